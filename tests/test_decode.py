"""decode.py: blocks of steps on static buffers draw what a look after every token draws. Graphs are recorded here as on a GPU, by hand; real ones are marked gpu."""
import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import decode
import lora
import model as models
import rollout
from conftest import TINY
from decode import Blocks
from kernels.attention import decode_ref
from rollout import generate

PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [30, 31], [11, 12, 13, 14], [5, 5]]
OPTIONS = dict(group_size=3, max_new_tokens=13, stop_ids=[4, 17, 9], seed=5, step=2, entropy=True)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Batches of a handful of rows shrink through several graphs, as 256 rows do."""
    monkeypatch.setattr(decode, "SIZES", (1, 2, 4, 8))


class Recorded(TorchDispatchMode):
    """A CUDA graph without CUDA: notes every operation with its tensors; replay does the same operations on the same memory, whatever Python knows by then."""

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
            for was, now in zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (out, op(*args, **kwargs)))):
                if torch.is_tensor(was) and was.data_ptr() != now.data_ptr():  # else a view, or in place
                    was.copy_(now)


@pytest.fixture
def recorded(monkeypatch):
    """Every Blocks records its steps and replays them, as on a GPU."""
    def capture(self, model, size, choose):
        before = [x.clone() for x in (self.token, self.own, self.done, self.number)]
        with Recorded() as graph:
            self.step(model, size, choose)
        for x, was in zip((self.token, self.own, self.done, self.number), before):
            x.copy_(was)
        captures.append(size)
        return graph

    def begin(self, *, graphs, **kwargs):
        ordinary(self, graphs=graphs, **kwargs)
        self.use_graphs = graphs
    captures, ordinary = [], Blocks.begin
    monkeypatch.setattr(Blocks, "capture", capture)
    monkeypatch.setattr(Blocks, "begin", begin)
    return captures


def same(out, ref):
    """Ids, stop reasons and what follows from them are equal; log-probabilities and entropies to rounding."""
    assert out.ids == ref.ids and out.stopped == ref.stopped
    for ours, theirs in ((out.logprobs, ref.logprobs), (out.entropies, ref.entropies)):
        assert [len(x) for x in ours] == [len(x) for x in theirs]
        assert all(abs(a - b) < 2e-5 for x, y in zip(ours, theirs) for a, b in zip(x, y))
    assert all(out.stats[name] == ref.stats[name] for name in ("tokens", "useful_slot_steps"))
    assert out.stats["slot_steps"] >= out.stats["useful_slot_steps"]


# ---------------------------------------------------------------------------------------------------- the same draws
@pytest.mark.parametrize("policy", [dict(), dict(temperature=0.0), dict(temperature=1.3, top_k=9, top_p=0.9, min_p=0.01)], ids=str)
def test_a_block_of_any_size_draws_what_a_look_after_every_token_draws(tiny, policy):
    ref = generate(tiny, PROMPTS, **OPTIONS, **policy)
    assert len({len(ids) for ids in ref.ids}) > 3 and any(ref.stopped) or policy.get("temperature") == 0
    for block, slots in ((1, 4), (3, None), (5, 3), (8, 5), (16, 2)):
        same(generate(tiny, PROMPTS, block=block, slots=slots, **OPTIONS, **policy), ref)


@pytest.mark.parametrize("block", [1, 3, 8])
def test_every_order_of_lengths_through_few_slots(tiny, block):
    """Slots are freed in every order while the next block runs: rows and groups move, slots are refilled, the batch shrinks."""
    whole = generate(tiny, PROMPTS[:3], group_size=2, max_new_tokens=7, stop_ids=[])
    for lengths in itertools.islice(itertools.product((1, 3, 7), repeat=6), 0, 729, 83):
        for slots in (2, 3, 5):
            sampler = rollout.Sampler(tiny, PROMPTS[:3], 2, list(lengths), [], (1.0, 0, 1.0, 0.0), slots, (0, 0, range(3)), "", block=block)
            assert sampler.run().ids == [ids[:n] for ids, n in zip(whole.ids, lengths)], (lengths, slots)


def test_the_context_ends_inside_a_block(tiny):
    prompts = [[1] * 62, [1, 2], [3] * 63]
    ref = generate(tiny, prompts, group_size=2, max_new_tokens=9, stop_ids=[40])
    same(generate(tiny, prompts, group_size=2, max_new_tokens=9, stop_ids=[40, 10**6], slots=3, block=8), ref)  # a stop id that the model does not have


def test_groups_are_handed_over_once_and_whole(tiny):
    calls = {}
    out = generate(tiny, PROMPTS, block=4, slots=5, on_group=lambda b, ids: calls.setdefault(b, []).append([list(x) for x in ids]), **OPTIONS)
    assert calls == {b: [out.group(b, 3)] for b in range(6)}


@pytest.mark.parametrize("block", [1, 4])
def test_a_broken_model_ends_in_a_sentence_and_the_next_call_is_unharmed(tiny, block):
    ref, weight = generate(tiny, PROMPTS, **OPTIONS), tiny.norm.weight.data[3].item()
    for _ in range(2):
        same(generate(tiny, PROMPTS, block=block, slots=4, **OPTIONS), ref)
        tiny.norm.weight.data[3] = float("nan")
        with pytest.raises(FloatingPointError, match="not finite"):
            generate(tiny, PROMPTS, block=block, slots=4, **OPTIONS)
        tiny.norm.weight.data[3] = weight


def test_a_call_that_broke_off_in_a_block_is_forgotten(tiny):
    ref = generate(tiny, PROMPTS, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny, PROMPTS, block=4, slots=4, on_group=interrupt, **OPTIONS)
    same(generate(tiny, PROMPTS, block=4, slots=4, **OPTIONS), ref)


def interrupt(b, ids):
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------------- waste
def counted(monkeypatch):
    """Rows of every step that ran, and how often the host looked."""
    steps, looks, step, read = [], [], Blocks.step, Blocks.read
    monkeypatch.setattr(Blocks, "step", lambda self, model, n, choose: (steps.append(n), step(self, model, n, choose))[1])
    monkeypatch.setattr(Blocks, "read", lambda self, *args: (looks.append(args), read(self, *args))[1])
    return steps, looks


def test_wasted_steps_are_counted(tiny, monkeypatch):
    steps, _ = counted(monkeypatch)
    for slots in (None, 4):
        for block in (1, 4, 16):
            steps.clear()
            out = generate(tiny, PROMPTS, block=block, slots=slots, **OPTIONS)
            if slots is None:  # nobody waits: what ran is what is counted
                assert out.stats["slot_steps"] == sum(steps) > out.stats["useful_slot_steps"]
            assert out.stats["slot_steps"] >= sum(steps)


def test_no_step_is_run_beyond_the_limit_and_the_host_looks_once_a_block(tiny, monkeypatch):
    steps, looks = counted(monkeypatch)
    out = generate(tiny, PROMPTS[:4], group_size=2, max_new_tokens=33, stop_ids=[], block=8)
    assert len(steps) == 32 and len(looks) == 4 and out.stats["slot_steps"] == out.stats["useful_slot_steps"]
    steps.clear()
    generate(tiny, PROMPTS[:4], group_size=2, max_new_tokens=30, stop_ids=[], block=8)
    assert len(steps) == 29


def test_a_finished_row_and_an_empty_slot_write_inside_their_slot(tiny):
    """Slot 0 may draw 3 tokens, slot 1 as many as fit, slots 2 and 3 are empty, of which one is computed beside them."""
    blocks = Blocks(tiny, groups=1, slots=4, prompt_tokens=2, new_tokens=5, block=9)
    blocks.begin(slots=3, stop_ids=[], graphs=False)
    blocks.batches = [3]
    two = torch.tensor([0, 1])
    blocks.enter(two, two, torch.tensor([2, 2]), torch.tensor([3, 6]), torch.zeros(2, 6, dtype=torch.long))
    blocks.compose([0, 0])
    with torch.no_grad():
        blocks.launch(tiny, 2, 9, lambda hidden, key: (key + 1, hidden[:, 0], None), ())
    assert blocks.own.tolist() == [1, 4, 0, 0] and blocks.done.tolist() == [True, True, True, True]
    written = (blocks.cache.own_k != 0).any(4).any(2).any(0)  # (slots, C)
    assert written.sum(1).tolist() == [2, 5, 1, 0] and written[:, 0].tolist() == [True, True, True, False]


def test_decoding_from_the_cache_is_its_definition():
    """Rows of two groups; what the cache holds beyond them is NaN."""
    n, H, K, E, P, C = 4, 6, 2, 8, 9, 7
    group, lengths, own, kw = [0, 1, 1, 0], [9, 4], [0, 6, 3, 2], dict(dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, pk, pv, ok, ov = (torch.randn(*shape, **kw) for shape in ((n, H, E), (2, K, P, E), (2, K, P, E), (n, K, C, E), (n, K, C, E)))
    for x in (pk, pv):
        x[1, :, 4:] = float("nan")
    for x in (ok, ov):
        for i in range(n):
            x[i, :, own[i] + 1 :] = float("nan")
    out = decode_ref(q, pk, pv, ok, ov, torch.tensor([[i, 1, own[i], group[i] * K * P, lengths[group[i]], i * K * C] for i in range(n)]))
    for i in range(n):
        keys, values = (torch.cat([a[group[i], :, : lengths[group[i]]], b[i, :, : own[i] + 1]], 1) for a, b in ((pk, ok), (pv, ov)))
        w = torch.einsum("krd,ktd->krt", q[i].view(K, H // K, E), keys).div(E**0.5).softmax(-1)
        torch.testing.assert_close(out[i], torch.einsum("krt,ktd->krd", w, values).reshape(H, E))


# ------------------------------------------------------------------------------------------------------------ graphs
@pytest.mark.parametrize("policy", [dict(), dict(temperature=0.0), dict(temperature=0.8, top_k=9, top_p=0.9)], ids=str)
def test_a_recorded_step_is_the_step(tiny, recorded, policy):
    """Over refills, moves, shrinking and a second call: nothing that the host knows is in the recording."""
    for seed in (1, 2):
        options = {**OPTIONS, **policy, "seed": seed}
        ref = generate(tiny, PROMPTS, **options)
        same(generate(tiny, PROMPTS, block=4, slots=5, **options), ref)
        same(generate(tiny, PROMPTS[::-1], prompt_numbers=[5, 4, 3, 2, 1, 0], block=4, slots=5, **{**options, "stop_ids": [1]}),
             generate(tiny, PROMPTS[::-1], prompt_numbers=[5, 4, 3, 2, 1, 0], **{**options, "stop_ids": [1]}))
    assert len(recorded) == len(set(recorded)) > 1, "a step of some size was recorded twice"


def test_weights_written_in_place_are_seen_by_what_was_recorded(tiny, recorded):
    lora.apply(tiny, rank=4, alpha=8, targets=["q_proj", "down_proj"])
    outs = []
    for round in range(3):
        ref = generate(tiny, PROMPTS, **OPTIONS)
        same(generate(tiny, PROMPTS, block=4, **OPTIONS), ref)
        count = len(recorded) if not round else count
        outs.append(ref.ids)
        with torch.no_grad():
            for p in tiny.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(round)) * 0.05)
    assert outs[0] != outs[1] != outs[2] and len(recorded) == count
    for layer in lora.layers(tiny).values():  # another function of the same weights
        layer.enabled = False
    same(generate(tiny, PROMPTS, block=4, **OPTIONS), generate(tiny, PROMPTS, **OPTIONS))
    assert len(recorded) > count


def test_buffers_are_kept_with_the_model_and_grow(tiny):
    options = dict(group_size=2, stop_ids=[], block=4)
    generate(tiny, PROMPTS, max_new_tokens=9, slots=4, **options)
    first = tiny.decode_graphs
    generate(tiny, PROMPTS[:2], max_new_tokens=5, slots=3, **options)
    assert tiny.decode_graphs is first
    generate(tiny, PROMPTS, max_new_tokens=20, slots=2, **options)
    second = tiny.decode_graphs
    assert second is not first and second.cache.C == 19 and second.slots == 4
    generate(tiny, PROMPTS, max_new_tokens=9, slots=4, **options)
    assert tiny.decode_graphs is second, "calls of two sizes take turns without building anything"
    assert copy.deepcopy(tiny).decode_graphs is None
    ref = generate(tiny, PROMPTS, max_new_tokens=9, slots=4, cuda_graphs=False, **options)
    assert tiny.decode_graphs is None
    generate(tiny, PROMPTS, max_new_tokens=9, **options)
    before = tiny.decode_graphs
    tiny.norm.weight.data = tiny.norm.weight.data.clone()  # a weight that moved
    assert generate(tiny, PROMPTS, max_new_tokens=9, **options).ids == ref.ids and tiny.decode_graphs is not before


def test_fewer_slots_where_memory_is_short_are_not_tried_again(tiny, monkeypatch, capsys):
    ref = generate(tiny, PROMPTS, **OPTIONS)
    monkeypatch.setattr(rollout, "free_bytes", lambda device: 200_000)
    runs = [generate(tiny, PROMPTS, block=4, **OPTIONS) for _ in range(2)]
    assert runs[0].stats["slots"] == runs[1].stats["slots"] < 18 and capsys.readouterr().out.count("rows at once") == 2  # one line says it twice
    for out in runs:
        same(out, ref)


# --------------------------------------------------------------------------------------------------------- on a GPU
def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def larger(dtype):
    config = dict(TINY, model_type="qwen2", vocab_size=1000, hidden_size=256, intermediate_size=512, max_position_embeddings=512, initializer_range=0.08)
    return models.create(config, seed=0, dtype=dtype, device="cuda")


@on_gpu
@pytest.mark.parametrize("policy", [dict(), dict(temperature=0.0), dict(temperature=0.9, top_k=50, top_p=0.95)], ids=str)
def test_graphs_draw_what_launches_draw(policy):
    """fp32: the graph of another size may round otherwise, which no draw here may notice."""
    model = larger(torch.float32)
    options = dict(group_size=8, max_new_tokens=70, stop_ids=list(range(20)), entropy=True, **policy)
    ref = generate(model, PROMPTS, cuda_graphs=False, block=1, **options)
    for block, slots in ((8, None), (8, 11), (16, 30)):
        same(generate(model, PROMPTS, block=block, slots=slots, cuda_graphs=False, **options), ref)
        same(generate(model, PROMPTS, block=block, slots=slots, **options), ref)
    assert len(model.decode_graphs.graphs) >= 3


@on_gpu
def test_graphs_see_weights_and_adapters_that_were_written_in_place():
    model = larger(torch.bfloat16)
    lora.apply(model, rank=8, alpha=16, targets=["q_proj", "v_proj", "down_proj"])
    options = dict(group_size=4, max_new_tokens=40, stop_ids=[3], slots=24)
    for round in range(3):
        out = generate(model, PROMPTS, **options)
        held = model.decode_graphs
        with torch.no_grad():
            logp, _, _ = model.completion_logprobs(PROMPTS, [out.group(b, 4) for b in range(6)])
        assert (logp.cpu() - torch.tensor(sum(out.logprobs, []))).abs().max() < 0.1  # bf16: graphs of old weights would be off by nats
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * p.std().nan_to_num() * torch.randn_like(p))
    assert held is model.decode_graphs and len(held.graphs) <= 2


@on_gpu
def test_a_call_that_finds_its_graphs_allocates_no_cache():
    model, options = larger(torch.bfloat16), dict(group_size=8, max_new_tokens=64, stop_ids=[])
    generate(model, PROMPTS, **options)
    before = torch.cuda.memory_allocated()
    generate(model, PROMPTS, **options)
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
