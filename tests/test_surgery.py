"""What surgery carries over, and that a failure leaves the model as it was."""

import copy

import pytest
import timm
import torch
import torch.nn.utils.prune
from equality import assert_same_output
from nets import CASES, conv
from torch import Tensor, nn

import normswap
from normswap.conversion import replacements


def small() -> nn.Sequential:
    return nn.Sequential(conv(3, 16), nn.BatchNorm2d(16, eps=1e-3), nn.ReLU(), conv(16, 16), nn.BatchNorm2d(16))


def test_model_is_untouched_by_default() -> None:
    model = small()
    before, state = repr(model), copy.deepcopy(model.state_dict())
    result = normswap.convert(model)
    assert repr(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not {id(p) for p in result.parameters()} & {id(p) for p in model.parameters()}


def test_in_place_keeps_parameter_objects_and_the_optimizer() -> None:
    model = small()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert normswap.convert(model, inplace=True) is model
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(ours is theirs for ours, theirs in zip(trainable, parameters, strict=True))
    before = [p.detach().clone() for p in parameters]
    model(torch.randn(1, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_carried(dtype: torch.dtype) -> None:
    result = normswap.convert(small().to(dtype))
    assert {p.dtype for p in result.parameters()} == {dtype}
    assert result(torch.randn(1, 3, 8, 8, dtype=dtype)).dtype == dtype


def test_converting_twice_changes_nothing_and_says_so() -> None:
    once = normswap.convert(small())
    with pytest.warns(normswap.AlreadyConverted, match="was converted before \\(2 weight-standardized"):
        twice = normswap.convert(once)
    x = torch.randn(2, 3, 8, 8)
    assert repr(twice) == repr(once)
    assert_same_output(twice(x), once(x))


def test_every_name_of_a_shared_norm_gets_the_same_object() -> None:
    case = CASES["shared norm"]
    result = normswap.convert(case.build(), example_input=torch.zeros(case.shape))
    assert result.bn is result.alias
    assert isinstance(result.bn, nn.GroupNorm)
    assert normswap.plan_of(result).norms[0].aliases == ("alias",)


def test_frozen_norm_buffers_become_the_affine_part() -> None:
    case = CASES["duck-typed frozen"]
    model = case.build()
    result = normswap.convert(model, example_input=torch.zeros(case.shape), affine="copy")
    assert result.bn.weight.eq(1.5).all()  # type: ignore[union-attr]
    assert result.bn.bias.eq(0.5).all()  # type: ignore[union-attr]
    assert not result.bn.weight.requires_grad  # type: ignore[union-attr]
    assert "bn.weight" in dict(result.named_parameters())


def test_root_that_is_a_norm() -> None:
    result = normswap.convert(nn.BatchNorm2d(8))
    assert isinstance(result, nn.GroupNorm)
    assert normswap.plan_of(result).norms[0].name == ""


def test_meta_model_has_the_same_structure() -> None:
    model = timm.create_model("resnet18")
    plan = normswap.inspect(model)
    with torch.device("meta"):
        empty = timm.create_model("resnet18")
    rebuilt = normswap.apply(empty, plan)
    real = normswap.apply(model, plan)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert str(rebuilt) == str(real)


def test_plan_for_another_network_is_refused() -> None:
    plan = normswap.inspect(small())
    with pytest.raises(
        normswap.PlanMismatch, match="^0: the plan was made for a Conv2d of 16 channels, found Conv2d of 8"
    ):
        normswap.apply(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)), plan)
    with pytest.raises(normswap.PlanMismatch, match="^0: the plan names it, Linear has no such layer"):
        normswap.apply(nn.Linear(3, 3), plan)


def test_plan_of_a_stranger() -> None:
    with pytest.raises(normswap.PlanMismatch, match="Linear carries no plan; pass the model that"):
        normswap.plan_of(nn.Linear(3, 3))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["dp", "compile"])
def test_wrappers_are_taken_off(wrap: object) -> None:
    model = small()
    result = normswap.convert(wrap(model))  # type: ignore[operator]
    assert type(result) is nn.Sequential
    ours = {name for name in result.state_dict() if not name.endswith("ws_gain")}
    assert ours <= set(model.state_dict())


def test_pruned_and_weight_normed_models_are_copied() -> None:
    model = small()
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    model(torch.randn(1, 3, 8, 8))
    result = normswap.convert(model)
    kept = {e.name: e.reason for e in normswap.plan_of(result).convs if not e.changes}
    assert "kernel is computed" in kept["0"]
    assert result[0].weight_mask.eq(0).any()  # type: ignore[index, union-attr]


def test_include_and_exclude() -> None:
    plan = normswap.plan_of(normswap.convert(small(), exclude="4"))
    assert [e.name for e in plan.changes] == ["0", "1"]
    assert plan.norms[1].by_user
    plan = normswap.plan_of(normswap.convert(small(), include=("3", "4")))
    assert [e.name for e in plan.changes] == ["3", "4"]
    with pytest.raises(normswap.NothingToConvert, match="all 2 norms of Sequential are left alone"):
        normswap.convert(small(), exclude=["*"])


class Forked(nn.Module):
    """A model whose attributes cannot be guessed: two inputs, keyword-only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = conv(), conv(1), nn.BatchNorm2d(8)

    def forward(self, *, image: Tensor, mask: Tensor) -> Tensor:
        return self.bn(self.a(image) + self.b(mask))


def test_example_input_by_keyword() -> None:
    with pytest.raises(
        normswap.NeedsExampleInput, match=r"no forward pass of Forked ran \(\(2, 3, 224, 224\): TypeError"
    ):
        normswap.convert(Forked())
    inputs = {"image": torch.zeros(2, 3, 8, 8), "mask": torch.zeros(2, 1, 8, 8)}
    result = normswap.convert(Forked(), example_input=inputs)
    assert isinstance(result.bn, nn.GroupNorm)
    assert normswap.check(result)


def test_options_are_checked_before_anything_else() -> None:
    with pytest.raises(normswap.InvalidOption, match="ws='on' is not one of 'auto', 'adaptive', 'standard', 'none'"):
        normswap.convert(None, ws="on")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "others",
    [nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1), nn.Identity()],
    ids=["buffers", "parameters", "none"],
)
def test_norms_without_tensors_get_the_type_of_the_network_or_its_input(others: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False, track_running_stats=False), others).double().eval()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    result = normswap.convert(model, groups=2, example_input=x)
    assert {p.dtype for p in result.parameters()} == {torch.float64}
    assert result(x).dtype == torch.float64
