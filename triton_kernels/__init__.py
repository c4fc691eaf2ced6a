"""The two stages of a step as Triton kernels; installed as `noetherperf.triton_kernels`.

Stage 1 (stage_1.py) walks tiles: blocks.py steps a block of elements by a rule's update (rules/), moments.py sums it,
tiles.py has the order of the walk, slices.py the stores to the workspace, options.py the compile options. Stage 2
(stage_2.py) walks spans: it adds the slices (spans.py) and advances the laws by the numbers of a row (rows.py).

Mirrors csrc, with the same names in the same order: plan.py csrc/plan.h, moments.py csrc/moments.h, rows.py
csrc/rows.h, rules/ csrc/rules/.
"""
