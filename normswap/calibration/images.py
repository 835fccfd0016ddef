"""Read a folder of images as batches, prepared as the network expects them."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from normswap.errors import CalibrationFailed
from normswap.networks.processes import processes, rank

BATCH, JUDGED_ONE_IN = 16, 10
"""Images per batch, and how many images there are to each one that is held back to judge by."""


Loader = DataLoader[Any]


def image_batches(
    folder: Path, model: nn.Module, size: tuple[int, ...], *, augment: bool, workers: int = 0
) -> tuple[Loader, Loader]:
    """Return (N, 3, H, W) batches to learn from and to judge by, of every image under a folder, without labels.

    Mean, deviation and interpolation are the ones that timm's ``pretrained_cfg`` names, else ImageNet's. Files that are
    no images are left out by their suffix. Of several processes each gets files of its own, and its part of a batch.

    Args:
        folder: Searched with its subfolders.
        model: The network the images are for.
        size: (3, H, W) of its input.
        augment: Learn from random crops and mirror images in random order, instead of central crops of images from all
            over the folder, whose subfolders may be classes.
        workers: Processes that read images.

    Raises:
        CalibrationFailed: There is no such folder, or it holds too few images.
    """
    from timm.data import create_transform, resolve_data_config

    must_be_folder(folder)
    if len(size) != 3 or size[0] != 3:
        raise CalibrationFailed(f"{type(model).__name__} takes no RGB images; use normswap.calibrate in Python")
    config = resolve_data_config({"input_size": size}, pretrained_cfg=getattr(model, "pretrained_cfg", None) or {})
    used = {key: config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    central = create_transform(**used)
    augmented = create_transform(**used, is_training=True, scale=(0.15, 1.0), color_jitter=None)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if len(files) < 2 * BATCH:
        raise CalibrationFailed(f"{folder}: holds {len(files)} images; calibration needs at least {2 * BATCH}")
    judged = files[::JUDGED_ONE_IN]
    held = set(judged)
    learned = [path for path in files if path not in held]
    Random(0).shuffle(learned)
    learned, judged, size_here = _own(learned), _own(judged), max(BATCH // processes(), 1)
    return (
        DataLoader(
            _Images(learned, augmented if augment else central),
            size_here,
            shuffle=augment,
            drop_last=augment,
            num_workers=workers,
        ),
        DataLoader(_Images(judged, central), size_here, num_workers=workers),
    )


def must_be_folder(folder: Path) -> None:
    """Raise where images are to come from something else than a folder.

    Raises:
        CalibrationFailed: There is no such folder.
    """
    if not folder.is_dir():
        raise CalibrationFailed(f"{folder}: no such folder; --calibrate takes a folder of images")


def _own(files: list[Path]) -> list[Path]:
    """Return this process' files, as many as every other one has."""
    return files[: len(files) // processes() * processes()][rank() :: processes()]


class _Images(Dataset[Tensor]):
    """The images of some files. timm's and torchvision's datasets take folders for classes; timm's skips bad files."""

    def __init__(self, files: list[Path], transform: Callable[[Any], Tensor]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return self.transform(default_loader(self.files[index]))
        except OSError as error:
            raise CalibrationFailed(f"{self.files[index]}: cannot be read ({error}); remove it") from error
