"""Rotary embedding (arXiv:2104.09864), and the writing of a decoding step's keys and values into the cache.

    forward    (a, b) = the two halves of a head     ya = a cos - b sin        yb = b cos + a sin
    backward                                         da = dya cos + dyb sin    db = dyb cos - dya sin

The gradient is the rotation back, so one kernel does both, with the sign of sin turned. Pairs are (i, i +
E/2), as in Hugging Face checkpoints.

Bytes: x is read once and y written once, 4 E a head in bf16; cos and sin, 2 E a token, are shared by its
heads. Six operations a pair. torch makes six products and sums and a concatenation, on a GPU seven
launches: 1.6 times the time at 16,384 tokens of 14 heads of 128 (bench/gpu.py, H100, commit 263d8c1),
though ours waits for its launches there: 20 % of what memory allows. A decoding step writes k and v of
every row to its own place: one launch here, four in torch (two copies out of the strided matmul, two
scatters). With few tokens both wait for their launches, about 42 us for each of Triton's and 12 to 18 us
for each of torch's; where a CUDA graph hides those, only the bytes count.

Any float dtype; the Triton form computes in fp32 and rounds once. fp64 takes the torch form.

Dims: T tokens, `heads` of a token, E head width; n rows, K key heads, C places of a slot.
"""

import torch

from kernels.switch import on_triton, tl, triton


def rotate_ref(x, cos, sin):
    """The definition, in the dtype given; arguments as `rotate`."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotate(x, cos, sin):
    """x (T, heads, E) by cos and sin (T, 1, E/2) -> (T, heads, E), differentiable in x."""
    if on_triton(x):
        return _Rotate.apply(x, cos, sin)
    # an autograd.Function by hand measured the same on a CPU: the products are still in the cache
    return rotate_ref(x, cos, sin)


def store_keys(k, v, cache_k, cache_v, places):
    """k[i], v[i] (K, E) of row i go to cache[slot i, :, places[i]].

    k, v (n, K, E); caches (slots, K, C, E) contiguous; places (n,) int64, also a column of a table.
    """
    n, K, E = k.shape
    C = cache_k.shape[2]
    if on_triton(k):
        k, v = heads_together(k), heads_together(v)
        BLOCK = triton.next_power_of_2(E)
        strides = k.stride(0), v.stride(0), places.stride(0)
        _store_kernel[(n, K)](k, v, cache_k, cache_v, places, *strides, K, C, E, BLOCK=BLOCK, num_warps=1)
    else:
        slots = torch.arange(n, device=k.device)
        cache_k[slots, :, places] = k
        cache_v[slots, :, places] = v


def heads_together(x):
    """x (T, heads, E) as the kernels read it: a token's heads lie one after another; tokens may be apart."""
    T, heads, E = x.shape
    return x if x.stride(2) == 1 and x.stride(1) == E else x.contiguous()


# ----------------------------------------------------------------------------------------- on a GPU
class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, sign=1.0):
        T, heads, E = x.shape
        shapes = f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        assert E % 2 == 0 and cos.numel() == sin.numel() == T * E // 2, shapes
        x, cos, sin = heads_together(x), cos.contiguous(), sin.contiguous()
        y = torch.empty(T, heads, E, dtype=x.dtype, device=x.device)
        if T:
            size = dict(E=E, HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(E // 2))
            _rotate_kernel[(T,)](x, cos, sin, y, sign, x.stride(0), heads * E, heads, **size, num_warps=4)
        ctx.save_for_backward(cos, sin)
        return y

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(dy, cos, sin, -1.0), None, None, None


@triton.jit
def _rotate_kernel(
    x, cos, sin, y, sign, x_token, y_token, heads,
    E: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program a token: all heads share its angles. sign 1 rotates, -1 rotates back."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    half: tl.constexpr = E // 2
    c = tl.load(cos + t * half + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + t * half + i, mask=i < half, other=0.0).to(tl.float32)[None, :] * sign
    real = (h < heads)[:, None] & (i < half)[None, :]
    place = h[:, None] * E + i[None, :]
    a_at = x + t * x_token + place
    a = tl.load(a_at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(a_at + half, mask=real, other=0.0).to(tl.float32)
    out_at = y + t * y_token + place
    tl.store(out_at, (a * c - b * s).to(y.dtype.element_ty), mask=real)
    tl.store(out_at + half, (b * c + a * s).to(y.dtype.element_ty), mask=real)


@triton.jit
def _store_kernel(k, v, cache_k, cache_v, places, k_token, v_token, place_row, K, C, E, BLOCK: tl.constexpr):
    """One program for a row and a head."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    e = tl.arange(0, BLOCK)
    to = ((row * K + head) * C + tl.load(places + row * place_row)) * E + e
    key = tl.load(k + row * k_token + head * E + e, mask=e < E)
    tl.store(cache_k + to, key, mask=e < E)
    value = tl.load(v + row * v_token + head * E + e, mask=e < E)
    tl.store(cache_v + to, value, mask=e < E)
