"""``python -m portattn.cli`` is ``portattn``."""

from portattn.cli import main

main()
