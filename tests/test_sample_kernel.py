"""The sampling kernels of kernels/sample.py draw what their definition draws: the same words, to the id.

In Triton's interpreter on a CPU, compiled on a GPU: the same tests. conftest.py sets TRITON_INTERPRET before
anything imports Triton, unless there is a GPU. The interpreter takes about a millisecond an operation of a
program, so shapes here are small and odd; large ones are marked gpu.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernels
from kernels.logprob import truncate_
from kernels.sample import draw, greedy, philox, sample, sample_ref, token_keys

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

# numpy's words for what the tests of extreme numbers do on purpose
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::RuntimeWarning:triton.runtime.interpreter", "ignore::RuntimeWarning:numpy"
    ),
    pytest.mark.usefixtures("interpreter_without_two_faults"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
quick = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def triton_everywhere():
    kernels.use("triton")
    yield
    kernels.use("auto")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Whatever a kernel forgets to write is NaN, or a large integer."""
    make = torch.empty

    def poisoned(*args, **kwargs):
        out = make(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 10**6)

    monkeypatch.setattr(torch, "empty", poisoned)


def randn(*shape, seed=0, scale=1.0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * scale).to(DEVICE)


def keys(n, seed=0):
    return token_keys(seed, 2, torch.arange(n), 3, 4).to(DEVICE)


def by_torch(logits, key, *, temperature=1.0, **truncation):
    """What rollout.py does on a CPU."""
    return draw(truncate_(logits / temperature, **truncation), key)


def close(logp, want):
    torch.testing.assert_close(logp, want, rtol=1e-6, atol=2e-6)


@triton.jit
def _philox_kernel(counter, out, seed, n: tl.constexpr):
    i = tl.arange(0, n)
    c0, c1 = tl.load(counter + i), tl.load(counter + n + i)
    c2, c3 = tl.load(counter + 2 * n + i), tl.load(counter + 3 * n + i)
    a, b, _, _ = tl.philox(seed, c0, c1, c2, c3)
    tl.store(out + i, a.to(tl.int64))
    tl.store(out + n + i, b.to(tl.int64))


@pytest.mark.parametrize("seed", [7, 0x1234567890ABCDEF])
def test_philox_equals_tritons(seed):
    c = torch.randint(0, 2**31, (4, 256), generator=torch.Generator().manual_seed(0))
    out = torch.full((2, 256), -1).to(DEVICE)
    _philox_kernel[(1,)](c.to(torch.int32).to(DEVICE), out, seed, 256)
    assert torch.equal(out.cpu() & 0xFFFFFFFF, torch.stack(philox(seed, *c)))


PLAIN = [dict(), dict(temperature=0.7)]
TRUNCATED = [
    dict(temperature=1.7, top_k=5),
    dict(top_p=0.8),
    dict(min_p=0.1),
    dict(top_k=100, top_p=0.95, min_p=0.01, temperature=0.6),
]
SHAPES = [(1, 3), (2, 5), (127, 4), (128, 4), (129, 4), (1000, 6)]
LARGE = [(4097, 3), (49_152, 3), (151_936, 2)]
CASES = []
for V, n in SHAPES:
    for options in [dict(), *TRUNCATED]:
        slow = V != 129 and options  # 129 is a full block and one word more
        CASES.append(pytest.param(V, n, options, marks=pytest.mark.slow if slow else ()))
for V, n in LARGE:
    for options in PLAIN:
        CASES.append(pytest.param(V, n, options, marks=pytest.mark.slow if V > 40_000 else ()))


@pytest.mark.parametrize("V, n, options", CASES, ids=str)
def test_sampler_draws_the_same_tokens_as_torch(V, n, options):
    logits, key = randn(n, V, seed=V, scale=3.0), keys(n, seed=1)
    before = logits.clone()
    token, logp, entropy = sample(logits, key, **options)
    assert torch.equal(logits, before)
    want, want_logp = by_torch(logits, key, **options)
    assert torch.equal(token, want)
    close(logp, want_logp)
    ref, ref_logp, ref_entropy = sample_ref(logits.cpu(), key.cpu(), **options)
    assert torch.equal(token.cpu(), ref)
    close(logp.cpu().double(), ref_logp)
    torch.testing.assert_close(entropy.cpu().double(), ref_entropy, rtol=1e-5, atol=5e-6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: minutes in the interpreter")
def test_truncation_of_a_real_vocabulary():
    """The cutoffs must be those of the sort, to the word."""
    logits, key = randn(64, 151_936, scale=2.0), keys(64)
    options = dict(top_k=300, top_p=0.9, min_p=0.002, temperature=0.9)
    token, logp, _ = sample(logits, key, **options)
    want, want_logp = by_torch(logits, key, **options)
    assert torch.equal(token, want)
    close(logp, want_logp)  # which a word more or less would move


@pytest.mark.slow
@quick
@given(
    V=st.integers(1, 250),
    times=st.integers(1, 2),
    top_k=st.integers(0, 30),
    top_p=st.sampled_from([1.0, 0.999, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 99),
)
def test_truncation_keeps_what_sorting_keeps(V, times, top_k, top_p, min_p, seed):
    logits, key = randn(2, V, seed=seed, scale=2.0), keys(2 * times, seed)
    options = dict(top_k=top_k, top_p=top_p, min_p=min_p)
    token, logp, _ = sample(logits, key, times=times, **options)
    want, want_logp = by_torch(logits.repeat_interleave(times, 0), key, **options)
    assert torch.equal(token, want)
    close(logp, want_logp)


def extreme_rows(V=4300):
    """Six rows that are hard and finite in their result, then three that are not finite."""
    inf = float("inf")
    z = torch.full((9, V), -inf)
    z[0, 4200] = -1e4
    z[1, :2] = torch.tensor([1e4, -1e4])
    z[2] = -3e38
    z[3, 5], z[3, 4299] = -3e38, 3e38
    z[4, ::2] = 0.0
    z[5] = torch.linspace(-1e4, 1e4, V)
    z[6], z[7, 7], z[8] = 0.0, inf, -inf
    z[6, 9] = float("nan")
    return z.to(DEVICE), keys(9, seed=3)


def test_extreme_logits_and_what_is_not_finite():
    z, key = extreme_rows()
    V = z.shape[1]
    token, logp, entropy = sample(z, key)
    assert torch.equal(token[:6], by_torch(z[:6].clone(), key[:6])[0])
    assert ((0 <= token) & (token < V)).all()
    assert logp[6:].isnan().all()
    assert logp[:6].isfinite().all() and entropy[:6].isfinite().all()


@pytest.mark.parametrize("row", [3, 5, 7], ids=["one word left", "an honest row", "not finite"])
def test_truncation_of_extreme_logits(row):
    z, key = extreme_rows()
    z, key = z[row, None, 4000:], key[row, None]
    token, logp, _ = sample(z, key, top_k=3, top_p=0.9)
    if row == 7:
        assert 0 <= token < z.shape[1]
    else:
        assert token == by_torch(z.clone(), key, top_k=3, top_p=0.9)[0]


def test_without_a_key_the_first_of_the_most_likely_words_comes():
    z, _ = extreme_rows()
    token, logp, _ = sample(z[:6], None)
    want, want_logp = greedy(z[:6])
    assert torch.equal(token, want)
    close(logp, want_logp)


def test_no_rows_give_no_tokens():
    assert [len(x) for x in sample(randn(0, 300), keys(0))] == [0, 0, 0]
