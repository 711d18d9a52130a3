"""`python -m trl_gopd.cli`, which `accelerate launch -m` can start."""

import sys

from . import main


if __name__ == "__main__":
    sys.exit(main())
