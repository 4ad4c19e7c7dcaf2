"""Eight bytes a step, by which two runs are compared: what was drawn, and what the weights are afterwards.

    metrics.jsonl        {"step": 12, "fingerprint": "5f1c09aa" "73d2e6b0", ..}: of the ids, of the weights
    python bench/same.py out/a out/b        at which step, and in what, the runs part

Both halves are sums modulo 2^32 that do not depend on order: the ids' hash is the same on any number of
processes. One id or one flipped bit of a weight changes its half for certain; other changes by chance once in
four billion.
"""

import hashlib
import struct

import torch

WORD = 0xFFFFFFFF
AS_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def hash_of_ids(numbers: list[int], group_size: int, ids: list[list[int]]) -> int:
    """Sum over completions of a hash of (prompt's number in the step, sample, ids), modulo 2^32.

    numbers: of the prompts in the step; ids: of their completions, group_size a prompt.
    """
    total = 0
    for row, tokens in enumerate(ids):
        number, sample = numbers[row // group_size], row % group_size
        content = struct.pack(f"<{2 + len(tokens)}q", number, sample, *tokens)
        total += int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little")
    return total & WORD


@torch.no_grad()
def hash_of_weights(tensors: list[tuple[int, torch.Tensor]]) -> int:
    """Sum over tensors of the sum of their bits as integers, times an odd number of their own, modulo 2^32.

    tensors: (number, tensor); those of several processes that share them add up to the hash of all.
    A bit that flips moves the sum by an odd multiple of a power of two below 2^32, which is not 0. On a GPU
    it is one pass over the weights and one wait.
    """
    sums = [torch.zeros((), dtype=torch.int64)]
    for i, tensor in tensors:
        bits = tensor.detach().view(AS_INTEGERS[tensor.element_size()])
        sums.append(bits.sum(dtype=torch.int64) * (2 * i + 1))
    return int(torch.stack([x.to(sums[-1].device) for x in sums]).sum()) & WORD


def fingerprint(ids: int, weights: int) -> str:
    """16 hexadecimal digits of the two hashes, each added up over all processes."""
    return f"{ids & WORD:08x}{weights & WORD:08x}"
