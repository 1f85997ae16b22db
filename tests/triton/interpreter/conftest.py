"""These tests run Triton kernels in its interpreter, chosen when a kernel module is imported.

So they need TRITON_INTERPRET=1 from the start and a process of their own:
tests/triton/test_interpreter.py starts it, and in any other process they are not collected.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
