"""Drawing tokens: counter-based random numbers and an inverse-CDF draw with its log-probability.

The random number of a token is a function of (seed, step, prompt, sample, position) and of nothing else: Philox4x32-10
(Salmon et al., SC'11) with the seed as its key and the other four as its counter. So a row's tokens do not depend on the batch it
was drawn in, its slot, the order of refills, the rank or the number of ranks; and it is the generator of `tl.philox`, so a
Triton kernel draws the same.

    token = first j with p_0 + .. + p_j > u * (p_0 + .. + p_V-1),   p = softmax(z)      logp = log p_token

One uniform a token instead of torch.multinomial's V exponentials: the draw of 32 rows from 49,152 words took 2.9x less time
(see dev/LOG.md). Sums go in two levels, blocks in fp32 and over blocks in fp64, so the cumulative sum of
151,936 small numbers does not round, and a word of probability 0 is never drawn.

Dims: n rows, V vocabulary.
"""
import torch

BLOCK = 128  # divides 49,152 and 151,936: no padding for the real vocabularies
ONE_LEVEL = 1024  # up to here one fp64 cumulative sum is faster than two levels: 18 words x 128 rows 0.39 -> 0.05 ms
WORD = 0xFFFFFFFF


def philox(seed: int, c0, c1, c2, c3):
    """First 32-bit word of Philox4x32-10 with key `seed` (64 bits) and counter words c0..c3 (int64 tensors, broadcast) -> int64 in [0, 2^32)."""
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64) & WORD for c in (c0, c1, c2, c3)))
    for _ in range(10):
        # products of two 32-bit words wrap in int64, but their bits are right: mask after the shift
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & WORD) ^ c1 ^ k0, b & WORD, (a >> 32 & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0


def uniforms(seed: int, step: int, prompt, sample, position):
    """Uniform numbers in (0, 1), fp64, of the tokens at `position` of sample number `sample` of prompt number `prompt` in a step."""
    return (philox(seed, position, sample, prompt, step).double() + 0.5) * 2.0**-32


def draw_ref(logits, u):
    """The definition: logits (n, V), u (n,) in (0, 1) -> token (n,) int64, logp (n,), by one cumulative sum in fp64."""
    p = logits.double().softmax(-1)
    cdf = p.cumsum(-1)
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    return token, logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]


def draw(logits, u):
    """logits (n, V) fp32, -inf for words that may not come, and u (n,) fp64 in (0, 1) -> token (n,) int64, logp (n,) fp32 in nats.

    A row of logits that is not finite gives some token of the vocabulary and a logp of nan: who reads the logp finds out.
    """
    n, V = logits.shape
    assert u.shape == (n,), f"logits {tuple(logits.shape)}, u {tuple(u.shape)}"
    p = logits.softmax(-1)  # one pass in cache; max, subtract, exp and sum apart take 1.5-2x as long at (32, 151,936)
    if V <= ONE_LEVEL:
        cdf = p.double().cumsum(-1)
        token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True).clamp_(max=V - 1)
        return token[:, 0], (p.gather(1, token) / cdf[:, -1:]).log().float()[:, 0]
    rows = torch.arange(n, device=logits.device)
    blocks = (p if V % BLOCK == 0 else torch.nn.functional.pad(p, (0, BLOCK - V % BLOCK))).view(n, -1, BLOCK)
    cdf = blocks.sum(-1).double().cumsum(-1)  # (n, blocks)
    target = (u * cdf[:, -1])[:, None]
    block = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[1] - 1)[:, 0]
    before = torch.where(block > 0, cdf[rows, block - 1], 0.0)[:, None]
    inner = blocks[rows, block].double().cumsum(-1)  # (n, BLOCK)
    # the block's fp32 sum and this fp64 one differ in the last bits: stay strictly below the end, where p > 0 is certain
    inside = torch.minimum(target - before, inner[:, -1:] * (1 - 2.0**-50)).clamp_(min=0.0)
    token = (block * BLOCK + torch.searchsorted(inner, inside, right=True)[:, 0]).clamp_(max=V - 1)
    # over the sum that was drawn from: fp32's own sum of 151,936 numbers is a few 1e-7 off
    return token, (p.gather(1, token[:, None]) / cdf[:, -1:]).log().float()[:, 0]


def greedy(logits):
    """Most likely token (n,) of logits (n, V) and its log-probability (n,) in nats; ties go to the smallest id."""
    token = logits.argmax(-1, keepdim=True)
    return token[:, 0], logits.log_softmax(-1).gather(1, token)[:, 0]
