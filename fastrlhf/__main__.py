"""`python -m fastrlhf`, which is what torchrun starts."""

import sys

from fastrlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
