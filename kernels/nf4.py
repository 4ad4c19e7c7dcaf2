"""Weights of 4 bits expanded: two weights a byte, one scale for 64 of them (NF4, arXiv:2305.14314).

    scale[b] = code[absmax[b]] nested_absmax[b // 256] + offset       absmax uint8; or fp32, the scale itself
    w[i]     = NF4[nibble i] scale[i // 64]                           the high half of a byte comes first

The 16 values of NF4 are quantiles of a normal distribution between -1 and 1, which is how weights lie within
a block. The scales are quantised themselves, to 8 bits in blocks of 256 after their mean (`offset`) is taken
off: 4.127 bits a weight instead of 4.5. Every operation is in fp32 and rounded by itself, as bitsandbytes
does it, and the product is rounded once to the dtype of `out`. A multiplication and an addition fused into
one would give other last bits, so the kernel is compiled without fusing.

Bytes a weight in bf16: 0.516 read and 2 written, and about 8 operations, so memory is the limit: a layer of
Qwen2.5-7B (233M weights) should take 0.18 ms of an H100's 3.35 TB/s. It has not been measured on a GPU.
torch on a CPU looks a byte's two values up at once and multiplies by the scale in place: 1.1 ns a weight on
one core (SmolLM2-135M's layers).

Dims: n weights of one projection, flat, in blocks of 64; the last block may be shorter.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from kernels.switch import on_triton, tl, triton

# The 16 values, bit for bit those of bitsandbytes (Appendix E of the paper gives them rounded otherwise).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # weights that share a scale
NESTED = 256  # scales that share a scale of their own
PIECE = {"cpu": 4096, "cuda": 1 << 20}  # blocks that torch expands at once


def expand_ref(packed, absmax, nested_absmax, code, offset, n):
    """The definition: (n,) fp32. The arguments are those of `expand`."""
    high, low = packed.long() >> 4, packed.long() & 15
    nibbles = torch.stack([high, low], 1).reshape(-1)[:n]
    scale = absmax
    if code is not None:
        b = torch.arange(len(absmax), device=absmax.device)
        scale = code[absmax.long()] * nested_absmax[b // NESTED] + offset
    values = torch.tensor(NF4, device=packed.device)
    return values[nibbles] * scale[torch.arange(n, device=packed.device) // BLOCK]


def expand(packed, absmax, nested_absmax, code, offset, out):
    """Writes the weights into `out`, any contiguous floating tensor of n numbers. Returns it.

    packed (ceil(n / 2),) uint8. absmax (ceil(n / 64),) uint8 with nested_absmax (ceil(that / 256),), code
    (256,) and offset () fp32; or absmax fp32, which is the scale itself, and the other three None.
    """
    n = out.numel()
    blocks = triton_cdiv(n, BLOCK)
    shapes = f"{n} weights, packed {tuple(packed.shape)}, absmax {tuple(absmax.shape)}"
    assert len(packed) == triton_cdiv(n, 2) and len(absmax) == blocks and out.is_contiguous(), shapes
    if on_triton(out):
        launch(packed, absmax, nested_absmax, code, offset, out)
        return out
    scale = absmax
    if code is not None:
        scale = scales(absmax, nested_absmax, code, offset)
    # One look-up a byte: its two values lie side by side, as one number of 64 bits. index_select takes a
    # third of the time of table[..]. A piece at a time, so that what lies between stays in a CPU's cache.
    table, flat = pair_table(packed.device), out.view(-1)
    size = PIECE.get(packed.device.type, PIECE["cuda"])
    for some, of_piece, piece in zip(packed.split(size * 32), scale.split(size), flat.split(size * BLOCK)):
        some = F.pad(some, (0, len(of_piece) * 32 - len(some)))
        pairs = table.index_select(0, some.int())  # (bytes,) int64
        values = pairs.view(torch.float32).view(-1, BLOCK).mul_(of_piece[:, None])
        piece.copy_(values.view(-1)[: len(piece)])
    return out


def triton_cdiv(n: int, size: int) -> int:
    return -(-n // size)


def scales(absmax, nested_absmax, code, offset):
    """The scale of each block, fp32, from its 8 bits."""
    nested = nested_absmax.repeat_interleave(NESTED)[: len(absmax)]
    return code.index_select(0, absmax.int()).mul_(nested).add_(offset)


@lru_cache
def pair_table(device):
    """(256,) int64: for each byte the bits of its two fp32 values, the high half's first."""
    values = torch.tensor(NF4)
    byte = torch.arange(256)
    return torch.stack([values[byte >> 4], values[byte & 15]], 1).view(torch.int64)[:, 0].to(device)


@lru_cache
def value_table(device):
    return torch.tensor(NF4, device=device)


# ----------------------------------------------------------------------------------------- on a GPU
def launch(packed, absmax, nested_absmax, code, offset, out):
    """One program for 64 blocks: 2 KB of nibbles in, 8 KB of bf16 out."""
    n, nested = out.numel(), code is not None
    if not nested:  # the kernel does not read these
        nested_absmax = code = offset = absmax
    tensors = packed, absmax, nested_absmax, code, offset, value_table(out.device), out
    grid = (triton.cdiv(n, 64 * BLOCK),)
    _expand_kernel[grid](*tensors, n, len(packed), NESTED=nested, BB=64, num_warps=4, enable_fp_fusion=False)


@triton.jit
def _expand_kernel(
    packed, absmax, nested_absmax, code, offset, values, out, n, n_bytes,
    NESTED: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    j = tl.arange(0, 32)
    scale = tl.load(absmax + b, mask=b * 64 < n, other=0)
    if NESTED:
        nested = tl.load(nested_absmax + b // 256, mask=b * 64 < n, other=0.0)
        scale = tl.load(code + scale.to(tl.int32)) * nested + tl.load(offset)
    at = b[:, None] * 32 + j[None, :]  # of the byte
    # Compared with a number of bytes, Triton sees that 16 of them are there or not together: one load.
    byte = tl.load(packed + at, mask=at < n_bytes, other=0).to(tl.int32)
    high = tl.load(values + (byte >> 4)) * scale[:, None]
    low = tl.load(values + (byte & 15)) * scale[:, None]
    w = tl.interleave(high, low)  # (BB, 64)
    i = b[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + i, w.to(out.dtype.element_ty), mask=i < n)
