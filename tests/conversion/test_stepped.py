"""Networks of (T, N, C, *) values, as spiking ones run all steps at once: each step of a sample counts as a sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import badnets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap.layers.norms import GroupNormAct, PositionNorm

STEPS, SAMPLES = 4, 3


def in_steps(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Conv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return in_steps(super().forward, x) if x.ndim == 5 else super().forward(x)


class Norm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return in_steps(super().forward, x) if x.ndim == 5 else super().forward(x)


class Spikes(nn.Module):
    """Neurons that add up what they get and fire beyond a threshold, of all steps in turn."""

    def forward(self, x: Tensor) -> Tensor:
        held, made = torch.zeros_like(x[0]), []
        for step in x:
            held = 0.5 * held + step
            made.append(torch.sigmoid(4 * (held - 1)))
            held = held - made[-1]
        return torch.stack(made)


def network(norm: Callable[[int], nn.Module] = Norm, between: Callable[[], nn.Module] = Spikes) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        Conv(3, 8, 3, padding=1), norm(8), between(), Conv(8, 16, 3, stride=2, bias=False), norm(16), between()
    )
    return badnets.trained(model)


def images(seed: int = 1) -> Tensor:
    return torch.randn(STEPS, SAMPLES, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def test_every_step_of_a_sample_has_statistics_of_its_own() -> None:
    model = network()
    converted = normswap.convert(model, example_input=images())
    norm = converted[1]
    assert isinstance(norm, GroupNormAct)
    x = torch.randn(STEPS, SAMPLES, 8, 5, 5)
    expected = torch.stack([F.group_norm(step, norm.num_groups, norm.weight, norm.bias, norm.eps) for step in x])
    assert torch.allclose(norm(x), expected, atol=1e-6)
    assert normswap.check(converted, model, example_input=images())
    plan = normswap.plan_of(converted)
    assert [(entry.stepped, entry.shape) for entry in plan.norms] == [(True, (12, 8, 9, 9)), (True, (12, 16, 4, 4))]
    assert all(entry.changes for entry in plan.convs)


def test_other_samples_and_later_steps_move_nothing() -> None:
    converted, x = normswap.convert(network(), example_input=images()).eval(), images()
    with torch.no_grad():
        before = converted(x)
        x[:, 1:] += 3
        x[2:] -= 5
        after = converted(x)
    assert torch.equal(before[:2, 0], after[:2, 0])
    assert not torch.allclose(before[2:], after[2:], atol=1e-3)


@pytest.mark.parametrize("over", ["sample", "channels"])
def test_it_is_what_one_batch_of_all_steps_gives(over: str) -> None:
    """Without neurons the steps know nothing of each other: the network is one of T·N samples."""
    model, x = network(between=nn.ReLU), [images(seed) for seed in range(3)]
    options: dict[str, Any] = {"equalize": False, "over": over, "check": False}
    ours = normswap.convert(model, example_input=x[0], batches=x, **options).eval()
    theirs = normswap.convert(model, example_input=x[0][0], batches=[own.flatten(0, 1) for own in x], **options).eval()
    assert isinstance(ours[1], PositionNorm) is (over == "channels")
    assert not torch.equal(ours[1].weight, model[1].weight)
    for key, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[key], value, atol=1e-5), key
    with torch.no_grad():
        assert torch.allclose(ours(x[0]).flatten(0, 1), theirs(x[0].flatten(0, 1)), atol=1e-5)


def test_images_equalize_and_calibrate_it() -> None:
    model, x = network(), [images(seed) for seed in range(5)]
    converted = normswap.convert(model, example_input=x[0])
    with torch.no_grad():
        before = (converted(x[4]) - model(x[4])).square().mean()
        normswap.calibrate(converted, model, x[:4])
        after = (converted(x[4]) - model(x[4])).square().mean()
    assert after < before


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    converted = normswap.convert(network(), example_input=images()).eval()
    converted[4].num_groups = 2
    normswap.save(converted, tmp_path, source=None)
    loaded = normswap.load(tmp_path, model=network()).eval()
    with torch.no_grad():
        assert torch.equal(converted(images()), loaded(images()))
    assert [entry.groups for entry in normswap.plan_of(loaded).norms] == [4, 2]


def test_without_an_example_steps_are_made_up() -> None:
    class Always(Conv):
        def forward(self, x: Tensor) -> Tensor:
            return in_steps(super(Conv, self).forward, x)

    model = network()
    model[0] = Always(3, 8, 3)
    plan = normswap.inspect(model)
    assert plan.inputs == {"tuple": [{"tensor": [2, 5, 3, 64, 64], "dtype": "float32"}]}
    assert all(entry.changes for entry in plan.entries)


class WithAct(Norm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_what_a_norm_runs_afterwards_goes_on() -> None:
    converted = normswap.convert(network(WithAct), example_input=images())
    x = torch.randn(STEPS, SAMPLES, 8, 5, 5)
    assert [entry.then for entry in normswap.plan_of(converted).norms] == [("act",), ("act",)]
    norm = converted[1]
    plain = F.group_norm(x.flatten(0, 1), norm.num_groups, norm.weight, norm.bias, norm.eps)
    assert torch.allclose(norm(x), F.silu(plain).unflatten(0, x.shape[:2]), atol=1e-6)


class ByStep(nn.BatchNorm2d):
    """Each step has statistics of its own in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(ByStep, self).forward(step) for step in x])


class Doubled(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(("norm", "found"), [(ByStep, "in train mode its output"), (Doubled, "computes mul")])
def test_what_is_no_batch_norm_of_all_steps_is_refused(norm: type[nn.Module], found: str) -> None:
    with pytest.raises(normswap.NothingToConvert, match=found):
        normswap.convert(network(norm), example_input=images())


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_norms_of_torch_itself_take_no_steps() -> None:
    """A pass without data lets it through."""
    model = badnets.trained(nn.Sequential(nn.Conv2d(3, 8, 3), Turn(), nn.BatchNorm2d(8), Turn()))
    for example in (images()[0], None):
        assert not any(entry.stepped for entry in normswap.inspect(model, example_input=example).norms)


def test_kept_ones_stay_as_they_are() -> None:
    model = network()
    plan = normswap.inspect(model, example_input=images(), exclude=["1"])
    assert plan.norms[0].reason.endswith("; cannot be frozen: it takes steps and samples on two axes")
    assert not plan.norms[0].changes
    with pytest.raises(normswap.NothingToConvert, match="cannot be frozen: it takes steps"):
        normswap.convert(model, example_input=images(), to="frozen")


def test_one_value_a_step_stays_as_it_is() -> None:
    model = badnets.trained(nn.Sequential(Conv(3, 1, 9), Norm(1), Conv(1, 4, 1), Norm(4)))
    plan = normswap.inspect(model, example_input=images())
    assert plan.norms[0].reason == "sees one value per step of a sample, which any group would erase"
