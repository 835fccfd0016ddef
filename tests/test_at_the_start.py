"""What a newcomer types: what cannot be is said at the start, in one line, with the exit code that it has."""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from badnets import trained
from refusals import SHAPE, files, must_be_one_line, must_refuse, run
from torch import nn

import normswap
from normswap.checkpoint.folder import claimed

SMALL = ("badnets:small", "--input", SHAPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start") / "OUT"
    assert run("convert", "test_resnet", "--no-pretrained", "-o", out, "-q")[0] == 0
    return out


@pytest.fixture
def _no_model_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where anything is opened or computed before what can be known is said."""

    def opened(*_: Any, **__: Any) -> None:
        pytest.fail("a network was opened")

    monkeypatch.setattr("normswap.sources.opening.open_model", opened)
    monkeypatch.setattr("normswap.demo.comparison.run", opened)
    monkeypatch.setattr("normswap.checkpoint.loading.apply", opened)


EARLY: dict[str, tuple[tuple[str, ...], int, str]] = {
    "two group counts": (("convert", "resnet18", "--groups", "8", "--group-size", "4"), 2, "^groups= says nothing"),
    "images for a dry run": (("convert", "resnet18", "--dry-run", "--calibrate", "."), 2, "leave --calibrate out"),
    "workers without images": (("convert", "resnet18", "--workers", "2"), 2, "--workers is for images; pass --calib"),
    "made-up and real": (("convert", "resnet18", "--synthetic", "--calibrate", "."), 2, "--synthetic is for want of"),
    "no images": (("convert", "resnet18", "--calibrate", "no", "-o", "OUT"), 1, "^no: no such folder; --calibrate"),
    "no weights": (("convert", "resnet18", "--weights", "no.pth", "-o", "OUT"), 1, "^no.pth: no such file; pass the"),
    "output a file": (("convert", "resnet18", "-o", "taken"), 1, "^taken: cannot be written \\(File exists\\); choose"),
    "output below a file": (("convert", "resnet18", "-o", "taken/OUT"), 1, "taken/OUT: cannot be written \\(Not a dir"),
    "two inputs": (("inspect", "resnet18", "--input", "1,2", "--input-from", "a:b"), 2, "both say what the"),
    "input from nowhere": (("inspect", "resnet18", "--input-from", "nowhere:x"), 2, "No module named 'nowhere'; name"),
    "input of no file": (("inspect", "resnet18", "--input-from", "no.pt"), 2, "^--input-from no.pt: no such file; it"),
    "plot in no folder": (("inspect", "resnet18", "--plot", "no/a.png"), 2, "there is no folder no; make it first"),
    "plot of no image": (("inspect", "resnet18", "--plot", "a.xyz"), 2, "'xyz' is no image format; there are .*png"),
    "plot a folder": (("demo", "--plot", "."), 2, "--plot \\.: Is a directory; write it elsewhere"),
    "plot of a demo": (("demo", "--plot", "no/a.png"), 2, "there is no folder no; make it first"),
    "opset of a program": (("export", "OUT", "--to", "torch", "--opset", "18"), 2, "opset=18 is for to='onnx'; leave"),
    "export into no folder": (("export", "OUT", "-o", "no/a.onnx"), 1, "cannot be written \\(No such file or direct"),
    "export onto a folder": (("export", "OUT", "-o", "."), 1, "cannot be written \\(Is a directory\\); choose another"),
    "export of nothing": (("export", "nowhere"), 1, "^nowhere: holds no config.json; pass a folder that normswap"),
    "export again": (("export", "OUT", "-o", "taken"), 1, "^taken: would be replaced; pass --force or another -o"),
    "check of nothing": (("check", "nowhere", "--against", "resnet18"), 1, "^nowhere: holds no config.json; pass a"),
}  # fmt: skip


@pytest.mark.usefixtures("_no_model_opens")
@pytest.mark.parametrize(("arguments", "code", "message"), EARLY.values(), ids=EARLY)
def test_what_can_be_known_is_said_before_anything_is_opened(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    must_refuse(code, message.replace("^", "^normswap: "), *arguments, folder=tmp_path)


MISSING = {
    "plot": ("matplotlib", ("inspect", "resnet18", "--plot", "a.png"), "pip install matplotlib, or .*'\\.\\[plot\\]'"),
    "demo": ("matplotlib", ("demo", "--plot", "a.png"), "--plot needs matplotlib; pip install matplotlib, or in a clo"),
    "onnx": ("onnx", ("export", "OUT"), "needs onnx; pip install onnx, or in a clone .* pip install '\\.\\[onnx\\]'"),
    "runtime": ("onnxruntime", ("export", "OUT"), "needs onnxruntime; pip install onnxruntime, or in a clone"),
}


@pytest.mark.usefixtures("_no_model_opens")
@pytest.mark.parametrize(("package", "arguments", "message"), MISSING.values(), ids=MISSING)
def test_packages_that_are_missing(
    package: str, arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == package else found(name, *a))
    monkeypatch.chdir(tmp_path)
    must_refuse(2, message, *arguments, folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "flag"),
    [(("--groups", "8"), "--groups"), (("--exclude", "*"), "--exclude"), (("--no-pretrained",), "--pretrained"),
     (("--ws", "auto"), "--ws"), (("--num-classes", "3"), "--num-classes"), (("--input", SHAPE), "--input"),
     (("--input-from", "a:b"), "--input-from")],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_options_that_cannot_apply_to_a_converted_folder(options: tuple[str, ...], flag: str, folder: Path) -> None:
    must_refuse(2, f"is converted, and {flag} is for what is not; leave it out", "inspect", folder, *options,
                folder=folder)  # fmt: skip
    assert run("inspect", folder)[0] == 0


def test_a_plan_that_leaves_all_alone_says_so() -> None:
    code, stdout, stderr = run("inspect", *SMALL, "--exclude", "*")
    assert code == 3
    assert "0 of 2 norms become GroupNorm" in stdout
    assert stderr == (
        "normswap: all 2 norms of Sequential are excluded (1: excluded by '*'); change include= or exclude=\n"
    )


def test_what_was_found_is_printed_before_the_drawing_fails(tmp_path: Path) -> None:
    code, stdout, stderr = run("inspect", "test_resnet", "--no-pretrained", "--plot", tmp_path / "a.png")
    assert code == 2
    assert "norms become GroupNorm" in stdout
    assert "no norm is trained" in stderr
    code, stdout, stderr = run("inspect", "test_resnet", "--no-pretrained", "--plot", tmp_path / "a.png", "--json")
    data = json.loads(stdout)  # one object
    assert (code, stderr, data["error"]["exit_code"]) == (2, "", 2)
    assert data["plan"]["entries"]


JSON: dict[str, tuple[tuple[str, ...], int, str, str]] = {
    "no model": (("inspect", "resnet51"), 2, "UnknownModel", "did you mean resnet51q"),
    "no option": (("inspect", "resnet18", "--gruops", "8"), 2, "NoSuchOption", "--gruops"),
    "no number": (("inspect", "resnet18", "--groups", "many"), 2, "BadParameter", "'many' is not a valid integer, nor"),
    "no argument": (("inspect",), 2, "MissingParameter", "MODEL"),
    "no verb": (("convret",), 2, "NoSuchCommand", "convret"),
    "nothing to do": (("inspect", *SMALL, "--exclude", "*"), 3, "NothingToConvert", "all 2 norms"),
    "no folder": (("check", "nowhere"), 1, "CheckpointError", "holds no config.json"),
}


@pytest.mark.parametrize(("arguments", "code", "kind", "message"), JSON.values(), ids=JSON)
def test_errors_are_one_json_object(arguments: tuple[str, ...], code: int, kind: str, message: str) -> None:
    found, stdout, stderr = run(*arguments, "--json")
    error = json.loads(stdout)["error"]
    assert (found, stderr, error["type"], error["exit_code"]) == (code, "", kind, code)
    assert message in error["message"]


def test_names_that_are_offered_are_offered_once() -> None:
    for name in ("resnet5", "resnet51", "mobilenet_v3", "densenet12", "vgg16bn"):
        _, _, stderr = run("inspect", name)
        offered = stderr.partition("did you mean ")[2].rstrip("?\n").split(", ")
        assert offered[0]
        assert len(offered) == len(set(offered)), stderr


def test_export_asks_before_it_replaces(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "net.pt2"
    arguments = ("export", folder, "--to", "TORCH", "-o", target)
    assert run(*arguments)[0] == 0
    before = target.stat().st_mtime_ns
    must_refuse(1, "net.pt2: would be replaced; pass --force or another -o", *arguments, folder=tmp_path)
    assert run(*arguments, "--force")[0] == 0
    assert target.stat().st_mtime_ns > before


def test_the_second_of_two_converts_is_told_at_the_start(tmp_path: Path) -> None:
    holds, done = threading.Event(), threading.Event()

    def first() -> None:
        with claimed(tmp_path / "OUT"):
            holds.set()
            done.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    holds.wait(60)
    try:
        message = "OUT: another process is making a checkpoint for it; wait for that, or pass another -o"
        must_refuse(1, message, "convert", *SMALL, "-o", tmp_path / "OUT", folder=tmp_path)
        assert run("convert", *SMALL, "-o", tmp_path / "OTHER", "-q")[0] == 0
    finally:
        done.set()
        thread.join()
    assert run("convert", *SMALL, "-o", tmp_path / "OUT", "-q")[0] == 0


def test_a_folder_that_fills_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normswap.checkpoint import making

    other, usual = tmp_path / "OTHER", making.check
    assert run("convert", *SMALL, "-o", other, "-q")[0] == 0

    def slow(*arguments: Any, **more: Any) -> Any:
        checks = usual(*arguments, **more)
        other.rename(tmp_path / "OUT")  # as another machine would
        return checks

    monkeypatch.setattr(making, "check", slow)
    code, _, stderr = run("convert", *SMALL, "--groups", "2", "-o", tmp_path / "OUT")
    assert code == 1
    must_be_one_line(stderr, "OUT: holds a checkpoint already; pass --force or another -o")
    assert normswap.Plan.from_dict(json.loads((tmp_path / "OUT" / "config.json").read_text())["normswap"]["plan"]
                                   ).options.groups == 32  # fmt: skip
    assert sorted(files(tmp_path / "OUT")) == ["README.md", "config.json", "model.safetensors"]


class Two(nn.Module):
    """Takes an image and a table by keyword, of numbers that mean something."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.names = nn.Embedding(5, 8)

    def forward(self, image: torch.Tensor, name: torch.Tensor) -> torch.Tensor:
        return self.body(image).mean((2, 3)) + self.names(name)


def two() -> nn.Module:
    torch.manual_seed(0)
    return trained(Two())


def keywords() -> dict[str, torch.Tensor]:
    return {"image": torch.randn(1, 3, 16, 16), "name": torch.tensor([3])}


def arguments() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 3, 16, 16), torch.tensor([3])


def nothing() -> None:
    return None


@pytest.fixture(params=["function", "tuple", "pt", "safetensors"])
def example(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    from safetensors.torch import save_file

    if request.param == "pt":
        torch.save(arguments(), tmp_path / "example.pt")
    if request.param == "safetensors":
        save_file(keywords(), tmp_path / "example.safetensors")
    names = {"function": "test_at_the_start:keywords", "tuple": "test_at_the_start:arguments"}
    return names.get(request.param, str(tmp_path / f"example.{request.param}"))


def test_networks_of_the_user_in_every_verb(example: str, tmp_path: Path) -> None:
    own, out = "test_at_the_start:two", tmp_path / "OUT"
    given = ("--input-from", example)
    for typed in (
        ("inspect", own, *given),
        ("convert", own, *given, "--no-synthetic", "-o", out),
        ("check", out, "--model", own, *given),
        ("check", out, "--against", own),
        ("export", out, "--model", own, *given, "--to", "torch", "-o", tmp_path / "a.pt2"),
        ("export", out, "--model", own, "--to", "onnx", "-o", tmp_path / "a.onnx"),
    ):
        code, _, stderr = run(*typed)
        assert (code, stderr) == (0, ""), (typed, stderr)
    expected = normswap.load(out, model=two())
    images, names = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 4])
    program = torch.export.load(str(tmp_path / "a.pt2")).module()
    keyword = example.endswith((":keywords", ".safetensors"))
    found = program(image=images, name=names) if keyword else program(images, names)
    torch.testing.assert_close(found, expected(images, names), rtol=1e-4, atol=1e-5)


def test_a_network_without_a_name_is_asked_for(tmp_path: Path) -> None:
    assert run("convert", *SMALL, "-o", tmp_path / "OUT", "-q")[0] == 0
    for verb in ("check", "export"):
        must_refuse(1, "OUT: names no registered model; pass .* or --model package.module:factory",
                    verb, tmp_path / "OUT", folder=tmp_path)  # fmt: skip
    must_refuse(2, "--input-from test_at_the_start:nothing gives nothing; it must be a tensor, a tuple of arguments",
                "check", tmp_path / "OUT", "--input-from", "test_at_the_start:nothing", folder=tmp_path)  # fmt: skip


@pytest.mark.parametrize("to", ["torch", "onnx"])
def test_one_sample_does_not_fix_the_number_of_samples(to: str, tmp_path: Path) -> None:
    import onnxruntime

    model = normswap.convert(two(), example_input=keywords())
    exported = normswap.export(model, tmp_path / "net", to=to, example_input=keywords())
    assert "batch" in exported.dynamic
    images, names = torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 4, 3])
    if to == "torch":
        found = torch.export.load(str(tmp_path / "net")).module()(image=images, name=names)
    else:
        session = onnxruntime.InferenceSession(str(tmp_path / "net"))
        feed = dict(zip([entry.name for entry in session.get_inputs()], (images.numpy(), names.numpy()), strict=True))
        found = torch.from_numpy(session.run(None, feed)[0])
    torch.testing.assert_close(found, model.eval()(images, names), rtol=1e-4, atol=1e-5)


def test_a_network_of_one_sample_alone_is_exported_as_it_is(tmp_path: Path) -> None:
    class One(Two):
        def forward(self, image: torch.Tensor, name: torch.Tensor) -> torch.Tensor:
            return super().forward(image, name).view(8)

    model = normswap.convert(trained(One()), example_input=keywords())
    exported = normswap.export(model, tmp_path / "net", to="torch", example_input=keywords())
    assert "batch" not in exported.dynamic
    assert exported.compared[0][0] == 1
