"""Exact KL(policy || reference) over the vocabulary at every token, without a (tokens, vocab) tensor.

    forward    z = h W^T / temperature,  p = softmax(z);  q likewise from the reference
               KL = sum_j p_j (log p_j - log q_j)
    backward   dKL/dz_j = p_j (log p_j - log q_j - KL)          the reference gets no gradient

The estimators k1, k2 and k3 of loss.py look at the sampled word alone; this looks at all of them, so it has
no variance. It needs the logits of both models: 4 M D V operations forward, 4 M D V to make them again in
the backward, and 2 M D V for each of the two gradients. Only a chunk of rows lives at a time: four fp32
tensors (m, V), where the whole logits of both would be 8 M V bytes. It loses to whole logits in time (they
are made twice) wherever those fit. Matmuls and passes are torch's on every device.

Under truncated sampling (top-k, top-p, min-p) both are renormalised over the set that the policy keeps:
outside it the policy has probability 0.

Dims: M rows, D width, V vocabulary, m rows of a chunk.
"""

import torch

from kernels.logprob import chunks, logits_fp32


def exact_kl_ref(hidden, weight, ref_hidden, ref_weight, *, temperature=1.0, kept=None):
    """The definition, by whole logits and autograd. kept: (M, V) bool or None; the rest as `exact_kl`."""
    z = hidden @ weight.t() / temperature
    ref_z = (ref_hidden @ ref_weight.t()).detach() / temperature
    if kept is not None:
        z = z.masked_fill(~kept, float("-inf"))
        ref_z = ref_z.masked_fill(~kept, float("-inf"))
    logp, logq = z.log_softmax(-1), ref_z.log_softmax(-1)
    difference = torch.where(logp.isinf(), 0.0, logp - logq)
    return (logp.exp() * difference).sum(-1)


def exact_kl(hidden, weight, ref_hidden, ref_weight, *, temperature=1.0, truncate=None):
    """KL (M,) in nats, fp32 (fp64 for fp64), differentiable in hidden (M, D) and weight (V, D).

    ref_hidden (M, D) and ref_weight (V, D) are the reference's, constants. truncate(z, rows): sets the words
    outside the kept set to -inf in the scaled logits z (m, V) of a slice of rows, in place, and returns z
    (kernels/logprob.py's truncate_ does it); None keeps all words.
    """
    shapes = f"{hidden.shape}, {ref_hidden.shape}, {weight.shape}, {ref_weight.shape}"
    assert hidden.shape == ref_hidden.shape and weight.shape == ref_weight.shape, shapes
    return _ExactKL.apply(hidden, weight, ref_hidden.detach(), ref_weight.detach(), temperature, truncate)


class _ExactKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, temperature, truncate):
        heads = hidden, weight, ref_hidden, ref_weight
        ctx.save_for_backward(*heads)
        ctx.temperature, ctx.truncate = temperature, truncate
        kl = []
        for rows in chunks(len(hidden), len(weight), hidden.device):
            _, _, kl_of_chunk = compare(rows, *heads, temperature, truncate)
            kl.append(kl_of_chunk)
        if not kl:
            return hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return torch.cat(kl)

    @staticmethod
    def backward(ctx, dkl):
        heads = ctx.saved_tensors
        hidden, weight, _, _ = heads
        dhidden = dweight = None
        if ctx.needs_input_grad[0]:
            dhidden = torch.empty_like(hidden)
        if ctx.needs_input_grad[1]:
            # Added up in fp32: a bf16 sum over thousands of rows would lose the small ones.
            dweight = torch.zeros(weight.shape, dtype=dkl.dtype, device=weight.device)
        for rows in chunks(len(hidden), len(weight), hidden.device):
            p, difference, kl = compare(rows, *heads, ctx.temperature, ctx.truncate)
            dz = p.mul_(difference.sub_(kl[:, None])).mul_(dkl[rows, None] / ctx.temperature)  # (m, V)
            if dhidden is not None:
                dhidden[rows] = dz.to(weight.dtype) @ weight
            if dweight is not None:
                dweight.addmm_(dz.t(), hidden[rows].to(dz.dtype))
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        return dhidden, dweight, None, None, None, None


def compare(rows, hidden, weight, ref_hidden, ref_weight, temperature, truncate):
    """Of a slice of rows: p (m, V), log p - log q (m, V) with 0 where p = 0, and their KL (m,)."""
    z = logits_fp32(hidden[rows], weight).div_(temperature)
    ref_z = logits_fp32(ref_hidden[rows], ref_weight).div_(temperature)
    if truncate is not None:
        gone = truncate(z, rows).isinf()
        ref_z.masked_fill_(gone, float("-inf"))
    logp = z.sub_(z.logsumexp(-1, keepdim=True))
    logq = ref_z.sub_(ref_z.logsumexp(-1, keepdim=True))
    p = logp.exp()
    difference = logp.sub_(logq)
    if truncate is not None:
        difference.masked_fill_(gone, 0.0)  # -inf - -inf
    return p, difference, (p * difference).sum(-1)
