"""Show by running which norms stand behind causal layers: what they read at one position does not depend on later ones.

GroupNorm takes statistics over all positions, so behind it every one depends on the later ones, and a stream that is
processed piece by piece is not what is computed at once.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normswap.networks.copying import copy_model, in_mode
from normswap.networks.hooks import watching
from normswap.networks.inputs import call, first_sample, fresh, materialize, reference, tensors_in
from normswap.networks.network import Network
from normswap.networks.randomness import normal, seed_all
from normswap.networks.surroundings import undisturbed
from normswap.tracing.facts import Trace

PADS = frozenset(["constant_pad_nd", "cat"])
"""Operators by which causal layers see nothing but what came before, a cache of it included."""

SHORTER = (1, 2, 3)
"""Positions that are left off: layers with strides up to 4 then meet their own padding."""

MOST = 2**20
"""Values of an input beyond which it is not run."""

TOLERANCE = 1e-5


@torch.no_grad()
def causal_norms(network: Network, trace: Trace, names: Iterable[str]) -> list[str]:
    """Return the norms whose input depends, along one axis, on what came before and not on what comes later.

    A copy of the unconverted network runs on random values: as they are, with others in the later half of an axis, with
    others in the earlier half, and without the last few. Norms at which every position stands alone are not among them,
    nor are those behind strided layers with padding on both sides, which at some sizes do not meet the later one.

    Args:
        network: The unconverted network.
        trace: What a forward pass showed.
        names: The norms that are asked about.
    """
    names = [name for name in names if len(trace.norms[name].shape) > 2]
    if not names or not _may_be_causal(trace, names):
        return []
    like = reference(network.model)
    main = next((t for t in tensors_in(trace.inputs) if t.is_floating_point()), None)
    if like.is_meta or main is None or main[:1].numel() > MOST:
        return []
    found: dict[str, None] = {}
    with undisturbed(network.model), torch.compiler.set_stance("force_eager"):
        try:
            example = materialize(first_sample(trace.example, trace.samples), like.device, like.dtype, seed=0)
            before = _inputs(network, names, example)
            for axis in range(1, main.ndim):
                if main.shape[axis] > 3:
                    later, earlier = (
                        _inputs(network, names, _changed(example, axis, main.shape[axis], later=part))
                        for part in (True, False)
                    )
                    causal = list(_causal(before, later, earlier))
                    for less in SHORTER if causal else ():
                        shorter = _shortened(example, axis, main.shape[axis], less)
                        cut = _inputs(network, causal, shorter, to_the_end=False)
                        causal = [name for name in causal if name not in cut or _begins(before[name], cut[name])]
                    found |= dict.fromkeys(causal)
        except (Exception, SystemExit):  # whatever the network's own code does with them
            return []
    return [name for name in names if name in found]


def _may_be_causal(trace: Trace, names: list[str]) -> bool:
    """Tell whether it is worth a run: norms of a series, or padding by an operator, as causal layers on maps do it."""
    if any(len(trace.norms[name].shape) == 3 for name in names):
        return True
    return any(node.name in PADS for graph in trace.graphs for node in graph.nodes)


def _inputs(network: Network, names: list[str], example: Any, *, to_the_end: bool = True) -> dict[str, Tensor]:
    """Return what norms read, by name, of their first call; of a pass that need not reach the end, those before it."""
    copy = Network(in_mode(copy_model(network.model), False))
    seen: dict[str, Tensor] = {}

    def look(name: str, _norm: nn.Module, x: Tensor) -> None:
        seen.setdefault(name, x.clone())

    seed_all(0)
    with watching({name: copy.slots[name] for name in names}, look):
        try:
            call(copy.model, fresh(example))
        except Exception:  # of a network that is made for inputs of one size
            if to_the_end:
                raise
    return seen


def _changed(example: Any, axis: int, size: int, *, later: bool) -> Any:
    """Return the example with other values in one half of an axis of the tensors that have it."""
    generator = torch.Generator().manual_seed(1)

    def other(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not _has(tensor, axis, size):
            return tensor
        noise = normal(tensor.shape, generator).to(tensor)
        start, length = (size // 2, size - size // 2) if later else (0, size // 2)
        changed = tensor.clone()
        changed.narrow(axis, start, length).copy_(noise.narrow(axis, start, length))
        return changed

    return tree_map_only(Tensor, other, example)


def _shortened(example: Any, axis: int, size: int, less: int) -> Any:
    """Return the example without the last positions of an axis of the tensors that have it."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor.narrow(axis, 0, size - less) if _has(tensor, axis, size) else tensor

    return tree_map_only(Tensor, cut, example)


def _has(tensor: Tensor, axis: int, size: int) -> bool:
    return tensor.ndim > axis and tensor.shape[axis] == size


def _begins(whole: Tensor, part: Tensor) -> bool:
    """Tell whether one input of a norm begins with another, of fewer positions."""
    if part.ndim != whole.ndim or any(size > most for size, most in zip(part.shape, whole.shape, strict=True)):
        return False
    start = whole[tuple(slice(size) for size in part.shape)]
    return float((start - part).abs().amax()) <= TOLERANCE * float(whole.abs().amax())


def _causal(before: Mapping[str, Tensor], later: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the norms at which an axis shows nothing of later inputs earlier, and something of earlier ones later."""
    for name, x in before.items():
        if name not in later or name not in earlier or later[name].shape != x.shape or earlier[name].shape != x.shape:
            continue
        for axis in range(2, x.ndim):
            size = x.shape[axis]
            if size < 4 or _differs(x, later[name], axis, 0, size // 2):
                continue
            half = (size + 1) // 2
            if _differs(x, earlier[name], axis, half, size) and _differs(x, later[name], axis, half, size):
                yield name


def _differs(x: Tensor, y: Tensor, axis: int, start: int, stop: int) -> bool:
    one, other = (values.narrow(axis, start, stop - start) for values in (x, y))
    return float((one - other).abs().amax()) > TOLERANCE * float(x.abs().amax())
