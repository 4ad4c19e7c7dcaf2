"""kernels/attention.py: the bucketed attention is the definition, and wastes little."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.attention import Buckets, alike, attention, attention_ref


def table(groups):
    """[(prompt length, [own lengths])] -> segments one after another, and the stream's length."""
    segments, T = [], 0
    for P, owns in groups:
        start = T
        segments.append((start, P, start, 0))
        T += P
        for C in owns:
            segments.append((T, C, start, P))
            T += C
    return segments, T


def qkv(T, H, K, E, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(T, heads, E, generator=g, dtype=dtype).requires_grad_() for heads in (H, K, K)]


SIZES = st.sampled_from([1, 2, 3, 5, 8, 13, 17, 31, 40])
GROUPS = st.lists(
    st.tuples(SIZES, st.lists(st.sampled_from([0, 0, 1, 2, 7, 16, 23, 39]), max_size=4)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.sampled_from([1, 3, 7]), st.sampled_from([1, 2]))
@example([(1, [0, 0, 1])], 7, 1)
@example([(40, [39, 1]), (1, [39, 39]), (40, [])], 3, 2)
def test_attention_is_its_definition_forward_and_backward(groups, R, K):
    segments, T = table(groups)
    inputs = qkv(T, R * K, K, 4)
    ours = attention(*inputs, Buckets(segments, R, dtype=torch.float64, device="cpu"))
    ref = attention_ref(*inputs, segments)
    torch.testing.assert_close(ours, ref, rtol=1e-12, atol=1e-12)
    dy = torch.randn(ref.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(ref, inputs, dy)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(GROUPS)
def test_definition_is_causal_attention_over_each_sequence_by_itself(groups):
    """The oracle of the oracle: a completion's outputs are those of attention to prompt + completion."""
    segments, T = table(groups)
    q, k, v = qkv(T, 6, 2, 4)
    out = attention_ref(q, k, v, segments)
    for start, length, prompt_start, prompt_length in segments:
        tokens = [*range(prompt_start, prompt_start + prompt_length), *range(start, start + length)]
        a, b, c = (
            x[tokens].transpose(0, 1) for x in (q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
        )
        alone = F.scaled_dot_product_attention(a, b, c, is_causal=True).transpose(0, 1)[prompt_length:]
        torch.testing.assert_close(out[start : start + length], alone, rtol=1e-12, atol=1e-12)


def test_gradient_equals_finite_differences():
    segments, T = table([(3, [2, 1]), (1, [4])])
    buckets = Buckets(segments, 3, dtype=torch.float64, device="cpu")
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, buckets), qkv(T, 3, 1, 2))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 600), st.lists(st.integers(0, 600), max_size=8)), min_size=1, max_size=12
    )
)
def test_no_segment_is_padded_by_more_than_a_quarter_or_eight_tokens(groups):
    segments, T = table(groups)
    for near in alike([s for s in segments if s[1]], lambda s: s[1]):
        for bucket in alike(near, lambda s: s[1] + s[3]):
            for size in (lambda s: s[1], lambda s: s[1] + s[3]):
                largest = max(map(size, bucket))
                assert all(size(s) >= min(0.75 * largest, largest - 8) for s in bucket)


@settings(max_examples=30, deadline=None)
@given(GROUPS)
def test_every_token_is_computed_once_and_found_again(groups):
    segments, T = table(groups)
    buckets = Buckets(segments, 1, dtype=torch.float32, device="cpu")
    laid = torch.cat(buckets.queries)
    assert torch.equal(laid[buckets.back], torch.arange(T))
    assert len(set(buckets.back.tolist())) == T
    assert Counter(n for n, _, _ in buckets.shape).total() <= len(segments)


def test_prompts_are_not_stretched_by_a_long_one_that_sorts_beside_them():
    """Segments were sorted by queries and cut where one was too short for the longest keys so far.

    One completion of a long prompt, coming after short prompts of its own length, stretched all of those to
    its keys: 6x the scores that were needed.
    """
    segments, _ = table([(60, [])] * 20 + [(500, [59])])
    buckets = Buckets(segments, 1, dtype=torch.float32, device="cpu")
    needed = sum(length * (length + prompt) for _, length, _, prompt in segments)
    assert sum(n * c * t for n, c, t in buckets.shape) < 1.1 * needed


def test_equal_groups_are_one_call():
    """The common case, equal lengths: one call for the prompts and one for the completions of all groups."""
    segments, _ = table([(64, [300] * 8)] * 4)
    assert sorted(Buckets(segments, 3, dtype=torch.float32, device="cpu").shape) == [
        (4, 64, 64),
        (32, 300, 364),
    ]


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_extreme_scores_stay_finite_and_right(scale):
    segments, T = table([(20, [10, 3])])
    q, k, v = qkv(T, 2, 1, 8)
    ours = attention(q * scale, k * scale, v, Buckets(segments, 2, dtype=torch.float64, device="cpu"))
    torch.testing.assert_close(ours, attention_ref(q * scale, k * scale, v, segments), rtol=1e-10, atol=1e-12)


def test_bf16_is_the_definition_to_rounding():
    segments, T = table([(20, [10, 3, 0]), (7, [12])])
    q, k, v = qkv(T, 6, 2, 16)
    low = attention(
        *(x.to(torch.bfloat16) for x in (q, k, v)), Buckets(segments, 3, dtype=torch.bfloat16, device="cpu")
    )
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), attention_ref(q, k, v, segments), rtol=0.05, atol=0.03)


def test_a_token_does_not_see_other_groups_later_tokens_or_siblings():
    """Each key is changed in turn; the outputs that move are exactly those that may see it."""
    segments, T = table([(3, [2, 2]), (2, [3])])
    q, k, v = (x.detach() for x in qkv(T, 1, 1, 4))
    buckets = Buckets(segments, 1, dtype=torch.float64, device="cpu")
    before = attention(q, k, v, buckets)
    sees = torch.zeros(T, T, dtype=torch.bool)
    for start, length, prompt_start, prompt_length in segments:
        for i in range(length):
            sees[start + i, prompt_start : prompt_start + prompt_length] = True
            sees[start + i, start : start + i + 1] = True
    for j in range(T):
        changed = v.clone()
        changed[j] += 1.0
        moved = (attention(q, k, changed, buckets) - before).abs().amax((1, 2)) > 0
        assert torch.equal(moved, sees[:, j])
    assert math.isclose(sees.sum().item(), 3 + 3 + 2 * (3 * 2 + 3) + 3 + (3 * 2 + 6))
