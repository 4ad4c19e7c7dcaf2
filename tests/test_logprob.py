"""kernels/logprob.py: chunked log-probabilities are the definition, and no (tokens, words) tensor is made."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import kernels.logprob as kernel
from kernels.logprob import chunks, logits_fp32, logprob, logprob_ref, truncate_


def example(M=13, D=6, V=37, scale=1.0, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, D, generator=g, dtype=dtype)
    weight = torch.randn(V, D, generator=g, dtype=dtype) * scale
    return hidden, weight, torch.randint(0, V, (M,), generator=g)


TRUNCATIONS = [
    dict(),
    dict(top_k=5),
    dict(top_p=0.7),
    dict(min_p=0.2),
    dict(top_k=9, top_p=0.8, min_p=0.05),
    dict(top_k=1),
]
LEARNS = {"hidden": (True, False), "weight": (False, True), "both": (True, True)}


@pytest.mark.parametrize("rows_a_chunk", [1, 4, 1000])
@pytest.mark.parametrize("learns", LEARNS)
@pytest.mark.parametrize("uses", ["logp", "entropy", "both"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_logprob_is_its_definition_forward_and_backward(
    monkeypatch, rows_a_chunk, learns, uses, temperature, truncation
):
    hidden, weight, targets = example()
    monkeypatch.setattr(kernel, "CHUNK_BYTES", rows_a_chunk * 4 * len(weight))
    inputs = [x.requires_grad_(g) for x, g in zip((hidden, weight), LEARNS[learns])]
    g = torch.Generator().manual_seed(3)
    dlogp, dentropy = (torch.randn(len(targets), generator=g, dtype=torch.float64) for _ in range(2))
    results = []
    for function in (logprob, logprob_ref):
        logp, entropy = function(*inputs, targets, temperature=temperature, **truncation)
        if uses == "logp":
            loss = (logp * dlogp).sum()  # the entropy is not in the graph at all: the fast backward
        else:
            loss = (logp * dlogp).sum() * (uses == "both") + (entropy * dentropy).sum()
        grads = torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])
        results.append([logp.detach(), entropy.detach(), *grads])
    for ours, ref in zip(*results):
        torch.testing.assert_close(ours, ref, rtol=1e-10, atol=1e-12)


def test_gradient_equals_finite_differences():
    hidden, weight, targets = example(M=4, D=3, V=9)
    both = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: logprob(h, w, targets, temperature=0.7), both)
    assert torch.autograd.gradcheck(
        lambda h: logprob(h, weight.detach(), targets, temperature=0.7)[0], hidden
    )


def test_fp32_is_the_definition_to_rounding():
    hidden, weight, targets = example(M=50, D=32, V=500)
    ref = logprob_ref(hidden, weight, targets)
    low = [x.float().requires_grad_() for x in (hidden, weight)]
    logp, entropy = logprob(*low, targets)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), ref[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), ref[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learns", LEARNS)
def test_bf16_gives_fp32_values_and_bf16_gradients_near_the_definition(learns):
    hidden, weight, targets = example(M=40, D=32, V=300, scale=0.3)
    inputs = [x.bfloat16().requires_grad_(g) for x, g in zip((hidden, weight), LEARNS[learns])]
    exact = [x.detach().double().requires_grad_(g) for x, g in zip(inputs, LEARNS[learns])]
    logp, entropy = logprob(*inputs, targets)
    ref_logp, ref_entropy = logprob_ref(*exact, targets)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(
        logp.double(), ref_logp, rtol=1e-5, atol=1e-5
    )  # bf16 inputs, but no bf16 logits
    torch.testing.assert_close(entropy.double(), ref_entropy, rtol=1e-5, atol=1e-5)
    logp.sum().backward()
    ref_logp.sum().backward()
    for x, ref in zip(inputs, exact):
        assert (x.grad is None) == (ref.grad is None)
        if ref.grad is not None:
            assert x.grad.dtype == torch.bfloat16
            assert (x.grad.double() - ref.grad).norm() < 0.01 * ref.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_finite_values_and_gradients(dtype):
    """Logits of +-50,000: probabilities are 0 and 1, log-probabilities huge and exact, nothing is nan."""
    weight = torch.tensor([[1.0], [0.0], [-1.0], [0.99999]], dtype=dtype).requires_grad_()
    hidden = torch.tensor([[50000.0], [-50000.0], [0.0]], dtype=dtype).requires_grad_()
    targets = torch.tensor([2, 2, 1])
    logp, entropy = logprob(hidden, weight, targets)
    (logp.sum() + entropy.sum()).backward()
    ref = logprob_ref(hidden.detach().double(), weight.detach().double(), targets)
    torch.testing.assert_close(logp.double(), ref[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), ref[1], rtol=2e-3, atol=1e-6)
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all() and (entropy >= 0).all()


def test_not_a_number_is_passed_on_and_not_hidden():
    hidden, weight, targets = example()
    hidden[3, 0] = float("nan")
    hidden[4, 0] = float("inf")
    logp, entropy = logprob(hidden, weight, targets)
    assert logp.isnan().nonzero().flatten().tolist() == entropy.isnan().nonzero().flatten().tolist() == [3, 4]


def test_a_row_does_not_depend_on_the_other_rows_or_the_chunk(monkeypatch):
    hidden, weight, targets = example(M=30, dtype=torch.float32)
    whole = logprob(hidden, weight, targets)
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 7 * 4 * len(weight))
    for ours, alone in zip(whole, logprob(hidden[11:24], weight, targets[11:24])):
        torch.testing.assert_close(ours[11:24], alone, rtol=1e-6, atol=1e-6)


def test_no_rows_give_empty_results():
    hidden, weight, _ = example()
    logp, entropy = logprob(hidden[:0].requires_grad_(), weight, torch.zeros(0, dtype=torch.long))
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 200_000), st.integers(1, 1 << 20))
def test_chunks_cover_all_rows_once_and_are_small_and_even(M, V, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "CHUNK_BYTES", size)
        cut = chunks(M, V)
    assert [i for rows in cut for i in range(M)[rows]] == list(range(M))
    lengths = [rows.stop - rows.start for rows in cut]
    assert all(n == 1 or n * V * 4 <= size for n in lengths) and len(set(lengths[:-1])) <= 1


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("truncation", [dict(), dict(top_k=4, top_p=0.9, min_p=0.01)], ids=str)
@pytest.mark.parametrize("learns", LEARNS)
def test_no_tensor_of_tokens_times_vocabulary_is_made(monkeypatch, learns, truncation):
    hidden, weight, targets = example(M=96, D=4, V=64, dtype=torch.float32)
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 8 * 4 * 64)  # 8 rows
    inputs = [x.requires_grad_(g) for x, g in zip((hidden, weight), LEARNS[learns])]
    with Largest() as largest:
        logp, entropy = logprob(*inputs, targets, **truncation)
        (logp.sum() + entropy.sum()).backward()
    assert largest.elements <= 8 * 64 < 96 * 64


def test_frozen_head_makes_its_gradient_in_the_forward():
    """LoRA's backward through the head is one multiplication: no logits, so no operation on V columns."""
    hidden, weight, targets = example(M=12, D=4, V=500, dtype=torch.float32)
    logp, _ = logprob(hidden.requires_grad_(), weight, targets)
    with Largest() as largest:
        logp.sum().backward()
    assert largest.elements <= 12 * 4
    with (
        torch.no_grad(),
        Largest() as largest,
    ):  # and the reference pass, which has no backward, does not make it
        slow = logprob(hidden, weight, targets)[0]
    torch.testing.assert_close(logp.detach(), slow)


# -------------------------------------------------------------------------------------- truncation
def warped(logits, top_k, top_p, min_p):
    """transformers' own warpers in transformers' order."""
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    if min_p:
        logits = MinPLogitsWarper(min_p)(None, logits)
    return logits


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0, 1, 3, 20, 100]),
    st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    st.booleans(),
)
def test_truncation_equals_transformers_warpers(seed, top_k, top_p, min_p, ties):
    logits = torch.randn(6, 21, generator=torch.Generator().manual_seed(seed)) * 3
    logits = logits.round() if ties else logits
    ours = truncate_(logits.clone(), top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(ours, warped(logits, top_k, top_p, min_p))


def test_truncation_keeps_the_sampled_word_whatever_the_set():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    keep = torch.randint(0, 30, (50,), generator=torch.Generator().manual_seed(1))
    out = truncate_(logits.clone(), top_k=2, keep=keep)
    rows = torch.arange(50)
    assert torch.equal(out[rows, keep], logits[rows, keep])
    kept = out > float("-inf")
    assert set(kept.sum(-1).tolist()) == {2, 3}


def test_truncated_words_have_no_probability_and_the_rest_is_renormalised():
    hidden, weight, _ = example(M=5, D=4, V=11)
    total = torch.zeros(5, dtype=torch.float64)
    for word in range(11):
        kept = truncate_(logits_fp32(hidden, weight), top_k=3) > float("-inf")
        logp, _ = logprob(hidden, weight, torch.full((5,), word), top_k=3)
        total += logp.exp() * kept[:, word]
    torch.testing.assert_close(total, torch.ones(5, dtype=torch.float64))


def test_logits_are_fp32_whatever_the_weights():
    """Rounded to bf16, logits near 20 are off by up to 0.06 nats: more than a clipped ratio allows."""
    hidden, weight, _ = example(M=9, D=64, V=40, dtype=torch.bfloat16)
    z = logits_fp32(hidden, weight)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.double(), hidden.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
