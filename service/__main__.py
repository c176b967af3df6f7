"""`python -m service` is `vitrine`."""

import sys

from service.cli import main

sys.exit(main())
