"""Whether a network that `load` is given computes what the saved one did, by a few numbers of every layer's output.

A file of weights says nothing of strides, padding, activations, hooks, or of a forward: these are the given network's.
"""

import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from normswap.errors import CheckpointError, PlanMismatch, described
from normswap.networks.copying import copy_model, in_mode
from normswap.networks.inputs import call, fresh, materialize, rebuild, reference, tensors_in
from normswap.networks.network import Network
from normswap.networks.randomness import normal, same_randomness, seed_all
from normswap.networks.sharing import sparing
from normswap.networks.surroundings import undisturbed
from normswap.planning.schema import number, text
from normswap.tracing.dispatch import Endless
from normswap.tracing.meta_results import DECISIONS
from normswap.tracing.operators import base_name

VALUES = 4096
"""Values of an output that are looked at."""

WAVES = 4
"""Sums of them that are taken, with weights that no output is likely to know of."""

TOLERANCE, COARSE = 1e-2, 1e-1
"""Largest difference allowed, relative to the output's size; the second in 16 bits. Rounding stays far below."""

ROUNDING = 1e-4
"""Share by which inputs are moved, more than another machine rounds: what ranks or cuts off by close values shows."""

HUGE = 1e300
"""No size or sum is as large; what a file says may be, and be a whole number that no float holds."""

MOST_DECISIONS = 1000
"""Values that a pass hands to Python, which may decide by them; a loop that waits for one hands on and on."""

INPUT = "."
"""Stands for the network's input, among names of layers."""

Traits = dict[str, list[float]]
"""Size and weighted sums of every layer's first output, by name, in the order in which the layers were done."""


def traits_of(model: nn.Module, inputs: Any) -> Traits:
    """Return what tells the outputs of a network's layers from others, on made-up inputs in eval mode.

    Layers that draw random numbers or remember are left out, and those that put out something else where inputs are
    hardly moved: another machine rounds differently. A network that does not run on such inputs shows nothing.

    Args:
        model: The network, of which a copy runs.
        inputs: Shapes and types of its inputs, as a plan holds them.
    """
    try:
        with undisturbed(model):
            return sparing(lambda: _steady(model, inputs))
    except (Exception, Endless):  # whatever the network's own code does with them
        return {}


def must_be_alike(model: nn.Module, inputs: Any, saved: Any, where: str) -> None:
    """Raise unless the layers of a network put out what those of the saved one did.

    Args:
        model: The loaded network.
        inputs: Shapes and types of its inputs, as the plan holds them.
        saved: What `traits_of` returned, as the checkpoint has it.
        where: The checkpoint.

    Raises:
        CheckpointError: That is no such thing.
        PlanMismatch: With the first layer that computes something else, or does not run.
    """
    if not _are_traits(saved):
        raise CheckpointError(f"{where}: what its layers put out cannot be {saved!r:.60}; save the checkpoint again")
    if not saved or any(p.is_meta for p in model.parameters()):
        return
    advice = "pass the network with the strides, padding, activations, hooks and forward that the saved one had"
    try:
        with undisturbed(model):
            found = sparing(lambda: _traits(model, inputs, seed=0))
    except (Exception, Endless) as error:  # whatever the network's own code does
        raise PlanMismatch(f"the network does not run as the saved one did ({described(error)}); {advice}") from error
    small = any(p.is_floating_point() and p.itemsize < 4 for p in model.parameters())
    tolerance = COARSE if small else TOLERANCE
    if not _alike(found[INPUT], saved.get(INPUT, []), tolerance):
        return  # other random numbers
    for name, traits in saved.items():
        if name not in found:
            raise PlanMismatch(f"{name or 'the network'}: ran in the saved network and does not in this one; {advice}")
        if not _alike(found[name], traits, tolerance):
            raise PlanMismatch(f"{name or 'the network'}: puts out something else than the saved one did; {advice}")


class _Bounded(TorchDispatchMode):
    """End a pass that loops on, waiting for values of data."""

    def __init__(self) -> None:
        super().__init__()
        self._decisions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        self._decisions += base_name(func) in DECISIONS
        if self._decisions > MOST_DECISIONS:
            raise Endless
        return func(*args, **(kwargs or {}))


def _steady(model: nn.Module, inputs: Any) -> Traits:
    """Return the traits that are the same whatever is drawn and however inputs are rounded."""
    first, second = _traits(model, inputs, seed=0), _traits(model, inputs, seed=1, moved=True)
    return {name: own for name, own in first.items() if text(name) and _alike(own, second.get(name, []), TOLERANCE)}


def _traits(model: nn.Module, inputs: Any, *, seed: int, moved: bool = False) -> Traits:
    copy = Network(in_mode(copy_model(model), False))
    like = reference(copy.model)
    example = materialize(rebuild(inputs), like.device, like.dtype, seed=0)
    example = tree_map_only(Tensor, _moved, example) if moved else example
    found: Traits = {INPUT: _traits_in(example)}
    for name, module in copy.modules.items():
        module.register_forward_hook(partial(_note, found, name))
    with torch.no_grad(), same_randomness(like.device), _Bounded():
        seed_all(seed)
        call(copy.model, fresh(example))
    return {name: traits for name, traits in found.items() if all(map(math.isfinite, traits))}


def _moved(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    noise = normal(tensor.shape, torch.Generator().manual_seed(1)).to(tensor)
    return tensor * (1 + max(ROUNDING, torch.finfo(tensor.dtype).eps) * noise)


def _note(found: Traits, name: str, module: nn.Module, args: Any, output: Any) -> None:
    if name not in found:
        found[name] = _traits_in(output)


def _traits_in(value: Any) -> list[float]:
    """Return the size of the numbers that a value holds, and sums of them with weights of one and the same size."""
    tensors = [tensor.detach().flatten() for tensor in tensors_in(value) if tensor.is_floating_point()]
    few = [tensor[:: max(len(tensor) // VALUES, 1)][:VALUES].double().cpu() for tensor in tensors if len(tensor)]
    if not few:
        return [0.0] * (1 + WAVES)
    values = torch.cat(few)
    sums = (_waves(len(values)) @ values).tolist()
    return [float(f"{value:.6g}") for value in (float(values.norm()), *sums)]


@lru_cache(maxsize=16)
def _waves(length: int) -> Tensor:
    """Return weights for as many values, (WAVES, length), of one mean square."""
    numbers = partial(torch.arange, dtype=torch.float64, device="cpu")
    phases = numbers(1, WAVES + 1).outer(numbers(length).square())
    return 2**0.5 * (2**0.5 * phases).cos()


def _alike(one: list[float], other: list[float], tolerance: float) -> bool:
    if len(one) != len(other):
        return False
    size = max(one[0], other[0])
    return all(abs(a - b) <= tolerance * size for a, b in zip(one, other, strict=True))


def _are_traits(value: Any) -> bool:
    return isinstance(value, Mapping) and all(text(name) and _is_trait(own) for name, own in value.items())


def _is_trait(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 1 + WAVES and all(number(one) and abs(one) < HUGE for one in value)
