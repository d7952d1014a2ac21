"""`python -m safelora`."""

import sys

from .cli import main

sys.exit(main())
