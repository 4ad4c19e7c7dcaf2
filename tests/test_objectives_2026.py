"""configs/objectives_2026.py: each objective beside a loop over rows and tokens in fp64, and beside TRL's."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

import config as configs
from conftest import ROOT
from loss import normaliser, policy_loss
from rollout import generate

CONFIG = configs.read(str(ROOT / "configs/objectives_2026.py"))[1]
OBJECTIVES = {name: CONFIG[name] for name in ("sapo", "gmpo", "dppo", "icepop")}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def rows_of(seed, wide=0.6):
    """Ragged rows: (logp, old, adv, rows), fp64, one row of advantage 0."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 7) for _ in range(5)]
    logp = [[-rng.random() * 3 - 0.01 for _ in range(n)] for n in lengths]
    old = [[min(-1e-3, x + rng.gauss(0, wide)) for x in row] for row in logp]
    adv = [rng.gauss(0, 1) for _ in lengths]
    adv[2] = 0.0
    return logp, old, adv


def flat(logp, old, adv):
    values = [torch.tensor([x for row in part for x in row], dtype=torch.float64) for part in (logp, old)]
    rows = torch.tensor([i for i, row in enumerate(logp) for _ in row])
    return values[0].requires_grad_(), values[1], torch.tensor(adv, dtype=torch.float64), rows


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def token_of(name, logp, old, A):
    """l of one token, from the paper's formula; logp a 0-d tensor with gradient, old and A floats."""
    rho = torch.exp(logp - old)
    if name == "sapo":  # f(x) = sigmoid(tau (x - 1)) * 4 / tau
        tau = 1.0 if A > 0 else 1.05
        return -4 / tau * sigmoid(tau * (rho - 1)) * A
    if name == "dppo":  # M rho A, M = 0 where |pi - mu| > delta and A pushes that way
        pi, mu = math.exp(logp.item()), math.exp(old)
        out = abs(pi - mu) > 0.15 and (pi > mu) == (A > 0)
        return -rho * A * (0.0 if out else 1.0)
    # M(rho; alpha, beta) A, M(k) = k inside and 0 outside
    return -rho * A if 0.5 <= rho.item() <= 5.0 else 0.0 * rho


def gmpo_row(logp, old, A, low=0.4, high=0.4):
    """-exp(1/C sum of clipped log rho) A of a row: min(d, clip(d)) where A > 0, else max."""
    kept = []
    for x, was in zip(logp, old):
        d = x - was
        clipped = torch.clamp(d, -low, high)
        kept.append(torch.minimum(d, clipped) if A > 0 else torch.maximum(d, clipped))
    return -torch.exp(sum(kept) / len(kept)) * A


def by_loop(name, logp, old, adv):
    """(loss, its gradient) for the sum over tokens / tokens, or over rows / rows for gmpo."""
    tokens = [[torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in row] for row in logp]
    total, count = torch.zeros((), dtype=torch.float64), sum(map(len, logp))
    for row, was, A in zip(tokens, old, adv):
        if not A:
            continue
        if name == "gmpo":
            total = total + gmpo_row(row, was, A)
        else:
            total = total + sum(token_of(name, x, y, A) for x, y in zip(row, was))
    total = total / (len(logp) if name == "gmpo" else count)
    leaves = [x for row in tokens for x in row]
    gradient = torch.autograd.grad(total, leaves, allow_unused=True)
    return total.detach(), torch.stack(
        [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradient)]
    )


def ours(name, logp, old, adv, **options):
    x, was, A, rows = flat(logp, old, adv)
    options.setdefault("aggregate", "sequence" if name == "gmpo" else "token")
    loss, stats = policy_loss(x, was, A, rows, objective=OBJECTIVES[name], **options)
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient, stats


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", range(12))
def test_value_and_gradient_are_those_of_the_formula(name, seed):
    case = rows_of(seed, wide=0.3 + 0.2 * (seed % 4))
    loss, gradient, stats = ours(name, *case)
    expected, slope = by_loop(name, *case)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-12)
    assert stats["clip_region"] <= stats["tokens"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_policy_each_is_the_plain_policy_gradient(name):
    logp, _, adv = rows_of(3)
    _, gradient, _ = ours(name, logp, logp, adv)
    x, was, A, rows = flat(logp, logp, adv)
    plain, _ = policy_loss(
        x, was, A, rows, objective="reinforce", aggregate="sequence" if name == "gmpo" else "token"
    )
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, x)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_without_advantage_gives_exactly_nothing_and_extremes_stay_finite(name):
    logp = [[-0.1, -50.0, -1e-9], [-3.0, -700.0], [-0.5]]
    old = [[-60.0, -0.1, -1e-9], [-700.0, -3.0], [-800.0]]
    for signs in ((1, -1, 0), (-1, 1, 0), (0, 0, 0)):
        loss, gradient, _ = ours(name, logp, old, [float(s) for s in signs])
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()
        assert (gradient[-1] == 0) and (signs != (0, 0, 0) or loss == 0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_add_up(name):
    logp, old, adv = rows_of(5)
    lengths = [len(row) for row in logp]
    aggregate = "sequence" if name == "gmpo" else "token"
    norm = normaliser(lengths, aggregate=aggregate)
    whole, _, _ = ours(name, logp, old, adv)
    parts = [ours(name, logp[a:b], old[a:b], adv[a:b], norm=norm)[0] for a, b in ((0, 2), (2, 3), (3, 5))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-14)


def test_dppo_with_binary_kl():
    logp, old, adv = rows_of(1)
    _, gradient, _ = ours("dppo", logp, old, adv, delta=0.05, binary_kl=True)
    n = 0
    for row, was, A in zip(logp, old, adv):
        for x, y in zip(row, was):
            pi, mu = math.exp(x), math.exp(y)
            kl = mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))
            out = kl > 0.05 and (pi > mu) == (A > 0)
            expected = 0.0 if out or not A else -math.exp(x - y) * A / len(gradient)
            assert float(gradient[n]) == pytest.approx(expected, rel=1e-9, abs=1e-15)
            n += 1


def test_maxrl_divides_by_the_mean():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, float("nan"), 0, 0]]).double()
    A, state = CONFIG["maxrl"](rewards, ["a"] * 4, dict(kept=1))
    assert state == dict(kept=1)
    assert A[0].tolist() == [3, -1, -1, -1] and A[2].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(A[1], torch.tensor([1, 1, 1, -3]).double() / 3)
    torch.testing.assert_close(A[3], torch.tensor([2, 0, -1, -1]).double())


def test_sapo_and_gmpo_are_trls():
    """The expressions of TRL 1.16's own trainers, on the same padded tensors."""
    GMPOTrainer = pytest.importorskip("trl.experimental.gmpo").GMPOTrainer  # newer than the rest of TRL
    GRPOTrainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    logp, old, adv = rows_of(7)
    width, B = max(map(len, logp)), len(logp)

    def pad(part):
        padded = [row + [-1.0] * (width - len(row)) for row in part]
        return torch.tensor(padded, dtype=torch.float64)

    mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in logp]).double()
    args = SimpleNamespace(delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05)
    alone = SimpleNamespace(reduce=lambda x, **_: x, gather=lambda x: x)
    one = SimpleNamespace(training=True)

    class Recorded(dict):
        def __missing__(self, key):
            return []

    def loss_of(trainer_class, **fields):
        me = SimpleNamespace(
            top_entropy_quantile=1.0, beta=0.0, off_policy_mask_threshold=None, use_vllm=False, args=args,
            importance_sampling_level="token", current_gradient_accumulation_steps=1, model=one,
            accelerator=alone, _metrics=dict(train=Recorded()), vllm_importance_sampling_correction=False,
            _get_per_token_logps_and_entropies=lambda *_, **__: (pad(logp), pad(old) * 0, None),
            aux_loss_enabled=False, _entropy_bonus_enabled=False, **fields,
        )  # fmt: skip
        inputs = dict(
            prompt_ids=torch.zeros(B, 1), prompt_mask=torch.ones(B, 1), completion_ids=torch.zeros(B, width),
            completion_mask=mask, advantages=torch.tensor(adv, dtype=torch.float64),
            old_per_token_logps=pad(old),
        )  # fmt: skip
        return trainer_class._compute_loss(me, one, inputs)

    theirs = loss_of(GMPOTrainer, epsilon_low=0.4, epsilon_high=0.4)
    torch.testing.assert_close(ours("gmpo", logp, old, adv)[0], theirs, rtol=1e-9, atol=1e-12)
    theirs = loss_of(GRPOTrainer, loss_type="sapo", epsilon_low=0.2, epsilon_high=0.2)
    mine, _, _ = ours("sapo", logp, old, adv, aggregate="sequence")
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)  # its temperatures are fp32


def test_a_trainer_over_the_whole_vocabulary_is_biased_by_the_kept_mass(tiny):
    """Elsewhere a truncated sampler's log-probabilities meet those over all words, and the ratio is the share
    of the words that were kept (huggingface/trl, issue 6789 and pull request 7269). Here both are over these.
    """
    prompts, options = [[3, 4, 5], [6, 7]], dict(top_p=0.9)
    out = generate(tiny, prompts, group_size=64, max_new_tokens=8, stop_ids=[], seed=1, **options)
    groups, drawn = (
        [out.group(b, 64) for b in range(2)],
        torch.tensor([x for row in out.logprobs for x in row]),
    )
    ours, _, _ = tiny.completion_logprobs(prompts, groups, **options)
    whole, _, _ = tiny.completion_logprobs(prompts, groups)
    assert (ours - drawn).abs().max() < 2e-5
    bias = (whole - drawn).mean().item()
    print(f"a trainer over all words: {bias:.3f} nats a token, ratio {math.exp(bias):.3f}")
    assert -0.12 < bias < -0.05


def test_a_flag_may_name_a_function_of_the_config_file():
    cfg = configs.load(["configs/objectives_2026.py", "--objective=dppo", "--delta=0.1", "--advantage=maxrl"])
    assert cfg.objective.__name__ == "dppo" and cfg.advantage.__name__ == "maxrl"
    assert cfg.objective_options == dict(delta=0.1) and cfg.scratch["hidden_size"] == 128
    with pytest.raises(ValueError, match="unknown key 'gmpo_low'"):
        configs.load(["configs/objectives_2026.py", "--objective=dppo", "--gmpo_low=0.1"])
    with pytest.raises(ValueError, match="objective = 'dpo' is not one of"):
        configs.load(["configs/objectives_2026.py", "--objective=dpo"])
    assert configs.load(["configs/objectives_2026.py", "--objective=cispo"]).objective == "cispo"
