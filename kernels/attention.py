"""Attention over a packed stream where the completions of a group share their prompt: the definition.

A stream holds segments one after another. Each segment is a run of tokens that sees itself
causally and, before itself, one other run: its prompt. With (start, length, prompt_start,
prompt_length) as a segment's row of the table:

    query i of the segment sees   prompt keys  prompt_start .. prompt_start + prompt_length - 1   all of them
                                  own keys     start .. start + i                                 causally

A prompt is a segment whose own prompt is empty. So G completions cost one prompt plus G completions, and
the prompt's keys get the gradient of all G.

`attention_ref` is that definition, one segment at a time: slow and obvious. `attention` is what runs on a
CPU: segments of similar size are stacked in buckets, because 500 small calls cost more than 5 larger ones.
`decode_ref` is the same definition for one decoding step, where the keys lie in the cache; it is what
flash_decode in kernels/flash_attention.py has to equal.

Dims: T tokens of the stream, H query heads, K key/value heads, R = H / K, E head width. A bucket has n
segments of at most c queries and t keys. A cache holds P keys of each prompt and C own keys of each slot.
"""

import math

import torch
import torch.nn.functional as F

Segment = tuple[int, int, int, int]  # start, length, prompt_start, prompt_length: tokens of the stream


def attention_ref(q, k, v, segments: list[Segment]):
    """q (T, H, E), k and v (T, K, E) -> (T, H, E): the definition, a segment at a time."""
    T, H, E = q.shape
    R = H // k.shape[1]
    out = torch.zeros_like(q)
    for start, length, prompt_start, prompt_length in segments:
        own = slice(start, start + length)
        prompt = slice(prompt_start, prompt_start + prompt_length)
        keys = torch.cat([k[prompt], k[own]]).repeat_interleave(R, 1)  # (t, H, E)
        values = torch.cat([v[prompt], v[own]]).repeat_interleave(R, 1)
        scores = torch.einsum("chd,thd->hct", q[own], keys) / math.sqrt(E)
        i = torch.arange(length, device=q.device)[:, None]
        j = torch.arange(len(keys), device=q.device)[None]
        scores = scores.masked_fill(j > i + prompt_length, float("-inf"))
        out[own] = torch.einsum("hct,thd->chd", scores.softmax(-1), values)
    return out


def decode_ref(q, prompt_k, prompt_v, own_k, own_v, table):
    """One query a row, keys in the cache: the definition of flash_decode in kernels/flash_attention.py.

    Arguments and result are described there: q (n, H, E), prompt_* (groups, K, P, E), own_* (slots, K, C, E),
    table (n, 6) -> (n, H, E).
    """
    n, H, E = q.shape
    _, K, P, _ = prompt_k.shape
    C = own_k.shape[2]
    _, _, first, prompt_start, prompt_length, own_start = table.t()
    group = prompt_start // (K * P)
    slot = own_start // (K * C)
    keys = torch.cat([prompt_k[group], own_k[slot]], 2)  # (n, K, P + C, E)
    values = torch.cat([prompt_v[group], own_v[slot]], 2)

    j = torch.arange(P + C, device=q.device)
    hidden = torch.where(j < P, j >= prompt_length[:, None], j - P > first[:, None])
    hidden = hidden[:, None, None]  # (n, 1, 1, P + C)
    scores = q.view(n, K, H // K, E) @ keys.transpose(2, 3) / math.sqrt(E)  # (n, K, R, P + C)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    # Where nothing was written the cache may hold anything, and a weight of 0 times a NaN is NaN.
    values = values.masked_fill(hidden.transpose(2, 3), 0.0)
    return (weights @ values).reshape(n, H, E)


class Buckets:
    """Where the rows of each bucket are in the stream; built once a stream, used by every layer.

    For bucket b: `queries[b]` (n*c,) and `keys[b]` (n*t,) are token numbers, `shape[b]` is (n, c, t),
    `mask[b]` is the additive mask (n, 1, c*R, t) in `dtype`. `back` (T,) finds each token's output among
    the outputs of all buckets laid end to end. Padding exists only in here: a padded query or key points at
    a real token and is masked or never read.
    """

    def __init__(self, segments: list[Segment], R: int, *, dtype, device):
        self.queries, self.keys, self.shape, self.mask = [], [], [], []
        tokens = sum(length for _, length, _, _ in segments)
        back = torch.empty(tokens, dtype=torch.long)
        offset = 0
        for bucket in stacks(segments):
            queries, keys, seen, real = lay_out(bucket)
            n, c, t = seen.shape
            mask = torch.zeros(n, 1, c, t, dtype=dtype).masked_fill_(~seen[:, None], float("-inf"))
            self.queries.append(queries.reshape(-1).to(device))
            self.keys.append(keys.reshape(-1).to(device))
            self.mask.append(mask.repeat_interleave(R, 2).to(device))
            self.shape.append((n, c, t))
            place = offset + torch.arange(n * c).view(n, c)
            back[queries[real]] = place[real]
            offset += n * c
        self.back = back.to(device)


def stacks(segments: list[Segment]) -> list[list[Segment]]:
    """The buckets: segments near in their number of queries and, among those, near in their number of keys.

    Sorted by one of the two only, a segment with a long prompt would stretch many short ones.
    """
    buckets = []
    with_queries = [s for s in segments if s[1]]
    for near in alike(with_queries, lambda s: s[1]):
        buckets += alike(near, lambda s: s[1] + s[3])
    return buckets


def alike(segments: list[Segment], size) -> list[list[Segment]]:
    """Cuts segments into runs near enough in size(segment) to be stacked, largest first.

    Near: no segment is padded by more than a quarter of the stack's size or 8 tokens. Measured on ragged
    lengths up to 35: 8 tokens 18.8 ms forward and backward, 16 tokens (fewer, emptier calls) 24.5, 4 tokens
    21.9; up to 320 they do not matter, the quarter does.
    """
    runs = []
    for segment in sorted(segments, key=size, reverse=True):
        largest = size(runs[-1][0]) if runs else 0
        if runs and size(segment) >= min(0.75 * largest, largest - 8):
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs


def lay_out(bucket: list[Segment]):
    """A bucket's token numbers, queries (n, c) and keys (n, t), and seen (n, c, t), real (n, c)."""
    table = torch.tensor(bucket)
    start, length, prompt_start, prompt_length = table[:, :, None].unbind(1)  # each (n, 1)
    c = int(length.max())
    t = int((length + prompt_length).max())
    i = torch.arange(c)[None]
    j = torch.arange(t)[None]
    last = length - 1  # past the end of a segment, its last token again
    queries = start + torch.minimum(i, last)
    own = start + torch.minimum(j - prompt_length, last)
    keys = torch.where(j < prompt_length, prompt_start + j, own)  # prompt, own, padding
    # This is causality, and it hides the padding too: no real query comes after the last real key.
    seen = j[:, None] <= i[..., None] + prompt_length[..., None]
    return queries, keys, seen, i < length


def attention(q, k, v, buckets: Buckets):
    """q (T, H, E), k and v (T, K, E) -> (T, H, E): attention_ref's function, differentiable, by buckets.

    The R query heads that share a key head stand as R rows of queries over that key head, so keys are never
    expanded (measured against enable_gqa at (16, 200, 350), 14/2 heads: forward and backward 1.35x faster).
    """
    T, H, E = q.shape
    K = k.shape[1]
    R = H // K
    out = []
    for queries, keys, shape, mask in zip(buckets.queries, buckets.keys, buckets.shape, buckets.mask):
        n, c, t = shape
        q_rows = q.index_select(0, queries).view(n, c, K, R, E)
        q_rows = q_rows.permute(0, 2, 1, 3, 4).reshape(n, K, c * R, E)
        k_rows = k.index_select(0, keys).view(n, t, K, E).transpose(1, 2)
        v_rows = v.index_select(0, keys).view(n, t, K, E).transpose(1, 2)
        y = F.scaled_dot_product_attention(q_rows, k_rows, v_rows, attn_mask=mask)  # (n, K, c*R, E)
        y = y.view(n, K, c, R, E).permute(0, 2, 1, 3, 4)
        out.append(y.reshape(n * c, H, E))
    return torch.cat(out).index_select(0, buckets.back)
