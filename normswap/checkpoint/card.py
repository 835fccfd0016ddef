"""The README.md that goes with a checkpoint: where it is from, what was done, what was checked, how to load it."""

from collections import Counter
from typing import Any

from normswap.texts import plain, yaml_scalar

TEMPLATE = """---
library_name: {library}
tags:
- normswap
{tags}{front}---
# {title}, {without}

{title} with {what},
made with normswap {version}. {trains}

## How to load it

```python
{load}
```

## What was done

| | |
|---|---|
| source | {source} |
| groups | {groups} |
| weight standardization | {forms} |
| affine values | {affine} |
| formula | {formula} |

## What was checked

{checks}
"""
AFFINE = {"match": "matched to the running statistics", "copy": "copied"}


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
    checks = (block.get("checks") or {}).get("checks", [])
    return TEMPLATE.format(
        library="timm" if _is_timm(config) else "pytorch",
        front=_front(config),
        title=plain(source["name"]) if source else "A network",
        tags="- group-norm\n- weight-standardization\n" if norms or not frozen else "",
        without="without BatchNorm" if norms or not frozen else "with frozen BatchNorm",
        what=f"GroupNorm in place of BatchNorm ({len(norms)} layers) and weight-standardized convolutions "
        f"({sum(forms.values())} layers)"
        if norms or not frozen
        else f"fixed statistics in every BatchNorm ({frozen} layers)",
        version=plain(str(block["versions"]["normswap"])),
        trains=_how_it_trains(entries),
        load=_how_to_load(config, repository),
        source=plain(f"{source['name']} of {source['registry']}") if source else "a network of its author's own",
        groups=", ".join(
            f"{count} norms of {g} groups" if g else f"{count} scales" for g, count in groups.most_common()
        ),
        forms=", ".join(f"{count} convolutions {plain(str(form))}" for form, count in sorted(forms.items())) or "none",
        affine=" and ".join(sorted({AFFINE[e["affine"]] for e in norms if e.get("affine") in AFFINE})) or "-",
        formula=plain(f"`{block['weight_standardization']}`") if forms else "-",
        checks="\n".join(plain(f"- {row['name']}: {row['detail']}") for row in checks) or "Nothing was checked.",
    )


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


def _is_timm(config: dict[str, Any]) -> bool:
    source = config["normswap"]["source"]
    return source is not None and source["registry"] == "timm"


def _front(config: dict[str, Any]) -> str:
    """Return the card's own metadata: license and base model of weights that were learned."""
    block, license_name = config["normswap"], config.get("pretrained_cfg", {}).get("license")
    front = f"license: {yaml_scalar(license_name)}\n" if license_name else ""
    learned = any(e.get("affine") == "match" or e.get("ws") == "adaptive" for e in block["plan"]["entries"])
    if learned and block.get("base_model"):
        front += f"base_model: {yaml_scalar(block['base_model'])}\n"
    return front


def _how_to_load(config: dict[str, Any], repository: str | None) -> str:
    place = f"hf-hub:{repository}" if repository else "PATH"
    if config["normswap"]["source"] is None:
        return f'import normswap\n\nmodel = normswap.load("{place}", model=YourNetwork())'
    lines = f'import normswap\n\nmodel = normswap.load("{place}", num_classes=10)'
    if not _is_timm(config):
        return lines
    create = f'timm.create_model("{place if repository else "local-dir:PATH"}", pretrained=True, num_classes=10)'
    hint = "works without normswap" if config["architecture"] != "normswap" else "after import normswap"
    return f"{lines}\n\nimport timm\n\nmodel = {create}  # {hint}"
