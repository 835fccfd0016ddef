"""Folders: checkpoints that are damaged, places that cannot be written to, and disks that are full."""

import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import badnets
import pytest
from refusals import SHAPE, described, files, must_be_one_line, must_refuse, run
from torch import nn

import normswap

SMALL = ("badnets:small", "--input", SHAPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return normswap.save(normswap.convert(badnets.small()), tmp_path_factory.mktemp("folders") / "OUT")


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tensors": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors: cannot be read \\(No such file"),
    "tensors a folder": (lambda p: ((p / "model.safetensors").unlink(), (p / "model.safetensors").mkdir()),
                         "model.safetensors: cannot be read \\(Is a directory\\); pass a folder"),
    "tensors truncated": (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:999]),
                          "model.safetensors: does not belong to config.json beside it; save the checkpoint again"),
    "tensors not fetched": (lambda p: (p / "model.safetensors").write_text(POINTER),
                            "model.safetensors: is a git-lfs pointer, not a checkpoint; download the file itself"),
    "no configuration": (lambda p: (p / "config.json").unlink(), "OUT: holds no config.json; pass a"),
    "configuration not fetched": (lambda p: (p / "config.json").write_text(POINTER), "config.json: cannot be"),
    "somebody else's": (lambda p: (p / "config.json").write_text('{"architecture": "resnet18"}'),
                        "config.json: is not normswap's"),
    "newer schema": (lambda p: replaced(p, '"normswap": {\n  "schema": 1', '"normswap": {\n  "schema": 2'),
                     "config.json: has schema 2, this normswap reads up to 1; upgrade normswap or convert again"),
    "newer plan": (lambda p: replaced(p, '"plan": {\n   "schema": 1', '"plan": {\n   "schema": 9'),
                   "config.json: this plan has schema 9, this normswap reads up to 1; upgrade normswap or convert"),
}  # fmt: skip


def replaced(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


@pytest.mark.parametrize(("damage", "message"), FOLDERS.values(), ids=FOLDERS)
def test_damaged_checkpoints(damage: Callable[[Path], Any], message: str, folder: Path, tmp_path: Path) -> None:
    damaged, model = copied(folder, tmp_path / "OUT"), badnets.small()
    damage(damaged)
    before, kept = described(model), files(tmp_path)
    with pytest.raises(normswap.NormswapError, match=message) as caught:
        normswap.load(damaged, model=model)
    must_be_one_line(str(caught.value), message)
    must_refuse(1, message, "check", damaged, "--against", "badnets:small", folder=tmp_path)
    assert (described(model), files(tmp_path)) == (before, kept)


@pytest.mark.parametrize("case", ["newer schema", "newer plan"])
def test_newer_plans_are_neither_shown_nor_applied(case: str, folder: Path, tmp_path: Path) -> None:
    damaged, (damage, message) = copied(folder, tmp_path / "OUT"), FOLDERS[case]
    damage(damaged)
    must_refuse(1, message, "inspect", damaged, folder=tmp_path)
    with pytest.raises(normswap.PlanMismatch, match=message):
        normswap.apply(badnets.small(), damaged / "config.json")


def a_file(folder: Path) -> Path:
    (folder / "taken").write_text("somebody's")
    return folder / "taken"


def a_link_to_nowhere(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "gone" / "away")
    return folder / "link"


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file": (a_file, "taken: cannot be written \\(File exists\\); choose another folder"),
    "below a file": (
        lambda p: a_file(p) / "OUT",
        "OUT: cannot be written \\(Not a directory\\); choose another folder",
    ),
    "deep below a file": (lambda p: a_file(p) / "a" / "OUT", "OUT: cannot be written \\(Not a directory\\); choose"),
    "read-only": (
        lambda _: Path("/proc/nowhere/OUT"),
        "OUT: cannot be written \\(No such file or directory\\); choose",
    ),
    "too long": (lambda p: p / ("x" * 300), "x: cannot be written \\(File name too long\\); choose another folder"),
    "a link to nowhere": (a_link_to_nowhere, "link: cannot be written \\(File exists\\); choose another folder"),
    "a folder in the way": (lambda p: in_the_way(p), "OUT: cannot be written \\(Is a directory\\); choose another"),
}
"""Where nothing can be written; /proc refuses root, too."""


def in_the_way(folder: Path) -> Path:
    (folder / "OUT" / "config.json" / "x").mkdir(parents=True)
    return folder / "OUT"


@pytest.mark.parametrize(("place", "message"), PLACES.values(), ids=PLACES)
def test_places_that_cannot_be_written_to(place: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    model, target = normswap.convert(badnets.small()), place(tmp_path)
    before, kept = described(model), files(tmp_path)
    with pytest.raises(normswap.CheckpointError, match=message) as caught:
        normswap.save(model, target)
    must_be_one_line(str(caught.value), message)
    assert (described(model), files(tmp_path)) == (before, kept)
    must_refuse(1, message, "convert", *SMALL, "--force", "-o", target, folder=tmp_path)


@pytest.mark.parametrize("place", ["a file", "read-only"])
def test_places_that_no_export_can_be_written_to(place: str, tmp_path: Path) -> None:
    target = PLACES[place][0](tmp_path) / "net.pt2"
    with pytest.raises(normswap.NormswapError, match="net.pt2: cannot be written .*; choose another place"):
        normswap.export(normswap.convert(badnets.small(), example_input=badnets.X), target, to="torch")


def limited(size: int, *arguments: object, to: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process whose files cannot grow beyond a size, as on a disk that is full by then."""
    with open(to or "/dev/null", "w") as stdout:
        return subprocess.run(
            [sys.executable, "-m", "normswap", *map(str, arguments)],
            stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size)) if size else None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("size", "verb", "message"),
    [
        (4096, "convert", "OUT: cannot be written \\(.*File too large.*\\); choose another folder"),
        (512, "export", "OUT: cannot be written \\(File too large\\); choose another place"),
    ],
    ids=["no room for tensors", "no room for a program"],
)
def test_full_disk(size: int, verb: str, message: str, tmp_path: Path) -> None:
    out, registered = tmp_path / "OUT", ("test_resnet", "--no-pretrained")
    if verb == "export":
        run("convert", *registered, "-o", tmp_path / "IN")
    before = files(tmp_path)
    given = (*SMALL,) if verb == "convert" else (tmp_path / "IN", "--to", "torch")
    found = limited(size, verb, *given, "-o", out)
    assert found.returncode == 1, found.stderr
    last = found.stderr.splitlines()[-1]
    assert "Traceback" not in found.stderr
    must_be_one_line(last, message)
    assert files(tmp_path) == before


def test_full_disk_keeps_the_old_checkpoint(folder: Path, tmp_path: Path) -> None:
    old = files(copied(folder, tmp_path / "OUT"))
    found = limited(1024, "convert", *SMALL, "--force", "--groups", "2", "-o", tmp_path / "OUT")
    assert found.returncode == 1
    must_be_one_line(found.stderr, "^normswap: .*OUT: cannot be written \\(.*File too large")
    assert files(tmp_path / "OUT") == old


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_standard_output() -> None:
    found = limited(0, "list", "resnet18*", to="/dev/full")
    assert found.returncode == 1
    must_be_one_line(found.stderr, "^normswap: the result cannot be printed \\(No space left on device\\); print it")


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "config.json"])
def test_files_of_others_are_not_replaced_unasked(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    message = "holds a checkpoint already" if name == "config.json" else f"{name}: would be replaced"
    message += "; pass --force or another -o"
    must_refuse(1, message, "convert", *SMALL, "-o", tmp_path, folder=tmp_path)
    assert run("convert", *SMALL, "--force", "-o", tmp_path)[0] == 0
    assert sorted(files(tmp_path)) == ["README.md", "config.json", "model.safetensors"]


def test_saving_what_was_not_converted_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(normswap.PlanMismatch, match="Linear carries no plan; pass the model that normswap.convert"):
        normswap.save(nn.Linear(2, 2), tmp_path / "OUT")
    assert not files(tmp_path)


@pytest.mark.parametrize("kind", ["a file", "read-only"])
def test_what_is_no_checkpoint_folder(kind: str, tmp_path: Path) -> None:
    place = PLACES[kind][0](tmp_path)
    must_refuse(1, f"{place}: holds no config.json; pass a folder that normswap wrote", "check", place, folder=tmp_path)
    with pytest.raises(normswap.CheckpointError, match="holds no config.json; pass a folder that normswap wrote"):
        normswap.load(place)
