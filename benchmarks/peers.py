"""What other converters leave behind, beside normswap, on 20 timm networks in one run; writes docs/peers.md.

pip install opacus && python benchmarks/peers.py

- Opacus: `ModuleValidator.fix`.
- torch: `SyncBatchNorm.convert_sync_batchnorm`, whose job is another one; what it does to norm subclasses is the point.
- by hand: the walk of diffusion policies, every `BatchNorm2d` becomes `GroupNorm(channels // 16, channels)`.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from opacus.validators import ModuleValidator
from torch import nn
from tqdm import tqdm

import normswap
from normswap.networks.network import Network
from normswap.networks.recognition import is_batch_norm
from normswap.tracing.forward import trace

NETWORKS = """resnet18 resnet50 efficientnet_b0 mobilenetv3_small_100 regnety_002 densenet121 resnetv2_50
tf_efficientnetv2_b0 mobilenetv2_050 vovnet39a ese_vovnet19b_dw dpn48b repvgg_a0 cspresnet50 inception_v3 xception41
hrnet_w18_small dla34 res2net50_26w_4s levit_128""".split()


def by_hand(model: nn.Module) -> nn.Module:
    """Replace BatchNorm2d by class, channels // 16 groups, nothing carried over."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(child.num_features // 16, child.num_features))
    return model


TOOLS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "normswap": normswap.convert,
    "Opacus": ModuleValidator.fix,
    "torch SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "by hand": by_hand,
}


def activations(model: nn.Module) -> Counter[str]:
    """Count the modules inside norms that run in a forward pass, by class, identities left out.

    Some converters attach the activation to the new norm and never call it.
    """
    ran = trace(Network(model), torch.empty(2, 3, 224, 224)).shapes
    return Counter(
        type(child).__name__
        for name, norm in model.named_modules()
        if isinstance(norm, nn.GroupNorm) or is_batch_norm(norm)
        for key, child in norm.named_children()
        if not isinstance(child, nn.Identity) and f"{name}.{key}" in ran
    )


def outcome(tool: Callable[[nn.Module], nn.Module], model: nn.Module) -> tuple[int, int] | str:
    """Return BatchNorms left and activations lost, or the error."""
    before = activations(model)
    try:
        converted = tool(copy.deepcopy(model))
    except Exception as error:
        return type(error).__name__
    left = sum(is_batch_norm(module) for module in converted.modules())
    return left, sum((before - activations(converted)).values())


def main() -> None:
    """Run every tool on every network and write the table."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    lines = [
        "# Beside other converters",
        "",
        "BatchNorm layers left / activations lost, of those in the network; written by `python benchmarks/peers.py`.",
        f"timm {timm.__version__}, torch {torch.__version__.split('+')[0]}. An error is named where the tool stops.",
        "",
        f"| network | BatchNorm / activations inside | {' | '.join(TOOLS)} |",
        "|---" * (len(TOOLS) + 2) + "|",
    ]
    for name in tqdm(NETWORKS, unit="net"):
        model = timm.create_model(name).eval()
        norms = sum(is_batch_norm(module) for module in model.modules())
        cells = [outcome(tool, model) for tool in TOOLS.values()]
        shown = [cell if isinstance(cell, str) else f"{cell[0]} / {cell[1]}" for cell in cells]
        lines.append(f"| {name} | {norms} / {sum(activations(model).values())} | {' | '.join(shown)} |")
    target = Path(__file__).parent.parent / "docs" / "peers.md"
    target.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
