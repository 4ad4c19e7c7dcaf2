"""SwiGLU's middle: silu(gate) * up, where the two lie side by side as one matmul left them (arXiv:2002.05202).

    s = sigmoid(gate)      y = gate s up      dup = dy gate s
    dgate = dy up s (1 + gate (1 - s)) = up (s dy + (1 - s) dup)

Autograd would keep gate, up and silu(gate), and glue the two gradients together in a copy; here s is made again, an eighth of a
layer's memory less, and the gradients are written where they belong. On a GPU one launch each way: 6 I bytes a row forward in bf16, 10 I
backward, nothing between (torch: 2 and 5 launches, 10 I and 26 I). Dims: T rows (all leading dimensions), I width of the MLP.
"""
import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it and do not need it
    from types import SimpleNamespace
    triton, tl = SimpleNamespace(jit=lambda f: f), SimpleNamespace(constexpr=None)

MODE = "auto"  # set by kernels.use(): "auto" Triton on CUDA tensors, "triton" always, "torch" never


def on_triton(x) -> bool:
    return (MODE == "triton" or MODE == "auto" and x.is_cuda) and x.dtype != torch.float64


def swiglu_ref(gate_up):
    """The definition, in the dtype given."""
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def swiglu(gate_up):
    """(T, 2 I), the gates first -> (T, I), differentiable."""
    assert gate_up.shape[-1] % 2 == 0, f"gate_up {tuple(gate_up.shape)}"
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        if on_triton(gate_up):
            y = torch.empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2, dtype=gate_up.dtype, device=gate_up.device)
            launch(_swiglu_kernel, gate_up.contiguous(), y)
            return y
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy):
        gate_up, = ctx.saved_tensors
        if on_triton(gate_up):
            d = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
            launch(_swiglu_grad_kernel, gate_up.contiguous(), dy.contiguous(), d)
            return d
        gate, up = gate_up.chunk(2, -1)
        d = torch.empty_like(gate_up)
        dgate, dup = d.chunk(2, -1)
        s = torch.sigmoid(gate)
        torch.mul(s, gate, out=dup).mul_(dy)
        torch.lerp(dup, dy, s, out=dgate).mul_(up)
        return d


# ------------------------------------------------------------------------------------------------------------ on a GPU
def launch(kernel, gate_up, *tensors):
    """A program a row and 1,024 columns; gate_up (.., 2 I) contiguous, the other tensors as the kernel wants them."""
    I = gate_up.shape[-1] // 2
    if gate_up.numel():
        kernel[(gate_up.numel() // (2 * I), triton.cdiv(I, 1024))](gate_up, *tensors, I, BLOCK=1024, num_warps=4)


@triton.jit
def _swiglu_kernel(gate_up, y, I, BLOCK: tl.constexpr):
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * I + j, mask=j < I, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * I + I + j, mask=j < I, other=0.0).to(tl.float32)
    tl.store(y + row * I + j, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=j < I)


@triton.jit
def _swiglu_grad_kernel(gate_up, dy, d, I, BLOCK: tl.constexpr):
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * I + j, mask=j < I, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * I + I + j, mask=j < I, other=0.0).to(tl.float32)
    g = tl.load(dy + row * I + j, mask=j < I, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(d + row * 2 * I + j, (g * up * s * (1 + gate * (1 - s))).to(d.dtype.element_ty), mask=j < I)
    tl.store(d + row * 2 * I + I + j, (g * gate * s).to(d.dtype.element_ty), mask=j < I)
