"""RMSNorm: x / rms(x) * w over the last dimension, computed in fp32 (arXiv:1910.07467).

    r = 1 / sqrt(mean(x^2) + eps)      y = x r w
    g = dy w                           dx = r (g - x r^2 mean(g x))      dw = sum over rows of dy x r

torch's own is a dozen operations on a CPU, and with a trained weight its autograd keeps x r besides x. Here the forward reads x twice
and writes y twice, and keeps x, which its neighbours keep anyway, and a number a row.

On a GPU a program a row forward: x is read once, and `add_rms_norm` adds the residual stream on its way (bf16: 8 D bytes a row, apart
10 D). Backward a program takes a run of rows, so that the weight's gradient is added up in registers, in a fixed order, and leaves D
numbers a program. The row must fit in registers: D up to 16,384. Dims: T rows (all leading dimensions), D width.
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


def rms_norm_ref(x, weight, eps):
    """The definition, in the dtype given."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rms_norm(x, weight, eps):
    """x (.., D) and weight (D,) in one dtype -> (.., D) in that dtype, computed in fp32 or better; differentiable in both."""
    assert x.shape[-1:] == weight.shape, f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    if on_triton(x):
        return _AddNorm.apply(x, None, weight, eps)[0]
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
        wide = torch.promote_types(x.dtype, torch.float32)
        # the norm is one pass and has no (T, D) square
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, r = ctx.saved_tensors
        # one product for both gradients: with the weight it gives the mean of g x, with r the weight's gradient. Matrix times vector,
        # because torch's sums over rows take several times as long
        dy, D = dy.to(r.dtype), x.shape[-1]
        product = (dy * x).reshape(-1, D)
        mean = torch.mv(product, weight.to(r.dtype)).view_as(r) / D
        dx = (dy * weight).addcmul_(x.to(r.dtype), mean * r * r, value=-1).mul_(r)  # r^3 of a large x would be 0
        dw = torch.mv(product.t(), r.reshape(-1)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx.to(x.dtype), dw, None


# ------------------------------------------------------------------------------------------------------------ on a GPU
class _AddNorm(torch.autograd.Function):
    """x (.., D), delta (.., D) or None -> y, and x + delta where there is a delta."""

    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        D, x = x.shape[-1], x.contiguous()
        y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) if make else None for make in (True, delta is not None))
        if x.numel():
            _norm_kernel[(x.numel() // D,)](x, None if delta is None else delta.contiguous(), weight, total, y, D, eps, BLOCK=triton.next_power_of_2(D), num_warps=4 if D <= 2048 else 8)
        ctx.save_for_backward(x if delta is None else total, weight)
        ctx.eps, ctx.added = eps, delta is not None
        ctx.set_materialize_grads(False)  # no zeros to read where the sum or the norm is not used
        return y, total

    @staticmethod
    def backward(ctx, dy, dtotal):
        x, weight = ctx.saved_tensors
        D, T = x.shape[-1], x.numel() // x.shape[-1]
        dy = torch.zeros_like(x) if dy is None else dy
        programs = max(1, min(T, 528))
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        parts = torch.empty(programs, D, device=x.device) if ctx.needs_input_grad[2] else None
        _norm_grad_kernel[(programs,)](x, weight, dy.contiguous(), None if dtotal is None else dtotal.contiguous(), dx, parts, T, D, ctx.eps, triton.cdiv(T, programs),
                                       BLOCK=triton.next_power_of_2(D), num_warps=4 if D <= 2048 else 8)
        # the gradient of a sum is that of both its terms
        return dx, dx if ctx.added else None, None if parts is None else parts.sum(0).to(weight.dtype), None


@triton.jit
def _norm_kernel(x, delta, weight, total, y, D, eps, BLOCK: tl.constexpr):
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    v = tl.load(x + row * D + j, mask=j < D, other=0.0).to(tl.float32)
    if delta is not None:
        # rounded to the stream's dtype first: the norm is that of what the next layer will read
        v = (v + tl.load(delta + row * D + j, mask=j < D, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * D + j, v, mask=j < D)
        v = v.to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, 0) / D + eps)
    w = tl.load(weight + j, mask=j < D, other=0.0).to(tl.float32)
    tl.store(y + row * D + j, (v * r * w).to(y.dtype.element_ty), mask=j < D)


@triton.jit
def _norm_grad_kernel(x, weight, dy, dtotal, dx, parts, T, D, eps, rows, BLOCK: tl.constexpr):
    """Program i takes rows i * rows .. and the weight's gradient over them."""
    i, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    w, dw = tl.load(weight + j, mask=j < D, other=0.0).to(tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(i * rows, tl.minimum((i + 1) * rows, T)):
        v = tl.load(x + row * D + j, mask=j < D, other=0.0).to(tl.float32)
        d = tl.load(dy + row * D + j, mask=j < D, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        g, v = d * w, v * r
        out = r * (g - v * (tl.sum(g * v, 0) / D))  # x r, and not x: r^3 of a large x would be 0
        if dtotal is not None:
            out += tl.load(dtotal + row * D + j, mask=j < D, other=0.0).to(tl.float32)
        tl.store(dx + row * D + j, out.to(dx.dtype.element_ty), mask=j < D)
        dw += d * v
    if parts is not None:
        tl.store(parts + i * D + j, dw, mask=j < D)
