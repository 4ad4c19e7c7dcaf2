"""What a person gets to see of a run: the screen, metrics.jsonl, rollouts/, wandb. Nothing here changes what a run learns.

Metric names are TRL's where TRL has one. Every mean is a ratio of two sums over the whole step and all ranks. On the screen: the first lines
say what is trained, then comes one line a step; `-` stands for what a step does not have.

Dims: B prompts a step, G completions a prompt, N = B * G rows, R rewards.
"""
import contextlib
import dataclasses
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import config as configs
import data
import eval as evaluation
import rollout
import sandbox


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """The value of every rank, in rank order."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def say(*words):
    if rank() == 0:
        print(*words, flush=True)


class Timer:
    """Seconds by phase: `with timer("sample"): ..`. On a GPU a phase ends when the device is done, not when Python is."""

    def __init__(self):
        self.start, self.seconds = time.perf_counter(), dict.fromkeys(("sample", "score", "reference", "train"), 0.0)

    @contextlib.contextmanager
    def __call__(self, phase):
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start

    def metrics(self, tokens) -> dict:
        s, total = self.seconds, time.perf_counter() - self.start
        m = {f"time/{phase}": seconds for phase, seconds in s.items()}
        return m | {"step_time": total, "time/other": total - sum(s.values()), "tokens_per_second/sample": tokens / s["sample"],
                    "tokens_per_second/train": tokens / max(1e-9, s["reference"] + s["train"])}


def reward_metrics(run, everyone, rewards) -> dict:
    """rewards (B, G) of all ranks, NaN for None. reward_failures: completions that a reward with a weight could not score, also where others could."""
    groups = [row[~row.isnan()] for row in rewards]
    spread = [float(g.std()) if len(g) > 1 else 0.0 for g in groups]
    metrics = {"reward": float(rewards.nanmean()), "reward_std": sum(spread) / len(spread), "frac_reward_zero_std": len(evaluation.flat_groups(rewards)) / len(rewards)}
    parts = np.concatenate([p for p, _, _, _ in everyone])
    metrics["reward_failures"] = int(np.isnan(parts[:, [weight != 0 for _, _, weight in run.rewards]]).any(1).sum())
    for i, (label, _, _) in enumerate(run.rewards):
        known = parts[:, i][~np.isnan(parts[:, i])]
        metrics |= {f"rewards/{label}/mean": float(known.mean()) if len(known) else None, f"rewards/{label}/std": float(known.std()) if len(known) else None}
    return metrics


def length_metrics(lengths, stopped) -> dict:
    ended = [n for n, s in zip(lengths, stopped) if s] or [0]
    m = {f"completions/{name}_length": f(lengths) for name, f in (("mean", np.mean), ("min", min), ("max", max))}
    m |= {f"completions/{name}_terminated_length": f(ended) for name, f in (("mean", np.mean), ("min", min), ("max", max))}
    return {key: float(value) for key, value in m.items()} | {"completions/clipped_ratio": 1 - sum(stopped) / len(stopped)}


def loss_metrics(stats: dict, difference: float) -> dict:
    """Means over the tokens that were trained on; a step without any has none of them."""
    if not stats:
        return {"loss": 0.0, "policy_loss": 0.0}
    n = stats["tokens"]
    m = {"loss": stats["loss"], "policy_loss": stats["policy_loss"], "entropy": stats["entropy"] / n, "clip_ratio/low_mean": stats["clip_low"] / n,
         "clip_ratio/high_mean": stats["clip_high"] / n, "clip_ratio/region_mean": stats["clip_region"] / n,
         "sampling/sampling_logp_difference/mean": difference, "sampling/sampling_logp_difference/max": stats["diff_max"],
         "sampling/importance_sampling_ratio/mean": stats["ratio_sum"] / n, "sampling/importance_sampling_ratio/min": stats["ratio_min"],
         "sampling/importance_sampling_ratio/max": stats["ratio_max"]}
    return m | ({"kl": stats["kl"] / n} if "kl" in stats else {})


def peak_gb(device) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def write_rollouts(run, batch, adv, entropies):
    """rollouts/step_000010.jsonl: one object a completion, prompts in order (rank 0's share of them)."""
    if rank() != 0:
        return
    folder, G, out = run.out / "rollouts", run.cfg.group_size, batch.out
    folder.mkdir(exist_ok=True)
    labels = [label for label, _, _ in run.rewards]
    with open(folder / f"step_{run.step:06d}.jsonl", "w") as f:
        for n, ids in enumerate(out.ids):
            row = dict(step=run.step, prompt=batch.rows[n // G]["prompt"], completion=batch.texts[n], ids=ids, reward=number(batch.reward[n]),
                       parts={label: number(batch.parts[n, i]) for i, label in enumerate(labels)}, advantage=float(adv[n]),
                       finish_reason="stop" if out.stopped[n] else "length", logprobs=[round(lp, 5) for lp in out.logprobs[n]],
                       entropy=[round(h, 5) for h in entropies[n].tolist()] if n in entropies else None)
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def number(x):
    return None if math.isnan(x) else float(x)


def show_sample(row, text, reward):
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    say(f"      | {shorten(prompt)} -> {shorten(text)}   reward {reward:.2f}")


def shorten(text, n=70):
    text = " ".join(text.split())
    return text if len(text) <= n else text[: n // 2] + " .. " + text[-n // 2 :]


def header(run):
    """What will be trained, what differs from the defaults, what memory it takes, and the first prompt as the model sees it."""
    cfg, m = run.cfg, run.model
    total, trained = sum(p.numel() for p in m.parameters()), sum(p.numel() for p in run.optimizer.params)
    name = torch.cuda.get_device_name() if run.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    say(f"{'scratch' if cfg.scratch else cfg.model}: {m.shape.family}, {total:,} parameters, {trained:,} trained ({f'LoRA {cfg.lora_rank}' if cfg.lora_rank else 'full'}), "
        f"{str(run.dtype).removeprefix('torch.')} on {name}" + (f", {world()} processes" if world() > 1 else ""))
    say("differs from the defaults: " + ", ".join(f"{k}={getattr(v, '__name__', v)!r}" for k, v in configs.differences(cfg).items()))
    say(run.kernels)
    if evaluation.runs_code(run.rewards):
        held = sandbox.isolation()
        say(f"sandbox ({cfg.sandbox}): isolates {', '.join(held)}" + "".join(f"; NOT {name}" for name in sandbox.FULL if name not in held))
    row = run.task.batch(0, 1, cfg.seed)[0]
    ids = data.prompt_ids(run.tokenizer, row["prompt"], system=cfg.system_prompt, prefill=cfg.prefill)
    slots = min(cfg.slots or 256, cfg.prompts_per_step // world() * cfg.group_size)
    cache = rollout.cache_bytes(m.shape, m.embed.itemsize, groups=rollout.group_places(slots, cfg.group_size, cfg.prompts_per_step), slots=slots,
                                prompt_tokens=len(ids), new_tokens=cfg.max_new_tokens)
    state = sum(t.nbytes for t in run.optimizer.state().values()) + 4 * trained
    say(f"memory: weights {sum(p.nbytes for p in m.parameters()) / 1e9:.2f} GB, gradients and optimiser {state / 1e9:.2f} GB, "
        f"reference {'a copy' if run.reference is not None else 'none' if not cfg.beta else 'adapters off'}, KV cache about {cache / 1e9:.2f} GB for {slots} slots")
    say(f"the first prompt, {len(ids)} tokens: " + "|".join(repr(run.tokenizer.decode([i]))[1:-1] for i in ids))


COLUMNS = [("reward", "reward", "7.3f"), ("spread", "reward_std", "7.3f"), ("kl", "kl", "8.4f"), ("entropy", "entropy", "7.3f"), ("length", "completions/mean_length", "7.1f"),
           ("cut%", "completions/clipped_ratio", "6.1%"), ("same%", "frac_reward_zero_std", "6.0%"), ("|grad|", "grad_norm", "7.3f"),
           ("sample t/s", "tokens_per_second/sample", "10,.0f"), ("train t/s", "tokens_per_second/train", "10,.0f")]


def line(run, m=None, left=0.0) -> str:
    """One aligned line of the screen for metrics m, or its heading."""
    columns = COLUMNS[:1] + [(label[:10], f"rewards/{label}/mean", f"{max(7, len(label[:10]))}.3f") for label, _, _ in run.rewards if len(run.rewards) > 1] + COLUMNS[1:]
    cells = [f"{'step':>6}" if m is None else f"{m['step']:6d}"]
    for label, key, spec in columns:
        width = int(spec.split(",")[0].split(".")[0])
        width = max(width, len(label))
        value = None if m is None else m.get(key)
        cells.append(f"{label if m is None else '-' if value is None else format(value, spec):>{width}}")
    return "  ".join(cells) + ("    left" if m is None else f"  {int(left) // 60:3d}:{int(left) % 60:02d}")


def versions() -> dict:
    import transformers

    git = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"], capture_output=True, text=True)
    return dict(git=git.stdout.strip() or None, argv=sys.argv, python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)


class Log:
    """metrics.jsonl, the screen, and wandb where it is switched on."""

    def __init__(self, run):
        self.run, cfg, self.step = run, run.cfg, -1  # the step whose row was written last
        self.active = rank() == 0
        if not self.active:
            return
        keys = {k: str(v) if k == "rewards" else v for k, v in dataclasses.asdict(cfg).items()}
        (run.out / "config.json").write_text(json.dumps(dict(config=keys, **versions()), indent=2, default=str))
        path = run.out / "metrics.jsonl"
        if run.resumed:
            checkpoint.truncate_metrics(path, run.step)
        self.file = open(path, "a" if run.resumed else "w")
        self.wandb = None
        if cfg.wandb:
            import wandb

            self.wandb = wandb.init(project=cfg.wandb_project, name=run.out.name, mode=cfg.wandb, config=keys, dir=str(run.out))

    def write(self, metrics: dict):
        self.step = metrics["step"]
        if self.active:
            self.file.write(json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}) + "\n")
            self.file.flush()
            if self.wandb:
                self.wandb.log(metrics, step=metrics["step"])


def finish(run, before, after):
    """The last lines: before, after, one problem answered before and after, and where everything is."""
    if before and after and before[0]:
        changed = [i for i, (b, a) in enumerate(zip(before[1], after[1])) if b != a] or [0]
        prompt = run.task.eval[changed[0]]["prompt"]
        say(f"\nbefore: {evaluation.summary(before[0])}\nafter:  {evaluation.summary(after[0])}")
        say(f"\n  {shorten(prompt if isinstance(prompt, str) else prompt[-1]['content'], 400)}\n  before: {shorten(before[1][changed[0]], 400)}\n  after:  {shorten(after[1][changed[0]], 400)}\n")
    say(f"curve: {run.out / 'metrics.jsonl'}   rollouts: {run.out / 'rollouts'}   checkpoint: {run.out / 'ckpt' / f'step_{run.step:06d}'}")
