"""The public name of noetherperf.optim.control: `from noetherperf.control import ...`."""

import sys

from noetherperf.optim import control

sys.modules[__name__] = control
