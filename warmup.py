"""Supervised warm-up: the model learns to write like a task's demonstrations before
reinforcement learning begins.

One objective: the mean negative log-likelihood (nats a token) of each row's `solution`, the stop id
included, given its prompt. It goes through the same packed forward and the same chunked head as GRPO: a
demonstration is a group of one completion. train.py calls `warm_up` when the config has sft_steps > 0;
sft.py is the script that does only this.
"""

import time

import torch

import data
import optim
import progress
from model import micro_batches


def demonstrations(tokenizer, rows, stop_id, *, system, prefill):
    """Rows with a `solution` -> prompts and completions, lists of ids. ValueError where a row has none."""
    lacking = sum(not row.get("solution") for row in rows)
    if lacking:
        raise ValueError(
            f"supervised warm-up needs a `solution` in every row, and {lacking} of {len(rows)} have none: "
            "set sft_steps=0, or add the column"
        )
    prompts = [data.prompt_ids(tokenizer, row["prompt"], system=system, prefill=prefill) for row in rows]
    completions = [[data.encode(tokenizer, row["solution"]) + [stop_id]] for row in rows]
    return prompts, completions


def warm_up(model, tokenizer, task, *, steps, batch, lr, seed, stop_id, micro_tokens, system="", prefill="",
            say=print, make_optimizer=optim.AdamW):  # fmt: skip
    """Trains the model in place for `steps` updates of `batch` demonstrations each.
    Returns the last loss, nats a token.

    The rate climbs for a twentieth of the steps and then falls as a cosine. Rows are those of
    `task.batch(step, batch, seed + 1)`, so the warm-up is a function of the seed alone. Each of several
    processes does all of it.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    more = dict(scaled=True) if model.dtype == torch.float16 else {}
    optimizer = make_optimizer(trained, lr=lr, betas=(0.9, 0.99), **more)
    start, average = time.perf_counter(), None
    with progress.doing("warm-up, steps", steps) as bar:
        for step in range(steps):
            rows = task.batch(step, batch, seed + 1)  # other rows than those the first GRPO steps see
            prompts, completions = demonstrations(tokenizer, rows, stop_id, system=system, prefill=prefill)
            loss = accumulate_gradients(model, prompts, completions, micro_tokens, optimizer.loss_scale)
            rate = optim.learning_rate(
                step, lr=lr, warmup_steps=max(1, steps // 20), steps=steps, schedule="cosine", min_ratio=0.1
            )
            optimizer.step(rate, max_norm=1.0)
            optimizer.zero_grad()
            average = loss if average is None else 0.9 * average + 0.1 * loss
            done, ms = step + 1, (time.perf_counter() - start) / (step + 1) * 1000
            bar.show(done, f"loss {average:.3f}")
            if done == steps or done % max(1, steps // 9) == 0:
                text = f"warm-up {done:5d}/{steps}  loss {average:.3f} nats/token  {ms:.0f} ms a step"
                progress.line(say, text)
    return average


def accumulate_gradients(model, prompts, completions, micro_tokens, scale=1.0) -> float:
    """Backward over a step's demonstrations, in micro-batches. Returns the loss, nats a token.

    scale: what the loss is multiplied by before its backward.
    """
    tokens = sum(len(group[0]) for group in completions)
    total = 0.0
    for cut in micro_batches(prompts, completions, micro_tokens):
        some_prompts = [prompts[b] for b, _ in cut]
        some_completions = [completions[b] for b, _ in cut]
        logp, _, _ = model.completion_logprobs(some_prompts, some_completions)
        loss = -logp.sum() / tokens  # one divisor for the step, however it is cut
        (loss * scale).backward()
        total += float(loss.detach())
    return total
