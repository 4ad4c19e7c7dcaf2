"""Exact KL of policy and reference over the vocabulary at every token, without a (tokens, vocab) tensor.

    forward    z = h W^T / temperature,  p = softmax(z);  q likewise from the reference
               reverse: KL(p || q) = sum_j p_j (log p_j - log q_j)
               forward: KL(q || p) = sum_j q_j (log q_j - log p_j)
    backward   reverse: dKL/dz_j = p_j (log p_j - log q_j - KL)          the reference gets no gradient
               forward: dKL/dz_j = p_j - q_j

The estimators k1, k2 and k3 of loss.py look at the sampled word alone; this looks at all of them, so it has
no variance. It needs the logits of both models: 4 M D V operations forward, 4 M D V to make them again in
the backward, and 2 M D V for each of the two gradients. With a frozen head (LoRA) dKL/dh is made in the
forward, while the logits are there: 6 M D V in all. Only a chunk of rows lives at a time: four fp32 tensors
(m, V), where the whole logits of both would be 8 M V bytes. It loses to whole logits in time (they are made
twice) wherever those fit and the head learns. Matmuls and passes are torch's on every device.

`top` > 0 compares coarser distributions: the reference's `top` likeliest words each by itself, and all other
words as one, whose probability is the sum of theirs. Nothing is renormalised. What is left is a true KL, 0
only where both agree on these words and on the rest's sum, and never above that over all words (merging
outcomes cannot raise a KL). Of the words in the rest each keeps its share: dKL/dz_j = (p_j / P) dKL/dz_rest,
with P the sum of theirs under the policy. Renormalised over the likeliest words instead, a KL does not see
how much probability lies outside, and the policy's may grow there (arXiv:2608.14728 adds the rest, too).

Under truncated sampling (top-k, top-p, min-p) both are renormalised over the set that the policy keeps:
outside it the policy has probability 0. `top` then takes the likeliest words of that set.

Papers: GKD 2306.13649 has both directions on what the student drew; MiniLLM 2306.08543.

Dims: M rows, D width of the policy (the reference may have another), V vocabulary, m rows of a chunk, K words
that are compared by themselves.
"""

import torch

from kernels.logprob import chunks, logits_fp32

DIRECTIONS = ("reverse", "forward")  # KL(policy || reference), KL(reference || policy)
# Stands for log 0. Unlike -inf it can be subtracted from itself and multiplied by a probability of 0.
NEVER = -1e30


def exact_kl_ref(
    hidden, weight, ref_hidden, ref_weight, direction="reverse", top=0, *, temperature=1.0, kept=None
):
    """The definition, by whole logits and autograd. kept: (M, V) bool or None; the rest as `exact_kl`."""
    z = hidden @ weight.t() / temperature
    ref_z = (ref_hidden @ ref_weight.t()).detach() / temperature
    if kept is not None:
        z = z.masked_fill(~kept, float("-inf"))
        ref_z = ref_z.masked_fill(~kept, float("-inf"))
    p, q = z.softmax(-1), ref_z.softmax(-1)
    if 0 < top < len(weight):
        words = q.topk(top, -1).indices
        rest = torch.ones_like(p).scatter(1, words, 0.0)  # 1 for the words that count as one
        p = torch.cat([p.gather(1, words), (p * rest).sum(-1, keepdim=True)], 1)
        q = torch.cat([q.gather(1, words), (q * rest).sum(-1, keepdim=True)], 1)
    if direction == "forward":
        p, q = q, p
    least = torch.finfo(p.dtype).tiny  # where both are 0 their logarithms are equal, and count nothing
    return (p * (p.clamp(min=least).log() - q.clamp(min=least).log())).sum(-1)


def exact_kl(
    hidden, weight, ref_hidden, ref_weight, direction="reverse", top=0, *, temperature=1.0, truncate=None
):
    """KL (M,) in nats, fp32 (fp64 for fp64), differentiable in hidden (M, D) and weight (V, D).

    ref_hidden (M, D') and ref_weight (V, D') are the reference's, constants. direction: one of DIRECTIONS.
    top: how many of the reference's likeliest words are compared by themselves, the others as one; 0: all
    words. truncate(z, rows): sets the words outside the kept set to -inf in the scaled logits z (m, V) of a
    slice of rows, in place, and returns z (kernels/logprob.py's truncate_ does it); None keeps all words.
    """
    shapes = f"{hidden.shape}, {ref_hidden.shape}, {weight.shape}, {ref_weight.shape}"
    assert len(hidden) == len(ref_hidden) and len(weight) == len(ref_weight), shapes
    assert direction in DIRECTIONS, f"direction {direction!r} is not one of {DIRECTIONS}"
    options = direction, top, temperature, truncate
    # asked here, because inside an autograd.Function gradients are always off
    frozen_head = torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad
    return _ExactKL.apply(hidden, weight, ref_hidden.detach(), ref_weight.detach(), options, frozen_head)


class _ExactKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, options, frozen_head):
        heads = hidden, weight, ref_hidden, ref_weight
        temperature = options[2]
        kl = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        slope = torch.empty_like(hidden) if frozen_head else None  # dKL/dh, (M, D)
        for rows in chunks(len(hidden), len(weight), hidden.device):
            kl[rows], dz = compare(rows, *heads, *options)
            if frozen_head:
                slope[rows] = dz.div_(temperature).to(weight.dtype) @ weight
        ctx.save_for_backward(*heads, slope)
        ctx.options = options
        return kl

    @staticmethod
    def backward(ctx, dkl):
        *heads, slope = ctx.saved_tensors
        if slope is not None:
            return slope * dkl[:, None].to(slope.dtype), None, None, None, None, None
        hidden, weight, _, _ = heads
        temperature = ctx.options[2]
        dhidden = dweight = None
        if ctx.needs_input_grad[0]:
            dhidden = torch.empty_like(hidden)
        if ctx.needs_input_grad[1]:
            # Added up in fp32: a bf16 sum over thousands of rows would lose the small ones.
            dweight = torch.zeros(weight.shape, dtype=dkl.dtype, device=weight.device)
        for rows in chunks(len(hidden), len(weight), hidden.device):
            _, dz = compare(rows, *heads, *ctx.options)
            dz.mul_(dkl[rows, None] / temperature)  # (m, V)
            if dhidden is not None:
                dhidden[rows] = dz.to(weight.dtype) @ weight
            if dweight is not None:
                dweight.addmm_(dz.t(), hidden[rows].to(dz.dtype))
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        return dhidden, dweight, None, None, None, None


def compare(rows, hidden, weight, ref_hidden, ref_weight, direction, top, temperature, truncate):
    """Of a slice of rows: their KL (m,), and its slope by the policy's scaled logits (m, V)."""
    z = logits_fp32(hidden[rows], weight).div_(temperature)
    ref_z = logits_fp32(ref_hidden[rows], ref_weight).div_(temperature)
    if truncate is not None:
        gone = truncate(z, rows).isinf()
        ref_z.masked_fill_(gone, float("-inf"))
    logp = z.sub_(z.logsumexp(-1, keepdim=True))
    logq = ref_z.sub_(ref_z.logsumexp(-1, keepdim=True))
    if truncate is not None:
        logp.clamp_(min=NEVER)
        logq.clamp_(min=NEVER)
    if 0 < top < len(weight):
        return compare_top_(logp, logq, direction, top)
    return compare_all_(logp, logq, direction)


def compare_all_(logp, logq, direction):
    """KL (m,) of log-probabilities logp and logq (m, V), and its slope by logits of logp (m, V).

    Both arguments are overwritten.
    """
    if direction == "forward":
        q = logq.exp()
        kl = (logq.sub_(logp) * q).sum(-1)
        return kl, logp.exp_().sub_(q)
    p = logp.exp()
    difference = logp.sub_(logq)
    kl = (p * difference).sum(-1)
    return kl, p.mul_(difference.sub_(kl[:, None]))


def compare_top_(logp, logq, direction, top):
    """As compare_all_, of the reference's `top` likeliest words and of all others as one."""
    words = logq.topk(top, -1).indices  # (m, K)
    logp_top, rest = apart_(logp, words)
    logq_top, _ = apart_(logq, words)
    total = logp_top[:, -1:].clone()  # (m, 1), of the rest under the policy
    kl, slope_top = compare_all_(logp_top, logq_top, direction)  # (m,), (m, K + 1)
    # A word of the rest moves the rest's sum by its share in it.
    slope = rest.sub_(total).exp_().mul_(slope_top[:, -1:])  # (m, V)
    return kl, slope.scatter_(1, words, slope_top[:, :-1])


def apart_(logp, words):
    """Log-probabilities (m, K + 1) of the words (m, K) and of all others together, and the others' (m, V).

    The last are logp, overwritten where the words stand. The rest is summed up by itself: as 1 minus the
    others it would be nothing but rounding where they are likely.
    """
    chosen = logp.gather(1, words)
    rest = logp.scatter_(1, words, float("-inf"))
    total = rest.logsumexp(-1, keepdim=True).clamp_(min=NEVER)
    return torch.cat([chosen, total], 1), rest
