"""Training loops of other packages, and what they do to a network between steps."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from equality import off
from nets import SMALL_IMAGES as X
from nets import moved
from timm.models import load_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")


def test_skorch_clones_fits_and_predicts(trained: nn.Module) -> None:
    skorch, base = pytest.importorskip("skorch"), pytest.importorskip("sklearn.base")
    options = {"max_epochs": 2, "lr": 0.01, "verbose": 0, "train_split": None, "criterion": nn.CrossEntropyLoss}
    net = base.clone(skorch.NeuralNetClassifier(trained, **options)).initialize()
    assert torch.equal(net.module_.eval()(X), trained(X))
    net.fit(X, torch.arange(2))
    assert net.history[-1]["train_loss"] < net.history[0]["train_loss"]
    assert any("ws_gain" in name for name in net.module_.state_dict())
    moved_on = dict(net.module_.named_parameters())
    assert not any(torch.equal(moved_on[name], before) for name, before in trained.named_parameters())


def test_accelerate_trains_saves_dispatches_and_offloads(trained: nn.Module, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    before = trained(X).detach()
    model, optimizer = accelerator.prepare(trained.train(), torch.optim.SGD(trained.parameters(), lr=0.01))
    accelerator.backward(model(X).square().sum())
    assert all(bool(p.grad.any()) for p in trained.parameters())  # type: ignore[union-attr]
    optimizer.step()
    expected = model.eval()(X).detach()
    assert off(expected, before) > 1e-3
    accelerator.save_model(model, str(tmp_path))
    with init_empty_weights():
        empty = copy.deepcopy(trained)
    assert torch.equal(load_checkpoint_and_dispatch(empty, str(tmp_path), device_map={"": "cpu"})(X), expected)
    assert torch.equal(cpu_offload(copy.deepcopy(trained), execution_device=torch.device("cpu"))(X), expected)


def test_timm_saves_an_average_and_loads_it(trained: nn.Module, tmp_path: Path) -> None:
    optimizer, average = torch.optim.SGD(trained.parameters(), lr=0.1), ModelEmaV3(trained, decay=0.5)
    trained.train()(X).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        before = average.module.eval()(X)
        average.update(trained)
        expected = average.module(X)
    assert off(before, expected) > 1e-3
    folder = str(tmp_path)
    saver = CheckpointSaver(trained, optimizer, model_ema=average, checkpoint_dir=folder, recovery_dir=folder)
    saver.save_checkpoint(0, 0.5)
    other = moved(copy.deepcopy(trained)).eval()
    load_checkpoint(other, str(tmp_path / "last.pth.tar"), use_ema=True, weights_only=False)
    with torch.no_grad():
        assert torch.equal(other(X), expected)
