"""A linear layer with low-rank adapters on some of its rows, forward and backward by hand (arXiv:2106.09685).

    h = s (x m) A^T              y = x W^T + b,       y[:, rows_k] += h_k B_k^T             for each adapter k
    dh_k = s dy[:, rows_k] B_k   dx = dy W + (dh A) m    dA = dh^T (x m)    dB_k = dy[:, rows_k]^T h_k

W and b are frozen. m is dropout's mask over (1 - p), or absent. Each thin product is added into the thick one in place: left to
autograd a layer writes its (T, N) output three times over (product, concatenation, sum), which on a CPU costs as much as the thin
matmuls themselves. Measured forward and backward at T 2,272, r 16, SmolLM2-135M's four layers together, one core: autograd 504 ms, this
432, the frozen layers alone 384.

On a GPU the adapters are fp32 beside bf16 activations, and torch would copy x to fp32 and write s h B^T out before it is added: 6 T D and
10 T N bytes. Here x is read once as it is (_shrink_kernel) and y read and written once (_expand_kernel): 2 T D and 4 T N, so an adapter
costs about what its frozen layer's input and output weigh. Products round fp32 adapters to tf32, bf16 activations not at all.

Dims: T rows, D input width, N output width, K adapters, r rank of each; A has the K thin matrices under each other.
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


def lora_linear_ref(x, mask, base, scale, rows, A, *B):
    """The definition, by autograd, in the dtype given."""
    y, thin = base(x).clone(), (x if mask is None else x * mask)
    for where, Ak, Bk in zip(rows, A.chunk(len(B)), B):
        y[:, where] = y[:, where] + scale * (thin @ Ak.t() @ Bk.t())
    return y


def lora_linear(x, mask, base, scale, rows, A, *B):
    """x (T, D) -> (T, N), differentiable in x, A and B.

    base: the frozen layer, a function x -> (T, N) with a `weight` (N, D); mask (T, D) or None; rows: slice of the outputs each adapter is
    added to; A (K r, D), B: K tensors (rows, r), in the base's dtype or a wider one, in which the thin products are then computed.
    """
    assert len(rows) == len(B) and A.shape == (sum(b.shape[1] for b in B), x.shape[1]), f"x {tuple(x.shape)}, A {tuple(A.shape)}, {len(rows)} slices, {len(B)} B"
    return _LoRALinear.apply(x, mask, base, scale, rows, A, *B)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, base, scale, rows, A, *B):
        y, x = base(x), x if mask is None else x * mask
        h = shrink(x, A, scale) if on_triton(x) else (x.to(A.dtype) @ A.t()).mul_(scale)  # (T, K r)
        for where, hk, Bk in zip(rows, h.chunk(len(B), -1), B):
            add_product_(y[:, where], hk, Bk.t())
        ctx.save_for_backward(x, mask, base.weight, h, A, *B)
        ctx.scale, ctx.rows = scale, rows
        return y

    @staticmethod
    def backward(ctx, dy):
        x, mask, weight, h, A, *B = ctx.saved_tensors
        wide, dh, dB = dy if on_triton(dy) else dy.to(A.dtype), torch.empty_like(h), []
        for where, hk, dhk, Bk in zip(ctx.rows, h.chunk(len(B), -1), dh.chunk(len(B), -1), B):
            dB.append(outer(wide[:, where], hk))
            if on_triton(dy):
                shrink(wide[:, where], Bk.t(), 1.0, dhk)
            else:
                torch.mm(wide[:, where], Bk, out=dhk)
        dA, dx = outer(dh.mul_(ctx.scale), x), None
        if ctx.needs_input_grad[0]:  # the first layer's input has nothing to learn below it
            dx = dy @ weight
            dx = add_product_(dx, dh, A) if mask is None else dx.add_((dh @ A).mul_(mask))
        return dx, None, None, None, None, dA, *dB


def outer(a, b):
    """a^T b (.., ..) of a (T, m) and b (T, n) in the wider dtype of the two; on a GPU bf16 where one of them is, added up in fp32."""
    if a.is_cuda and a.dtype != b.dtype and torch.float64 not in (a.dtype, b.dtype):
        return torch.mm(a.t().to(torch.bfloat16), b.to(torch.bfloat16), out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, b.dtype)
    return a.t().to(wide) @ b.to(wide)


def add_product_(y, a, b):
    """y += a b, in place; where y is bf16 and a, b are fp32 the sum is rounded once."""
    if on_triton(y):
        return expand_(y, a, b)
    return y.addmm_(a, b) if y.dtype == a.dtype else y.add_(a @ b)


# ------------------------------------------------------------------------------------------------------------ on a GPU
def shrink(x, A, scale, out=None):
    """scale x A^T: x (T, D), rows anywhere, A (r, D) any strides -> out (T, r), rows anywhere, in A's dtype."""
    (T, D), r = x.shape, len(A)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(T, r, dtype=A.dtype, device=x.device) if out is None else out
    if T:  # BD: at rank 64 the longer tile spills registers on sm_80 (Triton 3.6)
        _shrink_kernel[(triton.cdiv(T, 32),)](x, A, out, T, D, r, scale, x.stride(0), A.stride(0), A.stride(1), out.stride(0), BT=32, BD=64 if r <= 32 else 32,
                                              BR=max(16, triton.next_power_of_2(r)), PRECISION="tf32" if x.dtype != torch.float32 else "ieee", num_warps=4)
    return out


def expand_(y, h, B):
    """y += h B in place: y (T, N), rows anywhere, h (T, r), rows anywhere, B (r, N) any strides."""
    (T, N), r = y.shape, h.shape[1]
    if T:
        _expand_kernel[(triton.cdiv(T, 64), triton.cdiv(N, 128))](y, h, B, T, N, r, y.stride(0), h.stride(0), B.stride(0), B.stride(1), BT=64, BN=128,
                                                                  BR=max(16, triton.next_power_of_2(r)), PRECISION="tf32" if y.dtype != torch.float32 else "ieee", num_warps=4)
    return y


@triton.jit
def _shrink_kernel(x, A, out, T, D, r, scale, x_row, A_row, A_column, out_row, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr):
    t, k, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BR), tl.arange(0, BD)
    acc = tl.zeros((BT, BR), tl.float32)
    for start in range(0, D, BD):
        j = start + d
        xt = tl.load(x + t.to(tl.int64)[:, None] * x_row + j[None, :], mask=(t < T)[:, None] & (j < D)[None, :], other=0.0).to(tl.float32)
        At = tl.load(A + k[None, :] * A_row + j[:, None] * A_column, mask=(k < r)[None, :] & (j < D)[:, None], other=0.0).to(tl.float32)
        acc = tl.dot(xt, At, acc, input_precision=PRECISION)
    tl.store(out + t.to(tl.int64)[:, None] * out_row + k[None, :], (acc * scale).to(out.dtype.element_ty), mask=(t < T)[:, None] & (k < r)[None, :])


@triton.jit
def _expand_kernel(y, h, B, T, N, r, y_row, h_row, B_row, B_column, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr):
    t, j, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BR)
    ht = tl.load(h + t.to(tl.int64)[:, None] * h_row + k[None, :], mask=(t < T)[:, None] & (k < r)[None, :], other=0.0).to(tl.float32)
    Bt = tl.load(B + k[:, None] * B_row + j[None, :] * B_column, mask=(k < r)[:, None] & (j < N)[None, :], other=0.0).to(tl.float32)
    place, mask = y + t.to(tl.int64)[:, None] * y_row + j[None, :], (t < T)[:, None] & (j < N)[None, :]
    added = tl.load(place, mask=mask, other=0.0).to(tl.float32) + tl.dot(ht, Bt, input_precision=PRECISION)
    tl.store(place, added.to(y.dtype.element_ty), mask=mask)
