"""Norms of every unit or every tensor of a model: `neurons` and `layers`. They claim no symmetry."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from noetherperf.symmetry.kinds import Norm, Symmetry
from noetherperf.symmetry.part import Part

if TYPE_CHECKING:
    from torch import nn

__all__ = ["layers", "neurons"]


def neurons(model: "nn.Module") -> tuple[Symmetry, ...]:
    """The squared norm and its budget for every unit of every module that has a weight of two or more axes.

    A group is an output unit: a row of a linear map or an embedding, a filter of a convolution, with its bias. Frozen
    parameters are left out. Shared ones are listed once, under the name that `named_parameters()` gives them.

    Args:
        model: Any model.

    Returns:
        A Norm for each such weight, with the module's name. If the weight is not called "weight", the Norm's name is
        "parameter[axis]".

    Raises:
        ValueError: A parameter is lazy and has no shape yet, or the units of a grouped transposed convolution are no
            slices of its weight.
    """
    parameters = dict(_trainable(model))
    found: list[Symmetry] = []
    for name, parameter in parameters.items():
        if parameter.ndim < 2:
            continue
        prefix, _, own_name = name.rpartition(".")
        part = _units(name, parameter, model.get_submodule(prefix))
        bias = ".".join(filter(None, (prefix, own_name.replace("weight", "bias"))))
        n_units = part.n_groups(parameter.shape)
        has_bias = bias in parameters and tuple(parameters[bias].shape) == (n_units,)
        parts = [part, Part(bias, axis=0)] if has_bias else [part]
        found.append(Norm(prefix if prefix and own_name == "weight" else f"{name}[{part.axis}]", parts))
    return tuple(found)


def _units(name: str, parameter: "nn.Parameter", module: "nn.Module") -> Part:
    """The output units of a weight: axis 0, except in transposed convolutions, with weights [in, out / groups, ...]."""
    from torch import nn

    if not isinstance(module, nn.modules.conv._ConvTransposeNd) or parameter is not module.weight:
        return Part(name, axis=0)
    if module.groups == 1:
        return Part(name, axis=1)
    if parameter.shape[1] == 1:  # depthwise: output unit i is the i-th block of in / groups rows
        return Part(name, axis=0, fold=parameter.shape[0] // module.groups)
    raise ValueError(
        f"parameter {name!r}: with groups={module.groups} and {parameter.shape[1]} outputs each, an output unit of a "
        "transposed convolution is a block of rows in one column, which no Part describes; use layers(model), or "
        "write the Norms of the other modules by hand"
    )


def layers(model: "nn.Module") -> tuple[Symmetry, ...]:
    """The squared norm and its budget for every parameter tensor.

    Frozen parameters are left out. Shared ones are listed once, under the name that `named_parameters()` gives them.

    Args:
        model: Any model.

    Returns:
        A Norm of one group for each parameter, with the parameter's name.

    Raises:
        ValueError: A parameter is lazy and has no shape yet.
    """
    return tuple(Norm(name, [Part(name, axis=None)]) for name, _ in _trainable(model))


def _trainable(model: "nn.Module") -> "Iterator[tuple[str, nn.Parameter]]":
    from torch import nn

    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameter {name!r} is lazy and has no shape yet; run the model once on an example first")
        if parameter.requires_grad and parameter.numel():
            yield name, parameter
