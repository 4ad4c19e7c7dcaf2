"""The kernels that bench/gpu.py checks and times, at real shapes: definition, floor and peers of each.

A Row names what is measured and builds a Case of it at a shape, when its turn comes: nothing lives before or
after. A Case has calls without arguments, "ours" first and then the peers, and a pair: the results of ours,
every buffer from torch.empty full of NaN before, and what they must equal: the definition (NAME_ref) on the
same numbers in fp64, gradients included. Where whole logits would not fit, it runs 1,024 rows at a time.

Shapes have a real and an odd form: the odd one fits no tile, is checked in fp32 as well as in bf16, and is
what --dry runs in Triton's interpreter. A peer that is not installed is left out, by name. The sampler, the
update and the whole step are in bench/gpu_program.py.

Dims as in kernels/: M rows, T tokens, D width, V vocabulary, H / K heads, E head width, P prompt and C
completion length, B prompts, G completions each.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before bench/, which has a head.py and a rollout.py of its own

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import kernels  # noqa: E402
from head import policy_head  # noqa: E402
from kernels import attention, linear_logprob, logprob, lora_linear, nf4  # noqa: E402
from kernels import rms_norm, rope, sample, swiglu  # noqa: E402
from kernels import flash_attention as flash  # noqa: E402
from loss import Tokens, policy_loss  # noqa: E402
from peers import cut_logprob, liger_loss, missing  # noqa: E402

DEV, TYPE = ("cpu", torch.float32) if DRY else ("cuda", torch.bfloat16)  # the interpreter has no bf16 product
SEQUENCE = 64  # tokens a row in the loss: Liger wants rows of one length


@dataclass
class Case:
    calls: dict[str, Callable]  # "ours" first, then the peers
    pair: Callable | None  # () -> (results, what they must equal)
    phases: list[tuple]  # (bytes, operations) that follow each other: the least that must be moved and done
    tokens: int = 0  # drawn by a call, where the table shows tokens a second
    slack: float = 1.0  # times the rounding that is allowed for one kernel
    without: list[str] = field(default_factory=list)  # peers that are not installed


@dataclass
class Row:
    name: str
    build: Callable  # build(*shape, dtype=) -> Case
    real: tuple
    odd: tuple
    goal: str = ""


# ---------------------------------------------------------------------------------------------------- helpers
def rand(*shape, dtype, grad=False):
    return torch.randn(*shape, dtype=dtype, device=DEV).requires_grad_(grad)


def clock() -> float:
    if DEV == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def poisoned(make):
    """torch.empty or empty_like whose memory is NaN, or a large integer: what a kernel forgets shows.

    (torch's own switch for that forbids other calls.)
    """

    def poison(*args, **options):
        out = make(*args, **options)
        return out.fill_(float("nan") if out.is_floating_point() else 10**6)

    return poison


def in_torch(function):
    """The same call with every kernel in its torch form."""
    kernels.use("torch")
    try:
        return function()
    finally:
        kernels.use("triton" if DRY else "auto")


def run(function, args, upstream):
    """Results, and the gradients of those args that want one for `upstream`, the results' gradients."""
    out = function(*args)
    out = list(out) if isinstance(out, (tuple, list)) else [out]
    leaves = [x for x in args if x.requires_grad]
    if not leaves or upstream is None:
        return out
    upstream = [grad.to(y.dtype) for grad, y in zip(upstream, out)]
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


def widened(x):
    """The same numbers in fp64, with a gradient where x has one."""
    if not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def kernel(args, ours, definition, phase, peers, without=()) -> Case:
    """The case of a function of tensors; definition and peers take the same arguments.

    A peer named "compiled" is compiled first.
    """
    if "compiled" in peers:
        compiled = peers.pop("compiled")
        if not DRY:
            peers["compiled"] = torch.compile(compiled)
    upstream = None
    if any(x.requires_grad for x in args):
        with torch.no_grad():
            shapes = [y.shape for y in run(ours, args, None)]
        # bf16 numbers, so that they are the same in every dtype
        upstream = [torch.randn(shape, device=DEV).bfloat16() for shape in shapes]

    def pair():
        wide = [widened(x) for x in args]  # before ours, which may write to its arguments
        with patch.multiple(torch, empty=poisoned(torch.empty), empty_like=poisoned(torch.empty_like)):
            found = run(ours, args, upstream)
        return found, run(definition, wide, upstream)

    calls = {name: partial(run, f, args, upstream) for name, f in dict(ours=ours, **peers).items()}
    return Case(calls, pair, [phase], without=list(without))


# ------------------------------------------------------------------------------------ norms, rotation, SwiGLU
def norm(T, D, dtype):
    def in_torch_(x, w):
        return F.rms_norm(x, w.shape, w, 1e-6)

    args = [rand(T, D, dtype=dtype, grad=True), rand(D, dtype=dtype, grad=True)]
    ours, definition = partial(rms_norm.rms_norm, eps=1e-6), partial(rms_norm.rms_norm_ref, eps=1e-6)
    read = 5 * T * D * dtype.itemsize
    return kernel(args, ours, definition, (read, 0), dict(torch=in_torch_, compiled=in_torch_))


def add_norm(T, D, dtype):
    def in_torch_(x, y, w):
        return x + y, F.rms_norm(x + y, w.shape, w, 1e-6)

    def definition(x, y, w):
        return x + y, rms_norm.rms_norm_ref(x + y, w, 1e-6)

    args = [rand(*shape, dtype=dtype, grad=True) for shape in ((T, D), (T, D), (D,))]
    ours, read = partial(rms_norm.add_rms_norm, eps=1e-6), 8 * T * D * dtype.itemsize
    return kernel(args, ours, definition, (read, 0), dict(torch=in_torch_, compiled=in_torch_))


def gated(T, I, dtype):  # noqa: E741
    def in_torch_(z):
        gate, up = z.chunk(2, -1)
        return F.silu(gate) * up

    args, read = [rand(T, 2 * I, dtype=dtype, grad=True)], 8 * T * I * dtype.itemsize
    peers = dict(torch=in_torch_, compiled=in_torch_)
    return kernel(args, swiglu.swiglu, swiglu.swiglu_ref, (read, 0), peers)


def rotated(T, H, E, dtype):
    args = [rand(T, H, E, dtype=dtype, grad=True)]
    args += [rand(T, 1, E // 2, dtype=dtype) for _ in range(2)]
    read, ref = 4 * T * H * E * dtype.itemsize, rope.rotate_ref
    return kernel(args, rope.rotate, ref, (read, 0), dict(torch=ref, compiled=ref))


def stored(n, H, K, E, C, dtype):
    """A decoding step's queries and keys rotated, keys and values into the cache, again and again the same.

    In fp64 the function takes its torch form. The places are a column of a wider table, as in decoding.
    """

    def store(qk, v, cos, sin, cache_k, cache_v, table):
        q = rope.rotate_into_cache(qk, v, cos, sin, cache_k, cache_v, table[:, 2])
        return q, cache_k, cache_v

    shapes = [(n, H + K, E), (n, K, E)] + [(n, 1, E // 2)] * 2 + [(n, K, C, E)] * 2
    args = [rand(*shape, dtype=dtype) for shape in shapes]
    args.append(torch.randint(0, C, (n, 6), device=DEV))
    return kernel(args, store, store, (2 * n * (H + 2 * K) * E * dtype.itemsize, 0), {})


def shrunk(T, D, r, dtype):
    def in_torch_(x, A):
        return x.to(A.dtype) @ A.t()

    args = [rand(T, D, dtype=dtype), rand(r, D, dtype=torch.float32)]
    ours, phase = partial(lora_linear.shrink, scale=1.0), (T * D * dtype.itemsize, 2 * T * D * r)
    return kernel(args, ours, in_torch_, phase, dict(torch=in_torch_))


def expanded(T, D, r, dtype):
    def ours(y, h, B):
        return lora_linear.expand_(y.clone(), h, B)

    def in_torch_(y, h, B):
        return (y + h @ B).to(y.dtype)

    args = [rand(T, D, dtype=dtype), rand(T, r, dtype=torch.float32), rand(r, D, dtype=torch.float32)]
    phase = (4 * T * D * dtype.itemsize, 2 * T * D * r)
    return kernel(args, ours, in_torch_, phase, dict(torch=in_torch_))


def expanded_nf4(n, dtype):
    def ours(*quantised):
        return nf4.expand(*quantised, torch.empty(n, dtype=dtype, device=DEV))

    def definition(*quantised):
        return nf4.expand_ref(*quantised, n)

    def in_torch_(*quantised):
        return definition(*quantised).to(dtype)

    blocks = -(-n // 64)
    args = [torch.randint(0, 256, (size,), dtype=torch.uint8, device=DEV) for size in (-(-n // 2), blocks)]
    args += [rand(size, dtype=torch.float32) for size in (-(-blocks // 256), 256, 1)]
    moved = n // 2 + blocks + 4 * blocks // 256 + n * dtype.itemsize
    return kernel(args, ours, definition, (moved, 0), dict(compiled=in_torch_))


# ----------------------------------------------------------------------------------------- the head, the draw
def head_args(M, D, V, dtype, trained=False):
    weight = (0.05 * rand(V, D, dtype=dtype)).requires_grad_(trained)
    return [rand(M, D, dtype=dtype, grad=True), weight, torch.randint(0, V, (M,), device=DEV)]


def in_pieces(h, w, y):
    """logp and entropy (M,) by the definition, 1,024 rows at a time; the backward makes logits again."""
    parts = []
    for h_, y_ in zip(h.split(1024), y.split(1024)):
        parts.append(checkpoint(logprob.logprob_ref, h_, w, y_, use_reentrant=False))
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy)


def head_operations(M, D, V, trained) -> int:
    return (6 if trained else 4) * M * D * V


def scored(M, D, V, dtype, trained):
    def logp_of(function):
        return lambda *args: function(*args)[0]

    without = missing("cut_cross_entropy")
    peers = {} if without else dict(cut_ce=cut_logprob)
    args, phase = head_args(M, D, V, dtype, trained), (0, head_operations(M, D, V, trained))
    case = kernel(args, logp_of(logprob.logprob), logp_of(in_pieces), phase, peers, without)
    case.calls["torch"] = partial(in_torch, case.calls["ours"])
    return case


def loss(M, D, V, dtype, trained):
    """The whole loss with the ratio near 1, forward and backward, as train.py calls it."""
    hidden, weight, targets = args = head_args(M, D, V, dtype, trained)
    old = logprob.logprob(*args)[0].detach() + 0.01
    n = M // SEQUENCE
    tokens = Tokens(
        rows=torch.arange(M, device=DEV) // SEQUENCE,
        adv=rand(n, dtype=torch.float32),
        lengths=torch.full((n,), SEQUENCE, device=DEV),
        sampler_logp=old,
        old_logp=old,
    )
    objective = dict(objective="clip", norm=float(M))

    def ours(h, w, y):
        return policy_head(h, w, y, tokens, objective)[0]

    def definition(h, w, y):
        logp, entropy = in_pieces(h, w, y)
        return policy_loss(logp, entropy=entropy, **tokens.arguments(), **objective)[0]

    def liger(h, w, y):
        return liger_loss(h, w, y, tokens, SEQUENCE)

    without = missing("liger_kernel")
    peers = {} if without else dict(liger=liger)
    return kernel(args, ours, definition, (0, head_operations(M, D, V, trained)), peers, without)


def scored_only(M, D, V, dtype):
    args = [x.detach() for x in head_args(M, D, V, dtype)]
    peers = dict(chunks=torch.no_grad()(logprob.logprob))
    return kernel(args, linear_logprob.linear_logprob, in_pieces, (0, 2 * M * D * V), peers)


def drawn(n, V, dtype, **cut):
    def definition(z, key):
        return [x.to(DEV) for x in sample.sample_ref(z.cpu(), key.cpu(), **cut)]

    def in_torch_(z, key):
        return sample.draw(logprob.truncate_(z.clone(), **cut), key)

    def multinomial(z, key):
        return torch.multinomial(z.softmax(-1), 1)

    keys = sample.token_keys(0, 0, torch.arange(n), 0, 0).to(DEV)
    args = [3 * rand(n, V, dtype=torch.float32), keys]
    peers = dict(torch=in_torch_, multinomial=multinomial)
    return kernel(args, partial(sample.sample, **cut), definition, (4 * n * V, 0), peers)


# -------------------------------------------------------------------------------------------------- attention
def trained_attention(H, K, E, P, C, G, B, dtype):
    """B groups of G completions that share their prompts, beside torch's attention in buckets."""
    one = P + G * C
    segments = []  # (start, length, prompt_start, prompt_length)
    for start in range(0, B * one, one):
        segments.append((start, P, start, 0))
        segments += [(start + P + g * C, C, start, P) for g in range(G)]
    seen = B * (P * (P + 1) / 2 + G * (C * P + C * (C + 1) / 2))  # pairs of a query and a key
    tiles = flash.Tiles(segments, H // K, E=E, dtype=dtype, device=DEV)
    buckets = attention.Buckets(segments, H // K, dtype=dtype, device=DEV)
    args = [rand(B * one, heads, E, dtype=dtype, grad=True) for heads in (H, K, K)]
    ours = partial(flash.flash_attention, tiles=tiles)
    definition = partial(attention.attention_ref, segments=segments)
    peers = dict(buckets=partial(attention.attention, buckets=buckets))
    return kernel(args, ours, definition, (0, 14 * seen * H * E), peers)


def decoded_attention(H, K, E, P, C, n, dtype):
    """n rows of one group, each near the end of its C own keys."""
    q = rand(n, H, E, dtype=dtype)
    prompt_k, prompt_v = [rand(1, K, P, E, dtype=dtype) for _ in range(2)]
    own_k, own_v = [rand(n, K, C, E, dtype=dtype) for _ in range(2)]
    table = torch.tensor([[i, 1, C - 1 - i % 3, 0, P, i * K * C] for i in range(n)], device=DEV)
    keys = torch.cat([prompt_k.expand(n, -1, -1, -1), own_k], 2)
    values = torch.cat([prompt_v.expand(n, -1, -1, -1), own_v], 2)

    def sdpa(q, *_):
        grouped = q.view(n, K, H // K, E)  # the query heads of a key head as rows of queries
        return F.scaled_dot_product_attention(grouped, keys, values).reshape(n, H, E)

    args = [q, prompt_k, prompt_v, own_k, own_v, table]
    read = 2 * K * E * dtype.itemsize * (n * C + P)
    return kernel(args, flash.flash_decode, attention.decode_ref, (read, 0), dict(sdpa=sdpa))


# ------------------------------------------------------------------------------------------------------- rows
HEAD, SMALL_HEAD = (8192, 1536, 151_936), (64, 40, 333)
KERNELS = []
for what, build in (("policy loss fwd+bwd", loss), ("logprob fwd+bwd", scored)):
    for trained, goal in ((False, "16 ms, 1.3 GB"), (True, "22 ms, 1.3 GB")):
        name = f"{what}, head {'trained' if trained else 'frozen'}"
        KERNELS.append(Row(name, partial(build, trained=trained), HEAD, SMALL_HEAD, goal))
KERNELS += [
    Row("sample", drawn, (256, 151_936), (3, 1003), "0.08 ms"),
    Row("sample, one row", drawn, (1, 151_936), (1, 1003), "0.03 ms"),
    Row("sample, top-k, top-p", partial(drawn, top_k=50, top_p=0.95), (256, 151_936), (3, 1003), "0.5 ms"),
    Row(
        "attention fwd+bwd, 14/2 x 64",
        trained_attention,
        (14, 2, 64, 150, 200, 16, 4),
        (3, 1, 24, 70, 21, 3, 2),
    ),
    Row(
        "attention fwd+bwd, 28/4 x 128",
        trained_attention,
        (28, 4, 128, 150, 200, 16, 4),
        (1, 1, 24, 70, 21, 3, 2),
    ),
    Row("attention decode, 14/2 x 64", decoded_attention, (14, 2, 64, 150, 200, 256), (14, 2, 24, 37, 41, 5)),
    Row(
        "attention decode, 28/4 x 128", decoded_attention, (28, 4, 128, 150, 200, 256), (28, 4, 24, 37, 41, 5)
    ),
    Row(
        "attention decode, one row, 16k keys",
        decoded_attention,
        (14, 2, 64, 150, 16_384, 1),
        (14, 2, 24, 37, 700, 1),
    ),
    Row("logprob, no gradient", scored_only, HEAD, (37, 40, 333), "8 ms"),
    Row("rms_norm fwd+bwd", norm, (16_384, 1536), (5, 1003)),
    Row("add_rms_norm fwd+bwd", add_norm, (16_384, 1536), (5, 1003)),
    Row("swiglu fwd+bwd", gated, (16_384, 8960), (5, 1031)),
    Row("rope fwd+bwd", rotated, (16_384, 14, 128), (13, 5, 24)),
    Row("rotation, keys into the cache", stored, (256, 14, 2, 64, 512), (5, 4, 3, 24, 7)),
    Row("lora x A^T", shrunk, (16_384, 1536, 16), (37, 101, 5)),
    Row("lora y + h B^T, with a copy of y", expanded, (16_384, 1536, 16), (67, 131, 5)),
    Row("NF4 expanded", expanded_nf4, (3584 * 18_944,), (64 * 301 + 5,)),
]
