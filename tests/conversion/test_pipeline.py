"""What surgery carries over, and that a failure leaves the model as it was."""

import copy
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.utils.prune
from equality import assert_same_output, assert_same_state
from nets import conv, warm
from torch import Tensor, nn

import normswap
from normswap.conversion.pipeline import convert_beside


def small() -> nn.Sequential:
    return nn.Sequential(conv(3, 16), nn.BatchNorm2d(16, eps=1e-3), nn.ReLU(), conv(16, 16), nn.BatchNorm2d(16))


def test_model_is_untouched_by_default() -> None:
    model = small()
    before, state = repr(model), copy.deepcopy(model.state_dict())
    result = normswap.convert(model)
    assert repr(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not {id(p) for p in result.parameters()} & {id(p) for p in model.parameters()}


def test_what_becomes_of_a_copy_counts_as_no_change_of_the_model(tmp_path: Path) -> None:
    """Autograd refuses to go back through what has been changed since, by a count that views share."""
    model, x = warm(small()).eval(), torch.randn(2, 3, 8, 8)
    first = normswap.convert(model, example_input=x)
    loss = model(x).sum() + first(x).sum()
    config = normswap.save(first, tmp_path) / "config.json"
    made = [
        normswap.convert(model, example_input=x), normswap.apply(model, config), normswap.load(tmp_path, model=model),
        normswap.fold(first), normswap.out_of_place(first),
    ]  # fmt: skip
    with torch.no_grad():
        for parameter in (parameter for network in made for parameter in network.parameters()):
            parameter.add_(1)
    loss.backward()


def test_norms_in_one_memory_are_left() -> None:
    """One was matched in place over the other, which computed something else then."""
    model = warm(small())
    model[4].weight.data, model[4].bias.data = model[1].weight.data, model[1].bias.data  # type: ignore[union-attr]
    with pytest.raises(normswap.NothingToConvert, match="others hold its weight, too"):
        normswap.convert(model, inplace=True)


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


def test_converting_twice_changes_nothing_and_says_so() -> None:
    once = normswap.convert(small())
    with pytest.warns(normswap.AlreadyConverted, match="was converted before \\(2 weight-standardized"):
        twice = normswap.convert(once)
    x = torch.randn(2, 3, 8, 8)
    assert repr(twice) == repr(once)
    assert_same_output(twice(x), once(x))


def test_meta_model_has_the_same_structure() -> None:
    model = timm.create_model("resnet18")
    plan = normswap.inspect(model)
    with torch.device("meta"):
        empty = timm.create_model("resnet18")
    rebuilt = normswap.apply(empty, plan)
    real = normswap.apply(model, plan)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert str(rebuilt) == str(real)


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
    assert [e.name for e in plan.changes if e.converts] == ["0", "1"]
    assert plan.norms[1].by_user
    plan = normswap.plan_of(normswap.convert(small(), include=("3", "4")))
    assert [e.name for e in plan.changes if e.converts] == ["3", "4"]
    with pytest.raises(normswap.NothingToConvert, match="all 2 norms of Sequential are excluded"):
        normswap.convert(small(), exclude=["*"])


class Forked(nn.Module):
    """A model whose attributes cannot be guessed: two inputs, keyword-only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = conv(), conv(1), nn.BatchNorm2d(8)

    def forward(self, *, image: Tensor, mask: Tensor) -> Tensor:
        return self.bn(self.a(image) + self.b(mask))


def test_example_input_by_keyword() -> None:
    with pytest.raises(normswap.NeedsExampleInput, match=r"no forward pass of Forked ran \(\(2, 3, 224, 224\), "):
        normswap.convert(Forked())
    inputs = {"image": torch.zeros(2, 3, 8, 8), "mask": torch.zeros(2, 1, 8, 8)}
    result = normswap.convert(Forked(), example_input=inputs)
    assert isinstance(result.bn, nn.GroupNorm)
    assert normswap.check(result)


def test_options_are_checked_before_anything_else() -> None:
    with pytest.raises(normswap.InvalidOption, match="ws='on' is not one of 'auto', 'adaptive', 'standard', 'none'"):
        normswap.convert(None, ws="on")  # type: ignore[arg-type]


@pytest.mark.parametrize("ws", ["adaptive", "standard"])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_beside_the_original_only_what_changes_takes_memory(ws: str, trained: bool) -> None:
    model = nn.Sequential(*small(), nn.Flatten(), nn.Linear(16 * 6 * 6, 3))
    if trained:
        nn.init.uniform_(model[1].running_var, 0.5, 2)
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 10, 10)
    beside = convert_beside(model, example_input=x, ws=ws)
    assert_same_state(beside, normswap.convert(model, example_input=x, ws=ws))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for key, value in beside.state_dict().items():
        if key in state and value.ndim > 1:
            same = torch.equal(value, state[key])
            assert (value.data_ptr() == model.state_dict()[key].data_ptr()) == same
    assert beside[-1].weight.data_ptr() == model[-1].weight.data_ptr()
