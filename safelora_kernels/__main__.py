"""``python -m safelora_kernels`` is the doctor."""

import sys

from .doctor import main

sys.exit(main())
