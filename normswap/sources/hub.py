"""Pretrained weights and checkpoints from the hub: whether they can be had, told within seconds, and fetching them."""

import os
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import torch

from normswap.errors import CheckpointError, WeightsUnavailable, first_line

HUB = "hf-hub:"
"""What the name of a checkpoint on the hub begins with, as timm writes it."""

WAYS_ON = "pass --weights FILE for a checkpoint you have, or --no-pretrained for random weights"


def must_be_reachable(name: str, url: str, hub_id: str | None) -> None:
    """Fail within seconds where neither cache nor network has the weights; the hub's client retries for minutes."""
    if hub_id:
        import huggingface_hub
        from huggingface_hub import constants

        files = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin", "open_clip_model.safetensors")
        if any(isinstance(huggingface_hub.try_to_load_from_cache(hub_id, file), str) for file in files):
            return
        offline, url = constants.HF_HUB_OFFLINE, constants.ENDPOINT
        if offline:
            raise WeightsUnavailable(f"HF_HUB_OFFLINE is set and the weights of {name} are not cached; {WAYS_ON}")
    elif os.path.exists(
        os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(urllib.parse.urlparse(url).path))
    ):
        return
    if not _answers(url):
        host = urllib.parse.urlparse(url).hostname
        raise WeightsUnavailable(f"the pretrained weights of {name} cannot be had: {host} does not answer; {WAYS_ON}")


def fetch(name: str, files: Sequence[str]) -> Path:
    """Return the folder, in the hub's cache, with these files of the checkpoint ``hf-hub:user/name[@revision]``.

    Raises:
        CheckpointError: There is none, or the hub does not answer.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(files)))
    except Exception as error:  # besides its own the hub's client raises those of the HTTP library it happens to use
        raise CheckpointError(f"{name}: {first_line(error)}; check the name and the network") from error


def _answers(url: str, timeout: float = 4.0) -> bool:
    """Tell whether the host, or the proxy in front of it, accepts a connection within `timeout` seconds.

    The time-outs of the hub's client are for each of its retries, and a name server has none.
    """
    parts = urllib.parse.urlparse(urllib.request.getproxies().get(urllib.parse.urlparse(url).scheme) or url)
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    answered: list[bool] = []

    def connect() -> None:
        try:
            with socket.create_connection(address, timeout=timeout):
                answered.append(True)
        except OSError:
            answered.append(False)

    attempt = threading.Thread(target=connect, daemon=True)  # a name server that hangs has no time-out of its own
    attempt.start()
    attempt.join(timeout)
    return bool(answered and answered[0])
