"""Final linear layer -> log-probability of the chosen tokens and entropy, without a (tokens, vocab) tensor.

    z = h W^T / temperature      logp = z[y] - lse(z)      entropy = lse(z) - sum_j p_j z_j,   p = softmax(z)
    dlogp/dz = onehot(y) - p     dentropy/dz_j = -p_j (log p_j + entropy)

At 8,192 tokens and 151,936 words the logits alone are 5 GB in fp32, and log_softmax with autograd keeps three of them.
Here a chunk of rows lives at a time, and its logits become its probabilities where they stand. What the backward needs depends on who learns:

    hidden states only (LoRA: the head is frozen)  dlogp/dh = (W[y] - p W) / temperature is one vector a row. The forward makes
                                                   it while p is there, the backward multiplies it by dlogp: 4 M D V operations
    the head too, or the entropy has a gradient    the backward makes the chunk's logits again: 8 M D V (6 without dW); where the objective is a
                                                   sum over tokens, kernels/policy_head.py does without: 6 (4)
    nobody (scoring)                               on a GPU kernels/linear_logprob.py, which makes no logits at all: 2 M D V

Truncated sampling (top-k, top-p, min-p) is scored on the set it kept: words outside have probability 0 and no
gradient. Scoring such samples over the whole vocabulary instead biases every ratio by the kept mass.

On a GPU the matmuls stay torch's, and _row_kernel does the rest of a chunk in one launch: it reads the fp32 logits once for lse, logp and
entropy and once more to write their gradient, 8 M V bytes read and 2 M V (bf16) or 4 M V written, where the torch form makes ten passes.
It cannot win where truncation is on (sorting costs more) or the chunk is a few rows (a launch is a launch).

Dims: M rows, D width, V vocabulary, m rows of a chunk.
"""
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it and do not need it
    from types import SimpleNamespace
    triton, tl = SimpleNamespace(jit=lambda f: f), SimpleNamespace(constexpr=None)

MODE = "auto"  # set by kernels.use(): "auto" Triton on CUDA tensors, "triton" always, "torch" never
CHUNK_BYTES = 1 << 26  # fp32 logits alive at once; 64 MiB is 341 rows of 49,152 words: fewer rows made the matmul slower (16 MiB: 1.2x)
BLOCK = 8  # rows whose passes follow each other on a CPU: 1.6 MB of 49,152 words
GPU_CHUNKS = 8  # times as much on a GPU: 512 MiB is 883 rows of 151,936 words, enough to fill its matmuls


def logprob_ref(hidden, weight, targets, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The definition, by whole logits and autograd, in the dtype given; arguments and results as `logprob`."""
    logits = (hidden @ weight.t()) / temperature
    kept = truncate_(logits.detach().clone(), top_k=top_k, top_p=top_p, min_p=min_p, keep=targets) > float("-inf")
    logits = logits.masked_fill(~kept, float("-inf"))
    logp = logits.log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def logprob(hidden, weight, targets, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Log-probability (nats) of each target under its row of hidden states, and the row's entropy (nats).

    hidden (M, D) and weight (V, D) in any float dtype, targets (M,) int64 -> logp (M,), entropy (M,), both fp32 and both
    differentiable in hidden and weight. Logits are fp32 whatever the dtype.
    """
    (M, D), (V, D2) = hidden.shape, weight.shape
    assert D == D2 and targets.shape == (M,), f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
    # asked here, because inside an autograd.Function gradients are always off
    frozen_head = torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad
    return _LogProb.apply(hidden, weight, targets, temperature, (top_k, top_p, min_p), frozen_head)


def logits_fp32(hidden, weight, out=None):
    """hidden (M, D) @ weight (V, D)^T with fp32 results: rounding logits to bf16 is the largest sampler/trainer mismatch there is."""
    if hidden.is_cuda and hidden.dtype.itemsize < 4:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    wide = torch.promote_types(hidden.dtype, torch.float32)  # torch.mm(out_dtype=) has no CPU kernel
    return torch.mm(hidden.to(wide), weight.to(wide).t(), out=out)


def truncate_(logits, *, top_k=0, top_p=1.0, min_p=0.0, keep=None):
    """Sets logits (M, V) outside the kept set to -inf, in place, and returns them. top_k, then top_p of what is left, then min_p.

    The order and the ties are transformers': top-p keeps the smallest set of most likely words whose mass reaches top_p, min-p
    those at least min_p times as likely as the first. keep (M,): words that stay whatever happens: a word that was sampled
    was in the sampler's set, and rounding must not put it outside the trainer's.
    """
    M, V = logits.shape
    kept = logits.gather(1, keep[:, None]) if keep is not None else None
    if 0 < top_k < V:
        kth = logits.topk(top_k, -1).values[:, -1:]
        logits.masked_fill_(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(-1)  # least likely first, so that the sum of the tail is accurate
        tail = ordered.softmax(-1).cumsum(-1) <= 1.0 - top_p
        tail[:, -1] = False
        logits.masked_fill_(torch.zeros_like(tail).scatter_(1, order, tail), float("-inf"))
    if min_p > 0.0:
        p = logits.softmax(-1)
        logits.masked_fill_(p < min_p * p.amax(-1, keepdim=True), float("-inf"))
    return logits if kept is None else logits.scatter_(1, keep[:, None], kept)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, truncation, frozen_head):
        M, V = len(hidden), len(weight)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp, lse, entropy = (torch.empty(M, dtype=dtype, device=hidden.device) for _ in range(3))
        slope = torch.empty_like(hidden) if frozen_head else None  # dlogp/dh, (M, D)
        cut, triton_runs = chunks(M, V, hidden.device), on_triton(hidden)
        room = None if triton_runs else torch.empty(cut[0].stop if cut else 0, V, dtype=dtype, device=hidden.device)
        for rows in cut:
            if triton_runs:
                z, scale = raw_logits(hidden[rows], weight, targets[rows], temperature, truncation)
                # dlogp of 1 makes the slope; in place where the dtypes are one, else in half the room beside it
                dz = (z if z.dtype == weight.dtype else torch.empty_like(z, dtype=weight.dtype)) if frozen_head else None
                row_pass(z, dz, targets[rows], logp[rows], lse[rows], entropy[rows], torch.ones_like(logp[rows]), None, scale, temperature, stats=True)
                if frozen_head:
                    torch.mm(dz, weight, out=slope[rows])
                continue
            z = scaled_logits(hidden[rows], weight, targets[rows], temperature, truncation, room)  # (m, V)
            total, logp[rows], lse[rows], entropy[rows] = exponentials_(z, targets[rows])
            if frozen_head:
                z.scatter_add_(1, targets[rows, None], -total)  # total * (p - onehot)
                slope[rows] = (z.to(weight.dtype) @ weight).mul_(-1 / (total * temperature))
        ctx.save_for_backward(hidden, weight, targets, lse, entropy, slope)
        ctx.temperature, ctx.truncation = temperature, truncation
        ctx.set_materialize_grads(False)  # an unused entropy costs nothing in the backward
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, dentropy):
        hidden, weight, targets, lse, entropy, slope = ctx.saved_tensors
        if slope is not None and dlogp is not None and dentropy is None:
            return slope * dlogp[:, None].to(slope.dtype), None, None, None, None, None
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # bf16 sums over 10,000 tokens would lose the small ones, so the weight's gradient gathers in fp32
        dweight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device) if ctx.needs_input_grad[1] else None
        cut, triton_runs = chunks(len(hidden), len(weight), hidden.device), on_triton(hidden)
        room = None if triton_runs else torch.empty(cut[0].stop if cut else 0, len(weight), dtype=lse.dtype, device=hidden.device)
        for rows in cut:
            factors = (None if dlogp is None else dlogp[rows].contiguous(), None if dentropy is None else dentropy[rows].contiguous())
            if triton_runs:
                z, scale = raw_logits(hidden[rows], weight, targets[rows], ctx.temperature, ctx.truncation)
                dz = z if z.dtype == hidden.dtype else torch.empty_like(z, dtype=hidden.dtype)
                row_pass(z, dz, targets[rows], None, lse[rows], entropy[rows], *factors, scale, ctx.temperature, stats=False)
            else:
                z = scaled_logits(hidden[rows], weight, targets[rows], ctx.temperature, ctx.truncation, room)
                dz = logits_grad_(z, targets[rows], lse[rows], entropy[rows], *factors, ctx.temperature).to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dz, weight, out=dhidden[rows])
            if dweight is not None:
                add_outer_(dweight, dz, hidden[rows])
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None, None


def chunks(M: int, V: int, device=None) -> list[slice]:
    """Slices of rows whose fp32 logits fit CHUNK_BYTES (on a GPU, GPU_CHUNKS times as much), as even as possible."""
    fit = max(1, CHUNK_BYTES * (GPU_CHUNKS if device is not None and device.type == "cuda" else 1) // (4 * V))
    size = max(1, -(-M // max(1, -(-M // fit))))
    return [slice(i, min(i + size, M)) for i in range(0, M, size)]


def blocks(z) -> list[slice]:
    """Slices of BLOCK rows of z (m, V)."""
    return [slice(i, i + BLOCK) for i in range(0, len(z), BLOCK)]


def any_truncation(truncation) -> bool:
    return truncation[0] > 0 or truncation[1] < 1.0 or truncation[2] > 0.0  # top_k, top_p, min_p


def scaled_logits(hidden, weight, targets, temperature, truncation, room=None):
    """Logits over temperature, words outside the kept set at -inf. (m, D), (V, D), (m,) -> (m, V) fp32, in room where it is given: fresh memory costs a tenth of the matmul."""
    z = logits_fp32(hidden, weight, None if room is None else room[: len(hidden)])
    if temperature != 1.0:
        z.div_(temperature)
    top_k, top_p, min_p = truncation
    return truncate_(z, top_k=top_k, top_p=top_p, min_p=min_p, keep=targets) if any_truncation(truncation) else z


def exponentials_(z, targets):
    """Scaled logits z (m, V) become e^(z - max), not yet divided by their sum. Returns that sum (m, 1), and logp, lse, entropy (m,) of the softmax."""
    top, (logit, total, dot) = z.amax(-1, keepdim=True), torch.empty(3, len(z), 1, dtype=z.dtype, device=z.device)
    scratch = torch.empty_like(z[:BLOCK])
    for some in blocks(z):  # a few rows stay in the cache from one pass over them to the next
        e, y = z[some], targets[some, None]
        x = torch.sub(e, top[some], out=scratch[: len(e)])
        torch.gather(x, 1, y, out=logit[some])
        torch.exp(x, out=e)
        torch.sum(e, -1, keepdim=True, out=total[some])
        # a word outside the kept set has e = 0 and x = -inf, whose product is nan; 0 * -1e30 is the 0 it should be
        torch.sum(x.clamp_(min=-1e30).mul_(e), -1, keepdim=True, out=dot[some])
    log_total = total.log()
    return total, (logit - log_total)[:, 0], (top + log_total)[:, 0], (log_total - dot / total)[:, 0]


def add_outer_(dweight, dz, hidden):
    """dweight (V, D) += dz (m, V)^T hidden (m, D), added up in dweight's dtype."""
    if dz.is_cuda and dz.dtype != dweight.dtype:  # tensor cores take bf16 factors and add up in fp32
        torch.addmm(dweight, dz.t(), hidden, out_dtype=dweight.dtype, out=dweight)
    else:
        dweight.addmm_(dz.t().to(dweight.dtype), hidden.to(dweight.dtype))


def logits_grad_(z, targets, lse, entropy, dlogp, dentropy, temperature):
    """Gradient of the loss by the unscaled logits, from the scaled logits z (m, V), overwritten. dlogp, dentropy (m,) or None."""
    dlogp = torch.zeros_like(lse) if dlogp is None else dlogp / temperature
    for some in blocks(z):  # dloss/dz_j = onehot * dlogp - p_j * (dlogp + dentropy * (log p_j + entropy))
        logq, factor = z[some].sub_(lse[some, None]), dlogp[some, None]
        if dentropy is not None:
            factor = (logq.clamp(min=-1e30) + entropy[some, None]).mul_(dentropy[some, None] / temperature).add_(factor)
        logq.exp_().mul_(factor).neg_()
    return z.scatter_add_(1, targets[:, None], dlogp[:, None])


# ------------------------------------------------------------------------------------------------------------ on a GPU
def on_triton(x) -> bool:
    return (MODE == "triton" or MODE == "auto" and x.is_cuda) and x.dtype != torch.float64


def raw_logits(hidden, weight, targets, temperature, truncation):
    """Logits (m, V) fp32 and the number they must still be multiplied by: the row kernel divides by the temperature on its way."""
    if any_truncation(truncation):
        return scaled_logits(hidden, weight, targets, temperature, truncation), 1.0
    return logits_fp32(hidden, weight), 1.0 / temperature


def row_pass(z, dz, targets, logp, lse, entropy, dlogp, dentropy, scale, temperature, *, stats):
    """One launch over the rows of z (m, V): with `stats` fills logp, lse, entropy (m,); with dz (m, V; may be z) writes dloss/dlogits."""
    if len(z):
        _row_kernel[(len(z),)](z, dz, targets, logp, lse, entropy, dlogp, dentropy, z.shape[1], scale, 1.0 / temperature, STATS=stats, GRAD=dz is not None,
                               BLOCK=min(4096, triton.next_power_of_2(z.shape[1])), num_warps=8)


@triton.jit
def _fold(m, s, t, e_sum, ez_sum, m_new):
    """Joins (m, s, t) = (max, sum of e^(x - m), sum of e^(x - m) (x - m)) of what was seen with the sums of a tile taken about m_new."""
    a = tl.exp(m - m_new)
    # a is 0 long before the bound is reached, and 0 * -inf, where m was still the least float there is, would be NaN
    return m_new, s * a + e_sum, a * (t + s * tl.maximum(m - m_new, -1000.0)) + ez_sum


@triton.jit
def _row_kernel(z, dz, targets, logp, lse, entropy, dlogp, dentropy, V, scale, grad_scale, STATS: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """A program a row. lse and entropy are results with STATS, arguments without. Offsets are 64 bits wide: m V passes 2^31 at 14,134 rows."""
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
            m, s, t = _fold(m, s, t, tl.sum(e, 0), tl.sum(tl.where(e > 0, e * (x - m_new), 0.0), 0), m_new)
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
