"""State dicts as training tools leave them."""

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import normswap
from normswap.errors import CheckpointError
from normswap.sources.state_dicts import fill, made_whole, read_state_dict


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = normswap.convert(timm.create_model("test_resnet", num_classes=4))
    return normswap.save(model, tmp_path_factory.mktemp("weights") / "OUT")


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def averaged(model: nn.Module) -> dict[str, Any]:
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


def inner_compiled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("layer1.", "layer1._orig_mod."): tensor for name, tensor in state.items()}


FORMS: dict[str, tuple[Any, str]] = {
    "bare": (lambda s, _: s, ""),
    "lightning": (
        lambda s, _: {"epoch": 1, "state_dict": prefixed(s, "model.") | {"loss.weight": torch.ones(2)}},
        "took 'state_dict'; stripped 'model.' from {n} names and left 1 out",
    ),
    "ddp": (lambda s, _: {"model": prefixed(s, "module.")}, "took 'model'; stripped 'module.' from {n} names"),
    "compile": (lambda s, _: prefixed(s, "_orig_mod."), "stripped '_orig_mod.' from {n} names"),
    "inner compile": (lambda s, _: inner_compiled(s), "stripped '_orig_mod.' from"),
    "ddp of compile": (
        lambda s, _: prefixed(s, "module._orig_mod."),
        "stripped '_orig_mod.' from {n} names; stripped 'module.' from {n} names",
    ),
    "averaged": (lambda _, m: averaged(m), "stripped 'module.' from {n} names and left 1 out"),
    "timm with ema": (
        lambda s, _: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s, "epoch": 3},
        "took 'state_dict_ema' rather than 'state_dict'",
    ),
    "opacus": (lambda s, _: prefixed(s, "_module."), "stripped '_module.' from {n} names"),
    "transformers": (lambda s, _: prefixed(s, "timm_model."), "stripped 'timm_model.' from {n} names"),
}


@pytest.mark.parametrize(("form", "said"), FORMS.values(), ids=FORMS)
def test_what_training_tools_leave_behind(form: Any, said: str, folder: Path, tmp_path: Path) -> None:
    tuned = normswap.load(folder)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.5)
    state = tuned.state_dict()
    torch.save(form(state, tuned), tmp_path / "last.ckpt")
    with pytest.warns(normswap.CheckpointAdapted) if said else _silence() as caught:
        loaded = normswap.load(folder, weights=tmp_path / "last.ckpt")
    if said:
        (warning,) = caught
        assert str(warning.message).startswith(f"{tmp_path / 'last.ckpt'}: {said.format(n=len(state))}")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    fresh = normswap.apply(timm.create_model("test_resnet", num_classes=4), folder / "config.json")
    fresh.load_state_dict(state, strict=True)


def _silence() -> Any:
    import warnings

    return warnings.catch_warnings(record=True)


def test_weights_of_another_network(folder: Path, tmp_path: Path) -> None:
    torch.save(prefixed(timm.create_model("test_efficientnet").state_dict(), "model."), tmp_path / "other.pth")
    with pytest.raises(normswap.CheckpointError, match=r"other.pth: does not fit \(bn1.bias is missing; \d+ names"):
        normswap.load(folder, weights=tmp_path / "other.pth")


def test_head_of_the_fine_tuned_size(folder: Path, tmp_path: Path) -> None:
    state = normswap.load(folder, num_classes=2).state_dict()
    torch.save(state, tmp_path / "two.pth")
    with pytest.raises(normswap.CheckpointError, match="with as many classes"):
        normswap.load(folder, weights=tmp_path / "two.pth")
    loaded = normswap.load(folder, num_classes=2, weights=tmp_path / "two.pth")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_objects_are_not_unpickled(folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hparams": Path("x")}, tmp_path / "objects.ckpt")
    with pytest.raises(normswap.CheckpointError, match="holds Python objects, not only tensors"):
        normswap.load(folder, weights=tmp_path / "objects.ckpt")


@pytest.mark.parametrize(("size", "like"), [(0x180, b"\x80"), (0x4B50, b"PK")], ids=["pickle", "zip"])
def test_safetensors_may_begin_as_other_files_do(size: int, like: bytes, tmp_path: Path) -> None:
    """The first bytes are the header's length, and one length in 256 looks like a pickle's first."""
    model, path = nn.Linear(3, 2), tmp_path / "w.safetensors"
    for filler in range(max(0, size - 300), size):
        save_file(model.state_dict(), path, metadata={"filler": "x" * filler})
        if path.read_bytes().startswith(like):
            break
    assert path.read_bytes().startswith(like)
    found = read_state_dict(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


class Noting(nn.Module):
    """Notes what it is given on loading, and under which version."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("a", "ab", "b")})
        self.empty = None
        self.register_buffer("passing", torch.zeros(1), persistent=False)
        self.noted: list[Any] = []

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        self.noted.append((sorted(state_dict), prefix, dict(local_metadata)))
        state_dict[f"{prefix}inner.b.weight"] = state_dict[f"{prefix}inner.b.weight"] + 1  # what children then get
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def get_extra_state(self) -> Tensor:
        return torch.ones(3)

    def set_extra_state(self, state: Tensor) -> None:
        self.noted.append(state.tolist())


class Whole(nn.Module):
    """Loads as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({name: -tensor for name, tensor in state_dict.items()}, *args, **kwargs)


def hooked() -> nn.Module:
    model = nn.Sequential(Noting(), nn.Linear(2, 2))
    model.register_load_state_dict_pre_hook(lambda module, state, *_: state.update({"1.bias": torch.full((2,), 5.0)}))
    model.register_load_state_dict_post_hook(lambda module, keys: module[0].noted.append(list(keys.missing_keys)))
    return model


def shared() -> nn.Module:
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, nn.Sequential(layer, nn.Linear(2, 2)))


@pytest.mark.parametrize("build", [Noting, Whole, hooked, shared], ids=lambda build: build.__name__)
def test_a_network_is_filled_as_torch_does_it(build: Any) -> None:
    torch.manual_seed(0)
    source, ours, theirs = build(), build(), build()
    state = source.state_dict()
    fill(ours, state, name="state")
    theirs.load_state_dict(state)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    for one, other in zip(ours.modules(), theirs.modules(), strict=True):
        assert getattr(one, "noted", None) == getattr(other, "noted", None)


def test_what_a_module_misses_on_loading_is_said() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_load_state_dict_pre_hook(lambda module, state, *_: state.pop("0.bias"))
    with pytest.raises(CheckpointError, match=r"state: does not fit \(0\.bias is missing\)"):
        fill(model, model.state_dict(), name="state")


def test_names_are_looked_at_as_often_as_there_are_modules() -> None:
    def looks(children: int) -> int:
        model, found = nn.Sequential(*(nn.Linear(1, 1) for _ in range(children))), 0
        state = model.state_dict()

        def count(_frame: Any, event: str, function: Any) -> None:
            nonlocal found
            found += event == "c_call" and function.__name__ in ("startswith", "removeprefix", "partition")

        sys.setprofile(count)
        try:
            fill(model, state, name="state")
        finally:
            sys.setprofile(None)
        return found

    assert looks(64) < 6 * looks(16)


class Tied(nn.Module):
    """A weight under two names and in a list, a table that no state dict holds, where it has one, and statistics."""

    def __init__(self, table: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.two.weight = self.one.weight
        self.listed = [self.one.weight, self.norm.running_mean]
        self.table = torch.ones(4) if table else None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_network_takes_the_memory_of_a_state_dict(device: str) -> None:
    state = {name: torch.rand(value.shape).to(value.dtype) for name, value in Tied().state_dict().items()}
    state["two.weight"] = state["one.weight"]
    state["two.bias"] = state["two.bias"].double()
    with torch.device(device):
        model = Tied()
    parameters = list(model.parameters())
    fill(model, state, name="x", take=True)
    assert [id(p) for p in model.parameters()] == list(map(id, parameters))
    assert model.one.weight is model.two.weight is model.listed[0]
    assert model.norm.running_mean is model.listed[1]
    assert model.one.bias.data_ptr() == state["one.bias"].data_ptr()
    assert model.two.bias.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype))
    assert all(parameter.requires_grad and type(parameter) is nn.Parameter for parameter in parameters)


def test_what_no_state_dict_holds_is_missed() -> None:
    state = Tied().state_dict()
    with torch.device("meta"):
        models = Tied(), Tied(table=True), Tied()
    models[2].act = lambda x: x  # type: ignore[assignment]
    assert [made_whole(model, state, name="x") for model in models] == [True, False, False]
    with pytest.raises(CheckpointError, match="x: does not fit"):
        made_whole(models[0], {}, name="x")


def test_tensors_of_one_memory_are_taken_apart() -> None:
    whole = torch.rand(2, 4)
    model = nn.ParameterList([torch.zeros(4), torch.zeros(4)])
    fill(model, {"0": whole[0], "1": whole[0]}, name="x", take=True)
    with torch.no_grad():
        model[0].zero_()
    assert bool(model[1].all())
