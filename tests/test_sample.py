"""The generator, the draw and its log-probability, against published numbers, fp64 and chi-square.

The Triton form of the same is tested in test_sample_kernel.py.
"""

import math

import pytest
import torch

from conftest import quick
from kernels.logprob import truncate_
from kernels.sample import LONG, WORD, draw, draw_ref, greedy, philox, race, splitmix, token_keys


def philox_words(counter, key):
    """Philox4x32-10 by the paper, in Python's integers: four words."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k0, b & WORD, (a >> 32) ^ c[3] ^ k1, a & WORD]
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c


# kat_vectors of Random123: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox_gives_the_published_numbers(counter, key, words):
    assert tuple(philox_words(counter, key)) == words
    assert tuple(w.item() for w in philox(key[0] | key[1] << 32, *counter)) == words[:2]


def test_philox_equals_the_paper_on_random_counters():
    g = torch.Generator().manual_seed(0)
    c = torch.randint(0, 2**32, (4, 200), generator=g)
    for seed in (1, 0xDEADBEEF12345678, -1):
        theirs = [tuple(philox_words(row, (seed & WORD, seed >> 32 & WORD))[:2]) for row in c.t().tolist()]
        assert list(zip(*(w.tolist() for w in philox(seed, *c)))) == theirs


def test_each_part_of_the_key_changes_it_and_nothing_else_does():
    base = dict(seed=1, step=2, prompt=3, sample=4, position=5)
    made = {
        token_keys(**{**base, name: torch.tensor(6) if name not in ("seed", "step") else 6}).item()
        for name in base
    }
    assert len({token_keys(**base).item(), *made}) == 6
    assert token_keys(1, 2, torch.arange(9), 4, 5)[3] == token_keys(**base)
    words = philox(1, 5, 4, 3, 2)
    assert token_keys(**base).item() & LONG == words[0].item() | words[1].item() << 32


def test_splitmix_gives_the_published_numbers():
    """The reference C code started at 1234567, and an odd key of all bits by its ten lines in Python."""
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [x & LONG for x in splitmix(torch.tensor([1234567]), 0, 5)[0].tolist()] == known
    key, theirs = -0x123456789ABCDEF, []
    for i in range(40):
        z = (key + (i + 1) * 0x9E3779B97F4A7C15) & LONG
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & LONG
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & LONG
        theirs.append(z ^ z >> 31)
    assert [x & LONG for x in splitmix(torch.tensor([key]), 7, 33)[0].tolist()] == theirs[7:]


def test_a_race_is_won_in_proportion_to_the_weights():
    w = torch.tensor([0.0, 1.0, 1e-3, 5.0, 0.0, 2.5, 1e-30])
    keys = token_keys(0, 0, torch.arange(200)[:, None], torch.arange(200), 0).flatten()
    for first in (0, 1, 384):
        won = race(w.expand(len(keys), -1), keys, first)
        assert chi_square(torch.bincount(won, minlength=7), w / w.sum()) < 4


def test_neighbouring_keys_draw_independently():
    """Pairs of words are independent: of two positions, of two samples, and of both levels of one draw."""
    n, w = 40_000, torch.ones(1, 8)
    keys = token_keys(5, 1, torch.arange(2)[:, None, None], torch.arange(100)[:, None], torch.arange(200))
    a = race(w.expand(n, -1), keys.flatten(), 0).view(2, 100, 200)
    b = race(w.expand(n, -1), keys.flatten(), 8).view(2, 100, 200)
    for x, y in ((a[..., 0::2], a[..., 1::2]), (a[:, 0::2], a[:, 1::2]), (a[0], a[1]), (a, b)):
        assert chi_square(torch.bincount((x * 8 + y).flatten(), minlength=64), torch.full((64,), 1 / 64)) < 4


def chi_square(counts, p) -> float:
    """How far counts are from n*p, in standard deviations of the statistic (Wilson-Hilferty).

    4 is 1 in 30,000. Words expected fewer than five times are one cell, as the test asks. A word of
    probability 0 that was drawn fails at once.
    """
    n = counts.sum()
    assert not counts[p == 0].any(), "a word of probability 0 was drawn"
    expected, counts = p.double() * n, counts.double()
    rare = expected < 5
    if rare.any():
        expected, counts = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (expected, counts))
    expected, counts = expected[expected > 0], counts[expected > 0]
    x2, k = ((counts - expected) ** 2 / expected).sum().item(), len(expected) - 1
    return 0.0 if k == 0 else ((x2 / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


def test_the_chi_square_test_can_fail():
    p = torch.full((64,), 1 / 64)
    counts = torch.bincount(
        torch.randint(0, 64, (20_000,), generator=torch.Generator().manual_seed(0)), minlength=64
    )
    assert chi_square(counts, p) < 4
    counts[3] += 150
    assert chi_square(counts, p) > 4


def keys(n: int, seed=0):
    return token_keys(seed, 0, torch.arange(n), 0, 0)


@pytest.mark.parametrize("V", [1, 2, 17, 127, 128, 129, 1000, 49_152, 151_936])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_draw_equals_its_definition(V, spread):
    n = 24 if V < 9000 else 6
    logits = torch.randn(n, V, generator=torch.Generator().manual_seed(V)) * spread
    (token, logp), (want, want_logp) = draw(logits.clone(), keys(n)), draw_ref(logits, keys(n))
    assert torch.equal(token, want)
    assert (logp - want_logp).abs().max() < 2e-6 * max(1, spread)


@pytest.mark.parametrize("V", [50, 128, 300, 151_936])
def test_a_word_of_probability_0_is_never_drawn(V):
    """Words at -inf or 200 nats down, between and after the others."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, V, generator=g)
    logits[:, torch.rand(V, generator=g) < 0.7] = float("-inf")
    logits[:20, -V // 2 :] = -200.0  # exp underflows to 0 beside a word near 0
    logits[:, V // 3] = 0.0
    logits[20:, : V // 4] = float("-inf")
    for seed in range(5):
        token, logp = draw(logits.clone(), keys(40, seed))
        assert (logits.softmax(-1).gather(1, token[:, None]) > 0).all() and logp.isfinite().all()


def test_a_row_with_one_word_left_draws_it_with_certainty():
    for V in (7, 128, 49_152):
        for word in (0, V // 2, V - 1):
            logits = torch.full((3, V), float("-inf"))
            logits[:, word] = torch.tensor([-1e4, 0.0, 1e30])
            token, logp = draw(logits, keys(3))
            assert token.tolist() == [word] * 3 and logp.tolist() == [0.0] * 3


def test_extreme_logits_stay_finite_and_exact():
    logits = torch.tensor(
        [[3e38, 3e38, -3e38], [-3e38, -3e38, -3e38], [88.8, 0.0, -88.8], [1e-38, 0.0, -1e-38]]
    )
    (token, logp), (want, want_logp) = draw(logits.clone(), keys(4)), draw_ref(logits, keys(4))
    assert torch.equal(token, want) and torch.allclose(logp.double(), want_logp, atol=1e-6)


@pytest.mark.slow
def test_rounding_of_the_logits_hardly_ever_changes_a_draw():
    """An inverse-CDF draw changed its mind once in 270 tokens of SmolLM2 when logits moved by rounding.

    49,152 words have as many edges to cross.
    """
    n, V = 400, 49_152
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(n, V, generator=g) * 2
    noisy = logits * (1 + 2e-7 * torch.randn(n, V, generator=g)) + 1e-6 * torch.randn(n, V, generator=g)
    assert (draw(logits, keys(n))[0] != draw(noisy, keys(n))[0]).sum() == 0


def test_logits_that_are_not_finite_give_a_logp_that_is_not():
    """A word of the vocabulary must still come out: the embedding is read before the logp."""
    logits = torch.zeros(3, 300)
    logits[0, 5], logits[1, 7], logits[2] = float("nan"), float("inf"), float("-inf")
    token, logp = draw(logits, keys(3))
    assert ((0 <= token) & (token < 300)).all() and logp.isnan().all()


@pytest.mark.parametrize(
    "options",
    [dict(), dict(top_k=5), dict(top_p=0.8), dict(min_p=0.1), dict(top_k=20, top_p=0.9, min_p=0.02)],
)
@pytest.mark.parametrize("temperature", quick(1, [1.7, 0.6, 1.0]))
def test_draws_follow_the_exact_distribution(temperature, options):
    """20,000 draws of one row, keyed as the sampler keys them.

    Top-p and min-p are spelled out here and not by our truncate_.
    """
    V, n = 200, 20_000
    z = torch.randn(V, generator=torch.Generator().manual_seed(5)).double() * 2 / temperature
    ordered, order = z.sort(descending=True)
    keep = torch.ones(V, dtype=torch.bool)
    if "top_k" in options:
        keep &= z >= ordered[options["top_k"] - 1]
    if "top_p" in options:
        p = z.masked_fill(~keep, float("-inf")).softmax(-1)[order]
        reached = p.cumsum(-1) - p >= options["top_p"]  # by the words before
        keep[order[reached]] = False
    if "min_p" in options:
        p = z.masked_fill(~keep, float("-inf")).softmax(-1)
        keep &= p >= options["min_p"] * p.max()
    exact = z.masked_fill(~keep, float("-inf")).softmax(-1)
    assert keep.sum() < V or not options

    key = token_keys(11, 0, torch.arange(n // 100)[:, None], torch.arange(100), 0).flatten()
    logits = truncate_(z.float()[None].clone(), **options)
    token, logp = draw(logits.expand(n, V), key)
    assert chi_square(torch.bincount(token, minlength=V), exact) < 4
    assert torch.allclose(logp.double(), exact.log()[token], atol=2e-6)


@pytest.mark.slow
def test_draws_follow_the_exact_distribution_of_a_huge_vocabulary():
    """151,936 words, half of the mass spread thinly over all: cells of 1,187 words check every block."""
    V, n = 151_936, 1_600
    z = torch.randn(V, generator=torch.Generator().manual_seed(1))
    z[12_345] = z.logsumexp(-1)
    token = torch.cat([draw(z[None].expand(len(part), V), part)[0] for part in keys(n).split(100)])
    cells = torch.zeros(128, dtype=torch.double).index_add_(
        0, torch.arange(V) // 1187, z.double().softmax(-1)
    )
    assert chi_square(torch.bincount(token // 1187, minlength=128), cells) < 4


def test_greedy_takes_the_first_of_equals_and_scores_it():
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]])
    token, logp = greedy(logits)
    assert token.tolist() == [1, 0]
    assert torch.allclose(logp, logits.log_softmax(-1).gather(1, token[:, None])[:, 0])
