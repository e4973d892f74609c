"""``python -m gppf_ds`` and ``deepspeed --module gppf_ds``."""

import sys

from gppf_ds.cli import main

sys.exit(main())
