"""RMSNorm: x / rms(x) * w over the last dimension, computed in fp32 (arXiv:1910.07467).

    forward    r = 1 / sqrt(mean(x^2) + eps)     y = x r w
    backward   g = dy w      dx = r (g - x r^2 mean(g x))      dw = sum over rows of dy x r

On a CPU torch's own is a dozen operations, and with a trained weight its autograd keeps x r
besides x. Here the forward reads x twice and writes y twice, and keeps x, which its neighbours
keep anyway, and one number a row.

On a GPU a program takes a row forward: x is read once, and `add_rms_norm` adds the residual stream on its
way, 8 D bytes a row in bf16 where the two apart move 10 D. Backward a program takes a run of rows, so that
the weight's gradient is added up in registers in a fixed order and leaves D numbers a program; it reads x
and dy (and the sum's gradient) and writes dx, 6 D (8 D). About ten operations an element, so memory is the
limit. A row must fit into a program's registers: D up to 16,384.

It loses to torch where launches are the limit: at 16,384 rows of 1,536 the norm alone, forward and
backward, took 0.54 ms where torch's takes 0.17, and with the residual 0.75 where torch takes 0.45
(bench/gpu.py, H100, commit 263d8c1). A launch from Python costs the CPU 42 us, 74 under autograd, and
torch's 18. In decoding a CUDA graph hides that.

Dims: T rows (all leading dimensions), D width.
"""

import torch

from kernels.switch import on_triton, tl, triton


def rms_norm_ref(x, weight, eps):
    """The definition, in the dtype given."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rms_norm(x, weight, eps):
    """x (.., D) and weight (D,) of one dtype -> (.., D), computed in fp32 (fp64); differentiable in both."""
    assert x.shape[-1:] == weight.shape, f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    if on_triton(x):
        y, _ = _AddNorm.apply(x, None, weight, eps)
        return y
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x, delta, weight, eps):
    """(x + delta, rms_norm(x + delta)), in one pass on a GPU. x, delta (.., D)."""
    if on_triton(x):
        y, total = _AddNorm.apply(x, delta, weight, eps)
        return total, y
    x = x + delta
    return x, rms_norm(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        D = x.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        # the vector norm is one pass and makes no (T, D) square
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = norm.square_().div_(D).add_(eps).rsqrt_()  # (.., 1)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, r = ctx.saved_tensors
        D = x.shape[-1]
        dy = dy.to(r.dtype)
        # One product serves both gradients: times the weight it gives the mean of g x, times r the weight's
        # gradient. Both are matrix times vector, because torch's sums over rows take several times as long.
        product = (dy * x).reshape(-1, D)
        mean = torch.mv(product, weight.to(r.dtype)).view_as(r) / D
        dx = dy * weight
        # mean * r * r first and r last: r^3 of a large x would be 0
        dx = dx.addcmul_(x.to(r.dtype), mean * r * r, value=-1).mul_(r)
        dw = None
        if ctx.needs_input_grad[1]:
            dw = torch.mv(product.t(), r.reshape(-1)).to(weight.dtype)
        return dx.to(x.dtype), dw, None


# ----------------------------------------------------------------------------------------- on a GPU
class _AddNorm(torch.autograd.Function):
    """x (.., D), delta (.., D) or None -> y, and x + delta where there is a delta."""

    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        D = x.shape[-1]
        x = x.contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total = None
        if delta is not None:
            delta = delta.contiguous()
            total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.numel():
            T = x.numel() // D
            _norm_kernel[(T,)](x, delta, weight, total, y, D, eps, **block(D))
        ctx.save_for_backward(x if delta is None else total, weight)
        ctx.eps = eps
        ctx.added = delta is not None
        ctx.set_materialize_grads(False)  # no zeros to read where the sum or the norm is not used
        return y, total

    @staticmethod
    def backward(ctx, dy, dtotal):
        x, weight = ctx.saved_tensors
        D = x.shape[-1]
        T = x.numel() // D
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        if dtotal is not None:
            dtotal = dtotal.contiguous()
        programs = max(1, min(T, 528))  # four for each of an H100's 132 processors
        rows = triton.cdiv(T, programs)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        parts = dw = None
        if ctx.needs_input_grad[2]:
            parts = torch.empty(programs, D, device=x.device)
        _norm_grad_kernel[(programs,)](x, weight, dy, dtotal, dx, parts, T, D, ctx.eps, rows, **block(D))
        if parts is not None:
            dw = parts.sum(0).to(weight.dtype)
        ddelta = dx if ctx.added else None  # the gradient of a sum is that of both its terms
        return dx, ddelta, dw, None


def block(D: int) -> dict:
    """A row in one block, and the warps that its registers need."""
    return dict(BLOCK=triton.next_power_of_2(D), num_warps=4 if D <= 2048 else 8)


@triton.jit
def _norm_kernel(x, delta, weight, total, y, D, eps, BLOCK: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    real = j < D
    v = tl.load(x + row * D + j, mask=real, other=0.0).to(tl.float32)
    if delta is not None:
        v += tl.load(delta + row * D + j, mask=real, other=0.0).to(tl.float32)
        # rounded to the stream's dtype first: the norm is that of what the next layer will read
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + row * D + j, rounded, mask=real)
        v = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, 0) / D + eps)
    w = tl.load(weight + j, mask=real, other=0.0).to(tl.float32)
    tl.store(y + row * D + j, (v * r * w).to(y.dtype.element_ty), mask=real)


@triton.jit
def _norm_grad_kernel(x, weight, dy, dtotal, dx, parts, T, D, eps, rows, BLOCK: tl.constexpr):
    """Program i takes the rows from i * rows on, and the weight's gradient over them."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    real = j < D
    w = tl.load(weight + j, mask=real, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(i * rows, tl.minimum((i + 1) * rows, T)):
        v = tl.load(x + row * D + j, mask=real, other=0.0).to(tl.float32)
        d = tl.load(dy + row * D + j, mask=real, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        g = d * w
        v = v * r  # from here on x r, and not x: r^3 of a large x would be 0
        out = r * (g - v * (tl.sum(g * v, 0) / D))
        if dtotal is not None:
            out += tl.load(dtotal + row * D + j, mask=real, other=0.0).to(tl.float32)
        tl.store(dx + row * D + j, out.to(dx.dtype.element_ty), mask=real)
        dw += d * v
    if parts is not None:
        tl.store(parts + i * D + j, dw, mask=real)
