"""The public name of noetherperf.optim.distributed: `from noetherperf.distributed import ...`."""

import sys

from noetherperf.optim import distributed
from noetherperf.optim.distributed import *  # noqa: F403 (seen by what reads code without running it)

sys.modules[__name__] = distributed
