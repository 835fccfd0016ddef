"""Concatenations and layers that several norms read: random networks keep what they compute under BatchNorm."""

import copy
import json
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from equality import assert_same_state
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import normswap

Origin = tuple[tuple[str | None, int], ...]
"""What the channels of a value are: layer, None for anything else, and how many."""


@dataclass
class Value:
    """What a step of a `Woven` network makes, and what reads it."""

    origin: Origin
    readers: set[str] = field(default_factory=set)
    parts: tuple[int, ...] = ()
    step: tuple[Any, ...] = ("input",)

    @property
    def channels(self) -> int:
        return sum(size for _, size in self.origin)


class Woven(nn.Module):
    """Runs steps one by one, and knows of every channel where it comes from."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.values = [Value(((None, channels),))]
        self.layers = nn.ModuleDict()
        self.outputs: list[int] = []

    def step(self, kind: str, *read: int, layer: nn.Module | None = None) -> int:
        name = f"{kind}{len(self.values)}"
        origins = [self.values[index].origin for index in read]
        if layer is not None:
            self.layers[name] = layer
        channels = sum(size for _, size in origins[0])
        made: dict[str, Origin] = {"cat": tuple(chain.from_iterable(origins))}
        if kind == "layer":
            made[kind] = (
                (f"layers.{name}", layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels),
            )
        for index in read:
            self.values[index].readers.add(f"layers.{name}" if kind == "norm" else kind)
        self.values.append(Value(made.get(kind, ((None, channels),)), parts=read, step=(kind, name)))
        return len(self.values) - 1

    def forward(self, x: Tensor) -> Any:
        made = [x]
        for value in self.values[1:]:
            kind, name = value.step
            read = [made[index] for index in value.parts]
            if kind == "cat":
                made.append(torch.cat(read, 1))
            elif kind == "add":
                made.append(read[0] + read[1])
            elif kind == "relu":
                made.append(read[0].relu())
            else:
                made.append(self.layers[name](read[0]))
        return [made[index] for index in self.outputs]

    def extra_repr(self) -> str:
        steps = [f"{v.step[-1]}{list(v.parts)}" for v in self.values]
        return f"{' '.join(steps)} -> {self.outputs}"

    def example(self) -> Tensor:
        flat = any(isinstance(layer, nn.BatchNorm1d) for layer in self.layers.values())
        x = torch.randn(8, self.values[0].channels, *(() if flat else (5, 5))).double()
        return x + torch.randn(8, 1, *(1 for _ in x.shape[2:])).double()

    def norms(self) -> dict[str, Origin]:
        return {f"layers.{v.step[1]}": self.values[v.parts[0]].origin for v in self.values if v.step[0] == "norm"}

    def free(self) -> set[str]:
        """Layers that nothing reads but norms, themselves or in concatenations."""

        def alone(index: int) -> bool:
            read = [(reader, v) for reader, v in enumerate(self.values) if index in v.parts]
            fits = all(v.step[0] == "norm" or (v.step[0] == "cat" and alone(reader)) for reader, v in read)
            return fits and index not in self.outputs

        made = {v.origin[0][0]: index for index, v in enumerate(self.values) if v.step[0] == "layer"}
        read = {layer for origin in self.norms().values() for layer, _ in origin}
        return {layer for layer, index in made.items() if layer in read and alone(index)}


def layer_for(draw: Any, channels: int, *, flat: bool) -> nn.Module:
    bias = draw(st.booleans())
    if flat:
        return nn.Linear(channels, draw(st.integers(2, 6)), bias=bias)
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    outputs = groups * draw(st.integers(1, max(1, 6 // groups)))
    kind = draw(st.sampled_from([nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d]))
    return kind(channels, outputs, draw(st.sampled_from([1, 3])), groups=groups, bias=bias)


def norm_for(channels: int, *, flat: bool) -> nn.Module:
    norm = (nn.BatchNorm1d if flat else nn.BatchNorm2d)(channels)
    nn.init.normal_(norm.running_mean, std=0.5)
    nn.init.uniform_(norm.running_var, 0.3, 3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@st.composite
def woven(draw: st.DrawFn) -> Woven:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    flat, inputs = draw(st.booleans()), draw(st.integers(2, 4))
    net = Woven(inputs)
    for _ in range(draw(st.integers(4, 12))):
        kind = draw(st.sampled_from(["layer", "layer", "layer", "cat", "cat", "norm", "norm", "relu", "add"]))
        apart = [i for i, value in enumerate(net.values) if value.step[0] not in ("layer", "cat")]
        linear = [i for i, value in enumerate(net.values) if value.step[0] in ("layer", "cat")] or apart
        mixing = linear if kind in ("norm", "cat") else apart
        at = draw(st.sampled_from(range(len(net.values)) if draw(st.integers(0, 7)) == 0 else mixing))
        channels = net.values[at].channels
        if kind == "layer":
            layer = layer_for(draw, channels, flat=flat)
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.padding = tuple(size // 2 for size in layer.kernel_size)
            net.step(kind, at, layer=layer)
        elif kind == "norm" and channels > 1:
            net.step(kind, at, layer=norm_for(channels, flat=flat))
        elif kind == "cat":
            others = draw(st.lists(st.sampled_from([*linear, *linear, *apart]), min_size=1, max_size=2))
            if channels + sum(net.values[other].channels for other in others) < 40:
                net.step(kind, at, *others)
        elif kind == "relu":
            net.step(kind, at)
        elif kind == "add":
            same = [i for i, value in enumerate(net.values) if value.channels == channels]
            net.step(kind, at, draw(st.sampled_from(same)))
    last = len(net.values) - 1
    if net.values[last].channels < 2:
        last = net.step("cat", last, last)
    net.step("norm", last, layer=norm_for(net.values[last].channels, flat=flat))
    net.outputs = [i for i, value in enumerate(net.values) if value.step[0] == "norm"]
    if draw(st.integers(0, 9)) == 0:
        net.outputs.append(draw(st.integers(0, len(net.values) - 1)))
    return net.double().eval()


def scaled_by_hand(net: Woven, scales: dict[str, Tensor]) -> Woven:
    """Multiply filters, and give every norm the statistics and the γ that follow from where its channels come from."""
    other = copy.deepcopy(net)
    modules = dict(other.named_modules())
    with torch.no_grad():
        for name, s in scales.items():
            layer: Any = modules[name]
            if isinstance(layer, nn.ConvTranspose2d):
                per_group = layer.weight.shape[1]
                for g in range(layer.groups):
                    rows = slice(g * layer.in_channels // layer.groups, (g + 1) * layer.in_channels // layer.groups)
                    layer.weight[rows] *= s[g * per_group : (g + 1) * per_group].view(1, -1, 1, 1)
            else:
                layer.weight.mul_(s.view(-1, *(1 for _ in layer.weight.shape[1:])))
            if layer.bias is not None:
                layer.bias.mul_(s)
        for name, origin in net.norms().items():
            norm: Any = modules[name]
            s = torch.cat([scales.get(str(layer), torch.ones(size).double()) for layer, size in origin])
            new_var = norm.running_var * s**2
            norm.weight.mul_(((new_var + norm.eps) / (norm.running_var + norm.eps)).sqrt() / s)
            norm.running_mean.mul_(s)
            norm.running_var.copy_(new_var)
    return other


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(woven(), st.sampled_from([1, 2, "auto"]))
def test_batch_norm_does_not_see_the_scales_of_random_networks(net: Woven, groups: Any) -> None:
    x = net.example()
    plan = normswap.inspect(net, groups=groups, batches=[x], example_input=x[:2])
    scales = {name: torch.tensor(own).double() for name, own in plan.scales.items()}
    event(f"{min(len(scales), 4)} scaled")
    read = [{str(layer) for layer, _ in origin} for origin in net.norms().values()]
    event(f"a scaled layer that several norms read: {any(sum(name in own for own in read) > 1 for name in scales)}")
    event(f"a concatenation with scaled layers: {any(len(own) > 1 and own & set(scales) for own in read)}")
    event(f"slices that stay beside them: {any(own & set(scales) and own - set(scales) for own in read)}")
    with torch.no_grad():
        outputs = list(zip(scaled_by_hand(net, scales)(x), net(x), strict=True))
    for ours, theirs in outputs:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))
    entries = {entry.name: entry for entry in plan.norms}
    free = net.free()
    assert set(scales) <= free
    for name, origin in net.norms().items():
        for layer in {layer for layer, _ in origin if layer in free - set(scales)}:
            assert "less drift in all" in entries[name].not_equalized, layer
    again = normswap.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert_same_state(normswap.apply(net, again), normswap.apply(net, plan))
