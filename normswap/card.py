"""The README.md that goes with a checkpoint."""

from typing import Any

TEMPLATE = """---
library_name: {library}
tags:
- normswap
- group-norm
- weight-standardization
{front}---
# {title}, without BatchNorm

{title} with GroupNorm in place of BatchNorm ({norms} layers) and weight-standardized convolutions ({convs} layers),
made with normswap {version}. It trains at batch size 1 and needs no running statistics.

```python
import normswap

{load}
```

{checks}"""


def model_card(config: dict[str, Any]) -> str:
    """Return the model card of a checkpoint from its configuration."""
    block = config["normswap"]
    source, entries = block["source"], block["plan"]["entries"]
    pretrained = config.get("pretrained_cfg", {})
    front = f"license: {pretrained['license']}\n" if pretrained.get("license") else ""
    learned = any(entry.get("affine") == "match" or entry.get("ws") == "adaptive" for entry in entries)
    if source is not None and learned and block.get("base_model"):
        front += f"base_model: {block['base_model']}\n"
    title = source["name"] if source else "A network"
    load = 'model = normswap.load("PATH")' if source else 'model = normswap.load("PATH", model=YourNetwork())'
    checks = block.get("checks")
    rows = [f"- {row['name']}: {row['detail']}" for row in checks["checks"]] if checks else []
    return TEMPLATE.format(
        library="timm" if source and source["registry"] == "timm" else "pytorch",
        front=front,
        title=title,
        norms=sum(e["action"] in ("group_norm", "scale") for e in entries),
        convs=sum(e["action"] == "standardize" for e in entries),
        version=block["versions"]["normswap"],
        load=load,
        checks="\n".join(["What was checked:", "", *rows, ""]) if rows else "",
    )
