"""kernels/*.py: every Triton kernel is its definition, in Triton's interpreter on a CPU, compiled on a GPU.

conftest.py sets TRITON_INTERPRET before anything imports Triton, unless there is a GPU. The interpreter takes
about a millisecond an operation of a program, so shapes here are small and odd; large ones are marked gpu.
"""

import ast
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import kernels
import kernels.flash_attention as A
import kernels.linear_logprob as S
import kernels.logprob as L
import kernels.lora_linear as K
import kernels.nf4 as Q
import kernels.rms_norm as N
import kernels.rope as P
import kernels.sample as D
import kernels.swiglu as U
import lora
import loss as losses
import nf4
import optim
import policy
import rollout

triton = pytest.importorskip("triton")

pytestmark = [
    # numpy's words for what the tests of extreme numbers do on purpose
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),
    pytest.mark.usefixtures("interpreter_without_two_faults"),
]
ROOT = Path(rollout.__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = [torch.float32, torch.bfloat16]
SLOW = partial(pytest.param, marks=pytest.mark.slow)  # a case that a faster one covers as well
quick = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def on_gpu(test):
    """For shapes that take the interpreter minutes."""
    skip = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: minutes in the interpreter")
    return pytest.mark.gpu(skip(test))


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
            large = 255 if out.dtype == torch.uint8 else 10**6
            return out.fill_(float("nan") if out.is_floating_point() else large)

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def randn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * scale).to(dtype).to(DEVICE)


def near(ours, ref, dtype, exact=1e-5, rounded=0.02):
    """By norm, with every element finite where the definition's is; exact for fp32, rounded for bf16."""
    ours, ref = ours.detach().double().cpu(), ref.detach().double().cpu()
    assert ours.shape == ref.shape and ours.isfinite().all()
    bound = exact if dtype == torch.float32 else rounded
    error = (ours - ref).norm()
    assert error <= bound * (ref.norm() + 0.05), f"off by {(error / ref.norm()).item():.2e}"


def leaf(x, dtype=None):
    return x.detach().to(dtype or x.dtype).clone().requires_grad_()


# ---------------------------------------------------------------------------------------------- logprob
def rows_by_hand(z, y, dlogp, dentropy, scale):
    """logp, lse, entropy and the gradient by the logits of dlogp . logp + dentropy . entropy: fp64
    autograd.
    """
    z = leaf(z, torch.float64)
    q = (z * scale).log_softmax(-1)
    logp = q.gather(1, y[:, None])[:, 0]
    entropy = -(q.exp() * q.masked_fill(q.exp() == 0, 0.0)).sum(-1)
    loss = (logp * 0).sum()
    if dlogp is not None:
        loss = loss + (logp * dlogp.double()).sum()
    if dentropy is not None:
        loss = loss + (entropy * dentropy.double()).sum()
    (dz,) = torch.autograd.grad(loss, z)
    return logp, (z * scale).logsumexp(-1), entropy, dz


@pytest.mark.parametrize(
    "m, V, scale, uses",
    [
        (1, 1, 1.0, "logp"),
        (3, 5, 2.0, "entropy"),
        (5, 129, 0.5, "both"),
        (2, 4097, 1.0, "both"),
        (3, 4097, 1.0, "entropy"),
        SLOW(2, 49_152, 1.0, "logp"),
        SLOW(2, 151_936, 1.25, "both"),
    ],
)
def test_row_kernel_is_autograd_on_the_logits(m, V, scale, uses):
    z = randn(m, V, scale=3.0)
    y = torch.randint(0, V, (m,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    dlogp = None if uses == "entropy" else randn(m, seed=2)
    dentropy = None if uses == "logp" else randn(m, seed=3)
    refs = rows_by_hand(z, y, dlogp, dentropy, scale)
    for dtype in LOW:
        logp, lse, entropy = (torch.empty(m, device=DEVICE) for _ in range(3))
        work = z.clone()
        dz = work if dtype == torch.float32 else torch.empty_like(z, dtype=dtype)  # in place, and beside
        L.row_pass(work, dz, y, logp, lse, entropy, dlogp, dentropy, scale, 1 / scale, stats=True)
        for ours, ref, as_ in zip((logp, lse, entropy, dz), refs, (torch.float32,) * 3 + (dtype,)):
            near(ours, ref, as_, exact=1e-5, rounded=5e-3)
        again = torch.empty_like(z)  # the backward's call: lse and entropy are given
        L.row_pass(z, again, y, None, lse, entropy, dlogp, dentropy, scale, 1 / scale, stats=False)
        near(again, refs[3], torch.float32)


def test_row_kernel_at_extreme_logits():
    """+-1e4, -inf outside the kept set, a whole leading tile at -inf, numbers whose differences overflow.

    And what is not finite stays so.
    """
    inf, V = float("inf"), 4100
    z = torch.full((7, V), -inf)
    z[0, :3] = torch.tensor([1e4, -1e4, 0.0])
    z[1] = torch.linspace(-1e4, 1e4, V)
    z[2, 4097:] = torch.tensor([1.0, 2.0, 3.0])  # the first tile of 4,096 words is empty
    z[3, 4099] = 7.0
    z[4] = -3e38
    z[5, :2] = -3e38
    z[5, 4098] = 3e38
    z[6] = 0.0
    z = z.to(DEVICE)
    y = torch.tensor([0, 17, 4098, 4099, 3, 4098, 5], device=DEVICE)
    ones = torch.ones(7, device=DEVICE)
    logp, lse, entropy = (torch.empty(7, device=DEVICE) for _ in range(3))
    dz = torch.empty_like(z)
    L.row_pass(z, dz, y, logp, lse, entropy, ones, ones, 1.0, 1.0, stats=True)
    q = z.double().log_softmax(-1)
    by_hand = -(q.exp() * q.clamp(min=-1e300)).sum(-1)
    torch.testing.assert_close(logp.double(), q.gather(1, y[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), by_hand, rtol=1e-5, atol=1e-5)
    assert dz.isfinite().all() and (dz[z == -inf] == 0).all()
    z[0, 0] = float("nan")
    z[1, 0] = inf
    z[2] = -inf
    L.row_pass(z, None, y, logp, lse, entropy, None, None, 1.0, 1.0, stats=True)
    assert logp.isnan().tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("M, D, V", [(1, 16, 3), (5, 40, 131), (67, 24, 300), (3, 70, 1000)])
def test_linear_kernel_makes_the_same_without_logits(M, D, V, dtype):
    hidden, weight = randn(M, D, dtype=dtype), randn(V, D, seed=1, dtype=dtype)
    y = torch.randint(0, V, (M,)).to(DEVICE)
    ours = S.linear_logprob(hidden, weight, y, temperature=0.7)
    refs = S.linear_logprob_ref(hidden.double(), weight.double(), y, temperature=0.7)
    for a, b in zip(ours, refs):
        near(a, b, torch.float32, exact=1e-5)


def test_linear_kernel_at_extreme_logits_and_no_rows():
    weight = torch.tensor([[1.0], [0.0], [-1.0], [0.9]], device=DEVICE)
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], device=DEVICE)
    y = torch.tensor([2, 2, 1], device=DEVICE)
    refs = S.linear_logprob_ref(hidden.double(), weight.double(), y)
    for ours, ref in zip(S.linear_logprob(hidden, weight, y), refs):
        torch.testing.assert_close(ours.double(), ref, rtol=1e-6, atol=1e-6)
    assert [x.shape for x in S.linear_logprob(hidden[:0], weight, y[:0])] == [(0,), (0,)]
    hidden[1] = float("nan")
    assert S.linear_logprob(hidden, weight, y)[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("learns", [(True, True), SLOW((True, False)), SLOW((False, True))])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(temperature=0.6), dict(top_k=9, top_p=0.9, min_p=0.01, temperature=1.3)],
    ids=str,
)
def test_logprob_and_its_gradients(monkeypatch, dtype, learns, options):
    hidden, weight = randn(13, 24, dtype=dtype), randn(75, 24, seed=1, dtype=dtype, scale=0.4)
    y = torch.randint(0, 75, (13,)).to(DEVICE)
    monkeypatch.setattr(L, "CHUNK_BYTES", 4 * 4 * 75)
    for uses in ("logp", "both"):
        results = []
        for function, cast in ((L.logprob, dtype), (L.logprob_ref, torch.float64)):
            inputs = [leaf(x, cast).requires_grad_(g) for x, g in zip((hidden, weight), learns)]
            logp, entropy = function(*inputs, y, **options)
            loss = (logp * randn(13, seed=4)).sum()
            if uses == "both":
                loss = loss + (entropy * randn(13, seed=5)).sum()
            grads = torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])
            results.append([logp, entropy, *grads])
        for i, (ours, ref) in enumerate(zip(*results)):
            near(ours, ref, torch.float32 if i < 2 else dtype)


@on_gpu
@pytest.mark.parametrize("M, D, V", [(257, 896, 151_936), (1000, 576, 49_152), (33, 1536, 50_001)])
def test_log_probabilities_at_real_shapes(M, D, V):
    hidden = randn(M, D, dtype=torch.bfloat16)
    weight = randn(V, D, seed=1, dtype=torch.bfloat16, scale=0.05)
    y = torch.randint(0, V, (M,)).to(DEVICE)
    refs = L.logprob_ref(hidden.double(), weight.double(), y)
    for ours, ref in zip(S.linear_logprob(hidden, weight, y), refs):
        near(ours, ref, torch.float32)
    grads = []
    for function, cast in ((L.logprob, torch.bfloat16), (L.logprob_ref, torch.float64)):
        for learns in (False, True):
            h, w = leaf(hidden, cast), leaf(weight, cast).requires_grad_(learns)
            logp, entropy = function(h, w, y)
            loss = (logp * randn(M, seed=4)).sum()
            if learns:
                loss = loss + entropy.sum()
            loss.backward()
            grads.append([x.grad for x in (h, w) if x.grad is not None])
    for a, b in zip(grads[0] + grads[1], grads[2] + grads[3]):
        near(a, b, torch.bfloat16)


# ------------------------------------------------------------------------ norm, rotation, SwiGLU, LoRA
def check(ours, ref, inputs, dtype, exact=2e-6):
    """Values and gradients of ours(*inputs), in dtype, against ref's in fp64. Results may be tuples."""
    results = []
    for function, cast in ((ours, dtype), (ref, torch.float64)):
        leaves = [leaf(x.to(dtype), cast) for x in inputs]
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        ups = [randn(*y.shape, seed=9 + i, dtype=torch.float64) for i, y in enumerate(out)]
        loss = sum((y.double() * up).sum() for y, up in zip(out, ups))
        results.append([*out, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results):
        assert a.dtype == dtype
        near(a, b, dtype, exact=exact)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 64), (5, 130), (0, 8)])
def test_rms_norm_with_and_without_residual(shape, dtype):
    eps = 1e-5
    x, delta, weight = randn(*shape), randn(*shape, seed=1), 1 + 0.3 * randn(shape[-1], seed=2)
    check(
        lambda x, w: N.rms_norm(x, w, eps),
        lambda x, w: N.rms_norm_ref(x, w, eps),
        [x, weight],
        dtype,
    )
    check(
        lambda x, d, w: N.add_rms_norm(x, d, w, eps),
        lambda x, d, w: (x + d, N.rms_norm_ref(x + d, w, eps)),
        [x, delta, weight],
        dtype,
    )
    frozen = weight.to(dtype)
    check(  # the sum unused
        lambda x, d: N.add_rms_norm(x, d, frozen, eps)[1],
        lambda x, d: N.rms_norm_ref(x + d, frozen.double(), eps),
        [x, delta],
        dtype,
    )
    check(  # the norm unused
        lambda x, d: N.add_rms_norm(x, d, frozen, eps)[0],
        lambda x, d: x + d,
        [x, delta],
        dtype,
    )
    if x.numel():
        big = leaf(x * 1e15)  # squares up to 1e30, cubes out of range
        N.rms_norm(big, weight, eps).sum().backward()
        assert big.grad.isfinite().all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 3, 2050), (0, 8)])
def test_swiglu(shape, dtype):
    check(U.swiglu, U.swiglu_ref, [randn(*shape, scale=2.0)], dtype)
    assert U.swiglu(torch.tensor([[-1e4, 1e4, 1.0, 1.0]], device=DEVICE)).tolist() == [[0.0, 1e4]]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("T, heads, E", [(1, 1, 2), (5, 3, 8), (3, 16, 24), (0, 2, 4)])
def test_rotation(T, heads, E, dtype):
    angles = randn(T, 1, E // 2, scale=9.0)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    check(
        lambda x: P.rotate(x[:, 1:], cos, sin),
        lambda x: P.rotate_ref(x[:, 1:], cos.double(), sin.double()),
        [randn(T, heads + 1, E)],
        dtype,
    )


@pytest.mark.parametrize("H, K, E", [(4, 3, 8), (1, 1, 2), (7, 1, 24)])
def test_rotated_keys_and_values_go_where_they_belong_and_nowhere_else(H, K, E):
    heads = randn(4, H + 2 * K, E)
    qk, v = heads.split([H + K, K], 1)
    angles = randn(4, 1, E // 2, scale=9.0)
    turn = angles.cos(), angles.sin()
    caches = [randn(5, K, 7, E, seed=i) for i in (1, 2)]
    places, want = torch.tensor([0, 6, 2, 2], device=DEVICE), [c.clone() for c in caches]
    q = P.rotate_into_cache(qk, v, *turn, *caches, places)
    kernels.use("torch")
    near(q, P.rotate_into_cache(qk, v, *turn, *want, places), torch.float32)
    for ours, ref in zip(caches, want):
        near(ours, ref, torch.float32)
    assert torch.equal(caches[1][1, :, 6], v[1])


LORA_SHAPES = [(1, 8, [5], 1), (33, 70, [130, 7], 5), (3, 64, [16], 16)]  # T, D, rows of each adapter, rank


class Frozen:
    """A frozen layer: what the LoRA kernels read of one."""

    def __init__(self, weight, bias=None):
        self.weight, self.bias = weight, bias

    def __call__(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


def adapters(D, sizes, r):
    """rows, A (K r, D) and the B's (rows, r), fp32; the first adapter begins at row 0."""
    rows = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    A = randn(len(sizes) * r, D, seed=1)
    return rows, A, [randn(n, r, seed=5 + i) for i, n in enumerate(sizes)]


def values_and_gradients(function, leaves, N):
    y = function(*leaves)
    loss = (y.double() * randn(len(y), N, seed=8, dtype=torch.float64)).sum()
    return [y, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("T, D, sizes, r", LORA_SHAPES)
@pytest.mark.parametrize("dropout", [False, True])
def test_lora_linear(T, D, sizes, r, dropout, dtype):
    N = sum(sizes) + 3  # the last rows have no adapter
    weight, x = randn(N, D, seed=3, dtype=dtype), randn(T, D, dtype=dtype)
    mask = (randn(T, D, seed=4) > 0).to(dtype) * 2 if dropout else None
    exact_mask = mask.double() if dropout else None
    rows, A, B = adapters(D, sizes, r)

    def ours(x, A, *B):
        return K.lora_linear(x, mask, Frozen(weight), 0.7, rows, A, *B)

    def ref(x, A, *B):
        return K.lora_linear_ref(x, exact_mask, Frozen(weight.double()), 0.7, rows, A, *B)

    got = values_and_gradients(ours, [leaf(t) for t in (x, A, *B)], N)  # adapters are fp32 beside bf16
    want = values_and_gradients(ref, [leaf(t, torch.float64) for t in (x, A, *B)], N)
    for a, b in zip(got, want):
        near(a, b, dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("T, D, sizes, r", [*LORA_SHAPES, (0, 8, [5], 2)])
def test_merged_linear(T, D, sizes, r, dtype):
    """Values and gradients of A, B and x are those of the unrounded sum, to the rounding of W'."""
    N = sum(sizes) + 3
    weight, bias = randn(N, D, seed=3, dtype=dtype), randn(N, seed=6, dtype=dtype)
    x = randn(T, D, dtype=dtype)
    rows, A, B = adapters(D, sizes, r)
    merged = weight.double()
    for where, Ak, Bk in zip(rows, A.double().split(r), B):
        merged[where] += 0.7 * (Bk.double() @ Ak)
    merged = merged.to(dtype)

    def ours(x, A, *B):
        return K.merged_linear(x, Frozen(weight, bias), merged, 0.7, rows, A, *B)

    def ref(x, A, *B):
        return K.merged_linear_ref(x, Frozen(weight.double(), bias.double()), 0.7, rows, A, *B)

    def beside(x, A, *B):
        return K.lora_linear(x, None, Frozen(weight, bias), 0.7, rows, A, *B)

    got = values_and_gradients(ours, [leaf(t) for t in (x, A, *B)], N)
    want = values_and_gradients(ref, [leaf(t, torch.float64) for t in (x, A, *B)], N)
    same = values_and_gradients(beside, [leaf(t) for t in (x, A, *B)], N)
    for a, b, c, t in zip(got, want, same, (x, x, A, *B)):
        near(a, b, dtype)
        near(a, c, dtype)
        assert a.dtype == c.dtype == t.dtype


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("n", [1, 64, 127, 4097, 64 * 300 + 5])
def test_nf4_expands_to_the_bits_of_its_definition(n, dtype):
    """One and several programs, blocks and blocks of blocks that end early, 8-bit and fp32 scales."""
    blocks = -(-n // 64)
    g = torch.Generator().manual_seed(n)
    packed = torch.randint(0, 256, (-(-n // 2),), generator=g, dtype=torch.uint8).to(DEVICE)
    absmax = torch.randint(0, 256, (blocks,), generator=g, dtype=torch.uint8).to(DEVICE)
    code = randn(256).sort().values
    twice = absmax, randn(-(-blocks // 256), seed=1), code, randn(1, seed=2)[0]
    for scales in (twice, (randn(blocks), None, None, None)):
        want = Q.expand_ref(packed, *scales, n)
        if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts off where a GPU rounds
            want = (want.view(torch.int32) >> 16 << 16).view(torch.float32)
        want = want.to(dtype)
        room = randn(n + 2, dtype=dtype)
        before = room.clone()
        Q.expand(packed, *scales, room[1:-1])
        assert torch.equal(room[1:-1], want)
        assert room[0] == before[0] and room[-1] == before[-1]


NOTHING_FUSED = """
import re, sys
sys.path.insert(0, "bench")
import compile_check as check
check.switch.MODE = "triton"
for fn, name, args, kwargs in list(check.launches(90, "NF4")):
    types, constants, attrs = check.signature(fn, args, kwargs)
    for fuse in (True, kwargs["enable_fp_fusion"]):
        source = check.ASTSource(fn, types, constants, attrs)
        target = check.GPUTarget("cuda", 90, 32)
        kernel = check.triton.compile(source, target=target, options=dict(enable_fp_fusion=fuse))
        print("fma" if "fma" in kernel.asm["ptx"] else "apart", end=" ")
"""


@pytest.mark.slow
def test_nf4_on_a_gpu_fuses_no_multiplication_with_an_addition():
    """Fused, scales would not be bitsandbytes' to the bit. The interpreter never fuses, so it cannot tell."""
    out = subprocess.run([sys.executable, "-c", NOTHING_FUSED], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.split() == ["fma", "apart", "apart", "apart"] * 3, out.stdout + out.stderr


def test_a_model_in_4_bits_computes_with_the_kernel_what_it_does_with_torch(tiny):
    model = nf4.quantise_model(tiny.to(DEVICE))
    ours = [layer.dense().clone() for layer in nf4.layers(model).values()]
    kernels.use("torch")
    assert all(torch.equal(a, layer.dense()) for a, layer in zip(ours, nf4.layers(model).values()))


@pytest.mark.parametrize("mode, words", [("fast", "unknown"), ("Triton", "unknown")])
def test_a_mode_that_does_not_exist_is_refused(mode, words):
    with pytest.raises(ValueError, match=words):
        kernels.use(mode)


def test_one_switch_reaches_every_kernel_file():
    """A file with a mode of its own that kernels.use does not know would stay on its own."""
    own = {p.stem for p in (ROOT / "kernels").glob("*.py") if "\nMODE = " in p.read_text()}
    assert own == {"switch"}
    files, x = (A, D, K, L, N, P, S, U), torch.zeros(1, device=DEVICE)
    assert all(file.on_triton(x) for file in files)
    assert not any(file.on_triton(x.double()) for file in files)
    kernels.use("torch")
    assert not any(file.on_triton(x) for file in files)


def test_a_kernel_says_which_dtypes_it_takes():
    x = torch.zeros(1, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kernels.switch.on_triton(x.to(dtype))
        assert kernels.switch.on_triton(x.to(dtype), dtypes=(torch.float32,)) == (dtype == torch.float32)


def test_kernel_files_need_no_other_file_of_ours_but_the_switch():
    """tests/test_style.py copies them out and imports them."""
    beside = {"exact_kl": {"kernels.logprob"}, "linear_logprob": {"kernels.logprob"}}
    for name in ("exact_kl", "linear_logprob", "logprob", "lora_linear", "rms_norm", "rope", "swiglu"):
        tree = ast.parse((ROOT / f"kernels/{name}.py").read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        ours = {module for module in imported if module.startswith("kernels")}
        assert ours - {"kernels.switch"} == beside.get(name, set())


# ------------------------------------------------------------------------ the model, the sampler, a step
PROMPTS = [[1, 2, 3, 4, 5], [7]]
GROUPS = [[[8, 9], [10, 11, 12]], [[13], [5, 4, 3, 2]]]


def step(model):
    """Log-probabilities, entropies and the gradient of every weight of a loss on both."""
    model.zero_grad()
    logp, entropy, _ = model.completion_logprobs(PROMPTS, GROUPS, temperature=0.8)
    factors = torch.linspace(-1, 1, len(logp), device=DEVICE)
    loss = (logp * factors).sum() - 0.1 * entropy.sum()
    loss.backward()
    return [logp, entropy, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_model_forward_and_backward_equal_torch(tiny):
    tiny.to(DEVICE)
    for p in tiny.parameters():  # norms that are not 1
        p.data += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ours = step(tiny)
    with torch.no_grad():
        scored = tiny.completion_logprobs(PROMPTS, GROUPS, temperature=0.8)  # another kernel: no logits
    prompt = torch.tensor(PROMPTS[0], device=DEVICE)
    logits = tiny.logits(prompt)
    kernels.use("torch")
    ref = step(tiny)
    assert len(ours) == len(ref)
    for a, b in zip(ours, ref):
        near(a, b, torch.float32)
    for a, b in zip(scored[:2], ref):
        near(a, b, torch.float32)
    near(logits, tiny.logits(prompt), torch.float32)


@pytest.mark.parametrize("options", [SLOW(dict()), SLOW(dict(top_k=30, top_p=0.95))], ids=str)
def test_training_step_equals_torch(tiny, options):
    """Sampling, reference, loss with KL and entropy, backward, update: all through Triton, all through
    torch.
    """
    start, ends = [p.detach().clone() for p in tiny.parameters()], []
    adv = torch.tensor([1.0, -1.0, 0.5, -0.5], device=DEVICE)
    for mode in ("triton", "torch"):
        kernels.use(mode)
        tiny.to(DEVICE)
        for p, before in zip(tiny.parameters(), start):
            p.data, p.grad = before.clone().to(DEVICE), None
        limits = dict(group_size=2, max_new_tokens=4, stop_ids=[11], seed=5)
        out = rollout.generate(tiny, PROMPTS, **limits, **options)
        groups = [out.group(b, 2) for b in range(2)]
        old = torch.tensor(sum(out.logprobs, []), device=DEVICE)
        with torch.no_grad():
            ref_logp, _, _ = tiny.completion_logprobs(PROMPTS, groups, **options)
        logp, entropy, rows = tiny.completion_logprobs(PROMPTS, groups, **options)
        terms = dict(ref_logp=ref_logp - 0.1, entropy=entropy, beta=0.1, entropy_coef=0.01)
        loss, _ = losses.policy_loss(logp, old, adv, rows, **terms)
        loss.backward()
        assert (logp - old).abs().max() < 2e-5  # the sampler and the trainer are one model
        grads = [p.grad.clone() for p in tiny.parameters()]
        # eps 1: the step is the gradient, not its sign
        norm = optim.AdamW(list(tiny.named_parameters()), lr=1e-3, eps=1.0).step(1e-3)
        ends.append([loss, norm, *grads, *(p.detach().clone() for p in tiny.parameters())])
    for a, b in zip(*ends):
        near(a, b, torch.float32)


@pytest.mark.slow
def test_lora_step_equals_torch(tiny):
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    lora.apply(tiny, rank=4, alpha=8, targets=targets).to(DEVICE)
    for name, p in tiny.named_parameters():
        if ".B." in name:
            p.data = randn(*p.shape, seed=3, scale=0.1)
    ours = step(tiny)
    kernels.use("torch")
    ref = step(tiny)
    assert len(ours) == len(ref) > 15
    for a, b in zip(ours, ref):
        near(a, b, torch.float32)


def test_keys_go_to_places_that_are_a_column_of_a_table():
    """Places read as if they lay side by side sent a decoding step's keys to other rows' places on a GPU."""
    n, K, C, E = 5, 2, 7, 16
    qk, v = randn(n, 3 * K, E), randn(n, K, E, seed=1)
    turn = randn(2, n, 1, E // 2, seed=3)
    table = torch.randint(0, C, (n, 6), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    kernels.use("triton")
    ours = torch.zeros(2, n, K, C, E, device=DEVICE)
    P.rotate_into_cache(qk, v, *turn, *ours, table[:, 2])
    kernels.use("torch")
    ref = torch.zeros(2, n, K, C, E, device=DEVICE)
    P.rotate_into_cache(qk, v, *turn, *ref, table[:, 2].clone())
    near(ours, ref, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(), dict(temperature=0), dict(top_k=20, top_p=0.9)], ids=str)
def test_sampler_draws_the_same_rollout_as_torch(tiny, options):
    """Six rows through three slots: prefill, decoding from the cache, refilling, moving rows and groups."""
    tiny.to(DEVICE)
    runs = []
    limits = dict(group_size=2, max_new_tokens=6, stop_ids=[11, 40, 17], slots=3)
    for mode in ("triton", "torch"):
        kernels.use(mode)
        runs.append(rollout.generate(tiny, PROMPTS + [[3, 1, 4]], **limits, **options))
    assert runs[0].ids == runs[1].ids and runs[0].stopped == runs[1].stopped
    for a, b in zip(runs[0].logprobs, runs[1].logprobs):
        assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=2e-5)


# ------------------------------------------------------------------------------------------------ bench
@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="there it runs for good")
@pytest.mark.skipif(
    triton.__version__.startswith("3.6"),
    reason="its interpreter cannot loop to a bound read from memory beside numpy 2.4",
)
@pytest.mark.parametrize("only", ["swiglu", SLOW("sample")])
def test_bench_of_the_gpu_runs_dry(only):
    """Its code is tried without a GPU; it prints no figure then, and writes none."""
    before = sorted((ROOT / "bench/results").iterdir())
    command = [sys.executable, "bench/gpu.py", "--dry", f"--only={only}"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    told = out.stdout + out.stderr
    assert out.returncode == 0 and "not measured" in out.stdout and f"{only}" in out.stdout, told
    assert sorted((ROOT / "bench/results").iterdir()) == before


@pytest.mark.slow
def test_compile_check_compiles_for_gpus_that_are_not_here():
    command = [sys.executable, "bench/compile_check.py", "--arch=90", "--only=SwiGLU"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and "2 kernels, 0 bad" in out.stdout, out.stdout + out.stderr


@pytest.mark.parametrize("capability, form", [((7, 5), "torch everywhere: ours"), ((8, 0), "Triton where")])
def test_a_gpu_without_bf16_takes_torchs_forms_and_says_so(monkeypatch, capability, form):
    old = capability[0] < 8
    with monkeypatch.context() as m:  # over before the mode is put back
        m.setattr(torch.cuda, "is_available", lambda: True)
        m.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
        assert form in kernels.switch.use("auto")
        assert kernels.switch.MODE == ("torch" if old else "auto")
        assert policy.pick_device("cuda", "auto", 1)[1] == (torch.float16 if old else torch.bfloat16)
