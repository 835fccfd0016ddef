"""Concatenations and layers that several norms read: random networks keep what they compute under BatchNorm."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pytest
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
        made: dict[str, Origin] = {"cat": tuple(chain.from_iterable(origins)), "mean": origins[0], "turn": origins[0]}
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
            elif kind == "mean":
                flat = read[0].ndim == 2
                made.append(read[0] * 1 if flat else nn.functional.avg_pool2d(read[0], 3, stride=1, padding=1))
            elif kind == "turn":
                flat = read[0].ndim == 2
                made.append(read[0][None].flatten(0, 1) if flat else read[0].flatten(2).unflatten(2, (5, 5)).mT)
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
            follows = ("cat", "mean", "turn")
            fits = all(v.step[0] == "norm" or (v.step[0] in follows and alone(reader)) for reader, v in read)
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
        kinds = ["layer", "layer", "layer", "cat", "cat", "norm", "norm", "relu", "add", "mean", "turn"]
        kind, follows = draw(st.sampled_from(kinds)), ("layer", "cat", "mean", "turn")
        apart = [i for i, value in enumerate(net.values) if value.step[0] not in follows]
        linear = [i for i, value in enumerate(net.values) if value.step[0] in follows] or apart
        mixing = linear if kind in ("norm", "cat", "mean", "turn") else apart
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
        elif kind in ("relu", "mean", "turn"):
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


class DenseBlock(nn.Module):
    """Pre-activation units, each of which reads all that was made before it; pooled features in front."""

    def __init__(self, units: int = 3, growth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        sizes = [8 + growth * unit for unit in range(units + 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes)
        self.convs = nn.ModuleList(nn.Conv2d(size, growth, 3, padding=1) for size in sizes[:-1])

    def forward(self, x: Tensor) -> Tensor:
        made = [nn.functional.max_pool2d(self.stem(x), 2)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            made.append(conv(norm(torch.cat(made, 1)).relu()))
        return self.norms[-1](torch.cat(made, 1)).relu().mean((2, 3))


def trained_dense_block() -> tuple[DenseBlock, Tensor]:
    model, x = DenseBlock().train(), torch.randn(64, 3, 10, 10)
    x = x * torch.rand(64, 1, 1, 1) * 2 + torch.randn(64, 3, 1, 1)
    for norm in model.norms:
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    with torch.no_grad():
        model(x)
    return model.eval(), x


def test_a_dense_block_drifts_less_and_says_what_is_free() -> None:
    model, x = trained_dense_block()
    plan = normswap.inspect(model, groups=1, batches=[x], example_input=x[:2])
    assert set(plan.scales) == {"convs.0", "convs.1", "convs.2"}
    entries = {entry.name: entry for entry in plan.norms}
    assert [entries[f"norms.{i}"].not_equalized.split(":")[0] for i in range(4)] == [
        "no slice of the concatenation before it is the output of a convolution or linear layer",
        "6 of 14 channels are free",
        "12 of 20 channels are free",
        "18 of 26 channels are free",
    ]
    assert entries["norms.3"].scaled_by == (("convs.0", 8, 14), ("convs.1", 14, 20), ("convs.2", 20, 26))
    assert sum(e.drift**2 for e in plan.norms) < 0.8 * sum(e.drift_before**2 for e in plan.norms)
    plain = normswap.apply(model, normswap.inspect(model, groups=1, example_input=x[:2]))
    ours = normswap.apply(model, plan)
    with torch.no_grad():
        assert (ours(x) - model(x)).square().mean() < 0.8 * (plain(x) - model(x)).square().mean()


@pytest.mark.parametrize("groups", [1, 2, "auto"])
def test_the_drift_of_norms_with_slices_that_stay_is_what_group_norm_shows(groups: Any) -> None:
    model, x = trained_dense_block()
    plan = normswap.inspect(model, groups=groups, batches=[x], example_input=x[:2])
    without = normswap.inspect(model, groups=groups, batches=[x], example_input=x[:2], equalize=False)
    seen: dict[str, Tensor] = {}
    handles = [
        norm.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        for name, norm in model.named_modules()
    ]
    with torch.no_grad():
        model(x)
        for handle in handles:
            handle.remove()
        for chosen in (plan, without):
            converted = dict(normswap.apply(model, chosen).named_modules())
            for entry in chosen.norms:
                norm, s = dict(model.named_modules())[entry.name], torch.ones(entry.channels)
                for layer, start, stop in entry.scaled_by:
                    s[start:stop] = torch.tensor(chosen.scales[layer])
                exact = norm(seen[entry.name])
                apart = converted[entry.name](seen[entry.name] * s.view(1, -1, 1, 1)) - exact
                varying = exact - norm.bias.view(1, -1, 1, 1)
                assert entry.drift == pytest.approx(
                    float((apart.square().sum() / varying.square().sum()).sqrt()), rel=0.02
                )


def test_a_dense_block_is_converted_as_its_plan_says() -> None:
    model, x = trained_dense_block()
    converted = normswap.convert(model, groups=1, batches="synthetic", example_input=x[:2])
    plan = normswap.plan_of(converted)
    assert plan.scales
    again = normswap.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert_same_state(normswap.apply(model, again), converted)


WRONG = {
    "another layer": ([["other", 8, 14]], "channels 8 to 14 scaled by other, for which it holds 0 scales"),
    "another size": ([["convs.0", 8, 13]], "channels 8 to 13 scaled by convs.0, for which it holds 6 scales"),
    "past the end": ([["convs.0", 9, 15]], "channels 9 to 15 scaled by convs.0"),
    "overlapping": ([["convs.0", 0, 6], ["convs.0", 5, 11]], "scaled_by cannot be"),
    "no slice": ([["convs.0", 8]], "scaled_by cannot be"),
    "no layer": ([[1, 8, 14]], "scaled_by cannot be"),
    "no list": ("convs.0", "scaled_by cannot be"),
}


@pytest.mark.parametrize(("slices", "said"), WRONG.values(), ids=WRONG)
def test_slices_that_do_not_fit_are_refused(slices: Any, said: str) -> None:
    model, x = trained_dense_block()
    data = json.loads(json.dumps(normswap.inspect(model, groups=1, batches=[x], example_input=x[:2]).to_dict()))
    (entry,) = [entry for entry in data["entries"] if entry["name"] == "norms.1"]
    entry["scaled_by"] = slices
    with pytest.raises(normswap.PlanMismatch, match=said):
        normswap.apply(model, normswap.Plan.from_dict(data))


class Sly(nn.Conv2d):
    """A convolution whose forward is not linear in its filters, which a pass without values does not show."""

    def forward(self, x: Tensor) -> Tensor:
        size = 1.0 if "meta" in str(x.device) else float(self.weight.detach().abs().mean())
        return nn.functional.conv2d(x * size, self.weight, self.bias)


class Reading(nn.Module):
    """Chooses what to concatenate by the value of a filter, where there are values."""

    def __init__(self, first: nn.Module, *norms: nn.Module, swaps: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.norms, self.swaps = first, nn.Conv2d(3, 4, 1), nn.ModuleList(norms), swaps

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x), self.second(x)]
        if self.swaps and "meta" not in str(x.device):
            parts.reverse()
        return self.norms[0](torch.cat(parts, 1))


UNLIKE = {
    "its filters decide": (lambda: Reading(Sly(3, 4, 1), nn.BatchNorm2d(8)), "the output of first does not scale"),
    "data decides": (
        lambda: Reading(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(8), swaps=True),
        "a forward pass with scaled filters did not show what its channels are",
    ),
}


@pytest.mark.parametrize(("build", "said"), UNLIKE.values(), ids=UNLIKE)
def test_what_a_pass_does_not_bear_out_is_left_alone(build: Any, said: str) -> None:
    model, x = build(), torch.randn(16, 3, 6, 6)
    with torch.no_grad():
        nn.init.uniform_(model.norms[0].running_var, 0.5, 2)
        model.first.weight[0].abs_()
    plan = normswap.inspect(model.eval(), groups=1, batches=[x], example_input=x[:2])
    assert said in plan.norms[0].not_equalized
    assert "first" not in plan.scales


class Between(nn.Module):
    """A layer, something that each channel goes through by itself, and a norm; and a concatenation before another."""

    def __init__(self, layer: nn.Module, between: Callable[[Tensor], Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.between, self.norm = layer, between, norm
        self.one, self.two, self.last = nn.Linear(8, 6), nn.Linear(8, 6), nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.between(self.layer(x))).relu()
        y = y.reshape(len(x), -1)[:, :8]
        return self.last(torch.cat([self.one(y), self.two(y)], 1))


Way = tuple[tuple[int, ...], Callable[[], nn.Module], Callable[[Tensor], Tensor], Callable[[], nn.Module]]
"""Shape of a sample, layer, what is between, norm."""

MAP, TOKENS = (3, 6, 6), (5, 3)
BETWEEN: dict[str, Way] = {
    "tokens as samples": (TOKENS, lambda: nn.Linear(3, 8), lambda y: y.flatten(0, 1), lambda: nn.BatchNorm1d(8)),
    "tokens behind channels": (TOKENS, lambda: nn.Linear(3, 8), lambda y: y.mT, lambda: nn.BatchNorm1d(8)),
    "tokens in a row": (
        TOKENS, lambda: nn.Linear(3, 8), lambda y: y.permute(0, 2, 1).unsqueeze(-1), lambda: nn.BatchNorm2d(8)
    ),
    "averages": (MAP, lambda: nn.Conv2d(3, 8, 3), nn.AvgPool2d(2), lambda: nn.BatchNorm2d(8)),
    "one average": (MAP, lambda: nn.Conv2d(3, 8, 3), lambda y: y.mean((2, 3)), lambda: nn.BatchNorm1d(8)),
    "larger": (MAP, lambda: nn.Conv2d(3, 8, 3), nn.UpsamplingBilinear2d(scale_factor=2), lambda: nn.BatchNorm2d(8)),
    "border": (MAP, lambda: nn.Conv2d(3, 8, 3), nn.ZeroPad2d(1), lambda: nn.BatchNorm2d(8)),
    "line": (MAP, lambda: nn.Conv2d(3, 8, 3), lambda y: y.flatten(2), lambda: nn.BatchNorm1d(8)),
}  # fmt: skip


def trained_between(name: str) -> tuple[Between, Tensor]:
    shape, layer, between, norm = BETWEEN[name]
    torch.manual_seed(0)
    model, x = Between(layer(), between, norm()).double().train(), torch.randn(64, *shape).double()
    x = x + 2 * torch.randn(64, *(1 for _ in shape)).double()
    with torch.no_grad():
        for norm in (model.norm, model.last):
            norm.momentum = None
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        model(x)
    return model.eval(), x


@pytest.mark.parametrize("images", [True, False], ids=["images", "filters alone"])
@pytest.mark.parametrize("name", BETWEEN)
def test_what_each_channel_goes_through_by_itself_leaves_its_scale_free(name: str, images: bool) -> None:
    model, x = trained_between(name)
    source = {"batches": [x]} if images else {}
    plan = normswap.inspect(model, groups=1, example_input=x[:2], **source)
    entry = plan.norms[0]
    assert (entry.name, entry.not_equalized) == ("norm", "")
    assert entry.drift < 0.8 * entry.drift_before
    assert ("one" in plan.scales) == images  # filters alone do not tell how to scale a concatenation
    scaled, s = copy.deepcopy(model), torch.tensor(plan.scales["layer"]).double()
    with torch.no_grad():
        scaled.layer.weight.mul_(s.view(-1, *(1 for _ in model.layer.weight.shape[1:])))
        scaled.layer.bias.mul_(s)
        var = scaled.norm.running_var * s**2
        scaled.norm.weight.mul_(((var + scaled.norm.eps) / (model.norm.running_var + model.norm.eps)).sqrt() / s)
        scaled.norm.running_mean.mul_(s)
        scaled.norm.running_var.copy_(var)
        torch.testing.assert_close(scaled(x), model(x), rtol=1e-10, atol=1e-10)


ASTRAY: dict[str, Way] = {
    "tokens for channels": ((8, 3), lambda: nn.Linear(3, 8), lambda y: y * 1, lambda: nn.BatchNorm1d(8)),
    "rows for channels": (
        (3, 10, 5), lambda: nn.Conv2d(3, 8, 3), lambda y: y.transpose(1, 2), lambda: nn.BatchNorm2d(8)
    ),
    "largest": (MAP, lambda: nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), lambda: nn.BatchNorm2d(8)),
    "rectified": (MAP, lambda: nn.Conv2d(3, 8, 3), nn.ReLU(), lambda: nn.BatchNorm2d(8)),
    "mean of channels": ((3, 10, 10), lambda: nn.Conv2d(3, 8, 3), lambda y: y.mean(1), lambda: nn.BatchNorm1d(8)),
}  # fmt: skip


@pytest.mark.parametrize("name", ASTRAY)
def test_channels_that_are_no_filters_keep_their_scale_and_cost_others_nothing(name: str) -> None:
    shape, layer, between, norm = ASTRAY[name]
    torch.manual_seed(0)
    model, x = Between(layer(), between, norm()).train(), torch.randn(64, *shape)
    with torch.no_grad():
        model(x + torch.randn(64, *(1 for _ in shape)))
    plan = normswap.inspect(model.eval(), groups=1, example_input=x[:2], batches=[x])
    assert plan.norms[0].not_equalized
    assert set(plan.scales) == {"one", "two"}
