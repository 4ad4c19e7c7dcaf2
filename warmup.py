"""Supervised warm-up: the model learns to write like a task's demonstrations before
reinforcement learning begins.

One objective: the mean negative log-likelihood (nats a token) of each row's `solution`, the stop id
included, given its prompt. It goes through the same packed forward and the same chunked head as GRPO: a
demonstration is a group of one completion. A solution may be a conversation, a list of texts: the model's,
its environment's, the model's, ..; what the environment says is given and not learnt (turns.py). train.py
calls `warm_up` when the config has sft_steps > 0; sft.py is the script that does only this.
"""

import time

import torch

import data
import optim
import progress
from model import micro_batches


def demonstrations(tokenizer, rows, stop_id, *, system, prefill, wrapper=None, turn_ends=()):
    """Rows with a `solution` -> prompts and completions, lists of ids, and which ids are the model's.

    wrapper, turn_ends: of conversations, as in turns.Conversations. ValueError where a row has no solution.
    """
    lacking = sum(not row.get("solution") for row in rows)
    if lacking:
        raise ValueError(
            f"supervised warm-up needs a `solution` in every row, and {lacking} of {len(rows)} have none: "
            "set sft_steps=0, or add the column"
        )
    prompts = [data.prompt_ids(tokenizer, row["prompt"], system=system, prefill=prefill) for row in rows]
    completions, drawn = [], []
    for row in rows:
        said = row["solution"] if isinstance(row["solution"], list) else [row["solution"]]
        ids, mine = conversation(tokenizer, said, stop_id, wrapper, tuple(turn_ends))
        completions.append([ids])
        drawn.append(mine)
    return prompts, completions, drawn


def conversation(tokenizer, texts, stop_id, wrapper, turn_ends) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them are the model's: its texts 0, 2, 4, .. and their ends.

    They are those that the sampler would have made: a turn ends with the stop id, unless one of turn_ends
    ends it.
    """
    if len(texts) % 2 == 0 or (wrapper is None and len(texts) > 1):
        raise ValueError(
            "a `solution` that is a list of texts is a conversation of the model and its environment, which "
            f"needs `env` and ends with the model: it has {len(texts)} texts"
        )
    ids, drawn = [], []
    for i, text in enumerate(texts):
        if i % 2 == 0:
            stops = not text.endswith(turn_ends) if turn_ends else True
            part = data.encode(tokenizer, text) + [stop_id] * stops
        else:
            part = wrapper.ids(text, after_stop=stops)
        ids += part
        drawn += [i % 2 == 0] * len(part)
    return ids, drawn


def warm_up(model, tokenizer, task, *, steps, batch, lr, seed, stop_id, micro_tokens, system="", prefill="",
            wrapper=None, turn_ends=(), say=print, make_optimizer=optim.AdamW):  # fmt: skip
    """Trains the model in place for `steps` updates of `batch` demonstrations each.
    Returns the last loss, nats a token.

    The rate climbs for a twentieth of the steps and then falls as a cosine. Rows are those of
    `task.batch(step, batch, seed + 1)`, so the warm-up is a function of the seed alone. Each of several
    processes does all of it.
    """
    options = dict(system=system, prefill=prefill, wrapper=wrapper, turn_ends=turn_ends)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    more = dict(scaled=True) if model.dtype == torch.float16 else {}
    optimizer = make_optimizer(trained, lr=lr, betas=(0.9, 0.99), **more)
    start, average = time.perf_counter(), None
    with progress.doing("warm-up, steps", steps) as bar:
        for step in range(steps):
            rows = task.batch(step, batch, seed + 1)  # other rows than those the first GRPO steps see
            shown = demonstrations(tokenizer, rows, stop_id, **options)
            loss = accumulate_gradients(model, *shown, micro_tokens, optimizer.loss_scale)
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


def accumulate_gradients(model, prompts, completions, drawn, micro_tokens, scale=1.0) -> float:
    """Backward over a step's demonstrations, in micro-batches. Returns the loss, nats a token.

    drawn: which ids of each are the model's, and are learnt. scale: what the loss is multiplied by before its
    backward.
    """
    tokens = sum(map(sum, drawn))
    total = 0.0
    for cut in micro_batches(prompts, completions, micro_tokens):
        some_prompts = [prompts[b] for b, _ in cut]
        some_completions = [completions[b] for b, _ in cut]
        mine = [drawn[b] for b, _ in cut]
        logp, _, _ = model.completion_logprobs(some_prompts, some_completions, drawn=mine)
        loss = -logp.sum() / tokens  # one divisor for the step, however it is cut
        (loss * scale).backward()
        total += float(loss.detach())
    return total
