"""What the tests of the sandbox share: each mode forced, what programs see, that nothing is left of any."""

import contextlib
import functools
import os
import tempfile
import textwrap
from pathlib import Path

import pytest

from tasks import isolation as apart
from tasks.sandbox import SandboxError, check, isolation

GOOD = "def add(a, b):\n    return a + b\n"
TEST = "assert add(1, 2) == 3"
ALL = apart.USE
MODES = ("root", "user", "plain") if os.geteuid() == 0 else ("user", "plain")

# For attacks that take seconds: the first mode in the short suite, the others with the slow tests.
OTHERS_SLOW = [MODES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MODES[1:])]
first_mode_others_slow = pytest.mark.parametrize("mode", OTHERS_SLOW, indirect=True)


def program(text: str) -> str:
    """A program as it stands in a test, without the indentation that it has there."""
    return textwrap.dedent(text).strip("\n")


def needs(*names):
    if missing := [n for n in names if n not in isolation()]:
        pytest.skip(f"this machine's kernel gives a sandbox no {', '.join(missing)}")


def launched(pid: int | None = None) -> dict[str, str]:
    """Process -> its parent, of all that the launchers of a process (default: this one) have made."""
    mark = f"launcher.py\0{pid or os.getpid()}\0".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "cmdline").read_bytes():
                found[folder.name] = (folder / "stat").read_text().rpartition(")")[2].split()[1]
    return found


def processes():
    """Every process of a program of this run, and every zombie of ours. Watchers and launchers live on."""
    parents = launched()
    found = [pid for pid, parent in parents.items() if parents.get(parent) in parents]
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if parent == str(os.getpid()) and state == "Z":
                found.append(folder.name)
    return found


def scratch_folders():
    """What lies in the folders of this process's launchers."""
    folders = Path(tempfile.gettempdir()).glob(f"sandbox-{os.getpid()}-*")
    return [path for folder in folders for path in folder.iterdir()]


@pytest.fixture
def nothing_is_left():
    """No process, zombie, folder or descriptor is left by any test here, and the next program runs."""
    for name in MODES:
        with contextlib.suppress(SandboxError):
            apart.launcher_of(name)  # which stays
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert processes() == []
    assert len(os.listdir("/proc/self/fd")) <= before
    assert scratch_folders() == []


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """Each way to shut programs in, forced, whatever this machine would choose."""
    name = request.param
    try:
        held = probed(name)
    except SandboxError as e:
        pytest.skip(f"no mode {name} on this machine: {e}")
    monkeypatch.setattr(apart, "choose", lambda: (name, held))
    return name


@functools.cache
def probed(name: str):
    return apart.probed(name)


def probe(body: str, wanted: str, **keys):
    """What a program sees, as its answer to a test: `body` sets r."""
    source = (
        "import os, sys, socket, resource\ndef look():\n"
        + "".join(f"    {line}\n" for line in body.split("\n"))
        + "    return r\n"
    )
    return check(source, [f"assert look() == {wanted}"], **keys)


@pytest.fixture
def use(monkeypatch):
    """use("landlock"): sandboxes with only these of the kernel's filters, made by launchers of their own."""

    def only(*names):
        monkeypatch.setattr(apart, "USE", names)

    yield only
    if apart.USE != ALL:
        close_launchers(apart.USE)


def close_launchers(filters):
    """Ends this process's launchers with these filters, which a test started."""
    for key in [key for key in apart.LAUNCHERS if key[0] == os.getpid() and key[2] == filters]:
        apart.LAUNCHERS.pop(key).close()
