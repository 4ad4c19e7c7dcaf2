"""The kernels, one a file, and the switch between their forms: kernels.use("auto" | "torch" | "triton")."""

from kernels.switch import MODES, use

__all__ = ["MODES", "use"]
