"""Files and copies that other packages make of a converted network, and classes that come back from the hub."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from equality import off
from huggingface_hub import PyTorchModelHubMixin
from nets import SMALL_IMAGES as X
from nets import moved, small_resnet
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.func import functional_call, grad, stack_module_state, vmap

import normswap

pytestmark = pytest.mark.filterwarnings("ignore")


@torch.no_grad()
def test_safetensors(trained: nn.Module, tmp_path: Path) -> None:
    save_model(trained, str(tmp_path / "net.safetensors"))
    other = moved(copy.deepcopy(trained))
    assert off(other(X), trained(X)) > 0.01
    load_model(other, tmp_path / "net.safetensors")
    assert torch.equal(other(X), trained(X))


@torch.no_grad()
def test_distributed_checkpoints(trained: nn.Module, tmp_path: Path) -> None:
    expected = trained(X)
    dcp.save({"model": get_model_state_dict(trained)}, checkpoint_id=tmp_path, no_dist=True)
    state = {"model": get_model_state_dict(moved(trained))}
    assert off(trained(X), expected) > 0.01
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(trained, state["model"])
    assert torch.equal(trained(X), expected)


def test_exported_programs(trained: nn.Module) -> None:
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=8)}}
    program, buffer = torch.export.export(trained, (X,), dynamic_shapes=shapes), io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    again = torch.export.load(buffer).module()
    assert torch.equal(again(X), trained(X))
    assert again(torch.cat([X, X])).shape == (4, 5)


class Classifier(nn.Module, PyTorchModelHubMixin):
    """A class that converts what it builds, where it is given a plan."""

    def __init__(self, plan: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.net = small_resnet()
        if plan is not None:
            normswap.apply(self.net, normswap.Plan.from_dict(plan), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def test_a_hub_class_that_applies_a_plan_comes_back_bit_for_bit(trained: nn.Module, tmp_path: Path) -> None:
    model = Classifier(plan=normswap.plan_of(trained).to_dict())
    model.net.load_state_dict(trained.state_dict())
    model.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    assert torch.equal(again(X), trained(X))


class Unaware(nn.Module, PyTorchModelHubMixin):
    """A class that builds BatchNorm, whatever it is given."""

    def __init__(self, classes: int = 5, plan: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.net = small_resnet()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Aware(Unaware):
    """One that loads in a way of its own."""

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "Aware":
        model = normswap.convert(cls(), example_input=X)
        load_model(model, Path(model_id) / "model.safetensors")
        return model.eval()


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy], ids=["itself", "copy"])
def test_a_hub_class_that_would_bring_batch_norm_back_is_not_saved(copied: Any, tmp_path: Path) -> None:
    model = moved(copied(normswap.convert(Unaware(), example_input=X)))
    with pytest.raises(normswap.CheckpointError, match=r"^Unaware.from_pretrained would build BatchNorm again: "):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, config={"plan": normswap.plan_of(model).to_dict()})
    assert normswap.Plan.from_dict(json.loads((tmp_path / "config.json").read_text())["plan"]) == normswap.plan_of(
        model
    )
    again = Unaware()
    normswap.apply(again, normswap.plan_of(model), inplace=True)
    load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(again.eval()(X), model.eval()(X))


def test_a_hub_class_that_loads_in_its_own_way_is_saved(tmp_path: Path) -> None:
    model = moved(normswap.convert(Aware(), example_input=X)).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(Aware.from_pretrained(tmp_path)(X), model(X))


def test_ensembles_and_gradients_of_each_sample(trained: nn.Module) -> None:
    models = [trained, moved(copy.deepcopy(trained))]
    parameters, buffers = stack_module_state(models)
    outputs = vmap(lambda p, b: functional_call(copy.deepcopy(trained).to("meta"), (p, b), (X,)))(parameters, buffers)
    for ours, model in zip(outputs, models, strict=True):
        assert off(ours, model(X)) < 1e-5
    own, constants = dict(trained.named_parameters()), dict(trained.named_buffers())
    each = vmap(grad(lambda p, x: functional_call(trained, (p, constants), (x[None],)).sum()), in_dims=(None, 0))(
        own, X
    )
    trained(X).sum().backward()
    for name, parameter in own.items():
        torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-4)
