"""`python -m broker` equals `broker`."""

import sys

from broker.cli import main

sys.exit(main())
