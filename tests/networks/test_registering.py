"""What `register_norm` and `register_conv` do not take, and networks that are none, are named at once."""

from collections.abc import Callable
from typing import Any

import pytest
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
