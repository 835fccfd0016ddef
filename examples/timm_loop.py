"""Fine-tune a converted checkpoint with timm's own loaders, task, optimizer, schedule and checkpoints.

python examples/timm_loop.py OUT IMAGES            # OUT: what normswap convert wrote; IMAGES: one folder per class

timm's train.py runs unchanged: python -m normswap.run train.py IMAGES --model local-dir:OUT --pretrained
"""

import sys

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, CheckpointSaver, random_seed

import normswap  # makes timm find the checkpoint

EPOCHS = 3


def main(checkpoint: str, images: str) -> None:
    """Train at batch size 2, save timm's way and read that back."""
    random_seed(0)
    data = create_dataset("", root=images)
    classes = len(data.reader.class_to_idx)
    model = timm.create_model(f"local-dir:{checkpoint}", pretrained=True, num_classes=classes)
    config = resolve_model_data_config(model) | {"input_size": (3, 64, 64)}
    loader = create_loader(
        data,
        **{key: config[key] for key in ("input_size", "mean", "std")},
        batch_size=2,
        is_training=True,
        color_jitter=0.0,
        num_workers=0,
        use_prefetcher=False,
    )
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.003, momentum=0.9)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS)
    task = ClassificationTask(model, criterion_kwargs={"smoothing": 0.0}, device=torch.device("cpu"), verbose=False)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=".", recovery_dir=".", decreasing=True)
    for epoch in range(epochs):
        task.train()
        losses = AverageMeter()
        for image, label in loader:
            loss = task(image, label)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(label))
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=losses.avg)
        print(f"epoch {epoch + 1}: loss {losses.avg:.3f}")
    again = normswap.load(checkpoint, num_classes=classes, weights="last.pth.tar")
    sample = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(again(sample), model.eval()(sample))


if __name__ == "__main__":
    main(*sys.argv[1:3])
