"""Final linear layer -> log-probability of the chosen tokens and entropy, without a (tokens, vocab) tensor.

    forward    z = h W^T / temperature,  p = softmax(z)
               logp = z[y] - lse(z)                 entropy = lse(z) - sum_j p_j z_j
    backward   dlogp/dz = onehot(y) - p             dentropy/dz_j = -p_j (log p_j + entropy)
               dh = dz W / temperature              dW = dz^T h / temperature

At 8,192 tokens and 151,936 words the logits alone are 5 GB in fp32, and log_softmax with autograd keeps
three of them. Here only a chunk of rows lives at a time, and its logits become its probabilities in place.
Who learns decides what the backward needs:

    hidden states only        dlogp/dh = (W[y] - p W) / temperature is one vector a row. The forward makes it
    (LoRA: head frozen)       while p is there, the backward multiplies it by dlogp: 4 M D V operations.
    the head too, or the      The backward makes the chunk's logits again: 8 M D V (6 without dW). Where the
    entropy has a gradient    objective is a sum over tokens, the fused head and loss do without: 6 (4).
    nobody (scoring)          On a GPU kernels/linear_logprob.py, which makes no logits at all: 2 M D V.

Truncated sampling (top-k, top-p, min-p) is scored on the set it kept: words outside have probability 0 and
no gradient. Scoring such samples over the whole vocabulary instead biases every ratio by the kept mass.

On a GPU the matmuls stay torch's, and _row_kernel does the rest of a chunk in one launch: it reads the fp32
logits once for lse, logp and entropy and once more to write their gradient, 8 M V bytes read and 2 M V
(bf16) or 4 M V written, where the torch form makes ten passes. Measured at D 1,536, V 151,936 and 8,192
tokens: head frozen 15.9 ms, 70 % of the floor and 5.6 times as fast as torch; head trained 32.6 ms, 51 %
(bench/gpu.py, H100, commit 263d8c1). It does not win where truncation is on (sorting costs more than all
the rest) or where the chunk is a few rows (a launch costs what it costs).

Any float dtype; logits and results are fp32 (fp64 for fp64, which takes the torch form).

Dims: M rows, D width, V vocabulary, m rows of a chunk.
"""

import torch

from kernels.switch import on_triton, tl, triton

# fp32 logits alive at once: 64 MiB is 341 rows of 49,152 words. Fewer make the matmul slower (16 MiB: 1.2x).
CHUNK_BYTES = 1 << 26
# times as much on a GPU: 1 GiB is 1,766 rows of 151,936 words. With half of it chunks wait for the host: a
# GRPO loss of 8,192 tokens, D 1,536, head frozen, took 27 ms instead of 15 (H200), and 15 again at 2 GiB.
GPU_CHUNKS = 16
# Logits whose passes follow each other on a CPU, so that they stay in its cache: 10 rows of 49,152 words, and
# all rows of 17 words: 8 at a time took 25 ms instead of 4 (5,000 rows, forward and backward).
BLOCK_BYTES = 1 << 21


def logprob_ref(hidden, weight, targets, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The definition, by whole logits and autograd, in the dtype given; arguments and results as there."""
    logits = (hidden @ weight.t()) / temperature
    truncated = truncate_(logits.detach().clone(), top_k=top_k, top_p=top_p, min_p=min_p, keep=targets)
    kept = truncated > float("-inf")
    logits = logits.masked_fill(~kept, float("-inf"))
    logp = logits.log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def logprob(hidden, weight, targets, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Log-probability (nats) of each target under its row of hidden states, and the row's entropy (nats).

    hidden (M, D) and weight (V, D) in any float dtype, targets (M,) int64 -> logp and entropy (M,), fp32,
    both differentiable in hidden and weight. Logits are fp32 whatever the dtype.
    """
    M, D = hidden.shape
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
    assert D == weight.shape[1] and targets.shape == (M,), shapes
    # asked here, because inside an autograd.Function gradients are always off
    frozen_head = torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad
    return _LogProb.apply(hidden, weight, targets, temperature, (top_k, top_p, min_p), frozen_head)


# -------------------------------------------------------------------- logits, and which words count
def logits_fp32(hidden, weight, out=None):
    """hidden (M, D) @ weight (V, D)^T with fp32 results, in `out` (M, V) where it is given.

    Rounding logits to bf16 is the largest mismatch between sampler and trainer there is.
    """
    if hidden.is_cuda and hidden.dtype.itemsize < 4:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    wide = torch.promote_types(hidden.dtype, torch.float32)  # torch.mm(out_dtype=) has no CPU kernel
    return torch.mm(hidden.to(wide), weight.to(wide).t(), out=out)


def any_truncation(truncation) -> bool:
    """Whether (top_k, top_p, min_p) leave any word out."""
    top_k, top_p, min_p = truncation
    return top_k > 0 or top_p < 1.0 or min_p > 0.0


def truncate_(logits, *, top_k=0, top_p=1.0, min_p=0.0, keep=None):
    """Sets logits (M, V) outside the kept set to -inf, in place, and returns them.

    First top_k, then top_p of what is left, then min_p. The order and the ties are transformers': top-p keeps
    the smallest set of most likely words whose mass reaches top_p, min-p those at least min_p times as likely
    as the first. keep (M,): words that stay whatever happens. A word that was sampled was in the sampler's
    set, and rounding must not put it outside the trainer's.
    """
    V = logits.shape[1]
    if keep is not None:
        kept = logits.gather(1, keep[:, None])
    if 0 < top_k < V:
        kth = logits.topk(top_k, -1).values[:, -1:]
        logits.masked_fill_(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(-1)  # least likely first, so that the sum of the tail is accurate
        tail = ordered.softmax(-1).cumsum(-1) <= 1.0 - top_p
        tail[:, -1] = False
        outside = torch.zeros_like(tail).scatter_(1, order, tail)
        logits.masked_fill_(outside, float("-inf"))
    if min_p > 0.0:
        p = logits.softmax(-1)
        logits.masked_fill_(p < min_p * p.amax(-1, keepdim=True), float("-inf"))
    if keep is not None:
        logits.scatter_(1, keep[:, None], kept)
    return logits


def scaled_logits(hidden, weight, targets, temperature, truncation, room=None):
    """Logits over temperature, words outside the kept set at -inf. (m, D), (V, D), (m,) -> (m, V) fp32.

    They are made in the first rows of `room` where it is given: fresh memory costs a tenth of the matmul.
    """
    if room is not None:
        room = room[: len(hidden)]
    z = logits_fp32(hidden, weight, room)
    if temperature != 1.0:
        z.div_(temperature)
    if not any_truncation(truncation):
        return z
    top_k, top_p, min_p = truncation
    return truncate_(z, top_k=top_k, top_p=top_p, min_p=min_p, keep=targets)


# ----------------------------------------------------------------------------------- chunks of rows
def chunks(M: int, V: int, device=None) -> list[slice]:
    """Slices of rows, as even as possible, whose fp32 logits fit CHUNK_BYTES (times GPU_CHUNKS on a GPU)."""
    room = CHUNK_BYTES
    if device is not None and device.type == "cuda":
        room *= GPU_CHUNKS
    fit = max(1, room // (4 * V))
    number = max(1, -(-M // fit))
    size = max(1, -(-M // number))
    return [slice(i, min(i + size, M)) for i in range(0, M, size)]


def room_for_logits(cut, weight, dtype):
    """Scratch buffer for the logits of the largest chunk of `cut`: (m, V)."""
    m = cut[0].stop if cut else 0
    return torch.empty(m, len(weight), dtype=dtype, device=weight.device)


def room_for_grad(z, dtype):
    """Where a chunk's gradient goes: over its logits z (m, V) if they have its dtype, else beside them."""
    return z if z.dtype == dtype else torch.empty_like(z, dtype=dtype)


def blocks(z) -> list[slice]:
    """Slices of z (m, V), as many rows in each as BLOCK_BYTES hold."""
    rows = max(1, BLOCK_BYTES // (z.shape[1] * z.element_size()))
    return [slice(i, i + rows) for i in range(0, max(1, len(z)), rows)]


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, truncation, frozen_head):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        lse, entropy = torch.empty_like(logp), torch.empty_like(logp)
        slope = torch.empty_like(hidden) if frozen_head else None  # dlogp/dh, (M, D)
        cut = chunks(len(hidden), len(weight), hidden.device)
        fused = on_triton(hidden)
        room = None if fused else room_for_logits(cut, weight, dtype)
        for rows in cut:
            h, y = hidden[rows], targets[rows]
            if fused:
                z, scale = raw_logits(h, weight, y, temperature, truncation)
                dz = room_for_grad(z, weight.dtype) if frozen_head else None
                out = logp[rows], lse[rows], entropy[rows]
                one = torch.ones_like(logp[rows])  # dlogp of 1 makes the slope
                row_pass(z, dz, y, *out, one, None, scale, temperature, stats=True)
                if frozen_head:
                    torch.mm(dz, weight, out=slope[rows])
            else:
                z = scaled_logits(h, weight, y, temperature, truncation, room)  # (m, V)
                total, logp[rows], lse[rows], entropy[rows] = exponentials_(z, y)
                if frozen_head:
                    z.scatter_add_(1, y[:, None], -total)  # total * (p - onehot)
                    slope[rows] = (z.to(weight.dtype) @ weight).mul_(-1 / (total * temperature))
        ctx.save_for_backward(hidden, weight, targets, lse, entropy, slope)
        ctx.temperature, ctx.truncation = temperature, truncation
        ctx.set_materialize_grads(False)  # an unused entropy costs nothing in the backward
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, dentropy):
        hidden, weight, targets, lse, entropy, slope = ctx.saved_tensors
        temperature, truncation = ctx.temperature, ctx.truncation
        if slope is not None and dlogp is not None and dentropy is None:
            return slope * dlogp[:, None].to(slope.dtype), None, None, None, None, None
        dhidden = dweight = None
        if ctx.needs_input_grad[0]:
            dhidden = torch.empty_like(hidden)
        if ctx.needs_input_grad[1]:  # bf16 sums over 10,000 tokens would lose the small ones: fp32
            dweight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        cut = chunks(len(hidden), len(weight), hidden.device)
        fused = on_triton(hidden)
        room = None if fused else room_for_logits(cut, weight, lse.dtype)
        for rows in cut:
            h, y = hidden[rows], targets[rows]
            given = lse[rows], entropy[rows], rows_of(dlogp, rows), rows_of(dentropy, rows)
            if fused:
                z, scale = raw_logits(h, weight, y, temperature, truncation)
                dz = room_for_grad(z, hidden.dtype)
                row_pass(z, dz, y, None, *given, scale, temperature, stats=False)
            else:
                z = scaled_logits(h, weight, y, temperature, truncation, room)
                dz = logits_grad_(z, y, *given, temperature).to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dz, weight, out=dhidden[rows])
            if dweight is not None:
                add_outer_(dweight, dz, h)
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        return dhidden, dweight, None, None, None, None


def rows_of(x, rows):
    """x[rows] as a kernel reads it, or None."""
    return None if x is None else x[rows].contiguous()


def add_outer_(dweight, dz, hidden):
    """dweight (V, D) += dz (m, V)^T hidden (m, D), added up in dweight's dtype."""
    if dz.is_cuda and dz.dtype != dweight.dtype:  # tensor cores take bf16 factors and add up in fp32
        torch.addmm(dweight, dz.t(), hidden, out_dtype=dweight.dtype, out=dweight)
    else:
        dweight.addmm_(dz.t().to(dweight.dtype), hidden.to(dweight.dtype))


# --------------------------------------------------------------------------------- a chunk in torch
def exponentials_(z, targets):
    """Scaled logits z (m, V) become e^(z - max), in place, not yet divided by their sum.

    Returns that sum (m, 1), and logp, lse and entropy (m,) of the softmax.
    """
    top = z.amax(-1, keepdim=True)  # (m, 1), and so are the next three
    logit, total, dot = torch.empty_like(top), torch.empty_like(top), torch.empty_like(top)
    cut = blocks(z)
    scratch = torch.empty_like(z[cut[0]])
    for some in cut:  # a few rows stay in the cache from one pass over them to the next
        e, y = z[some], targets[some, None]
        x = torch.sub(e, top[some], out=scratch[: len(e)])
        torch.gather(x, 1, y, out=logit[some])
        torch.exp(x, out=e)
        torch.sum(e, -1, keepdim=True, out=total[some])
        # A word outside the kept set has e = 0 and x = -inf, whose product is nan; 0 *
        # -1e30 is the 0 it should be.
        torch.sum(x.clamp_(min=-1e30).mul_(e), -1, keepdim=True, out=dot[some])
    log_total = total.log()
    logp, lse, entropy = logit - log_total, top + log_total, log_total - dot / total
    return total, logp[:, 0], lse[:, 0], entropy[:, 0]


def logits_grad_(z, targets, lse, entropy, dlogp, dentropy, temperature):
    """Gradient of the loss by the unscaled logits, in place of the scaled logits z (m, V).

    dlogp, dentropy: (m,) or None. dloss/dz_j = onehot dlogp - p_j (dlogp + dentropy (log p_j + entropy)).
    """
    dlogp = torch.zeros_like(lse) if dlogp is None else dlogp / temperature
    for some in blocks(z):
        logq = z[some].sub_(lse[some, None])
        factor = dlogp[some, None]
        if dentropy is not None:
            surprise = logq.clamp(min=-1e30) + entropy[some, None]
            factor = surprise.mul_(dentropy[some, None] / temperature).add_(factor)
        logq.exp_().mul_(factor).neg_()
    return z.scatter_add_(1, targets[:, None], dlogp[:, None])


# --------------------------------------------------------------------------------- a chunk on a GPU
def raw_logits(hidden, weight, targets, temperature, truncation):
    """Logits (m, V) fp32, and the number that they must still be multiplied by.

    The row kernel divides by the temperature on its way; truncation needs scaled logits before.
    """
    if any_truncation(truncation):
        return scaled_logits(hidden, weight, targets, temperature, truncation), 1.0
    return logits_fp32(hidden, weight), 1.0 / temperature


def row_pass(z, dz, targets, logp, lse, entropy, dlogp, dentropy, scale, temperature, *, stats):
    """One launch over the rows of z (m, V).

    With `stats` it fills logp, lse and entropy (m,); without, it reads lse and entropy. With dz (m, V), which
    may be z, it writes dloss/dlogits there. dlogp, dentropy: (m,) or None.
    """
    m, V = z.shape
    if m:
        rows = targets, logp, lse, entropy, dlogp, dentropy
        how = dict(STATS=stats, GRAD=dz is not None, BLOCK=min(4096, triton.next_power_of_2(V)))
        _row_kernel[(m,)](z, dz, *rows, V, scale, 1.0 / temperature, **how, num_warps=8)


@triton.jit
def fold(m, s, t, e_sum, ez_sum, m_new):
    """Joins what was seen, (m, s, t), with the sums of a tile taken about m_new, the maximum of both.

    m = max x, s = sum of e^(x - m), t = sum of e^(x - m) (x - m).
    """
    a = tl.exp(m - m_new)
    # a is 0 long before the bound is reached, but 0 * -inf would be NaN: m starts as the least float there is
    shift = tl.maximum(m - m_new, -1000.0)
    return m_new, s * a + e_sum, a * (t + s * shift) + ez_sum


@triton.jit
def _row_kernel(
    z, dz, targets, logp, lse, entropy, dlogp, dentropy, V, scale, grad_scale,
    STATS: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row. lse and entropy are results with STATS and arguments without.

    Offsets are 64 bits wide: m V passes 2^31 at 14,134 rows of 151,936 words.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * V
    y = tl.load(targets + row)
    j = tl.arange(0, BLOCK)
    if STATS:
        z_y = tl.load(z + y) * scale  # before anything is overwritten
        m, s, t = -3.4028234e38, 0.0, 0.0
        for start in range(0, V, BLOCK):
            x = tl.load(z + start + j, mask=start + j < V, other=float("-inf")) * scale
            m_new = tl.maximum(m, tl.max(x, 0))
            e = tl.exp(x - m_new)
            ex = tl.where(e > 0, e * (x - m_new), 0.0)  # 0 * -inf would be NaN
            m, s, t = fold(m, s, t, tl.sum(e, 0), tl.sum(ex, 0), m_new)
        total = m + tl.log(s)
        H = tl.log(s) - t / s
        tl.store(logp + row, (z_y - m) - tl.log(s))
        tl.store(lse + row, total)
        tl.store(entropy + row, H)
    else:
        total = tl.load(lse + row)
        H = tl.load(entropy + row)
    if GRAD:
        dz += row * V
        for start in range(0, V, BLOCK):
            x = tl.load(z + start + j, mask=start + j < V, other=float("-inf")) * scale
            p = tl.exp(x - total)
            g = tl.zeros_like(p)
            if dlogp is not None:
                d = tl.load(dlogp + row)
                g += tl.where(start + j == y, d, 0.0) - d * p
            if dentropy is not None:
                g -= tl.load(dentropy + row) * tl.where(p > 0, p * (x - total + H), 0.0)
            tl.store(dz + start + j, (g * grad_scale).to(dz.dtype.element_ty), mask=start + j < V)
