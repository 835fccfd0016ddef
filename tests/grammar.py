"""Trained float64 networks drawn from a grammar of blocks, and what plain torch says they compute."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from strategies import CONVS, NORMS, TRANSPOSED
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BLOCKS = ("conv", "depthwise", "grouped", "transposed", "norm first", "added", "joined", "tied", "read twice", "bare")
TAILS = ("none", "linear", "linear and norm")
POSITIONS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


@dataclass(frozen=True)
class Sentence:
    """A network, an input of a few samples, and the options to convert it with.

    Attributes:
        model: In eval mode and float64.
        x: Its input.
        options: Arguments of `normswap.convert`.
        words: What it was drawn from, to be read in a report.
    """

    model: nn.Module
    x: Tensor
    options: dict[str, Any]
    words: tuple[str, ...]

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(f"{self.words} {tuple(self.x.shape)} {self.options}\n{self.model}")


class Added(nn.Module):
    """A body beside a shortcut."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Joined(nn.Module):
    """Two convolutions whose outputs one norm sees side by side."""

    def __init__(self, a: nn.Module, b: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.norm = a, b, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([self.a(x), self.b(x)], 1))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """One convolution and one norm under two names each, run twice."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm
        self.again = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.again(self.norm(self.conv(x)).relu()))  # type: ignore[no-any-return]


class ReadTwice(nn.Module):
    """A convolution that something else than its norm reads, too."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y.sigmoid()  # type: ignore[no-any-return]


def with_activation(base: type[_BatchNorm]) -> type[_BatchNorm]:
    """Return a norm class that runs an activation of its own afterwards."""

    class WithActivation(base):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.act = nn.SiLU()

        def forward(self, input: Tensor) -> Tensor:
            return self.act(super().forward(input))  # type: ignore[no-any-return]

    return WithActivation


def with_factor(base: type[_BatchNorm]) -> type[_BatchNorm]:
    """Return a norm class that computes more than BatchNorm: it cannot be replaced."""

    class WithFactor(base):  # type: ignore[misc, valid-type]
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)  # type: ignore[no-any-return]

    return WithFactor


def gated(base: type[_BatchNorm]) -> type[_BatchNorm]:
    """Return a norm class that multiplies its input by what BatchNorm makes of it: it cannot be replaced."""

    class Gated(base):  # type: ignore[misc, valid-type]
        def forward(self, input: Tensor) -> Tensor:
            return input * super().forward(input).sigmoid()  # type: ignore[no-any-return]

    return Gated


KINDS: tuple[Callable[[type[_BatchNorm]], type[_BatchNorm]], ...] = (
    lambda base: base, lambda base: base, lambda base: base, with_activation, with_factor, gated,
)  # fmt: skip


@st.composite
def trained_norms(draw: st.DrawFn, dims: int, channels: int) -> nn.Module:
    """A norm with statistics, its affine part there or not; classes that compute something else among them."""
    made = draw(st.sampled_from(KINDS))(NORMS[dims])
    norm = made(channels, draw(st.sampled_from([1e-5, 1e-3, 0.1])), affine=draw(st.booleans()))
    if not draw(st.integers(0, 3)):
        norm.register_parameter("bias", None)
    for tensor, low, high in (
        (norm.weight, -1.5, 1.5), (norm.bias, -1, 1), (norm.running_mean, -1, 1), (norm.running_var, 0.2, 3),
    ):  # fmt: skip
        if tensor is not None:
            nn.init.uniform_(tensor, low, high)
    return norm


@st.composite
def blocks(draw: st.DrawFn, kind: str, dims: int, channels: int) -> tuple[nn.Module, int]:
    """A block of a kind, and the channels of its output; it keeps the size of its input, or adds one to it."""

    def norm(count: int) -> nn.Module:
        return draw(trained_norms(dims, count))

    def conv(inputs: int, outputs: int, **options: Any) -> nn.Module:
        return CONVS[dims](inputs, outputs, 3, padding=1, bias=draw(st.booleans()), **options)

    outputs = draw(st.sampled_from([4, 6, 8, 16]))
    if kind == "norm first":
        return nn.Sequential(norm(channels), nn.ReLU(), conv(channels, outputs)), outputs
    if kind == "bare":
        return nn.Sequential(norm(channels), nn.ReLU()), channels
    if kind == "depthwise":
        return nn.Sequential(conv(channels, channels, groups=channels), norm(channels), nn.ReLU()), channels
    if kind == "grouped":
        return nn.Sequential(conv(channels, channels, groups=2), norm(channels), nn.ReLU()), channels
    if kind == "transposed":
        made = TRANSPOSED[dims](channels, outputs, 2, groups=draw(st.sampled_from([1, 2])))
        return nn.Sequential(made, norm(outputs), nn.ReLU()), outputs
    if kind == "added":
        return Added(nn.Sequential(conv(channels, channels), norm(channels), nn.ReLU())), channels
    if kind == "joined":
        return Joined(conv(channels, outputs), conv(channels, 4), norm(outputs + 4)), outputs + 4
    if kind == "tied":
        return Tied(conv(channels, channels), norm(channels)), channels
    if kind == "read twice":
        return ReadTwice(conv(channels, outputs), norm(outputs)), outputs
    return nn.Sequential(conv(channels, outputs), norm(outputs), nn.ReLU()), outputs


@st.composite
def sentences(draw: st.DrawFn) -> Sentence:
    """A network of one to four blocks and a tail."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    dims = draw(st.integers(1, 3))
    first = channels = draw(st.sampled_from([4, 8]))
    words, layers = [f"{dims}d"], list[nn.Module]()
    for kind in draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4)):
        block, channels = draw(blocks(kind, dims, channels))
        layers.append(block)
        words.append(kind)
    tail = draw(st.sampled_from(TAILS))
    if tail != "none":
        layers += [POSITIONS[dims](1), nn.Flatten(), nn.Linear(channels, 8)]
        layers += [draw(trained_norms(1, 8)), nn.ReLU()] if tail == "linear and norm" else []
        words.append(tail)
    model = nn.Sequential(*layers).double().eval()
    for module in model.modules():
        if hasattr(module, "kernel_size") and hasattr(module, "weight"):
            nn.init.normal_(module.weight)  # type: ignore[arg-type]
    options = {
        "groups": draw(st.sampled_from([1, 2, 4, 32, "auto"])),
        "ws": draw(st.sampled_from(["auto", "adaptive", "none"])),
        "shrink": draw(st.sampled_from([None, 0, 1.0])),
    }
    x = torch.randn(3, first, *[draw(st.integers(3, 5))] * dims, dtype=torch.float64)
    return Sentence(model, x, options, tuple(words))


class Affine(nn.Module):
    """What a BatchNorm does in eval mode, from the definition."""

    def __init__(self, norm: _BatchNorm, then: tuple[nn.Module, ...]) -> None:
        super().__init__()
        ones = torch.ones_like(norm.running_var)  # type: ignore[arg-type]
        gamma, beta = (ones if norm.weight is None else norm.weight), (0 * ones if norm.bias is None else norm.bias)
        factor = gamma / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
        self.factor, self.shift = factor.detach(), (beta - norm.running_mean * factor).detach()  # type: ignore[operator]
        self.then = nn.Sequential(*then)

    def forward(self, x: Tensor) -> Tensor:
        axes = (1, -1, *(1 for _ in x.shape[2:]))
        return self.then(x * self.factor.view(axes) + self.shift.view(axes))  # type: ignore[no-any-return]


def as_batch_norm(converted: nn.Module, original: nn.Module) -> nn.Module:
    """Return a converted network with the affine map of the old BatchNorm in the place of every new norm."""
    model, old = copy.deepcopy(converted), dict(original.named_modules(remove_duplicate=False))
    for name, module in list(model.named_modules(remove_duplicate=False)):
        norm = old.get(name)
        if isinstance(norm, _BatchNorm) and not isinstance(module, _BatchNorm):
            holder, _, key = name.rpartition(".")
            setattr(model.get_submodule(holder), key, Affine(norm, tuple(module.children())))
    return model


def typical(norm: _BatchNorm, dims: int) -> Tensor:
    """Return two samples whose statistics, channel by channel, are exactly a norm's running ones."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(2 ** (dims - 1)).view(*[2] * dims)
    axes = (1, -1, *[1] * dims)
    mean, std = norm.running_mean.view(axes), norm.running_var.sqrt().view(axes)  # type: ignore[union-attr]
    return torch.cat([mean + std * signs, mean - std * signs])


def gradients(model: nn.Module, batches: list[Tensor], within: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Return the gradients of a sum over batches, by parameter."""
    model = copy.deepcopy(model)
    with within(model):
        for batch in batches:
            model(batch).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def positive_factors(count: int) -> Tensor:
    """Return a factor for each filter."""
    return torch.linspace(0.5, 3, count, dtype=torch.float64)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


def is_exact(difference: float) -> bool:
    """Tell whether float64 sums in another order explain a difference."""
    return difference < 1e-9 and math.isfinite(difference)
