"""kernels/*.py: every Triton kernel is its definition. In Triton's interpreter on a CPU, compiled on a GPU: the same tests.

conftest.py sets TRITON_INTERPRET before anything imports Triton, unless there is a GPU. The interpreter takes about a millisecond an operation
of a program, so shapes here are small and odd; large ones are marked gpu.
"""
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernels
import kernels.linear_logprob as S
import kernels.logprob as L
import kernels.sample as D

pytest.importorskip("triton")
import triton.language as tl

# numpy's words for what the tests of extreme numbers do on purpose
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter", "ignore::RuntimeWarning:numpy")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = [torch.float32, torch.bfloat16]
quick = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True, scope="module")
def interpreter_multiplies_bf16():
    """Triton's interpreter keeps bf16 as its 16 bits and its dot multiplies those as integers (3.6 to 3.9): widen them first."""
    from triton.runtime.interpreter import InterpreterBuilder
    dot = InterpreterBuilder.create_dot

    def widened(self, a, b, d, *options):
        return dot(self, *(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), d, *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", widened)
        yield


@pytest.fixture(autouse=True)
def triton_everywhere():
    kernels.use("triton")
    yield
    kernels.use("auto")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Whatever a kernel forgets to write is NaN: torch.empty and empty_like give NaN, and large integers."""
    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else 10**6)
        return made
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def randn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).to(DEVICE)


def near(ours, ref, dtype, exact=1e-5, rounded=0.02):
    """By norm, with every element finite where the definition's is; exact for fp32, rounded for bf16."""
    ours, ref = ours.detach().double().cpu(), ref.detach().double().cpu()
    assert ours.shape == ref.shape and ours.isfinite().all()
    bound = exact if dtype == torch.float32 else rounded
    assert (ours - ref).norm() <= bound * (ref.norm() + 0.05), f"off by {((ours - ref).norm() / ref.norm()).item():.2e}"


def leaf(x, dtype=None):
    return x.detach().to(dtype or x.dtype).clone().requires_grad_()


# ------------------------------------------------------------------------------------------------------------- logprob
def rows_by_hand(z, y, dlogp, dentropy, scale):
    """logp, lse, entropy and the gradient of dlogp . logp + dentropy . entropy by the logits, by autograd in fp64."""
    z = leaf(z, torch.float64)
    q = (z * scale).log_softmax(-1)
    logp, entropy = q.gather(1, y[:, None])[:, 0], -(q.exp() * q.masked_fill(q.exp() == 0, 0.0)).sum(-1)
    dz, = torch.autograd.grad((logp * (0 if dlogp is None else dlogp.double())).sum() + (entropy * (0 if dentropy is None else dentropy.double())).sum(), z)
    return logp, (z * scale).logsumexp(-1), entropy, dz


@pytest.mark.parametrize("m, V, scale, uses", [(1, 1, 1.0, "logp"), (3, 5, 2.0, "entropy"), (5, 129, 0.5, "both"), (2, 4097, 1.0, "both"), (3, 4097, 1.0, "entropy"),
                                               (2, 49_152, 1.0, "logp"), (2, 151_936, 1.25, "both")])
def test_row_kernel_is_autograd_on_the_logits(m, V, scale, uses):
    z, y = randn(m, V, scale=3.0), torch.randint(0, V, (m,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    dlogp, dentropy = None if uses == "entropy" else randn(m, seed=2), None if uses == "logp" else randn(m, seed=3)
    refs = rows_by_hand(z, y, dlogp, dentropy, scale)
    for dtype in LOW:
        logp, lse, entropy = (torch.empty(m, device=DEVICE) for _ in range(3))
        work = z.clone()
        dz = work if dtype == torch.float32 else torch.empty_like(z, dtype=dtype)  # in place, and beside
        L.row_pass(work, dz, y, logp, lse, entropy, dlogp, dentropy, scale, 1 / scale, stats=True)
        for ours, ref, as_ in zip((logp, lse, entropy, dz), refs, (torch.float32,) * 3 + (dtype,)):
            near(ours, ref, as_, exact=1e-5, rounded=5e-3)
        again = torch.empty_like(z)  # the backward's call: lse and entropy are given
        L.row_pass(z, again, y, None, lse, entropy, dlogp, dentropy, scale, 1 / scale, stats=False)
        near(again, refs[3], torch.float32)


def test_row_kernel_at_extreme_logits():
    """+-1e4, -inf outside the kept set, a whole leading tile at -inf, numbers whose differences overflow; and what is not finite stays so."""
    inf, V = float("inf"), 4100
    z = torch.full((7, V), -inf)
    z[0, :3] = torch.tensor([1e4, -1e4, 0.0])
    z[1] = torch.linspace(-1e4, 1e4, V)
    z[2, 4097:] = torch.tensor([1.0, 2.0, 3.0])  # the first tile of 4,096 words is empty
    z[3, 4099] = 7.0
    z[4] = -3e38
    z[5, :2], z[5, 4098] = -3e38, 3e38
    z[6] = 0.0
    z, y = z.to(DEVICE), torch.tensor([0, 17, 4098, 4099, 3, 4098, 5], device=DEVICE)
    ones = torch.ones(7, device=DEVICE)
    logp, lse, entropy, dz = *(torch.empty(7, device=DEVICE) for _ in range(3)), torch.empty_like(z)
    L.row_pass(z, dz, y, logp, lse, entropy, ones, ones, 1.0, 1.0, stats=True)
    q = z.double().log_softmax(-1)
    torch.testing.assert_close(logp.double(), q.gather(1, y[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(q.exp() * q.clamp(min=-1e300)).sum(-1), rtol=1e-5, atol=1e-5)
    assert dz.isfinite().all() and (dz[z == -inf] == 0).all()
    z[0, 0], z[1, 0], z[2] = float("nan"), inf, -inf
    L.row_pass(z, None, y, logp, lse, entropy, None, None, 1.0, 1.0, stats=True)
    assert logp.isnan().tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("M, D, V", [(1, 16, 3), (5, 40, 131), (67, 24, 300), (3, 70, 1000)])
def test_linear_kernel_makes_the_same_without_logits(M, D, V, dtype):
    hidden, weight, y = randn(M, D, dtype=dtype), randn(V, D, seed=1, dtype=dtype), torch.randint(0, V, (M,)).to(DEVICE)
    for ours, ref in zip(S.linear_logprob(hidden, weight, y, temperature=0.7), S.linear_logprob_ref(hidden.double(), weight.double(), y, temperature=0.7)):
        near(ours, ref, torch.float32, exact=1e-5)


def test_linear_kernel_at_extreme_logits_and_no_rows():
    weight, hidden = torch.tensor([[1.0], [0.0], [-1.0], [0.9]], device=DEVICE), torch.tensor([[1e4], [-1e4], [0.0]], device=DEVICE)
    y = torch.tensor([2, 2, 1], device=DEVICE)
    for ours, ref in zip(S.linear_logprob(hidden, weight, y), S.linear_logprob_ref(hidden.double(), weight.double(), y)):
        torch.testing.assert_close(ours.double(), ref, rtol=1e-6, atol=1e-6)
    assert [x.shape for x in S.linear_logprob(hidden[:0], weight, y[:0])] == [(0,), (0,)]
    hidden[1] = float("nan")
    assert S.linear_logprob(hidden, weight, y)[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("learns", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.6), dict(top_k=9, top_p=0.9, min_p=0.01, temperature=1.3)], ids=str)
def test_logprob_and_its_gradients(monkeypatch, dtype, learns, options):
    hidden, weight, y = randn(13, 24, dtype=dtype), randn(75, 24, seed=1, dtype=dtype, scale=0.4), torch.randint(0, 75, (13,)).to(DEVICE)
    monkeypatch.setattr(L, "CHUNK_BYTES", 4 * 4 * 75)
    for uses in ("logp", "both"):
        grads = []
        for function, cast in ((L.logprob, dtype), (L.logprob_ref, torch.float64)):
            inputs = [leaf(x, cast).requires_grad_(g) for x, g in zip((hidden, weight), learns)]
            logp, entropy = function(*inputs, y, **options)
            loss = (logp * randn(13, seed=4)).sum() + (0 if uses == "logp" else (entropy * randn(13, seed=5)).sum())
            grads.append([logp, entropy, *torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])])
        for i, (ours, ref) in enumerate(zip(*grads)):
            near(ours, ref, torch.float32 if i < 2 else dtype)


# -------------------------------------------------------------------------------------------------------------- sample
def by_torch(logits, key, *, temperature=1.0, **truncation):
    """What rollout.py does on a CPU."""
    return D.draw(L.truncate_(logits / temperature, **truncation), key)


@pytest.mark.parametrize("V, n", [(1, 3), (2, 5), (127, 4), (128, 4), (129, 4), (1000, 6), (4097, 3), (49_152, 3), (151_936, 2)])
def test_sampler_draws_the_same_tokens_as_torch(V, n):
    logits, key = randn(n, V, seed=V, scale=3.0), D.token_keys(1, 2, torch.arange(n), 3, 4).to(DEVICE)
    for options in [dict(), dict(temperature=0.7)] if V > 1000 else [dict(), dict(temperature=1.7, top_k=5), dict(top_p=0.8), dict(min_p=0.1), dict(top_k=100, top_p=0.95, min_p=0.01, temperature=0.6)]:
        before = logits.clone()
        token, logp, entropy = D.sample(logits, key, **options)
        want, want_logp = by_torch(logits, key, **options)
        ref, ref_logp, ref_entropy = D.sample_ref(logits.cpu(), key.cpu(), **options)
        assert torch.equal(token, want) and torch.equal(token.cpu(), ref) and torch.equal(logits, before), options
        torch.testing.assert_close(logp, want_logp, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(logp.cpu().double(), ref_logp, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(entropy.cpu().double(), ref_entropy, rtol=1e-5, atol=5e-6)


@pytest.mark.gpu
def test_truncation_of_a_real_vocabulary():
    """49,152 words: minutes in the interpreter; the cutoffs must be those of the sort, to the word."""
    logits, key = randn(2, 49_152, scale=2.0), D.token_keys(0, 0, torch.arange(2), 0, 0).to(DEVICE)
    options = dict(top_k=300, top_p=0.9, min_p=0.002, temperature=0.9)
    token, logp, _ = D.sample(logits, key, **options)
    want, want_logp = by_torch(logits, key, **options)
    assert torch.equal(token, want)
    torch.testing.assert_close(logp, want_logp, rtol=1e-6, atol=2e-6)  # which a word more or less would move


@settings(quick, max_examples=5)
@given(st.integers(1, 250), st.integers(1, 2), st.integers(0, 30), st.sampled_from([1.0, 0.999, 0.5, 1e-6]), st.sampled_from([0.0, 0.05, 1.0]), st.integers(0, 99))
def test_truncation_keeps_what_sorting_keeps(V, times, top_k, top_p, min_p, seed):
    logits, key = randn(2, V, seed=seed, scale=2.0), D.token_keys(seed, 0, torch.arange(2 * times), 0, 0).to(DEVICE)
    options = dict(top_k=top_k, top_p=top_p, min_p=min_p)
    token, logp, _ = D.sample(logits, key, times=times, **options)
    want, want_logp = by_torch(logits.repeat_interleave(times, 0), key, **options)
    assert torch.equal(token, want)
    torch.testing.assert_close(logp, want_logp, rtol=1e-6, atol=2e-6)


def test_sampler_at_extreme_logits_and_what_is_not_finite():
    inf, V = float("inf"), 4300
    z = torch.full((9, V), -inf)
    z[0, 4200] = -1e4
    z[1, :2] = torch.tensor([1e4, -1e4])
    z[2] = -3e38
    z[3, 5], z[3, 4299] = -3e38, 3e38
    z[4, ::2] = 0.0
    z[5] = torch.linspace(-1e4, 1e4, V)
    z[6], z[7, 7], z[8] = 0.0, inf, -inf
    z[6, 9] = float("nan")
    z, key = z.to(DEVICE), D.token_keys(3, 0, torch.arange(9), 0, 0).to(DEVICE)
    token, logp, entropy = D.sample(z, key)
    assert torch.equal(token[:6], by_torch(z[:6].clone(), key[:6])[0]) and ((0 <= token) & (token < V)).all()
    assert logp[6:].isnan().all() and logp[:6].isfinite().all() and entropy[:6].isfinite().all()
    for row in (3, 5, 7):  # one word left, an honest row, one that is not finite
        token, logp, _ = D.sample(z[row, None, 4000:], key[row, None], top_k=3, top_p=0.9)
        assert token == by_torch(z[row, None, 4000:].clone(), key[row, None], top_k=3, top_p=0.9)[0] if row < 7 else 0 <= token < 300
    token, logp, _ = D.sample(z[:6], None)
    want, want_logp = D.greedy(z[:6])
    assert torch.equal(token, want)
    torch.testing.assert_close(logp, want_logp, rtol=1e-6, atol=2e-6)
    assert [len(x) for x in D.sample(z[:0], key[:0])] == [0, 0, 0]
