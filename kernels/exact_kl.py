"""Exact KL(policy || reference) over the vocabulary at every token, from the hidden states of both, without a (tokens, vocab) tensor.

    z = h W^T / temperature,  p = softmax(z);  q likewise from the reference         KL = sum_j p_j (log p_j - log q_j)
    dKL/dz_j = p_j (log p_j - log q_j - KL)                                          nothing flows into the reference

The estimators k1, k2, k3 of loss.py look at the sampled word alone; this looks at all of them, so it has no variance. It costs the logits of both
models: 4 M D V operations forward, 4 M D V to make them again in the backward, and 2 M D V a gradient. A chunk of rows lives at a time.

Under truncated sampling (top-k, top-p, min-p) both are renormalised over the set that the policy keeps: outside it the policy never speaks.

Dims: M rows, D width, V vocabulary.
"""
import torch

from kernels.logprob import chunks, logits_fp32


def exact_kl_ref(hidden, weight, ref_hidden, ref_weight, *, temperature=1.0, kept=None):
    """The definition, by whole logits and autograd: kept (M, V) bool or None. Arguments and result as `exact_kl`."""
    z, ref_z = hidden @ weight.t() / temperature, (ref_hidden @ ref_weight.t()).detach() / temperature
    if kept is not None:
        z, ref_z = z.masked_fill(~kept, float("-inf")), ref_z.masked_fill(~kept, float("-inf"))
    logp, logq = z.log_softmax(-1), ref_z.log_softmax(-1)
    return (logp.exp() * torch.where(logp.isinf(), 0.0, logp - logq)).sum(-1)


def exact_kl(hidden, weight, ref_hidden, ref_weight, *, temperature=1.0, truncate=None):
    """KL (M,) in nats, fp32 (fp64 for fp64), differentiable in hidden (M, D) and weight (V, D).

    ref_hidden (M, D), ref_weight (V, D): the reference's, constants. truncate: a function that sets the words outside the kept set to -inf in
    scaled logits (m, V) of a slice of rows, in place (kernels/logprob.py's truncate_); None keeps all.
    """
    assert hidden.shape == ref_hidden.shape and weight.shape == ref_weight.shape, f"{hidden.shape}, {ref_hidden.shape}, {weight.shape}, {ref_weight.shape}"
    return _ExactKL.apply(hidden, weight, ref_hidden.detach(), ref_weight.detach(), temperature, truncate)


class _ExactKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, temperature, truncate):
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight)
        ctx.temperature, ctx.truncate = temperature, truncate
        kl = [pieces(rows, hidden, weight, ref_hidden, ref_weight, temperature, truncate)[2] for rows in chunks(len(hidden), len(weight), hidden.device)]
        return torch.cat(kl) if kl else hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx, dkl):
        hidden, weight, ref_hidden, ref_weight = ctx.saved_tensors
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros(weight.shape, dtype=dkl.dtype, device=weight.device) if ctx.needs_input_grad[1] else None
        for rows in chunks(len(hidden), len(weight), hidden.device):
            p, difference, kl = pieces(rows, hidden, weight, ref_hidden, ref_weight, ctx.temperature, ctx.truncate)
            dz = p.mul_(difference.sub_(kl[:, None])).mul_(dkl[rows, None] / ctx.temperature)  # (m, V)
            if dhidden is not None:
                dhidden[rows] = dz.to(weight.dtype) @ weight
            if dweight is not None:
                dweight.addmm_(dz.t(), hidden[rows].to(dz.dtype))
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None, None


def pieces(rows, hidden, weight, ref_hidden, ref_weight, temperature, truncate):
    """p (m, V), log p - log q (m, V) with 0 where p = 0, and their KL (m,), for a slice of rows."""
    z, ref_z = (logits_fp32(h[rows], w).div_(temperature) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    if truncate is not None:
        gone = truncate(z, rows).isinf()
        ref_z.masked_fill_(gone, float("-inf"))
    z, ref_z = (x.sub_(x.logsumexp(-1, keepdim=True)) for x in (z, ref_z))
    p = z.exp()
    difference = z.sub_(ref_z)
    if truncate is not None:
        difference.masked_fill_(gone, 0.0)  # -inf - -inf
    return p, difference, (p * difference).sum(-1)
