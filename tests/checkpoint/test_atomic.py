"""Writes that survive: killed anywhere, raced by another writer, linked, and read while they happen."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import killing
import pytest
import timm
import torch
from equality import assert_same_output, assert_same_state

import normswap


@pytest.fixture(params=["calls", "sizes"])
def rows(request: pytest.FixtureRequest) -> list[dict[str, int | str]]:
    script = [sys.executable, killing.__file__, request.param]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, int | str]] = json.loads(result.stdout)
    return found


def test_killed_anywhere_the_old_checkpoint_or_the_new_one_is_there(rows: list[dict[str, int | str]]) -> None:
    for row in rows:
        assert row["complete"] == 1
        assert row["killed"] == row["new"] + row.get("old", 0)  # type: ignore[operator]
        if row["kind"] == "calls":
            assert row["killed"] > 20, row
            assert row["new"] > 5, row


def test_two_writers_and_a_reader_never_meet_half_a_checkpoint(tmp_path: Path) -> None:
    normswap.save(killing.MODELS[8], tmp_path)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=killing.write_often, args=(tmp_path, groups)) for groups in (2, 4)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        model = normswap.load(tmp_path, model=killing.network())
        (groups,) = {entry.groups for entry in normswap.plan_of(model).norms}
        expected = killing.MODELS[groups].state_dict()  # type: ignore[index]
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        seen.add(groups)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen & {2, 4}
    assert killing.generation(tmp_path) in (2, 4)
    assert len(list(tmp_path.iterdir())) == 3


def test_links_and_permissions_are_kept(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "OUT"
    blobs.mkdir()
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (blobs / f"{name}[1]").touch(mode=0o600)
        (folder / name).symlink_to(blobs / f"{name}[1]")
    normswap.save(killing.MODELS[2], folder)
    normswap.save(killing.MODELS[4], folder)
    assert killing.generation(folder) == 4
    assert all((folder / name).is_symlink() for name in ("model.safetensors", "config.json"))
    assert sorted(file.name for file in blobs.iterdir()) == ["config.json[1]", "model.safetensors[1]"]
    assert {file.stat().st_mode & 0o777 for file in blobs.iterdir()} == {0o600}


def test_interrupted_save_is_read_where_nothing_can_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killing.left_half_way(tmp_path)

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refused)
        model = normswap.load(tmp_path, model=killing.network())
    assert {entry.groups for entry in normswap.plan_of(model).norms} == {4}
    assert killing.generation(tmp_path) == 4
    assert len(list(tmp_path.iterdir())) == 3


def test_timm_finds_the_new_checkpoint_whole_after_an_interrupted_save(tmp_path: Path) -> None:
    old, new = (normswap.convert(timm.create_model("test_resnet", num_classes=4), groups=g).eval() for g in (2, 4))
    normswap.save(old, tmp_path / "OUT")
    normswap.save(new, tmp_path / "NEW")
    staged = tmp_path / "OUT" / ".model.safetensors.0123abcd.tmp"
    staged.mkdir()
    os.replace(tmp_path / "NEW" / "model.safetensors", staged / "model.safetensors")
    os.replace(tmp_path / "NEW" / "config.json", tmp_path / "OUT" / "config.json")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'OUT'}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert_same_state(loaded, new)
    assert_same_output(loaded(x), new(x))
    assert not staged.exists()


@pytest.mark.parametrize("key", ["normswap", "num_classes", "pretrained_cfg"])
def test_configuration_changed_alone_is_refused(key: str, tmp_path: Path) -> None:
    normswap.save(normswap.convert(timm.create_model("test_resnet", num_classes=4)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if key == "normswap":
        config[key]["plan"]["entries"][0]["eps"] = 0.25
    else:
        config[key] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(normswap.CheckpointError, match="was saved with another config.json than the one beside it"):
        normswap.load(tmp_path)


def test_everything_is_on_the_disk_before_it_takes_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, object]] = []
    staged: dict[str, tuple[object, object]] = {}
    fsync, replace = os.fsync, os.replace

    def identity(file: int | str | Path) -> tuple[int, int]:
        found = os.stat(file)
        return found.st_dev, found.st_ino

    def synced(descriptor: int) -> None:
        done.append(("fsync", identity(descriptor)))
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        done.append(("replace", target.name))
        staged[target.name] = identity(source), identity(source.parent)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    folder = tmp_path / "OUT"
    normswap.save(killing.MODELS[2], folder)
    assert list(staged) == ["config.json", "README.md", "model.safetensors"]
    first = done.index(("replace", "config.json"))
    for name, (file, its_folder) in staged.items():
        assert {("fsync", file), ("fsync", its_folder), ("fsync", identity(folder))} <= set(done[:first])
        assert done[done.index(("replace", name)) + 1] == ("fsync", identity(folder))
