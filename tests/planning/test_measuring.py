"""Group counts measured on images."""

import pytest
import torch
from torch import nn

import normswap
from normswap.planning.measuring import ROWS, Seen


def trained(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Give a norm statistics and an affine part that differ by channel."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor, low in ((norm.weight, 0.5), (norm.bias, -1.0), (norm.running_mean, -2.0), (norm.running_var, 0.1)):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2 + low)  # type: ignore[union-attr]
    return norm.eval()


def test_auto_measures_on_images() -> None:
    norm = trained(nn.BatchNorm2d(32))
    with torch.no_grad():
        norm.weight.fill_(1)
        norm.bias.zero_()
        norm.running_mean.zero_()  # type: ignore[union-attr]
        norm.running_var.fill_(1.01)  # type: ignore[union-attr]
    own = torch.randn(64, 2, 1, 1, 1).expand(64, 2, 16, 8, 8).flatten(1, 2)  # each half moves as one
    alternating = own * torch.tensor([1.0, -1.0]).repeat(16).view(1, 32, 1, 1) + 0.1 * torch.randn(64, 32, 8, 8)
    plan = normswap.inspect(norm, groups="auto", batches=[alternating], example_input=alternating[:2])
    entry = plan.norms[0]
    assert entry.drift is not None
    shown = normswap.apply(norm, plan)(alternating) - norm(alternating)
    assert entry.drift == pytest.approx((shown.square().mean().sqrt() / norm(alternating).std()).item(), rel=0.02)
    fresh = nn.BatchNorm2d(32)
    with pytest.raises(normswap.InvalidOption, match="batches= are for trained norms; there are none here"):
        normswap.inspect(fresh, batches=[alternating], example_input=alternating[:2])


def test_of_many_rows_as_of_tokens_some_are_kept_from_all_batches() -> None:
    seen = Seen()
    for start in range(0, 8 * ROWS, ROWS // 2):
        values = torch.arange(start, start + ROWS // 2).float()
        seen.add(values.unsqueeze(1).expand(-1, 3).clone())
        seen.thin()
        assert sum(map(len, seen.first)) <= ROWS
    first, second = torch.cat(seen.first), torch.cat(seen.second)
    assert len(first) > ROWS // 2
    assert torch.equal(second, first.square())
    gaps = first[:, 0].diff()
    assert gaps.unique().tolist() == [8.0]
