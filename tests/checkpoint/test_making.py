"""From a network to a checkpoint in one go."""

from pathlib import Path

import broken
import torch
from equality import assert_same_state
from torch import nn
from torchvision.transforms.functional import to_pil_image

import normswap
from normswap.checkpoint.making import make


def photos(folder: Path) -> Path:
    folder.mkdir()
    for index in range(40):
        to_pil_image(torch.rand(3, 20, 20)).save(folder / f"{index}.png")
    return folder


def test_each_part_is_told_as_it_begins(tmp_path: Path) -> None:
    told: list[str] = []
    images = photos(tmp_path / "photos")
    model = broken.Net().eval()
    nn.init.uniform_(model.bn1.running_var, 0.5, 2)
    made = make(
        model, tmp_path / "OUT", source=None, images=images, groups="auto", example_input=broken.X, note=told.append
    )
    assert told == ["calibrating …", "checking …", "writing …"]
    assert made.directory == tmp_path / "OUT"
    assert made.calibration is not None
    assert set(made.to_dict()) == {"output", "plan", "calibration", "checks"}
    assert str(made).splitlines()[-1] == f"wrote {tmp_path / 'OUT'}"
    loaded = normswap.load(tmp_path / "OUT", model=broken.Net())
    assert normswap.plan_of(loaded) == made.plan


def test_without_images_it_is_convert_check_and_save(tmp_path: Path) -> None:
    model = broken.Net()
    made = make(model, tmp_path / "OUT", source=None, example_input=broken.X, groups=4)
    loaded = normswap.load(tmp_path / "OUT", model=broken.Net())
    assert_same_state(loaded, normswap.convert(model, example_input=broken.X, groups=4))
    assert "calibration" not in made.to_dict()


def test_what_does_not_pass_is_not_written(tmp_path: Path) -> None:
    made = make(broken.batch_independence(), tmp_path / "OUT", source=None, example_input=broken.X)
    assert made.directory is None
    assert made.to_dict()["output"] is None
    assert str(made).splitlines()[-1] == "wrote nothing"
    assert not (tmp_path / "OUT").exists()
