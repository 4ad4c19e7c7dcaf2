"""What a group saves by sharing its prompt in training: G completions behind one prompt, and as G sequences.

    python bench/shared_prompt.py --model=models/smollm2-135m
    python bench/shared_prompt.py --model=PATH --prompt=150 --completion=200 --group=16 --lora=16 --reps=3

Forward and backward of both take turns, so that a busy machine slows both. The processor's time counts, and
the ratio is the median over the turns. Their gradients must be equal. possible: G (P + C) / (P + G C) tokens,
were everything in proportion to them (the head is not: it sees completions only; attention grows faster).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as models  # noqa: E402
from random_run import add_adapter, random_ids  # noqa: E402


def gradient(model, prompts, groups, weights):
    """Seconds of a forward and backward, and the gradient of all trained weights as one vector.

    weights (G C,): what each log-probability counts.
    """
    model.zero_grad()
    start = time.process_time()
    logp, _, _ = model.completion_logprobs(prompts, groups)
    (logp * weights).sum().backward()
    seconds = time.process_time() - start
    return seconds, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", required=True)
    numbers = dict(prompt=150, completion=200, group=16, lora=16, threads=1, reps=3)
    for name, default in numbers.items():
        p.add_argument(f"--{name}", type=int, default=default)
    return p.parse_args()


def main():
    a = arguments()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    model = models.load(a.model)
    if a.lora:
        add_adapter(model, a.lora)
    prompt, *group = random_ids(model.shape.V, a.prompt, *[a.completion] * a.group)
    M = a.group * a.completion
    weights = torch.randn(M) / M
    ratios, worst = [], 0.0
    for _ in range(a.reps + 1):  # the first warms up
        together, ours = gradient(model, [prompt], [group], weights)
        alone = [[completion] for completion in group]
        apart, theirs = gradient(model, [prompt] * a.group, alone, weights)
        ratios.append(apart / together)
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
        print(f"shared {together:.2f} s, separate {apart:.2f} s, {apart / together:.2f}x", flush=True)
    possible = a.group * (a.prompt + a.completion) / (a.prompt + a.group * a.completion)
    ratio = statistics.median(ratios[1:])
    print(f"{ratio:.2f}x of {possible:.2f}x possible; gradients differ by {worst:.1e} of their norm")
    assert worst < 1e-4, "the gradients are not the same"


if __name__ == "__main__":
    main()
