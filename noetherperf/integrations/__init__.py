"""Training libraries: one small file for each, which imports the library; nothing else here does.

accelerate needs none: `unwrap(optimizer)` is the measured optimizer inside what `accelerator.prepare` returned.
"""

from noetherperf.integrations.watch import unwrap

__all__ = ["unwrap"]
