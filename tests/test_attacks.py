"""Files made to do harm: each has its expectation beside it in attacks/, or here where code makes it."""

import copy
import itertools
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import pytest
import timm
import torch
from safetensors.torch import load_file

import normswap
from normswap.sources.state_dicts import fill, read_state_dict

CONFIGURATIONS = json.loads(Path(__file__).with_name("attacks").joinpath("configurations.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return normswap.save(normswap.convert(timm.create_model("test_resnet", num_classes=4)), tmp_path / "OUT")


@pytest.fixture(autouse=True)
def _nothing_is_opened_or_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **_: object) -> None:
        raise SystemExit(f"the network was reached: {arguments}")

    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setattr("os.system", refused)
    monkeypatch.setattr("subprocess.Popen", refused)


@pytest.mark.parametrize("attack", CONFIGURATIONS, ids=[attack["id"] for attack in CONFIGURATIONS])
def test_sealed_configurations(attack: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    *path, last = attack["at"].split(".")
    holder = config
    for key in path:
        holder = holder[int(key) if isinstance(holder, list) else key]
    holder[last] = attack["value"]
    mutations.seal(folder, load_file(folder / "model.safetensors"), config)
    before = mutations.peak()
    with pytest.raises(normswap.NormswapError, match=attack["error"]) as caught:
        normswap.load(folder)
    assert "\n" not in str(caught.value)
    assert mutations.peak() - before < 64 * 1024


TEXTS: dict[str, tuple[Callable[[str], str], str]] = {
    "nested a million times": (lambda _: "[" * 10**6, "is nested too deeply"),
    "key twice": (lambda text: text.replace('"normswap": {', '"normswap": {}, "normswap": {'), "'normswap' twice"),
    "not a number": (lambda text: text.replace("1e-05", "NaN", 1), "NaN is not a finite number"),
    "infinite": (lambda text: text.replace("1e-05", "1e999", 1), "1e999 is not a finite number"),
    "number of a million digits": (lambda text: text.replace("1e-05", "9" * 10**6, 1), "cannot be read"),
    "40 MB": (lambda text: text + " " * 40_000_000, "is larger than 32 MiB"),
    "another encoding": (lambda text: "\ud800" + text, "cannot be read"),
}


@pytest.mark.parametrize(("change", "error"), TEXTS.values(), ids=TEXTS)
def test_texts_that_are_no_configuration(change: Callable[[str], str], error: str, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(change(path.read_text()), encoding="utf-8", errors="surrogatepass")
    with pytest.raises(normswap.CheckpointError, match=error):
        normswap.load(folder)
    with pytest.raises(normswap.PlanMismatch, match=error.replace("cannot be read", "no plan can be read")):
        normswap.apply(timm.create_model("test_resnet"), path)


def test_a_configuration_that_is_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(normswap.CheckpointError, match="is no regular file"):
        normswap.load(folder)


PICKLE = """
import pathlib, sys, torch, normswap
from normswap.sources.state_dicts import read_state_dict
class Harm:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(sys.argv[1] + ".touched"),)
torch.save({"weight": torch.ones(1), "harm": Harm()}, sys.argv[1], _use_new_zipfile_serialization=sys.argv[2] == "zip")
try:
    read_state_dict(sys.argv[1])
except normswap.CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("variable", ["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_pickles_are_not_executed_whatever_the_environment_says(
    form: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    environment = {**os.environ} | ({variable: "1"} if variable else {})
    script = [sys.executable, "-c", PICKLE, str(tmp_path / "harm.pth"), form]
    result = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert "holds Python objects, not only tensors" in result.stdout, result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["harm.pth"]


def test_an_archive_that_unpacks_to_a_gigabyte(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"")
        for number in range(16):
            archive.writestr(f"bomb/data/{number}", bytes(2**26))
    before = mutations.peak()
    with pytest.raises(normswap.CheckpointError, match="unpacks to many times its size"):
        read_state_dict(tmp_path / "bomb.pth")
    assert mutations.peak() - before < 64 * 1024


def test_tensors_that_are_marked_as_folders(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(4)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        records = [(record, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(tmp_path / "marked.pth", "w") as archive:
        for record, content in records:
            record.external_attr = 0x10 if record.filename.endswith("data/0") else 0
            archive.writestr(record, content)
    assert not torch.load(tmp_path / "marked.pth", weights_only=True)["weight"].equal(torch.ones(4))
    with pytest.raises(normswap.CheckpointError, match="is damaged \\(a tensor is marked as a folder\\); get a fresh"):
        read_state_dict(tmp_path / "marked.pth")


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(9)}, tmp_path / "state.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_state_dict(tmp_path / "state.pth")["weight"], torch.ones(9))


def test_a_state_dict_whose_names_are_paths_stays_in_memory(tmp_path: Path) -> None:
    torch.save({"../../outside": torch.ones(1), "/etc/outside": torch.ones(1)}, tmp_path / "state.pth")
    with pytest.raises(normswap.CheckpointError, match="does not fit"):
        fill(torch.nn.Linear(1, 1), read_state_dict(tmp_path / "state.pth"), name="state.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["state.pth"]


def test_indexes_of_sharded_checkpoints_are_not_followed(tmp_path: Path) -> None:
    index = {"weight_map": {"weight": "../../../etc/hostname"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(normswap.CheckpointError, match="is truncated or no checkpoint"):
        read_state_dict(tmp_path / "model.safetensors.index.json")


IMPORTS = """
import os, sys, normswap, timm, torchvision
folder = sys.argv[1]
normswap.check(normswap.load(folder + "/GOOD"))        # everything that is imported late is imported now
seen = []
sys.addaudithook(lambda event, arguments: seen.append((event, arguments)))
tried = 0
for name in sorted(os.listdir(folder)):
    if name != "GOOD":
        tried += 1
        try:
            normswap.load(folder + "/" + name)
        except normswap.NormswapError:
            pass
for event, arguments in seen:
    if event in ("os.system", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "exec", "compile"):
        print(event, arguments)
    if event == "open" and isinstance(arguments[0], str) and not arguments[0].startswith(folder):
        print(event, arguments)
    if event == "import" and arguments[0] in ("antigravity", "this"):
        print(event, arguments)
print(tried, "tried")
"""


def test_no_code_is_imported_no_other_file_opened_and_nothing_reached(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    state = load_file(folder / "model.safetensors")
    original = json.loads((folder / "config.json").read_text())
    folder.rename(folder.with_name("GOOD"))
    places = ("name", "norm_layer", "act_layer", "block", "checkpoint_path", "model_args")
    for number, (place, value) in enumerate(itertools.product(places, ("antigravity:fly", "this", "antigravity.fly"))):
        config = copy.deepcopy(original)
        source = config["normswap"]["source"]
        if place == "name":
            source["name"] = value
        elif place == "model_args":
            config["model_args"]["source"] = {"registry": value, "name": value, "arguments": {}}
        else:
            source["arguments"][place] = value
        out = folder.with_name(f"OUT{number}")
        out.mkdir()
        mutations.seal(out, state, config)
    script = [sys.executable, "-c", IMPORTS, str(folder.parent)]
    result = subprocess.run(script, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "18 tried\n"), result.stdout + result.stderr
