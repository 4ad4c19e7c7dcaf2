"""The three pictures of runs in docs/, from the metrics in bench/results.

    python bench/figures.py                        # draws docs/arithmetic.png, presets.png and guess.png
    python bench/figures.py arithmetic FILE OUT    # one picture, of another run's metrics.jsonl

bench/curves.py looks at any run in a moment. This script is for pictures that are read without their
text: every axis has a name and a unit, every curve its name at its end, and no two differ by colour alone.

It needs matplotlib (`pip install matplotlib`), which nothing else here does but bench/curves.py: a
tool of development, in no requirements file.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
GUESSES = RESULTS / "2026-11-27_cpu_guess_turns.jsonl"
ONE_RUN = RESULTS / "2026-11-26_cpu_arithmetic_seed0_metrics.jsonl"

# Colours that a colour-blind reader can tell apart (Okabe and Ito), a line style and a marker for each.
STYLES = {
    "grpo": dict(color="#0072B2", ls="-", marker="o"),
    "gspo": dict(color="#D55E00", ls="--", marker="s"),
    "dapo": dict(color="#009E73", ls="-", marker="^"),
    "dr_grpo": dict(color="#CC79A7", ls="--", marker="D"),
    "cispo": dict(color="#E69F00", ls="-.", marker="v"),
    "reinforce": dict(color="#444444", ls=":", marker="x"),
}


def presets_file(name: str) -> Path:
    return RESULTS / f"2026-11-26_cpu_arithmetic_{name}_seed0_metrics.jsonl"


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def series(rows: list[dict], key: str) -> tuple[list, list]:
    """(steps, values) of the rows that have the key."""
    having = [row for row in rows if key in row]
    return [row["step"] for row in having], [row[key] for row in having]


def percent(rows: list[dict], key: str) -> tuple[list, list]:
    steps, values = series(rows, key)
    return steps, [100 * value for value in values]


def smooth(values: list[float], width: int = 9) -> list[float]:
    """Centred running mean over `width` steps, narrower at both ends."""
    half, means = width // 2, []
    for i in range(len(values)):
        near = values[max(0, i - half) : i + half + 1]
        means.append(sum(near) / len(near))
    return means


def label_ends(axis, ends: list[tuple], gap: float):
    """Writes each curve's name at its right end, at least `gap` (in units of y) from the next one.

    ends: (x, y, name, colour). A thin line joins a name that had to move with its curve's end.
    """
    heights = []
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        height = y if not heights else max(y, heights[-1] + gap)
        heights.append(height)
        axis.annotate(
            name, xy=(x, y), xytext=(x * 1.05, height), color=color, fontsize=8, va="center",
            arrowprops=dict(arrowstyle="-", color=color, lw=0.6, shrinkA=0, shrinkB=2),
            annotation_clip=False,
        )  # fmt: skip


def dress(axis, title: str, x: str, y: str):
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e6e6e6", lw=0.6)


def arithmetic(rows: list[dict], picture: Path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), width_ratios=(1.35, 1))
    ends = []
    curves = {
        "rewards/worked/mean": ("worked, sampled", "#E69F00", "--"),
        "rewards/arithmetic/mean": ("right, sampled", "#0072B2", "-"),
    }
    for key, (name, color, style) in curves.items():
        steps, values = percent(rows, key)
        left.plot(steps, values, color=color, lw=0.5, alpha=0.4)  # each step
        left.plot(steps, smooth(values), color=color, ls=style, lw=1.6)  # mean of nine
        ends.append((steps[-1], smooth(values)[-1], name, color))
    steps, values = percent(rows, "eval/strict")
    left.plot(steps, values, color="#009E73", lw=1.6, marker="o", ms=4)
    ends.append((steps[-1], values[-1], "right, held-out", "#009E73"))
    label_ends(left, ends, gap=6.5)
    left.set(xlim=(0, 100), ylim=(0, 104))
    dress(left, "Thinking is found because it pays", "GRPO step", "share of answers, %")

    steps, values = series(rows, "completions/mean_length")
    right.plot(steps, values, color="#0072B2", lw=0.5, alpha=0.4)
    right.plot(steps, smooth(values), color="#0072B2", lw=1.6)
    right.set(xlim=(0, 100), ylim=(0, 31))
    right.axhline(30, color="#999999", ls=":", lw=1)
    right.text(2, 28.9, "max_new_tokens = 30", fontsize=8, color="#666666", va="top")
    dress(right, "and answers grow longer", "GRPO step", "mean length of an answer, tokens")
    finish(
        figure, "configs/arithmetic.py, seed 0: 429,056 weights; thin: each step, thick: mean of 9", picture
    )


def presets(runs: dict[str, list[dict]], picture: Path):
    """A panel for each preset: its own curves in colour, the other five in grey behind it.

    Several presets lie on top of each other here, so in one panel no style would tell them apart.
    """
    figure, panels = plt.subplots(2, 3, figsize=(9.6, 5.2), sharex=True, sharey=True)
    for panel, name in zip(panels.flat, runs):
        for other, rows in runs.items():
            if other != name:
                panel.plot(*percent(rows, "eval/strict"), color="#c8c8c8", lw=1)
        rows, style = runs[name], STYLES[name]
        steps, values = percent(rows, "rewards/arithmetic/mean")
        panel.plot(steps, smooth(values), color=style["color"], lw=1, alpha=0.7)
        panel.annotate("sampled", (steps[-1], smooth(values)[-1]), (76, 72), fontsize=7, color=style["color"])
        steps, values = percent(rows, "eval/strict")
        panel.plot(steps, values, lw=1.6, ms=4, mfc="none", **style)
        at_20 = values[steps.index(20)]
        panel.annotate(
            f"{at_20:.1f} % at step 20", (20, at_20), (34, min(at_20, 56) - 14), fontsize=8,
            arrowprops=dict(arrowstyle="-", color="#444444", lw=0.6),
        )  # fmt: skip
        panel.annotate("held-out", (100, values[-1]), (74, 103), fontsize=7, color=style["color"])
        panel.set(xlim=(0, 101), ylim=(0, 110), yticks=range(0, 101, 20))
        dress(panel, name, "", "")
    for panel in panels[1]:
        panel.set_xlabel("GRPO step", fontsize=9)
    for panel in panels[:, 0]:
        panel.set_ylabel("right answers, %", fontsize=9)
    title = (
        "configs/arithmetic.py --preset=NAME, seed 0: held-out accuracy (200 sums, greedy; others in grey)"
    )
    finish(figure, title + "\nand sampled accuracy (mean of 9 steps)", picture)


def guess(rows: list[dict], picture: Path):
    """Five seeds of configs/guess.py. rows: seed, step and, of each step or evaluation, its guesses."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), width_ratios=(1.35, 1))
    seeds = {seed: [row for row in rows if row["seed"] == seed] for seed in sorted({r["seed"] for r in rows})}
    sampled = [series(of_seed, "turns/mean")[1] for of_seed in seeds.values()]
    steps = series(seeds[0], "turns/mean")[0]
    for values in sampled:
        left.plot(steps, values, color="#0072B2", lw=0.6, alpha=0.4)
    left.plot(steps, [sum(v) / len(v) for v in zip(*sampled)], color="#0072B2", lw=1.8)
    for level, name in ((5.0, "log2(32) = 5"), (135 / 32, "the best there is: 4.22")):
        left.axhline(level, color="#888888", ls=":", lw=1)
        left.text(1, level + 0.04, name, fontsize=8, color="#666666", va="bottom")
    left.set(xlim=(0, 80), ylim=(3.5, 9.5))
    dress(left, "Few guesses pay, so the model halves", "GRPO step", "guesses a game, sampled")
    for of_seed in seeds.values():
        right.plot(*percent(of_seed, "eval/strict"), color="#009E73", lw=1.1, marker="o", ms=3.5, alpha=0.7)
    right.set(xlim=(0, 82), ylim=(0, 104))
    dress(right, "and seldom needs more than six", "GRPO step", "games of six guesses or fewer, greedy, %")
    title = (
        "configs/guess.py, seeds 0 to 4: a number from 1 to 32 by higher and lower; thick: mean of the seeds"
    )
    finish(figure, title, picture)


def finish(figure, title: str, picture: Path):
    figure.suptitle(title, fontsize=9, color="#444444", x=0.01, ha="left")
    figure.tight_layout(w_pad=2.5)
    figure.savefig(picture, dpi=120, metadata={"Software": None})
    print(f"drawn: {picture}")


def main(words: list[str]):
    if words:
        kind, source, picture = words
        assert kind == "arithmetic", f"{kind}: only the picture of one run is drawn from a file of choice"
        arithmetic(read(source), Path(picture))
        return
    arithmetic(read(ONE_RUN), ROOT / "docs" / "arithmetic.png")
    presets({name: read(presets_file(name)) for name in STYLES}, ROOT / "docs" / "presets.png")
    guess(read(GUESSES), ROOT / "docs" / "guess.png")


if __name__ == "__main__":
    if len(sys.argv) not in (1, 4):
        sys.exit("python bench/figures.py, or python bench/figures.py arithmetic METRICS.jsonl PICTURE.png")
    main(sys.argv[1:])
