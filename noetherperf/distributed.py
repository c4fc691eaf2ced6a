"""The public name of noetherperf.optim.distributed: `from noetherperf.distributed import ...`."""

import sys

from noetherperf.optim import distributed

sys.modules[__name__] = distributed
