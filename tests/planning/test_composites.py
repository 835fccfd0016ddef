"""Modules that hold several BatchNorms for one place are left whole, or taught as one; never replaced piecemeal."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import Tensor, nn

import normswap
from normswap.networks.recognition import _NORMS

C = 8


class Split(nn.Module):
    """A norm for splits of the batch in train mode, one of their aggregated statistics in eval mode (SlowFast's)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(C) + 0.5), nn.Parameter(torch.randn(C))
        self.bn, self.split_bn = nn.BatchNorm2d(C, affine=False), nn.BatchNorm2d(2 * C, affine=False)

    def aggregate(self) -> None:
        self.bn.running_mean.copy_(self.split_bn.running_mean.view(2, C).mean(0))  # type: ignore[union-attr]
        self.bn.running_var.copy_(self.split_bn.running_var.view(2, C).mean(0))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            n, c, h, w = x.shape
            y = self.split_bn(x.view(n // 2, 2 * c, h, w)).view(n, c, h, w)
        else:
            y = self.bn(x)
        return y * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class Domains(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.norms, self.domain = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(count)), 1

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[self.domain](x)


class DomainsByName(Domains):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()) for name in ("day", "night")})

    def forward(self, x: Tensor, domain: str = "day") -> Tensor:
        return self.norms[domain](x)


class Dual(nn.Module):
    """One norm for clean images, one for adversarial ones."""

    def __init__(self) -> None:
        super().__init__()
        self.clean, self.adversarial, self.attacked = nn.BatchNorm2d(C), nn.BatchNorm2d(C), False

    def forward(self, x: Tensor) -> Tensor:
        return self.adversarial(x) if self.attacked else self.clean(x)


class ByMode(Dual):
    def forward(self, x: Tensor) -> Tensor:
        return self.adversarial(x) if self.training else self.clean(x)


class Widths(nn.Module):
    """One norm a width, as slimmable networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.ModuleList(nn.BatchNorm2d(width) for width in (2, 4, C))

    def forward(self, x: Tensor) -> Tensor:
        return {bn.num_features: bn for bn in self.bn}[x.shape[1]](x)  # type: ignore[index,misc]


class Experts(Domains):
    """All norms run, and are weighed."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([norm(x) for norm in self.norms]).mean(0)


class Branches(nn.Module):
    """Norms side by side that all run, as in RepVGG."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.identity = nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.identity(x)


class Auxiliary(nn.Module):
    """A head in train mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.head, self.head_bn = nn.BatchNorm2d(C), nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y + self.head_bn(self.head(y)) if self.training else y


class Inline(nn.Module):
    """A block that chooses by a flag between norms that it holds beside its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.second = nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, C, 1)
        self.clean, self.adversarial, self.attacked = nn.BatchNorm2d(C), nn.BatchNorm2d(C), False

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(self.second(F.relu(self.bn(self.first(x)))))

    def normed(self, x: Tensor) -> Tensor:
        return self.adversarial(x) if self.attacked else self.clean(x)


class InlineByName(Inline):
    def normed(self, x: Tensor) -> Tensor:
        kind = "adversarial" if self.attacked else "clean"
        return getattr(self, kind)(x)  # type: ignore[no-any-return]


class InlineWithActivations(Inline):
    def __init__(self) -> None:
        super().__init__()
        self.clean, self.adversarial = (nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()) for _ in range(2))


class InlineByArgument(Inline):
    def forward(self, x: Tensor, attacked: bool = False) -> Tensor:
        x = self.second(F.relu(self.bn(self.first(x))))
        return self.adversarial(x) if attacked else self.clean(x)


class InlineByMode(Inline):
    def normed(self, x: Tensor) -> Tensor:
        return self.adversarial(x) if self.training else self.clean(x)


class SwitchedOff(Inline):
    """A head that is off has a norm and a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(C, C, 1)

    def normed(self, x: Tensor) -> Tensor:
        y = self.clean(x)
        return y + self.adversarial(self.head(y)) if self.attacked else y


class Unused(Inline):
    """A norm that no code runs."""

    def normed(self, x: Tensor) -> Tensor:
        return self.clean(x)


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv0, self.bn0, self.conv, self.norm = (
            nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.Conv2d(C, C, 3), norm,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(F.relu(self.bn0(self.conv0(x))))))


X = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))

CHOOSING = {
    "split": (Split, ("norm.bn", "norm.split_bn"), "norm.bn runs in eval mode and norm.split_bn in train mode"),
    "by mode": (ByMode, ("norm.clean", "norm.adversarial"), "norm.clean runs in eval mode and norm.adversarial in"),
    "dual": (Dual, ("norm.clean", "norm.adversarial"), "norm.adversarial did not run"),
    "domains": (Domains, ("norm.norms.0", "norm.norms.1", "norm.norms.2"), "norm.norms.0 did not run"),
    "by name": (DomainsByName, ("norm.norms.day.0", "norm.norms.night.0"), "norm.norms.night did not run"),
    "widths": (Widths, ("norm.bn.0", "norm.bn.1", "norm.bn.2"), "norm.bn.0 did not run"),
}


INLINE = {
    "flag": (Inline, ("clean", "adversarial"), "norm.adversarial did not run"),
    "name": (InlineByName, ("clean", "adversarial"), "norm.adversarial did not run"),
    "activations": (InlineWithActivations, ("clean.0", "adversarial.0"), "norm.adversarial did not run"),
    "argument": (InlineByArgument, ("clean", "adversarial"), "norm.adversarial did not run"),
    "mode": (InlineByMode, ("clean", "adversarial"), "norm.clean runs in eval mode and norm.adversarial in train mode"),
}


def trained(norm: nn.Module) -> nn.Module:
    """Return a network with statistics, in eval mode."""
    model = Net(norm).train()
    for _ in range(3):
        model(X + torch.randn(X.shape))
    return model.eval()


@pytest.mark.parametrize("case", CHOOSING.values(), ids=CHOOSING.keys())
def test_left_whole_and_refused(case: tuple[type[nn.Module], tuple[str, ...], str]) -> None:
    kind, names, why = case
    model = trained(kind())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plan = normswap.inspect(model, example_input=X)
    found = {entry.name: entry for entry in plan.norms}
    assert found.keys() == {"bn0", *names}
    assert found["bn0"].converts
    for name in names:
        assert not found[name].changes
        assert f"between which norm ({kind.__name__}) chooses ({why}" in found[name].reason
    assert not next(entry for entry in plan.convs if entry.name == "conv").changes
    with pytest.raises(
        normswap.CheckFailed, match=rf"{len(names)} left: .*register_norm, or leave it alone with exclude="
    ):
        normswap.convert(model, example_input=X)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("case", CHOOSING.values(), ids=CHOOSING.keys())
def test_the_advice_works(case: tuple[type[nn.Module], tuple[str, ...], str]) -> None:
    kind, names, _ = case
    model = trained(kind())
    kept = normswap.convert(model, example_input=X, exclude="norm")
    assert isinstance(kept.bn0, nn.GroupNorm)
    features = torch.randn(4, C, 6, 6)
    assert torch.equal(kept.norm(features), model.norm(features))  # type: ignore[operator]
    if kind is Split:  # it has no norm of its own that computes what it does
        return
    (used,) = [name for name in names if _runs(model, name)]
    model.norm = model.get_submodule(used)
    converted = normswap.convert(model, example_input=X)
    assert isinstance(converted.norm, nn.GroupNorm)


def _runs(model: nn.Module, name: str) -> bool:
    ran: list[bool] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *_: ran.append(True))
    model(X)
    handle.remove()
    return bool(ran)


@pytest.mark.parametrize("case", INLINE.values(), ids=INLINE.keys())
def test_chosen_inline_beside_convolutions(case: tuple[type[nn.Module], tuple[str, ...], str]) -> None:
    kind, names, why = case
    model = trained(kind())
    plan = normswap.inspect(model, example_input=X)
    found = {entry.name: entry for entry in plan.norms}
    for name in names:
        reason = f"one of 2 norms between which norm ({kind.__name__}) chooses ({why}): hold the one in use alone"
        assert not found[f"norm.{name}"].changes
        assert found[f"norm.{name}"].reason == reason
    assert found["norm.bn"].converts
    assert not next(entry for entry in plan.convs if entry.name == "norm.second").changes
    with pytest.raises(normswap.CheckFailed, match=rf"2 left: norm\.{names[0]}, norm\.{names[1]}.*exclude="):
        normswap.convert(model, example_input=X)


def test_a_norm_that_the_user_leaves_alone_stands_in_nobodys_way() -> None:
    converted = normswap.convert(trained(Inline()), example_input=X, exclude="norm.adversarial")
    assert isinstance(converted.get_submodule("norm.clean"), nn.GroupNorm)
    assert not isinstance(converted.get_submodule("norm.adversarial"), nn.GroupNorm)


@pytest.mark.parametrize("kind", [SwitchedOff, Unused], ids=lambda kind: kind.__name__)
def test_a_norm_that_did_not_run_and_has_its_own_place_is_replaced(kind: type[nn.Module]) -> None:
    converted = normswap.convert(trained(kind()), example_input=X)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())


@pytest.fixture
def _taught() -> Iterator[None]:
    before = dict(_NORMS)
    yield
    _NORMS.clear()
    _NORMS.update(before)


def _split_parts(m: Split) -> normswap.NormParts:
    return normswap.NormParts(C, m.bn.eps, m.weight, m.bias, m.bn.running_mean, m.bn.running_var)


def _domain_parts(m: Domains) -> normswap.NormParts:
    own = m.norms[m.domain]
    return normswap.NormParts(C, own.eps, own.weight, own.bias, own.running_mean, own.running_var)  # type: ignore


def _timm_parts(m: SplitBatchNorm2d) -> normswap.NormParts:
    return normswap.NormParts(C, m.eps, m.weight, m.bias, m.running_mean, m.running_var)


TAUGHT = {"split": (Split, _split_parts), "domains": (Domains, _domain_parts), "timm": (SplitBatchNorm2d, _timm_parts)}


@pytest.mark.usefixtures("_taught")
@pytest.mark.parametrize(("kind", "parts"), TAUGHT.values(), ids=TAUGHT.keys())
def test_taught_as_one(kind: type[nn.Module], parts: object) -> None:
    model = trained(kind(C) if kind is SplitBatchNorm2d else kind())
    if isinstance(model.norm, Split):
        model.norm.aggregate()
    normswap.register_norm(kind, parts)  # type: ignore[arg-type]
    own = parts(model.norm)  # type: ignore[operator]
    converted = normswap.convert(model, example_input=X, affine="copy", equalize=False)
    assert type(converted.norm) is nn.GroupNorm
    assert not list(converted.norm.children())
    assert torch.equal(converted.norm.weight, own.weight)
    assert torch.equal(converted.norm.bias, own.bias)
    assert [entry.name for entry in normswap.plan_of(converted).norms] == ["bn0", "norm"]
    checks = normswap.check(converted, model)
    assert checks, str(checks)


def test_what_a_norm_holds_is_a_part_of_it() -> None:
    model = trained(SplitBatchNorm2d(C))
    plan = normswap.inspect(model, example_input=X)
    assert [entry.name for entry in plan.norms] == ["bn0", "norm"]
    assert "train mode" in plan.norms[1].reason


@pytest.mark.parametrize("kind", [Experts, Branches, Auxiliary], ids=lambda kind: kind.__name__)
def test_norms_that_all_have_a_place_are_replaced(kind: type[nn.Module]) -> None:
    converted = normswap.convert(trained(kind()), example_input=X)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
