"""A picture of one run, or of several side by side, from their metrics.jsonl (pip install matplotlib).

    python bench/curves.py docs/arithmetic.png out/arithmetic
    python bench/curves.py docs/presets.png out/grpo out/dapo out/gspo          # folders, or metrics.jsonl files; labels are the folders' names

One run: sampled reward, sampled rewards of weight 0, held-out accuracy, and the length of completions. Several: accuracy and length of each.
"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt


def read(path: str) -> tuple[str, list[dict], list[dict]]:
    """(label, rows of training steps, rows with an evaluation)."""
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return file.parent.name if file.name == "metrics.jsonl" else file.stem, [r for r in rows if "reward" in r], [r for r in rows if "eval/strict" in r]


def curve(axis, rows, key, **style):
    axis.plot([r["step"] for r in rows], [r[key] for r in rows], **style)


def main(picture: str, *paths: str):
    runs = [read(path) for path in paths]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
    for label, steps, evaluations in runs:
        alone = len(runs) == 1
        for key in (k for k in steps[0] if alone and k.startswith("rewards/") and k.endswith("/mean")):
            curve(left, steps, key, lw=1, label=f"{key.split('/')[1]} (sampled)")
        curve(left, evaluations, "eval/strict", marker="o", ms=3, label="held-out accuracy (greedy)" if alone else label)
        curve(right, steps, "completions/mean_length", lw=1, label=None if alone else label)
    left.set(ylim=(0, 1.02), xlabel="GRPO step", title="accuracy" if len(runs) > 1 else None)
    right.set(xlabel="GRPO step", title="completion length, tokens")
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
