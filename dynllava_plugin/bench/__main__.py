"""`python -m dynllava_plugin.bench`, the same as `dynllava bench`."""

import sys

from dynllava_plugin.bench.command import main

sys.exit(main())
