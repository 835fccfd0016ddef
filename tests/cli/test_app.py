"""The command line: results, exit codes, and what is not imported."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from torchvision.transforms.functional import to_pil_image

import normswap
from normswap import errors
from normswap.cli.app import cli


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normswap.sources.hub._answers", lambda *_: False)


def test_help_imports_neither_torch_nor_timm() -> None:
    code = (
        "import sys; sys.argv = ['normswap', '--help']\n"
        "try:\n    from normswap.cli.app import main; main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'torchvision', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "convert  Convert MODEL" in result.stdout


def test_the_package_imports_little() -> None:
    code = (
        "import sys; before = set(sys.modules); import normswap; new = set(sys.modules) - before\n"
        "heavy = {'torch', 'timm', 'torchvision', 'numpy', 'safetensors', 'click'} & new\n"
        "sys.exit(f'imported {heavy}, {len(new)} modules' if heavy or len(new) > 150 else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_module_entry_point() -> None:
    result = subprocess.run([sys.executable, "-m", "normswap", "--version"], capture_output=True, text=True)
    assert result.stdout.strip() == f"normswap, version {normswap.__version__}"


def test_convert_then_check_then_load(tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    code, stdout, stderr = run("convert", "test_resnet", "--no-pretrained", "-o", str(out))
    assert code == 0
    assert stderr == ""
    assert f"wrote {out}" in stdout
    assert "ok  batch independence" in stdout
    assert run("check", str(out), "--against", "test_resnet")[0] == 0
    assert isinstance(normswap.load(out), torch.nn.Module)


def test_json_is_one_object(tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    code, stdout, _ = run("convert", "test_resnet", "--no-pretrained", "-o", str(out), "--groups", "8", "--json")
    data = json.loads(stdout)
    assert code == 0
    assert data["output"] == str(out)
    assert data["checks"]["ok"] is True
    assert data["plan"]["options"]["groups"] == 8
    assert normswap.Plan.from_dict(data["plan"]) == normswap.plan_of(normswap.load(out))


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    assert run("convert", "test_resnet", "--no-pretrained", "-o", str(tmp_path / "OUT"), "-q") == (0, "", "")


def test_dry_run_and_inspect_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = run("convert", "test_resnet", "--no-pretrained", "--dry-run")
    second = run("inspect", "test_resnet", "--no-pretrained")
    assert first == second
    assert first[0] == 0
    assert "GroupNorm(" in first[1]
    assert list(tmp_path.iterdir()) == []


def test_existing_checkpoint_is_kept(tmp_path: Path) -> None:
    arguments = ("convert", "test_resnet", "--no-pretrained", "-o", str(tmp_path))
    assert run(*arguments)[0] == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    code, stdout, stderr = run(*arguments)
    assert (code, stdout) == (1, "")
    assert "holds a checkpoint already; pass --force or another -o" in stderr
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert run(*arguments, "--force")[0] == 0


def test_options_by_layer() -> None:
    code, stdout, _ = run("inspect", "test_resnet", "--no-pretrained", "--json", "--override", "conv1.1:groups=2")
    assert code == 0
    plan = normswap.Plan.from_dict(json.loads(stdout)["plan"])
    assert plan.norms[0].groups == 2
    code, _, stderr = run("inspect", "test_resnet", "--no-pretrained", "--override", "bn1=2")
    assert code == 2
    assert "'bn1=2' does not look like 'layer4.*:groups=8'" in stderr


@pytest.mark.usefixtures("unreachable")
def test_weights_out_of_reach_show_the_plan_and_save_nothing(tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    code, stdout, stderr = run("convert", "resnet18", "--groups", "16", "-o", str(out))
    assert code == 1
    assert "would convert:\n20 of 20 norms become GroupNorm: 20 of 16 groups" in stdout
    assert "pass --weights FILE for a checkpoint you have, or --no-pretrained for random weights" in stderr
    assert stderr.count("\n") == 1
    assert not out.exists()
    code, stdout, stderr = run("convert", "resnet18", "--json")
    assert set(json.loads(stdout)) == {"schema", "plan", "error"}


def test_weights_out_of_reach_end_soon(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HF_ENDPOINT": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "normswap", "convert", "resnet18", "-o", str(tmp_path / "OUT")],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 1
    assert "127.0.0.1 does not answer" in result.stderr
    assert time.monotonic() - started < 60  # a bound on hanging, not a benchmark: the hub's own retries take minutes


def test_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained = timm.create_model("test_resnet")
    torch.save({"epoch": 3, "state_dict": trained.state_dict()}, tmp_path / "last.pth")
    code, _, stderr = run(
        "convert", "test_resnet", "--weights", str(tmp_path / "last.pth"), "-o", str(tmp_path / "OUT")
    )
    assert (code, stderr) == (0, f"normswap: {tmp_path / 'last.pth'}: took 'state_dict'\n")
    loaded = normswap.load(tmp_path / "OUT")
    key = "fc.weight"
    assert torch.equal(loaded.state_dict()[key], trained.state_dict()[key])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is an empty file"),
        (b"<!DOCTYPE html><html>", "is an HTML page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b"PK\x03\x04 and then nothing", "is truncated or no checkpoint"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "is truncated or no checkpoint"),
    ],
)
def test_bad_weight_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    code, _, stderr = run("convert", "test_resnet", "--weights", str(path), "-o", str(tmp_path / "OUT"))
    assert code == 1
    assert f"{path}: " in stderr
    assert message in stderr
    assert not (tmp_path / "OUT").exists()


def test_pickled_module_is_not_executed(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet"), tmp_path / "whole.pth")
    code, _, stderr = run("convert", "test_resnet", "--weights", str(tmp_path / "whole.pth"))
    assert code == 1
    assert "holds Python objects, not only tensors; save model.state_dict()" in stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("convert", "resnet51"), 2, "no model named 'resnet51' in timm or torchvision; did you mean resnet51q"),
        (("convert", "torchvision/resnet51"), 2, "no model named 'resnet51' in torchvision; did you mean resnet"),
        (("convert", "resnet18", "--groups", "0"), 2, "groups=0 must be a whole number of at least 1"),
        (("convert", "resnet18", "--groups", "many"), 2, "'many' is not a valid integer"),
        (("convert", "resnet18", "--ws", "some"), 2, "'some' is not one of"),
        (("convert",), 2, "Missing argument 'MODEL'"),
        (("convert", "vit_tiny_patch16_224", "--no-pretrained"), 3, "holds no BatchNorm; nothing to convert"),
        (("inspect", "vit_tiny_patch16_224", "--no-pretrained"), 3, "holds no BatchNorm"),
        (("check", "nowhere"), 1, "nowhere: holds no config.json"),
        (("list", "nothing*"), 2, "no model matches 'nothing*'"),
    ],
)
def test_errors(arguments: tuple[str, ...], code: int, message: str) -> None:
    found, _, stderr = run(*arguments)
    assert found == code
    assert message in stderr
    assert "Traceback" not in stderr


def test_errors_as_json() -> None:
    code, stdout, _ = run("convert", "resnet51", "--json")
    assert code == 2
    assert json.loads(stdout)["error"]["type"] == "UnknownModel"


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    from normswap.cli import app as module

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["normswap", "list"])
    monkeypatch.setattr("normswap.sources.registry.names", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        module.main()
    assert exit_info.value.code == 130


def test_list() -> None:
    code, stdout, _ = run("list", "*resnet18*")
    assert code == 0
    assert "timm/resnet18\n" in stdout
    assert "torchvision/resnet18\n" in stdout


def test_every_error_has_an_exit_code() -> None:
    from normswap.cli.output import EXIT_CODES

    assert EXIT_CODES[-1] == (errors.NormswapError, 1)


@pytest.fixture(scope="module")
def trained_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet")
    for _ in range(3):
        model(torch.randn(4, 3, 96, 96))
    path = tmp_path_factory.mktemp("weights") / "trained.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for index in range(40):
        coarse = torch.rand(3, 6, 6, generator=generator)
        to_pil_image(torch.nn.functional.interpolate(coarse[None], size=(180, 200))[0]).save(folder / f"{index}.png")
    return folder


def test_calibrate_on_a_folder_of_images(tmp_path: Path, trained_weights: Path, photos: Path) -> None:
    out = tmp_path / "OUT"
    arguments = ("convert", "test_resnet", "--weights", str(trained_weights), "--groups", "auto", "--json")
    code, stdout, stderr = run(*arguments, "--calibrate", str(photos), "--steps", "2", "-o", str(out))
    assert (code, stderr) == (0, "")
    result = json.loads(stdout)
    assert set(result["calibration"]["scores"]) == {"converted", "equalized", "distilled"}
    assert result["calibration"]["kept"] in result["calibration"]["scores"]
    if result["calibration"]["kept"] != "converted":
        assert result["plan"]["scales"]
    estimated = json.loads(run(*arguments, "--dry-run")[1])["plan"]
    drifts = [[entry.get("drift") for entry in plan["entries"]] for plan in (result["plan"], estimated)]
    assert drifts[0] != drifts[1]  # measured on the images, and estimated from statistics
    assert isinstance(normswap.load(out), torch.nn.Module)


def test_bad_images_are_named_and_nothing_is_written(tmp_path: Path, trained_weights: Path, photos: Path) -> None:
    out = tmp_path / "OUT"
    arguments = ("convert", "test_resnet", "--weights", str(trained_weights), "-o", str(out), "--calibrate")
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    (tmp_path / "broken").mkdir()
    for path in sorted(photos.iterdir())[:3]:
        (tmp_path / "few" / path.name).write_bytes(path.read_bytes())
    for path in sorted(photos.iterdir()):
        (tmp_path / "broken" / path.name).write_bytes(path.read_bytes()[:100])
    for folder, message in (
        ("missing", "no such folder"),
        ("empty", "holds 0 images"),
        ("few", "holds 3 images; calibration needs at least 32"),
        ("broken", "cannot be read"),
    ):
        code, _, stderr = run(*arguments, str(tmp_path / folder))
        assert code == 1, folder
        assert message in stderr
        assert stderr.count("\n") == 1
        assert not out.exists()
    assert run("convert", "test_resnet", "--no-pretrained", "--steps", "3")[0] == 2


def test_inspect_draws_the_drift(tmp_path: Path, trained_weights: Path) -> None:
    drawing = tmp_path / "plan.png"
    code, stdout, _ = run("inspect", "test_resnet", "--weights", str(trained_weights), "--plot", str(drawing))
    assert code == 0
    assert "drift" in stdout
    assert drawing.read_bytes()[:4] == b"\x89PNG"
    code, _, stderr = run("inspect", "test_resnet", "--no-pretrained", "--plot", str(drawing))
    assert code == 2
    assert "no norm is trained" in stderr
    code, _, stderr = run(
        "inspect", "test_resnet", "--weights", str(trained_weights), "--plot", str(tmp_path / "a.xyz")
    )
    assert code == 2
    assert "a.xyz" in stderr


@pytest.mark.parametrize("device", ["nope", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named_at_once(tmp_path: Path, device: str) -> None:
    code, stdout, stderr = run("convert", "no_such_model", "--device", device, "-o", str(tmp_path / "OUT"))
    assert (code, stdout) == (2, "")
    assert f"device '{device}' cannot be used here" in stderr
    assert "leave it out, or name another" in stderr
    assert not (tmp_path / "OUT").exists()


def test_two_processes_of_torchrun_write_what_one_writes(tmp_path: Path, trained_weights: Path, photos: Path) -> None:
    arguments = ["convert", "test_resnet", "--weights", str(trained_weights), "--calibrate", str(photos), "--json"]
    both = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "normswap"]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    where = ["--device", "cpu", "--workers", "1", "-o"]
    done = subprocess.run([*both, *arguments, *where, str(tmp_path / "TWO")], capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one object: the other process is silent
    assert run(*arguments, "--device", "cpu", "-o", str(tmp_path / "ONE"))[0] == 0
    assert result["calibration"]["kept"] == "equalized"
    one, two = (normswap.load(tmp_path / name).state_dict() for name in ("ONE", "TWO"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)
