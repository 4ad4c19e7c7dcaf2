"""What a group saves by sharing its prompt in training: forward and backward of G completions, packed behind one prompt and as G sequences.

    python bench/shared_prompt.py --model=models/smollm2-135m [--prompt=150 --completion=200 --group=16 --lora=16 --threads=1 --reps=3]

The two take turns, so that a busy machine slows both; the processor's time counts, and the ratio is the median over the turns. Their gradients must be equal.
possible: G (P + C) / (P + G C) tokens, were everything in proportion to them (the head is not: it sees completions only; attention grows faster).
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lora
import model as models


def gradient(model, prompts, groups, weights):
    """Seconds of a forward and backward, and the gradient of all trained weights as one vector. weights (G C,): what each log-probability counts."""
    model.zero_grad()
    start = time.process_time()
    (model.completion_logprobs(prompts, groups)[0] * weights).sum().backward()
    return time.process_time() - start, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", required=True)
    for name, default in dict(prompt=150, completion=200, group=16, lora=16, threads=1, reps=3).items():
        p.add_argument(f"--{name}", type=int, default=default)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    model = models.load(a.model)
    if a.lora:
        lora.apply(model, rank=a.lora, alpha=2 * a.lora, targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
        for name, weight in model.named_parameters():
            if ".B." in name:  # zeros would leave A without a gradient
                weight.data.normal_(0, 0.01)
    (prompt,), group = (torch.randint(10, model.shape.V, (n, length)).tolist() for n, length in ((1, a.prompt), (a.group, a.completion)))
    weights, ratios, worst = torch.randn(a.group * a.completion) / (a.group * a.completion), [], 0.0
    for _ in range(a.reps + 1):  # the first warms up
        together, ours = gradient(model, [prompt], [group], weights)
        apart, theirs = gradient(model, [prompt] * a.group, [[completion] for completion in group], weights)
        ratios.append(apart / together)
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
        print(f"shared {together:.2f} s, separate {apart:.2f} s, {apart / together:.2f}x", flush=True)
    possible = a.group * (a.prompt + a.completion) / (a.prompt + a.group * a.completion)
    print(f"{statistics.median(ratios[1:]):.2f}x of {possible:.2f}x possible; gradients differ by {worst:.1e} of their norm")
    assert worst < 1e-4, "the gradients are not the same"


if __name__ == "__main__":
    main()
