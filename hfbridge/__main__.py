"""`python -m hfbridge`: the same as the command `hfbridge`."""

import sys

from hfbridge.cli import main

sys.exit(main())
