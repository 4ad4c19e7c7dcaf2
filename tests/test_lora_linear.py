"""kernels/lora_linear.py: the hand-written forward and backward are autograd's."""
import pytest
import torch
from torch.nn import Linear

from kernels.lora_linear import lora_linear, lora_linear_ref


def inputs(parts, targets, r, dtype=torch.float64, T=9, D=5):
    torch.manual_seed(0)
    base, rows, row = Linear(D, sum(parts), dtype=dtype).requires_grad_(False), [], 0
    for i, size in enumerate(parts):
        rows += [slice(row, row + size)] if i in targets else []
        row += size
    x, A = torch.randn(T, D, dtype=dtype), torch.randn(r * len(rows), D, dtype=dtype)
    B = [torch.randn(where.stop - where.start, r, dtype=dtype) for where in rows]
    return base, rows, [t.requires_grad_() for t in (x, A, *B)]


@pytest.mark.parametrize("parts, targets, r", [((7,), (0,), 1), ((4, 3, 2), (0, 1, 2), 3), ((4, 3, 2), (0, 2), 2), ((4, 3), (1,), 8)])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("x_learns", [True, False])
def test_forward_and_every_gradient_equal_autograd(parts, targets, r, dropped, x_learns):
    base, rows, (x, A, *B) = inputs(parts, targets, r)
    x.requires_grad_(x_learns)
    mask = torch.bernoulli(torch.full_like(x, 0.7)) / 0.7 if dropped else None
    learns = [x] * x_learns + [A, *B]
    ours, ref = (f(x, mask, base, 1.7, rows, A, *B) for f in (lora_linear, lora_linear_ref))
    torch.testing.assert_close(ours, ref, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(ref)
    for a, b in zip(torch.autograd.grad(ours, learns, dy), torch.autograd.grad(ref, learns, dy)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_bf16_layer_with_fp32_adapters_is_near_fp64_and_gives_fp32_gradients():
    base, rows, exact = inputs((64, 32), (0, 1), 4, T=50, D=48)
    low = [exact[0].detach().bfloat16().requires_grad_(), *(t.detach().float().requires_grad_() for t in exact[1:])]
    ours = lora_linear(low[0], None, Linear(48, 96, dtype=torch.bfloat16).requires_grad_(False), 0.5, rows, *low[1:])
    base.load_state_dict({k: v.double() for k, v in Linear(48, 96, dtype=torch.bfloat16).state_dict().items()})
    assert ours.dtype == torch.bfloat16
    layer = Linear(48, 96, dtype=torch.bfloat16).requires_grad_(False)
    base.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    ours, ref = lora_linear(low[0], None, layer, 0.5, rows, *low[1:]), lora_linear_ref(exact[0], None, base, 0.5, rows, *exact[1:])
    assert (ours.double() - ref).norm() < 0.01 * ref.norm()
    dy = torch.randn_like(ref)
    for a, b, t in zip(torch.autograd.grad(ours, low, dy.bfloat16()), torch.autograd.grad(ref, exact, dy), low):
        assert a.dtype == t.dtype and (a.double() - b).norm() < 0.01 * b.norm()


def test_base_runs_whatever_function_it_is():
    """The sampler puts a packed copy of the weights behind the frozen layer: it must be called, not read."""
    base, rows, (x, A, *B) = inputs((4,), (0,), 2)
    calls = []
    layer = type("Base", (), {"weight": base.weight, "__call__": lambda self, x: calls.append(1) or base(x)})()
    with torch.no_grad():
        torch.testing.assert_close(lora_linear(x, None, layer, 1.0, rows, A, *B), lora_linear_ref(x, None, base, 1.0, rows, A, *B))
    assert calls == [1]
