"""Compiles every Triton kernel for GPUs that are not here, and reports registers, spills and shared memory: a bad tile is seen without a GPU.

    python bench/compile_check.py [--arch=90,80] [--only=attention]

The wrappers of kernels/ are called as the model calls them, at the shapes of real models, on tensors without memory (device "meta"); each
launch is caught and its kernel compiled for the tile sizes, types and alignments it was launched with, as Triton's own launcher would.
ptxas, which comes with Triton, then assembles it. Ends with status 1 if a kernel does not compile, spills registers, or asks for more shared
memory than the architecture has (Triton itself finds that out only at the launch).

Dims as in kernels/: M rows, T tokens, D width, V vocabulary, H / K query / key heads, E head width, P prompt and C completion length.
"""
import importlib
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import kernels
from kernels import flash_attention as flash
from kernels import linear_logprob, logprob, lora_linear, rms_norm, rope, sample, softmax, swiglu

SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
PTXAS = sorted(map(str, (Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*")))
BF16, FP32, LONG = torch.bfloat16, torch.float32, torch.long


def meta(*shape, dtype=BF16, grad=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def train(function, *args, **options):
    """Forward and backward of a function whose first results are floating."""
    out = function(*args, **options)
    out = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
    torch.autograd.backward(out, [torch.empty_like(x) for x in out])


def cases():
    """Name -> a call that launches the kernels. The shapes are Qwen2.5-0.5B's, 1.5B's and SmolLM2-135M's."""
    for M, D, V in ((8192, 896, 151_936), (32, 576, 49_152)):
        yield f"linear_logprob M {M} D {D} V {V}", partial(linear_logprob.linear_logprob, meta(M, D), meta(V, D), meta(M, dtype=LONG))
    h, w, y = meta(512, 896, grad=True), meta(151_936, 896), meta(512, dtype=LONG)
    yield "logprob head frozen", partial(train, logprob.logprob, h, w, y)
    yield "logprob head trained, entropy", partial(train, logprob.logprob, h, w.detach().requires_grad_(), y)
    yield "linear_logprob fp32", partial(linear_logprob.linear_logprob, meta(64, 576, dtype=FP32), meta(49_152, 576, dtype=FP32), meta(64, dtype=LONG))
    # Triton makes a constant of every integer that is 1: such a kernel is another one
    yield "one row: linear_logprob", partial(linear_logprob.linear_logprob, meta(1, 64), meta(100, 64), meta(1, dtype=LONG))
    yield "one row: sample", partial(sample.sample, meta(1, 100, dtype=FP32), meta(1, dtype=LONG), min_p=0.1)
    yield "one row: norm", partial(train, rms_norm.rms_norm, meta(1, 64, grad=True), meta(64, grad=True), 1e-6)
    yield "one row: store keys", partial(rope.store_keys, *(meta(1, 1, 64) for _ in range(2)), *(meta(1, 1, 1, 64) for _ in range(2)), meta(1, dtype=LONG))
    yield "one row: LoRA", partial(lora_linear.expand_, meta(1, 64), meta(1, 1, dtype=FP32), meta(1, 64, dtype=FP32))
    for D in (896, 3584):
        yield f"norm D {D}", partial(train, rms_norm.rms_norm, meta(4096, D, grad=True), meta(D, grad=True), 1e-6)
        yield f"add and norm D {D}", partial(train, rms_norm.add_rms_norm, *(meta(4096, D, grad=True) for _ in range(2)), meta(D, grad=True), 1e-6)
    yield "SwiGLU", partial(train, swiglu.swiglu, meta(4096, 2 * 4864, grad=True))
    yield "rope", partial(train, rope.rotate, meta(4096, 18, 64, grad=True)[:, :16], *(meta(4096, 1, 32) for _ in range(2)))
    yield "store keys", partial(rope.store_keys, *(meta(256, 2, 64) for _ in range(2)), *(meta(256, 2, 400, 64) for _ in range(2)), meta(256, dtype=LONG))
    yield "softmax", partial(train, softmax.softmax, meta(4096, 1000, grad=True))
    for r in (16, 64):
        yield f"LoRA rank {r}: shrink", partial(lora_linear.shrink, meta(4096, 896), meta(r, 896, dtype=FP32), 1.0)
        yield f"LoRA rank {r}: expand", partial(lora_linear.expand_, meta(4096, 9728)[:, 4864:], meta(4096, 2 * r, dtype=FP32)[:, r:], meta(4864, r, dtype=FP32).t())
    for options in (dict(), dict(top_k=50, top_p=0.9, min_p=0.05), None):
        key = None if options is None else meta(256, dtype=LONG)
        yield f"sample V 151936 {'greedy' if options is None else 'truncated' if options else ''}", partial(sample.sample, meta(256, 151_936, dtype=FP32), key, **options or {})
    for name, H, K, E, dtype in (("SmolLM2", 9, 3, 64, BF16), ("Qwen 0.5B", 14, 2, 64, BF16), ("Qwen 7B", 28, 4, 128, BF16), ("SmolLM2 fp32", 9, 3, 64, FP32)):
        segments = [(0, 150, 0, 0)] + [(150 + 200 * g, 200, 0, 150) for g in range(8)]
        qk, v, tiles = meta(1750, H + K, E, dtype=dtype, grad=True), meta(1750, K, E, dtype=dtype, grad=True), flash.Tiles(segments, H // K, E=E, dtype=dtype, device="meta")
        yield f"attention, training: {name}", partial(train, flash.flash_attention, qk[:, :H], qk[:, H:], v, tiles)
        cache = [meta(*shape, dtype=dtype) for shape in ((9, K, 160, E), (9, K, 160, E), (256, K, 400, E), (256, K, 400, E))]
        yield f"attention, decoding: {name}", partial(flash.flash_decode, meta(256, H, E, dtype=dtype), *cache, meta(256, 6, dtype=LONG))


def signature(fn, args, kwargs):
    """What Triton's launcher makes of a call: type of each argument, constants, alignments."""
    given = dict(zip(fn.arg_names, args)) | {k: v for k, v in kwargs.items() if k in fn.arg_names}
    types, constants, attrs = {}, {}, {}
    for i, name in enumerate(fn.arg_names):
        value = given.get(name, fn.params[i].default)
        if fn.params[i].is_constexpr or value is None or (isinstance(value, int) and value == 1):
            types[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64", "int64": "i64", "int32": "i32", "bool": "i1"}[str(value.dtype)[6:]]
            attrs[(i,)] = [["tt.divisibility", 16]] if value.storage_offset() * value.itemsize % 16 == 0 else []
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32" if -2**31 <= value < 2**31 else "i64"
            attrs[(i,)] = [["tt.divisibility", 16]] if isinstance(value, int) and value % 16 == 0 else []
    return types, constants, {k: v for k, v in attrs.items() if v}


def compile_for(arch, fn, args, kwargs):
    """(registers, bytes spilled, bytes of shared memory, tensor-core instructions) of a launch."""
    types, constants, attrs = signature(fn, args, kwargs)
    options = {k: kwargs[k] for k in ("num_warps", "num_stages") if k in kwargs}
    kernel = triton.compile(ASTSource(fn, types, constants, attrs), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(kernel.asm["ptx"])
        f.flush()
        target = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
        # Triton brings two, an old and a new one; the cubin it made came from one of them
        tries = [subprocess.run([p, "-v", f"--gpu-name={target}", f.name, "-o", os.devnull], capture_output=True, text=True) for p in PTXAS]
        usage = next(t.stderr for t in reversed(tries) if not t.returncode)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", usage)))
    dots = "wgmma" if "wgmma" in kernel.asm["ptx"] else "mma" if "mma.sync" in kernel.asm["ptx"] else ""
    return int(re.search(r"Used (\d+) registers", usage)[1]), spilled, kernel.metadata.shared, dots


def launches(arch, only):
    """(kernel, case, arguments, options) of every launch that the cases make, once for each set of types and constants."""
    seen = {}
    flash.capability = lambda device: arch
    for name, call in cases():
        if only in name:
            JITFunction.run = lambda self, *args, grid, warmup, name=name, **kwargs: seen.setdefault((self.__name__, str(signature(self, args, kwargs)[:2])), (self, name, args, kwargs))
            call()
    return seen.values()


def main(arch="90,80", only=""):
    for name in kernels.WITH_TRITON:  # kernels.use refuses Triton where there is no GPU, rightly
        importlib.import_module(f"kernels.{name}").MODE = "triton"
    count = bad = 0
    print(f"triton {triton.__version__}, torch {torch.__version__}\n{'kernel':22}{'case':42}{'sm':>4}{'regs':>6}{'spilled':>9}{'shared':>9}  dots")
    for a in map(int, arch.split(",")):
        for fn, name, args, kwargs in launches(a, only):
            try:
                regs, spilled, shared, dots = compile_for(a, fn, args, kwargs)
            except Exception as e:  # whatever the compiler raises is the finding
                regs, spilled, shared, dots = 0, 0, 0, f"FAILED {type(e).__name__}: {str(e)[:200]}"
            failed = spilled or shared > SHARED[a] or "FAILED" in dots
            count, bad = count + 1, bad + bool(failed)
            print(f"{fn.__name__:22}{name:42}{a:4}{regs:6}{spilled:9}{shared:9}  {dots}{'  <-' if failed else ''}", flush=True)
    print(f"{count} kernels, {bad} bad")
    return bad


if __name__ == "__main__":
    sys.exit(bool(main(**dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:]))))
