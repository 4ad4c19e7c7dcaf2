"""SwiGLU's middle: silu(gate) * up, where the two lie side by side as one matmul left them (arXiv:2002.05202).

    s = sigmoid(gate)      y = gate s up      dup = dy gate s
    dgate = dy up s (1 + gate (1 - s)) = up (s dy + (1 - s) dup)

Autograd would keep gate, up and silu(gate), and glue the two gradients together in a copy; here s is made again, an eighth of a
layer's memory less, and the gradients are written where they belong. Dims: T rows, I width of the MLP.
"""
import torch
import torch.nn.functional as F


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
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy):
        gate_up, = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        d = torch.empty_like(gate_up)
        dgate, dup = d.chunk(2, -1)
        s = torch.sigmoid(gate)
        torch.mul(s, gate, out=dup).mul_(dy)
        torch.lerp(dup, dy, s, out=dgate).mul_(up)
        return d
