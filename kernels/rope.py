"""Rotary embedding (arXiv:2104.09864), and the writing of a decoding step's keys and values into the cache.

    (a, b) = halves of a head        y = (a cos - b sin,  b cos + a sin)        da = dya cos + dyb sin,  db = dyb cos - dya sin

The gradient is the rotation back, so one kernel does both with the sign of sin turned. Pairs are (i, i + E/2), as in Hugging Face checkpoints.
Bytes: x read, y written, each once (torch: six products and sums and a concatenation, on a GPU seven launches). A decoding step
writes k and v of every row to its own place: one launch here, four in torch (two copies out of the strided matmul, two scatters).

Dims: T tokens, `heads` of a token, E head width; n rows, K key heads, C places of a slot.
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


def rotate_ref(x, cos, sin):
    """The definition, in the dtype given; arguments as `rotate`."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotate(x, cos, sin):
    """x (T, heads, E) by cos and sin (T, 1, E/2) -> (T, heads, E), differentiable in x."""
    # on a CPU by hand as an autograd.Function it measured the same as this: the products are in the cache
    return _Rotate.apply(x, cos, sin) if on_triton(x) else rotate_ref(x, cos, sin)


def store_keys(k, v, cache_k, cache_v, places):
    """k[i], v[i] (K, E) of row i go to cache[slot i, :, places[i]]. k, v (n, K, E), caches (slots, K, C, E) contiguous, places (n,) int64."""
    n, K, E = k.shape
    if on_triton(k):
        k, v = (x if x.stride(2) == 1 and x.stride(1) == E else x.contiguous() for x in (k, v))
        _store_kernel[(n, K)](k, v, cache_k, cache_v, places, k.stride(0), v.stride(0), K, cache_k.shape[2], E, BLOCK=triton.next_power_of_2(E), num_warps=1)
    else:
        cache_k[torch.arange(n, device=k.device), :, places], cache_v[torch.arange(n, device=k.device), :, places] = k, v


@triton.jit
def _rotate_kernel(x, cos, sin, y, sign, x_token, y_token, heads, E: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """A program a token: all heads share its angles. sign 1 rotates, -1 rotates back."""
    t, h, i = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS), tl.arange(0, HALF)
    half: tl.constexpr = E // 2
    c = tl.load(cos + t * half + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + t * half + i, mask=i < half, other=0.0).to(tl.float32)[None, :] * sign
    mask, place = (h < heads)[:, None] & (i < half)[None, :], h[:, None] * E + i[None, :]
    a = tl.load(x + t * x_token + place, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + t * x_token + place + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + t * y_token + place, (a * c - b * s).to(y.dtype.element_ty), mask=mask)
    tl.store(y + t * y_token + place + half, (b * c + a * s).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _store_kernel(k, v, cache_k, cache_v, places, k_token, v_token, K, C, E, BLOCK: tl.constexpr):
    row, head, e = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    to = ((row * K + head) * C + tl.load(places + row)) * E + e
    tl.store(cache_k + to, tl.load(k + row * k_token + head * E + e, mask=e < E), mask=e < E)
    tl.store(cache_v + to, tl.load(v + row * v_token + head * E + e, mask=e < E), mask=e < E)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, sign=1.0):
        T, heads, E = x.shape
        assert E % 2 == 0 and cos.numel() == sin.numel() == T * E // 2, f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        x, cos, sin = x if x.stride(2) == 1 and x.stride(1) == E else x.contiguous(), cos.contiguous(), sin.contiguous()
        y = torch.empty(T, heads, E, dtype=x.dtype, device=x.device)
        if T:
            _rotate_kernel[(T,)](x, cos, sin, y, sign, x.stride(0), heads * E, heads, E=E, HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(E // 2), num_warps=4)
        ctx.save_for_backward(cos, sin)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _Rotate.apply(dy, *ctx.saved_tensors, -1.0), None, None, None
