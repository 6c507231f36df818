"""The entry point of `python -m fastrlhf`, which torchrun starts."""

import sys

from fastrlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
