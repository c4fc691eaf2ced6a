"""The settings of a training run: plain data, which need no torch, so that the command line's help is quick."""

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from noetherperf.optim.adam import Adam
    from noetherperf.optim.sgd import SGD

__all__ = ["OPTIMIZERS", "OPTIONS", "SettingError", "Settings"]


class SettingError(ValueError):
    """A setting cannot be used.

    Args:
        setting: Its name.
        why: Why not, and what to do.
    """

    def __init__(self, setting: str, why: str) -> None:
        super().__init__(f"{setting}: {why}")
        self.setting, self.why = setting, why


class Choice(NamedTuple):
    """An optimizer, by its home and name, and its options with the values for a training of these recipes."""

    home: str
    name: str
    options: Mapping[str, Any]

    @property
    def make(self) -> "type[SGD] | type[Adam]":
        """The optimizer's class."""
        made: type[SGD] | type[Adam] = getattr(importlib.import_module(f"noetherperf.optim.{self.home}"), self.name)
        return made


OPTIMIZERS: Mapping[str, Choice] = {
    "sgd": Choice("sgd", "SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": False}),
    "adam": Choice("adam", "Adam", {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}),
    "adamw": Choice("adam", "AdamW", {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-2}),
}
OPTIONS = tuple(dict.fromkeys(name for choice in OPTIMIZERS.values() for name in choice.options))
DTYPES = ("float32", "float64")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run. Two runs on one machine with equal settings give equal numbers.

    Args:
        optimizer: One of OPTIMIZERS.
        lr, momentum, nesterov, betas, weight_decay: As in torch's optimizer; None: the value in OPTIMIZERS.
        epochs: Passes over the training images.
        batch_size: Images in a step; the last step of an epoch may have fewer.
        seed: Draws the split of the data, the initial parameters, the batches and dropout's masks.
        backend: One of `noetherperf.backends()`, or "auto".
        every: Steps between two records of the charges.
        device: Where to train.
        dtype: Dtype of parameters and images, one of DTYPES.

    Raises:
        SettingError: A number is out of range, the optimizer or dtype is unknown, or the optimizer has no such option.
    """

    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    epochs: int = 40
    batch_size: int = 32
    seed: int = 0
    backend: str = "auto"
    every: int = 5
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "every"):
            if getattr(self, name) < 1:
                raise SettingError(name, f"must be at least 1, not {getattr(self, name)}")
        for name, known in (("optimizer", OPTIMIZERS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise SettingError(name, f"there is no {getattr(self, name)!r}; there are: {', '.join(known)}")
        own = OPTIMIZERS[self.optimizer].options
        for name in self._given:
            if name not in own:
                raise SettingError(name, f"{self.optimizer} has none; it has {', '.join(own)}")
        for name in ("lr", "momentum", "weight_decay"):
            if not self.options.get(name, 0.0) >= 0:
                raise SettingError(name, f"must be at least 0, got {self.options[name]}")
        if not all(0 <= beta < 1 for beta in self.options.get("betas", ())):
            raise SettingError("betas", f"both must be at least 0 and below 1, got {self.options['betas']}")
        if self.nesterov and self.options["momentum"] == 0:
            raise SettingError("nesterov", "needs a momentum above 0")

    @property
    def _given(self) -> dict[str, Any]:
        """The optimizer's options that are given."""
        return {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}

    @property
    def options(self) -> dict[str, Any]:
        """The optimizer's options, those that are not given from OPTIMIZERS."""
        return {**OPTIMIZERS[self.optimizer].options, **self._given}

    @property
    def plain(self) -> dict[str, Any]:
        """All settings as plain data, the optimizer's options by their names."""
        rest = {name: value for name, value in asdict(self).items() if name not in OPTIONS}
        return {**rest, **self.options}
