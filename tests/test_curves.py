"""bench/curves.py on two made-up runs; skipped where matplotlib is not installed."""
import json
import subprocess
import sys

import pytest

from conftest import ROOT


def test_curves_of_one_run_and_of_two(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [{"step": 0, "eval/strict": 0.1}] + [{"step": i, "reward": 0.1 * i, "rewards/r/mean": 0.1 * i, "completions/mean_length": 5.0} | ({"eval/strict": 0.5} if i == 3 else {}) for i in (1, 2, 3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for runs in (["a"], ["a", "b"]):
        picture = tmp_path / f"{len(runs)}.png"
        subprocess.run([sys.executable, str(ROOT / "bench" / "curves.py"), str(picture), *(str(tmp_path / run) for run in runs)], check=True)
        assert picture.read_bytes()[:4] == b"\x89PNG"
