"""``python -m pymend`` is the command ``pymend``."""

import sys

from pymend.commands import main

sys.exit(main())
