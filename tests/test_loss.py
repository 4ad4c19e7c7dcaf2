"""loss.py against: loops written from the papers in float64, autograd, finite differences, numbers worked
out by hand, and TRL.

Run: python -m pytest tests/test_loss.py
Shapes as in loss.py: T tokens, N rows, B prompts, G completions of each.
"""

import ast
import collections
import itertools
import math
import pathlib
import random
import types

import pytest
import torch

import loss
from conftest import quick
from loss import AGGREGATES, KL, OBJECTIVES, SCALES, add_stats, advantages, normaliser, policy_loss

NAN, INF = math.nan, math.inf
F64 = torch.float64
COUNTS = dict(group_size=2, max_new_tokens=7)  # what aggregate="group" and "constant" divide by
CLIPS = dict(clip_low=0.1, clip_high=0.15, cispo_max=1.2)  # narrow, so that every branch is taken
KL_CHOICES = [(0.0, "k3", False)] + [(0.3, kl, times) for kl in KL for times in (False, True)]
DUAL = {"clip": (None, 1.3), "gspo": (None, 1.3)}
OPTIONS = [
    dict(objective=o, aggregate=a, beta=beta, kl=kl, kl_times_ratio=times, dual_clip=dual, entropy_coef=coef)
    for o, a, (beta, kl, times), coef in itertools.product(OBJECTIVES, AGGREGATES, KL_CHOICES, (0.0, 0.05))
    for dual in DUAL.get(o, (None,))
]


def batch(seed=8, lengths=(3, 1, 5, 0, 2, 4, 3, 2), dtype=F64):
    """Ragged rows: one of no tokens, one of a single token, one of advantage 0; ratios
    on both sides of every bound.
    """
    g = torch.Generator().manual_seed(seed)
    rows = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    T, N = len(rows), len(lengths)
    normal = lambda n: torch.randn(n, generator=g, dtype=F64)
    adv = normal(N)
    adv[4] = 0.0
    logp = -normal(T).abs() - 0.1
    old = logp + 0.25 * normal(T) + 0.3 * normal(N)[rows]  # the shift by row gives GSPO something to clip
    ref, entropy = logp + 0.4 * normal(T), normal(T).abs()
    tensors = dict(
        logp=logp, old_logp=old, adv=adv, ref_logp=ref, entropy=entropy, exact_kl=normal(T).square()
    )
    return {k: v.to(dtype) for k, v in tensors.items()} | {"rows": rows}


def with_grad(x):
    """The batch with logp and entropy as fresh leaves."""
    return x | {k: x[k].clone().requires_grad_() for k in ("logp", "entropy")}


def value_and_grad(x, **options):
    """Loss, gradient in logp, gradient in entropy (zeros if unused), stats."""
    x = with_grad(x)
    value, stats = policy_loss(**x, **options)
    grads = torch.autograd.grad(value, (x["logp"], x["entropy"]), allow_unused=True, materialize_grads=True)
    return value.detach(), *grads, stats


# ------------------------------------------------------------ the oracle: one token at a time, no shared code


def oracle(
    x,
    objective,
    aggregate,
    beta,
    kl,
    kl_times_ratio,
    dual_clip,
    entropy_coef,
    clip_low,
    clip_high,
    cispo_max,
    group_size,
    max_new_tokens,
    weight=None,
):
    """The loss from FORMULAS, scalar by scalar; tensors of no dimension, so that
    autograd can differentiate it.
    """
    logp, old, ref, ent = ([v for v in x[k]] for k in ("logp", "old_logp", "ref_logp", "entropy"))
    adv, rows = x["adv"].tolist(), x["rows"].tolist()
    N, total = len(adv), 0.0
    for i in range(N):
        tokens = [t for t in range(len(rows)) if rows[t] == i]
        in_row = 0.0
        for t in tokens:
            rho = torch.exp(logp[t] - old[t])
            s = torch.exp(sum(logp[u] - old[u] for u in tokens) / len(tokens)) if objective == "gspo" else rho
            if objective == "reinforce":
                l = -adv[i] * logp[t]
            elif objective == "cispo":
                l = -min(s.item(), cispo_max) * adv[i] * logp[t]
            else:
                bounded = min(max(s.item(), 1 - clip_low), 1 + clip_high)
                l = s * adv[i] if s.item() * adv[i] <= bounded * adv[i] else bounded * adv[i]
                if adv[i] < 0 and dual_clip is not None and s.item() > dual_clip:
                    l = dual_clip * adv[i]
                l = -l
            if weight is not None:
                l = l * weight[t].item()
            if beta:
                d = ref[t] - logp[t]
                k = {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - d - 1, "full": x["exact_kl"][t]}[kl]
                l = l + beta * (rho * k if kl_times_ratio else k)
            in_row = in_row + l - entropy_coef * ent[t]
        total = total + (in_row / len(tokens) if aggregate == "sequence" and tokens else in_row)
    divisor = {"token": len(rows), "sequence": N, "constant": N * max_new_tokens, "group": N / group_size}[
        aggregate
    ]
    return total / divisor


@pytest.mark.parametrize("aggregate", quick(1, AGGREGATES))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_equal_a_loop_in_float64_for_every_option(objective, aggregate):
    x = batch()
    mask = torch.tensor([1.0, 0.0, 0.4] * 7, dtype=F64)[: len(x["rows"])]
    for o in (
        o | dict(weight=w)
        for o in OPTIONS
        if o["objective"] == objective and o["aggregate"] == aggregate
        for w in (None, mask)
    ):
        y = with_grad(x)
        want = oracle(y, **o, **CLIPS, **COUNTS)
        want_grads = torch.autograd.grad(
            want, (y["logp"], y["entropy"]), allow_unused=True, materialize_grads=True
        )
        got, *got_grads, stats = value_and_grad(x, **o, **CLIPS, **COUNTS)
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-13, msg=str(o))
        for a, b in zip(got_grads, want_grads):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=str(o))


def test_the_batch_of_these_tests_reaches_every_branch():
    """Otherwise equality with the oracle says little."""
    x = batch()
    for objective in ("clip", "gspo"):
        _, stats = policy_loss(**x, objective=objective, **CLIPS)
        assert stats["clip_low"] > 0 and stats["clip_high"] > 0 and stats["clip_region"] < stats["tokens"]
        plain, _ = policy_loss(**x, objective=objective, **CLIPS)
        assert policy_loss(**x, objective=objective, dual_clip=1.3, **CLIPS)[0] != plain
    _, stats = policy_loss(**x, objective="cispo", **CLIPS)
    assert 0 < stats["clip_high"] < stats["tokens"] and stats["clip_low"] == 0


@pytest.mark.parametrize("objective", ["reinforce", "clip", "gspo"])
def test_gradient_equals_finite_differences(objective):
    """Not cispo, whose point is a gradient that is not that of its value."""
    x, h = batch(3), 1e-6
    o = dict(
        objective=objective,
        aggregate="sequence",
        dual_clip=1.3,
        beta=0.3,
        kl_times_ratio=True,
        entropy_coef=0.05,
        **CLIPS,
    )
    _, grad, grad_entropy, _ = value_and_grad(x, **o)
    for name, g in (("logp", grad), ("entropy", grad_entropy)):
        for t in range(len(g)):
            step = torch.zeros_like(g)
            step[t] = h
            up, down = (policy_loss(**(x | {name: x[name] + sign * step}), **o)[0] for sign in (1, -1))
            assert abs((up - down) / (2 * h) - g[t]) < 1e-8


def test_cispo_gradient_is_that_of_the_weighted_log_probability():
    x = batch(3)
    weight = torch.exp(x["logp"] - x["old_logp"]).clamp(max=1.2)
    _, grad, *_ = value_and_grad(x, objective="cispo", **CLIPS)
    torch.testing.assert_close(grad, -weight * x["adv"][x["rows"]] / len(weight), rtol=1e-13, atol=0)


# -------------------------------------------------------------------------------------------- numbers by hand


def one_token(rho, adv, **options):
    """The loss and the gradient in logp of one token with logp = ln(1/2) and the given ratio."""
    logp = torch.tensor([math.log(0.5)], dtype=F64, requires_grad=True)
    value, _ = policy_loss(
        logp, logp.detach() - math.log(rho), torch.tensor([adv], dtype=F64), torch.tensor([0]), **options
    )
    value.backward()
    return value.item(), logp.grad.item()


@pytest.mark.parametrize(
    "objective, rho, adv, options, value, grad",
    [
        ("reinforce", 1.5, 2.0, {}, 2 * math.log(2), -2.0),
        ("clip", 1.1, 2.0, {}, -2.2, -2.2),  # inside: -rho A
        ("clip", 1.5, 2.0, {}, -2.4, 0.0),  # far enough: -1.2 A
        ("clip", 1.25, 2.0, {"clip_high": 0.28}, -2.5, -2.5),  # DAPO's wider roof
        ("clip", 0.5, 2.0, {}, -1.0, -1.0),  # less likely than before, though good: pulled back
        ("clip", 0.5, -2.0, {}, 1.6, 0.0),  # bad, already rarer: 0.8 * 2
        ("clip", 5.0, -2.0, {}, 10.0, 10.0),  # bad and more likely: no bound ...
        ("clip", 5.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0),  # ... but for the dual clip
        ("clip", 2.0, -2.0, {"dual_clip": 3.0}, 4.0, 4.0),
        ("cispo", 3.0, 2.0, {}, 6 * math.log(2), -6.0),
        ("cispo", 8.0, 2.0, {}, 10 * math.log(2), -10.0),  # weight capped at 5, the gradient lives
        ("cispo", 8.0, -2.0, {}, -10 * math.log(2), 10.0),
        ("gspo", 1.1, 2.0, {}, -2.2, -2.2),  # one token: its sequence
    ],
)
def test_objective_of_one_token_by_hand(objective, rho, adv, options, value, grad):
    got = one_token(rho, adv, objective=objective, **options)
    assert got == pytest.approx((value, grad), abs=1e-14)


def test_gspo_by_hand():
    """Ratios 2 and 1/2 average to 1 in the log: GSPO does not clip what clip would clip twice, and both
    tokens get s A.
    """
    logp = torch.log(torch.tensor([0.5, 0.25], dtype=F64)).requires_grad_()
    old = torch.log(torch.tensor([0.25, 0.5], dtype=F64))
    value, stats = policy_loss(
        logp, old, torch.tensor([3.0], dtype=F64), torch.tensor([0, 0]), objective="gspo"
    )
    value.backward()
    assert value.item() == pytest.approx(-3.0) and logp.grad.tolist() == pytest.approx([-1.5, -1.5])
    assert stats["clip_region"] == 0 and stats["ratio_max"] == pytest.approx(2.0)


def test_aggregation_by_hand():
    """Rows of 1 and 3 tokens, l = -A logp = 2, 1, 1, 1: token 5/4, sequence (2 + 1)/2, constant 5/(2*10),
    group of 2: 5.
    """
    logp, adv, rows = torch.full((4,), -1.0, dtype=F64), torch.tensor([2.0, 1.0]), torch.tensor([0, 1, 1, 1])
    want = {"token": 1.25, "sequence": 1.5, "constant": 0.25, "group": 5.0}
    for aggregate, value in want.items():
        got, _ = policy_loss(
            logp, logp, adv, rows, objective="reinforce", aggregate=aggregate, group_size=2, max_new_tokens=10
        )
        assert got.item() == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize(
    "kl, times, value, grad",
    [
        ("k1", False, math.log(2), 1.0),
        ("k2", False, math.log(2) ** 2 / 2, math.log(2)),
        ("k3", False, math.log(2) - 0.5, 0.5),
        ("k1", True, 3 * math.log(2), 3 * (math.log(2) + 1)),
        ("k2", True, 1.5 * math.log(2) ** 2, 1.5 * math.log(2) ** 2 + 3 * math.log(2)),
        (
            "k3",
            True,
            3 * (math.log(2) - 0.5),
            3 * math.log(2),
        ),  # (rho k3)' = rho (k3 + 1 - r): 3 (ln 2 - 0.5 + 0.5)
    ],
)
def test_kl_by_hand(kl, times, value, grad):
    """Policy 1/2, reference 1/4, ratio 3: d = -ln 2."""
    logp = torch.tensor([math.log(0.5)], dtype=F64, requires_grad=True)
    total, stats = policy_loss(
        logp,
        logp.detach() - math.log(3),
        torch.zeros(1),
        torch.tensor([0]),
        beta=0.1,
        kl=kl,
        ref_logp=torch.tensor([math.log(0.25)], dtype=F64),
        kl_times_ratio=times,
    )
    total.backward()
    assert (total.item(), logp.grad.item()) == pytest.approx((0.1 * value, 0.1 * grad), abs=1e-14)
    assert stats["kl"].item() == pytest.approx(value) and stats["policy_loss"] == 0


@pytest.mark.parametrize("kl", ["k1", "k3"])
def test_kl_times_ratio_has_the_value_and_gradient_of_the_exact_kl_off_policy(kl):
    """The expectation under the sampler, summed over a vocabulary of 5, against
    KL(policy || reference) itself.
    """
    g = torch.Generator().manual_seed(0)
    logits, old, ref = (torch.randn(5, generator=g, dtype=F64) for _ in range(3))
    logits.requires_grad_()
    logp, old, ref = logits.log_softmax(0), old.log_softmax(0), ref.log_softmax(0)
    exact = (logp.exp() * (logp - ref)).sum()
    (want,) = torch.autograd.grad(exact, logits, retain_graph=True)
    for times in (True, False):
        # token v is drawn with probability old(v): its loss is weighted by that
        each = [
            policy_loss(
                logp[v : v + 1],
                old[v : v + 1],
                torch.zeros(1),
                torch.tensor([0]),
                ref_logp=ref[v : v + 1],
                beta=1.0,
                kl=kl,
                kl_times_ratio=times,
            )[0]
            for v in range(5)
        ]
        mean = sum(p * e for p, e in zip(old.exp(), each))
        (got,) = torch.autograd.grad(mean, logits, retain_graph=True)
        assert torch.allclose(mean, exact) is times and torch.allclose(got, want) is times


def test_k3_is_exact_and_never_negative_near_zero():
    """exp(d) - d - 1 in float32 is noise of 1e-7, often negative, for |d| < 3e-4: where a run starts."""
    d = torch.linspace(-1e-3, 1e-3, 2001, dtype=F64)
    zero = torch.zeros(2001)
    logp = -d.float()
    _, stats = policy_loss(logp, logp, zero[:1], zero.long(), ref_logp=zero)
    exact = torch.expm1(-logp.double()) + logp.double()
    each = KL["k3"](-logp)
    assert (each >= 0).all() and stats["kl"].item() == pytest.approx(exact.sum().item(), rel=1e-3)
    assert (each - exact).abs().max() < 1e-10


# ------------------------------------------------------------------------------------------ splits and chunks


def take(x, tokens, rows=None):
    """Some tokens of the batch; with `rows`, only these rows' advantages too, renumbered."""
    y = {k: (v if k == "adv" else v[tokens]) for k, v in x.items()}
    if rows is not None:
        new = torch.full((len(x["adv"]),), -1)
        new[rows] = torch.arange(len(rows))
        y |= {"adv": x["adv"][rows], "rows": new[y["rows"]]}
    return y


def add_parts(x, parts, **options):
    """Loss, gradients and stats of policy_loss over (tokens, kept rows or None) parts, added up."""
    value, grad, grad_entropy, stats = 0.0, torch.zeros_like(x["logp"]), torch.zeros_like(x["logp"]), {}
    for tokens, rows in parts:
        v, g, e, s = value_and_grad(take(x, tokens, rows), **options)
        value, stats = value + v, add_stats(stats, s)
        grad[tokens] += g
        grad_entropy[tokens] += e
    return value, grad, grad_entropy, stats


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_gradient_and_stats_do_not_depend_on_micro_batches(objective):
    """Every option, over random splits into whole rows, with advantages of the whole
    step or of the micro-batch.
    """
    x, rng = batch(), random.Random(0)
    lengths = torch.bincount(x["rows"], minlength=8).tolist()
    for o in (o for o in OPTIONS if o["objective"] == objective):
        norm = normaliser(lengths, aggregate=o["aggregate"], **COUNTS)
        whole = value_and_grad(x, **o, **CLIPS, norm=norm)
        order = rng.sample(range(8), 8)
        cuts = sorted(rng.sample(range(1, 8), rng.randint(1, 3)))
        bins = [torch.tensor(order[a:b]) for a, b in zip([0] + cuts, cuts + [8])]
        parts = [(torch.isin(x["rows"], b).nonzero()[:, 0], b if rng.random() < 0.5 else None) for b in bins]
        split = add_parts(x, parts, **o, **CLIPS, norm=norm)
        for a, b in zip(split[:3], whole[:3]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=str(o))
        assert split[3].keys() == whole[3].keys()
        for k, v in whole[3].items():
            torch.testing.assert_close(split[3][k], v, rtol=1e-12, atol=1e-14, msg=f"{k} {o}")


def test_elementwise_objectives_may_be_called_on_chunks_that_cut_rows():
    x = batch(2)
    T, lengths = len(x["rows"]), torch.bincount(x["rows"], minlength=8)
    for o in (o for o in OPTIONS if o["objective"] != "gspo" and o["beta"] and o["kl"] == "k3"):
        norm = normaliser(lengths, aggregate=o["aggregate"], **COUNTS)
        whole = value_and_grad(x, **o, **CLIPS, norm=norm)
        parts = [(torch.arange(a, min(a + 3, T)), None) for a in range(0, T, 3)]
        chunks = add_parts(x, parts, **o, **CLIPS, norm=norm, lengths=lengths)
        for a, b in zip(chunks[:3], whole[:3]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=str(o))


def test_order_of_tokens_does_not_matter():
    x = batch(2)
    perm = torch.randperm(len(x["rows"]), generator=torch.Generator().manual_seed(0))
    for objective, aggregate in itertools.product(OBJECTIVES, AGGREGATES):
        o = dict(objective=objective, aggregate=aggregate, beta=0.1, **COUNTS)
        value, grad, *_ = value_and_grad(x, **o)
        shuffled, shuffled_grad, *_ = value_and_grad(take(x, perm), **o)
        torch.testing.assert_close(shuffled, value, rtol=1e-12, atol=0)
        torch.testing.assert_close(shuffled_grad, grad[perm], rtol=1e-12, atol=1e-16)


def test_normaliser_is_the_default_and_adds_up_over_ranks():
    x, lengths = batch(), [3, 1, 5, 0, 2, 4, 3, 2]
    want = {"token": 20.0, "sequence": 8.0, "constant": 56.0, "group": 4.0}
    for aggregate, value in want.items():
        norm = normaliser(lengths, aggregate=aggregate, **COUNTS)
        assert norm == value and type(norm) is float
        assert normaliser(torch.tensor(lengths), aggregate=aggregate, **COUNTS) == value
        assert (
            sum(normaliser(part, aggregate=aggregate, **COUNTS) for part in (lengths[:3], [], lengths[3:]))
            == value
        )
        default = policy_loss(**x, aggregate=aggregate, **COUNTS)[0]
        assert torch.equal(default, policy_loss(**x, aggregate=aggregate, norm=norm)[0])


def test_a_rank_without_tokens_adds_nothing():
    x = batch()
    empty = take(x, torch.arange(0))
    for objective, aggregate in itertools.product(OBJECTIVES, AGGREGATES):
        for norm in (None, 0.0, 5.0):  # 0.0: every completion of the step was masked out
            value, grad, _, stats = value_and_grad(
                empty, objective=objective, aggregate=aggregate, beta=0.1, norm=norm, **COUNTS
            )
            assert value == 0 and grad.shape == (0,)
        full = policy_loss(**x, objective=objective)[1]
        merged = add_stats(stats, full)
        assert all(torch.equal(merged[k], v) for k, v in full.items() if "loss" not in k)


# --------------------------------------------------------------------------------------- zeros and infinities


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_advantage_is_exactly_zero_loss_and_gradient_whatever_the_ratio(objective, dtype):
    """Also where exp(logp - old) overflows or a log-probability is -inf: 0 * inf is NaN."""
    logp = torch.tensor([-1.0, -0.1, -0.2, -INF, -3.0, -0.5], dtype=dtype, requires_grad=True)
    old = torch.tensor([-1.0, -2000.0, -INF, -1.0, -0.5, -90.0], dtype=dtype)
    rows = torch.tensor([0, 0, 0, 1, 1, 2])
    for aggregate, dual in itertools.product(AGGREGATES, (None, 3.0)):
        value, stats = policy_loss(
            logp,
            old,
            torch.zeros(3),
            rows,
            objective=objective,
            aggregate=aggregate,
            dual_clip=dual,
            **COUNTS,
        )
        (grad,) = torch.autograd.grad(value, logp)
        assert torch.equal(value.detach(), torch.zeros_like(value)) and torch.equal(
            grad, torch.zeros_like(grad)
        )
        assert stats["clip_region"] == 0 and stats["policy_loss"] == 0


def test_zero_advantage_rows_leave_the_others_alone_to_the_bit():
    """A row of advantage 0, however wild, changes neither the loss nor any gradient of the other rows."""
    x = batch(4)
    for o in (o for o in OPTIONS if not o["beta"] and not o["entropy_coef"]):
        wild = x | {"old_logp": torch.where(x["rows"] == 4, -INF, x["old_logp"])}
        calm, grad, *_ = value_and_grad(x, **o, **CLIPS, **COUNTS)
        same, same_grad, *_ = value_and_grad(wild, **o, **CLIPS, **COUNTS)
        assert torch.equal(calm, same) and torch.equal(grad, same_grad)


def test_all_equal_group_gives_exactly_zero_policy_gradient_end_to_end():
    for reward, G in itertools.product((0.1, 0.3, 1 / 3, 1e8 + 0.1, -7.7), (2, 3, 7, 8, 16)):
        for scale in SCALES:
            adv = advantages(torch.full((2, G), reward, dtype=F64), scale=scale)
            logp = torch.linspace(-3, -0.1, 2 * G).requires_grad_()
            value, _ = policy_loss(logp, logp.detach() - 0.3, adv.flatten(), torch.arange(2 * G))
            value.backward()
            assert value == 0 and (logp.grad == 0).all()


@pytest.mark.parametrize("dtype, far", [(torch.float32, 200.0), (F64, 2000.0)])
@pytest.mark.parametrize("objective", ["clip", "gspo"])
def test_clipped_token_whose_ratio_overflows_has_zero_gradient_not_nan(objective, dtype, far):
    for adv, dual, bound, times in (
        (1.0, None, 1.2, 1),
        (-1.0, 3.0, 3.0, 1),
        (1.0, None, 1.2, 1000),
        (-1.0, 3.0, 3.0, 1000),
    ):
        logp = torch.tensor([-0.5], dtype=dtype, requires_grad=True)
        value, _ = policy_loss(
            logp,
            logp.detach() - times * far,
            torch.tensor([adv]),
            torch.tensor([0]),
            objective=objective,
            dual_clip=dual,
        )
        value.backward()
        assert value.item() == pytest.approx(-bound * adv) and logp.grad.item() == 0


@pytest.mark.parametrize("dtype, near, far", [(torch.float32, 80.0, 90.0), (F64, 700.0, 720.0)])
def test_exponentials_are_exact_up_to_the_limit_and_then_stay_finite_with_the_right_sign(dtype, near, far):
    """k3 of a token the policy has abandoned must still pull it back (gradient -), and
    harder the further it is.
    """
    d = torch.tensor([-INF, -5.0, 0.0, 1e-3, 5.0, 30.0, near, far, 2 * far], dtype=dtype)
    x = d.clone().requires_grad_()
    y = loss.tamed(torch.exp, x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y[:7], d[:7].exp()) and torch.equal(grad[:7], d[:7].exp())
    assert (
        y.isfinite().all() and grad.isfinite().all() and (y.diff() > 0).all() and (grad[7:] >= grad[6]).all()
    )
    logp = (-d[1:]).requires_grad_()
    value, _ = policy_loss(
        logp,
        logp.detach(),
        torch.zeros(1),
        torch.zeros(8, dtype=torch.long),
        beta=1.0,
        ref_logp=torch.zeros(8, dtype=dtype),
    )
    value.backward()
    assert value.isfinite() and (logp.grad[2:] < 0).all() and logp.grad[0] > 0 and logp.grad[1] == 0


def test_nan_is_not_hidden():
    x = batch()
    for key in ("logp", "old_logp", "adv"):
        broken = x | {key: x[key].clone()}
        broken[key][0] = NAN
        value, stats = policy_loss(**broken)
        assert value.isnan() and stats["loss"].isnan()
        assert key == "adv" or (stats["diff_max"].isnan() and stats["ratio_min"].isnan())


def test_on_policy_clip_and_cispo_have_the_gradient_of_reinforce_to_the_bit():
    """Ratio 1 is a tie in min(): the gradient must not be halved or doubled there. The
    loss is -mean A, not 0.
    """
    x = batch(5)
    x["old_logp"] = x["logp"]
    _, want, *_ = value_and_grad(x, objective="reinforce")
    for o in (
        dict(objective="clip"),
        dict(objective="clip", dual_clip=3.0),
        dict(objective="cispo"),
        dict(objective="clip", clip_low=0.0, clip_high=0.0),
    ):
        value, grad, _, stats = value_and_grad(x, **o)
        assert torch.equal(grad, want)
        assert (
            stats["clip_region"] == 0
            and stats["ratio_min"] == stats["ratio_max"] == 1
            and stats["diff_max"] == 0
        )


def test_old_and_reference_and_advantage_are_constants():
    """old_logp=logp without detach() gives many scripts a gradient of 0; here it is the on-policy one."""
    x = with_grad(batch())
    value, _ = policy_loss(**(x | {"old_logp": x["logp"]}))
    (grad,) = torch.autograd.grad(value, x["logp"])
    _, want, *_ = value_and_grad(batch() | {"old_logp": batch()["logp"]})
    assert torch.equal(grad, want) and (grad != 0).any()


# ------------------------------------------------------------------------------------------------ stats


@pytest.mark.parametrize("seed", [0, 3, 6, 8])
def test_stats_are_what_a_loop_counts(seed):
    x, o = batch(seed), dict(clip_low=0.1, clip_high=0.15, beta=0.2, entropy_coef=0.1)
    value, stats = policy_loss(**x, **o)
    diff = [(a - b).item() for a, b in zip(x["logp"], x["old_logp"])]
    adv = [x["adv"][i].item() for i in x["rows"]]
    low = sum(math.exp(d) < 0.9 and a < 0 for d, a in zip(diff, adv))
    high = sum(math.exp(d) > 1.15 and a > 0 for d, a in zip(diff, adv))
    kl = sum((math.exp(r - p) - (r - p) - 1) for p, r in zip(x["logp"].tolist(), x["ref_logp"].tolist()))
    want = dict(
        tokens=20,
        clip_low=low,
        clip_high=high,
        clip_region=low + high,
        kl=kl,
        entropy=x["entropy"].sum().item(),
        loss=value.item(),
        diff_sum=sum(map(abs, diff)),
        diff_max=max(map(abs, diff)),
        ratio_sum=sum(map(math.exp, diff)),
        ratio_min=math.exp(min(diff)),
        ratio_max=math.exp(max(diff)),
        policy_loss=value.item() - 0.2 * kl / 20 + 0.1 * x["entropy"].mean().item(),
    )
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(want, rel=1e-12)
    assert all(v.shape == () and v.dtype == F64 and not v.requires_grad for v in stats.values())


def test_stats_have_a_kl_or_entropy_only_where_given_and_beta_zero_only_watches():
    x = with_grad(batch())
    assert not {"kl", "entropy"} & policy_loss(x["logp"], x["old_logp"], x["adv"], x["rows"])[1].keys()
    value, stats = policy_loss(**x)
    plain, _ = policy_loss(x["logp"], x["old_logp"], x["adv"], x["rows"])
    assert stats["kl"] > 0 and stats["entropy"] > 0 and torch.equal(value, plain)


def test_weight_multiplies_the_policy_term_only():
    x, weight = batch(), torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=F64)
    weight[::3] = 0.0
    for objective in OBJECTIVES:
        o = dict(objective=objective, beta=0.1, entropy_coef=0.1, **CLIPS)
        _, stats = policy_loss(**x, **o)
        one, grad, *_ = value_and_grad(x, **o, weight=torch.ones(20))
        assert torch.equal(one, policy_loss(**x, **o)[0])
        # with only one token kept, the policy loss is that token's
        each = [policy_loss(**x, **o, weight=torch.eye(20)[t])[1] for t in range(20)]
        weighted = policy_loss(**x, **o, weight=weight)[1]
        torch.testing.assert_close(
            weighted["policy_loss"],
            sum(w * e["policy_loss"] for w, e in zip(weight, each)),
            rtol=1e-12,
            atol=1e-15,
        )
        assert weighted["kl"] == stats["kl"] and stats["clip_region"] == sum(e["clip_region"] for e in each)
        assert weighted["clip_region"] == sum(e["clip_region"] for w, e in zip(weight, each) if w > 0)


# ------------------------------------------------------------------------------------------------ advantages


def oracle_advantages(rewards, scale, ddof, eps):
    """Lists of float or None in, lists of float out, straight from the table."""
    valid = [[r for r in group if r is not None] for group in rewards]
    flat = sum(valid, [])

    def std(v):
        return math.sqrt(sum((r - sum(v) / len(v)) ** 2 for r in v) / (len(v) - ddof))

    out = []
    for group, v in zip(rewards, valid):
        silent = len(v) < 2 or max(v) == min(v)
        for r in group:
            if r is None or silent:
                out.append(0.0)
            elif scale == "rloo":
                others = list(v)
                others.remove(r)
                out.append(r - sum(others) / len(others))
            else:
                out.append(
                    (r - sum(v) / len(v))
                    / (1 if scale == "none" else std(v if scale == "group" else flat) + eps)
                )
    return out


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_equal_a_loop_with_nones_anywhere(scale):
    rng = random.Random(0)
    for _ in range(60):
        B, G = rng.randint(1, 5), rng.randint(2, 9)
        draw = rng.choice(
            [lambda: rng.gauss(0, 3), lambda: float(rng.random() < 0.5), lambda: 0.1 * rng.randint(0, 2)]
        )
        groups = [[None if rng.random() < 0.25 else draw() for _ in range(G)] for _ in range(B)]
        tensor = torch.tensor([[NAN if r is None else r for r in g] for g in groups], dtype=F64)
        for ddof, eps in ((1, 1e-4), (0, 1e-4), (1, 0.0)):
            got = advantages(tensor, scale=scale, ddof=ddof, eps=eps)
            want = torch.tensor(oracle_advantages(groups, scale, ddof, eps), dtype=F64).view(B, G)
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_advantages_by_hand():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0]], dtype=F64)
    s = {k: advantages(r, scale=k) for k in SCALES}
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (1 + 1e-4)  # stds with ddof 1: sqrt(1/3) and 1
    assert s["group"].tolist() == [
        pytest.approx([a, -a, -a, a]),
        pytest.approx([1.5 * b, -0.5 * b, -0.5 * b, -0.5 * b]),
    ]
    assert s["none"].tolist() == [[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]]
    assert s["rloo"].tolist() == [
        pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        pytest.approx([2, -2 / 3, -2 / 3, -2 / 3]),
    ]
    c = math.sqrt((2 * 0.25 + 2.25 + 5 * 0.25) / 7) + 1e-4  # all eight rewards about their mean of 1/2
    assert (s["batch"] * c).tolist() == [
        pytest.approx([0.5, -0.5, -0.5, 0.5]),
        pytest.approx([1.5, -0.5, -0.5, -0.5]),
    ]
    assert advantages(r, ddof=0)[0].tolist() == pytest.approx(
        [0.5 / 0.5001, -0.5 / 0.5001, -0.5 / 0.5001, 0.5 / 0.5001]
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_give_exactly_zero_even_without_eps(scale, dtype):
    """0.1 eight times has a mean that is not 0.1: (r - mean) / std of rounding noise
    has been an advantage of thousands.
    """
    values = [0.1, 0.2, 0.3, 0.7, 1 / 3, 1e-30, 1e8 + 0.1, -2.3]
    for G in (2, 3, 5, 7, 8, 16, 63):
        group = torch.tensor(values, dtype=dtype)[:, None].expand(-1, G).clone()
        some_missing = group.clone()
        some_missing[:, ::2] = NAN
        for r in (group, some_missing):
            A = advantages(r, scale=scale, eps=0.0)
            assert torch.equal(A, torch.zeros_like(A)) and A.dtype == dtype


@pytest.mark.parametrize("scale", SCALES)
def test_an_unscored_completion_gets_zero_and_changes_no_other(scale):
    full = torch.tensor([[1.0, 0.25, 0.5], [0.0, 3.0, 1.0]], dtype=F64)
    gap = torch.tensor([[1.0, NAN, 0.25, 0.5], [0.0, 3.0, 1.0, NAN]], dtype=F64)
    a, b = advantages(full, scale=scale), advantages(gap, scale=scale)
    assert (
        torch.allclose(b[0, [0, 2, 3]], a[0]) and torch.allclose(b[1, :3], a[1]) and b[0, 1] == b[1, 3] == 0
    )
    alone = advantages(torch.tensor([[NAN, 5.0, NAN], [NAN, NAN, NAN]]), scale=scale)
    assert torch.equal(alone, torch.zeros(2, 3))
    assert torch.equal(advantages(torch.tensor([[0.0, 1.0], [NAN, NAN]]), scale=scale)[1], torch.zeros(2))


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_of_a_group_sum_to_zero_and_ignore_a_shift(scale):
    r = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    A = advantages(r, scale=scale)
    assert A.sum(1).abs().max() < 1e-13
    torch.testing.assert_close(advantages(r + 1e6, scale=scale), A, rtol=1e-6, atol=1e-8)


def test_advantages_are_computed_in_float64_and_returned_in_float32():
    """One point in 10,000: a float32 mean of rewards near 1e4 would lose the difference."""
    r = torch.tensor([[1e4, 1e4 + 0.0009765625]])
    A = advantages(r, scale="none")
    assert A.dtype == torch.float32 and A.tolist() == [[-0.00048828125, 0.00048828125]]
    assert advantages(torch.tensor([[0, 1]])).dtype == torch.float32


def test_advantages_leave_their_input_alone():
    r = torch.tensor([[1.0, NAN, 0.5]], requires_grad=True)
    before = r.detach().clone()
    assert not advantages(r).requires_grad and torch.equal(r.detach().nan_to_num(9), before.nan_to_num(9))


@pytest.mark.parametrize("scale", ["group", "batch", "rloo"])
def test_a_group_of_one_is_refused_in_a_sentence(scale):
    with pytest.raises(ValueError, match="group size 1 leaves nobody to compare with"):
        advantages(torch.ones(4, 1), scale=scale)
    assert torch.equal(advantages(torch.ones(4, 1), scale="none"), torch.zeros(4, 1))


@pytest.mark.parametrize("bad", [INF, -INF])
def test_an_infinite_reward_is_refused_with_its_place(bad):
    with pytest.raises(ValueError, match=r"\(1, 0\)"):
        advantages(torch.tensor([[0.0, NAN], [bad, 1.0]]))


# ------------------------------------------------------------------------------------------------ misuse


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(objective="gpso"), "did you mean 'gspo'.*Known: reinforce, clip, cispo, gspo"),
        (dict(aggregate="sequense"), "did you mean 'sequence'"),
        (dict(aggregate="bnpo", norm=3.0), "unknown aggregate"),
        (dict(kl="k4"), "unknown kl 'k4'.*Known: k1, k2, k3, full"),
        (dict(beta=0.1, kl="full", exact_kl=None), "exact_kl="),
        (dict(aggregate="group"), "group_size="),
        (dict(aggregate="constant"), "max_new_tokens="),
        (dict(beta=0.1, ref_logp=None), "ref_logp="),
        (dict(entropy_coef=0.1, entropy=None), "entropy="),
        (dict(objective="gspo", lengths=torch.ones(8)), "whole row"),
        (dict(norm=0.0), "norm=0.0"),
        (dict(objective="cispo", cispo_max=0.28), "cispo_max=0.28"),
        (dict(dual_clip=0.2), "dual_clip > 1"),
        (dict(clip_low=-0.1), "clip_low"),
        (dict(old_logp=torch.zeros(20, dtype=torch.bfloat16)), "old_logp is torch.bfloat16"),
    ],
)
def test_misuse_is_one_clear_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        policy_loss(**(batch() | change))


@pytest.mark.parametrize(
    "change",
    [
        dict(rows=torch.zeros(3, dtype=torch.long)),
        dict(adv=torch.zeros(8, 1)),
        dict(old_logp=torch.zeros(4, 5)),
        dict(lengths=torch.ones(3)),
        dict(weight=torch.ones(1)),
        dict(entropy=torch.ones(19)),
    ],
)
def test_a_wrong_shape_is_shown_with_the_right_one(change):
    with pytest.raises(AssertionError, match=r"\(.*\).*\(.*\)"):
        policy_loss(**(batch() | change))


def test_unknown_scale_and_wrong_rank_of_rewards_stop():
    with pytest.raises(ValueError, match="did you mean 'group'"):
        advantages(torch.ones(2, 2), scale="groups")
    with pytest.raises(AssertionError, match=r"\(B, G\).*\(4,\)"):
        advantages(torch.ones(4))
    with pytest.raises(ValueError, match="ddof"):
        advantages(torch.ones(2, 2), ddof=2)


def test_the_file_can_be_copied_out_alone():
    """Standard library and torch, and nothing but definitions at the top level."""
    tree = ast.parse(pathlib.Path(loss.__file__).read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    assert modules == {"dataclasses", "difflib", "functools", "inspect", "math", "torch"}
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Expr)
    assert all(isinstance(node, definitions) for node in tree.body)


def test_float32_agrees_with_float64():
    for o in OPTIONS[::7]:
        exact, grad, *_ = value_and_grad(batch(), **o, **CLIPS, **COUNTS)
        rough, rough_grad, *_ = value_and_grad(batch(dtype=torch.float32), **o, **CLIPS, **COUNTS)
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough.double(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rough_grad.double(), grad, rtol=1e-5, atol=1e-6)


def test_no_tensor_is_read_back_to_the_host():
    """On the meta device a tensor has no values: .item(), a comparison in an if,
    nonzero or bincount would raise.
    """
    x = {k: v.to("meta") for k, v in batch().items()}
    for o in (
        dict(objective=o, aggregate=a, beta=0.1, kl_times_ratio=True, entropy_coef=0.1)
        for o, a in zip(OBJECTIVES, AGGREGATES)
    ):
        _, grad, _, stats = value_and_grad(x, **o, **CLIPS, **COUNTS)
        assert grad.device.type == "meta" and all(v.device.type == "meta" for v in stats.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same_numbers_and_is_never_waited_for():
    for o in OPTIONS[::5]:
        want, grad, *_ = value_and_grad(batch(), **o, **CLIPS, **COUNTS)
        x = {k: v.cuda() for k, v in batch().items()}
        torch.cuda.set_sync_debug_mode("error")
        try:
            got, got_grad, _, stats = value_and_grad(x, **o, **CLIPS, **COUNTS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(got_grad.cpu(), grad, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------------------ TRL


@pytest.fixture(scope="module")
def trl_loss():
    """TRL's own GRPOTrainer._compute_loss on the least `self` that it accepts: (batch,
    settings) -> loss, gradient, metrics.
    """
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer

    def run(
        x,
        *,
        loss_type,
        level="token",
        low=0.2,
        high=0.2,
        delta=None,
        beta=0.0,
        times=False,
        entropy_coef=0.0,
        weight=None,
        top=1.0,
    ):
        rows, N = x["rows"], len(x["adv"])
        lengths = torch.bincount(rows, minlength=N)
        C = int(lengths.max())
        mask = torch.arange(C) < lengths[:, None]  # (N, C)
        pad = lambda v: torch.full((N, C), -0.7, dtype=v.dtype).masked_scatter(
            mask, v
        )  # rows are in order: row-major fill
        logp = x["logp"].clone().requires_grad_()
        entropy = x["entropy"].clone().requires_grad_()
        args = types.SimpleNamespace(delta=delta, use_bias_correction_kl=times, steps_per_generation=1)
        accelerator = types.SimpleNamespace(
            num_processes=1,
            gather=lambda v: v,
            pad_across_processes=lambda v, **_: v,
            reduce=lambda v, reduction: v,
            sync_gradients=True,
        )
        metrics = {"train": collections.defaultdict(list)}
        stub = types.SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *a, **k: (pad(logp), pad(entropy), None),
            aux_loss_enabled=False,
            top_entropy_quantile=top,
            off_policy_mask_threshold=None,
            importance_sampling_level=level,
            beta=beta,
            args=args,
            loss_type=loss_type,
            epsilon_low=low,
            epsilon_high=high,
            use_vllm=weight is not None,
            vllm_importance_sampling_correction=True,
            model=types.SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
            accelerator=accelerator,
            max_completion_length=COUNTS["max_new_tokens"],
            _entropy_bonus_enabled=entropy_coef != 0,
            use_adaptive_entropy=False,
            entropy_coef=entropy_coef,
            _metrics=metrics,
        )
        stub.get_high_entropy_mask = types.MethodType(trainer.get_high_entropy_mask, stub)
        ids = torch.zeros((N, C), dtype=torch.long)
        inputs = dict(
            prompt_ids=ids[:, :1],
            prompt_mask=torch.ones((N, 1)),
            completion_ids=ids,
            completion_mask=mask.to(logp.dtype),
            advantages=x["adv"],
            old_per_token_logps=pad(x["old_logp"]),
            ref_per_token_logps=pad(x["ref_logp"]),
            num_items_in_batch=lengths.sum(),
        )
        if weight is not None:
            inputs["importance_sampling_ratio"] = pad(weight)
        value = trainer._compute_loss(stub, None, inputs)
        grads = torch.autograd.grad(value, (logp, entropy), allow_unused=True, materialize_grads=True)
        return value.detach(), *grads, {k: v[0] for k, v in metrics["train"].items()}

    return run


TRL_TYPES = {
    "grpo": ("clip", "sequence"),
    "dapo": ("clip", "token"),
    "dr_grpo": ("clip", "constant"),
    "bnpo": ("clip", "token"),
    "cispo": ("cispo", "token"),
}


@pytest.mark.parametrize(
    "loss_type, level",
    [(t, "token") for t in TRL_TYPES] + [(t, "sequence") for t in TRL_TYPES if t != "cispo"],
)
def test_loss_gradient_and_clip_ratios_equal_trl(trl_loss, loss_type, level):
    objective, aggregate = TRL_TYPES[loss_type]
    objective = "gspo" if level == "sequence" else objective
    x = batch(7, lengths=(3, 1, 5, 2, 4, 3, 2, 6))  # TRL's mean over a row of no tokens is NaN in its metrics
    for beta, times, delta, (low, high) in itertools.product(
        (0.0, 0.1), (False, True), (None, 1.3), ((0.2, 0.2), (0.1, 0.28))
    ):
        if level == "sequence" and times:
            continue  # TRL takes the sequence's ratio there, DeepSeek-V3.2 and we the token's
        trl_high = (
            1.2 if objective == "cispo" else high
        )  # TRL reads cispo_max from epsilon_high: the confusion FORMULAS warns of
        want, want_grad, _, metrics = trl_loss(
            x, loss_type=loss_type, level=level, low=low, high=trl_high, delta=delta, beta=beta, times=times
        )
        got, grad, _, stats = value_and_grad(
            x,
            objective=objective,
            aggregate=aggregate,
            clip_low=low,
            clip_high=high,
            cispo_max=1.2,
            dual_clip=delta,
            beta=beta,
            kl_times_ratio=times,
            **COUNTS,
        )
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grad, want_grad, rtol=1e-12, atol=1e-14)
        assert stats["entropy"] / stats["tokens"] == pytest.approx(metrics["entropy"])
        assert not beta or stats["kl"].item() / stats["tokens"].item() == pytest.approx(metrics["kl"])
        if level == "token" and objective == "clip":  # TRL's mean over sequences in the other case
            for k in ("low", "high", "region"):
                assert (stats[f"clip_{k}"] / stats["tokens"]).item() == pytest.approx(
                    metrics[f"clip_ratio/{k}_mean"], rel=1e-6
                )


def test_entropy_bonus_and_token_weight_equal_trl(trl_loss):
    x = batch(8, lengths=(3, 1, 5, 2, 4, 3, 2, 6))
    weight = torch.rand(26, generator=torch.Generator().manual_seed(1), dtype=F64)
    for o in (dict(entropy_coef=0.05), dict(weight=weight)):
        want, *want_grads, _ = trl_loss(x, loss_type="dapo", beta=0.1, **o)
        got, *grads, _ = value_and_grad(x, beta=0.1, **o)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        for a, b in zip(grads, want_grads):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("top", [0.2, 0.5, 0.8])
def test_entropy_mask_equals_trl(trl_loss, top):
    x = batch(8, lengths=(3, 1, 5, 2, 4, 3, 2, 6))
    x["entropy"] = x["entropy"].float().double()  # TRL compares with a threshold in float32
    want, want_grad, _, _ = trl_loss(x, loss_type="dapo", beta=0.1, top=top)
    got, grad, *_ = value_and_grad(x, beta=0.1, weight=loss.highest(x["entropy"], top).double())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, want_grad, rtol=1e-12, atol=1e-14)


# --------------------------------------------------------------------------- several rewards, masks, mismatch
def test_normalize_then_sum_equals_a_loop_with_nones_anywhere():
    g = torch.Generator().manual_seed(4)
    for _ in range(50):
        B, G, R = (int(torch.randint(lo, hi, (), generator=g)) for lo, hi in ((1, 5), (2, 6), (1, 4)))
        parts = torch.randint(0, 3, (B, G, R), generator=g).double() * torch.tensor([1.0, 10.0, 0.1])[:R]
        parts[torch.rand(B, G, R, generator=g) < 0.15] = NAN
        weights = torch.tensor([1.0, 0.5, 0.0])[:R]
        sums, live = {}, []
        for b, i in itertools.product(range(B), range(G)):
            total, any_spread = 0.0, False
            for r in range(R):
                column = [x for x in parts[b, :, r].tolist() if x == x]
                if weights[r] == 0 or len(column) < 2 or max(column) == min(column):
                    continue
                any_spread = True
                mean = sum(column) / len(column)
                std = (sum((x - mean) ** 2 for x in column) / (len(column) - 1)) ** 0.5
                if not math.isnan(parts[b, i, r]):
                    total += weights[r].item() * (parts[b, i, r].item() - mean) / (std + 1e-4)
            sums[b, i] = total
            if any_spread and any(weights[r] and not math.isnan(parts[b, i, r]) for r in range(R)):
                live.append((b, i))
        values = [sums[k] for k in live]
        mean = sum(values) / max(1, len(values))
        std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else 0.0
        want = torch.tensor(
            [
                [(sums[b, i] - mean) / (std + 1e-4) if (b, i) in live else 0.0 for i in range(G)]
                for b in range(B)
            ],
            dtype=F64,
        )
        torch.testing.assert_close(loss.normalize_then_sum(parts, weights), want, rtol=1e-9, atol=1e-9)


def test_normalize_then_sum_tells_apart_what_a_sum_does_not():
    """GDPO's point: with the rewards (0, 1), (1, 0) and (1, 1) summed in groups of two, a prompt whose
    answers differ in both parts looks like one whose differ in one.
    """
    parts = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [1.0, 1.0]]])
    summed = advantages(parts.sum(2))
    torch.testing.assert_close(summed[0], summed[1], rtol=1e-3, atol=1e-3)
    apart = loss.normalize_then_sum(parts, torch.ones(2))
    assert apart[0, 1] > 1.5 * apart[1, 1] > 0


def test_an_equal_group_stays_at_exactly_zero_also_when_rewards_are_normalised_apart():
    parts = torch.tensor([[[0.1, 3.0]] * 4, [[0.0, 3.0], [1.0, 3.0], [1.0, 3.0], [1.0, 3.0]]])
    A = loss.normalize_then_sum(parts, torch.ones(2))
    assert (A[0] == 0).all() and (A[1] != 0).all()
    assert (
        loss.normalize_then_sum(parts, torch.tensor([0.0, 1.0])) == 0
    ).all()  # the part that differs has weight 0


def test_highest_entropy_keeps_the_fraction_asked_for():
    entropy = torch.tensor([0.5, 3.0, 0.1, 2.0, 2.0, 0.0, 1.0, 0.3, 0.2, 0.4])
    assert loss.highest(entropy, 0.1).tolist() == [i == 1 for i in range(10)]
    assert loss.highest(entropy, 0.2).tolist() == [i in (1, 3, 4) for i in range(10)]  # ties are kept
    assert loss.highest(entropy, 1.0).all() and not loss.highest(torch.zeros(0), 0.2).numel()
    with pytest.raises(AssertionError, match="fraction"):
        loss.highest(entropy, 0.0)


def test_mismatch_weight_is_the_truncated_ratio_and_a_constant():
    trainer, sampler = (
        torch.tensor([-1.0, -2.0, -0.5, 0.0], requires_grad=True),
        torch.tensor([-1.0, -1.0, -2.0, -500.0]),
    )
    w = loss.mismatch_weight(trainer, sampler, 2.0)
    assert not w.requires_grad
    torch.testing.assert_close(w, torch.tensor([1.0, math.exp(-1), 2.0, 2.0]))


def test_the_exact_kl_weighs_as_an_estimate_would_and_its_gradient_flows():
    x = batch()
    exact = x["exact_kl"].clone().requires_grad_()
    value, stats = policy_loss(**(x | dict(exact_kl=exact)), beta=0.3, kl="full", aggregate="sequence")
    value.backward()
    lengths = torch.bincount(x["rows"], minlength=8)
    torch.testing.assert_close(exact.grad, 0.3 / 8 / lengths[x["rows"]].double())
    torch.testing.assert_close(stats["kl"], x["exact_kl"].sum())
