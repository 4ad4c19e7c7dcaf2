"""Final linear layer -> log-probability of the chosen tokens and entropy, without gradient and without logits: what scoring needs.

    z = h W^T / temperature      logp = z[y] - lse(z)      entropy = lse(z) - sum_j p_j z_j,   p = softmax(z)

A program multiplies BM rows of hidden states with BN words at a time, and of each such tile of logits keeps four running numbers a row:
m = max z,  s = sum e^(z - m),  t = sum e^(z - m) (z - m),  z[y]. Then lse = m + log s and entropy = log s - t / s.

2 M D V operations, and of bytes the weight about once (2 D V) and the hidden states once a run of words; logits would be 4 M V written and
read again (8,192 rows of 151,936 words: 5 GB, twice). torch's matmul reaches more operations a second than a tile loop in Triton does, so
this wins by its memory first and by its time only where the logits' way to memory and back costs more than that. With a
gradient there is nothing to win: the backward needs probabilities, see kernels/logprob.py.

Dims: M rows, D width, V vocabulary.
"""
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it and do not need it
    from types import SimpleNamespace
    triton, tl = SimpleNamespace(jit=lambda f: f), SimpleNamespace(constexpr=None)

MODE = "auto"  # set by kernels.use(): "auto" Triton on CUDA tensors, "triton" always, "torch" never


def on_triton(x) -> bool:
    return (MODE == "triton" or MODE == "auto" and x.is_cuda) and x.dtype != torch.float64


def linear_logprob_ref(hidden, weight, targets, *, temperature=1.0):
    """The definition, by whole logits, in the dtype given; arguments and results as `linear_logprob`."""
    logp = ((hidden @ weight.t()) / temperature).log_softmax(-1)
    p = logp.exp()
    return logp.gather(1, targets[:, None])[:, 0], -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)


@torch.no_grad()
def linear_logprob(hidden, weight, targets, *, temperature=1.0):
    """hidden (M, D) and weight (V, D) in one dtype, targets (M,) int64 -> logp (nats) and entropy (nats), (M,) fp32, without gradient.

    The vocabulary is cut into as many runs as fill the GPU with programs; each leaves max, sum, sum of e x and the target's logit per row
    in `part` (runs, 4, M), 16 bytes where the logits would be 4 V, and torch joins the runs.
    """
    (M, D), (V, D2) = hidden.shape, weight.shape
    assert D == D2 and targets.shape == (M,), f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
    if not on_triton(hidden):
        return linear_logprob_ref(hidden, weight, targets, temperature=temperature)
    BM, BN, BK = (128, 128, 64) if M > 64 else (64, 128, 64)
    if hidden.dtype == torch.float32:
        BM, BN, BK = 32, 64, 16  # no tensor cores: exactness is what fp32 is for
    tiles, blocks = triton.cdiv(V, BN), triton.cdiv(M, BM)
    runs = max(1, min(tiles, 528 // max(blocks, 1)))  # 132 processors, four programs each, before they queue
    part = torch.empty(runs, 4, M, device=hidden.device)
    if M:
        _linear_kernel[(blocks, runs)](hidden.contiguous(), weight.contiguous(), targets, part, M, V, D, 1.0 / temperature, triton.cdiv(tiles, runs),
                                       BM=BM, BN=BN, BK=BK, num_warps=8 if BM == 128 else 4, num_stages=3)
    m, s, t, z_y = part.unbind(1)
    top = m.amax(0)
    weight_of = (m - top).exp()  # a run that saw only -inf has s = 0
    total, shifted = (s * weight_of).sum(0), ((t + s * (m - top).clamp(min=-1000.0)) * weight_of).sum(0)
    return z_y.sum(0) - top - total.log(), total.log() - shifted / total


@triton.jit
def _fold(m, s, t, e_sum, ez_sum, m_new):
    """Joins (m, s, t) = (max, sum of e^(x - m), sum of e^(x - m) (x - m)) of what was seen with the sums of a tile taken about m_new."""
    a = tl.exp(m - m_new)
    # a is 0 long before the bound is reached, and 0 * -inf, where m was still the least float there is, would be NaN
    return m_new, s * a + e_sum, a * (t + s * tl.maximum(m - m_new, -1000.0)) + ez_sum


@triton.jit
def _linear_kernel(hidden, weight, targets, part, M, V, D, scale, tiles, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Program (i, run): BM rows against `tiles` tiles of BN words. Neighbours share the words, so the weight is read from memory about once."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    run = tl.program_id(1)
    real = i < M
    y = tl.load(targets + i, mask=real, other=-1)
    m, s, t, z_y = tl.full((BM,), -3.4028234e38, tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    k = tl.arange(0, BK)
    h_rows = hidden + i.to(tl.int64)[:, None] * D
    for tile in range(run * tiles, (run + 1) * tiles):
        j = tile * BN + tl.arange(0, BN)
        w_rows = weight + j.to(tl.int64)[None, :] * D
        x = tl.zeros((BM, BN), tl.float32)
        for start in range(0, D, BK):
            a = tl.load(h_rows + start + k[None, :], mask=real[:, None] & (start + k < D)[None, :], other=0.0)
            b = tl.load(w_rows + start + k[:, None], mask=(j < V)[None, :] & (start + k < D)[:, None], other=0.0)
            x = tl.dot(a, b, x, input_precision="ieee")
        x = tl.where(j[None, :] < V, x * scale, float("-inf"))
        z_y += tl.sum(tl.where(j[None, :] == y[:, None], x, 0.0), 1)
        m_new = tl.maximum(m, tl.max(x, 1))
        e = tl.exp(x - m_new[:, None])
        m, s, t = _fold(m, s, t, tl.sum(e, 1), tl.sum(tl.where(e > 0, e * (x - m_new[:, None]), 0.0), 1), m_new)
    out = part + run.to(tl.int64) * 4 * M + i
    tl.store(out, m, mask=real)
    tl.store(out + M, s, mask=real)
    tl.store(out + 2 * M, t, mask=real)
    tl.store(out + 3 * M, z_y, mask=real)
