"""kernels/flash_attention.py: the Triton kernels are their definitions in kernels/attention.py.

In Triton's interpreter on a CPU, compiled on a GPU: the same tests. The interpreter takes about a millisecond
an operation of a program, so shapes here are small and odd; large ones are marked gpu.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernels
import kernels.flash_attention as flash
from kernels.attention import attention_ref, decode_ref
from test_attention import table

triton = pytest.importorskip("triton")

# numpy's words for what the tests of extreme numbers do on purpose
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),
    pytest.mark.usefixtures("interpreter_without_two_faults"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = [torch.float32, torch.bfloat16]
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: minutes in the interpreter")


@pytest.fixture(autouse=True)
def triton_everywhere():
    kernels.use("triton")
    yield
    kernels.use("auto")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Whatever a kernel forgets to write is NaN: torch.empty and empty_like give NaN, and large integers."""

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else 10**6)

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def randn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * scale).to(dtype).to(DEVICE)


def near(ours, ref, dtype):
    """By norm, 1e-5 in fp32 and 2 % in bf16, and every element is finite."""
    ours, ref = ours.detach().double().cpu(), ref.detach().double().cpu()
    assert ours.shape == ref.shape and ours.isfinite().all()
    bound = 1e-5 if dtype == torch.float32 else 0.02
    off = (ours - ref).norm()
    assert off <= bound * (ref.norm() + 0.05), f"off by {(off / ref.norm()).item():.2e}"


# ---------------------------------------------------------------------------------------------- training
def check_attention(groups, H, K, E, dtype, scale=1.0):
    """Output and gradients are those of attention_ref in fp64."""
    segments, T = table(groups)
    # as in the model: q and k are parts of one tensor, v of another
    qk = randn(T, H + K, E, scale=scale, dtype=dtype)
    v = randn(T, K + 1, E, seed=1, dtype=dtype)[:, 1:]
    dout = randn(T, H, E, seed=2, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in (qk[:, :H], qk[:, H:], v)]
    inputs = [x.detach().requires_grad_() for x in (qk[:, :H], qk[:, H:], v)]
    ref = attention_ref(*exact, segments)
    tiles = flash.Tiles(segments, H // K, E=E, dtype=dtype, device=DEVICE)
    ours = flash.flash_attention(*inputs, tiles)
    near(ours, ref, dtype)
    ref_grads = torch.autograd.grad(ref, exact, dout.double())
    for a, b in zip(torch.autograd.grad(ours, inputs, dout), ref_grads):
        near(a, b, dtype)


@pytest.mark.parametrize("dtype", [LOW[0], pytest.param(LOW[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "H, K, E, groups",
    [
        (1, 1, 8, [(1, [])]),  # one token
        (4, 2, 16, [(37, [5, 40, 1]), (3, [])]),
        (7, 1, 16, [(20, [12, 0, 33])]),  # 7 heads a key: rows of the tile are left over
        (3, 3, 24, [(33, [9]), (2, [35])]),  # E is no power of two
    ],
)
def test_attention_is_its_definition_forward_and_backward(H, K, E, groups, dtype):
    check_attention(groups, H, K, E, dtype)


PROMPT_LENGTHS = st.sampled_from([1, 2, 13, 34])
OWN_LENGTHS = st.lists(st.sampled_from([0, 1, 7, 35]), max_size=3)
GROUPS = st.lists(st.tuples(PROMPT_LENGTHS, OWN_LENGTHS), min_size=1, max_size=2)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(GROUPS, st.sampled_from([1, 3]), st.sampled_from([1, 2]))
def test_attention_of_any_segments(groups, R, K):
    check_attention(groups, R * K, K, 8, torch.float32)


def test_attention_of_extreme_scores():
    check_attention([(20, [10, 3])], 2, 1, 16, torch.float32, scale=4.0)  # to +-200: weights are 0 and 1


def test_completions_that_are_scattered_are_refused():
    segments = [(0, 4, 0, 0), (4, 2, 0, 4), (6, 3, 6, 0), (9, 2, 0, 4)]
    with pytest.raises(ValueError, match="one after another"):
        flash.Tiles(segments, 1, E=8, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize(
    "segments", [[(0, 4, 0, 0), (4, 3, 4, 0), (7, 2, 0, 4)], [(2, 4, 2, 0), (0, 2, 2, 4)]]
)
def test_completions_that_do_not_follow_their_prompt_are_refused(segments):
    """Keys of a prompt are seen by one run of queries that begins with the prompt."""
    with pytest.raises(ValueError, match="right behind it"):
        flash.Tiles(segments, 1, E=8, dtype=torch.float32, device=DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "H, K, E, groups",
    [
        (2, 2, 8, [(37, [5, 90, 61]), (70, [])]),  # a prompt without completions is cut, too
        (7, 1, 24, [(3, [50]), (40, [9, 0, 1])]),
    ],
)
def test_gradients_of_keys_in_parts_are_those_of_the_definition(monkeypatch, H, K, E, groups, dtype):
    """About 40 rows a program: most tiles have several parts, and those at the end of a segment have one."""
    monkeypatch.setattr(flash, "PART_ROWS", 40)
    monkeypatch.setattr(flash, "PROGRAMS", 10**6)
    tiles = flash.Tiles(table(groups)[0], H // K, E=E, dtype=dtype, device=DEVICE)
    assert tiles.sums[:, 3].max() > 2 and (tiles.keys[:, 4] == -1).any()
    check_attention(groups, H, K, E, dtype)


@pytest.mark.slow
def test_the_order_of_parts_is_fixed(monkeypatch):
    """The same bits every time, where parts are added by another kernel."""
    monkeypatch.setattr(flash, "PART_ROWS", 50)
    monkeypatch.setattr(flash, "PROGRAMS", 10**6)
    segments, T = table([(9, [40])])
    inputs = [randn(T, heads, 8, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    tiles = flash.Tiles(segments, 2, E=8, dtype=torch.float32, device=DEVICE)
    assert tiles.parts > 1
    grads = []
    for _ in range(2):
        loss = flash.flash_attention(*inputs, tiles).square().sum()
        grads.append(torch.autograd.grad(loss, inputs))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.lists(st.integers(0, 900), max_size=6)), min_size=1, max_size=5
    ),
    st.sampled_from([1, 3, 7]),
)
def test_tables_hold_every_query_and_every_pair_of_key_and_query_once(groups, R):
    segments, T = table(groups)
    tiles = flash.Tiles(segments, R, E=64, dtype=torch.bfloat16, device="cpu")
    queries = sorted((start, start + n) for start, n, *_ in tiles.queries.tolist())
    keys, places = {}, []  # tile of keys -> the runs of queries of its parts
    for start, n, begin, end, place in tiles.keys.tolist():
        keys.setdefault((start, start + n), []).append((begin, end, place))
        assert 0 < end - begin <= flash.PART_ROWS / R + 64
    for runs in (queries, sorted(keys)):
        bounds = [0] + [end for _, end in runs]
        assert [begin for begin, _ in runs] == bounds[:-1] and bounds[-1] == T
    readers = {}  # a segment's last token -> where its readers end
    for start, length, prompt_start, prompt_length in segments:
        readers[start] = start + length
        if prompt_length:
            readers[prompt_start] = start + length
    sums = {start: (place, parts) for start, _, place, parts in tiles.sums.tolist()}
    for (start, _), parts in keys.items():
        parts.sort()
        segment = max(s for s, length, _, _ in segments if s <= start and length)
        assert [begin for begin, _, _ in parts] == [start] + [end for _, end, _ in parts[:-1]]
        assert parts[-1][1] == readers[segment]
        first, count = sums.get(start, (-1, 1))
        assert [place for _, _, place in parts] == ([-1] if count == 1 else list(range(first, first + count)))
        places += [place for _, _, place in parts if place >= 0]
    assert sorted(places) == list(range(tiles.parts))


def test_no_program_is_long_beside_the_load_of_a_processor():
    """A prompt's keys are seen by all of its completions: one program walked 4,000 queries where the mean
    processor of an H100 had 1,000, and the update waited for it."""
    segments, T = table([(128, [100, 400, 250, 300] * 4)] * 3)
    tiles = flash.Tiles(segments, 7, E=64, dtype=torch.bfloat16, device="cpu")
    walks = tiles.keys[:, 3] - tiles.keys[:, 2]
    load = 2 * walks.sum() / 132  # two key heads
    assert walks.max() < 0.7 * load
    assert (
        tiles.parts < 60
    )  # and few sums go through memory: of 24 KB a head where dk and dv of the tile have 16


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("H, K, E", [(9, 3, 64), (14, 2, 64), (28, 4, 128), (16, 16, 80)])
@pytest.mark.parametrize("dtype", LOW)
def test_attention_of_real_models(H, K, E, dtype):
    check_attention([(150, [200, 129, 0, 64, 1]), (1, [300]), (257, [])], H, K, E, dtype)
    segments, T = table([(150, [200, 129])])
    q, k, v = [randn(T, n, E, seed=n, dtype=dtype).requires_grad_() for n in (H, K, K + 50)]
    tiles = flash.Tiles(segments, H // K, E=E, dtype=dtype, device=DEVICE)
    grads = []
    for _ in range(2):
        loss = flash.flash_attention(q, k, v[:, :K], tiles).float().square().sum()
        grads.append(torch.autograd.grad(loss, (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*grads))  # to the bit: no atomics


# ---------------------------------------------------------------------------------------------- decoding
def cache(H, K, E, P, C, group, lengths, own, dtype):
    """Arguments of flash_decode. What the cache holds beyond the tokens of its rows is NaN."""
    n = len(own)
    q = randn(n, H, E, dtype=dtype)
    prompt_k, prompt_v = [randn(len(lengths), K, P, E, seed=i, dtype=dtype) for i in range(2)]
    own_k, own_v = [randn(n, K, C, E, seed=i, dtype=dtype) for i in range(2)]
    for x in (prompt_k, prompt_v):
        for b, length in enumerate(lengths):
            x[b, :, length:] = float("nan")
    for x in (own_k, own_v):
        for i in range(n):
            x[i, :, own[i] + 1 :] = float("nan")
    rows = [[i, 1, own[i], group[i] * K * P, lengths[group[i]], i * K * C] for i in range(n)]
    return q, prompt_k, prompt_v, own_k, own_v, torch.tensor(rows, device=DEVICE)


def in_fp64(q, prompt_k, prompt_v, own_k, own_v, rows):
    tensors = [x.double() for x in (q, prompt_k, prompt_v, own_k, own_v)]
    return decode_ref(*tensors, rows)


@pytest.mark.parametrize("dtype", LOW)
def test_decoding_reads_the_cache(dtype):
    """Rows of two groups at different lengths; what the cache holds beyond them must not be touched."""
    n, H, K, E, P, C = 5, 6, 2, 16, 40, 70
    group, lengths, own = [0, 0, 1, 1, 1], [40, 13], [0, 69, 3, 31, 64]
    args = cache(H, K, E, P, C, group, lengths, own, dtype)
    q, prompt_k, prompt_v, own_k, own_v, _ = args
    out = flash.flash_decode(*args)
    near(out, in_fp64(*args), dtype)
    for i in range(n):
        g, seen = group[i], own[i] + 1
        keys = torch.cat([prompt_k[g, :, : lengths[g]], own_k[i, :, :seen]], 1).double()
        values = torch.cat([prompt_v[g, :, : lengths[g]], own_v[i, :, :seen]], 1).double()
        scores = torch.einsum("krd,ktd->krt", q[i].double().view(K, H // K, E), keys) / E**0.5
        near(out[i], torch.einsum("krt,ktd->krd", scores.softmax(-1), values).reshape(H, E), dtype)


SPLIT = [(6, 16, LOW[0])]
for size in ((6, 16), (2, 24)):
    SPLIT.append(pytest.param(*size, LOW[1], marks=pytest.mark.slow))


@pytest.mark.parametrize("H, E, dtype", SPLIT)
def test_keys_of_a_row_are_split(monkeypatch, H, E, dtype):
    """Splits that end in the prompt and among the own keys, and rows so short that most splits are empty."""
    monkeypatch.setattr(flash, "KEYS_A_SPLIT", 32)
    args = cache(H, 2, E, 70, 154, [0, 0, 1], [70, 1], [90, 0, 153], dtype)
    assert flash.key_splits(3 * 2, 70 + 154) == 7
    out = flash.flash_decode(*args)
    near(out, in_fp64(*args), dtype)
    assert torch.equal(out, flash.flash_decode(*args))
    monkeypatch.setattr(flash, "FULL", 0)
    whole = flash.flash_decode(*args)
    near(out, whole, dtype)


def test_only_few_rows_and_long_contexts_are_split():
    assert flash.key_splits(2, 16_384) == 64  # one row of 2 key heads
    assert flash.key_splits(32, 8192) == 8
    assert flash.key_splits(96, 8192) == 2
    assert flash.key_splits(128, 100_000) == 1  # 64 rows of 2 key heads fill the GPU
    assert flash.key_splits(2, 511) == 1
    assert flash.key_splits(1, 10**6) == 64


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("H, K, E", [(14, 2, 64), (28, 4, 128)])
def test_long_contexts_of_real_models(H, K, E):
    args = cache(H, K, E, 3000, 5000, [0, 1, 1], [3000, 17], [4999, 0, 1234], torch.bfloat16)
    assert flash.key_splits(3 * K, 8000) > 8
    near(flash.flash_decode(*args), in_fp64(*args), torch.bfloat16)
