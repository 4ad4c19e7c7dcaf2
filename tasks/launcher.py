"""Makes sandboxes: a Python that is started once and forks, for each job, a process that shuts itself in.

    python launcher.py PID SETTINGS     started by tasks/isolation.py in the process PID; nobody imports it

    watcher   ends the launcher, and with it all sandboxes, when the process PID has ended.
    launcher  forks programs and ends them: when their time is up, or when whoever asked for one has gone.
              With namespaces it is process 1 of one of its own, so that the kernel ends them all with it.
    program   shuts itself in (tasks/confine.py), for good, and becomes tasks/inside.py.

Only the last runs what a model wrote. Nothing of a job is ever read by the launcher, which hands the job's
open file on: a program finds no other program's tests in the memory that it has from here. Two programs are
no nearer to each other than with a fresh Python each: namespaces, user, scratch folder, key ring and limits
are new in each fork. What they share is what the launcher read before the first of them, Python and its
modules, and the places in memory where these lie; each has its own copy. With namespaces a program is
process 1 too, to which a signal without a handler does nothing, save SIGKILL from outside.

Linux only. Needs the standard library, tasks/confine.py and tasks/seccomp.py.
Tests: python -m pytest tests/test_isolation.py
"""

import atexit
import contextlib
import dataclasses
import gc
import json
import math
import os
import random
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))  # last: tasks/math.py must not be taken for Python's
import confine  # noqa: E402
import seccomp  # noqa: E402

del sys.path[-1]

LOOK = 0.1  # seconds between looks at a scratch folder's size, where there are no namespaces
DEEPEST = 50  # folders within folders of it
# What many programs import, which a fork need not read again.
IMPORTED = "ast bisect collections dataclasses datetime decimal fractions functools heapq itertools".split()
IMPORTED += "math re string typing".split()


# ------------------------------------------------------------------------------------------ the launcher
def main(trainer: int, settings: dict):
    """The watcher, who forks the launcher. Returns in a program alone, shut in."""
    confine.prctl(confine.PR_SET_DUMPABLE, 0)  # this user's other processes can't open what is open here
    control = socket.socket(fileno=os.dup(settings["control"]))  # low in number, as the trainer's may not be
    os.close(settings["control"])
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most == resource.RLIM_INFINITY or most > confine.HIGHEST_FD:
        most = confine.HIGHEST_FD
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        if settings["mode"] == "user":
            confine.enter_user_namespace()
        if settings["mode"] != "plain":
            confine.enter_process_namespace()  # of which the next fork is process 1
        launcher = os.fork()
        if launcher == 0:
            confine.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)
            settings["launcher"] = os.getpid()
            prepare(settings)
            control.send(b"ready")
            return serve(control, settings)
    except OSError as e:
        control.send(f"failed {e}".encode())
        os._exit(1)
    control.close()
    watch(trainer, launcher)
    remove_folder(settings["folder"])
    os._exit(0)


def watch(trainer: int, launcher: int):
    """Waits for the launcher's end, or brings it about when the trainer has gone.

    The launcher sees that itself, unless a fork of the trainer's holds the other end of its socket open.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # to wait for it, and no longer than a moment
    while os.waitpid(launcher, os.WNOHANG) == (0, 0):
        if os.getppid() != trainer:
            signal.sigtimedwait([signal.SIGCHLD], 0.5)
            os.kill(launcher, signal.SIGKILL)
        signal.sigtimedwait([signal.SIGCHLD], 0.2)


def prepare(settings: dict):
    """Finds out what the kernel can do, and readies this process to be forked."""
    settings["landlock"] = 0
    if settings["mode"] == "plain" and "landlock" in settings["use"]:
        settings["landlock"] = confine.landlock_version()
    settings["filter"] = "seccomp" in settings["use"] and can_filter()
    settings["folders"] = confine.system_folders()
    for module in IMPORTED:
        __import__(module)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page of what is here


@dataclasses.dataclass
class Job:
    """A program under way, then the removal of its scratch folder."""

    pid: int
    channel: socket.socket  # to whoever asked for it
    deadline: float  # on the monotonic clock
    scratch: str  # "" with namespaces, where it goes with the program
    status: int | None = None  # of the program, once it has ended
    look: float = 0.0  # when to see how full the scratch folder is

    def tell(self, words: str):
        with contextlib.suppress(OSError):  # whoever asked may have gone
            self.channel.send(words.encode()[:500])

    def kill(self):
        if self.status is None:  # else it is the removal that goes on
            os.kill(self.pid, signal.SIGKILL)

    def has_had_its_time(self, settings: dict) -> bool:
        """Whether it is to end: its time is up, or its scratch folder full, looked at now and then."""
        now = time.monotonic()
        if now > self.deadline:
            return True
        if not self.scratch or now < self.look:
            return False
        self.look = now + LOOK
        return overfull(self.scratch, settings)


def serve(control, settings: dict):
    """Forks a program for each job that arrives, until the other end closes. Returns in a program alone."""
    jobs = {}  # channel's number -> Job
    user = random.randint(*settings["users"])
    woken, wakes = os.pipe()  # gets a byte when a child ends
    os.set_blocking(woken, False)
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    for fd in (woken, control.fileno()):
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _ in poll.poll(time_left(jobs)):
            if fd == woken:
                os.read(woken, 4096)
            elif fd in jobs:  # whoever asked wants no more of it
                poll.unregister(fd)
                jobs[fd].kill()
            else:
                message, fds, _, _ = socket.recv_fds(control, 4096, 16)
                if not message:
                    return close(jobs)
                if len(fds) < confine.FDS:  # more at once than there is room for: whoever asked sees it close
                    for left in fds:
                        os.close(left)
                    continue
                user = user + 1 if user < settings["users"][1] else settings["users"][0]
                job = begin(settings, dict(json.loads(message), user=user), fds)
                if job is None:
                    return None
                jobs[fds[0]] = job
                poll.register(fds[0], select.POLLIN)
        for job in jobs.values():
            if job.has_had_its_time(settings):
                job.kill()
        for fd in reaped(jobs):
            with contextlib.suppress(KeyError):
                poll.unregister(fd)
            jobs.pop(fd).channel.close()


def time_left(jobs: dict) -> float | None:
    """Milliseconds until a job's time is up or its scratch folder is looked at; None: there is neither."""
    deadlines = [job.deadline for job in jobs.values() if job.deadline < math.inf]
    if not deadlines:
        return None
    left = max(0, 1000 * (min(deadlines) - time.monotonic()) + 1)
    has_folder = any(job.scratch for job in jobs.values())
    return min(left, 1000 * LOOK) if has_folder else left


def overfull(folder: str, settings: dict) -> bool:
    """Whether a scratch folder that no file system of its own limits has grown too large, or too full.

    A folder in it that can't be looked into counts as too full, and so do folders nested by the thousand.
    """
    count = size = 0
    folders = [(folder, 0)]
    while folders:
        try:
            path, depth = folders.pop()
            for entry in os.scandir(path):
                count += 1
                size += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    folders.append((entry.path, depth + 1))
                if count > settings["files"] or size > settings["file_mb"] * 2**20 or depth == DEEPEST:
                    return True
        except FileNotFoundError:  # gone again
            continue
        except OSError:
            return True
    return False


def begin(settings: dict, asked: dict, fds: list[int]) -> Job | None:
    """A program for what was asked. Returns None in the program, when it is shut in.

    fds: the job's channel (it hears "ready", a failure, "ended STATUS"; its closing ends the program), its
    file, stdin, stdout, and what it has besides.
    """
    plain = settings["mode"] == "plain"
    job = Job(0, socket.socket(fileno=fds[0]), time.monotonic() + asked["seconds"], "")
    try:
        if plain:
            job.scratch = scratch_folder(settings["folder"], asked["user"])
        job.pid = os.fork() if plain else confine.fork_into_namespace()
    except OSError as e:
        job.tell(f"failed {e}")
        job.status, job.deadline = 1, 0
    if job.pid or job.status:
        for fd in fds[1:]:
            os.close(fd)
        return job
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if plain:
            os.chdir(job.scratch)
        else:
            confine.enter_namespaces(settings)
        confine.shut_in(settings, asked, job.channel, fds)
    except Exception as e:
        job.tell(f"failed {type(e).__name__}: {e}")
        os._exit(1)
    return None


def reaped(jobs: dict) -> list[int]:
    """The channels of jobs of which nothing is left.

    A scratch folder, which a program may have made long work of, is removed in a process of its own.
    """
    done = []
    for fd, job in jobs.items():
        if job.pid:
            ended, status = os.waitpid(job.pid, os.WNOHANG)
            if not ended:
                continue
            if job.status is None:
                code = os.waitstatus_to_exitcode(status)
                job.status = code if code >= 0 else 128 - code
        if job.scratch:
            job.pid, job.scratch, job.deadline = removal(job.scratch), "", math.inf
            if job.pid:
                continue
        job.tell(f"ended {job.status}")
        done.append(fd)
    return done


def close(jobs: dict):
    """Ends all jobs and this process."""
    for job in jobs.values():
        job.kill()
    while jobs:
        for fd in reaped(jobs):
            del jobs[fd]
        time.sleep(0.01)
    os._exit(0)


def remove_folder(folder: str):
    """Removes the folder that mounts and scratch folders were in."""
    process = removal(folder)
    if process:
        os.waitpid(process, 0)


def scratch_folder(parent: str, user: int) -> str:
    """A new folder for one user."""
    folder = tempfile.mkdtemp(dir=parent)
    if os.geteuid() == 0:
        os.chown(folder, user, user)
    return folder


def removal(folder: str) -> int:
    """Deletes a folder, whatever a program has made of it: too deep to name, closed to its owner.

    Returns 0, or the process that is at it.
    """
    with contextlib.suppress(OSError):
        os.rmdir(folder)
        return 0
    command = 'chmod -R u+rwx "$0"; rm -rf "$0"'
    return os.posix_spawn("/bin/sh", ["sh", "-c", command, folder], dict(PATH="/usr/bin:/bin"))


def can_filter() -> bool:
    """Whether the kernel takes a seccomp filter, found out in a fork."""
    child = os.fork()
    if child == 0:
        try:
            seccomp.install(False)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


# ------------------------------------------------------------------------------------------- the program
def leave(status: int):
    """Ends a program as Python does, but for freeing its memory, which would copy all of it first."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    # By this Python, which may be of another version than the trainer's.
    ROLES = compile((HERE / "inside.py").read_text(), "inside.py", "exec")
    JUDGING = compile((HERE / "judging.py").read_text(), "judging.py", "exec")
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
    status = 1
    try:
        exec(ROLES, dict(__name__="inside", __builtins__=__builtins__, JUDGING=JUDGING))
        status = 0
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            status = (e.code or 0) & 255
    finally:
        leave(status)
