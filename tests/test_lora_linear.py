"""kernels/lora_linear.py: forward and backward by hand are autograd's, with adapters beside and merged."""

import pytest
import torch
from torch.nn import Linear

from kernels.lora_linear import lora_linear, lora_linear_ref, merged_linear, merged_linear_ref

# sizes of the layer's parts, the parts that have an adapter, rank
LAYERS = [((7,), (0,), 1), ((4, 3, 2), (0, 1, 2), 3), ((4, 3, 2), (0, 2), 2), ((4, 3), (1,), 8)]


def inputs(parts, targets, r, dtype=torch.float64, T=9, D=5):
    """A frozen layer, the rows of each adapter, and the leaves x, A and the B's."""
    torch.manual_seed(0)
    base = Linear(D, sum(parts), dtype=dtype).requires_grad_(False)
    rows, row = [], 0
    for i, size in enumerate(parts):
        if i in targets:
            rows.append(slice(row, row + size))
        row += size
    x, A = torch.randn(T, D, dtype=dtype), torch.randn(r * len(rows), D, dtype=dtype)
    B = [torch.randn(where.stop - where.start, r, dtype=dtype) for where in rows]
    return base, rows, [t.requires_grad_() for t in (x, A, *B)]


def merge(base, scale, rows, A, *B):
    """round(W + s B A), added up in the adapters' dtype and rounded once to the base's."""
    weight = base.weight.to(A.dtype, copy=True)
    for where, Ak, Bk in zip(rows, A.chunk(len(B)), B):
        weight[where] += scale * (Bk @ Ak)
    return weight.detach().to(base.weight.dtype)


def low_and_exact():
    """A bf16 layer with fp32 adapters, and the same numbers in fp64: base, rows, leaves of each."""
    base, rows, leaves = inputs((64, 32, 7), (0, 2), 4, T=50, D=48)
    layer = Linear(48, 103, dtype=torch.bfloat16).requires_grad_(False)
    base.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    x, *adapters = leaves
    low = [x.detach().bfloat16().requires_grad_(), *(t.detach().float().requires_grad_() for t in adapters)]
    exact = [t.detach().double().requires_grad_() for t in low]
    return layer, base, rows, low, exact


@pytest.mark.parametrize("parts, targets, r", LAYERS)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("x_learns", [True, False])
def test_forward_and_every_gradient_equal_autograd(parts, targets, r, dropped, x_learns):
    base, rows, (x, A, *B) = inputs(parts, targets, r)
    x.requires_grad_(x_learns)
    mask = torch.bernoulli(torch.full_like(x, 0.7)) / 0.7 if dropped else None
    learns = [x] * x_learns + [A, *B]
    ours = lora_linear(x, mask, base, 1.7, rows, A, *B)
    ref = lora_linear_ref(x, mask, base, 1.7, rows, A, *B)
    torch.testing.assert_close(ours, ref, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(ref)
    for a, b in zip(torch.autograd.grad(ours, learns, dy), torch.autograd.grad(ref, learns, dy)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts, targets, r", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_learns", [True, False])
def test_merged_forward_and_every_gradient_equal_autograd_through_the_sum(parts, targets, r, bias, x_learns):
    base, rows, (x, A, *B) = inputs(parts, targets, r)
    x.requires_grad_(x_learns)
    if not bias:
        base.bias = None
    learns = [x] * x_learns + [A, *B]
    ours = merged_linear(x, base, merge(base, 1.7, rows, A, *B), 1.7, rows, A, *B)
    ref = merged_linear_ref(x, base, 1.7, rows, A, *B)
    beside = lora_linear(x, None, base, 1.7, rows, A, *B)
    torch.testing.assert_close(ours, ref, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, beside, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(ref)
    grads = [torch.autograd.grad(y, learns, dy) for y in (ours, ref, beside)]
    for a, b, c in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-12)


def test_bf16_layer_with_fp32_adapters_is_near_fp64_and_gives_fp32_gradients():
    layer, base, rows, low, exact = low_and_exact()
    ours = lora_linear(low[0], None, layer, 0.5, rows, *low[1:])
    ref = lora_linear_ref(exact[0], None, base, 0.5, rows, *exact[1:])
    assert ours.dtype == torch.bfloat16 and (ours.double() - ref).norm() < 0.01 * ref.norm()
    dy = torch.randn_like(ref)
    grads = torch.autograd.grad(ours, low, dy.bfloat16()), torch.autograd.grad(ref, exact, dy)
    for a, b, t in zip(*grads, low):
        assert a.dtype == t.dtype and (a.double() - b).norm() < 0.01 * b.norm()


def test_merged_in_bf16_is_as_near_fp64_as_with_the_adapters_beside():
    """Rounding W + s B A to bf16 adds no error to what bf16 has; gradients of A and B are fp32."""
    layer, base, rows, low, exact = low_and_exact()
    ours = merged_linear(low[0], layer, merge(layer, 0.5, rows, *low[1:]), 0.5, rows, *low[1:])
    beside = lora_linear(low[0], None, layer, 0.5, rows, *low[1:])
    ref = merged_linear_ref(exact[0], base, 0.5, rows, *exact[1:])
    assert ours.dtype == torch.bfloat16
    dy = torch.randn_like(ref)
    results = [[ours, *torch.autograd.grad(ours, low, dy.bfloat16())]]
    results.append([beside, *torch.autograd.grad(beside, low, dy.bfloat16())])
    results.append([ref, *torch.autograd.grad(ref, exact, dy)])
    for a, c, b, t in zip(*results, (low[0], *low)):
        error, error_beside = (a.double() - b).norm(), (c.double() - b).norm()
        assert a.dtype == t.dtype and error < 0.01 * b.norm() and error < 1.5 * error_beside + 1e-6 * b.norm()


def test_merged_saves_only_its_input_for_the_backward():
    base, rows, (x, A, *B) = inputs((4, 3), (0, 1), 2)
    merged, kept = merge(base, 1.0, rows, A, *B), []
    known = {t.data_ptr() for t in (x, merged, A, *B)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        merged_linear(x, base, merged, 1.0, rows, A, *B)
    assert {t.data_ptr() for t in kept} == known


def test_a_backward_after_the_merged_weights_changed_is_refused():
    """W' is made again in place after an update; a graph that was built before must not use the new one."""
    base, rows, (x, A, *B) = inputs((4,), (0,), 2)
    merged = merge(base, 1.0, rows, A, *B)
    y = merged_linear(x, base, merged, 1.0, rows, A, *B)
    merged.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_merged_weights_of_another_layer_are_refused():
    base, rows, (x, A, *B) = inputs((4,), (0,), 2)
    with pytest.raises(AssertionError, match="merged"):
        merged_linear(x, base, base.weight[:3], 1.0, rows, A, *B)


def test_base_runs_whatever_function_it_is():
    """The sampler puts a packed copy of the weights behind the frozen layer: it must be called, not read."""
    base, rows, (x, A, *B) = inputs((4,), (0,), 2)
    calls = []

    class Packed:
        weight = base.weight

        def __call__(self, x):
            calls.append(1)
            return base(x)

    with torch.no_grad():
        ours = lora_linear(x, None, Packed(), 1.0, rows, A, *B)
        torch.testing.assert_close(ours, lora_linear_ref(x, None, base, 1.0, rows, A, *B))
    assert calls == [1]
