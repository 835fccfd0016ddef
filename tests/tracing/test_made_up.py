"""Inputs made up from what a network says: sizes that it states, names of parameters, and heads that want a size."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normswap


class Body(nn.Module):
    """A convolution over time and its norm."""

    def __init__(self, **stated: Any) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(6, 8, 3, padding=1), nn.BatchNorm1d(8)
        for name, value in stated.items():
            setattr(self, name, value)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class FramesFirst(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.features(x.transpose(1, 2))


class Electrodes(Body):
    """The first convolution sees one channel; how many electrodes there are is stated alone."""

    def __init__(self) -> None:
        super().__init__(n_chans=6, n_times=50)
        self.first = nn.Conv2d(1, 1, (1, 5), padding=(0, 2))

    def forward(self, x: Tensor) -> Tensor:
        electrodes, times = x.shape[1:]
        if (electrodes, times) != (6, 50):
            raise ValueError("another montage")
        return self.features(self.first(x.unsqueeze(1)).squeeze(1))


class Configured(Body):
    def __init__(self) -> None:
        super().__init__(config=SimpleNamespace(context_length=20, num_input_channels=6), main_input_name="past_values")

    def forward(self, static: Tensor | None = None, past_values: Tensor | None = None) -> Tensor:
        if past_values is None or past_values.shape[1:] != (20, 6):
            raise ValueError("no values")
        return self.features(past_values.transpose(1, 2))


class WithLengths(Body):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if lengths.dtype is not torch.long or int(lengths.max()) != x.shape[-1]:
            raise ValueError("a length of the longest sample")
        return self.features(x)


class Noisy(Body):
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.features(x) * sigma.view(-1, 1, 1)


class Spoken(Body):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)

    def forward(self, token_ids: Tensor, token_lengths: Tensor) -> Tensor:
        return self.features(self.embedding(token_ids).transpose(1, 2)) * token_lengths.view(-1, 1, 1)


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Linear(5, 32), nn.BatchNorm1d(32)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        y = self.bn(self.a(x))
        return torch.zeros_like(y).index_add(0, edge_index[1], y[edge_index[0]])  # type: ignore[no-any-return]


class OwnLinear(nn.Module):
    """A linear layer of another class; on meta tensors its norm takes frames of any width."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bn, self.in_channels = nn.Parameter(torch.randn(32, 5)), nn.BatchNorm1d(32), 5

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x @ self.weight.T)  # type: ignore[no-any-return]


def head(size: int, sides: int = 2) -> nn.Module:
    conv, norm = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)) if sides == 2 else (nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8))
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(8 * (size - 2) ** sides, 5))


MADE: dict[str, tuple[nn.Module, list[list[int]]]] = {
    "frames before features": (FramesFirst(), [[2, 64, 6]]),
    "channels and length of its own": (Electrodes(), [[2, 6, 50]]),
    "main input and configuration": (Configured(), [[2, 20, 6]]),
    "lengths": (WithLengths(), [[2, 6, 224], [2]]),
    "level of noise": (Noisy(), [[2, 6, 224], [2]]),
    "tokens": (Spoken(), [[2, 16], [2]]),
    "graph": (Graph(), [[6, 5], [2, 12]]),
    "head over an image": (head(28), [[2, 1, 28, 28]]),
    "head over a series": (head(100, 1), [[2, 1, 100]]),
    "rows that no layer of torch tells": (OwnLinear(), [[2, 5]]),
    "norm of rows": (nn.Sequential(nn.BatchNorm1d(9), nn.Linear(9, 3)), [[2, 9]]),
}  # fmt: skip


@pytest.mark.parametrize(("model", "shapes"), MADE.values(), ids=MADE)
def test_an_input_is_made_up_that_runs_to_the_end(model: nn.Module, shapes: list[list[int]]) -> None:
    plan = normswap.inspect(model.eval())
    items = plan.inputs["tuple"] if "tuple" in plan.inputs else [*plan.inputs["dict"].values()]
    assert [item["tensor"] for item in items] == shapes
    assert [warning for warning in plan.warnings if "stopped" in warning] == []
    assert plan.made_up
    assert str(plan).splitlines()[-1].startswith(f"made up: an input of ({', '.join(map(str, shapes[0]))})")
    assert normswap.Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(("model", "shapes"), MADE.values(), ids=MADE)
def test_what_was_made_up_is_enough_for_the_checks(model: nn.Module, shapes: list[list[int]]) -> None:
    checks = normswap.check(normswap.convert(model.eval()), model)
    assert checks, checks


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 11 * 7, 2)).eval()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.body(pixel_values)  # type: ignore[no-any-return]


IMAGES, LABELS = torch.randn(4, 3, 13, 9), torch.arange(4)
GIVEN: dict[str, tuple[nn.Module, Any]] = {
    "batch with labels": (net(), [IMAGES, LABELS]),
    "batch without": (net(), [IMAGES]),
    "loader": (net(), DataLoader(TensorDataset(IMAGES, LABELS), 2)),
    "loader of dicts": (Named(), DataLoader([{"pixel_values": x, "labels": 1} for x in IMAGES], 2)),  # type: ignore[arg-type]
    "dict of another name": (net(), {"image": IMAGES, "label": LABELS}),
}  # fmt: skip


@pytest.mark.parametrize(("model", "given"), GIVEN.values(), ids=GIVEN)
def test_a_loader_or_its_batch_is_an_example(model: nn.Module, given: Any, tmp_path: Any) -> None:
    converted = normswap.convert(model, example_input=given)
    plan = normswap.plan_of(converted)
    assert [entry.shape[2:] for entry in plan.norms if entry.shape] == [(11, 7)]
    assert not plan.made_up
    checks = normswap.check(converted, model, example_input=given)
    assert checks, checks
    normswap.export(converted, tmp_path / "net.pt2", to="torch", example_input=given)


def test_a_loader_without_batches_is_named() -> None:
    with pytest.raises(normswap.InvalidOption, match="a loader without a batch"):
        normswap.convert(net(), example_input=DataLoader(TensorDataset(IMAGES[:0], LABELS[:0]), 2))


def test_where_no_reading_runs_the_error_is_that_of_the_first() -> None:
    with pytest.raises(normswap.NeedsExampleInput, match=r"ran \(\(4, 5, 13, 9\), \(4,\)"):
        normswap.convert(net(), example_input=[torch.zeros(4, 5, 13, 9), LABELS])
