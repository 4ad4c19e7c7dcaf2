"""bench/gpu.py without a GPU: what counts as a failure, what is recorded, what a second run leaves out, what the table says."""
import json
import subprocess
import sys
from functools import partial

import pytest
import torch

import kernels
from conftest import ROOT

if torch.cuda.is_available():
    pytest.skip("there it runs for good", allow_module_level=True)
triton = pytest.importorskip("triton")


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu.py", "--dry"])
        patch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
        patch.setenv("TRITON_INTERPRET", "1")
        import gpu as bench
        yield bench
        kernels.use("auto")


def row(gpu, name, calls, pair=None):
    case = sys.modules["gpu_rows"].Case(calls, pair, [(8, 0)])
    return sys.modules["gpu_rows"].Row(name, lambda dtype: case, (), ())


def run(gpu, rows, found=None, goals=()):
    found = found or dict(device="none", commit="c", versions={}, results={})
    gpu.work(found, "", rows, goals, lambda: json.dumps(found, allow_nan=False))
    return found


def test_a_nan_or_another_shape_is_a_failure(gpu):
    one, nan = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert gpu.error([one], [one]) == 0 and gpu.error([one, one], [one, 2 * one]) == 0.5
    for ours, ref in (([one, nan], [one, one]), ([nan, one], [one, one]), ([one], [nan]), ([one], [torch.ones(1)])):
        assert gpu.error(ours, ref) == torch.inf
    found = run(gpu, [row(gpu, "bad", dict(ours=lambda: pytest.fail("it was timed")), lambda: ([nan], [one]))])
    assert "off by inf" in found["results"]["check of bad"]["failed"] and "bad" not in found["results"]


def test_memory_that_a_kernel_does_not_write_is_nan(gpu):
    rows = sys.modules["gpu_rows"]
    half = lambda x: torch.empty_like(x).index_copy_(0, torch.tensor([0]), x[:1])
    ours, ref = rows.kernel([torch.ones(2, 3)], half, lambda x: x, (0, 0), {}).pair()
    assert ours[0].isnan().tolist() == [[False] * 3, [True] * 3] and ref[0].dtype == torch.float64
    assert not hasattr(torch.empty, "__wrapped__") and torch.empty is torch._C._VariableFunctions.empty


def test_a_row_that_raises_is_recorded_and_the_next_one_runs(gpu, capsys):
    def boom():
        raise RuntimeError("CUDA out of memory. Tried\nmore lines")
    found = run(gpu, [row(gpu, "a", dict(ours=boom, peer=lambda: dict(seconds=[1.0] * 3))), row(gpu, "b", dict(ours=lambda: dict(seconds=[2.0] * 3)))])
    assert found["results"]["a: ours"] == dict(failed="RuntimeError: CUDA out of memory. Tried")
    assert found["results"]["a: peer"]["seconds"] and found["results"]["b: ours"]["seconds"]
    assert "FAILED a: ours: RuntimeError: CUDA out of memory. Tried" in gpu.table(found)


def test_a_second_run_does_what_is_missing_or_failed_and_no_more(gpu):
    called, broken = [], [True]

    def call(name):
        called.append(name)
        if name == "b" and broken:
            raise ValueError("no")
        return dict(seconds=[1.0] * 3)
    rows = [row(gpu, name, dict(ours=partial(call, name), peer=partial(call, name + "'"))) for name in "abc"]
    found = run(gpu, rows[:2], goals=rows[1:2])
    assert called == ["b", "b'", "a", "a'"]  # goals first
    broken.clear()
    found = run(gpu, rows, json.loads(json.dumps(found)))
    assert called[4:] == ["b", "c", "c'"] and "FAILED" not in gpu.table(found)


def test_the_table_has_error_floor_share_told_and_peers(gpu):
    row = dict(goal="3 s", floor=0.5, tokens=0, perf=0.0, without=["trl"], calls=["ours", "peer"])
    results = {"tests, kernels": dict(counts="9 passed"), "check of a": {"odd": 1e-7, "real": 2e-3}, "a": row,
               "a: ours": dict(seconds=[1.0, 1, 1], peak_bytes=3e9, useful=0.91), "a: peer": dict(seconds=[2.5, 2, 3])}
    table = gpu.table(dict(device="X", commit="c", versions={}, results=results))
    line = next(x for x in table.splitlines() if x.startswith("a "))
    assert line.split()[1:8] == ["2.0e-03", "500.000", "ms", "1,000.000", "ms", "50%", "3.0"] and "tests, kernels: 9 passed" in table
    assert line.endswith("goal 3 s; useful 0.91; peer 2,500.000 ms (2.50x); no trl here")
    row |= dict(tokens=1000, perf=4000.0)
    assert "2,000 tok/s     1,000 tok/s" in gpu.table(dict(device="X", commit="c", versions={}, results=results)) and "25% of PERF's 4,000" in gpu.figures(row, {"ours": results["a: ours"]})


@pytest.mark.skipif(triton.__version__.startswith("3.6"), reason="its interpreter cannot loop to a bound read from memory beside numpy 2.4")
def test_the_alarm_ends_a_run_and_the_table_still_comes():
    out = subprocess.run([sys.executable, "bench/gpu.py", "--dry", "--minutes=0.03", "--only=attention fwd"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "out of time" in out.stdout and "goal; peers" in out.stdout and out.returncode == 0, out.stdout + out.stderr
    assert "attention fwd+bwd, 28/4 x 128: done" not in out.stdout  # which takes longer, wherever the alarm rang
