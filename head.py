"""From hidden states to the loss and its gradient: the final linear layer, log-softmax and the objective.

    z = h W^T / temperature    logp, entropy = log-softmax of z at the target    loss = policy_loss(logp, ..)

This is where loss.py meets the kernels. Whole logits would be (T, V): 8,192 tokens of 151,936 words are 5 GB
in fp32, and autograd would keep three such tensors. So a chunk of rows lives at a time, in one of two ways:

    elementwise objectives   What a token's log-probability is multiplied by in the backward is known as soon
                             as the log-probability is. So a chunk goes all the way, through the loss and back
                             to dh and dW, while its logits are there: 6 T D V operations, 4 where the head is
                             frozen, one exponential a word. The factor is autograd's, of policy_loss itself.
    whole rows               (GSPO's one ratio a row, the exact KL) A token's factor depends on the other
                             tokens of its row: all log-probabilities come first (kernels/logprob.py and
                             kernels/exact_kl.py), and the backward makes the logits again: 8 T D V.

A full update of Qwen2.5-0.5B takes 0.91 of the time in the first way (dev/LOG.md, 2026-11-21).

Dims: T completion tokens, D width, V vocabulary, m rows of a chunk.
"""

from functools import partial

import torch

from kernels.exact_kl import exact_kl, exact_kl_ref
from kernels.logprob import (
    add_outer_,
    any_truncation,
    blocks,
    chunks,
    exponentials_,
    logprob,
    logprob_ref,
    on_triton,
    raw_logits,
    row_pass,
    scaled_logits,
    truncate_,
)
from loss import policy_loss, takes_whole_rows


def policy_head(hidden, weight, targets, tokens, objective, *, reference=None, logp_out=None, temperature=1.0,
                top_k=0, top_p=1.0, min_p=0.0):  # fmt: skip
    """The loss of the tokens `targets` (T,) predicted from hidden (T, D) by weight (V, D).

    Differentiable in hidden and weight. tokens: loss.Tokens, what each token carries. objective: a dict of
    policy_loss's keywords, `norm` among them. reference: where the objective has the exact KL, exact_kl's
    arguments of it: hidden (T, D') and weight (V, D') of the reference and, if they are not its defaults, the
    direction and how many of the likeliest words it compares. logp_out: (T,), takes the targets'
    log-probabilities. temperature, top_k, top_p, min_p: of the sampled distribution.

    Returns the loss (0-d), the entropy (T,) in nats and policy_loss's stats, the last two without gradient. A
    second backward through the loss needs a second forward.
    """
    (T, D), (V, D2), device = hidden.shape, weight.shape, hidden.device
    assert D == D2 and targets.shape == (T,), f"{hidden.shape}, {weight.shape}, {targets.shape}"
    if reference is not None or takes_whole_rows(objective["objective"]):
        sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        return whole_rows_head(hidden, weight, targets, tokens, objective, reference, logp_out, **sampling)

    dtype = torch.promote_types(hidden.dtype, torch.float32)
    dhidden, dweight = gradient_buffers(hidden, weight, dtype)
    logp, entropy = torch.empty(2, T, dtype=dtype, device=device)
    make_chunk = TritonChunk if on_triton(hidden) else TorchChunk
    scratch = make_chunk.scratch(T, V, dtype, device)
    with torch.no_grad():
        for rows in chunks(T, V, device):
            truncation = (top_k, top_p, min_p)
            chunk = make_chunk(hidden[rows], weight, targets[rows], temperature, truncation, scratch)
            logp[rows], entropy[rows] = chunk.logp, chunk.entropy
            if dhidden is None and dweight is None:
                continue
            dlogp, dentropy = factors(chunk.logp, chunk.entropy, tokens[rows], objective)
            dz = chunk.logits_grad(dlogp, dentropy)  # (m, V)
            if dhidden is not None:
                torch.mm(dz, weight, out=dhidden[rows])
            if dweight is not None:
                add_outer_(dweight, dz, hidden[rows])
            del chunk, dz  # or the next chunk's logits would stand beside these
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        if logp_out is not None:
            logp_out.copy_(logp)
        # Once for all chunks: on a GPU its hundred small sums would make each chunk wait for the host.
        loss, stats = policy_loss(logp, entropy=entropy, **tokens.arguments(), **objective)
    return _HandOut.apply(loss, hidden, weight, dhidden, dweight), entropy, stats


def gradient_buffers(hidden, weight, dtype):
    """dhidden (T, D) and a zero dweight (V, D) in `dtype`; None for what takes no gradient."""
    dhidden = dweight = None
    if torch.is_grad_enabled() and hidden.requires_grad:
        dhidden = torch.empty_like(hidden)
    if torch.is_grad_enabled() and weight.requires_grad:
        # bf16 sums over 10,000 tokens would lose the small ones, so the weight's gradient gathers in fp32.
        dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    return dhidden, dweight


class _HandOut(torch.autograd.Function):
    """The loss, whose gradients are known already: backward hands them out."""

    @staticmethod
    def forward(ctx, loss, hidden, weight, dhidden, dweight):
        # Not saved for the backward, where we hand them out and keep nothing: autograd would copy them.
        ctx.grads = dhidden, dweight
        return loss.clone()

    @staticmethod
    def backward(ctx, dloss):
        assert ctx.grads is not None, (
            "policy_head makes its gradients once: a second backward needs a second forward"
        )
        grads, ctx.grads = ctx.grads, None
        # A loss scaler multiplies the loss. On a GPU we multiply without looking, which would make it wait.
        if dloss.device.type != "cpu" or dloss != 1:
            grads = [None if grad is None else grad.mul_(dloss.to(grad.dtype)) for grad in grads]
        return None, *grads, None, None


def whole_rows_head(
    hidden, weight, targets, tokens, objective, reference, logp_out, *, temperature, **truncation
):
    """As policy_head: all log-probabilities first, then the objective on all tokens, then autograd."""
    logp, entropy = logprob(hidden, weight, targets, temperature=temperature, **truncation)
    if logp_out is not None:
        logp_out.copy_(logp.detach())
    kl = None
    if reference is not None:
        truncate = None
        if any_truncation(tuple(truncation.values())):
            truncate = partial(truncate_rows, targets=targets, **truncation)
        kl = exact_kl(hidden, weight, *reference, temperature=temperature, truncate=truncate)
    carried = whole_rows(tokens, objective)
    loss, stats = policy_loss(logp, entropy=entropy, exact_kl=kl, **carried, **objective)
    return loss, entropy.detach(), stats


def policy_head_ref(hidden, weight, targets, tokens, objective, *, reference=None, logp_out=None, **sampling):
    """The definition: all tokens at once, whole logits, autograd. Arguments and results as `policy_head`."""
    logp, entropy = logprob_ref(hidden, weight, targets, **sampling)
    if logp_out is not None:
        logp_out.copy_(logp.detach())
    kl = None
    if reference is not None:
        truncation = dict(sampling)
        temperature = truncation.pop("temperature", 1.0)
        z = (hidden @ weight.t() / temperature).detach()
        kept = truncate_(z, keep=targets, **truncation) > float("-inf")  # (T, V)
        kl = exact_kl_ref(hidden, weight, *reference, temperature=temperature, kept=kept)
    loss, stats = policy_loss(
        logp, entropy=entropy, exact_kl=kl, **whole_rows(tokens, objective), **objective
    )
    return loss, entropy.detach(), stats


def whole_rows(tokens, objective) -> dict:
    """The tokens as policy_loss's arguments for a call that has every token of its rows."""
    arguments = tokens.arguments()
    if takes_whole_rows(objective["objective"]):
        # Counted there: policy_loss refuses lengths, which say that rows may be cut.
        arguments["lengths"] = None
    return arguments


def truncate_rows(z, rows, *, targets, **truncation):
    """The trainer's truncation of the scaled logits z (m, V) of a slice of rows, in place."""
    return truncate_(z, keep=targets[rows], **truncation)


def factors(logp, entropy, tokens, objective):
    """Autograd's dloss/dlogp and dloss/dentropy (m,) of a run of tokens; the latter None without effect."""
    logp, entropy = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
    with torch.enable_grad():
        loss, _ = policy_loss(logp, entropy=entropy, stats=False, **tokens.arguments(), **objective)
        dlogp = dentropy = None
        if loss.requires_grad:
            dlogp, dentropy = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    if dlogp is None:
        dlogp = torch.zeros_like(logp)
    if dentropy is not None:
        dentropy = dentropy.contiguous()
    return dlogp, dentropy


class TorchChunk:
    """A chunk's logits in torch: exponentials where the logits stood, and from them
    the gradient in the same place.
    """

    @staticmethod
    def scratch(T, V, dtype, device):
        """One buffer for the logits of every chunk: fresh memory costs a tenth of the matmul."""
        cut = chunks(T, V, device)
        return torch.empty(cut[0].stop if cut else 0, V, dtype=dtype, device=device)

    def __init__(self, hidden, weight, targets, temperature, truncation, scratch):
        self.targets, self.temperature, self.dtype = targets, temperature, hidden.dtype
        self.z = scaled_logits(hidden, weight, targets, temperature, truncation, scratch)
        self.total, self.logp, _, self.entropy = exponentials_(self.z, targets)

    def logits_grad(self, dlogp, dentropy):
        """dloss/dlogits (m, V), which overwrites the exponentials."""
        if dentropy is not None:
            dentropy = dentropy / self.temperature
        dz = slopes_(self.z, self.total, self.targets, self.entropy, dlogp / self.temperature, dentropy)
        return dz.to(self.dtype)


def slopes_(e, total, targets, entropy, dlogp, dentropy):
    """dloss/dlogits (m, V) from what `exponentials_` gives, in e (m, V): -p_j (dlogp + dentropy (log p_j +
    H)), and dlogp added at the target. total (m, 1), entropy, dlogp (m,), dentropy (m,) or None.
    """
    for some in blocks(e):  # a few rows stay in the cache from one pass over them to the next
        factor = dlogp[some, None]
        if dentropy is not None:
            # log p made again from p costs less than keeping both; where p is 0 it does not matter
            logp = e[some].log().clamp_(min=-1e30).sub_(total[some].log())
            factor = logp.add_(entropy[some, None]).mul_(dentropy[some, None]).add_(factor)
        e[some].mul_(-factor / total[some])
    return e.scatter_add_(1, targets[:, None], dlogp[:, None])


class TritonChunk:
    """A chunk's logits on a GPU: one launch reads them for logp and entropy, one
    writes their gradient over them.
    """

    @staticmethod
    def scratch(T, V, dtype, device):
        return None

    def __init__(self, hidden, weight, targets, temperature, truncation, scratch):
        self.targets, self.temperature, self.dtype = targets, temperature, hidden.dtype
        self.z, self.scale = raw_logits(hidden, weight, targets, temperature, truncation)  # (m, V) fp32
        self.logp, self.lse, self.entropy = torch.empty(3, len(hidden), device=hidden.device)
        self.row_pass(None, self.logp, None, None, stats=True)

    def row_pass(self, dz, logp, dlogp, dentropy, stats):
        row_pass(
            self.z, dz, self.targets, logp, self.lse, self.entropy, dlogp, dentropy, self.scale,
            self.temperature, stats=stats,
        )  # fmt: skip

    def logits_grad(self, dlogp, dentropy):
        """dloss/dlogits (m, V): in place for fp32, else beside the logits in half their room."""
        dz = self.z
        if self.z.dtype != self.dtype:
            dz = torch.empty_like(self.z, dtype=self.dtype)
        self.row_pass(dz, None, dlogp.contiguous(), dentropy, stats=False)
        return dz
