"""``python -m lightning_sym``: the same as the command ``lightning-sym``."""

import sys

from lightning_sym.cli import main

if __name__ == "__main__":
    sys.exit(main())
