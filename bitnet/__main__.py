"""`python -m bitnet`: the `bitnet` command where scripts are not on the PATH."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
