"""Fine-tune a converted checkpoint with PyTorch Lightning, one image at a time.

python examples/lightning.py OUT IMAGES            # OUT: what normswap convert wrote; IMAGES: one folder per class
"""

import sys

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import normswap


class Classifier(pl.LightningModule):
    """A converted network and its loss; the checkpoint's path is all it needs to be built again."""

    def __init__(self, checkpoint: str, num_classes: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = normswap.load(checkpoint, num_classes=num_classes)
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Return the loss of one image."""
        image, label = batch
        loss = F.cross_entropy(self.model(image), label)
        self.losses.append(loss.item())
        return loss

    def on_train_epoch_end(self) -> None:
        """Print the mean loss."""
        print(f"epoch {self.current_epoch + 1}: loss {sum(self.losses) / len(self.losses):.3f}")
        self.losses.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train what conversion left trainable."""
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.003, momentum=0.9)


def main(checkpoint: str, images: str) -> None:
    """Train, and read Lightning's checkpoint with Lightning and without it."""
    pl.seed_everything(0)
    data = ImageFolder(images, transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()]))
    classifier = Classifier(checkpoint, len(data.classes))
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accumulate_grad_batches=2,
    )
    trainer.fit(classifier, DataLoader(data, batch_size=1, shuffle=True))
    trainer.save_checkpoint("last.ckpt")
    sample = data[0][0][None]
    expected = classifier.eval().model(sample)
    restored = Classifier.load_from_checkpoint("last.ckpt", weights_only=True).eval()
    torch.testing.assert_close(restored.model(sample), expected)
    alone = normswap.load(checkpoint, num_classes=len(data.classes), weights="last.ckpt")
    torch.testing.assert_close(alone(sample), expected)


if __name__ == "__main__":
    main(*sys.argv[1:3])
