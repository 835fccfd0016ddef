"""Checkpoint files that are not what they seem, each named by what it is, and odd ones that are read all the same."""

import argparse
import gzip
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import badnets
import numpy as np
import pytest
import torch
from equality import assert_same_output, assert_same_state
from refusals import SHAPE, described, must_be_one_line, must_refuse, run
from safetensors.torch import save_file
from torch import Tensor, nn

import normswap

State = dict[str, Tensor]
KERNEL = "0.weight"
TRUNCATED = "is truncated or no checkpoint"
OBJECTS = "holds Python objects, not only tensors; save model.state_dict\\(\\) to a new file"
NO_STATE = "holds no state dict; save model.state_dict\\(\\) to a new file"
PACKED = "the network holds plain float32; save the tensors of the network as it was before it was quantized"


def saved(path: Path, data: Any) -> None:
    torch.save(data, path)


def half_of(write: Callable[[State, Path], None]) -> Callable[[State, Path], None]:
    """Return a writer of the first half of what another one writes."""

    def cut(state: State, path: Path) -> None:
        write(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def pickled(state: State, path: Path) -> None:
    torch.save(state, path)


def safe(state: State, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[State, Path], None]:
    """Return a writer of a state of which one kernel is another kind of tensor."""
    return lambda state, path: torch.save({**state, KERNEL: change(state[KERNEL])}, path)


def quantized(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def exported_program(_: State, path: Path) -> None:
    torch.export.save(torch.export.export(badnets.small(), (badnets.X,)), path)


def other_archive(_: State, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photos/cat.jpg", b"\xff\xd8")


Write = Callable[[State, Path], Any]
REFUSED: dict[str, tuple[str, Write, str]] = {
    "missing": ("w.pth", lambda s, p: None, "no such file; pass the path of a"),
    "folder": ("w.pth", lambda s, p: p.mkdir(), "is a folder; pass the path of a"),
    "empty": ("w.pth", lambda s, p: p.touch(), "is an empty file, not a checkpoint; download"),
    "truncated": ("w.pth", half_of(pickled), TRUNCATED),
    "truncated safetensors": ("w.safetensors", half_of(safe), TRUNCATED),
    "text": ("w.pth", lambda s, p: p.write_text("Not found\n" * 99), TRUNCATED),
    "JSON": ("w.pth", lambda s, p: p.write_text('{"error": "denied"}'), TRUNCATED),
    "HTML": ("w.pth", lambda s, p: p.write_text("\n <!doctype html>"), "is an HTML page, not a checkpoint; download"),
    "HTML named safetensors": ("w.safetensors", lambda s, p: p.write_text("<html>"), "is an HTML page, not"),
    "git-lfs pointer": ("w.safetensors", lambda s, p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
                        "is a git-lfs pointer, not a checkpoint; download the file itself"),
    "gzip": ("w.pth", lambda s, p: p.write_bytes(gzip.compress(b"PK" * 999)), TRUNCATED),
    "HDF5": ("w.h5", lambda s, p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600)), TRUNCATED),
    "numpy": ("w.pth", lambda s, p: np.savez(p.open("wb"), w=np.zeros(3)), "is a zip archive that torch.save did not"),
    "other zip": ("w.pth", other_archive, "is a zip archive that torch.save did not write; save model.state_dict"),
    "plain pickle": ("w.pkl", lambda s, p: p.write_bytes(pickle.dumps({"w": np.zeros(3)})), OBJECTS),
    "whole model": ("w.pth", lambda s, p: saved(p, badnets.small()), OBJECTS),
    "Namespace": ("w.pth", lambda s, p: saved(p, {"state_dict": s, "args": argparse.Namespace(lr=1)}), OBJECTS),
    "numpy scalar": ("w.pth", lambda s, p: saved(p, {"state_dict": s, "best": np.float64(1)}), OBJECTS),
    "TorchScript": ("w.pt", lambda s, p: torch.jit.save(badnets.scripted(), p), "is a TorchScript archive; save"),
    "exported program": ("w.pt2", exported_program, "is a program that torch.export.save wrote; save model.state_dict"),
    "optimizer": ("w.pth", lambda s, p: saved(p, {"optimizer": {"state": {}}, "epoch": 3}), NO_STATE),
    "no tensors": ("w.pth", lambda s, p: saved(p, {}), NO_STATE),
    "one tensor": ("w.pth", lambda s, p: saved(p, torch.zeros(3)), NO_STATE),
    "list": ("w.pth", lambda s, p: saved(p, list(s.values())), NO_STATE),
    "numbers for names": ("w.pth", lambda s, p: saved(p, dict(enumerate(s.values()))), NO_STATE),
    "nested too deeply": ("w.pth", lambda s, p: saved(p, {"model": {"model": {"model": {"model": s}}}}), NO_STATE),
    "other network": ("w.pth", lambda s, p: saved(p, nn.Linear(2, 2).state_dict()), "does not fit .*; use the model"),
    "one missing": ("w.pth", lambda s, p: saved(p, {k: v for k, v in s.items() if k != KERNEL}),
                    "does not fit \\(0.weight is missing; 1 names differ\\); use the model it was saved from"),
    "pruned": ("w.pth", lambda s, p: saved(p, {f"{k}_orig" if k == KERNEL else k: v for k, v in s.items()}),
               "does not fit \\(0.weight is missing; 2 names differ\\); use the model"),
    "weight_norm": ("w.pth", lambda s, p: saved(p, badnets.weight_normed().state_dict()), "does not fit .*; use the"),
    "other head": ("w.pth", lambda s, p: saved(p, {**s, "8.weight": torch.zeros(3, 8)}),
                   "8.weight is \\(3, 8\\), the network has \\(5, 8\\); use the model .*, with as many classes"),
    "quantized": ("w.pth", changed(quantized), f"0.weight is strided qint8, {PACKED}"),
    "whole numbers": ("w.pth", changed(lambda t: (t * 100).to(torch.int8)), f"0.weight is strided int8, {PACKED}"),
    "complex": ("w.pth", changed(lambda t: t.to(torch.complex64)), f"0.weight is strided complex64, {PACKED}"),
    "sparse": ("w.pth", changed(Tensor.to_sparse), f"0.weight is sparse_coo float32, {PACKED}"),
    "meta": ("w.pth", changed(lambda t: t.to("meta")), f"0.weight is strided float32 on the meta device, {PACKED}"),
}  # fmt: skip
"""File name, what writes it, and what the message says of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return normswap.save(normswap.convert(badnets.small()), tmp_path_factory.mktemp("files") / "OUT")


@pytest.mark.filterwarnings("ignore")  # torch deprecates its own quantization and scripting
@pytest.mark.parametrize(("name", "write", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(name: str, write: Write, message: str, folder: Path, tmp_path: Path) -> None:
    model = badnets.small()
    path, before, converted = tmp_path / name, described(model), normswap.load(folder, model=model)
    write(converted.state_dict(), path)
    with pytest.raises(normswap.CheckpointError, match=message) as caught:
        normswap.load(folder, model=model, weights=path)
    must_be_one_line(str(caught.value), message)
    assert str(caught.value).startswith(f"{path}: ")
    assert described(model) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "write", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_the_command_line(name: str, write: Write, message: str, tmp_path: Path) -> None:
    write(badnets.small().state_dict(), tmp_path / name)
    arguments = ("badnets:small", "--input", SHAPE, "--weights", tmp_path / name)
    message = f"^normswap: {tmp_path / name}: .*{message}"
    must_refuse(1, message, "convert", *arguments, "-o", tmp_path / "OUT", folder=tmp_path)
    must_refuse(1, message, "inspect", *arguments, folder=tmp_path)


def test_a_file_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    unreadable = Path("/proc/self/mem")
    if not unreadable.exists():
        pytest.skip("no /proc here")
    message = "/proc/self/mem: cannot be read \\(Input/output error\\); pass a file that can"
    with pytest.raises(normswap.CheckpointError, match=message):
        normswap.load(folder, model=badnets.small(), weights=unreadable)
    arguments = ("convert", "badnets:small", "--weights", unreadable, "-o", tmp_path / "OUT")
    must_refuse(1, message, *arguments, folder=tmp_path)


NOT_FINITE = "holds NaN or infinity; repair the checkpoint or take an earlier one"
STATISTICS = "running statistics are negative or not finite; repair the checkpoint"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("0.weight", float("nan"), f"0.weight: {NOT_FINITE}"),
        ("3.weight", float("inf"), f"3.weight: {NOT_FINITE}"),
        ("8.bias", float("-inf"), f"8.bias: {NOT_FINITE}"),
        ("4.bias", float("nan"), f"4.bias: {NOT_FINITE}"),
        ("1.running_mean", float("nan"), f"1: {STATISTICS}"),
        ("4.running_var", -0.5, f"4: {STATISTICS}"),
    ],
    ids=["NaN kernel", "infinite kernel", "infinite head", "NaN beta", "NaN mean", "negative variance"],
)
def test_values_that_mean_nothing(name: str, value: float, message: str, tmp_path: Path) -> None:
    safe(badnets.holding(name, value).state_dict(), tmp_path / "w.safetensors")
    arguments = ("badnets:small", "--input", SHAPE, "--weights", tmp_path / "w.safetensors", "-o", tmp_path / "OUT")
    must_refuse(1, message, "convert", *arguments, folder=tmp_path)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def before_1_6(state: State, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def rounded(state: State, kind: torch.dtype) -> State:
    return {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


READ: dict[str, tuple[str, Write, str, torch.dtype]] = {
    "torch": ("w.pth", pickled, "", torch.float32),
    "torch before 1.6": ("w.pth", before_1_6, "", torch.float32),
    "torch named safetensors": ("w.safetensors", pickled, "", torch.float32),
    "safetensors named pth": ("w.pth", safe, "", torch.float32),
    "half": ("w.pth", lambda s, p: saved(p, rounded(s, torch.float16)), "", torch.float16),
    "bfloat16": ("w.safetensors", lambda s, p: safe(rounded(s, torch.bfloat16), p), "", torch.bfloat16),
    "double": ("w.pth", lambda s, p: saved(p, rounded(s, torch.float64)), "", torch.float32),
    "nested": ("w.pth", lambda s, p: saved(p, {"model": {"state_dict": s}}),
               "took 'model'; took 'state_dict'", torch.float32),
    "averaged first": ("w.pth", lambda s, p: saved(p, {"state_dict": prefixed(s, "x."), "state_dict_ema": s}),
                       "took 'state_dict_ema' rather than 'state_dict'", torch.float32),
    "Lightning": ("w.ckpt", lambda s, p: saved(p, {"epoch": 1, "state_dict": prefixed(s, "net.")}),
                  "took 'state_dict'; stripped 'net.' from 16 names", torch.float32),
    "DDP": ("w.pth", lambda s, p: saved(p, prefixed(s, "module.")), "stripped 'module.' from 16 names", torch.float32),
    "compiled": ("w.pth", lambda s, p: saved(p, prefixed(s, "_orig_mod.")),
                 "stripped '_orig_mod.' from 16 names", torch.float32),
    "FSDP": ("w.pth", lambda s, p: saved(p, prefixed(s, "_fsdp_wrapped_module.")),
             "stripped '_fsdp_wrapped_module.' from 16 names", torch.float32),
}  # fmt: skip
"""File name, what writes it, what is said about it, and the type its values were rounded to."""


@pytest.mark.parametrize(("name", "write", "said", "kind"), READ.values(), ids=READ)
def test_read_by_content(name: str, write: Write, said: str, kind: torch.dtype, tmp_path: Path) -> None:
    trained, path = badnets.small(), tmp_path / name
    write(trained.state_dict(), path)
    arguments = ("badnets:small", "--input", SHAPE, "--weights", path, "-o", tmp_path / "OUT")
    code, _, stderr = run("convert", *arguments)
    assert (code, stderr) == (0, f"normswap: {path}: {said}\n" if said else "")
    trained.load_state_dict(rounded(trained.state_dict(), kind))
    expected = normswap.convert(trained, batches="synthetic", example_input=badnets.X)
    x = torch.randn(2, 3, 16, 16)
    assert_same_state(normswap.load(tmp_path / "OUT", model=badnets.small()), expected)
    assert_same_output(normswap.load(tmp_path / "OUT", model=badnets.small())(x), expected(x))
