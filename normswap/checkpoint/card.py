"""The README.md that goes with a checkpoint: where it is from, what was done, what was checked, how to load it."""

import html
import re
from collections import Counter
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from normswap.texts import plain

BODY = """# {title}, {without}

{title} with {what},
made with normswap {version}. {trains}

## How to install and load it

{install}

```python
{load}
```

## What was done

| | |
|---|---|
| source | {source} |
| weights | {weights} |
| groups | {groups} |
| weight standardization | {forms} |
| affine values | {affine} |
| formula | {formula} |

## What was checked

{checks}
"""
TAGS = ["normswap", "group-norm", "weight-standardization"]
AFFINE = {"match": "matched to the running statistics", "copy": "copied"}
MARKUP = re.compile(r"([\\`*\[\]|~])")


def model_card(config: dict[str, Any], repository: str | None = None) -> str:
    """Return the model card of a checkpoint from its configuration.

    Args:
        config: What config.json holds.
        repository: ``user/name`` of the checkpoint on the hub; by default the card speaks of a folder.
    """
    block = config["normswap"]
    source, entries = block["source"], block["plan"]["entries"]
    norms = [e for e in entries if e["action"] in ("group_norm", "scale")]
    frozen = sum(e["action"] == "freeze" for e in entries)
    forms = Counter(e["ws"] for e in entries if e["action"] == "standardize")
    groups = Counter(e.get("groups") for e in norms)
    body = BODY.format(
        title=_data(source["name"]) if source else "A network",
        without="without BatchNorm" if norms or not frozen else "with frozen BatchNorm",
        what=f"GroupNorm in place of BatchNorm ({len(norms)} layers) and weight-standardized convolutions "
        f"({sum(forms.values())} layers)"
        if norms or not frozen
        else f"fixed statistics in every BatchNorm ({frozen} layers)",
        version=_data(block["versions"]["normswap"]),
        trains=_how_it_trains(entries),
        install=_how_to_install(config),
        load=_how_to_load(config, repository),
        source=_data(f"{source['name']} of {source['registry']}") if source else "a network of its author's own",
        weights=_whose_weights(config),
        groups=", ".join(
            f"{count} norms of {_data(g)} groups" if g else f"{count} scales" for g, count in groups.most_common()
        ),
        forms=", ".join(f"{count} convolutions {_data(form)}" for form, count in sorted(forms.items())) or "none",
        affine=" and ".join(sorted({AFFINE[e["affine"]] for e in norms if e.get("affine") in AFFINE})) or "-",
        formula=_data(block["weight_standardization"]) if forms else "-",
        checks=_what_was_checked((block.get("checks") or {}).get("checks", [])),
    )
    front = _front(config, tags=TAGS if norms or not frozen else TAGS[:1])
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n{body}"))


def _data(text: object) -> str:
    """Return text from networks and files so that it means nothing to Markdown."""
    return MARKUP.sub(r"\\\1", html.escape(plain(str(text)), quote=False))


def _how_it_trains(entries: list[dict[str, Any]]) -> str:
    norms = [e for e in entries if e.get("role") == "norm"]
    if made := sum(e["action"] == "freeze" and not e.get("by_user") for e in norms):
        return f"It trains at batch size 1; {made} BatchNorms have the statistics they had, in train mode, too."
    kept = Counter(e["action"] for e in norms if e.get("by_user"))
    if live := kept["keep"]:
        return f"{live} norms were kept as they were: in train mode they look at the batch."
    if frozen := kept["freeze"]:
        return f"It trains at batch size 1; {frozen} BatchNorms were kept, with the statistics they have."
    return "It trains at batch size 1 and needs no running statistics."


def _whose_weights(config: dict[str, Any]) -> str:
    """Return where the weights are from, as far as that is known."""
    block, stated = config["normswap"], config.get("pretrained_cfg", {})
    match block.get("weights"):
        case "pretrained":
            heads = (config.get("num_classes"), stated.get("num_classes"))
            new = "; its head is new, and random" if None not in heads and heads[0] != heads[1] else ""
            return (f"those of {_data(base)}" if (base := _base_model(config)) else "those that came with it") + new
        case "random":
            return "random: it was never trained"
        case "file":
            return "from a file of its author's"
    return "its author's"


def _base_model(config: dict[str, Any]) -> str | None:
    """Return the repository that the weights were learned in, where they are those."""
    block = config["normswap"]
    return block.get("base_model") if block.get("weights") == "pretrained" else None


def _what_was_checked(checks: list[dict[str, Any]]) -> str:
    """Return a list of what was judged, and of what could not be."""
    said = {True: list[str](), False: list[str](), None: list[str]()}
    for row in checks:
        said[row["ok"]].append(f"- {_data(row['name'])}: {_data(row['detail'])}")
    parts = said[True] or ["Nothing was checked." if not said[False] else "No check held."]
    for title, rows in (("Failed:", said[False]), ("Could not be judged:", said[None])):
        parts += ["", title, "", *rows] if rows else []
    return "\n".join(parts)


def _is_timm(config: dict[str, Any]) -> bool:
    source = config["normswap"]["source"]
    return source is not None and source["registry"] == "timm"


def _needs_normswap(config: dict[str, Any]) -> bool:
    return bool(not _is_timm(config) or config["architecture"] == "normswap")


def _front(config: dict[str, Any], *, tags: list[str]) -> ModelCardData:
    """Return the card's metadata; license and base model are those of weights that came with them."""
    stated = {"base_model": _base_model(config)}
    if config["normswap"].get("weights") == "pretrained":
        stated["license"] = config.get("pretrained_cfg", {}).get("license")
    said = {key: plain(str(value)) for key, value in stated.items() if value}
    return ModelCardData(library_name="timm" if _is_timm(config) else "pytorch", tags=list(tags), **said)  # type: ignore[arg-type]


def _how_to_install(config: dict[str, Any]) -> str:
    if not _needs_normswap(config):
        return "`pip install timm` is enough; in a clone of normswap, `pip install .` gives its tools, too."
    return "In a clone of normswap: `pip install .`, which brings torch and timm."


def _how_to_load(config: dict[str, Any], repository: str | None) -> str:
    place = f"hf-hub:{repository}" if repository else "PATH"
    if config["normswap"]["source"] is None:
        return f'import normswap\n\nmodel = normswap.load("{place}", model=YourNetwork())'
    lines = (
        f'import normswap\n\nmodel = normswap.load("{place}")\n'
        f'model = normswap.load("{place}", num_classes=10)  # with a new head'
    )
    if not _is_timm(config):
        return lines
    create = f'timm.create_model("{place if repository else "local-dir:PATH"}", pretrained=True, num_classes=10)'
    hint = "after import normswap" if _needs_normswap(config) else "works without normswap"
    return f"{lines}\n\nimport timm\n\nmodel = {create}  # {hint}"
