"""``python -m unionfs2`` is the command ``unionfs2``."""

import sys

from unionfs2.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
