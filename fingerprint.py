"""Eight bytes that say whether two runs are the same: 16 hex digits a step, `fingerprint` in metrics.jsonl.

    "fingerprint": "5e0c41d9a83b7f02"     # eight digits of the ids drawn, eight of the weights after it

    python bench/same.py out/a out/b      # at which step, and in what, two runs part

Both halves are sums modulo 2^32, so they do not depend on the order of rows, micro-batches or ranks, and one
flipped bit of one weight or one id changes them with certainty, not only most likely:

    ids       sum over rows of crc32(number of the prompt, sample, ids): a crc tells any change within 32 bits
    weights   sum over all numbers of f(their bits), f(x) = x (2 x + 1)

f is a permutation of the 32-bit numbers (RC6, Rivest et al. 1998), so another x is another f(x); and unlike x
itself it does not let two opposite roundings cancel. What the weights' half does not see is two weights that
have changed places.
"""

import zlib
from array import array

import torch

# Numbers that are summed at once. Small tensors are laid end to end up to this, so that an adapter of
# hundreds of them is a few launches on a GPU; the copies take 32 MB.
CHUNK = 1 << 22
MODULUS = 1 << 32


def of_ids(numbers: list[int], groups: list[list[list[int]]]) -> int:
    """numbers: of the prompts in the step; groups: the ids of each one's completions. Returns 0 to 2^32 - 1.

    What is drawn by another rank, or later in the step, is added to it.
    """
    total = 0
    for number, group in zip(numbers, groups):
        for sample, ids in enumerate(group):
            total += zlib.crc32(array("q", [number, sample, len(ids), *ids]))
    return total % MODULUS


@torch.no_grad()
def of_weights(tensors) -> int:
    """tensors: float32 or of 16 bits. Returns 0 to 2^32 - 1.

    The sums are made where the tensors are, and only the last one is fetched: one wait for a GPU.
    """
    total = 0
    for x in chunks(tensors):
        # 32-bit arithmetic that wraps, which is what the definition asks for, and a fifth of the time of
        # 64-bit arithmetic on a CPU.
        f = (x * 2).add_(1).mul_(x)
        total = total + f.sum(dtype=torch.int32)
    return int(total) % MODULUS


def chunks(tensors):
    """The bits of all numbers as integers, laid end to end in 1-D tensors of about CHUNK."""
    waiting, count = [], 0
    for tensor in tensors:
        width = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
        for piece in tensor.detach().reshape(-1).view(width).split(CHUNK):
            if count + len(piece) > CHUNK:
                yield torch.cat(waiting)
                waiting, count = [], 0
            waiting.append(piece.int())
            count += len(piece)
    if waiting:
        yield torch.cat(waiting)


def as_text(ids: int, weights: int) -> str:
    """16 hex digits: eight of the ids, eight of the weights."""
    return f"{ids % MODULUS:08x}{weights % MODULUS:08x}"
