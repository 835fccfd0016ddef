"""Upload to, and load from, a small stand-in for the hub's HTTP interface."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import nn

import normswap
from normswap.cli.app import cli

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Keeps what is committed to it; repositories are made on request, for one token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, data: Any = None, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        content = json.dumps(data).encode() if data is not None else body
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer secret":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repositories.setdefault(name, {})
            self.server.private[name] = "private" in (asked.get("visibility"), asked.get("private") and "private")
            return self.answer(200, {"url": f"{self.server.address}/{name}"})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(content)["files"]]  # fmt: skip
            return self.answer(200, {"files": files})
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                self.server.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT,
                                 "success": True})  # fmt: skip

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":
            name, files = "/".join(parts[2:4]), self.server.repositories.get("/".join(parts[2:4]))
            if files is None:
                return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if "tree" in parts:
                tree = [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()]
                return self.answer(200, tree)
            return self.answer(200, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": p} for p in files]})
        content = self.server.repositories.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
        if content is None:
            return self.answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.answer(200, headers={"ETag": etag, "X-Repo-Commit": COMMIT}, body=content)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    torch.manual_seed(0)
    return normswap.convert(timm.create_model("test_resnet", num_classes=10)).eval()


@pytest.fixture(scope="module")
def folder(converted: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checks = normswap.check(converted)
    return normswap.save(converted, tmp_path_factory.mktemp("hub") / "OUT", checks=checks)


LOAD = """
import sys, normswap, timm, torch
x = torch.ones(1, 3, 64, 64)
for model in (timm.create_model("hf-hub:user/net", pretrained=True).eval(), normswap.load("hf-hub:user/net")):
    print(model(x).sum().item())
"""


def test_push_then_load_from_the_hub(hub: Hub, converted: nn.Module, folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": "secret", "HF_HOME": str(tmp_path)}
    pushed = subprocess.run(
        [sys.executable, "-m", "normswap", "push", str(folder), "user/net", "--private"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert pushed.returncode == 0, pushed.stderr
    assert f"pushed to {hub.address}/user/net" in pushed.stdout
    stored = hub.repositories["user/net"]
    assert hub.private == {"user/net": True}
    assert set(stored) == {"README.md", "config.json", "model.safetensors"}
    assert stored["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    loaded = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, env=environment)
    assert loaded.returncode == 0, loaded.stderr
    expected = converted(torch.ones(1, 3, 64, 64)).sum().item()
    assert [float(line) for line in loaded.stdout.splitlines()] == pytest.approx([expected] * 2, rel=1e-4)


def test_dry_run_shows_the_card_and_sends_nothing(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(cli, ["push", str(folder), "user/net", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert hub.repositories == {}
    for said in (
        "| source | test_resnet.r160_in1k of timm |",
        "| groups | 5 norms of 24 groups, 5 norms of 32 groups",
        "| weight standardization | 15 convolutions standard |",
        "- batch independence: ",
        'timm.create_model("hf-hub:user/net", pretrained=True, num_classes=10)  # after import normswap',
        "would push to user/net; nothing was sent",
    ):
        assert said in result.stdout
    data = json.loads(CliRunner().invoke(cli, ["push", str(folder), "user/net", "--dry-run", "--json"]).stdout)
    assert data["url"] is None
    assert data["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr("normswap.checkpoint.hub_upload.HfApi", lambda **_: pytest.fail("talked to the hub"))
    normswap.push(folder, "user/net", dry_run=True)


def test_refused(hub: Hub, folder: Path) -> None:
    with pytest.raises(normswap.HubError, match=r"user/net: .*401.*; check the name and your access token"):
        normswap.push(folder, "user/net", endpoint=hub.address, token="wrong")
    assert hub.repositories == {}


def test_hub_that_does_not_answer(folder: Path) -> None:
    result = CliRunner().invoke(cli, ["push", str(folder), "no name"])
    assert result.exit_code == 2
    assert "'no name' is no repository; write user/name" in result.stderr
    with pytest.raises(normswap.HubError, match="check the name and your access token"):
        normswap.push(folder, "user/net", endpoint="http://127.0.0.1:9", token="secret")


def test_only_whole_checkpoints_are_pushed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(normswap.CheckpointError, match="holds no config.json"):
        normswap.push(tmp_path, "user/net", dry_run=True)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(normswap.CheckpointError, match="does not belong to config.json beside it"):
        normswap.push(tmp_path, "user/net", dry_run=True)


@pytest.mark.parametrize(
    "name", ["name", "a/b/c", "user/na me", "-a/b", "user/x..y", "user/" + "x" * 100, "user/name.git", "../x", "user/",
             "a/\x1b[31m", ""],
    ids=ascii,
)  # fmt: skip
def test_names_that_the_hub_does_not_take_are_told_without_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(normswap.InvalidOption, match="is no repository; write user/name") as caught:
        normswap.push(tmp_path, name, endpoint="http://127.0.0.1:9")
    assert str(caught.value).isprintable()
