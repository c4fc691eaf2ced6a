"""The step, its moments and the laws as Triton kernels; installed as `noetherperf.triton_kernels`.

Mirrors csrc: the same mathematics with the same names in the same order. plan.py mirrors csrc/plan.h, step.py
csrc/step.h, laws.py csrc/laws.h; launch.py holds the two kernels and starts them.
"""
