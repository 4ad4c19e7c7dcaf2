"""How many programs a second does the sandbox check, and what does each part of it cost?

    python bench/sandbox.py                     # 40 programs of one test each, one worker a core
    python bench/sandbox.py --programs=200 --workers=8
    python bench/sandbox.py --mode=plain        # or root, user: not what this machine would choose

A program with statement tests takes two sandboxes (its own and the judge's), a stdin test one. `bare` is the
same Python, started without any of it: the floor for a way that starts Python for each program.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tasks import isolation, sandbox

BARE = [isolation.PYTHON, "-s", "-S", "-B", "-c", "import json, os, resource"]
ADD = "def add(a, b):\n    return a + b"
ADD_INPUT = "print(sum(map(int, input().split())))"


def timed(what: str, n: int, call):
    """What call() returns; prints how many of its n things it did in a second."""
    start = time.perf_counter()
    result = call()
    took = time.perf_counter() - start
    print(f"{what:44} {n / took:8.1f} a second  {1000 * took / n:8.1f} ms each")
    return result


def check_programs(what: str, programs: int, workers: int, source: str, tests: list):
    jobs = [(source, tests)] * programs

    def check():
        return sandbox.check_all(jobs, workers=workers, seconds=20)

    verdicts = timed(what, programs, check)
    assert verdicts == [["passed"]] * programs, verdicts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--programs", type=int, default=40)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--mode", choices=("root", "user", "plain"))
    args = parser.parse_args()
    if args.mode:
        chosen = (args.mode, isolation.probed(args.mode))
        isolation.choose = lambda: chosen
    start = time.perf_counter()
    mode, held = isolation.choose()
    took = time.perf_counter() - start
    print(
        f"mode {mode}, isolates {', '.join(held)}; found out in {took:.2f} s; "
        f"{args.workers} workers, {os.cpu_count()} cores"
    )

    def bare():
        for _ in range(args.programs):
            subprocess.run(BARE, check=True)

    timed("bare Python, one after the other", args.programs, bare)
    check_programs("statement tests", args.programs, args.workers, ADD, ["assert add(1, 2) == 3"])
    typed = [dict(input="1 2", output="3")]
    check_programs("stdin tests", args.programs, args.workers, ADD_INPUT, typed)


if __name__ == "__main__":
    main()
