"""The public name of noetherperf.optim.control: `from noetherperf.control import ...`."""

import sys

from noetherperf.optim import control
from noetherperf.optim.control import *  # noqa: F403 (seen by what reads code without running it)

sys.modules[__name__] = control
