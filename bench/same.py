"""Are two runs the same, and if not, where do they part?

    python bench/same.py out/a out/b

Reads config.json and metrics.jsonl of both: says which keys differ, how many steps have the same ids, weights
and metrics, and what is other at the first step that has not: the ids (then it is the draws, or the weights
before), or the weights alone (then it is the learning). Times and memory are not compared. Exit status: 0 the
same in every step that both have, 1 not, 2 where there is nothing to compare.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rundir  # noqa: E402

# Of the machine, and not of the run.
NOT_COMPARED = ("run", "time/", "step_time", "tokens_per_second/", "memory/", "fingerprint")


def rows_of(folder: str) -> dict[int, dict]:
    """{step: row of metrics.jsonl}. ValueError where there is none."""
    path = Path(folder, "metrics.jsonl")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as e:
        raise ValueError(f"{path} cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise ValueError(f"{path} is not whole: {e}") from None
    found = {row["step"]: row for row in rows}
    if not found:
        raise ValueError(f"{path} has no step")
    return found


def parted(a: dict, b: dict) -> list[str]:
    """What is other in two rows of one step: 'ids', 'weights', names of metrics. Empty: nothing."""
    found = []
    mine, yours = a.get("fingerprint", ""), b.get("fingerprint", "")
    if mine and yours:
        found += ["ids"] * (mine[:8] != yours[:8]) + ["weights"] * (mine[8:] != yours[8:])
    for name in sorted(a.keys() | b.keys()):
        if not name.startswith(NOT_COMPARED) and a.get(name) != b.get(name):
            found.append(name)
    return found


def compare(first: str, second: str) -> tuple[list[str], bool]:
    """(what to print, whether all steps that both have are the same). ValueError: nothing to compare."""
    a, b = rows_of(first), rows_of(second)
    told = []
    configs = [rundir.read(folder).get("config", {}) for folder in (first, second)]
    for key, (mine, yours) in rundir.differences(*configs).items():
        if key not in rundir.UNSAID:
            told.append(f"{key}: {mine!r}, {yours!r}")
    both = sorted(a.keys() & b.keys())
    if not both:
        raise ValueError(f"{first} and {second} have no step in common")
    if not all("fingerprint" in a[step] and "fingerprint" in b[step] for step in both if step):
        told.append("without a fingerprint in every step of both: metrics alone are compared there")
    for i, step in enumerate(both):
        other = parted(a[step], b[step])
        if other:
            told.append(f"the same for {i} steps; at step {step} other: {', '.join(other[:8])}")
            return told, False
    lengths = "" if len(a) == len(b) else f" (of {len(a)} and {len(b)})"
    told.append(f"the same for {len(both)} steps{lengths}")
    return told, True


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("runs", nargs=2, metavar="RUN")
    try:
        told, same = compare(*parser.parse_args().runs)
    except ValueError as e:
        print(f"same.py: {e}", file=sys.stderr)
        return 2
    print("\n".join(told))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
