"""The head and the objective in one pass: loss, and its gradient by hidden states and weight, from logits that are made once.

    z = h W^T / temperature    logp, entropy = softmax's at the target    loss = objective(logp, entropy)    dloss/dz -> dh, dW

kernels/logprob.py has to make a chunk's logits again in the backward when the head learns or the entropy has a gradient, because what each token's
log-probability is multiplied by comes only then: 8 M D V operations. But for an objective that is a sum over tokens that factor is known as soon as the
token's log-probability is. So here a chunk goes all the way while its logits are there: 6 M D V, 4 where the head is frozen, one exponential a word
instead of two. The factor is autograd's, of the very function that the caller would call on all tokens: the objective is defined in one place.

It cannot be used where a token's factor depends on other tokens of its row (sequence-level ratios). dh and dW wait for the backward: dW is then as
large as the weight's gradient, which the backward of the layers below would have beside it anyway.

Dims: M rows, D width, V vocabulary, m rows of a chunk.
"""
import torch

from kernels.logprob import add_outer_, blocks, chunks, exponentials_, logprob_ref, on_triton, raw_logits, row_pass, scaled_logits


def policy_head_ref(hidden, weight, targets, objective, **options):
    """The definition: all tokens at once, and autograd. Arguments and results as `policy_head`."""
    logp, entropy = logprob_ref(hidden, weight, targets, **options)
    loss, told = objective(logp, entropy, slice(0, len(targets)))
    return loss, logp.detach(), entropy.detach(), [told]


def policy_head(hidden, weight, targets, objective, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Loss of the tokens `targets` (M,) predicted from hidden (M, D) by weight (V, D), differentiable in hidden and weight.

    objective(logp (m,), entropy (m,), rows: slice) -> (loss 0-d, anything): the share of the rows `rows`; shares must add up to the whole
    loss. Gradients of logp and of entropy are both honoured. Returns (loss 0-d, logp (M,), entropy (M,) fp32 without gradient, what the
    objective returned beside each chunk's loss, in order).
    """
    (M, D), (V, D2) = hidden.shape, weight.shape
    assert D == D2 and targets.shape == (M,), f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
    told = []
    loss, logp, entropy = _PolicyHead.apply(hidden, weight, targets, objective, temperature, (top_k, top_p, min_p), told)
    return loss, logp, entropy, told


class _PolicyHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, objective, temperature, truncation, told):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp, lse, entropy = (torch.empty(len(hidden), dtype=dtype, device=hidden.device) for _ in range(3))
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # bf16 sums over 10,000 tokens would lose the small ones, so the weight's gradient gathers in fp32
        dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        cut, triton_runs = chunks(len(hidden), len(weight), hidden.device), on_triton(hidden)
        room = None if triton_runs else torch.empty(cut[0].stop if cut else 0, len(weight), dtype=dtype, device=hidden.device)
        for rows in cut:
            y = targets[rows]
            if triton_runs:
                z, scale = raw_logits(hidden[rows], weight, y, temperature, truncation)  # (m, V)
                row_pass(z, None, y, logp[rows], lse[rows], entropy[rows], None, None, scale, temperature, stats=True)
            else:
                z = scaled_logits(hidden[rows], weight, y, temperature, truncation, room)
                total, logp[rows], lse[rows], entropy[rows] = exponentials_(z, y)
            share, dlogp, dentropy = factors(objective, logp[rows], entropy[rows], rows, told)
            loss += share
            if dhidden is None and dweight is None:
                continue
            if triton_runs:
                dz = z if z.dtype == hidden.dtype else torch.empty_like(z, dtype=hidden.dtype)
                row_pass(z, dz, y, None, lse[rows], entropy[rows], dlogp.contiguous(), dentropy, scale, temperature, stats=False)
            else:
                dz = slopes_(z, total, y, entropy[rows], dlogp / temperature, None if dentropy is None else dentropy / temperature).to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dz, weight, out=dhidden[rows])
            if dweight is not None:
                add_outer_(dweight, dz, hidden[rows])
        # not saved for the backward but given away by it: autograd copies a gradient that somebody else still holds
        ctx.grads = dhidden, None if dweight is None else dweight.to(weight.dtype)
        ctx.mark_non_differentiable(logp, entropy)
        ctx.set_materialize_grads(False)
        return loss, logp, entropy

    @staticmethod
    def backward(ctx, dloss, *_):
        assert ctx.grads is not None, "the gradients of policy_head are made once: a second backward needs a second forward"
        grads, ctx.grads = ctx.grads, None
        if dloss.device.type != "cpu" or dloss != 1:  # a scaler of mixed precision multiplies the loss; looking would make a GPU wait
            grads = (None if x is None else x.mul_(dloss.to(x.dtype)) for x in grads)
        return *grads, None, None, None, None, None


def factors(objective, logp, entropy, rows, told):
    """The chunk's loss, and autograd's dloss/dlogp and dloss/dentropy (m,), the second None where the entropy has no part in it."""
    leaves = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
    with torch.enable_grad():
        loss, more = objective(*leaves, rows)
        dlogp, dentropy = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None, None)
    told.append(more)
    return loss.detach(), torch.zeros_like(logp) if dlogp is None else dlogp, None if dentropy is None else dentropy.contiguous()


def slopes_(e, total, targets, entropy, dlogp, dentropy):
    """dloss/dlogits (m, V) from what `exponentials_` gives, in e: -p_j (dlogp + dentropy (log p_j + H)), and dlogp at the target."""
    for some in blocks(e):
        factor = dlogp[some, None]
        if dentropy is not None:  # log p again from p costs less than to keep both; where p is 0 it does not matter
            logp = e[some].log().clamp_(min=-1e30).sub_(total[some].log())
            factor = logp.add_(entropy[some, None]).mul_(dentropy[some, None]).add_(factor)
        e[some].mul_(-factor / total[some])
    return e.scatter_add_(1, targets[:, None], dlogp[:, None])
