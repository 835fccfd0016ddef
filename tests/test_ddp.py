"""Two processes at batch size 1 are one process at batch size 2; with BatchNorm they are not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap

STEPS, LEARNING_RATE = 20, 0.003


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=4)
    if kind != "batch norm":
        model = normswap.convert(model)
    return (model.double() if kind == "converted, float64" else model).train()


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, 2, 3, 64, 64, generator=generator), torch.randint(0, 4, (STEPS, 2), generator=generator)


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), LEARNING_RATE)
    for image, label in zip(images, labels, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(image.to(next(model.parameters()).dtype)), label).backward()
        optimizer.step()


def train_a_rank(kind: str, folder: str) -> None:
    """Run in each of two processes, on one sample of each pair."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = nn.parallel.DistributedDataParallel(build(kind), broadcast_buffers=False)
    images, labels = samples()
    train(model, images[:, rank : rank + 1], labels[:, rank : rank + 1])
    torch.save(model.module.state_dict(), Path(folder) / f"rank{rank}.pth")
    torch.distributed.destroy_process_group()


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max((ours[key].double() - theirs[key].double()).abs().max().item() for key in ours)


@pytest.mark.parametrize("kind", ["converted", "converted, float64", "batch norm"])
def test_two_processes_are_one_with_two_samples(kind: str, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launcher, __file__, kind, str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    alone = build(kind)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in alone.modules())
    before = {key: value.clone() for key, value in alone.state_dict().items()}
    train(alone, *samples())
    trainable = {name for name, _ in alone.named_parameters()}
    weights = [{k: v for k, v in state.items() if k in trainable} for state in (before, first, alone.state_dict())]
    moved, apart, between = distance(weights[0], weights[2]), distance(weights[1], weights[2]), distance(first, second)
    print(f"\n{kind}: parameters moved by up to {moved:.1e} in {STEPS} steps; the ranks differ by {between:.1e}; "
          f"from one process at batch size 2 parameters differ by {apart:.1e}")  # fmt: skip
    assert moved > 3e-3
    if kind == "batch norm":
        assert between > 1e-2  # running statistics of another sample each
        assert apart > 1e-3
    else:
        assert between == 0
        assert apart < (1e-5 if kind == "converted" else 1e-12)


if __name__ == "__main__":
    train_a_rank(*sys.argv[1:3])
