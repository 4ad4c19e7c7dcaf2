"""Every figure of the kernels on one GPU: tests, then each kernel checked and timed beside its peers, then sampling, update and a whole step.

    python bench/gpu.py [--only=logprob] [--minutes=25] [--out=FILE.json]         a machine with a GPU
    python bench/gpu.py --dry                                                     any machine: tiny shapes in Triton's interpreter, nothing timed

A row is timed only after its result equals that of the first peer, fp32 or fp64 torch, to `err` (norm of the difference over the norm). Times
are medians by device events with the L2 cache flushed in between (triton.testing.do_bench), beside their 20th and 80th percentiles. floor: the
larger of bytes over the speed of a copy and operations over the speed of a large matmul, both measured here first. Results go to
bench/results/ as JSON with commit, device and versions, one row at a time: run again, it measures only what is missing there for this commit.
The rows, their shapes and peers are in bench/gpu_rows.py. Ends with status 1 if a kernel differs from its definition by more than rounding.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gpu_rows import DRY, FAMILIES, ROOT, kernels, rand  # first: --dry must reach Triton before it is imported

import torch
import triton


def rates():
    """Bytes a second of a copy and operations a second of a large matmul, here and now."""
    x, a, b = rand(1 << 29), rand(8192, 8192), rand(8192, 8192)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (seconds(lambda: y.copy_(x))[0]), 2 * 8192**3 / seconds(lambda: a @ b)[0]


def seconds(call):
    """(median, 20th, 80th percentile) seconds of a call."""
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    if time.perf_counter() - start > 1:  # do_bench is for kernels; the first call compiled
        times = [0.0] * 3
        for i in range(3):
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times[i] = time.perf_counter() - start
        return statistics.median(times), min(times), max(times)
    return tuple(ms / 1e3 for ms in triton.testing.do_bench(call, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8]))


def error(ours, ref):
    """Largest relative error, by norm, of the results; rollouts are not compared: random weights make ties."""
    pairs = [(a.double(), b.double()) for a, b in zip(*(x if isinstance(x, (list, tuple)) else [x] for x in (ours, ref))) if isinstance(a, torch.Tensor)]
    return max([float((a - b.reshape(a.shape)).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs], default=0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default in (("only", str, ""), ("minutes", float, 25.0), ("out", str, "")):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--dry", action="store_true")
    a, begin = parser.parse_args(), time.time()
    if not DRY and not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs a GPU; --dry tries its code without one")
    print(kernels.use("triton" if DRY else "auto"))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    device = "none" if DRY else torch.cuda.get_device_name()
    path = Path(a.out or ROOT / "bench/results" / f"{device.replace(' ', '_')}_{commit}.json")
    found = json.loads(path.read_text()) if path.exists() and not DRY else dict(commit=commit, device=device, torch=torch.__version__, triton=triton.__version__, date=time.strftime("%F"), rows={})
    if not DRY and "tests" not in found:
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_triton.py"], cwd=ROOT, capture_output=True, text=True)
        found["tests"] = tests.stdout.strip().splitlines()[-1]
        print(found["tests"] if not tests.returncode else tests.stdout[-4000:])
    copy, matmul = (0, 0) if DRY else rates()
    found |= dict(copy_bytes_per_s=copy, matmul_ops_per_s=matmul)
    for family in FAMILIES:
        for name, goal, nbytes, ops, ours, peers in family():
            if a.only not in name or name in found["rows"] or time.time() - begin > 60 * a.minutes:
                continue
            calls = {"ours": ours} | {k: v for k, v in peers.items() if not (DRY and k == "compiled")}
            err = error(ours(), next(iter(peers.values()))())
            row = found["rows"][name] = dict(err=err, goal=goal)
            if not DRY:
                row |= dict(floor=max(nbytes / copy, ops / matmul), seconds={k: seconds(call) for k, call in calls.items()}, peak_bytes=torch.cuda.max_memory_allocated())
                path.write_text(json.dumps(found, indent=1))
            print(f"{name}: error {err:.1e}", flush=True)
    print(f"\n{device}, commit {commit}, torch {torch.__version__}, triton {triton.__version__}\n{'':42}{'error':>9}{'floor ms':>10}{'ours ms':>10}{'of floor':>9}  goal, peers (ms)")
    for name, row in found["rows"].items():
        ms = {k: 1e3 * t[0] for k, t in row.get("seconds", {}).items()}
        told = f"{1e3 * row['floor']:10.3f}{ms['ours']:10.3f}{1e3 * row['floor'] / ms['ours']:9.0%}" if ms else f"{'not measured':>29}"
        print(f"{name:42}{row['err']:9.1e}{told}  {row['goal']}  {', '.join(f'{k} {t:.3f}' for k, t in ms.items() if k != 'ours')}")
    sys.exit(bool(max([row["err"] for row in found["rows"].values()], default=0) > 0.05))


if __name__ == "__main__":
    main()
