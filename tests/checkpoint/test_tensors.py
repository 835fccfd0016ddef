"""What a checkpoint stores: the same function for the network that loads it and for one of plain convolutions."""

from pathlib import Path

import pytest
import torch
from nets import CASES
from safetensors.torch import load_file
from torch import Tensor, nn

import normswap
from normswap.checkpoint.tensors import stored_tensors

FORMS = pytest.mark.parametrize("ws", ["adaptive", "standard"])
SMALL = 1e-3
"""Scale of filters whose variance is as small as the epsilon of the standardization."""


class Merged(nn.Module):
    """Biased convolutions of different scales that meet in a sum before their norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        with torch.no_grad():
            self.b.weight.mul_(SMALL)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x) + self.b(x))


def tuned(model: nn.Module, x: Tensor) -> nn.Module:
    """Move every filter, its scale and its mean, by training with momentum and weight decay."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.5, 0.9, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model.train()(x).square().sum(1).mean().backward()
        optimizer.step()
    return model.eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@FORMS
@pytest.mark.parametrize("build", [Merged, CASES["transposed"].build, CASES["cat"].build], ids=["sum", "up", "cat"])
def test_trained_network_loads_into_itself_and_into_plain_convolutions(ws: str, build: object, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    source = build()  # type: ignore[operator]
    model = normswap.convert(source, ws=ws, example_input=x)
    raw = {name: value.clone() for name, value in model.state_dict().items()}
    expected = tuned(model, x)(x)
    assert all(not torch.equal(value, raw[name]) for name, value in model.state_dict().items() if "ws" not in name)
    normswap.save(model, tmp_path)
    loaded = normswap.load(tmp_path, model=source)
    assert relative(loaded(x), expected) < 1e-6
    plain = normswap.convert(source, ws="none", example_input=x).eval()
    missed = plain.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not missed.missing_keys
    assert {name.rpartition(".")[2] for name in missed.unexpected_keys} <= {"ws_gain", "ws_offset"}
    assert relative(plain(x), expected) < 1e-5
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    normswap.save(loaded, tmp_path)
    again = normswap.load(tmp_path, model=source)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


@FORMS
def test_plain_network_that_loads_a_fresh_file_strictly_says_what_it_lacks(ws: str, tmp_path: Path) -> None:
    model = normswap.convert(Merged(), ws=ws)
    normswap.save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"a.ws_gain"'):
        normswap.convert(Merged(), ws="none").load_state_dict(stored)
    with pytest.raises(RuntimeError, match="ws_gain"):
        Merged().load_state_dict(stored, strict=True)


def test_standard_form_is_the_papers_behind_a_norm() -> None:
    conv, norm = nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32)
    model = normswap.convert(nn.Sequential(conv, norm), ws="standard", groups=4)
    paper = (conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)) / conv.weight.std(
        (1, 2, 3), correction=0, keepdim=True
    )
    x = torch.randn(2, 3, 16, 16)
    expected = nn.functional.group_norm(nn.functional.conv2d(x, paper), 4)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


def test_a_half_precision_network_is_stored_as_it_is(tmp_path: Path) -> None:
    model = normswap.convert(Merged(), ws="adaptive").half()
    normswap.save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = normswap.load(tmp_path, model=Merged().half())
    x = torch.randn(1, 3, 8, 8).half()
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=2e-3, atol=2e-3)


def test_what_lies_in_memory_as_in_a_file_is_stored_from_there() -> None:
    model = normswap.convert(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), example_input=torch.zeros(2, 3, 8, 8)
    )
    model.register_buffer("whole", torch.arange(6.0).view(2, 3))
    model.register_buffer("again", model.whole[1])  # type: ignore[index]
    model.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
    model.register_buffer("conjugate", torch.ones(2, dtype=torch.complex64).mul(1j).conj())
    state, stored = model.state_dict(), stored_tensors(model)
    assert {key for key in state if state[key].data_ptr() != stored[key].data_ptr()} == {"again", "turned", "conjugate"}
    assert len({value.untyped_storage().data_ptr() for value in stored.values()}) == len(stored)
    assert all(value.is_contiguous() and torch.equal(value, state[key]) for key, value in stored.items())
    assert not stored["conjugate"].is_conj()
