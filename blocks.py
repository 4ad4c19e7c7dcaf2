"""Numbers of 8 bits in blocks: a block's largest magnitude in fp32, each number as one of 256 shares of it.

    numbers, absmax = quantise(x, 256, signed=True)              # uint8 like x, one fp32 a block
    expand(numbers, absmax, dynamic_map(signed=True), 256)       # near x

The 256 shares are 'dynamic' (arXiv:1511.04561): a leading run of bits is the exponent, seven decades of it,
and what is left of the 8 bits the fraction. So large numbers of a block keep about 1 % and small ones are not
lost, which is what the moments of Adam need (arXiv:2110.02861). The scales of weights in 4 bits are kept so,
too (nf4.py).

The map is bitsandbytes' to the bit. So are the numbers wherever theirs is the nearest share: its CUDA form
takes the nearest, its CPU form a neighbour of it in 0.15 % (signed) to 3 % (unsigned) of cases.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Least magnitude that a block is divided by: a block of zeros stays zeros.
TINY = 1e-38


@lru_cache
def dynamic_map(signed: bool, device="cpu") -> Tensor:
    """(256,) fp32, ascending: 0, 1, and for each decade down to 1e-6 shares in the middle of equal steps.

    Signed: 1, 2, 4, .. 64 steps a decade and the same below zero, down to -0.993. Unsigned: twice as many.
    """
    shares = [0.0, 1.0]
    for decade in range(7):
        steps = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        found = (10 ** (decade - 6) * middles).tolist()
        shares += found
        if signed:
            shares += [-share for share in found]
    return torch.tensor(sorted(shares), dtype=torch.float32).to(device)


def quantise(x: Tensor, size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """(uint8 of x's shape, absmax (ceil(numbers / size),) fp32) of a floating x, in blocks of `size`."""
    n = x.numel()
    blocks = F.pad(x.reshape(-1).float(), (0, -n % size)).view(-1, size)
    absmax = blocks.abs().amax(1)
    shares = blocks / absmax.clamp(min=TINY)[:, None]
    return nearest(shares.view(-1), signed)[:n].view(x.shape), absmax


def expand(numbers: Tensor, absmax: Tensor, code: Tensor, size: int) -> Tensor:
    """fp32 of numbers' shape: each one's share, of the 256 in `code`, times the absmax of its block."""
    n = numbers.numel()
    shares = code.index_select(0, numbers.reshape(-1).int())  # in a third of the time of code[..]
    shares = F.pad(shares, (0, -n % size)).view(-1, size)
    return shares.mul_(absmax[:, None]).view(-1)[:n].view(numbers.shape)


def nearest(shares: Tensor, signed: bool) -> Tensor:
    """uint8: which of the map is nearest, for fp32 shares (n,) between -1 and 1; of two the lower.

    torch.bucketize by the midpoints says the same, in 36 ns a number on a CPU core, and this in 2. The upper
    16 bits of a number (sign, exponent, 7 of the mantissa) leave at most one midpoint open, and one
    comparison decides.
    """
    least, midpoints = tables(signed, shares.device)
    upper = (shares.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    found = least.index_select(0, upper)
    found += shares > midpoints.index_select(0, found.int())
    return found


@lru_cache
def tables(signed: bool, device) -> tuple[Tensor, Tensor]:
    """For `nearest`: the least answer for each 16 upper bits, uint8 (65536,), and the midpoints (256,)."""
    code = dynamic_map(signed)
    midpoints = (code[:-1] + code[1:]) / 2
    upper = torch.arange(65536, dtype=torch.int32) << 16
    ends = torch.stack([upper.view(torch.float32), (upper | 0xFFFF).view(torch.float32)])
    lowest, highest = ends.aminmax(dim=0)
    least = torch.bucketize(lowest, midpoints)
    most = torch.bucketize(highest, midpoints)
    within = (highest >= code[0]) & (lowest <= code[-1])  # not the upper bits of NaN
    assert (most - least)[within].max() <= 1, "two midpoints within 16 bits: these shares lie too close"
    never = torch.full((1,), torch.inf)
    return least.to(torch.uint8).to(device), torch.cat([midpoints, never]).to(device)
