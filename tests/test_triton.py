"""kernels/*.py: every Triton kernel is its definition. In Triton's interpreter on a CPU, compiled on a GPU: the same tests.

conftest.py sets TRITON_INTERPRET before anything imports Triton, unless there is a GPU. The interpreter takes about a millisecond an operation
of a program, so shapes here are small and odd; large ones are marked gpu.
"""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernels
import kernels.flash_attention as A
import kernels.linear_logprob as S
import kernels.logprob as L
import kernels.lora_linear as K
import kernels.rms_norm as N
import kernels.rope as P
import kernels.sample as D
import kernels.softmax as X
import kernels.swiglu as U
import lora
import loss as losses
import optim
import rollout

triton = pytest.importorskip("triton")

# numpy's words for what the tests of extreme numbers do on purpose
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter", "ignore::RuntimeWarning:numpy"),
              pytest.mark.usefixtures("interpreter_without_two_faults")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = [torch.float32, torch.bfloat16]
quick = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def on_gpu(test):
    """For shapes that take the interpreter minutes."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: minutes in the interpreter")(test))


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


@on_gpu
@pytest.mark.parametrize("M, D, V", [(257, 896, 151_936), (1000, 576, 49_152), (33, 1536, 50_001)])
def test_log_probabilities_at_real_shapes(M, D, V):
    hidden, weight, y = randn(M, D, dtype=torch.bfloat16), randn(V, D, seed=1, dtype=torch.bfloat16, scale=0.05), torch.randint(0, V, (M,)).to(DEVICE)
    for ours, ref in zip(S.linear_logprob(hidden, weight, y), L.logprob_ref(hidden.double(), weight.double(), y)):
        near(ours, ref, torch.float32)
    grads = []
    for function, cast in ((L.logprob, torch.bfloat16), (L.logprob_ref, torch.float64)):
        for learns in (False, True):
            h, w = leaf(hidden, cast), leaf(weight, cast).requires_grad_(learns)
            logp, entropy = function(h, w, y)
            ((logp * randn(M, seed=4)).sum() + (entropy.sum() if learns else 0)).backward()
            grads.append([x.grad for x in (h, w) if x.grad is not None])
    for a, b in zip(grads[0] + grads[1], grads[2] + grads[3]):
        near(a, b, torch.bfloat16)


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


@on_gpu
def test_truncation_of_a_real_vocabulary():
    """The cutoffs must be those of the sort, to the word."""
    logits, key = randn(64, 151_936, scale=2.0), D.token_keys(0, 0, torch.arange(64), 0, 0).to(DEVICE)
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


# ------------------------------------------------------------------------------------- norm, rotation, SwiGLU, LoRA, softmax
def check(ours, ref, inputs, dtype, exact=2e-6):
    """Values and gradients of ours(*inputs), in dtype, against ref's in fp64. Results may be tuples."""
    grads = []
    for function, cast in ((ours, dtype), (ref, torch.float64)):
        leaves = [leaf(x.to(dtype), cast) for x in inputs]
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        loss = sum((y.double() * randn(*y.shape, seed=9 + i, dtype=torch.float64)).sum() for i, y in enumerate(out))
        grads.append([*out, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*grads):
        assert a.dtype == dtype
        near(a, b, dtype, exact=exact)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 64), (5, 130), (0, 8)])
def test_rms_norm_with_and_without_residual(shape, dtype):
    x, delta, weight = randn(*shape), randn(*shape, seed=1), 1 + 0.3 * randn(shape[-1], seed=2)
    check(lambda x, w: N.rms_norm(x, w, 1e-5), lambda x, w: N.rms_norm_ref(x, w, 1e-5), [x, weight], dtype)
    check(lambda x, d, w: N.add_rms_norm(x, d, w, 1e-5), lambda x, d, w: (x + d, N.rms_norm_ref(x + d, w, 1e-5)), [x, delta, weight], dtype)
    check(lambda x, d: N.add_rms_norm(x, d, weight.to(dtype), 1e-5)[1], lambda x, d: N.rms_norm_ref(x + d, weight.to(dtype).double(), 1e-5), [x, delta], dtype)  # frozen; total unused
    check(lambda x, d: N.add_rms_norm(x, d, weight.to(dtype), 1e-5)[0], lambda x, d: x + d, [x, delta], dtype)  # the norm unused
    if x.numel():
        big = leaf(x * 1e15)  # squares up to 1e30, cubes out of range
        N.rms_norm(big, weight, 1e-5).sum().backward()
        assert big.grad.isfinite().all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 3, 2050), (0, 8)])
def test_swiglu(shape, dtype):
    check(U.swiglu, U.swiglu_ref, [randn(*shape, scale=2.0)], dtype)
    assert U.swiglu(torch.tensor([[-1e4, 1e4, 1.0, 1.0]], device=DEVICE)).tolist() == [[0.0, 1e4]]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("T, heads, E", [(1, 1, 2), (5, 3, 8), (3, 16, 24), (0, 2, 4)])
def test_rotation(T, heads, E, dtype):
    angles = randn(T, 1, E // 2, scale=9.0)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    check(lambda x: P.rotate(x[:, 1:], cos, sin), lambda x: P.rotate_ref(x[:, 1:], cos.double(), sin.double()), [randn(T, heads + 1, E)], dtype)


def test_keys_and_values_are_stored_where_they_belong_and_nowhere_else():
    kv, caches = randn(4, 6, 8), [randn(5, 3, 7, 8, seed=i) for i in (1, 2)]
    places, want = torch.tensor([0, 6, 2, 2], device=DEVICE), [c.clone() for c in caches]
    P.store_keys(kv[:, :3], kv[:, 3:], *caches, places)
    kernels.use("torch")
    P.store_keys(kv[:, :3], kv[:, 3:], *want, places)
    assert all(torch.equal(a, b) for a, b in zip(caches, want)) and torch.equal(caches[1][1, :, 6], kv[1, 3:])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("T, D, sizes, r", [(1, 8, [5], 1), (33, 70, [130, 7], 5), (3, 64, [16], 16)])
@pytest.mark.parametrize("dropout", [False, True])
def test_lora_linear(T, D, sizes, r, dropout, dtype):
    N = sum(sizes) + 3  # the last rows have no adapter
    weight = randn(N, D, seed=3, dtype=dtype)
    mask = (randn(T, D, seed=4) > 0).to(dtype) * 2 if dropout else None
    rows = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    x, A, B = randn(T, D, dtype=dtype), randn(len(sizes) * r, D, seed=1), [randn(n, r, seed=5 + i) for i, n in enumerate(sizes)]
    grads = []
    for function, wide, W in ((K.lora_linear, False, weight), (K.lora_linear_ref, True, weight.double())):
        def base(x, W=W):
            return x @ W.t()
        base.weight = W
        leaves = [leaf(t, torch.float64 if wide else None) for t in (x, A, *B)]  # adapters are fp32 beside bf16
        y = function(leaves[0], mask if mask is None else mask.to(W.dtype), base, 0.7, rows, *leaves[1:])
        grads.append([y, *torch.autograd.grad((y.double() * randn(T, N, seed=8, dtype=torch.float64)).sum(), leaves)])
    for a, b in zip(*grads):
        near(a, b, dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 130), (0, 4)])
def test_softmax(shape, dtype):
    check(X.softmax, X.softmax_ref, [randn(*shape, scale=3.0)], dtype)
    inf = float("inf")
    x = torch.tensor([[1e4, -1e4, 0.0, -inf], [-inf, -inf, 2.0, 2.0]], device=DEVICE)
    assert X.softmax(x).tolist() == [[1, 0, 0, 0], [0, 0, 0.5, 0.5]]


@pytest.mark.parametrize("mode, words", [("fast", "unknown"), ("Triton", "unknown")])
def test_a_mode_that_does_not_exist_is_refused(mode, words):
    with pytest.raises(ValueError, match=words):
        kernels.use(mode)


def test_the_switch_reaches_every_kernel_file():
    """A file with a MODE that kernels.use does not know would stay on its own."""
    files = {p.stem for p in (Path(rollout.__file__).parent / "kernels").glob("*.py") if "\nMODE = " in p.read_text()}
    assert files == set(kernels.WITH_TRITON)
    kernels.use("torch")
    assert not any(x.on_triton(torch.zeros(1, device=DEVICE)) for x in (A, D, K, L, N, P, S, U, X))


# ---------------------------------------------------------------------------------------------- the model, the sampler, a step
PROMPTS, GROUPS = [[1, 2, 3, 4, 5], [7]], [[[8, 9], [10, 11, 12]], [[13], [5, 4, 3, 2]]]


def step(model):
    """Log-probabilities, entropies and the gradient of every weight of a loss on both."""
    model.zero_grad()
    logp, entropy, _ = model.completion_logprobs(PROMPTS, GROUPS, temperature=0.8)
    (logp * torch.linspace(-1, 1, len(logp), device=DEVICE)).sum().sub(0.1 * entropy.sum()).backward()
    return [logp, entropy, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_model_forward_and_backward_equal_torch(tiny):
    tiny.to(DEVICE)
    for p in tiny.parameters():  # norms that are not 1
        p.data += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ours = step(tiny)
    with torch.no_grad():
        scored = tiny.completion_logprobs(PROMPTS, GROUPS, temperature=0.8)  # another kernel: no logits
    logits = tiny.logits(torch.tensor(PROMPTS[0], device=DEVICE))
    kernels.use("torch")
    ref = step(tiny)
    assert len(ours) == len(ref)
    for a, b in zip(ours, ref):
        near(a, b, torch.float32)
    for a, b in zip(scored[:2], ref):
        near(a, b, torch.float32)
    near(logits, tiny.logits(torch.tensor(PROMPTS[0], device=DEVICE)), torch.float32)


@pytest.mark.parametrize("options", [dict(), dict(top_k=30, top_p=0.95)], ids=str)
def test_training_step_equals_torch(tiny, options):
    """Sampling, reference, loss with KL and entropy, backward, update, all through Triton and all through torch."""
    start, ends = [p.detach().clone() for p in tiny.parameters()], []
    for mode in ("triton", "torch"):
        kernels.use(mode)
        tiny.to(DEVICE)
        for p, before in zip(tiny.parameters(), start):
            p.data, p.grad = before.clone().to(DEVICE), None
        out = rollout.generate(tiny, PROMPTS, group_size=2, max_new_tokens=4, stop_ids=[11], seed=5, **options)
        groups, old = [out.group(b, 2) for b in range(2)], torch.tensor(sum(out.logprobs, []), device=DEVICE)
        with torch.no_grad():
            ref_logp, _, _ = tiny.completion_logprobs(PROMPTS, groups, **options)
        logp, entropy, rows = tiny.completion_logprobs(PROMPTS, groups, **options)
        loss, _ = losses.policy_loss(logp, old, torch.tensor([1.0, -1.0, 0.5, -0.5], device=DEVICE), rows, ref_logp=ref_logp - 0.1, entropy=entropy, beta=0.1, entropy_coef=0.01)
        loss.backward()
        assert (logp - old).abs().max() < 2e-5  # the sampler and the trainer are one model
        grads = [p.grad.clone() for p in tiny.parameters()]
        norm = optim.AdamW(list(tiny.named_parameters()), lr=1e-3, eps=1.0).step(1e-3)  # eps 1: the step is the gradient, not its sign
        ends.append([loss, norm, *grads, *(p.detach().clone() for p in tiny.parameters())])
    for a, b in zip(*ends):
        near(a, b, torch.float32)


def test_lora_step_equals_torch(tiny):
    lora.apply(tiny, rank=4, alpha=8, targets=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]).to(DEVICE)
    for name, p in tiny.named_parameters():
        if ".B." in name:
            p.data = randn(*p.shape, seed=3, scale=0.1)
    ours = step(tiny)
    kernels.use("torch")
    ref = step(tiny)
    assert len(ours) == len(ref) > 15
    for a, b in zip(ours, ref):
        near(a, b, torch.float32)


@pytest.mark.parametrize("options", [dict(), dict(temperature=0), dict(top_k=20, top_p=0.9)], ids=str)
def test_sampler_draws_the_same_rollout_as_torch(tiny, options):
    """Six rows through three slots: prefill, decoding from the cache, refilling, moving rows and groups."""
    tiny.to(DEVICE)
    runs = []
    for mode in ("triton", "torch"):
        kernels.use(mode)
        runs.append(rollout.generate(tiny, PROMPTS + [[3, 1, 4]], group_size=2, max_new_tokens=6, stop_ids=[11, 40, 17], slots=3, **options))
    assert runs[0].ids == runs[1].ids and runs[0].stopped == runs[1].stopped
    for a, b in zip(runs[0].logprobs, runs[1].logprobs):
        assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=2e-5)


# --------------------------------------------------------------------------------------------------------------- bench
@pytest.mark.skipif(DEVICE == "cuda", reason="there it runs for good")
@pytest.mark.skipif(triton.__version__.startswith("3.6"), reason="its interpreter cannot loop to a bound read from memory beside numpy 2.4")
@pytest.mark.parametrize("only", ["swiglu", "sample"])
def test_bench_of_the_gpu_runs_dry(only):
    """Its code is tried without a GPU; it prints no figure then, and writes none."""
    root = Path(rollout.__file__).parent
    before = sorted((root / "bench/results").iterdir())
    out = subprocess.run([sys.executable, "bench/gpu.py", "--dry", f"--only={only}"], cwd=root, capture_output=True, text=True)
    assert out.returncode == 0 and "not measured" in out.stdout and f"{only}" in out.stdout, out.stdout + out.stderr
    assert sorted((root / "bench/results").iterdir()) == before


def test_compile_check_compiles_for_gpus_that_are_not_here():
    out = subprocess.run([sys.executable, "bench/compile_check.py", "--arch=90", "--only=SwiGLU"], cwd=Path(rollout.__file__).parent, capture_output=True, text=True)
    assert out.returncode == 0 and "2 kernels, 0 bad" in out.stdout, out.stdout + out.stderr
