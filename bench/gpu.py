"""Every figure of docs/performance.md on one GPU: tests, each kernel against fp64, then times beside peers.

    python bench/gpu.py [--minutes=25] [--only="decode 0.5B" --only=sample] [--no-tests] [--out=FOLDER]
    python bench/gpu.py --gsm8k=330 --model=FOLDER --data_dir=FOLDER [-- --lr=4e-5 ..]      a run of train.py
    python bench/gpu.py --dry                   any machine: tiny shapes in Triton's interpreter, no times

Tests come first. Then the rows, the most important first: each is checked, with its outputs full of NaN
before, at an odd shape in fp32 and bf16 and at the real one in bf16; then it and its peers are timed. What
differs from its definition by more than rounding (LIMIT: norm of the difference over the norm; NaN always) is
not timed.

A call of under 50 ms is timed by device events with the L2 cache flushed in between (triton's do_bench):
median, 20th and 80th percentile. A longer one by the clock, for a second and three times at least: median,
least and most. busy: the durations of all kernels of one call, from torch.profiler; where it is far below the
time, the GPU waits for the host. floor: phase by phase, the larger of bytes over the speed of a copy and
operations over that of a large matmul, both measured here first. GB: the allocator's peak, what lay there
before included.

Results go to --out (bench/results) as JSON with commit, device and versions after every call. Run again, it
does what is missing or failed there for this commit. Whatever a row raises is its result, in one sentence. At
--minutes an alarm ends the work wherever it is. The table comes last; status 1 if anything in it failed.
The rows are in bench/gpu_program.py (sampler, update, step) and bench/gpu_rows.py (kernels).
"""

import argparse
import gc
import importlib.metadata
import json
import signal
import subprocess
import sys
import time
from functools import partial

# First: --dry has to reach Triton before it is imported.
from gpu_rows import DRY, KERNELS, ROOT, TYPE, clock, kernels, rand

import gpu_program  # noqa: I001
import torch
import triton
from peers import missing

LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.02}
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "liger_kernel", "cut_cross_entropy")
TESTS = {
    "-m gpu": ["-m", "gpu"],
    "kernels": ["-m", "not gpu and not slow", "tests/test_triton.py", "tests/test_head.py"],
}
SHORT = 0.05  # seconds: below, a call is timed by device events


# ----------------------------------------------------------------------------------------------------- a time
def rates() -> dict:
    """Bytes a second of a copy and operations a second of a large matmul, here and now."""
    elements, size = (64, 8) if DRY else (1 << 29, 8192)
    x, y = [rand(elements, dtype=TYPE) for _ in range(2)]
    a, b = [rand(size, size, dtype=TYPE) for _ in range(2)]
    copy = timed(lambda: y.copy_(x)).get("seconds", [1.0])[0]
    matmul = timed(lambda: a @ b).get("seconds", [1.0])[0]
    return dict(bytes_per_s=2 * x.nbytes / copy, ops_per_s=2 * size**3 / matmul)


def timed(call, profiled=False) -> dict:
    """seconds [median, low, high] and peak_bytes of a call, and what it returned if that is a dict.

    A call may have timed itself, and then returns its `seconds`. profiled: busy_seconds and launches too.
    """
    if DRY:
        told = call()
        return told if isinstance(told, dict) else {}
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    told = call()  # the first compiles
    found = {}
    if not (isinstance(told, dict) and "seconds" in told):
        told, found = repeated(call)
    found |= dict(held_bytes=held, peak_bytes=torch.cuda.max_memory_allocated())
    if profiled:
        found |= busy(call)
    if isinstance(told, dict):
        found |= told
    return found


def repeated(call):
    """(what the call returned last, dict(seconds=[median, low, high]))."""
    times = []
    while not enough(times):
        begin = clock()
        told = call()
        times.append(clock() - begin)
    if times[0] <= SHORT:
        short = triton.testing.do_bench(call, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8])
        return told, dict(seconds=[milliseconds / 1e3 for milliseconds in short])
    return told, dict(seconds=[sorted(times)[len(times) // 2], min(times), max(times)])


def enough(times: list[float]) -> bool:
    if not times:
        return False
    return times[0] <= SHORT or sum(times) >= 10 or (len(times) >= 3 and sum(times) >= 1)


def busy(call) -> dict:
    """Seconds that kernels of one call ran on the GPU, and how many were launched."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    microseconds = sum(event.self_device_time_total for event in events)
    return dict(busy_seconds=microseconds / 1e6, launches=sum(event.count for event in events))


# ---------------------------------------------------------------------------------------------------- a check
def error(ours, ref) -> float:
    """The largest difference of two lists of tensors, by norm.

    Infinite where a number is NaN or where there is none beside it.
    """
    worst = 0.0
    for a, b in zip(ours, ref, strict=True):
        if a.shape != b.shape:
            return torch.inf
        a, b = a.detach().double(), b.detach().double()
        off = float((a - b).norm() / b.norm().clamp(min=1e-6))
        if not off < torch.inf:  # NaN is not smaller than anything
            return torch.inf
        worst = max(worst, off)
    return worst


def check(row) -> dict:
    """{shape and dtype: error}; ValueError where it is more than rounding."""
    forms = [("odd", row.odd, torch.float32)]
    if not DRY:
        forms += [("odd", row.odd, TYPE), ("real", row.real, TYPE)]
    found = {}
    for form, shape, dtype in forms:
        torch.manual_seed(0)
        case = row.build(*shape, dtype=dtype)
        if case.pair is None:
            return {}
        off = error(*case.pair())
        found[f"{form}, {dtype}"] = off
        limit = case.slack * LIMIT[dtype]
        if off > limit:
            raise ValueError(
                f"{form} {shape} in {dtype} is off by {off:.1e}, and rounding explains {limit:.0e}"
            )
    return found


# ------------------------------------------------------------------------------------------------------ a row
def measure(row, found, save) -> dict:
    """What the table says of a row. The times of its calls are results of their own."""
    case = row.build(*(row.odd if DRY else row.real), dtype=TYPE)
    for name, call in case.calls.items():
        profiled = name == "ours" and not DRY
        attempt(found["results"], f"{row.name}: {name}", partial(timed, call, profiled=profiled), save)
    floor, speeds = 0.0, found["speeds"]
    for bytes_moved, operations in case.phases:
        floor += max(bytes_moved / speeds["bytes_per_s"], operations / speeds["ops_per_s"])
    return dict(goal=row.goal, floor=floor, tokens=case.tokens, without=case.without, calls=list(case.calls))


def attempt(results, name, job, save):
    """results[name] = job(), or the sentence of what it raised, unless it is there already."""
    if name in results and "failed" not in results[name]:
        return
    try:
        results[name] = job()
    except Exception as e:
        first_line = (str(e).strip() or "no message").splitlines()[0]
        results[name] = dict(failed=f"{type(e).__name__}: {first_line[:300]}")
    if not DRY:
        gc.collect()  # a model and its graphs hold each other
        torch.cuda.empty_cache()
    save()
    print(f"{time.strftime('%T')} {name}: {results[name].get('failed', 'done')}", flush=True)


def run_tests(options) -> dict:
    """Counts of the tests; ValueError with the last of what they printed if one fails."""
    command = [sys.executable, "-m", "pytest", *options]
    both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out = subprocess.run(command, cwd=ROOT, **both)
    if out.returncode:
        print(out.stdout[-4000:])
        raise ValueError((out.stdout.strip() or "no output").splitlines()[-1])
    return dict(counts=out.stdout.strip().splitlines()[-1])


def work(found, only, rows, save, tests=True):
    """Everything that is not in `found` yet: tests, then the rows in their order, each checked and timed.

    only: parts of names, one of which a row's name must have; [] takes all.
    """
    results = found["results"]
    if tests and not only and not DRY:
        for name, options in TESTS.items():
            attempt(results, f"tests, {name}", partial(run_tests, options), save)
    found["speeds"] = found.get("speeds") or rates()
    for row in rows:
        if only and not any(part in row.name for part in only):
            continue
        attempt(results, f"check of {row.name}", partial(check, row), save)
        calls = results.get(row.name, {}).get("calls", ())
        if any("failed" in results[f"{row.name}: {call}"] for call in calls):
            del results[row.name]  # what failed is tried again
        if "failed" not in results[f"check of {row.name}"]:
            attempt(results, row.name, partial(measure, row, found, save), save)


# -------------------------------------------------------------------------------------------------- the table
def table(found) -> str:
    results = found["results"]
    lines = [f"\n{found['device']}, commit {found['commit']}, {found['versions']}"]
    lines += [f"{name}: {result['counts']}" for name, result in results.items() if "counts" in result]
    heading = f"{'':66}{'error':>9}{'floor':>16}{'ours':>16}{'of floor':>9}{'busy':>6}{'GB':>6}"
    lines.append(f"{heading}  goal; peers (times ours)")
    for name, errors in results.items():
        if not name.startswith("check of "):
            continue
        name = name.removeprefix("check of ")
        row = results.get(name, {})
        calls = {call: results[f"{name}: {call}"] for call in row.get("calls", ())}
        worst = ""
        if errors and "failed" not in errors:
            worst = f"{max(errors.values()):.1e}"
        lines.append(f"{name:66}{worst:>9}{figures(row, calls)}")
    lines += [f"{name}: {result['told']}" for name, result in results.items() if "told" in result]
    lines += [f"FAILED {name}: {result['failed']}" for name, result in results.items() if "failed" in result]
    return "\n".join(lines)


def figures(row, calls) -> str:
    """A line of the table from its floor on."""
    times = {name: call["seconds"][0] for name, call in calls.items() if "seconds" in call}
    if "ours" not in times:
        return f"{'not measured':>41}"
    seconds, ours = times.pop("ours"), calls["ours"]

    def shown(t):
        if row["tokens"]:
            return f"{row['tokens'] / t:,.0f} tok/s"
        return f"{1e3 * t:,.3f} ms"

    told = []
    if row["goal"]:
        told.append(f"goal {row['goal']}")
    hidden = ("seconds", "busy_seconds", "held_bytes", "peak_bytes")
    told += [f"{name} {value:.4g}" for name, value in ours.items() if name not in hidden]
    told += [f"{name} {1e3 * t:,.3f} ms ({t / seconds:.2f}x)" for name, t in times.items()]
    told += [f"no {name} here" for name in row["without"]]
    share = f"{ours['busy_seconds'] / seconds:6.0%}" if "busy_seconds" in ours else f"{'':6}"
    gigabytes = ours.get("peak_bytes", 0) / 1e9
    line = f"{shown(row['floor']):>16}{shown(seconds):>16}{row['floor'] / seconds:9.0%}"
    return f"{line}{share}{gigabytes:6.1f}  {'; '.join(told)}"


# ------------------------------------------------------------------------------------------------------- main
def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    git = subprocess.getoutput(f"git -C {ROOT} describe --always --dirty 2>/dev/null") or "unknown"
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--commit", default=git)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--gsm8k", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--model", default="")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("flags", nargs="*", help="of train.py, after --")
    return parser.parse_args()


def load_results(a) -> tuple:
    """(results so far for this device and commit, a function that writes them)."""
    device = "none" if DRY else torch.cuda.get_device_name()
    path = ROOT / a.out / f"{device.replace(' ', '_')}_{a.commit}.json"
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if not missing(name)}
    found = dict(
        commit=a.commit, device=device, versions=versions, date=time.strftime("%F"), argv=sys.argv[1:],
        results={},
    )  # fmt: skip
    if path.exists() and not DRY:
        found = json.loads(path.read_text())

    def save():
        """Whole or not at all: the alarm may ring here too."""
        if not DRY:
            new = path.with_suffix(".new")
            new.write_text(json.dumps(found, indent=1))
            new.replace(path)

    return found, save


def main():
    a = arguments()
    if not DRY and not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs a GPU; --dry tries its code without one")
    print(kernels.use("triton" if DRY else "auto"))
    found, save = load_results(a)
    # No Exception: whatever runs must not take the alarm for a failure of its own. It rings again every 5 s,
    # should a library have swallowed the first.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 60 * a.minutes, 5)
    try:
        work(found, a.only, gpu_program.ROWS + KERNELS, save, tests=not a.no_tests)
        if a.gsm8k:
            run = partial(gpu_program.gsm8k, a.gsm8k, a.model, a.data_dir, a.flags)
            attempt(found["results"], "GSM8K", run, save)
    except KeyboardInterrupt:
        print("out of time, or interrupted: run again for the rest")
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(table(found))
    sys.exit(any("failed" in result for result in found["results"].values()))


if __name__ == "__main__":
    main()
