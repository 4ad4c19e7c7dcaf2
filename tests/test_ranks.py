"""Real runs on several processes beside the same run on one, and errors that every rank raises together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from conftest import ROOT, even, rows, settings, weights
from test_promises import free_port
from test_train import by_prompt

pytestmark = pytest.mark.slow

SCRIPT = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
import train
import test_ranks
sys.exit(train.main(test_ranks.CASES[sys.argv[2]](Path(sys.argv[1]))))
"""


def fails_on_rank_1(completions, **_):
    calls.append(1)
    if os.environ.get("RANK") == "1" and len(calls) == 3:
        raise OSError("no such service")
    return even(completions)


calls = []


def slowly(completions, **_):
    """Says which process is which, for a test that kills one."""
    print(f"rank {os.environ.get('RANK')} is process {os.getpid()}", flush=True)
    time.sleep(0.1)
    return even(completions)


slowly.__name__ = "even"


def case(**keys):
    return lambda folder: settings(folder, **dict(prompts_per_step=8, steps=3, lr=1e-4) | keys)


CASES = {
    "minibatches": case(minibatches=4, epochs=2),
    "resampling": case(resample_zero_groups=True, resample_budget=6, rewards=[(by_prompt, 1.0)]),
    "dropout": case(lora_rank=4, lora_alpha=8.0, lora_dropout=0.2, beta=0.1),
    "a failing reward": case(rewards=[(fails_on_rank_1, 1.0)], save_every=0),
    "many steps": case(steps=200, save_every=0, rewards=[(slowly, 1.0)]),
}


def command(tmp_path, name, processes=2, folder="two"):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        f"--master_port={free_port()}",
    ]
    return [sys.executable, *launcher, str(script), str(tmp_path / folder), name]


def on_several(tmp_path, name, processes=2, folder="two"):
    words = command(tmp_path, name, processes, folder)
    return subprocess.run(words, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    "name, processes", [("minibatches", 2), ("resampling", 2), ("dropout", 2), ("minibatches", 4)]
)
def test_several_processes_learn_what_one_does(tmp_path, name, processes):
    """Minibatches, resampled prompts and dropout depended on the number of processes."""
    out = on_several(tmp_path, name, processes)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "Warning" not in out.stdout + out.stderr, out.stderr  # torch has some, about what gather is given
    train.main(CASES[name](tmp_path / "one"))
    one, several = [rows(tmp_path / folder / "run" / "metrics.jsonl") for folder in ("one", "two")]
    for ours, theirs in zip(one, several, strict=True):
        for key in ("num_tokens", "resampled_prompts"):
            assert ours[key] == theirs[key]
        assert ours["fingerprint"][:8] == theirs["fingerprint"][:8]  # the ids, of all processes
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-12)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    last = [weights(tmp_path / folder / "run" / "ckpt" / "step_000003") for folder in ("one", "two")]
    for key, tensor in last[0].items():
        if not key.startswith("optimizer"):
            torch.testing.assert_close(last[1][key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("victim", [0, 1])
def test_after_the_death_of_a_process_another_says_so_and_saves(tmp_path, victim):
    """After that of rank 0 nobody spoke and nothing was saved, since both were rank 0's to do."""
    with open(tmp_path / "told", "w") as told:
        words = command(tmp_path, "many steps")
        launcher = subprocess.Popen(words, stdout=told, stderr=subprocess.STDOUT)
    metrics = tmp_path / "two" / "run" / "metrics.jsonl"
    while launcher.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.01)
    found = [line.split() for line in (tmp_path / "told").read_text().splitlines() if "is process" in line]
    pid = {int(rank): int(pid) for _, rank, _, _, pid in found}[victim]
    os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    assert launcher.wait(60) != 0
    assert time.monotonic() - begin < 15
    told = (tmp_path / "told").read_text()
    assert told.count("\na process of this run has died") == 1, told
    assert told.count("; go on with: python train.py") == 1, told
    # That a run resumed from it ends with the same bits is among the faults of test_faults.py.
    (saved,) = Path(tmp_path / "two/run/ckpt").iterdir()
    assert int(saved.name[-6:]) >= 2


def test_a_reward_that_fails_on_rank_1_is_said_once_and_the_last_step_is_saved(tmp_path):
    """It ended in gloo's 'Connection closed by peer': its sentence was nowhere, and the step was lost."""
    out = on_several(tmp_path, "a failing reward")
    assert out.returncode != 0
    assert out.stdout.count("raised OSError: no such service") == 1, out.stdout + out.stderr
    assert "step_000002; go on with" in out.stdout
    assert "raised OSError: no such service; saved" in out.stderr  # on torchrun's page, too
    assert (tmp_path / "two" / "run" / "ckpt" / "step_000002").is_dir()
