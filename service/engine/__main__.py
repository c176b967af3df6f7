"""`python -m service.engine SOCKET FOLDER`: the engine process (see loop.py)."""

import sys

from service.engine.loop import main

sys.exit(main())
