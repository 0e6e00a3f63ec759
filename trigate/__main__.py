"""``python -m trigate`` is ``trigate``; without arguments it serves."""

from __future__ import annotations

import sys

from trigate.cli.commands import main

if __name__ == "__main__":
    main(sys.argv[1:] or ["serve"], prog_name="trigate")
