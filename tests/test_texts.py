"""Names from networks and files are data: none of them moves a cursor, begins a line, or means anything to YAML."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from badnets import trained
from refusals import SHAPE, run
from torch import nn

import normswap
from normswap import errors
from normswap.checkpoint.card import model_card
from normswap.planning.options import matches
from normswap.tables import table
from normswap.texts import plain, plain_lines

EVIL = "a\x1b[2J\r\nnormswap: all is well\x9b31m\u2028\u202e\x07"
X = torch.randn(2, 3, 16, 16)


def harmless(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n")) and "\nnormswap: all is well" not in text


def evil_names() -> nn.Module:
    """Return a network whose layers and classes have names that would take over a terminal."""
    model = nn.Sequential()
    model.add_module(EVIL, type(EVIL, (nn.Conv2d,), {})(3, 8, 3))
    model.add_module("norm" + EVIL, type(EVIL, (nn.BatchNorm2d,), {})(8))
    model.add_module("other" + EVIL, nn.BatchNorm2d(8))
    model.add_module("conv", nn.Conv2d(8, 8, 3))
    return trained(model)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("bn1", "bn1"), ("层 é →", "层 é →"), ("a\x1b[31m", "a\\x1b[31m"), ("a\nb\rc", "a\\nb\\rc"),
     ("\x9b\u202e", "\\x9b\\u202e"),
     ("\ud800", "\\ud800"), ("\U000e0041", "\\U000e0041")],
    ids=ascii,
)  # fmt: skip
def test_what_is_not_printable_is_written_out(text: str, shown: str) -> None:
    assert plain(text) == shown
    assert plain_lines(f"{text}\nb") == (f"{shown}\nb" if "\n" not in text else "a\nb\\rc\nb")


@pytest.mark.parametrize(
    "error",
    [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, (Exception, Warning))],
    ids=lambda kind: kind.__name__,
)
def test_errors_and_warnings_are_one_line(error: type[Exception]) -> None:
    assert str(error(f"layer {EVIL}")) == f"layer {plain(EVIL)}"


def test_tables_are_as_wide_as_what_is_shown() -> None:
    lines = table([(EVIL, "b")], header=("name", "other")).split("\n")
    assert len(lines) == 3
    assert lines[2] == f"{plain(EVIL)}  b"
    assert lines[1] == "-" * (len(plain(EVIL)) + 7)


SHOWN: dict[str, Callable[[], str]] = {
    "plan": lambda: str(normswap.inspect(evil_names(), example_input=X)),
    "warnings": lambda: "".join(
        normswap.inspect(evil_names(), example_input=X, keep="live", exclude="other*").warnings
    ),
    "checks": lambda: str(normswap.check(normswap.convert(evil_names(), example_input=X), evil_names())),
}


@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN)
def test_what_is_printed_is_harmless(shown: Callable[[], str]) -> None:
    assert harmless(shown())


FAILING: dict[str, Callable[[Path], Any]] = {
    "save": lambda path: normswap.save(normswap.convert(evil_names(), example_input=X), path / "OUT"),
    "apply": lambda _: normswap.apply(nn.Conv2d(3, 8, 3), normswap.inspect(evil_names(), example_input=X)),
    "exclude": lambda _: normswap.convert(evil_names(), example_input=X, exclude="*" + EVIL),
    "override": lambda _: normswap.convert(evil_names(), example_input=X, overrides={EVIL: {"groups": 2}}),
    "statistics": lambda _: normswap.convert(broken_statistics(), example_input=X),
}


def broken_statistics() -> nn.Module:
    model = evil_names()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.running_var, -1)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("failing", FAILING.values(), ids=FAILING)
def test_what_is_raised_is_harmless(failing: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(normswap.NormswapError) as caught:
        failing(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "arguments",
    [("inspect",), ("convert", "--dry-run"), ("convert",), ("convert", "--exclude", "other*", "--keep", "live")],
    ids=" ".join,
)
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_the_command_line_is_harmless(arguments: tuple[str, ...], form: tuple[str, ...], tmp_path: Path) -> None:
    verb, *options = arguments
    target = () if verb == "inspect" else ("-o", tmp_path / "OUT", "--no-synthetic")
    _, stdout, stderr = run(verb, "test_texts:evil_names", "--input", SHAPE, *options, *form, *target)
    assert stdout or stderr
    assert harmless(stdout)
    assert harmless(stderr)


@pytest.mark.parametrize(
    "value", ["apache-2.0", "mit", "no", "null", "1.0", "a: b", "- x", "{x}",
     "a # b", "'", '"', "", EVIL, "x\n---\n# pwned", "é", "[a](http://b)", "<script>", "a|b", "`x`", "!!python/a"],
    ids=ascii,
)  # fmt: skip
def test_the_front_of_a_card_is_yaml_of_the_same_text(value: str) -> None:
    entries = [{"name": "bn", "role": "norm", "action": "group_norm", "groups": 4, "affine": "match"}]
    block = {"weights": "pretrained", "source": {"registry": "timm", "name": value},
             "plan": {"entries": entries}, "versions": {"normswap": value}, "base_model": value,
             "weight_standardization": value,
             "checks": {"checks": [{"name": value, "ok": True, "detail": value}]}}  # fmt: skip
    card = model_card({"architecture": "normswap", "normswap": block, "pretrained_cfg": {"license": value}})
    _, front, body = card.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data.get("base_model", "") == data.get("license", "") == plain(value)
    assert "\n# pwned" not in body
    assert not re.search(r"(?<!\\)[\[\]`*]", body.replace("```", "").partition("## What was done")[2])
    assert not re.search(r"<(?!/?$)", body)
    rows = [line for line in body.split("\n") if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert harmless(card)


NAMES = {
    ("layer4.0.bn1", "layer4"): True,
    ("layer4.0.bn1", "layer[34]"): True,
    ("layer4.0.bn1", "layer4.0"): True,
    ("layer4.0.bn1", "*.bn1"): True,
    ("layer41.bn1", "layer4"): False,
    ("a.layer4.bn1", "layer4"): False,
    ("bn1", "bn"): False,
    ("", "*"): True,
    ("bn1", ""): False,
}


@pytest.mark.parametrize(("name", "pattern"), NAMES, ids=str)
def test_a_pattern_that_names_a_container_matches_what_is_in_it(name: str, pattern: str) -> None:
    assert matches(name, pattern) is NAMES[name, pattern]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 144, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)))  # type: ignore[no-any-return]


def net() -> nn.Module:
    return trained(Net())


def test_containers_are_excluded_and_overridden_with_all_they_hold() -> None:
    plan = normswap.plan_of(normswap.convert(net(), example_input=X, exclude="stem"))
    assert [(entry.name, entry.by_user) for entry in plan.entries if entry.by_user] == [
        ("stem.0", True),
        ("stem.1", True),
    ]
    plan = normswap.plan_of(normswap.convert(net(), example_input=X, include=["body"]))
    assert [entry.name for entry in plan.entries if entry.converts] == ["body.0", "body.1"]
    plan = normswap.plan_of(normswap.convert(net(), example_input=X, overrides={"body": {"groups": 2, "ws": "none"}}))
    assert [entry.groups for entry in plan.norms] == [4, 2]
    assert [entry.changes for entry in plan.convs] == [True, False]


NORMS, CONVS = "which is for norms, and matches none of them", "which is for convolutions, and matches none of them"
WRONG = {
    "groups of a convolution": ({"stem.0": {"groups": 8}}, f"the override 'stem.0' sets groups=, {NORMS} (stem.0, …)"),
    "a kind of a convolution": ({"stem.0*": {"to": "layer"}}, f"the override 'stem.0*' sets to=, {NORMS}"),
    "a size of an activation": ({"stem.2": {"group_size": 4}}, f"the override 'stem.2' sets group_size=, {NORMS}"),
    "a form of a norm": ({"stem.1": {"ws": "none"}}, f"the override 'stem.1' sets ws=, {CONVS} (stem.1, …)"),
    "a form of a linear layer": ({"head": {"ws": "none"}}, f"the override 'head' sets ws=, {CONVS} (head, …)"),
    "one of two": ({"stem.1": {"groups": 2, "ws": "none"}}, f"the override 'stem.1' sets ws=, {CONVS}"),
}


@pytest.mark.parametrize(("overrides", "says"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("call", [normswap.inspect, normswap.convert], ids=lambda call: call.__name__)
def test_overrides_that_can_apply_to_nothing_are_refused(
    overrides: dict[str, Any], says: str, call: Callable[..., Any]
) -> None:
    model = net()
    before = repr(model)
    with pytest.raises(normswap.InvalidOption) as caught:
        call(model, example_input=X, overrides=overrides)
    assert says in str(caught.value)
    assert repr(model) == before


def test_the_command_line_takes_containers_and_refuses_the_wrong_role() -> None:
    code, stdout, stderr = run("inspect", "test_texts:net", "--input", SHAPE, "--override", "body:groups=2")
    assert code == 0, stderr
    assert "GroupNorm(2)" in stdout
    code, _, stderr = run("inspect", "test_texts:net", "--input", SHAPE, "--override", "stem.0:groups=2")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "which is for norms" in stderr
