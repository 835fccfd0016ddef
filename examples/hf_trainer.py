"""Fine-tune a converted checkpoint with Hugging Face's Trainer, through the wrapper that transformers has for timm.

python examples/hf_trainer.py OUT IMAGES           # OUT: what normswap convert wrote; IMAGES: one folder per class
"""

import sys
from typing import Any

import torch
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

import normswap  # makes timm, and so transformers, find the checkpoint


def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
    """Return a batch under the names the wrapper expects."""
    images, labels = default_collate(samples)
    return {"pixel_values": images, "labels": labels}


def main(checkpoint: str, images: str) -> None:
    """Train at batch size 1, save transformers' way and read that back with transformers and without it."""
    set_seed(0)
    data = ImageFolder(images, transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()]))
    model = AutoModelForImageClassification.from_pretrained(
        checkpoint, num_labels=len(data.classes), ignore_mismatched_sizes=True
    )
    arguments = TrainingArguments(
        output_dir="run",
        num_train_epochs=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=5e-4,
        logging_strategy="epoch",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    for row in trainer.state.log_history:
        if "loss" in row:
            print(f"epoch {row['epoch']:.0f}: loss {float(row['loss']):.3f}")
    trainer.save_model("tuned")
    sample = data[0][0][None]
    expected = model.eval()(sample).logits
    again = AutoModelForImageClassification.from_pretrained("tuned").eval()
    torch.testing.assert_close(again(sample).logits, expected)
    alone = normswap.load(checkpoint, num_classes=len(data.classes), weights="tuned/model.safetensors")
    torch.testing.assert_close(alone(sample), expected)


if __name__ == "__main__":
    main(*sys.argv[1:3])
