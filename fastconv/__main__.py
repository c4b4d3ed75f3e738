"""`python -m fastconv`."""

from __future__ import annotations

import sys

from fastconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
