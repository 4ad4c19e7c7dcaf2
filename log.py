"""What a run writes down: metrics, metrics.jsonl, rollouts/, wandb. Nothing here changes what it learns.

Metric names are TRL's where TRL has one. Every mean is a ratio of two sums over the whole step and
all ranks.

Dims: B prompts a step, G completions a prompt, N = B * G rows, R rewards.
"""

import json
import math
import os
import platform
import subprocess
import sys

import numpy as np
import torch

import checkpoint
import config as configs
import rewards as rewarding
from ranks import rank, say
from screen import what_is_trained
from trackers import Trackers


# --------------------------------------------------------------------------------------------- metrics
def reward_metrics(scores, rewards) -> dict:
    """scores: batch.Scores of all ranks; rewards: [(label, function, weight)], with the step's weights.

    reward_std is over all rewards of the step and reward_spread the mean of the groups', both with ddof 1, as
    TRL's stds are. reward_failures: completions that a reward with a weight could not score, also where
    others could. Where no reward has a weight there is no reward, and only their own means are here.
    """
    parts = scores.parts.flatten(0, 1).numpy()  # (N, R)
    counted = [weight != 0 for _, _, weight in rewards]
    m = sum_metrics(scores, parts[:, counted]) if any(counted) else {}
    for i, (label, _, _) in enumerate(rewards):
        known = parts[:, i][~np.isnan(parts[:, i])]
        m[f"rewards/{label}/mean"] = float(known.mean()) if len(known) else None
        m[f"rewards/{label}/std"] = float(known.std(ddof=1)) if len(known) > 1 else None
    return m


def sum_metrics(scores, counted) -> dict:
    """Of the weighted sums of the rewards. counted: the parts (N, ..) of those with a weight."""
    spread = []
    for group in scores.rewards:
        known = group[~group.isnan()]
        spread.append(float(known.std()) if len(known) > 1 else 0.0)
    flat = rewarding.flat_groups(scores.rewards)
    every = scores.rewards[~scores.rewards.isnan()]
    return {
        "reward": float(scores.rewards.nanmean()),
        "reward_std": float(every.std()) if len(every) > 1 else 0.0,
        "reward_spread": sum(spread) / len(spread),
        "frac_reward_zero_std": len(flat) / len(scores.rewards),
        "reward_failures": int(np.isnan(counted).any(1).sum()),
    }


def logged_sums(logged: list) -> dict:
    """{name: (sum, count)} of what rewards logged with log_metric on this rank. logged: rewards.Logged."""
    sums = {}
    for some in logged:
        for name, values in some.metrics.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = (total + sum(values), count + len(values))
    return sums


def logged_metrics(of_ranks: list, taken) -> dict:
    """Means over the step and all ranks, from the logged_sums of each.

    A name that is one of the run's own metrics (`taken`) gets "logged/" in front.
    """
    m = {}
    for name in sorted({name for sums in of_ranks for name in sums}):
        pairs = [sums[name] for sums in of_ranks if name in sums]
        label = f"logged/{name}" if name in taken else name
        m[label] = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
    return m


def completion_metrics(scores) -> dict:
    """Lengths and entropy of the N completions in batch.Scores. entropy: mean over all tokens, nats."""
    lengths, stopped = scores.lengths, scores.stopped
    terminated = [length for length, ended in zip(lengths, stopped) if ended] or [0]
    m = {"entropy": sum(scores.entropy) / sum(lengths)}
    for name, function in (("mean", np.mean), ("min", min), ("max", max)):
        m[f"completions/{name}_length"] = float(function(lengths))
        m[f"completions/{name}_terminated_length"] = float(function(terminated))
    m["completions/clipped_ratio"] = 1 - sum(stopped) / len(stopped)
    return m


def turn_counts(turns: list) -> dict:
    """Sums over the conversations of a step on this rank. turns: turns.Turns of each call of the sampler."""
    talks = [talk for call in turns for talk in call.talks]
    failed = [sentence for call in turns for sentence in call.failures()]
    said = [len(talk.said) for talk in talks]
    return dict(rows=len(talks), turns=sum(said), most=max(said, default=0), failures=failed)


def turn_metrics(of_ranks: list) -> dict:
    """Means over the step and all ranks, from the turn_counts of each; says the first failure. {} without."""
    rows = sum(counts["rows"] for counts in of_ranks)
    if not rows:
        return {}
    failures = [sentence for counts in of_ranks for sentence in counts["failures"]]
    if failures:
        say(f"{len(failures)} of {rows} rows lost their environment, the first of them: {failures[0]}")
    return {
        "turns/mean": sum(counts["turns"] for counts in of_ranks) / rows,
        "turns/max": max(counts["most"] for counts in of_ranks),
        "turns/env_failures": len(failures),
    }


def loss_metrics(stats: dict, difference: float) -> dict:
    """Means over the tokens that were trained on; a step without any has none of them.

    stats: policy_loss's sums; difference: mean |trainer - sampler|, nats.
    """
    if not stats:
        return {"loss": 0.0, "policy_loss": 0.0}
    n = stats["tokens"]
    m = {
        "loss": stats["loss"],
        "policy_loss": stats["policy_loss"],
        "clip_ratio/low_mean": stats["clip_low"] / n,
        "clip_ratio/high_mean": stats["clip_high"] / n,
        "clip_ratio/region_mean": stats["clip_region"] / n,
        "sampling/sampling_logp_difference/mean": difference,
        "sampling/sampling_logp_difference/max": stats["diff_max"],
        "sampling/importance_sampling_ratio/mean": stats["ratio_sum"] / n,
        "sampling/importance_sampling_ratio/min": stats["ratio_min"],
        "sampling/importance_sampling_ratio/max": stats["ratio_max"],
    }
    if "kl" in stats:
        m["kl"] = stats["kl"] / n
    return m


# ----------------------------------------------------------------------------------------------- files
def write_rollouts(run, step, batch):
    """rollouts/step_000010.jsonl: one object a completion, prompts in order (rank 0's share of them).

    Of each token its id, its text, the sampler's log-probability, the trainer's entropy, and by how much the
    trainer's log-probability differs from the sampler's, in nats; the last two are null for a row that the
    update did not need. `group` is the prompt's number in the step.

    A row of a conversation has more (turns.Turns.for_people): its `turns`, which are messages, env_reward,
    env_failure, and `given`, [first, number] of the tokens of each reply, which have null for all numbers.
    """
    if rank() != 0:
        return
    write_for_people(run.out / "rollouts" / f"step_{step.number:06d}.jsonl", rollout_rows(run, step, batch))


def rollout_rows(run, step, batch):
    """What a person may want to know of each completion of this rank, prompts in order."""
    labels = [label for label, _, _ in run.rewards]
    G = batch.group_size
    pieces = token_texts(run.tokenizer, batch.out.ids)
    for n, ids in enumerate(batch.out.ids):
        drawn = batch.out.logprobs[n]
        entropy, logp = batch.entropies.get(n), batch.logps.get(n)
        difference = None  # of a row that was not computed: it had no advantage
        if logp is not None:
            difference = [round(x - y, 6) + 0.0 for x, y in zip(logp.tolist(), drawn)]
        numbers = dict(
            logprobs=[round(logp, 5) for logp in drawn],
            entropy=None if entropy is None else [round(h, 5) for h in entropy.tolist()],
            difference=difference,
        )
        row = dict(
            step=step.number,
            group=step.numbers[n // G],
            prompt=batch.rows[n // G]["prompt"],
            completion=batch.texts[n],
            ids=ids,
            tokens=[pieces[i] for i in ids],
            reward=none_for_nan(batch.reward[n]),
            parts={label: none_for_nan(batch.parts[n, i]) for i, label in enumerate(labels)},
            advantage=float(batch.adv[n]),
            **logged_columns(batch, n),
            finish_reason="stop" if batch.out.stopped[n] else "length",
        )
        if batch.conversations:
            numbers = {name: beside_ids(values, batch.out.drawn[n]) for name, values in numbers.items()}
            row |= batch.conversations[n] | dict(given=given_spans(batch.out.drawn[n]))
        yield row | numbers


def beside_ids(values: list | None, drawn: list[bool]) -> list | None:
    """Values of drawn ids, one beside each id: null for the others."""
    if values is None:
        return None
    left = iter(values)
    return [next(left) if is_drawn else None for is_drawn in drawn]


def given_spans(drawn: list[bool]) -> list[list[int]]:
    """[first, number] of each run of ids that were given."""
    spans = []
    for i, is_drawn in enumerate(drawn):
        if not is_drawn and i and not drawn[i - 1]:
            spans[-1][1] += 1
        elif not is_drawn:
            spans.append([i, 1])
    return spans


def token_texts(tokenizer, ids) -> dict:
    """{id: its text} of the ids in a list of completions, stop and other special tokens included.

    Each is decoded behind itself, since some tokenizers drop the space before a text's first token. A token
    that is a part of a character is U+FFFD.
    """
    known = sorted({i for row in ids for i in row})
    alone = tokenizer.batch_decode([[i] for i in known])
    twice = tokenizer.batch_decode([[i, i] for i in known])
    return {i: both.removeprefix(one) or one for i, one, both in zip(known, alone, twice)}


def write_answers(run, log, rows, texts, right, conversations):
    """rollouts/eval_000025.jsonl: one object a held-out problem, with its first answer after that step.

    conversations: with an environment the messages of each, `turns` in the file; else None.
    """
    if log.trackers:
        log.trackers.samples(run.state["step"], rows, texts, right)
    if not run.cfg.rollouts_every:
        return
    number, answers = run.state["step"], []
    for problem, (row, text, is_right) in enumerate(zip(rows, texts, right)):
        answer = dict(step=number, problem=problem, prompt=row["prompt"], completion=text, right=is_right)
        answers.append(answer | (dict(turns=conversations[problem]) if conversations else {}))
    write_for_people(run.out / "rollouts" / f"eval_{number:06d}.jsonl", answers)


def write_for_people(path, objects):
    """A line of JSON an object. Nothing is made from these files: a full disk is no reason to stop."""
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in objects]
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        say(f"{path} could not be written ({error.strerror}): going on without it")


def logged_columns(batch, n: int) -> dict:
    """What rewards logged of completion n with log_extra, under "extra", where they logged something."""
    extra = {name: values[n] for name, values in batch.extra.items()}
    return dict(extra=extra) if extra else {}


def none_for_nan(x):
    return None if math.isnan(x) else float(x)


class Log:
    """metrics.jsonl, and the trackers that are switched on. Writes config.json first."""

    def __init__(self, run):
        cfg = run.cfg
        self.active = rank() == 0
        self.path = run.out / "metrics.jsonl"
        self.last = None  # a row that is not written yet; on the other ranks the last one
        if not self.active:
            return
        about = dict(run=run.id, trained=what_is_trained(run), config=run.keys, **versions())
        about["differs"] = list(configs.differences(cfg))  # keys that are not the defaults
        (run.out / "config.json").write_text(json.dumps(about, indent=2, default=str))
        if run.resumed:
            checkpoint.truncate_metrics(self.path, run.state["step"])
        else:
            self.path.write_bytes(b"")
        self.size = self.path.stat().st_size  # bytes of the rows that are in the file
        self.waiting = b""  # rows that a full disk did not take
        self.identity = run.id if self.size == 0 else None  # goes into the first row
        self.trackers = Trackers(run)

    def row(self, step: int) -> dict | None:
        """The row of a step, or None where there is none."""
        for text in self.path.read_text().splitlines():
            row = json.loads(text)
            if row["step"] == step:
                return row
        return None

    def has_evaluation(self, step: int) -> bool:
        row = self.row(step) if self.active else None
        return row is not None and "eval/strict" in row

    def add(self, step: int, metrics: dict):
        """Adds metrics to the last row, which is that of `step`, or writes a row of them."""
        if not self.active:
            return
        row = self.row(step) or dict(step=step)
        checkpoint.truncate_metrics(self.path, step - 1)
        self.size = self.path.stat().st_size
        self.write(row | metrics)

    def write(self, metrics: dict):
        """One row, on the disk or among those that wait for room there."""
        self.last = metrics
        try:
            self.flush()
        except OSError as error:
            say(f"{error.strerror}; its rows are kept and written later")

    def flush(self):
        """Writes what is not written yet. OSError where the disk does not take it; no row is torn.

        A checkpoint may only be saved after this: a run that goes on from it does not write these rows again.
        """
        if not self.active:
            return
        if self.last is not None:
            self.waiting += self.encoded(self.last)
            self.last = None
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.truncate(self.size)  # what an earlier try left of a row
                file.seek(self.size)
                written = file.write(self.waiting)
                if written < len(self.waiting):  # the disk is full, and the next write says so
                    file.write(self.waiting[written:])
        except OSError as error:
            sentence = f"{self.path} could not be written ({error.strerror})"
            raise OSError(error.errno, sentence) from error
        self.size += len(self.waiting)
        self.waiting = b""

    def encoded(self, metrics: dict) -> bytes:
        """A row's line. What is not finite becomes null: JSON has no NaN."""
        row = {}
        if self.identity:
            row["run"], self.identity = self.identity, None
        for key, value in metrics.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            row[key] = value if finite else None
        if self.trackers:
            self.trackers.log(metrics)
        return (json.dumps(row) + "\n").encode()

    def take_over(self):
        """For a rank that ends the run because rank 0 has died, perhaps before it wrote its last row."""
        if self.last is None:
            return
        checkpoint.truncate_metrics(self.path, self.last["step"])  # half a row goes
        self.active, self.identity, self.waiting, self.trackers = True, None, b"", None
        self.size = self.path.stat().st_size
        if self.row(self.last["step"]) is not None:
            self.last = None

    def close(self, report):
        """The end of a run, whole or not. report: the path of its page."""
        if self.active and self.trackers:
            self.trackers.close(report)


def versions() -> dict:
    import transformers

    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    return dict(
        git=git.stdout.strip() or None,
        argv=sys.argv,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
