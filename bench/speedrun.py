"""A record to beat: trains to a target from several seeds, and prints one JSON line.

    python bench/speedrun.py                                     # the laptop's track, five seeds
    python bench/speedrun.py --lr=1e-4 --prompts_per_step=8      # an attempt: keys of config.py may follow
    python bench/speedrun.py --config=mine.py                    # another config file
    python bench/speedrun.py --track=gpu --data_dir=data         # Qwen2.5-0.5B-Instruct on GSM8K, three seeds
    python bench/speedrun.py --track=gpu-coder --model=Qwen/Qwen2.5-Coder-0.5B-Instruct

docs/speedrun.md has the rules and the records. A run is train.py's own, in a process for each seed, and ends
at the first evaluation of the track's watched held-out problems that reaches the target. The clock is the sum
of `step_time` in its metrics.jsonl: sampling, rewards, loss and update of every step, and none of loading,
warm-up, evaluating and saving. The model that it saved is then graded on fresh held-out problems, on which
nothing was decided, because the first evaluation above a target may be a lucky one.

Exit status: 0 where every seed reached the target and the fresh problems confirm it, 1 where not, 2 where the
rules do not allow the attempt or it could not run.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bandwidth  # noqa: E402
import config as configs  # noqa: E402
import data  # noqa: E402
import rewards as rewarding  # noqa: E402
from evaluation import evaluate, wilson  # noqa: E402
from policy import find_model, load_policy, pick_device  # noqa: E402
from rollout import Sampler  # noqa: E402

# Keys of which every attempt has the values of the track's config: the task, the model that training starts
# from, how answers are graded, and no second teacher.
FIXED = (
    "scratch", "alphabet", "adapter", "base", "task", "task_options", "train_file", "eval_file",
    "system_prompt", "prefill", "reward_weights", "reference", "sft_steps", "sft_batch", "sft_lr", "env",
    "eval_samples", "eval_max_new_tokens",
)  # fmt: skip
# Keys that this script gives to train.py itself.
OURS = ("seed", "out_dir", "resume", "device", "eval_problems")


@dataclass(frozen=True)
class Track:
    """What is trained, and when it is done. docs/speedrun.md says it in words."""

    config: str  # whose values the keys of FIXED have
    target: float  # share of right answers, greedy
    seeds: tuple[int, ...]
    watched: int  # the first held-out problems, which end a run
    fresh: int  # the next ones, which the saved model is graded on
    held_out: str  # hash_of_rows of both
    device: str
    defaults: dict  # keys that an attempt may set otherwise
    sizes: dict | None = None  # what a checkpoint's config.json must say


QWEN_05B = dict(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2,
)  # fmt: skip
QUIET = dict(save_every=0, rollouts_every=0, show_every=0)  # a run saves at its end in any case
GPU = dict(
    config="configs/gsm8k.py", seeds=(0, 1, 2), watched=660, fresh=659, held_out="e90ffdd4b3bc8c73",
    device="cuda", defaults=dict(eval_every=20, steps=1000, **QUIET), sizes=QWEN_05B,
)  # fmt: skip
TRACKS = {
    "laptop": Track(
        config="configs/arithmetic.py", target=0.97, seeds=(0, 1, 2, 3, 4), watched=500, fresh=500,
        held_out="6bc6b208fab03962", device="cpu", defaults=dict(eval_every=5, threads=1, **QUIET),
    ),
    "gpu": Track(target=0.50, **GPU),
    "gpu-coder": Track(target=0.38, **GPU),
}  # fmt: skip
MOST_THREADS = 2  # of the laptop's track


# ------------------------------------------------------------------------------------------------- the rules
def load(track: Track, config: str, words: list[str]) -> configs.Config:
    """The attempt's config. ValueError where the rules do not allow it, with what to type instead."""
    given = {key for key, _ in configs.split(words)[1]}
    for key in OURS:
        if key in given:
            raise ValueError(
                f"{key} is the track's, not the attempt's: leave --{key} out (--seeds has seeds)"
            )
    stop_at = [] if "stop_at" in given else [f"--stop_at=eval/strict>={track.target}"]
    defaults = [f"--{key}={value}" for key, value in track.defaults.items() if key not in given]
    ours = [f"--eval_problems={track.watched}", f"--device={track.device}"]
    cfg = configs.load([config, *defaults, *stop_at, *words, *ours])
    check_rules(track, cfg)
    return cfg


def check_rules(track: Track, cfg: configs.Config):
    """ValueError for a config that is another task, model or grader than the track's."""
    rules = configs.load([str(ROOT / track.config)])
    for key in FIXED:
        mine, theirs = getattr(cfg, key), getattr(rules, key)
        if mine != theirs:
            raise ValueError(
                f"{key} = {configs.shown(mine):.80} breaks the rules: this track has "
                f"{configs.shown(theirs):.80} (docs/speedrun.md); leave it as in {track.config}"
            )
    # The first grades an evaluation. What is given no weight is shown and not trained on.
    wanted = counted(rules.rewards)
    if counted(cfg.rewards) != wanted or cfg.rewards[0] != rules.rewards[0]:
        raise ValueError(
            f"rewards = {cfg.rewards!r:.80} break the rules: {wanted} are trained on and come first, "
            "others may follow with weight 0"
        )
    check_goal(track, cfg)
    if track.device == "cpu" and not 1 <= cfg.threads <= MOST_THREADS:
        raise ValueError(f"threads = {cfg.threads} breaks the rules: 1 or {MOST_THREADS} are allowed")
    if track.sizes:
        check_sizes(track, cfg.model)


def counted(rewards: list) -> list:
    return [entry for entry in rewards if entry[1] != 0]


def check_goal(track: Track, cfg: configs.Config):
    """A run may aim above the target, so that the fresh problems confirm it, and not below."""
    name, comparison, number = configs.goal_of(cfg.stop_at)
    if name != "eval/strict" or comparison != ">=" or number < track.target:
        raise ValueError(
            f"stop_at = {cfg.stop_at!r} breaks the rules: give eval/strict>= and {track.target} or more"
        )


def check_sizes(track: Track, model: str):
    folder, _, _ = find_model(model)
    sizes = json.loads(Path(folder, "config.json").read_text())
    for key, size in track.sizes.items():
        if sizes.get(key) != size:
            raise ValueError(
                f"{model} has {key} = {sizes.get(key)} and breaks the rules: this track's model has {size}"
            )


def hash_of_rows(rows: list[dict]) -> str:
    """16 hexadecimal digits by which a set of problems and answers is known."""
    pairs = [[row["prompt"], row["answer"]] for row in rows]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def check_data(track: Track, cfg: configs.Config, task, seeds: list[int]):
    """ValueError where the held-out problems are not the track's, or one of them would be trained on."""
    found = hash_of_rows(task.eval)
    if found != track.held_out:
        raise ValueError(
            f"the {len(task.eval)} held-out problems are not the track's: they hash to {found} and not to "
            f"{track.held_out}; take the task's files as they were published"
        )
    held_out = {row["prompt"] for row in task.eval}
    for seed in seeds:
        for step in range(cfg.steps):
            for row in task.batch(step, cfg.prompts_per_step, seed):
                if row["prompt"] in held_out:
                    raise ValueError(f"step {step + 1} of seed {seed} would train on a held-out problem")


# ---------------------------------------------------------------------------------------------------- a seed
def train(config: str, cfg: configs.Config, words: list[str], seed: int, folder: Path) -> dict:
    """Runs train.py with one seed. Returns its rows of metrics.jsonl and the whole process's seconds."""
    keys = ["eval_every", "stop_at", "threads", "steps", *QUIET, "device", "eval_problems"]
    ours = [f"--{key}={getattr(cfg, key)}" for key in keys]
    script = str(ROOT / "train.py")
    command = [sys.executable, script, config, *words, *ours, f"--seed={seed}", f"--out_dir={folder}"]
    started = time.perf_counter()
    status = subprocess.run(command, stdout=sys.stderr).returncode
    seconds = time.perf_counter() - started
    if status:
        raise ValueError(f"train.py ended with status {status} at seed {seed}: it says why above")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if "step_time" not in rows[-1]:
        raise ValueError(f"seed {seed} has {cfg.stop_at} before its first step: there is nothing to time")
    return dict(rows=rows, wall=seconds)


def result_of(rows: list[dict], goal: str) -> dict:
    """What a run's rows of metrics.jsonl say: seconds by the clock, steps, tokens, accuracies.

    The run ended with the evaluation that reached the goal, or with its last step.
    """
    steps = [row for row in rows if "step_time" in row]
    sampling = sum(row["time/sample"] for row in steps)
    tokens = sum(row["tokens_per_second/sample"] * row["time/sample"] for row in steps)
    last = rows[-1]
    return dict(
        reached=configs.goal_reached(goal, last),
        seconds=sum(row["step_time"] for row in steps),
        steps=len(steps),
        before=rows[0].get("eval/strict"),
        watched=last.get("eval/strict"),
        watched_interval=[last.get("eval/strict_low"), last.get("eval/strict_high")],
        tokens=round(tokens),
        sampling_seconds=sampling,
    )


def grade(track: Track, cfg: configs.Config, task, folder: Path) -> dict:
    """The saved model on the fresh problems: their share of right answers, greedy."""
    device, dtype = pick_device(cfg.device, cfg.dtype, cfg.threads)
    model, tokenizer, stop_ids, _ = load_policy(str(folder), dtype=dtype, device=device)
    metrics, _ = evaluate(
        Sampler(model.eval()), tokenizer, task.eval[track.watched :], rewarding.resolve(cfg.rewards),
        stop_ids=stop_ids, **configs.evaluation_options(cfg),
    )  # fmt: skip
    return dict(fresh=metrics["eval/strict"])


# ---------------------------------------------------------------------------------------------------- a line
def spread(values: list[float]) -> dict:
    """Mean, sample standard deviation (None of one value), least and most."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return dict(mean=statistics.mean(values), sd=deviation, least=min(values), most=max(values))


def summary(track: Track, results: list[dict]) -> dict:
    """What all seeds say together: the time, and whether the target was reached."""
    share = statistics.mean(result["fresh"] for result in results)
    problems = track.fresh * len(results)
    tokens = sum(result["tokens"] for result in results)
    reached = all(result["reached"] for result in results)
    return dict(
        seconds=spread([result["seconds"] for result in results]),
        steps=spread([result["steps"] for result in results]),
        fresh=share,
        fresh_interval=list(wilson(share * problems, problems)),
        reached=reached and share >= track.target,
        tokens=tokens,
        tokens_per_s=tokens / sum(result["sampling_seconds"] for result in results),
    )


def objections(track: Track, found: dict, seeds: list[int], dirty: bool | None) -> list[str]:
    """Why a result is no record, as far as a script can see it. Empty: nothing is in its way."""
    why = []
    missed = [result["seed"] for result in found["runs"] if not result["reached"]]
    if missed:
        why.append(f"the target was not reached from seeds {missed}")
    if found["fresh"] < track.target:
        why.append(
            f"on fresh problems {found['fresh']:.2%} are right in the mean and {track.target:.0%} are the "
            "target: aim higher, --stop_at"
        )
    if tuple(seeds) != track.seeds:
        why.append(f"the track's seeds are {list(track.seeds)}")
    if dirty is None:
        why.append("the code is in no git repository, so nobody knows which it was")
    elif dirty:
        why.append("there are changes that no commit has")
    return why


def commit() -> tuple[str | None, bool | None]:
    """(hash of the commit, whether files differ from it), or (None, None) outside of a repository."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None, None
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return head.stdout.strip(), bool(changes.stdout.strip())


def device_name(device: str) -> str:
    """The GPU's name, or the processor's as Linux has it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"


def attempt(name: str, track: Track, config: str, words: list[str], seeds: list[int], folder: Path) -> dict:
    """The whole line: a run of each seed, graded, and decoding's share of the memory bandwidth."""
    if track.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"the track {name} needs a GPU, and torch sees none here: --track=laptop needs none")
    cfg = load(track, config, words)
    everything = configs.task_options(cfg) | dict(eval_problems=track.watched + track.fresh)
    task = data.load_task(cfg.task, **everything)
    check_data(track, cfg, task, seeds)
    code, dirty = commit()  # now: the code may change while it runs
    load_before = os.getloadavg()
    places = [folder / f"{name}_seed{seed}" for seed in seeds]
    trained = [train(config, cfg, words, seed, place) for seed, place in zip(seeds, places)]
    # Graded when all are trained: a model in this process would leave less of a GPU's memory to the others.
    runs = []
    for seed, place, run in zip(seeds, places, trained):
        result = dict(seed=seed, **result_of(run["rows"], cfg.stop_at), wall_seconds=run["wall"])
        runs.append(result | grade(track, cfg, task, place))
    found = dict(track=name, target=track.target, goal=cfg.stop_at, **summary(track, runs), runs=runs)
    against = objections(track, found, seeds, dirty)
    return found | dict(
        record=not against,
        objections=against,
        mbu=bandwidth.of_config(cfg, str(places[-1])),
        model=cfg.model if cfg.scratch is None else "random weights",
        device=device_name(track.device),
        threads=cfg.threads if track.device == "cpu" else None,
        load=[load_before[0], os.getloadavg()[0]],
        torch=torch.__version__,
        commit=code,
        dirty=dirty,
        command=shlex.join(["python", "bench/speedrun.py", *sys.argv[1:]]),
        date=time.strftime("%F"),
    )


def seeds_of(text: str) -> list[int]:
    words = text.split(",") if text else []
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--seeds={text} are no seeds: write them as 0,1,2")
    return [int(word) for word in words]


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--track", choices=TRACKS, default="laptop")
    parser.add_argument("--seeds", default="", help="such as 0,1,2; the track's, where none are given")
    parser.add_argument("--config", default="", help="a config file; the track's, where none is given")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "speedrun", help="folder for the runs")
    a, words = parser.parse_known_args()
    track = TRACKS[a.track]
    try:
        seeds = seeds_of(a.seeds) or list(track.seeds)
        config = a.config or str(ROOT / track.config)
        # What runs and their progress say goes to stderr, so that stdout has the JSON line alone.
        with contextlib.redirect_stdout(sys.stderr):
            found = attempt(a.track, track, config, words, seeds, a.out)
    except (ValueError, OSError) as e:
        print(f"speedrun.py: {e}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0 if found["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
