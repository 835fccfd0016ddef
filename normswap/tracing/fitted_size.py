"""Find the size of an input for which a network's head fits: a linear layer takes as many features as are flattened."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normswap.networks.copying import in_mode, meta_copy
from normswap.networks.inputs import as_call, tensors_in
from normswap.networks.surroundings import undisturbed

FIRST, LARGEST = 32, 2048
"""First and longest side that are tried."""


def fitted(model: nn.Module, example: Any) -> Iterator[tuple[Tensor, ...]]:
    """Yield an example of meta tensors of one shape, resized so that the linear layer that it did not fit takes it.

    The features that a layer is given grow with the sides, so a few passes without data find the size: of all sides
    together, then of the last one alone.

    Args:
        model: The network; it is only read.
        example: An example with which a pass failed.
    """
    tensors, args = list(tensors_in(example)), as_call(example)[0]
    alike = len(args) == len(tensors) and len({tuple(tensor.shape) for tensor in tensors}) == 1
    if not alike or tensors[0].ndim < 3 or not tensors[0].is_floating_point():
        return
    copy = in_mode(meta_copy(model), False)
    batch, channels, *sides = tensors[0].shape
    with undisturbed(model), torch.no_grad():
        for fixed in dict.fromkeys(((), tuple(sides[:-1]))):
            free = len(sides) - len(fixed)
            if (side := _side(copy, tensors[0], len(args), (batch, channels, *fixed), free)) is not None:
                yield (tensors[0].new_empty(batch, channels, *fixed, *(side,) * free),) * len(args)


def _side(model: nn.Module, like: Tensor, count: int, before: tuple[int, ...], free: int) -> int | None:
    """Return the smallest side with which features are as many as a layer takes: doubling, then bisection."""

    def short(side: int) -> bool | None:
        return _short(model, (like.new_empty(*before, *(side,) * free),) * count)

    low, high = 1, FIRST
    while (found := short(high)) is True and high < LARGEST:
        low, high = high + 1, 2 * high
    while found is not None and low < high:
        middle = (low + high) // 2
        if (found := short(middle)) is not None:
            low, high = (middle + 1, high) if found else (low, middle)
    return low if found is not None and low < LARGEST else None


def _short(model: nn.Module, args: tuple[Tensor, ...]) -> bool | None:
    """Tell whether an input is too small: it does not get as far as a linear layer, or gives one too few features.

    None where a pass fails for another reason.
    """
    reached: list[tuple[int, int]] = []

    def entering(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        given = next(iter(tensors_in(inputs)), None)
        if given is not None and given.ndim:
            reached.append((given.shape[-1], layer.in_features))  # type: ignore[arg-type]

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(entering) for layer in layers]
    try:
        model(*args)
    except Exception:  # whatever the network's own code does with a size
        given, wanted = reached[-1] if reached else (0, 1)
        return None if given == wanted else given < wanted
    else:
        return False
    finally:
        for hook in hooks:
            hook.remove()
