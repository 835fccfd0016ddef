"""Options, names and inputs that make no sense, refused before anything is written."""

from pathlib import Path
from typing import Any

import badnets
import pytest
import torch
from refusals import SHAPE, described, files, must_be_one_line, must_refuse, run

import normswap
from normswap import errors

WHOLE = "must be a whole number of at least 1"
RAN = "no forward pass of Sequential ran"

ARGUMENTS: dict[str, tuple[dict[str, Any], type[normswap.NormswapError], str]] = {
    "no groups": ({"groups": 0}, errors.InvalidOption, f"groups=0 {WHOLE}"),
    "negative groups": ({"groups": -4}, errors.InvalidOption, f"groups=-4 {WHOLE}"),
    "groups and a half": ({"groups": 2.5}, errors.InvalidOption, f"groups=2.5 {WHOLE}"),
    "groups as text": ({"groups": "8"}, errors.InvalidOption, f"groups='8' {WHOLE}"),
    "groups as truth": ({"groups": True}, errors.InvalidOption, f"groups=True {WHOLE}"),
    "no group size": ({"group_size": 0}, errors.InvalidOption, f"group_size=0 {WHOLE}"),
    "unknown kind": ({"to": "batch"}, errors.InvalidOption, "to='batch' is not one of 'group', 'layer', 'instance'"),
    "unknown form": ({"ws": "weak"}, errors.InvalidOption, "ws='weak' is not one of 'auto', 'adaptive', 'standard'"),
    "unknown affine": ({"affine": "none"}, errors.InvalidOption, "affine='none' is not one of 'match', 'copy'"),
    "groups as nothing": ({"groups": None}, errors.InvalidOption, f"groups=None {WHOLE}"),
    "override of nothing": ({"overrides": {"1": {"groups": None}}}, errors.InvalidOption, f"groups=None {WHOLE}"),
    "override of a number": ({"overrides": {1: {"groups": 2}}}, errors.InvalidOption, "the pattern 1 in over"),
    "shrink beyond floats": ({"shrink": 10**400}, errors.InvalidOption, "shrink=1000.* must be a number of at least 0"),
    "batches of no samples": ({"batches": [torch.zeros(0, 3, 16, 16)]}, errors.InvalidOption,
                              "batches= holds no images; pass at least one batch, or leave it out"),
    "negative shrink": ({"shrink": -1}, errors.InvalidOption, "shrink=-1 must be a number of at least 0"),
    "shrink NaN": ({"shrink": float("nan")}, errors.InvalidOption, "shrink=nan must be a number of at least 0"),
    "include no text": ({"include": 3}, errors.InvalidOption, "include=3 must be a pattern of layer names"),
    "exclude no texts": ({"exclude": ["1", 4]}, errors.InvalidOption, "exclude=4 must be a pattern of layer names"),
    "overrides a list": ({"overrides": ["layer1"]}, errors.InvalidOption, "overrides=.* must look like"),
    "override unknown": ({"overrides": {"1": {"eps": 1}}}, errors.InvalidOption, "'eps' is not one of 'groups'"),
    "override no groups": ({"overrides": {"1": {"groups": 0}}}, errors.InvalidOption, f"groups=0 {WHOLE}"),
    "include nothing": ({"include": "layer9*"}, errors.InvalidOption, "include 'layer9\\*' matches no layer; there"),
    "exclude all": ({"exclude": "*"}, errors.NothingToConvert,
                    "all 2 norms of Sequential are excluded \\(1: excluded by '\\*'\\); change include= or exclude="),
    "batches no batches": ({"batches": 3}, errors.InvalidOption, "batches=3 must be several batches, as in \\[ima"),
    "five channels": ({"example_input": torch.zeros(2, 5, 16, 16)}, errors.NeedsExampleInput,
                      f"{RAN} \\(\\(2, 5, 16, 16\\): RuntimeError: .*\\); pass another example_input=, or --input"),
    "no map": ({"example_input": torch.zeros(2, 3)}, errors.NeedsExampleInput, f"{RAN} \\(\\(2, 3\\): .*; pass"),
    "two inputs": ({"example_input": (badnets.X, badnets.X)}, errors.NeedsExampleInput, f"{RAN} .*TypeError.*; pass"),
    "input by another name": ({"example_input": {"y": badnets.X}}, errors.NeedsExampleInput, f"{RAN} .*; pass another"),
    "input as text": ({"example_input": "2,3,16,16"}, errors.NeedsExampleInput, f"{RAN} \\(str: .*; pass another"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
def test_arguments(arguments: dict[str, Any], error: type[normswap.NormswapError], message: str, inplace: bool) -> None:
    model = badnets.small()
    before = described(model)
    with pytest.raises(error, match=message) as caught:
        normswap.convert(model, **{"example_input": badnets.X, **arguments, "inplace": inplace})
    assert type(caught.value) is error
    must_be_one_line(str(caught.value), message)
    assert described(model) == before


OPTIONS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no groups": (("--groups", "0"), 2, f"groups=0 {WHOLE}"),
    "negative groups": (("--groups", "-4"), 2, f"groups=-4 {WHOLE}"),
    "no group size": (("--group-size", "0"), 2, f"group_size=0 {WHOLE}"),
    "shrink NaN": (("--shrink", "nan"), 2, "shrink=nan must be a number of at least 0"),
    "override unknown": (("--override", "1:eps=1"), 2, "'eps' is not one of 'groups'"),
    "override no groups": (("--override", "*:groups=0"), 2, f"groups=0 {WHOLE}"),
    "include nothing": (("--include", "layer9*"), 2, "include 'layer9\\*' matches no layer; there are 0, 1, 3, 4"),
    "exclude all": (("--exclude", "*"), 3, "all 2 norms of Sequential are excluded \\(1: excluded by '\\*'\\); change"),
    "steps without images": (("--steps", "5"), 2, "--steps is for images; pass --calibrate DIR too"),
    "no images": (("--calibrate", "nowhere"), 1, "nowhere: no such folder; --calibrate takes a folder of images"),
    "no shape": (("--input", "2,x"), 2, "--input '2,x' is no shape; write sizes as in 2,3,64,64"),
    "empty batch": (("--input", "0,3,16,16"), 2, "--input '0,3,16,16' is no shape; write sizes as in"),
    "too large": (("--input", "2,3,99999,99999"), 2, "has more than 268435456 elements; write a smaller shape"),
    "five channels": (("--input", "2,5,16,16"), 1, f"{RAN} \\(\\(2, 5, 16, 16\\): .*\\); pass another .*--input"),
    "no map": (("--input", "2,3"), 1, f"{RAN} \\(\\(2, 3\\): .*; pass another example_input=, or --input"),
    "two inputs": (("--input", "2,3,9,9", "--input", "2,3,9,9"), 1, f"{RAN} .*TypeError.*; pass another"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "code", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options(options: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    given = () if "--input" in options else ("--input", SHAPE)
    must_refuse(code, message, "convert", "badnets:small", *given, *options, "-o", tmp_path / "OUT", folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--groups", "2.5"), "Invalid value for '--groups': '2.5' is not a valid integer"),
        (("--groups", "many"), "Invalid value for '--groups': 'many' is not a valid integer"),
        (("--to", "batch"), "Invalid value for '--to': 'batch' is not one of"),
        (("--shrink", "-1"), "Invalid value for '--shrink': -1.0 is not in the range x>=0"),
        (("--steps", "-1"), "Invalid value for '--steps': -1 is not in the range x>=0"),
        (("--num-classes", "-1"), "Invalid value for '--num-classes': -1 is not in the range x>=0"),
        (("--override", "groups=8"), "Invalid value for '--override': 'groups=8' does not look like 'layer4"),
        (("--gruops", "8"), "No such option '--gruops'"),
    ],
    ids=["half a group", "many groups", "kind", "shrink", "steps", "classes", "override", "no option"],
)  # fmt: skip
def test_usage(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    code, stdout, stderr = run("convert", "badnets:small", *options, "-o", tmp_path / "OUT")
    assert (code, stdout) == (2, "")
    assert stderr.splitlines()[-1].startswith("Error: ")
    assert message in stderr
    assert not files(tmp_path)


NAMES: dict[str, tuple[str, int, str]] = {
    "nearest": ("resnet51", 2, "no model named 'resnet51' in timm or torchvision; did you mean resnet51q, .*\\?"),
    "nearest of a registry": ("torchvision/resnet51", 2, "'resnet51' in torchvision; did you mean resnet\\d+, .*\\?"),
    "nothing near": ("qqqqqqqq", 2, "no model named 'qqqqqqqq' in timm or torchvision; see `normswap list`"),
    "no name": ("", 2, "no model named '' in timm or torchvision; see `normswap list`"),
    "with a blank": ("resnet 18", 2, "did you mean resnet18"),
    "a path": ("./resnet18.pth", 2, "no model named './resnet18.pth' in timm or torchvision; "),
    "too long": ("resnet" * 99, 2, "in timm or torchvision; see `normswap list`"),
    "no such tag": (
        "resnet18.a9_in1k",
        2,
        "timm knows no weights 'a9_in1k' of resnet18; did you mean resnet18.a\\d_in1k",
    ),
    "no module": ("nowhere.nets:small", 2, "No module named 'nowhere'; name a function as in package.module:factory"),
    "no function": ("badnets:large", 2, "has no attribute 'large'; name a function as in package.module:factory"),
    "broken module": ("brokennets:small", 1, "brokennets cannot be imported \\(SyntaxError: .*\\); mend it first"),
    "failing module": ("failingnets:small", 1, "failingnets cannot be imported \\(RuntimeError: no\\); mend it first"),
    "leaving module": ("leavingnets:small", 1, "leavingnets cannot be imported \\(SystemExit: 0\\); mend it first"),
    "no folder": ("local-dir:nowhere", 2, "nowhere: holds no config.json; pass a folder in timm's format"),
    "no norm": ("badnets:no_norm", 3, "Sequential holds no BatchNorm; nothing to convert"),
}


@pytest.mark.parametrize(("name", "code", "message"), NAMES.values(), ids=NAMES)
def test_names(name: str, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokennets.py").write_text("def small(:\n")
    (tmp_path / "failingnets.py").write_text("raise RuntimeError('no\\nand no')\n")
    (tmp_path / "leavingnets.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    must_refuse(code, message, "convert", name, "--no-pretrained", "-o", tmp_path / "OUT", folder=tmp_path)


def test_tags_that_timm_does_not_know_by_the_api() -> None:
    with pytest.raises(normswap.UnknownModel, match="did you mean test_resnet.r160_in1k\\?"):
        normswap.Source("timm", "test_resnet.r161_in1k").build()
