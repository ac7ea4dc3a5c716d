"""``python -m immunize_ext`` is the command ``immunize``."""

import sys

from immunize_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
