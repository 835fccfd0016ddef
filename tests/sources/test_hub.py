"""Whether pretrained weights can be had, and what is said where they cannot."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import normswap
from normswap.sources.hub import fetch, must_be_reachable


@pytest.fixture
def host() -> Iterator[str]:
    """Return the address of a host that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def silent() -> str:
    """Return the address of a host that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def cached(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put one file of the repository user/net into the hub's cache."""
    commit = folder / "models--user--net" / "snapshots" / ("a" * 40)
    commit.mkdir(parents=True)
    (commit / "model.safetensors").touch()
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))


WAYS_ON = "pass --weights FILE for a checkpoint you have, or --no-pretrained for random weights$"


@pytest.mark.parametrize("hub_id", ["user/net", None], ids=["hub", "url"])
def test_a_host_that_answers_is_enough(hub_id: str | None, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", host)
    must_be_reachable("net", f"{host}/net.pth", hub_id)


@pytest.mark.parametrize("hub_id", ["user/net", None], ids=["hub", "url"])
def test_a_host_that_does_not_answer_is_named(
    hub_id: str | None, silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", silent)
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    with pytest.raises(
        normswap.WeightsUnavailable,
        match=f"^the pretrained weights of net cannot be had: 127.0.0.1 does not answer; {WAYS_ON}",
    ):
        must_be_reachable("net", f"{silent}/net.pth", hub_id)


def test_where_there_is_a_proxy_it_is_the_one_that_answers(
    host: str, silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    monkeypatch.setenv("http_proxy", host)
    must_be_reachable("net", f"{silent}/net.pth", None)


def test_a_name_server_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()

    def hang(*_: object, **__: object) -> None:
        end.wait(60)
        raise TimeoutError

    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    monkeypatch.setattr("socket.create_connection", hang)
    monkeypatch.setattr("normswap.sources.hub._answers.__defaults__", (0.1,))
    started = time.monotonic()
    with pytest.raises(normswap.WeightsUnavailable, match=r"example\.org does not answer"):
        must_be_reachable("net", "https://example.org/net.pth", None)
    end.set()
    assert time.monotonic() - started < 30  # a bound on hanging, not a benchmark


@pytest.mark.parametrize("offline", [False, True])
def test_what_is_cached_needs_no_host(
    offline: bool, silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", silent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    cached(monkeypatch, tmp_path / "hub")
    must_be_reachable("net", "", "user/net")
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "net.pth").touch()
    must_be_reachable("net", f"{silent}/net.pth", None)


def test_a_hub_that_is_switched_off_is_not_asked(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", host)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        normswap.WeightsUnavailable, match=f"^HF_HUB_OFFLINE is set and the weights of net are not cached; {WAYS_ON}"
    ):
        must_be_reachable("net", "", "user/net")


def test_a_checkpoint_that_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(normswap.CheckpointError, match="^hf-hub:user/none@main: .*; check the name and the network$"):
        fetch("hf-hub:user/none@main", ["config.json"])
