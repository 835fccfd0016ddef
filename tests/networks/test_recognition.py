"""Classes that users teach, what norms hold, and methods that fold them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nets import Direct, Masked, conv
from torch import Tensor, nn

import normswap
from normswap.layers.convs import WeightStandardized
from normswap.networks import recognition as families


class OwnNorm(nn.Module):
    """Names of its own, an activation without a module."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.slack = size, 1e-3
        self.gamma, self.beta = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.batch_norm(x, self.mean, self.var, self.gamma, self.beta, eps=self.slack)
        return torch.relu(y)


@pytest.fixture
def registry() -> Iterator[None]:
    norms, convs = dict(families._NORMS), set(families._CONVS)
    yield
    families._NORMS.clear()
    families._NORMS.update(norms)
    families._CONVS.clear()
    families._CONVS.update(convs)


@pytest.mark.usefixtures("registry")
def test_own_norm_in_five_lines() -> None:
    model = Direct(conv=conv(), bn=OwnNorm(8))
    with pytest.raises(normswap.NothingToConvert, match="holds no BatchNorm"):
        normswap.convert(model)
    normswap.register_norm(
        OwnNorm,
        lambda m: normswap.NormParts(m.size, m.slack, m.gamma, m.beta, m.mean, m.var, {"act": nn.ReLU()}),  # type: ignore[arg-type]
    )
    nn.init.constant_(model.bn.var, 4.0)  # type: ignore[arg-type]
    gamma = model.bn.gamma
    result = normswap.convert(model, inplace=True, shrink=0)
    assert result.bn.weight is gamma
    assert (result.bn.num_groups, result.bn.eps) == (4, 1e-3)
    assert normswap.plan_of(result).norms[0].affine == "match"
    assert (result.bn(torch.randn(2, 8, 4, 4)) >= 0).all()  # type: ignore[operator]
    assert normswap.check(result)


@pytest.mark.usefixtures("registry")
def test_own_conv_in_one_line() -> None:
    model = Direct(conv=Masked(3, 8, 3), bn=nn.BatchNorm2d(8))
    assert not normswap.inspect(model).convs[0].changes
    normswap.register_conv(Masked)
    result = normswap.convert(model, ws="standard")
    assert isinstance(result.conv, WeightStandardized)
    expected = nn.functional.conv2d(torch.ones(1, 3, 5, 5), result.conv.standardized_weight() * 0.5, result.conv.bias)
    torch.testing.assert_close(result.conv(torch.ones(1, 3, 5, 5)), expected)


def test_deformable_convolution_needs_no_registration() -> None:
    from torchvision.ops import DeformConv2d

    class Deformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset, self.conv = nn.Conv2d(3, 18, 3, padding=1), DeformConv2d(3, 8, 3, padding=1)
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x, self.offset(x)))

    model = Deformed()
    nn.init.constant_(model.bn.bias, 0.1)
    result = normswap.convert(model, equalize=False)
    assert [e.name for e in normswap.plan_of(result).convs if e.changes] == ["conv"]
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(result.conv(x, result.offset(x)), model.conv(x, model.offset(x)), rtol=1e-4, atol=1e-4)  # type: ignore[operator]


def test_frozen_norm_as_transformers_writes_it() -> None:
    """Epsilon only in the code, buffers reshaped in the forward, no base class in common with BatchNorm."""

    class FrozenNorm(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            for name, value in (("weight", 2.0), ("bias", 0.0), ("running_mean", 1.0), ("running_var", 4.0)):
                self.register_buffer(name, torch.full((n,), value))

        def forward(self, x: Tensor) -> Tensor:
            weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
            running_var, running_mean = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
            scale = weight * (running_var + 1e-5).rsqrt()
            return x * scale + (bias - running_mean * scale)

    model = Direct(conv=conv(), bn=FrozenNorm(8))
    result = normswap.convert(model, equalize=False)  # or filters and norm change signs together
    x = torch.randn(1, 8, 16, 16) * 2 + 1
    assert isinstance(result.bn, nn.GroupNorm)
    assert not result.bn.weight.requires_grad
    torch.testing.assert_close(result.bn(x), model.bn(x), rtol=0.3, atol=0.3)  # type: ignore[operator]


def test_a_method_that_merges_features_is_left_alone() -> None:
    class Pyramid(Direct):
        def fuse(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return self.fuse(y, y)

    result = normswap.convert(Pyramid(conv=conv(), bn=nn.BatchNorm2d(8)))
    assert normswap.plan_of(result).warnings == ()
    assert result(torch.randn(1, 3, 8, 8)).shape == (1, 8, 8, 8)


class Activated(nn.Module):
    """A norm of its own kind with an activation inside."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma, self.beta, self.act = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size)), nn.ReLU()
        self.register_buffer("mean", torch.randn(size))
        self.register_buffer("var", torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(nn.functional.batch_norm(x, self.mean, self.var, self.gamma, self.beta))


def parts_with(then: Callable[[Activated], dict[str, nn.Module] | None]) -> Callable[[Activated], normswap.NormParts]:
    return lambda m: normswap.NormParts(len(m.gamma), 1e-5, m.gamma, m.beta, m.mean, m.var, then(m))


@pytest.mark.usefixtures("registry")
def test_an_activation_that_the_parts_do_not_name_is_not_lost() -> None:
    normswap.register_norm(Activated, parts_with(lambda _: {}))
    with pytest.raises(
        normswap.NothingToConvert, match="bn: its forward runs act, which its NormParts do not name; add it to then="
    ):
        normswap.convert(Direct(conv=conv(), bn=Activated(8)))


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("key", ["act", "activation", None])
def test_an_activation_is_carried_whatever_the_parts_call_it(key: str | None) -> None:
    normswap.register_norm(Activated, parts_with(lambda m: None if key is None else {key: m.act}))
    model = Direct(conv=conv(), bn=Activated(8)).eval()
    result = normswap.convert(model)
    assert normswap.plan_of(result).norms[0].then == ("act",)
    assert normswap.check(result, model)
    x = torch.randn(2, 3, 8, 8)
    assert (result(x) >= 0).all()
    assert result.bn.act is not model.bn.act  # type: ignore[union-attr]


def test_affine_is_one_and_zero_where_there_is_none() -> None:
    weight, bias = normswap.NormParts(3, bias=torch.tensor([1.0, 2.0, 3.0])).affine(torch.zeros(1, dtype=torch.float64))
    assert (weight.tolist(), bias.tolist(), bias.dtype) == ([1, 1, 1], [1, 2, 3], torch.float64)


FRESH = torch.tensor([0.0, 0.0])
TRAINED = {
    "nothing": (normswap.NormParts(2), False),
    "fresh": (normswap.NormParts(2, 1e-5, FRESH + 1, FRESH, FRESH, FRESH + 1), False),
    "zero weight throughout": (normswap.NormParts(2, weight=FRESH, bias=FRESH), False),
    "mean": (normswap.NormParts(2, mean=FRESH + 1), True),
    "var": (normswap.NormParts(2, var=FRESH), True),
    "bias": (normswap.NormParts(2, bias=FRESH + 1), True),
    "weight": (normswap.NormParts(2, weight=torch.tensor([1.0, 2.0])), True),
    "meta": (normswap.NormParts(2, mean=FRESH.to("meta")), False),
}


@pytest.mark.parametrize(("parts", "trained"), TRAINED.values(), ids=TRAINED)
def test_is_trained(parts: normswap.NormParts, trained: bool) -> None:
    assert parts.is_trained is trained


BAD_PARTS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "fails": (
        lambda m: 1 / 0,
        "what it computes with is unknown \\(ZeroDivisionError: division by zero\\); correct it",
    ),
    "something else": (
        lambda m: {},
        "what it computes with is a dict, no NormParts; correct it, or the function given",
    ),
    "bias": (
        lambda m: normswap.NormParts(8, bias=torch.zeros(3)),
        "its bias is \\(3,\\), for 8 channels; correct it, or",
    ),
}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(("parts", "message"), BAD_PARTS.values(), ids=BAD_PARTS)
def test_parts_that_make_no_sense_are_named(parts: Callable[[nn.Module], Any], message: str) -> None:
    normswap.register_norm(OwnNorm, parts)
    with pytest.raises(normswap.UnsupportedModel, match=f"^bn: {message}"):
        normswap.convert(Direct(conv=conv(), bn=OwnNorm(8)), example_input=torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("eps", [None, "small"])
def test_an_epsilon_that_is_no_number_is_named(eps: Any) -> None:
    model = Direct(conv=conv(), bn=nn.BatchNorm2d(8))
    model.bn.eps = eps
    with pytest.raises(normswap.UnsupportedModel, match="^bn: what it computes with is unknown"):
        normswap.inspect(model, example_input=torch.zeros(2, 3, 8, 8))
