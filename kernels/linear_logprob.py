"""Final linear layer -> log-probability of the chosen tokens and entropy, with no logits and no gradient.

    z = h W^T / temperature      logp = z[y] - lse(z)      entropy = lse(z) - sum_j p_j z_j,   p = softmax(z)

This is what scoring needs. A program multiplies BM rows of hidden states with BN words at a time, and of
each such tile of logits keeps four running numbers a row: m = max z,  s = sum e^(z - m),  t = sum e^(z - m)
(z - m),  z[y]. Then lse = m + log s and entropy = log s - t / s.

2 M D V operations. Bytes: the weight about once (2 D V in bf16), and the hidden states once for each run of
words; logits would be 4 M V written and read again (8,192 rows of 151,936 words: 5 GB, twice). torch's matmul
reaches more operations a second than a tile loop in Triton does, so this wins by its memory first, and by its
time only where the logits' way to memory and back costs more than that: at D 1,536 and those sizes it takes
8.9 ms, 62 % of the floor, where kernels/logprob.py's chunks take 8.4 (bench/gpu.py, H100, commit 263d8c1).
With a gradient there is nothing to win: the backward needs probabilities, see kernels/logprob.py.

bf16, fp16 or fp32 (products of fp32 are exact: no tf32); fp64 and a CPU take the definition, by whole logits.

Dims: M rows, D width, V vocabulary.
"""

import torch

from kernels.logprob import fold
from kernels.switch import on_triton, tl, triton


def linear_logprob_ref(hidden, weight, targets, *, temperature=1.0):
    """The definition, by whole logits, in the dtype given; arguments and results as `linear_logprob`."""
    logits = (hidden @ weight.t()) / temperature
    logp = logits.log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


@torch.no_grad()
def linear_logprob(hidden, weight, targets, *, temperature=1.0):
    """logp and entropy (M,) fp32, in nats, of targets (M,) int64; without gradient.

    hidden (M, D) and weight (V, D) in one dtype. The vocabulary is cut into as many runs as fill the GPU
    with programs. Each run leaves its four numbers a row in `part` (runs, 4, M), 16 bytes where the logits
    would be 4 V, and torch joins the runs.
    """
    (M, D), (V, D2) = hidden.shape, weight.shape
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
    assert D == D2 and targets.shape == (M,), shapes
    if not on_triton(hidden):
        return linear_logprob_ref(hidden, weight, targets, temperature=temperature)
    size = tile_size(M, hidden.dtype)
    row_blocks, tiles = triton.cdiv(M, size["BM"]), triton.cdiv(V, size["BN"])
    # 132 processors take four programs each before they queue
    runs = max(1, min(tiles, 528 // max(row_blocks, 1)))
    part = torch.empty(runs, 4, M, device=hidden.device)
    if M:
        tensors = hidden.contiguous(), weight.contiguous(), targets, part
        tiles_a_run = triton.cdiv(tiles, runs)
        _linear_kernel[(row_blocks, runs)](*tensors, M, V, D, 1.0 / temperature, tiles_a_run, **size)
    m, s, t, z_y = part.unbind(1)  # each (runs, M)
    top = m.amax(0)
    share = (m - top).exp()  # a run that saw only -inf has s = 0
    total = (s * share).sum(0)
    shifted = ((t + s * (m - top).clamp(min=-1000.0)) * share).sum(0)
    logp = z_y.sum(0) - top - total.log()
    entropy = total.log() - shifted / total
    return logp, entropy


def tile_size(M: int, dtype) -> dict:
    """Rows, words and width of a tile, and how the compiler is to run it."""
    if dtype == torch.float32:  # no tensor cores: exactness is what fp32 is for
        return dict(BM=32, BN=64, BK=16, num_warps=4, num_stages=3)
    if M > 64:
        return dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3)
    return dict(BM=64, BN=128, BK=64, num_warps=4, num_stages=3)


@triton.jit
def _linear_kernel(
    hidden, weight, targets, part, M, V, D, scale, tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (i, run): BM rows against `tiles` tiles of BN words.

    Neighbours share the words, so the weight is read from memory about once.
    """
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    run = tl.program_id(1)
    k = tl.arange(0, BK)
    real = i < M
    y = tl.load(targets + i, mask=real, other=-1)
    h_rows = hidden + i.to(tl.int64)[:, None] * D
    m = tl.full((BM,), -3.4028234e38, tl.float32)
    s = tl.zeros((BM,), tl.float32)
    t = tl.zeros((BM,), tl.float32)
    z_y = tl.zeros((BM,), tl.float32)
    for tile in range(run * tiles, (run + 1) * tiles):
        j = tile * BN + tl.arange(0, BN)
        w_rows = weight + j.to(tl.int64)[None, :] * D
        x = tl.zeros((BM, BN), tl.float32)
        for start in range(0, D, BK):
            inside = start + k < D
            h_real = real[:, None] & inside[None, :]
            a = tl.load(h_rows + start + k[None, :], mask=h_real, other=0.0)
            w_real = (j < V)[None, :] & inside[:, None]
            b = tl.load(w_rows + start + k[:, None], mask=w_real, other=0.0)
            x = tl.dot(a, b, x, input_precision="ieee")
        x = tl.where(j[None, :] < V, x * scale, float("-inf"))
        z_y += tl.sum(tl.where(j[None, :] == y[:, None], x, 0.0), 1)
        m_new = tl.maximum(m, tl.max(x, 1))
        e = tl.exp(x - m_new[:, None])
        ex = tl.where(e > 0, e * (x - m_new[:, None]), 0.0)  # 0 * -inf would be NaN
        m, s, t = fold(m, s, t, tl.sum(e, 1), tl.sum(ex, 1), m_new)
    out = part + run.to(tl.int64) * 4 * M + i
    tl.store(out, m, mask=real)
    tl.store(out + M, s, mask=real)
    tl.store(out + 2 * M, t, mask=real)
    tl.store(out + 3 * M, z_y, mask=real)
