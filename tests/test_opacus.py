"""Opacus: validation, per-sample gradients and training of converted networks."""

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.layers.convs import WeightStandardized

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
]
BATCH, CLASSES = 4, 5
EXACT = 1e-10
"""Allowed in float64; in float32 rounding alone comes to 3e-5 of the largest gradient in a network of 49 norms."""


class Shapes(nn.Module):
    """Convolutions of every kind that conversion replaces by a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.grouped, self.bn2 = nn.Conv2d(16, 16, 3, groups=4, bias=False), nn.BatchNorm2d(16)
        self.same, self.bn3 = timm.layers.Conv2dSame(16, 16, 3, stride=2), nn.BatchNorm2d(16)
        self.up, self.bn4 = nn.ConvTranspose2d(16, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn1(self.plain(x)))
        y = F.silu(self.bn2(self.grouped(y)))
        y = F.silu(self.bn3(self.same(y)))
        return self.head(self.bn4(self.up(y)).mean((2, 3)))


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "shapes": Shapes,
    "test_efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=CLASSES),
    "efficientnet_b0": lambda: timm.create_model("efficientnet_b0", num_classes=CLASSES),
}
ALL = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
FORMS = pytest.mark.parametrize("ws", ["adaptive", "standard"])


def ready(build: Callable[[], nn.Module], ws: str) -> nn.Module:
    """Convert, and switch in-place activations off: Opacus' hooks do not go with them."""
    model = normswap.convert(build(), ws=ws, example_input=torch.zeros(2, 3, 32, 32)).train()
    assert any(isinstance(module, WeightStandardized) for module in model.modules())
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return model


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, 32, 32, dtype=torch.float64), torch.randint(0, CLASSES, (BATCH,))


def one_at_a_time(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Per-sample gradients by a backward pass for each sample."""
    rows: dict[str, list[Tensor]] = {name: [] for name, p in model.named_parameters() if p.requires_grad}
    for image, label in zip(images, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()
        for name in rows:
            rows[name].append(model.get_parameter(name).grad.clone())
    model.zero_grad()
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


@ALL
@FORMS
def test_hooks_give_the_oracles_gradients(build: Callable[[], nn.Module], ws: str) -> None:
    model, (images, labels) = ready(build, ws).double(), batch()
    expected = one_at_a_time(model, images, labels)
    private = GradSampleModule(model, loss_reduction="sum", strict=True)
    F.cross_entropy(private(images), labels, reduction="sum").backward()
    for name, gradients in expected.items():
        difference = (model.get_parameter(name).grad_sample - gradients).abs().max()
        assert difference <= EXACT * gradients.abs().max(), name


@ALL
@FORMS
def test_ghost_mode_gives_the_oracles_norms(build: Callable[[], nn.Module], ws: str) -> None:
    model, (images, labels) = ready(build, ws).double(), batch()
    expected = one_at_a_time(model, images, labels)
    private = GradSampleModuleFastGradientClipping(
        model, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True, strict=True
    )
    F.cross_entropy(private(images), labels, reduction="sum").backward()
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in expected.values()]).norm(dim=0)
    torch.testing.assert_close(private.get_norm_sample(), norms, rtol=EXACT, atol=EXACT)


def test_opacus_own_fixer_leaves_every_norm_of_efficientnet_b0() -> None:
    model = timm.create_model("efficientnet_b0", num_classes=CLASSES)
    assert sum(isinstance(module, _BatchNorm) for module in model.modules()) == 49
    fixed = ModuleValidator.fix(model)
    assert sum(isinstance(module, _BatchNorm) for module in fixed.modules()) == 49
    assert ModuleValidator.is_valid(fixed)  # it looks at exact types, and timm's norms are subclasses
    converted = ready(lambda: model, "auto")
    assert not any(isinstance(module, _BatchNorm) for module in converted.modules())
    assert ModuleValidator.is_valid(converted)
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % CLASSES)
    optimizer = torch.optim.SGD((p for p in converted.parameters() if p.requires_grad), lr=0.1)
    before = {name: p.detach().clone() for name, p in converted.named_parameters() if p.requires_grad}
    private, optimizer, loader = PrivacyEngine().make_private(
        module=converted, optimizer=optimizer, data_loader=DataLoader(data, batch_size=4),
        noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=False,
    )  # fmt: skip
    for image, label in loader:
        optimizer.zero_grad()
        F.cross_entropy(private(image), label).backward()
        optimizer.step()
    assert all(bool((p.detach() != before[name]).any()) for name, p in converted.named_parameters() if name in before)
    assert all(bool(p.isfinite().all()) for p in converted.parameters())
