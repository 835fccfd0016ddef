"""Opacus on networks that add in place: torchvision's and timm's ResNets, after `normswap.out_of_place`."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from opacus import PrivacyEngine
from opacus.grad_sample.utils import wrap_model
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.errors import WrittenInPlace

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is not a leaf Tensor.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]
BUILDS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: torchvision.models.resnet18(num_classes=5),
    "timm": lambda: timm.create_model("resnet18", num_classes=5),
}
ALL = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
X, LABELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
MODES = {"hooks": False, "functorch": False, "ew": True}
"""Opacus' ways to per-sample gradients, and whether the convolutions must be plain: ew knows no computed kernels."""


def converted(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return normswap.convert(build(), example_input=X[:2]).train()


@ALL
@pytest.mark.parametrize(("mode", "folded"), MODES.items(), ids=MODES)
def test_per_sample_gradients_are_those_of_one_backward_pass_a_sample(
    build: Callable[[], nn.Module], mode: str, folded: bool
) -> None:
    model = converted(build).double()
    model = normswap.fold(model) if folded else model
    expected: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for image, label in zip(X.double(), LABELS, strict=True):
        plain = copy.deepcopy(model)
        F.cross_entropy(plain(image[None]), label[None]).backward()
        for name, parameter in plain.named_parameters():
            expected[name].append(parameter.grad)  # type: ignore[arg-type]
    private = wrap_model(normswap.out_of_place(model), grad_sample_mode=mode, loss_reduction="sum")
    F.cross_entropy(private(X.double()), LABELS, reduction="sum").backward()
    found = {name.removeprefix("_module."): p.grad_sample for name, p in private.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradients in expected.items():
        oracle = torch.stack(gradients)
        assert (found[name] - oracle).abs().max() <= 1e-9 * oracle.abs().max(), name


@ALL
@pytest.mark.parametrize(("mode", "folded"), MODES.items(), ids=MODES)
def test_two_private_steps(build: Callable[[], nn.Module], mode: str, folded: bool) -> None:
    model = converted(build)
    model = normswap.out_of_place(normswap.fold(model) if folded else model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = DataLoader(TensorDataset(X.repeat(2, 1, 1, 1), LABELS.repeat(2)), batch_size=3)
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=data, noise_multiplier=1.0,
        max_grad_norm=1.0, poisson_sampling=False, grad_sample_mode=mode,
    )  # fmt: skip
    steps = 0
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(private(images), labels).backward()
        optimizer.step()
        steps += 1
    assert steps == 2
    assert all(bool((p.detach() != before[name]).any()) for name, p in model.named_parameters())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@ALL
def test_without_it_opacus_does_not_run(build: Callable[[], nn.Module]) -> None:
    private = wrap_model(converted(build), grad_sample_mode="hooks")
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        private(X)


@ALL
def test_the_function_and_its_gradients_are_the_same_to_the_bit(build: Callable[[], nn.Module]) -> None:
    model = converted(build)
    switched = normswap.out_of_place(model)
    assert any(getattr(module, "inplace", False) for module in model.modules())
    assert not any(getattr(module, "inplace", False) for module in switched.modules())
    for each in (model, switched):
        each(X).square().sum().backward()
    for ours, theirs in zip(switched.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    assert torch.equal(switched(X), model(X))
    assert switched.state_dict().keys() == model.state_dict().keys()
    assert normswap.plan_of(switched) == normswap.plan_of(model)


class Writes(nn.Module):
    """Changes what a layer returned in place: by assignment, by a statement, or under another name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.how == "assignment":
            y *= x
            y -= 1
        elif self.how == "function":
            y = F.silu(y, inplace=True)
        elif self.how == "method":
            y = y.add_(x, alpha=2).relu_()
        elif self.how == "statement":
            y.add_(x)
        else:
            other = y.view(-1)
            y += x
            y = y + other.view_as(y)
        return y * 2


@pytest.mark.parametrize("how", ["assignment", "function", "method"])
def test_all_kinds_of_in_place_operations_compute_what_they_did(how: str) -> None:
    torch.manual_seed(0)
    model = Writes(how).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    hooked = normswap.out_of_place(model)
    hooked.layer.register_full_backward_hook(lambda *_: None)  # type: ignore[union-attr, operator]
    hooked.zero_grad()
    output = hooked(x)
    output.square().sum().backward()
    assert torch.equal(output, model(x))
    torch.testing.assert_close(hooked.layer.weight.grad, model.layer.weight.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["statement", "another name"])
def test_what_would_be_lost_is_refused(how: str) -> None:
    model = normswap.out_of_place(Writes(how))
    x = torch.randn(3, 4)
    assert torch.equal(model(x), Writes.forward(model, x))  # type: ignore[arg-type]
    model.layer.register_full_backward_hook(lambda *_: None)  # type: ignore[union-attr, operator]
    with pytest.raises(WrittenInPlace, match=r"write it as y = y \+ x in the forward pass"):
        model(x)
    assert _get_current_function_mode() is None


def test_doing_it_twice_or_to_a_copy_is_doing_it_once() -> None:
    model = normswap.out_of_place(normswap.out_of_place(Writes("assignment")), inplace=True)
    again = copy.deepcopy(model)
    for each in (model, again):
        assert len(each._forward_pre_hooks) == len(each._forward_hooks) == 1
        each(torch.randn(2, 4))
    assert _get_current_function_mode() is None
