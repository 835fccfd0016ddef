"""What a plan warns of: what the trace met, what torch does not see, and options that came to nothing."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from normswap.networks.network import Network
from normswap.networks.recognition import fold_methods, stray_norms
from normswap.planning.entry import NormEntry
from normswap.planning.options import Options
from normswap.tracing.facts import Trace


def plan_warnings(network: Network, norms: Mapping[str, NormEntry], trace: Trace, options: Options) -> Iterator[str]:
    """Yield a line for everything about a network that its conversion does not change and that may surprise.

    Args:
        network: The network, unconverted.
        norms: The norms' entries by name.
        trace: What a forward pass showed.
        options: What the user asked for.
    """
    if trace.stopped_by:
        yield f"the forward pass stopped after the last norm ({trace.stopped_by})"
    flattened = [n for n, facts in trace.norms.items() if facts.shape[0] != trace.batch]
    if flattened:
        yield (
            f"{len(flattened)} norms see a flattened batch ({flattened[0]} and others): "
            "GroupNorm takes its statistics from one row of it, not from one sample"
        )
    never = [name for name, entry in norms.items() if entry.shape is None]
    if never:
        yield f"{len(never)} norms were never reached ({never[0]}, …); their convolutions stay plain"
    for name in trace.functional_norms:
        yield f"{name or 'the model'} calls batch_norm itself, without a module; it still depends on the batch"
    fusing = [name for name, m in network.modules.items() if fold_methods(m)]
    if fusing and norms:
        yield (
            f"{len(fusing)} modules can fold BatchNorm into convolutions ({fusing[0] or 'the model'}, …); "
            "that no longer works after conversion: fold before it, or not at all"
        )
    for where in stray_norms(network.model):
        yield f"{where} keeps BatchNorm where torch does not register it; it stays as it is: use nn.ModuleList"
    for option, pattern in _patterns(options):
        if not any(fnmatchcase(name, pattern) for name in network.modules):
            yield f"{option} {pattern!r} matches no layer"


def _patterns(options: Options) -> Iterator[tuple[str, str]]:
    yield from (("include", pattern) for pattern in options.include)
    yield from (("exclude", pattern) for pattern in options.exclude)
    yield from (("override", pattern) for pattern in dict.fromkeys(pattern for pattern, *_ in options.overrides))
