"""Attention on a GPU by a table of runs of keys: one kernel for prefill, decoding and training, and two for the backward (arXiv:2205.14135).

The definition is attention_ref in kernels/attention.py: query i of a segment sees all keys of its prompt, and its own segment's up to
itself. A program takes a tile of queries from a table and walks two runs of keys, wherever they are:

    queries start .. start + n - 1, of which the first is number `first` of its segment
    prompt keys: p_length of them from token p_start on           all are seen
    own keys: first + n of them from token o_start on             query `first + i` sees keys 0 .. first + i

In training and prefill both runs lie in the stream itself; in decoding (n = 1) the prompt's lies in the cache of prompts, read by all rows of
the group, and the own run in the row's slot. The R query heads of a key head lie under each other as rows of one product, so a key
is read once for all of them and a decoding step of 7 heads fills 7 of 16 rows of a tensor core instead of 1.

    S = Q K^T / sqrt(E)   P = exp(S - lse)   O = P V        D = rowsum(dO * O)
    dV = P^T dO           dP = dO V^T        dS = P * (dP - D)     dQ = dS K / sqrt(E)     dK = dS^T Q / sqrt(E)

Backward without atomics, so the same bits every time: _dq_kernel walks as the forward does; _dkv_kernel owns a tile of keys and walks the
queries that see it: its segment's from the key on, and for a prompt all of its completions, which stand one after another in the stream.

Operations: 4 E a pair of query and visible key forward, 10 E backward (14 with what is made twice). Bytes forward: q, out once; keys once a
tile of BM / R queries, mostly from L2. Loses to torch's own flash attention where nothing is shared and all lengths are equal.

Dims: T tokens of the stream, H query heads, K key/value heads, R = H / K, E head width; BM rows (query, head) and BN keys of a tile.
"""
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it and do not need it
    from types import SimpleNamespace
    triton, tl = SimpleNamespace(jit=lambda f: f), SimpleNamespace(constexpr=None)

MODE = "auto"  # set by kernels.use(): "auto" Triton on CUDA tensors, "triton" always, "torch" never
LOG2E = 1.4426950408889634


def on_triton(x) -> bool:
    return (MODE == "triton" or MODE == "auto" and x.is_cuda) and x.dtype != torch.float64


def capability(device) -> int:
    """90 for a Hopper, 80 for an A100: what the tiles are chosen by."""
    return 10 * torch.cuda.get_device_capability(device)[0] if torch.device(device).type == "cuda" else 90


def tile(E: int, dtype, device) -> dict:
    """Tile sizes for a head width: BM rows and BN keys forward, dq_keys for dq, keys and rows for dkv, warps. Chosen by registers; not yet timed."""
    if dtype == torch.float32:  # no tensor cores: for exactness
        return dict(BM=32, BN=32, dq_keys=32, keys=32, rows=16, warps=4)
    if capability(device) >= 90:  # wgmma reads its factors from shared memory; before it they take registers
        return dict(BM=128, BN=64, dq_keys=64, keys=64, rows=64 if E <= 64 else 32, warps=8)
    return dict(BM=64, BN=32, dq_keys=32, keys=32, rows=32, warps=4)


class Tiles:
    """The tables of a stream, built once and used by every layer. segments: (start, length, prompt_start, prompt_length) as in attention.py.

    queries (tiles, 6) int64: start, n, first, p_start, p_length, o_start. keys (tiles, 5) int64: start, n, end of its segment, start and end of
    the completions that see all of it. Both with the most work first, so that the long programs are not the last to begin.
    Raises ValueError if the completions of a prompt do not stand one after another.
    """

    def __init__(self, segments, R: int, *, E: int, dtype, device):
        self.R, self.size = R, tile(E, dtype, device)
        BQ, BK = self.size["BM"] // R, self.size["keys"]
        assert BQ, f"{R} query heads a key head: at most {self.size['BM']}"
        segments = [s for s in segments if s[1]]
        readers = {}  # prompt's start -> start, end and tokens of its completions
        for start, length, prompt, prompt_length in segments:
            if prompt_length:
                a, b, n = readers.get(prompt, (start, start, 0))
                readers[prompt] = min(a, start), max(b, start + length), n + length
        if any(b - a != n for a, b, n in readers.values()):
            raise ValueError("the completions of a prompt must stand one after another in the stream")
        queries = [(s + i, min(BQ, n - i), i, p, pn, s) for s, n, p, pn in segments for i in range(0, n, BQ)]
        keys = [(s + j, min(BK, n - j), s + n, *(readers.get(s, (0, 0))[:2] if not pn else (0, 0))) for s, n, _, pn in segments for j in range(0, n, BK)]
        queries.sort(key=lambda q: -(q[1] + q[2] + q[4]))
        keys.sort(key=lambda k: -(k[2] - k[0] + k[4] - k[3]))
        self.queries, self.keys = (torch.tensor(x, dtype=torch.long).to(device) for x in (queries, keys))


def flash_attention(q, k, v, tiles: Tiles):
    """q (T, H, E), k and v (T, K, E) -> (T, H, E), differentiable: attention_ref on tensors that `on_triton` accepts."""
    return _Flash.apply(*(x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (q, k, v)), tiles)


def flash_decode(q, prompt_k, prompt_v, own_k, own_v, table):
    """One query a row, keys in the cache: q (n, H, E), prompt_* (groups, K, P, E), own_* (slots, K, C, E) -> (n, H, E).

    table (n, 6) int64 as Tiles.queries, where a place of the cache's first key counts as its token: place * K * P, slot * K * C.
    """
    n, H, E = q.shape
    R = H // own_k.shape[1]
    q, out = q.contiguous(), torch.empty(n, H, E, dtype=q.dtype, device=q.device)
    heads = prompt_k.stride(1), own_k.stride(1)
    BM = max(16, triton.next_power_of_2(R))
    _forward_kernel[(n, H // R)](q, prompt_k, prompt_v, own_k, own_v, out, None, table, LOG2E * E**-0.5, q.stride(0), E, E, heads[0], E, E, heads[1],
                                 R=R, E=E, BE=max(16, triton.next_power_of_2(E)), BM=BM, BN=64 if q.dtype != torch.float32 else 32, num_warps=4, num_stages=3)
    return out


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, tiles):
        (T, H, E), R, size = q.shape, tiles.R, tiles.size
        out, lse = torch.empty(T, H, E, dtype=q.dtype, device=q.device), torch.empty(T, H, device=q.device)
        _forward_kernel[(len(tiles.queries), H // R)](
            q, k, v, k, v, out, lse, tiles.queries, LOG2E * E**-0.5, q.stride(0), k.stride(0), v.stride(0), E, k.stride(0), v.stride(0), E,
            R=R, E=E, BE=max(16, triton.next_power_of_2(E)), BM=size["BM"], BN=size["BN"], num_warps=size["warps"], num_stages=2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx, dout):
        (q, k, v, out, lse), tiles, dout = ctx.saved_tensors, ctx.tiles, dout.contiguous()
        (T, H, E), R, size = q.shape, tiles.R, tiles.size
        delta = torch.empty_like(lse)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        args = dict(scale=E**-0.5, q_token=q.stride(0), k_token=k.stride(0), v_token=v.stride(0), R=R, E=E, BE=max(16, triton.next_power_of_2(E)), num_stages=2)
        _dq_kernel[(len(tiles.queries), H // R)](q, k, v, out, dout, dq, lse, delta, tiles.queries, BM=size["BM"], BN=size["dq_keys"], num_warps=size["warps"], **args)
        _dkv_kernel[(len(tiles.keys), H // R)](q, k, v, dout, dk, dv, lse, delta, tiles.keys, BM=size["rows"], BN=size["keys"], num_warps=size["warps"], **args)
        return dq, dk, dv, None


@triton.jit
def _scan(q, m, s, acc, k, v, k_token, v_token, length, last, scale, CAUSAL: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr):
    """Folds keys 0 .. length - 1 of a run into a tile's running maximum m, sum s (BM,) and weighted values acc (BM, BE). CAUSAL: keys <= last (BM,)."""
    e = tl.arange(0, BE)
    for start in range(0, length, BN):
        j = start + tl.arange(0, BN)
        kt = tl.load(k + j[None, :] * k_token + e[:, None], mask=(j < length)[None, :] & (e < E)[:, None], other=0.0)
        x = tl.dot(q, kt, input_precision="ieee") * scale
        x = tl.where(j[None, :] <= last[:, None] if CAUSAL else (j < length)[None, :], x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        p = tl.exp2(x - m_new[:, None])
        a = tl.exp2(m - m_new)  # 0 at the first tile, where m is -inf; m_new is not, since every row sees a run's first key
        vt = tl.load(v + j[:, None] * v_token + e[None, :], mask=(j < length)[:, None] & (e < E)[None, :], other=0.0)
        acc = tl.dot(p.to(vt.dtype), vt, acc * a[:, None], input_precision="ieee")
        m, s = m_new, s * a + tl.sum(p, 1)
    return m, s, acc


@triton.jit
def _forward_kernel(q, pk, pv, ok, ov, out, lse, table, scale, q_token, pk_token, pv_token, p_head, ok_token, ov_token, o_head,
                    R: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Program (tile, key head). Row r of the tile is query r // R, head r % R of those that share the key head. scale: log2(e) / sqrt(E)."""
    table += tl.program_id(0) * 6
    start, n, first, p_start, p_length, o_start = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3), tl.load(table + 4), tl.load(table + 5)
    kv, r, e = tl.program_id(1), tl.arange(0, BM), tl.arange(0, BE)
    i, head = r // R, kv * R + r % R
    mask = (i < n)[:, None] & (e < E)[None, :]
    qt = tl.load(q + (start + i)[:, None] * q_token + head[:, None] * E + e[None, :], mask=mask, other=0.0)
    m, s, acc = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM, BE), tl.float32)
    pk += p_start * pk_token + kv * p_head
    pv += p_start * pv_token + kv * p_head
    m, s, acc = _scan(qt, m, s, acc, pk, pv, pk_token, pv_token, p_length.to(tl.int32), r, scale, False, E, BE, BN)
    ok += o_start * ok_token + kv * o_head
    ov += o_start * ov_token + kv * o_head
    m, s, acc = _scan(qt, m, s, acc, ok, ov, ok_token, ov_token, (first + n).to(tl.int32), first.to(tl.int32) + i, scale, True, E, BE, BN)
    H = tl.num_programs(1) * R
    rows = (start + i) * H + head
    tl.store(out + rows[:, None] * E + e[None, :], (acc / s[:, None]).to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        tl.store(lse + rows, m + tl.log2(s), mask=i < n)  # of base 2, as the scores are


@triton.jit
def _dq_scan(q, dout, lse, delta, dq, k, v, k_token, v_token, length, last, scale, CAUSAL: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr):
    e = tl.arange(0, BE)
    for start in range(0, length, BN):
        j = start + tl.arange(0, BN)
        mask = (j < length)[None, :] & (e < E)[:, None]
        kt = tl.load(k + j[None, :] * k_token + e[:, None], mask=mask, other=0.0)
        vt = tl.load(v + j[None, :] * v_token + e[:, None], mask=mask, other=0.0)
        x = tl.dot(q, kt, input_precision="ieee") * scale
        p = tl.where(j[None, :] <= last[:, None] if CAUSAL else (j < length)[None, :], tl.exp2(x - lse[:, None]), 0.0)
        ds = p * (tl.dot(dout, vt, input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(kt.dtype), tl.trans(kt), dq, input_precision="ieee")
    return dq


@triton.jit
def _dq_kernel(q, k, v, out, dout, dq, lse, delta, table, scale, q_token, k_token, v_token,
               R: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The forward's walk with the probabilities made again; leaves delta = rowsum(dout * out) for _dkv_kernel."""
    table += tl.program_id(0) * 6
    start, n, first, p_start, p_length, o_start = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3), tl.load(table + 4), tl.load(table + 5)
    kv, r, e = tl.program_id(1), tl.arange(0, BM), tl.arange(0, BE)
    i, head = r // R, kv * R + r % R
    rows, real = (start + i) * (tl.num_programs(1) * R) + head, i < n
    mask, place = real[:, None] & (e < E)[None, :], rows[:, None] * E + e[None, :]
    qt = tl.load(q + (start + i)[:, None] * q_token + head[:, None] * E + e[None, :], mask=mask, other=0.0)
    dt = tl.load(dout + place, mask=mask, other=0.0)
    d = tl.sum(dt.to(tl.float32) * tl.load(out + place, mask=mask, other=0.0).to(tl.float32), 1)
    tl.store(delta + rows, d, mask=real)
    lt, acc = tl.load(lse + rows, mask=real, other=0.0), tl.zeros((BM, BE), tl.float32)
    k += kv * E
    v += kv * E
    scale2 = scale * 1.4426950408889634
    acc = _dq_scan(qt, dt, lt, d, acc, k + p_start * k_token, v + p_start * v_token, k_token, v_token, p_length.to(tl.int32), r, scale2, False, E, BE, BN)
    acc = _dq_scan(qt, dt, lt, d, acc, k + o_start * k_token, v + o_start * v_token, k_token, v_token, (first + n).to(tl.int32), first.to(tl.int32) + i, scale2, True, E, BE, BN)
    tl.store(dq + place, (acc * scale).to(dq.dtype.element_ty), mask=mask)


@triton.jit
def _dkv_scan(kt, vt, dk, dv, q, dout, lse, delta, begin, end, key, kv, H, scale, q_token, CAUSAL: tl.constexpr,
              R: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr):
    """Adds to dk, dv (BN, BE) what queries begin .. end - 1 give; CAUSAL: only those at or after the key (BN,)."""
    r, e = tl.arange(0, BM), tl.arange(0, BE)
    for start in range(begin, end, BM // R):
        t, head = start + r // R, kv * R + r % R
        real = (t < end) & (r < BM // R * R)  # 64 rows hold 9 queries of 7 heads and one row too many
        rows = t.to(tl.int64) * H + head
        mask = real[None, :] & (e < E)[:, None]
        qt = tl.load(q + t.to(tl.int64)[None, :] * q_token + head[None, :] * E + e[:, None], mask=mask, other=0.0)  # (BE, BM)
        dt = tl.load(dout + rows[None, :] * E + e[:, None], mask=mask, other=0.0)
        x = tl.dot(kt, qt, input_precision="ieee") * scale - tl.load(lse + rows, mask=real, other=0.0)[None, :]
        p = tl.where(real[None, :] & (t[None, :] >= key[:, None]) if CAUSAL else real[None, :], tl.exp2(x), 0.0)
        dv = tl.dot(p.to(dt.dtype), tl.trans(dt), dv, input_precision="ieee")
        ds = p * (tl.dot(vt, dt, input_precision="ieee") - tl.load(delta + rows, mask=real, other=0.0)[None, :])
        dk = tl.dot(ds.to(qt.dtype), tl.trans(qt), dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _dkv_kernel(q, k, v, dout, dk, dv, lse, delta, table, scale, q_token, k_token, v_token,
                R: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Program (tile of keys, key head): it alone writes their gradients, and adds in the order of the stream."""
    table += tl.program_id(0) * 5
    start, n, end, begin2, end2 = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3), tl.load(table + 4)
    kv, j, e = tl.program_id(1), tl.arange(0, BN), tl.arange(0, BE)
    K = tl.num_programs(1)
    mask = (j < n)[:, None] & (e < E)[None, :]
    kt = tl.load(k + (start + j)[:, None] * k_token + kv * E + e[None, :], mask=mask, other=0.0)
    vt = tl.load(v + (start + j)[:, None] * v_token + kv * E + e[None, :], mask=mask, other=0.0)
    key, scale2 = start.to(tl.int32) + j, scale * 1.4426950408889634
    dkt, dvt = tl.zeros((BN, BE), tl.float32), tl.zeros((BN, BE), tl.float32)
    dkt, dvt = _dkv_scan(kt, vt, dkt, dvt, q, dout, lse, delta, start.to(tl.int32), end.to(tl.int32), key, kv, K * R, scale2, q_token, True, R, E, BE, BM)
    dkt, dvt = _dkv_scan(kt, vt, dkt, dvt, q, dout, lse, delta, begin2.to(tl.int32), end2.to(tl.int32), key, kv, K * R, scale2, q_token, False, R, E, BE, BM)
    place = ((start + j) * K + kv)[:, None] * E + e[None, :]
    tl.store(dk + place, (dkt * scale).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + place, dvt.to(dv.dtype.element_ty), mask=mask)
