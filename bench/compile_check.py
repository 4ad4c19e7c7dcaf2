"""Compiles every Triton kernel for GPUs that are not here: a bad tile is seen without a GPU.

    python bench/compile_check.py [--arch=90,80] [--only=attention]
    python bench/compile_check.py --arch=70,75 --dtype=float16    # GPUs without bf16

The wrappers of kernels/ are called as the model calls them, at the shapes of real models, on tensors
without memory (device "meta"). Each launch is caught, and its kernel is compiled for the tile sizes, types
and alignments it was launched with, as Triton's own launcher would. ptxas, which comes with Triton, then
assembles it and says how many registers it takes, how many bytes it spills and how much shared memory it
wants. Ends with status 1 if a kernel does not compile, spills registers, or asks for more shared memory
than the architecture has (Triton itself finds that out only at the launch).

Dims as in kernels/: M rows, T tokens, D width, V vocabulary, H / K query / key heads, E head width, P
prompt and C completion length.
"""

import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels import flash_attention as flash
from kernels import linear_logprob, logprob, lora_linear, nf4, rms_norm, rope, sample, swiglu, switch

KB = 1024
# Bytes of shared memory that a program may have.
SHARED = {70: 96 * KB, 75: 64 * KB, 80: 163 * KB, 86: 99 * KB, 89: 99 * KB, 90: 227 * KB, 100: 227 * KB}
PTXAS = sorted(map(str, (Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*")))
FP32, LONG = torch.float32, torch.long
# What the model computes in: a GPU before sm_80 has no bf16.
BF16 = torch.float16 if "--dtype=float16" in sys.argv else torch.bfloat16
TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


# --------------------------------------------------------------------------------------- what is launched
def meta(*shape, dtype=BF16, grad=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def train(function, *args, **options):
    """Forward and backward of a function whose first results are floating."""
    out = function(*args, **options)
    if not isinstance(out, tuple):
        out = (out,)
    out = [x for x in out if x.requires_grad]
    torch.autograd.backward(out, [torch.empty_like(x) for x in out])


def cases():
    """Name -> a call that launches the kernels. The shapes are Qwen2.5-0.5B's, 1.5B's and SmolLM2-135M's."""
    yield from head_cases()
    yield from layer_cases()
    yield from lora_cases()
    yield from nf4_cases()
    yield from one_row_cases()
    yield from sample_cases()
    yield from attention_cases()


def head_cases():
    score = linear_logprob.linear_logprob
    for M, D, V in ((8192, 896, 151_936), (32, 576, 49_152)):
        yield f"linear_logprob M {M} D {D} V {V}", partial(score, meta(M, D), meta(V, D), meta(M, dtype=LONG))
    h, w, y = meta(64, 576, dtype=FP32), meta(49_152, 576, dtype=FP32), meta(64, dtype=LONG)
    yield "linear_logprob fp32", partial(score, h, w, y)

    h, w, y = meta(512, 896, grad=True), meta(151_936, 896), meta(512, dtype=LONG)
    trained = meta(151_936, 896, grad=True)
    yield "logprob head frozen", partial(train, logprob.logprob, h, w, y)
    yield "logprob head trained, entropy", partial(train, logprob.logprob, h, trained, y)


def layer_cases():
    for D in (896, 3584):
        x, delta, weight = meta(4096, D, grad=True), meta(4096, D, grad=True), meta(D, grad=True)
        yield f"norm D {D}", partial(train, rms_norm.rms_norm, x, weight, 1e-6)
        yield f"add and norm D {D}", partial(train, rms_norm.add_rms_norm, x, delta, weight, 1e-6)
    yield "SwiGLU", partial(train, swiglu.swiglu, meta(4096, 2 * 4864, grad=True))

    qk = meta(4096, 18, 64, grad=True)  # as in the model: q and k are parts of one tensor
    cos, sin = meta(4096, 1, 32), meta(4096, 1, 32)
    yield "rope", partial(train, rope.rotate, qk[:, :16], cos, sin)
    turn = meta(256, 1, 32), meta(256, 1, 32)
    caches = meta(256, 2, 400, 64), meta(256, 2, 400, 64)
    args = meta(256, 16, 64), meta(256, 2, 64), *turn, *caches, meta(256, dtype=LONG)
    yield "rotate into cache", partial(rope.rotate_into_cache, *args)


def lora_cases():
    for r in (16, 64):
        A, B = meta(r, 896, dtype=FP32), meta(4864, r, dtype=FP32)
        yield f"LoRA rank {r}: shrink", partial(lora_linear.shrink, meta(4096, 896), A, 1.0)
        y = meta(4096, 9728)[:, 4864:]  # the second of two adapters
        h = meta(4096, 2 * r, dtype=FP32)[:, r:]
        yield f"LoRA rank {r}: expand", partial(lora_linear.expand_, y, h, B.t())
        x, weight = meta(4096, 896, grad=True), meta(4864, 896)
        base = torch.nn.Linear(896, 4864, device="meta", dtype=BF16)
        merged = partial(lora_linear.merged_linear, x, base, weight, 1.0, [slice(0, 4864)])
        yield f"LoRA rank {r}: merged", partial(train, merged, A.requires_grad_(), B.requires_grad_())


def nf4_cases():
    """A projection of Qwen2.5-7B, doubly and singly quantised, and one of a single weight."""
    for n, out in ((18_944 * 3584, BF16), (18_944 * 3584, FP32), (1, BF16)):
        blocks = -(-n // 64)
        packed, w = meta(-(-n // 2), dtype=torch.uint8), meta(n, dtype=out)
        eight = meta(blocks, dtype=torch.uint8), meta(-(-blocks // 256), dtype=FP32)
        twice = *eight, meta(256, dtype=FP32), meta(1, dtype=FP32)
        yield f"NF4 {n} weights, {out}", partial(nf4.expand, packed, *twice, w)
        once = meta(blocks, dtype=FP32), None, None, None
        yield f"NF4 {n} weights, {out}, fp32 scales", partial(nf4.expand, packed, *once, w)


def one_row_cases():
    """Triton makes a constant of every integer that is 1: such a kernel is another one."""
    y = meta(1, dtype=LONG)
    yield "one row: linear_logprob", partial(linear_logprob.linear_logprob, meta(1, 64), meta(100, 64), y)
    yield "one row: sample", partial(sample.sample, meta(1, 100, dtype=FP32), y, min_p=0.1)
    x, weight = meta(1, 64, grad=True), meta(64, grad=True)
    yield "one row: norm", partial(train, rms_norm.rms_norm, x, weight, 1e-6)
    turn, caches = (meta(1, 1, 32), meta(1, 1, 32)), (meta(1, 1, 1, 64), meta(1, 1, 1, 64))
    args = meta(1, 2, 64), meta(1, 1, 64), *turn, *caches, y
    yield "one row: rotate into cache", partial(rope.rotate_into_cache, *args)
    h, B = meta(1, 1, dtype=FP32), meta(1, 64, dtype=FP32)
    yield "one row: LoRA", partial(lora_linear.expand_, meta(1, 64), h, B)


def sample_cases():
    logits, key = meta(256, 151_936, dtype=FP32), meta(256, dtype=LONG)
    yield "sample V 151936", partial(sample.sample, logits, key)
    yield "sample V 151936 truncated", partial(sample.sample, logits, key, top_k=50, top_p=0.9, min_p=0.05)
    yield "sample V 151936 greedy", partial(sample.sample, logits, None)


def attention_cases():
    models = (
        ("SmolLM2", 9, 3, 64, BF16),
        ("Qwen 0.5B", 14, 2, 64, BF16),
        ("Qwen 7B", 28, 4, 128, BF16),
        ("SmolLM2 fp32", 9, 3, 64, FP32),
    )
    segments = [(0, 150, 0, 0)] + [(150 + 200 * g, 200, 0, 150) for g in range(8)]
    for name, H, K, E, dtype in models:
        qk, v = meta(1750, H + K, E, dtype=dtype, grad=True), meta(1750, K, E, dtype=dtype, grad=True)
        tiles = flash.Tiles(segments, H // K, E=E, dtype=dtype, device="meta")
        run = partial(train, flash.flash_attention, qk[:, :H], qk[:, H:], v, tiles)
        yield f"attention, training: {name}", run

        q, table = meta(256, H, E, dtype=dtype), meta(256, 6, dtype=LONG)
        prompts = meta(9, K, 160, E, dtype=dtype), meta(9, K, 160, E, dtype=dtype)
        own = meta(256, K, 400, E, dtype=dtype), meta(256, K, 400, E, dtype=dtype)
        yield f"attention, decoding: {name}", partial(flash.flash_decode, q, *prompts, *own, table)


# ------------------------------------------------------------------------------- how it is compiled
def signature(fn, args, kwargs):
    """What Triton's launcher makes of a call: type of each argument, constants, alignments."""
    given = dict(zip(fn.arg_names, args))
    given |= {k: v for k, v in kwargs.items() if k in fn.arg_names}
    types, constants, attrs = {}, {}, {}
    for i, name in enumerate(fn.arg_names):
        value = given.get(name, fn.params[i].default)
        aligned = False
        if fn.params[i].is_constexpr or value is None or (isinstance(value, int) and value == 1):
            types[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = TRITON_TYPES[value.dtype]
            aligned = value.storage_offset() * value.itemsize % 16 == 0
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attrs[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attrs


def compile_for(arch, fn, args, kwargs):
    """(registers, bytes spilled, bytes of shared memory, tensor-core instructions) of a launch."""
    types, constants, attrs = signature(fn, args, kwargs)
    options = {k: kwargs[k] for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in kwargs}
    source = ASTSource(fn, types, constants, attrs)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = kernel.asm["ptx"]
    usage = assemble(ptx)
    registers = int(re.search(r"Used (\d+) registers", usage)[1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", usage)))
    dots = ""
    if "wgmma" in ptx:
        dots = "wgmma"
    elif "mma.sync" in ptx:
        dots = "mma"
    return registers, spilled, kernel.metadata.shared, dots


def assemble(ptx):
    """What ptxas says of the program. Triton brings an old and a new one; the cubin came from one of them."""
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx)
        f.flush()
        for ptxas in reversed(PTXAS):
            command = [ptxas, "-v", f"--gpu-name={target}", f.name, "-o", os.devnull]
            ran = subprocess.run(command, capture_output=True, text=True)
            if not ran.returncode:
                return ran.stderr
    raise RuntimeError(f"no ptxas takes {target}: {ran.stderr[:200]}")


def launches(arch, only):
    """(kernel, case, arguments, options) of every launch, once for each set of types and constants."""
    seen = {}
    flash.capability = lambda device: arch
    for name, call in cases():
        if only not in name:
            continue

        def note(self, *args, grid, warmup, case=name, **kwargs):
            types, constants, _ = signature(self, args, kwargs)
            seen.setdefault((self.__name__, str((types, constants))), (self, case, args, kwargs))

        JITFunction.run = note
        call()
    return seen.values()


def main(arch="90,80", only="", dtype="bfloat16"):
    """dtype: BF16 above has taken it from the command line."""
    switch.MODE = "triton"  # switch.use refuses Triton where there is no GPU, rightly
    count = bad = 0
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    print(f"{'kernel':22}{'case':42}{'sm':>4}{'regs':>6}{'spilled':>9}{'shared':>9}  dots")
    for sm in map(int, arch.split(",")):
        for fn, name, args, kwargs in launches(sm, only):
            try:
                regs, spilled, shared, dots = compile_for(sm, fn, args, kwargs)
                failed = spilled or shared > SHARED[sm]
            except Exception as e:  # whatever the compiler raises is the finding
                regs = spilled = shared = 0
                dots = f"FAILED {type(e).__name__}: {str(e)[:200]}"
                failed = True
            count += 1
            bad += bool(failed)
            mark = "  <-" if failed else ""
            print(f"{fn.__name__:22}{name:42}{sm:4}{regs:6}{spilled:9}{shared:9}  {dots}{mark}", flush=True)
    print(f"{count} kernels, {bad} bad")
    return bad


if __name__ == "__main__":
    flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
    sys.exit(bool(main(**flags)))
