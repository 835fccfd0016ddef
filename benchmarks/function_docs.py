"""Write docs/function.md and its drawings from the results of function.py, finetune.py and scratch.py.

python benchmarks/function_docs.py      # needs matplotlib
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from finetune import FORMS, OTHERS, RATES, STEPS, TEST_IMAGES
from function import FEWER, MATCHED, USUAL
from function import FORMS as CONVERSIONS
from function import STEPS as STEPS_DISTILLED
from matplotlib.figure import Figure
from records import Job, read, spread

DOCS = Path(__file__).resolve().parents[1] / "docs"
HEAD = """# How much of the function is kept

Every line is measured on real data by a script in `benchmarks/`; the scripts say where the data come from. Figures are
means over seeds with the standard deviation between them, *n* seeds as stated: each seed trains its own BatchNorm
network, and draws its own images for calibration and fine-tuning. What is kept of ImageNet networks is told in
[equalization](equalization.md#how-much-it-keeps).
"""


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def grouped(rows: list[Job], key: Callable[[Job], Any]) -> dict[Any, list[Job]]:
    found: dict[Any, list[Job]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return found


def accuracies(form: str, rows: list[Job]) -> str:
    return spread(row[form] for row in rows if form in row)


def shares(form: str, rows: list[Job]) -> str:
    return spread(100 * row[form] / row["BN"] for row in rows if form in row)


def function_section(rows: list[Job]) -> str:
    by_groups = grouped([row for row in rows if row["shrink"] is None], lambda row: row["groups"])
    by_shrink = grouped([row for row in rows if row["shrink"] is not None], lambda row: row["shrink"])
    titles = {32: "32 groups", 16: "16 groups", 8: "8 groups", 1: "1 group", "auto": "auto"}
    counts = [groups for groups in titles if groups in by_groups]
    forms = [*CONVERSIONS, "distilled"]
    table, kept = (
        markdown([title, *(titles[g] for g in counts)], [[f, *(told(f, by_groups[g]) for g in counts)] for f in forms])
        for title, told in (("top-1, %", accuracies), ("share of BatchNorm's, %", shares))
    )
    seeds = len(by_groups[USUAL])
    shortest, longest = (f"{find(row['seconds'] for row in by_groups[USUAL]):.0f}" for find in (min, max))
    bn = spread(row["BN"] for row in by_groups[USUAL])
    shrinks = markdown(
        ["share of BatchNorm's, %", *(f"shrink {shrink:g}" for shrink in sorted(by_shrink))],
        [[form, *(shares(form, by_shrink[shrink]) for shrink in sorted(by_shrink))] for form in MATCHED],
    )
    draw_function(by_groups, counts)
    return f"""
## Fashion-MNIST

`benchmarks/function.py`: a ResNet of 9 convolutions (`benchmarks/fashion.py`), {seeds} seeds, 10,000 test images;
BatchNorm itself {bn} %. *γ, β copied*: what everybody writes by hand, filters as they are. *Not equalized*: γ and β
matched, `equalize=False`. *convert(model)*: no images and no option but the group count. *Made-up images*:
`batches="synthetic"`. *128 and 256 images*: `batches=` with so many training images, without labels. *Distilled*:
`calibrate(…, steps={STEPS_DISTILLED})` on batches of 64 of 1,024 such images; with the
conversion {shortest} to {longest} s of one core of a busy machine.

{table}

{kept}

![accuracy by group count](function-groups.png)

32 groups by `shrink`, on the first {FEWER:,} test images, {min(map(len, by_shrink.values()))} seeds:

{shrinks}
"""


def draw_function(by_groups: dict[Any, list[Job]], counts: list[Any]) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for form in MATCHED:
        values = [mean(row[form] for row in by_groups[g]) for g in counts]
        axes.plot(range(len(counts)), values, marker="o", markersize=4, label=form)
    usual = by_groups[USUAL]
    axes.plot(counts.index(USUAL), mean(row["distilled"] for row in usual), "*", color="k", label="distilled")
    axes.axhline(mean(row["BN"] for row in usual), color="0.4", linestyle=":", label="BatchNorm")
    axes.set_xticks(range(len(counts)), [str(g) for g in counts])
    axes.set(xlabel="groups", ylabel="test accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(DOCS / "function-groups.png", dpi=130)


def tuning_section(rows: list[Job]) -> str:
    text = f"""
## Fine-tuning at small batches

`benchmarks/finetune.py`: the same networks and forms, 32 groups where none are named, SGD with momentum 0.9, constant
learning rate, no augmentation, no weight decay; top-1 on {TEST_IMAGES:,} test images. Near is the task the
network was trained on; far is the same images turned by 90° and inverted. All forms see the same images in one order.

![accuracy by learning rate, near and far](function-tuning.png)
"""
    draw_tuning(rows)
    for (task, batch), found in sorted(grouped(rows, lambda row: (row["task"], row["batch"])).items(), reverse=True):
        lines = []
        by_form = grouped(found, lambda row: row["form"])
        for form in (form for form in FORMS | OTHERS if form in by_form):
            for rate, tuned in sorted(grouped(by_form[form], lambda row: row["rate"]).items()):
                columns = zip(*(row["curve"] for row in tuned), strict=True)
                lines.append([form, f"{rate:g}", str(len(tuned)), *(spread(column) for column in columns)])
        text += f"\n### {task.capitalize()}, batch size {batch}\n\n"
        text += markdown(["form", "learning rate", "seeds", *(f"{step} steps" for step in STEPS[task])], lines) + "\n"
    return text


def draw_tuning(rows: list[Job]) -> None:
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = (("near", 2, 100, (80, 95)), ("far", 1, 1200, (0, 85)))
    for axes, (task, batch, step, limits) in zip(figure.subplots(1, 2), panels, strict=True):
        place = STEPS[task].index(step)
        for form in FORMS | OTHERS:
            runs = [row for row in rows if (row["task"], row["batch"], row["form"]) == (task, batch, form)]
            rates = grouped(runs, lambda row: row["rate"])
            values = [mean(row["curve"][place] for row in rates[rate]) for rate in sorted(rates)]
            style = "--" if form.startswith("BN") else "-"
            axes.plot(sorted(rates), values, style, marker="o", markersize=4, label=form)
        axes.set_xscale("log")
        axes.set_xticks(RATES[task], [f"{rate:g}" for rate in RATES[task]], minor=False)
        axes.minorticks_off()
        axes.set(xlabel="learning rate", ylabel="test accuracy (%)", ylim=limits)
        axes.set_title(f"{task}, batch size {batch}, after {step:,} steps", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(DOCS / "function-tuning.png", dpi=130)


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
    sections = (("function", function_section), ("finetune", tuning_section), ("scratch", scratch_section))
    text = HEAD
    for name, section in sections:
        rows = read(name)
        if rows:
            text += section(rows)
    (DOCS / "function.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
