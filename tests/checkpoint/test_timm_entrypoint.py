"""timm finds converted checkpoints by their folder or hub name, and describes converted networks rightly."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from equality import assert_same_output, assert_same_state
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from normswap.layers.convs import WeightStandardized

NAME = "test_efficientnet"


def trained(name: str, **arguments: object) -> nn.Module:
    """Build a network whose norms look trained, so that conversion is adaptive and matched."""
    model = timm.create_model(name, **arguments).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    torch.manual_seed(0)
    return normswap.convert(trained(NAME, num_classes=10))


@pytest.fixture(scope="module")
def folder(converted: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return normswap.save(converted, tmp_path_factory.mktemp("timm") / "OUT")


def create(folder: Path, **arguments: object) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()


def test_same_network_bit_for_bit(converted: nn.Module, folder: Path) -> None:
    loaded, x = create(folder), torch.randn(2, 3, 64, 64)
    assert_same_state(loaded, converted)
    assert_same_output(loaded(x), converted(x))
    assert normswap.plan_of(loaded) == normswap.plan_of(converted)
    assert loaded.pretrained_cfg["architecture"] == "normswap"


def test_head_of_another_size_and_other_arguments(folder: Path) -> None:
    loaded = create(folder, num_classes=5, drop_path_rate=0.1)
    assert loaded(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    assert torch.equal(loaded.conv_stem.weight, create(folder).conv_stem.weight)
    assert create(folder, num_classes=0)(torch.randn(1, 3, 64, 64)).ndim == 2


def test_other_input_channels_sum_the_kernels(converted: nn.Module, folder: Path) -> None:
    x = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(create(folder, in_chans=1)(x), converted(x.expand(2, 3, 64, 64)))


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_resnet", "levit_128s", "mobilenetv3_small_050", "xception41"]
)
def test_feature_extractors(name: str, tmp_path: Path) -> None:
    whole = normswap.convert(trained(name), check=False)
    normswap.save(whole, tmp_path)
    x = torch.randn(1, 3, 224, 224)
    features = create(tmp_path, features_only=True)(x)
    expected = trained(name, features_only=True)(x)
    assert [f.shape for f in features] == [f.shape for f in expected]
    inner = whole.forward_intermediates(x, intermediates_only=True)
    for feature in features:
        assert any(f.shape == feature.shape and torch.allclose(f, feature, atol=1e-5) for f in inner)
    assert len(create(tmp_path, features_only=True, out_indices=(0, 1))(x)) == 2


@pytest.mark.parametrize("chosen", [(0, 4), [1, 3], (-1,)], ids=["both ends", "two of a list", "last"])
def test_extractors_put_out_the_features_that_they_were_built_for(chosen: object, tmp_path: Path) -> None:
    x = torch.randn(1, 3, 64, 64)
    extractor = normswap.convert(trained("resnet18", features_only=True, out_indices=chosen), check=False)
    normswap.save(extractor, tmp_path)
    for loaded in (normswap.load(tmp_path), create(tmp_path)):
        assert len(loaded(x)) == len(extractor(x))
        for ours, theirs in zip(loaded(x), extractor(x), strict=True):
            assert_same_output(ours, theirs)
    assert len(create(tmp_path, features_only=True, out_indices=(0, 1))(x)) == 2


def test_features_of_a_network_whose_concatenations_are_scaled(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    whole = normswap.convert(trained("densenet121"), batches=[x], groups=1, check=False)
    assert any(entry.scaled_by for entry in normswap.plan_of(whole).norms)
    normswap.save(whole, tmp_path)
    assert_same_output(create(tmp_path)(x), whole(x))
    made: list[torch.Tensor] = []
    for module in whole.modules():
        module.register_forward_hook(lambda _module, _args, output: made.append(output.clone()))
    whole(x)
    for feature in create(tmp_path, features_only=True)(x):
        assert any(f.shape == feature.shape and torch.allclose(f, feature, rtol=1e-4, atol=1e-4) for f in made)


def test_extractor_holds_no_batch_norm(folder: Path) -> None:
    extractor = create(folder, features_only=True)
    assert not any(isinstance(module, _BatchNorm) for module in extractor.modules())
    assert sum(isinstance(module, WeightStandardized) for module in extractor.modules()) > 10


def test_hub_name_reads_the_same_configuration(
    converted: nn.Module, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--user--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = timm.create_model("hf-hub:user/name", pretrained=True, cache_dir=tmp_path).eval()
    x = torch.randn(1, 3, 64, 64)
    assert_same_state(loaded, converted)
    assert_same_output(loaded(x), converted(x))


@pytest.mark.parametrize("classes", [10, 4])
def test_timms_own_export_reloads(folder: Path, tmp_path: Path, classes: int) -> None:
    tuned, x = create(folder, num_classes=classes), torch.randn(1, 3, 64, 64)
    save_for_hf(tuned, str(tmp_path), safe_serialization=True)
    assert_same_state(create(tmp_path), tuned)
    assert_same_output(create(tmp_path)(x), tuned(x))


def test_a_converted_object_describes_itself(converted: nn.Module, tmp_path: Path) -> None:
    folded, x = normswap.fold(converted), torch.randn(1, 3, 64, 64)
    for model in (converted, folded):
        save_for_hf(model, str(tmp_path), safe_serialization=True)
        again = create(tmp_path)
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
        assert_same_state(again, model)
        assert_same_output(again(x), model(x))


def test_converting_leaves_the_originals_description_alone() -> None:
    model = timm.create_model(NAME)
    before = dict(model.pretrained_cfg), dict(model._model_args)
    normswap.convert(model)
    assert (model.pretrained_cfg, model._model_args) == before


IN_A_FRESH_PYTHON = """
import sys
{first}
assert "timm" not in sys.modules or "timm" in {first!r}
{second}
import timm, torch
torch.manual_seed(0)
print(timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()(torch.ones(1, 3, 64, 64)).sum().item())
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import normswap", "import timm"),
        ("import timm", "import normswap"),
        ("import normswap", "from timm import data"),
    ],
    ids=["normswap first", "timm first", "submodule"],
)
def test_either_import_may_come_first(first: str, second: str, converted: nn.Module, folder: Path) -> None:
    code = IN_A_FRESH_PYTHON.format(first=first, second=second)
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(converted(torch.ones(1, 3, 64, 64)).sum().item(), rel=1e-4)


def test_import_brings_neither_torch_nor_timm() -> None:
    code = "import sys, normswap; sys.exit(bool({'torch', 'timm'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002"])
def test_what_timm_builds_by_itself_is_left_to_timm(name: str, tmp_path: Path) -> None:
    native = name == "resnet18"
    model, x = normswap.convert(trained(name), ws="none", affine="copy"), torch.randn(1, 3, 64, 64)
    normswap.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == (name if native else "normswap")
    assert_same_state(normswap.load(tmp_path), model)
    assert_same_output(normswap.load(tmp_path)(x), model(x))
    if native:
        assert config["model_args"] == {"norm_layer": "groupnorm"}
        code = "import sys, timm; timm.create_model('local-dir:' + sys.argv[1], pretrained=True)"
        result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert_same_state(create(tmp_path), model)
        assert_same_output(create(tmp_path)(x), model(x))


@pytest.mark.parametrize("ws", ["adaptive", "standard"])
def test_timms_plain_network_computes_the_same_with_the_file(ws: str, tmp_path: Path) -> None:
    model, x = normswap.convert(trained("resnet18"), ws=ws), torch.randn(2, 3, 64, 64)
    normswap.save(model, tmp_path)
    plain = timm.create_model("resnet18", norm_layer="groupnorm").eval()
    for entry in normswap.plan_of(model).norms:
        plain.get_submodule(entry.name).eps = entry.eps  # no tensor carries it
    missed = plain.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not missed.missing_keys
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changed", [{"groups": 16}, {"ws": "adaptive"}, {"exclude": "bn1"}, {"affine": "match"}], ids=str
)
def test_what_timm_cannot_build_is_not_left_to_it(changed: dict[str, object], tmp_path: Path) -> None:
    options: dict[str, object] = {"ws": "none", "affine": "copy"} | changed
    normswap.save(normswap.convert(trained("resnet18"), **options), tmp_path)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "normswap"


def test_configuration_without_a_plan_is_refused() -> None:
    with pytest.raises(normswap.CheckpointError, match="needs a converted checkpoint; pass local-dir:OUT"):
        timm.create_model("normswap")


def test_a_configuration_cannot_name_code(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "OUT")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["source"] = {"registry": "os", "name": "system", "arguments": {"command": "touch owned"}}
    (tmp_path / "OUT" / "config.json").write_text(json.dumps(config))
    with pytest.raises(normswap.CheckpointError, match="is not a model of timm or torchvision"):
        create(tmp_path / "OUT")


class Touch:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


def test_pickles_are_not_executed(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    torch.save({"state_dict": Touch(tmp_path / "owned")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match="weights_only"):
        create(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("where", ["model_args", "source"])
def test_a_configuration_cannot_have_other_files_read(where: str, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    arguments = config["model_args"] if where == "model_args" else config["model_args"]["source"]["arguments"]
    arguments["checkpoint_path"] = "/etc/hostname"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(normswap.CheckpointError, match="checkpoint_path names weights; an architecture has none"):
        timm.create_model(f"local-dir:{tmp_path}")


def test_other_input_channels_are_saved_as_they_are(folder: Path, tmp_path: Path) -> None:
    gray, x = create(folder, in_chans=1), torch.randn(1, 1, 64, 64)
    save_for_hf(gray, str(tmp_path / "theirs"), safe_serialization=True)
    normswap.save(gray, tmp_path / "ours")
    for again in (create(tmp_path / "theirs"), create(tmp_path / "ours"), normswap.load(tmp_path / "ours")):
        assert_same_state(again, gray)
        assert_same_output(again(x), gray(x))
        assert again.pretrained_cfg["input_size"][0] == 1
