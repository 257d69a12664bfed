"""``python -m dmm``, the same as ``dmm``."""

import sys

from dmm.cli import main

sys.exit(main())
