# PYTHON_ARGCOMPLETE_OK
"""`python -m irg_jax`: the same as the console command `irg`."""

import sys

from irg_jax.commands import main

sys.exit(main())
