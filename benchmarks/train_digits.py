"""Regenerate ``normswap/demo/data``: the digits as scikit-learn ships them, and the BatchNorm ResNet trained on them.

python benchmarks/train_digits.py --seed 0

Same seed and same version of torch give the same weights; training takes about half a minute on one core.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from normswap.demo.digits import DigitsResNet, split_digits

DATA = Path(__file__).resolve().parents[1] / "normswap" / "demo" / "data"
EPOCHS, BATCH, LR = 30, 32, 0.1


def main() -> None:
    """Write both data files and print the accuracy on the test images."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of initialization, order and shifts (default 0)")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default normswap/demo/data)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums over threads come in another order and would give other weights
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)

    images, labels = fetch()
    save_file({"images": images, "labels": labels}, args.out / "digits.safetensors")
    train_images, train_labels, test_images, test_labels = split_digits(images, labels)
    start = time.perf_counter()
    model = train(train_images, train_labels, seed=args.seed)
    seconds = time.perf_counter() - start
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, args.out / "digits_resnet.safetensors")
    right = accuracy(model, test_images, test_labels)
    print(f"seed {args.seed}: {right:.1%} of {len(test_labels)} test images right; trained in {seconds:.0f} s")


def fetch() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits: images uint8 (1797, 8, 8) of values 0 to 16, labels uint8 (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("scikit-learn, which ships the digits, is not installed: pip install scikit-learn") from None
    digits = load_digits()
    return torch.tensor(digits.images).to(torch.uint8), torch.tensor(digits.target).to(torch.uint8)


def train(images: Tensor, labels: Tensor, *, seed: int) -> DigitsResNet:
    """Return a net trained on images (N, 1, 8, 8) and labels (N,), in eval mode.

    Ordinary training: SGD with Nesterov momentum, one learning rate cycle, weight decay 5e-4, label smoothing 0.1, and
    shifts of up to one pixel.
    """
    torch.manual_seed(seed)
    model = DigitsResNet()
    batches = len(images) // BATCH  # an epoch leaves the last few images of its order out
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=batches * EPOCHS, pct_start=0.2)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images))[: batches * BATCH].view(batches, BATCH):
            optimizer.zero_grad()
            loss(model(shifted(images[batch])), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def shifted(images: Tensor) -> Tensor:
    """Return every image (N, 1, 8, 8) moved by -1, 0 or 1 pixels each way, the border filled with paper."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0).squeeze(1)
    offsets = torch.randint(0, 3, (2, len(images), 1)) + torch.arange(8)
    rows, columns = offsets[0][:, :, None], offsets[1][:, None, :]
    return padded[torch.arange(len(images))[:, None, None], rows, columns].unsqueeze(1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images (N, 1, 8, 8) whose largest logit is their label's."""
    return float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
