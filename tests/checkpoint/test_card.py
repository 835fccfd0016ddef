"""The card of a checkpoint says what was done, what was checked and how to load it."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard

from normswap.checkpoint.card import model_card
from normswap.cli.app import cli

NORM = {"name": "bn", "role": "norm", "action": "group_norm", "groups": 4, "affine": "match"}
CONV = {"name": "conv", "role": "conv", "action": "standardize", "ws": "adaptive"}
LEFT = {"name": "spare", "role": "norm", "action": "keep"}
TIMM = {"registry": "timm", "name": "resnet18", "arguments": {}}


def config(source: dict[str, Any] | None = None, *, weights: str | None = None, **top: Any) -> dict[str, Any]:
    """Return a configuration as `save` writes it, as far as cards read it."""
    entries = [NORM, CONV, LEFT]
    return {
        "architecture": "normswap",
        "normswap": {
            "source": source,
            "weights": weights,
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
    assert "| formula | (w - mean) / std |" in card
    assert "- shapes: 9 module outputs keep their shape" in card
    unchecked = config()
    unchecked["normswap"]["checks"] = None
    assert "Nothing was checked." in model_card(unchecked)


WEIGHTS = {
    "pretrained": "| weights | those of timm/resnet18 |",
    "random": "| weights | random: it was never trained |",
    "file": "| weights | from a file of its author's |",
    None: "| weights | its author's |",
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_base_model_and_license_are_those_of_the_weights(weights: str | None) -> None:
    card = model_card(config(TIMM, weights=weights, pretrained_cfg={"license": "mit", "num_classes": 1000}))
    metadata = ModelCard(card).data.to_dict()
    assert (metadata.get("base_model") == "timm/resnet18") is (weights == "pretrained")
    assert (metadata.get("license") == "mit") is (weights == "pretrained")
    assert WEIGHTS[weights] in card
    assert metadata["tags"] == ["normswap", "group-norm", "weight-standardization"]


def test_checkpoints_that_do_not_say_whose_weights_they_hold_claim_nothing() -> None:
    data = config(TIMM, pretrained_cfg={"license": "mit"})
    del data["normswap"]["weights"]
    assert not {"license", "base_model"} & set(ModelCard(model_card(data)).data.to_dict())


def test_a_new_head_is_named() -> None:
    told = "those of timm/resnet18; its head is new, and random"
    for classes in (1000, 5):
        card = model_card(config(TIMM, weights="pretrained", num_classes=classes, pretrained_cfg={"num_classes": 1000}))
        assert (told in card) is (classes == 5)


def test_what_could_not_be_judged_is_not_listed_as_checked() -> None:
    data = config()
    data["normswap"]["checks"]["checks"] += [
        {"name": "gradients", "ok": None, "detail": "no weights"},
        {"name": "finite", "ok": False, "detail": "NaN"},
    ]
    checked, _, rest = model_card(data).partition("## What was checked")[2].partition("Failed:")
    assert checked.strip() == "- shapes: 9 module outputs keep their shape"
    failed, _, not_judged = rest.partition("Could not be judged:")
    assert (failed.strip(), not_judged.strip()) == ("- finite: NaN", "- gradients: no weights")


@pytest.mark.parametrize(
    ("data", "said"),
    [(config(), "In a clone of normswap: `pip install .`"), (config(TIMM), "In a clone of normswap: `pip install .`"),
     (config(TIMM, architecture="resnet18"), "`pip install timm` is enough")],
    ids=["own", "timm", "timm alone"],
)  # fmt: skip
def test_how_to_install_it(data: dict[str, Any], said: str) -> None:
    assert said in model_card(data).partition("## How to install and load it")[2].partition("```")[0]


def convert(out: Path, *arguments: str) -> str:
    result = CliRunner().invoke(cli, ["convert", *arguments, "-q", "-o", str(out)])
    assert result.exit_code == 0, result.stderr
    return (out / "README.md").read_text(encoding="utf-8")


def test_random_weights_and_weights_of_a_file_claim_no_license(tmp_path: Path) -> None:
    trained = timm.create_model("test_resnet")
    for _ in range(2):
        trained(torch.randn(4, 3, 96, 96))
    torch.save(trained.state_dict(), tmp_path / "mine.pth")
    assert trained.pretrained_cfg["license"]
    random = convert(tmp_path / "RANDOM", "test_resnet", "--no-pretrained")
    mine = convert(tmp_path / "MINE", "test_resnet", "--weights", str(tmp_path / "mine.pth"), "--no-synthetic")
    own = convert(tmp_path / "OWN", "badnets:small", "--input", "2,3,16,16", "--no-synthetic")
    for card, said in ((random, "random: it was never trained"), (mine, "from a file of"), (own, "its author's")):
        assert said in card
        assert not {"license", "base_model"} & set(ModelCard(card).data.to_dict())
