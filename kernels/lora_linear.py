"""A linear layer with low-rank adapters on some of its rows, forward and backward by hand (arXiv:2106.09685).

Two forms of one function, y = x (W + s B A)^T + b. Both have the same gradients.

beside: the adapters run beside the frozen layer. `lora_linear`, the one that knows dropout

    forward    h = s (x m) A^T           y = x W^T + b,    y[:, rows_k] += h_k B_k^T      for each adapter k
    backward   dh_k = s dy[:, rows_k] B_k                  dx = dy W + (dh A) m
               dA = dh^T (x m)                             dB_k = dy[:, rows_k]^T h_k

merged: W' = round(W + s B A) was made once, after the update that made A and B. `merged_linear`

    forward    y = x W'^T + b            one matmul, and only x is saved
    backward   dx = dy W'                h = s x A^T is made again;  dA and dB_k as above, without m

W, W' and b are frozen; m is dropout's mask over (1 - p), or absent. Merged, sampler and trainer are the
same function, that of the exported model, and W' must be made from W each time: adding and subtracting in
bf16 drifts. Rounding W' adds no error to what bf16 has anyway: mean |log-probability difference| to fp32 is
0.0154 nats with adapters beside and 0.0136 merged (Qwen2.5-0.5B, rank 32, bf16 on a CPU). It costs a second
copy of the wrapped weights where the frozen model is needed too, and it cannot do dropout.

Operations: 2 T D N forward and as many for dx, in both forms. With S = 2 T r (K D + the rows of all
adapters), beside adds S forward and 2 S backward, merged adds 2 S backward. An update of 50k tokens of a 0.5B
model took 422 ms with adapters beside and 365 merged, in a form made for that test (H100, commit 263d8c1).

On a CPU each thin product is added into the thick one in place: left to autograd a layer writes its (T, N)
output three times over (product, concatenation, sum), which costs as much as the thin matmuls themselves.
Measured forward and backward at T 2,272, r 16, SmolLM2-135M's four layers together, one core: autograd 504
ms, this 432, the frozen layers alone 384.

On a GPU the adapters are fp32 beside bf16 activations, and torch would copy x to fp32 and write s h B^T out
before it is added: 6 T D and 10 T N bytes. Here x is read once as it is (_shrink_kernel: 2 T D bytes, 54 %
of the floor and 4.9 times as fast as torch) and y is read and written once (_expand_kernel: 4 T N, 86 % and
2.7 times; bench/gpu.py, H100, commit 263d8c1), so an adapter costs about what its frozen layer's input and
output weigh. Products round fp32 adapters to tf32, bf16 activations not at all. With a few rows these are
launches without work: in decoding, rank 16 beside takes 3.69 ms a step where the frozen model takes 2.10.

Dims: T rows, D input width, N output width, K adapters, r rank of each; A has the K
thin matrices under each other.
"""

import torch
import torch.nn.functional as F

from kernels.switch import on_triton, tl, triton


def lora_linear_ref(x, mask, base, scale, rows, A, *B):
    """The definition of `lora_linear`, by autograd, in the dtype given."""
    y = base(x).clone()
    thin = x if mask is None else x * mask
    for where, Ak, Bk in zip(rows, A.chunk(len(B)), B):
        y[:, where] = y[:, where] + scale * (thin @ Ak.t() @ Bk.t())
    return y


def merged_linear_ref(x, base, scale, rows, A, *B):
    """The definition of `merged_linear`, by autograd through W + s B A, in the dtype given."""
    weight = base.weight.clone()
    for where, Ak, Bk in zip(rows, A.chunk(len(B)), B):
        weight[where] = weight[where] + scale * (Bk @ Ak)
    return F.linear(x, weight, base.bias)


def lora_linear(x, mask, base, scale, rows, A, *B):
    """x (T, D) -> (T, N), differentiable in x, A and B.

    base: the frozen layer, a function x -> (T, N) with a `weight` (N, D), or, where that is not held in full,
    with a method `input_grad`: dy -> dy W. mask (T, D) or None. rows: the slice of the outputs that each
    adapter is added to. A (K r, D) and B, K tensors (rows, r), have the base's dtype or a wider one, in which
    the thin products are then computed.
    """
    check_shapes(x, rows, A, B)
    return _LoRALinear.apply(x, mask, base, scale, rows, A, *B)


def merged_linear(x, base, merged, scale, rows, A, *B):
    """x (T, D) -> (T, N) by the constant merged (N, D) = round(W + s B A); differentiable in x, A and B.

    The gradients are those of x (W + s B A)^T, where dx is taken at `merged`, which must have
    been made from these A and B. base: the frozen layer, of which only the bias is used, (N,) or
    None. The rest as in `lora_linear`.
    """
    check_shapes(x, rows, A, B)
    assert merged.shape == base.weight.shape, f"merged {tuple(merged.shape)}, W {tuple(base.weight.shape)}"
    return _MergedLinear.apply(x, merged, base.bias, scale, rows, A, *B)


def check_shapes(x, rows, A, B):
    shapes = f"x {tuple(x.shape)}, A {tuple(A.shape)}, {len(rows)} slices, {len(B)} B"
    ranks = sum(b.shape[1] for b in B)
    assert len(rows) == len(B) and A.shape == (ranks, x.shape[1]), shapes


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, base, scale, rows, A, *B):
        y = base(x)
        if mask is not None:
            x = x * mask
        h = thin_product(x, A, scale)  # (T, K r)
        for where, hk, Bk in zip(rows, h.chunk(len(B), -1), B):
            add_product_(y[:, where], hk, Bk.t())
        # An expanded weight is not kept: that of all layers would be the whole model (nf4.py).
        ctx.save_for_backward(x, mask, getattr(base, "weight", None), h, A, *B)
        ctx.base, ctx.scale, ctx.rows = base, scale, rows
        return y

    @staticmethod
    def backward(ctx, dy):
        x, mask, weight, h, A, *B = ctx.saved_tensors
        dh, dA, dB = adapter_grads(dy, x, h, ctx.scale, ctx.rows, B)
        dx = None
        if ctx.needs_input_grad[0]:  # the first layer's input has nothing to learn below it
            dx = ctx.base.input_grad(dy) if weight is None else dy @ weight
            if mask is None:
                dx = add_product_(dx, dh, A)
            else:
                dx.add_((dh @ A).mul_(mask))
        return dx, None, None, None, None, dA, *dB


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, merged, bias, scale, rows, A, *B):
        ctx.save_for_backward(x, merged, A, *B)  # all but x are there anyway
        ctx.scale, ctx.rows = scale, rows
        return F.linear(x, merged, bias)

    @staticmethod
    def backward(ctx, dy):
        x, merged, A, *B = ctx.saved_tensors
        h = thin_product(x, A, ctx.scale)  # (T, K r)
        _, dA, dB = adapter_grads(dy, x, h, ctx.scale, ctx.rows, B)
        dx = dy @ merged if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, dA, *dB


def adapter_grads(dy, x, h, scale, rows, B):
    """dh (T, K r), dA (K r, D) and the list of the K dB, from dy (T, N), the adapters' input x and h."""
    dh = torch.empty_like(h)
    fused = on_triton(dy)
    wide = dy if fused else dy.to(h.dtype)
    dB = []
    for where, hk, dhk, Bk in zip(rows, h.chunk(len(B), -1), dh.chunk(len(B), -1), B):
        dyk = wide[:, where]
        dB.append(outer(dyk, hk))
        if fused:
            shrink(dyk, Bk.t(), 1.0, dhk)
        else:
            torch.mm(dyk, Bk, out=dhk)
    dA = outer(dh.mul_(scale), x)
    return dh, dA, dB


def outer(a, b):
    """a^T b (m, n) of a (T, m) and b (T, n), in the wider dtype of the two.

    Where one of them is bf16 on a GPU, both are for the product, which is added up in fp32.
    """
    if a.is_cuda and a.dtype != b.dtype and torch.float64 not in (a.dtype, b.dtype):
        return torch.mm(a.t().to(torch.bfloat16), b.to(torch.bfloat16), out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, b.dtype)
    return a.t().to(wide) @ b.to(wide)


def thin_product(x, A, scale):
    """scale x A^T: x (T, D), A (K r, D) -> (T, K r) in A's dtype."""
    if on_triton(x):
        return shrink(x, A, scale)
    return (x.to(A.dtype) @ A.t()).mul_(scale)


def add_product_(y, a, b):
    """y += a b, in place; where y is bf16 and a, b are fp32 the sum is rounded once."""
    if on_triton(y):
        return expand_(y, a, b)
    return y.addmm_(a, b) if y.dtype == a.dtype else y.add_(a @ b)


# ------------------------------------------------------------------------------------------------- on a GPU
def shrink(x, A, scale, out=None):
    """scale x A^T: x (T, D), rows anywhere, A (r, D), any strides -> out (T, r), rows anywhere."""
    (T, D), r = x.shape, len(A)
    if x.stride(1) != 1:
        x = x.contiguous()
    if out is None:
        out = torch.empty(T, r, dtype=A.dtype, device=x.device)
    if T:
        # at rank 64 the longer tile spills registers on sm_80 (Triton 3.6)
        size = dict(BT=32, BD=64 if r <= 32 else 32, **rank_options(r, x))
        strides = x.stride(0), A.stride(0), A.stride(1), out.stride(0)
        _shrink_kernel[(triton.cdiv(T, 32),)](x, A, out, T, D, r, scale, *strides, **size)
    return out


def expand_(y, h, B):
    """y += h B in place: y (T, N), rows anywhere, h (T, r), rows anywhere, B (r, N) any strides."""
    (T, N), r = y.shape, h.shape[1]
    if T:
        size = dict(BT=64, BN=128, **rank_options(r, y))
        strides = y.stride(0), h.stride(0), B.stride(0), B.stride(1)
        _expand_kernel[(triton.cdiv(T, 64), triton.cdiv(N, 128))](y, h, B, T, N, r, *strides, **size)
    return y


def rank_options(r, thick) -> dict:
    """At least 16 columns for a tensor core. tf32 loses nothing of bf16; fp32 asks for exactness."""
    precision = "ieee" if thick.dtype == torch.float32 else "tf32"
    return dict(BR=max(16, triton.next_power_of_2(r)), PRECISION=precision, num_warps=4)


@triton.jit
def _shrink_kernel(
    x, A, out, T, D, r, scale, x_row, A_row, A_column, out_row,
    BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for BT rows: the whole of A passes by."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, BR)
    d = tl.arange(0, BD)
    t_real = (t < T)[:, None]
    k_real = (k < r)[None, :]
    t = t.to(tl.int64)[:, None]
    k = k[None, :]
    acc = tl.zeros((BT, BR), tl.float32)
    for start in range(0, D, BD):
        j = start + d
        x_at = x + t * x_row + j[None, :]
        xt = tl.load(x_at, mask=t_real & (j < D)[None, :], other=0.0)
        A_at = A + k * A_row + j[:, None] * A_column
        At = tl.load(A_at, mask=k_real & (j < D)[:, None], other=0.0)
        acc = tl.dot(xt.to(tl.float32), At.to(tl.float32), acc, input_precision=PRECISION)
    acc = acc * scale
    tl.store(out + t * out_row + k, acc.to(out.dtype.element_ty), mask=t_real & k_real)


@triton.jit
def _expand_kernel(
    y, h, B, T, N, r, y_row, h_row, B_row, B_column,
    BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for BT rows and BN columns of y."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BR)
    t_real = (t < T)[:, None]
    j_real = (j < N)[None, :]
    t = t.to(tl.int64)[:, None]
    j = j[None, :]
    h_at = h + t * h_row + k[None, :]
    ht = tl.load(h_at, mask=t_real & (k < r)[None, :], other=0.0).to(tl.float32)
    B_at = B + k[:, None] * B_row + j * B_column
    Bt = tl.load(B_at, mask=(k < r)[:, None] & j_real, other=0.0).to(tl.float32)
    y_at = y + t * y_row + j
    before = tl.load(y_at, mask=t_real & j_real, other=0.0).to(tl.float32)
    after = before + tl.dot(ht, Bt, input_precision=PRECISION)
    tl.store(y_at, after.to(y.dtype.element_ty), mask=t_real & j_real)
