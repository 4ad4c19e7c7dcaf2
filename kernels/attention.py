"""Attention over a packed stream in which the completions of a group share their prompt: the definition, in torch.

A stream holds segments one after another. Each segment is a run of tokens that sees itself causally and, before itself,
one other run: its prompt. With (start, length, prompt_start, prompt_length) as a segment's row of the table:

    query i of the segment sees   prompt keys  prompt_start .. prompt_start + prompt_length - 1     all of them
                                  own keys     start .. start + i                                   causally

A prompt is a segment whose own prompt is empty. So G completions cost one prompt plus G completions, and the prompt's
keys get the gradient of all G. `attention_ref` is that definition, one segment at a time: slow and obvious. `attention`
is what runs: segments of similar size are stacked in buckets, because 500 small calls cost more than 5 larger ones.

Dims: T tokens of the stream, H query heads, K key/value heads, R = H / K, E head width; a bucket has n segments of at most
c queries and t keys.
"""
import math

import torch
import torch.nn.functional as F

Segment = tuple[int, int, int, int]  # start, length, prompt_start, prompt_length: tokens of the stream


def attention_ref(q, k, v, segments: list[Segment]):
    """q (T, H, E), k and v (T, K, E) -> (T, H, E): the definition, by loops over segments, in the dtype given."""
    T, H, E = q.shape
    R = H // k.shape[1]
    out = torch.zeros_like(q)
    for start, length, prompt_start, prompt_length in segments:
        own, prompt = slice(start, start + length), slice(prompt_start, prompt_start + prompt_length)
        keys = torch.cat([k[prompt], k[own]]).repeat_interleave(R, 1)  # (t, H, E)
        values = torch.cat([v[prompt], v[own]]).repeat_interleave(R, 1)
        scores = torch.einsum("chd,thd->hct", q[own], keys) / math.sqrt(E)
        i = torch.arange(length, device=q.device)[:, None]
        j = torch.arange(len(keys), device=q.device)[None]
        scores = scores.masked_fill(j > i + prompt_length, float("-inf"))
        out[own] = torch.einsum("hct,thd->chd", scores.softmax(-1), values)
    return out


def decode_ref(q, prompt_k, prompt_v, own_k, own_v, table):
    """One query a row, keys in the cache: the definition of flash_decode in kernels/flash_attention.py, arguments and result as there."""
    (n, H, E), (_, K, P, _), C = q.shape, prompt_k.shape, own_k.shape[2]
    _, _, first, p_start, p_length, o_start = table.t()
    keys, values = (torch.cat([p[p_start // (K * P)], o[o_start // (K * C)]], 2) for p, o in ((prompt_k, own_k), (prompt_v, own_v)))  # (n, K, P + C, E)
    j = torch.arange(P + C, device=q.device)
    hidden = torch.where(j < P, j >= p_length[:, None], j - P > first[:, None])[:, None, None]  # (n, 1, 1, P + C)
    scores = (q.view(n, K, H // K, E) @ keys.transpose(2, 3) / math.sqrt(E)).masked_fill(hidden, float("-inf"))
    # what the cache holds where nothing was written may be anything, and 0 times a NaN is NaN
    return (scores.softmax(-1) @ values.masked_fill(hidden.transpose(2, 3), 0.0)).reshape(n, H, E)


class Buckets:
    """Where the rows of each bucket are in the stream; built once a stream, used by every layer.

    For bucket b: `queries[b]` (n*c,) and `keys[b]` (n*t,) are token numbers, `shape[b]` is (n, c, t), `mask[b]` is the additive mask
    (n, 1, c*R, t) in `dtype`. `back` (T,) finds each token's output among the outputs of all buckets laid end to end.
    Padding exists only in here: a padded query or key points at a real token and is masked or never read.
    """

    def __init__(self, segments: list[Segment], R: int, *, dtype, device):
        self.queries, self.keys, self.shape, self.mask = [], [], [], []
        offset = 0
        back = torch.empty(sum(length for _, length, _, _ in segments), dtype=torch.long)
        # near in queries, and among those near in keys: sorted by one of them only, a long prompt would stretch short ones
        queries_alike = alike([s for s in segments if s[1]], lambda s: s[1])
        for bucket in (b for a in queries_alike for b in alike(a, lambda s: s[1] + s[3])):
            n, bucket = len(bucket), torch.tensor(bucket)
            start, length, prompt_start, prompt_length = bucket[:, :, None].unbind(1)  # each (n, 1)
            c, t = int(length.max()), int((length + prompt_length).max())
            i, j = torch.arange(c)[None], torch.arange(t)[None]
            last = length - 1  # past the end of a segment, its last token again
            own = start + torch.minimum(i, last)  # (n, c)
            keys = torch.where(j < prompt_length, prompt_start + j, start + torch.minimum(j - prompt_length, last))  # (n, t): prompt, own, padding
            # one line is causality and hides the padding: no real query comes after the last real key
            seen = j[:, None] <= i[..., None] + prompt_length[..., None]  # (n, c, t)
            mask = torch.zeros(n, 1, c, t, dtype=dtype).masked_fill_(~seen[:, None], float("-inf"))
            self.queries.append(own.reshape(-1).to(device))
            self.keys.append(keys.reshape(-1).to(device))
            self.mask.append(mask.repeat_interleave(R, 2).to(device))
            self.shape.append((n, c, t))
            real = i < length
            back[own[real]] = offset + (torch.arange(n)[:, None] * c + i)[real]
            offset += n * c
        self.back = back.to(device)


def alike(segments: list[Segment], size) -> list[list[Segment]]:
    """Cuts segments into runs near enough in size(segment) to be stacked, largest first.

    Near: no segment is padded by more than a quarter of the stack's size or 8 tokens. Measured on ragged lengths up to 35: 8 tokens 18.8 ms
    forward and backward, 16 tokens (fewer, emptier calls) 24.5, 4 tokens 21.9; up to 320 they do not matter, the quarter does.
    """
    runs = []
    for segment in sorted(segments, key=size, reverse=True):
        largest = size(runs[-1][0]) if runs else 0
        if runs and size(segment) >= min(0.75 * largest, largest - 8):
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs


def attention(q, k, v, buckets: Buckets):
    """q (T, H, E), k and v (T, K, E) -> (T, H, E): the same function as attention_ref, differentiable, by buckets.

    The R query heads that share a key head stand as R rows of queries over that key head, so keys are never expanded
    (measured against enable_gqa at (16, 200, 350), 14/2 heads: forward and backward 1.35x faster).
    """
    T, H, E = q.shape
    K = k.shape[1]
    R = H // K
    out = []
    for queries, keys, (n, c, t), mask in zip(buckets.queries, buckets.keys, buckets.shape, buckets.mask):
        qb = q.index_select(0, queries).view(n, c, K, R, E).permute(0, 2, 1, 3, 4).reshape(n, K, c * R, E)
        kb = k.index_select(0, keys).view(n, t, K, E).transpose(1, 2)
        vb = v.index_select(0, keys).view(n, t, K, E).transpose(1, 2)
        ob = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=mask)  # (n, K, c*R, E)
        out.append(ob.view(n, K, c, R, E).permute(0, 2, 1, 3, 4).reshape(n * c, H, E))
    return torch.cat(out).index_select(0, buckets.back)
