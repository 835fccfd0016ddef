"""Which filters may be multiplied by anything: all that reads them are BatchNorms, which take the factors up again."""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from normswap.layers.convs import WeightStandardized
from normswap.networks.network import Network
from normswap.networks.recognition import rows_of
from normswap.planning.choices import WS
from normswap.planning.entry import ConvEntry, NormEntry
from normswap.planning.moving_averages import moving_averages
from normswap.planning.options import Options
from normswap.planning.scaling import first_astray, layer_follows
from normswap.tracing.facts import LayerFacts, NormFacts, Trace
from normswap.tracing.graph import LAYERS

Place = tuple[str, int, int]
"""A layer, and the first channel and the end of the slice of a norm's input that it makes."""

NOT_SHOWN = "a forward pass with scaled filters did not show what its channels are"
TOGETHER = "filters alone do not tell how to scale a concatenation or what several norms read"

TRIES = 4
"""Passes that show what channels are, each without what went astray in the one before."""


@dataclass(frozen=True)
class Freedom:
    """What of one norm's channels may be scaled.

    Attributes:
        places: Slices whose layers may be.
        obstacle: Why others, or all, may not.
    """

    places: tuple[Place, ...] = ()
    obstacle: str = ""

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers, once each."""
        return tuple(dict.fromkeys(layer for layer, _, _ in self.places))

    def reason(self, channels: int) -> str:
        """Return what the plan says: nothing where all channels are free."""
        free = sum(stop - start for _, start, stop in self.places)
        return f"{free} of {channels} channels are free: {self.obstacle}" if 0 < free < channels else self.obstacle


def freedoms(
    network: Network,
    trace: Trace,
    norms: Mapping[str, NormEntry],
    convs: Mapping[str, ConvEntry],
    options: Options,
    *,
    able: Collection[str],
    by_filters: bool,
) -> dict[str, Freedom]:
    """Return for every norm which of its channels may be scaled.

    Args:
        network: The unconverted network.
        trace: What a forward pass of it showed.
        norms: The matched norms' entries.
        convs: The convolutions' entries.
        options: What the user asked for.
        able: Names of those that can be fitted.
        by_filters: Whether nothing but filters is known of a norm's input; then only a layer that one norm reads, and a
            norm that reads one layer, are free.
    """
    layers: dict[str, str] = {}
    ran = {name: network.slots[name] for name in (*trace.convs, *trace.linears) if name in network.slots}
    twins = moving_averages(ran)
    places, obstacles = dict[str, tuple[Place, ...]](), dict[str, str]()
    for name, entry in norms.items():
        obstacles[name] = _norm_obstacle(trace.norms.get(name), entry)
        places[name] = () if obstacles[name] else _places(trace.norms[name])
    able = {name for name in able if places[name]}
    for name in places:
        for layer, start, stop in places[name]:
            if layer not in layers:
                layers[layer] = _layer_obstacle(network, layer, trace, able, convs, options)
            if not layers[layer] and layer in twins:
                layers[layer] = f"{twins[layer]} holds nearly the filters of {layer}, as a moving average does"
            if not layers[layer] and rows_of(network.slots[layer]) != stop - start:
                layers[layer] = f"{layer} is no layer with one filter per channel"
    unsure, known = set[str](), dict[Hashable, bool | None]()
    for layer in [layer for layer, obstacle in layers.items() if not obstacle]:
        follows = layer_follows(network.slots[layer], known)
        if follows is None:
            unsure.add(layer)
        elif not follows:
            layers[layer] = f"the output of {layer} does not scale with its filters"
    free = {layer for layer, obstacle in layers.items() if not obstacle}
    reads = Counter(layer for own in places.values() for layer, _, _ in own)
    whole = {
        own[0][0]: name for name, own in places.items() if [place[1:] for place in own] == [(0, norms[name].channels)]
    }
    alone = {layer for layer in free.intersection(whole) if reads[layer] == 1}
    if by_filters:
        layers |= dict.fromkeys(free - alone, TOGETHER)
        free = alone
    sure = {layer for layer in alone - unsure if trace.norms[whole[layer]].direct}
    layers |= dict.fromkeys(free - sure - _shown(network, trace, places, free, sure), NOT_SHOWN)
    return {name: _freedom(own, layers, obstacles[name], norms[name].channels) for name, own in places.items()}


def _freedom(places: tuple[Place, ...], layers: Mapping[str, str], obstacle: str, channels: int) -> Freedom:
    free = tuple(place for place in places if not layers[place[0]])
    if obstacle or sum(stop - start for _, start, stop in free) == channels:
        return Freedom(free, obstacle)
    bound = next((layers[layer] for layer, _, _ in places if layers[layer]), "")
    return Freedom(free, bound or "the others are no layer's own output")


def _shown(
    network: Network, trace: Trace, places: Mapping[str, Iterable[Place]], free: set[str], sure: set[str]
) -> set[str]:
    """Return those free layers, the sure ones apart, whose factors the norms behind them are shown to undo."""
    left = free - sure
    for _ in range(TRIES):
        kept = left | sure
        wired = [name for name in trace.norms if any(layer in left for layer, _, _ in places.get(name, ()))]
        tried = {name: tuple(place for place in places[name] if place[0] in kept) for name in wired}
        astray = first_astray(network, trace, tried) if tried else None
        if astray is None:
            return left
        left = left - {layer for layer, _, _ in tried.get(astray, ())} if astray in tried else set()
    return set()


def _places(facts: NormFacts) -> tuple[Place, ...]:
    found, start = list[Place](), 0
    for own in facts.slices:
        if own.layer:
            found.append((own.layer, start, start + own.channels))
        start += own.channels
    return tuple(found)


def _norm_obstacle(facts: NormFacts | None, entry: NormEntry) -> str:
    """Return why nothing that a norm reads can be scaled, or nothing."""
    if facts is None:
        return "never runs"
    if facts.slices and sum(own.channels for own in facts.slices) == entry.channels:
        if any(own.layer for own in facts.slices):
            return ""
        return "no slice of the concatenation before it is the output of a convolution or linear layer"
    if len(facts.fed_by) != 1 or facts.fed_by[0].kind not in LAYERS:
        return "not fed by one convolution or linear layer"
    return "something stands between the layer before it and the norm"


def _layer_obstacle(
    network: Network,
    name: str,
    trace: Trace,
    able: Collection[str],
    convs: Mapping[str, ConvEntry],
    options: Options,
) -> str:
    """Return why the filters of a layer cannot be scaled, or nothing."""
    layer, entry = network.slots.get(name), convs.get(name)
    facts: LayerFacts | None = trace.convs.get(name) or trace.linears.get(name)
    weight = None if layer is None else layer._parameters.get("weight")
    if layer is None or facts is None or weight is None or not facts.plain:
        return f"the kernel of {name} is computed in the forward pass"
    if facts.leaves or facts.weight_reads or facts.norms is None:
        return f"{name} is read by others, too"
    if facts.bias_reads:
        return f"the bias of {name} is also read by {sorted(facts.bias_reads)[0]}"
    if not weight.requires_grad or isinstance(layer, WeightStandardized):
        return f"the filters of {name} are fixed"
    if options.leaves(name):
        return f"{name} is left alone: {options.leaves(name)}"
    if entry is not None and entry.ws is WS.STANDARD:
        return f"the filters of {name} are standardized without their scale"
    if not isinstance(layer, nn.Linear) and entry is None:
        return f"{name} is no layer with one filter per channel"
    if any(network.owners[id(own)] > 1 for own in (weight, layer._parameters.get("bias")) if own is not None):
        return f"{name} shares its parameters with another layer"
    if other := sorted(facts.norms.difference(able)):
        return f"{name} is read by {other[0]}, which cannot take its scales up"
    return ""
