"""Write docs/performance.md from the results of performance.py.

python benchmarks/performance_docs.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from function_docs import grouped, markdown
from records import RESULTS, Job, read
from timing import spread

DOCS = Path(__file__).resolve().parents[1] / "docs"

HEAD = """# What it costs

Every figure comes from `python benchmarks/performance.py`, which runs the variants of a table in turns (A B A B) and
divides round by round: medians, with the quartiles of the ratios in brackets. Milliseconds are of one machine and say
little on another; the ratios say more.
"""


TRIED = """
### Forms that were tried

`python benchmarks/standardizing.py`: forward and backward, layer by layer, processor time of one thread, ratios to the
form that is used; 53 layers of ResNet-50 and the 17 depthwise ones of MobileNetV2.

| form | ResNet-50, all | 3×3 and 7×7 | 1×1 | MobileNetV2, depthwise |
| --- | --- | --- | --- | --- |
| used: group_norm | 65.0 ms | 39.8 ms | 30.8 ms | 1.3 ms |
| layer_norm, then gain and offset | 1.49 (1.35 to 1.94) | 1.28 (1.12 to 1.43) | 1.39 (1.38 to 1.43) | 0.94 (0.88 to 1.03) |
| batch_norm, as timm's | 1.82 (1.72 to 2.09) | 1.90 (1.82 to 1.95) | 1.73 (1.69 to 1.77) | 0.86 (0.78 to 0.93) |
| group_norm, backward by layer_norm's | 0.85 (0.79 to 0.90) | 0.94 (0.79 to 1.05) | 0.98 (0.96 to 0.99) | 1.02 (0.89 to 1.11) |
| group_norm, backward in closed form | 1.53 (1.44 to 1.62) | 1.41 (1.35 to 1.51) | 1.50 (1.46 to 1.52) | 1.49 (1.35 to 1.64) |
| an operator of torch.library, the same as layer_norm's | 0.98 (0.90 to 1.05) | 0.99 (0.95 to 1.05) | 1.04 (1.03 to 1.09) | 1.71 (1.56 to 1.81) |
| a copy, then a sum of two | 0.63 (0.55 to 0.68) | 0.56 (0.53 to 0.60) | 0.54 (0.53 to 0.55) | 0.08 (0.07 to 0.09) |

Nothing wins by a tenth: the one that comes near, layer_norm's backward pass, takes 0.93 (0.91 to 0.97) of all filters'
time in 41 more rounds against the used form alone, and needs a derivative of its own. `torch._foreach_*` has no sums
along a row. The last line only reads and writes what any form must, and is half of the time: no uncached form that
reads each filter takes less. Half of the share below, measured apart and on two threads, is more than 3 % of a step.
"""  # noqa: E501

COMPILED = """
On a CPU the compiler lays convolutions out channels last, and a kernel that is computed must be turned in every step:
keep the network itself channels last there, `model.to(memory_format=torch.channels_last)`.

Of a flattened filter that is laid out anew, the compiler worked out the place of every value by division, one at a
time. Compiled code therefore standardizes on the filter's own axes by the formula, and no longer by
`torch.group_norm`, with which the lines of the table were 1.53, 1.17, 1.29 and 1.08 where 16-bit arithmetic was five
times slower. On parts, one thread, processor time of a busy machine, torch 2.14, batch 2:

| compiled, forward and backward | to its own base |
| --- | --- |
| one 3×3 convolution, 512 to 512 channels at 7×7, contiguous float32: before, to plain | 1.85 (1.77 to 1.93) |
| the same by the formula | 1.28 (1.22 to 1.33) |
| ResNet of one bottleneck a stage, 224 pixels, contiguous float32: GN, to BN | 1.15 (1.14 to 1.23) |
| the same, GN + WS before | 1.39 (1.30 to 1.48) |
| the same, GN + WS by the formula | 1.26 (1.20 to 1.32) |

Most of what is left is GroupNorm: the compiler turns it into sums over flattened groups, and its backward pass,
channels last, finds the group of every channel by division, one value at a time.

On constant filters and maps, where the true result is 0, eager and compiled code each leave rounding, magnified by the
root of epsilon (7.5e-6 at most here, for filters of 0.1), and not always the same: what amplifies it, as a logarithm
or a second normalization does, differs between them.
"""


def ws_section(rows: list[Job]) -> str:
    """Return the table of the forms of weight standardization."""
    parts = grouped(rows, lambda row: row["form"])
    lines = [
        [form, *(cell for row in found for cell in (f"{row['ms']:.1f}", spread(row)))] for form, found in parts.items()
    ]
    header = ["53 filters of ResNet-50", "forward, ms", "to timm's", "with backward, ms", "to timm's"]
    return f"""
## Weight standardization

{_device(rows)}. To `torch.group_norm` the filters are one sample and each a group of its own: the whole formula in one
fused pass that can be differentiated any number of times, compiled and exported. Gain and offset of the adaptive form
are its affine part. It is what normswap's convolutions run.

{markdown(header, lines)}
{TRIED}"""


def accumulation_section(rows: list[Job]) -> str:
    """Return the share of a training step."""
    ms = {row["variant"]: row["ms"] for row in rows}
    lines = [[row["variant"], f"{row['ms']:.0f}", spread(row)] for row in rows]
    alone, steps = ms["WS alone"], ms["GN, 4 micro-batches"]
    shared = ms["GN + WS, 4 micro-batches, accumulate"]
    return f"""
## A training step, and four micro-batches

ResNet-50, batch size 2, 224 pixels. Standardizing the filters once, forward and backward, is
{100 * alone / ms["GN + WS, 1 step"]:.1f} % of a step; it reads and writes memory, so its share grows with how fast the
processor is beside it. With `normswap.accumulate` the forward passes of micro-batches standardize once:

```python
import timm
import torch
from torch.nn.functional import cross_entropy

import normswap

model = normswap.convert(timm.create_model("resnet18", num_classes=5)).train()
optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01)
micro_batches = [(torch.randn(1, 3, 64, 64), torch.tensor([label])) for label in range(4)]
with normswap.accumulate(model):
    for images, labels in micro_batches:
        cross_entropy(model(images), labels).backward()
optimizer.step()
```

Four micro-batches take {100 * (ms["GN + WS, 4 micro-batches"] / steps - 1):+.1f} % against plain convolutions without
it, {100 * (shared / steps - 1):+.1f} % with it: backward passes, which are most of it, each turn their gradients into
those of the filters, so that these are right after every one.

{markdown(["variant", "ms", "to BN, 1 step"], lines)}
"""


def convert_section(rows: list[Job]) -> str:
    """Return the time of a conversion."""
    timed = [row for row in rows if "variant" in row]
    lines = [
        [
            f"{row['model']}, {row['parameters'] / 1e6:.0f} M",
            f"{row.get('state', 'trained')}, {row.get('threads', 2)}",
            row["variant"],
            f"{row['ms']:.0f}",
            spread(row),
        ]
        for row in timed
    ]
    peaks = "".join(
        f"`inplace=True` on {row['model']} holds {row['peak']:.2f} times the model at its peak, trained; "
        f"{row['peak_fresh']:.2f} times where the norms are fresh and filters are rewritten.\n"
        for row in rows
        if "peak" in row
    )
    return f"""
## Conversion

`convert` copies, traces without data, plans, matches, and traces the result to compare every shape; Opacus' fixer
copies and swaps layers. Small networks are mostly Python to both; in large ones the copies count.

{markdown(["network, parameters", "norms, threads", "", "ms", "to Opacus' fixer"], lines)}

Trained networks cost the fit of scales on top (`equalize=False` leaves it out); before it looked at what the outputs
make of channels together resnet50 took 1.20 on two threads and 1.39 on one, fresh 0.70 and 0.94.

{peaks}"""


def fold_section(rows: list[Job]) -> str:
    """Return latencies of inference."""
    lines = [[row["variant"], f"{row['ms']:.1f}", spread(row)] for row in rows]
    return f"""
## Inference

ResNet-50, one image, the processor's time on one thread. `normswap.fold` leaves plain convolutions. Unfolded, a layer
in eval mode on the CPU keeps its standardized kernel between passes that record no gradient for it (`torch.no_grad`,
`torch.inference_mode`, frozen filters), until its filters or constants change: one more copy of the filters in memory,
which `model.train()` gives back. Copies, pickles and state dicts hold none of it. Layers whose class brings a forward
of its own, other devices, compiled code, traces and function transforms standardize in every pass.

Of changes in place through `.data` or numpy torch tells nothing. One value of every filter, of every input channel and
of every position is looked at in each pass, which shows what moves whole filters or channels; after a change of single
values by that way call `model.train()` or `model.eval()`, both of which forget the kernels.

{markdown(["", "ms", "to folded"], lines)}

Where arithmetic was half as fast beside the same memory, GN + WS took 1.05 (1.04 to 1.06), and 1.08 (1.07 to 1.10) in
every pass.
"""


def step_section(rows: list[Job]) -> str:
    """Return time and memory of training steps."""
    text = f"""
## Training step against BatchNorm

{_device(rows)}; forward and backward at 224 pixels. *Saved* is what the forward pass keeps for the backward pass: in
float32 the standardized kernels come on top, one more copy of the filters; under autocast a copy is kept either way.
GroupNorm itself costs about what BatchNorm does. What standardization costs stays the same at any batch size, so it
weighs most at batch 1: `normswap.accumulate` shares its forward pass among micro-batches, and `ws="none"` leaves it
out. These steps are long and the machine is shared: read the brackets.
"""
    return text + _steps(rows)


def _steps(rows: list[Job]) -> str:
    """Return a table for each network; of compiled steps too, which come after those that are not."""
    text = ""
    for (model, compiled), found in grouped(rows, lambda row: (row["model"], row["compiled"])).items():
        cells: dict[Any, dict[str, Job]] = {}
        for row in found:
            cells.setdefault((row["batch"], row["channels_last"], row["bf16"]), {})[row["form"]] = row
        forms = list(next(iter(cells.values())))
        lines = [
            [
                str(batch),
                "channels last" if last else "contiguous",
                "bf16" if half else "fp32",
                f"{by_form['BN']['ms']:.0f} ms" + ("" if compiled else f", {by_form['BN']['saved_MB']:.0f} MB"),
                *(spread(by_form[form]) + ("" if compiled else _saved(by_form, form)) for form in forms[1:]),
            ]
            for (batch, last, half), by_form in cells.items()
        ]
        said = "time" if compiled else "time, saved"
        header = ["batch", "layout", "type", "BN", *(f"{form}: {said}" for form in forms[1:])]
        text += f"\n### {model}, {'torch.compile' if compiled else 'eager'}\n\n{markdown(header, lines)}\n"
    return text


def _saved(by_form: dict[str, Job], form: str) -> str:
    return f", {by_form[form]['saved_MB'] / by_form['BN']['saved_MB']:.2f}"


def compiled_section(rows: list[Job]) -> str:
    """Return time and memory of compiled training steps."""
    return f"{_steps(rows)}{COMPILED}"


def onnx_section(rows: list[Job]) -> str:
    """Return what exported files differ by."""
    lines = [
        [
            row["model"],
            ", ".join(row["dynamic"]),
            ", ".join("×".join(map(str, s)) for s in row["compared"]),
            f"{row['difference']:.1e}",
        ]
        for row in rows
    ]
    return f"""
## ONNX

`normswap export OUT --to onnx` writes opset 21, where GroupNorm is one operator, and compares the file with the network
in onnxruntime before it takes its place.

{markdown(["network", "free axes", "inputs compared", "largest difference"], lines)}
"""


def growth_section(rows: list[Job]) -> str:
    """Return how time grows with a network."""
    own = [row for row in rows if row["network"] == "residual"]
    sizes = sorted({row["size"] for row in own})
    seconds = {(row["verb"], row["size"]): row["seconds"] for row in own}
    verbs = list(dict.fromkeys(row["verb"] for row in own))
    lines = [[verb, *(f"{seconds[verb, n]:.2f}" if (verb, n) in seconds else "–" for n in sizes)] for verb in verbs]
    rest = "".join(
        f"`inspect` of {row['parameters'] / 1e9:.1f} billion parameters without data takes {row['seconds']:.2f} s.\n"
        for row in rows
        if row["network"] == "meta"
    )
    return f"""
## Growth

Time grows nearly as the network does: residual networks of tiny blocks, seconds of the processor on one thread, from
`python benchmarks/growth.py`.

{markdown(["residual blocks", *(f"{n:,}" for n in sizes)], lines)}

`check` runs the network on data, here two images of 8×8: seven times, twice of them with gradients.

![seconds over blocks, both in logarithms](growth.png)

{rest}"""


SECTIONS: dict[str, Callable[[list[Job]], str]] = {
    "ws": ws_section,
    "accumulation": accumulation_section,
    "convert": convert_section,
    "fold": fold_section,
    "step": step_section,
    "compiled": compiled_section,
    "onnx": onnx_section,
}


def _device(rows: list[Job]) -> str:
    return f"On {rows[0]['device']}"


def main() -> None:
    """Write the page from the results there are."""
    text = HEAD
    for kind in ("cpu", "cuda"):
        found = {name: f"performance-{name}-{kind}" for name in SECTIONS}
        found = {name: file for name, file in found.items() if (RESULTS / f"{file}.jsonl").exists()}
        text += "".join(SECTIONS[name](read(file)) for name, file in found.items())
    if (RESULTS / "growth.jsonl").exists():
        text += growth_section(read("growth"))
    (DOCS / "performance.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
