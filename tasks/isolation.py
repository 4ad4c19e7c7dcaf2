"""A Python process that can do no harm: sandboxes, asked of a launcher, and what they isolate.

    with started(job, seconds=4) as process: ..     tasks/inside.py at work on a job, in a sandbox
    isolation()                                     what holds on this machine, found out by trying

There are three ways, and the first in which all holds is taken:

    root    namespaces of processes, mounts, network and IPC; another user for each program
    user    the same through a user namespace, as an ordinary user
    plain   where a container forbids namespaces. As root programs are another user each, with a Python that
            these can read (python_of); as an ordinary user they are this user.

In the first two a program has a file system of nothing but /usr, Python (both read-only), /dev/null and a
scratch folder of FILE_MB: no /proc, no /home. In all three it has no privileges, no environment, a key ring
of its own, limits, and a filter of system calls (tasks/seccomp.py), by which it starts no process and keeps
nothing in memory that RLIMIT_AS does not count. In mode plain Landlock, where the kernel has it, keeps it to
the same folders, though it may see that others exist; its scratch folder is looked at ten times a second,
and a program that has filled it is ended.

Not every kernel gives all of it. isolation() names what holds; strict refuses to do without any of it, auto
only where a program could write its own verdict: where it is the same user as its judge, in mode plain, and
Landlock does not close /proc to it.

The kernel itself is trusted. Without the filter memory is capped for each of a program's processes, not for
all together. bwrap would do much of this, and a second way would be tested half as well.

Linux only. Needs the standard library, and of tasks/ launcher.py, confine.py, seccomp.py and inside.py.
Tests: python -m pytest tests/test_isolation.py
"""

import atexit
import contextlib
import fcntl
import functools
import json
import math
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

FULL = ("limits", "privileges", "processes", "network", "files", "system calls")
FILE_MB, FILES = 16, 1000  # a scratch folder's size, and how many files it may hold
THREADS = 8  # of one program, its first included
OUTPUT = 2**20  # bytes of stdout that are read
# Seconds on the clock for each of CPU: on a busy machine a verdict should not depend on the neighbours.
PATIENCE = 3
USERS = (60001, 64999)  # ids of the users that programs run as, of which no real one is
USE = ("seccomp", "landlock")  # what the launcher tries of the kernel
PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
LAUNCHER = Path(__file__).resolve().with_name("launcher.py")
FLAGS = ["-P", "-s", "-S", "-B", "-X", "utf8"]  # imports nothing from where it starts, nor from a home folder


class SandboxError(ValueError):
    """The sandbox itself failed, or isolation is too weak: nothing is known about the program."""


# ------------------------------------------------------------------------------------------ the launcher
class Launcher:
    """A process of tasks/launcher.py, which makes the sandboxes of one mode until this process ends."""

    def __init__(self, mode: str):
        # Where sandboxes mount their file system, each in a namespace of its own; in mode plain what scratch
        # folders lie in.
        self.folder = tempfile.mkdtemp(prefix=f"sandbox-{os.getpid()}-")
        os.chmod(self.folder, 0o711)
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = dict(control=theirs.fileno(), mode=mode, folder=self.folder, users=USERS)
        settings |= dict(file_mb=FILE_MB, files=FILES, use=USE)
        python = python_of(mode)
        command = [python, *FLAGS, str(LAUNCHER), str(os.getpid()), json.dumps(settings)]
        with theirs:
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,  # a Ctrl-C is for the trainer
                    pass_fds=[theirs.fileno()],
                    env=dict(PATH="/usr/sbin:/usr/bin:/sbin:/bin", PYTHONHASHSEED="0"),
                )
            except OSError as e:
                self.control.close()
                os.rmdir(self.folder)
                raise SandboxError(f"the sandboxes' launcher did not start (mode {mode}: {e})") from e
        self.owner = os.getpid()
        atexit.register(self.close)
        self.control.settimeout(30)
        try:
            said = self.control.recv(1000)
        except OSError:
            said = b""
        if said != b"ready":
            self.close()
            why = said.decode(errors="replace").removeprefix("failed ") or python
            raise SandboxError(f"the sandboxes' launcher did not start (mode {mode}: {why})")

    def ask(self, limits: dict, fds: list[int]):
        """Has a sandbox made. fds: its channel, the job's file, stdin, stdout, and what else the job has."""
        socket.send_fds(self.control, [json.dumps(limits).encode()], fds)

    def close(self):
        """Ends it with its sandboxes; it removes its folder. A fork of its owner leaves it alone."""
        atexit.unregister(self.close)
        if os.getpid() != self.owner:
            return
        self.control.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


LAUNCHERS = {}  # (process, mode, USE) -> Launcher: a fork of this process starts its own
STARTING = threading.Lock()


def launcher_of(mode: str) -> Launcher:
    """The mode's launcher, started if there is none or it has died."""
    key = (os.getpid(), mode, USE)
    with STARTING:
        launcher = LAUNCHERS.get(key)
        if launcher and launcher.process.poll() is not None:
            launcher.close()
            launcher = None
        if not launcher:
            launcher = LAUNCHERS[key] = Launcher(mode)
    return launcher


def ask(mode: str, limits: dict, fds: list[int]):
    """Has the mode's launcher make a sandbox; a new one, should the old have died."""
    launcher = launcher_of(mode)
    try:
        launcher.ask(limits, fds)
    except ConnectionError:
        launcher.process.wait(10)  # it is dying, and removes what it leaves
        launcher_of(mode).ask(limits, fds)


def python_of(mode: str) -> str:
    """The Python that a mode's launcher and programs run with: this process's own, unless another user must
    read it. In mode plain as root that is so, and a Python under root's home folder is closed to others."""
    if mode == "plain" and os.geteuid() == 0:
        return python_for_others()
    return PYTHON


@functools.cache
def python_for_others() -> str:
    """The first Python that another user can run, of this process's and the system's."""
    for python in (PYTHON, "/usr/bin/python3", "/usr/local/bin/python3", shutil.which("python3")):
        command = [python, *FLAGS, "-c", "import ctypes, json, math, random, subprocess"]
        other = dict(user=USERS[0], group=USERS[0], extra_groups=[], cwd="/", env={})
        with contextlib.suppress(OSError, TypeError):
            done = subprocess.run(command, capture_output=True, timeout=60, **other)
            if done.returncode == 0:
                return python
    raise SandboxError(
        "sandboxed programs run as another user here, and no Python can be run by one: install Python for "
        "the whole system (/usr/bin/python3, from 3.11 on), or allow namespaces (in a container: "
        "--cap-add=SYS_ADMIN --security-opt seccomp=unconfined)"
    )


# ------------------------------------------------------------------------------------------- one sandbox
class Sandbox:
    """What is known of a process in a sandbox, heard on a channel that ends it when it closes."""

    def __init__(self, channel):
        self.channel = channel
        self.stdout = None  # a file to read its output from, where that was asked for
        self.ready = False  # it got as far as its job
        self.failure = ""
        self.returncode = None  # 128 + signal where one ended it

    def poll(self) -> int | None:
        """The status that it ended with; None while it runs."""
        self.hear(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The status that it ends with. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            if not self.hear(deadline - time.monotonic()) and self.returncode is None:
                raise subprocess.TimeoutExpired("sandbox", timeout)
        return self.returncode

    def hear(self, seconds: float) -> bool:
        """Takes what the launcher's side says within `seconds`. False: nothing more."""
        poll = select.poll()
        poll.register(self.channel, select.POLLIN)
        if not poll.poll(max(0, seconds) * 1000):
            return False
        said, _, rest = self.receive().partition(" ")
        if said == "ready":
            self.ready = True
        elif said == "failed":
            self.failure = rest
        elif said == "ended":
            self.returncode = int(rest)
        elif self.returncode is None:
            self.returncode = 128 + 9
            self.failure = "its launcher has ended"
        return said != ""

    def receive(self) -> str:
        try:
            return self.channel.recv(1000).decode(errors="replace")
        except ConnectionError:
            return ""

    def end(self):
        """Ends it with all that it started. When this returns nothing of it is left."""
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 10
        while self.hear(deadline - time.monotonic()):
            pass
        over = time.monotonic() > deadline
        self.channel.close()
        if self.stdout:
            self.stdout.close()
        if over:
            raise SandboxError("a sandbox could not be ended within 10 seconds")


def limits_of(seconds: float, memory_mb: int) -> dict[str, int]:
    """The limits of each process (RLIMIT_..)."""
    return dict(
        AS=memory_mb * 2**20,
        CPU=math.ceil(seconds),
        FSIZE=FILE_MB * 2**20,
        NOFILE=64,
        CORE=0,
        NPROC=THREADS,  # 1 where mode plain must make sure that it starts no process
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
    """A Sandbox with tasks/inside.py at work on a job in it, ended on the way out.

    stdout: subprocess.PIPE or DEVNULL. SandboxError if it never got as far as the job.
    """
    mode = mode or choose()[0]
    limits = dict(seconds=PATIENCE * seconds + 1, limits=limits_of(seconds, memory_mb))
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sandbox = Sandbox(channel)
    try:
        with contextlib.ExitStack() as passed:  # copies of which it gets
            files = [passed.enter_context(theirs)]
            files.append(passed.enter_context(sealed(json.dumps(job).encode())))
            files.append(passed.enter_context(sealed(stdin)))
            if stdout == subprocess.PIPE:
                read, write = os.pipe()
                sandbox.stdout = open(read, "rb", 0)
                files.append(passed.enter_context(open(write, "wb", 0)))
            else:
                files.append(passed.enter_context(open(os.devnull, "wb")))
            ask(mode, limits, [*(file.fileno() for file in files), *fds])
        yield sandbox
    finally:
        sandbox.end()
    if sandbox.failure or not sandbox.ready:
        why = sandbox.failure or "the machine is out of processes, memory or time"
        raise SandboxError(f"a sandbox {'failed' if sandbox.ready else 'did not start'} (mode {mode}): {why}")


def sealed(content: bytes):
    """A file in memory that nobody can change any more. A pipe would block on long content."""
    file = open(os.memfd_create("job", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+b", 0)
    file.write(content)
    file.seek(0)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


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


def conversation(program: dict, judge: dict, *, seconds, memory_mb=512, mode=None) -> tuple[bytes, str]:
    """What the job `judge` prints about the job `program`, and why that is not all ("" if it is).

    Each has a sandbox of its own, and two pipes to the other: fds are (where it reads, where it writes).
    """
    limits = dict(seconds=seconds, memory_mb=memory_mb, mode=mode)
    with contextlib.ExitStack() as stack:
        pipes = stack.enter_context(contextlib.ExitStack())
        program_reads, judge_writes = os.pipe()  # questions
        judge_reads, program_writes = os.pipe()  # answers
        for fd in (program_reads, judge_writes, judge_reads, program_writes):
            pipes.callback(os.close, fd)
        deadline = time.monotonic() + PATIENCE * seconds
        stack.enter_context(started(program, fds=(program_reads, program_writes), **limits))
        judging = started(judge, fds=(judge_reads, judge_writes), stdout=subprocess.PIPE, **limits)
        judge = stack.enter_context(judging)
        pipes.close()  # with ours open nobody would see the other end close
        return drained(judge, deadline)


# -------------------------------------------------------------------------------------------- isolation
# A program that tries what it must not be able to do, and prints what was refused.
PROBE = """
import ctypes, json, math, os, random, resource, socket

def refused(f, *a):
    try:
        f(*a)
    except OSError:
        return True

def forks():
    for n in range(%(threads)d + 5):
        if os.fork() == 0:
            os._exit(0)

def reached():
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) != os.getpid():
            if not refused(os.listdir, f"/proc/{pid}/fd") or not refused(open, f"/proc/{pid}/mem", "rb"):
                return True

folder, port, trainer, said = %(folder)r, %(port)d, %(trainer)d, []
hidden = refused(os.listdir, "/proc")
if hidden or not reached():
    said.append("verdicts")
if os.getuid() != 0 and refused(os.chroot, "/"):
    said.append("privileges")
if os.getpid() == 1 or hidden and refused(os.kill, trainer, 0):
    said.append("processes")
if refused(socket.create_connection, ("127.0.0.1", port), 2):
    said.append("network")
places = [(folder + "/open", "r"), (folder + "/new", "w")]
places += [(path, "w") for path in ("/usr/new", "/new", "/dev/new")]
if all(refused(open, path, mode) for path, mode in places):
    said.append("files")
if refused(os.memfd_create, "memory") and ctypes.CDLL(None).prctl(21, 0, 0, 0, 0) == 2:
    said.append("system calls")
if refused(forks):
    big = os.open("big", os.O_CREAT | os.O_RDWR)
    if refused(os.posix_fallocate, big, 0, 2**30) and resource.getrlimit(resource.RLIMIT_AS)[1] > 0:
        said.append("limits")
print(*said, sep="\\n")
"""
# What to do about isolation that is missing.
GRANT = (
    "allow user namespaces (in a container: --cap-add=SYS_ADMIN, or --security-opt seccomp=unconfined; on "
    "Ubuntu sysctl kernel.apparmor_restrict_unprivileged_userns=0)"
)
TRIAL = "import json, math, random\ndef add(a, b):\n    return a + b"


@functools.cache
def choose() -> tuple[str, tuple]:
    """(mode, what holds in it): the first in which everything does, else the one in which most does.

    What holds are words of FULL, and "verdicts": no program reaches a process that decides about it. Each
    mode is tried by running programs in it.
    """
    found = []
    failures = []
    modes = ["user", "plain"]
    if os.geteuid() == 0:
        modes.insert(0, "root")
    for mode in modes:
        try:
            held = probed(mode)
        except (SandboxError, OSError) as e:
            failures.append(str(e))
            continue
        found.append((mode, held))
        if set(FULL) <= set(held):
            break
    if not found:
        raise SandboxError(f"no program can be run apart on this machine: {'; '.join(failures)}")
    return max(found, key=lambda f: len(f[1]))


def probed(mode: str) -> tuple:
    """Which of FULL hold in a mode, as PROBE finds out inside it. SandboxError where programs don't run."""
    program = dict(role="program", source=TRIAL)
    judge = dict(role="judge", tests=["assert add(1, 2) == 3"], names=["add"], modules={})
    said, why = conversation(program, judge, seconds=10, mode=mode)
    if b'"passed"' not in said:
        raise SandboxError(f"a program that is right does not pass in mode {mode} ({why or 'no verdict'})")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o777)
        Path(folder, "open").touch()
        here = dict(folder=folder, port=server.getsockname()[1], trainer=os.getpid(), threads=THREADS)
        job = dict(role="script", source=PROBE % here)
        with started(job, seconds=10, stdout=subprocess.PIPE, mode=mode) as process:
            said, _ = drained(process, time.monotonic() + 10)
    held = said.decode().split("\n")[:-1]
    if not held:
        raise SandboxError(f"a program does not run to its end in mode {mode}")
    return tuple(sorted(held, key=("verdicts", *FULL).index))


def isolation(strict: bool = False) -> list[str]:
    """Which of FULL hold here, found out once by trying. strict: SandboxError where one is missing.

    limits: time, memory, file size and processes. privileges: none. processes: sees and reaches no others.
    network: none. files: the system read-only, its scratch folder, and nothing else. system calls: those of
    tasks/seccomp.py are refused, among them all that get memory beside the limit or start a process.
    """
    found = choose()[1]
    missing = [name for name in FULL if name not in found]
    if strict and missing:
        raise SandboxError(
            f"sandbox='strict' needs {', '.join(FULL)}, and this machine gives no {', '.join(missing)}: "
            f"{GRANT}, or accept less with sandbox='auto'"
        )
    return [name for name in FULL if name in found]


def way() -> str:
    """How programs are run apart here, in a few words: whose namespaces, or which user and Python."""
    mode = choose()[0]
    if mode == "root":
        return "namespaces of root's, another user for each program"
    if mode == "user":
        return "namespaces of this user's"
    who = "another user for each program" if os.geteuid() == 0 else "this user"
    python = python_of(mode)
    return f"no namespaces, {who}" + (f", {python}" if python != PYTHON else "")


def demand(level: str):
    """SandboxError where this machine gives less than a level of trust in programs wants.

    strict: all of FULL. auto: that no program reaches a process that decides about it, or it could write its
    own verdict. trust: nothing.
    """
    if level == "strict":
        isolation(strict=True)
    elif level == "auto" and "verdicts" not in choose()[1]:
        raise SandboxError(
            "programs can't be kept from the processes that judge them on this machine, since they run as "
            f"the same user and see all files: {GRANT}, or run on a kernel with Landlock (from 5.13 on), or "
            "as root, so that programs run as another user; sandbox='trust' runs them anyway"
        )
