"""The sampler against a fresh scoring pass, a ten-line sampler without cache or slots, transformers' greedy,
and itself in other batches."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cache
import lora
import model as models
import rollout
from cache import Cache, cache_bytes, group_places, plan_places, plan_slots
from conftest import TINY, quick
from kernels.logprob import logits_fp32, truncate_
from kernels.packed_linear import PackedLinear, pack, packable, packed_copy
from kernels.sample import draw, greedy, token_keys
from rollout import Sampler, generate

PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [30, 31], [11, 12, 13, 14], [5, 5]]


def plain(
    model,
    prompts,
    group_size,
    max_new_tokens,
    stop_ids,
    temperature=1.0,
    seed=0,
    step=0,
    numbers=None,
    **truncation,
):
    """The definition: one row at a time, the whole sequence through the model for every token."""
    rows = []
    for b, prompt in enumerate(prompts):
        for g in range(group_size):
            ids, logps = [], []
            while (
                len(ids) < max_new_tokens
                and len(prompt) + len(ids) < model.shape.context
                and not (ids and ids[-1] in stop_ids)
            ):
                with torch.no_grad():
                    logits = model.logits(torch.tensor(prompt + ids))[-1:]
                if temperature:
                    logits = truncate_(logits / temperature, **truncation)
                    key = token_keys(
                        seed, step, torch.tensor([b if numbers is None else numbers[b]]), g, len(ids)
                    )
                token, logp = draw(logits, key) if temperature else greedy(logits)
                ids.append(token.item())
                logps.append(logp.item())
            rows.append((ids, logps))
    return [r[0] for r in rows], [r[1] for r in rows]


def scored(model, prompts, out, group_size, **options) -> float:
    """The largest difference between the log-probabilities that were stored and those of a fresh scoring
    pass.

    A word at the very edge of the kept set (min_p, top_p) is in or out by the rounding of another batch;
    either reading of the edge will do.
    """
    stored, best = torch.tensor([x for row in out.logprobs for x in row]), None
    for edge in (1.0, 1 - 1e-5, 1 + 1e-5) if options.keys() & {"min_p", "top_p"} else (1.0,):
        moved = {k: v * edge if k in ("min_p", "top_p") else v for k, v in options.items()}
        with torch.no_grad():
            logp, _, _ = model.completion_logprobs(
                prompts, [out.group(b, group_size) for b in range(len(prompts))], **moved
            )
        best = (logp - stored).abs() if best is None else torch.minimum(best, (logp - stored).abs())
    return best.max().item()


def check(model, prompts, out, *, group_size, max_new_tokens, stop_ids, slots=None):
    """What holds for every rollout, whatever was drawn."""
    N = len(prompts) * group_size
    assert len(out.ids) == len(out.logprobs) == len(out.stopped) == N
    for n, (ids, logps, stopped) in enumerate(zip(out.ids, out.logprobs, out.stopped)):
        limit = min(max_new_tokens, model.shape.context - len(prompts[n // group_size]))
        assert 1 <= len(ids) == len(logps) <= limit
        assert not set(ids[:-1]) & set(stop_ids), "a row went on after its stop id"
        assert stopped == (ids[-1] in stop_ids) and (stopped or len(ids) == limit)
        assert all(0 <= i < model.shape.V for i in ids) and all(math.isfinite(lp) and lp <= 0 for lp in logps)
    stats = out.stats
    assert (
        stats["tokens"] == sum(map(len, out.ids))
        and stats["useful_slot_steps"] == stats["tokens"] - N <= stats["slot_steps"]
    )
    assert stats["slots"] <= min(slots or 256, N)


# --------------------------------------------------------------------------------- the same as the definition
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.0),
        dict(temperature=0.7, top_k=9),
        dict(temperature=1.3, top_p=0.8),
        dict(min_p=0.05, top_k=20, top_p=0.9),
    ],
)
def test_equals_sampling_one_row_at_a_time_without_a_cache(tiny, options):
    truncation = {
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        **{k: v for k, v in options.items() if k != "temperature"},
    }
    want, want_logps = plain(
        tiny, PROMPTS, 3, 12, {4, 17}, options.get("temperature", 1.0), seed=5, step=2, **truncation
    )
    for slots in (None, 4):
        out = generate(
            tiny,
            PROMPTS,
            group_size=3,
            max_new_tokens=12,
            stop_ids=[4, 17],
            seed=5,
            step=2,
            slots=slots,
            **options,
        )
        assert out.ids == want
        assert max(abs(a - b) for x, y in zip(out.logprobs, want_logps) for a, b in zip(x, y)) < 2e-5
        check(tiny, PROMPTS, out, group_size=3, max_new_tokens=12, stop_ids=[4, 17], slots=slots)


@pytest.mark.parametrize(
    "options", [dict(), dict(temperature=0.6), dict(temperature=1.5, top_k=7, top_p=0.9, min_p=0.01)]
)
def test_logprobs_equal_the_trainers(tiny, options):
    out = generate(tiny, PROMPTS, group_size=4, max_new_tokens=20, stop_ids=[4], slots=5, **options)
    assert scored(tiny, PROMPTS, out, 4, **options) < 2e-5


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_logprobs_equal_the_trainers_in_every_family(family):
    """Biases on q, k, v (qwen2), norms on q and k (qwen3), an untied head, a head width that is not D / H."""
    config = dict(TINY, model_type=family, tie_word_embeddings=False, head_dim=16, sliding_window=None)
    model = models.create(config, seed=1)
    for name, p in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    out = generate(model, PROMPTS, group_size=3, max_new_tokens=16, stop_ids=[4], slots=4)
    assert scored(model, PROMPTS, out, 3) < 2e-5


# --------------------------------------------------------------------------------- the same in whatever batch
@pytest.mark.parametrize("temperature", quick(1, [1.0, 0.0]))
def test_ids_do_not_depend_on_slots_or_threads(tiny, temperature):
    runs = []
    for slots, threads in ((1, 1), (3, 1), (8, 1), (None, 1), (None, 2)):
        torch.set_num_threads(threads)
        try:
            runs.append(
                generate(
                    tiny,
                    PROMPTS,
                    group_size=6,
                    max_new_tokens=14,
                    stop_ids=[4, 9],
                    temperature=temperature,
                    slots=slots,
                    seed=1,
                )
            )
        finally:
            torch.set_num_threads(1)
    assert all(r.ids == runs[0].ids and r.stopped == runs[0].stopped for r in runs)
    assert (
        len({len(ids) for ids in runs[0].ids}) > 3 or temperature == 0
    )  # rows of many lengths, or nothing was tested


def test_ids_do_not_depend_on_the_other_rows(tiny):
    """Prompts added, removed and reordered; each keeps its number, and so its draws."""
    options = dict(group_size=4, max_new_tokens=15, stop_ids=[4, 9], seed=3, step=7)
    whole = generate(tiny, PROMPTS, **options)
    for numbers in ([5, 4, 3, 2, 1, 0], [2], [4, 0], [1, 3, 5, 0]):
        part = generate(tiny, [PROMPTS[b] for b in numbers], prompt_numbers=numbers, slots=3, **options)
        for i, b in enumerate(numbers):
            assert part.group(i, 4) == whole.group(b, 4)
    more = generate(tiny, PROMPTS, **{**options, "group_size": 7})
    assert [more.group(b, 7)[:4] for b in range(6)] == [
        whole.group(b, 4) for b in range(6)
    ]  # a larger group has the smaller one in it


def test_seed_step_number_and_sample_each_change_the_draws(tiny):
    options = dict(group_size=4, max_new_tokens=15, stop_ids=[])
    base = generate(tiny, [[3, 4]], **options)
    assert base.ids == generate(tiny, [[3, 4]], **options).ids
    assert len({tuple(ids) for ids in base.ids}) == 4
    for change in (dict(seed=1), dict(step=1), dict(prompt_numbers=[1])):
        assert not {tuple(ids) for ids in base.ids} & {
            tuple(ids) for ids in generate(tiny, [[3, 4]], **options, **change).ids
        }


# ------------------------------------------------------------------------------------------------------ edges
def test_several_stop_ids_end_a_row_and_stay_in_it(tiny):
    out = generate(tiny, PROMPTS, group_size=8, max_new_tokens=30, stop_ids=[3, 4, 5, 6, 7])
    check(tiny, PROMPTS, out, group_size=8, max_new_tokens=30, stop_ids=[3, 4, 5, 6, 7])
    assert len({ids[-1] for ids, stopped in zip(out.ids, out.stopped) if stopped}) >= 4
    assert scored(tiny, PROMPTS, out, 8) < 2e-5  # the stop id's own log-probability included


def test_a_stop_id_inside_the_prompt_is_an_ordinary_token(tiny):
    """As for a model whose pad id is its stop id: what is real never depends on a token's value."""
    out = generate(tiny, [[4, 4, 1, 4], [4]], group_size=5, max_new_tokens=10, stop_ids=[4])
    check(tiny, [[4, 4, 1, 4], [4]], out, group_size=5, max_new_tokens=10, stop_ids=[4])
    assert scored(tiny, [[4, 4, 1, 4], [4]], out, 5) < 2e-5


@pytest.mark.parametrize("room", [1, 2, 5])
def test_a_prompt_near_the_end_of_the_context_gets_what_is_left(tiny, room):
    prompts = [[1] * (64 - room), [1, 2]]
    out = generate(tiny, prompts, group_size=3, max_new_tokens=9, stop_ids=[], slots=2)
    assert [len(ids) for ids in out.ids] == [min(room, 9)] * 3 + [9] * 3 and not any(out.stopped)
    assert scored(tiny, prompts, out, 3) < 2e-5


def test_one_new_token(tiny):
    out = generate(tiny, PROMPTS, group_size=3, max_new_tokens=1, stop_ids=[4])
    check(tiny, PROMPTS, out, group_size=3, max_new_tokens=1, stop_ids=[4])
    assert out.stats["slot_steps"] == 0 and scored(tiny, PROMPTS, out, 3) < 2e-5


def test_groups_of_one(tiny):
    out = generate(tiny, PROMPTS, group_size=1, max_new_tokens=12, stop_ids=[4], slots=2)
    assert out.ids == generate(tiny, PROMPTS, group_size=4, max_new_tokens=12, stop_ids=[4]).ids[::4]


@pytest.mark.parametrize("slots", [1, 4, None])
def test_all_rows_may_finish_at_the_first_token(tiny, slots):
    every = list(range(tiny.shape.V))
    out = generate(tiny, PROMPTS, group_size=3, max_new_tokens=9, stop_ids=every, slots=slots)
    assert all(len(ids) == 1 for ids in out.ids) and all(out.stopped) and out.stats["slot_steps"] == 0


def test_a_model_that_is_broken_ends_in_a_sentence(tiny):
    tiny.norm.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(tiny, PROMPTS, group_size=2, max_new_tokens=4, stop_ids=[])


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(prompts=[]), "no prompt"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1] * 64]), "context is 64"),
        (dict(prompts=[[1, 48]]), "another tokenizer"),
        (dict(prompts=[[-1]]), "another tokenizer"),
        (dict(prompt_numbers=[1, 2]), "2 prompt_numbers for 1"),
        (dict(group_size=0), "group_size=0"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.1), "top_p=1.1"),
        (dict(min_p=1.5), "min_p=1.5"),
        (dict(slots=0), "slots=0"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(tiny, change, words):
    options = {**dict(prompts=[[1]], group_size=2, max_new_tokens=3, stop_ids=[]), **change}
    with pytest.raises(ValueError, match=words):
        generate(tiny, options.pop("prompts"), **options)


# ------------------------------------------------------------------------------------------- random scenarios
def scenario(model, data):
    """One random call, checked: invariants, log-probabilities, and that slots do not matter."""
    V, context = model.shape.V, model.shape.context
    prompts = data.draw(
        st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=context - 1), min_size=1, max_size=5)
        | st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=6), min_size=1, max_size=9),
        label="prompts",
    )
    options = dict(
        group_size=data.draw(st.integers(1, 5)),
        max_new_tokens=data.draw(st.integers(1, 12)),
        stop_ids=data.draw(st.lists(st.integers(0, V - 1), max_size=12)),
        seed=data.draw(st.integers(0, 2**64 - 1)),
    )
    policy = data.draw(
        st.sampled_from([dict(), dict(temperature=0.5), dict(top_k=5), dict(top_p=0.7), dict(min_p=0.2)])
    )
    slots = data.draw(st.integers(1, 12) | st.none(), label="slots")
    out = generate(model, prompts, slots=slots, **options, **policy)
    check(
        model,
        prompts,
        out,
        group_size=options["group_size"],
        max_new_tokens=options["max_new_tokens"],
        stop_ids=options["stop_ids"],
        slots=slots,
    )
    # logits / 0.5 have twice the rounding error of logits: up to 2.6e-5 on these weights
    assert scored(model, prompts, out, options["group_size"], **policy) < 2e-5 / policy.get(
        "temperature", 1.0
    )
    if slots is not None:
        assert generate(model, prompts, **options, **policy).ids == out.ids


@pytest.mark.slow
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_random_scenarios_keep_the_invariants(tiny, data):
    scenario(tiny, data)


@pytest.mark.slow
@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_a_thousand_random_scenarios_keep_the_invariants(tiny, data):
    scenario(tiny, data)


def test_every_order_of_lengths_through_few_slots(tiny):
    """Lengths forced row by row, so that slots are freed in every order.

    Groups move, rows move, some finish before they have a slot.
    """
    options = dict(group_size=2, stop_ids=[])
    whole = generate(tiny, PROMPTS[:3], max_new_tokens=4, **options)
    orders = itertools.product((1, 2, 4), repeat=6)
    for lengths in itertools.islice(orders, 0, 729, 31):
        for slots in (2, 3, 5):
            out = generate(tiny, PROMPTS[:3], max_new_tokens=list(lengths), slots=slots, **options)
            assert out.ids == [ids[:n] for ids, n in zip(whole.ids, lengths)], (lengths, slots)


def test_a_sampler_serves_many_calls(tiny):
    """Other prompts, group sizes, lengths and options in each: nothing of a call is left for the next."""
    sampler = Sampler(tiny, slots=5)
    calls = [
        dict(prompts=PROMPTS, group_size=3, max_new_tokens=12, stop_ids=[4, 17]),
        dict(prompts=PROMPTS[:1], group_size=1, max_new_tokens=30, stop_ids=[], temperature=0.0),
        dict(prompts=PROMPTS[::-1], group_size=2, max_new_tokens=1, stop_ids=[9], entropy=True),
        dict(prompts=PROMPTS, group_size=4, max_new_tokens=9, stop_ids=[9], top_k=5, seed=3, step=8),
    ]
    for options in calls + calls:
        ours, fresh = sampler.generate(**options), generate(tiny, slots=5, **options)
        assert ours.ids == fresh.ids and ours.logprobs == fresh.logprobs
        assert ours.entropies == fresh.entropies and ours.stopped == fresh.stopped


def test_each_row_may_have_a_limit_of_its_own(tiny):
    limits = [1, 7, 60, 3]
    out = generate(tiny, [[1] * 30, [2]], group_size=2, max_new_tokens=limits, stop_ids=[])
    assert [len(ids) for ids in out.ids] == [1, 7, 60, 3]
    out = generate(tiny, [[1] * 62, [2]], group_size=2, max_new_tokens=limits, stop_ids=[])
    assert [len(ids) for ids in out.ids] == [1, 2, 60, 3]  # the context has an end
    with pytest.raises(ValueError, match="3 max_new_tokens for 4 rows"):
        generate(tiny, [[1], [2]], group_size=2, max_new_tokens=[1, 2, 3], stop_ids=[])
    with pytest.raises(ValueError, match="makes no sense"):
        generate(tiny, [[1], [2]], group_size=2, max_new_tokens=[1, 2, 0, 3], stop_ids=[])


# ------------------------------------------------------------------------------------------- slots and memory
@pytest.mark.parametrize(
    "slots, group_size, longest, block, least",
    quick(1, [(32, 8, 48, 1, 0.97), (64, 16, 48, 1, 0.97), (16, 4, 384, 1, 0.97), (16, 4, 384, 8, 0.83)]),
)
def test_refilled_slots_are_useful(slots, group_size, longest, block, least):
    """Jobs = 4 x slots with lengths like GSM8K's: 8 to `longest`, mean 40 % of that before clipping. A block
    runs on for 11 steps after a row's end."""
    u = torch.rand(4 * slots, generator=torch.Generator().manual_seed(0))
    lengths = (8 + torch.log1p(-u) / math.log(1 - 1 / (0.4 * longest))).long().clamp(8, longest).tolist()
    prompts = [[b + 1, 2, 3] for b in range(4 * slots // group_size)]
    net = models.create(dict(TINY, num_hidden_layers=1, max_position_embeddings=512), seed=0)
    sampler = Sampler(net, slots=slots, block=block)
    out = sampler.generate(prompts, group_size=group_size, max_new_tokens=lengths, stop_ids=[])
    assert [len(ids) for ids in out.ids] == lengths
    assert out.stats["useful_slot_steps"] / out.stats["slot_steps"] >= least, out.stats


def test_memory_is_planned_before_the_first_token(tiny, capsys, monkeypatch):
    sizes = dict(group_size=2, prompts=6, prompt_tokens=9, new_tokens=19)
    one, all_ = (
        3 * 4 * 48 * n
        + cache_bytes(tiny.shape, 4, groups=group_places(n, 2, 6), slots=n, prompt_tokens=9, new_tokens=19)
        for n in (1, 12)
    )
    assert plan_slots(tiny.shape, 4, all_, slots=12, **sizes) == 12 and not capsys.readouterr().out
    assert (
        1 <= plan_slots(tiny.shape, 4, all_ - 1, slots=12, **sizes) < 12
        and "rows at once" in capsys.readouterr().out
    )
    assert plan_slots(tiny.shape, 4, one, slots=12, **sizes) == 1
    with pytest.raises(ValueError, match="lower max_new_tokens"):
        plan_slots(tiny.shape, 4, one - 1, slots=12, **sizes)

    options = dict(group_size=2, max_new_tokens=20, stop_ids=[4])
    whole = generate(tiny, PROMPTS, **options)
    monkeypatch.setattr(cache, "free_bytes", lambda device: 0.4 * all_ / 0.8)
    fewer = generate(tiny, PROMPTS, **options)
    assert fewer.stats["slots"] < 12 and fewer.ids == whole.ids


def test_cache_bytes_is_what_the_cache_takes(tiny):
    sizes = dict(groups=3, slots=7, prompt_tokens=11, new_tokens=5)
    assert Cache(tiny, **sizes).bytes() == cache_bytes(tiny.shape, 4, **sizes)
    assert cache.free_bytes(torch.device("cpu")) > 1e6


def test_places_for_prompts_are_as_many_as_fit(tiny):
    sizes = dict(prompt_tokens=9, new_tokens=19)
    least = group_places(3, 1, 20)

    def planned(groups):
        free = 3 * 4 * 48 * 3 + cache_bytes(tiny.shape, 4, groups=groups, slots=3, **sizes)
        return plan_places(tiny.shape, 4, free, slots=3, group_size=1, prompts=20, **sizes)

    assert [planned(groups) for groups in (0, least, 11, 20, 40)] == [least, least, 11, 20, 20]
    assert plan_places(tiny.shape, 4, math.inf, slots=3, group_size=1, prompts=20, **sizes) == 20


# -------------------------------------------------------------------------------- packed weights and adapters
def wide():
    """A model whose layers are wide enough to be packed."""
    return models.create(
        dict(TINY, vocab_size=600, hidden_size=512, intermediate_size=640, initializer_range=0.05), seed=0
    )


def with_adapter(model):
    lora.apply(model, rank=4, alpha=8, targets=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    for layer in lora.layers(model).values():
        for B in layer.B:
            B.data.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return model


def packed_layers(module):
    return sum(isinstance(m, PackedLinear) for m in module.modules())


@pytest.mark.parametrize("adapter", [False, True])
def test_packed_weights_are_the_same_function(adapter):
    """The adapter is added into the copy; kernels/packed_linear.py states how far that rounds differently."""
    model = with_adapter(wide()) if adapter else wide()
    x = torch.randint(0, 600, (9,))
    with torch.no_grad():
        before = model.logits(x)
        twin, head = packed_copy(model)
        plan = models.Packed(model, [x.tolist()], [[]])
        inside = head(twin(plan.ids, plan.positions, plan))
        assert packed_layers(twin) >= (2 if packable(model.head) else 0) * model.shape.L
        assert torch.equal(model.logits(x), before) and not packed_layers(model), (
            "the model is left as it was"
        )
    assert (inside - before).abs().max() < 1e-5 * before.abs().max().clamp(min=1)


def test_a_packed_copy_shares_every_parameter_and_has_its_own_modules():
    """A second copy of a model would take its memory, and an attribute written to the twin would reach the
    model."""
    model = with_adapter(wide()).to(torch.bfloat16)  # bf16: adapters stay beside their bases
    twin, _ = packed_copy(model)
    known = {id(p) for p in model.parameters()}
    assert all(id(p) in known for p in twin.parameters())
    assert not set(model.modules()) & set(twin.modules())
    for layer in lora.layers(model).values():
        layer.enabled = False
    assert all(layer.enabled for layer in lora.layers(twin).values())


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("make", [wide, lambda: models.create(dict(TINY), seed=0)], ids=["packed", "plain"])
def test_sampling_through_an_adapter_equals_training_through_it(make, enabled):
    model = with_adapter(make())
    base = generate(model, PROMPTS, group_size=2, max_new_tokens=rollout.PACK_STEPS, stop_ids=[]).ids
    for layer in lora.layers(model).values():
        layer.enabled = enabled
    out = generate(model, PROMPTS, group_size=2, max_new_tokens=rollout.PACK_STEPS, stop_ids=[])
    assert scored(model, PROMPTS, out, 2) < 2e-5
    assert (out.ids == base) == enabled


def test_weights_changed_between_calls_are_seen():
    """The packed copy lives for one call: an optimiser writes to the weights in place."""
    model = wide()
    options = dict(group_size=2, max_new_tokens=rollout.PACK_STEPS, stop_ids=[])
    generate(model, PROMPTS, **options)
    for p in model.parameters():
        p.data.mul_(1.1)
    out = generate(model, PROMPTS, **options)
    assert scored(model, PROMPTS, out, 2) < 2e-5


def test_an_exception_drops_the_packed_weights():
    def interrupt(b, ids):
        raise KeyboardInterrupt

    model = wide()
    sampler = Sampler(model)
    options = dict(group_size=2, max_new_tokens=rollout.PACK_STEPS, stop_ids=[])
    with pytest.raises(KeyboardInterrupt):
        sampler.generate(PROMPTS, on_group=interrupt, **options)
    assert sampler.twin is None and sampler.head is None and not packed_layers(model)
    for p in model.parameters():
        p.data.mul_(1.1)
    assert scored(model, PROMPTS, sampler.generate(PROMPTS, **options), 2) < 2e-5


@pytest.mark.parametrize("make", [wide, lambda: models.create(dict(TINY), seed=0)], ids=["packed", "plain"])
@pytest.mark.parametrize("adapter", quick(1, [False, True]), ids=["base", "adapter"])
def test_bf16_on_a_cpu_equals_training_in_bf16(make, adapter):
    """From PACK_STEPS new tokens on, the head was packed in fp32 and handed bf16 rows: sampling crashed."""
    model = make().to(torch.bfloat16)
    if adapter:
        with_adapter(model)
    out = generate(model, PROMPTS, group_size=2, max_new_tokens=40, stop_ids=[4], slots=5)
    assert max(len(ids) for ids in out.ids) > rollout.PACK_STEPS
    with torch.no_grad():
        logp, _, _ = model.completion_logprobs(PROMPTS, [out.group(b, 2) for b in range(6)])
    apart = (logp - torch.tensor(sum(out.logprobs, []))).abs()
    # bf16 has 8 bits, and these weights make logits of 10 and more; at most 0.17 and 0.020 when this was
    # written
    assert apart.max() < 0.35 and apart.mean() < 0.04


def test_the_head_gives_fp32_logits_whatever_the_dtype():
    """Rounding logits to bf16 is the largest mismatch of sampler and trainer there is."""
    for dtype in (torch.bfloat16, torch.float32):
        model = wide().to(dtype)
        _, head = packed_copy(model)
        hidden = torch.randn(5, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
        logits = head(hidden)
        assert logits.dtype == torch.float32
        assert (logits - logits_fp32(hidden, model.head)).abs().max() < 1e-5 * logits.abs().max()


def test_a_packed_layer_gives_the_same_bits_for_a_row_in_any_batch():
    """So slots and refills cannot change a word by rounding here; F.linear's first three rows differ from
    those of a larger batch."""
    weight = torch.randn(1536, 576, generator=torch.Generator().manual_seed(0))
    if not packable(weight):
        pytest.skip("no oneDNN here")
    f, x = pack(weight), torch.randn(40, 576)
    assert all(torch.equal(f(x[:n]), f(x)[:n]) for n in (1, 2, 3, 7, 16, 33))


# ------------------------------------------------------------------------------------------------ real models
TEXTS = [
    "Natalia sold clips to 48 of her friends in April, and then half as many in May.",
    "The capital of France is",
    "def fibonacci(n):",
    "Once",
]


def real(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return models.load(folder).requires_grad_(False), [tokenizer(text)["input_ids"] for text in TEXTS]


REAL = [dict(), pytest.param(dict(temperature=0.8, top_k=50, top_p=0.9), marks=pytest.mark.slow)]


@pytest.mark.model
@pytest.mark.parametrize("options", REAL, ids=str)
def test_a_real_models_logprobs_equal_the_trainers(smollm2, options):
    model, prompts = real(smollm2)
    call = dict(group_size=2, max_new_tokens=rollout.PACK_STEPS, stop_ids=[0, 2], slots=5)
    assert scored(model, prompts, generate(model, prompts, **call, **options), 2, **options) < 1e-4


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "qwen"])
def test_a_real_models_ids_do_not_depend_on_slots_or_threads(name, request):
    model, prompts = real(request.getfixturevalue(name))
    runs = []
    for slots, threads in ((32, 1), (3, 1), (8, 2)):
        torch.set_num_threads(threads)
        try:
            runs.append(
                generate(
                    model, prompts, group_size=8, max_new_tokens=32, stop_ids=[0, 2, 151645], slots=slots
                ).ids
            )
        finally:
            torch.set_num_threads(1)
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "qwen"])
def test_greedy_equals_transformers_over_500_tokens(name, request):
    """One story of 500 tokens, on packed weights; transformers has the plain ones, and no wiser way to break
    a tie than we."""
    from transformers import AutoModelForCausalLM

    folder = request.getfixturevalue(name)
    model, prompts = real(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = generate(model, prompts[:1], group_size=1, max_new_tokens=500, stop_ids=[], temperature=0).ids[0]
    out = theirs.generate(
        torch.tensor(prompts[:1]),
        attention_mask=torch.ones(1, len(prompts[0]), dtype=torch.long),
        max_new_tokens=500,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompts[0]) :].tolist()
    assert ours == out, (
        f"first difference at token {next(i for i, (a, b) in enumerate(zip(ours, out)) if a != b)}"
    )
