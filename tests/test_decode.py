"""decode.py: blocks of steps on static buffers draw what a look after every token draws.

Graphs are recorded here as on a GPU, by hand; real ones are marked gpu.
"""

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cache
import decode
import lora
import model as models
import rollout
from conftest import TINY, quick
from decode import GridAttention, Slots, TableAttention
from kernels.attention import decode_ref
from rollout import Sampler, generate

PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [30, 31], [11, 12, 13, 14], [5, 5]]
OPTIONS = dict(group_size=3, max_new_tokens=13, stop_ids=[4, 17, 9], seed=5, step=2, entropy=True)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Batches of a handful of rows shrink through several graphs, as 256 rows do."""
    monkeypatch.setattr(decode, "SIZES", (1, 2, 4, 8))


@pytest.fixture
def table(monkeypatch):
    """The form of a GPU: keys by table, all prompts first; its kernels are torch's definitions here."""
    monkeypatch.setattr(decode, "attention_form", lambda model: TableAttention)


@pytest.fixture(params=[GridAttention, TableAttention], ids=["grid", "table"])
def form(request, monkeypatch):
    """Both forms of attention over the cache, one after the other."""
    monkeypatch.setattr(decode, "attention_form", lambda model: request.param)
    return request.param


class Recorded(TorchDispatchMode):
    """A CUDA graph without CUDA: notes every operation with its tensors.

    `replay` does the same operations on the same memory, whatever Python knows by then.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert "local_scalar" not in str(op), "the host looks at a value inside a step"
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        for op, args, kwargs, out in self.calls:
            again = op(*args, **kwargs)
            if not isinstance(out, (tuple, list)):
                out, again = [out], [again]
            for was, now in zip(out, again):
                if torch.is_tensor(was) and was.data_ptr() != now.data_ptr():  # else a view, or in place
                    was.copy_(now)


@pytest.fixture
def recorded(table, monkeypatch):
    """All slots record their steps and replay them, as on a GPU. Gives the sizes that were recorded."""
    captures = []

    def capture(self, size):
        state = (self.token, self.own, self.done, self.number)
        before = [x.clone() for x in state]
        with Recorded() as graph:
            self.step(size)
        for x, was in zip(state, before):
            x.copy_(was)
        captures.append(size)
        return graph

    monkeypatch.setattr(Slots, "capture", capture)
    monkeypatch.setattr(Slots, "can_record", lambda self, cuda_graphs: cuda_graphs and self.attention.records)
    return captures


def same(out, ref):
    """Ids, stop reasons and what follows from them are equal; log-probabilities and entropies to rounding."""
    assert out.ids == ref.ids and out.stopped == ref.stopped
    for ours, theirs in ((out.logprobs, ref.logprobs), (out.entropies, ref.entropies)):
        assert [len(x) for x in ours] == [len(x) for x in theirs]
        pairs = [(a, b) for x, y in zip(ours, theirs) for a, b in zip(x, y)]
        assert all(abs(a - b) < 2e-5 for a, b in pairs)
    for name in ("tokens", "useful_slot_steps"):
        assert out.stats[name] == ref.stats[name]
    assert out.stats["slot_steps"] >= out.stats["useful_slot_steps"]


# --------------------------------------------------------------------------------------------- the same draws
POLICIES = [dict(), dict(temperature=0.0), dict(temperature=1.3, top_k=9, top_p=0.9, min_p=0.01)]


@pytest.mark.parametrize("policy", quick(1, POLICIES[::-1]), ids=str)
def test_a_block_of_any_size_draws_what_a_look_after_every_token_draws(tiny, monkeypatch, policy):
    ref = generate(tiny, PROMPTS, **OPTIONS, **policy)
    many_lengths = len({len(ids) for ids in ref.ids}) > 3 and any(ref.stopped)
    assert many_lengths or policy.get("temperature") == 0
    for form in (GridAttention, TableAttention):
        monkeypatch.setattr(decode, "attention_form", lambda model, form=form: form)
        for block, slots in ((1, 4), (3, None), (5, 3), (16, 2)):
            same(generate(tiny, PROMPTS, block=block, slots=slots, **OPTIONS, **policy), ref)


@pytest.mark.parametrize("block", quick(1, [3, 1, 8]))
def test_every_order_of_lengths_through_few_slots(tiny, form, block):
    """Slots are freed in every order while the next block runs: rows and groups move, slots are refilled."""
    options = dict(group_size=2, stop_ids=[])
    whole = generate(tiny, PROMPTS[:3], max_new_tokens=7, **options)
    orders = itertools.product((1, 3, 7), repeat=6)
    for lengths in itertools.islice(orders, 0, 729, 125):
        for slots in (2, 3, 5):
            out = generate(
                tiny, PROMPTS[:3], max_new_tokens=list(lengths), slots=slots, block=block, **options
            )
            assert out.ids == [ids[:n] for ids, n in zip(whole.ids, lengths)], (lengths, slots)


def test_the_context_ends_inside_a_block(tiny, form):
    prompts = [[1] * 62, [1, 2], [3] * 63]
    options = dict(group_size=2, max_new_tokens=9)
    ref = generate(tiny, prompts, stop_ids=[40], **options)
    # with a stop id that the model does not have
    same(generate(tiny, prompts, stop_ids=[40, 10**6], slots=3, block=8, **options), ref)


def test_groups_are_handed_over_once_and_whole(tiny, form):
    calls = {}

    def note(b, ids):
        calls.setdefault(b, []).append([list(x) for x in ids])

    out = generate(tiny, PROMPTS, block=4, slots=5, on_group=note, **OPTIONS)
    assert calls == {b: [out.group(b, 3)] for b in range(6)}


@pytest.mark.parametrize("block", [1, 4])
def test_a_broken_model_ends_in_a_sentence_and_the_next_call_is_unharmed(tiny, form, block):
    """What a broken model leaves in the cache is not finite: no later call may meet it."""
    ref, weight = generate(tiny, PROMPTS, **OPTIONS), tiny.norm.weight.data[3].item()
    sampler = Sampler(tiny, slots=4, block=block)
    for _ in range(2):
        same(sampler.generate(PROMPTS, **OPTIONS), ref)
        tiny.norm.weight.data[3] = float("nan")
        with pytest.raises(FloatingPointError, match="not finite"):
            sampler.generate(PROMPTS, **OPTIONS)
        tiny.norm.weight.data[3] = weight


def test_keys_that_are_not_finite_do_not_outlive_their_call(tiny, form):
    ref, weight = generate(tiny, PROMPTS, **OPTIONS), tiny.blocks[0].input_norm.weight.data[3].item()
    sampler = Sampler(tiny, slots=4, block=4)
    tiny.blocks[0].input_norm.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler.generate(PROMPTS, **OPTIONS)
    tiny.blocks[0].input_norm.weight.data[3] = weight
    same(sampler.generate(PROMPTS, **OPTIONS), ref)


def test_a_call_that_broke_off_in_a_block_is_forgotten(tiny, form):
    def interrupt(b, ids):
        raise KeyboardInterrupt

    ref, sampler = generate(tiny, PROMPTS, **OPTIONS), Sampler(tiny, block=4, slots=4)
    with pytest.raises(KeyboardInterrupt):
        sampler.generate(PROMPTS, on_group=interrupt, **OPTIONS)
    same(sampler.generate(PROMPTS, **OPTIONS), ref)


# -------------------------------------------------------------------------------------- all prompts first
def prefills(monkeypatch):
    """Prompts in each prefill, and the decoding steps that had run before it."""
    calls, steps, step = [], [], Slots.step
    prefill = rollout.Prefill.__init__

    def noted(self, model, prompts, *args):
        calls.append((len(prompts), len(steps)))
        prefill(self, model, prompts, *args)

    monkeypatch.setattr(rollout.Prefill, "__init__", noted)
    monkeypatch.setattr(Slots, "step", lambda self, n: (steps.append(n), step(self, n)))
    return calls


def test_all_prompts_are_prefilled_before_the_first_step(tiny, table, monkeypatch):
    ref, calls = generate(tiny, PROMPTS, slots=4, **OPTIONS), prefills(monkeypatch)
    same(generate(tiny, PROMPTS, slots=4, block=4, **OPTIONS), ref)
    assert sum(n for n, _ in calls) == 6 and all(steps == 0 for _, steps in calls)
    assert max(n for n, _ in calls) <= 4, "more logits at once than are planned for"
    calls.clear()
    monkeypatch.setattr(rollout, "PREFILL_TOKENS_TRITON", 10)
    same(generate(tiny, PROMPTS, slots=4, block=4, **OPTIONS), ref)
    assert [n for n, _ in calls] == [2, 1, 3]  # of 3 + 1, 9, and 2 + 4 + 2 tokens


def test_prompts_that_do_not_fit_are_prefilled_as_places_become_free(tiny, table, monkeypatch):
    ref, calls = generate(tiny, PROMPTS, slots=3, **OPTIONS), prefills(monkeypatch)
    for places in (1, 2, 4):
        calls.clear()
        monkeypatch.setattr(rollout, "plan_places", lambda *args, places=places, **kwargs: places)
        same(generate(tiny, PROMPTS, slots=3, block=4, **OPTIONS), ref)
        assert calls[0][0] == min(3, places) and calls[-1][1] > 0
        assert sum(n for n, _ in calls) == 6 and max(n for n, _ in calls) <= places


# ------------------------------------------------------------------------------------------------------ waste
def counted(monkeypatch):
    """Rows of every step that ran, and how often the host looked."""
    steps, looks, step, read = [], [], Slots.step, Slots.read

    def noted_step(self, n):
        steps.append(n)
        step(self, n)

    def noted_read(self):
        looks.append(1)
        return read(self)

    monkeypatch.setattr(Slots, "step", noted_step)
    monkeypatch.setattr(Slots, "read", noted_read)
    return steps, looks


def test_wasted_steps_are_counted(tiny, form, monkeypatch):
    steps, _ = counted(monkeypatch)
    for slots in (None, 4):
        for block in (1, 4, 16):
            steps.clear()
            stats = generate(tiny, PROMPTS, block=block, slots=slots, **OPTIONS).stats
            if slots is None:  # nobody waits: what ran is what is counted
                assert stats["slot_steps"] == sum(steps) >= stats["useful_slot_steps"]
                # a block of one step is looked at before the next one starts
                assert (sum(steps) > stats["useful_slot_steps"]) == (block > 1)
            assert stats["slot_steps"] >= sum(steps)


def test_no_step_is_run_beyond_the_limit_and_the_host_looks_once_a_block(tiny, form, monkeypatch):
    steps, looks = counted(monkeypatch)
    options = dict(group_size=2, stop_ids=[], block=8)
    stats = generate(tiny, PROMPTS[:4], max_new_tokens=33, **options).stats
    assert len(steps) == 32 and len(looks) == 4 and stats["slot_steps"] == stats["useful_slot_steps"]
    steps.clear()
    generate(tiny, PROMPTS[:4], max_new_tokens=30, **options)
    assert len(steps) == 29


def test_a_finished_row_and_an_empty_slot_write_inside_their_slot(tiny, table):
    """Slot 0 may draw 3 tokens, slot 1 as many as fit; slots 2 and 3 are empty, of which one is computed."""
    slots = Slots(tiny, groups=1, slots=4, prompt_tokens=2, new_tokens=5, block=9)

    def choose(hidden, key):
        return key + 1, hidden[:, 0], None

    slots.begin(tiny, choose, slots=3, stop_ids=[], cuda_graphs=False)
    two = torch.tensor([0, 1])
    lengths, limits = torch.tensor([2, 2]), torch.tensor([3, 5])
    slots.enter(two, two, lengths, 0 * two, limits, torch.zeros(2, 6, dtype=torch.long))
    slots.seat([0, 0])
    with torch.no_grad():
        slots.run(3, 9, longest=0)
    assert slots.own.tolist() == [2, 4, 0, 0] and slots.done.tolist() == [True, True, True, True]
    written = (slots.cache.own_k != 0).any(4).any(2).any(0)  # (slots, C)
    assert written.sum(1).tolist() == [3, 5, 1, 0] and written[:, 0].tolist() == [True, True, True, False]


def test_a_finished_row_writes_inside_its_slot_on_the_grid_too(tiny):
    slots = Slots(tiny, groups=1, slots=2, prompt_tokens=2, new_tokens=5, block=9)
    slots.begin(
        tiny, lambda hidden, key: (key + 1, hidden[:, 0], None), slots=2, stop_ids=[], cuda_graphs=False
    )
    two = torch.tensor([0, 1])
    lengths, limits = torch.tensor([2, 2]), torch.tensor([3, 5])
    slots.enter(two, two, lengths, 0 * two, limits, torch.zeros(2, 6, dtype=torch.long))
    slots.seat([0, 0])
    with torch.no_grad():
        slots.run(2, 9, longest=0)
    written = (slots.cache.own_k != 0).any(4).any(2).any(0)
    assert slots.own.tolist() == [2, 4] and written.sum(1).tolist() == [3, 5]


def test_a_block_that_nobody_has_read_is_not_written_over(tiny):
    slots = Slots(tiny, groups=1, slots=1, prompt_tokens=2, new_tokens=5, block=1)
    slots.begin(tiny, lambda hidden, key: (key, hidden[:, 0], None), slots=1, stop_ids=[], cuda_graphs=False)
    one = torch.tensor([0])
    slots.enter(one, one, one + 2, one, one + 6, torch.arange(6)[None])
    slots.seat([0])
    with torch.no_grad():
        slots.run(1, 1, longest=0)
        slots.run(1, 1, longest=1)
        with pytest.raises(AssertionError, match="written over"):
            slots.run(1, 1, longest=2)
    assert [slots.read()[0] for _ in range(2)] == [[[1]], [[2]]]  # oldest first


def test_decoding_from_the_cache_is_its_definition():
    """Rows of two groups; what the cache holds beyond them is NaN."""
    n, H, K, E, P, C = 4, 6, 2, 8, 9, 7
    group, lengths, own = [0, 1, 1, 0], [9, 4], [0, 6, 3, 2]
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, pk, pv = random(n, H, E), random(2, K, P, E), random(2, K, P, E)
    ok, ov = random(n, K, C, E), random(n, K, C, E)
    for x in (pk, pv):
        x[1, :, 4:] = float("nan")
    for x in (ok, ov):
        for i in range(n):
            x[i, :, own[i] + 1 :] = float("nan")
    table = [[i, 1, own[i], group[i] * K * P, lengths[group[i]], i * K * C] for i in range(n)]
    out = decode_ref(q, pk, pv, ok, ov, torch.tensor(table))
    for i in range(n):
        prompt, last = slice(0, lengths[group[i]]), own[i] + 1
        keys = torch.cat([pk[group[i], :, prompt], ok[i, :, :last]], 1)
        values = torch.cat([pv[group[i], :, prompt], ov[i, :, :last]], 1)
        w = torch.einsum("krd,ktd->krt", q[i].view(K, H // K, E), keys).div(E**0.5).softmax(-1)
        torch.testing.assert_close(out[i], torch.einsum("krt,ktd->krd", w, values).reshape(H, E))


# ----------------------------------------------------------------------------------------------------- graphs
RECORDED_POLICIES = [dict(), dict(temperature=0.0), dict(temperature=0.8, top_k=9, top_p=0.9)]


@pytest.mark.parametrize("policy", quick(1, RECORDED_POLICIES[::-1]), ids=str)
def test_a_recorded_step_is_the_step(tiny, recorded, policy):
    """Over refills, moves, shrinking and a second call: nothing that the host knows is in the recording."""
    sampler = Sampler(tiny, slots=5, block=4)
    back = dict(prompt_numbers=[5, 4, 3, 2, 1, 0], **policy)
    for seed in (1, 2):
        options = {**OPTIONS, "seed": seed}
        ref = generate(tiny, PROMPTS, cuda_graphs=False, **options, **policy)
        same(sampler.generate(PROMPTS, **options, **policy), ref)
        options["stop_ids"] = [1]
        ref = generate(tiny, PROMPTS[::-1], cuda_graphs=False, **options, **back)
        same(sampler.generate(PROMPTS[::-1], **options, **back), ref)
    assert len(recorded) == len(set(recorded)) > 1, "a step of some size was recorded twice"


def test_a_temperature_that_changes_records_nothing_new(tiny, recorded):
    """With a schedule each step has a temperature of its own."""
    sampler, counts = Sampler(tiny, slots=5, block=4), []
    for temperature in (1.0, 0.9, 0.6):
        ref = generate(tiny, PROMPTS, cuda_graphs=False, temperature=temperature, **OPTIONS)
        same(sampler.generate(PROMPTS, temperature=temperature, **OPTIONS), ref)
        counts.append(len(recorded))
    assert counts[0] > 1 and len(recorded) == len(set(recorded)), "a step of some size was recorded twice"


def test_weights_written_in_place_are_seen_by_what_was_recorded(tiny, recorded):
    lora.apply(tiny, rank=4, alpha=8, targets=["q_proj", "down_proj"])
    sampler, outs, counts = Sampler(tiny, block=4), [], []
    for round in range(3):
        ref = generate(tiny, PROMPTS, cuda_graphs=False, **OPTIONS)
        same(sampler.generate(PROMPTS, **OPTIONS), ref)
        outs.append(ref.ids)
        counts.append(len(recorded))
        with torch.no_grad():
            for p in tiny.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(round)) * 0.05)
    assert outs[0] != outs[1] != outs[2] and len(recorded) == len(set(recorded))
    for layer in lora.layers(tiny).values():  # another function of the same weights
        layer.enabled = False
    same(sampler.generate(PROMPTS, **OPTIONS), generate(tiny, PROMPTS, cuda_graphs=False, **OPTIONS))
    assert len(recorded) > counts[-1]


def test_a_merged_weight_that_moves_is_seen(tiny):
    """lora.py's layers may read a weight with the adapter added in: its address is in a graph as the others
    are."""
    lora.apply(tiny, rank=4, alpha=8, targets=["q_proj"])
    before = decode.addresses(tiny)
    layer = next(iter(lora.layers(tiny).values()))
    layer.merged = layer.merged_weight()
    assert decode.addresses(tiny) != before


def test_buffers_are_kept_with_the_sampler_and_grow(tiny, table):
    options = dict(group_size=2, stop_ids=[])
    sampler = Sampler(tiny, slots=4, block=4)
    ref = generate(tiny, PROMPTS, max_new_tokens=9, cuda_graphs=False, **options)
    sampler.generate(PROMPTS, max_new_tokens=9, **options)
    first = sampler.kept
    sampler.generate(PROMPTS[:2], max_new_tokens=5, **options)
    assert sampler.kept is first
    sampler.generate([[1] * 9] * 9, max_new_tokens=[55] * 18, **{**options, "stop_ids": range(48)})
    second = sampler.kept
    assert second is not first and second.sizes == dict(groups=9, slots=4, prompt_tokens=64, new_tokens=64)
    out = sampler.generate(PROMPTS, max_new_tokens=9, **options)
    assert sampler.kept is second, "calls of two sizes take turns without building anything"
    assert out.ids == ref.ids
    tiny.norm.weight.data = tiny.norm.weight.data.clone()  # a weight that moved
    assert sampler.generate(PROMPTS, max_new_tokens=9, **options).ids == ref.ids
    assert sampler.kept is not second
    lora.apply(tiny, rank=2, alpha=4, targets=["q_proj"])  # new weights
    third = sampler.kept
    assert sampler.generate(PROMPTS, max_new_tokens=9, **options).ids == ref.ids
    assert sampler.kept is not third


def test_longer_completions_grow_the_buffers_in_steps_of_64(table):
    net = models.create(dict(TINY, max_position_embeddings=256), seed=0)
    sampler = Sampler(net, slots=2, block=4)
    sizes = []
    for new in (9, 64, 65, 20):
        sampler.generate(PROMPTS[:2], group_size=1, max_new_tokens=new, stop_ids=[])
        sizes.append(sampler.kept.cache.C)
    assert sizes == [64, 64, 128, 128]


def test_the_model_carries_nothing_of_the_sampler(tiny, form):
    """A model that is copied, saved or trained must not drag a cache along, nor a copy of its weights."""
    before = {name: set(vars(module)) for name, module in tiny.named_modules()}
    sampler = Sampler(tiny, block=4)
    sampler.generate(PROMPTS, **{**OPTIONS, "max_new_tokens": rollout.PACK_STEPS})
    after = {name: set(vars(module)) for name, module in tiny.named_modules()}
    before[""].add("rope_scale")  # the model's own, made at its first forward
    assert after == before | {"": after[""] & before[""]}
    copy.deepcopy(tiny)
    assert sampler.slots is None and (sampler.kept is None) == (form is GridAttention)


def test_buffers_too_large_to_keep_are_dropped(tiny, table, monkeypatch):
    ref, sampler = generate(tiny, PROMPTS, **OPTIONS), Sampler(tiny, block=4)
    monkeypatch.setattr(decode, "kept_bytes", lambda device: 1000)
    for _ in range(2):
        same(sampler.generate(PROMPTS, **OPTIONS), ref)
        assert sampler.kept is None


def test_prompts_are_not_all_prefilled_where_the_buffers_could_not_be_kept(tiny, table, monkeypatch):
    """An evaluation of a thousand problems must not cost the run its graphs."""
    prompts = [[1 + b % 40, 2] for b in range(60)]
    options = dict(group_size=1, max_new_tokens=5, stop_ids=[3])
    ref = generate(tiny, prompts, **options)
    least = cache.cache_bytes(tiny.shape, 4, groups=5, slots=4, prompt_tokens=64, new_tokens=64)
    a_place = cache.cache_bytes(tiny.shape, 4, groups=1, slots=0, prompt_tokens=64, new_tokens=64)
    monkeypatch.setattr(decode, "kept_bytes", lambda device: least + 8 * a_place)
    sampler = Sampler(tiny, block=4, slots=4)
    same(sampler.generate(prompts, **options), ref)
    assert sampler.kept is not None and 5 <= sampler.kept.sizes["groups"] <= 13


def test_fewer_slots_where_memory_is_short_are_not_tried_again(tiny, table, monkeypatch, capsys):
    ref = generate(tiny, PROMPTS, **OPTIONS)
    monkeypatch.setattr(cache, "free_bytes", lambda device: 200_000)
    sampler = Sampler(tiny, block=4)
    runs = [sampler.generate(PROMPTS, **OPTIONS) for _ in range(2)]
    assert runs[0].stats["slots"] == runs[1].stats["slots"] < 18
    assert capsys.readouterr().out.count("rows at once") == 2  # one line says it twice
    for out in runs:
        same(out, ref)


# --------------------------------------------------------------------------------------------------- on a GPU
def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def larger(dtype):
    sizes = dict(vocab_size=1000, hidden_size=256, intermediate_size=512, max_position_embeddings=512)
    config = dict(TINY, model_type="qwen2", initializer_range=0.08, **sizes)
    return models.create(config, seed=0, dtype=dtype, device="cuda")


@on_gpu
@pytest.mark.parametrize(
    "policy", [dict(), dict(temperature=0.0), dict(temperature=0.9, top_k=50, top_p=0.95)], ids=str
)
def test_graphs_draw_what_launches_draw(policy):
    """fp32: the graph of another size may round otherwise, which no draw here may notice."""
    model = larger(torch.float32)
    options = dict(group_size=8, stop_ids=list(range(20)), entropy=True, **policy)
    options["max_new_tokens"] = [8 + row for row in range(48)]  # so that the batch shrinks, whatever is drawn
    ref = generate(model, PROMPTS, cuda_graphs=False, block=1, **options)
    sizes = set()
    for block, slots in ((8, None), (8, 11), (16, 30)):
        same(generate(model, PROMPTS, block=block, slots=slots, cuda_graphs=False, **options), ref)
        sampler = Sampler(model, block=block, slots=slots)
        same(sampler.generate(PROMPTS, **options), ref)
        sizes |= {kind[0] for kind in sampler.kept.graphs}
    assert len(sizes) >= 3


@on_gpu
def test_graphs_see_weights_and_adapters_that_were_written_in_place():
    model = larger(torch.bfloat16)
    lora.apply(model, rank=8, alpha=16, targets=["q_proj", "v_proj", "down_proj"])
    options = dict(group_size=4, max_new_tokens=40, stop_ids=[3])
    sampler, held = Sampler(model, slots=24), []
    for _ in range(3):
        out = sampler.generate(PROMPTS, **options)
        held.append(sampler.kept)
        with torch.no_grad():
            logp, _, _ = model.completion_logprobs(PROMPTS, [out.group(b, 4) for b in range(6)])
        stored = torch.tensor(sum(out.logprobs, []))
        assert (logp.cpu() - stored).abs().max() < 0.1  # bf16: graphs of old weights would be off by nats
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * p.std().nan_to_num() * torch.randn_like(p))
    assert held[0] is held[1] is held[2]


@on_gpu
def test_a_call_that_finds_its_graphs_allocates_no_cache():
    model, options = larger(torch.bfloat16), dict(group_size=8, max_new_tokens=64, stop_ids=[])
    sampler = Sampler(model)
    sampler.generate(PROMPTS, **options)
    before = torch.cuda.memory_allocated()
    sampler.generate(PROMPTS, **options)
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
