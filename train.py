"""GRPO, top to bottom: sample groups of answers, score them, make what beat its group likelier.

    python train.py configs/arithmetic.py                      # a laptop, three minutes
    python train.py configs/gsm8k.py --lr=2e-6                 # one GPU; any key of config.py may follow
    python train.py configs/gsm8k.py --resume=True             # go on from the newest whole checkpoint
    torchrun --nproc_per_node=4 train.py configs/gsm8k.py      # the same run on four processes

One step: B prompts -> G completions each (rollout.py) -> rewards (rewards.py) -> advantages (loss.py) -> forward, loss and backward in
micro-batches of whole groups (model.py, loss.py) -> one update (optim.py) -> one line on the screen and one row in metrics.jsonl. `train_step`
is that, `learn` its update or updates, `gradients` the inside of one. What stays the same over the steps is made in run.py.

What a step draws and learns is a function of the config, the seed and the step's number, so a run killed and resumed ends with the
same bits as one that was not. out/NAME/ holds what a run made: config.json, metrics.jsonl, rollouts/, ckpt/.

Dims: B prompts a step, G completions a prompt, N = B * G rows, T completion tokens of a micro-batch.
"""
import contextlib
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import config as configs
import data
import eval as evaluation
import loss as losses
import model as models
import optim
import rewards as rewarding
import rollout
from kernels.logprob import any_truncation
from kernels.policy_head import policy_head
from log import Log, Timer, finish, gather, header, length_metrics, line, loss_metrics, peak_gb, rank, reward_metrics, say, show_sample, world, write_rollouts
from run import Run

# Largest |trainer - sampler| in nats that rounding explains. fp32 is compared by its worst token. In bf16 single tokens differ by
# tenths between two correct implementations, so there the mean is what tells a wrong model from a rounded one.
MISMATCH = {torch.float32: ("max", 1e-3), torch.bfloat16: ("mean", 0.05)}


class Stop(Exception):
    """The run cannot go on, for the reason given; what was learnt so far is saved."""


# ----------------------------------------------------------------------------------------------------------------- one step
@dataclass
class Batch:
    """This rank's completions of a step: group_size of each of its rows, laid end to end."""

    rows: list[dict]
    prompts: list[list[int]]  # ids
    out: rollout.Rollout
    texts: list[str]
    parts: np.ndarray  # (n, R) of each reward, NaN for None
    reward: np.ndarray  # (n,)

    def replace_group(self, b: int, other: "Batch", i: int, G: int):
        """Group i of another batch takes the place of group b."""
        self.rows[b], self.prompts[b] = other.rows[i], other.prompts[i]
        here, there = slice(b * G, b * G + G), slice(i * G, i * G + G)
        for name in ("ids", "logprobs", "stopped", "entropies"):
            getattr(self.out, name)[here] = getattr(other.out, name)[there]
        for name in ("texts", "parts", "reward"):
            getattr(self, name)[here] = getattr(other, name)[there]


def sample_and_score(run, rows, numbers, timer) -> Batch:
    """Samples a group for each of these rows and scores it. numbers: the rows' numbers in the step, which draws are keyed by."""
    cfg = run.cfg
    prompts = [data.prompt_ids(run.tokenizer, row["prompt"], system=cfg.system_prompt, prefill=cfg.prefill) for row in rows]
    background = rewarding.InBackground() if cfg.reward_overlap else None
    with timer("sample"):
        run.model.eval()  # no LoRA dropout in the sampler
        out = rollout.generate(run.model, prompts, group_size=cfg.group_size, max_new_tokens=cfg.max_new_tokens, stop_ids=run.stop_ids,
                               **evaluation.sampled_from(cfg), slots=cfg.slots, seed=cfg.seed, step=run.step + 1, prompt_numbers=numbers, entropy=cfg.top_entropy < 1, cuda_graphs=cfg.cuda_graphs,
                               on_group=background and (lambda b, ids: background.calls.put((b, partial(score_rows, run, [rows[b]], list(ids))))))
    with timer("score"):
        scored = background.results() if background else [score_rows(run, rows, out.ids)]
    texts, parts, reward = zip(*scored)
    return Batch(rows, prompts, out, [text for of in texts for text in of], np.concatenate(parts), np.concatenate(reward))


def score_rows(run, rows, ids):
    """Texts, reward parts (n, R) and rewards (n,), NaN for None, of completions `ids`, group_size of each of the rows."""
    cfg = run.cfg
    return evaluation.score_completions(run.tokenizer, rows, ids, weighted(run), prefill=cfg.prefill, max_new_tokens=cfg.max_new_tokens,
                                        reward_messages=cfg.reward_messages, timeout=cfg.reward_timeout)


def resample(run, batch, timer) -> tuple[int, int, int]:
    """Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): new prompts for groups without signal. Returns prompts used, tokens drawn and read.

    Each round replaces at most the groups that are still flat; what is flat again stays as it was first. The extra prompts are a stream of
    their own, a function of (seed, step, rank), so a resumed run and the next step's own prompts are the same with and without them.
    """
    cfg, G = run.cfg, run.cfg.group_size
    budget, used, tokens, read = (cfg.resample_budget or cfg.prompts_per_step) // world(), 0, 0, 0
    extra = run.task.batch(run.step, budget * world(), cfg.seed + 7_919)[rank() :: world()]  # not the stream of the steps, nor that of the warm-up
    while used < budget and (flat := evaluation.flat_groups(batch.reward.reshape(-1, G))):
        rows = extra[used : used + len(flat)]
        numbers = [cfg.prompts_per_step + rank() + world() * (used + i) for i in range(len(rows))]
        new = sample_and_score(run, rows, numbers, timer)
        good = sorted(set(range(len(rows))) - set(evaluation.flat_groups(new.reward.reshape(-1, G))))
        for b, i in zip(flat, good):
            batch.replace_group(b, new, i, G)
        used, tokens, read = used + len(rows), tokens + new.out.stats["tokens"], read + G * sum(map(len, new.prompts))
    return used, tokens, read


def weighted(run) -> list[tuple]:
    """The rewards with this step's weights."""
    if run.cfg.reward_weights is None:
        return run.rewards
    weights = run.cfg.reward_weights(run.step + 1)
    if len(weights) != len(run.rewards):
        raise ValueError(f"reward_weights gave {len(weights)} weights at step {run.step + 1} for {len(run.rewards)} rewards")
    return [(label, f, float(w)) for (label, f, _), w in zip(run.rewards, weights)]


def step_advantages(run, everyone):
    """(B, G) advantages of the whole step, from every rank's parts and rewards: scale "batch" and GDPO need them all."""
    G = run.cfg.group_size
    parts, rewards = (torch.from_numpy(np.concatenate([x[i] for x in everyone])) for i in (0, 1))
    if run.cfg.combine == "sum":
        return losses.advantages(rewards.view(-1, G), scale=run.cfg.advantage)
    return losses.normalize_then_sum(parts.view(-1, G, parts.shape[1]), torch.tensor([w for _, _, w in weighted(run)], dtype=torch.float64))


def micro_batches(run, batch, chosen, needed):
    """Yields (numbers, (prompts, completions)) for the rows of the groups `chosen` that are `needed` (n,): a micro-batch's rows, and what the model scores."""
    G, prompts = run.cfg.group_size, batch.prompts
    groups = [[batch.out.ids[b * G + g] if b in chosen and needed[b * G + g] else [] for g in range(G)] for b in range(len(prompts))]
    for cut in models.micro_batches(prompts, groups, run.cfg.micro_tokens):
        numbers = [b * G + g for b, members in cut for g in members]
        yield numbers, ([prompts[b] for b, _ in cut], [[groups[b][g] for g in members] for b, members in cut])


def flat(values, numbers, device):
    """Per-token values of the rows `numbers`, laid end to end: (T,) float32."""
    return torch.tensor([x for n in numbers for x in values[n]], device=device)


def objective_of(run, batch, numbers, adv, norm, *, ref_logp, trainer_logp, bar):
    """The share of the loss of any of a micro-batch's tokens: a function (logp (m,), entropy (m,), at: slice, exact_kl=None) -> (loss, sums).

    numbers: the micro-batch's rows, whose tokens lie end to end; ref_logp: the reference's log-probabilities of them (T,) or None; the rest as
    `gradients`. Every token's share is its own, except in objectives with a ratio for a sequence: those are to be called on all tokens at once.
    """
    cfg, device, ids = run.cfg, run.model.device, batch.out.ids
    lengths = torch.tensor([len(ids[n]) for n in numbers])
    rows, lengths, adv = torch.arange(len(numbers)).repeat_interleave(lengths).to(device), lengths.to(device), adv[numbers].to(device)
    sampled, before = flat(batch.out.logprobs, numbers, device), flat(trainer_logp, numbers, device) if trainer_logp else None
    forking = None if bar is None else flat(batch.out.entropies, numbers, device) >= bar

    def objective(logp, entropy, at, exact_kl=None):
        old_logp, weight = sampled[at], None
        if cfg.mismatch_clip:  # the ratio is then the trainer's to itself, and the sampler's difference a weight
            old_logp = logp.detach() if before is None else before[at]
            weight = losses.mismatch_weight(old_logp, sampled[at], cfg.mismatch_clip)
        if forking is not None:
            weight = forking[at] * (1.0 if weight is None else weight)
        return losses.policy_loss(
            logp, old_logp, adv, rows[at], ref_logp=None if ref_logp is None else ref_logp[at], exact_kl=exact_kl, entropy=entropy, weight=weight,
            objective=cfg.objective, aggregate=cfg.aggregate, clip_low=cfg.clip_low, clip_high=cfg.clip_high, dual_clip=cfg.dual_clip,
            cispo_max=cfg.cispo_max, beta=cfg.beta, kl=cfg.kl, kl_times_ratio=cfg.kl_times_ratio, entropy_coef=cfg.entropy_coef,
            group_size=cfg.group_size, max_new_tokens=cfg.max_new_tokens, norm=norm, lengths=None if cfg.objective in losses.SEQUENCE_LEVEL else lengths)

    return objective


def gradients(run, batch, chosen, adv, needed, norm, timer, *, trainer_logp=None, bar=None):
    """Backward over the rows of the groups `chosen`, in micro-batches. Returns the sums policy_loss gives, and token entropies by row.

    adv, needed (n,): advantage of each row, and whether it is computed. trainer_logp: the trainer's log-probabilities by row from before the
    step's first update, where there are several. bar: the entropy (nats) from which on a token is in the policy term, or None.
    """
    cfg, stats, entropies, options = run.cfg, {}, {}, evaluation.sampled_from(run.cfg)
    for numbers, scored in micro_batches(run, batch, chosen, needed):
        ref_logp = ref_hidden = None
        if cfg.beta:
            with timer("reference"), torch.no_grad(), run.as_reference() as reference:
                if cfg.kl == "full":
                    ref_hidden = reference.completion_hidden(*scored)[0], reference.head.detach()
                else:
                    ref_logp, _, _ = reference.completion_logprobs(*scored, **options)
        with timer("train"):
            run.model.train()
            objective = objective_of(run, batch, numbers, adv, norm, ref_logp=ref_logp, trainer_logp=trainer_logp, bar=bar)
            hidden, packed = run.model.completion_hidden(*scored)
            if cfg.objective in losses.SEQUENCE_LEVEL or cfg.kl == "full":
                logp, entropy, exact_kl = run.model.scores(hidden, packed.targets, ref_hidden, **options)
                loss, *parts = objective(logp, entropy, slice(None), exact_kl)
            else:  # the head's gradients are made while a chunk's logits are there: a full update of Qwen2.5-0.5B takes 0.91 of the time
                loss, logp, entropy, parts = policy_head(hidden, run.model.head, packed.targets, objective, **options)
            if not torch.isfinite(loss.detach()):
                torch.save(dict(prompts=scored[0], completions=scored[1], logp=logp.detach(), old_logp=flat(batch.out.logprobs, numbers, "cpu")), run.out / "bad_batch.pt")
                raise Stop(f"the loss is {loss.item()} at step {run.step + 1}; the micro-batch that made it is in {run.out / 'bad_batch.pt'}")
            loss.backward()
        for sums in parts:
            stats = losses.add_stats(stats, sums)
        for n, row in zip(numbers, entropy.detach().split([len(batch.out.ids[n]) for n in numbers])):
            entropies[n] = row
    return stats, entropies


def learn(run, batch, adv, timer, whole):
    """The updates of a step: `epochs` passes over its groups, each in `minibatches` parts. adv (n,). Returns metrics and token entropies by row.

    One update is the usual case. With several the ratio leaves 1 and clipping has something to do; the divisor is that of the update.
    whole: an ExitStack that ends with the step; from the first update on nothing interrupts it.
    """
    cfg, G, updates = run.cfg, run.cfg.group_size, run.cfg.epochs * run.cfg.minibatches
    lengths = [len(ids) for ids in batch.out.ids]
    kept = torch.tensor([stopped or not cfg.mask_truncated for stopped in batch.out.stopped])
    # without a KL or an entropy term a row of advantage 0 has gradient 0: its tokens count in the divisor and are not computed
    needed = kept & ((adv != 0) | bool(cfg.beta or cfg.entropy_coef))
    everybody, trainer_logp, bar = range(len(batch.prompts)), None, None
    if cfg.top_entropy < 1:  # one bar for the step, from the sampler's entropies, so that it does not depend on micro-batches
        all_entropies = torch.tensor([h for rank_h in gather([h for n, row in enumerate(batch.out.entropies) if kept[n] for h in row]) for h in rank_h])
        bar = all_entropies[losses.highest(all_entropies, cfg.top_entropy)].min() if len(all_entropies) else None
    if cfg.mismatch_clip and updates > 1:
        trainer_logp = trainer_scores(run, batch, needed, timer)
    total, entropies, norms = {}, {}, []
    lr = optim.learning_rate(run.step, lr=cfg.lr, warmup_steps=cfg.warmup_steps, steps=cfg.steps, schedule=cfg.schedule)
    for update in range(updates):
        chosen = everybody[update % cfg.minibatches :: cfg.minibatches]
        counted = gather([lengths[n] for b in chosen for n in range(b * G, b * G + G) if kept[n]])
        norm = losses.normaliser([n for of in counted for n in of], aggregate=cfg.aggregate, group_size=G, max_new_tokens=cfg.max_new_tokens)
        stats, of_rows = gradients(run, batch, chosen, adv, needed, norm, timer, trainer_logp=trainer_logp, bar=bar)
        stats, entropies = reduce_stats(stats), of_rows | entropies
        if not update:
            difference, worst = stats["diff_sum"] / max(1, stats["tokens"]) if stats else 0.0, stats.get("diff_max", 0.0)
            check_mismatch(run, stats, difference)
            whole.enter_context(checkpoint.uninterrupted())  # half an update, or half of a step's updates, could not be saved
            run.torn = updates > 1
        with timer("train"):
            for grad in run.optimizer.grads() if world() > 1 else ():
                dist.all_reduce(grad)
            norms.append(float(run.optimizer.step(lr, max_norm=cfg.max_grad_norm)))
            run.optimizer.zero_grad()
        total = losses.add_stats(total, {k: torch.tensor(v, dtype=torch.float64) for k, v in stats.items()})
    run.step, run.torn = run.step + 1, False
    run.sync_reference()
    stats = {k: float(v) for k, v in total.items()}
    if stats:  # a mean over updates; and sampler against trainer only where both had the same weights
        stats |= dict(loss=stats["loss"] / updates, policy_loss=stats["policy_loss"] / updates, diff_max=worst)
    return dict(learning_rate=lr, grad_norm=sum(norms) / updates) | loss_metrics(stats, difference), entropies


@torch.no_grad()
def trainer_scores(run, batch, needed, timer) -> dict:
    """The trainer's log-probabilities by row, as lists, before an update."""
    found = {}
    for numbers, scored in micro_batches(run, batch, range(len(batch.prompts)), needed):
        with timer("reference"):
            run.model.eval()
            logp, _, _ = run.model.completion_logprobs(*scored, **evaluation.sampled_from(run.cfg))
        found |= zip(numbers, (row.tolist() for row in logp.split([len(batch.out.ids[n]) for n in numbers])))
    return found


def train_step(run, whole) -> dict:
    """One step. Returns the row for metrics.jsonl; writes the step's rollouts when they are due. whole: see `learn`."""
    cfg, timer, G = run.cfg, Timer(), run.cfg.group_size
    torch.manual_seed(hash((cfg.seed, run.step, rank())))  # LoRA dropout, the only torch randomness there is
    rows = run.task.batch(run.step, cfg.prompts_per_step, cfg.seed)[rank() :: world()]
    batch = sample_and_score(run, rows, list(range(rank(), cfg.prompts_per_step, world())), timer)
    # of all ranks, since a mean is a ratio of two sums over the whole step; and as drawn, before groups are replaced, so that curves compare
    drawn = gather((batch.parts.copy(), batch.reward.copy(), [len(ids) for ids in batch.out.ids], list(batch.out.stopped)))
    rewards = torch.from_numpy(np.concatenate([r.reshape(-1, G) for _, r, _, _ in drawn]))  # (B, G), rank by rank
    if run.step == 0 and not cfg.force:
        evaluation.refuse_hopeless(rewards, [s for _, _, _, stopped in drawn for s in stopped], cfg.max_new_tokens)
    tokens, read, resampled = batch.out.stats["tokens"], G * sum(map(len, batch.prompts)), 0
    if cfg.resample_zero_groups:
        resampled, more, more_read = resample(run, batch, timer)
        tokens, read = tokens + more, read + more_read
    tokens, read, resampled = (sum(x) for x in zip(*gather((tokens, read, resampled))))
    all_adv = step_advantages(run, gather((batch.parts, batch.reward)) if cfg.resample_zero_groups else drawn)
    adv = all_adv.chunk(world())[rank()].reshape(-1)
    metrics, entropies = learn(run, batch, adv.float(), timer, whole)
    run.num_tokens += tokens + read

    lengths, stopped = ([x for of in drawn for x in of[i]] for i in (2, 3))
    metrics |= dict(step=run.step, num_tokens=run.num_tokens, epoch=run.task.epoch(run.step, cfg.prompts_per_step), resampled_prompts=resampled)
    metrics |= reward_metrics(run, drawn, rewards) | length_metrics(lengths, stopped) | timer.metrics(tokens)
    useful = gather((sum(len(ids) for ids, a in zip(batch.out.ids, adv.tolist()) if a), sum(map(len, batch.out.ids))))
    metrics["frac_tokens_with_advantage"] = sum(u for u, _ in useful) / sum(n for _, n in useful)
    metrics["memory/peak_gb"] = peak_gb(run.device)
    if cfg.rollouts_every and run.step % cfg.rollouts_every == 0:
        write_rollouts(run, batch, adv, entropies)
    if cfg.show_every and run.step % cfg.show_every == 0:
        show_sample(batch.rows[0], batch.texts[0], batch.reward[0])
    return metrics


def check_mismatch(run, stats, difference):
    """Stops a run whose first step shows that the trainer does not give the sampler's log-probabilities: all of it would be off-policy in secret."""
    if run.checked or not stats:
        return
    run.checked = True
    which, limit = MISMATCH.get(run.dtype, ("max", 1e-3))
    # a word at the very edge may be in one's kept set and not in the other's: log(1 + its share), on one token
    which = "mean" if any_truncation((run.cfg.top_k, run.cfg.top_p, run.cfg.min_p)) else which
    worst = stats.get("diff_max", 0.0) if which == "max" else difference
    if worst > limit and not run.cfg.lora_dropout:
        raise Stop(f"the sampler's and the trainer's log-probabilities differ by {worst:.2g} nats ({which} over tokens) at step {run.step + 1}; rounding explains {limit}: "
                   "the two do not compute the same model, so every ratio would be wrong")


def reduce_stats(stats: dict) -> dict:
    """policy_loss's sums over all ranks, as floats. Empty if no rank had a row to train on."""
    total = {}
    for part in gather({key: float(value) for key, value in stats.items()}):
        total = losses.add_stats({k: torch.tensor(v) for k, v in total.items()}, {k: torch.tensor(v, dtype=torch.float64) for k, v in part.items()})
    return {key: float(value) for key, value in total.items()}


def evaluate(run) -> tuple[dict, list]:
    """Held-out problems, on rank 0 while the others wait: (metrics, texts)."""
    result = ({}, [])
    if rank() == 0:
        run.model.eval()
        result = evaluation.evaluate(run.model, run.tokenizer, run.task.eval[: run.cfg.eval_problems], run.rewards, stop_ids=run.stop_ids, **evaluation.options(run.cfg))
    if world() > 1:
        dist.barrier()
    return result


def main(cfg):
    run = Run(cfg)
    log, before, after = Log(run), None, None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster that takes its machine back gets a checkpoint too
    header(run)
    if cfg.eval_every and not run.resumed:
        before = evaluate(run)
        say(f"before: {evaluation.summary(before[0])}" if before[0] else "")
        log.write(dict(step=run.step) | before[0])
    say(line(run))
    started, first, metrics = time.perf_counter(), run.step, None
    try:
        while run.step < cfg.steps:
            with contextlib.ExitStack() as whole:
                metrics = train_step(run, whole)
            left = (time.perf_counter() - started) / (run.step - first) * (cfg.steps - run.step)
            say(line(run, metrics, left))
            if cfg.eval_every and (run.step % cfg.eval_every == 0 or run.step == cfg.steps):
                after = evaluate(run)
                metrics |= after[0]
                say(f"      = {evaluation.summary(after[0])}" if after[0] else "")
            log.write(metrics)
            if rank() == 0 and (cfg.save_every and run.step % cfg.save_every == 0 or run.step == cfg.steps):
                run.save()
    except (KeyboardInterrupt, Stop, rewarding.RewardError, FloatingPointError, ValueError) as e:
        if isinstance(e, ValueError) and run.step == first:
            raise  # a config that cannot run at all: there is nothing to save
        if run.torn:
            raise  # between the updates of a step: what is in memory is no step's state, the last checkpoint is
        if metrics and log.step < metrics["step"]:  # interrupted after the step, before its row was written
            log.write(metrics)
        # weights and optimiser change only inside `uninterrupted`, so what stands here is a whole step: nothing is lost
        path = run.save() if rank() == 0 else ""
        say(f"\n{'interrupted' if isinstance(e, KeyboardInterrupt) else e}\nsaved {path}; go on with: python train.py {' '.join(a for a in sys.argv[1:] if 'resume' not in a)} --resume=True")
        return 1
    finish(run, before, after)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(configs.load(sys.argv[1:])))
    except (ValueError, rewarding.RewardError) as e:
        sys.exit(f"train.py: {e}")
