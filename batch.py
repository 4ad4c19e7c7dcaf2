"""The record of a step and its completions: what sampling yields, what all ranks
know of it, and its micro-batches.

A Step is made when a step begins and goes to sampler, trainer, advantages and log. A Batch holds one rank's
completions. Scores are gathered from all ranks, once: everything that a step decides is made from them.

Dims: B prompts a step, G completions a prompt, N = B * G rows of the step, n of them on this rank; R
rewards; T completion tokens of a micro-batch.
"""

import contextlib
import time
from dataclasses import dataclass, field

import numpy as np
import torch

import model as models
from kernels.sample import token_keys
from loss import Tokens
from ranks import gather
from rollout import Rollout


# Added to the seed for LoRA's dropout, so that its random bits are not those of the draws.
DROPOUT = 15_485_863


class Timer:
    """Seconds and memory by phase: `with timer("sample"): ..`. On a GPU a phase ends when the device is done.

    peaks: memory.Peaks of the run, whose phases are these.
    """

    def __init__(self, peaks):
        self.peaks = peaks
        self.start = time.perf_counter()
        self.seconds = dict.fromkeys(("sample", "score", "reference", "train"), 0.0)

    @contextlib.contextmanager
    def __call__(self, phase):
        start = time.perf_counter()
        with self.peaks(phase):
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start

    def metrics(self, tokens: int) -> dict:
        """tokens: drawn in the step, over all ranks."""
        seconds, total = self.seconds, time.perf_counter() - self.start
        m = {f"time/{phase}": spent for phase, spent in seconds.items()}
        m["step_time"] = total
        m["time/other"] = total - sum(seconds.values())
        for phase, size in self.peaks.of.items():
            m[f"memory/{phase}_gb"] = size / 1e9
        m["memory/peak_gb"] = max(self.peaks.note(), self.peaks.highest) / 1e9
        m["tokens_per_second/sample"] = tokens / seconds["sample"]
        m["tokens_per_second/train"] = tokens / max(1e-9, seconds["reference"] + seconds["train"])
        return m


@dataclass
class Scores:
    """What sampling and scoring gave on all ranks, rank by rank. NaN is a reward of None."""

    prompts: list  # B, text or messages
    parts: torch.Tensor  # (B, G, R) float64, of each reward
    rewards: torch.Tensor  # (B, G) float64, their weighted sum
    lengths: list[int]  # N, tokens
    stopped: list[bool]  # N, ended by a stop id; False: cut by the length limit
    entropy: list[float]  # N, nats, the sum over the row's tokens, of the distributions they were drawn from


@dataclass
class Step:
    """The record of a step, made at its start. Sampler, trainer, advantages and log all read it."""

    number: int  # from 1, as metrics.jsonl counts; draws are keyed by it
    group_size: int  # G
    rows: list[dict]  # this rank's share of the step's prompts, as the task gives them
    numbers: list[int]  # their numbers among all prompts of the step, which draws are keyed by
    sampling: dict  # temperature, top_k, top_p, min_p: of the sampler and of the trainer
    rewards: list[tuple]  # (label, function, weight), with this step's weights
    lr: float
    timer: Timer
    drawn: Scores | None = None  # of all ranks, as first drawn: what the log shows, so that curves compare
    scores: Scores | None = None  # of all ranks, as trained on: after groups without signal were replaced
    logged: list = field(default_factory=list)  # rewards.Logged of each call of the rewards, on this rank
    tokens_drawn: int = 0  # on this rank
    tokens_read: int = 0  # on this rank: each completion counts its prompt, and what it was given
    turns: list = field(default_factory=list)  # turns.Turns of each call of the sampler, on this rank
    micro_batches: list[int] = field(default_factory=list)  # tokens of each, on this rank
    resampled: int = 0  # prompts that dynamic sampling used, on this rank


@dataclass
class Batch:
    """This rank's completions of a step: n = rows * G of them, laid end to end."""

    rows: list[dict]
    prompts: list[list[int]]  # ids
    out: Rollout
    texts: list[str]
    parts: np.ndarray  # (n, R) of each reward, NaN for None
    reward: np.ndarray  # (n,)
    adv: torch.Tensor | None = None  # (n,) float64
    kept: torch.Tensor | None = None  # (n,) bool: counts in the loss and in its divisor
    needed: torch.Tensor | None = None  # (n,) bool: has a gradient, so it is computed
    entropy_bar: torch.Tensor | None = None  # nats; tokens below it leave the policy term
    conversations: list | None = None  # n, of each row what rollouts/ shows of its turns
    extra: dict = field(default_factory=dict)  # column -> n values, which rewards logged for rollouts/
    old_logp: list[list[float]] | None = None  # n, what ratios compare with; None: the policy as it is
    entropies: dict = field(default_factory=dict)  # row -> (C,) nats, of the trainer, as far as computed
    logps: dict = field(default_factory=dict)  # the same of log-probabilities, before the first update

    @property
    def group_size(self) -> int:
        return len(self.out.ids) // len(self.prompts)

    @property
    def answers(self) -> list[str]:
        """What the rewards graded: the texts, or of conversations what the model said last."""
        if not self.conversations:
            return self.texts
        return [talk["turns"][-1]["content"] for talk in self.conversations]

    def replace_group(self, b: int, other: "Batch", i: int):
        """Group i of another batch takes the place of group b."""
        G = self.group_size
        self.rows[b], self.prompts[b] = other.rows[i], other.prompts[i]
        here, there = slice(b * G, b * G + G), slice(i * G, i * G + G)
        for name in ("ids", "drawn", "logprobs", "stopped", "entropies"):
            getattr(self.out, name)[here] = getattr(other.out, name)[there]
        for name in ("texts", "parts", "reward", *(["conversations"] if self.conversations else [])):
            getattr(self, name)[here] = getattr(other, name)[there]
        for name in self.extra.keys() | other.extra.keys():
            column = self.extra.setdefault(name, [None] * len(self.texts))
            column[here] = other.extra.get(name, [None] * len(other.texts))[there]

    def lengths(self, numbers: list[int]) -> list[int]:
        """How many tokens each of these rows drew. What it was given between turns is nowhere counted."""
        return [len(self.out.logprobs[n]) for n in numbers]

    def drawn(self, numbers: list[int]) -> list[list[bool]]:
        """Which ids of these rows were drawn and are scored, for packing.Packed."""
        return [self.out.drawn[n] for n in numbers]

    def tokens(self, numbers: list[int], device) -> Tokens:
        """What the tokens of the rows `numbers` carry, laid end to end."""

        def flat(values):
            return torch.tensor([x for n in numbers for x in values[n]], device=device)  # (T,) float32

        lengths = torch.tensor(self.lengths(numbers))
        rows = torch.arange(len(numbers)).repeat_interleave(lengths)
        weight = None if self.entropy_bar is None else flat(self.out.entropies) >= self.entropy_bar
        return Tokens(
            rows=rows.to(device),
            adv=self.adv[numbers].float().to(device),
            lengths=lengths.to(device),
            sampler_logp=flat(self.out.logprobs),
            old_logp=None if self.old_logp is None else flat(self.old_logp),
            weight=weight,
        )


def gather_scores(batch) -> Scores:
    """The scores of all ranks. A mean is then a ratio of two sums over the whole step."""
    G, lengths = batch.group_size, batch.lengths(range(len(batch.out.ids)))
    prompts = [row["prompt"] for row in batch.rows]
    entropy = [sum(row) for row in batch.out.entropies]
    mine = Scores(prompts, batch.parts.copy(), batch.reward.copy(), lengths, list(batch.out.stopped), entropy)
    everyone = gather(mine)
    parts = torch.from_numpy(np.concatenate([scores.parts for scores in everyone]))  # (N, R)
    rewards = torch.from_numpy(np.concatenate([scores.rewards for scores in everyone]))  # (N,)
    return Scores(
        prompts=[prompt for scores in everyone for prompt in scores.prompts],
        parts=parts.unflatten(0, (-1, G)),
        rewards=rewards.view(-1, G),
        lengths=[length for scores in everyone for length in scores.lengths],
        stopped=[stopped for scores in everyone for stopped in scores.stopped],
        entropy=[entropy for scores in everyone for entropy in scores.entropy],
    )


def micro_batches(batch, groups, micro_tokens: int):
    """Yields (numbers, prompts, completions) of the rows in these groups that are
    needed, a micro-batch at a time.

    numbers: the rows' numbers in the batch; prompts and completions: what the model scores, in the same
    order.
    """
    G, completions = batch.group_size, []  # the completions of each prompt; [] is a row to leave out
    for b in range(len(batch.prompts)):
        group = batch.out.group(b, G)
        wanted = [b in groups and bool(batch.needed[b * G + g]) for g in range(G)]
        completions.append([ids if wanted[g] else [] for g, ids in enumerate(group)])
    for cut in models.micro_batches(batch.prompts, completions, micro_tokens):
        numbers = [b * G + g for b, members in cut for g in members]
        yield numbers, [batch.prompts[b] for b, _ in cut], [[completions[b][g] for g in gs] for b, gs in cut]


def stream_keys(seed: int, step, numbers: list[int], prompts, completions):
    """64 random bits (T,) int64 for each token of the packed stream of a micro-batch, for LoRA's dropout.

    They are a function of (seed, step, the prompt's number, sample, position). Arguments as `micro_batches`
    yields them. The stream is that of packing.py: prompt, then its completions without their last token.
    """
    prompt_numbers, samples, positions = [], [], []
    rows, G = iter(numbers), step.group_size
    for prompt, group in zip(prompts, completions):
        members = [next(rows) for _ in group]
        number = step.numbers[members[0] // G]
        parts = [(0, 0, len(prompt))]  # (sample, first position, tokens); 0 is the prompt, which all read
        parts += [(1 + n % G, len(prompt), len(ids) - 1) for n, ids in zip(members, group)]
        for sample, first, tokens in parts:
            prompt_numbers += [number] * tokens
            samples += [sample] * tokens
            positions += range(first, first + tokens)
    where = [torch.tensor(x) for x in (prompt_numbers, samples, positions)]
    return token_keys(seed + DROPOUT, step.number, *where)


def share_of_useful_tokens(batch) -> float:
    """The share of all completion tokens, over all ranks, whose row has an advantage."""
    lengths = batch.lengths(range(len(batch.out.ids)))
    useful = sum(length for length, adv in zip(lengths, batch.adv.tolist()) if adv)
    counts = gather((useful, sum(lengths)))
    return sum(u for u, _ in counts) / sum(n for _, n in counts)
