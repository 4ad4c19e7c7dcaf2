"""Bad luck on purpose: real runs, real faults, and after each the same bits as a run that met none.

    python -m pytest -m slow tests/test_faults.py                              # 50 faults, about two minutes
    python -m pytest -m slow tests/test_faults.py --faults=500                 # more of them
    python -m pytest -m slow tests/test_faults.py --faults=500 -k "fault[137]" # one of them again

Fault number n is drawn from n alone: what runs (VARIANTS), what happens to it (FAULTS), and when. After it
the run is resumed, now and then killed again, and resumed until it ends. Then its last checkpoint and all of
its metrics must be those of a run of the same config that nothing happened to.

A process that has imported torch once (`serve`) forks a process for each run, and killing that is as real as
killing one that was started from a shell; it saves the four seconds that each would take to import.
"""

import errno
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

if __name__ == "__main__":  # as the process that forks
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import pytest

import ranks
import rewards as rewarding
import train
from conftest import ROOT, WITH_TURNS, even, rows, same, settings, untimed, weights
from test_promises import free_port

pytestmark = pytest.mark.slow

STEPS = 6
COMMON = dict(steps=STEPS, save_every=1, keep=3, eval_every=3, eval_problems=2, rollouts_every=3)


def flat_for_half(completions, prompts, **_):
    """A reward without any spread for every other prompt, for dynamic sampling to replace."""
    flat = [zlib.crc32(str(prompt).encode()) % 2 for prompt in prompts]
    return [0.5 if same_for_all else score for same_for_all, score in zip(flat, even(completions))]


def against_the_past(rewards, prompts, state):
    """An advantage with a memory, which is part of what a checkpoint holds."""
    mean = 0.9 * state.get("mean", 0.3) + 0.1 * float(rewards.nan_to_num(0.0).mean())
    return rewards - mean, dict(mean=mean)


VARIANTS = {
    "full": dict(),
    "lora": dict(lora_rank=2, lora_alpha=4.0, lora_dropout=0.1, beta=0.1),
    "sft": dict(sft_steps=2, sft_batch=4, lora_rank=2, lora_alpha=4.0),
    "bf16": dict(dtype="bfloat16", weight_decay=0.1),
    "dynamic": dict(resample_zero_groups=True, resample_budget=6),
    "epochs": dict(epochs=2, minibatches=2, schedule="cosine"),
    "moving reference": dict(beta=0.1, ref_sync_every=2),
    "memory": dict(advantage=against_the_past),
    "turns": dict(WITH_TURNS),
    "two processes": dict(),
    "sharded": dict(shard=True),
}
WORLD = {"two processes": 2, "sharded": 2}


# ------------------------------------------------------------------- the process that forks the runs
def serve():
    """Reads jobs from stdin, a line each; writes the process numbers of its ranks, then their exit codes."""
    with tempfile.TemporaryDirectory() as folder:  # so that all that is imported late is imported once
        quietly(lambda: train.main(settings(Path(folder), steps=1)))
        quietly(lambda: train.main(settings(Path(folder), steps=2, resume=True)))
    print("ready", flush=True)
    pids = []
    for text in sys.stdin:
        for pid in pids:
            os.waitpid(pid, 0)
        job, pids = json.loads(text), []
        for rank in range(job["world"]):
            pid = os.fork()
            if pid == 0:
                os._exit(one_run(job, rank))
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps([exit_code(pid) for pid in pids]), flush=True)


def exit_code(pid) -> int:
    """Of a process when it has ended; -N where signal N ended it.

    Its number stays taken until the next job, so that a signal sent late reaches nobody else.
    """
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status


def quietly(function):
    kept = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    function()
    sys.stdout.flush()
    os.dup2(kept, 1)


def one_run(job, rank) -> int:
    """What `python train.py` does with this job's config. Returns the exit status."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["world"] > 1:
        numbers = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=job["world"], LOCAL_WORLD_SIZE=job["world"])
        os.environ |= {key: str(number) for key, number in numbers.items()}
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    try:
        return train.main(config_of(job))
    except (ValueError, rewarding.RewardError, ranks.RankLost, OSError) as error:  # as train.py's last lines
        print(f"train.py: {error}", flush=True)
    except KeyboardInterrupt:
        print("train.py: stopped at once", flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    return 1


def config_of(job):
    keys = COMMON | VARIANTS[job["variant"]]
    plain = flat_for_half if job["variant"] == "dynamic" else even
    calls = []

    def reward(completions, prompts, **_):
        calls.append(1)
        if len(calls) == job.get("at_call"):
            INSIDE[job["fault"]](job)
        return plain(completions, prompts=prompts)

    # By one name in every run, since the name is part of the config.
    reward.__name__ = "even"
    keys |= dict(rewards=[(reward, 1.0)], reward_timeout=job.get("reward_timeout", 60.0))
    out = str(Path(job["folder"]) / "run")
    return settings(Path(job["folder"]), **keys | job.get("keys", {}), out_dir=out, resume=job["resume"])


# What happens inside a run, in the call of a reward.
def hang(job):
    time.sleep(60)


def fail(job):
    raise OSError("no such service")


def turn_the_clock_back(job):
    """From here on the time of day is an hour ago, and goes back by a second with each look at it."""
    real, looks = time.time, []

    def earlier():
        looks.append(1)
        return real() - 3600 - len(looks)

    time.time = earlier


def lose_the_temporary_folder(job):
    """A reward that keeps something in the temporary folder, which somebody has cleaned up."""
    tempfile.tempdir = str(Path(job["folder"]) / "tmp")
    os.mkdir(tempfile.tempdir)
    os.rmdir(tempfile.tempdir)
    with tempfile.NamedTemporaryFile():
        raise AssertionError("the folder is there")


INSIDE = {
    "a reward that hangs": hang,
    "a reward that fails": fail,
    "a clock that jumps": turn_the_clock_back,
    "the temporary folder gone": lose_the_temporary_folder,
}


# ----------------------------------------------------------------------------------- the test's side
class Server:
    """The process that forks, seen from the test."""

    def __init__(self):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        quiet = dict(os.environ, PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1")
        self.process = subprocess.Popen([sys.executable, __file__], env=quiet, cwd=ROOT, **pipes)
        assert self.line() == "ready\n"
        self.runs = False  # a job, whose exit codes are not read yet

    def line(self, seconds=120):
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        assert ready, f"no answer in {seconds} s"
        return self.process.stdout.readline()

    def start(self, **job) -> list[int]:
        assert not self.runs, "the run of an earlier test has not ended"
        self.runs = True
        job = dict(world=WORLD.get(job["variant"], 1), port=free_port(), **job)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.line())

    def wait(self, pids, seconds=60) -> list[int]:
        """Exit statuses of the ranks; -N for one that signal N has ended."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not ready:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            self.line()
            self.runs = False
            raise AssertionError(f"the run had not ended after {seconds} s")
        self.runs = False
        return json.loads(self.line())

    def run(self, **job) -> list[int]:
        return self.wait(self.start(**job))


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(60)


@pytest.fixture
def left_in_peace(server):
    """A test that fails in the middle of a run does not take the next one with it."""
    yield
    if server.runs:
        server.wait([])


@pytest.fixture(scope="module")
def unhurt(server, tmp_path_factory):
    """variant -> (folder of a run of it that nothing happened to, seconds that it took)."""
    found = {}

    def of(variant):
        if variant not in found:
            folder = tmp_path_factory.mktemp("unhurt")
            begin = time.perf_counter()
            log = folder / "log"
            codes = server.run(variant=variant, folder=str(folder), log=str(log), resume=False, fault="none")
            assert set(codes) == {0}, log.read_text()
            found[variant] = folder, time.perf_counter() - begin
        return found[variant]

    return of


class Victim:
    """A run that something happens to."""

    def __init__(self, server, variant, folder, seconds, rng):
        self.server, self.variant, self.folder, self.rng = server, variant, folder, rng
        self.seconds = seconds  # that it takes when nothing happens
        self.out, self.log = folder / "run", folder / "log"
        self.ckpt = self.out / "ckpt"

    def job(self, resume, **more):
        files = dict(folder=str(self.folder), log=str(self.log))
        return dict(variant=self.variant, resume=resume, fault="none") | files | more

    def whole_checkpoints(self):
        return sorted(self.ckpt.glob("step_*"))


def until(condition, seconds=30):
    """Waits until a thing is there, looking often; whether it came."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0003)
    return False


def send_at_some_time(number):
    def strike(victim, resume):
        said = victim.log.stat().st_size if victim.log.exists() else 0
        pids = victim.server.start(**victim.job(resume))
        time.sleep(victim.rng.random() * victim.seconds)
        os.kill(victim.rng.choice(pids), number)
        if len(pids) > 1 and not select.select([victim.server.process.stdout], [], [], 15)[0]:
            # The other process waits for one that never came, which is its launcher's to end (torchrun's).
            assert b"GRPO on" not in victim.log.read_bytes()[said:], "the processes had met"
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        return victim.server.wait(pids)

    return strike


def kill_while_saving(victim, resume):
    """From when the folder of a save is there, which is renamed when the save is done."""
    pids = victim.server.start(**victim.job(resume))
    wanted = victim.rng.randint(1, STEPS)
    until(lambda: (victim.ckpt / f".tmp-step_{wanted:06d}").exists(), 1.5 * victim.seconds)
    time.sleep(victim.rng.random() * 0.01)
    os.kill(pids[0], signal.SIGKILL)
    return victim.server.wait(pids)


def happen_inside(name):
    def strike(victim, resume):
        more = dict(fault=name, at_call=victim.rng.randint(1, STEPS + 2))
        if name == "a reward that hangs":
            more["reward_timeout"] = 0.5
        return victim.server.run(**victim.job(resume, **more))

    return strike


def fill_the_disk(victim, resume):
    """Everything but some kilobytes of a small disk is taken, and given back when the run has ended."""
    more = dict(keys=dict(save_failure=victim.rng.choice(["warn", "stop"])))
    pids = victim.server.start(**victim.job(resume, **more))
    time.sleep(victim.rng.random() * victim.seconds)
    ballast = victim.folder / "ballast"
    room = max(0, shutil.disk_usage(victim.folder).free - victim.rng.randint(0, 400_000))
    try:
        ballast.write_bytes(b"\0" * room)
    except OSError as error:  # the run has written, too, since the look at what is free
        assert error.errno == errno.ENOSPC
    codes = victim.server.wait(pids)
    ballast.unlink()
    return codes


def flip_a_byte(victim, resume):
    """A byte of the newest checkpoint is another when the run is resumed."""
    codes = send_at_some_time(signal.SIGKILL)(victim, resume)
    found = victim.whole_checkpoints()
    if len(found) > 1:
        files = sorted(path for path in found[-1].rglob("*") if path.is_file())
        path = victim.rng.choice(files)
        content = bytearray(path.read_bytes())
        content[victim.rng.randrange(len(content))] ^= 1 << victim.rng.randrange(8)
        path.write_bytes(content)
    return codes


FAULTS = {
    "SIGKILL": send_at_some_time(signal.SIGKILL),
    "SIGKILL while saving": kill_while_saving,
    "SIGTERM": send_at_some_time(signal.SIGTERM),
    "SIGINT": send_at_some_time(signal.SIGINT),
    "a full disk": fill_the_disk,
    "a flipped byte": flip_a_byte,
} | {name: happen_inside(name) for name in INSIDE}


# Those that every run meets, and that no run goes on after.
ENDS = ("a reward that hangs", "a reward that fails", "the temporary folder gone")


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A disk of 6 MB of its own, where the system lets us mount one."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_fault(number, server, left_in_peace, unhurt, small_disk, tmp_path, record_property):
    rng = random.Random(number)
    variant, name = rng.choice(list(VARIANTS)), rng.choice(list(FAULTS))
    folder = tmp_path
    if name == "a full disk":
        if small_disk is None:
            pytest.skip("no small disk can be mounted here")
        folder = small_disk / str(number)
        folder.mkdir()
    whole, seconds = unhurt(variant)
    victim = Victim(server, variant, folder, seconds, rng)
    told = f"fault {number}: {name}, {variant}"
    strikes = [name]
    if rng.random() < 0.3:
        strikes.append("SIGKILL")  # of the resumed run
    resume = False
    for strike in strikes:
        codes = FAULTS[strike](victim, resume)
        if strike in ENDS:
            assert 0 not in codes, f"{told} did not end it\n{victim.log.read_text()}"
        record_property(strike, f"{variant}: exit {codes}")  # in --junitxml=FILE
        resume = True
    codes = server.run(**victim.job(resume))
    text = victim.log.read_text()
    told += f", {strikes}; exit {codes}\n{text}"
    assert set(codes) == {0} and "Traceback" not in text, told
    end = f"ckpt/step_{STEPS:06d}"
    assert same(weights(whole / "run" / end), weights(victim.out / end)), told
    ours, theirs = [[untimed(row) for row in rows(at / "run/metrics.jsonl")] for at in (folder, whole)]
    assert ours == theirs, told
    assert not list(victim.ckpt.glob(".*")), told
    shutil.rmtree(folder)


def test_memory_is_flat_over_300_steps(server, left_in_peace, tmp_path):
    """The peak of memory after 300 steps, 30 saves and 30 files of rollouts is that after 100."""
    log, keys = (
        str(tmp_path / "log"),
        dict(steps=300, save_every=10, eval_every=0, rollouts_every=10, lr=1e-4),
    )
    job = dict(variant="full", folder=str(tmp_path), log=log, resume=False, fault="none", keys=keys)
    assert server.wait(server.start(**job), 300) == [0], Path(log).read_text()
    peak = {row["step"]: row["memory/peak_gb"] for row in rows(tmp_path / "run" / "metrics.jsonl")}
    assert peak[300] - peak[100] < 0.004, {step: peak[step] for step in (1, 50, 100, 200, 300)}


def pytest_generate_tests(metafunc):
    if "number" in metafunc.fixturenames:
        count = metafunc.config.getoption("--faults")
        metafunc.parametrize("number", range(count), ids=str)


if __name__ == "__main__":
    serve()
