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

Dims: n rows, V vocabulary, m runners of a race.
"""
import torch

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
