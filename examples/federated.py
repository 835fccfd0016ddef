"""Federated averaging of a converted checkpoint: clients train on their own images, the server averages state dicts.

python examples/federated.py OUT IMAGES            # OUT: what normswap convert wrote; IMAGES: one folder per class

There are no running statistics to average, which differ between clients and of which a counter is a whole number.
"""

import copy
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

import normswap

ROUNDS, CLIENTS = 3, 2


def train(model: nn.Module, data: Subset) -> tuple[dict[str, Tensor], float]:
    """Return a client's state dict and mean loss after one pass at batch size 1."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.003, momentum=0.9)
    total = 0.0
    for image, label in DataLoader(data, batch_size=1, shuffle=True):
        loss = F.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return model.state_dict(), total / len(data)


def main(checkpoint: str, images: str) -> None:
    """Run a few rounds and load the averaged network."""
    torch.manual_seed(0)
    data = ImageFolder(images, transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()]))
    model = normswap.load(checkpoint, num_classes=len(data.classes)).train()
    assert not any("running" in name or "num_batches" in name for name in model.state_dict())
    shards = [Subset(data, range(client, len(data), CLIENTS)) for client in range(CLIENTS)]
    for number in range(ROUNDS):
        results = [train(copy.deepcopy(model), shard) for shard in shards]
        states = [state for state, _ in results]
        average = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
        model.load_state_dict(average)
        print(f"round {number + 1}: loss {sum(loss for _, loss in results) / CLIENTS:.3f}")
    torch.save(average, "averaged.pth")
    again = normswap.load(checkpoint, num_classes=len(data.classes), weights="averaged.pth")
    sample = data[0][0][None]
    torch.testing.assert_close(again(sample), model.eval()(sample))


if __name__ == "__main__":
    main(*sys.argv[1:3])
