"""Checkpoints that are whole or absent, and a resume that goes on with the same bits.

    out_dir/ckpt/step_000100/
        config.json, model.safetensors, ...   what write_model(folder) writes: Hugging Face's or PEFT's files
        optimizer.safetensors                 AdamW.state()
        state.json                            step, the caller's state, [bytes, sha256] of each file

A process can die between any two instructions (out of memory, preempted, a second Ctrl-C, a full disk).
So a checkpoint is written under a name that nobody reads, made durable (fsync), and then gets its real
name in one rename, which a POSIX file system does entirely or not at all. Names that begin with a dot
belong to saves that have not ended:

    .tmp-*             rubbish: half a save, or an old checkpoint on its way out; every save deletes it
    .old-step_000100   a whole checkpoint that made room for a new step_000100; read only if that never came

Nothing is pickled: a checkpoint from a stranger can be looked at, and loaded, without running their code.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def save(
    out_dir: str | Path,
    step: int,
    *,
    write_model: Callable[[Path], object],
    optimizer_state: dict[str, Tensor],
    state: dict,
    keep: int = 2,
) -> Path:
    """Writes out_dir/ckpt/step_{step} and returns its path. Ctrl-C waits until it is done.

    One process may save at a time. `write_model(folder)` writes the model's files; `state` is any dict that
    JSON can hold. A checkpoint of the same step is replaced. The `keep` newest up to this step stay (0: all);
    older ones go only when this one is on the disk, so there must be room for keep + 1. Never deleted: later
    steps (of a run that was taken up again from an earlier one), and damaged folders, which do not count
    either: they would push out the last good one.
    """
    ckpt = Path(out_dir) / "ckpt"
    name = f"step_{step:06d}"
    final = ckpt / name
    tmp = ckpt / f".tmp-{name}"
    old = ckpt / f".old-{name}"
    with uninterrupted():
        ckpt.mkdir(parents=True, exist_ok=True)
        _sweep(ckpt)
        tmp.mkdir()
        try:
            with os_errors():
                write_model(tmp)
                tensors = {key: t.detach().contiguous() for key, t in optimizer_state.items()}
                save_file(tensors, tmp / "optimizer.safetensors")
            # state.json comes last: its presence says that all before it was written, its manifest what.
            _write_state(tmp, step, state)
            # The content reaches the disk before the name does. Left to itself a file system orders them as
            # it likes, and a power cut soon after the rename would leave the right name on empty files.
            _fsync(*tmp.rglob("*"), tmp)
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)  # a full disk is not left fuller by half a save
            raise
        if final.exists():
            # rename() cannot replace a folder that has files. Deleting the old one first would leave a moment
            # with neither; moved aside it is still found by newest(), until the new one stands in its place.
            os.rename(final, old)
        os.rename(tmp, final)
        _fsync(ckpt, ckpt.parent)  # both renames, and ckpt/ itself, which may be new
        if keep:
            earlier = []  # whole ones, newest first
            for at, path in _candidates(ckpt):
                if at < step and not _problem(path, content=False):
                    earlier.append(path)
            for path in earlier[keep - 1 :]:
                # Deleted under its own name, a kill in the middle would leave a damaged checkpoint.
                os.rename(path, ckpt / f".tmp-{path.name}")
        _sweep(ckpt)
    return final


def newest(out_dir: str | Path, run: str | None = None) -> Path | None:
    """The newest whole checkpoint under out_dir, or None; prints what is passed over.

    run: passes over those whose state names another run. Every byte is checked, at 1.5 GB/s. Read the step
    from load_state(path), not from the name: a save killed while replacing leaves .old-step_000100.
    """
    for _, path in _candidates(Path(out_dir) / "ckpt"):
        problem = _problem(path)
        if problem:
            print(f"warning: checkpoint {path} is not whole and is passed over: {problem}")
        elif run and _run_of(path) not in (run, None):
            print(f"warning: checkpoint {path} is of another run and is passed over")
        else:
            return path
    return None


def has_any(out_dir: str | Path) -> bool:
    """Whether there is anything that was saved as a checkpoint, whole or not."""
    return bool(_candidates(Path(out_dir) / "ckpt"))


def sweep(out_dir: str | Path) -> None:
    """Ends what a killed save left behind, where no save will follow that does. For one process."""
    ckpt = Path(out_dir) / "ckpt"
    if ckpt.is_dir():
        _sweep(ckpt)


def rewrite_manifest(folder: Path) -> None:
    """Writes a checkpoint's state.json anew, after one of its files was changed on purpose."""
    stored = json.loads((folder / "state.json").read_text())
    _write_state(folder, stored["step"], stored["state"])


def load_state(folder: str | Path) -> tuple[dict[str, Tensor], dict]:
    """(optimizer_state, state) as they were given to save(), and state["step"]; the tensors are on the CPU.

    Raises ValueError if files are missing or of the wrong size (their content is checked by newest()).
    """
    folder = Path(folder)
    problem = _problem(folder, content=False)
    if problem:
        raise ValueError(f"{folder} is not a whole checkpoint: {problem}")
    stored = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "optimizer.safetensors")
    return tensors, {**stored["state"], "step": stored["step"]}


def check_same_run(state: dict, expected: dict) -> None:
    """Raises ValueError, naming every difference, unless state["model"] equals `expected`.

    expected: a flat dict of what must not change on resume (model, hidden_size, dtype, lora_rank, ...).
    Different shapes would fail later and less clearly; equal shapes (another model of the same family,
    another lora_alpha) would not fail at all and train on nonsense.
    """
    stored = state.get("model", {})
    expected = json.loads(json.dumps(expected))  # tuples become lists, as in the file
    theirs, mine = [], []
    for key in {**stored, **expected}:
        was, now = stored.get(key, "absent"), expected.get(key, "absent")
        if was != now:
            theirs.append(f"{key} {was}")
            mine.append(f"{key} {now}")
    if theirs:
        raise ValueError(
            f"the checkpoint of step {state.get('step')} was made with {', '.join(theirs)}; "
            f"this run has {', '.join(mine)}: "
            "go on with the same values, or start anew in another out_dir"
        )


@contextmanager
def uninterrupted():
    """Ctrl-C (SIGINT) and SIGTERM wait for the end of the block, then raise KeyboardInterrupt.

    Around an optimiser update it keeps weights, moments and step together: Python raises KeyboardInterrupt
    between any two bytecodes, and the save that follows would store half an update as if it were whole. What
    waited is handed to the handler that was there before: that of an enclosing block waits on, one of the
    caller's own decides for itself. Only the main thread receives signals, in others this does nothing; a
    signal that was ignored (nohup) stays ignored. If the block fails by itself, its error is the __context__
    of the KeyboardInterrupt, so both are shown.
    """
    previous = {}  # signal -> the handler that was there before
    caught = []

    def wait(number, frame):
        caught.append(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # None is a handler that was not set from Python: it could not be put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, wait)
    try:
        yield
    finally:
        # SIGINT last: until then it cannot break this loop.
        for number, handler in reversed(previous.items()):
            signal.signal(number, handler)
        if caught:
            number = caught[0]
            handler = previous[number]
            if not callable(handler):  # the system's default for SIGTERM, which would kill at once
                raise KeyboardInterrupt(signal.Signals(number).name)
            handler(number, None)  # one signal, however many came


@contextmanager
def os_errors():
    """Raises the OSError that a library in Rust met as that OSError.

    safetensors and tokenizers have error types of their own, which say "No space left on device (os error
    28)" and are no OSError: a full disk would end a run that could have gone on.
    """
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def truncate_metrics(path: str | Path, step: int) -> int:
    """Drops the rows of a .jsonl file after `step`, and a torn last line. Returns how many lines went.

    The run goes on from a checkpoint and will write those rows again; kept, they would draw every curve back
    and forth. A kill in the middle of a write tears the last line: it has no end. The file is replaced
    atomically, and kept lines stay byte for byte.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for line in lines:
        whole = line.endswith(b"}\n")
        if whole and json.loads(line)["step"] <= step:
            kept.append(line)
    if len(kept) < len(lines):
        tmp = path.with_name(path.name + ".tmp")
        tmp.write_bytes(b"".join(kept))
        _fsync(tmp)
        os.replace(tmp, path)
    return len(lines) - len(kept)


def writable(out_dir: str | Path) -> None:
    """Makes out_dir and writes a file there. Raises ValueError with the system's reason where that fails.

    So a wrong path or a full disk is known before hours of training are lost to it.
    """
    probe = Path(out_dir) / f".tmp-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        _fsync(probe)  # some file systems notice only here that the disk or the quota is full
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to {str(out_dir)!r} ({error.strerror}): choose another, --out_dir=PATH"
        ) from None


# ---------------------------------------------------------------------------------------- what is on the disk
def _write_state(folder: Path, step: int, state: dict) -> None:
    """Writes state.json: the step, the caller's state, and the manifest of all other files in the folder."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / "state.json":
            files[str(path.relative_to(folder))] = [path.stat().st_size, _sha256(path)]
    # Through JSON and back, so that the hash is of what will be read: keys become strings, tuples lists.
    body = json.loads(json.dumps({"step": step, "state": state, "files": files}))
    body["sha256"] = _sha256(body)
    (folder / "state.json").write_text(json.dumps(body, indent=1) + "\n")


def _candidates(ckpt: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all that may be checkpoints, newest first; step_* before its .old-step_*."""
    found = []
    for path in ckpt.glob("*step_*"):
        match = re.fullmatch(r"(\.old-)?step_(\d+)", path.name)
        if match:
            found.append((int(match[2]), path))
    return sorted(found, reverse=True)  # among paths of one step "s" sorts after ".", so it comes first here


def _problem(folder: Path, content: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None. Without `content` files are known by name and size only."""
    try:
        stored = json.loads((folder / "state.json").read_bytes())
        files = stored["files"]
        unchanged = stored.pop("sha256") == _sha256(stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "state.json is missing or cannot be read"
    if not unchanged:
        return "state.json is not as it was written"
    for name, (size, sha256) in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else "no"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if content and _sha256(path) != sha256:
            return f"{name} is not as it was written (its sha256 differs)"
    return None


def _run_of(folder: Path) -> str | None:
    """The identity of the run that saved a whole checkpoint; None where it names none."""
    return json.loads((folder / "state.json").read_bytes())["state"].get("run")


def _sha256(what: Path | dict) -> str:
    """Of a file (what `sha256sum FILE` prints), or of a dict, whatever the order of its keys."""
    if isinstance(what, dict):
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    with open(what, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(*paths: Path) -> None:
    """Waits until files, or the name lists of folders, are on the disk and not only in memory."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _sweep(ckpt: Path) -> None:
    """Ends what a save, this one or one that was killed, has begun."""
    for old in ckpt.glob(".old-step_*"):
        final = ckpt / old.name.removeprefix(".old-")
        if final.exists():  # it was replaced, and is rubbish
            os.rename(old, ckpt / f".tmp-{old.name}")
        else:  # the save died between its two renames: this is still the checkpoint of that step
            os.rename(old, final)
    for tmp in ckpt.glob(".tmp-*"):
        if tmp.is_dir() and not tmp.is_symlink():
            shutil.rmtree(tmp)
        else:
            tmp.unlink()  # of a link only the link, never what it points to
