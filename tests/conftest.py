"""One thread per test process, one seed per test, an empty hub, and how many examples hypothesis draws."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # workers that share cores slow each other down many times over

PROXIES = ("http_proxy", "https_proxy", "all_proxy")

COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=30, derandomize=True, **COMMON)
settings.register_profile("thorough", max_examples=400, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start from a hub that is not switched off, an empty cache and no token, whatever the environment says."""
    home = tmp_path_factory.getbasetemp() / "hub"
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")) or name.lower() in PROXIES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "token"))


@pytest.fixture
def initialized_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Types of the devices on which convolutions are initialized from now on."""
    devices = list[str]()
    usual = torch.nn.Conv2d.reset_parameters

    def noted(conv: torch.nn.Conv2d) -> None:
        devices.append(conv.weight.device.type)
        usual(conv)

    monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", noted)
    return devices
