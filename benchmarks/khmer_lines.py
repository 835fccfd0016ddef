"""A trained network that reads lines of Khmer, and lines to ask it about.

The network is the recurrent one of `pip install khmer-ocr-ocm --no-deps` (BSD), seven BatchNorms before two LSTMs. The
lines are random letters and vowels, drawn with the fonts of the package.
"""

from pathlib import Path
from random import Random

import torch
from installed import installed
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

HEIGHT, WIDTH = 48, 512
LETTERS, VOWELS = [chr(code) for code in range(0x1780, 0x17A3)], [chr(code) for code in range(0x17B6, 0x17C6)]
LAYERS = (
    *((64, 3, nn.MaxPool2d(2)), (128, 3, nn.MaxPool2d(2)), (256, 3, None), (256, 3, nn.MaxPool2d((2, 1)))),
    *((512, 3, None), (512, 3, nn.MaxPool2d((2, 1))), (512, 2, None)),
)
"""Channels, kernel, and what pools."""


class Reader(nn.Module):
    """Scores of letters at 127 places, (127, N, classes), for lines (N, 1, 48, 512) with values in [-1, 1]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers, inputs = list[nn.Module](), 1
        for outputs, kernel, pool in LAYERS:
            layers += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 3), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [] if pool is None else [pool, nn.Dropout2d(0.2)]
            inputs = outputs
        self.cnn = nn.Sequential(*layers)
        self.rnn = nn.LSTM(512, 256, num_layers=2, bidirectional=True)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        places = self.cnn(x).mean(2).permute(2, 0, 1)
        scores: Tensor = self.fc(self.rnn(places)[0])
        return scores


def package() -> Path:
    """Return the folder of the weights and the fonts."""
    return installed("khmer_ocr_ocm") / "assets"


def reader() -> Reader:
    """Return the network with the package's weights."""
    state = torch.load(package() / "model.pth", weights_only=True, map_location="cpu")
    state = state.get("model_state_dict", state)
    model = Reader(len(state["fc.bias"])).eval()
    model.load_state_dict(state)
    return model


def khmer(count: int, seed: int) -> Tensor:
    """Return lines (N, 1, 48, 512)."""
    random, images = Random(seed), list[Tensor]()
    fonts = sorted((package() / "fonts" / "khmer").glob("*.ttf"))
    for _ in range(count):
        length = random.randint(4, 22)
        text = "".join(random.choice(LETTERS) + random.choice(["", *VOWELS]) for _ in range(length))
        image = Image.new("L", (WIDTH, HEIGHT), 255)
        place = (5 + 20 * random.random(), 2)
        ImageDraw.Draw(image).text(place, text, random.randrange(80), ImageFont.truetype(random.choice(fonts), 28))
        images.append(2 * to_tensor(image) - 1)
    return torch.stack(images)


class Reading:
    """On how many places, and lines, a network reads what the original does, in per cent."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.images = images
        self.answers = self.run(model)

    @torch.no_grad()
    def run(self, model: nn.Module) -> Tensor:
        return torch.cat([model(images).argmax(2) for images in self.images.split(16)], 1)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        answers = self.run(model)
        same = [letters(one) == letters(other) for one, other in zip(answers.T, self.answers.T, strict=True)]
        return {"top1": 100 * sum(same) / len(same), "places": 100 * float((answers == self.answers).float().mean())}


def letters(places: Tensor) -> list[int]:
    """Return what is read of a line: repeated letters are one, 0 is none (Graves et al. 2006, connectionist)."""
    return [letter for letter in torch.unique_consecutive(places).tolist() if letter]
