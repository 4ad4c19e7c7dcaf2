"""Triton or its stand-in, and the one switch that says which form of every kernel runs.

    from kernels.switch import on_triton, tl, triton

A kernel file needs this one beside it and torch, nothing else of ours: to take rms_norm elsewhere, copy
kernels/switch.py and kernels/rms_norm.py into a folder named kernels. (exact_kl and linear_logprob also
need logprob.) Where Triton is not installed, as in torch's builds for a CPU, a stand-in lets the files be
imported, and every function takes its torch form.
"""

import os

import torch

try:
    import triton
    import triton.language as tl
    from triton.language import core  # by its name: the interpreter does not see it in tl.core
except ImportError:  # torch's CPU builds come without it and do not need it
    from types import SimpleNamespace

    triton = SimpleNamespace(jit=lambda f: f)
    tl = core = SimpleNamespace(constexpr=None)

MODES = {
    "auto": "Triton where the tensors are on a GPU, torch elsewhere",
    "torch": "torch everywhere: for debugging, and for devices that Triton does not know",
    "triton": "Triton everywhere; on a CPU through its interpreter, thousands of times slower: for tests",
}
# Before sm_80 Triton has no tensor cores: attention and the thin products compile for sm_75, and spill
# thousands of bytes (bench/compile_check.py --arch=75 --dtype=float16).
LEAST_CAPABILITY = 8
MODE = "auto"  # set by use(); read it as switch.MODE, because an imported name would keep the old value

# fp64 is left out: it is asked for where exactness is, and most kernels add up in fp32
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def use(mode: str) -> str:
    """Switches every kernel to `mode` and returns a line that says what will run.

    ValueError where the mode does not exist or cannot be had here.
    """
    global MODE
    if mode not in MODES:
        raise ValueError(f"kernels={mode!r} is unknown: one of {', '.join(MODES)}")
    if mode == "triton":
        installed = hasattr(triton, "__version__")  # the stand-in has none
        if not installed:
            raise ValueError(
                "kernels='triton' needs Triton, which is not installed:"
                " pip install triton, or use kernels='auto'"
            )
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                "kernels='triton' needs a GPU, or TRITON_INTERPRET=1 in the environment before Python starts"
                " (slow: for tests)"
            )
    if mode == "auto" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major < LEAST_CAPABILITY:
            MODE = "torch"
            why = f"ours are slow on a GPU before sm_80, and this is sm_{major}{minor}"
            return f"kernels: auto (torch everywhere: {why})"
    MODE = mode
    return f"kernels: {mode} ({MODES[mode]})"


def on_triton(x, dtypes=FLOATS) -> bool:
    """Whether the Triton form runs on the tensor x, for a kernel that takes `dtypes`."""
    wanted = MODE == "triton" or (MODE == "auto" and x.is_cuda)
    return wanted and x.dtype in dtypes
