"""``python -m portattn.cli`` is ``portattn``."""

from portattn.cli import main

if __name__ == "__main__":  # benchmarks start processes that import this module
    main()
