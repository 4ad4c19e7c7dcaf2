"""A picture of one run, or of several side by side, from their metrics.jsonl (pip install matplotlib).

    python bench/curves.py picture.png out/arithmetic
    python bench/curves.py picture.png out/grpo out/dapo out/gspo

A run is its folder, or a metrics.jsonl file; its label is the folder's name. One run: sampled rewards, also
of weight 0, held-out accuracy, and the length of completions. Several: accuracy and length of each. The
pictures of docs/ are drawn by bench/figures.py.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402


def read(path: str) -> tuple[str, list[dict], list[dict]]:
    """(label, rows of training steps, rows with an evaluation)."""
    file = Path(path)
    if file.is_dir():
        file = file / "metrics.jsonl"
    label = file.parent.name if file.name == "metrics.jsonl" else file.stem
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [row for row in rows if "reward" in row]
    evaluations = [row for row in rows if "eval/strict" in row]
    return label, steps, evaluations


def curve(axis, rows, key, **style):
    axis.plot([row["step"] for row in rows], [row[key] for row in rows], **style)


def draw_one(left, right, steps, evaluations):
    """Every reward of a run beside its held-out accuracy; and its length."""
    for key in steps[0]:
        if key.startswith("rewards/") and key.endswith("/mean"):
            curve(left, steps, key, lw=1, label=f"{key.split('/')[1]} (sampled)")
    curve(left, evaluations, "eval/strict", marker="o", ms=3, label="held-out accuracy (greedy)")
    curve(right, steps, "completions/mean_length", lw=1)
    left.set_title("rewards and accuracy")


def draw_several(left, right, runs):
    for label, steps, evaluations in runs:
        curve(left, evaluations, "eval/strict", marker="o", ms=3, label=label)
        curve(right, steps, "completions/mean_length", lw=1)
    left.set_title("held-out accuracy (greedy)")


def main(picture: str, *paths: str):
    runs = [read(path) for path in paths]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
    if len(runs) == 1:
        _, steps, evaluations = runs[0]
        draw_one(left, right, steps, evaluations)
    else:
        draw_several(left, right, runs)
    left.set(ylim=(0, 1.02), xlabel="GRPO step", ylabel="share")
    right.set(xlabel="GRPO step", ylabel="tokens", title="completion length")
    right.set_ylim(0)
    left.legend(fontsize=7, frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(9)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("python bench/curves.py PICTURE.png RUN [RUN ..]: a run is its folder, out/NAME")
    main(*sys.argv[1:])
