"""The kernels that bench/gpu.py checks and times, at the shapes of real models: each with its definition, its floor and its peers.

A Row names what is measured and builds a Case of it at a shape, when its turn comes: nothing lives before or after. A Case has calls without
arguments, "ours" first and then the peers, and a pair: the results of ours, every buffer from torch.empty full of NaN before, and what they must
equal: the definition (NAME_ref) on the same numbers in fp64, gradients included. Where whole logits would not fit, it runs 1,024 rows at a time.

phases: [(bytes, operations)] that follow each other: the least that must be moved and done. Shapes have a real and an odd form: the odd one fits no
tile, is checked in fp32 as well as in bf16, and is what --dry runs in Triton's interpreter. What is not installed is left out, by name.
The loss's peers are those of bench/head.py. The program's rows (sampler, update, step) are in bench/gpu_program.py.

Dims as in kernels/: M rows, T tokens, D width, V vocabulary, H / K heads, E head width, P prompt and C completion length, B prompts, G completions each.
"""
import importlib.util
import os
import sys
import time
from collections import namedtuple
from functools import partial
from pathlib import Path
from unittest.mock import patch

DRY = "--dry" in sys.argv
os.environ |= {"TRITON_INTERPRET": "1"} if DRY else {}  # before Triton is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before bench/, which has a rollout.py of its own

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import attention, flash_attention, linear_logprob, logprob, lora_linear, rms_norm, rope, sample, swiglu
from head import SEQUENCE, fused, liger, objective

DEV, TYPE = ("cpu", torch.float32) if DRY else ("cuda", torch.bfloat16)  # the interpreter cannot multiply bf16


# calls: name -> call; pair: () -> (results, what they must equal), or None; tokens: drawn by a call, where the table shows tokens a second; perf: PERF.md's
# floor of that on an H100; slack: times the rounding that is allowed for one kernel; without: peers that are not installed
Case = namedtuple("Case", "calls pair phases tokens perf slack without", defaults=[0, 0.0, 1.0, []])
Row = namedtuple("Row", "name build real odd goal", defaults=[""])  # build(*shape, dtype=) -> Case


def missing(*names) -> list[str]:
    return [name for name in names if not importlib.util.find_spec(name)]


def rand(*shape, dtype, grad=False):
    return torch.randn(*shape, dtype=dtype, device=DEV).requires_grad_(grad)


def clock() -> float:
    _ = DEV == "cuda" and torch.cuda.synchronize()
    return time.perf_counter()


def poisoned(make):
    """torch.empty or empty_like whose memory is NaN, or a large integer: what a kernel forgets to write shows. (torch's own switch forbids other calls.)"""
    return lambda *a, **kw: (out := make(*a, **kw)).fill_(float("nan") if out.is_floating_point() else 10**6)


def in_torch(function):
    """The same call with every kernel in its torch form."""
    kernels.use("torch")
    try:
        return function()
    finally:
        kernels.use("triton" if DRY else "auto")


def run(function, args, upstream):
    """Results, and the gradients of those args that want one, for the gradients `upstream` of the results where there are any."""
    out, leaves = function(*args), [a for a in args if a.requires_grad and upstream]
    out = list(out) if isinstance(out, (tuple, list)) else [out]
    return [*out, *torch.autograd.grad(out, leaves, [g.to(y.dtype) for g, y in zip(upstream, out)])] if leaves else out


def kernel(args, ours, definition, phase, peers, **more) -> Case:
    """The case of a function of tensors; definition and peers take the same arguments. A peer named "compiled" is compiled first."""
    peers = {k: torch.compile(f) if k == "compiled" else f for k, f in peers.items() if not (DRY and k == "compiled")}
    with torch.no_grad():  # bf16 numbers, so that they are the same in every dtype
        upstream = [torch.randn(y.shape, device=DEV).bfloat16() for y in run(ours, args, None)] if any(a.requires_grad for a in args) else None

    def pair():
        wide = [a.detach().double().requires_grad_(a.requires_grad) if a.is_floating_point() else a for a in args]  # before ours, which may write to its args
        in_poison = patch.multiple(torch, empty=poisoned(torch.empty), empty_like=poisoned(torch.empty_like))(run)
        return in_poison(ours, args, upstream), run(definition, wide, upstream)
    return Case({name: partial(run, f, args, upstream) for name, f in dict(ours=ours, **peers).items()}, pair, [phase], **more)


def norm(T, D, dtype):
    ref, args = lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [rand(T, D, dtype=dtype, grad=True), rand(D, dtype=dtype, grad=True)]
    return kernel(args, partial(rms_norm.rms_norm, eps=1e-6), partial(rms_norm.rms_norm_ref, eps=1e-6), (5 * T * D * dtype.itemsize, 0), dict(torch=ref, compiled=ref))


def add_norm(T, D, dtype):
    ref, args = lambda x, y, w: (x + y, F.rms_norm(x + y, w.shape, w, 1e-6)), [rand(*s, dtype=dtype, grad=True) for s in ((T, D), (T, D), (D,))]
    definition = lambda x, y, w: (x + y, rms_norm.rms_norm_ref(x + y, w, 1e-6))
    return kernel(args, partial(rms_norm.add_rms_norm, eps=1e-6), definition, (8 * T * D * dtype.itemsize, 0), dict(torch=ref, compiled=ref))


def gated(T, I, dtype):
    ref = lambda z: F.silu(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1]
    return kernel([rand(T, 2 * I, dtype=dtype, grad=True)], swiglu.swiglu, swiglu.swiglu_ref, (8 * T * I * dtype.itemsize, 0), dict(torch=ref, compiled=ref))


def rotated(T, H, E, dtype):
    args, ref = [rand(T, H, E, dtype=dtype, grad=True), rand(T, 1, E // 2, dtype=dtype), rand(T, 1, E // 2, dtype=dtype)], rope.rotate_ref
    return kernel(args, rope.rotate, ref, (4 * T * H * E * dtype.itemsize, 0), dict(torch=ref, compiled=ref))


def stored(n, K, E, C, dtype):
    """A decoding step's keys and values into the cache, again and again the same; in fp64 the function takes its torch form."""
    store, args = lambda *args: rope.store_keys(*args) or args[2:4], [*(rand(*s, dtype=dtype) for s in [(n, K, E)] * 2 + [(n, K, C, E)] * 2), torch.randint(0, C, (n,), device=DEV)]
    return kernel(args, store, store, (4 * n * K * E * dtype.itemsize, 0), {})


def shrunk(T, D, r, dtype):
    args, ref = [rand(T, D, dtype=dtype), rand(r, D, dtype=torch.float32)], lambda x, A: x.to(A.dtype) @ A.t()
    return kernel(args, partial(lora_linear.shrink, scale=1.0), ref, (T * D * dtype.itemsize, 2 * T * D * r), dict(torch=ref))


def expanded(T, D, r, dtype):
    args, ref = [rand(T, D, dtype=dtype), *(rand(*s, dtype=torch.float32) for s in ((T, r), (r, D)))], lambda y, h, B: (y + h @ B).to(y.dtype)
    return kernel(args, lambda y, h, B: lora_linear.expand_(y.clone(), h, B), ref, (4 * T * D * dtype.itemsize, 2 * T * D * r), dict(torch=ref))


def head_args(M, D, V, dtype, trained=False):
    return [rand(M, D, dtype=dtype, grad=True), (0.05 * rand(V, D, dtype=dtype)).requires_grad_(trained), torch.randint(0, V, (M,), device=DEV)]


def in_rows(h, w, y):
    """logp and entropy (M,) by the definition, 1,024 rows at a time, whose logits are made again in the backward."""
    parts = [checkpoint(logprob.logprob_ref, h[i : i + 1024], w, y[i : i + 1024], use_reentrant=False) for i in range(0, len(h), 1024)]
    return tuple(torch.cat(x) for x in zip(*parts))


def cut_ce(h, w, y):
    from cut_cross_entropy import linear_cross_entropy
    return -linear_cross_entropy(h, w, y, reduction="none")


def scored(M, D, V, dtype, trained):
    ours, definition, absent = lambda *args: logprob.logprob(*args)[0], lambda *args: in_rows(*args)[0], missing("cut_cross_entropy")
    case = kernel(head_args(M, D, V, dtype, trained), ours, definition, (0, (4 + 2 * trained) * M * D * V), {} if absent else dict(cut_ce=cut_ce), without=absent)
    return case._replace(calls=case.calls | dict(torch=partial(in_torch, case.calls["ours"])))


def loss(M, D, V, dtype, trained):
    args, row_of, absent = head_args(M, D, V, dtype, trained), torch.arange(M, device=DEV) // SEQUENCE, missing("liger_kernel")
    constants = dict(old_logp=logprob.logprob(*args)[0].detach() + 0.01, adv=rand(M // SEQUENCE, dtype=torch.float32), row_of=row_of, norm=float(M))
    definition = lambda *args: objective(*in_rows(*args), slice(None), **constants)[0]
    return kernel(args, partial(fused, constants=constants), definition, (0, (4 + 2 * trained) * M * D * V), {} if absent else dict(liger=partial(liger, constants=constants)), without=absent)


def scored_only(M, D, V, dtype):
    return kernel([x.detach() for x in head_args(M, D, V, dtype)], linear_logprob.linear_logprob, in_rows, (0, 2 * M * D * V), dict(chunks=torch.no_grad()(logprob.logprob)))


def drawn(n, V, dtype, **cut):
    args = [3 * rand(n, V, dtype=torch.float32), sample.token_keys(0, 0, torch.arange(n), 0, 0).to(DEV)]
    ref = lambda z, key: [x.to(DEV) for x in sample.sample_ref(z.cpu(), key.cpu(), **cut)]
    peers = dict(torch=lambda z, key: sample.draw(logprob.truncate_(z.clone(), **cut), key), multinomial=lambda z, key: torch.multinomial(z.softmax(-1), 1))
    return kernel(args, partial(sample.sample, **cut), ref, (4 * n * V, 0), peers)


def trained_attention(H, K, E, P, C, G, B, dtype):
    """B groups of G completions that share their prompts, beside torch's attention in buckets."""
    one, pairs = P + G * C, B * (P * (P + 1) / 2 + G * (C * P + C * (C + 1) / 2))
    segments = [s for b in range(0, B * one, one) for s in [(b, P, b, 0)] + [(b + P + g * C, C, b, P) for g in range(G)]]
    tiles, buckets = flash_attention.Tiles(segments, H // K, E=E, dtype=dtype, device=DEV), attention.Buckets(segments, H // K, dtype=dtype, device=DEV)
    return kernel([rand(B * one, n, E, dtype=dtype, grad=True) for n in (H, K, K)], partial(flash_attention.flash_attention, tiles=tiles),
                  partial(attention.attention_ref, segments=segments), (0, 14 * pairs * H * E), dict(buckets=partial(attention.attention, buckets=buckets)))


def decoded_attention(H, K, E, P, C, n, dtype):
    """n rows of one group, each near the end of its C own keys."""
    q, pk, pv, k, v = (rand(*s, dtype=dtype) for s in [(n, H, E)] + [(1, K, P, E)] * 2 + [(n, K, C, E)] * 2)
    table = torch.tensor([[i, 1, C - 1 - i % 3, 0, P, i * K * C] for i in range(n)], device=DEV)
    keys, values = (torch.cat([p.expand(n, -1, -1, -1), own], 2) for p, own in ((pk, k), (pv, v)))
    sdpa = lambda q, *_: F.scaled_dot_product_attention(q.view(n, K, H // K, E), keys, values).reshape(n, H, E)
    return kernel([q, pk, pv, k, v, table], flash_attention.flash_decode, attention.decode_ref, (2 * n * K * C * E * dtype.itemsize, 0), dict(sdpa=sdpa))


HEAD, SMALL_HEAD = (8192, 1536, 151_936), (64, 40, 333)
ROWS = [Row(f"{what}, head {'trained' if trained else 'frozen'}", partial(build, trained=trained), HEAD, SMALL_HEAD, goal) for what, build in
        (("policy loss fwd+bwd", loss), ("logprob fwd+bwd", scored)) for trained, goal in ((False, "16 ms, 1.3 GB"), (True, "22 ms, 1.3 GB"))] + [
    Row("logprob, no gradient", scored_only, HEAD, (37, 40, 333), "9.5 ms"),
    Row("sample", drawn, (256, 151_936), (3, 1003), "0.06 ms"), Row("sample, top-k and top-p", partial(drawn, top_k=50, top_p=0.95), (256, 151_936), (3, 1003)),
    *[Row(f"attention fwd+bwd, {H}/{K} x {E}", trained_attention, (H, K, E, 150, 200, 16, 4), (R, 1, 24, 70, 21, 3, 2)) for H, K, E, R in ((14, 2, 64, 3), (28, 4, 128, 1))],
    *[Row(f"attention decode, {H}/{K} x {E}", decoded_attention, (H, K, E, 150, 200, 256), (H, K, 24, 37, 41, 5)) for H, K, E in ((14, 2, 64), (28, 4, 128))],
    *[Row(f"{name} fwd+bwd", build, (16_384, 1536), (5, 1003)) for name, build in (("rms_norm", norm), ("add_rms_norm", add_norm))],
    Row("swiglu fwd+bwd", gated, (16_384, 8960), (5, 1031)), Row("rope fwd+bwd", rotated, (16_384, 14, 128), (13, 5, 24)),
    Row("keys into the cache", stored, (256, 2, 64, 512), (5, 3, 24, 7)),
    Row("lora x A^T", shrunk, (16_384, 1536, 16), (37, 101, 5)), Row("lora y + h B^T, with a copy of y", expanded, (16_384, 1536, 16), (67, 131, 5))]
