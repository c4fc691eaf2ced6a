"""The benchmarks on a GPU: the same cases and peers as on a CPU, timed by the device's own events.

    python -m bench.gpu --out gpu.json [--part bench-adamw] [--seconds 200] [--cases 'resnet50-*'] [--device cuda]

The device's time of a step is what lies between two events of its stream. A pause queued before the first one lets the
host run ahead, so that no launch is waited for in between; what the host takes for a step is timed apart. Input sets
rotate, so that no step finds its data in the L2 cache, and in every round a copy of as many bytes as the step moves is
timed too. The cases come in order of importance; the file is written again after each, and no case begins after
`--seconds`. On a CPU (`--device cpu`) the same is timed by the host's clock: the rehearsal, whose figures mean nothing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import noetherperf as nperf
from bench.gpu.cases import CASES_OF, chosen
from bench.gpu.comparison import Bench
from bench.gpu.device import Device
from bench.gpu.run import compile_kernels, run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="the JSON to write")
    what.add_argument("--compile", metavar="I/N", help="only compile, for every N-th case from the I-th on")
    parser.add_argument("--seconds", type=float, default=200.0, help="after so many no case begins")
    parser.add_argument("--case-seconds", type=float, default=Bench.case_seconds, help="for the rounds of each case")
    parser.add_argument("--part", default="", help=f"the cases of one part, of {', '.join(CASES_OF)}")
    parser.add_argument("--cases", default="", help="names or patterns of names, separated by commas")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    device = Device.of(options.device)
    if not device.backends:
        status = nperf.backends()
        reasons = "; ".join(f"{name}: {status[name]}" for name in ("cuda", "triton") if name in status)
        print(f"bench.gpu: no backend can run on {options.device} ({reasons})", file=sys.stderr)
        return 1

    cases = chosen(options.cases, options.part)
    if options.compile:
        first, step = map(int, options.compile.split("/"))
        compile_kernels(cases[first::step], device)
        return 0

    def write(result: dict[str, Any]) -> None:
        options.out.write_text(json.dumps(result))

    result = run(cases, Bench(device, options.case_seconds), options.seconds, write)
    for case in result["cases"]:
        for name, reason in case["wrong"].items():
            print(f"{case['case']}, {name}: {reason}", file=sys.stderr)
    return 1 if any(case["wrong"] for case in result["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
