"""Patterns and options that come to nothing are refused, with the name that was meant."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from badnets import trained
from torch import nn

import normswap

X = torch.randn(2, 3, 16, 16)


class Stages(nn.Module):
    """Layers inside containers, one container under two names, and a head that is neither norm nor convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.layer4 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self.again = self.layer4
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer4(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def stages() -> nn.Module:
    torch.manual_seed(0)
    return trained(Stages())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another name": ({"exclude": "layer5"}, "exclude 'layer5' matches no layer; did you mean layer4"),
    "capitals": ({"exclude": "Layer4"}, "exclude 'Layer4' matches no layer; did you mean layer4"),
    "inside something": ({"include": "0"}, "include '0' matches no layer; did you mean '*.0'?"),
    "of a wrapper": ({"include": "module.layer4"}, "include 'module.layer4' matches no layer; did you mean 'layer4'?"),
    "one of two": ({"exclude": ["stem", "zzz"]}, "exclude 'zzz' matches no layer; there are layer4, stem"),
    "an override": ({"overrides": {"zz*": {"groups": 2}}}, "override 'zz*' matches no layer; there are layer4, stem"),
    "the second name": ({"exclude": "again"}, "exclude 'again' matches no layer; it is another name of 'layer4'"),
    "neither norm nor convolution": (
        {"exclude": "head"},
        "exclude 'head' matches no norm and no convolution (head, …); name those, or what holds them",
    ),
    "of excluded layers": (
        {"exclude": "layer4", "overrides": {"layer4": {"groups": 2}}},
        "the override 'layer4' sets groups= of norms that stay as they are (layer4.1: excluded by 'layer4'); leave one",
    ),
    "two sizes": ({"groups": 8, "group_size": 2}, "groups= says nothing with group_size=; leave it out, or change"),
    "groups of one group": ({"to": "layer", "groups": 8}, "groups= says nothing with to='layer'; leave it out"),
    "sizes of one channel": ({"to": "instance", "group_size": 2}, "group_size= says nothing with to='instance'"),
    "shrink of nothing": ({"affine": "copy", "shrink": 3}, "shrink= says nothing with affine='copy'; leave it out"),
    "scales of nothing": ({"affine": "copy", "equalize": True}, "equalize= says nothing with affine='copy'"),
    "keep nothing": ({"keep": "live"}, "keep= says nothing without include= or exclude=; leave it out"),
    "two sizes of a layer": (
        {"overrides": {"stem": {"groups": 2, "group_size": 2}}},
        "in overrides['stem'] groups= says nothing with group_size=; leave it out",
    ),
    "an option": ({"exlude": "stem"}, "exlude= is no option; did you mean exclude?"),
    "groups in words": ({"groups": "many"}, "groups='many' must be a whole number of at least 1, or 'auto'"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("call", [normswap.inspect, normswap.convert], ids=lambda call: call.__name__)
def test_what_comes_to_nothing_is_refused(options: dict[str, Any], message: str, call: Callable[..., Any]) -> None:
    with pytest.raises(normswap.InvalidOption) as caught:
        call(stages(), example_input=X, **options)
    assert message in str(caught.value)


def test_the_name_that_is_offered_works() -> None:
    for pattern in ("layer4", "*.0", "stem"):
        plan = normswap.inspect(stages(), example_input=X, exclude=pattern)
        assert 0 < sum(entry.by_user for entry in plan.entries) < len(plan.entries)


@pytest.mark.parametrize(
    "options",
    [{"to": "LAYER", "ws": "None", "groups": None}, {"groups": "AUTO"}, {"overrides": {"stem": {"groups": "Auto"}}}],
    ids=str,
)
def test_capitals_are_choices_too(options: dict[str, Any]) -> None:
    asked = {key: value for key, value in options.items() if value is not None}
    small = {k: v.lower() if isinstance(v, str) else {"stem": {"groups": "auto"}} for k, v in asked.items()}
    found, expected = (normswap.inspect(stages(), example_input=X, **own) for own in (asked, small))
    assert [(e.name, e.action) for e in found.entries] == [(e.name, e.action) for e in expected.entries]
    assert [e.groups for e in found.norms] == [e.groups for e in expected.norms]


@pytest.mark.parametrize(
    "options",
    [{"group_size": 2}, {"to": "layer"}, {"affine": "copy"}, {"groups": 4, "exclude": "stem", "keep": "live"},
     {"overrides": {"layer4": {"groups": 2, "ws": "none"}}}],
    ids=str,
)  # fmt: skip
def test_options_that_a_plan_names_can_be_passed_again(options: dict[str, Any]) -> None:
    plan = normswap.inspect(stages(), example_input=X, **options)
    assert normswap.inspect(stages(), example_input=X, **plan.options.wishes()).entries == plan.entries
