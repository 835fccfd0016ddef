"""Files that run without normswap."""

import json
from collections.abc import Callable
from pathlib import Path

import badnets
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from click.testing import CliRunner
from nets import warm
from torch import nn

import normswap
from normswap.cli.app import cli


def small() -> nn.Module:
    torch.manual_seed(0)
    return normswap.convert(warm(timm.create_model("resnet18")), example_input=torch.randn(2, 3, 64, 64))


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    return small()


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize(("opset", "native"), [(21, True), (18, False)])
def test_onnx(converted: nn.Module, tmp_path: Path, opset: int, native: bool) -> None:
    exported = normswap.export(converted, tmp_path / "net.onnx", opset=opset)
    assert exported.dynamic == ("batch", "height", "width")
    assert exported.compared == ((1, 3, 64, 64), (1, 3, 96, 96), (3, 3, 64, 64), (3, 3, 96, 96))
    assert exported.difference <= 1e-5
    assert ("GroupNormalization" in operators(tmp_path / "net.onnx")) is native
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == opset
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_torch_program_runs_at_other_sizes(converted: nn.Module, tmp_path: Path) -> None:
    normswap.export(converted, tmp_path / "net.pt2", to="torch")
    program = torch.export.load(str(tmp_path / "net.pt2")).module()
    images = torch.randn(5, 3, 80, 112)
    torch.testing.assert_close(program(images), converted.eval()(images), rtol=1e-4, atol=1e-5)
    assert not any("ws_gain" in name for name, _ in program.named_parameters())


def test_a_fixed_size_stays_fixed(tmp_path: Path) -> None:
    exported = normswap.export(normswap.convert(timm.create_model("levit_128s")), tmp_path / "net.onnx")
    assert exported.dynamic == ("batch",)
    assert exported.compared == ((1, 3, 224, 224), (3, 3, 224, 224))


def test_outputs_in_a_dict(tmp_path: Path) -> None:
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    example = torch.randn(2, 3, 64, 64)
    exported = normswap.export(normswap.convert(warm(model), example_input=example), tmp_path / "net.onnx")
    assert "batch" in exported.dynamic
    assert exported.difference <= 1e-5


class Off(nn.Module):
    """Answers otherwise in a file than in Python: the difference an export must not let through."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) + (1e-3 if torch.compiler.is_exporting() else 0.0)


class Untraceable(Off):
    """Reads a value in Python."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) * float(x.detach().sum() > 0)


@pytest.mark.parametrize(("build", "message"), [(Off, "is off by"), (Untraceable, "cannot be traced by torch.export")])
@pytest.mark.parametrize("to", ["torch", "onnx"])
def test_failures_leave_the_old_file(build: Callable[[], nn.Module], message: str, to: str, tmp_path: Path) -> None:
    path = tmp_path / "net"
    path.write_text("old")
    model = normswap.convert(build(), example_input=torch.randn(2, 3, 16, 16))
    with pytest.raises(normswap.ExportFailed, match=message):
        normswap.export(model, path, to=to)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_bad_options_are_named(converted: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in ((({"to": "tflite"}), "not one of 'onnx', 'torch'"), ({"opset": 12}, "17 to 23")):
        with pytest.raises(normswap.InvalidOption, match=message):
            normswap.export(converted, tmp_path / "net", **options)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(normswap.InvalidOption, match=r"pip install onnx onnxscript onnxruntime, or .*'\.\[onnx\]'"):
        normswap.export(converted, tmp_path / "net")
    monkeypatch.undo()
    with pytest.raises(normswap.ExportFailed, match="cannot be written"):
        normswap.export(converted, tmp_path / "missing" / "net", to="torch")


class Scaled(nn.Module):
    """A network with an argument that is no tensor, which a plan does not record."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor, scale: object) -> torch.Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def test_inputs_that_the_plan_does_not_record_are_asked_for(tmp_path: Path) -> None:
    result = normswap.convert(Scaled(), example_input=(torch.zeros(2, 3, 8, 8), object()))
    with pytest.raises(normswap.NeedsExampleInput, match="it held more than tensors; pass example_input="):
        normswap.export(result, tmp_path / "net.pt2", to="torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", ["compile", "trace", "export"])
def test_folded_networks_are_traced_whole(converted: nn.Module, way: str) -> None:
    folded = normswap.fold(converted).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        if way == "compile":
            other = torch.compile(folded, fullgraph=True, backend="aot_eager")
        elif way == "trace":
            other = torch.jit.trace(folded, images)
        else:
            other = torch.export.export(folded, (images,)).module()
        torch.testing.assert_close(other(images), converted.eval()(images), rtol=1e-4, atol=1e-5)


def test_command_line(tmp_path: Path) -> None:
    normswap.save(normswap.convert(timm.create_model("test_resnet")), tmp_path / "OUT")
    result = CliRunner().invoke(cli, ["export", str(tmp_path / "OUT"), "--to", "torch", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["difference"] <= 1e-5
    assert (tmp_path / "OUT.pt2").is_file()
    result = CliRunner().invoke(cli, ["export", str(tmp_path / "no"), "-o", str(tmp_path / "net.onnx")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "config.json" in result.stderr
    assert not (tmp_path / "net.onnx").exists()


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return normswap.convert(badnets.trained(badnets.small()), example_input=badnets.X).eval()


def test_an_older_opset_for_runtimes_without_group_norm(tiny: nn.Module, tmp_path: Path) -> None:
    exported = normswap.export(tiny, tmp_path / "net.onnx", opset=17)
    assert [own.version for own in onnx.load(tmp_path / "net.onnx").opset_import] == [17]
    assert "GroupNormalization" not in operators(tmp_path / "net.onnx")
    assert exported.dynamic == ("batch", "height", "width")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 20, 24)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), tiny(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["torch", "onnx"])
def test_sizes_are_fixed_where_asked_for(tiny: nn.Module, to: str, tmp_path: Path) -> None:
    exported = normswap.export(tiny, tmp_path / "net", to=to, static=True)
    assert (exported.dynamic, exported.compared) == ((), ((2, 3, 16, 16),))
    if to == "onnx":
        shape = onnx.load(tmp_path / "net").graph.input[0].type.tensor_type.shape
        assert [axis.dim_value for axis in shape.dim] == [2, 3, 16, 16]


@pytest.mark.parametrize("opset", [17, 21])
def test_openvino_runs_what_was_exported(tiny: nn.Module, opset: int, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    normswap.export(tiny, tmp_path / "net.onnx", opset=opset)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # by default it computes in bfloat16 where the processor can
    model = openvino.Core().compile_model(str(tmp_path / "net.onnx"), "CPU", exact)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(torch.from_numpy(model(images.numpy())[0]), tiny(images), rtol=1e-4, atol=1e-5)
