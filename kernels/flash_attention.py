"""Attention on a GPU by a table of runs of keys: one kernel serves prefill, decoding and training.

The definition is attention_ref in kernels/attention.py: query i of a segment sees all keys of its prompt,
and its own segment's keys up to itself. A program takes a tile of queries from a table and walks two runs
of keys, wherever they lie (after FlashAttention, arXiv:2205.14135):

    queries        start .. start + n - 1, of which the first is number `first` of its segment
    prompt keys    p_length of them from token p_start on    all are seen
    own keys       first + n of them from token o_start on   query `first + i` sees keys 0 .. first + i

In training and prefill both runs lie in the stream itself. In decoding (n = 1) the prompt's run lies in the
cache of prompts, read by all rows of the group, and the own run in the row's slot. The R query heads of a
key head lie under each other as rows of one product. So a key is read once for all of them, and a decoding
step of 7 heads fills 7 of the 16 rows of a tensor core instead of 1. Where rows are few and contexts may be
long, a row's keys are shared out to several programs, and _combine_kernel joins what they found.

    S = Q K^T / sqrt(E)   P = exp(S - lse)   O = P V        D = rowsum(dO * O)
    dV = P^T dO           dP = dO V^T        dS = P * (dP - D)
    dQ = dS K / sqrt(E)   dK = dS^T Q / sqrt(E)

_dq_kernel walks the keys as the forward does. _dkv_kernel owns a tile of keys and walks the queries that see
it: those of its own segment from the key on, and for a prompt those of its completions, which stand right
behind it in the stream. A prompt's walk is long, 16 completions of 250 tokens where a completion's own keys
are seen by 250, and as one program it would end long after all others. So a walk of more than PART_ROWS rows
is cut into parts, one program each, which leave fp32 sums in a scratch buffer, and _add_kernel adds the parts
of a tile in their order. No atomics: the same bits every time.

Operations: 4 E a pair of query and visible key forward, 10 E backward (14 with what is made twice).
Bytes forward: q and out once, and the keys once a tile of BM / R queries, mostly from L2.
The parts: 8 BN E K bytes each, written once and read once. At 14/2 heads x 64, 12 groups of 16 x 250 tokens
behind prompts of 128 have 180 parts of 24 tiles, 12 MB in all, where dk and dv have 25.
Bytes of a decoding step: each key and value that a row of the batch sees, once from memory; of a split row,
besides, 8 (E + 1) bytes a split and query head: 6 % of the keys' at 256 keys a split, 7 heads a key head.
Loses to torch's own flash attention where nothing is shared and all lengths are equal.

Dims: T tokens of the stream, H query heads, K key/value heads, R = H / K, E head width (BE: to a power of
two); BM rows (query, head) and BN keys of a tile.
"""

import torch

from kernels.switch import on_triton, tl, triton  # noqa: F401 (callers ask flash_attention.on_triton)

LOG2E = 1.4426950408889634

# Tile sizes and launch options, by kind of device and head width. BM: rows of a tile in the forward and
# in dq, which share a table. The rest are arguments of one kernel each. On an H100, 4 groups of 16 x
# (128 + 384) tokens, bf16: dkv at 14/2 heads x 64 takes 0.22 ms with 4 warps and 3 stages, 0.48 with 8
# and 2; at 12/2 x 128 0.30 with 32 rows, 4 warps and 3 stages, 0.79 with 8 and 2. Decoding at 256 rows
# of 256 + 256 keys lies within 6 % of the best of 36 settings. Forward and dq, and what is older than
# Hopper, are chosen by registers.
SIZES = {
    "fp32": dict(  # no tensor cores: for exactness
        BM=32,
        forward=dict(BN=32, num_warps=4, num_stages=2),
        dq=dict(BN=32, num_warps=4, num_stages=2),
        dkv=dict(BM=16, BN=32, num_warps=4, num_stages=1),
        decode=dict(BN=32, num_warps=2, num_stages=3),
    ),
    "hopper": dict(  # wgmma reads its factors from shared memory; before it they take registers
        BM=128,
        forward=dict(BN=64, num_warps=8, num_stages=2),
        dq=dict(BN=64, num_warps=8, num_stages=2),
        dkv=dict(BM=64, BN=64, num_warps=4, num_stages=3),
        decode=dict(BN=64, num_warps=4, num_stages=3),
    ),
    "hopper, wide": dict(  # E above 64
        BM=128,
        forward=dict(BN=64, num_warps=8, num_stages=2),
        dq=dict(BN=64, num_warps=8, num_stages=2),
        dkv=dict(BM=32, BN=64, num_warps=4, num_stages=3),
        decode=dict(BN=32, num_warps=2, num_stages=3),
    ),
    "older": dict(
        BM=64,
        forward=dict(BN=32, num_warps=4, num_stages=2),
        dq=dict(BN=32, num_warps=4, num_stages=2),
        dkv=dict(BM=32, BN=32, num_warps=4, num_stages=2),
        decode=dict(BN=64, num_warps=4, num_stages=3),
    ),
}


# A program of _dkv_kernel walks about this many rows (query, head) at most: 585 queries of 7 heads. Almost no
# completion of GSM8K is longer. So only prompts are cut, one with 16 completions of 250 tokens into 8 parts.
PART_ROWS = 4096
# In a large batch longer parts fill the GPU as well: four programs an SM of an H100, for each key head.
PROGRAMS = 512

# A decoding step with fewer programs (row, key head) than this leaves SMs of an H100 idle. Then the keys of a
# row are split, so that there are up to twice as many, each with 256 keys to walk if the cache is full.
FULL = 128
KEYS_A_SPLIT = 256
MOST_SPLITS = 64  # one program joins the splits of a row, in registers


def capability(device) -> int:
    """90 for a Hopper, 80 for an A100: what the tiles are chosen by."""
    if torch.device(device).type != "cuda":
        return 90
    return 10 * torch.cuda.get_device_capability(device)[0]


def tile(E: int, dtype, device) -> dict:
    """The entry of SIZES for a head width, a type and a device."""
    if dtype == torch.float32:
        return SIZES["fp32"]
    if capability(device) < 90:
        return SIZES["older"]
    return SIZES["hopper"] if E <= 64 else SIZES["hopper, wide"]


def padded(E: int) -> int:
    """The head width of a tile: a power of two, and at least what a tensor core takes."""
    return max(16, triton.next_power_of_2(E))


class Tiles:
    """The tables of a stream, built once on the CPU and used by every layer.

    segments: (start, length, prompt_start, prompt_length), as in attention.py.
    queries (tiles, 6) int64: start, n, first, p_start, p_length, o_start.
    keys (parts, 5) int64: start and n of a tile of keys, begin and end of a run of the queries that see it,
    and the place of the part's sums in the scratch buffer, or -1 for the only part of its tile.
    sums (tiles of several parts, 4) int64: start, n, place of the first part, parts.
    queries and keys have the most work first, so that the long programs are not the last to begin.
    Raises ValueError if the completions of a prompt do not stand one after another behind it.
    """

    def __init__(self, segments, R: int, *, E: int, dtype, device):
        self.R = R
        self.size = tile(E, dtype, device)
        assert R <= self.size["BM"], f"{R} query heads a key head: at most {self.size['BM']}"
        segments = [s for s in segments if s[1]]
        table = torch.tensor(segments, dtype=torch.long).view(-1, 4)
        ends = torch.tensor(ends_of_readers(segments), dtype=torch.long)
        queries = query_tiles(table, self.size["BM"] // R)
        keys, sums = key_tiles(table, ends, self.size["dkv"]["BN"], self.size["dkv"]["BM"] // R, R)
        self.queries = queries.to(device)
        self.keys = keys.to(device)
        self.sums = sums.to(device)
        self.parts = int(sums[:, 3].sum())  # that go through the scratch buffer


def ends_of_readers(segments) -> list[int]:
    """Where the last query that sees a segment's keys ends: the segment's end, or its last completion's."""
    ends = {start: start + length for start, length, _, _ in segments}
    for start, length, prompt_start, prompt_length in sorted(segments):
        if prompt_length:
            if ends.get(prompt_start) != start:
                raise ValueError(
                    "the completions of a prompt must stand one after another in the stream, right behind it"
                )
            ends[prompt_start] = start + length
    return [ends[start] for start, _, _, _ in segments]


def cut(lengths, size):
    """Cuts runs into pieces of `size`, a number or one for each run: the piece's run and its offset there."""
    pieces = (lengths + size - 1) // size
    run = torch.arange(len(lengths)).repeat_interleave(pieces)
    number = torch.arange(len(run)) - (pieces.cumsum(0) - pieces)[run]  # of the piece in its run
    offset = number * (size[run] if isinstance(size, torch.Tensor) else size)
    return run, offset


def query_tiles(segments, size: int):
    """Tiles.queries: tiles of at most `size` queries, those with the most keys first."""
    start, length, prompt_start, prompt_length = segments.t()
    s, first = cut(length, size)
    n = (length[s] - first).clamp(max=size)
    tiles = torch.stack([start[s] + first, n, first, prompt_start[s], prompt_length[s], start[s]], 1)
    keys = first + n + prompt_length[s]
    return tiles[keys.argsort(descending=True, stable=True)]


def key_tiles(segments, ends, size: int, step: int, R: int):
    """Tiles.keys and Tiles.sums: tiles of at most `size` keys, their parts in multiples of `step` queries."""
    start, length, _, _ = segments.t()
    s, offset = cut(length, size)
    first = start[s] + offset
    n = (length[s] - offset).clamp(max=size)
    walk = ends[s] - first  # queries

    # Parts of about equal length, in whole steps of the loop.
    longest = max(PART_ROWS, R * int(walk.sum()) // PROGRAMS) // R
    parts = (walk + longest - 1) // longest
    share = (walk + parts - 1) // parts
    share = (share + step - 1) // step * step
    t, offset = cut(walk, share)  # tile of each part
    begin = first[t] + offset
    end = torch.minimum(begin + share[t], ends[s][t])

    parts = t.bincount(minlength=len(s))  # whole steps may have made one fewer
    several = parts > 1
    place = torch.where(several[t], several[t].cumsum(0) - 1, -1)
    keys = torch.stack([first[t], n[t], begin, end, place], 1)
    keys = keys[(end - begin).argsort(descending=True, stable=True)]
    first, n, parts = first[several], n[several], parts[several]
    sums = torch.stack([first, n, parts.cumsum(0) - parts, parts], 1)
    return keys, sums


def flash_attention(q, k, v, tiles: Tiles):
    """q (T, H, E), k and v (T, K, E) -> (T, H, E), differentiable: attention_ref in Triton."""
    return _Flash.apply(heads_together(q), heads_together(k), heads_together(v), tiles)


def heads_together(x):
    """The kernels find head h of a token at h * E: any stride from token to token will do, but no other."""
    if x.stride(2) == 1 and x.stride(1) == x.shape[2]:
        return x
    return x.contiguous()


def flash_decode(q, prompt_k, prompt_v, own_k, own_v, table):
    """One query a row, keys in the cache: decode_ref of kernels/attention.py in Triton.

    q (n, H, E), prompt_* (groups, K, P, E), own_* (slots, K, C, E) -> (n, H, E). table (n, 6) int64 as
    Tiles.queries, where a place of the cache's first key counts as its token: place * K * P, slot * K * C.
    """
    n, H, E = q.shape
    K = own_k.shape[1]
    R = H // K
    size = tile(E, q.dtype, q.device)["decode"]
    if (
        q.stride(2) != 1 or q.stride(1) != E
    ):  # rows may be apart, as in a part of the rotated queries and keys
        q = q.contiguous()
    out = torch.empty(n, H, E, dtype=q.dtype, device=q.device)
    splits = key_splits(n * K, prompt_k.shape[2] + own_k.shape[2])
    parts, lse = out, None
    if splits > 1:
        parts = torch.empty(n, H, splits, E, device=q.device)
        lse = torch.empty(n, H, splits, device=q.device)
    tensors = (q, prompt_k, prompt_v, own_k, own_v, parts, lse, table)
    prompt_strides = (E, E, prompt_k.stride(1))  # from key to key, from value to value, from head to head
    own_strides = (E, E, own_k.stride(1))
    numbers = (LOG2E * E**-0.5, q.stride(0), *prompt_strides, *own_strides)
    widths = dict(SPLIT=splits > 1, R=R, E=E, BE=padded(E), BM=max(16, triton.next_power_of_2(R)))
    _forward_kernel[(n, K, splits)](*tensors, *numbers, **widths, **size)
    if splits > 1:
        BS = triton.next_power_of_2(splits)
        _combine_kernel[(n, H)](parts, lse, out, splits, E=E, BE=padded(E), BS=BS)
    return out


def key_splits(programs: int, capacity: int) -> int:
    """How many programs share the keys of a row, where there are `programs` pairs of row and key head.

    capacity: keys of a row when the cache is full. What a row has now is on the device and is not asked for:
    a recorded step has to stay valid while rows grow.
    """
    if programs >= FULL:
        return 1
    return max(1, min(2 * FULL // programs, capacity // KEYS_A_SPLIT, MOST_SPLITS))


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, tiles):
        T, H, E = q.shape
        R, size = tiles.R, tiles.size
        out = torch.empty(T, H, E, dtype=q.dtype, device=q.device)
        lse = torch.empty(T, H, device=q.device)
        tensors = (q, k, v, k, v, out, lse, tiles.queries)  # prompt and own keys: both are the stream's
        strides = (k.stride(0), v.stride(0), E)
        numbers = (LOG2E * E**-0.5, q.stride(0), *strides, *strides)
        widths = dict(SPLIT=False, R=R, E=E, BE=padded(E), BM=size["BM"])
        _forward_kernel[(len(tiles.queries), H // R)](*tensors, *numbers, **widths, **size["forward"])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        E = q.shape[2]
        K = k.shape[1]
        tiles = ctx.tiles
        R, size = tiles.R, tiles.size
        delta = torch.empty_like(lse)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        numbers = (E**-0.5, q.stride(0), k.stride(0), v.stride(0))
        widths = dict(R=R, E=E, BE=padded(E))
        tensors = (q, k, v, out, dout, dq, lse, delta, tiles.queries)
        _dq_kernel[(len(tiles.queries), K)](*tensors, *numbers, **widths, BM=size["BM"], **size["dq"])
        keys = size["dkv"]["BN"]
        parts = torch.empty(tiles.parts, K, 2, keys, E, device=q.device)
        tensors = (q, k, v, dout, dk, dv, parts, lse, delta, tiles.keys)
        _dkv_kernel[(len(tiles.keys), K)](*tensors, *numbers, **widths, **size["dkv"])
        if tiles.parts:
            block = min(16, keys)
            grid = (len(tiles.sums), K, keys // block)
            _add_kernel[grid](parts, dk, dv, tiles.sums, E**-0.5, E=E, BE=padded(E), BN=keys, BLOCK=block)
        return dq, dk, dv, None


@triton.jit
def _scan(
    q,  # (BM, BE)
    m, s, acc,  # running maximum (BM,), sum of the weights (BM,) and of the weighted values (BM, BE)
    k, v, k_token, v_token, begin, end,
    last,  # (BM,)
    scale, CAUSAL: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Folds keys begin .. end - 1 of a run into m, s, acc. CAUSAL: a row sees keys up to `last` only."""
    e = tl.arange(0, BE)
    for start in range(begin, end, BN):
        j = start + tl.arange(0, BN)
        real = j < end
        k_mask = real[None, :] & (e < E)[:, None]
        k_tile = tl.load(k + j[None, :] * k_token + e[:, None], mask=k_mask, other=0.0)
        x = tl.dot(q, k_tile, input_precision="ieee") * scale
        if CAUSAL:
            x = tl.where(j[None, :] <= last[:, None], x, float("-inf"))
        else:
            x = tl.where(real[None, :], x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))  # finite: every row sees the first of the keys
        p = tl.exp2(x - m_new[:, None])
        shrink = tl.exp2(m - m_new)  # 0 at the first tile, where m is -inf
        v_mask = real[:, None] & (e < E)[None, :]
        v_tile = tl.load(v + j[:, None] * v_token + e[None, :], mask=v_mask, other=0.0)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        s = s * shrink + tl.sum(p, 1)
        m = m_new
    return m, s, acc


@triton.jit
def _forward_kernel(
    q, prompt_k, prompt_v, own_k, own_v, out,
    lse,  # None where nothing will be differentiated
    table,
    scale,  # log2(e) / sqrt(E)
    q_token, pk_token, pv_token, p_head, ok_token, ov_token, o_head,
    SPLIT: tl.constexpr,
    R: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (tile, key head, split). Row r of a tile is query r // R and head r % R of the key head's.

    The result of a split goes to out (queries, H, splits, E) and lse (queries, H, splits).
    """
    table += tl.program_id(0) * 6
    start = tl.load(table)
    n = tl.load(table + 1)
    first = tl.load(table + 2)
    p_start = tl.load(table + 3)
    p_length = tl.load(table + 4)
    o_start = tl.load(table + 5)
    kv = tl.program_id(1)
    r = tl.arange(0, BM)
    e = tl.arange(0, BE)
    i = r // R
    head = kv * R + r % R
    mask = (i < n)[:, None] & (e < E)[None, :]
    q_place = (start + i)[:, None] * q_token + head[:, None] * E + e[None, :]
    q_tile = tl.load(q + q_place, mask=mask, other=0.0)

    m = tl.full((BM,), float("-inf"), tl.float32)
    s = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BE), tl.float32)

    # The keys that this program walks: all of the prompt's and the own, or a split's share of them.
    p_begin, o_begin = 0, 0
    p_end = p_length.to(tl.int32)
    o_end = (first + n).to(tl.int32)
    last = first.to(tl.int32) + i
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(p_end + o_end, splits), BN) * BN
        begin = split * share  # counted through the prompt's keys and the own
        o_begin = tl.maximum(begin - p_end, 0)
        o_end = tl.minimum(begin + share - p_end, o_end)
        p_begin = tl.minimum(begin, p_end)
        p_end = tl.minimum(begin + share, p_end)
        last = tl.minimum(last, o_end - 1)
    pk = prompt_k + p_start * pk_token + kv * p_head
    pv = prompt_v + p_start * pv_token + kv * p_head
    m, s, acc = _scan(
        q_tile, m, s, acc, pk, pv, pk_token, pv_token, p_begin, p_end, r, scale, False, E, BE, BN
    )
    ok = own_k + o_start * ok_token + kv * o_head
    ov = own_v + o_start * ov_token + kv * o_head
    m, s, acc = _scan(
        q_tile, m, s, acc, ok, ov, ok_token, ov_token, o_begin, o_end, last, scale, True, E, BE, BN
    )

    H = tl.num_programs(1) * R
    rows = (start + i) * H + head
    if SPLIT:
        rows = rows * splits + split
    y = acc / s[:, None]  # NaN, and lse -inf, where a split has no keys
    tl.store(out + rows[:, None] * E + e[None, :], y.to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        tl.store(lse + rows, m + tl.log2(s), mask=i < n)  # of base 2, as the scores are


@triton.jit
def _combine_kernel(
    parts,  # (n, H, splits, E)
    lse,  # (n, H, splits)
    out, splits, E: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Program (row, query head): the mean of the splits' outputs, each weighted by its sum of exp(score)."""
    row = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    e = tl.arange(0, BE)
    split = tl.arange(0, BS)
    mask = (split < splits)[:, None] & (e < E)[None, :]
    place = row * splits + split
    lse_tile = tl.load(lse + place, mask=split < splits, other=float("-inf"))
    y = tl.load(parts + place[:, None] * E + e[None, :], mask=mask, other=0.0)
    y = tl.where((lse_tile == float("-inf"))[:, None], 0.0, y)
    weights = tl.exp2(lse_tile - tl.max(lse_tile, 0))
    y = tl.sum(y * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * E + e, y.to(out.dtype.element_ty), mask=e < E)


@triton.jit
def _dq_scan(
    dq,  # (BM, BE)
    q, dout, lse, delta, k, v, k_token, v_token, length, last, scale,
    CAUSAL: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds to dq what keys 0 .. length - 1 of a run give, with the probabilities made again."""
    e = tl.arange(0, BE)
    for start in range(0, length, BN):
        j = start + tl.arange(0, BN)
        mask = (j < length)[None, :] & (e < E)[:, None]
        k_tile = tl.load(k + j[None, :] * k_token + e[:, None], mask=mask, other=0.0)
        v_tile = tl.load(v + j[None, :] * v_token + e[:, None], mask=mask, other=0.0)
        x = tl.dot(q, k_tile, input_precision="ieee") * scale
        p = tl.exp2(x - lse[:, None])
        if CAUSAL:
            p = tl.where(j[None, :] <= last[:, None], p, 0.0)
        else:
            p = tl.where((j < length)[None, :], p, 0.0)
        dp = tl.dot(dout, v_tile, input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), tl.trans(k_tile), dq, input_precision="ieee")
    return dq


@triton.jit
def _dq_kernel(
    q, k, v, out, dout, dq, lse, delta, table,
    scale,  # 1 / sqrt(E)
    q_token, k_token, v_token,
    R: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (tile, key head), as the forward's; leaves delta = rowsum(dout * out) for _dkv_kernel."""
    table += tl.program_id(0) * 6
    start = tl.load(table)
    n = tl.load(table + 1)
    first = tl.load(table + 2)
    p_start = tl.load(table + 3)
    p_length = tl.load(table + 4)
    o_start = tl.load(table + 5)
    kv = tl.program_id(1)
    r = tl.arange(0, BM)
    e = tl.arange(0, BE)
    i = r // R
    head = kv * R + r % R
    real = i < n
    mask = real[:, None] & (e < E)[None, :]
    rows = (start + i) * (tl.num_programs(1) * R) + head
    place = rows[:, None] * E + e[None, :]
    q_place = (start + i)[:, None] * q_token + head[:, None] * E + e[None, :]
    q_tile = tl.load(q + q_place, mask=mask, other=0.0)
    do_tile = tl.load(dout + place, mask=mask, other=0.0)
    out_tile = tl.load(out + place, mask=mask, other=0.0)
    delta_tile = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + rows, delta_tile, mask=real)
    lse_tile = tl.load(lse + rows, mask=real, other=0.0)

    acc = tl.zeros((BM, BE), tl.float32)
    scale2 = scale * 1.4426950408889634  # log2(e): lse is of base 2
    pk = k + p_start * k_token + kv * E
    pv = v + p_start * v_token + kv * E
    n_prompt = p_length.to(tl.int32)
    acc = _dq_scan(acc, q_tile, do_tile, lse_tile, delta_tile, pk, pv, k_token, v_token, n_prompt, r, scale2,
                   False, E, BE, BN)  # fmt: skip
    ok = k + o_start * k_token + kv * E
    ov = v + o_start * v_token + kv * E
    n_own = (first + n).to(tl.int32)
    last = first.to(tl.int32) + i
    acc = _dq_scan(acc, q_tile, do_tile, lse_tile, delta_tile, ok, ov, k_token, v_token, n_own, last, scale2,
                   True, E, BE, BN)  # fmt: skip
    tl.store(dq + place, (acc * scale).to(dq.dtype.element_ty), mask=mask)


@triton.jit
def _dkv_kernel(
    q, k, v, dout, dk, dv,
    parts,  # scratch (parts, K, 2, BN, E) fp32
    lse, delta, table,
    scale,  # 1 / sqrt(E)
    q_token, k_token, v_token,
    R: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (part of a tile's walk, key head): what queries begin .. end - 1 give to dk and dv."""
    table += tl.program_id(0) * 5
    start = tl.load(table)
    n = tl.load(table + 1)
    begin = tl.load(table + 2).to(tl.int32)
    end = tl.load(table + 3).to(tl.int32)
    part = tl.load(table + 4)
    kv = tl.program_id(1)
    K = tl.num_programs(1)
    j = tl.arange(0, BN)
    r = tl.arange(0, BM)
    e = tl.arange(0, BE)
    mask = (j < n)[:, None] & (e < E)[None, :]
    k_tile = tl.load(k + (start + j)[:, None] * k_token + kv * E + e[None, :], mask=mask, other=0.0)
    v_tile = tl.load(v + (start + j)[:, None] * v_token + kv * E + e[None, :], mask=mask, other=0.0)

    key = start.to(tl.int32) + j
    i = r // R
    head = kv * R + r % R
    whole = r < BM // R * R  # 64 rows hold 9 queries of 7 heads and one row too many
    row = i * (K * R) + head
    q_place = (
        i[None, :] * q_token + head[None, :] * E + e[:, None]
    )  # (BE, BM), from the step's first query on
    do_place = row[None, :] * E + e[:, None]
    scale2 = scale * 1.4426950408889634  # log2(e): lse is of base 2
    dk_tile = tl.zeros((BN, BE), tl.float32)
    dv_tile = tl.zeros((BN, BE), tl.float32)
    for first in range(begin, end, BM // R):
        t = first + i
        real = whole & (t < end)
        real_e = real[None, :] & (e < E)[:, None]
        first_row = tl.cast(first, tl.int64) * (K * R)
        q_tile = tl.load(q + tl.cast(first, tl.int64) * q_token + q_place, mask=real_e, other=0.0)
        do_tile = tl.load(dout + first_row * E + do_place, mask=real_e, other=0.0)
        lse_tile = tl.load(lse + first_row + row, mask=real, other=0.0)
        delta_tile = tl.load(delta + first_row + row, mask=real, other=0.0)

        x = tl.dot(k_tile, q_tile, input_precision="ieee") * scale2
        # A prompt's keys come before all of its completions. Rows that are not real add 0: q and dout are 0.
        p = tl.where(t[None, :] >= key[:, None], tl.exp2(x - lse_tile[None, :]), 0.0)
        dv_tile = tl.dot(p.to(do_tile.dtype), tl.trans(do_tile), dv_tile, input_precision="ieee")
        dp = tl.dot(v_tile, do_tile, input_precision="ieee")
        ds = p * (dp - delta_tile[None, :])
        dk_tile = tl.dot(ds.to(q_tile.dtype), tl.trans(q_tile), dk_tile, input_precision="ieee")

    if part < 0:
        place = ((start + j) * K + kv)[:, None] * E + e[None, :]
        tl.store(dk + place, (dk_tile * scale).to(dk.dtype.element_ty), mask=mask)
        tl.store(dv + place, dv_tile.to(dv.dtype.element_ty), mask=mask)
    else:
        place = ((part * K + kv) * 2 * BN + j)[:, None] * E + e[None, :]
        tl.store(parts + place, dk_tile, mask=mask)
        tl.store(parts + BN * E + place, dv_tile, mask=mask)


@triton.jit
def _add_kernel(
    parts, dk, dv, table,
    scale,  # 1 / sqrt(E)
    E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN keys in several parts, key head, BLOCK of its keys): adds the parts in order."""
    table += tl.program_id(0) * 4
    start = tl.load(table)
    n = tl.load(table + 1)
    part = tl.load(table + 2)
    count = tl.load(table + 3).to(tl.int32)
    kv = tl.program_id(1)
    K = tl.num_programs(1)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, BE)
    mask = (j < n)[:, None] & (e < E)[None, :]
    dk_tile = tl.zeros((BLOCK, BE), tl.float32)
    dv_tile = tl.zeros((BLOCK, BE), tl.float32)
    place = ((part * K + kv) * 2 * BN + j)[:, None] * E + e[None, :]
    for _ in range(0, count):
        dk_tile += tl.load(parts + place, mask=mask, other=0.0)
        dv_tile += tl.load(parts + BN * E + place, mask=mask, other=0.0)
        place += K * 2 * BN * E
    place = ((start + j) * K + kv)[:, None] * E + e[None, :]
    tl.store(dk + place, (dk_tile * scale).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + place, dv_tile.to(dv.dtype.element_ty), mask=mask)
