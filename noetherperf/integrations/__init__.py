"""Training libraries: one small file for each, the only one that imports the library.

accelerate needs no file: `unwrap(optimizer)` is the MeasuredOptimizer inside what `accelerator.prepare` returned.
"""

from noetherperf.integrations.watch import unwrap

__all__ = ["unwrap"]
