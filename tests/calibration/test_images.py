"""A folder of images as batches: which are learned from, which are judged by, and how they are prepared."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

import normswap
from normswap.calibration.images import BATCH, JUDGED_ONE_IN, image_batches

SIZE = (3, 16, 16)


def paint(folder: Path, count: int) -> Path:
    """Write images of one brightness each, every second one into a subfolder, and a file that is none."""
    (folder / "more").mkdir(parents=True)
    (folder / "notes.txt").write_text("no image")
    for index in range(count):
        image = torch.full((3, 20, 20), index / 255)
        to_pil_image(image).save(folder / ("more" if index % 2 else ".") / f"{index:03}.PNG")
    return folder


def test_every_image_is_in_one_of_the_two(tmp_path: Path) -> None:
    learned, judged = (torch.cat(list(b)) for b in image_batches(paint(tmp_path, 50), nn.ReLU(), SIZE, augment=False))
    assert learned.shape == (45, *SIZE)
    assert len(judged) == 50 // JUDGED_ONE_IN
    shades = torch.cat([learned, judged])[:, 0, 8, 8]
    assert len(shades.unique()) == 50
    back = (shades * 0.229 + 0.485) * 255  # ImageNet's mean and deviation of red
    torch.testing.assert_close(back.sort().values, torch.arange(50.0), rtol=0, atol=0.01)


def test_a_network_of_timm_names_its_own_mean_and_deviation(tmp_path: Path) -> None:
    model = nn.ReLU()
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}  # type: ignore[assignment]
    _, judged = image_batches(paint(tmp_path, 2 * BATCH), model, SIZE, augment=False)
    (batch,) = judged
    assert batch[0].unique().tolist() == [-2]


def test_learning_in_random_order_leaves_the_judged_ones_alone(tmp_path: Path) -> None:
    learned, judged = image_batches(paint(tmp_path, 50), nn.ReLU(), SIZE, augment=True)
    first, second = (torch.cat(list(learned))[:, 0, 8, 8].tolist() for _ in range(2))
    assert first != second
    assert len(first) == 32  # the last batch, which is short, is left out
    assert torch.equal(*(torch.cat(list(judged)) for _ in range(2)))


@pytest.mark.parametrize(
    ("count", "size", "message"),
    [
        (None, SIZE, "no such folder; --calibrate takes a folder of images"),
        (31, SIZE, "holds 31 images; calibration needs at least 32"),
        (32, (1, 16, 16), "ReLU takes no RGB images; use normswap.calibrate in Python"),
        (32, (3, 16), "ReLU takes no RGB images; use normswap.calibrate in Python"),
    ],
    ids=["no folder", "too few", "grey", "flat"],
)
def test_folders_and_networks_that_do_not_do(
    count: int | None, size: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "photos" if count is None else paint(tmp_path / "photos", count)
    with pytest.raises(normswap.CalibrationFailed, match=message):
        image_batches(folder, nn.ReLU(), size, augment=False)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (paint(tmp_path, 32) / "000.PNG").write_bytes(b"no image")
    _, judged = image_batches(tmp_path, nn.ReLU(), SIZE, augment=False)
    with pytest.raises(normswap.CalibrationFailed, match=r"000\.PNG: cannot be read \(.*\); remove it"):
        list(judged)
