"""How many programs a second does the sandbox check, and what does each part of it cost?

    python bench/sandbox.py                     # 40 programs of one test each, one worker a core
    python bench/sandbox.py --programs=200 --workers=8

A program with statement tests takes two sandboxes (its own and the judge's), a stdin test one. `bare` is the same Python, started without any of it: the
floor for a way that gives each program a fresh process.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sandbox


def timed(what: str, n: int, call):
    start = time.perf_counter()
    result = call()
    took = time.perf_counter() - start
    print(f"{what:44} {n / took:8.1f} a second  {1000 * took / n:8.1f} ms each")
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--programs", type=int, default=40)
    p.add_argument("--workers", type=int, default=os.cpu_count())
    a = p.parse_args()
    start = time.perf_counter()
    mode, held = sandbox.choose()
    print(
        f"mode {mode}, isolates {', '.join(held)}; found out in {time.perf_counter() - start:.2f} s; {a.workers} workers, {os.cpu_count()} cores"
    )
    bare = [sandbox.PYTHON, "-s", "-S", "-B", "-c", "import json, os, resource"]
    timed(
        "bare Python, one after the other",
        a.programs,
        lambda: [subprocess.run(bare, check=True) for _ in range(a.programs)],
    )
    source, statement, typed = (
        "def add(a, b):\n    return a + b",
        ["assert add(1, 2) == 3"],
        [dict(input="1 2", output="3")],
    )
    jobs = [(source, statement)] * a.programs
    verdicts = timed(
        "statement tests", a.programs, lambda: sandbox.check_all(jobs, workers=a.workers, seconds=20)
    )
    assert verdicts == [["passed"]] * a.programs, verdicts
    jobs = [("print(sum(map(int, input().split())))", typed)] * a.programs
    verdicts = timed(
        "stdin tests", a.programs, lambda: sandbox.check_all(jobs, workers=a.workers, seconds=20)
    )
    assert verdicts == [["passed"]] * a.programs, verdicts


if __name__ == "__main__":
    main()
