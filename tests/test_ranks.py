"""Real runs on several processes beside the same run on one, and errors that every rank raises together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import optim
import ranks
import train
from conftest import ROOT, WITH_TURNS, even, rows, same, settings, weights
from test_train import by_prompt

pytestmark = pytest.mark.slow

SCRIPT = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
import ranks
import train
import test_ranks, test_shard, test_teacher
try:
    status = train.main(test_ranks.CASES[sys.argv[2]](Path(sys.argv[1])))
except ValueError as e:
    ranks.leave(f"train.py: {{e}}")  # as train.py's last lines do
ranks.end(status)
"""


def fails_on_rank_1(completions, **_):
    calls.append(1)
    if os.environ.get("RANK") == "1" and len(calls) == 3:
        raise OSError("no such service")
    return even(completions)


def dies_on_rank_1(completions, **_):
    calls.append(1)
    if os.environ.get("RANK") == "1" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is short
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
    "twenty steps": case(steps=20, beta=0.1),
    "resampling": case(resample_zero_groups=True, resample_budget=6, rewards=[(by_prompt, 1.0)]),
    "dropout": case(lora_rank=4, lora_alpha=8.0, lora_dropout=0.2, beta=0.1),
    "turns": case(**WITH_TURNS, rewards=[("env", 0.1), (even, 1.0)], resample_zero_groups=True),
    "base in 4 bits": case(lora_rank=4, lora_alpha=8.0, base="nf4"),
    "a failing reward": case(rewards=[(fails_on_rank_1, 1.0)], save_every=0),
    "a killed process": case(rewards=[(dies_on_rank_1, 1.0)], save_every=0),
    "not divisible": case(prompts_per_step=7),
    "bf16": case(dtype="bfloat16"),
    "8 bits": case(dtype="bfloat16", optimizer_bits=8),
    "8 bits, shared": case(dtype="bfloat16", optimizer_bits=8, shard_optimizer=True),
    "bf16, shared": case(dtype="bfloat16", shard_optimizer=True),
    "lora, shared": case(lora_rank=4, lora_alpha=8.0, beta=0.1, shard_optimizer=True),
    "lora": case(lora_rank=4, lora_alpha=8.0, beta=0.1),
    "many steps": case(steps=200, save_every=0, rewards=[(slowly, 1.0)]),
    "a killed process, shared": case(rewards=[(dies_on_rank_1, 1.0)], save_every=1, shard_optimizer=True),
}


def command(processes, tmp_path, name, folder):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *launcher, str(script), str(tmp_path / folder), name]


def on(processes, tmp_path, name, folder="several"):
    words = command(processes, tmp_path, name, folder)
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "name, processes",
    [
        ("minibatches", 2),
        ("minibatches", 4),
        ("resampling", 2),
        ("dropout", 2),
        ("turns", 2),
        ("base in 4 bits", 2),
        ("twenty steps", 2),
        ("twenty steps", 4),
    ],
)
def test_several_processes_learn_what_one_does(tmp_path, name, processes):
    """Minibatches, resampled prompts and dropout depended on the number of processes."""
    out = on(processes, tmp_path, name)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "Warning" not in out.stderr
    train.main(CASES[name](tmp_path / "one"))
    one, several = [rows(tmp_path / folder / "run" / "metrics.jsonl") for folder in ("one", "several")]
    for ours, theirs in zip(one, several, strict=True):
        assert ours["fingerprint"][:8] == theirs["fingerprint"][:8]  # the same ids in the same places
        for key in ("num_tokens", "resampled_prompts"):
            assert ours[key] == theirs[key]
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-12)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    step = f"step_{len(one):06d}"
    last = [weights(tmp_path / folder / "run" / "ckpt" / step) for folder in ("one", "several")]
    for key, tensor in last[0].items():
        if not key.startswith("optimizer"):
            torch.testing.assert_close(last[1][key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("victim", [0, 1])
def test_after_the_death_of_a_process_another_says_so_and_saves(tmp_path, victim):
    """After that of rank 0 nobody spoke and nothing was saved, since both were rank 0's to do."""
    with open(tmp_path / "told", "w") as told:
        words = command(2, tmp_path, "many steps", "two")
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
    out = on(2, tmp_path, "a failing reward")
    assert out.returncode != 0
    assert out.stdout.count("raised OSError: no such service") == 1, out.stdout + out.stderr
    assert "step_000002; go on with" in out.stdout
    assert "raised OSError: no such service" in out.stderr  # on torchrun's page, too
    assert (tmp_path / "several" / "run" / "ckpt" / "step_000002").is_dir()


def test_a_process_that_is_killed_ends_the_run_with_a_sentence_and_a_save(tmp_path):
    begin = time.monotonic()
    out = on(2, tmp_path, "a killed process")
    assert out.returncode != 0 and time.monotonic() - begin < 60
    assert out.stdout.count("a process of this run has died") == 1, out.stdout + out.stderr
    assert "saved" in out.stdout and "step_000002; go on with" in out.stdout
    assert "Traceback" not in out.stdout  # ours; torchrun prints its own, and then the sentence once more
    assert "a process of this run has died" in out.stderr.rpartition("Traceback")[2]
    assert (tmp_path / "several" / "run" / "ckpt" / "step_000002").is_dir()


STORE = """
import time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
keys = store.num_keys()
while store.num_keys() == keys:
    time.sleep(0.1)
time.sleep(1)
"""


@pytest.mark.slow
def test_a_process_that_dies_before_all_have_met_is_one_sentence(tmp_path):
    """Fault 197: rank 0 was killed while rank 1 waited for its address, and rank 1 ended in a traceback."""
    first = subprocess.Popen([sys.executable, "-c", STORE], stdout=subprocess.PIPE, text=True)
    numbers = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=first.stdout.readline().strip())
    where["TORCHELASTIC_ERROR_FILE"] = str(tmp_path / "page")  # what torchrun's last page says
    words = [sys.executable, str(ROOT / "train.py"), "configs/arithmetic.py", f"--out_dir={tmp_path}/run"]
    second = subprocess.Popen(
        words, env=os.environ | numbers | where, cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert first.wait(60) == 0  # it is gone a second after the other has told it its address
    told, _ = second.communicate(timeout=60)
    assert second.returncode == 1 and "Traceback" not in told, told
    assert "train.py: the processes of this run have not met (" in (tmp_path / "page").read_text()


def test_prompts_that_processes_cannot_share_evenly_are_refused_once(tmp_path):
    out = on(2, tmp_path, "not divisible")
    assert out.returncode != 0
    said = "train.py: prompts_per_step = 7 does not divide among 2 processes"
    ours, _, launchers = (out.stdout + out.stderr).partition("Traceback")
    assert ours.count(said) == 1 and said in launchers, out.stdout + out.stderr
    assert not (tmp_path / "several").exists()


@pytest.mark.parametrize("name, processes", [("bf16", 2), ("lora", 4), ("8 bits", 2)])
def test_a_shared_optimiser_changes_no_bit_and_its_checkpoint_is_anybodys(tmp_path, name, processes):
    for folder, which in (("apart", name), ("shared", f"{name}, shared")):
        out = on(processes, tmp_path, which, folder)
        assert out.returncode == 0, out.stdout + out.stderr
    apart, shared = [tmp_path / folder / "run" for folder in ("apart", "shared")]
    prints = [[row["fingerprint"] for row in rows(run / "metrics.jsonl")] for run in (apart, shared)]
    assert prints[0] == prints[1]
    last = [weights(run / "ckpt" / "step_000003") for run in (apart, shared)]
    assert last[0].keys() == last[1].keys() and same(*last)
    # One process goes on with either.
    for folder, which in (("apart", name), ("shared", f"{name}, shared")):
        cfg = CASES[which](tmp_path / folder)
        assert train.main(type(cfg)(**{**cfg.__dict__, "steps": 5, "resume": True})) == 0
    assert same(*[weights(run / "ckpt" / "step_000005") for run in (apart, shared)])


def test_a_killed_process_takes_its_part_of_a_shared_optimiser_with_it(tmp_path):
    out = on(2, tmp_path, "a killed process, shared")
    assert out.returncode != 0
    assert "not saved, because a part of the optimiser was that process's" in out.stdout, (
        out.stdout + out.stderr
    )
    assert (tmp_path / "several" / "run" / "ckpt" / "step_000002").is_dir()  # as it was saved in time


def test_each_rank_has_its_part_of_a_shared_optimiser_and_no_more(monkeypatch):
    sizes = [7, 500, 30, 30, 500, 1, 400]
    params = [(str(i), torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16))) for i, n in enumerate(sizes)]
    monkeypatch.setattr(ranks, "world", lambda: 3)
    owners = ranks.share_out([p for _, p in params])
    held = [0, 0, 0]
    for rank in range(3):
        opt = optim.AdamW(params, lr=0.1, owners=owners, rank=rank)
        held[rank] = sum(t.nbytes for t in opt.state().values())
    assert sum(held) - 8 == sum(t.nbytes for t in opt.whole_state().values())  # each counts its steps
    assert max(held) < 1.5 * min(held)
