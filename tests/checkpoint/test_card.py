"""The card of a checkpoint says what was done, what was checked and how to load it."""

from typing import Any

import pytest

from normswap.checkpoint.card import model_card

NORM = {"name": "bn", "role": "norm", "action": "group_norm", "groups": 4, "affine": "match"}
CONV = {"name": "conv", "role": "conv", "action": "standardize", "ws": "adaptive"}
LEFT = {"name": "spare", "role": "norm", "action": "keep"}
TIMM = {"registry": "timm", "name": "resnet18", "arguments": {}}


def config(source: dict[str, Any] | None = None, *, learned: bool = True, **top: Any) -> dict[str, Any]:
    """Return a configuration as `save` writes it, as far as cards read it."""
    entries = [NORM, CONV, LEFT] if learned else [{**NORM, "affine": "copy"}, {**CONV, "ws": "standard"}]
    return {
        "architecture": "normswap",
        "normswap": {
            "source": source,
            "plan": {"entries": entries},
            "versions": {"normswap": "0.1.0"},
            "weight_standardization": "(w - mean) / std",
            "base_model": "timm/resnet18",
            "checks": {"checks": [{"name": "shapes", "ok": True, "detail": "9 module outputs keep their shape"}]},
        },
        **top,
    }


LOADED: dict[str, tuple[dict[str, Any], str | None, tuple[str, ...]]] = {
    "own network": (config(), None, ('normswap.load("PATH", model=YourNetwork())', "library_name: pytorch")),
    "timm, a folder": (
        config(TIMM),
        None,
        ('timm.create_model("local-dir:PATH", pretrained=True, num_classes=10)  # after import normswap',
         "library_name: timm"),
    ),
    "timm, on the hub": (
        config(TIMM),
        "user/net",
        ('normswap.load("hf-hub:user/net", num_classes=10)', 'timm.create_model("hf-hub:user/net", pretrained=True'),
    ),
    "timm alone": (config(TIMM, architecture="resnet18"), None, ("# works without normswap",)),
}  # fmt: skip


@pytest.mark.parametrize(("data", "repository", "said"), LOADED.values(), ids=LOADED)
def test_how_to_load_it(data: dict[str, Any], repository: str | None, said: tuple[str, ...]) -> None:
    card = model_card(data, repository)
    assert all(line in card for line in said)
    assert ("import timm" in card) is (data["normswap"]["source"] is not None)


def test_what_was_done_and_checked() -> None:
    card = model_card(config(TIMM))
    assert "# resnet18, without BatchNorm" in card
    assert "(1 layers) and weight-standardized convolutions (1 layers)" in card
    assert "| formula | `(w - mean) / std` |" in card
    assert "- shapes: 9 module outputs keep their shape" in card
    unchecked = config()
    unchecked["normswap"]["checks"] = None
    assert "Nothing was checked." in model_card(unchecked)


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "fresh"])
def test_only_weights_that_were_learned_name_a_base_model(learned: bool) -> None:
    card = model_card(config(TIMM, learned=learned, pretrained_cfg={"license": "mit"}))
    assert ("base_model: timm/resnet18\n" in card) is learned
    assert "license: mit\n" in card
