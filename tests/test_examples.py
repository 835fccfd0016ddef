"""Every example runs against the real package, on a small folder of images, and learns something."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torchvision.datasets import FakeData

import normswap

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
LOSS = re.compile(r"loss (\d+\.\d+)")
LAUNCHERS = {"ddp": 2, "fsdp2": 2}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noise, each tinted another way."""
    folder = tmp_path_factory.mktemp("images")
    tints = [(1.0, 0.2, 0.2), (0.2, 1.0, 0.2), (0.2, 0.2, 1.0)]
    for number, (image, _) in enumerate(FakeData(18, (3, 64, 64))):
        target = folder / f"class{number % 3}"
        target.mkdir(exist_ok=True)
        bands = zip(image.split(), tints[number % 3], strict=True)
        tinted = [band.point([int(value * tint) for value in range(256)]) for band, tint in bands]
        Image.merge("RGB", tinted).save(target / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = normswap.convert(timm.create_model("test_efficientnet"))
    return normswap.save(model, tmp_path_factory.mktemp("examples") / "OUT")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, images: Path, checkpoint: Path, tmp_path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 80
    launcher = [sys.executable]
    if path.stem in LAUNCHERS:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={LAUNCHERS[path.stem]}"]
    arguments = [str(images)] if "main(sys.argv[1])" in text else [str(checkpoint), str(images)]
    result = subprocess.run(
        [*launcher, str(path), *arguments], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    losses = [float(value) for value in LOSS.findall(result.stdout)]
    assert len(losses) >= 2
    assert losses[-1] < losses[0], result.stdout
