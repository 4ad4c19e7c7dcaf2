"""Drawing tokens: counter-based random numbers, a race that decides, and the log-probability of what was drawn.

The random numbers of a token are a function of (seed, step, prompt, sample, position) and of nothing else: Philox4x32-10
(Salmon et al., SC'11) with the seed as its key and the other four as its counter gives 64 bits, the token's own key; it is the
generator of `tl.philox`. Those are stretched into as many exponential variates as the draw needs by SplitMix64's finaliser (Steele et
al., OOPSLA'14), ten operations each where Philox takes a hundred.

    race over weights w:  winner = argmax_i w_i / E_i,  E_i exponential   ->   P(winner = i) = w_i / sum w
    token = race over blocks of 128 words (w = a block's mass), then over the words of the block that won     logp = log p_token

Why a race and not the inverse of the cumulative sum, which needs one number: rounding. Another batch, thread count or machine moves
logits by 1e-6, which moves every edge of the cumulative sum, and 49,152 words have as many edges: SmolLM2 drew another token once in
270, so 4 rows of 32 changed when the number of slots did. A race changes its mind only when its first two are within rounding: 0 of 32.
One variate a word would cost 49,152 of them a token; two levels cost 384 + 128.

On a GPU all of a row happens in one program of one launch (`sample`): temperature, truncation, both races, log-probability, entropy, and the
logits are read once, 4 V bytes. Truncation to top-k, top-p and min-p is one cutoff: keep z >= c. The first two cutoffs are found without
sorting, by the 8 hexadecimal digits of c's place in the order of all floats, each digit by one more reading of the row, so top-k or top-p
alone costs 8 or 9 readings more, which the L2 cache serves in part. (Words equal to the cutoff are all kept; a sort would drop some.)

Dims: n rows, V vocabulary, m runners of a race.
"""
import math

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it and do not need it
    from types import SimpleNamespace
    triton, tl = SimpleNamespace(jit=lambda f: f), SimpleNamespace(constexpr=None)

MODE = "auto"  # set by kernels.use(): "auto" Triton on CUDA tensors, "triton" always, "torch" never
BLOCK = 128  # near the square root of V, and it divides 49,152 and 151,936: no padding for the real vocabularies
WORD, LONG = 0xFFFFFFFF, (1 << 64) - 1


def philox(seed: int, c0, c1, c2, c3):
    """First two 32-bit words of Philox4x32-10 with key `seed` (64 bits) and counter words c0..c3 (int64 tensors, broadcast) -> int64 in [0, 2^32)."""
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64) & WORD for c in (c0, c1, c2, c3)))
    for _ in range(10):
        # products of two 32-bit words wrap in int64, but their bits are right: mask after the shift
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & WORD) ^ c1 ^ k0, b & WORD, (a >> 32 & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1


def token_keys(seed: int, step: int, prompt, sample, position):
    """64 random bits (int64) for the token at `position` of sample number `sample` of prompt number `prompt` in a step; tensors broadcast."""
    low, high = philox(seed, position, sample, prompt, step)
    return high << 32 | low


def signed(x: int) -> int:
    return (x & LONG) - (1 << 64 if x & (1 << 63) else 0)  # torch's int64 wraps like uint64, but takes its constants signed


GOLDEN, MIX1, MIX2 = signed(0x9E3779B97F4A7C15), signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)


def splitmix(key, first: int, m: int):
    """Outputs first .. first + m - 1 of SplitMix64 started at key (n,) int64 -> (n, m) int64, all 64 bits random."""
    z = key[:, None] + torch.arange(first + 1, first + m + 1, device=key.device) * GOLDEN
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * MIX1  # int64 shifts drag the sign along: the mask makes them logical
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * MIX2
    return z ^ (z >> 31 & (1 << 33) - 1)


def race(weights, key, first: int):
    """Draws an index (n,) in proportion to weights (n, m) >= 0, with variates first .. first + m - 1 of each row's key (n,)."""
    u = ((splitmix(key, first, weights.shape[1]) >> 11 & (1 << 53) - 1).double() + 0.5) * 2.0**-53  # inside (0, 1)
    return (weights / -u.log()).argmax(-1)


def draw_ref(logits, key):
    """The definition, in fp64: logits (n, V), key (n,) -> token (n,) int64, logp (n,)."""
    n, V = logits.shape
    logp = logits.double().log_softmax(-1)
    p, token = logp.exp(), torch.zeros(n, dtype=torch.int64)
    for i in range(n):
        blocks, start = p[i].split(BLOCK), 0
        if V > BLOCK:
            start = int(race(torch.stack([b.sum() for b in blocks])[None], key[i : i + 1], 0))
        token[i] = start * BLOCK + race(blocks[start][None], key[i : i + 1], len(blocks) if V > BLOCK else 0)[0]
    return token, logp.gather(1, token[:, None])[:, 0]


def draw(logits, key):
    """logits (n, V) fp32, -inf for words that may not come, and key (n,) int64 -> token (n,) int64, logp (n,) fp32 in nats.

    A row of logits that is not finite gives some token of the vocabulary and a logp of nan: who reads the logp finds out.
    """
    n, V = logits.shape
    assert key.shape == (n,), f"logits {tuple(logits.shape)}, key {tuple(key.shape)}"
    p = logits.softmax(-1)  # one pass in cache: max, subtract, exp and sum apart take 1.5-2x as long at (32, 151,936)
    if V <= BLOCK:
        token, total = race(p, key, 0), p.double().sum(-1)
    else:
        blocks = (p if V % BLOCK == 0 else torch.nn.functional.pad(p, (0, BLOCK - V % BLOCK))).view(n, -1, BLOCK)
        mass = blocks.sum(-1).double()
        block, total = race(mass, key, 0), mass.sum(-1)
        token = block * BLOCK + race(blocks[torch.arange(n, device=p.device), block], key, mass.shape[1])
    # over the mass as it is here: fp32's sum of 151,936 numbers inside softmax is a few 1e-7 off
    return token, (p.gather(1, token[:, None])[:, 0] / total).log().float()


def greedy(logits):
    """Most likely token (n,) of logits (n, V) and its log-probability (n,) in nats; ties go to the smallest id."""
    token = logits.argmax(-1, keepdim=True)
    return token[:, 0], logits.log_softmax(-1).gather(1, token)[:, 0]


def entropy(logits):
    """Entropy (n,) in nats of the distributions with these logits (n, V), -inf for words that may not come."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)  # 0 * -inf would be NaN


# ------------------------------------------------------------------------------------------------------------ on a GPU
def on_triton(x) -> bool:
    return (MODE == "triton" or MODE == "auto" and x.is_cuda) and x.dtype == torch.float32


def sample_ref(logits, key, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The definition of `sample`, in fp64 and by sorting: logits (n, V), key (n,) -> token (n,), logp (n,), entropy (n,)."""
    z = logits.double() / temperature
    if 0 < top_k < z.shape[1]:
        z = z.masked_fill(z < z.topk(top_k, -1).values[:, -1:], float("-inf"))
    if top_p < 1.0:
        ordered, order = z.sort(-1)
        gone = ordered.softmax(-1).cumsum(-1) <= 1.0 - top_p
        gone[:, -1] = False
        z = z.masked_fill(torch.zeros_like(gone).scatter_(1, order, gone), float("-inf"))
    z = z.masked_fill(z < z.amax(-1, keepdim=True) + (math.log(min_p) if min_p else -math.inf), float("-inf"))
    logp = z.log_softmax(-1)
    return *draw_ref(z, key), -(logp.exp() * logp.clamp(min=-1e300)).sum(-1)


def sample(logits, key, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, times=1):
    """Tempers, truncates, draws and scores in one launch, for tensors that `on_triton` accepts.

    logits (n, V) fp32, not changed; key (n * times,) int64, row i draws from logits i // times; key None: the most likely
    word, whose distribution is then neither tempered nor truncated.
    Returns token (n * times,) int64, logp and entropy (n * times,) fp32 in nats, both of the tempered and truncated distribution.
    """
    n, V = logits.shape
    assert key is None or key.shape == (n * times,), f"logits {tuple(logits.shape)}, key {tuple(key.shape)}, times {times}"
    if key is None:
        temperature, top_k, top_p, min_p = 1.0, 0, 1.0, 0.0
    token = torch.empty(n * times, dtype=torch.int64, device=logits.device)
    logp, entropy = (torch.empty(n * times, device=logits.device) for _ in range(2))
    if n:
        _sample_kernel[(n * times,)](logits.contiguous(), key, token, logp, entropy, V, triton.cdiv(V, BLOCK), float(temperature), float(top_k), 1.0 - top_p,
                                     math.log(min_p) if min_p else -math.inf, times, TOP_K=0 < top_k < V, TOP_P=top_p < 1.0,
                                     BLOCK=BLOCK, TILE=min(4096, max(BLOCK, triton.next_power_of_2(V))), num_warps=8)
    return token, logp, entropy


@triton.jit
def _words(logits, j, V, temperature, cut):
    """Tempered logits of words j; -inf below the cutoff and past the end. NaN stays NaN: it fails the comparison."""
    x = tl.div_rn(tl.load(logits + j, mask=j < V, other=float("-inf")), temperature)
    return tl.where(x < cut, float("-inf"), x)


@triton.jit
def _exponential(key, i):
    """log of the i-th exponential variate (fp64) of a row's key: SplitMix64 as in `splitmix`, where uint64 wraps by itself."""
    z = key + (i + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return tl.log(-tl.log(((z >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16))


@triton.jit
def _cutoff(logits, V, temperature, cut, m, limit, MASS: tl.constexpr, TILE: tl.constexpr):
    """The largest float c with  #{z >= c} >= limit,  or with MASS  mass{z < c} <= limit * mass{all}.

    Floats compare like integers once the lower 31 bits of negative ones are flipped; both conditions hold up to some integer and fail from
    there on, so 16 candidates tried at once give its next four bits. m: any number near the row's maximum.
    """
    d = tl.arange(0, 16).to(tl.int64)
    at = tl.full((), -2139095041, tl.int64)  # -inf in that order; what lies past +inf is NaN and fails every comparison
    step = tl.full((), 1 << 28, tl.int64)
    for _ in range(8):
        place = tl.minimum(at + d * step, 0x7FFFFFFF).to(tl.int32)
        c = (place ^ ((place >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        found, total = tl.zeros((16,), tl.float32), 0.0
        for start in range(0, V, TILE):
            x = _words(logits, start + tl.arange(0, TILE), V, temperature, cut)
            above = x[:, None] >= c[None, :]
            if MASS:
                e = tl.exp(x - m)
                total += tl.sum(e, 0)
                found += tl.sum(tl.where(above, 0.0, e[:, None]), 0)
            else:
                found += tl.sum(tl.where(above, 1.0, 0.0), 0)
        good = found <= limit * total if MASS else found >= limit
        at += tl.maximum(tl.sum(good.to(tl.int64), 0) - 1, 0) * step
        step = step // 16
    place = at.to(tl.int32)
    return (place ^ ((place >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _sample_kernel(logits, keys, token, logp, entropy, V, blocks, temperature, top_k, tail, floor, times,
                   TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """A program a row. tail: 1 - top_p; floor: log(min_p) or -inf. A race over masses w is the argmax of log w - log E: no maximum is needed first."""
    row = tl.program_id(0)
    logits += (row // times).to(tl.int64) * V
    key = tl.zeros((), tl.uint64) if keys is None else tl.load(keys + row).to(tl.uint64, bitcast=True)
    cut, m = float("-inf"), -3.4028234e38
    if TOP_K:
        cut = _cutoff(logits, V, temperature, cut, 0.0, top_k, False, min(TILE, 1024))
    if TOP_P or floor > float("-inf"):
        for start in range(0, V, TILE):
            m = tl.maximum(m, tl.max(_words(logits, start + tl.arange(0, TILE), V, temperature, cut), 0))
        if TOP_P:
            cut = tl.maximum(cut, tl.minimum(_cutoff(logits, V, temperature, cut, m, tail, True, min(TILE, 1024)), m))  # the first word stays
        cut = tl.maximum(cut, m + floor)
    m, s, t = -3.4028234e38, 0.0, 0.0
    best, block = tl.full((), float("-inf"), tl.float64), 0
    b, w = tl.arange(0, TILE // BLOCK), tl.arange(0, BLOCK)
    for start in range(0, V, TILE):
        x = _words(logits, start + b[:, None] * BLOCK + w[None, :], V, temperature, cut)
        m_new = tl.maximum(m, tl.max(tl.max(x, 1), 0))
        e = tl.exp(x - m_new)
        mass = tl.sum(e, 1)
        a = tl.exp(m - m_new)
        t = a * (t + s * tl.maximum(m - m_new, -1000.0)) + tl.sum(tl.sum(tl.where(e > 0, e * (x - m_new), 0.0), 1), 0)
        s = s * a + tl.sum(mass, 0)
        if keys is None:
            score = (tl.max(x, 1) - m_new).to(tl.float64)
        else:
            score = tl.log(mass.to(tl.float64)) - _exponential(key, start // BLOCK + b)
        score = tl.where(score == score, score, float("-inf"))  # NaN loses here, and shows in the logp
        # scores are relative to the maximum so far: beside a logit of -3e38 even fp64 would lose them
        top, best, m = tl.max(score, 0), best + (m - m_new), m_new
        block = tl.where(top > best, start // BLOCK + tl.argmax(score, 0), block)
        best = tl.maximum(best, top)
    score = (_words(logits, block * BLOCK + w, V, temperature, cut) - m).to(tl.float64)
    if keys is not None:
        score -= _exponential(key, tl.where(blocks > 1, blocks, 0) + w)
    score = tl.where(score == score, score, float("-inf"))
    word = tl.minimum(block * BLOCK + tl.argmax(score, 0), V - 1)  # inside the vocabulary, whatever the logits are
    tl.store(token + row, word.to(tl.int64))
    tl.store(logp + row, (_words(logits, word, V, temperature, cut) - m) - tl.log(s))
    tl.store(entropy + row, tl.log(s) - t / s)
