"""Modes are set without running code of the user's that is not shown to set modes and nothing else."""

import copy
from typing import Any, Self

import pytest
import timm
import torch
from nets import Direct, conv
from torch import Tensor, nn

import normswap
from normswap.networks.copying import in_mode
from normswap.networks.overrides import sets_modes_alone

RUNS: list[str] = []


class Trainer:
    def fit(self) -> None:
        RUNS.append("fit")


def launch(model: nn.Module) -> None:
    RUNS.append("launch")
    torch.save({}, "/nonexistent/folder/file")


class TrainsByName(Direct):
    def train(self, data: Any = None, **options: Any) -> None:  # type: ignore[override]
        RUNS.append("by name")


class TrainsByMode(Direct):
    def train(self, mode: bool = True) -> "TrainsByMode":
        if mode:
            launch(self)
        return super().train(mode)


class TrainsByTrainer(Direct):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__(**parts)
        self.trainer, self.trainers = Trainer(), [Trainer()]

    def train(self, mode: bool = True) -> "TrainsByTrainer":
        self.trainer.fit()
        return self


class TrainsByList(TrainsByTrainer):
    def train(self, mode: bool = True) -> "TrainsByList":
        for trainer in self.trainers:
            run = trainer.fit
            run()
        return self


class Imports(Direct):
    def train(self, mode: bool = True) -> "Imports":
        import subprocess  # noqa: F401

        RUNS.append("import")
        return self


class Evaluates(Direct):
    def eval(self) -> "Evaluates":
        launch(self)
        return self


class ByWayOfAnother(Direct):
    def train(self, mode: bool = True) -> "ByWayOfAnother":
        self.start()
        return self

    def start(self) -> None:
        launch(self)


class Inside(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.inner = TrainsByName(**parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


HARMFUL = [
    TrainsByName,
    TrainsByMode,
    TrainsByTrainer,
    TrainsByList,
    Imports,
    Evaluates,
    ByWayOfAnother,
    Inside,
]


@pytest.mark.parametrize("kind", HARMFUL, ids=lambda kind: kind.__name__)
def test_nothing_of_the_users_is_run(kind: type[nn.Module]) -> None:
    RUNS.clear()
    model = kind(conv=conv(), bn=nn.BatchNorm2d(8))
    normswap.inspect(model)
    converted = normswap.convert(model)
    checks = normswap.check(converted, model)
    assert checks, str(checks)
    assert RUNS == []
    flags = {module.training for module in in_mode(model, False).modules()}
    assert (flags, RUNS) == ({False}, [])


class Caches(Direct):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__(**parts)
        self.kept: dict[str, Tensor] = {}
        self.training_code = True

    def train(self, mode: bool = True) -> "Caches":
        super().train(mode)
        self.training_code = mode
        if mode and self.kept:
            self.kept.clear()
        return self


class Freezes(Direct):
    stages = 1

    @torch.no_grad()
    def train(self, mode: bool = True) -> "Freezes":
        super().train(mode)
        self.freeze()
        for module in self.modules():
            if mode and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def freeze(self) -> None:
        if self.stages > 0 and any(p.requires_grad for p in self.conv.parameters()):  # type: ignore[union-attr]
            self.conv.eval()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [Caches, Freezes], ids=lambda kind: kind.__name__)
def test_what_sets_modes_alone_is_run(kind: type[nn.Module]) -> None:
    model = kind(conv=conv(), bn=nn.BatchNorm2d(8))
    assert sets_modes_alone(model)
    in_mode(model, False)
    in_mode(model, True)
    assert model.training
    if isinstance(model, Caches):
        assert not in_mode(model, False).training_code
    else:
        assert not model.bn.training  # type: ignore[union-attr]


def test_timms_caches_are_dropped() -> None:
    model = timm.create_model("levit_128s").eval()
    model(torch.zeros(1, 3, 224, 224))
    caches = [m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache")]
    assert all(caches)
    in_mode(model, True)
    assert not any(m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache"))


def test_a_train_put_on_a_module_is_not_run() -> None:
    model = Direct(conv=conv(), bn=nn.BatchNorm2d(8)).eval()
    model.bn.train = lambda mode=True: launch(model)  # type: ignore[union-attr,method-assign]
    RUNS.clear()
    in_mode(model, True)
    assert model.bn.training  # type: ignore[union-attr]
    assert RUNS == []


class RefusesToTrain(nn.BatchNorm2d):
    """Made for inference alone."""

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise RuntimeError("inference only")
        return super().train(mode)


def test_a_network_that_refuses_a_mode_is_looked_at_in_both() -> None:
    """Its error came through `convert`; the network itself is left in the mode that it was in."""
    model = Direct(conv=conv(), bn=RefusesToTrain(8)).eval()
    assert in_mode(copy.deepcopy(model), True).bn.training  # type: ignore[union-attr]
    converted = normswap.convert(model, example_input=torch.zeros(2, 3, 8, 8))
    assert isinstance(converted.bn, nn.GroupNorm)
    assert not any(module.training for module in (*model.modules(), *converted.modules()))
