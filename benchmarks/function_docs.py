"""Write docs/function.md and its drawings from the results of function.py, lite0.py, finetune.py and scratch.py.

python benchmarks/function_docs.py      # needs matplotlib
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from finetune import FORMS
from matplotlib.figure import Figure
from records import Job, read, spread

DOCS = Path(__file__).resolve().parents[1] / "docs"
STEPS = {"near": (0, 100, 300, 800), "far": (0, 100, 400, 1200)}

HEAD = """# How much of the function is kept

Every line is measured on real data by a script in `benchmarks/`; the scripts say where the data come from. Figures are
means over seeds with the standard deviation between them, *n* seeds as stated: each seed trains its own BatchNorm
network, and draws its own images for calibration and fine-tuning.
"""


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def grouped(rows: list[Job], key: Callable[[Job], Any]) -> dict[Any, list[Job]]:
    found: dict[Any, list[Job]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return found


def function_section(rows: list[Job]) -> str:
    by_groups = grouped(rows, lambda row: row["groups"])
    counts = [groups for groups in (32, 16, 8, 1, "auto") if groups in by_groups]
    forms = [name for name in rows[0] if name not in ("groups", "seed", "seconds", "BN")]
    table = markdown(
        [
            "top-1, % of 10,000",
            *("auto" if groups == "auto" else f"{groups} groups" if groups != 1 else "1 group" for groups in counts),
        ],
        [[form, *(spread(row[form] for row in by_groups[groups]) for groups in counts)] for form in forms],
    )
    kept = markdown(
        ["share of BN's accuracy, %", *(str(groups) for groups in counts)],
        [
            [form, *(spread(100 * row[form] / row["BN"] for row in by_groups[groups]) for groups in counts)]
            for form in ("closed form + adaptive WS", "distilled")
        ],
    )
    seeds = len({row["seed"] for row in rows})
    seconds = [row["seconds"] for row in rows]
    bn = spread({row["seed"]: row["BN"] for row in rows}.values())
    draw_function(by_groups, counts, forms)
    return f"""
## Fashion-MNIST

`benchmarks/function.py`: a ResNet of 9 convolutions (`benchmarks/fashion.py`), {seeds} seeds, BatchNorm itself {bn} %.
*Copied*: γ and β kept. *Closed form*: no data. *Calibrated*: moments matched on 1,024 unlabeled training images.
*Distilled*: 300 steps of 64 of them; {min(seconds):.0f} to {max(seconds):.0f} s a run on one core, two runs at a time.

{table}

{kept}

![accuracy by group count](function-groups.png)
"""


def draw_function(by_groups: dict[Any, list[Job]], counts: list[Any], forms: list[str]) -> None:
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, limits in zip(figure.subplots(1, 2), ((0, 100), (88, 94)), strict=True):
        for form in forms:
            values = [mean(row[form] for row in by_groups[g]) for g in counts]
            axes.plot(range(len(counts)), values, marker="o", markersize=4, label=form)
        axes.axhline(mean(row["BN"] for row in by_groups[counts[0]]), color="0.4", linestyle=":", label="BatchNorm")
        axes.set_xticks(range(len(counts)), [str(g) for g in counts])
        axes.set(xlabel="groups", ylabel="test accuracy (%)", ylim=limits)
        axes.spines[["top", "right"]].set_visible(False)
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(DOCS / "function-groups.png", dpi=130)


def lite_section(rows: list[Job]) -> str:
    crops = rows[0]["crops"]
    plain = [row for row in rows if "form" in row and "seed" not in row]
    tuned = [row for row in rows if "seed" in row]
    lines = [[row["form"], f"{row['top1']:.1f}", f"{row['top5']:.1f}"] for row in plain]
    if tuned:
        lines.append(["auto, distilled", spread(r["top1"] for r in tuned), spread(r["top5"] for r in tuned)])
    seconds = ", ".join(f"{row['seconds']:.0f}" for row in tuned)
    return f"""
## EfficientNet-Lite0, ImageNet weights

`benchmarks/lite0.py`: agreement with the original's first answer on {crops} photo crops; calibration saw crops of other
photos. Distillation sees random crops resized to 160 pixels; seeds: {len(tuned)}, seconds on two cores: {seconds}.

{markdown(["agreement, %", "top-1", "original's answer in top 5"], lines)}
"""


def tuning_section(rows: list[Job]) -> str:
    text = """
## Fine-tuning at small batches

`benchmarks/finetune.py`: 32 groups, SGD with momentum 0.9, constant learning rate, no augmentation, no weight decay;
top-1 on 1,500 test images. *Calibrated* here is distilled for 300 steps on 1,024 unlabeled images before it starts.
Near is the task the network was trained on; far is the same images turned by 90° and inverted.
"""
    for (task, batch), found in sorted(grouped(rows, lambda row: (row["task"], row["batch"])).items(), reverse=True):
        by_form = grouped(found, lambda row: row["form"])
        lines = []
        for form, runs in by_form.items():
            rates = grouped(runs, lambda row: row["rate"])
            for rate, tuned in sorted(rates.items()):
                columns = zip(*(row["curve"] for row in tuned), strict=True)
                lines.append([form, f"{rate:g}", str(len(tuned)), *(spread(column) for column in columns)])
        text += f"\n### {task.capitalize()}, batch size {batch}\n\n"
        text += markdown(["form", "learning rate", "seeds", *(f"{step} steps" for step in STEPS[task])], lines) + "\n"
        name = f"function-{task}-{batch}.png"
        draw_tuning(by_form, task, DOCS / name)
        text += f"\n![{task}, batch size {batch}: each form at its best learning rate]({name})\n"
    return text


def draw_tuning(by_form: dict[Any, list[Job]], task: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for form in FORMS:
        runs = by_form[form]
        curves = {
            rate: [mean(values) for values in zip(*(row["curve"] for row in found), strict=True)]
            for rate, found in grouped(runs, lambda row: row["rate"]).items()
        }
        best = max(curves, key=lambda rate: curves[rate][-1])
        style = "-" if form.startswith("normswap") else "--"
        axes.plot(STEPS[task], curves[best], style, marker="o", markersize=3, label=f"{form} ({best:g})")
    axes.set(xlabel="steps", ylabel="test accuracy (%)")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def scratch_section(rows: list[Job]) -> str:
    lines = []
    for (batch, form), runs in grouped(rows, lambda row: (row["batch"], row["form"])).items():
        rates = grouped(runs, lambda row: row["rate"])
        found = [f"{spread(row['accuracy'] for row in rates[rate])} ({len(rates[rate])})" for rate in sorted(rates)]
        lines.append([str(batch), form, *found])
    header = ["batch size", "form", *(f"learning rate {rate:g} (seeds)" for rate in sorted({r["rate"] for r in rows}))]
    return f"""
## From scratch at small batches

`benchmarks/scratch.py`: the same architecture, fresh weights, 2,000 steps, SGD with momentum 0.9; top-1 on 1,500 test
images.

{markdown(header, sorted(lines))}
"""


def main() -> None:
    """Write the page from whatever results there are."""
    sections = (("function", function_section), ("lite0", lite_section), ("finetune", tuning_section))
    text = HEAD
    for name, section in (*sections, ("scratch", scratch_section)):
        rows = read(name)
        if rows:
            text += section(rows)
    (DOCS / "function.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
