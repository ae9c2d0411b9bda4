"""python -m stream_engine: the same as the command stream-engine."""

import sys

from stream_engine.cli.main import main

sys.exit(main())
