"""What is published: types for users, and archives that hold what they should and say what is true."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml

import normswap

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

USER = """
import torch
from torch import nn

import normswap

model: nn.Module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
reveal_type(normswap.convert(model, groups=8))
reveal_type(normswap.inspect(model).norms[0].groups)
reveal_type(normswap.check(model).failed)
reveal_type(normswap.save(model, "OUT"))
reveal_type(normswap.load("OUT"))
error: normswap.NormswapError = normswap.InvalidOption("x")
normswap.convert(model, gruops=8)
normswap.convert(model, groups=[8])
normswap.convret(model)
"""
REVEALED = [
    "torch.nn.modules.module.Module",
    "int | None",
    "tuple[normswap.conversion.checks.Check, ...]",
    "pathlib.Path",
    "torch.nn.modules.module.Module",
]


def test_types_reach_the_files_of_users(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", ROOT / ".mypy_cache", "user.py"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    lines = found.stdout.split("\n")
    assert [re.sub(r'.*"(.*)"', r"\1", line) for line in lines if "note: Revealed" in line] == REVEALED, found.stdout
    errors = [line for line in lines if ": error: " in line]
    assert [int(line.split(":")[1]) for line in errors] == [14, 15, 16], found.stdout
    assert 'Unexpected keyword argument "gruops"' in errors[0]
    assert 'Module has no attribute "convret"' in errors[2]


FIRST_USE = """
import random

import numpy
import torch
from torch import nn

random.seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
before = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
import normswap

model = normswap.convert(model, example_input=torch.zeros(2, 3, 9, 9))
str(normswap.plan_of(model)), normswap.check(model), [getattr(normswap, name) for name in normswap.__all__]
assert before == (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist())
"""


def test_first_use_draws_no_random_number() -> None:
    found = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True)
    assert not found.returncode, found.stderr


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[zipfile.ZipFile, list[str]]:
    build = pytest.importorskip("hatchling.build")
    out, here = tmp_path_factory.mktemp("dist"), Path.cwd()
    os.chdir(ROOT)
    try:
        wheel, sdist = build.build_wheel(str(out)), build.build_sdist(str(out))
    finally:
        os.chdir(here)
    with tarfile.open(out / sdist) as archive:
        return zipfile.ZipFile(out / wheel), [name.partition("/")[2] for name in archive.getnames()]


def test_the_wheel_holds_the_package_alone_and_everything_once(archives: tuple[zipfile.ZipFile, list[str]]) -> None:
    wheel, _ = archives
    names = wheel.namelist()
    assert "normswap/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"normswap", f"normswap-{normswap.__version__}.dist-info"}
    contents = [wheel.read(name) for name in names if wheel.getinfo(name).file_size]
    assert len(contents) == len(set(contents))
    licenses = [name for name in names if "/licenses/" in name]
    assert {Path(name).name for name in licenses} == {"LICENSE", "digits-LICENSE.md"}


def test_the_sdist_holds_what_a_reader_needs(archives: tuple[zipfile.ZipFile, list[str]]) -> None:
    _, names = archives
    root = {
        "CHANGELOG.md",
        "CITATION.cff",
        "CODE_OF_CONDUCT.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "README.md",
        "SECURITY.md",
    }
    assert root <= set(names)
    assert "normswap/py.typed" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_metadata_is_true(archives: tuple[zipfile.ZipFile, list[str]]) -> None:
    wheel, _ = archives
    (path,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = HeaderParser().parsestr(wheel.read(path).decode())
    assert metadata["License-Expression"] == "Apache-2.0 AND CC-BY-4.0"
    here = f"Programming Language :: Python :: {sys.version_info.major}.{sys.version_info.minor}"
    named = [c for c in metadata.get_all("Classifier", []) if re.fullmatch(r".*Python :: 3\.\d+", c)]
    assert named == [here] or here not in named  # a later Python may try what is not promised for it yet
    assert "Programming Language :: Python :: 3.11" in named
    assert all(re.search(r"[<>=~]", need) for need in PROJECT["dependencies"]), "a dependency without a lower bound"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == normswap.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]), ids=lambda path: path.name
)
def test_workflows_and_forms_are_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_reports_are_asked_for_the_plan() -> None:
    for name in ("bug", "idea"):
        form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
        told = " ".join(str(field["attributes"].get("description", "")) for field in form["body"])
        assert "attach `normswap inspect --json MODEL" in told


def test_the_workflow_tries_every_python_that_is_promised_and_later_ones() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "password" not in str(release)
