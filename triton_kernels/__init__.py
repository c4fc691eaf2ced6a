"""The step, its moments and the laws as Triton kernels; installed as `noetherperf.triton_kernels`.

Mirrors csrc: the same mathematics with the same names in the same order.
"""
