"""Trained float64 networks drawn from a grammar of blocks, and what plain torch says they compute."""

import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from strategies import CONVS, NORMS, TRANSPOSED
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BLOCKS = (
    "conv", "depthwise", "grouped", "transposed", "norm first", "added", "joined", "shuffled", "summed", "tied",
    "read", "zero branch", "other axis", "bare",
)  # fmt: skip
RARE = ("counted", "escaped", "deep")
"""Blocks that are drawn by themselves alone."""

DEPTH = 12
"""Branches that one block of the kind "deep" adds up."""

PASSES: Counter[str] = Counter()
"""What the code of a block counts outside of its network."""

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
        changed: What a user changes of a norm after the conversion: ``"groups"``, ``"eps"`` or nothing.
    """

    model: nn.Module
    x: Tensor
    options: dict[str, Any]
    words: tuple[str, ...]
    changed: str = ""

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(f"{self.words} {tuple(self.x.shape)} {self.options} {self.changed}\n{self.model}")


class Added(nn.Module):
    """A body beside a shortcut."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Counted(nn.Module):
    """A body that counts its passes outside of the network."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        PASSES["all"] += 1
        return self.body(x)  # type: ignore[no-any-return]


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


class Shuffled(nn.Module):
    """A norm that sees the channels of a convolution in another order."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))  # type: ignore[no-any-return]


class Summed(nn.Module):
    """Two convolutions of which a norm sees the sum; the second may start at zero, and must then be free to grow."""

    def __init__(self, conv: nn.Module, other: nn.Module, norm: nn.Module, *, zero: bool) -> None:
        super().__init__()
        self.conv, self.other, self.norm = conv, other, norm
        self.stay_plain = ("other",) if zero else ()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x) + self.other(x))  # type: ignore[no-any-return]


class OtherAxis(nn.Module):
    """A norm over the last axis of its input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


class Kernel(nn.Module):
    """The kernel of a convolution, held under another name."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.kernel, self.run = conv.weight, getattr(F, f"conv{conv.weight.ndim - 2}d")

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.kernel, padding=1)  # type: ignore[no-any-return]


def kept(block: Any, y: Tensor, z: Tensor) -> Tensor:
    """Return what a norm makes of an output that stays in an attribute."""
    block.last = y
    return block.norm(y)  # type: ignore[no-any-return]


def logged(block: Any, y: Tensor, z: Tensor) -> Tensor:
    """Return what a norm makes of an output that stays in a dict."""
    block.log["last"] = y.detach()
    return block.norm(y)  # type: ignore[no-any-return]


def on_a_grid(y: Tensor, z: Tensor) -> Tensor:
    """Return what lies where a tensor points; where there is no grid, two tensors weighed by it."""
    if y.ndim != 4:
        return torch.lerp(z, z.flip(1), 1e-2 * y)
    return F.grid_sample(z, (1e-2 * y[:, :2]).movedim(1, -1), align_corners=False)


def in_numpy(y: Tensor) -> float:
    """Return a number that torch sees nothing of."""
    return float(np.tanh(y.detach().numpy()).mean())


READERS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], tuple[str, ...]]] = {
    "sigmoid": (lambda block, y, z: block.norm(y) + y.sigmoid(), ("conv",)),
    "numpy": (lambda block, y, z: block.norm(y) + in_numpy(y), ("conv",)),
    "attribute": (kept, ("conv",)),
    "dict": (logged, ("conv",)),
    "square": (lambda block, y, z: block.norm(y * y), ("conv",)),
    "product": (lambda block, y, z: block.norm(y * z), ("conv", "other")),
    "index": (lambda block, y, z: block.norm(z.gather(1, (1e-9 * y).long())), ("conv",)),
    "weight": (lambda block, y, z: block.norm(torch.lerp(z, z.flip(1), 1e-2 * y)), ("conv",)),
    "grid": (lambda block, y, z: block.norm(on_a_grid(y, z)), ("conv",)),
    "list": (lambda block, y, z: block.norm(y) + sum(y.mean((0, 2)).flatten().tolist()), ("conv",)),
    "train": (lambda block, y, z: block.norm(y), ("conv",)),
    "its weight": (lambda block, y, z: block.norm(y) + block.conv.weight.square().mean(), ("conv",)),
    "another name": (lambda block, y, z: block.norm(y) + block.kernel(block.x).tanh(), ("conv",)),
    "another layer": (lambda block, y, z: block.norm(y) + z.tanh(), ("conv", "other")),
}
"""What reads the output ``y`` or the weight of ``conv`` beside a norm, and which convolutions must stay plain."""


class Read(nn.Module):
    """Two convolutions, of which something else than a norm reads the first."""

    def __init__(self, conv: Any, other: Any, norm: nn.Module, reader: str) -> None:
        super().__init__()
        self.conv, self.other, self.norm, self.reader = conv, other, norm, reader
        self.rule, self.stay_plain = READERS[reader]
        self.log: dict[str, Tensor] = {}
        if reader == "another name":
            self.kernel = Kernel(conv)
        if reader == "another layer":
            other.weight = conv.weight

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["x"] = x if self.reader == "another name" else None
        y = self.conv(x)
        out = self.rule(self, y, self.other(x))
        if self.training and self.reader == "train":
            out = out + y.tanh()
        self.__dict__["x"] = None
        return out


Kind = Callable[[type[_BatchNorm]], type[nn.Module]]


def with_activation(base: type[_BatchNorm]) -> type[_BatchNorm]:
    """Return a norm class that runs an activation of its own afterwards."""

    class WithActivation(base):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.act = nn.SiLU()

        def forward(self, input: Tensor) -> Tensor:
            return self.act(super().forward(input))  # type: ignore[no-any-return]

    return WithActivation


def by_hand(base: type[_BatchNorm]) -> type[_BatchNorm]:
    """Return a norm class that calls torch's function itself, and a count of its own."""

    class ByHand(base):  # type: ignore[misc, valid-type]
        def forward(self, input: Tensor) -> Tensor:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
            )

    return ByHand


def duck(centred: bool = True) -> Kind:
    """Return the kind of frozen norms that are no BatchNorm by class; not centred, they compute something else."""

    class Duck(nn.Module):
        def __init__(self, channels: int, eps: float, affine: bool = True) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))
            self.eps, self.cannot_be_replaced = eps, not centred

        def forward(self, input: Tensor) -> Tensor:
            axes = (1, -1, *[1] * (input.ndim - 2))
            mean, var = self.running_mean.view(axes), self.running_var.view(axes)  # type: ignore[operator, union-attr]
            y = (input - mean if centred else input) * (var + self.eps).rsqrt()
            y = y if self.weight is None else y * self.weight.view(axes)
            return y if self.bias is None else y + self.bias.view(axes)

    return lambda base: Duck


def departing(change: Callable[[Any, Callable[[Tensor], Tensor], Tensor], Tensor]) -> Kind:
    """Return the kind of norms that compute something else, which can only stay as they are."""

    def kind(base: type[_BatchNorm]) -> type[_BatchNorm]:
        class Departing(base):  # type: ignore[misc, valid-type]
            cannot_be_replaced = True

            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                self.act = nn.ReLU() if change is activated_before else None

            def forward(self, input: Tensor) -> Tensor:
                return change(self, super().forward, input)

        return Departing

    return kind


def with_eps(norm: Any, batch_norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """BatchNorm with another epsilon than it says."""
    own = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return F.batch_norm(x, *own, norm.training, 0.1, norm.eps + 0.01)


def with_more_gamma(norm: Any, batch_norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """BatchNorm whose factor is γ + 1."""
    return batch_norm(x) + F.batch_norm(x, norm.running_mean, norm.running_var, None, None, norm.training, 0, norm.eps)


def activated_before(norm: Any, batch_norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """BatchNorm behind an activation of its own."""
    return batch_norm(norm.act(x))


def over_the_last_axis(norm: Any, batch_norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """BatchNorm whose channels are the last axis."""
    return batch_norm(x.transpose(1, -1)).transpose(1, -1)


DEPARTING: dict[str, Kind] = {
    "factor": departing(lambda norm, batch_norm, x: 2 * batch_norm(x)),
    "gate": departing(lambda norm, batch_norm, x: x * batch_norm(x).sigmoid()),
    "eps": departing(with_eps),
    "gamma": departing(with_more_gamma),
    "train": departing(lambda norm, batch_norm, x: batch_norm(x) * (2 if norm.training else 1)),
    "noise": departing(lambda norm, batch_norm, x: (y := batch_norm(x)) + 1e-6 * torch.randn_like(y)),
    "activation before": departing(activated_before),
    "activation after": departing(lambda norm, batch_norm, x: batch_norm(x).relu()),
    "flip": departing(lambda norm, batch_norm, x: batch_norm(x).flip(1)),
    "duck": duck(centred=False),
}
LAST_AXIS = departing(over_the_last_axis)
FAITHFUL: dict[str, Kind] = {
    "torch's": lambda base: base, "with an activation": with_activation, "by hand": by_hand, "frozen duck": duck(),
}  # fmt: skip


@st.composite
def trained_norms(draw: st.DrawFn, dims: int, channels: int, kind: Kind | None = None) -> Any:
    """A norm with statistics, its affine part there or not; classes that compute something else among them.

    Some have a channel that is quiet beside a loud one, and is heard by BatchNorm; some start at zero.
    """
    if kind is None:
        kinds = FAITHFUL if draw(st.integers(0, 3)) else DEPARTING
        kind = kinds[draw(st.sampled_from(list(kinds)))]
    norm: Any = kind(NORMS[dims])(channels, draw(st.sampled_from([1e-5, 1e-3, 0.1])), affine=draw(st.booleans()))
    if not draw(st.integers(0, 3)):
        norm.register_parameter("bias", None)
    for tensor, low, high in (
        (norm.weight, -1.5, 1.5), (norm.bias, -1, 1), (norm.running_mean, -1, 1), (norm.running_var, 0.2, 3),
    ):  # fmt: skip
        if tensor is not None:
            nn.init.uniform_(tensor, low, high)
    if draw(st.integers(0, 2)) == 2:
        norm.running_var[:2] = norm.eps * torch.tensor([1, 5e9])
    if norm.weight is not None and draw(st.integers(0, 5)) == 5:
        nn.init.zeros_(norm.weight)
    return norm


@st.composite
def blocks(
    draw: st.DrawFn, kind: str, dims: int, channels: int, side: int, of: Kind | None = None
) -> tuple[nn.Module, int]:
    """A block of a kind, and the channels of its output; it keeps the size of its input, or adds one to it.

    The kind may be what reads a convolution, too. Its norms are of one kind where that is given.
    """

    def norm(count: int) -> nn.Module:
        return draw(trained_norms(dims, count, of))  # type: ignore[no-any-return]

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
    if kind == "counted":
        return Counted(nn.Sequential(conv(channels, outputs), norm(outputs), nn.ReLU())), outputs
    if kind == "escaped":
        body = nn.Sequential(conv(channels, outputs), norm(outputs), nn.ReLU())
        return nn.Sequential(OrderedDict([(draw(st.sampled_from(["\x1b[2J", "a\nb"])), body)])), outputs
    if kind == "deep":
        branches = (nn.Sequential(norm(channels), nn.ReLU(), conv(channels, channels)) for _ in range(DEPTH))
        return nn.Sequential(*map(Added, branches), norm(channels)), channels
    if kind == "joined":
        return Joined(conv(channels, outputs), conv(channels, 4), norm(outputs + 4)), outputs + 4
    if kind == "tied":
        return Tied(conv(channels, channels), norm(channels)), channels
    if kind == "shuffled":
        return Shuffled(conv(channels, outputs), norm(outputs)), outputs
    if kind in ("summed", "zero branch"):
        zero = kind == "zero branch"
        return Summed(conv(channels, outputs), conv(channels, outputs), norm(outputs), zero=zero), outputs
    if kind == "read" or kind in READERS:
        reader = draw(st.sampled_from(list(READERS))) if kind == "read" else kind
        return Read(conv(channels, outputs), conv(channels, outputs), norm(outputs), reader), outputs
    if kind == "other axis":
        return OtherAxis(draw(trained_norms(dims, side, LAST_AXIS))), channels
    return nn.Sequential(conv(channels, outputs), norm(outputs), nn.ReLU()), outputs


NAMED = {f"norm: {name}": kind for name, kind in (*FAITHFUL.items(), *DEPARTING.items())}
WORDS = (*BLOCKS, *RARE, *READERS, *NAMED)
"""What every test of the grammar should have met."""


@st.composite
def sentences(draw: st.DrawFn, word: str | None = None) -> Sentence:
    """A network of a few blocks and a tail, one block of them as a word says and with norms that can be replaced."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    word = draw(st.sampled_from(WORDS)) if word is None else word
    dims = draw(st.integers(1, 3))
    first = channels = draw(st.sampled_from([4, 8]))
    size = side = draw(st.integers(3, 5))
    words, layers = [f"{dims}d"], list[nn.Module]()
    kinds: list[str] = draw(st.lists(st.sampled_from(BLOCKS), max_size=2))
    kinds.insert(place := draw(st.integers(0, len(kinds))), word)
    of = NAMED.get(word) or FAITHFUL[draw(st.sampled_from(list(FAITHFUL)))]
    for index, kind in enumerate(kinds):
        made = "conv" if kind.startswith("norm: ") else kind
        block, channels = draw(blocks(made, dims, channels, side, of if index == place else None))
        side += kind == "transposed"  # of stride 1 and a kernel of 2
        layers.append(block)
        words.append(getattr(block, "reader", kind))
    tail = draw(st.sampled_from(TAILS))
    if tail != "none":
        layers += [POSITIONS[dims](1), nn.Flatten(), nn.Linear(channels, 8)]
        layers += [draw(trained_norms(1, 8)), nn.ReLU()] if tail == "linear and norm" else []
        words.append(tail)
    model = nn.Sequential(*layers).double().eval()
    options: dict[str, Any] = {
        "groups": draw(st.sampled_from([1, 2, 4, 32, "auto"])),
        "ws": draw(st.sampled_from(["standard", "auto", "standard", "adaptive", "standard", "none"])),
        "shrink": draw(st.sampled_from([None, 0, 1.0])),
        "equalize": False,  # the oracle puts the old norms behind the filters as they were
    }
    others = [name for name, norm in model.named_modules() if is_norm(norm) and not name.startswith(f"{place}.")]
    if others and draw(st.booleans()):
        options["exclude"] = [draw(st.sampled_from(others))]
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "kernel_size") and hasattr(module, "weight"):
                nn.init.normal_(module.weight)  # type: ignore[arg-type]
                if options["ws"] == "standard":
                    centre(module)
        for module in model.modules():
            if isinstance(module, Summed) and module.stay_plain:
                module.other.weight.zero_()  # type: ignore[operator, union-attr]
    x = torch.randn(3, first, *[size] * dims, dtype=torch.float64)
    return Sentence(model, x, options, tuple(words), draw(st.sampled_from(["groups", "eps", ""])))


def centre(conv: Any) -> None:
    """Give filters a mean of zero and sizes of their own: the standard form then only scales what they compute."""
    transposed = hasattr(conv, "output_padding") and any(isinstance(conv, kind) for kind in TRANSPOSED.values())
    filters = conv.weight.unflatten(0, (conv.groups, -1))
    filters = filters.transpose(1, 2) if transposed else filters  # groups, outputs, inputs, positions
    axes = tuple(range(2, filters.ndim))
    filters -= filters.mean(axes, keepdim=True)
    filters *= torch.linspace(0.5, 2, filters.shape[1], dtype=filters.dtype).view(-1, *[1] * len(axes))


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is one of the grammar's norms, whatever it computes."""
    return isinstance(module, _BatchNorm) or type(module).__name__ == "Duck"


def is_faithful(norm: nn.Module) -> bool:
    """Tell whether a norm computes what BatchNorm does, and can be replaced."""
    return not getattr(norm, "cannot_be_replaced", False)


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


def feeders(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Return the convolution whose very output each norm gets, by the norm's name; only where that is always one."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names.setdefault(module, name)
    made, found, keep = dict[int, str](), dict[str, set[str]](), list[Tensor]()

    def leaving(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if is_norm(module):
            found.setdefault(names[module], set()).add(made.get(id(arguments[0]), ""))
        elif hasattr(module, "kernel_size"):
            made[id(output)] = names[module]
            keep.append(output)

    hooks = [module.register_forward_hook(leaving) for module in names]
    run(model, x)
    for hook in hooks:
        hook.remove()
    return {norm: next(iter(convs)) for norm, convs in found.items() if len(convs) == 1 and "" not in convs}


def rescaled(old: Any, new: Any) -> tuple[Tensor, Tensor]:
    """Return by what a convolution multiplies its outputs now, channel by channel, and its bias, which stays."""
    x = torch.randn(2, old.in_channels, *[7] * (old.weight.ndim - 2), dtype=torch.float64)
    bias = torch.zeros(old.out_channels, dtype=torch.float64) if old.bias is None else old.bias.detach()
    axes = (1, -1, *[1] * (x.ndim - 2))
    before, after = ((conv(x) - bias.view(axes)).movedim(1, 0).flatten(1) for conv in (old, new))
    return (before * after).sum(1) / before.square().sum(1), bias


class Undone(nn.Module):
    """Undo a scale per channel around a bias, before a module."""

    def __init__(self, scale: Tensor, bias: Tensor, then: nn.Module) -> None:
        super().__init__()
        self.scale, self.bias, self.then = scale, bias, then

    def forward(self, x: Tensor) -> Tensor:
        axes = (1, -1, *(1 for _ in x.shape[2:]))
        bias = self.bias.view(axes)
        return self.then((x - bias) / self.scale.view(axes) + bias)  # type: ignore[no-any-return]


def as_batch_norm(converted: nn.Module, original: nn.Module, fed_by: dict[str, str]) -> nn.Module:
    """Return a converted network with the affine map of the old BatchNorm in the place of every new norm.

    A convolution in the standard form scales what a norm alone reads; that is undone in front of it.
    """
    model, old = copy.deepcopy(converted), dict(original.named_modules(remove_duplicate=False))
    first: dict[nn.Module, str] = {}
    for name, module in old.items():
        first.setdefault(module, name)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        norm = old.get(name)
        if norm is not None and is_norm(norm) and isinstance(module, nn.GroupNorm):
            holder, _, key = name.rpartition(".")
            affine: nn.Module = Affine(norm, tuple(module.children()))
            conv = fed_by.get(first[norm])
            if conv is not None and getattr(converted.get_submodule(conv), "form", "") == "standard":
                affine = Undone(*rescaled(original.get_submodule(conv), converted.get_submodule(conv)), affine)
            setattr(model.get_submodule(holder), key, affine)
    return model


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Return what a network computes; what is drawn is drawn alike."""
    torch.manual_seed(0)
    return model(x)  # type: ignore[no-any-return]


def typical(norm: Any, dims: int) -> Tensor:
    """Return two samples whose statistics, channel by channel, are exactly a norm's running ones."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(2 ** (dims - 1)).view(*[2] * dims)
    axes = (1, -1, *[1] * dims)
    mean, std = norm.running_mean.view(axes), norm.running_var.sqrt().view(axes)
    return torch.cat([mean + std * signs, mean - std * signs])


def gradients(model: nn.Module, batches: list[Tensor], within: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Return the gradients of a sum over batches, by parameter, of two steps of an optimizer that trains all."""
    model, found = copy.deepcopy(model).requires_grad_(True), dict[str, Tensor]()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, weight_decay=0.5)
    for step in range(2):
        optimizer.zero_grad()
        with within(model):
            for batch in batches:
                run(model, batch).square().mean().backward()
        found |= {f"{name} {step}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return found


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy after a step of an optimizer that trains all there is."""
    model = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)
    run(model, x).square().mean().backward()
    optimizer.step()
    return model


def positive_factors(count: int) -> Tensor:
    """Return a factor for each filter."""
    return torch.linspace(0.5, 3, count, dtype=torch.float64)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


def is_exact(difference: float) -> bool:
    """Tell whether float64 sums in another order explain a difference."""
    return difference < 1e-9 and math.isfinite(difference)
