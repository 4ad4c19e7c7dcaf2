"""kernels/exact_kl.py against its definition in fp64 and autograd, whole and in chunks, truncated and not."""

import pytest
import torch

from kernels import logprob
from kernels.exact_kl import exact_kl, exact_kl_ref
from kernels.logprob import truncate_


def tensors(M=7, D=12, V=33, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    return make(M, D).requires_grad_(), make(V, D).requires_grad_(), make(M, D), make(V, D)


@pytest.mark.parametrize("options", [dict(), dict(top_k=5), dict(top_p=0.6), dict(min_p=0.2)], ids=str)
@pytest.mark.parametrize("chunk_bytes", [1 << 26, 400])
def test_value_and_gradients_equal_the_definition(monkeypatch, options, chunk_bytes):
    monkeypatch.setattr(logprob, "CHUNK_BYTES", chunk_bytes)  # 400 bytes: 3 rows at a time
    h, w, rh, rw = tensors()
    truncate = kept = None
    if options:
        truncate = lambda z, rows: truncate_(z, **options)
        kept = truncate_((h @ w.t() / 0.7).detach().clone(), **options) > float("-inf")
    got = exact_kl(h, w, rh, rw, temperature=0.7, truncate=truncate)
    want = exact_kl_ref(h, w, rh, rw, temperature=0.7, kept=kept)
    torch.testing.assert_close(got, want)
    up = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(got, (h, w), up), torch.autograd.grad(want, (h, w), up)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_it_is_what_the_estimators_estimate():
    """The mean of k1 over the policy's own words, all of them, weighted by their probabilities."""
    h, w, rh, rw = tensors()
    p, q = (h @ w.t()).softmax(-1), (rh @ rw.t()).softmax(-1)
    torch.testing.assert_close(exact_kl(h, w, rh, rw), (p * (p.log() - q.log())).sum(-1))
    assert (exact_kl(h, w, h, w).abs() < 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_gives_fp32_results_near_the_definition(dtype):
    h, w, rh, rw = tensors(dtype=dtype)
    got = exact_kl(h, w, rh, rw)
    assert got.dtype == torch.float32
    want = exact_kl_ref(*(t.detach().double() for t in (h, w, rh, rw)))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert h.grad.dtype == dtype and w.grad.dtype == dtype and h.grad.isfinite().all()


def test_no_rows_and_a_frozen_head():
    h, w, rh, rw = tensors(M=0)
    assert exact_kl(h, w, rh, rw).shape == (0,)
    h, w, rh, rw = tensors()
    exact_kl(h, w.detach(), rh, rw).sum().backward()
    assert h.grad is not None and w.grad is None
