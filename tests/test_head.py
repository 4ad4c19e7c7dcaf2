"""head.py: head and objective in one pass are loss.py on kernels/logprob.py's results, for every option."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import kernels.logprob as kernel
from head import policy_head, policy_head_ref
from kernels.exact_kl import exact_kl_ref
from kernels.logprob import logprob, truncate_
from loss import OBJECTIVES, Tokens, normaliser, policy_loss, takes_whole_rows
from test_logprob import LEARNS, Largest, example
from test_loss import CLIPS, COUNTS, OPTIONS

LENGTHS = torch.tensor([3, 1, 0, 5, 4])
ESTIMATED = [options for options in OPTIONS if options["kl"] != "full"]
EXACT = [options for options in OPTIONS if options["kl"] == "full"]


def batch(dtype=torch.float64, seed=0, **sizes):
    """hidden, weight, targets, tokens: ratios beyond both bounds, an advantage of 0, a row of no tokens."""
    hidden, weight, targets = example(dtype=dtype, seed=seed, **sizes)
    g = torch.Generator().manual_seed(seed + 1)
    logp, _ = logprob(hidden.double(), weight.double(), targets)

    def noise():
        return torch.randn(len(targets), generator=g, dtype=torch.float64)

    old_logp = (logp + 0.3 * noise()).to(dtype)
    tokens = Tokens(
        rows=torch.repeat_interleave(torch.arange(5), LENGTHS),
        adv=torch.tensor([1.0, -0.5, 0.3, 0.0, -2.0], dtype=dtype),
        lengths=LENGTHS,
        sampler_logp=old_logp,
        old_logp=old_logp,
        ref_logp=(logp + 0.4 * noise()).to(dtype),
        weight=noise().abs().to(dtype),
    )
    return hidden, weight, targets, tokens


def moved(tokens, to):
    """The tokens with every floating tensor's dtype, or every tensor's device, changed."""
    values = {}
    for name, x in tokens.arguments().items():
        if x is not None and (x.is_floating_point() or not isinstance(to, torch.dtype)):
            x = x.to(to)
        values[name] = x
    return Tokens(**values)


def whole(options):
    """Options of the objective as a step has them: with the divisor of the whole step."""
    counts = dict(aggregate=options["aggregate"]) | COUNTS
    return CLIPS | COUNTS | options | dict(norm=normaliser(LENGTHS, **counts))


def unfused(hidden, weight, targets, tokens, objective, *, reference=None, **sampling):
    """The same by kernels/logprob.py and one call of policy_loss on all tokens."""
    logp, entropy = logprob(hidden, weight, targets, **sampling)
    kl = None
    if reference is not None:
        kl = exact_kl_ref(hidden, weight, *reference, **sampling)
    carried = tokens.arguments() | dict(lengths=None)
    loss, stats = policy_loss(logp, entropy=entropy, exact_kl=kl, **carried, **objective)
    return loss, entropy.detach(), stats


def compare(inputs, tokens, objective, tolerance, **more):
    learn = [x for x in inputs[:2] if x.requires_grad]
    results = []
    for function in (policy_head, unfused):
        loss, entropy, stats = function(*inputs, tokens, objective, **more)
        grads = torch.autograd.grad(loss, learn)
        results.append([loss.detach(), entropy, *grads, *(stats[key] for key in sorted(stats))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 1e-2, msg=str(objective))


@pytest.mark.slow
@pytest.mark.parametrize("learns", LEARNS)
def test_every_option_gives_the_loss_the_gradient_and_the_sums_of_the_unfused_path(monkeypatch, learns):
    *inputs, tokens = batch()
    for x, learning in zip(inputs, LEARNS[learns]):
        x.requires_grad_(learning)
    for i, options in enumerate(ESTIMATED if learns == "both" else ESTIMATED[::7]):
        rows_a_chunk = (1, 4, 1000)[i % 3]  # chunks that cut rows of the batch
        monkeypatch.setattr(kernel, "CHUNK_BYTES", rows_a_chunk * 4 * 37)
        some = tokens if i % 2 else dataclasses.replace(tokens, weight=None)
        compare(inputs, some, whole(options), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("rows_a_chunk", [4, 1000])
def test_every_option_with_the_exact_kl(monkeypatch, rows_a_chunk):
    *inputs, tokens = batch()
    reference = [x + 0.1 * x.roll(1, 0) for x in inputs[:2]]
    for x in inputs[:2]:
        x.requires_grad_()
    monkeypatch.setattr(kernel, "CHUNK_BYTES", rows_a_chunk * 4 * 37)
    for options in EXACT:
        compare(inputs, tokens, whole(options), 1e-9, reference=reference, temperature=0.8)


SAMPLING = [dict(temperature=0.6), dict(top_k=5), dict(temperature=1.3, top_k=9, top_p=0.8, min_p=0.05)]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
def test_temperature_and_truncation(monkeypatch, sampling, entropy_coef):
    *inputs, tokens = batch()
    for x in inputs[:2]:
        x.requires_grad_()
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 4 * 4 * 37)
    for name in OBJECTIVES:
        options = dict(objective=name, aggregate="sequence", beta=0.2, entropy_coef=entropy_coef)
        compare(inputs, tokens, whole(options), 1e-9, **sampling)


@pytest.mark.parametrize("objective", ["reinforce", "gspo"])
@pytest.mark.parametrize("kl", ["k3", "full"])
@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_it_is_its_definition_and_a_multiple_of_the_loss_has_a_multiple_of_the_gradient(
    objective, kl, sampling
):
    hidden, weight, targets, tokens = batch()
    options = dict(objective=objective, aggregate="token", kl=kl, beta=0.1, entropy_coef=0.1)
    reference = None
    if kl == "full":
        reference = hidden.flip(0), weight.flip(1)
    both = hidden.requires_grad_(), weight.requires_grad_()
    results = []
    for function in (policy_head, policy_head_ref):
        loss, entropy, stats = function(
            *both, targets, tokens, whole(options), reference=reference, **sampling
        )
        grads = torch.autograd.grad(3.0 * loss, both)  # a loss scaler multiplies the loss
        results.append([loss.detach(), entropy, stats["kl"], *grads])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [("reverse", 6), ("forward", 0), ("forward", 6)])
@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("rewarded", [True, False])
def test_the_exact_kl_goes_either_way_and_over_the_likeliest_words(options, sampling, rewarded):
    """The reference is of another width, its head frozen, under the policy's temperature and truncation.

    Where no row has an advantage the gradient is that of the KL alone.
    """
    hidden, weight, targets, tokens = batch()
    tokens.adv *= rewarded
    objective = whole(dict(objective="clip", aggregate="token", kl="full", beta=0.1, entropy_coef=0.0))
    reference = hidden.flip(0)[:, :3].clone(), weight.flip(1)[:, :3].clone(), *options
    both = hidden.requires_grad_(), weight.requires_grad_()
    results = []
    for function in (policy_head, policy_head_ref):
        loss, entropy, stats = function(*both, targets, tokens, objective, reference=reference, **sampling)
        results.append([loss.detach(), entropy, stats["kl"], *torch.autograd.grad(loss, both)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_the_definition_truncates_the_exact_kl_as_the_policy_is_truncated():
    """The definition itself, against logits written out here: it once left the truncation out of the KL."""
    hidden, weight, targets, tokens = batch()
    ref_hidden, ref_weight = hidden.flip(0), weight.flip(1)
    options = whole(dict(objective="reinforce", aggregate="token", kl="full", beta=0.1, entropy_coef=0.0))
    _, _, stats = policy_head_ref(
        hidden, weight, targets, tokens, options, reference=(ref_hidden, ref_weight), top_k=4, temperature=0.7
    )
    z = truncate_(hidden @ weight.t() / 0.7, top_k=4, keep=targets)
    p = z.softmax(-1)
    q = (ref_hidden @ ref_weight.t() / 0.7).masked_fill(p == 0, float("-inf")).softmax(-1)
    kl = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum()
    torch.testing.assert_close(stats["kl"], kl)


PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS, ids=["fp32", "bf16"])
def test_rounded_weights_give_the_exact_loss_and_gradients_near_fp64(dtype, tolerance):
    hidden, weight, targets, tokens = batch(D=32, V=300)
    options = whole(dict(objective="clip", aggregate="token", beta=0.1, entropy_coef=0.05))
    low = [(x * 0.3).to(dtype).requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in low]
    loss, entropy, _ = policy_head(*low, targets, moved(tokens, torch.float32), options)
    want, want_entropy, _ = policy_head_ref(*exact, targets, tokens, options)
    assert loss.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-5)
    loss.backward()
    want.backward()
    for x, ref in zip(low, exact):
        assert x.grad.dtype == dtype
        assert (x.grad.double() - ref.grad).norm() < tolerance * ref.grad.norm()


@pytest.mark.parametrize("sampling", [dict(temperature=0.8), dict(top_k=9, temperature=1.2)], ids=str)
@pytest.mark.parametrize("learns", LEARNS)
@pytest.mark.usefixtures("interpreter_without_two_faults")
def test_the_row_kernel_gives_the_same(learns, sampling):
    """Triton's form, in its interpreter where there is no GPU."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = whole(dict(objective="clip", aggregate="sequence", beta=0.2, entropy_coef=0.05))
    results = []
    for mode in ("torch", "triton"):
        *inputs, tokens = batch(dtype=torch.float32)
        hidden, weight, targets = [x.to(device) for x in inputs]
        for x, learning in zip((hidden, weight), LEARNS[learns]):
            x.requires_grad_(learning)
        kernels.use(mode)
        try:
            loss, entropy, _ = policy_head(
                hidden, weight, targets, moved(tokens, device), options, **sampling
            )
            grads = torch.autograd.grad(loss, [x for x in (hidden, weight) if x.requires_grad])
        finally:
            kernels.use("auto")
        results.append([loss.detach(), entropy, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


class Made(TorchDispatchMode):
    """Names of the operations that gave a tensor of more than one element."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() > 1:
            self.names.add(function.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("learns", LEARNS)
def test_no_tensor_of_tokens_times_vocabulary_is_made_and_the_backward_makes_none_at_all(monkeypatch, learns):
    *inputs, tokens = batch(D=4, V=64, dtype=torch.float32)
    for x, learning in zip(inputs, LEARNS[learns]):
        x.requires_grad_(learning)
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 2 * 4 * 64)
    options = whole(dict(objective="clip", aggregate="token", entropy_coef=0.1))
    with Largest() as largest:
        loss, _, _ = policy_head(*inputs, tokens, options)
    assert largest.elements <= 4 * 64 < 13 * 64
    with Made() as made:
        loss.backward()
    # What the forward made is handed over as it is: no copy, no multiplication.
    assert made.names <= {"detach"}
    with pytest.raises((AssertionError, RuntimeError)):
        loss.backward()


def test_nobody_learns_and_nothing_to_learn():
    hidden, weight, targets, tokens = batch()
    options = whole(dict(objective="clip", aggregate="token"))
    with torch.no_grad():
        loss, _, _ = policy_head(hidden.requires_grad_(), weight, targets, tokens, options)
    assert not loss.requires_grad
    flat = dataclasses.replace(tokens, adv=0 * tokens.adv)
    loss, _, _ = policy_head(hidden, weight, targets, flat, options)
    loss.backward()
    assert not loss.any() and not hidden.grad.any()
    loss, _, _ = policy_head(hidden[:0], weight, targets[:0], tokens[:0], options)
    loss.backward()
    assert not loss.any()


def test_a_run_of_tokens_is_a_slice_of_what_they_carry():
    tokens = batch()[3]
    run = tokens[2:6]
    assert run.rows.tolist() == tokens.rows[2:6].tolist() and run.adv is tokens.adv
    assert run.lengths.tolist() == LENGTHS.tolist()  # of the whole rows, which the run may cut
    assert torch.equal(run.ref_logp, tokens.ref_logp[2:6])


def test_sequence_objectives_are_those_that_take_whole_rows():
    assert [name for name in OBJECTIVES if takes_whole_rows(name)] == ["gspo"]
