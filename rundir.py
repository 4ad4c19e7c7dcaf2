"""out/NAME holds one run. Nothing of another run is taken up, written over or deleted.

    run = rundir.claim("out/gsm8k")          # a new run: what was there is moved to out/gsm8k.1 first
    known = rundir.read("out/gsm8k")         # what a run that is resumed was started with

A run gets an identity when it starts, a random word that stands in config.json, in the first row of
metrics.jsonl and in the state of every checkpoint. A resumed run keeps it, and takes up only what has it.
What changes on resume is said; what the start, the order of the data or the draws depend on may not change.
"""

import fcntl
import itertools
import json
import secrets
from pathlib import Path

import checkpoint

OURS = ("config.json", "metrics.jsonl", "rollouts", "ckpt", "start", "report.html", "curves.svg")  # a run's

# Keys that weights, data order and draws depend on: a resumed run must have the same.
IDENTITY = (
    "model", "base", "scratch", "alphabet", "adapter", "lora_rank", "lora_alpha", "lora_targets", "seed",
    "sft_steps", "sft_batch", "sft_lr", "task", "task_options", "train_file", "system_prompt", "prefill",
    "prompts_per_step", "optimizer_bits", "reference",
)  # fmt: skip
# Keys of how a run is watched or where it runs; their change is nobody's business.
UNSAID = ("resume", "out_dir", "device", "threads", "wandb", "wandb_project", "show_every", "rollouts_every")


def plain(value):
    """A config's value as JSON can hold it: a function is its name, a pair or tuple a list."""
    if callable(value):
        return getattr(value, "__name__", str(value))
    if isinstance(value, dict):
        return {str(key): plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    return value


def read(out: str | Path) -> dict:
    """The config.json of the run in a folder; {} where there is none, or none that can be read."""
    try:
        found = json.loads((Path(out) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_used(out: str | Path) -> bool:
    return any((Path(out) / name).exists() for name in OURS)


def new_identity() -> str:
    return secrets.token_hex(8)


def claim(out: str | Path) -> tuple[str, Path | None]:
    """(the identity of a new run, where an earlier run in `out` was moved to, or None).

    Raises ValueError where `out` cannot be moved or written to.
    """
    out, moved = Path(out), None
    if is_used(out):
        moved = move_aside(out)
    checkpoint.writable(out)
    return new_identity(), moved


def hold(out: str | Path):
    """A lock on the folder: an open file, which the system closes when this process ends, however it ends.

    None where another process holds it. By it the other ranks know whether rank 0 is gone.
    """
    file = open(Path(out) / ".lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it, or a file system has no locks
        file.close()
        return None
    return file


def move_aside(out: Path) -> Path:
    """Renames the folder to NAME.1, or the first free number after it. Returns the new path."""
    here = Path.cwd().resolve()
    if out.resolve() == here or out.resolve() in here.parents:
        raise ValueError(
            f"{out} holds an earlier run and cannot be moved aside, since we stand in it: "
            "go on with it, --resume=True, or choose another, --out_dir=PATH"
        )
    for number in itertools.count(1):
        aside = out.with_name(f"{out.name}.{number}")
        if not aside.exists():
            break
    try:
        out.rename(aside)
    except OSError as error:
        raise ValueError(
            f"{out} holds an earlier run and cannot be moved to {aside} ({error.strerror}): "
            "go on with it, --resume=True, or choose another, --out_dir=PATH"
        ) from None
    # An adapter names the model that it sits on by its path, which has just become another.
    for adapter in (aside / "ckpt").glob("step_*/adapter_config.json"):
        config = json.loads(adapter.read_text())
        if config["base_model_name_or_path"] == str(out / "start"):
            config["base_model_name_or_path"] = str(aside / "start")
            adapter.write_text(json.dumps(config, indent=2))
            checkpoint.rewrite_manifest(adapter.parent)
    return aside


def differences(before: dict, now: dict) -> dict:
    """{key: (before, now)} of the keys that both have, with other values. Values as `plain` makes them."""
    now = json.loads(json.dumps(now))
    return {key: (before[key], now[key]) for key in before if key in now and before[key] != now[key]}


def check_resumable(before: dict, now: dict, out) -> list[str]:
    """What has changed since the run in `out` was started, one phrase a key.

    before, now: all keys of the config, plain. Raises ValueError for a change of a key in IDENTITY.
    """
    changed = differences(before, now)
    refused = [key for key in changed if key in IDENTITY]
    if refused:
        theirs = ", ".join(f"{key} {changed[key][0]!r}" for key in refused)
        mine = ", ".join(f"{key} {changed[key][1]!r}" for key in refused)
        raise ValueError(
            f"the checkpoints in {out} were made with {theirs}; this run has {mine}, on which weights, data "
            "or draws depend: go on with the same values, or start anew in another out_dir"
        )
    said = [key for key in changed if key not in UNSAID]
    return [f"{key} {changed[key][0]!r} -> {changed[key][1]!r}" for key in said]
