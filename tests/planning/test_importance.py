"""What the outputs make of each channel: against derivatives taken one by one."""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.networks.network import Network
from normswap.planning.importance import Importance, weighted
from normswap.planning.measuring import watch


def two_outputs() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    with torch.no_grad():
        model[5].weight[:, 1] = 0  # what nothing reads
        model[5].weight[:, 2] *= 20
    return model.eval().requires_grad_(False)


def looked(model: nn.Module, norm: str, images: Tensor) -> dict[str, Tensor]:
    importance = Importance(Network(model), [norm])
    for rows, followed in importance.pieces(images):
        assert followed
        assert importance.look(rows)
    return importance.found()


def test_it_is_the_derivative_of_all_outputs_by_a_shift_of_the_channel() -> None:
    model, images = two_outputs(), torch.randn(16, 3, 8, 8)
    found = looked(model, "1", images)["1"]
    squares = torch.zeros(4, dtype=torch.float64)
    for image in images:
        x = model[0](image[None])
        shift = torch.zeros(4, requires_grad=True)
        for output in model[1:](x + shift.view(1, 4, 1, 1))[0]:
            squares += torch.autograd.grad(output, shift, retain_graph=True)[0].double().square()
    assert found.shape == (4, 4)
    torch.testing.assert_close(found.square().sum(0), squares, rtol=0.6, atol=1e-9)  # two signs a sample, 16 samples
    assert not found[:, 1].any()
    assert all(parameter.grad is None for parameter in model.parameters())


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).argmax(1)


def test_a_network_without_gradients_is_equalized_by_its_norms_alone() -> None:
    model, images = Rounded().eval(), torch.randn(8, 3, 9, 9)
    nn.init.uniform_(model.bn.running_var, 0.5, 2)
    assert looked(model, "bn", images) == {}
    plan = normswap.inspect(model, batches=[images], example_input=images[:2], groups=1)
    assert plan.norms[0].drift is not None


def test_weights_without_importance_are_those_of_the_norm() -> None:
    gamma, unit = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])
    gammas, units = torch.stack([gamma, gamma]), torch.stack([unit, unit])
    for nothing in (torch.zeros(2, 0, 2), torch.zeros(2, 3, 2)):
        rows, own = weighted(nothing, gammas, units)
        assert not rows.any()
        assert torch.equal(own, gammas)
    slopes = torch.tensor([[[0.0, 4.0], [0.0, -3.0]], [[0.0, 0.0], [0.0, 0.0]]])
    rows, own = weighted(slopes, gammas, units)
    share = (2 * 0.6) ** 0.5
    assert rows[0].tolist() == [[0, pytest.approx(0.8 * share)], [0, pytest.approx(-0.6 * share)]]
    assert own[0].square().tolist() == pytest.approx([0.1 * 1 / 2.5, 2 * 0.4 + 0.1 * 4 / 2.5])
    assert not rows[1].any()
    assert torch.equal(own[1], gamma)


class WithoutHistory(nn.Module):
    """Cannot run where autograd looks on; notes how many samples each pass has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.sizes = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return torch.from_numpy(self.bn(self.conv(x)).numpy()).mean((2, 3))


def test_samples_that_gradients_cannot_follow_are_seen_once() -> None:
    model, images = WithoutHistory().eval(), torch.randn(40, 3, 9, 9)
    nn.init.uniform_(model.bn.running_var, 0.5, 2)
    network = Network(model)
    seen = watch(network, normswap.inspect(model, example_input=images[:2]).norms, [images])["bn"]
    with torch.no_grad():
        x = (model.conv(images) / (model.bn.running_var + model.bn.eps).sqrt().view(1, 4, 1, 1)).flatten(2)
    torch.testing.assert_close(torch.cat(seen.first), x.mean(-1))
    assert seen.slopes is None


def test_one_pass_serves_moments_and_gradients() -> None:
    model, images = two_outputs(), torch.randn(40, 3, 8, 8)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    network, entries = Network(model), normswap.inspect(model, example_input=images[:2]).norms
    with mock.patch.object(nn.Conv2d, "forward", autospec=True, side_effect=nn.Conv2d.forward) as ran:
        seen = watch(network, entries, [images])["1"]
    assert [len(call.args[1]) for call in ran.call_args_list] == [16, 16, 8]
    assert len(torch.cat(seen.first)) == 40
    assert seen.slopes is not None
