"""Whether two runs are the same: at which step, and in what, they part.

    python bench/same.py out/a out/b

Compares config.json, and step by step metrics.jsonl: the fingerprint (fingerprint.py: eight digits of the ids
that were drawn, eight of the weights after the step) and every metric that no clock and no memory decides.
Config keys that differ are said; exit status 0 if all steps that both runs have are the same, 1 if not.

Ids that part first were drawn otherwise (another seed, other prompts, another sampler). Weights that part
first were learnt otherwise (another rate, reward or number of processes), and the ids follow later.
"""

import argparse
import json
import sys
from pathlib import Path

# What a clock or a machine's memory decides, and a run's own name.
UNCOMPARED = ("run", "time/", "tokens_per_second/", "memory/", "step_time")
# Config keys of where a run is and how it is watched.
UNSAID = ("resume", "out_dir", "wandb", "wandb_project", "show_every", "rollouts_every")


def read(folder: str) -> tuple[dict, dict[int, dict]]:
    """(config, {step: metrics}) of a run's folder. Raises ValueError where there is no run."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())["config"]
        lines = (Path(folder) / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        # A run that was killed in the middle of a write, or that is being written, ends in half a line.
        rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is not the folder of a run: {error}") from None
    return config, {row["step"]: compared(row) for row in rows}


def compared(row: dict) -> dict:
    """The metrics of a row that two same runs have in common, the fingerprint as its two halves."""
    kept = {key: value for key, value in row.items() if not key.startswith(UNCOMPARED)}
    halves = kept.pop("fingerprint", None)
    if halves:
        kept |= {"ids": halves[:8], "weights": halves[8:]}
    return kept


def changed(a: dict, b: dict) -> list[str]:
    """The keys whose values differ, in the order of a; what only one has differs, too."""
    return [key for key in {**a, **b} if a.get(key, "absent") != b.get(key, "absent")]


def parting(a: dict[int, dict], b: dict[int, dict]) -> tuple[int, list[str]] | None:
    """(step, what differs there) of the first step that both have and that differs; None if none does."""
    for step in sorted(a.keys() & b.keys()):
        keys = changed(a[step], b[step])
        if keys:
            # Ids and weights first: metrics follow from them.
            return step, sorted(keys, key=lambda key: key not in ("ids", "weights"))
    return None


def main(first: str, second: str) -> int:
    (config_a, a), (config_b, b) = read(first), read(second)
    for key in changed(config_a, config_b):
        if key not in UNSAID:
            print(f"config: {key} = {config_a.get(key, 'absent')!r}, {config_b.get(key, 'absent')!r}")
    common = a.keys() & b.keys()
    if not common:
        raise ValueError(f"{first} and {second} have no step in common")
    found = parting(a, b)
    if found:
        step, keys = found
        print(f"they part at step {step}: {', '.join(keys)}")
        for key in keys:
            print(f"  {key}: {a[step].get(key, 'absent')}, {b[step].get(key, 'absent')}")
        return 1
    print(f"the same for {len(common)} steps, up to step {max(common)}")
    for name, mine in ((first, a), (second, b)):
        if len(mine) > len(common):
            print(f"{name} has {len(mine) - len(common)} more, up to step {max(mine)}")
    if not all("weights" in a[step] for step in common if step):
        print("some have no fingerprint: their weights were not compared")
    return 0


if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("first", help="folder of a run")
    parser.add_argument("second", help="folder of another")
    words = parser.parse_args()
    try:
        sys.exit(main(words.first, words.second))
    except ValueError as error:
        sys.exit(f"same.py: {error}")
