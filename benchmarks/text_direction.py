"""A trained network that tells upright lines of text from those turned by 180°, and lines to ask it about.

python benchmarks/text_direction.py lines.png     # checks the network and draws the first lines

The network is PaddleOCR's ch_ppocr_mobile_v2.0_cls (Apache 2.0), a MobileNetV3 of 35 BatchNorms, as an ONNX file in
`pip install rapidocr-onnxruntime onnx onnxruntime`. The lines are drawn with the fonts that matplotlib ships.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from installed import installed
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image, to_tensor

HEIGHT, WIDTH = 48, 192
"""Size of a line, from the package's config.yaml."""
FONTS = ("DejaVuSans", "DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneral")
TOLERANCE = 1e-4

BLOCKS = {
    "conv2": (8, 8, 8, 3, 2, 2, nn.ReLU),
    "conv3": (8, 24, 8, 3, 2, 0, nn.ReLU),
    "conv4": (8, 32, 8, 3, 1, 0, nn.ReLU),
    "conv5": (8, 32, 16, 5, 2, 8, nn.Hardswish),
    "conv6": (16, 88, 16, 5, 1, 22, nn.Hardswish),
    "conv7": (16, 88, 16, 5, 1, 22, nn.Hardswish),
    "conv8": (16, 40, 16, 5, 1, 10, nn.Hardswish),
    "conv9": (16, 48, 16, 5, 1, 12, nn.Hardswish),
    "conv10": (16, 104, 32, 5, 2, 26, nn.Hardswish),
    "conv11": (32, 200, 32, 5, 1, 50, nn.Hardswish),
    "conv12": (32, 200, 32, 5, 1, 50, nn.Hardswish),
}
"""Inputs, expanded channels, outputs, kernel, stride over the height, channels in the gate (0: no gate), activation."""


class Block(nn.Module):
    """An inverted residual with a gate of slope 0.2, where torch's Hardsigmoid has 1/6 (Howard et al. 2019)."""

    def __init__(
        self, inputs: int, middle: int, outputs: int, kernel: int, stride: int, gate: int, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        self.expand = nn.Conv2d(inputs, middle, 1, bias=False)
        self.expand_bn = nn.BatchNorm2d(middle)
        self.depthwise = nn.Conv2d(middle, middle, kernel, (stride, 1), kernel // 2, groups=middle, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(middle)
        self.se_1 = nn.Conv2d(middle, gate, 1) if gate else None
        self.se_2 = nn.Conv2d(gate, middle, 1) if gate else None
        self.linear = nn.Conv2d(middle, outputs, 1, bias=False)
        self.linear_bn = nn.BatchNorm2d(outputs)
        self.activation = activation()
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.expand_bn(self.expand(x)))
        y = self.activation(self.depthwise_bn(self.depthwise(y)))
        if self.se_1 is not None and self.se_2 is not None:
            gate = self.se_2(F.relu(self.se_1(y.mean((2, 3), keepdim=True))))
            y = y * (0.2 * gate + 0.5).clamp(0, 1)
        y = self.linear_bn(self.linear(y))
        return x + y if self.adds else y


class TextDirection(nn.Module):
    """Two logits, upright and turned, for lines (N, 3, 48, 192): blue, green, red, with values in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.conv1_bn = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleDict({name: Block(*sizes) for name, sizes in BLOCKS.items()})
        self.conv_last = nn.Conv2d(32, 200, 1, bias=False)
        self.conv_last_bn = nn.BatchNorm2d(200)
        self.fc_0 = nn.Linear(200, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv1_bn(self.conv1(x)))
        for block in self.blocks.values():
            x = block(x)
        x = F.hardswish(self.conv_last_bn(self.conv_last(x)))
        logits: Tensor = self.fc_0(F.max_pool2d(x, 2).mean((2, 3)))
        return logits


def source() -> Path:
    """Return the ONNX file of the package."""
    return installed("rapidocr_onnxruntime") / "models" / "ch_ppocr_mobile_v2.0_cls_infer.onnx"


def tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that keeps them in Constant nodes."""
    import onnx

    nodes = (node for node in onnx.load(path).graph.node if node.op_type == "Constant")
    return {node.output[0]: torch.tensor(onnx.numpy_helper.to_array(node.attribute[0].t)) for node in nodes}


def key_in_file(key: str) -> str:
    """Return how the file calls an entry of the state dict."""
    module, _, parameter = key.removeprefix("blocks.").rpartition(".")
    names = {"bias": "offset", "running_mean": "mean", "running_var": "variance"}
    names["weight"] = "scale" if module.endswith("bn") else "weights"
    return f"{module.replace('.', '_')}_{names[parameter]}"


def state(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict for tensors by the names in the file."""
    keys = [key for key in TextDirection().state_dict() if not key.endswith("num_batches_tracked")]
    own = {key: found[key_in_file(key)] for key in keys if not key.startswith("fc_0")}
    return own | {"fc_0.weight": found["fc_0.w_0"].T, "fc_0.bias": found["fc_0.b_0"]}


def direction() -> TextDirection:
    """Return the network in torch, held to what onnxruntime makes of the file on 16 lines."""
    import onnxruntime

    path = source()
    model = TextDirection().eval()
    _, unexpected = model.load_state_dict(state(tensors(path)), strict=False)
    if unexpected:
        raise SystemExit(f"{path}: holds what the network has no place for: {unexpected}")
    images, _ = lines(16, seed=2)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        error = float((model(images).softmax(1) - torch.tensor(expected)).abs().max())
    if not error <= TOLERANCE:
        raise SystemExit(f"{path}: onnxruntime's answers differ from torch's by up to {error:.1e}")
    return model


def line(random: Random, words: list[str], fonts: list[Path]) -> Image.Image:
    """Return one upright line: words on a background of two scales, a little turned, blurred and noisy."""
    font = ImageFont.truetype(random.choice(fonts), random.randint(24, 44))
    text = " ".join(random.choices(words, k=random.randint(1, 4)))[: random.randint(5, 24)].strip()
    left, top, right, bottom = font.getbbox(text)
    margin = [random.randint(2, 12) for _ in range(4)]
    size = (int(right - left) + margin[0] + margin[1], int(bottom - top) + margin[2] + margin[3])
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    ground = torch.rand(1, 3, 1, 1, generator=generator).repeat(1, 1, size[1], size[0])
    for cells, strength in ((2, 0.15), (12, 0.08)):
        field = torch.randn(1, 3, cells, 4 * cells, generator=generator)
        ground += random.random() * strength * F.interpolate(field, (size[1], size[0]), mode="bicubic")
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).text((margin[0] - left, margin[2] - top), text, 255, font)
    mask = mask.rotate(random.uniform(-4, 4), Image.Resampling.BICUBIC)
    mask = mask.filter(ImageFilter.GaussianBlur(random.uniform(0, 1.5)))
    ink = torch.rand(3, 1, 1, generator=generator)
    ink = ink + (ink - ground[0].mean((1, 2), keepdim=True)).sign() * 0.15
    drawn = torch.lerp(ground[0], ink.expand_as(ground[0]), to_tensor(mask))
    drawn += random.uniform(0, 0.05) * torch.randn(drawn.shape, generator=generator)
    return to_pil_image(drawn.clamp(0, 1))


def lines(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return lines (N, 3, 48, 192) as the package prepares them, and for each whether it is turned, half of them."""
    import matplotlib

    random = Random(seed)
    fonts = [Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf" for name in FONTS]
    words = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8").split()
    words += [str(random.randrange(10**digits)) for digits in range(2, 9) for _ in range(10)]
    images = torch.zeros(count, 3, HEIGHT, WIDTH)
    turned = torch.arange(count) % 2
    for image, is_turned in zip(images, turned.tolist(), strict=True):
        drawn = line(random, words, fonts).rotate(180 * is_turned)
        width = min(-(-HEIGHT * drawn.width // drawn.height), WIDTH)
        resized = to_tensor(drawn.resize((width, HEIGHT), Image.Resampling.BILINEAR))
        image[:, :, :width] = 2 * resized.flip(0) - 1
    return images, turned


class Answers:
    """How often a network answers what the original does, and how often each is right, in per cent of the lines."""

    def __init__(self, model: nn.Module, images: Tensor, turned: Tensor) -> None:
        self.images, self.turned = images, turned
        self.answers = self.run(model)

    @torch.no_grad()
    def run(self, model: nn.Module) -> Tensor:
        return torch.cat([model(images) for images in self.images.split(64)]).argmax(1)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        answers = self.run(model)
        pairs = {
            "top1": (answers, self.answers),
            "accuracy": (answers, self.turned),
            "original_accuracy": (self.answers, self.turned),
        }
        return {name: 100 * float((one == other).float().mean()) for name, (one, other) in pairs.items()}


def main() -> None:
    """Check the network, print how often it is right and draw the first lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    model = direction()
    images, turned = lines(256, seed=1)
    print(Answers(model, images, turned)(model))
    grid = images[:48].unflatten(0, (12, 4)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    to_pil_image((grid.flip(0) + 1) / 2).save(args.picture)


if __name__ == "__main__":
    main()
