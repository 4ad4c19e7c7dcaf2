"""Supervised warm-up: the model learns to write like a task's demonstrations, before reinforcement learning changes what it writes.

    python sft.py configs/arithmetic.py

One objective: the mean negative log-likelihood (nats a token) of each row's `solution`, the stop id included, given its prompt. It goes
through the same packed forward and the same chunked head as GRPO: a demonstration is a group of one completion. train.py calls `warm_up`
when the config has sft_steps > 0.
"""
import os
import sys
import time

import torch

import config as configs
import data
import optim
from eval import load_task
from model import micro_batches
from sample import load_policy, pick_device, save_policy


def demonstrations(tokenizer, rows, stop_id, *, system, prefill):
    """Rows with a `solution` -> prompts and completions, lists of ids. ValueError where a row has none."""
    lacking = [i for i, row in enumerate(rows) if not row.get("solution")]
    if lacking:
        raise ValueError(f"supervised warm-up needs a `solution` in every row, and {len(lacking)} of {len(rows)} have none: set sft_steps=0, or add the column")
    prompts = [data.prompt_ids(tokenizer, row["prompt"], system=system, prefill=prefill) for row in rows]
    return prompts, [[data.encode(tokenizer, row["solution"]) + [stop_id]] for row in rows]


def warm_up(model, tokenizer, task, *, steps, batch, lr, seed, stop_id, micro_tokens, system="", prefill="", say=print):
    """Trains the model in place for `steps` updates of `batch` demonstrations; the rate climbs for a twentieth of them and then falls as a cosine.

    Rows are those of `task.batch(step, batch, seed)`, so the warm-up is a function of the seed alone. Returns the last loss, nats a token.
    """
    optimizer = optim.AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.99))
    start, running = time.perf_counter(), None
    for step in range(steps):
        rows = task.batch(step, batch, seed + 1)  # other rows than those the first GRPO steps see
        prompts, completions = demonstrations(tokenizer, rows, stop_id, system=system, prefill=prefill)
        tokens, total = sum(len(c[0]) for c in completions), 0.0
        for cut in micro_batches(prompts, completions, micro_tokens):
            logp, _, _ = model.completion_logprobs([prompts[b] for b, _ in cut], [completions[b] for b, _ in cut])
            loss = -logp.sum() / tokens  # one divisor for the step, however it is cut
            loss.backward()
            total += float(loss.detach())
        optimizer.step(optim.learning_rate(step, lr=lr, warmup_steps=max(1, steps // 20), steps=steps, schedule="cosine", min_ratio=0.1), max_norm=1.0)
        optimizer.zero_grad()
        running = total if running is None else 0.9 * running + 0.1 * total
        if (step + 1) % max(1, steps // 9) == 0 or step + 1 == steps:
            say(f"warm-up {step + 1:5d}/{steps}  loss {running:.3f} nats/token  {(time.perf_counter() - start) / (step + 1) * 1000:.0f} ms a step")
    return running


def main(cfg):
    if not cfg.sft_steps:
        raise ValueError("the config has sft_steps = 0: there is no warm-up to do; give --sft_steps=N")
    device, dtype = pick_device(cfg.device, cfg.dtype, cfg.threads)
    if dtype != torch.float32:
        print("the warm-up trains all weights; they are kept in fp32 inside the optimiser")
    model, tokenizer, stop_ids, base = load_policy(cfg.model, scratch=cfg.scratch, alphabet=cfg.alphabet, seed=cfg.seed, dtype=dtype, device=device)
    warm_up(model, tokenizer, load_task(cfg), steps=cfg.sft_steps, batch=cfg.sft_batch, lr=cfg.sft_lr, seed=cfg.seed, stop_id=stop_ids[0],
            micro_tokens=cfg.micro_tokens, system=cfg.system_prompt, prefill=cfg.prefill)
    folder = os.path.join(cfg.out_dir, "start")
    save_policy(model, tokenizer, stop_ids, folder, base=base)
    print(f"saved {folder}")


if __name__ == "__main__":
    try:
        main(configs.load(sys.argv[1:]))
    except ValueError as e:
        sys.exit(f"sft.py: {e}")
