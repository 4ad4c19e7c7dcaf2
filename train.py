"""GRPO, top to bottom: sample groups of answers, score them, make what beat its group likelier.

    python train.py configs/arithmetic.py                      # a laptop, three minutes
    python train.py configs/gsm8k.py --lr=2e-6                 # one GPU; any key of config.py may follow
    python train.py configs/gsm8k.py --resume=True             # go on from the newest whole checkpoint
    torchrun --nproc_per_node=4 train.py configs/gsm8k.py      # the same run on four processes

One step (`train_step`): B prompts -> G completions of each (rollout.py) -> rewards (rewards.py) -> advantages
(loss.py) -> updates (`update`): forward, loss and backward in micro-batches of whole groups (model.py,
head.py, loss.py), then AdamW (optim.py) -> one line on the screen and one row in metrics.jsonl (log.py).

What stays the same over the steps is made once, in run.py. What a step draws and learns is a function of
the config, the seed and the step's number, so a run that is killed and resumed ends with the same bits as
one that was not. out/NAME/ holds what a run made: config.json, metrics.jsonl, rollouts/, ckpt/, report.html.

Dims: B prompts a step, G completions a prompt, N = B * G rows of the step, n of them on this rank; R
rewards; T completion tokens of a micro-batch.
"""

import progress

if __name__ == "__main__":  # the imports below take seconds, and Ctrl-C is one sentence from here on
    progress.begin("train.py")

import contextlib
import signal
import sys
import time
from functools import partial

import numpy as np
import torch

import checkpoint
import checks
import config as configs
import data
import lora
import memory
import optim
import ranks
import report
import rewards as rewarding
import shard
from batch import Batch, Step, Timer, gather_scores, micro_batches, share_of_useful_tokens, stream_keys
from evaluation import evaluate, missing_form, refuse_hopeless
from fingerprint import fingerprint, hash_of_ids
from head import policy_head
from kernels.logprob import any_truncation
from log import (
    Log,
    completion_metrics,
    logged_metrics,
    logged_sums,
    loss_metrics,
    reward_metrics,
    turn_counts,
    turn_metrics,
    write_answers,
    write_rollouts,
)
from loss import add_stats, highest, normaliser, normalize_then_sum
from ranks import gather, rank, say, world
from rewards import flat_groups
from run import Run
from screen import evaluated, finish, header, legend, line, say_memory, show_sample, what_next
from trackers import push

# Largest |trainer - sampler| in nats that rounding explains. fp32 is compared by its worst token. In bf16
# single tokens differ by tenths between two correct implementations, so there, and in fp16, the mean is what
# tells a wrong model from a rounded one.
MISMATCH = {torch.float32: ("max", 1e-3), torch.bfloat16: ("mean", 0.05), torch.float16: ("mean", 0.05)}
# Added to the seed for the prompts of dynamic sampling, so that they are neither the steps' nor the
# warm-up's.
EXTRA_PROMPTS = 7_919


class Stop(Exception):
    """The run cannot go on, for the reason given."""


def begin_step(run, number: int) -> Step:
    cfg = run.cfg
    lr = optim.learning_rate(
        number - 1, lr=cfg.lr, warmup_steps=cfg.warmup_steps, steps=cfg.steps, schedule=cfg.schedule
    )
    # Ranks take every world-th row. The numbers go with the rows, so that a prompt's completions are the same
    # ids on any rank and with any number of ranks.
    return Step(
        number=number,
        group_size=cfg.group_size,
        rows=run.task.batch(number - 1, cfg.prompts_per_step, cfg.seed)[rank() :: world()],
        numbers=list(range(rank(), cfg.prompts_per_step, world())),
        sampling=configs.sampling_options(cfg, number),
        rewards=rewards_at(run, number),
        lr=lr,
        timer=Timer(run.peaks),
    )


def rewards_at(run, number: int) -> list[tuple]:
    """(label, function, weight) of each reward, with the weights of this step."""
    if run.cfg.reward_weights is None:
        return run.rewards
    weights = run.cfg.reward_weights(number)
    if len(weights) != len(run.rewards):
        raise ValueError(
            f"reward_weights gave {len(weights)} weights at step {number} for {len(run.rewards)} rewards"
        )
    return [(label, f, float(weight)) for (label, f, _), weight in zip(run.rewards, weights)]


# -------------------------------------------------------------------------------------------- one step
def train_step(run, number: int) -> dict:
    """One step: sample, score, compare within groups, learn. Returns its row for metrics.jsonl."""
    cfg = run.cfg
    step = begin_step(run, number)  # its rows, temperature, rate: functions of the config and of `number`

    # Sample G completions of each prompt and score them. Every rank works on its own prompts, and from here
    # on every rank knows all rewards: a baseline, a scale or a mean may need them. Weights that are spread
    # over ranks (shard.py) are whole inside, for the sampler.
    with run.whole_weights():
        batch = draw(run, step)

    # A completion is good if it beats its group; make its tokens likelier, and those of the others less
    # likely.
    A, advantage_state = advantages_of(run, step)  # (B, G), of all ranks
    batch.adv = A.chunk(world())[rank()].reshape(-1)  # (n,)
    metrics = learn(run, step, batch)

    useful, weights_hash = share_of_useful_tokens(batch), run.weights_hash()  # of all ranks
    # The step is complete. From here on it counts: this is the one place where the run's state changes.
    ids = hash_of_ids(step.numbers, cfg.group_size, batch.out.ids)
    mine = (step.tokens_drawn, step.tokens_read, ids, logged_sums(step.logged), turn_counts(step.turns))
    *counts, logged, turns = zip(*gather(mine))
    drawn, read, ids = [sum(of_ranks) for of_ranks in counts]
    num_tokens = run.state["num_tokens"] + drawn + read
    run.state = dict(step=number, num_tokens=num_tokens, advantage=advantage_state)
    run.sync_reference(number)
    run.whole = True

    # All below is for people: it changes nothing that is learnt. Nothing below may need another rank: where
    # one is gone, this step would be saved and its row would not be written.
    epoch = run.task.epoch(number, cfg.prompts_per_step)
    metrics |= dict(step=number, num_tokens=num_tokens, epoch=epoch, resampled_prompts=step.resampled)
    if run.dtype == torch.float16:
        metrics["loss_scale"] = run.optimizer.loss_scale
    metrics |= reward_metrics(step.drawn, step.rewards)
    metrics |= completion_metrics(step.drawn)
    metrics["fingerprint"] = fingerprint(ids, weights_hash)
    metrics |= step.timer.metrics(drawn)
    metrics["frac_tokens_with_advantage"] = useful
    metrics |= turn_metrics(turns)
    metrics |= logged_metrics(logged, metrics)
    if callable(cfg.temperature):
        metrics["temperature"] = step.sampling["temperature"]
    if not run.checked_memory:
        run.checked_memory = True
        say_memory(run, step, batch)
    if cfg.rollouts_every and number % cfg.rollouts_every == 0:
        write_rollouts(run, step, batch)
    if cfg.show_every and number % cfg.show_every == 0:
        conversation = batch.conversations[0] if batch.conversations else None
        show_sample(batch.rows[0], batch.texts[0], batch.reward[0], conversation)
    return metrics


def draw(run, step) -> Batch:
    """The step's completions on this rank, scored; the scores of all ranks are in step.scores."""
    cfg = run.cfg
    with ranks.together():  # a reward that fails on one rank stops all of them
        batch = sample_and_score(run, step, step.rows, step.numbers)
    step.drawn = step.scores = gather_scores(batch)
    if step.number == 1 and configs.has_reward(cfg) and not cfg.force:
        # A run in which no group has two different rewards would burn hours and learn nothing.
        # Of each rank the reward whose form is missing most, and in how many answers.
        of_ranks, missing = gather(missing_form(step.rewards, batch.answers)), None
        if of_ranks[0]:
            label, lost = of_ranks[0][0], sum(lost for _, lost in of_ranks)
            missing = label, lost / len(step.drawn.stopped)
        refuse_hopeless(
            step.drawn.rewards,
            step.drawn.stopped,
            cfg.max_new_tokens,
            within_groups=not callable(cfg.advantage),
            missing=missing,
            has_turns=bool(cfg.env),
        )
    if cfg.resample_zero_groups:
        resample(run, step, batch)
        step.scores = gather_scores(batch)
    return batch


def sample_and_score(run, step, rows, numbers) -> Batch:
    """Samples a group for each of these rows and scores it. numbers: of the rows in the
    step, which draws are keyed by.
    """
    cfg, prompts = run.cfg, []
    for row in rows:
        ids = data.prompt_ids(run.tokenizer, row["prompt"], system=cfg.system_prompt, prefill=cfg.prefill)
        prompts.append(ids)
    # Slow rewards (a judge, tests of a program) can be computed while other groups are still being sampled.
    background = rewarding.InBackground() if cfg.reward_overlap else None
    turns = run.converse(rows, cfg.group_size)  # None, or what environments answer

    def score_group(b, ids):
        """Scores a finished group while the others are still being sampled."""
        background.submit(b, score_rows, run, step, [rows[b]], list(ids), turns, b * cfg.group_size)

    with step.timer("sample"):
        run.samples.eval()  # no LoRA dropout in the sampler
        out = run.sampler.generate(
            prompts,
            group_size=cfg.group_size,
            max_new_tokens=cfg.max_new_tokens,
            stop_ids=run.stop_ids,
            seed=cfg.seed,
            step=step.number,
            prompt_numbers=numbers,
            entropy=True,
            on_group=score_group if background else None,
            turns=turns,
            max_context=cfg.max_context,
            **step.sampling,
        )
    # Text is made from the ids once, for the rewards and the log, and never becomes ids again.
    with step.timer("score"), progress.doing("scoring"):
        scored = background.results() if background else [score_rows(run, step, rows, out.ids, turns)]
    # Counted here, because dynamic sampling comes through here several times in a step.
    step.tokens_drawn += out.stats["tokens"]
    step.tokens_read += cfg.group_size * sum(map(len, prompts)) + sum(map(len, out.ids)) - out.stats["tokens"]
    texts, parts, reward, logged = zip(*scored)
    texts = [text for some in texts for text in some]
    step.logged += logged
    more = dict(extra=rewarding.joined_columns(logged))
    if turns:
        step.turns.append(turns)
        more["conversations"] = turns.for_people(out, cfg.max_new_tokens)
    return Batch(rows, prompts, out, texts, np.concatenate(parts), np.concatenate(reward), **more)


def score_rows(run, step, rows, ids, turns=None, first=0):
    """Texts, reward parts (n, R), rewards (n,), NaN for None, and what the rewards logged, of completions
    `ids`: group_size of each row. turns: their conversations, where these are the rows from `first` on.
    """
    state = rewarding.TrainerState(step.number, run.cfg.steps)
    logged = rewarding.Logged(len(ids))
    options = configs.reward_options(run.cfg) | dict(state=state, logged=logged)
    if turns:
        options["heard"] = turns.heard(range(first, first + len(ids)))
    return *rewarding.score_completions(run.tokenizer, rows, ids, step.rewards, **options), logged


def resample(run, step, batch):
    """Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): new prompts for groups without signal.

    The extra prompts are a stream of their own, a function of (seed, step). In each round every group that is
    flat, in the order of their numbers over all ranks, gets the next of them, which the group's rank samples;
    what is flat again stays as it was. So the same prompts are used on any number of ranks.
    """
    cfg, G = run.cfg, run.cfg.group_size
    budget = cfg.resample_budget or cfg.prompts_per_step
    extra = run.task.batch(step.number - 1, budget, cfg.seed + EXTRA_PROMPTS)
    # In rounds, because a new group may be flat again; `budget` bounds what a step can cost.
    while step.resampled < budget:
        # By the spread of their rewards, not their mean: rewards need not be 0 and 1.
        mine = [step.numbers[b] for b in flat_groups(batch.reward.reshape(-1, G))]
        flat = sorted(number for of_rank in gather(mine) for number in of_rank)
        flat = flat[: budget - step.resampled]
        if not flat:
            break
        # Which of the extra prompts each flat group gets. Every rank computes the same, and samples for the
        # groups that are its own.
        place = {number: step.resampled + i for i, number in enumerate(flat)}  # in `extra`
        groups = [b for b, number in enumerate(step.numbers) if number in place]
        places = [place[step.numbers[b]] for b in groups]
        with ranks.together():
            replace_groups(run, step, batch, groups, [extra[i] for i in places], places)
        step.resampled += len(flat)


def replace_groups(run, step, batch, groups, rows, places):
    """Samples these rows, and puts those with a spread of rewards in the place of the batch's `groups`."""
    if not groups:
        return
    # Their numbers follow those of the step's own prompts, so no two completions share random numbers.
    numbers = [run.cfg.prompts_per_step + i for i in places]
    new = sample_and_score(run, step, rows, numbers)
    flat_again = flat_groups(new.reward.reshape(-1, run.cfg.group_size))
    for i, b in enumerate(groups):
        if i not in flat_again:
            batch.replace_group(b, new, i)


def advantages_of(run, step):
    """(A (B, G), the state that the advantage keeps) of the whole step: some scales
    need the rewards of all ranks.
    """
    scores, state = step.scores, run.state["advantage"]
    if not configs.has_reward(run.cfg):  # what is learnt is the KL to a teacher
        return torch.zeros_like(scores.rewards), state
    if run.cfg.combine == "normalize_then_sum":  # GDPO looks at each reward by itself
        weights = torch.tensor([weight for _, _, weight in step.rewards], dtype=torch.float64)
        return normalize_then_sum(scores.parts, weights), state
    A, state = run.advantages(scores.rewards, scores.prompts, state)
    assert A.shape == scores.rewards.shape, f"advantages {tuple(A.shape)} of {tuple(scores.rewards.shape)}"
    return A, state


# -------------------------------------------------------------------------------------------- learning
def learn(run, step, batch) -> dict:
    """The updates of a step: `epochs` passes over its groups, each in `minibatches` parts. Returns metrics.

    One update is the usual case. With several the ratio leaves 1 and clipping has something to do; the
    divisor is that of the update.
    """
    cfg = run.cfg
    updates = cfg.epochs * cfg.minibatches
    # Not when the run begins: the sampler's cache and graphs, which it keeps, are there only now.
    if not run.micro_tokens:
        run.micro_tokens = choose_micro_tokens(run)
    choose_tokens(run, step, batch, updates)
    # Each update is a whole optimiser step. `total` adds the sums of all of them up, so that a mean over
    # tokens is one division at the end.
    total, grad_norms = {}, []
    for i in range(updates):
        # Whole groups, since a group shares its prompt; each is in one minibatch of every epoch. By their
        # numbers in the step, so that minibatches do not depend on how many ranks there are.
        part = i % cfg.minibatches
        groups = [b for b, number in enumerate(step.numbers) if number % cfg.minibatches == part]
        stats, grad_norm = update(run, step, batch, groups, first=i == 0)
        if i == 0:
            first = stats
        total = add_stats(total, {k: torch.tensor(v, dtype=torch.float64) for k, v in stats.items()})
        grad_norms.append(grad_norm)
    total = {key: float(value) for key, value in total.items()}
    if total:
        # A mean over updates; and sampler against trainer only where both had the same weights.
        total |= dict(loss=total["loss"] / updates, policy_loss=total["policy_loss"] / updates)
        total["diff_max"] = first.get("diff_max", 0.0)
    metrics = dict(learning_rate=step.lr, grad_norm=sum(grad_norms) / updates)
    return metrics | loss_metrics(total, mean_difference(first))


def choose_micro_tokens(run) -> int:
    """How many tokens an update takes at once, from the memory that is free now, beside weights and sampler.

    Large micro-batches keep a GPU busy: at 12,000 tokens it waits for Python's launches for a quarter of the
    time, at 49,000 it does not (bench/results, H100). A CPU gains nothing beyond 8,192.
    """
    device = run.model.device
    if device.type != "cuda":
        return memory.CPU_TOKENS
    torch.cuda.empty_cache()  # what torch holds and does not use counts as free
    free, _ = torch.cuda.mem_get_info(device)
    tokens = memory.micro_tokens_for(free, run.cfg, run.model.shape, "cuda", run.teacher_shape)
    say(f"micro-batches of {tokens:,} tokens: {free / 1e9:.1f} GB are free")
    return tokens


def choose_tokens(run, step, batch, updates: int):
    """Which rows and tokens of the batch are in the loss, and what their ratios compare with."""
    cfg, stopped = run.cfg, torch.tensor(batch.out.stopped)
    batch.kept = stopped if cfg.mask_truncated else torch.ones_like(stopped)
    # Rows with advantage 0 give no policy gradient, so their forward and backward are skipped unless a KL
    # or entropy term needs them. Their tokens still count in the divisor.
    every_row = bool(cfg.beta or cfg.entropy_coef)
    batch.needed = batch.kept & ((batch.adv != 0) | every_row)
    if cfg.top_entropy < 1:
        # One bar for the step, from the sampler's entropies, so that it does not depend on micro-batches.
        mine = [h for n, row in enumerate(batch.out.entropies) if batch.kept[n] for h in row]
        entropies = torch.tensor([h for of_rank in gather(mine) for h in of_rank])
        if len(entropies):
            batch.entropy_bar = entropies[highest(entropies, cfg.top_entropy)].min()
    # The sampler's own, of the distribution that each token was drawn from: with one update the ratio is
    # then 1 but for rounding, and how far it is from 1 shows whether sampler and trainer are one model.
    batch.old_logp = batch.out.logprobs
    if cfg.mismatch_clip:
        # The ratio is then the trainer's to itself from before the first update, and what the sampler
        # differs by is a weight. With one update that is the policy as it is.
        batch.old_logp = trainer_logp(run, step, batch) if updates > 1 else None


def update(run, step, batch, groups, first: bool):
    """One optimiser step on the rows of these groups. Returns policy_loss's sums over all
    ranks, and the gradient's norm.

    first: nothing of this step has been learnt yet.
    """
    cfg = run.cfg
    # One divisor for the whole update, over all ranks. Dividing by a micro-batch's own count would make the
    # gradient depend on how the step is cut.
    # In fp16 the loss is scaled up, by way of its divisor, so that no gradient is too small for it.
    scale = run.optimizer.loss_scale
    objective = run.objective | dict(norm=step_normaliser(cfg, batch, groups) / scale)
    rows = int(batch.needed.view(-1, cfg.group_size)[groups].sum())
    with ranks.together(), shard.in_step(run.model), progress.doing("updating", rows) as bar:
        stats = accumulate_gradients(run, step, batch, groups, objective, bar)

    # Before anything is learnt from it: is the trainer the model that the sampler drew from?
    stats = sum_stats(stats)
    for name in {"loss", "policy_loss"} & stats.keys():
        stats[name] /= scale
    if first:
        check_mismatch(run, step, stats)
    # AdamW clips the gradient's norm and takes its step in place, so the sampler's CUDA graphs stay good.
    with step.timer("train"):
        # A sum and not a mean: the divisor is that of all ranks already.
        if not run.optimizer.summed:
            ranks.sum_over_ranks(run.optimizer.grads())
        grad_norm = float(run.optimizer.step(step.lr, max_norm=cfg.max_grad_norm))
        run.whole = False  # until the step is complete
        run.optimizer.zero_grad()
        ranks.take_from_owners(run.optimizer.params, run.optimizer.owners)
        run.weights_changed()
    return stats, grad_norm


def accumulate_gradients(run, step, batch, groups, objective, bar) -> dict:
    """Forward, loss and backward of the rows of these groups. Returns policy_loss's sums on this rank.

    bar: shows a person how many rows are done.
    """
    # A micro-batch is as much as fits into memory. With one divisor for the step, how it is cut changes the
    # gradient by rounding only.
    model, stats = run.model, {}
    micro = micro_batches(batch, groups, run.micro_tokens)
    # Where ranks share the weights they compute in step: one with fewer micro-batches joins in with empty
    # ones.
    nothing = ([], *shard.NOTHING)
    for numbers, prompts, completions in shard.rounds(micro, model, nothing, run.reference):
        if not numbers:
            join_in(run, step, prompts, completions)
            continue
        tokens = batch.tokens(numbers, model.device)  # old_logp, adv, rows, .. of its T tokens
        with step.timer("reference"):
            tokens.ref_logp, exact_reference = look_up_reference(
                run, step, prompts, completions, batch.drawn(numbers)
            )
        with step.timer("train"), dropout_of(run, step, numbers, prompts, completions):
            model.train()
            # A group's prompt stands once in the packed stream; the gradients of all its completions flow
            # into it.
            drawn = batch.drawn(numbers)  # what was given between turns is seen, and not scored
            hidden, targets = model.completion_hidden(prompts, completions, drawn)  # (T, D), (T,)
            logp = torch.empty_like(tokens.sampler_logp)  # (T,)
            loss, entropy, sums = policy_head(
                hidden, model.head, targets, tokens, objective, reference=exact_reference, logp_out=logp,
                **step.sampling,
            )  # fmt: skip
            with shard.agreed(model):
                if not torch.isfinite(loss.detach()):
                    refuse_loss(run, step, loss, prompts, completions, tokens)
            loss.backward()  # gradients add up over micro-batches
        bar.show(bar.done + len(numbers))
        step.micro_batches.append(packed_tokens(prompts, completions))
        # Sums and not means, so that micro-batches, and ranks later, may be added up in any grouping.
        stats = add_stats(stats, sums)
        # Of the step's first update, when the weights are those that the rows were drawn with.
        lengths = tokens.lengths.tolist()
        for n, of_entropy, of_logp in zip(numbers, entropy.split(lengths), logp.split(lengths)):
            batch.entropies.setdefault(n, of_entropy)
            batch.logps.setdefault(n, of_logp)
    return stats


def packed_tokens(prompts, completions) -> int:
    """Tokens of a micro-batch: a prompt counts once for its group."""
    return sum(map(len, prompts)) + sum(len(ids) for group in completions for ids in group)


def join_in(run, step, prompts, completions):
    """The passes of a micro-batch that another rank has and this one has not. They teach nothing."""
    with step.timer("train"):
        look_up_reference(run, step, prompts, completions)
        run.model.train()
        shard.learn_nothing(run.model)


def dropout_of(run, step, numbers, prompts, completions):
    """The context in which LoRA's dropout is a row's own, whatever micro-batch or rank it is in."""
    if not run.cfg.lora_dropout:
        return contextlib.nullcontext()
    keys = stream_keys(run.cfg.seed, step, numbers, prompts, completions)
    return lora.dropout_keys(run.model, keys.to(run.model.device))


def step_normaliser(cfg, batch, groups) -> float:
    """The divisor of the update, from the lengths of all ranks, known before its first micro-batch."""
    G, kept = cfg.group_size, []
    for b in groups:
        kept += batch.lengths([n for n in range(b * G, b * G + G) if batch.kept[n]])
    lengths = [length for of_rank in gather(kept) for length in of_rank]
    return normaliser(lengths, aggregate=cfg.aggregate, group_size=G, max_new_tokens=cfg.max_new_tokens)


@torch.no_grad()
def look_up_reference(run, step, prompts, completions, drawn=None):
    """(ref_logp (T,), None), or (None, exact_kl's arguments of the reference); (None, None) at beta 0."""
    if not run.cfg.beta:
        return None, None
    # The same tokens under the model that training started from, or under a teacher. With LoRA the start is
    # this model with its adapters off, so no second copy is held.
    with run.as_reference() as reference:
        # The exact KL needs the reference's whole distribution, which head.py makes
        # a chunk at a time from these.
        if run.cfg.kl == "full":
            hidden, _ = reference.completion_hidden(prompts, completions, drawn)
            return None, (hidden, reference.head.detach(), run.cfg.kl_direction, run.cfg.kl_top)
        logp, _, _ = reference.completion_logprobs(prompts, completions, drawn=drawn, **step.sampling)
        return logp, None


@torch.no_grad()
def trainer_logp(run, step, batch) -> list[list[float]]:
    """The trainer's log-probabilities of each row before the step's first update; [] for rows that are not
    needed.
    """
    found = [[] for _ in batch.out.ids]
    groups = range(len(batch.prompts))
    micro = micro_batches(batch, groups, run.micro_tokens)
    for numbers, prompts, completions in shard.rounds(micro, run.model, ([], *shard.NOTHING)):
        with step.timer("reference"), shard.in_step(run.model):
            run.model.eval()
            drawn = batch.drawn(numbers) or None  # shard.NOTHING has a row, and none of the batch's
            logp, _, _ = run.model.completion_logprobs(prompts, completions, drawn=drawn, **step.sampling)
        if not numbers:
            continue
        for n, row in zip(numbers, logp.split(batch.lengths(numbers))):
            found[n] = row.tolist()
    return found


# ------------------------------------------------------------------------------------ sums, and guards
def sum_stats(stats: dict) -> dict:
    """policy_loss's sums over all ranks, as floats. Empty if no rank had a row to train on."""
    total = {}
    for part in gather({key: float(value) for key, value in stats.items()}):
        exact = {key: torch.tensor(value, dtype=torch.float64) for key, value in part.items()}
        total = add_stats(total, exact)
    return {key: float(value) for key, value in total.items()}


def mean_difference(stats: dict) -> float:
    """Mean |trainer - sampler| over tokens, nats."""
    return stats["diff_sum"] / max(1, stats["tokens"]) if stats else 0.0


def check_mismatch(run, step, stats):
    """Stops a run whose first step shows that the trainer does not give the sampler's log-probabilities.

    All of it would be off-policy in secret, and every ratio wrong.
    """
    if run.checked or not stats or run.cfg.lora_dropout:
        return
    run.checked = True
    which, limit = MISMATCH.get(run.dtype, ("max", 1e-3))
    if any_truncation((step.sampling["top_k"], step.sampling["top_p"], step.sampling["min_p"])):
        # A word at the very edge may be in one's kept set and not in the other's:
        # log(1 + its share), on one token.
        which = "mean"
    difference = stats["diff_max"] if which == "max" else mean_difference(stats)
    if difference > limit:
        raise Stop(
            f"the sampler's and the trainer's log-probabilities differ by {difference:.2g} nats "
            f"({which} over tokens) at step {step.number}; rounding explains {limit}: "
            "the two do not compute the same model, so every ratio would be wrong"
        )


def refuse_loss(run, step, loss, prompts, completions, tokens):
    """Keeps the micro-batch whose loss is not finite, and stops."""
    path = run.out / "bad_batch.pt"
    torch.save(dict(prompts=prompts, completions=completions, tokens=tokens.arguments()), path)
    raise Stop(f"the loss is {loss.item()} at step {step.number}; the micro-batch that made it is in {path}")


# --------------------------------------------------------------------------------------------- the run
class Interrupt:
    """Ctrl-C and SIGTERM set a flag, read between steps and between batches of an
    evaluation; a second stops at once.
    """

    def __init__(self):
        self.asked = self.evaluating = False
        for number in (signal.SIGINT, signal.SIGTERM):  # a cluster that takes its machine back sends SIGTERM
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        what = "this batch of problems" if self.evaluating else "this step, which is then saved"
        progress.line(say, f"\nstopping after {what} (Ctrl-C again: at once, without it)")

    def on_any_rank(self) -> bool:
        return any(gather(self.asked))


def evaluate_now(run, log, interrupt) -> tuple[dict, list]:
    """Held-out problems, on rank 0 while the others wait: (metrics, texts), both empty if interrupted."""
    metrics, texts = {}, []
    run.samples.eval()  # no LoRA dropout
    interrupt.evaluating = True
    with run.whole_weights(), ranks.together(), progress.doing("evaluating", drawn=False):
        if rank() == 0:
            rows = run.task.eval[: run.cfg.eval_problems]
            options = configs.evaluation_options(run.cfg)
            metrics, texts = evaluate(
                run.sampler,
                run.tokenizer,
                rows,
                run.rewards,
                stop_ids=run.stop_ids,
                stop=lambda: interrupt.asked,
                on_answers=partial(write_answers, run, log),
                converse=run.converse,
                **options,
            )
    interrupt.evaluating = False
    return metrics, texts


def evaluate_missing(run, log, interrupt) -> tuple[dict, list] | None:
    """The evaluation of the step that the run stands at, where one is due and metrics.jsonl has none.

    That is the one before training, or one that was interrupted. Returns it, or None if nothing was due.
    """
    # metrics.jsonl says what was done: a run may have been killed, or stopped, at any point before.
    cfg, number = run.cfg, run.state["step"]
    is_due = due(number, cfg.eval_every, cfg.steps) or (number == 0 and cfg.eval_every > 0)
    done = gather(log.has_evaluation(number))[0]  # rank 0 has the file
    if done or not is_due:
        return None
    found = evaluate_now(run, log, interrupt)
    if found[0]:
        progress.line(say, evaluated("before:" if number == 0 else "      =", found[0]))
        log.add(number, found[0])
    return found


def main(cfg) -> int:
    # Model, task, rewards, optimiser; where the run is resumed, as the checkpoint has them. Until the loop
    # takes Ctrl-C over there is nothing to save, and it ends the process (progress.leave).
    with progress.doing("preparing the run", drawn=False):
        run = Run(cfg)
    log, interrupt = Log(run), Interrupt()
    header(run)
    first = run.state["step"] + 1
    started = time.perf_counter()
    try:
        after = evaluate_missing(run, log, interrupt)
        before = after if first == 1 else None
        end = cfg.steps
        if reached(cfg, log.row(first - 1) if rank() == 0 else {}):
            end = first - 1
        if first > end:
            if rank() == 0:
                checkpoint.sweep(run.out)  # the last save was perhaps killed while it deleted an older one
            more = f"stop_at={cfg.stop_at!r} is reached" if end < cfg.steps else "a larger --steps goes on"
            say(f"already done: step {first - 1} of steps={cfg.steps}; {more}")
        legend(cfg)
        say(line(run))
        for number in range(first, end + 1):
            # Between two steps everything is whole, so this is where a run can be left.
            if interrupt.on_any_rank():
                return stop(run, log, "interrupted")
            with progress.doing(f"step {number}", drawn=False):
                metrics = train_step(run, number)
            log.last = metrics  # so that it is written if the evaluation fails
            seconds = (time.perf_counter() - started) / (number - first + 1)
            progress.line(say, line(run, metrics, seconds * (cfg.steps - number)))
            last = number == cfg.steps or reached(cfg, metrics)
            if due(number, cfg.eval_every, number if last else cfg.steps):
                after = evaluate_now(run, log, interrupt)
                metrics |= after[0]
                last = last or reached(cfg, metrics)
                if after[0]:
                    progress.line(say, evaluated("      =", after[0]))
            # The row is written before the checkpoint: a run that dies between the two and is resumed makes
            # the step again, and its row replaces this one.
            log.write(metrics)
            if due(number, cfg.save_every, cfg.steps) or last:
                save_or_say(run, log, last)
            if last:
                break
    # Every rank comes here with the same error (ranks.together), and the last whole step is saved.
    except (Stop, rewarding.RewardError, FloatingPointError, ValueError, ranks.RankLost, OSError) as e:
        if isinstance(e, ValueError) and run.state["step"] + 1 == first:
            raise  # a config that cannot run at all: there is nothing to save
        reason = reason_of(e) if isinstance(e, OSError) else str(e)
        return stop(run, log, reason, lost=isinstance(e, ranks.RankLost))
    return end_well(run, log, before, after)


def end_well(run, log, before, after) -> int:
    """The end of a whole run: before and after, its page, the hub, and what to type next. Returns the status.

    before, after: (metrics, texts) of an evaluation, or None.
    """
    finish(run, before, after)
    status = 0
    if rank() == 0:
        say_report(run)
        if run.cfg.push_to_hub:
            pushed, sentence = push(run, before[0] if before else {}, after[0] if after else {})
            say(sentence)
            status = 0 if pushed else 1
        what_next(run)
    log.close(run.out / "report.html")
    return status


def reached(cfg, metrics) -> bool:
    """Whether metrics, which are whole on rank 0, are what cfg.stop_at waits for. Every rank calls this.

    ValueError where no metric of that kind has its name.
    """
    if not cfg.stop_at:
        return False
    with ranks.together():
        mine = rank() == 0 and configs.goal_reached(cfg.stop_at, metrics or {})
    return gather(mine)[0]


def due(number: int, every: int, last: int) -> bool:
    return every > 0 and (number % every == 0 or number == last)


def save_or_say(run, log, last: bool):
    """Saves on rank 0. Where the disk does not let it: says so, and goes on to the next save or stops.

    last: no save will follow this one.
    """
    moments = run.moments()
    with ranks.together():
        if rank() != 0:
            return
        try:
            log.flush()  # a run that is resumed here does not write the rows up to here again
            run.save(moments)
        except OSError as e:
            # The weights are in memory and the run is as well as before: hours of it need not end because a
            # disk is full for a while.
            number, place = run.state["step"], run.out / "ckpt"
            sentence = f"step {number} could not be saved in {place}: {reason_of(e)}; {safe(run)}"
            if run.cfg.save_failure == "stop" or last:
                raise Stop(sentence) from e
            say(f"{sentence}; going on to the next save")


def stop(run, log, reason: str, lost: bool = False) -> int:
    """Ends a run early: saves the last whole step, says why and how to go on. Returns the exit status.

    lost: another rank has died, perhaps rank 0, who does this else.
    """
    first = rank() == 0
    if lost and not first and run.rank_0_is_gone():
        log.take_over()
        first = True
    saved = "nothing saved, since this step is half learnt: the last checkpoint stands"
    if run.whole:
        try:
            moments = run.moments()
            if first:
                log.flush()
                saved = f"saved {run.save(moments)}"
        except OSError as e:
            saved = f"not saved ({reason_of(e)}); {safe(run)}"
        except ranks.RankLost:
            what = "the weights" if run.optimizer.summed else "the optimiser"
            saved = f"not saved, because a part of {what} was that process's; {safe(run)}"
    if first:
        flags = " ".join(word for word in sys.argv[1:] if "resume" not in word)
        print(f"\n{reason}\n{saved}; go on with: python train.py {flags} --resume=True", flush=True)
        say_report(run)
    ranks.tell_launcher(f"{reason}; {saved}" if first else reason)
    log.close(run.out / "report.html")
    return 1


def say_report(run):
    """Writes report.html, the page of the run. The run is over: nothing depends on it."""
    print(report.at_the_end(run.out), flush=True)


def reason_of(error: OSError) -> str:
    return error.strerror or str(error)


def safe(run) -> str:
    """What is on the disk, for a person whose save has just failed."""
    found = checkpoint.newest(run.out, run.id)
    return f"{found} is safe" if found else "there is no earlier checkpoint"


if __name__ == "__main__":
    try:
        ranks.end(main(checks.config_of("train.py", sys.argv[1:])))
    except (ValueError, rewarding.RewardError, ranks.RankLost, OSError, ImportError) as e:
        ranks.leave(f"train.py: {e}")
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: stopped at once; what was saved before stands, --resume=True goes on from it")
