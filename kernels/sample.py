"""Drawing tokens: counter-based random numbers, a race that decides, and the logp of what was drawn.

The random numbers of a token are a function of (seed, step, prompt, sample, position) and of nothing
else: Philox4x32-10 (Salmon et al., SC'11) with the seed as its key and the other four as its counter
gives 64 bits, the token's own key; it is the generator of `tl.philox`. SplitMix64's finaliser (Steele et
al., OOPSLA'14) stretches them into as many exponential variates as the draw needs, at ten operations
each where Philox takes a hundred.

    race over weights w:  winner = argmax_i w_i / E_i,  E_i exponential   ->   P(winner = i) = w_i / sum w
    token = race over blocks of 128 words (w = a block's mass), then over the words of the block that won
    logp  = log p_token

Why a race and not the inverse of the cumulative sum, which needs one number: rounding. Another batch,
thread count or machine moves logits by 1e-6, which moves every edge of the cumulative sum, and 49,152 words
have as many edges: SmolLM2 drew another token once in 270, so 4 rows of 32 changed when the number of slots
did. A race changes its mind only when its first two are within rounding: 0 of 32. One variate a word would
cost 49,152 of them a token; two levels cost 384 + 128.

On a GPU (`sample`) two kernels do all of it. `_blocks_kernel` reads the logits once, 4 V bytes a row, with
many programs a row, and keeps three numbers a block of 128 words: maximum m, sum of e = exp(z - m), sum of
e * (z - m). `_sample_kernel`, one program a draw, joins them (a block weighs e^(m - M) times its sum, M the
row's maximum), races the blocks, races the words of the block that won, and writes log-probability and
entropy. A block's numbers do not depend on how many programs there are, so a row draws the same in any batch.

Truncation to top-k, top-p and min-p is one cutoff: keep z >= c. The first two cutoffs are found without
sorting (`_cut_kernel`), by the hexadecimal digits of c's place in the order of all floats, each digit by one
reading of the few blocks that can decide it. For top-k they are the k blocks with the largest maxima, for
top-p those with a word likely enough to matter. Words equal to the cutoff are all kept; a sort would drop
some.

Dims: n rows, V vocabulary, m runners of a race.
"""

import math
from functools import partial

import torch

from kernels import switch
from kernels.switch import core, tl, triton

# Near the square root of V, and it divides 49,152 and 151,936: no padding for the real vocabularies.
BLOCK = 128
CUT_BLOCKS, CUT_WARPS = 8, 16  # blocks that _cut_kernel reads at once, and its warps
WORD, LONG = 0xFFFFFFFF, (1 << 64) - 1


def philox(seed: int, c0, c1, c2, c3):
    """First two 32-bit words of Philox4x32-10 -> two int64 tensors of numbers in [0, 2^32).

    seed: its key, 64 bits; c0..c3: the words of its counter, int64 tensors or ints that broadcast.
    """
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    counter = [torch.as_tensor(c, dtype=torch.int64) & WORD for c in (c0, c1, c2, c3)]
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    for _ in range(10):
        # Products of two 32-bit words wrap in int64, but their bits are right: mask after the shift.
        a = c0 * 0xD2511F53
        b = c2 * 0xCD9E8D57
        c0, c2 = (b >> 32 & WORD) ^ c1 ^ k0, (a >> 32 & WORD) ^ c3 ^ k1
        c1, c3 = b & WORD, a & WORD
        k0 = (k0 + 0x9E3779B9) & WORD
        k1 = (k1 + 0xBB67AE85) & WORD
    return c0, c1


def token_keys(seed: int, step: int, prompt, sample, position):
    """64 random bits (int64) for the token at `position` of sample `sample` of prompt `prompt` in a step.

    The last three are numbers, tensors or ints that broadcast.
    """
    low, high = philox(seed, position, sample, prompt, step)
    return high << 32 | low


def signed(x: int) -> int:
    """The lower 64 bits of x as an int64: torch's wraps like uint64, but takes its constants signed."""
    x &= LONG
    return x - (1 << 64) if x >> 63 else x


GOLDEN = signed(0x9E3779B97F4A7C15)
MIX1 = signed(0xBF58476D1CE4E5B9)
MIX2 = signed(0x94D049BB133111EB)


def splitmix(key, first: int, m: int):
    """Outputs first .. first + m - 1 of SplitMix64 started at key (n,) int64 -> (n, m) int64."""
    numbers = torch.arange(first + 1, first + m + 1, device=key.device)
    z = key[:, None] + numbers * GOLDEN  # (n, m)
    # int64 shifts drag the sign along; the masks make them logical
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * MIX1
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * MIX2
    return z ^ (z >> 31 & (1 << 33) - 1)


def race(weights, key, first: int):
    """Draws an index (n,) in proportion to weights (n, m) >= 0.

    It uses variates first .. first + m - 1 of each row's key (n,).
    """
    bits = splitmix(key, first, weights.shape[1]) >> 11 & (1 << 53) - 1
    u = (bits.double() + 0.5) * 2.0**-53  # inside (0, 1)
    return (weights / -u.log()).argmax(-1)


def draw_ref(logits, key):
    """The definition, in fp64: logits (n, V), key (n,) -> token (n,) int64, logp (n,)."""
    n, V = logits.shape
    logp = logits.double().log_softmax(-1)
    p = logp.exp()
    token = torch.zeros(n, dtype=torch.int64)
    for i in range(n):
        blocks, own_key = p[i].split(BLOCK), key[i : i + 1]
        winner, used = 0, 0  # the block that won, and how many variates that took
        if V > BLOCK:
            mass = torch.stack([block.sum() for block in blocks])
            winner, used = int(race(mass[None], own_key, 0)), len(blocks)
        token[i] = winner * BLOCK + race(blocks[winner][None], own_key, used)[0]
    return token, logp.gather(1, token[:, None])[:, 0]


def draw(logits, key, *, entropy=False):
    """Draws a word of each row -> token (n,) int64, its logp (n,) fp32 in nats.

    logits (n, V) fp32, -inf for words that may not come; key (n,) int64. entropy: gives the entropy (n,) fp32
    of each distribution, in nats, as a third result; -inf must then be written as -1e30, for 0 * -inf is NaN.

    A row of logits that is not finite gives some token of the vocabulary and a logp of nan, so that whoever
    reads the logp finds out.
    """
    n, V = logits.shape
    assert key.shape == (n,), f"logits {tuple(logits.shape)}, key {tuple(key.shape)}"
    # One pass in cache: max, subtract, exp and sum apart take 1.5-2x as long at (32, 151,936).
    p = logits.softmax(-1)
    if V <= BLOCK:
        total = p.double().sum(-1)
        token = race(p, key, 0)
    else:
        padding = -V % BLOCK
        padded = torch.nn.functional.pad(p, (0, padding)) if padding else p
        blocks = padded.view(n, -1, BLOCK)
        mass = blocks.sum(-1).double()  # (n, blocks)
        total = mass.sum(-1)
        block = race(mass, key, 0)
        words = blocks[torch.arange(n, device=p.device), block]  # (n, BLOCK)
        token = block * BLOCK + race(words, key, mass.shape[1])
    # Divided by the mass as it is here: fp32's sum of 151,936 numbers inside softmax is a few 1e-7 off.
    p_token = p.gather(1, token[:, None])[:, 0]
    logp = (p_token / total).log().float()
    if not entropy:
        return token, logp
    # H = log sum exp(z) - sum p z, whose first part the drawn word has already. One more reading of p and z:
    # 1 % of a step of SmolLM2 where log-softmax and its exponential are 9 %.
    mean = torch.bmm(p[:, None], logits[:, :, None])[:, 0, 0]
    return token, logp, logits.gather(1, token[:, None])[:, 0] - logp - mean


def greedy(logits):
    """Most likely token (n,) of logits (n, V) and its logp (n,) in nats; ties go to the smallest id."""
    token = logits.argmax(-1, keepdim=True)
    return token[:, 0], logits.log_softmax(-1).gather(1, token)[:, 0]


def entropy(logits):
    """Entropy (n,) in nats of the distributions of logits (n, V), -inf for words that may not come."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)  # 0 * -inf would be NaN


# ------------------------------------------------------------------------------------------- on a GPU
def on_triton(x) -> bool:
    return switch.on_triton(x, dtypes=(torch.float32,))


def sample_ref(logits, key, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The definition of `sample`, in fp64 and by sorting.

    logits (n, V), key (n,) -> token (n,), logp (n,), entropy (n,).
    """
    inf = float("inf")
    z = logits.double() / temperature
    if 0 < top_k < z.shape[1]:
        kth = z.topk(top_k, -1).values[:, -1:]
        z = z.masked_fill(z < kth, -inf)
    if top_p < 1.0:
        ordered, order = z.sort(-1)
        gone = ordered.softmax(-1).cumsum(-1) <= 1.0 - top_p
        gone[:, -1] = False  # the most likely word stays
        z = z.masked_fill(torch.zeros_like(gone).scatter_(1, order, gone), -inf)
    if min_p:
        z = z.masked_fill(z < z.amax(-1, keepdim=True) + math.log(min_p), -inf)
    token, logp = draw_ref(z, key)
    logps = z.log_softmax(-1)
    return token, logp, -(logps.exp() * logps.clamp(min=-1e300)).sum(-1)


def sample(logits, key, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, times=1):
    """Tempers, truncates, draws and scores, for tensors that `on_triton` accepts.

    logits (n, V) fp32, not changed; key (n * times,) int64, row i draws from logits i // times; key None: the
    most likely word, whose distribution is then neither tempered nor truncated. temperature, top_p, min_p:
    numbers, or tensors of one number on the device (fp32 or fp64). A tensor is read when the kernels run, so
    a recorded CUDA graph follows it. A tensor for top_p or min_p switches truncation on whatever its value,
    because that decides what is launched. top_k: a number. Returns token (n * times,) int64, logp and entropy
    (n * times,) fp32 in nats, both of the tempered and truncated distribution.
    """
    n, V = logits.shape
    shapes = f"logits {tuple(logits.shape)}, key {None if key is None else tuple(key.shape)}, times {times}"
    assert key is None or key.shape == (n * times,), shapes
    if key is None:
        temperature, top_k, top_p, min_p = 1.0, 0, 1.0, 0.0
    token = torch.empty(n * times, dtype=torch.int64, device=logits.device)
    logp = torch.empty(n * times, device=logits.device)
    entropy = torch.empty(n * times, device=logits.device)
    if n == 0:
        return token, logp, entropy

    logits = logits.contiguous()
    blocks = triton.cdiv(V, BLOCK)
    stats = torch.empty(n, 3, blocks, device=logits.device)
    width = max(16, triton.next_power_of_2(blocks))
    count, warps = blocks_a_program(n, blocks)
    programs = triton.cdiv(blocks, count)
    read_blocks = partial(
        _blocks_kernel[(n * programs,)],
        logits, stats, V=V, blocks=blocks, programs=programs, temperature=temperature,
        BLOCK=BLOCK, COUNT=count, num_warps=warps,
    )  # fmt: skip
    read_blocks(cuts=None)
    cuts = truncation(logits, stats, temperature, top_k, top_p, min_p)
    if cuts is not None:
        read_blocks(cuts=cuts)
    _sample_kernel[(n * times,)](
        logits, stats, cuts, key, token, logp, entropy, V, blocks, temperature, times,
        BLOCK=BLOCK, WIDTH=width, num_warps=8 if width > 512 else 4,
    )  # fmt: skip
    return token, logp, entropy


def blocks_a_program(n: int, blocks: int):
    """How many blocks a program of _blocks_kernel folds, and its warps.

    Few rows need many small programs to fill a GPU of 132 processors. Each warp folds whole blocks, so no bit
    of the result depends on this rule.
    """
    if n * blocks < 132 * 64:
        return 4, 4
    return 16, 4


def truncation(logits, stats, temperature, top_k, top_p, min_p):
    """The cutoff (n,) fp32 of each row, below which no tempered logit is kept. None: all words may come.

    stats (n, 3, blocks): of all words, as _blocks_kernel wrote them.
    """
    (n, V), blocks = logits.shape, stats.shape[2]
    keeps_k = 0 < top_k < V
    keeps_mass = torch.is_tensor(top_p) or top_p < 1.0
    has_floor = torch.is_tensor(min_p) or min_p > 0
    if not (keeps_k or keeps_mass or has_floor):
        return None
    cuts = torch.empty(n, device=logits.device)
    chosen = torch.empty(n, blocks, dtype=torch.int32, device=logits.device)
    floor = -math.inf
    if has_floor:
        floor = min_p.log() if torch.is_tensor(min_p) else math.log(min_p)
    _cut_kernel[(n,)](
        logits, stats, chosen, cuts, V, blocks, temperature, float(top_k), 1.0 - top_p, floor,
        TOP_K=keeps_k, TOP_P=keeps_mass, BLOCK=BLOCK, COUNT=min(CUT_BLOCKS, triton.next_power_of_2(blocks)),
        WIDTH=max(16, triton.next_power_of_2(blocks)), num_warps=CUT_WARPS,
    )  # fmt: skip
    return cuts


@triton.jit
def _number(x):
    """A number that the host gave, or that lies on the device."""
    x = core.to_tensor(x)
    if x.dtype.is_ptr():
        x = tl.load(x)
    return x.to(tl.float32)


@triton.jit
def _words(logits, j, V, temperature, cut):
    """Tempered logits of words j; -inf below the cutoff and past the end. NaN stays NaN."""
    x = tl.load(logits + j, mask=j < V, other=float("-inf"))
    if temperature != 1.0:  # an exact division is ten instructions, a third of what the kernel may do a word
        x = tl.div_rn(x, temperature)
    return tl.where(x < cut, float("-inf"), x)


@triton.jit
def _exponential(key, i):
    """The i-th exponential variate (fp64) of a row's key: `splitmix`, where uint64 wraps by itself."""
    z = key + (i + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    u = ((z >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16
    return -tl.log(u)


@triton.jit
def _place_of(x):
    """The place (int64) of a float in the order of all floats; `_float_at` is its inverse.

    Floats compare like integers once the lower 31 bits of negative ones are flipped.
    """
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _float_at(place):
    bits = place.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _cutoff(
    z, V, temperature, cut, chosen, count, low, top, limit, outside,
    MASS: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The largest float c with  #{z >= c} >= limit,  or with MASS  mass{z < c} <= limit * mass{all}.

    Either holds from `low` on up to some place in the order of floats, and fails from there on, `top`, the
    row's maximum, at the latest: 16 candidates tried at once give the next four bits of that place. Read are
    `count` blocks of words, those listed in `chosen` or (None) the first. outside: the mass of all other
    words, which are below low. Masses are relative to top.
    """
    digits = tl.arange(0, 16).to(tl.int64)
    at = _place_of(low)
    step = tl.full((), 1 << 28, tl.int64)
    while step > _place_of(top) - at:
        step = step // 16
    while step > 0:
        # what lies past +inf is NaN and fails every comparison
        c = _float_at(tl.minimum(at + digits * step, 0x7FFFFFFF))
        # a number a word and candidate, added up once at the end: a sum for each tile waits for all warps
        found = tl.zeros((COUNT * BLOCK, 16), tl.float32)
        total = tl.zeros((COUNT * BLOCK,), tl.float32)
        for start in range(0, count, COUNT):
            i = start + tl.arange(0, COUNT)
            block = i
            if chosen is not None:
                block = tl.load(chosen + i, mask=i < count, other=0)
            j = tl.where(i < count, block * BLOCK, V)[:, None] + tl.arange(0, BLOCK)[None, :]
            x = _words(z, tl.reshape(j, (COUNT * BLOCK,)), V, temperature, cut)
            above = x[:, None] >= c[None, :]
            if MASS:
                e = tl.exp(x - top)
                total += e
                found += tl.where(above, 0.0, e[:, None])
            else:
                found += tl.where(above, 1.0, 0.0)
        below = outside + tl.sum(found, 0)
        good = below <= limit * (outside + tl.sum(total, 0)) if MASS else below >= limit
        at += tl.maximum(tl.sum(good.to(tl.int64), 0) - 1, 0) * step
        step = step // 16
    return _float_at(at)


@triton.jit
def _cut_kernel(
    logits, stats, chosen, cuts, V, blocks, temperature, top_k, tail, floor,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The cutoff of a row, a program each. tail: 1 - top_p; floor: log(min_p) or -inf; chosen: scratch."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    stats += row * 3 * blocks
    chosen += row * blocks
    temperature, tail = _number(temperature), _number(tail)
    b = tl.arange(0, WIDTH)
    m = tl.load(stats + b, mask=b < blocks, other=float("-inf"))
    top = tl.max(m, 0)
    cut = tl.full((), float("-inf"), tl.float32)
    low, outside = cut, 0.0
    if TOP_K:
        # the k-th largest maximum: k blocks have a word as large, so the k-th largest word is no smaller
        all_maxima = tl.cdiv(blocks, BLOCK)
        low = _cutoff(stats, blocks, 1.0, cut, None, all_maxima, low, top, top_k, 0.0, False, BLOCK, COUNT)
    elif TOP_P:
        # V words that are less likely than a V-th of the tail weigh less than it; 0.1 % is for rounding
        mass = tl.load(stats + blocks + b, mask=b < blocks, other=0.0) * tl.exp(m - top)
        low = top + tl.log(0.999 * tail * tl.sum(mass, 0) / V)
        low = tl.where(low == low, low, float("-inf"))
        outside = tl.sum(tl.where(m < low, mass, 0.0), 0)
    if TOP_K or TOP_P:
        few = (b < blocks) & (m >= low)
        tl.store(chosen + tl.cumsum(few.to(tl.int32), 0) - 1, b, mask=few)
        tl.debug_barrier()  # the list is read by other threads than wrote it
        count = tl.sum(few.to(tl.int32), 0)
    if TOP_K:
        cut = _cutoff(logits, V, temperature, cut, chosen, count, low, top, top_k, 0.0, False, BLOCK, COUNT)
        low = cut
    if TOP_P:
        walk = (logits, V, temperature, cut, chosen, count, low, top)
        nucleus = _cutoff(*walk, tail, outside, True, BLOCK, COUNT)
        cut = tl.maximum(cut, tl.minimum(nucleus, top))  # the most likely word stays
    cut = tl.maximum(cut, top + _number(floor))
    tl.store(cuts + row, cut)


@triton.jit
def _fold(x):
    """Words x (blocks, BLOCK) -> of each block: maximum m, sum of e = exp(x - m), sum of e * (x - m)."""
    m = tl.max(x, 1)
    base = tl.where(m > float("-inf"), m, 0.0)  # -inf less -inf would be NaN
    d = x - base[:, None]
    e = tl.exp(d)
    slope = tl.where(e > 0, e * d, 0.0)  # 0 * -inf would be NaN
    return m, tl.sum(e, 1), tl.sum(slope, 1)


@triton.jit
def _blocks_kernel(
    logits, stats, cuts, V, blocks, programs, temperature, BLOCK: tl.constexpr, COUNT: tl.constexpr
):
    """Reads the logits once and writes stats (n, 3, blocks); `programs` of COUNT blocks a row.

    With cuts (n,) it has been here before: it reads again only blocks with a word above the row's cutoff, or
    that are not finite, which their stats say.
    """
    row = tl.program_id(0) // programs
    block = tl.program_id(0) % programs * COUNT + tl.arange(0, COUNT)
    logits += row.to(tl.int64) * V
    stats += row * 3 * blocks
    j = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if cuts is None:
        cut = float("-inf")
    else:
        cut = tl.load(cuts + row)
        m = tl.load(stats + block, mask=block < blocks, other=float("-inf"))
        s = tl.load(stats + blocks + block, mask=block < blocks, other=0.0)
        j = tl.where((m >= cut) | (s != s), 0, V)[:, None] + j
    m, s, t = _fold(_words(logits, j, V, _number(temperature), cut))
    tl.store(stats + block, m, mask=block < blocks)
    tl.store(stats + blocks + block, s, mask=block < blocks)
    tl.store(stats + 2 * blocks + block, t, mask=block < blocks)


@triton.jit
def _sample_kernel(
    logits,
    stats,
    cuts,
    keys,
    token,
    logp,
    entropy,
    V,
    blocks,
    temperature,
    times,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Joins the blocks of a row and draws: the block that wins, then its word that wins; a program a draw.

    Without keys the scores of the races are the logits themselves.
    """
    draw = tl.program_id(0)
    row = draw // times
    logits += row.to(tl.int64) * V
    temperature = _number(temperature)
    if cuts is None:
        cut = float("-inf")
    else:
        cut = tl.load(cuts + row)

    b = tl.arange(0, WIDTH)
    real = b < blocks
    stats += row * 3 * blocks
    m = tl.load(stats + b, mask=real, other=float("-inf"))
    s = tl.load(stats + blocks + b, mask=real, other=0.0)
    t = tl.load(stats + 2 * blocks + b, mask=real, other=0.0)
    top = tl.max(m, 0)
    a = tl.exp(m - top)
    mass = (s * a).to(tl.float64)
    log_total = tl.log(tl.sum(mass, 0)).to(tl.float32)
    # -1000 for -inf: what is so far below the maximum weighs nothing, and 0 * -inf would be NaN
    slope = tl.sum(a * (t + s * tl.maximum(m - top, -1000.0)), 0)

    if keys is None:
        score = m.to(tl.float64)
    else:
        key = tl.load(keys + draw).to(tl.uint64, bitcast=True)
        score = mass / _exponential(key, b)
    score = tl.where(real & (score == score), score, float("-inf"))  # NaN loses here, and shows in the logp
    block = tl.argmax(score, 0)

    w = tl.arange(0, BLOCK)
    x = _words(logits, block * BLOCK + w, V, temperature, cut)
    if keys is None:
        score = x.to(tl.float64)
    else:
        e = tl.exp(x - tl.max(x, 0)).to(tl.float64)
        used = tl.where(blocks > 1, blocks, 0)  # variates of the race over blocks
        score = e / _exponential(key, used + w)
    score = tl.where(score == score, score, float("-inf"))
    # of the vocabulary, whatever the logits are
    word = tl.minimum(block * BLOCK + tl.argmax(score, 0), V - 1)

    x = _words(logits, word, V, temperature, cut)
    tl.store(token + draw, word.to(tl.int64))
    tl.store(logp + draw, (x - top) - log_total)
    tl.store(entropy + draw, log_total - slope / tl.sum(mass, 0).to(tl.float32))
