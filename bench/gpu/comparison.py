"""One case on a device: the variants that can run it, the gate before them, their rounds and figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.cases import Case
from bench.cells import PLAIN
from bench.correctness import Mismatch, check
from bench.gpu.cases import MAX_COMPILED
from bench.gpu.device import Device, GpuRounds, host_seconds, launches
from bench.inputs import InputSet, make_input_set, n_sets
from bench.iterations import timed
from bench.networks import TASKS
from bench.timing import Rounds, Step, figures, ratios
from bench.training import TRAIN
from bench.variants import VARIANTS, Unavailable, Variant, one_line, ours

LEAST_ROUNDS = 7
TRAIN_SECONDS = 5.0  # for the rounds of training

PEERS = ("fused", "foreach", "compiled")
MEASURING_PEERS = ("fused", "probed", "eager", "compiled_measured")


# ---- variants -------------------------------------------------------------------------------------------------------


def names_for(case: Case, backends: Sequence[str]) -> list[str]:
    """The variants that a case compares."""
    if case.suite == "host":
        return [*backends, "fused", "foreach"]
    if case.view == "none":
        return [*backends, *PEERS]
    return [*(name for backend in backends for name in (backend, backend + PLAIN)), *MEASURING_PEERS]


def variant_of(name: str) -> Variant:
    """A peer of bench.variants, or a backend of noetherperf."""
    if name in VARIANTS:
        return VARIANTS[name]
    backend = name.removesuffix(PLAIN)
    return Variant(VARIANTS["ours"].make, {"measuring": backend == name, "backend": backend})


def copies(case: Case, device: Device) -> list[Step]:
    """Copies on the device that read and write as many bytes together as the case's step, in memory of their own."""
    n = max(1, case.bytes_moved // 2)
    n_pairs = max(1, -(-4 * device.cache // (2 * n))) if n < 4 * device.cache else 1
    pairs = [torch.zeros(2, n, dtype=torch.uint8, device=device.device) for _ in range(min(n_pairs, 64))]

    def copy(source: torch.Tensor, target: torch.Tensor) -> Step:
        return lambda: target.copy_(source)

    return [copy(pair[i], pair[1 - i]) for i in range(2) for pair in pairs]


# ---- a case ---------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Runs cases on a device; keeps input sets for the next case if it has the same tensors."""

    device: Device
    case_seconds: float = 1.2  # for a case's rounds
    _key: tuple[object, ...] = ()
    _sets: list[InputSet] = field(default_factory=list)

    def sets(self, case: Case) -> list[InputSet]:
        key = (case.shapes, case.dtype, case.recipe.is_squared)
        if key != self._key:
            self.forget()
            n = n_sets(case, 2 * self.device.cache, self.device.memory)
            self._sets = [make_input_set(case, i, self.device.device) for i in range(n)]
            self._key = key
        return self._sets

    def forget(self) -> None:
        """Free the input sets."""
        self._key, self._sets = (), []
        self.device.forget()

    def run(self, case: Case) -> dict[str, Any]:
        """Check and time one case.

        Raises:
            TooLarge: It does not fit into the device's memory.
        """
        if case.suite == TRAIN:
            return self.train(case)
        sets = self.sets(case)
        steps, reasons, wrong = self.admit(case, sets)
        steps["copy"] = copies(case, self.device)
        for step in steps["copy"]:
            step()
        host = {name: host_seconds(variant, self.device) for name, variant in steps.items()}
        rounds: Rounds = GpuRounds(steps, host) if self.device.is_gpu else Rounds(steps)
        rounds.compare("copy", self.case_seconds, LEAST_ROUNDS)
        counted = [name for name in steps if name in (*self.device.backends, "fused")]
        return {
            **case.described(),
            "input sets": len(sets),
            "rounds": rounds.n_rounds,
            "steps timed together": rounds.repeats,
            "figures": self.figures(rounds.times),
            "host seconds": {name: float(f"{x:.4g}") for name, x in host.items()},
            "launches": {name: launches(steps[name][0]) for name in counted} if self.device.is_gpu else {},
            "not run": reasons,
            "wrong": wrong,
        }

    def train(self, case: Case) -> dict[str, Any]:
        """Time whole iterations.

        Raises:
            TooLarge: They do not fit into the device's memory.
        """
        self.forget()
        batch = TASKS[case.model].described(self.device.device)
        empty: dict[str, Any] = {"batch": batch, "figures": {}, "host seconds": {}, "launches": {}, "not run": {}}
        try:
            found = timed(case, self.device.memory, TRAIN_SECONDS, LEAST_ROUNDS, device=self.device.device)
        except Mismatch as error:
            wrong = {name: str(error) for name in self.device.backends[:1]}
            return {**case.described(), **empty, "wrong": wrong}
        return {**case.described(), **empty, **found, "wrong": {}}

    def figures(self, times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, list[float]]]:
        """Per variant its seconds, what fraction of the copy's bandwidth it reaches, and its multiples of others."""
        backends = self.device.backends
        found = figures(times, ["fused", *backends, *(backend + PLAIN for backend in backends)])
        for name, values in times.items():
            found[name]["of copy"] = ratios({"copy": times["copy"], name: values}, name)["copy"]
        return {name: {key: spread.rounded() for key, spread in one.items()} for name, one in found.items()}

    def admit(self, case: Case, sets: list[InputSet]) -> tuple[dict[str, list[Step]], dict[str, str], dict[str, str]]:
        """The variants that can run the case, why others cannot, and which of ours compute something wrong.

        Each of them has stepped twice, so that its setup is over.
        """
        admitted: dict[str, list[Step]] = {}
        reasons: dict[str, str] = {}
        wrong: dict[str, str] = {}
        for name in names_for(case, self.device.backends):
            variant = variant_of(name)
            if variant.compiles and len(case.shapes) > MAX_COMPILED:
                reasons[name] = f"unrolled over {len(case.shapes)} tensors it would compile for too long"
                continue
            try:
                if name not in VARIANTS:
                    check(case, sets[0], ours(case, sets[0], **variant.how))
                steps = variant.make(case, sets, **variant.how)
                for _ in range(2):
                    for step in steps:
                        step()
                self.device.synchronize()
            except Mismatch as error:
                wrong[name] = str(error)
            except Unavailable as error:
                reasons[name] = str(error)
            except Exception as error:
                reasons[name] = one_line(error)
                if name not in VARIANTS:
                    wrong[name] = reasons[name]
                self.device.forget()
            else:
                admitted[name] = steps
        return admitted, reasons, wrong
