"""One real step of GRPO with the values and shapes of its tensors: writes docs/walkthrough.md.

    python bench/walkthrough.py              # writes the page
    python bench/walkthrough.py --print      # prints it

A tiny model adds two-digit numbers badly. The script takes one step with it through train.py's own
functions and says what each line of the loop holds. Everything is a function of the seed, so a test compares
the page with what the script prints.

Dims: B prompts, G completions a prompt, N = B * G rows, T completion tokens, D width, V vocabulary.
"""

import contextlib
import io
import shutil
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import config as configs
import train
from batch import gather_scores, micro_batches
from head import policy_head
from run import Run

PAGE = Path(__file__).parents[1] / "docs" / "walkthrough.md"
FLAGS = [
    "--sft_steps=140",
    "--sft_batch=64",
    "--prompts_per_step=3",
    "--group_size=4",
    "--max_new_tokens=8",
    "--steps=1",
]
FLAGS += ["--eval_every=0", "--eval_problems=8", "--threads=1", "--device=cpu", "--force=True", "--lr=2e-5"]
FLAGS += ["--task_options={'digits': 2, 'worked_share': 0.0}", "--warmup_steps=0", "--entropy_coef=0.0"]
FLAGS += ["--temperature=1.0", "--seed=1"]


def numbers(x, digits=2) -> str:
    """A tensor's values in few digits. Minus zero is zero."""
    return ", ".join(f"{value:.{digits}f}".replace("-0." + "0" * digits, "0." + "0" * digits) for value in x)


def table(head, rows) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def shown(text: str) -> str:
    return "`" + (text or " ") + "`"


def sampled(run, step, batch) -> list[str]:
    """Sampling and rewards."""
    G, out = batch.group_size, batch.out
    lines = ["## Sample and score", ""]
    lines += [
        "`sample_and_score` draws G completions of each prompt. A row keeps its ids, the stop id included,",
        "and the log-probability with which each was drawn. A prompt is computed once, whatever G is.",
        "",
    ]
    rows = []
    for n, ids in enumerate(out.ids):
        row = [n, shown(step.rows[n // G]["prompt"]), shown(batch.texts[n]), ids]
        rows.append([*row, numbers(out.logprobs[n]), f"{batch.reward[n]:.0f}"])
    lines += table(["row", "prompt", "completion", "ids", "old_logp, nats", "reward"], rows)
    return [*lines, ""]


def compared(scores, A) -> list[str]:
    """Advantages, by hand."""
    lines = ["## Compare within the group", ""]
    lines += [
        "`advantages_of` takes the rewards (B, G) of all ranks. An answer's advantage is its reward minus",
        "the mean of its group, over the group's standard deviation (with G - 1, as TRL) plus 1e-4. A group",
        "whose rewards are all equal has advantages of exactly 0, teaches nothing and is not computed below.",
        "",
    ]
    rows = []
    for b, group in enumerate(scores.rewards):
        mean, std = float(group.mean()), float(group.std())
        rows.append([b, numbers(group, 0), f"{mean:.2f}", f"{std:.3f}", numbers(A[b])])
    return [*lines, *table(["group", "rewards", "mean", "std", "A"], rows), ""]


def trained(run, step, batch, A) -> list[str]:
    """The micro-batch, its loss and gradient; then one update."""
    batch.adv = A.reshape(-1)
    run.micro_tokens = 8192
    train.choose_tokens(run, step, batch, updates=1)
    groups = range(len(batch.prompts))
    norm = train.step_normaliser(run.cfg, batch, groups)
    rows, prompts, completions = next(micro_batches(batch, groups, run.micro_tokens))
    tokens = batch.tokens(rows, run.model.device)
    run.model.train()
    hidden, targets = run.model.completion_hidden(prompts, completions)
    objective = run.objective | dict(norm=norm)
    loss, entropy, stats = policy_head(hidden, run.model.head, targets, tokens, objective, **step.sampling)
    loss.backward()
    (T, D), V = hidden.shape, len(run.model.head)
    packed = sum(map(len, prompts)) + T
    apart = sum((len(p) + len(ids)) for p, group in zip(prompts, completions) for ids in group)

    lines = ["## Micro-batch, loss, backward", ""]
    lines += [
        f"Rows with an advantage are {', '.join(map(str, rows))}. They go through the model as one",
        f"packed stream of {packed} tokens, in which each prompt stands once; apart they would be {apart}.",
        f"Of the hidden states, `completion_hidden` returns the T = {T} that predict a completion's token:",
        f"`hidden` ({T}, {D}) and `targets` ({T},). `policy_head` multiplies by the head ({V}, {D}), a",
        "chunk of rows at a time.",
        "",
    ]
    lines += table(
        ["what", "value"],
        [
            ["divisor of the step: all its tokens", f"{norm:.0f}"],
            ["ratio new / old, smallest and largest", numbers([stats["ratio_min"], stats["ratio_max"]], 4)],
            ["largest difference of sampler and trainer", "below 1e-5 nats"],
            ["mean entropy, nats", numbers([entropy.mean()])],
            ["loss", numbers([loss.item()])],
        ],
    )
    assert float(stats["diff_max"]) < 1e-5, stats
    lines += [
        "",
        "The ratio is 1, since nothing has been learnt yet, and the loss is small: it has a gradient and",
    ]
    return [*lines, "hardly a value.", ""]


def moved(run, step, batch) -> list[str]:
    """What the update did to each row."""
    grad_norm = float(run.optimizer.step(step.lr, max_norm=run.cfg.max_grad_norm))
    run.optimizer.zero_grad()
    run.model.eval()
    G = batch.group_size
    groups = [batch.out.group(b, G) for b in range(len(batch.prompts))]
    with torch.no_grad():
        logp, _, _ = run.model.completion_logprobs(batch.prompts, groups)
    lines = [
        "## Update",
        "",
        f"AdamW takes one step at lr {step.lr:g}; the gradient's norm was {grad_norm:.1f}.",
    ]
    lines += ["Each row's log-probability, the sum over its tokens, before, and its change:", ""]
    rows = []
    for n, row in enumerate(logp.split([len(ids) for ids in batch.out.ids])):
        before, after = sum(batch.out.logprobs[n]), float(row.sum())
        rows.append([n, numbers([batch.adv[n]]), numbers([before]), numbers([after - before], 3)])
    lines += table(["row", "A", "before", "change"], rows)
    lines += [
        "",
        "In each group with a spread, the answer that beat its group gained on those that lost to it. That",
    ]
    lines += ["is all of GRPO. Rows of advantage 0 move too, since all rows share their weights."]
    return lines


def page() -> str:
    folder = tempfile.mkdtemp()
    argv = [str(PAGE.parents[1] / "configs" / "arithmetic.py"), *FLAGS, f"--out_dir={folder}"]
    with contextlib.redirect_stdout(io.StringIO()):
        run = Run(configs.load(argv))
    step = train.begin_step(run, 1)
    batch = train.sample_and_score(run, step, step.rows, step.numbers)
    step.drawn = step.scores = gather_scores(batch)
    A, _ = train.advantages_of(run, step)
    lines = ["# One step, with its numbers", ""]
    lines += [
        "A model of 429,056 weights has had 140 steps of warm-up on sums of two digits, and knows some of",
        f"them. This is one step of [train.py](../train.py) with B = {len(step.rows)} prompts and",
        f"G = {batch.group_size} completions each. `python bench/walkthrough.py` makes this page with",
        "train.py's own functions, and a test compares the two.",
        "",
    ]
    lines += sampled(run, step, batch) + compared(step.scores, A)
    lines += trained(run, step, batch, A) + moved(run, step, batch)
    shutil.rmtree(folder)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = page()
    if "--print" in sys.argv:
        print(text, end="")
    else:
        PAGE.write_text(text)
