"""What `register_norm` and `register_conv` do not take, and networks that are none, are named at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normswap
from normswap.networks import recognition

CLASS = "must be a class of your own, derived from nn.Module"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a name": (lambda: normswap.register_norm("B", 3), f"register_norm: 'B' {CLASS}"),  # type: ignore[arg-type]
    "no parts": (lambda: normswap.register_norm(nn.BatchNorm2d, 3), "parts=3 is no function of one argument"),  # type: ignore[arg-type]
    "parts of two": (lambda: normswap.register_norm(nn.BatchNorm2d, lambda a, b: a), "is no function of one argument"),  # type: ignore[arg-type]
    "a module": (lambda: normswap.register_norm(nn.BatchNorm2d(3), len), "no class; pass BatchNorm2d itself"),  # type: ignore[arg-type]
    "every module": (lambda: normswap.register_norm(nn.Module, len), CLASS),  # type: ignore[arg-type]
    "another class": (lambda: normswap.register_norm(dict, len), f"<class 'dict'> {CLASS}"),  # type: ignore[arg-type]
    "a number": (lambda: normswap.register_conv(3), f"register_conv: 3 {CLASS}"),  # type: ignore[arg-type]
    "a convolution": (lambda: normswap.register_conv(nn.Conv2d(1, 1, 1)), "no class; pass Conv2d itself"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_registering_nonsense(call: Callable[[], Any], message: str) -> None:
    before = dict(recognition._NORMS), set(recognition._CONVS)
    with pytest.raises(normswap.InvalidOption) as caught:
        call()
    assert message in str(caught.value)
    assert before == (recognition._NORMS, recognition._CONVS)


class Taught(nn.BatchNorm2d):
    """A class that functions which return nonsense are given for."""


ILL_MADE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "half a channel": (lambda m: (8.5,), "its num_channels is 8.5, no whole number"),
    "no epsilon": (lambda m: (8, None), "its eps is None, no number of at least 0"),
    "an epsilon below zero": (lambda m: (8, -1.0), "its eps is -1.0, no number of at least 0"),
    "an array": (lambda m: (8, 1e-5, m.weight.detach().numpy()), "its weight is a ndarray, no tensor"),
    "a list of modules": (
        lambda m: (8, 1e-5, None, None, None, None, [nn.ReLU()]), "its then is a list, no dict of modules by name",
    ),
    "a function": (
        lambda m: (8, 1e-5, None, None, None, None, {"act": F.relu}), "its then holds act, a function and no module",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("made", "message"), ILL_MADE.values(), ids=ILL_MADE)
def test_parts_that_make_no_sense(made: Callable[[Any], Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recognition._NORMS, Taught, lambda m: normswap.NormParts(*made(m)))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Taught(8))
    with pytest.raises(normswap.UnsupportedModel, match=f"^1: {message}; correct it, or the function given to"):
        normswap.convert(model, example_input=torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    "call",
    [normswap.convert, normswap.inspect, normswap.check, normswap.fold, normswap.plan_of,
     lambda model: normswap.save(model, "nowhere"), lambda model: normswap.export(model, "nowhere.onnx"),
     lambda model: normswap.apply(model, normswap.inspect(nn.BatchNorm2d(4)))],
    ids=["convert", "inspect", "check", "fold", "plan_of", "save", "export", "apply"],
)  # fmt: skip
def test_a_name_in_place_of_a_network(call: Callable[[Any], Any]) -> None:
    with pytest.raises(normswap.UnsupportedModel, match="str is not an nn.Module; pass the network itself"):
        call("resnet50")
