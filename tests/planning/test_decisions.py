"""The words and the edges of a plan: reasons, labels, warnings, and which option wins."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import CASES, Net, WithAct, conv, warm
from torch import Tensor, nn

import normswap
from normswap.planning.choices import Action
from normswap.planning.entry import ConvEntry, NormEntry


def plan_for(name: str, **options: Any) -> normswap.Plan:
    case = CASES[name]
    return normswap.inspect(case.build(), example_input=torch.zeros(case.shape), **options)


def entry(plan: normswap.Plan, name: str) -> NormEntry | ConvEntry:
    return next(e for e in plan.entries if e.name == name)


REASONS = {
    "one conv": ("direct", "bn", "follows one conv; 4 of 32 groups fit"),
    "cat": ("cat", "bn", "follows conv through cat; 8 of 32 groups fit"),
    "view": ("view", "bn", "follows one conv through view; 4 of 32 groups fit"),
    "add": ("pre-activation", "bn2", "follows conv through add; 4 of 32 groups fit"),
    "linear": ("linear", "bn", "follows one linear; 4 of 32 groups fit"),
    "never": ("dead code", "old_bn", "never runs; replaced all the same"),
    "one value": ("one value", "bn", "sees one value per sample, which any group would erase"),
    "function": ("function inside", "bn", "its forward also computes relu, which GroupNorm would lose"),
    "fresh": ("direct", "conv", "its norm is fresh"),
    "merged": ("cat", "a", "every path ends in a norm, through cat; its norm is fresh"),
    "leaves": ("read before the norm", "c", "its output leaves the network"),
    "tied": ("tied weights", "a", "shares its weight with b, which is left as it is"),
    "tied, read": ("tied weights", "b", "its output is read by <relu>"),
    "gate": ("squeeze-excite", "gate", "its output is read by <sigmoid>"),
    "kept norm": ("function inside", "conv", "its output is read by bn, which is left as it is"),
    "fan-in 1": ("fan-in 1", "conv", "one weight per filter (fan-in 1): standardizing would erase it"),
    "computed": ("weight_norm", "conv", "its kernel is computed in the forward pass, or read outside its own"),
    "unreached": ("dead code", "old", "no forward pass reaches it"),
}


@pytest.mark.parametrize(("net", "layer", "reason"), REASONS.values(), ids=REASONS)
def test_reasons(net: str, layer: str, reason: str) -> None:
    assert entry(plan_for(net), layer).reason == reason


def test_a_trained_norm_makes_its_convolution_adaptive() -> None:
    case = CASES["direct"]
    plan = normswap.inspect(warm(case.build()), example_input=torch.zeros(case.shape))
    assert (entry(plan, "conv").reason, entry(plan, "conv").ws) == ("its norm is trained", "adaptive")
    assert entry(plan_for("direct"), "conv").ws == "standard"
    assert entry(plan_for("direct", ws="adaptive"), "conv").ws == "adaptive"


def test_one_trained_norm_of_two_is_enough() -> None:
    case = CASES["shared conv"]
    model = case.build()
    model.bn2.running_mean.fill_(1)  # type: ignore[union-attr, operator]
    assert entry(normswap.inspect(model, example_input=torch.zeros(case.shape)), "conv").ws == "adaptive"


def test_a_frozen_filter_is_never_changed() -> None:
    case = CASES["direct"]
    model = case.build()
    model.conv.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    plan = normswap.inspect(model, example_input=torch.zeros(case.shape))
    assert (entry(plan, "conv").ws, entry(plan, "conv").reason) == ("adaptive", "its norm is fresh")
    kept = entry(normswap.inspect(model, example_input=torch.zeros(case.shape), ws="standard"), "conv")
    assert kept.reason == "its weight is frozen: the standard form would change a filter that is fixed"
    assert (kept.action, kept.ws, kept.eps, kept.by_user) == (Action.KEEP, None, None, False)


@pytest.mark.parametrize(
    ("options", "asked", "groups"),
    [
        ({}, 32, 4),
        ({"groups": 2}, 2, 2),
        ({"groups": "auto"}, "auto", 4),
        ({"to": "layer"}, 1, 1),
        ({"to": "instance"}, 8, 8),
        ({"group_size": 4}, 2, 2),
        ({"group_size": 3}, 2, 2),
        ({"group_size": 16}, 1, 1),
        ({"groups": 4, "overrides": {"b*": {"group_size": 8}}}, 1, 1),
        ({"group_size": 8, "overrides": {"bn": {"groups": 2}}}, 2, 2),
        ({"groups": 1, "overrides": {"conv": {"ws": "none"}}}, 1, 1),
    ],
    ids=str,
)
def test_groups_asked_and_given(options: dict[str, Any], asked: int | str, groups: int) -> None:
    found = entry(plan_for("direct", **options), "bn")
    assert (found.groups_asked, found.groups) == (asked, groups)
    assert (f"{groups} of {asked} groups fit" in found.reason) is (asked not in (groups, "auto"))


def test_auto_without_statistics_stops_at_32() -> None:
    norms = [nn.BatchNorm2d(c, track_running_stats=False) for c in (62, 64, 66, 128)]
    found = [
        normswap.inspect(n, groups="auto", example_input=torch.zeros(2, n.num_features, 4, 4)).norms[0] for n in norms
    ]
    assert [e.groups for e in found] == [31, 32, 22, 32]


@pytest.mark.parametrize(("channels", "side", "groups"), [(1, 1, None), (2, 1, 1), (1, 2, 1), (1, None, 1)], ids=str)
def test_one_value_a_sample_is_the_only_one_scaled(channels: int, side: int | None, groups: int | None) -> None:
    """Where a norm was never reached its map is taken to have more than one position."""
    model = nn.Sequential(nn.BatchNorm2d(channels))
    x = torch.zeros(2, channels, side or 4, side or 4)
    if side is None:
        case = CASES["dead code"]
        model = case.build()
        model.old_bn = nn.BatchNorm2d(channels)
        found = entry(normswap.inspect(model, example_input=torch.zeros(case.shape)), "old_bn")
    else:
        found = normswap.inspect(model, example_input=x).norms[0]
    assert found.groups == groups
    assert found.action == (Action.SCALE if groups is None else Action.GROUP_NORM)


def test_the_user_comes_first() -> None:
    plan = plan_for("function inside", exclude=["bn"])
    reason = "excluded by 'bn'; cannot be frozen: its forward also computes relu, which GroupNorm would lose"
    assert (entry(plan, "bn").reason, entry(plan, "bn").by_user) == (reason, True)
    plan = plan_for("direct", exclude=["bn", "c*", "conv"])
    assert (entry(plan, "conv").reason, entry(plan, "conv").by_user) == ("excluded by 'c*'", True)
    plan = plan_for("direct", include=["bn"])
    assert (entry(plan, "conv").reason, entry(plan, "conv").by_user) == ("no include pattern matches", True)
    plan = plan_for("direct", ws="none")
    assert (entry(plan, "conv").reason, entry(plan, "conv").by_user) == ("weight standardization is off", True)
    plan = plan_for("direct", overrides={"conv": {"ws": "none"}})
    assert entry(plan, "conv").reason == "weight standardization is off"
    assert not entry(plan_for("direct"), "bn").by_user


class NamedNorm(nn.BatchNorm2d):
    """A norm whose forward can be told what to run before and after."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__(8)
        self.act, self.before, self.after = nn.ReLU(), before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.act(super().forward(self.before(x))))


class ActFirst(nn.BatchNorm2d):
    """Runs its child before it normalizes."""

    def __init__(self) -> None:
        super().__init__(8)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.act(x))


class Deep(nn.BatchNorm2d):
    """Runs a module that is not its child."""

    def __init__(self) -> None:
        super().__init__(8)
        self.inner = nn.Sequential(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](super().forward(x))


def same(x: Tensor) -> Tensor:
    return x


NORMS: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "child": (lambda: WithAct(8), "", ("drop", "act")),
    "views": (lambda: NamedNorm(lambda x: x.flatten(2).view_as(x), lambda x: x.view_as(x)), "", ("act",)),
    "before": (lambda: NamedNorm(torch.exp, same), "its forward also computes exp, which GroupNorm would lose", ()),
    "after": (lambda: NamedNorm(same, torch.tanh), "its forward also computes tanh, which GroupNorm would lose", ()),
    "act first": (ActFirst, "its forward runs act before it normalizes", ()),
    "deep": (Deep, "its forward runs inner.0, which is not a child of it", ()),
}  # fmt: skip


@pytest.mark.parametrize("nested", [False, True], ids=["root", "nested"])
@pytest.mark.parametrize(("build", "obstacle", "then"), NORMS.values(), ids=NORMS)
def test_what_a_norms_forward_runs(
    build: Callable[[], nn.Module], obstacle: str, then: tuple[str, ...], nested: bool
) -> None:
    model = nn.Sequential(build()) if nested else build()
    found = normswap.inspect(model, example_input=torch.zeros(2, 8, 6, 6)).norms[0]
    if obstacle:
        assert (found.action, found.reason, found.by_user) == (Action.KEEP, obstacle, False)
    else:
        assert (found.action, found.then) == (Action.GROUP_NORM, then)


class ReadTwice(Net):
    """Reads a weight a second time, outside of its convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv.weight.abs().sum()


class ReadByOtherNorm(Net):
    """A convolution that GroupNorm alone reads is none of normswap's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.relu(self.gn(self.conv(x))))


def test_convolutions_that_something_else_reads() -> None:
    model = ReadTwice(conv=conv(), bn=nn.BatchNorm2d(8))
    plan = normswap.inspect(model, example_input=torch.zeros(2, 3, 8, 8))
    assert entry(plan, "conv").reason == "its weight is also read by abs"
    model = ReadByOtherNorm(conv=conv(), gn=nn.GroupNorm(2, 8), bn=nn.BatchNorm2d(8))
    plan = normswap.inspect(model, example_input=torch.zeros(2, 3, 8, 8))
    assert entry(plan, "conv").reason == "no norm that is replaced reads its output"
    once = normswap.convert(CASES["direct"].build(), example_input=torch.zeros(2, 3, 8, 8))
    again = normswap.inspect(nn.Sequential(once, nn.BatchNorm2d(8)), example_input=torch.zeros(2, 3, 8, 8))
    assert entry(again, "0.conv").reason == "weight-standardized already"


def test_entries_follow_registration_and_carry_what_they_saw() -> None:
    plan = plan_for("reversed order")
    assert [e.name for e in plan.entries] == ["bn1", "conv2", "bn2", "conv1"]
    assert entry(plan, "bn1").fed_by == ("conv1",)
    assert entry(plan, "conv1").feeds == ("bn1",)
    assert (entry(plan, "bn1").shape, entry(plan, "bn1").channels, entry(plan, "bn1").eps) == ((2, 8, 8, 8), 8, 1e-5)
    assert entry(plan, "conv1").eps == 1e-6
    assert entry(plan_for("squeeze-excite"), "gate").feeds == ("<sigmoid>",)
    assert entry(plan_for("shared norm"), "bn").aliases == ("alias",)


class Merged(Net):
    """A norm that follows a convolution and an operator, and one behind two kinds of operator."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        both = self.after_two(y + torch.sigmoid(self.other(x)))
        wide = self.after_three(torch.cat([both.relu(), y], 1).flatten(2)[..., None])
        return wide.mean((2, 3)) + self.after_none(self.table.expand(2, 16, 2, 2)).mean((2, 3))


def test_reasons_of_norms_that_follow_several_things() -> None:
    norms = {"after_two": nn.BatchNorm2d(8), "after_three": nn.BatchNorm2d(16), "after_none": nn.BatchNorm2d(16)}
    model = Merged(conv=conv(), other=conv(), **norms)
    model.table = nn.Parameter(torch.zeros(1, 16, 1, 1))
    plan = normswap.inspect(model, groups=2, example_input=torch.zeros(2, 3, 8, 8))
    reasons = {e.name: e.reason for e in plan.norms}
    assert reasons["after_two"] == "follows conv and sigmoid through add"
    assert reasons["after_three"] == "follows conv and relu through cat+view"
    assert reasons["after_none"] == "follows constants"
    assert entry(plan, "after_two").fed_by == ("conv", "<sigmoid>")


class SplitNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(y.flatten(1)) + self.bn(self.again(y)).sum()


def test_entries_of_convolutions_say_what_they_are() -> None:
    shared = conv(8, 8)
    model = SplitNet(conv=conv(), again=shared, alias=shared, bn=nn.BatchNorm2d(8), head=nn.Linear(8 * 64, 2))
    plan = normswap.inspect(model, example_input=torch.zeros(2, 3, 8, 8))
    assert entry(plan, "conv").reason == "its output is read by head"
    again = entry(plan, "again")
    assert (again.kind, again.role, again.aliases, again.feeds) == ("Conv2d", "conv", ("alias",), ("bn",))


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_arithmetic_beyond_batch_norm_is_not_lost() -> None:
    plan = normswap.inspect(nn.Sequential(conv(), Doubled(8)), example_input=torch.zeros(2, 3, 8, 8))
    assert plan.norms[0].reason == "its forward also computes mul, which GroupNorm would lose"
