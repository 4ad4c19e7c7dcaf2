"""How much memory a phase of the run has held at most, on a GPU or in this process.

    peaks = Peaks("cuda:0")
    with peaks("sample"): ..                    # bytes: peaks.of["sample"]; over all so far: peaks.highest

Linux's own high-water mark can be set back, so that a phase has one of its own. Where it cannot (another
system, a container that forbids it) a phase shows the highest that there was by its end.
"""

import contextlib
import resource
import sys

import torch


class Peaks:
    """The highest number of bytes of each phase, of all times that it ran, and of everything."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.of: dict[str, int] = {}
        self.highest = 0

    @contextlib.contextmanager
    def __call__(self, phase: str):
        self.note()  # what was held before is not this phase's
        restart(self.device)
        try:
            yield
        finally:
            self.of[phase] = max(self.of.get(phase, 0), self.note())

    def note(self) -> int:
        """Bytes held at most since the last phase began."""
        now = most(self.device)
        self.highest = max(self.highest, now)
        return now


def most(device) -> int:
    """Bytes held at most since `restart`: of torch on a GPU, of this process else."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in kilobytes elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def restart(device) -> None:
    """The high-water mark is what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
