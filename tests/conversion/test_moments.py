"""Moments: gathered batch by batch, and given to the norms of a converted network."""

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.conversion.moments import Moments, match_moments
from normswap.networks.network import Network


def test_moments_of_batches_alike_in_size_are_those_of_all_together() -> None:
    values, moments = torch.randn(6, 8, 3, dtype=torch.float64), Moments()
    for batch in values:
        moments.add(batch.mean(0), batch.var(0, correction=0))
    every = values.flatten(0, 1)
    torch.testing.assert_close(moments.mean, every.mean(0))
    torch.testing.assert_close(moments.var, every.var(0, correction=0))


def test_a_variance_is_never_negative() -> None:
    moments = Moments()
    moments.add(torch.full((2,), 1e8), torch.zeros(2))
    moments.add(torch.full((2,), 1e8), torch.zeros(2))
    assert (moments.var >= 0).all()


def trained() -> nn.Module:
    """Return two norms in a row whose statistics are those of no batch; one channel has a negative weight."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    with torch.no_grad():
        model[1].weight[0] = -1
    return model.eval()


@pytest.mark.parametrize("name", ["1", "4"])
def test_norms_have_the_originals_moments_afterwards(name: str) -> None:
    model = trained()
    converted = normswap.convert(model, affine="copy", example_input=torch.zeros(2, 3, 12, 12)).eval()
    batch = torch.randn(32, 3, 12, 12) * 2 + 1
    match_moments(Network(converted), Network(model), ["1", "4"], [batch])
    outputs: list[Tensor] = []
    for network in (model, converted):
        handle = network.get_submodule(name).register_forward_hook(lambda _module, _args, y: outputs.append(y))
        network(batch)
        handle.remove()
    theirs, ours = outputs
    torch.testing.assert_close(ours.mean((0, 2, 3)), theirs.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.std((0, 2, 3)), theirs.std((0, 2, 3)), rtol=1e-3, atol=1e-3)
    assert torch.equal(converted.get_submodule("1").weight < 0, model[1].weight < 0)  # type: ignore[index, operator]


def test_without_a_batch_nothing_changes() -> None:
    model = trained()
    converted = normswap.convert(model, example_input=torch.zeros(2, 3, 12, 12)).eval()
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    match_moments(Network(converted), Network(model), ["1", "4"], [])
    assert all(torch.equal(value, before[key]) for key, value in converted.state_dict().items())
