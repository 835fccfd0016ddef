"""How channels move together from sample to sample, told by filters and running statistics, without a forward pass.

What moves a GroupNorm's statistics is what many channels of a sample see at once, such as its brightness or colour. A
constant added to all positions of an input passes through a convolution as the sums of the filters over positions,
through BatchNorm as γ/σ, and through a rectifier as its mean slope, which for channels that are normal with mean β and
deviation |γ| is Φ(β/|γ|). A sample of more contrast has larger deviations everywhere, and a rectifier's mean grows with
them by |γ|·φ(β/|γ|). So a few random constants and contrasts, sent through the recorded graph by these rules, tell
which channels of each norm's input go up together and which against each other; and the way back from the outputs tells
what they make of each.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import chain

import torch
from torch import Tensor, nn

from normswap.networks.network import Network
from normswap.networks.randomness import normal
from normswap.networks.recognition import norm_parts
from normswap.planning.measuring import Seen
from normswap.planning.statistics import loud
from normswap.tracing.graph import LAYERS, PASSING, Graph, Kind, Node

CONSTANTS = 32
"""Random constants that are sent through the network."""

LARGEST = 1e12
"""Larger moves are as good as unknown: along layers that nothing normalizes they grow without end."""

OWN, COLOURS = 0.25, 3
"""What each channel adds by itself, so that the layers behind it do not see the same few moves as it did; more, by the
square, where an input has fewer channels than a colour image. One channel (digits, clothes) moves only one way."""

CONTRAST = 0.5
"""Deviation of the samples' contrast beside that of the constants. On two networks 0 and 1 did no better."""

SHARE = 0.1
"""Of a channel's variance, what they make up. On three trained networks 0.03 and 0.3 kept as much of the function."""
_SAME = (nn.Identity, nn.modules.dropout._DropoutNd)
"""Modules behind which channels are what they were."""


@dataclass(frozen=True)
class Move:
    """How a tensor's C channels answer to the constants.

    Attributes:
        channels: (CONSTANTS, C) what each adds to the channels' means.
        slope: (C,) of a rectifier that would read them.
        contrast: (CONSTANTS, C) what a rectifier would add where a sample has more contrast or less, or 0.
    """

    channels: Tensor
    slope: Tensor
    contrast: Tensor | float = 0.0

    def __add__(self, other: "Move") -> "Move":
        """Return the move of a sum."""
        return Move(self.channels + other.channels, (self.slope + other.slope) / 2, self.contrast + other.contrast)

    def rectified(self) -> "Move":
        """Return the move behind a rectifier."""
        return Move(self.channels * self.slope + self.contrast, torch.ones_like(self.slope))


def responses(network: Network, graph: Graph, then: Mapping[str, Iterable[str]]) -> dict[str, Seen]:
    """Return what every norm behind a layer would see of samples that differ by constants.

    Where a way cannot be followed (channels that are sliced, shuffled or computed), the layer behind it is given random
    moves, independent from channel to channel.

    Args:
        network: The unconverted network, whose tensors hold values.
        graph: What ran, in its order.
        then: Modules inside norms that run after the normalization, by norm.
    """
    read = sum(node.shape[1] for node in graph.nodes if node.kind is Kind.INPUT and len(node.shape) > 1)
    walk = _Walk(network, OWN * max(COLOURS / max(read, 1), 1) ** 2, then)
    own = chain(network.model.parameters(), network.model.buffers())
    followed = not any(tensor.is_inference() for tensor in own)
    with torch.set_grad_enabled(followed):
        for node in graph.nodes:
            walk.step(node)
        walk.back(graph.outputs)
    return walk.seen


class _Walk:
    """Moves of the nodes met so far, None where they are not known, and what norms saw."""

    def __init__(self, network: Network, own: float, then: Mapping[str, Iterable[str]]) -> None:
        self.seen: dict[str, Seen] = {}
        self._network, self._own, self._then = network, own, then
        self._moves: list[Move | None] = []
        self._inputs: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)
        self._contrast = CONTRAST * normal((CONSTANTS, 1), torch.Generator().manual_seed(1))

    def step(self, node: Node) -> None:
        """Go on by one node."""
        before = [self._moves[parent] for parent in node.parents]
        channels = node.shape[1] if len(node.shape) > 1 else 0
        known = [move for move in before if move is not None and len(move.slope) in node.shape[1:]]  # on any axis
        alike = [move for move in known if len(move.slope) == len(known[0].slope)]
        made: Move | None = None
        if node.kind is Kind.INPUT:
            made = self._drawn(channels)
        elif node.kind in LAYERS:
            made = self._through_filters(node, before[0])
        elif node.kind is Kind.NORM:
            made = self._through_norm(node.name, before[0]) if before and before[0] is not None else None
        elif node.slices:
            made = self._joined(node)
        elif alike and node.kind is Kind.ADD:
            made = reduce(Move.__add__, alike)
        elif alike and node.kind in PASSING:
            made = alike[0]
        elif alike:
            made = alike[0].rectified()
        if made is not None and not made.channels.square().sum() <= LARGEST**2:  # NaN is no smaller
            made = self._drawn(channels) if node.kind in LAYERS else None
        self._moves.append(made)

    def back(self, outputs: Iterable[int]) -> None:
        """Note what the outputs make of each norm's channels: derivatives of a mixture of theirs for every constant."""
        ends = [move.channels for move in (self._moves[index] for index in sorted(outputs)) if move is not None]
        ends = [end for end in ends if end.requires_grad]
        if not ends or not self._inputs:
            return
        signs = [torch.randint(0, 2, end.shape, generator=self._generator).to(end) * 2 - 1 for end in ends]
        slopes = torch.autograd.grad(ends, list(self._inputs.values()), signs, allow_unused=True)
        for name, slope in zip(self._inputs, slopes, strict=True):
            if slope is not None and bool(slope.isfinite().all()):
                self.seen[name].slopes = slope

    def _random(self, channels: int) -> Tensor:
        return normal((CONSTANTS, channels), self._generator)

    def _drawn(self, channels: int) -> Move:
        return Move(self._followed(channels), torch.ones(channels, dtype=torch.float32))

    def _followed(self, channels: int) -> Tensor:
        return self._random(channels).requires_grad_(torch.is_grad_enabled())

    def _joined(self, node: Node) -> Move | None:
        parts = [(self._moves[parent] if parent >= 0 else None, size) for parent, size in node.slices]
        known = [part for part, size in parts if part is not None and len(part.slope) == size]
        if len(known) < len(parts):
            return None
        contrasts = [torch.zeros_like(part.channels) + part.contrast for part in known]
        slopes = torch.cat([part.slope for part in known])
        return Move(torch.cat([part.channels for part in known], 1), slopes, torch.cat(contrasts, 1))

    def _through_filters(self, node: Node, before: Move | None) -> Move | None:
        layer = self._network.slots.get(node.name)
        weight = None if layer is None else layer._parameters.get("weight")
        if weight is None or weight.is_meta or weight.ndim < 2:
            return None
        groups, transposed = int(getattr(layer, "groups", 1)), bool(getattr(layer, "transposed", False))
        if len(weight) % groups:  # no filters as convolutions hold them: experts that are mixed, say
            return None
        sums = weight.detach().float().flatten(2) if weight.ndim > 2 else weight.detach().float().unsqueeze(2)
        sums = sums.squeeze(2) if sums.shape[2] == 1 else sums @ sums.new_ones(sums.shape[2])
        sums = sums.unflatten(0, (groups, -1))  # (groups, in, out) of a transposed layer, else (groups, out, in)
        sums = sums if transposed else sums.transpose(1, 2)
        inputs = math.prod(sums.shape[:2])
        moves = self._followed(inputs) if before is None or len(before.slope) != inputs else before.channels
        mixed = torch.bmm(moves.to(sums).unflatten(1, (groups, -1)).transpose(0, 1), sums).transpose(0, 1).flatten(1)
        return Move(mixed, mixed.new_ones(mixed.shape[1])) if mixed.shape[1] in node.shape[1:] else None

    def _through_norm(self, name: str, before: Move) -> Move | None:
        """Note what a norm sees, and return what it makes of it."""
        parts = norm_parts(self._network.slots[name])
        if parts.var is None or parts.var.is_meta or parts.var.shape != before.slope.shape:
            return None
        unit = (parts.var.detach().to(before.channels) + parts.eps).sqrt()
        moves = before.channels / unit
        power = moves.detach().square().mean().clamp_min(1e-30)
        if name not in self.seen:
            first = (moves * (SHARE / power).sqrt()).detach()
            self.seen[name], self._inputs[name] = Seen([first], [1 - SHARE + first.square()]), before.channels
        weight, bias = parts.affine(unit)
        weight = loud(weight)
        moves = moves + self._own * power.sqrt() * self._random(len(unit)).to(moves)
        at = bias / weight.abs().clamp_min(1e-6)
        density = weight.abs() * (-at.square() / 2).exp() / math.sqrt(2 * math.pi)
        made = Move(moves * weight, torch.special.ndtr(at), power.sqrt() * self._contrast.to(moves) * density)
        inside = [self._network.slots.get(f"{name}.{child}") for child in self._then.get(name, ())]
        return made if all(isinstance(module, _SAME) for module in inside) else made.rectified()
