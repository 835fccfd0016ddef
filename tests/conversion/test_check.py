"""Every check has a network that breaks it, and it is reported: by `check`, by `convert` and by the command line."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from broken import BROKEN, FACTORIES, Net, X, named
from refusals import run
from torch import Tensor, nn

import normswap
from normswap.conversion import pipeline


def failed(checks: normswap.Checks) -> dict[str, str]:
    return {row.name: row.detail for row in checks.failed}


def test_all_hold_where_nothing_is_broken() -> None:
    model = Net()
    checks = normswap.check(normswap.convert(model, example_input=X), model)
    assert [row.name for row in checks.rows if row.ok] == [
        "shapes", "no BatchNorm left", "finite", "batch size 1", "batch independence", "train() equals eval()",
        "gradients",
    ]  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_is_found_by_check(name: str) -> None:
    model, case = named(name), BROKEN[name]
    found = failed(normswap.check(normswap.convert(model, example_input=X), model))
    assert set(found) == case.fails
    assert case.says in found[name.partition(",")[0]]


@pytest.mark.parametrize("name", FACTORIES)
def test_a_fault_is_found_by_the_command_line(name: str, tmp_path: Path) -> None:
    target = tmp_path / "OUT"
    code, stdout, stderr = run("convert", f"broken:{FACTORIES[name].__name__}", "--input", "2,3,16,16", "-o", target)
    assert code == 1
    assert f"{name}: {BROKEN[name].says}" in stderr
    assert "wrote nothing" in stdout
    assert not target.exists()


def coarser(model: nn.Module) -> None:
    model.pool = nn.AvgPool2d(3)


def silent(model: nn.Module) -> None:
    model.skips = "between"  # type: ignore[assignment]


def unused(model: nn.Module) -> None:
    model.unused = nn.BatchNorm2d(8)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.scale)  # type: ignore[arg-type]


def functional(model: nn.Module) -> None:
    model.between = Functional()


class InTraining(nn.Module):
    """Calls batch_norm in train mode alone, with the batch's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return F.batch_norm(y, None, None, training=True) if self.training else y


def test_a_function_that_runs_in_train_mode_alone_is_found() -> None:
    with pytest.raises(normswap.CheckFailed, match="^no BatchNorm left: 1 left: the model .calls batch_norm."):
        normswap.convert(InTraining(), example_input=torch.zeros(2, 3, 8, 8))


SABOTAGE = {
    "shape": (coarser, "shapes", r"pool: \(\(2, 8, 6, 6\),\) became \(\(2, 8, 4, 4\),\)"),
    "module that no longer runs": (silent, "shapes", "between ran before and does not any more"),
    "module": (unused, "no BatchNorm left", "1 left: unused"),
    "function": (functional, "no BatchNorm left", r"1 left: between \(calls batch_norm\)"),
}


@pytest.mark.parametrize(("sabotage", "check", "says"), SABOTAGE.values(), ids=SABOTAGE)
def test_what_surgery_could_spoil_is_found_by_check(
    sabotage: Callable[[nn.Module], None], check: str, says: str
) -> None:
    model = Net()
    converted = normswap.convert(model, example_input=X)
    sabotage(converted)
    (row,) = normswap.check(converted, model).failed
    assert row.name == check
    assert re.match(says, row.detail), row.detail


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("sabotage", "check", "says"), SABOTAGE.values(), ids=SABOTAGE)
def test_what_surgery_could_spoil_is_found_by_convert(
    sabotage: Callable[[nn.Module], None], check: str, says: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    operate = pipeline.operate

    def spoiled(*arguments: object, **options: object) -> nn.Module:
        model = operate(*arguments, **options)  # type: ignore[arg-type]
        sabotage(model)
        return model

    monkeypatch.setattr(pipeline, "operate", spoiled)
    model = Net()
    before = repr(model)
    with pytest.raises(normswap.CheckFailed, match=f"^{check}: {says}"):
        normswap.convert(model, example_input=X, inplace=inplace)
    assert repr(model) == before


def test_a_planned_norm_that_no_longer_runs_is_missed_without_the_original() -> None:
    converted = normswap.convert(Net(), example_input=X)
    converted.skips = "bn2"  # type: ignore[assignment]
    found = failed(normswap.check(converted))
    assert found["shapes"] == "bn2 ran before and does not any more"


def test_lost_gradients_are_named() -> None:
    class Cut(Net):
        cut = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn1(self.conv1(x)).relu()
            return self.head(self.pool(self.bn2(self.conv2(y.detach() if self.cut else y)).relu()).mean((2, 3)))

    model = Cut()
    converted = normswap.convert(model, example_input=X)
    converted.cut = True  # type: ignore[assignment]
    for original, mode in ((model, " in train mode"), (None, "")):
        (row,) = normswap.check(converted, original).failed
        assert row.name == "gradients"
        assert row.detail == f"3 parameters lost theirs{mode}: bn1.bias, bn1.weight, conv1.weight"


def test_a_backward_pass_that_fails_without_a_word_is_not_judged() -> None:
    class Mute(torch.autograd.Function):
        @staticmethod
        def forward(_context: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_context: object, _gradient: Tensor) -> Tensor:
            raise RuntimeError

    class Net2(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(Mute.apply(x * self.conv1.weight.mean()))

    model = Net2()
    checks = normswap.check(normswap.convert(model, example_input=X), model)
    assert checks, checks
    assert [row.detail for row in checks.rows if row.ok is None] == ["no backward pass ran (RuntimeError)"]


def test_weights_that_are_not_finite_are_refused_before_anything_changes() -> None:
    model = Net()
    with torch.no_grad():
        model.head.weight[0, 0] = float("inf")
    with pytest.raises(normswap.BadStatistics, match=r"head\.weight: holds NaN or infinity"):
        normswap.convert(model, example_input=X)


class NeedsData(nn.Module):
    """A network that counts in Python what it sees, and holds a norm that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.never = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y + 0 * len(x.flatten(1)[0].tolist())


def test_a_network_that_needs_data_is_traced_alike_before_and_after() -> None:
    model = NeedsData().eval()
    new = normswap.convert(model, example_input=X)
    assert normswap.check(new, model, example_input=X)


class Sparse(NeedsData):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu().to_sparse()


def test_sparse_outputs_are_looked_at() -> None:
    model = Sparse().eval()
    checks = normswap.check(normswap.convert(model, example_input=X), model, example_input=X)
    assert checks
    assert {row.name: row.ok for row in checks.rows}["batch independence"]


def test_groups_of_one_value_are_named() -> None:
    """A channel by itself on one position is its own mean: for several samples torch puts out β and says nothing."""
    model = Net()
    result = normswap.convert(model, to="instance", example_input=X)
    assert normswap.check(result, model)
    found = failed(normswap.check(result, model, example_input=torch.randn(2, 3, 5, 5)))
    assert found["values per group"].startswith(
        "bn2 meets (2, 8, 1, 1): one value in each of 8 groups, which it erases"
    )
