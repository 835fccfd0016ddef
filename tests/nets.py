"""One tiny network for each structural hazard, with what must become of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

CHANNELS = 8


@dataclass(frozen=True)
class Case:
    """A network, an example input, and the expected outcome by layer name.

    `norms` maps every norm to its group count (None: left alone); `convs` names the standardized convolutions;
    `kept` gives a part of the reason for convolutions left plain.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    norms: dict[str, int | None]
    convs: set[str] = field(default_factory=set)
    kept: dict[str, str] = field(default_factory=dict)
    warns: str = ""


class Net(nn.Module):
    """Base that takes its parts by keyword."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def warm(model: nn.Module) -> nn.Module:
    """Give every norm statistics that look trained, so that conversion is adaptive and matched."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def conv(inputs: int = 3, outputs: int = CHANNELS, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


class Direct(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class ReversedOrder(nn.Module):
    """Registered in another order than it runs, so that registration order names the wrong parent."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv2, self.bn2, self.conv1 = nn.BatchNorm2d(8), conv(8), nn.BatchNorm2d(8), conv(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class ThroughView(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y.flatten(2).transpose(1, 2).transpose(1, 2)).view_as(y)


class Split(Net):
    """IBN-Net: half of a convolution's channels go to BatchNorm, half to InstanceNorm."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).split(CHANNELS // 2, 1)
        return torch.cat([self.bn(a.contiguous()), self.inorm(b.contiguous())], 1)


class Cat(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat([self.a(x), self.b(x)], 1))


class PreActivation(Net):
    """Every path from a and b ends in bn1 or bn2; c feeds the sum and leaves the network."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y + self.b(F.relu(self.bn1(y)))
        return y.mean() * 0 + self.c(F.relu(self.bn2(y)))


class PreActivationClean(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y + self.b(F.relu(self.bn1(y)))
        return F.relu(self.bn2(y))


class SliceWrite(Net):
    """Writes into slices of an empty tensor, which functional tracers lose."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], 2 * CHANNELS, *x.shape[2:])
        y[:, :CHANNELS] = self.a(x)
        y[:, CHANNELS:] = self.b(x)
        return self.bn(y)


class SqueezeExcite(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))


class Pooled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(F.adaptive_avg_pool2d(x, 1)))


class Shared(Net):
    """One BatchNorm object under two names."""

    def __init__(self) -> None:
        super().__init__(a=conv(), b=conv(CHANNELS), bn=nn.BatchNorm2d(CHANNELS))
        self.alias = self.bn

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.b(self.bn(self.a(x))))


class InLists(nn.Module):
    """The layers that run are reached through a plain list beside their registration."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(CHANNELS)
        self.steps = [self.conv, self.bn]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Auxiliary(Net):
    """A head that only runs in train mode."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.bn(self.conv(x))
        return (y, self.aux_bn(self.aux(y))) if self.training else y


class DeadCode(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class SharedConv(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv(x)) + self.bn2(self.conv(x.flip(-1)))


class TwoSizes(Net):
    """One norm on a map and on its mean: the group count must fit both."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + self.bn(y.mean((2, 3), keepdim=True))


class TiedWeights(Net):
    def __init__(self) -> None:
        super().__init__(a=conv(), b=conv(), bn=nn.BatchNorm2d(CHANNELS))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) + F.relu(self.b(x))


class WithAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d and inplace-ABN: the activation lives inside the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class WithFunction(nn.BatchNorm2d):
    """An activation without a module, which no replacement could carry over."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class DuckFrozen(nn.Module):
    """As the frozen norms of detection code: buffers alone, no BatchNorm base class."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.5), ("bias", 0.5), ("running_mean", 0.25), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class SamePadding(nn.Conv2d):
    """A subclass whose own forward pads."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class Masked(nn.Conv2d):
    """A kernel computed in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * 0.5, self.bias)


class FlattenedBatch(Net):
    """LeViT's LinearNorm: BatchNorm1d sees (batch × tokens, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.bn(y.flatten(0, 1)).reshape_as(y)


class FunctionalNorm(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.bn(self.conv(x)), None, None, training=True)


class Fusable(Direct):
    def fuse(self) -> None:
        raise AssertionError("folding is not what is tested")


class Adapted(Net):
    """A layer with two adapters of low rank, whose products may be added to its kernel."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for down, up in ((self.a, self.b), (self.c, self.d)):
            y = y + 0.5 * up(F.dropout(down(x), 0.1, self.training))
        return self.bn(y)


class Delta(Net):
    """A layer beside which the product of two matrices convolves, as an update of its kernel."""

    def __init__(self) -> None:
        super().__init__(conv=conv(), bn=bn())
        self.a, self.b = nn.Parameter(torch.randn(CHANNELS, 2)), nn.Parameter(torch.randn(2, 27))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + F.conv2d(x, (self.a @ self.b).view(CHANNELS, 3, 3, 3), padding=1))


class Parallel(Net):
    """Two convolutions side by side, and a third that reads another input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x) + self.b(x) + self.d(self.c(F.relu(x))))


class BlurPool(Net):
    """A fixed filter kept as a buffer, between a convolution and its norm."""

    def __init__(self) -> None:
        super().__init__(conv=conv(), bn=nn.BatchNorm2d(CHANNELS))
        self.register_buffer("filt", torch.ones(CHANNELS, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(self.conv(x), self.filt, groups=CHANNELS))


class Forces(Net):
    """An energy and its derivative by the positions, as networks of molecules and fields put out."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.head(self.bn(self.conv(x)).sigmoid().mean((2, 3)))
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=self.training)
        return torch.cat([energy, force.flatten(1)], 1)


def bn(channels: int = CHANNELS) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


IMAGE = (2, 3, 8, 8)
ONE = {"bn": 4}
CASES: dict[str, Case] = {
    "direct": Case(lambda: Direct(conv=conv(), bn=bn()), IMAGE, ONE, {"conv"}),
    "biased conv": Case(lambda: Direct(conv=conv(bias=True), bn=bn()), IMAGE, ONE, {"conv"}),
    "reversed order": Case(ReversedOrder, IMAGE, {"bn1": 4, "bn2": 4}, {"conv1", "conv2"}),
    "view": Case(lambda: ThroughView(conv=conv(), bn=nn.BatchNorm1d(CHANNELS)), IMAGE, ONE, {"conv"}),
    "split": Case(lambda: Split(conv=conv(), bn=bn(4), inorm=nn.InstanceNorm2d(4)), IMAGE, {"bn": 2}, {"conv"}),
    "cat": Case(lambda: Cat(a=conv(), b=conv(), bn=bn(16)), IMAGE, {"bn": 8}, {"a", "b"}),
    "pre-activation": Case(
        lambda: PreActivationClean(a=conv(), b=conv(8), bn1=bn(), bn2=bn()), IMAGE, {"bn1": 4, "bn2": 4}, {"a", "b"}
    ),
    "read before the norm": Case(
        lambda: PreActivation(a=conv(), b=conv(8), c=conv(8), bn1=bn(), bn2=bn()), IMAGE, {"bn1": 4, "bn2": 4}, set(),
        {"a": "leaves the network|read by", "b": "leaves the network|read by", "c": "leaves the network"},
    ),
    "slice write": Case(lambda: SliceWrite(a=conv(), b=conv(), bn=bn(16)), IMAGE, {"bn": 8}, {"a", "b"}),
    "squeeze-excite": Case(
        lambda: SqueezeExcite(conv=conv(), bn=bn(), gate=conv(8, 8, 1)), IMAGE, ONE, {"conv"}, {"gate": "sigmoid"}
    ),
    "1x1 map": Case(lambda: Pooled(conv=conv(3, 64, 1), bn=bn(64)), IMAGE, {"bn": 4}, {"conv"}),
    "one value": Case(lambda: Pooled(conv=conv(3, 1, 1), bn=bn(1)), IMAGE, {"bn": None}, {"conv"}),
    "shared norm": Case(Shared, IMAGE, ONE, {"a", "b"}),
    "plain list": Case(InLists, IMAGE, ONE, {"conv"}),
    "auxiliary head": Case(
        lambda: Auxiliary(conv=conv(), bn=bn(), aux=conv(8), aux_bn=bn()), IMAGE, {"bn": 4, "aux_bn": 4},
        {"conv", "aux"},
    ),
    "dead code": Case(
        lambda: DeadCode(conv=conv(), bn=bn(), old=conv(), old_bn=bn()), IMAGE, {"bn": 4, "old_bn": 4}, {"conv"},
        {"old": "no forward pass"}, "never reached",
    ),
    "shared conv": Case(lambda: SharedConv(conv=conv(), bn1=bn(), bn2=bn()), IMAGE, {"bn1": 4, "bn2": 4}, {"conv"}),
    "two sizes": Case(lambda: TwoSizes(conv=conv(3, 64), bn=bn(64)), IMAGE, {"bn": 4}, {"conv"}),
    "tied weights": Case(TiedWeights, IMAGE, ONE, set(), {"a": "shares its weight", "b": "relu"}),
    "activation inside": Case(lambda: Direct(conv=conv(), bn=WithAct(8)), IMAGE, ONE, {"conv"}),
    "function inside": Case(
        lambda: Direct(conv=conv(), bn=WithFunction(8)), IMAGE, {"bn": None}, set(), {"conv": "left as it is"}
    ),
    "frozen": Case(lambda: Direct(conv=conv(), bn=FrozenBatchNorm2d(8)), IMAGE, ONE, {"conv"}),
    "duck-typed frozen": Case(lambda: Direct(conv=conv(), bn=DuckFrozen(8)), IMAGE, ONE, {"conv"}),
    "conv subclass": Case(lambda: Direct(conv=SamePadding(3, 8, 3), bn=bn()), IMAGE, ONE, {"conv"}),
    "computed kernel": Case(
        lambda: Direct(conv=Masked(3, 8, 3), bn=bn()), IMAGE, ONE, set(), {"conv": "kernel is computed"}
    ),
    "weight_norm": Case(
        lambda: Direct(conv=torch.nn.utils.parametrizations.weight_norm(conv()), bn=bn()), IMAGE, ONE, set(),
        {"conv": "kernel is computed"},
    ),
    "fan-in 1": Case(
        lambda: Direct(conv=conv(8, 8, 1, groups=8), bn=bn()), (2, 8, 8, 8), ONE, set(), {"conv": "fan-in 1"}
    ),
    "transposed": Case(lambda: Direct(conv=nn.ConvTranspose2d(3, 8, 3), bn=bn()), IMAGE, ONE, {"conv"}),
    "1d": Case(lambda: Direct(conv=nn.Conv1d(3, 8, 3), bn=nn.BatchNorm1d(8)), (2, 3, 16), ONE, {"conv"}),
    "3d": Case(lambda: Direct(conv=nn.Conv3d(3, 8, 3), bn=nn.BatchNorm3d(8)), (2, 3, 6, 6, 6), ONE, {"conv"}),
    "linear": Case(lambda: Direct(conv=nn.Linear(12, 64), bn=nn.BatchNorm1d(64)), (2, 12), {"bn": 4}),
    "no affine": Case(lambda: Direct(conv=conv(), bn=nn.BatchNorm2d(8, affine=False)), IMAGE, ONE, {"conv"}),
    "no statistics": Case(
        lambda: Direct(conv=conv(), bn=nn.BatchNorm2d(8, track_running_stats=False)), IMAGE, ONE, {"conv"}
    ),
    "sync": Case(lambda: Direct(conv=conv(), bn=nn.SyncBatchNorm(8)), IMAGE, ONE, {"conv"}),
    "adapted": Case(
        lambda: Adapted(base=conv(), a=conv(3, 2), b=conv(2, 8, 1), c=conv(3, 2), d=conv(2, 8, 1), bn=bn()), IMAGE, ONE,
        set(), {"base": "adds up over one input with b, as a layer and its adapter do", "b": "with base, as a layer",
                "d": "with base, as a layer", "a": "read by b"}, "adapters",
    ),
    "delta": Case(Delta, IMAGE, ONE, set(), {"conv": "as a layer and its adapter do"}, "adapters"),
    "parallel": Case(
        lambda: Parallel(a=conv(), b=conv(), c=conv(3, 2, 1), d=conv(2), bn=bn()), IMAGE, ONE, {"a", "b", "d"},
        {"c": "read by d"},
    ),
    "blur filter": Case(BlurPool, IMAGE, ONE, set(), {"conv": "read by"}),
    "flattened batch": Case(
        lambda: FlattenedBatch(linear=nn.Linear(12, 64), bn=nn.BatchNorm1d(64)), (2, 4, 12), {"bn": 4},
        warns="flattened batch",
    ),
    "fusable": Case(lambda: Fusable(conv=conv(), bn=bn()), IMAGE, ONE, {"conv"}, warns="fold"),
    "derivatives": Case(
        lambda: Forces(conv=conv(), bn=bn(), head=nn.Linear(8, 1)), IMAGE, ONE, set(), {"conv": "convolution_backward"}
    ),
    "channels 7": Case(lambda: Direct(conv=conv(3, 7), bn=bn(7)), IMAGE, {"bn": 1}, {"conv"}),
}  # fmt: skip


def small_resnet() -> nn.Module:
    """A ResNet of torchvision with one block a stage and made-up statistics, in eval mode."""
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


SMALL_IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
"""What `small_resnet` is shown."""


def moved(model: nn.Module, by: float = 0.05) -> nn.Module:
    """Move all parameters, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return model
