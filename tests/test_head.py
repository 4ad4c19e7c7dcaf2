"""kernels/policy_head.py: head and objective in one pass are loss.py's objective on kernels/logprob.py's log-probabilities, for every option."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.logprob as kernel
import loss as losses
from kernels.logprob import logprob
from kernels.policy_head import policy_head, policy_head_ref
from test_logprob import LEARNS, Largest, example
from test_loss import CLIPS, COUNTS, OPTIONS, SEQUENCE_LEVEL

LENGTHS = torch.tensor([3, 1, 0, 5, 4])
ELEMENTWISE = [o for o in OPTIONS if o["objective"] not in SEQUENCE_LEVEL and o["kl"] != "full"]


def objective(logp, entropy, rows, *, of_token, **options):
    """loss.policy_loss on the rows (a slice) of a chunk: what a script passes to policy_head."""
    return losses.policy_loss(
        logp, entropy=entropy, **{key: x[rows] for key, x in of_token.items()}, **options
    )


def batch(dtype=torch.float64, seed=0, **sizes):
    """hidden, weight, targets, and the constants of the objective: ratios on both sides of the bounds, one advantage of 0, one row of no tokens."""
    hidden, weight, targets = example(dtype=dtype, seed=seed, **sizes)
    g = torch.Generator().manual_seed(seed + 1)
    logp, _ = logprob(hidden.double(), weight.double(), targets)
    noise = lambda: torch.randn(len(targets), generator=g, dtype=torch.float64)
    rows = torch.repeat_interleave(torch.arange(5), LENGTHS)
    of_token = dict(
        old_logp=(logp + 0.3 * noise()).to(dtype),
        ref_logp=(logp + 0.4 * noise()).to(dtype),
        rows=rows,
        weight=noise().abs().to(dtype),
    )
    return hidden, weight, targets, of_token, torch.tensor([1.0, -0.5, 0.3, 0.0, -2.0], dtype=dtype)


def unfused(hidden, weight, targets, of_token, adv, options, **sampling):
    """The same by kernels/logprob.py and one call on all tokens. Returns loss, logp, entropy, stats."""
    logp, entropy = logprob(hidden, weight, targets, **sampling)
    loss, stats = losses.policy_loss(logp, adv=adv, entropy=entropy, **of_token, **options)
    return loss, logp.detach(), entropy.detach(), stats


def fused(hidden, weight, targets, of_token, adv, options, **sampling):
    norm = losses.normaliser(LENGTHS, aggregate=options["aggregate"], **COUNTS)
    loss, logp, entropy, told = policy_head(
        hidden,
        weight,
        targets,
        partial(objective, of_token=of_token, adv=adv, lengths=LENGTHS, norm=norm, **options),
        **sampling,
    )
    stats = {}
    for part in told:
        stats = losses.add_stats(stats, part)
    return loss, logp, entropy, stats


def compare(inputs, constants, options, tolerance, **sampling):
    learn = [x for x in inputs[:2] if x.requires_grad]
    results = []
    for function in (fused, unfused):
        loss, logp, entropy, stats = function(*inputs, *constants, options, **sampling)
        results.append(
            [
                loss.detach(),
                logp,
                entropy,
                *torch.autograd.grad(loss, learn),
                *(stats[key] for key in sorted(stats)),
            ]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 1e-2, msg=str(options))


@pytest.mark.parametrize("learns", LEARNS)
def test_every_elementwise_option_gives_the_loss_the_gradient_and_the_sums_of_the_unfused_path(
    monkeypatch, learns
):
    *inputs, of_token, adv = batch()
    [x.requires_grad_(g) for x, g in zip(inputs, LEARNS[learns])]
    for i, options in enumerate(ELEMENTWISE if learns == "both" else ELEMENTWISE[::7]):
        monkeypatch.setattr(
            kernel, "CHUNK_BYTES", (1, 4, 1000)[i % 3] * 4 * 37
        )  # rows of a chunk: rows of the batch are cut
        tokens = of_token if i % 2 else {key: x for key, x in of_token.items() if key != "weight"}
        compare(inputs, (tokens, adv), options | CLIPS | COUNTS, 1e-10)


@pytest.mark.parametrize(
    "sampling",
    [dict(temperature=0.6), dict(top_k=5), dict(temperature=1.3, top_k=9, top_p=0.8, min_p=0.05)],
    ids=str,
)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
def test_temperature_and_truncation(monkeypatch, sampling, entropy_coef):
    *inputs, of_token, adv = batch()
    [x.requires_grad_() for x in inputs[:2]]
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 4 * 4 * 37)
    compare(
        inputs,
        (of_token, adv),
        dict(objective="clip", aggregate="sequence", beta=0.2, entropy_coef=entropy_coef) | COUNTS,
        1e-9,
        **sampling,
    )


def test_it_is_its_definition_and_a_multiple_of_the_loss_has_a_multiple_of_the_gradient():
    hidden, weight, targets, of_token, adv = batch()
    options = dict(
        of_token=of_token,
        adv=adv,
        lengths=LENGTHS,
        norm=13.0,
        objective="reinforce",
        beta=0.1,
        entropy_coef=0.1,
    )
    both = hidden.requires_grad_(), weight.requires_grad_()
    results = []
    for function in (policy_head, policy_head_ref):
        loss, logp, entropy, _ = function(*both, targets, partial(objective, **options), temperature=0.7)
        results.append(
            [loss.detach(), logp, entropy, *torch.autograd.grad(3.0 * loss, both)]
        )  # a scaler may multiply the loss
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
def test_rounded_weights_give_the_exact_loss_and_gradients_near_fp64(dtype, tolerance):
    hidden, weight, targets, of_token, adv = batch(D=32, V=300)
    options = dict(
        objective="clip",
        aggregate="token",
        beta=0.1,
        entropy_coef=0.05,
        adv=adv.float(),
        lengths=LENGTHS,
        norm=13.0,
    )
    low, of_low = (
        [(x * 0.3).to(dtype).requires_grad_() for x in (hidden, weight)],
        {key: x.float() if x.is_floating_point() else x for key, x in of_token.items()},
    )
    exact = [x.detach().double().requires_grad_() for x in low]
    loss, logp, _, _ = policy_head(*low, targets, partial(objective, of_token=of_low, **options))
    want, want_logp, _, _ = policy_head_ref(*exact, targets, partial(objective, of_token=of_token, **options))
    assert loss.dtype == logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), want_logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-5)
    loss.backward()
    want.backward()
    for x, ref in zip(low, exact):
        assert x.grad.dtype == dtype and (x.grad.double() - ref.grad).norm() < tolerance * ref.grad.norm()


@pytest.mark.parametrize("sampling", [dict(temperature=0.8), dict(top_k=9, temperature=1.2)], ids=str)
@pytest.mark.parametrize("learns", LEARNS)
@pytest.mark.usefixtures("interpreter_without_two_faults")
def test_the_row_kernel_gives_the_same(monkeypatch, learns, sampling):
    """Triton's form, in its interpreter where there is no GPU."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options, results = dict(objective="clip", aggregate="sequence", beta=0.2, entropy_coef=0.05), []
    for mode in ("torch", "triton"):
        monkeypatch.setattr(kernel, "MODE", mode)
        *inputs, of_token, adv = batch(dtype=torch.float32)
        inputs = [x.to(device).requires_grad_(g) for x, g in zip(inputs, (*LEARNS[learns], False))]
        loss, logp, entropy, _ = policy_head(
            *inputs,
            partial(
                objective,
                of_token={k: x.to(device) for k, x in of_token.items()},
                adv=adv.to(device),
                lengths=LENGTHS.to(device),
                norm=13.0,
                **options,
            ),
            **sampling,
        )
        results.append(
            [loss.detach(), logp, entropy, *torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


class Made(TorchDispatchMode):
    """Names of the operations that gave a tensor of more than one element."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names |= (
            {function.overloadpacket.__name__} if isinstance(out, torch.Tensor) and out.numel() > 1 else set()
        )
        return out


@pytest.mark.parametrize("learns", LEARNS)
def test_no_tensor_of_tokens_times_vocabulary_is_made_and_the_backward_makes_none_at_all(monkeypatch, learns):
    *inputs, of_token, adv = batch(D=4, V=64, dtype=torch.float32)
    [x.requires_grad_(g) for x, g in zip(inputs, LEARNS[learns])]
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 2 * 4 * 64)
    with Largest() as largest:
        loss, *_ = fused(*inputs, of_token, adv, dict(objective="clip", aggregate="token", entropy_coef=0.1))
    assert largest.elements <= 4 * 64 < 13 * 64
    with Made() as made:
        loss.backward()
    assert made.names <= {"detach"}, (
        "what the forward made is handed over as it is: no copy, no multiplication"
    )
    with pytest.raises((AssertionError, RuntimeError)):
        loss.backward()


def test_nobody_learns_and_nothing_to_learn():
    hidden, weight, targets, of_token, adv = batch()
    options = dict(objective="clip", aggregate="token")
    with torch.no_grad():
        loss, *_ = fused(hidden.requires_grad_(), weight, targets, of_token, adv, options)
    assert not loss.requires_grad
    loss, *_ = fused(hidden, weight, targets, of_token, 0 * adv, options)
    loss.backward()
    assert not loss.any() and not hidden.grad.any()
    empty = {key: x[:0] for key, x in of_token.items()}
    loss, *_ = fused(hidden[:0], weight, targets[:0], empty, adv, options)
    loss.backward()
    assert not loss.any()
