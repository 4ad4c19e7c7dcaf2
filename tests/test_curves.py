"""bench/curves.py on two made-up runs; skipped where matplotlib is not installed."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.mark.slow
def test_curves_of_one_run_and_of_two(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        rows = [{"step": 0, "eval/strict": 0.1}]
        for step in (1, 2, 3):
            share = 0.1 * step
            row = {"step": step, "reward": share, "rewards/r/mean": share, "completions/mean_length": 5.0}
            rows.append(row)
        rows[-1]["eval/strict"] = 0.5
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for runs in (["a"], ["a", "b"]):
        picture = tmp_path / f"{len(runs)}.png"
        folders = [str(tmp_path / run) for run in runs]
        subprocess.run([sys.executable, "bench/curves.py", str(picture), *folders], cwd=ROOT, check=True)
        assert picture.read_bytes()[:4] == b"\x89PNG"
