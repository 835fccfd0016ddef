"""Checks of networks in which values of the example matter: edges, lengths, masks; and of those that differ by mode."""

from typing import Any

import badnets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])


class Graph(nn.Module):
    """Nodes along the first axis, each of which takes from those that an edge comes from."""

    def __init__(self, skips_in_training: bool = False) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)
        self.skips_in_training = skips_in_training

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.a(x)))
        if self.training and self.skips_in_training:
            return self.b(y)  # type: ignore[no-any-return]
        return self.b(y + torch.zeros_like(y).index_add(0, edge_index[1], y[edge_index[0]]))  # type: ignore[no-any-return]


def checks(model: nn.Module, example: Any, *, original: bool = True) -> dict[str, normswap.Check]:
    model = badnets.trained(model)
    converted = normswap.convert(model, example_input=example)
    found = normswap.check(converted, model if original else None, example_input=example)
    return {row.name: row for row in found.rows}


@pytest.mark.parametrize("original", [True, False], ids=["beside the original", "alone"])
def test_nodes_of_a_graph_are_no_samples_of_their_own(original: bool) -> None:
    found = checks(Graph(), (torch.randn(6, 8), EDGES), original=original)
    assert [name for name, row in found.items() if row.ok is False] == []
    assert (found["batch size 1"].ok, found["batch independence"].ok) == (None, None)
    assert "one sample does not run by itself" in found["batch size 1"].detail


class Stateful(nn.Module):
    """Takes the state of a recurrent layer, (layers, samples, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.rnn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LSTM(8, 5)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        y, _ = self.rnn(self.bn(self.conv(x)).mean((2, 3))[None], state)
        return y[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("original", [True, False], ids=["beside the original", "alone"])
def test_states_hold_samples_on_another_axis(original: bool) -> None:
    state = torch.randn(1, 2, 5), torch.randn(1, 2, 5)
    found = checks(Stateful(), (torch.randn(2, 3, 8, 8), state), original=original)
    assert [name for name, row in found.items() if row.ok is False] == []
    assert found["batch size 1"].ok is None
    assert "another axis than its first" in found["batch size 1"].detail


def test_a_network_without_edges_must_run_on_one_sample() -> None:
    class Paired(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if isinstance(self[1], nn.GroupNorm) and len(y) < 2:
                raise ValueError("needs two")
            return y  # type: ignore[no-any-return]

    found = checks(Paired(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.randn(2, 3, 8, 8))
    assert found["batch size 1"].ok is False


def test_code_that_skips_a_step_in_train_mode_is_not_the_norms() -> None:
    found = checks(Graph(skips_in_training=True), (torch.randn(6, 8), EDGES))["train() equals eval()"]
    assert found.ok
    assert "the network itself differs by mode" in found.detail


class Lengths(nn.Module):
    """Means over the part of each sample that its length, a share of the whole, leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        mask = (torch.arange(x.shape[-1]) < (lengths * x.shape[-1])[:, None]).float()
        return (y * mask[:, None]).sum(-1) / mask.sum(1, keepdim=True)


class Masked(Lengths):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return (y * mask[:, None]).sum(-1) / (mask.sum(1, keepdim=True) * (mask * (1 - mask) == 0).all())


class Positive(Lengths):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x.log())).mean(-1)  # type: ignore[no-any-return]


MASK = torch.cat([torch.ones(2, 12), torch.zeros(2, 8)], 1)
VALUES: dict[str, tuple[type[nn.Module], Any]] = {
    "lengths": (Lengths, (torch.zeros(2, 4, 20), torch.tensor([1.0, 0.6]))),
    "lengths that are alike": (Lengths, (torch.zeros(2, 4, 20), torch.ones(2))),
    "mask": (Masked, (torch.zeros(2, 4, 20), MASK)),
    "values above zero": (Positive, torch.rand(2, 4, 20) + 0.1),
}


@pytest.mark.parametrize(("kind", "example"), VALUES.values(), ids=VALUES)
def test_values_are_used_where_they_matter(kind: type[nn.Module], example: Any) -> None:
    found = checks(kind(), example)
    assert [f"{name}: {row.detail}" for name, row in found.items() if row.ok is False] == []
    assert found["finite"].ok


def test_a_made_up_size_that_the_head_refuses_breaks_no_check() -> None:
    model = badnets.trained(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 21 * 33, 5))
    )
    rows = {row.name: row for row in normswap.check(normswap.convert(model), model).rows}
    assert rows["runs"].ok is None
    assert rows["runs"].detail.endswith("the input is made up, pass example_input=")
    again = normswap.check(normswap.convert(model), model, example_input=torch.randn(2, 1, 23, 35))
    assert again, again


class Split(nn.BatchNorm2d):
    """Statistics of several parts of the batch, one after the other."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.running_mean, self.running_var = torch.zeros(2 * channels), torch.ones(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        means, variances = self.running_mean.view(2, -1).mean(0), self.running_var.view(2, -1).mean(0)  # type: ignore[union-attr]
        return F.batch_norm(x, means, variances, self.weight, self.bias, self.training, eps=self.eps)


class Wide(nn.Module):
    """Statistics of shape (1, C, 1, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in ("running_mean", 0.0), ("running_var", 1.0):
            self.register_buffer(name, torch.full((1, channels, 1, 1), value))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) / (self.running_var + 1e-5).sqrt()  # type: ignore[operator]


def test_statistics_of_another_size_leave_the_norm_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Split(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(normswap.CheckFailed, match=r"1: its weight is \(8,\), for 16 channels; or teach it"):
        normswap.convert(model, example_input=torch.zeros(2, 3, 8, 8))
    converted = normswap.convert(model, example_input=torch.zeros(2, 3, 8, 8), exclude="1")
    assert isinstance(converted[1], Split)
    assert isinstance(converted[3], nn.GroupNorm)


def test_running_statistics_of_a_class_that_nobody_knows_are_warned_of() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Wide(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    plan = normswap.inspect(model, example_input=torch.zeros(2, 3, 8, 8))
    assert plan.warnings == (
        "1 modules keep running statistics and are no known norms (1, a Wide with statistics (1, 8, 1, 1)); they stay "
        "as they are: where they are BatchNorm, teach them with normswap.register_norm",
    )


class Recurrent(nn.Module):
    """A layer that has parameters and draws random numbers in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.lstm = nn.LSTM(16, 8, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(F.relu(self.bn(self.conv(x))).transpose(1, 2))[0]  # type: ignore[no-any-return]


class Spiking(nn.Module):
    """Keeps what it saw, as neurons with a membrane do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.potential = nn.Conv1d(4, 16, 3), nn.BatchNorm1d(16), 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.potential = 0.5 * self.potential + self.bn(self.conv(x))
        return self.potential  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [Recurrent, Spiking], ids=["dropout inside a layer", "state between calls"])
def test_dropout_and_state_are_not_the_norms(kind: type[nn.Module]) -> None:
    found = checks(kind(), torch.randn(2, 4, 20))
    assert [f"{name}: {row.detail}" for name, row in found.items() if row.ok is False] == []
