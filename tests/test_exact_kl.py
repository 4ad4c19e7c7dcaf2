"""kernels/exact_kl.py against its definition in fp64 and autograd, whole and in chunks, truncated and not, in
both directions, over all words and over the likeliest and a rest.
"""

import pytest
import torch

from conftest import quick
from kernels import logprob
from kernels.exact_kl import DIRECTIONS, exact_kl, exact_kl_ref
from kernels.logprob import truncate_
from test_logprob import Largest

TRUNCATIONS = [dict(), dict(top_k=5), dict(top_p=0.6), dict(min_p=0.2)]


def tensors(M=7, D=12, V=33, dtype=torch.float64, seed=0, ref_D=9):
    """Policy and reference: hidden and weight of each, the reference of another width."""
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    return make(M, D).requires_grad_(), make(V, D).requires_grad_(), make(M, ref_D), make(V, ref_D)


def truncation(h, w, options):
    """(truncate, kept) as exact_kl and exact_kl_ref take them."""
    if not options:
        return None, None
    kept = truncate_((h @ w.t() / 0.7).detach().clone(), **options) > float("-inf")
    return lambda z, rows: truncate_(z, **options), kept


def upstream(M=7):
    return torch.randn(M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("chunk_bytes", [1 << 26, 400])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("top", quick(2, [0, 4, 1, 32, 33]))
def test_value_and_gradients_equal_the_definition(monkeypatch, options, chunk_bytes, direction, top):
    """top = 4 and 32 have words outside the kept set among the likeliest, or nothing in the rest."""
    monkeypatch.setattr(logprob, "CHUNK_BYTES", chunk_bytes)  # 400 bytes: 3 rows at a time
    h, w, rh, rw = tensors()
    truncate, kept = truncation(h, w, options)
    got = exact_kl(h, w, rh, rw, direction, top, temperature=0.7, truncate=truncate)
    want = exact_kl_ref(h, w, rh, rw, direction, top, temperature=0.7, kept=kept)
    torch.testing.assert_close(got, want)
    up = upstream()
    grads = torch.autograd.grad(got, (h, w), up)
    for a, b in zip(grads, torch.autograd.grad(want, (h, w), up)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    # With a frozen head the gradient is made in the forward.
    frozen = exact_kl(h, w.detach(), rh, rw, direction, top, temperature=0.7, truncate=truncate)
    torch.testing.assert_close(torch.autograd.grad(frozen, h, up)[0], grads[0], rtol=1e-9, atol=1e-11)


def by_words(h, w, rh, rw, direction, top, kept):
    """The KL of each row by a loop over words, as a paper would write it."""
    total = []
    for row in range(len(h)):
        words = [j for j in range(len(w)) if kept is None or kept[row, j]]
        z, ref_z = (w[words] @ h[row]) / 0.7, (rw[words] @ rh[row]) / 0.7
        p, q = z.exp() / z.exp().sum(), ref_z.exp() / ref_z.exp().sum()
        if 0 < top < len(words):
            order = q.argsort(descending=True)
            p = [*p[order[:top]], p[order[top:]].sum()]
            q = [*q[order[:top]], q[order[top:]].sum()]
        if direction == "forward":
            p, q = q, p
        total.append(sum(a * (a.log() - b.log()) for a, b in zip(p, q)))
    return torch.stack(total)


@pytest.mark.parametrize("options", [dict(), dict(top_k=12)], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("top", [0, 4])
def test_value_and_gradients_equal_a_loop_over_words(options, direction, top):
    h, w, rh, rw = tensors()
    truncate, kept = truncation(h, w, options)
    got = exact_kl(h, w, rh, rw, direction, top, temperature=0.7, truncate=truncate)
    want = by_words(h, w, rh, rw, direction, top, kept)
    torch.testing.assert_close(got, want)
    up = upstream()
    for a, b in zip(torch.autograd.grad(got, (h, w), up), torch.autograd.grad(want, (h, w), up)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_more_words_apart_never_make_the_kl_smaller_and_all_of_them_make_it_whole(direction):
    inputs = tensors()
    whole = exact_kl(*inputs, direction)
    before = torch.zeros_like(whole)
    for top in range(1, 33):
        now = exact_kl(*inputs, direction, top)
        assert (now >= before - 1e-12).all() and (now <= whole + 1e-12).all()
        before = now
    torch.testing.assert_close(before, whole)  # 32 words and a rest of one


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("top", [0, 3])
def test_a_rest_of_almost_no_probability_has_a_finite_kl_and_gradient(direction, top):
    """1 - the sum of the likeliest would be 0 here, and its logarithm infinite."""
    h, w, rh, rw = tensors(dtype=torch.float32)
    h, rh = (60 * h).detach().requires_grad_(), 60 * rh
    kl = exact_kl(h, w, rh, rw, direction, top)
    kl.sum().backward()
    assert kl.isfinite().all() and h.grad.isfinite().all() and w.grad.isfinite().all()
    wide = [x.detach().double() for x in (h, w, rh, rw)]
    torch.testing.assert_close(kl.double(), exact_kl(*wide, direction, top), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("learns", ["both", "hidden"])
@pytest.mark.parametrize("top", [0, 3])
def test_no_tensor_of_tokens_times_vocabulary_is_made(monkeypatch, learns, top):
    h, w, rh, rw = tensors(M=96, D=4, V=64, dtype=torch.float32, ref_D=4)
    monkeypatch.setattr(logprob, "CHUNK_BYTES", 8 * 4 * 64)  # 8 rows
    with Largest() as largest:
        exact_kl(h, w if learns == "both" else w.detach(), rh, rw, "forward", top).sum().backward()
    assert largest.elements <= 8 * 64 < 96 * 64


def test_it_is_what_the_estimators_estimate():
    """The mean of k1 over the policy's own words, all of them, weighted by their probabilities."""
    h, w, rh, rw = tensors()
    p, q = (h @ w.t()).softmax(-1), (rh @ rw.t()).softmax(-1)
    torch.testing.assert_close(exact_kl(h, w, rh, rw), (p * (p.log() - q.log())).sum(-1))
    torch.testing.assert_close(exact_kl(h, w, rh, rw, "forward"), (q * (q.log() - p.log())).sum(-1))
    assert (exact_kl(h, w, h, w).abs() < 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [("reverse", 0), ("forward", 5)])
def test_lower_precision_gives_fp32_results_near_the_definition(dtype, options):
    h, w, rh, rw = tensors(dtype=dtype)
    got = exact_kl(h, w, rh, rw, *options)
    assert got.dtype == torch.float32
    want = exact_kl_ref(*(t.detach().double() for t in (h, w, rh, rw)), *options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert h.grad.dtype == dtype and w.grad.dtype == dtype and h.grad.isfinite().all()


def test_no_rows_and_a_frozen_head():
    h, w, rh, rw = tensors(M=0)
    assert exact_kl(h, w, rh, rw).shape == (0,)
    h, w, rh, rw = tensors()
    exact_kl(h, w.detach(), rh, rw).sum().backward()
    assert h.grad is not None and w.grad is None
