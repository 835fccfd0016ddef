"""Train a YOLO that stays converted: Ultralytics builds the network anew from its yaml when training begins.

python examples/ultralytics_yolo.py IMAGES         # here: one box around every image; swap in your own data.yaml
pip install ultralytics-opencv-headless            # or ultralytics, where OpenCV's libGL is installed
"""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("YOLO_CONFIG_DIR", str(Path("settings").resolve()))  # leave the user's own alone

import torch
import yaml
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

import normswap

EPOCHS, SIDE = 3, 64


class ConvertedTrainer(DetectionTrainer):
    """Convert the network that the trainer builds, with the weights it starts from; one for every task works alike."""

    def get_model(self, cfg: object = None, weights: torch.nn.Module | None = None, verbose: bool = True) -> object:
        """Return the network to train: what is converted already goes on with its plan."""
        if not is_converted(weights):
            return normswap.convert(super().get_model(cfg, weights, verbose))
        model = normswap.apply(super().get_model(cfg, None, verbose), normswap.plan_of(weights))
        model.load_state_dict(weights.state_dict())
        return model


def is_converted(model: torch.nn.Module | None) -> bool:
    """Tell whether a network holds GroupNorm and no BatchNorm; there may be none yet."""
    kinds = set() if model is None else set(map(type, model.modules()))
    return torch.nn.GroupNorm in kinds and torch.nn.BatchNorm2d not in kinds


def tell_loss(trainer: DetectionTrainer) -> None:
    """Print the sum of the mean losses of an epoch."""
    print(f"epoch {trainer.epoch + 1}: loss {float(sum(trainer.tloss.values())):.3f}")


def write_data(images: Path) -> Path:
    """Write the images of a folder of classes, and a label file for each, as Ultralytics reads them."""
    classes = sorted(folder.name for folder in images.iterdir() if folder.is_dir())
    for kind in ("images", "labels"):
        Path("data", kind).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(classes):
        for path in (images / name).iterdir():
            shutil.copy(path, Path("data", "images", path.name))
            Path("data", "labels", f"{path.stem}.txt").write_text(f"{number} 0.5 0.5 0.8 0.8\n")
    found = {"path": str(Path("data").resolve()), "train": "images", "val": "images", "names": dict(enumerate(classes))}
    Path("data.yaml").write_text(yaml.safe_dump(found))
    return Path("data.yaml")


def main(images: str) -> None:
    """Train, validate, predict, and load what was saved."""
    quiet = {"verbose": False, "plots": False, "workers": 0}
    data, yolo = write_data(Path(images)), YOLO("yolov8n.yaml")
    yolo.add_callback("on_train_epoch_end", tell_loss)
    flat = dict.fromkeys(("mosaic", "hsv_h", "hsv_s", "hsv_v", "translate", "scale", "fliplr"), 0.0)
    yolo.train(
        trainer=ConvertedTrainer, data=data, epochs=EPOCHS, imgsz=SIDE, batch=6, nbs=6, optimizer="SGD", lr0=0.01,
        warmup_epochs=0, exist_ok=True, project=str(Path("runs").resolve()), **flat, **quiet,
    )  # fmt: skip
    again = YOLO("runs/train/weights/last.pt")
    assert all(map(is_converted, (yolo.model, again.model)))
    again.val(data=data, imgsz=SIDE, batch=6, **quiet)
    again.predict("data/images", imgsz=SIDE, verbose=False)
    print(Path(again.export(format="onnx", imgsz=SIDE, simplify=False)).name)


if __name__ == "__main__":
    main(sys.argv[1])
