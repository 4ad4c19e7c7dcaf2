"""Rotary embedding (arXiv:2104.09864), and the writing of a decoding step's keys and values into the cache.

    forward    (a, b) = the two halves of a head     ya = a cos - b sin        yb = b cos + a sin
    backward                                         da = dya cos + dyb sin    db = dyb cos - dya sin

The gradient is the rotation back, so one kernel does both, with the sign of sin turned. Pairs are (i, i +
E/2), as in Hugging Face checkpoints.

Bytes: x is read once and y written once, 4 E a head in bf16; cos and sin, 2 E a token, are shared by its
heads. Six operations a pair. torch makes six products and sums and a concatenation, on a GPU seven
launches: 1.6 times the time at 16,384 tokens of 14 heads of 128 (bench/gpu.py, H100, commit 263d8c1),
though ours waits for its launches there: 20 % of what memory allows. In a decoding step k and v of every
row also go to places of their own: rotation and writing are one launch here. With few tokens both wait for
their launches, about 42 us for each of Triton's and 12 to 18 us for each of torch's; where a CUDA graph hides
those, only the bytes count.

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


def rotate_into_cache(qk, v, cos, sin, cache_k, cache_v, places):
    """Rotates a decoding step's queries and keys; row i's keys and values go to cache[slot i, :, places[i]].

    qk (n, H + K, E), the queries first; v (n, K, E); cos and sin (n, 1, E/2); caches (slots, K, C, E)
    contiguous; places (n,) int64, also a column of a table. Returns the queries (n, H, E). Without gradient.
    """
    n, K, E = v.shape
    H, C = qk.shape[1] - K, cache_k.shape[2]
    if not on_triton(qk):
        q, k = rotate(qk, cos, sin).split([H, K], 1)
        slots = torch.arange(n, device=k.device)
        cache_k[slots, :, places] = k
        cache_v[slots, :, places] = v
        return q
    qk, v = heads_together(qk), heads_together(v)
    q = torch.empty(n, H, E, dtype=qk.dtype, device=qk.device)
    size = dict(E=E, HEADS=triton.next_power_of_2(H + K), HALF=triton.next_power_of_2(E // 2))
    strides = qk.stride(0), v.stride(0), places.stride(0)
    _cache_kernel[(n,)](qk, v, cos, sin, q, cache_k, cache_v, places, *strides, H, K, C, **size, num_warps=4)
    return q


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
def _cache_kernel(
    qk, v, cos, sin, q, cache_k, cache_v, places, qk_token, v_token, place_row, H, K, C,
    E: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program a row: rotates its heads as `_rotate_kernel` and takes each to where it belongs."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    half: tl.constexpr = E // 2
    c = tl.load(cos + row * half + i, mask=i < half, other=0.0).to(tl.float32)
    s = tl.load(sin + row * half + i, mask=i < half, other=0.0).to(tl.float32)
    a_at = qk + row * qk_token + h * E + i
    a = tl.load(a_at, mask=(h < H + K) & (i < half), other=0.0).to(tl.float32)
    b = tl.load(a_at + half, mask=(h < H + K) & (i < half), other=0.0).to(tl.float32)
    ya = (a * c - b * s).to(q.dtype.element_ty)
    yb = (b * c + a * s).to(q.dtype.element_ty)
    is_query = (h < H) & (i < half)
    query_at = q + (row * H + h) * E + i
    tl.store(query_at, ya, mask=is_query)
    tl.store(query_at + half, yb, mask=is_query)
    is_key = (h >= H) & (h < H + K) & (i < half)
    cell = ((row * K + h - H) * C + tl.load(places + row * place_row)) * E + i
    tl.store(cache_k + cell, ya, mask=is_key)
    tl.store(cache_k + cell + half, yb, mask=is_key)
    value_at = v + row * v_token + (h - H) * E + i
    tl.store(cache_v + cell, tl.load(value_at, mask=is_key), mask=is_key)
    tl.store(cache_v + cell + half, tl.load(value_at + half, mask=is_key), mask=is_key)
