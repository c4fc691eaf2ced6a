"""Runs engines' tests with the sanitized kernels; tests/test_cuda_emulation.py starts it with the sanitizers loaded.

The first argument is the number of dtypes, the others are names in test_engines.TENSORS. The sanitizers end the process
at the first error.
"""

import sys
from typing import Any

import test_engines

import cuda_emulation
from noetherperf.engines.cuda import CudaEngine


def sanitized(*args: Any) -> CudaEngine:
    return CudaEngine(*args, module=cuda_emulation.load(sanitize=True))


if __name__ == "__main__":
    name = "cuda-sanitized"
    test_engines.ENGINES[name] = sanitized
    for tensor in sys.argv[2:]:
        for dtype in test_engines.DTYPES[: int(sys.argv[1])]:
            for rule, kit in test_engines.KITS.items():
                if test_engines.steps(name, kit.rule):
                    test_engines.test_step_moments_and_laws(rule, name, dtype, tensor)
    print("clean")
