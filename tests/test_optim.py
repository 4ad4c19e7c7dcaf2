"""AdamW against torch's own, and what torch's own cannot do: bf16 weights, exact resume."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import optim
from optim import AdamW, learning_rate

OPTIONS = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def model(dtype=torch.float32, seed=0):
    """Two layers, with biases: tensors of one and of two dims."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5)).to(dtype)


def backward(net, step):
    """The gradient of update `step`: the same for every model of the same weights."""
    dtype = net[0].weight.dtype
    x = torch.randn(11, 7, generator=torch.Generator().manual_seed(step)).to(dtype)
    net(x).float().square().sum().backward()


def updates(net, opt, steps, max_norm=1.0):
    for step in steps:
        backward(net, step)
        opt.step(learning_rate(step, lr=1e-2, warmup_steps=2, steps=8, schedule="cosine"), max_norm)
        opt.zero_grad()


def named(net):
    return list(net.named_parameters())


def copies(tensors):
    return {name: t.detach().clone() for name, t in tensors.items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_fp32_equals_torch_bit_for_bit(max_norm):
    ours, theirs = model(), model()
    opt = AdamW(named(ours), lr=1.0, **OPTIONS)
    matrices, vectors = ([p for p in theirs.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, lr=1.0, fused=True, **OPTIONS)
    for step in range(6):
        lr = 1e-2 / (step + 1)
        backward(ours, step), backward(theirs, step)
        norm = opt.step(lr, max_norm)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf)
        for group in oracle.param_groups:
            group["lr"] = lr
        oracle.step()
        opt.zero_grad(), oracle.zero_grad()
        assert norm > 0.5 and torch.equal(norm, expected)
        assert same_bits(ours.state_dict(), theirs.state_dict())


def test_bf16_weights_move_at_lr_1e_6_where_plain_bf16_does_not():
    """300 updates of 1e-6 are 3e-4; the neighbour of the bf16 number 0.02 is 1.2e-4 away."""
    ours, plain = (nn.Parameter(torch.full((4, 4), 0.02, dtype=torch.bfloat16)) for _ in range(2))
    start = plain.detach().clone()
    opt, oracle = AdamW([("w", ours)], lr=1e-6), torch.optim.AdamW([plain], lr=1e-6, weight_decay=0.0)
    for _ in range(300):
        ours.sum().backward(), plain.sum().backward()
        opt.step(1e-6), oracle.step()
        opt.zero_grad(), oracle.zero_grad()
    assert torch.equal(plain, start)
    assert ours.dtype == torch.bfloat16
    # to half the distance between neighbours
    assert torch.allclose(ours.float(), start.float() - 3e-4, atol=6.2e-5)
    assert torch.allclose(opt.state()["master.w"], start.float() - 3e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_of_micro_batches_are_summed_in_fp32(dtype):
    """1 + 15 * 2**-9 in bf16 stays 1: each addend is half of what a bf16 number near 1 can show."""
    weight = nn.Parameter(torch.zeros(3, 2, dtype=dtype))
    opt = AdamW([("w", weight)], lr=1e-3)
    parts = [torch.full((3, 2), value, dtype=dtype) for value in [1.0] + [2.0**-9] * 15]
    for part in parts:
        (weight * part).sum().backward()
        assert weight.grad is None  # one 16-bit gradient at a time
    (total,) = opt.grads()
    assert total.dtype == torch.float32
    assert torch.equal(total, sum(part.float() for part in parts))
    assert opt.grad_norm().item() == pytest.approx((1 + 15 * 2.0**-9) * math.sqrt(6), rel=1e-6)


def test_a_gradient_assigned_by_hand_counts_like_one_from_backward():
    by_hand, by_backward = (nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    first, second = AdamW([("w", by_hand)], lr=1e-2), AdamW([("w", by_backward)], lr=1e-2)
    by_hand.grad = torch.full((3,), 2.0, dtype=torch.bfloat16)
    (2 * by_backward).sum().backward()
    first.step(1e-2), second.step(1e-2)
    assert torch.equal(by_hand, by_backward) and not torch.equal(by_hand, torch.ones_like(by_hand))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stay_at_the_same_address(dtype):
    net = model(dtype)
    opt = AdamW(named(net), lr=1e-2)
    where = [p.data_ptr() for p in net.parameters()]
    updates(net, opt, range(2))
    opt.load_state(copies(opt.state()))
    assert where == [p.data_ptr() for p in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [0, 3])
def test_state_loaded_in_mid_run_continues_with_the_same_bits(dtype, cut):
    goes_on_with_the_same_bits(model, dtype, cut)


def goes_on_with_the_same_bits(make, dtype, cut, then=lambda: None, **options):
    """A net made by `make` and updated 8 times, beside one whose state is loaded into another after `cut`.

    then: called between the two.
    """
    straight, first, second = make(dtype), make(dtype), make(dtype, seed=1)
    opt = AdamW(named(straight), lr=1.0, **options, **OPTIONS)
    updates(straight, opt, range(8))
    then()
    before = AdamW(named(first), lr=1.0, **options, **OPTIONS)
    updates(first, before, range(cut))
    second.load_state_dict(first.state_dict())
    after = AdamW(named(second), lr=0.123, **options, **OPTIONS)  # this lr is never used: step(lr) is
    after.load_state(copies(before.state()))
    updates(second, after, range(cut, 8))
    assert same_bits(second.state_dict(), straight.state_dict())
    assert same_bits(after.state(), opt.state())
    assert not same_bits(straight.state_dict(), make(dtype).state_dict())


def test_low_precision_weights_are_the_rounding_of_their_masters():
    net, other = model(torch.bfloat16), model(torch.bfloat16, seed=1)
    opt, after = AdamW(named(net), lr=1.0), AdamW(named(other), lr=1.0)
    updates(net, opt, range(3))
    assert all(torch.equal(p, opt.state()[f"master.{name}"].bfloat16()) for name, p in named(net))
    after.load_state(copies(opt.state()))  # the masters alone bring the weights back
    assert same_bits(other.state_dict(), net.state_dict())


def test_state_names_masters_only_for_low_precision():
    net = model()
    net[2].to(torch.bfloat16)
    names = set(AdamW(named(net), lr=1.0).state())
    weights = ["0.weight", "0.bias", "2.weight", "2.bias"]
    moments = {f"{moment}.{weight}" for moment in ("exp_avg", "exp_avg_sq") for weight in weights}
    assert names == moments | {"step", "master.2.weight", "master.2.bias"}


def test_load_state_names_what_is_missing_extra_or_misshapen_and_changes_nothing():
    net = model()
    opt = AdamW(named(net), lr=1.0)
    updates(net, opt, range(2))
    before, wrong = copies(opt.state()), copies(opt.state())
    del wrong["exp_avg.0.bias"]
    wrong["master.0.weight"] = torch.zeros(33, 7)
    wrong["exp_avg_sq.2.bias"] = torch.zeros(6)
    wrong["exp_avg.2.bias"] = torch.zeros(5, dtype=torch.bfloat16)
    wrong["exp_avg.0.weight"] += 1
    with pytest.raises(ValueError) as error:
        opt.load_state(wrong)
    text = str(error.value)
    for part in (
        "1 missing (exp_avg.0.bias)",
        "1 not known here (master.0.weight)",
        "exp_avg_sq.2.bias (6,)",
        "here (5,)",
        "exp_avg.2.bias (5,) torch.bfloat16",
        "2 of another shape",
    ):
        assert part in text
    assert same_bits(opt.state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_is_named_and_updates_nothing(dtype, value):
    net = model(dtype)
    opt = AdamW(named(net), lr=1e-2, **OPTIONS)
    updates(net, opt, range(2))
    weights, state = copies(net.state_dict()), copies(opt.state())
    backward(net, 2)
    for name, grad in zip(opt.names, opt.grads()):
        if name in ("0.bias", "2.weight"):
            grad.view(-1)[3] = value
    with pytest.raises(FloatingPointError, match=r"no update was made; .* in: 0\.bias, 2\.weight$"):
        opt.step(1e-2, max_norm=1.0)
    assert same_bits(net.state_dict(), weights) and same_bits(opt.state(), state)
    opt.zero_grad()
    updates(net, opt, range(2, 3))  # and it can go on


def test_norm_is_taken_over_all_gradients_and_clipping_scales_to_it():
    a, b = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    opt = AdamW([("a", a), ("b", b)], lr=1.0)
    (2 * a.sum() + 3 * b.sum()).backward()  # gradients 2, 2, 2, 2, 3: norm 5
    assert opt.grad_norm().shape == () and opt.grad_norm().item() == 5.0
    assert opt.step(0.0, max_norm=0.5).item() == 5.0  # the norm before clipping
    clipped = torch.cat([grad.view(-1) for grad in opt.grads()])
    assert clipped.tolist() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.3], rel=1e-6)
    opt.step(0.0, max_norm=100.0)  # below the limit: untouched
    assert opt.grad_norm().item() == pytest.approx(0.5, rel=1e-6)


def test_norm_of_a_large_tensor_is_exact():
    """One running fp32 sum over 136M numbers lost 1.6 % of the norm on a CPU; over these 8M, 0.02 %."""
    weight = nn.Parameter(torch.empty(1 << 15, 1 << 8))
    opt = AdamW([("w", weight)], lr=1.0)
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert opt.grad_norm().item() == pytest.approx(weight.grad.double().norm().item(), rel=1e-5)


def test_parameters_without_a_gradient_get_zeros_in_the_callers_order():
    """Bug to keep out: a rank without useful rows skipped its all-reduces, and the others waited for ever."""
    net = model()
    opt = AdamW(named(net), lr=1e-2)
    net[2].bias.sum().backward()
    assert [grad.shape for grad in opt.grads()] == [p.shape for p in net.parameters()]
    assert [bool(grad.any()) for grad in opt.grads()] == [False, False, False, True]


def test_no_backward_and_a_backward_of_zeros_are_the_same_update():
    nets = [model(), model()]
    opts = [AdamW(named(net), lr=1e-2, **OPTIONS) for net in nets]
    for net, opt in zip(nets, opts):
        updates(net, opt, range(2))
    sum(0.0 * p.sum() for p in nets[0].parameters()).backward()
    for opt in opts:
        opt.step(1e-2)
    assert same_bits(nets[0].state_dict(), nets[1].state_dict())
    assert same_bits(opts[0].state(), opts[1].state())


def test_zero_grad_frees_the_memory_of_gradients():
    net = model(torch.bfloat16)
    opt = AdamW(named(net), lr=1e-2)
    backward(net, 0)
    opt.zero_grad()
    assert all(t.grad is None for t in [*net.parameters(), *opt.fp32])


def test_a_second_optimiser_on_the_same_weights_receives_the_gradients():
    """After a supervised warm-up its optimiser's hooks took every gradient, and RL trained on zeros."""
    net = model(torch.bfloat16)
    first, second = AdamW(named(net), lr=1e-2), AdamW(named(net), lr=1e-2)
    backward(net, 0)
    assert second.grad_norm() > 0 and first.grad_norm() == 0


def test_frozen_parameters_are_left_alone():
    net = model(torch.bfloat16)
    net[0].requires_grad_(False)
    opt = AdamW(named(net), lr=1e-2, **OPTIONS)
    frozen = copies(net[0].state_dict())
    updates(net, opt, range(2))
    assert opt.names == ["2.weight", "2.bias"] and same_bits(net[0].state_dict(), frozen)


def test_nothing_to_train_and_tensors_given_twice_are_refused():
    net = model()
    with pytest.raises(ValueError, match="given once"):
        AdamW([*named(net), ("tied", net[0].weight)], lr=1.0)
    with pytest.raises(ValueError, match="given once"):
        AdamW([("w", net[0].weight), ("w", net[2].weight)], lr=1.0)
    with pytest.raises(ValueError, match="nothing to train.*requires_grad"):
        AdamW(named(net.requires_grad_(False)), lr=1.0)


def test_learning_rate_warms_up_from_the_first_step_and_decays_to_its_floor():
    at = lambda step, **options: learning_rate(step, lr=2.0, warmup_steps=4, steps=14, **options)
    assert [at(step) for step in (0, 1, 2, 3, 4, 13, 99)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    linear = [at(step, schedule="linear") for step in (3, 4, 9, 14, 99)]
    assert linear == pytest.approx([2.0, 2.0, 1.0, 0.0, 0.0])
    assert [at(step, schedule="cosine") for step in (4, 9, 14)] == pytest.approx([2.0, 1.0, 0.0])
    assert at(99, schedule="cosine", min_ratio=0.1) == pytest.approx(0.2)
    assert at(9, schedule="linear", min_ratio=0.5) == pytest.approx(1.5)
    assert learning_rate(0, lr=3.0, warmup_steps=0, steps=0, schedule="cosine") == 3.0
    with pytest.raises(ValueError, match="'exponential'.*constant, cosine, linear"):
        at(0, schedule="exponential")


# ------------------------------------------------------------------------------------------------ 8 bits
def wide_model(dtype=torch.float32, seed=0):
    """Tensors above and below 4,096 numbers; the first matrix has blocks that end early."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 601), nn.Tanh(), nn.Linear(601, 9), nn.Linear(9, 5)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [0, 3])
def test_8_bits_loaded_in_mid_run_continue_with_the_same_bits(dtype, cut, monkeypatch):
    """And updates do not depend on how many numbers are updated at once."""
    smaller = partial(monkeypatch.setitem, optim.PIECE, "cpu", 512)
    goes_on_with_the_same_bits(wide_model, dtype, cut, then=smaller, bits=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_state_has_the_same_bits(dtype, monkeypatch):
    """Whatever the size of a piece: the ends of pieces are where the kernel's own blocks end."""
    monkeypatch.setitem(optim.PIECE, "cuda", 1024)
    plain, away = wide_model(dtype), wide_model(dtype)
    here, there = AdamW(named(plain), lr=1.0, **OPTIONS), AdamW(named(away), lr=1.0, offload=True, **OPTIONS)
    assert len(there.away.tensors) == sum(p.numel() >= optim.LARGE for p in away.parameters()) > 0
    for cut in (range(3), range(3, 6)):
        updates(plain, here, cut, max_norm=0.5)
        updates(away, there, cut, max_norm=0.5)
        assert same_bits(away.state_dict(), plain.state_dict())
        assert same_bits(there.state(), here.state())
        assert [i for i, _ in there.masters()] == [i for i, _ in here.masters()]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(there.masters(), here.masters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [0, 3])
def test_offloaded_state_loaded_in_mid_run_continues_with_the_same_bits(dtype, cut):
    goes_on_with_the_same_bits(wide_model, dtype, cut, offload=True)


def test_offloaded_state_goes_on_where_it_was_not_offloaded_and_back():
    straight, net = wide_model(torch.bfloat16), wide_model(torch.bfloat16)
    opt, now = AdamW(named(straight), lr=1.0), AdamW(named(net), lr=1.0)
    updates(straight, opt, range(6))
    for steps, offload in ((range(2), True), (range(2, 4), False), (range(4, 6), True)):
        state = copies(now.state())
        now = AdamW(named(net), lr=1.0, offload=offload)
        now.load_state(state)
        updates(net, now, steps)
    assert same_bits(net.state_dict(), straight.state_dict())


def test_an_offloaded_gradient_that_is_not_finite_moves_nothing():
    net = wide_model(torch.bfloat16)
    opt = AdamW(named(net), lr=1.0, offload=True)
    before = copies(opt.state()) | copies(net.state_dict())
    next(net.parameters()).grad = torch.full_like(next(net.parameters()), math.nan)
    with pytest.raises(FloatingPointError, match="0.weight"):
        opt.step(1e-2, max_norm=1.0)
    assert same_bits(opt.state() | net.state_dict(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_state_is_in_the_hosts_memory():
    net = wide_model(torch.bfloat16).cuda()
    before = torch.cuda.memory_allocated()
    opt = AdamW(named(net), lr=1.0, offload=True)
    large = sum(p.numel() for p in net.parameters() if p.numel() >= optim.LARGE)
    assert torch.cuda.memory_allocated() - before < large
    assert all(t.is_pinned() for stand_in in opt.away.tensors for t in opt.moments[stand_in].values())
    plain = wide_model(torch.bfloat16).cuda()
    here = AdamW(named(plain), lr=1.0)
    updates(net, opt, range(4)), updates(plain, here, range(4))
    assert same_bits(net.state_dict(), plain.state_dict())


def test_8_bits_take_two_bytes_a_number_and_small_tensors_keep_32():
    net = wide_model(torch.bfloat16)
    opt = AdamW(named(net), lr=1.0, bits=8)
    kinds = {name: (t.dtype, tuple(t.shape)) for name, t in opt.state().items()}
    assert kinds == {name: (t.dtype, tuple(t.shape)) for name, t in opt.whole_state().items()}
    assert kinds["exp_avg.0.weight"] == (torch.uint8, (601, 7))
    assert kinds["exp_avg_sq_absmax.2.weight"] == (torch.float32, (22,))  # 9 * 601 numbers
    assert kinds["exp_avg_sq.3.weight"] == (torch.float32, (5, 9))
    assert kinds["master.0.weight"] == (torch.float32, (601, 7))
    big = nn.Parameter(torch.zeros(512, 512))
    state = AdamW([("w", big)], lr=1.0, bits=8).state()
    assert sum(t.nbytes for t in state.values()) - 4 == big.numel() * (2 + 2 * 4 / 256)
    with pytest.raises(ValueError, match="optimizer_bits"):
        AdamW(named(net), lr=1.0).load_state(opt.state())


def test_8_bits_go_where_32_bits_go():
    """Updates of both from the same start and on the same gradients lie within a few percent."""
    eight, full = wide_model(), wide_model()
    opts = [AdamW(named(net), lr=1.0, bits=bits, **OPTIONS) for net, bits in ((eight, 8), (full, 32))]
    start = copies(full.state_dict())
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        for a, b in zip(eight.parameters(), full.parameters()):
            a.grad = torch.randn(a.shape, generator=g) * 0.1 + 0.05
            b.grad = a.grad.clone()
        for opt in opts:
            opt.step(1e-3)
    for (name, a), b in zip(named(eight), full.parameters()):
        moved, off = (b - start[name]).norm(), (a - b).norm()
        assert moved > 0.01 and off < 0.02 * moved, name
        assert (off == 0) == (a.numel() < 4096)


def test_8_bits_do_not_jump_where_a_second_moment_is_small_in_its_block():
    """Rounded to 0, as in bitsandbytes, it left eps to divide by: 12,700 times the learning rate at once."""
    weight = nn.Parameter(torch.zeros(4096))
    opt = AdamW([("w", weight)], lr=1.0, betas=(0.9, 0.99), bits=8)
    weight.grad = torch.zeros(4096)
    weight.grad[::256] = 1.0
    weight.grad[1::256] = 3e-4
    opt.step(1e-3)
    weight.grad.zero_()
    opt.step(1e-3)
    assert 0 < weight.detach().abs().max() < 4e-3
    assert (weight[2::256] == 0).all()  # what never had a gradient has not moved


def numbers(factor):
    return ((torch.arange(16 * 256) * factor % 101 - 50).float() / 64).view(16, 256)


def test_8_bits_are_what_bitsandbytes_had_after_one_update():
    """Values of bitsandbytes 0.50.2, AdamW8bit on a CPU."""
    weight = nn.Parameter(numbers(29))
    opt = AdamW([("w", weight)], lr=1.0, bits=8, **OPTIONS)
    weight.grad = numbers(37)
    opt.step(1e-3)
    state = opt.state()
    assert (state["exp_avg_absmax.w"] == 0.078125).all()
    assert (state["exp_avg_sq_absmax.w"] == 0.030517578125).all()
    first = [0, 52, 218, 14, 78, 232, 28, 193, 246, 42, 208, 4]
    second = [255, 103, 145, 203, 40, 178, 163, 69, 222, 135, 129, 238]
    assert state["exp_avg.w"][0, :12].tolist() == first and state["exp_avg_sq.w"][0, :12].tolist() == second
    assert weight[0, :4].tolist() == pytest.approx([-0.7801719, -0.3270922, 0.1239875, 0.5790672], abs=1e-7)


def moments_as_bitsandbytes_has_them(steps):
    """Updates of ours and of bitsandbytes.optim.AdamW8bit on the same gradients: [(ours, theirs)]."""
    theirs = pytest.importorskip("bitsandbytes.optim", reason="bitsandbytes is the oracle here")
    ours, other = (nn.Parameter(torch.randn(40, 256, generator=torch.Generator().manual_seed(1)))
                   for _ in range(2))  # fmt: skip
    opt = AdamW([("w", ours)], lr=1.0, bits=8, **OPTIONS)
    oracle = theirs.AdamW8bit([other], lr=1e-3, **OPTIONS)
    for step in range(steps):
        g = torch.randn(40, 256, generator=torch.Generator().manual_seed(step + 2))
        ours.grad, other.grad = g, g.clone()
        opt.step(1e-3)
        oracle.step()
    return ours, other, opt.state(), oracle.state[other]


def test_8_bits_are_bitsandbytes_after_one_update():
    ours, other, mine, theirs = moments_as_bitsandbytes_has_them(1)
    assert torch.equal(ours, other)
    assert torch.equal(mine["exp_avg_absmax.w"], theirs["absmax1"])
    assert torch.equal(mine["exp_avg_sq_absmax.w"], theirs["absmax2"])
    for name, key in (("exp_avg.w", "state1"), ("exp_avg_sq.w", "state2")):
        differ = mine[name] != theirs[key]
        assert differ.float().mean() < 0.05  # their CPU form does not always take the nearest
        absmax, code = theirs[key.replace("state", "absmax")], theirs[key.replace("state", "qmap")]
        values = [code[x.int()] * absmax[:, None] for x in (mine[name], theirs[key])]
        assert ((values[0] - values[1]).abs() <= 0.02 * absmax[:, None]).all()


def test_8_bits_stay_with_bitsandbytes():
    ours, other, *_ = moments_as_bitsandbytes_has_them(10)
    assert (ours - other).abs().max() < 2e-3 and (ours - other).abs().mean() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_through_weights_of_before_the_update_is_an_error(dtype):
    """torch's fused AdamW does not count its writes: the gradient would be that of two models mixed."""
    net = model(dtype)
    opt = AdamW(named(net), lr=1e-2)
    loss = net(torch.ones(2, 7, dtype=dtype, requires_grad=True)).sum()
    backward(net, 0)
    opt.step(1e-2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------------------ fp16
def fp16_optimizer(scaled=True):
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.float16))
    return weight, optim.AdamW([("weight", weight)], lr=0.1, scaled=scaled)


def test_a_scaled_loss_keeps_gradients_that_fp16_would_lose():
    """1e-9 is no number of fp16, and the gradient of a long batch is made of such."""
    norms = {}
    for scaled in (False, True):
        weight, optimizer = fp16_optimizer(scaled)
        for _ in range(3):  # micro-batches
            ((weight.float() * 1e-9).sum() * optimizer.loss_scale).backward()
        norms[scaled] = float(optimizer.step(0.1))
    assert norms[False] == 0 and norms[True] == pytest.approx(3e-9 * 8**0.5, rel=1e-2)


def test_an_overflow_leaves_the_update_out_and_halves_the_scale():
    weight, optimizer = fp16_optimizer()
    before = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    ((weight.float() * 10).sum() * optimizer.loss_scale).backward()
    assert not torch.isfinite(optimizer.step(0.1))
    optimizer.zero_grad()
    after = optimizer.state()
    assert optimizer.loss_scale == 32_768 and after.keys() == before.keys()
    for name in before.keys() - {"loss_scale"}:
        assert torch.equal(after[name], before[name]), name
    for _ in range(20):
        ((weight.float() * 10).sum() * optimizer.loss_scale).backward()
        norm = optimizer.step(0.1)
        optimizer.zero_grad()
        if torch.isfinite(norm):
            break
    assert float(norm) == pytest.approx(10 * 8**0.5, rel=1e-3) and (weight < 1).all()


def test_the_scale_grows_again_and_is_part_of_the_state(monkeypatch):
    monkeypatch.setattr(optim.LossScale, "PATIENCE", 3)
    weight, optimizer = fp16_optimizer()
    for _ in range(4):
        ((weight.float() * 1e-3).sum() * optimizer.loss_scale).backward()
        optimizer.step(0.1)
        optimizer.zero_grad()
    assert optimizer.loss_scale == 131_072
    _, other = fp16_optimizer()
    other.load_state({name: tensor.clone() for name, tensor in optimizer.state().items()})
    assert other.loss_scale == 131_072 and float(other.scale.good) == 1


def test_a_loss_that_overflows_unscaled_is_an_error():
    weight, optimizer = fp16_optimizer()
    optimizer.scale.value.fill_(1.0)
    weight.grad = torch.full_like(weight, torch.inf)
    with pytest.raises(FloatingPointError, match="too narrow"):
        optimizer.step(0.1)
