"""Draw what equalization does and what it keeps: docs/equalization.png.

python benchmarks/equalization_picture.py      # needs the rows of benchmarks/equalization.py, and what it needs

Left: the mean that GroupNorm subtracts from each of 64 made-up images in one norm of MobileNetV2, in deviations of its
group, with filters as they are and equalized. Right: top-1 agreement against shrink, a line for each source of moments.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from equalization import mobilenetv2
from records import read
from torch import Tensor, nn

import normswap
from normswap.planning.synthetic import synthetic

NORM = "features.7.conv.0.1"
COLORS = {"as they are": "#999999", "filters": "#c59b2d", "made-up": "#2d7fc5", "128 images": "#c5402d"}


def group_means(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """Return the mean of every sample in the norm's one group, less the samples' mean, in the group's deviations."""
    seen: list[Tensor] = []
    norm = model.get_submodule(NORM)
    handle = norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(1)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    values = torch.cat(seen)
    means = values.mean(1)
    return (means - means.mean()) / values.std()


def main() -> None:
    """Draw both panels."""
    model = mobilenetv2()
    batches = list(synthetic((3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1, 1.2))
    for row, (label, equal) in enumerate((("filters as they are", False), ("equalized", True))):
        converted = normswap.convert(model, groups=1, shrink=10, batches="synthetic", equalize=equal)
        means = group_means(converted, batches)
        left.scatter(means, torch.full_like(means, -row) + 0.25 * torch.rand(len(means)) - 0.12, s=14, alpha=0.6)
        left.text(0, -row + 0.28, f"{label}: deviation {means.std():.3f}", ha="center")
    left.set_yticks([])
    left.set_ylim(-1.4, 0.6)
    left.set_xlabel("mean of a sample's group, in deviations of the group")
    left.set_title(f"MobileNetV2, {NORM}, 64 images", fontsize=10)
    rows = [row for row in read("equalization") if row["groups"] == 1 and row["crops"] in ("crops", "drawn")]
    for network, style in (("lite0", "-"), ("mobilenetv2", "--"), ("text direction", ":")):
        for source in COLORS:
            points = sorted((r["shrink"], r["top1"]) for r in rows if (r["network"], r["source"]) == (network, source))
            label = source if network == "lite0" else None
            right.plot(*zip(*points, strict=True), style, color=COLORS[source], marker="o", ms=4, label=label)
    right.set_xscale("log")
    right.set_xticks([1.5, 10, 60], ["1.5", "10", "60"], minor=False)
    right.minorticks_off()
    right.set_xlabel("shrink")
    right.set_ylabel("answers that are the original's, %")
    right.set_ylim(0, 100)
    right.set_title("one group; solid Lite0, dashed MobileNetV2, dotted text direction", fontsize=9)
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).parents[1] / "docs" / "equalization.png", dpi=130)


if __name__ == "__main__":
    main()
