"""Forward passes that meta tensors alone cannot make."""

import sys
from collections.abc import Iterator

import pytest
import torch
import torchvision
from nets import Net, conv
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import normswap
from normswap.networks.recognition import is_batch_norm

DETECTION = [
    "fasterrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
    "retinanet_resnet50_fpn",
]


@pytest.mark.parametrize("name", DETECTION)
def test_detection(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    result = normswap.convert(model)
    assert not any(is_batch_norm(module) for module in result.modules())


def test_frozen_backbone_keeps_its_function() -> None:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    model = torchvision.models.detection.FasterRCNN(backbone, num_classes=5).eval()
    norms = sum(is_batch_norm(module) for module in model.modules())
    result = normswap.convert(model)
    assert norms == 20
    assert sum(isinstance(module, nn.GroupNorm) for module in result.modules()) == 20
    outputs = result([torch.rand(3, 64, 64), torch.rand(3, 80, 64)])
    assert len(outputs) == 2


def test_pairs_of_images() -> None:
    result = normswap.convert(torchvision.models.get_model("raft_large", weights=None).eval())
    assert isinstance(normswap.plan_of(result).inputs["tuple"], list)


class ThroughNumpy(Net):
    """Leaves torch on the way, which only real tensors survive."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.a(x))
        scale = float(y.detach().numpy().ndim)
        return self.bn2(self.b(y)) * scale


def test_falls_back_to_real_tensors() -> None:
    model = ThroughNumpy(a=conv(), b=conv(8), bn1=nn.BatchNorm2d(8), bn2=nn.BatchNorm2d(8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = normswap.convert(model, example_input=torch.zeros(2, 3, 8, 8))
    assert [entry.fed_by for entry in normswap.plan_of(result).norms] == [("a",), ("b",)]
    assert normswap.check(result, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_stops_after_the_last_norm_are_reported() -> None:
    class Breaks(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.a(x))
            raise ValueError("no boxes")
            return y

    plan = normswap.inspect(Breaks(a=conv(), bn=nn.BatchNorm2d(8)))
    assert plan.warnings == ("the forward pass stopped after the last norm (ValueError: no boxes)",)


@pytest.mark.parametrize("wrap", ["autocast", "checkpoint"])
def test_autocast_and_checkpointing_inside(wrap: str) -> None:
    class Wrapped(Net):
        def forward(self, x: Tensor) -> Tensor:
            if wrap == "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return self.bn(self.a(x))
            return torch.utils.checkpoint.checkpoint(lambda t: self.bn(self.a(t)), x, use_reentrant=False)

    plan = normswap.inspect(Wrapped(a=conv(), bn=nn.BatchNorm2d(8)))
    assert [entry.action for entry in plan.entries] == ["standardize", "group_norm"]


class FixedPoint(Net):
    """Iterates until data says that it has converged."""

    def forward(self, x: Tensor) -> Tensor:
        h, change = x, torch.tensor(1.0)
        while change > 1e-3:
            new = x + 0.1 * torch.tanh(self.bn(self.conv(h)))
            h, change = new, (new - h).abs().max()
        return h


def test_a_loop_that_ends_by_data_is_traced_with_data() -> None:
    model = FixedPoint(conv=conv(8), bn=nn.BatchNorm2d(8)).eval()
    result = normswap.convert(model, example_input=torch.randn(2, 8, 8, 8))
    assert isinstance(result.bn, nn.GroupNorm)


class Forever(Net):
    """Goes on whatever it sees, and takes no error for an answer."""

    def forward(self, x: Tensor) -> Tensor:
        while (x.abs() >= 0).all():
            try:
                x = self.bn(self.conv(x)) if self.reached else x + 1
            except Exception:
                continue
        return x


@pytest.mark.parametrize("reached", [True, False])
def test_a_loop_that_never_ends_is_named(reached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normswap.tracing.dispatch.MOST_CALLS", 2_000)
    model = Forever(conv=conv(8), bn=nn.BatchNorm2d(8))
    model.reached = reached  # type: ignore[assignment]
    with pytest.raises(normswap.NeedsExampleInput, match=r"it loops on, waiting for values of data\); pass another ex"):
        normswap.convert(model, example_input=torch.randn(2, 8, 8, 8))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.bn = nn.Embedding(20, 8), nn.Conv1d(8, 16, 3), nn.BatchNorm1d(16)

    def forward(self, ids: Tensor) -> Tensor:
        assert 0 <= int(ids.min()) < int(ids.max()) < 20
        return self.bn(self.conv(self.table(torch.tensor(ids.tolist())).transpose(1, 2)))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.gru = nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16), nn.GRU(16, 8)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).permute(2, 0, 1)
        return self.gru(nn.utils.rnn.pack_padded_sequence(y, lengths))[1]  # type: ignore[no-any-return]


class Masked(nn.Module):
    """Takes another way where a mask is full."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(8, 16, 1), nn.BatchNorm1d(16)
        self.full, self.other = nn.Conv1d(8, 16, 1), nn.BatchNorm1d(16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.other(self.full(x)) if mask.all() else self.bn(self.conv(x)) * mask.unsqueeze(1)


VALUES = {
    "tokens": (Tokens, torch.arange(20).view(2, 10)),
    "lengths": (Packed, (torch.randn(8, 2, 9).transpose(0, 1), torch.tensor([9, 5]))),
    "mask": (Masked, (torch.randn(2, 8, 9), torch.arange(18).view(2, 9) > 3)),
}


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize(("kind", "example"), VALUES.values(), ids=VALUES)
def test_values_of_an_example_count(kind: type[nn.Module], example: object, inplace: bool) -> None:
    model = kind()
    plan = normswap.inspect(model, example_input=example)
    assert [entry.shape is None for entry in plan.norms] == [False, True][: len(plan.norms)]
    result = normswap.convert(model, example_input=example, inplace=inplace)
    checks = normswap.check(result, None if inplace else model, example_input=example)
    assert checks, checks
    assert "n/a" not in str(normswap.check(result, example_input=example).rows[2:4])


def test_values_that_are_made_up_prove_nothing() -> None:
    class Full(Packed):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            assert lengths.max() == x.shape[2]
            return super().forward(x, lengths)

    result = normswap.convert(Full(), example_input=VALUES["lengths"][1])
    row = normswap.check(result).rows[-1]
    assert (row.name, row.ok) == ("runs", None)
    assert row.detail.endswith("its whole numbers are made up, pass example_input=")


class Keeping(Net):
    """A hook, a list and a buffer hold what autograd made."""

    def __init__(self) -> None:
        super().__init__(conv=conv(), bn=nn.BatchNorm2d(8))
        self.skips, self.state = list[Tensor](), {"last": torch.zeros(1)}
        self.register_buffer("membrane", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        self.skips, self.state["last"], self.membrane = [y, y], y, y
        return y


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
def test_networks_that_keep_activations(inplace: bool) -> None:
    model, x = Keeping(), torch.randn(2, 3, 8, 8)
    kept = model(x)
    result = normswap.convert(model, example_input=x, inplace=inplace)
    assert model.skips[0] is model.state["last"] is model.membrane is kept
    assert torch.equal(result.skips[0], kept)  # type: ignore[index]
    assert result.skips[0] is result.skips[1]  # type: ignore[index]
    assert normswap.check(result)


READERS = {
    "zeros_like": lambda s, y: s.bn(y) + torch.zeros_like(y),
    "empty_like": lambda s, y: s.bn(y) + torch.empty_like(y).fill_(1),
    "rand_like": lambda s, y: s.bn(y) * torch.rand_like(y),
    "new_ones": lambda s, y: s.bn(y) * y.new_ones(y.shape),
    "new_full": lambda s, y: s.bn(y) * y.new_full((1,), 2.0),
    "isnan": lambda s, y: y * 0 if torch.isnan(y).any() else s.bn(y),
    "isinf": lambda s, y: s.bn(y) if not torch.isinf(y).any() else y,
}
LOOKING = {"its own values": lambda s, y: s.bn(y) * y, "its mean": lambda s, y: s.bn(y) - y.mean().exp()}


@pytest.mark.parametrize(
    ("rest", "changes"),
    [*((rest, True) for rest in READERS.values()), *((rest, False) for rest in LOOKING.values())],
    ids=[*READERS, *LOOKING],
)
def test_reading_a_shape_is_no_reading(rest: object, changes: bool) -> None:
    kind = type("Reads", (Net,), {"forward": lambda self, x: rest(self, self.conv(x))})  # type: ignore[operator]
    plan = normswap.inspect(kind(conv=conv(), bn=nn.BatchNorm2d(8)), example_input=torch.randn(2, 3, 9, 9))
    assert plan.convs[0].changes == changes, plan.convs[0].reason
    assert plan.norms[0].shape is not None


def nested(depth: int) -> nn.Module:
    model: nn.Module = nn.Sequential(conv(), nn.BatchNorm2d(8))
    for _ in range(depth):
        model = nn.Sequential(model)
    return model


def test_modules_nest_as_deeply_as_the_network_runs() -> None:
    model, x = nested(150), torch.zeros(2, 3, 8, 8)
    model(x)
    limit = sys.getrecursionlimit()
    assert normswap.convert(model, example_input=x)(x).shape == (2, 8, 8, 8)
    assert sys.getrecursionlimit() == limit


@pytest.fixture
def pythons_own_limit() -> Iterator[None]:
    """Have the depth of calls that Python starts with: torch's compilers raise it for the whole process."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(limit)


@pytest.mark.usefixtures("pythons_own_limit")
def test_modules_nested_too_deeply_are_named() -> None:
    with pytest.raises(normswap.UnsupportedModel, match="Sequential nests its modules too deeply for Python; flatten"):
        normswap.convert(nested(1500), example_input=torch.zeros(2, 3, 8, 8))


def test_a_forward_that_exits_is_named() -> None:
    class Exits(Net):
        def forward(self, x: Tensor) -> Tensor:
            sys.exit(3)

    with pytest.raises(normswap.NeedsExampleInput, match=r"SystemExit: 3\); pass another example_input="):
        normswap.convert(Exits(conv=conv(), bn=nn.BatchNorm2d(8)), example_input=torch.zeros(2, 3, 8, 8))
