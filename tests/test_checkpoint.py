"""A process that dies anywhere leaves a whole checkpoint; damage is noticed. Real kills and signals."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import check_same_run, load_state, newest, save, truncate_metrics, uninterrupted, writable

ROOT = Path(checkpoint.__file__).parent


def write(out, step, value=None, **options):
    """A checkpoint in which the model, the optimiser and the state all hold `value`."""
    value = step if value is None else value
    tensor = torch.full((3, 4), float(value))

    def write_model(folder):
        save_file({"w": tensor}, folder / "model.safetensors")
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.txt").write_text(f"value {value}")

    return save(
        out,
        step,
        write_model=write_model,
        optimizer_state={"exp_avg.w": tensor, "step": torch.tensor(float(step))},
        state={"value": value},
        **options,
    )


def value_of(folder):
    """The value of a checkpoint, which must be the same in all of its parts."""
    tensors, state = load_state(folder)
    assert load_file(folder / "model.safetensors")["w"][0, 0] == tensors["exp_avg.w"][0, 0] == state["value"]
    assert (folder / "tokenizer" / "vocab.txt").read_text() == f"value {state['value']}"
    return state["value"]


def names(out):
    return sorted(path.name for path in (out / "ckpt").iterdir())


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    tensors = {
        "a": torch.randn(5, 3).t(),
        "b": torch.tensor([float("nan"), -0.0]),
        "step": torch.tensor(7.0),
        "c": torch.randn(4).bfloat16(),
    }
    state = {
        "seed": 3,
        "lr": 0.1 + 0.2,
        "loss": float("inf"),
        "model": {"hidden_size": 576},
        "eos": [1, 2],
        "text": "é\n\ud800",
    }
    path = save(tmp_path, 12, write_model=lambda folder: None, optimizer_state=tensors, state=state)
    assert path == tmp_path / "ckpt" / "step_000012" == newest(tmp_path)
    loaded, loaded_state = load_state(path)
    assert loaded_state == {**state, "step": 12}
    assert loaded.keys() == tensors.keys()
    for name, t in tensors.items():
        assert loaded[name].dtype == t.dtype and torch.equal(loaded[name].nan_to_num(9), t.nan_to_num(9))


def test_state_keys_that_json_turns_into_strings_do_not_look_like_damage(tmp_path):
    """Integers sort as 9, 10, their names as "10", "9": the checksum must be of what will be read."""
    path = save(
        tmp_path,
        1,
        write_model=lambda f: None,
        optimizer_state={"t": torch.ones(1)},
        state={"solved": {9: 1, 10: (2,)}},
    )
    assert newest(tmp_path) == path and load_state(path)[1]["solved"] == {"9": 1, "10": [2]}


def test_nothing_to_resume_from_is_none(tmp_path):
    assert newest(tmp_path) is None and newest(tmp_path / "absent") is None


@pytest.mark.parametrize("keep, left", [(0, [2, 4, 6, 8]), (1, [8]), (2, [6, 8]), (9, [2, 4, 6, 8])])
def test_the_newest_are_kept_and_older_ones_removed(tmp_path, keep, left):
    for step in (2, 4, 6, 8):
        write(tmp_path, step, keep=keep)
    assert names(tmp_path) == [f"step_{step:06d}" for step in left]


def test_later_and_damaged_checkpoints_are_neither_deleted_nor_counted(tmp_path, capsys):
    """A run taken up from step 4, since 6 is damaged, must not count 6, nor delete what it did not make."""
    for step in (2, 4, 6, 9):
        write(tmp_path, step, keep=0)
    (tmp_path / "ckpt" / "step_000006" / "model.safetensors").unlink()
    write(tmp_path, 8, keep=2)
    assert names(tmp_path) == ["step_000004", "step_000006", "step_000008", "step_000009"]


def test_steps_beyond_a_million_are_newer(tmp_path):
    for step in (999_999, 1_000_000):
        write(tmp_path, step, keep=0)
    assert value_of(newest(tmp_path)) == 1_000_000


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "tokenizer/vocab.txt", "state.json"]
)
@pytest.mark.parametrize("damage", ["shorter", "longer", "other", "missing"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path, capsys, name, damage):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    content = file.read_bytes()
    at = len(content) - 1
    if b"2" in content:  # as in state.json: a digit, so that it stays JSON
        at = content.rindex(b"2")
    new = {
        "shorter": content[:-3],
        "longer": content + b"1",
        "other": content[:at] + b"3" + content[at + 1 :],
        "missing": None,
    }[damage]
    file.unlink() if new is None else file.write_bytes(new)
    assert value_of(newest(tmp_path)) == 1
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and name in out and "step_000002" in out
    if damage != "other":
        with pytest.raises(ValueError, match=name):
            load_state(tmp_path / "ckpt" / "step_000002")


def test_every_digit_of_the_state_is_guarded(tmp_path, capsys):
    file = write(tmp_path, 5) / "state.json"
    content = file.read_bytes()
    for at, byte in enumerate(content):
        if chr(byte).isalnum():
            file.write_bytes(content[:at] + (b"7" if byte != ord("7") else b"8") + content[at + 1 :])
            assert newest(tmp_path) is None, f"byte {at} was changed and not noticed"


KILLER = """
import os, shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[2:]
import checkpoint
from test_checkpoint import names, newest, value_of, write

# A killed process loses nothing that it wrote, only a power cut would; and fsync takes its time.
os.fsync = lambda fd: None

# The victim dies just before the k-th of: the lines of save and _sweep, and the files and folders that rmtree
# deletes. What else they call writes nothing before its last line, so to die in there leaves what a death at
# the caller's line, or at the next one, leaves.
WRITERS = [checkpoint.save.__code__, checkpoint._sweep.__code__]

def die_at(k):
    left = k

    def tick():
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(9)

    def trace(frame, event, arg):
        if frame.f_code in WRITERS:
            if event == "line":
                tick()
            return trace

    sys.addaudithook(lambda event, args: tick() if event in ("os.remove", "os.rmdir") else None)
    sys.settrace(trace)

def killed(k, action):
    child = os.fork()
    if child == 0:
        die_at(k)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

top = Path(sys.argv[1])
for step in (1, 2, 3):
    write(top / "before", step, keep=0)
for old in (None, 3):  # an empty folder; and one where step 3 is replaced and step 1 is removed
    k, finds, died = 0, [], True
    while died:
        k += 1
        out = top / f"{old}-{k}"
        if old:
            shutil.copytree(top / "before", out)
        died = killed(k, lambda: write(out, 3, 30, keep=2))
        found = newest(out)
        finds.append(found and value_of(found))
        write(out, 4, keep=2)  # the save after it clears up, and loses nothing
        left = ["step_000003", "step_000004"] if finds[-1] else ["step_000004"]
        assert names(out) == left, (old, k, names(out))
        assert value_of(out / "ckpt" / left[0]) == (finds[-1] or 4), (old, k)
        shutil.rmtree(out)
    # Old ... old, new ... new: never neither, and once the new one is there it stays.
    turn = finds.index(30)
    assert finds == [old] * turn + [30] * (k - turn) and turn > 10, (old, finds)
    print("died at", k - 1, "places")
"""


@pytest.mark.slow
def test_a_save_killed_at_any_line_leaves_the_old_or_the_new_checkpoint_whole(tmp_path):
    paths = [str(ROOT), str(Path(__file__).parent)]
    command = [sys.executable, "-c", KILLER, str(tmp_path), *paths]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    # Nor was there ever a folder that newest() had to pass over.
    assert run.stdout.count("died at") == 2 and "warning" not in run.stdout


def test_content_and_folders_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """What a power cut needs: fsync of every file and folder, then the rename, then fsync of its folder."""
    log, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append(f"rename {Path(b).name}"), rename(a, b)))
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to see which file is synced")
    path = write(tmp_path, 1)
    at = log.index("rename step_000001")
    inside = {".", *(str(p.relative_to(path)) for p in path.rglob("*"))}
    synced = {os.path.relpath(p, path.with_name(".tmp-step_000001")) for p in log[:at]}
    assert synced == inside and len(inside) == 6
    assert log[at + 1 :] == [str(tmp_path / "ckpt"), str(tmp_path)]


def test_a_save_that_fails_leaves_the_old_one_and_the_next_succeeds(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(TypeError):
        save(tmp_path, 2, write_model=lambda f: None, optimizer_state={}, state={"bad": object()})
    with pytest.raises(ZeroDivisionError):
        save(tmp_path, 2, write_model=lambda f: 1 / 0, optimizer_state={}, state={})
    assert value_of(newest(tmp_path)) == 1
    write(tmp_path, 2)
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_a_checkpoint_of_another_model_is_refused_with_every_difference():
    state = {"step": 100, "model": {"model": "smollm", "hidden_size": 576, "layers": [1, 2], "lora_rank": 8}}
    check_same_run(state, {"model": "smollm", "hidden_size": 576, "layers": (1, 2), "lora_rank": 8})
    said = "step 100 was made with model smollm, hidden_size 576; this run has model qwen, hidden_size 896"
    with pytest.raises(ValueError, match=said):
        check_same_run(state, {"model": "qwen", "hidden_size": 896, "layers": [1, 2], "lora_rank": 8})
    with pytest.raises(ValueError, match="lora_rank 8; this run has lora_rank absent"):
        check_same_run(state, {"model": "smollm", "hidden_size": 576, "layers": [1, 2]})
    with pytest.raises(ValueError, match="made with dtype absent; this run has dtype fp32"):
        check_same_run({"step": 1}, {"dtype": "fp32"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_outermost_block(number):
    before, done = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(number)
                done.append("inner")
            signal.raise_signal(number)
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with uninterrupted():
        pass  # nothing is left over


def test_an_error_inside_the_block_is_not_lost_when_a_signal_comes_too():
    with pytest.raises(KeyboardInterrupt) as caught:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            raise FloatingPointError("nan")
    assert isinstance(caught.value.__context__, FloatingPointError)
    with pytest.raises(FloatingPointError):
        with uninterrupted():
            raise FloatingPointError("nan")


def test_the_callers_own_handler_gets_the_signal_and_an_ignored_one_stays_ignored():
    received = []
    old_term = signal.signal(signal.SIGTERM, lambda *a: received.append(a[0]))
    old_int = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert received == []
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, old_term)
        signal.signal(signal.SIGINT, old_int)


def test_outside_the_main_thread_the_block_does_nothing():
    ran = []

    def work():
        with uninterrupted():
            ran.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start(), thread.join()
    assert ran == [signal.getsignal(signal.SIGINT)]


def test_ctrl_c_during_a_save_comes_after_it(tmp_path):
    def write_model(folder):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, write_model=write_model, optimizer_state={"t": torch.ones(1)}, state={})
    assert newest(tmp_path) == tmp_path / "ckpt" / "step_000001"


def test_metrics_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [b'{"step": %d, "loss": 0.50, "kl": {"a": NaN}}\n' % step for step in (1, 2, 2, 3, 4)]
    path.write_bytes(b"".join(rows) + b'{"step": 2, "kl": {"a": 1}')
    assert truncate_metrics(path, 2) == 3
    assert path.read_bytes() == b"".join(rows[:3])
    stamp = path.stat().st_mtime_ns
    assert truncate_metrics(path, 2) == 0 and path.stat().st_mtime_ns == stamp
    assert truncate_metrics(tmp_path / "absent.jsonl", 2) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_cannot_be_written_is_refused_with_the_reason(tmp_path):
    writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    unwritable = [tmp_path / "file", tmp_path / "file" / "below"]
    if os.path.isdir("/proc"):
        unwritable.append("/proc/nothing")
    for bad in unwritable:
        with pytest.raises(ValueError, match="cannot write to .*--out_dir=PATH"):
            writable(bad)
