"""Watching layers leaves nothing behind."""

import pytest
import torch
from torch import Tensor, nn

from normswap.networks.hooks import outputs_of, watching


def test_inputs_are_watched_by_name_while_the_block_lasts() -> None:
    model, seen = nn.Sequential(nn.ReLU(), nn.Flatten()), list[tuple[str, nn.Module, Tensor]]()
    x = torch.randn(2, 3, 4, requires_grad=True)
    with watching({"act": model[0], "flat": model[1]}, lambda *row: seen.append(row)):
        model(x)
    model(x)
    assert [(name, module) for name, module, _ in seen] == [("act", model[0]), ("flat", model[1])]
    assert torch.equal(seen[0][2], x)
    assert not seen[0][2].requires_grad
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_outputs_are_those_of_the_last_pass() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Flatten())
    with outputs_of({"act": model[0]}) as found:
        model(torch.ones(1, 2))
        model(-torch.ones(1, 2))
        assert torch.equal(found["act"], torch.zeros(1, 2))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("watch", [watching, outputs_of])
def test_an_error_takes_the_hooks_off(watch: object) -> None:
    layer = nn.ReLU()
    arguments = ({"act": layer}, print) if watch is watching else ({"act": layer},)
    with pytest.raises(KeyError), watch(*arguments):  # type: ignore[operator]
        raise KeyError
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks
