"""Shard a converted checkpoint with FSDP2 after conversion, fine-tune it, and gather the state dict.

torchrun --standalone --nproc-per-node=2 examples/fsdp2.py OUT IMAGES     # with GPUs: backend "nccl"
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

import normswap

EPOCHS = 3


def main(checkpoint: str, images: str) -> None:
    """Convert (here: load), shard, train, gather."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    data = ImageFolder(images, transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()]))
    model = normswap.load(checkpoint, num_classes=len(data.classes)).train()
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
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
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    sample = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(sample).detach()
    if dist.get_rank() == 0:
        torch.save(state, "tuned.pth")
    dist.barrier()  # every process reads the file back: none exits while gloo's threads hold its last tensors
    again = normswap.load(checkpoint, num_classes=len(data.classes), weights="tuned.pth")
    torch.testing.assert_close(again(sample), expected)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3])
