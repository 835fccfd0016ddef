"""Models that cannot be converted, each named by layer and left as it was, and awkward ones that can."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import badnets
import pytest
import torch
from equality import assert_same_output, assert_same_state
from refusals import SHAPE, described, must_be_one_line, must_refuse, run
from torch import nn

import normswap
from normswap import errors

STATISTICS = "running statistics are negative or not finite; repair the checkpoint or pass affine='copy'"
NOT_FINITE = "holds NaN or infinity; repair the checkpoint or take an earlier one"
STRAY = "extra keeps BatchNorm where torch does not register it, .*; use nn.ModuleList or nn.ModuleDict"
COMPUTED = "no BatchNorm left: 1 left: 1; 1: its weight is computed \\(pruned or parametrized\\); make that permanent"

REFUSED: dict[str, tuple[type[normswap.NormswapError], str]] = {
    "nan_kernel": (errors.BadStatistics, f"0.weight: {NOT_FINITE}"),
    "infinite_kernel": (errors.BadStatistics, f"3.weight: {NOT_FINITE}"),
    "half_infinite": (errors.BadStatistics, f"0.weight: {NOT_FINITE}"),
    "nan_gamma": (errors.BadStatistics, f"1.weight: {NOT_FINITE}"),
    "nan_head": (errors.BadStatistics, f"8.weight: {NOT_FINITE}"),
    "nan_mean": (errors.BadStatistics, f"4: {STATISTICS}"),
    "infinite_variance": (errors.BadStatistics, f"4: {STATISTICS}"),
    "negative_variance": (errors.BadStatistics, f"1: {STATISTICS}"),
    "scripted": (errors.UnsupportedModel, "is a ScriptModule; convert the Python model before torch.jit.script"),
    "scripted_part": (errors.UnsupportedModel, "0 is a ScriptModule; convert the Python model"),
    "jit_traced": (errors.UnsupportedModel, "is a ScriptModule; convert the Python model"),
    "exported_module": (errors.UnsupportedModel, "is an exported graph of operators; convert the model before torch"),
    "lazy_conv": (errors.UnsupportedModel, "0 is an uninitialized Lazy module; run one forward pass first"),
    "lazy_norm": (errors.UnsupportedModel, "1 is an uninitialized Lazy module; run one forward pass first"),
    "quantization_prepared": (errors.UnsupportedModel, "is a quantized or QAT module .*; convert before torch.ao"),
    "quantized": (errors.UnsupportedModel, "0 is a quantized or QAT module \\(Quantize\\); convert before torch.ao"),
    "quantized_dynamically": (errors.UnsupportedModel, "8 is a quantized or QAT module \\(Linear\\); convert before"),
    "fsdp": (errors.UnsupportedModel, "is sharded \\(FSDP or DTensor parameters\\); convert before sharding"),
    "plain_list": (errors.UnsupportedModel, STRAY),
    "plain_tuple": (errors.UnsupportedModel, STRAY),
    "plain_dict_and_nothing_else": (errors.UnsupportedModel, STRAY),
    "functional": (errors.NothingToConvert, "holds no BatchNorm module, but its own forward calls batch_norm; make it"),
    "graph_with_functional": (
        errors.CheckFailed,
        "no BatchNorm left: 1 left: .*calls batch_norm.*; convert",
    ),
    "pruned_norm": (errors.CheckFailed, COMPUTED),
    "parametrized_norm": (errors.CheckFailed, COMPUTED),
    "no_norm": (errors.NothingToConvert, "Sequential holds no BatchNorm; nothing to convert"),
}
"""Networks of `badnets`, by name; `test_wrapping.py` has those that need a process group."""

CODES = {errors.NothingToConvert: 3}
quiet = pytest.mark.filterwarnings("ignore")  # torch deprecates its own quantization and scripting


@quiet
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize(("name", "error", "message"), [(n, *row) for n, row in REFUSED.items()], ids=REFUSED)
def test_refused(name: str, error: type[normswap.NormswapError], message: str, inplace: bool) -> None:
    model = getattr(badnets, name)()
    before = described(model)
    with pytest.raises(error, match=message) as caught:
        normswap.convert(model, example_input=example(model), inplace=inplace)
    assert type(caught.value) is error
    must_be_one_line(str(caught.value), message)
    assert described(model) == before


@quiet
@pytest.mark.parametrize(("name", "error", "message"), [(n, *row) for n, row in REFUSED.items()], ids=REFUSED)
def test_refused_by_the_command_line(
    name: str, error: type[normswap.NormswapError], message: str, tmp_path: Path
) -> None:
    code = CODES.get(error, 1)
    must_refuse(code, message, "convert", f"badnets:{name}", "--input", SHAPE, "-o", tmp_path / "OUT", folder=tmp_path)


@quiet
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exported", "badnets:exported returned a ExportedProgram; return the network itself"),
        ("state_dict", "badnets:state_dict returned a OrderedDict; return the network itself"),
        ("raises", "badnets:raises failed \\(OSError: two\\); it is called without arguments"),
        ("leaves", "badnets:leaves failed \\(SystemExit: 3\\); it is called without arguments"),
        ("X", "badnets:X failed \\(TypeError: 'Tensor' object is not callable\\); it is called without"),
    ],
    ids=["ExportedProgram", "state dict", "raises", "leaves", "no function"],
)
def test_factories_that_give_no_network(name: str, message: str, tmp_path: Path) -> None:
    must_refuse(1, message, "convert", f"badnets:{name}", "-o", tmp_path / "OUT", folder=tmp_path)


@quiet
def test_a_factory_that_takes_no_number_of_classes(tmp_path: Path) -> None:
    message = "badnets:raises failed \\(TypeError: .*num_classes'\\); it is called with num_classes alone$"
    asked = ("convert", "badnets:raises", "--num-classes", "3", "-o", tmp_path / "OUT")
    must_refuse(1, message, *asked, folder=tmp_path)


KEPT = "its kernel is computed in the forward pass, or read outside its own"

WORKS: dict[str, str] = {
    "half": "its norm is trained",
    "brain_half": "its norm is trained",
    "constant_channel": "its norm is trained",
    "tied": "shares its weight with 1, which is left as it is|its norm is trained",
    "hooked": "its norm is trained",
    "synchronized": "SyncBatchNorm",
    "without_affine": "its norm is trained",
    "without_statistics": "its norm is fresh",
    "fresh": "its norm is fresh",
    "shared_norm_of_two_sizes": "follows conv",
    "after_a_pool": "1 of 32 groups fit",
    "pruned": KEPT,
    "weight_normed": KEPT,
    "spectral_normed": KEPT,
    "graph": "its norm is trained",
    "compiled": "its norm is trained",
    "compiled_part": "0._orig_mod.1",
    "data_parallel": "its norm is trained",
    "averaged": "module.1",
    "list_that_does_not_run": "warning: extra keeps BatchNorm where torch does not register it; it stays as it is",
}
"""Networks that convert, with what the plan says about it."""


@quiet
@pytest.mark.parametrize(("name", "said"), WORKS.items(), ids=WORKS)
def test_works(name: str, said: str) -> None:
    model = getattr(badnets, name)()
    before = described(model)
    result = normswap.convert(model, example_input=example(model))
    checks = normswap.check(result, model)
    assert checks, checks
    assert normswap.check(result), "without the original"
    plan = str(normswap.plan_of(result))
    assert any(words in plan for words in said.split("|")), plan
    assert described(model) == before
    assert not [m for m in result.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@quiet
@pytest.mark.parametrize(("name", "said"), WORKS.items(), ids=WORKS)
def test_works_by_the_command_line(name: str, said: str, tmp_path: Path) -> None:
    arguments = (f"badnets:{name}", "--input", SHAPE)
    code, stdout, stderr = run("inspect", *arguments)
    assert (code, stderr) == (0, "")
    assert any(words in stdout for words in said.split("|")), stdout
    code, stdout, stderr = run("convert", *arguments, "-o", tmp_path / "OUT")
    assert (code, stderr) == (0, ""), stdout
    assert f"wrote {tmp_path / 'OUT'}" in stdout
    assert run("check", tmp_path / "OUT", "--against", f"badnets:{name}")[0] == 0


@pytest.mark.parametrize("name", ["half", "brain_half"])
def test_half_precision_is_what_float_gives_rounded(name: str) -> None:
    model = getattr(badnets, name)()
    ours, exact = normswap.convert(model), normswap.convert(copy.deepcopy(model).float())
    x = torch.randn(2, 3, 16, 16)
    assert ours(x.to(ours[0].weight.dtype)).float().sub(exact(x)).abs().max() < 0.02 * exact(x).abs().max()  # type: ignore[index]
    assert {p.dtype for p in ours.parameters()} == {p.dtype for p in model.parameters()}


def test_tied_weights_stay_tied_and_are_saved(tmp_path: Path) -> None:
    result = normswap.convert(badnets.tied())
    assert result[1].weight is result[3].weight  # type: ignore[index]
    loaded, x = normswap.load(normswap.save(result, tmp_path / "OUT"), model=badnets.tied()), torch.randn(2, 3, 16, 16)
    assert_same_state(loaded, result)
    assert_same_output(loaded(x), result(x))
    assert loaded[1].weight is loaded[3].weight  # type: ignore[index]


def test_hooks_run_on_the_replacement() -> None:
    model, x = badnets.hooked(), torch.randn(2, 3, 16, 16)
    result = normswap.convert(model)
    with_hook = result[1](x[:, :1].expand(2, 8, 16, 16))  # type: ignore[index]
    result[1]._forward_hooks.clear()  # type: ignore[index]
    assert_same_output(with_hook, result[1](x[:, :1].expand(2, 8, 16, 16)) + 1)  # type: ignore[index]


def test_meta_models_are_planned_and_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = badnets.fresh()
    result = normswap.convert(model)
    assert normswap.plan_of(result).norms[0].groups == 4
    with pytest.raises(normswap.CheckpointError, match="0.weight: has no data \\(meta device\\); it cannot be saved"):
        normswap.save(result, tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()


def test_an_optimizer_made_before_holds_the_parameters_in_place_only() -> None:
    model = badnets.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    copied, taught = normswap.convert(model), lambda m: {id(p) for p in m.parameters() if p.requires_grad}
    assert not taught(copied) & held
    assert taught(normswap.convert(model, inplace=True)) == held


@pytest.mark.parametrize(
    "other", [None, "resnet18", nn.BatchNorm2d, {}, []], ids=["None", "name", "class", "dict", "list"]
)
@pytest.mark.parametrize("verb", [normswap.convert, normswap.inspect], ids=["convert", "inspect"])
def test_what_is_no_model(verb: Callable[[Any], Any], other: Any) -> None:
    with pytest.raises(normswap.UnsupportedModel) as caught:
        verb(other)
    must_be_one_line(str(caught.value), f"^{type(other).__name__} is not an nn.Module; pass the network itself")


def example(model: Any) -> torch.Tensor:
    """Return an input of the type of the model's parameters."""
    return torch.zeros(2, 3, 16, 16, dtype=next((p.dtype for p in model.parameters()), torch.float32))
