"""kernels/rms_norm.py: the hand-written forward and backward are the definition's."""

import pytest
import torch
import torch.nn.functional as F

from kernels.rms_norm import rms_norm, rms_norm_ref


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (6, 3, 16), (0, 4)], ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_forward_and_gradients_equal_the_definition(shape, trained):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64).requires_grad_(trained)
    learns = [x] + [weight] * trained
    ours, ref = rms_norm(x, weight, 1e-3), rms_norm_ref(x, weight, 1e-3)
    torch.testing.assert_close(ours, ref, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(ref)
    for a, b in zip(torch.autograd.grad(ours, learns, dy), torch.autograd.grad(ref, learns, dy)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_gradient_equals_finite_differences_on_a_strided_input():
    x = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x[:, :2], w, 1e-5), (x, weight))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e15])
def test_small_and_large_inputs_are_normalised_in_fp32(dtype, tolerance, size):
    torch.manual_seed(0)
    x = (torch.randn(20, 64) * size).to(dtype).requires_grad_()
    weight = torch.randn(64).to(dtype).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    ours, ref = rms_norm(x, weight, 1e-6), rms_norm_ref(*exact, 1e-6)
    assert ours.dtype == dtype
    assert (ours.double() - ref).norm() <= tolerance * ref.norm()
    dy = torch.randn(20, 64).to(dtype)
    for a, b in zip(torch.autograd.grad(ours, (x, weight), dy), torch.autograd.grad(ref, exact, dy.double())):
        assert a.dtype == dtype and (a.double() - b).norm() <= tolerance * b.norm() + 1e-30
    if dtype == torch.float32:
        torch.testing.assert_close(ours, F.rms_norm(x, (64,), weight, 1e-6), rtol=1e-5, atol=1e-6)


def test_nothing_but_the_input_and_a_number_a_row_is_kept_for_the_backward():
    x, weight = torch.randn(10, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, 1e-6)
    known = (x.data_ptr(), weight.data_ptr())
    assert sum(t.numel() for t in kept if t.data_ptr() not in known) == 10
