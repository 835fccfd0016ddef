"""Fine-tune a converted checkpoint in several processes at batch size 1 each; nothing is shared but gradients.

torchrun --standalone --nproc-per-node=2 examples/ddp.py OUT IMAGES       # with GPUs: backend "nccl"
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

import normswap

EPOCHS = 3


def main(checkpoint: str, images: str) -> None:
    """Train, check that the processes agree, save from one of them."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    data = ImageFolder(images, transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()]))
    model = DistributedDataParallel(normswap.load(checkpoint, num_classes=len(data.classes)).train())
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01, momentum=0.9)
    sampler = DistributedSampler(data, seed=0)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        total = torch.zeros(())
        for image, label in DataLoader(data, batch_size=1, sampler=sampler):
            loss = F.cross_entropy(model(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {total.item() / len(data):.3f}")
    for name, tensor in model.state_dict().items():
        first = tensor.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(first, tensor), f"{name} differs between processes"
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), "tuned.pth")
        normswap.load(checkpoint, num_classes=len(data.classes), weights="tuned.pth")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3])
