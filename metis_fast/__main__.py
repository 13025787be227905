"""`python -m metis_fast` is `metis-fast`."""

import sys

from metis_fast.cli import main

sys.exit(main())
