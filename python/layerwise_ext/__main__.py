"""``python -m layerwise_ext``."""

import sys

from layerwise_ext.cli import main

sys.exit(main())
