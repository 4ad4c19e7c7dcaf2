"""The kernels, one a file, and the one switch that says which form of them runs: kernels.use("auto" | "torch" | "triton")."""
import importlib
import os

MODES = {
    "auto": "Triton where the tensors are on a GPU, torch elsewhere",
    "torch": "torch everywhere: for debugging, and for devices that Triton does not know",
    "triton": "Triton everywhere; on a CPU through its interpreter, thousands of times slower: for tests",
}
WITH_TRITON = ("flash_attention", "linear_logprob", "logprob", "lora_linear", "rms_norm", "rope", "sample", "softmax", "swiglu")


def use(mode: str) -> str:
    """Switches every kernel to `mode` and returns a line that says what will run. ValueError where that cannot be had here.

    Each file has a MODE of its own, which this sets: so each can be copied out alone.
    """
    if mode not in MODES:
        raise ValueError(f"kernels={mode!r} is unknown: one of {', '.join(MODES)}")
    files = [importlib.import_module(f"kernels.{name}") for name in WITH_TRITON]
    if mode == "triton":
        import torch

        version = getattr(files[0].triton, "__version__", None)  # absent from the stand-in where Triton is not installed
        if version is None:
            raise ValueError("kernels='triton' needs Triton, which is not installed: pip install triton, or use kernels='auto'")
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("kernels='triton' needs a GPU, or TRITON_INTERPRET=1 in the environment before Python starts (slow: for tests)")
    for file in files:
        file.MODE = mode
    return f"kernels: {mode} ({MODES[mode]})"
