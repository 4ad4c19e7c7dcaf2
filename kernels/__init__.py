"""The kernels, one a file, and the switch between their forms: kernels.use("auto" | "torch" | "triton")."""

import importlib

from kernels import switch
from kernels.switch import MODES

__all__ = ["MODES", "use"]


def use(mode: str) -> str:
    """kernels/switch.py's `use`; it also reaches the files that still keep a MODE of their own."""
    said = switch.use(mode)
    for name in ("flash_attention", "sample"):
        file = importlib.import_module(f"kernels.{name}")
        if hasattr(file, "MODE"):
            file.MODE = mode
    return said
