"""Save and load."""

from pathlib import Path

import before
import pytest
import timm
import torch
from equality import assert_same_output, assert_same_state
from nets import CASES
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import mnasnet0_5, resnet18

import normswap


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = normswap.convert(timm.create_model("resnet18", num_classes=10))
    return normswap.save(model, tmp_path_factory.mktemp("checkpoints") / "OUT")


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "levit_128s", "tf_efficientnet_b0"])
def test_loads_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = normswap.convert(timm.create_model(name)).eval()
    loaded = normswap.load(normswap.save(model, tmp_path))
    x = torch.randn(2, 3, 224, 224)
    assert_same_state(loaded, model)
    assert_same_output(loaded(x), model(x))
    assert normswap.plan_of(loaded) == normswap.plan_of(model)


def test_torchvision_by_name(tmp_path: Path) -> None:
    model = normswap.convert(resnet18(num_classes=3)).eval()
    with pytest.raises(
        normswap.CheckpointError, match=r"builds another network \(fc.bias: \(1000,\) there, \(3,\) here\)"
    ):
        normswap.save(model, tmp_path / "wrong", source="torchvision/resnet18")
    assert not (tmp_path / "wrong").exists()
    source = normswap.Source("torchvision", "resnet18", {"num_classes": 3})
    loaded = normswap.load(normswap.save(model, tmp_path / "right", source=source))
    x = torch.randn(2, 3, 64, 64)
    assert_same_state(loaded, model)
    assert_same_output(loaded(x), model(x))


def test_networks_that_read_the_version_they_were_saved_with(tmp_path: Path) -> None:
    model = normswap.convert(mnasnet0_5()).eval()
    loaded = normswap.load(normswap.save(model, tmp_path, source="torchvision/mnasnet0_5"))
    x = torch.randn(1, 3, 64, 64)
    assert_same_state(loaded, model)
    assert_same_output(loaded(x), model(x))


def test_own_network_with_tied_weights_and_fine_tuned(tmp_path: Path) -> None:
    case = CASES["shared norm"]
    model = normswap.convert(case.build(), example_input=torch.zeros(case.shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    normswap.save(model, tmp_path)
    with pytest.raises(normswap.CheckpointError, match=r"names no registered model; pass load\(directory, model="):
        normswap.load(tmp_path)
    loaded = normswap.load(tmp_path, model=case.build())
    x = torch.randn(case.shape)
    torch.testing.assert_close(loaded(x), model.eval()(x))
    with pytest.raises(normswap.PlanMismatch, match="has no such layer"):
        normswap.load(tmp_path, model=nn.Linear(3, 3))


def test_head_of_another_size(folder: Path) -> None:
    loaded = normswap.load(folder, num_classes=7)
    assert loaded(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert torch.equal(loaded.state_dict()["conv1.weight"], load_file(folder / "model.safetensors")["conv1.weight"])


def test_bare_state_dict_after_fine_tuning(folder: Path) -> None:
    tuned = normswap.load(folder)
    state = tuned.state_dict()
    fresh = normswap.apply(timm.create_model("resnet18", num_classes=10), folder / "config.json").eval()
    fresh.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert_same_state(fresh, tuned)
    assert_same_output(fresh(x), tuned(x))


def test_tensors_of_another_checkpoint_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(normswap.CheckpointError, match="does not belong to config.json beside it"):
        normswap.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no config.json; pass a folder that normswap wrote"),
        ("{", "cannot be read"),
        ("{}", "is not normswap's"),
        ('{"normswap": {"plan": {"schema": 99}}}', "this plan has schema 99, this normswap reads up to 1"),
        ('{"normswap": {"plan": {"schema": 1}}}', "this is not a plan \\(KeyError: 'options'\\)"),
    ],
)
def test_bad_configurations(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(normswap.NormswapError, match=message):
        normswap.load(tmp_path)


def test_a_folder_that_an_earlier_commit_wrote_loads_bit_for_bit() -> None:
    folder = Path(__file__).with_name("written_before")
    expected = load_file(folder / "expected.safetensors")
    loaded = normswap.load(folder, model=before.network())
    state = loaded.state_dict()
    assert {f"state.{name}" for name in state} == set(expected) - {"x", "y"}
    assert all(torch.equal(value, expected[f"state.{name}"]) for name, value in state.items())
    assert_same_output(loaded(expected["x"]), expected["y"])
    assert [entry.groups for entry in normswap.plan_of(loaded).norms] == [4, 4, 4]


@pytest.mark.parametrize("num_classes", [None, 7], ids=["as saved", "another head"])
def test_what_is_loaded_is_no_part_of_the_file(folder: Path, tmp_path: Path, num_classes: int | None) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    loaded = normswap.load(tmp_path, num_classes=num_classes)
    state = {key: value.clone() for key, value in loaded.state_dict().items()}
    (tmp_path / "model.safetensors").write_bytes(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    loaded(torch.randn(1, 3, 64, 64)).square().mean().backward()
    torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], 0.1).step()
    assert any(not torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_a_network_is_initialized_only_for_what_the_file_lacks(folder: Path, initialized_on: list[str]) -> None:
    normswap.load(folder)
    assert set(initialized_on) == {"meta"}
    normswap.load(folder, num_classes=7)
    assert set(initialized_on) == {"meta", "cpu"}
