"""What surgery puts in place, and that a failure leaves the model as it was."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from nets import CASES, conv
from torch import nn

import normswap
from normswap.conversion import replacements


def small() -> nn.Sequential:
    return nn.Sequential(conv(3, 16), nn.BatchNorm2d(16, eps=1e-3), nn.ReLU(), conv(16, 16), nn.BatchNorm2d(16))


def test_failure_while_building_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    plan = normswap.inspect(model)
    before, state, built = repr(model), copy.deepcopy(model.state_dict()), []
    real = replacements._norm

    def fails_the_second_time(*arguments: object) -> object:
        built.append(arguments)
        if len(built) == 2:
            raise RuntimeError("out of memory")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(replacements, "_norm", fails_the_second_time)
    with pytest.raises(RuntimeError, match="out of memory"):
        normswap.apply(model, plan, inplace=True)
    assert repr(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_flags_and_hooks_are_carried() -> None:
    model = small()
    model[1].eval()
    model[1].weight.requires_grad_(False)
    calls: list[str] = []
    handle = model[1].register_forward_hook(lambda *_: calls.append("norm"))
    model[3].register_forward_hook(lambda *_: calls.append("conv"))
    result = normswap.convert(model, inplace=True)
    calls.clear()
    assert not result[1].training  # type: ignore[index]
    assert result[4].training  # type: ignore[index]
    assert not result[1].weight.requires_grad  # type: ignore[index, union-attr]
    assert result[1].eps == 1e-3  # type: ignore[index]
    result(torch.randn(1, 3, 8, 8))
    assert calls == ["norm", "conv"]
    handle.remove()
    result(torch.randn(1, 3, 8, 8))
    assert calls == ["norm", "conv", "conv"]


def test_every_name_of_a_shared_norm_gets_the_same_object() -> None:
    case = CASES["shared norm"]
    result = normswap.convert(case.build(), example_input=torch.zeros(case.shape))
    assert result.bn is result.alias
    assert isinstance(result.bn, nn.GroupNorm)
    assert normswap.plan_of(result).norms[0].aliases == ("alias",)


def test_root_that_is_a_norm() -> None:
    result = normswap.convert(nn.BatchNorm2d(8))
    assert isinstance(result, nn.GroupNorm)
    assert normswap.plan_of(result).norms[0].name == ""


def _trained(model: nn.Module) -> nn.Module:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


class Tied(nn.Module):
    """Two convolutions with one weight, each before a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(4, 4), conv(4, 4)
        self.second.weight = self.first.weight
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](self.first(x))
        return self.norms[1](self.second(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{}, {"ws": "standard"}, {"ws": "adaptive"}, {"ws": "none"}], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("build", [small, Tied], ids=["plain", "tied"])
def test_a_copy_shares_no_memory_with_the_model(build: Any, trained: bool, layout: Any, options: Any) -> None:
    torch.manual_seed(0)
    model = build().to(memory_format=layout)
    model = _trained(model) if trained else model
    before = copy.deepcopy(model.state_dict())
    example = torch.zeros(2, 4 if build is Tied else 3, 8, 8)
    result = normswap.convert(model, example_input=example, **options)
    assert not _memory(model) & _memory(result)
    strides = {name: parameter.stride() for name, parameter in model.named_parameters()}
    assert {name: strides.get(name) for name, _ in result.named_parameters()} == strides
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.fill_(7)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_copies_and_changed_models_are_the_same() -> None:
    for trained in (False, True):
        torch.manual_seed(0)
        model = _trained(small()) if trained else small()
        result = normswap.convert(model)
        changed = normswap.convert(model, inplace=True).state_dict()
        assert all(torch.equal(value, changed[key]) for key, value in result.state_dict().items())


def _memory(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()] if tensor.numel()}


class Holding(nn.Conv2d):
    """A convolution that holds its norm, as detectron2's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x)).relu()


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
def test_a_norm_inside_a_convolution_is_replaced(inplace: bool) -> None:
    model = nn.Sequential(Holding(3, 8), Holding(8, 8))
    result = normswap.convert(model, example_input=torch.zeros(2, 3, 9, 9), inplace=inplace)
    assert [type(layer.norm) for layer in result] == [nn.GroupNorm] * 2  # type: ignore[union-attr]
    assert [entry.ws for entry in normswap.plan_of(result).convs] == ["standard"] * 2
    x = torch.randn(2, 3, 9, 9)
    expected = x
    for layer in result:
        expected = layer.norm(torch.conv2d(expected, layer.standardized_weight())).relu()  # type: ignore
    torch.testing.assert_close(result(x), expected)
