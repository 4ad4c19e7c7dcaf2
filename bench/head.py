"""The head alone, forward and backward: ours, whole logits, and Liger's fused loss, at a model's (D, V): time and memory, as ratios to whole logits.

    python bench/head.py [--model=smollm2-135m,qwen2.5-0.5b] [--rows=1024] [--reps=3] [--threads=1] [--dtype=float32] [--device=cpu]

    naive    logits of all rows, log_softmax, gather, autograd; the entropy without gradient, from the same log_softmax
    ours     kernels/logprob.py: log-probabilities and entropy; the objective outside
    fused    kernels/policy_head.py: the same with loss.policy_loss inside, gradients made while the logits are there
    liger    LigerFusedLinearGRPOLoss (pip install liger-kernel), uncompiled, sequences of 64 tokens; it gives no entropy

The objective is clip with the ratio near 1, the same for all. frozen: only hidden states learn (LoRA); trained: the head too. Each side has a process of its
own and they take turns, so that a busy machine slows all of them; the processor's time counts, its minimum over the turns. Memory is the peak above what is
there before: hidden states, weight, targets. `beyond` is that without the gradients that every side must return. floor: the multiplications that
frozen (4 M D V) and trained (6) need, at the speed of a 1024^3 matmul timed here.
"""
import argparse
import importlib.util
import json
import multiprocessing
import resource
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import loss as losses
from kernels.logprob import logprob
from kernels.policy_head import policy_head

SIZES = {"smollm2-135m": (576, 49152), "qwen2.5-0.5b": (896, 151936), "qwen2.5-1.5b": (1536, 151936)}
SEQUENCE = 64  # Liger wants sequences


def objective(logp, entropy, rows, *, old_logp, adv, row_of, norm):
    return losses.policy_loss(logp, old_logp[rows], adv, row_of[rows], entropy=entropy, lengths=torch.full((len(adv),), SEQUENCE, device=logp.device), norm=norm)


def naive(hidden, weight, targets, constants):
    logq = (hidden @ weight.t()).float().log_softmax(-1)
    logp = logq.gather(1, targets[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(logq.exp() * logq).sum(-1)
    return objective(logp, entropy, slice(None), **constants)[0]


def ours(hidden, weight, targets, constants):
    return objective(*logprob(hidden, weight, targets), slice(None), **constants)[0]


def fused(hidden, weight, targets, constants):
    return policy_head(hidden, weight, targets, partial(objective, **constants))[0]


def liger(hidden, weight, targets, constants):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    shape, head = (len(constants["adv"]), SEQUENCE), LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo")
    return head(hidden.view(*shape, -1), weight, targets.view(shape), torch.ones(shape, device=hidden.device), constants["adv"], old_per_token_logps=constants["old_logp"].view(shape))[0]


SIDES = dict(naive=naive, ours=ours, fused=fused, liger=liger)


def clock(device):
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak(device) -> int:
    return torch.cuda.max_memory_allocated() if device != "cpu" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(pipe, side, a, D, V, trained):
    """A process: at each message one forward and backward, answered by its seconds; at "end" the loss, the gradient's norm and the peak in bytes."""
    torch.set_num_threads(a.threads)
    g, dtype = torch.Generator().manual_seed(0), getattr(torch, a.dtype)
    hidden = torch.randn(a.rows, D, generator=g).to(a.device, dtype).requires_grad_()
    weight = torch.empty(V, D).normal_(generator=g).mul_(2 / D**0.5).to(a.device, dtype).requires_grad_(trained)
    targets = torch.randint(0, V, (a.rows,), generator=g).to(a.device)
    adv, row_of = torch.randn(a.rows // SEQUENCE, generator=g).to(a.device), torch.arange(a.rows, device=a.device) // SEQUENCE
    with torch.no_grad():
        # a few rows at a time, so that what this leaves behind is no part of any side's peak
        logp = torch.cat([logprob(h, weight, y)[0] for h, y in zip(hidden.split(16), targets.split(16))])
    constants = dict(old_logp=logp + 0.01, adv=adv, row_of=row_of, norm=float(a.rows))
    before = peak(a.device)
    while pipe.recv() != "end":
        hidden.grad = weight.grad = None
        start = clock(a.device)
        loss = SIDES[side](hidden, weight, targets, constants)
        loss.backward()
        pipe.send(clock(a.device) - start)
    pipe.send((float(loss.detach()), float(hidden.grad.float().norm()), peak(a.device) - before))


def compare(a, D, V, trained) -> dict:
    """{side: dict(seconds, gb, loss, norm)} of the sides that are installed."""
    names = [name for name in SIDES if name != "liger" or importlib.util.find_spec("liger_kernel")]
    start, found = multiprocessing.get_context("spawn"), {name: [] for name in names}
    pipes = {name: start.Pipe() for name in names}
    processes = [start.Process(target=worker, args=(pipes[name][1], name, a, D, V, trained)) for name in names]
    [p.start() for p in processes]
    for _ in range(a.reps + 1):
        for name in names:
            pipes[name][0].send("go")
            found[name].append(pipes[name][0].recv())
    [pipes[name][0].send("end") for name in names]
    ended = {name: pipes[name][0].recv() for name in names}
    [p.join() for p in processes]
    return {name: dict(zip(("loss", "norm", "bytes"), ended[name]), seconds=min(found[name][1:])) for name in names}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", default="smollm2-135m,qwen2.5-0.5b")
    for name, default in dict(rows=1024, reps=3, threads=1).items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="cpu")
    a, out = p.parse_args(), []
    torch.set_num_threads(a.threads)
    x, times = torch.randn(1024, 1024, device=a.device), []
    for _ in range(5):
        start = clock(a.device)
        x @ x
        times.append(clock(a.device) - start)
    print(f"{a.rows} rows, {a.dtype}, {a.device}, {a.threads} threads\n{'':28} {'seconds':>8} {'/ naive':>8} {'floor':>6} {'MB':>7} {'beyond':>7} {'/ naive':>8}")
    for name in a.model.split(","):
        for trained in (False, True):
            D, V = SIZES[name]
            results = compare(a, D, V, trained)
            due, floor = (a.rows * D + V * D * trained) * getattr(torch, a.dtype).itemsize, (2 + trained) * 2 * a.rows * D * V / (2 * 1024**3 / min(times))
            for side, r in results.items():
                base, beyond = results["naive"], max(r["bytes"] - due, 0)
                assert abs(r["norm"] / base["norm"] - 1) < 0.02, f"{side} has another gradient: {r}"
                print(f"{name:14} {'trained' if trained else 'frozen':7} {side:5} {r['seconds']:8.3f} {r['seconds'] / base['seconds']:8.2f} {floor / r['seconds']:6.0%} "
                      f"{r['bytes'] / 1e6:7.0f} {beyond / 1e6:7.0f} {beyond / max(base['bytes'] - due, 1):8.3f}", flush=True)
                out.append(dict(r, side=side, model=name, trained=trained, floor=floor))
    print(json.dumps(dict(args=vars(a), torch=torch.__version__, results=out)))


if __name__ == "__main__":
    main()
