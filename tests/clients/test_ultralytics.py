"""Ultralytics' YOLO, converted: it trains, validates, predicts, exports, saves, and folds where there is nothing to."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import normswap

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:.*normswap.*")]
SIDE = 64
QUIET = {"verbose": False, "plots": False, "workers": 0}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep Ultralytics' settings and runs to a folder of the test."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", os.environ.get("YOLO_CONFIG_DIR", str(tmp_path / "settings")))
    monkeypatch.chdir(tmp_path)
    yield
    logging.getLogger("ultralytics").setLevel(logging.WARNING)


@pytest.fixture
def yolo() -> Any:
    from ultralytics import YOLO

    yolo = YOLO("yolov8n.yaml")
    yolo.model = normswap.convert(yolo.model.eval())
    return yolo


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four images of a white square, and where it is."""
    generator = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for number in range(4):
        image = generator.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        image[16:48, 16:48] = 255
        Image.fromarray(image).save(tmp_path / "data" / "images" / f"{number}.png")
        (tmp_path / "data" / "labels" / f"{number}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    path = tmp_path / "data.yaml"
    path.write_text(f"path: {tmp_path / 'data'}\ntrain: images\nval: images\nnames: {{0: square}}\n")
    return path


def kinds(model: nn.Module) -> tuple[int, int]:
    """Count GroupNorm and BatchNorm."""
    modules = list(model.modules())
    return sum(isinstance(m, nn.GroupNorm) for m in modules), sum(isinstance(m, nn.BatchNorm2d) for m in modules)


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    x = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return model.eval().float()(x)[0]


def test_fusing_leaves_the_network_as_it_is(yolo: Any) -> None:
    before = outputs(yolo.model)
    with pytest.warns(UserWarning, match=r"DetectionModel.fuse\(\) finds no BatchNorm to fold"):
        yolo.fuse()
    assert kinds(yolo.model) == (57, 0)
    assert torch.equal(outputs(yolo.model), before)


def test_an_unconverted_network_is_fused(yolo: Any) -> None:
    from ultralytics import YOLO

    plain = YOLO("yolov8n.yaml")
    normswap.convert(plain.model)
    plain.fuse()
    assert kinds(plain.model) == (0, 0)


def test_validates_predicts_exports_saves_and_loads(yolo: Any, data: Path) -> None:
    from ultralytics import YOLO

    before = outputs(yolo.model)
    yolo.val(data=str(data), imgsz=SIDE, batch=2, **QUIET)
    (found,) = yolo.predict(np.zeros((SIDE, SIDE, 3), np.uint8), imgsz=SIDE, verbose=False)
    assert found.boxes is not None
    assert kinds(yolo.model) == (57, 0)
    torch.testing.assert_close(outputs(yolo.model), before, rtol=0, atol=1e-4)

    file = yolo.export(format="onnx", imgsz=SIDE, simplify=False)
    session = onnxruntime.InferenceSession(file)
    x = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).numpy()
    (exported,) = session.run(None, {session.get_inputs()[0].name: x})
    difference = np.abs(exported - before.numpy()).max() / np.abs(before.numpy()).max()
    print(f"ONNX: {difference:.1e}")
    assert difference < 1e-4

    yolo.save("yolo.pt")
    again = YOLO("yolo.pt")
    assert kinds(again.model) == (57, 0)
    torch.testing.assert_close(outputs(again.model), before, rtol=2e-3, atol=0.5)  # the file is in half precision


def test_trains_and_stays_converted(data: Path) -> None:
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer

    class ConvertedTrainer(DetectionTrainer):
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
            return normswap.convert(super().get_model(cfg, weights, verbose))

    seen = []
    yolo = YOLO("yolov8n.yaml")
    yolo.add_callback("on_train_batch_end", lambda trainer: seen.append(kinds(trainer.model)))
    yolo.train(trainer=ConvertedTrainer, data=str(data), epochs=1, imgsz=SIDE, batch=2, project="runs", **QUIET)
    assert seen == [(57, 0)] * 2
    assert kinds(yolo.model) == (57, 0)
    assert all(bool(parameter.isfinite().all()) for parameter in yolo.model.parameters())


def test_the_wrapper_is_not_trained_when_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics import YOLO

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a training run")

    yolo = YOLO("yolov8n.yaml")
    monkeypatch.setattr(YOLO.__mro__[1], "train", started)
    message = "calling a YOLO runs something else than its forward; pass the network inside, .model"
    for verb in (normswap.inspect, normswap.convert):
        with pytest.raises(normswap.UnsupportedModel, match=message):
            verb(yolo)
    assert normswap.inspect(yolo.model).norms
