"""Small networks drawn by hypothesis: layers of every kind in the places where conversion treats them differently."""

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ACTS = (nn.Identity, nn.ReLU, nn.SiLU)
PARTS = ("conv norm", "residual", "forked", "norm conv", "norm")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
MAX_CHANNELS = 24


@dataclass(frozen=True)
class Drawn:
    """A network, an input of two or three samples for it, and the options to convert it with."""

    model: nn.Module
    x: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """Show hypothesis all that differs between examples, and not the input's values."""
        flags = [name for name, module in self.model.named_modules() if module.training]
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        printer.text(f"{self.model}\n{tuple(self.x.shape)} {self.x.dtype} {self.options} {flags=} {frozen=}")


class Residual(nn.Module):
    """A body beside a shortcut."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Forked(nn.Module):
    """One convolution that two norms read."""

    def __init__(self, conv: nn.Module, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.conv, self.first, self.second = conv, first, second

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.first(y) + self.second(y).relu()


@st.composite
def convs(draw: st.DrawFn, dims: int, inputs: int, side: int, *, same: bool = False) -> tuple[nn.Module, int]:
    """A convolution for `inputs` channels of `side` positions an axis, and the side of its output.

    With `same` its shape is kept, as a shortcut beside it needs.
    """
    groups = draw(st.sampled_from([d for d in range(1, inputs + 1) if inputs % d == 0]))
    outputs = inputs if same else groups * draw(st.integers(1, max(1, MAX_CHANNELS // groups)))
    options: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans()), "dilation": draw(st.integers(1, 2))}
    if same:
        kernel = draw(st.sampled_from([1, 3]))
        return CONVS[dims](inputs, outputs, kernel, padding="same", **options), side
    kernel, options["stride"] = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    span = options["dilation"] * (kernel - 1) + 1
    if draw(st.integers(0, 3)) == 3 and side < 8:
        padding = draw(st.integers(0, (span - 1) // 2))
        made = TRANSPOSED[dims](inputs, outputs, kernel, padding=padding, **options)
        return made, (side - 1) * options["stride"] + span - 2 * padding
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.integers(0, min(2, side - 1)))
    if span > side + 2 * padding:
        kernel, span, options["dilation"] = 1, 1, 1
    made = CONVS[dims](inputs, outputs, kernel, padding=padding, padding_mode=mode, **options)
    return made, (side + 2 * padding - span) // options["stride"] + 1


@st.composite
def norms(draw: st.DrawFn, dims: int, channels: int) -> nn.Module:
    """A BatchNorm with or without an affine part and statistics, fresh or trained."""
    affine, tracked = draw(st.booleans()), draw(st.booleans())
    norm = NORMS[dims](channels, draw(st.sampled_from([1e-5, 1e-3, 1e-12])), affine=affine, track_running_stats=tracked)
    if draw(st.booleans()):
        for tensor, low, high in (
            (norm.weight, -1.5, 1.5), (norm.bias, -1, 1), (norm.running_mean, -1, 1), (norm.running_var, 0.2, 3),
        ):  # fmt: skip
            if tensor is not None:
                nn.init.uniform_(tensor, low, high)
    return norm


@st.composite
def parts(draw: st.DrawFn, dims: int, channels: int, side: int) -> tuple[nn.Module, int, int]:
    """A piece of a network that holds a norm, and the channels and the side of its output."""
    kind, act = draw(st.sampled_from(PARTS)), draw(st.sampled_from(ACTS))()
    if kind == "norm":
        return nn.Sequential(draw(norms(dims, channels)), act), channels, side
    if kind == "residual":
        conv, _ = draw(convs(dims, channels, side, same=True))
        return Residual(nn.Sequential(conv, draw(norms(dims, channels)), act)), channels, side
    conv, after = draw(convs(dims, channels, side))
    outputs = int(conv.out_channels)  # type: ignore[arg-type]
    if kind == "norm conv":
        return nn.Sequential(draw(norms(dims, channels)), act, conv), outputs, after
    first = draw(norms(dims, outputs))
    made = Forked(conv, first, draw(norms(dims, outputs))) if kind == "forked" else nn.Sequential(conv, first, act)
    return made, outputs, after


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """The type of a network's tensors."""
    return st.sampled_from(DTYPES)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `convert`."""
    size = draw(st.none() | st.integers(1, 12))
    drawn = {
        "groups": draw(st.integers(1, 40) | st.just("auto")),
        "to": draw(st.sampled_from(["group", "group", "layer", "instance"])),
        "ws": draw(st.sampled_from(["auto", "adaptive", "standard", "none"])),
        "affine": draw(st.sampled_from(["match", "copy"])),
        "shrink": draw(st.none() | st.sampled_from([0, 0.25, 2])),
    }
    if size is not None and drawn["to"] == "group":
        drawn["group_size"] = size
    for silent, said in (
        ("groups", drawn["to"] != "group" or "group_size" in drawn),
        ("shrink", drawn["affine"] == "copy"),
    ):
        if said:  # an option that would say nothing beside another is refused
            del drawn[silent]
    return drawn


@st.composite
def networks(draw: st.DrawFn, dtype: st.SearchStrategy[torch.dtype] | None = None) -> Drawn:
    """A network of up to three parts, with its own flags module by module and parameter by parameter."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dims = draw(st.integers(1, 3))
    first = channels = draw(st.integers(1, 12))
    size = side = draw(st.integers(3, 9 if dims < 3 else 5))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        part, channels, side = draw(parts(dims, channels, side))
        layers.append(part)
    kind = draw(dtype or dtypes())
    model = nn.Sequential(*layers).to(kind)
    assume(model.state_dict())  # a network without a tensor has no type to keep
    for name, module in model.named_modules():
        module.training = draw(st.booleans(), label=f"{name}.training")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(draw(st.integers(0, 4), label=f"{name} frozen") < 4)
    x = torch.randn(draw(st.integers(2, 3)), first, *[size] * dims).to(kind)
    return Drawn(model, x, draw(options()))
