"""Softmax over the last dimension: the smallest kernel here, to read first. Nothing in the loop uses it; all the others have its shape.

    p_j = e^(x_j - m) / sum_k e^(x_k - m),   m = max x            dx_j = p_j (dp_j - sum_k p_k dp_k)

A kernel is one program run many times at once: here once a row. tl.program_id says which row this is, tl.arange makes a block of column
numbers (their count a power of two, known when the kernel is compiled), a mask keeps what lies past the row's end from being read or written.
Subtracting m changes nothing but keeps e^x from overflowing; the padding is -inf, whose weight is 0.

Bytes: forward reads x and writes p, 2 V a row and element; backward reads p, dp and writes dx, 3 V. A few operations an element, so memory is
the limit, and one pass is all there is to win: step by step (max, subtract, exp, sum, divide) torch would move 8 V. Its own softmax is one
pass too, so this one only ties with it. Past 65,536 columns a row no longer fits into a program's registers: see kernels/logprob.py for rows of a vocabulary.

Dims: M rows (all leading dimensions), V columns.
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


def softmax_ref(x):
    """The definition, in the dtype given."""
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def softmax(x):
    """x (.., V) -> (.., V) in x's dtype, computed in fp32; differentiable. Rows of at most 65,536."""
    return _Softmax.apply(x) if on_triton(x) and x.shape[-1] <= 65536 else torch.softmax(x, -1)


@triton.jit
def _softmax_kernel(x, p, V, BLOCK: tl.constexpr):
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    xr = tl.load(x + row * V + j, mask=j < V, other=float("-inf")).to(tl.float32)
    e = tl.exp(xr - tl.max(xr, 0))
    tl.store(p + row * V + j, (e / tl.sum(e, 0)).to(p.dtype.element_ty), mask=j < V)


@triton.jit
def _softmax_grad_kernel(p, dp, dx, V, BLOCK: tl.constexpr):
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    pr = tl.load(p + row * V + j, mask=j < V, other=0.0).to(tl.float32)
    dr = tl.load(dp + row * V + j, mask=j < V, other=0.0).to(tl.float32)
    tl.store(dx + row * V + j, (pr * (dr - tl.sum(pr * dr, 0))).to(dx.dtype.element_ty), mask=j < V)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x, V = x.contiguous(), x.shape[-1]
        p = torch.empty_like(x)
        if x.numel():
            _softmax_kernel[(x.numel() // V,)](x, p, V, BLOCK=triton.next_power_of_2(V), num_warps=4 if V <= 4096 else 16)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, dp):
        (p,), dp, V = ctx.saved_tensors, dp.contiguous(), dp.shape[-1]
        dx = torch.empty_like(p)
        if p.numel():
            _softmax_grad_kernel[(p.numel() // V,)](p, dp, dx, V, BLOCK=triton.next_power_of_2(V), num_warps=4 if V <= 4096 else 16)
        return dx
