"""What a plan warns of: what the trace met, and what torch does not see."""

from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.layers.norms import HOOKS
from normswap.networks.copying import meta_copy
from normswap.networks.network import Network
from normswap.networks.recognition import (
    fold_methods,
    is_batch_norm,
    is_registered_norm,
    is_unknown_norm,
    norm_parts,
    stray_norms,
)
from normswap.networks.references import strays
from normswap.planning.causality import causal_norms
from normswap.planning.choices import Action, Affine
from normswap.planning.entry import NormEntry
from normswap.planning.statistics import drowned
from normswap.tracing.facts import Trace
from normswap.tracing.modes import words


def plan_warnings(network: Network, norms: Mapping[str, NormEntry], trace: Trace) -> Iterator[str]:
    """Yield a line for everything about a network that its conversion does not change and that may surprise.

    Args:
        network: The network, unconverted.
        norms: The norms' entries by name.
        trace: What a forward pass showed.
    """
    yield from _of_the_pass(network, norms, trace)
    yield from _of_norms(network, norms)
    yield from _of_the_rest(network, norms, trace)


def _of_the_pass(network: Network, norms: Mapping[str, NormEntry], trace: Trace) -> Iterator[str]:
    """Yield a line for what norms meet."""
    if trace.stopped_by:
        yield f"the forward pass stopped after the last norm ({trace.stopped_by})"
    batch = trace.batch
    flattened = [n for n, facts in trace.norms.items() if facts.shape[0] != batch]
    if flattened:
        yield (
            f"{len(flattened)} norms see a flattened batch ({flattened[0]} and others): "
            "GroupNorm takes its statistics from one row of it, not from one sample"
        )
    whole = [n for n, e in norms.items() if e.action is Action.GROUP_NORM and not e.per_position and n in trace.norms]
    if causal := causal_norms(network, trace, whole):
        yield (
            f"{len(causal)} norms stand behind causal layers ({causal[0]}, …): GroupNorm's statistics run over all "
            "positions, so that earlier outputs depend on later inputs and a stream differs from the whole; "
            "over='channels' (--over channels) takes them at each position"
        )


def _of_norms(network: Network, norms: Mapping[str, NormEntry]) -> Iterator[str]:
    """Yield a line for what the plan makes of norms and may not be what was wanted."""
    kept = [name for name, entry in norms.items() if entry.by_user and not entry.changes]
    if live := [name for name in kept if _is_live(network, name)]:
        yield (
            f"{len(live)} norms that were kept still look at the batch in train mode and update their statistics "
            f"({live[0]}, …); keep='frozen' (--keep frozen) holds those that it can at the statistics they have"
        )
    frozen = [name for name, entry in norms.items() if entry.action is Action.FREEZE]
    if fresh := [name for name in frozen if not norm_parts(network.slots[name]).is_trained]:
        advice = "pass keep='live' (--keep live) to train them" if norms[fresh[0]].by_user else "train them first"
        yield (
            f"{len(fresh)} norms are frozen before they were trained ({fresh[0]}, …): they normalize nothing; {advice}"
        )
    for name, entry in norms.items():
        if entry.affine is Affine.MATCH and (lost := drowned(entry, network)):
            channels = f"channel {lost[0]}" + (f" and {len(lost) - 1} others" if lost[1:] else "")
            yield f"{name}: {channels} is lost in the rounding of louder ones in its group; more groups may keep it"
    never = [name for name, entry in norms.items() if entry.shape is None]
    if never:
        yield f"{len(never)} norms were never reached ({never[0]}, …); their convolutions stay plain"


def _of_the_rest(network: Network, norms: Mapping[str, NormEntry], trace: Trace) -> Iterator[str]:
    """Yield a line for what depends on the batch, on BatchNorm or on the original, and is none of its norms."""
    unknown = [name for name, module in network.modules.items() if is_unknown_norm(module)]
    if unknown:
        first = network.slots[unknown[0]]
        shape = tuple(first._buffers["running_mean"].shape)  # type: ignore[union-attr]
        yield (
            f"{len(unknown)} modules keep running statistics and are no known norms ({unknown[0] or network.kind}, a "
            f"{type(first).__name__} with statistics {shape}); they stay as they are: where they are BatchNorm, teach "
            "them with normswap.register_norm"
        )
    if trace.past:
        yield (
            f"{trace.past[0]} is found past the network's modules (in a global, by a weak reference, by a hook that "
            "knows the network): a converted copy computes with the original's; hold its layer as a module"
        )
    for where, name in _bound_to_the_original(network):
        yield (
            f"{where} knows {name or 'the network'} itself, and of a converted copy it goes on with the original's: "
            "make it a method, which is copied, or convert with inplace=True"
        )
        break
    for name in trace.functional_norms:
        yield f"{name or 'the model'} calls batch_norm itself, without a module; it still depends on the batch"
    fusing = [name for name, m in network.modules.items() if fold_methods(m) or _folds_by_mode(m)]
    if fusing and norms:
        yield (
            f"{len(fusing)} modules can fold BatchNorm into convolutions ({fusing[0] or 'the model'}, …); "
            "that no longer works after conversion: fold before it, or not at all"
        )
    for where in stray_norms(network.model):
        yield f"{where} keeps BatchNorm where torch does not register it; it stays as it is: use nn.ModuleList"


def _bound_to_the_original(network: Network) -> Iterator[tuple[str, str]]:
    """Yield where a copy would refer to modules of the network, with their names: a function is copied as it is."""
    with_functions = (
        any(isinstance(value, FunctionType) or (key in HOOKS and value) for key, value in vars(module).items())
        for module in network.modules.values()
    )
    if any(with_functions):
        for module, where in strays(meta_copy(network.model)):
            if id(module) in network.names:
                yield where, network.name(module)


def _folds_by_mode(module: nn.Module) -> bool:
    """Tell whether a module looks at a norm's statistics as its mode is set, as one that caches a folded kernel."""
    kind: Any = type(module)
    asks = any("running_var" in words(kind, mode) for mode in ("train", "eval"))
    return asks and not is_batch_norm(module) and any(map(is_batch_norm, module.modules()))


def _is_live(network: Network, name: str) -> bool:
    return isinstance(network.slots[name], _BatchNorm) or is_registered_norm(network.slots[name])
