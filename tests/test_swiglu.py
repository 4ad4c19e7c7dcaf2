"""kernels/swiglu.py: the hand-written forward and backward are the definition's."""

import pytest
import torch

from kernels.swiglu import swiglu, swiglu_ref


@pytest.mark.parametrize("T, I", [(1, 1), (7, 5), (0, 3), (33, 40)])
def test_forward_and_gradient_equal_the_definition(T, I):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(T, 2 * I, dtype=torch.float64, generator=g).mul_(3).requires_grad_()
    ours, ref = swiglu(x), swiglu_ref(x)
    torch.testing.assert_close(ours, ref, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(ref)
    grads = torch.autograd.grad(ours, x, dy), torch.autograd.grad(ref, x, dy)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


def test_extreme_gates_stay_finite():
    x = torch.tensor([[1e4, -1e4, 0.0, 2.0, 3.0, 4.0]], requires_grad=True)
    y = swiglu(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([[2e4, 0.0, 0.0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[2.0, 0.0, 2.0, 1e4, 0.0, 0.0]]))


def test_bf16_is_the_definition_to_rounding():
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    ours, ref = swiglu(x), swiglu_ref(exact)
    assert ours.dtype == torch.bfloat16 and (ours.double() - ref).norm() < 0.01 * ref.norm()
    dy = torch.randn(40, 32).bfloat16()
    (a,) = torch.autograd.grad(ours, x, dy)
    (b,) = torch.autograd.grad(ref, exact, dy.double())
    assert (a.double() - b).norm() < 0.01 * b.norm()


def test_only_the_input_is_kept_for_the_backward():
    x, kept = torch.randn(10, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
