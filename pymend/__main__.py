"""``python -m pymend`` is the command ``pymend``."""

import sys

from pymend.cli import main

sys.exit(main())
