"""A Python process that can do no harm: sandboxes made by the system's own commands, and what they isolate.

    with started(job, seconds=4) as process: ..     tasks/inside.py at work on a job, in a sandbox
    isolation()                                     what holds on this machine, found out by trying

The kernel itself is trusted: there is no seccomp filter, and memory is capped
for each process, not for all of a program's `PROCESSES` together.

A sandbox is made by the system's own unshare, mount, chroot, setpriv and timeout (util-linux, coreutils),
as root or through a user namespace: a file system of nothing but /usr, Python (both read-only), /dev/null
and a scratch folder of FILE_MB; no /proc, no /home, no keys in the environment; own process, network, IPC
and mount namespaces; no privileges; limits. bwrap would do the same, and a second way would be tested
half as well. Where the kernel allows no namespaces, what is left is: limits, no child processes, another
user if we are root. isolation() then says so, and strict refuses.

Linux only. Needs the standard library and tasks/inside.py.
Tests: python -m pytest tests/test_sandbox.py
"""

import contextlib
import functools
import json
import math
import os
import random
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FULL = ("limits", "privileges", "processes", "network", "files")
FILE_MB, FILES = 16, 1000  # a scratch folder's size, and how many files it may hold
PROCESSES = 8  # and threads, of one program
OUTPUT = 2**20  # bytes of stdout that are read
PATIENCE = (
    3  # seconds on the clock for each of CPU: on a busy machine a verdict should not depend on the neighbours
)
USERS = (60001, 64999)  # ids of the users that programs run as, of which no real one is
PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
PREFIX = os.path.realpath(sys.base_prefix)


class SandboxError(ValueError):
    """The sandbox itself failed, or isolation is too weak: nothing is known about the program."""


CHILD = Path(__file__).with_name("inside.py").read_text()


# ------------------------------------------------------------------------------------------ the sandbox
NAMESPACES = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]


def wrapper(mode: str, seconds: float) -> list[str]:
    """The command that a sandboxed command follows. The mount point is the folder it starts in.

    timeout is the first process of the namespace: should this process be killed, it ends the sandbox, and
    with the first process all others.
    """
    ended = ["timeout", "-s", "KILL", f"{PATIENCE * seconds + 1:g}"]
    if mode == "plain":
        return ended
    mapped = ["--user", "--map-root-user"] if mode == "user" else []
    user = []
    if mode == "root":
        # Another user each time: the kernel counts processes by user, and a fork bomb
        # must not use up its neighbour's.
        uid = random.randint(*USERS)
        user = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    return [
        *["unshare", *mapped, *NAMESPACES],
        *["sh", "-c", file_system(), "sh"],
        *["setpriv", *user, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"],
        *ended,
    ]


def file_system() -> str:
    """The shell script that makes the sandbox's file system in the current folder and goes on inside it."""
    lines = [
        "set -e",
        "mount -t tmpfs -o size=1m,mode=755 none .",
        'cd "$PWD"',
        "mkdir -p dev tmp",
        "touch dev/null",
        "mount --bind /dev/null dev/null",
        f"mount -t tmpfs -o nosuid,nodev,size={FILE_MB}m,nr_inodes={FILES},mode=1777 none tmp",
    ]
    for folder in system_folders():
        there = shlex.quote(folder)
        here = shlex.quote("." + folder)
        if os.path.islink(folder):  # where /lib is a link to usr/lib, a link it stays
            lines.append(f"ln -s {shlex.quote(os.readlink(folder))} {here}")
        else:
            lines.append(f"mkdir -p {here}; mount --rbind -o ro {there} {here}")
    lines += [
        "mount -o remount,ro,size=1m,mode=755 none .",
        "echo 0 > /proc/sys/kernel/shmall || :",  # System V shared memory would be memory beside the limit
        'exec chroot . "$@"',
    ]
    return "\n".join(lines)


def system_folders() -> list[str]:
    """What a program needs to run: /usr and, where they are not inside it, the libraries and Python."""
    folders = ["/usr"]
    for folder in ("/bin", "/lib", "/lib64", "/lib32", "/nix", PREFIX):
        if os.path.isdir(folder) and not (folder + "/").startswith("/usr/"):
            folders.append(folder)
    return folders


def limits_of(mode: str, seconds: float, memory_mb: int) -> dict[str, int]:
    """The limits of each process (RLIMIT_..). Where nothing isolates, a program may not start another."""
    return dict(
        AS=memory_mb * 2**20,
        CPU=math.ceil(seconds),
        FSIZE=FILE_MB * 2**20,
        NOFILE=64,
        CORE=0,
        NPROC=1 if mode == "plain" else PROCESSES + 2,  # two more: timeout and setpriv
    )


@contextlib.contextmanager
def started(
    job: dict,
    *,
    seconds: float,
    memory_mb: int = 512,
    stdin: bytes = b"",
    stdout=subprocess.DEVNULL,
    fds=(),
    mode: str | None = None,
):
    """A CHILD in a sandbox: the Popen of its outermost process, ended on the way out with all it started.

    SandboxError if it never got as far as the job.
    """
    mode = mode or choose()[0]
    command = [*wrapper(mode, seconds), PYTHON, "-P", "-s", "-S", "-B", "-X", "utf8", "-c", CHILD]
    uid = random.randint(*USERS) if mode == "plain" and os.geteuid() == 0 else 0
    limits = limits_of(mode, seconds, memory_mb)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder(uid))
        ready, told = os.pipe()  # the child writes a byte to `told` when it begins with the job
        stack.callback(os.close, ready)
        with open(told, "wb"):
            inside = scratch if mode == "plain" else "/tmp"
            job = job | dict(limits=limits, uid=uid, ready=told, fds=list(fds), scratch=inside)
            with read_only(json.dumps(job).encode()) as file, read_only(stdin) as typed:
                process = subprocess.Popen(
                    [*command, str(file.fileno())],
                    stdin=typed,
                    stdout=stdout,
                    stderr=subprocess.DEVNULL,
                    cwd=scratch,
                    start_new_session=True,
                    pass_fds=(file.fileno(), told, *fds),
                    env=dict(PATH="/usr/sbin:/usr/bin:/sbin:/bin", PYTHONHASHSEED="0"),
                )
        stack.callback(end, process)
        yield process
        end(process)
        if not os.read(ready, 1):
            raise SandboxError(
                f"a sandbox did not start (mode {mode}, status {process.returncode}): "
                "the machine is out of processes, memory or time"
            )


@contextlib.contextmanager
def scratch_folder(uid: int):
    """A folder for one user (0: ours) that is deleted at the end, whatever a program has made of it."""
    prefix = f"sandbox-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        if uid:
            os.chown(folder, uid, uid)
        yield folder


def read_only(content: bytes):
    """An open file without a name that can only be read, made under a new name outside the scratch folders.

    A pipe would block on long content, and a file open for writing is a place to write.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return open(file.name, "rb")


def end(process):
    """Kills a sandbox from the inside out. When it returns, the namespace is gone.

    The first process of the namespace takes all others with it, and each parent reaps its own child, so
    that no zombie is left to whatever this machine's process 1 is.
    """
    if process.poll() is None:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            for child in children.split():
                os.kill(int(child), signal.SIGKILL)
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout:
        process.stdout.close()


def drained(process, deadline: float) -> tuple[bytes, str]:
    """What a process writes before it closes its stdout, and why that is not all.

    The reason is "", "too slow" or "too much output". No signal is needed for the time.
    """
    said = bytearray()
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    while poll.poll(max(0, deadline - time.monotonic()) * 1000):
        piece = os.read(process.stdout.fileno(), 2**16)
        said += piece
        if not piece:
            return bytes(said), ""
        if len(said) > OUTPUT:
            return bytes(said), "too much output"
    return bytes(said), "too slow"


# -------------------------------------------------------------------------------------------- isolation
# A program that tries what it must not be able to do, and prints what was refused.
PROBE = """
import os, resource, socket

def refused(f, *a):
    try:
        f(*a)
    except OSError:
        return True

def forks():
    for n in range(%(processes)d + 5):
        if os.fork() == 0:
            os._exit(0)

folder, port, said = %(folder)r, %(port)d, []
if os.getuid() != 0 or refused(os.chroot, "/"):
    said.append("privileges")
if os.getppid() == 1:
    said.append("processes")
if refused(socket.create_connection, ("127.0.0.1", port), 2):
    said.append("network")
places = [(folder + "/open", "r"), (folder + "/new", "w")]
places += [(path, "w") for path in ("/usr/new", "/new", "/dev/new")]
if all(refused(open, path, mode) for path, mode in places):
    said.append("files")
if refused(forks):
    big = os.open("big", os.O_CREAT | os.O_RDWR)
    if refused(os.posix_fallocate, big, 0, 2**30) and resource.getrlimit(resource.RLIMIT_AS)[1] > 0:
        said.append("limits")
print(*said)
"""


@functools.cache
def choose() -> tuple[str, tuple]:
    """(mode, what it isolates): the first way that gives everything, else the one that gives most."""
    found = []
    modes = ["user", "plain"]
    if os.geteuid() == 0:
        modes.insert(0, "root")
    for mode in modes:
        with contextlib.suppress(SandboxError, OSError):
            held = probed(mode)
            found.append((mode, held))
            if set(held) == set(FULL):
                break
    if not found:
        raise SandboxError(
            "no program can be run apart on this machine: the sandbox needs Linux and the commands timeout "
            "and, for isolation, unshare, mount, setpriv"
        )
    return max(found, key=lambda f: len(f[1]))


def probed(mode: str) -> tuple:
    """Which of FULL hold in a mode, as PROBE finds out inside it."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o777)
        Path(folder, "open").touch()
        source = PROBE % dict(folder=folder, port=server.getsockname()[1], processes=PROCESSES)
        job = dict(role="script", source=source)
        with started(job, seconds=10, stdout=subprocess.PIPE, mode=mode) as process:
            said, _ = drained(process, time.monotonic() + 10)
            held = said.decode().split()
    return tuple(sorted(held, key=FULL.index))


def isolation(strict: bool = False) -> list[str]:
    """Which of FULL hold here, found out once by trying. strict: SandboxError where one is missing.

    limits: time, memory, file size and processes. privileges: none. processes: sees and reaches no others.
    network: none. files: the system read-only, its scratch folder, and nothing else.
    """
    mode, found = choose()
    missing = [name for name in FULL if name not in found]
    if strict and missing:
        raise SandboxError(
            f"sandbox='strict' needs {', '.join(FULL)}, and this machine gives no {', '.join(missing)}: "
            "install util-linux and allow user namespaces (in a container: --cap-add=SYS_ADMIN, or "
            "--security-opt seccomp=unconfined), or accept less with sandbox='auto'"
        )
    return list(found)
