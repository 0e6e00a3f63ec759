"""``python -m trigate`` runs the command line; without arguments, ``trigate serve``."""

from __future__ import annotations

import sys

from trigate.cli.commands import main

if __name__ == "__main__":
    main(sys.argv[1:] or ["serve"], prog_name="trigate")
