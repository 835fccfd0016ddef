"""Tell which sizes follow from values, as the length of speech follows from durations that a network predicts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normswap.errors import NeedsExampleInput
from normswap.networks.copying import copy_model
from normswap.networks.network import Network
from normswap.networks.randomness import normal
from normswap.networks.surroundings import Surroundings
from normswap.planning.plan import Plan
from normswap.tracing.facts import Trace
from normswap.tracing.forward import trace
from normswap.tracing.recorder import Shapes

PASSES = 3
"""Passes with other values, of which each may by chance come to the same sizes."""


def disturbed(network: Network, plan: Plan, given: Trace, around: Surroundings | None = None) -> Iterator[Trace]:
    """Yield passes like a given one in which the plan's norms put out other values: theirs, and as much noise.

    None where the given pass needed no data: no size follows from values then.

    Args:
        network: The network before conversion or after it; copies run.
        plan: What tells its norms.
        given: A pass of it.
        around: What the network's code reaches outside of it, where that is known already.
    """
    changed = [entry.name for entry in plan.norms if entry.changes]
    reached = [entry.name for entry in plan.norms if entry.shape is not None]
    for seed in range(PASSES if given.with_data else 0):
        twin = Network(copy_model(network.model))
        hook = _noise(torch.Generator().manual_seed(seed))
        for norm in map(twin.slots.__getitem__, changed):
            if not isinstance(norm, torch.jit.ScriptModule):
                norm.register_forward_hook(hook)
        try:
            yield trace(twin, given.example, until=reached, edges=False, with_data=True, around=around)
        except NeedsExampleInput:  # its own code does not run with such values
            continue


def _noise(generator: torch.Generator) -> Callable[[nn.Module, Any, Any], Any]:
    def noisy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor + normal(tensor.shape, generator).to(tensor) * tensor.std(correction=0)

    return lambda _module, _args, output: tree_map_only(Tensor, noisy, output)


def agree(wanted: Shapes, found: Shapes, passes: Sequence[Shapes], *, in_part: bool = False) -> bool:
    """Tell whether shapes are the same but for sizes that differ between passes of one network.

    >>> agree(((2, 7, 16),), ((2, 5, 16),), [((2, 7, 16),), ((2, 9, 16),)])
    True

    Args:
        wanted: The shapes of a module's outputs that are expected.
        found: Those that were met.
        passes: Those of several passes of one network.
        in_part: Whether more may be found than is wanted.
    """
    every = (wanted, found, *passes)
    in_order = not in_part and len({tuple(map(len, shapes)) for shapes in every}) == 1
    sizes = [_sizes(shapes, in_order=in_order) for shapes in passes]
    moving = {place for one in sizes for place in one if any(one[place] != other.get(place) for other in sizes)}

    def fixed(shapes: Shapes) -> Iterable[tuple[int, ...]]:
        return [
            tuple(-1 if (where, axis) in moving else size for axis, size in enumerate(shape))
            for where, shape in _placed(shapes, in_order=in_order)
        ]

    ours, theirs = fixed(wanted), fixed(found)
    return ours == theirs if in_order else set(ours) <= set(theirs) if in_part else set(ours) == set(theirs)


def _sizes(shapes: Shapes, *, in_order: bool) -> dict[tuple[int, int], set[int]]:
    sizes: dict[tuple[int, int], set[int]] = {}
    for where, shape in _placed(shapes, in_order=in_order):
        for axis, size in enumerate(shape):
            sizes.setdefault((where, axis), set()).add(size)
    return sizes


def _placed(shapes: Shapes, *, in_order: bool) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield shapes with what stands for the same output in another pass: their position, else their number of axes."""
    return ((index if in_order else len(shape), shape) for index, shape in enumerate(shapes))
