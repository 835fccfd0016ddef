"""Moments: gathered batch by batch, and given to the norms of a converted network."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.conversion.moments import joint_sums, match_moments
from normswap.networks.network import Network


def test_sums_of_batches_add_up_to_those_of_all_values() -> None:
    x, y = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64) + 2
    count, *sums = joint_sums(x[:1], y[:1]) + joint_sums(x[1:], y[1:])
    assert count.tolist() == [6 * 4 * 5] * 3
    for found, wanted in zip(sums, (x, y, x * x, y * y, x * y), strict=True):
        torch.testing.assert_close(found, wanted.sum((0, 2, 3)))


def trained(*, bias: float = 0.0) -> nn.Module:
    """Return two norms in a row whose statistics are those of no batch; one channel has a negative weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    with torch.no_grad():
        model[1].weight[0] = -1
    return model.eval()


def pairs(model: nn.Module, converted: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor, nn.GroupNorm]:
    """Return what a norm's GroupNorm normalizes to, what its BatchNorm gives, (C, all values) each, and the norm."""
    seen: list[Tensor] = []
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _module, _args, y: seen.append(y)),
        converted.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0])),
    ]
    with torch.no_grad():
        model(x), converted(x)
    for hook in hooks:
        hook.remove()
    norm = converted.get_submodule(name)
    normalized = torch.nn.functional.group_norm(seen[1], norm.num_groups, eps=norm.eps)
    return normalized.transpose(0, 1).flatten(1), seen[0].transpose(0, 1).flatten(1), norm


@pytest.mark.parametrize("name", ["1", "4"])
@pytest.mark.parametrize("parts", [1, 3], ids=["one batch", "three batches"])
def test_norms_come_as_close_to_the_original_as_a_line_can(name: str, parts: int) -> None:
    model = trained()
    converted = normswap.convert(model, example_input=torch.zeros(2, 3, 12, 12)).eval()
    images = torch.randn(48, 3, 12, 12) * torch.linspace(0.2, 3, 48).view(-1, 1, 1, 1) + 0.3
    match_moments(Network(converted), Network(model), ["1", "4"], images.chunk(parts))
    x, y, norm = pairs(model, converted, name, images)
    for channel in range(8):
        slope, intercept = np.polyfit(x[channel].numpy(), y[channel].numpy(), 1)
        close = 1e-4 if parts == 1 else 1e-2
        assert norm.weight[channel].item() == pytest.approx(slope, rel=close, abs=close)
        assert norm.bias[channel].item() == pytest.approx(intercept, rel=close, abs=close)
    assert (converted[1].weight[0] < 0).item()  # type: ignore[index]


def test_a_channel_that_does_not_follow_the_original_is_not_turned_off() -> None:
    model = trained()
    converted = normswap.convert(model, ws="none", example_input=torch.zeros(2, 3, 12, 12)).eval()
    with torch.no_grad():
        converted[3].weight.copy_(torch.randn_like(converted[3].weight))  # type: ignore[index]
    images = torch.randn(16, 3, 12, 12)
    match_moments(Network(converted), Network(model), ["4"], [images])
    x, y, norm = pairs(model, converted, "4", images)
    deviation = y.std(1) / x.std(1)
    assert (norm.weight.abs() >= 0.2 * deviation * 0.999).all()
    assert (norm.weight.abs() < deviation).all()


def test_what_is_written_into_an_activation_later_does_not_count() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            y = self.bn(x)
            x += 100
            return x + y

    model = Stream().eval()
    nn.init.uniform_(model.bn.running_var, 0.5, 2)
    converted = normswap.convert(model, groups=2, ws="none").eval()
    images = torch.randn(8, 3, 6, 6)
    match_moments(Network(converted), Network(model), ["bn"], [images])
    with torch.no_grad():
        close = (converted(images) - model(images)).square().mean() / model.bn(model.conv(images)).var()
    assert close < 0.5


def test_without_a_batch_nothing_changes() -> None:
    model = trained()
    converted = normswap.convert(model, example_input=torch.zeros(2, 3, 12, 12)).eval()
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    match_moments(Network(converted), Network(model), ["1", "4"], [])
    assert all(torch.equal(value, before[key]) for key, value in converted.state_dict().items())
