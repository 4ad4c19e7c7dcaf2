"""A linear layer with low-rank adapters on some of its rows, forward and backward by hand (arXiv:2106.09685).

    h = s (x m) A^T              y = x W^T + b,       y[:, rows_k] += h_k B_k^T             for each adapter k
    dh_k = s dy[:, rows_k] B_k   dx = dy W + (dh A) m    dA = dh^T (x m)    dB_k = dy[:, rows_k]^T h_k

W and b are frozen. m is dropout's mask over (1 - p), or absent. Each thin product is added into the thick one in place: left to
autograd a layer writes its (T, N) output three times over (product, concatenation, sum), which on a CPU costs as much as the thin
matmuls themselves. Measured forward and backward at T 2,272, r 16, SmolLM2-135M's four layers together, one core: autograd 504 ms, this
432, the frozen layers alone 384.

Dims: T rows, D input width, N output width, K adapters, r rank of each; A has the K thin matrices under each other.
"""
import torch


def lora_linear_ref(x, mask, base, scale, rows, A, *B):
    """The definition, by autograd, in the dtype given."""
    y, thin = base(x).clone(), (x if mask is None else x * mask)
    for where, Ak, Bk in zip(rows, A.chunk(len(B)), B):
        y[:, where] = y[:, where] + scale * (thin @ Ak.t() @ Bk.t())
    return y


def lora_linear(x, mask, base, scale, rows, A, *B):
    """x (T, D) -> (T, N), differentiable in x, A and B.

    base: the frozen layer, a function x -> (T, N) with a `weight` (N, D); mask (T, D) or None; rows: slice of the outputs each adapter is
    added to; A (K r, D), B: K tensors (rows, r), in the base's dtype or a wider one, in which the thin products are then computed.
    """
    assert len(rows) == len(B) and A.shape == (sum(b.shape[1] for b in B), x.shape[1]), f"x {tuple(x.shape)}, A {tuple(A.shape)}, {len(rows)} slices, {len(B)} B"
    return _LoRALinear.apply(x, mask, base, scale, rows, A, *B)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, base, scale, rows, A, *B):
        y, x = base(x), x if mask is None else x * mask
        h = (x.to(A.dtype) @ A.t()).mul_(scale)  # (T, K r)
        for where, hk, Bk in zip(rows, h.chunk(len(B), -1), B):
            add_product_(y[:, where], hk, Bk.t())
        ctx.save_for_backward(x, mask, base.weight, h, A, *B)
        ctx.scale, ctx.rows = scale, rows
        return y

    @staticmethod
    def backward(ctx, dy):
        x, mask, weight, h, A, *B = ctx.saved_tensors
        wide, dh, dB = dy.to(A.dtype), torch.empty_like(h), []
        for where, hk, dhk, Bk in zip(ctx.rows, h.chunk(len(B), -1), dh.chunk(len(B), -1), B):
            dB.append(wide[:, where].t() @ hk)
            torch.mm(wide[:, where], Bk, out=dhk)
        dA, dx = dh.mul_(ctx.scale).t() @ x.to(A.dtype), None
        if ctx.needs_input_grad[0]:  # the first layer's input has nothing to learn below it
            dx = dy @ weight
            dx = add_product_(dx, dh, A) if mask is None else dx.add_((dh @ A).mul_(mask))
        return dx, None, None, None, None, dA, *dB


def add_product_(y, a, b):
    """y += a b, in place; where y is bf16 and a, b are fp32 the sum is rounded once."""
    return y.addmm_(a, b) if y.dtype == a.dtype else y.add_(a @ b)
