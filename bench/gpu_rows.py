"""What bench/gpu.py measures: every kernel at the shapes of real models, with its floor, its goal and its peers.

A row is (name, goal, bytes, operations, ours, {peer: call}): bytes and operations are the least that the work must move and do, `ours` and
the peers take no arguments and return tensors that can be compared; the first peer is the definition, in torch. With --dry the shapes are
tiny and the kernels run in Triton's interpreter. Peers that are not installed are left out: Liger (liger_kernel), cut_cross_entropy.

Dims as in kernels/: M rows, T tokens, D width, V vocabulary, H / K heads, E head width, P prompt and C completion length, B prompts, G completions each.
"""
import importlib.util
import os
import sys
from functools import partial
from pathlib import Path

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

import kernels
import lora
import model as models
import rollout
from kernels import attention, flash_attention, linear_logprob, logprob, lora_linear, rms_norm, rope, sample, softmax, swiglu

DEV, TYPE = ("cpu", torch.float32) if DRY else ("cuda", torch.bfloat16)  # the interpreter cannot multiply bf16
QWEN = dict(model_type="qwen2", vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=True)
SMALL = dict(QWEN, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)


def size(real, dry):
    return dry if DRY else real


def rand(*shape, dtype=TYPE, grad=False):
    return torch.randn(*shape, dtype=dtype, device=DEV).requires_grad_(grad)


def both(function, *args):
    """Forward and backward; returns what can be compared: results and gradients. The gradient that comes in is one for all runs."""
    torch.manual_seed(1)
    out = function(*args)
    out = out if isinstance(out, tuple) else (out,)
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    return [*out, *torch.autograd.grad(out, leaves, [torch.randn_like(y) for y in out])]


def in_torch(function):
    """The same call with every kernel in its torch form."""
    kernels.use("torch")
    try:
        return function()
    finally:
        kernels.use("triton" if DRY else "auto")


def elementwise():
    """Rows of the small kernels: (name, goal, bytes, operations, ours, {peer: call}); the first peer is what ours is compared with."""
    T, D, I = size((16_384, 1536, 8960), (3, 24, 40))
    item = TYPE.itemsize
    x, y, w = rand(T, D, grad=True), rand(T, D, grad=True), rand(D, grad=True)
    ref = lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)
    yield "rms_norm fwd+bwd", "", 5 * T * D * item, 0, partial(both, partial(rms_norm.rms_norm, eps=1e-6), x, w), dict(torch=partial(both, ref, x, w), compiled=partial(both, torch.compile(ref), x, w))
    ref2 = lambda x, y, w: (x + y, F.rms_norm(x + y, w.shape, w, 1e-6))
    yield "add_rms_norm fwd+bwd", "", 8 * T * D * item, 0, partial(both, partial(rms_norm.add_rms_norm, eps=1e-6), x, y, w), dict(torch=partial(both, ref2, x, y, w), compiled=partial(both, torch.compile(ref2), x, y, w))
    gate_up = rand(T, 2 * I, grad=True)
    ref3 = lambda z: F.silu(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1]
    yield "swiglu fwd+bwd", "", 8 * T * I * item, 0, partial(both, swiglu.swiglu, gate_up), dict(torch=partial(both, ref3, gate_up), compiled=partial(both, torch.compile(ref3), gate_up))
    E = size(128, 8)
    q, cos, sin = rand(T, 14, E, grad=True), rand(T, 1, E // 2), rand(T, 1, E // 2)
    yield "rope fwd+bwd", "", 4 * q.numel() * item, 0, partial(both, rope.rotate, q, cos, sin), dict(torch=partial(both, rope.rotate_ref, q, cos, sin), compiled=partial(both, torch.compile(rope.rotate_ref), q, cos, sin))
    yield "softmax fwd+bwd", "tie", 5 * T * D * item, 0, partial(both, softmax.softmax, x), dict(torch=partial(both, partial(torch.softmax, dim=-1), x))
    A, h = rand(16, D, dtype=torch.float32), rand(T, 16, dtype=torch.float32)
    yield "lora x A^T", "", T * D * item, 2 * T * D * 16, partial(lora_linear.shrink, x.detach(), A, 1.0), dict(torch=lambda: x.detach().float() @ A.t())
    yield "lora y + h B^T", "", 2 * T * D * item, 2 * T * D * 16, lambda: lora_linear.expand_(x.detach().clone(), h, A), dict(torch=lambda: (x.detach() + h @ A).to(TYPE))


def heads():
    """Rows of the last layer: log-probabilities with and without gradient, and the sampler behind it."""
    M, D, V = size((8192, 1536, 151_936), (3, 16, 70))
    h, w, y = rand(M, D, grad=True), (0.05 * rand(V, D)).requires_grad_(), torch.randint(0, V, (M,), device=DEV)
    score = lambda h, w, f=logprob.logprob: f(h, w, y)[0]
    peers = {}
    if importlib.util.find_spec("cut_cross_entropy") and not DRY:
        from cut_cross_entropy import linear_cross_entropy
        peers["cut_ce"] = lambda h, w: -linear_cross_entropy(h, w, y, reduction="none")
    if importlib.util.find_spec("liger_kernel") and not DRY:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as liger
        peers["liger (sum)"] = lambda h, w: liger.apply(h, w, y, None, None, -100, 0.0, 0.0, "sum")[0]
    for name, weight, goal, flops in (("frozen", w.detach(), "16 ms", 4 * M * D * V), ("trained", w, "22 ms", 6 * M * D * V)):
        yield f"logprob fwd+bwd, head {name}", goal, 0, flops, partial(both, score, h, weight), {"torch": lambda weight=weight: in_torch(partial(both, score, h, weight))} | {k: partial(both, f, h, weight) for k, f in peers.items()}
    with_no_grad = [h.detach(), w.detach(), y]
    yield "logprob, no gradient", "9.5 ms", 0, 2 * M * D * V, partial(linear_logprob.linear_logprob, *with_no_grad), dict(chunks=torch.no_grad()(partial(logprob.logprob, *with_no_grad)))
    n = size(256, 2)
    z, key = 3 * rand(n, V, dtype=torch.float32), sample.token_keys(0, 0, torch.arange(n), 0, 0).to(DEV)
    cut = dict(top_k=50, top_p=0.95)
    yield "sample", "0.06 ms", 4 * n * V, 0, partial(sample.sample, z, key), dict(torch=lambda: sample.draw(z, key), multinomial=lambda: torch.multinomial(z.softmax(-1), 1))
    yield "sample, top-k and top-p", "", 4 * n * V, 0, partial(sample.sample, z, key, **cut), dict(torch=lambda: sample.draw(logprob.truncate_(z.clone(), **cut), key))


def attentions():
    """Rows of attention at 0.5B's and 7B's heads: training with a shared prompt, beside torch's in buckets; a decoding step from the cache."""
    P, C, G = size((150, 200, 16), (3, 4, 2))
    for H, K, E in size(((14, 2, 64), (28, 4, 128)), ((4, 2, 16),)):
        T, segments = P + G * C, [(0, P, 0, 0)] + [(P + g * C, C, 0, P) for g in range(G)]
        q, k, v = (rand(T, n, E, grad=True) for n in (H, K, K))
        tiles, buckets = flash_attention.Tiles(segments, H // K, E=E, dtype=TYPE, device=DEV), attention.Buckets(segments, H // K, dtype=TYPE, device=DEV)
        pairs = P * (P + 1) / 2 + G * (C * P + C * (C + 1) / 2)
        yield f"attention fwd+bwd, {H}/{K} x {E}", "", 0, 14 * pairs * H * E, partial(both, lambda q, k, v: flash_attention.flash_attention(q, k, v, tiles), q, k, v), dict(buckets=partial(both, lambda q, k, v: attention.attention(q, k, v, buckets), q, k, v))
        n, cached = size(256, 2), [rand(1, K, P, E), rand(1, K, P, E), rand(size(256, 2), K, C, E), rand(size(256, 2), K, C, E)]
        table = torch.tensor([[i, 1, C - 1, 0, P, i * K * C] for i in range(n)], device=DEV)
        whole = [torch.cat([cached[i].expand(n, -1, -1, -1), cached[2 + i]], 2) for i in (0, 1)]
        one = rand(n, H, E)
        yield f"attention decode, {H}/{K} x {E}", "", 2 * n * K * C * E * TYPE.itemsize, 0, partial(flash_attention.flash_decode, one, *cached, table), dict(sdpa=lambda: F.scaled_dot_product_attention(one.view(n, K, H // K, E), *whole).reshape(n, H, E))


def whole():
    """Rows of the program itself, on Qwen2.5-0.5B's shape with random weights: tokens a second of sampling, seconds of an update, no peers but torch's kernels."""
    net, s = models.create(size(QWEN, SMALL), seed=0, dtype=TYPE, device=DEV), size(QWEN, SMALL)
    weights = sum(p.numel() for p in net.parameters()) * TYPE.itemsize
    P, C = size((256, 256), (3, 4))
    for B in size((256, 1), (2,)):
        draw = lambda B=B: rollout.generate(net, [[7] * P] * B, group_size=1, max_new_tokens=C, stop_ids=[], slots=B)
        kv = 2 * s["num_hidden_layers"] * 2 * (s["hidden_size"] // s["num_attention_heads"]) * TYPE.itemsize
        yield f"decode 0.5B, B {B}, {C} tokens", size({256: "150k tokens/s", 1: "1.3k tokens/s"}, {2: ""})[B], C * (weights + B * (P + C / 2) * kv), 0, draw, dict(torch=partial(in_torch, draw))
    lora.apply(net, rank=16, alpha=32, targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    B, G, P, C = size((4, 16, 128, 384), (1, 2, 3, 4))
    prompts, groups = [list(range(1, P + 1))] * B, [[[5 + g] * C for g in range(G)] for _ in range(B)]
    layers = sum(p.numel() for n, p in net.named_parameters() if "base.weight" in n)
    update = lambda: net.completion_logprobs(prompts, groups)[0].mean().backward()
    yield f"update 0.5B LoRA, {B} x {G} x ({P} + {C})", "", 0, 4 * (layers * B * (P + G * C) + net.head.numel() * B * G * C), update, dict(torch=partial(in_torch, update))


FAMILIES = (elementwise, heads, attentions, whole)
