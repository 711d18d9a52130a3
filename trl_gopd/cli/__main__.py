"""Entry point of `python -m trl_gopd.cli`, so that `accelerate launch -m trl_gopd.cli` can start the command."""

import sys

from . import main


if __name__ == "__main__":
    sys.exit(main())
