"""`python -m tritter`: the command `tritter`."""

import sys

from tritter.cli import main

if __name__ == "__main__":
    sys.exit(main())
