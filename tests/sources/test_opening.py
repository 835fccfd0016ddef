"""Everything a user may name: registries, checkpoints in timm's format, and functions."""

import json
import warnings
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from click.testing import CliRunner
from equality import assert_same_output, assert_same_state
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

import normswap
from normswap.cli.app import cli
from normswap.sources.opening import open_model, open_with_weights

OWN = """
from torch import nn

LOADED = []

class Volume:
    def small(num_classes=4):
        return nn.Sequential(nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                             nn.Linear(8, num_classes))

def broken():
    raise OSError("no data here")

def table():
    return {}
"""


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "ownnets.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "timm/test_resnet", "torchvision/mnasnet0_5"])
def test_names_of_registries(name: str) -> None:
    model, source = open_model(name, pretrained=False, num_classes=3)
    assert source is not None
    assert source.arguments["num_classes"] == 3
    built = source.build()
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_checkpoint_folder_of_timm(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=6, act_layer="silu").eval()
    save_for_hf(model, str(tmp_path / "BN"), safe_serialization=True, model_args={"act_layer": "silu"})
    code, _, stderr = run("convert", f"local-dir:{tmp_path / 'BN'}", "-o", str(tmp_path / "OUT"))
    assert (code, stderr) == (0, "")
    loaded, x = normswap.load(tmp_path / "OUT"), torch.randn(1, 3, 64, 64)
    assert_same_output(loaded(x), normswap.convert(model)(x))
    config = json.loads((tmp_path / "OUT" / "config.json").read_text())
    assert config["normswap"]["source"]["name"] == "test_resnet"
    assert str(tmp_path) not in json.dumps(config)


def test_hub_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_resnet", num_classes=6).eval()
    nn.init.normal_(model.bn1.running_mean)
    repository = tmp_path / "models--user--bn"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("b" * 40)
    save_for_hf(model, str(repository / "snapshots" / ("b" * 40)), safe_serialization=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, stderr = run("convert", "hf-hub:user/bn", "-o", str(tmp_path / "OUT"))
    assert (code, stderr) == (0, "")
    assert "base_model: user/bn" in (tmp_path / "OUT" / "README.md").read_text()
    assert normswap.load(tmp_path / "OUT")(torch.randn(1, 3, 64, 64)).shape == (1, 6)
    code, _, stderr = run("convert", "hf-hub:user/none", "-o", str(tmp_path / "NONE"))
    assert code == 1
    assert "HF_HUB_OFFLINE is set and the weights of hf-hub:user/none are not cached" in stderr


def test_own_function_with_its_own_input(own: Path) -> None:
    name = "ownnets:Volume.small"
    code, stdout, stderr = run("convert", name, "--input", "2,1,9,9,9", "-o", "OUT")
    assert (code, stderr) == (0, "")
    assert "1 of 1 norms become GroupNorm" in stdout
    assert normswap.plan_of(normswap.load("OUT", model=open_model(name, pretrained=False)[0])).norms[0].shape == (
        2, 8, 7, 7, 7,
    )  # fmt: skip
    assert run("check", "OUT", "--against", name)[0] == 0
    code, _, stderr = run("check", "OUT")
    assert code == 1
    assert "names no registered model" in stderr
    assert "ownnets" not in Path("OUT/config.json").read_text()


def test_own_function_with_other_classes_and_weights(own: Path) -> None:
    with torch.device("cpu"):
        trained = open_model("ownnets:Volume.small", pretrained=False, num_classes=2)[0]
    torch.save({"state_dict": {f"net.{k}": v for k, v in trained.state_dict().items()}}, "last.ckpt")
    arguments = ("convert", "ownnets:Volume.small", "--input", "2,1,9,9,9", "--weights", "last.ckpt", "-o", "OUT")
    code, _, stderr = run(*arguments)
    assert code == 1
    assert "use the model it was saved from, with as many classes" in stderr
    code, _, stderr = run(*arguments, "--num-classes", "2")
    assert code == 0
    assert stderr == "normswap: last.ckpt: took 'state_dict'; stripped 'net.' from 9 names\n"
    state = normswap.load("OUT", model=trained).state_dict()
    assert torch.equal(state["5.weight"], trained[5].weight)  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("ownnets:none", 2, "ownnets:none: module 'ownnets' has no attribute 'none'; name a function as in"),
        ("nowhere.nets:resnet", 2, "No module named 'nowhere'; name a function as in package.module:factory"),
        ("ownnets:broken", 1, "ownnets:broken failed (OSError: no data here)"),
        ("ownnets:table", 1, "ownnets:table returned a dict; return the network itself"),
        ("local-dir:nothing", 2, "nothing: holds no config.json; pass a folder in timm's format"),
        ("https://example.org/net", 2, "no model named 'https://example.org/net'"),
    ],
)
@pytest.mark.usefixtures("own")
def test_names_that_lead_nowhere(name: str, code: int, message: str) -> None:
    exit_code, stdout, stderr = run("convert", name, "-o", "OUT")
    assert (exit_code, stdout) == (code, "")
    assert message in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "implied"), [("googlenet", {"transform_input": True, "aux_logits": False}),
                                               ("deeplabv3_mobilenet_v3_large", {"aux_loss": True})])  # fmt: skip
def test_what_pretrained_weights_imply_is_kept(
    name: str, implied: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    whole: dict[str, object] = {"aux_loss": True, "weights_backbone": None} if "aux_loss" in implied else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        random = torchvision.models.get_model(name, weights=None, **whole)
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    torch.save(random.state_dict(), tmp_path / "checkpoints" / url.rpartition("/")[2])
    model, source = open_model(f"torchvision/{name}", pretrained=True)
    assert source is not None
    assert source.arguments.items() >= implied.items()
    converted = normswap.convert(model.eval(), check=False)
    loaded = normswap.load(normswap.save(converted, tmp_path / "OUT", source=source))
    x = torch.rand(1, 3, 64, 64)
    ours, theirs = loaded(x), converted.eval()(x)
    for key in ours if isinstance(ours, dict) else ():
        assert torch.equal(ours[key], theirs[key])
    assert isinstance(ours, dict) or torch.equal(ours, theirs)


def test_a_converted_folder_is_not_converted_again(tmp_path: Path) -> None:
    normswap.save(normswap.convert(timm.create_model("test_resnet")), tmp_path / "ONCE")
    code, _, stderr = run("convert", f"local-dir:{tmp_path / 'ONCE'}", "-o", str(tmp_path / "TWICE"))
    assert code == 3
    assert "was converted before" in stderr
    assert not (tmp_path / "TWICE").exists()


@pytest.mark.parametrize("name", ["test_resnet", "torchvision/mnasnet0_5", "ownnets:Volume.small", "test_efficientnet"])
def test_weights_stay_in_their_file_until_they_are_written_to(name: str, own: Path) -> None:
    torch.manual_seed(1)
    trained, _ = open_model(name, pretrained=False)
    path = own / "weights.safetensors"
    save_file(trained.state_dict(), path)
    stored = path.read_bytes()
    model, source = open_with_weights(name, path)
    assert (source is None) == (":" in name)
    assert_same_state(model, trained)
    maps = Path("/proc/self/maps")
    if maps.exists():
        places = [line.split("-")[0] for line in maps.read_text().splitlines() if line.endswith(path.name)]
        assert places
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == stored


@pytest.mark.parametrize("form", ["torch.save", "compressed", "old", "misnamed"])
def test_weights_that_torch_saved_are_the_same_however_they_are_read(form: str, own: Path) -> None:
    trained = timm.create_model("test_resnet")
    path = own / ("weights.safetensors" if form == "misnamed" else "weights.pth")
    torch.save({"state_dict": trained.state_dict()}, path, _use_new_zipfile_serialization=form != "old")
    if form == "compressed":
        records = {record: zipfile.ZipFile(path).read(record) for record in zipfile.ZipFile(path).namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for record, content in records.items():
                archive.writestr(record, content)
    stored = path.read_bytes()
    with pytest.warns(normswap.CheckpointAdapted, match="took 'state_dict'"):
        model, _ = open_with_weights("test_resnet", path)
    assert_same_state(model, trained)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert (str(path) in maps.read_text()) == (form == "torch.save")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == stored


def test_a_registered_network_with_weights_of_a_file_is_built_once_and_without_data(
    own: Path, initialized_on: list[str]
) -> None:
    path = own / "weights.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    initialized_on.clear()
    open_with_weights("test_resnet", path)
    assert set(initialized_on) == {"meta"}
