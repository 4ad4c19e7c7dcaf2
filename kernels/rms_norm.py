"""RMSNorm: x / rms(x) * w over the last dimension, computed in fp32 (arXiv:1910.07467).

    r = 1 / sqrt(mean(x^2) + eps)      y = x r w
    g = dy w                           dx = r (g - x r^2 mean(g x))      dw = sum over rows of dy x r

torch's own is a dozen operations on a CPU, and with a trained weight its autograd keeps x r besides x. Here the forward reads x twice
and writes y twice, and keeps x, which its neighbours keep anyway, and a number a row. On a GPU torch has one kernel for each
direction. Dims: T rows (all leading dimensions), D width.
"""
import torch
import torch.nn.functional as F


def rms_norm_ref(x, weight, eps):
    """The definition, in the dtype given."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rms_norm(x, weight, eps):
    """x (.., D) and weight (D,) in one dtype -> (.., D) in that dtype, computed in fp32 or better; differentiable in both."""
    assert x.shape[-1:] == weight.shape, f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    return F.rms_norm(x, weight.shape, weight, eps) if x.is_cuda else _RMSNorm.apply(x, weight, eps)


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
