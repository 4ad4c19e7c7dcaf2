"""Every figure of PERF.md on one GPU: the tests, each kernel against fp64, then kernels, sampler, update and a whole step beside their peers.

    python bench/gpu.py [--only=logprob] [--minutes=25] [--out=FOLDER]         a machine with a GPU
    python bench/gpu.py --dry                                                     any machine: tiny shapes in Triton's interpreter, nothing timed

Order: tests that need a GPU; every kernel checked, with its outputs full of NaN before, at an odd shape in fp32 and bf16 and at the real one in bf16; then
times, PERF.md's goals first. What differs from its definition by more than rounding (LIMIT: norm of the difference over the norm; NaN always) is not timed.

A short call is timed by device events with the L2 cache flushed in between (triton.testing.do_bench): median, 20th and 80th percentile. One of over 50 ms
by the clock, for a second and three times at least: median, least and most. floor: phase by phase, the larger of bytes over the speed of a copy
and operations over that of a large matmul, both measured here first. peak: of the allocator, what lay there before included.

Results go to --out (bench/results) as JSON with commit, device and versions after every call: run again, it does what is missing or failed there for this commit. Whatever
a row raises is its result, in one sentence. At --minutes an alarm ends the work wherever it is. The table comes last; status 1 if anything in it failed.
The rows are in bench/gpu_rows.py (kernels) and bench/gpu_program.py.
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

from gpu_rows import DRY, ROOT, ROWS, TYPE, clock, kernels, missing, rand  # first: --dry must reach Triton before it is imported

import torch
import triton

import gpu_program

LIMIT, PACKAGES = {torch.float32: 1e-4, torch.bfloat16: 0.02}, ("torch", "triton", "transformers", "trl", "peft", "liger_kernel", "cut_cross_entropy")
TESTS = {"-m gpu": ["-m", "gpu"], "kernels": ["-m", "not gpu", "tests/test_triton.py", "tests/test_policy_head.py"]}


def rates() -> dict:
    """Bytes a second of a copy and operations a second of a large matmul, here and now."""
    x, y, a, b = (rand(*s, dtype=TYPE) for s in ([(64,), (64,), (8, 8), (8, 8)] if DRY else [(1 << 29,), (1 << 29,), (8192, 8192), (8192, 8192)]))
    copy, matmul = (timed(call).get("seconds", [1.0])[0] for call in (lambda: y.copy_(x), lambda: a @ b))
    return dict(bytes_per_s=2 * x.nbytes / copy, ops_per_s=2 * len(a) ** 3 / matmul)


def timed(call) -> dict:
    """seconds [median, low, high] and peak_bytes of a call, and what it returned if that is a dict: it may have timed itself."""
    held, _ = (0, 0) if DRY else (torch.cuda.memory_allocated(), torch.cuda.reset_peak_memory_stats())
    told, times = call(), []  # the first compiles
    while not DRY and not (isinstance(told, dict) and "seconds" in told) and (not times or times[0] > 0.05 and sum(times) < 10 and (len(times) < 3 or sum(times) < 1)):
        begin = clock()
        told = call()
        times.append(clock() - begin)
    found = {} if DRY else dict(held_bytes=held, peak_bytes=torch.cuda.max_memory_allocated())
    if times:
        short = times[0] <= 0.05 and triton.testing.do_bench(call, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8])
        found["seconds"] = [ms / 1e3 for ms in short] if short else [sorted(times)[len(times) // 2], min(times), max(times)]
    return found | (told if isinstance(told, dict) else {})


def error(ours, ref) -> float:
    """The largest difference of two lists of tensors, by norm; infinite where a number is NaN or where there is none beside it."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(ours, ref, strict=True)]
    off = [float((a - b).norm() / b.norm().clamp(min=1e-6)) if a.shape == b.shape else torch.inf for a, b in pairs]
    return max(x if x < torch.inf else torch.inf for x in off)  # a NaN is not larger than anything


def check(row) -> dict:
    """{shape and dtype: error}; ValueError where it is more than rounding."""
    found = {}
    for form, shape, dtype in [("odd", row.odd, torch.float32)] + [("odd", row.odd, TYPE), ("real", row.real, TYPE)] * (not DRY):
        torch.manual_seed(0)
        case = row.build(*shape, dtype=dtype)
        if case.pair is None:
            return {}
        found[f"{form}, {dtype}"] = off = error(*case.pair())
        if off > case.slack * LIMIT[dtype]:
            raise ValueError(f"{form} {shape} in {dtype} is off by {off:.1e}, and rounding explains {case.slack * LIMIT[dtype]:.0e}")
    return found


def measure(row, found, save) -> dict:
    """What the table says of a row. The times of its calls are results of their own."""
    case = row.build(*(row.odd if DRY else row.real), dtype=TYPE)
    for name, call in case.calls.items():
        attempt(found["results"], f"{row.name}: {name}", partial(timed, call), save)
    floor = sum(max(b / found["speeds"]["bytes_per_s"], ops / found["speeds"]["ops_per_s"]) for b, ops in case.phases)
    return dict(goal=row.goal, floor=floor, tokens=case.tokens, perf=case.perf, without=case.without, calls=list(case.calls))


def attempt(results, name, job, save):
    """results[name] = job(), or the sentence of what it raised, unless it is there already."""
    if "failed" not in results.get(name, dict(failed="not tried")):
        return
    try:
        results[name] = job()
    except Exception as e:
        results[name] = dict(failed=f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0][:300]}")
    gc.collect()  # a model and its graphs hold each other
    torch.cuda.empty_cache()
    save()
    print(f"{time.strftime('%T')} {name}: {results[name].get('failed', 'done')}", flush=True)


def tests(options) -> dict:
    """Counts of the tests; ValueError with the last of what they printed if one fails."""
    out = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if out.returncode:
        print(out.stdout[-4000:])
        raise ValueError((out.stdout.strip() or "no output").splitlines()[-1])
    return dict(counts=out.stdout.strip().splitlines()[-1])


def work(found, only, rows, goals, save):
    """Everything that is not in `found` yet: tests, checks, then times, those of the rows `goals` first."""
    results, rows = found["results"], [row for row in rows if only in row.name]
    for name, options in TESTS.items() if only in ("", "tests") and not DRY else ():
        attempt(results, f"tests, {name}", partial(tests, options), save)
    for row in rows:
        attempt(results, f"check of {row.name}", partial(check, row), save)
    found["speeds"] = found.get("speeds") or rates()
    for row in sorted(rows, key=lambda row: row not in goals):
        if any("failed" in results[f"{row.name}: {call}"] for call in results.get(row.name, {}).get("calls", ())):
            del results[row.name]  # what failed is tried again
        if "failed" not in results[f"check of {row.name}"]:
            attempt(results, row.name, partial(measure, row, found, save), save)


def table(found) -> str:
    results, title = found["results"], f"\n{found['device']}, commit {found['commit']}, {found['versions']}"
    lines = [title, *(f"{name}: {x['counts']}" for name, x in results.items() if "counts" in x), f"{'':46}{'error':>9}{'floor':>16}{'ours':>16}{'of floor':>9}{'GB':>6}  goal; peers (times ours)"]
    for name, errors in ((name.removeprefix("check of "), x) for name, x in results.items() if name.startswith("check of ")):
        worst = f"{max(errors.values()):.1e}" if errors and "failed" not in errors else ""
        lines.append(f"{name:46}{worst:>9}" + figures(results.get(name, {}), {call: results[f"{name}: {call}"] for call in results.get(name, {}).get("calls", ())}))
    return "\n".join(lines + [f"FAILED {name}: {x['failed']}" for name, x in results.items() if "failed" in x])


def figures(row, calls) -> str:
    """A line of the table from its floor on."""
    times = {name: call["seconds"][0] for name, call in calls.items() if "seconds" in call}
    if "ours" not in times:
        return f"{'not measured':>41}"
    ours, shown = times.pop("ours"), lambda s: f"{row['tokens'] / s:,.0f} tok/s" if row["tokens"] else f"{1e3 * s:,.3f} ms"
    told = [row["goal"] and f"goal {row['goal']}", row["perf"] and f"{row['tokens'] / ours / row['perf']:.0%} of PERF's {row['perf']:,.0f}"]
    told += [f"{k} {v:.3g}" for k, v in calls["ours"].items() if "bytes" not in k and k != "seconds"] + [f"{k} {1e3 * t:,.3f} ms ({t / ours:.2f}x)" for k, t in times.items()]
    return f"{shown(row['floor']):>16}{shown(ours):>16}{row['floor'] / ours:9.0%}{calls['ours'].get('peak_bytes', 0) / 1e9:6.1f}  {'; '.join([x for x in told if x] + [f'no {k} here' for k in row['without']])}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    git = subprocess.getoutput(f"git -C {ROOT} describe --always --dirty 2>/dev/null") or "unknown"
    for name, kind, default in (("only", str, ""), ("minutes", float, 25.0), ("out", str, "bench/results"), ("commit", str, git)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--dry", action="store_true")
    a = parser.parse_args()
    _ = DRY or torch.cuda.is_available() or sys.exit("bench/gpu.py needs a GPU; --dry tries its code without one")
    print(kernels.use("triton" if DRY else "auto"))
    device, versions = "none" if DRY else torch.cuda.get_device_name(), {p: importlib.metadata.version(p) for p in PACKAGES if not missing(p)}
    path, fresh = ROOT / a.out / f"{device.replace(' ', '_')}_{a.commit}.json", dict(commit=a.commit, device=device, versions=versions, date=time.strftime("%F"), results={})
    found, new = json.loads(path.read_text()) if path.exists() and not DRY else fresh, path.with_suffix(".new")
    save = lambda: DRY or new.write_text(json.dumps(found, indent=1)) and new.replace(path)  # whole or not at all: the alarm may ring here too
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # no Exception: whatever runs must not take it for a failure of its own
    signal.setitimer(signal.ITIMER_REAL, 60 * a.minutes, 5)  # again every 5 s, should a library have swallowed the first
    try:
        work(found, a.only, ROWS + gpu_program.ROWS, gpu_program.GOALS, save)
    except KeyboardInterrupt:
        print("out of time, or interrupted: run again for the rest")
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(table(found))
    sys.exit(any("failed" in x for x in found["results"].values()))


if __name__ == "__main__":
    main()
