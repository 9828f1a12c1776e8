"""``python -m ensembler.cli``: what the demo and tests start as a process of its own."""

import sys

from ensembler.cli import main

if __name__ == "__main__":
    sys.exit(main())
