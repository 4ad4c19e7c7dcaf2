"""The head alone, forward and backward: ours, whole logits, and Liger's fused loss, at a model's (D, V).

    python bench/head.py
    python bench/head.py --model=smollm2-135m,qwen2.5-0.5b --rows=1024 --reps=3 --threads=1
    python bench/head.py --dtype=bfloat16 --device=cuda --rows=8192

    naive    logits of all rows, log_softmax, gather, autograd; the entropy without gradient, from the same
             log_softmax
    ours     kernels/logprob.py: log-probabilities and entropy; the objective outside
    fused    head.py, as train.py calls it: the objective inside, gradients made while the logits are there
    liger    LigerFusedLinearGRPOLoss (pip install liger-kernel), uncompiled, sequences of 64 tokens; it
             gives no entropy

The objective is clip with the ratio near 1, the same for all. frozen: only hidden states learn (LoRA);
trained: the head too. Each side has a process of its own and they take turns, so that a busy machine slows
all of them. The processor's time counts, its minimum over the turns. Memory is the peak above what is there
before: hidden states, weight, targets. `beyond` is that without the gradients that every side must return.
floor: the multiplications that frozen (4 M D V) and trained (6) need, at the speed of a 1024^3 matmul timed
here.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from head import policy_head  # noqa: E402
from kernels.logprob import logprob  # noqa: E402
from loss import Tokens, policy_loss  # noqa: E402
from peers import liger_loss, missing  # noqa: E402

SIZES = {"smollm2-135m": (576, 49152), "qwen2.5-0.5b": (896, 151936), "qwen2.5-1.5b": (1536, 151936)}
SEQUENCE = 64  # Liger wants sequences


def naive(hidden, weight, targets, tokens, objective):
    logq = (hidden @ weight.t()).float().log_softmax(-1)
    logp = logq.gather(1, targets[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(logq.exp() * logq).sum(-1)
    return policy_loss(logp, entropy=entropy, **tokens.arguments(), **objective)[0]


def ours(hidden, weight, targets, tokens, objective):
    logp, entropy = logprob(hidden, weight, targets)
    return policy_loss(logp, entropy=entropy, **tokens.arguments(), **objective)[0]


def fused(hidden, weight, targets, tokens, objective):
    return policy_head(hidden, weight, targets, tokens, objective)[0]


def liger(hidden, weight, targets, tokens, objective):
    return liger_loss(hidden, weight, targets, tokens, SEQUENCE)


SIDES = dict(naive=naive, ours=ours, fused=fused, liger=liger)


def clock(device) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak(device) -> int:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def make_problem(a, D, V, trained):
    """(hidden (M, D), weight (V, D), targets (M,), Tokens, objective), the same numbers for every side."""
    g, dtype = torch.Generator().manual_seed(0), getattr(torch, a.dtype)
    hidden = torch.randn(a.rows, D, generator=g).to(a.device, dtype).requires_grad_()
    weight = torch.empty(V, D).normal_(generator=g).mul_(2 / D**0.5)
    weight = weight.to(a.device, dtype).requires_grad_(trained)
    targets = torch.randint(0, V, (a.rows,), generator=g).to(a.device)
    adv = torch.randn(a.rows // SEQUENCE, generator=g).to(a.device)
    with torch.no_grad():
        # a few rows at a time, so that what this leaves behind is no part of any side's peak
        pieces = [logprob(h, weight, y)[0] for h, y in zip(hidden.split(16), targets.split(16))]
    old = torch.cat(pieces) + 0.01
    rows = torch.arange(a.rows, device=a.device) // SEQUENCE
    lengths = torch.full((len(adv),), SEQUENCE, device=a.device)
    tokens = Tokens(rows=rows, adv=adv, lengths=lengths, sampler_logp=old, old_logp=old)
    return hidden, weight, targets, tokens, dict(objective="clip", norm=float(a.rows))


def worker(pipe, side, a, D, V, trained):
    """A process: at each message one forward and backward, answered by its seconds.

    At "end" it answers with the loss, the norm of the gradient and the peak in bytes.
    """
    torch.set_num_threads(a.threads)
    problem = make_problem(a, D, V, trained)
    hidden, weight = problem[:2]
    before = peak(a.device)
    while pipe.recv() != "end":
        hidden.grad = weight.grad = None
        start = clock(a.device)
        loss = SIDES[side](*problem)
        loss.backward()
        pipe.send(clock(a.device) - start)
    pipe.send((float(loss.detach()), float(hidden.grad.float().norm()), peak(a.device) - before))


def compare(a, D, V, trained) -> dict:
    """{side: dict(loss, norm, bytes, seconds)} of the sides that are installed."""
    names = [name for name in SIDES if name != "liger" or not missing("liger_kernel")]
    start = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in names:
        pipes[name], end = start.Pipe()
        processes.append(start.Process(target=worker, args=(end, name, a, D, V, trained)))
        processes[-1].start()
    times = {name: [] for name in names}
    for _ in range(a.reps + 1):
        for name in names:
            pipes[name].send("go")
            times[name].append(pipes[name].recv())
    found = {}
    for name in names:
        pipes[name].send("end")
        loss, norm, peak_bytes = pipes[name].recv()
        # the first turn warms up
        found[name] = dict(loss=loss, norm=norm, bytes=peak_bytes, seconds=min(times[name][1:]))
    for process in processes:
        process.join()
    return found


def matmul_speed(device) -> float:
    """Operations a second of a 1024^3 matmul, here and now."""
    x, times = torch.randn(1024, 1024, device=device), []
    for _ in range(5):
        start = clock(device)
        x @ x
        times.append(clock(device) - start)
    return 2 * 1024**3 / min(times)


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", default="smollm2-135m,qwen2.5-0.5b")
    for name, default in dict(rows=1024, reps=3, threads=1).items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="cpu")
    return p.parse_args()


def main():
    a, out = arguments(), []
    torch.set_num_threads(a.threads)
    speed = matmul_speed(a.device)
    heading = f"{'seconds':>8} {'/ naive':>8} {'floor':>6} {'MB':>7} {'beyond':>7} {'/ naive':>8}"
    print(f"{a.rows} rows, {a.dtype}, {a.device}, {a.threads} threads\n{'':28} {heading}")
    for name in a.model.split(","):
        D, V = SIZES[name]
        for trained in (False, True):
            results = compare(a, D, V, trained)
            numbers = a.rows * D
            if trained:
                numbers += V * D
            due = numbers * getattr(torch, a.dtype).itemsize  # bytes of the gradients that all must return
            floor = (6 if trained else 4) * a.rows * D * V / speed
            base = results["naive"]
            for side, r in results.items():
                assert abs(r["norm"] / base["norm"] - 1) < 0.02, f"{side} has another gradient: {r}"
                beyond = max(r["bytes"] - due, 0)
                ratio, share = r["seconds"] / base["seconds"], floor / r["seconds"]
                memory = f"{r['bytes'] / 1e6:7.0f} {beyond / 1e6:7.0f}"
                more = beyond / max(base["bytes"] - due, 1)
                title = f"{name:14} {'trained' if trained else 'frozen':7} {side:5}"
                print(
                    f"{title} {r['seconds']:8.3f} {ratio:8.2f} {share:6.0%} {memory} {more:8.3f}", flush=True
                )
                out.append(dict(r, side=side, model=name, trained=trained, floor=floor))
    print(json.dumps(dict(args=vars(a), torch=torch.__version__, results=out)))


if __name__ == "__main__":
    main()
