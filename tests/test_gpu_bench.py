"""bench/gpu.py without a GPU: what counts as a failure, what is recorded, what a second run leaves out."""

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


def row(name, calls, pair=None):
    rows = sys.modules["gpu_rows"]
    case = rows.Case(calls, pair, [(8, 0)])
    return rows.Row(name, lambda dtype: case, (), ())


def run(gpu, rows, found=None, only=()):
    found = found or dict(device="none", commit="c", versions={}, results={})
    gpu.work(found, list(only), rows, lambda: json.dumps(found, allow_nan=False))
    return found


def a_second():
    return dict(seconds=[1.0] * 3)


def test_a_nan_or_another_shape_is_a_failure(gpu):
    one, nan = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert gpu.error([one], [one]) == 0
    assert gpu.error([one, one], [one, 2 * one]) == 0.5
    pairs = [([one, nan], [one, one]), ([nan, one], [one, one]), ([one], [nan]), ([one], [torch.ones(1)])]
    for ours, ref in pairs:
        assert gpu.error(ours, ref) == torch.inf
    timing = dict(ours=lambda: pytest.fail("it was timed"))
    found = run(gpu, [row("bad", timing, lambda: ([nan], [one]))])
    assert "off by inf" in found["results"]["check of bad"]["failed"]
    assert "bad" not in found["results"]


def test_memory_that_a_kernel_does_not_write_is_nan(gpu):
    def half(x):
        return torch.empty_like(x).index_copy_(0, torch.tensor([0]), x[:1])

    ours, ref = sys.modules["gpu_rows"].kernel([torch.ones(2, 3)], half, lambda x: x, (0, 0), {}).pair()
    assert ours[0].isnan().tolist() == [[False] * 3, [True] * 3]
    assert ref[0].dtype == torch.float64
    assert torch.empty is torch._C._VariableFunctions.empty  # put back


def test_a_row_that_raises_is_recorded_and_the_next_one_runs(gpu):
    def boom():
        raise RuntimeError("CUDA out of memory. Tried\nmore lines")

    found = run(gpu, [row("a", dict(ours=boom, peer=a_second)), row("b", dict(ours=a_second))])
    sentence = "RuntimeError: CUDA out of memory. Tried"
    assert found["results"]["a: ours"] == dict(failed=sentence)
    assert found["results"]["a: peer"]["seconds"] and found["results"]["b: ours"]["seconds"]
    assert f"FAILED a: ours: {sentence}" in gpu.table(found)


def test_a_second_run_does_what_is_missing_or_failed_and_no_more(gpu):
    called, broken = [], [True]

    def call(name):
        called.append(name)
        if name == "b" and broken:
            raise ValueError("no")
        return a_second()

    rows = [row(name, dict(ours=partial(call, name), peer=partial(call, name + "'"))) for name in "abc"]
    found = run(gpu, rows[:2])
    assert called == ["a", "a'", "b", "b'"]  # in their order: the most important is first
    broken.clear()
    found = run(gpu, rows, json.loads(json.dumps(found)))
    assert called[4:] == ["b", "c", "c'"]
    assert "FAILED" not in gpu.table(found)


def test_only_takes_several_parts_of_names(gpu):
    rows = [row(name, dict(ours=a_second)) for name in ("decode 0.5B", "decode 7B", "sample", "swiglu")]
    found = run(gpu, rows, only=["decode", "glu"])
    named = {name for name in found["results"] if ":" not in name and "check" not in name}
    assert named == {"decode 0.5B", "decode 7B", "swiglu"}


def test_the_table_has_error_floor_share_busy_told_and_peers(gpu):
    of_a = dict(goal="3 s", floor=0.5, tokens=0, without=["trl"], calls=["ours", "peer"])
    ours = dict(seconds=[1.0, 1, 1], busy_seconds=0.8, launches=40, peak_bytes=3e9, useful=0.91)
    results = {
        "tests, kernels": dict(counts="9 passed"),
        "check of a": {"odd": 1e-7, "real": 2e-3},
        "a": of_a,
        "a: ours": ours,
        "a: peer": dict(seconds=[2.5, 2, 3]),
    }
    found = dict(device="X", commit="c", versions={}, results=results)
    line = next(line for line in gpu.table(found).splitlines() if line.startswith("a "))
    wanted = ["2.0e-03", "500.000", "ms", "1,000.000", "ms", "50%", "80%", "3.0"]
    assert line.split()[1:9] == wanted and "tests, kernels: 9 passed" in gpu.table(found)
    assert line.endswith("goal 3 s; launches 40; useful 0.91; peer 2,500.000 ms (2.50x); no trl here")
    of_a["tokens"] = 1000
    assert "2,000 tok/s     1,000 tok/s" in gpu.table(found)


@pytest.mark.slow
def test_a_run_on_gsm8k_tells_its_accuracies(gpu, tmp_path, monkeypatch):
    """train.py itself is started: here on a tiny model and problems of a file."""
    from conftest import ALPHABET, SHAPE

    for name, size in (("train", 7473), ("test", 1319)):  # whole files, or the task refuses them
        problems = [{"question": f"{i}+{i}=", "answer": f"#### {2 * i}"} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    flags = [
        f"--scratch={SHAPE!r}",
        f"--alphabet={ALPHABET}",
        "--system_prompt=",
        "--lora_rank=0",
        "--steps=2",
    ]
    flags += ["--beta=0.0", "--prompts_per_step=2", "--group_size=2", "--max_new_tokens=4", "--device=cpu"]
    flags += ["--force=True", "--threads=1", "--eval_problems=4", "--save_every=0"]
    found = sys.modules["gpu_program"].gsm8k(60.0, "", str(tmp_path), flags)
    assert found["steps"] == 2 and sorted(found["accuracy"]) == [0, 2]
    assert "step 0: 0.0%" in found["told"] and "2 steps in" in found["told"]


OLD_INTERPRETER = "its interpreter cannot loop to a bound read from memory beside numpy 2.4"


@pytest.mark.slow
@pytest.mark.skipif(triton.__version__.startswith("3.6"), reason=OLD_INTERPRETER)
def test_the_alarm_ends_a_run_and_the_table_still_comes():
    command = [sys.executable, "bench/gpu.py", "--dry", "--minutes=0.02", "--only=attention fwd"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    told = out.stdout + out.stderr
    assert out.returncode == 0 and "out of time" in told and "goal; peers" in told, told
    assert "attention fwd+bwd, 28/4 x 128: done" not in told  # which takes longer, wherever the alarm rang


@pytest.mark.slow
def test_updates_and_steps_of_the_program_run_dry():
    command = [sys.executable, "bench/gpu.py", "--dry"]
    command += ["--only=update 0.5B, 2 x 16 x (128 + 384), LoRA 32 merged", "--only=whole step 0.5B"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0 and "FAILED" not in out.stdout, out.stdout + out.stderr
    assert out.stdout.count(": ours: done") == 2
