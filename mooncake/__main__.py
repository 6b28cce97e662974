"""`python -m mooncake` is the `mooncake` command; the supervisor starts its children so."""

from __future__ import annotations

import sys

from mooncake.cli import main

if __name__ == "__main__":
    sys.exit(main())
