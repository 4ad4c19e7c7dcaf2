"""Runs Python that a model wrote, with its tests, without trusting it.

    check(source, ["assert add(1, 2) == 3", {"input": "1 2\\n", "output": "3\\n"}])   -> ["passed", "passed"]
    check_all([(source, tests), ..])                        the same for many, several at once
    isolation()                                             what holds on this machine, found out by trying

A naive harness runs program and tests in one interpreter, where the program can print the success mark,
leave with exit(0), replace `assert`'s operands by objects that equal everything, or read the expected
values off the stack. Here three parties never share a process:

    program   the model's code, in a sandbox of its own. It is asked "what is add(1, 2)?" and may answer with
              data (JSON of plain types).
    judge     the data set's tests, in another sandbox. Names that the tests do not define are stubs that ask
              the program; `== 3` is evaluated here, on plain data, and 3 is never sent. Without the judge the
              data set's code would run in this process.
    this one  reads the judge's verdicts from a pipe that the program has not got, and for tests of stdin and
              stdout compares the text itself.

So the program can only be right by giving right answers, to inputs it sees and expected values it does not.

What remains forgeable: answers known by heart; a test without an expected value (`assert f(x)`), or one that
asks the returned object about itself (`assert f(x).ok()`) or hands it the expected value (`f(x).equals(3)`).

What is lost: arguments are copies (a function that sorts its argument in place has no
effect), a test cannot hand over a function or catch an exception class of the program's own, and only the
standard library is there.

The kernel itself is trusted: there is no seccomp filter, and memory is capped
for each process, not for all of a program's `PROCESSES` together.

A sandbox is made by the system's own unshare, mount, chroot, setpriv and timeout (util-linux, coreutils),
as root or through a user namespace: a file system of nothing but /usr, Python (both read-only), /dev/null
and a scratch folder of FILE_MB; no /proc, no /home, no keys in the environment; own process, network, IPC
and mount namespaces; no privileges; limits. bwrap would do the same, and a second way would be tested
half as well. Where the kernel allows no namespaces, what is left is: limits, no child processes, another
user if we are root. isolation() then says so, and strict refuses.

Linux only. Needs the standard library and nothing else of ours.
Tests: python -m pytest tests/test_sandbox.py, speed: python bench/sandbox.py
"""

import ast
import builtins
import concurrent.futures
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


# ----------------------------------------------------------------------- what runs inside the sandboxes
# Limits first, then one of three roles. It is text, so that nothing of it can run in this process.
CHILD = r'''
import builtins, json, operator, os, resource, sys

with open(int(sys.argv[1]), "rb") as f:
    job = json.loads(f.read())
sys.set_int_max_str_digits(0)
os.environ.clear()
os.chdir(job["scratch"])
for name, value in job["limits"].items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
if job["uid"]:
    os.setgroups([])
    os.setgid(job["uid"])
    os.setuid(job["uid"])
sys.argv = ["solution.py"]
sys.path = [p for p in sys.path if p]
os.write(job["ready"], b"1")
os.close(job["ready"])

GONE = "the program has ended"
KINDS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(x):
    """x as JSON types. Subclasses (Counter, namedtuple) stand for what they are built on, other objects for a
    number. The methods called are those of the base type: a subclass may lie."""
    if x is None or isinstance(x, bool):
        return x
    for base, method in ((int, int.__int__), (float, float.__float__), (str, str.__str__)):
        if isinstance(x, base):
            return method(x)
    if isinstance(x, dict):
        return ["dict", [[encode(k), encode(v)] for k, v in dict.items(x)]]
    if isinstance(x, complex):
        return [type(x).__name__, [x.real, x.imag]]
    if isinstance(x, (bytes, bytearray)):
        return [type(x).__name__, x.hex()]
    for name, kind in KINDS.items():
        if isinstance(x, kind):
            return [name, [encode(v) for v in kind.__iter__(x)]]
    return ["object", name_object(x)]


def decode(x):
    if not isinstance(x, list):
        return x
    kind, value = x
    if kind == "object":
        return find_object(value)
    if kind == "dict":
        return {decode(k): decode(v) for k, v in value}
    if kind in ("bytes", "bytearray"):
        return getattr(builtins, kind).fromhex(value)
    if kind == "complex":
        return complex(*value)
    return KINDS[kind](map(decode, value))


if job["role"] == "script":
    module = sys.modules["__main__"] = type(sys)("__main__")
    exec(compile(job["source"], "solution.py", "exec"), module.__dict__)

if job["role"] == "program":
    module = sys.modules["solution"] = type(sys)("solution")
    kept = []  # objects that the judge knows by their number here

    def name_object(x):
        kept.append(x)
        return len(kept) - 1

    def find_object(name):
        if not isinstance(name, str):
            return kept[name]
        if name not in module.__dict__:
            raise NameError(f"name {name!r} is not defined")
        return module.__dict__[name]

    def answer_to(line):
        op, args, named = json.loads(line)
        args = [decode(a) for a in args]
        named = {k: decode(v) for k, v in named.items()}
        if op == "call":
            result = args[0](*args[1:], **named)
        else:
            function = getattr(builtins, op, None) or getattr(operator, op)
            result = function(*args)
        return json.dumps(["gives", encode(result)])

    exec(compile(job["source"], "solution.py", "exec"), module.__dict__)
    with open(job["fds"][0], "rb") as questions, open(job["fds"][1], "wb", 0) as answers:
        for line in questions:
            try:
                answer = answer_to(line)
            except BaseException as e:
                answer = json.dumps(["raises", type(e).__name__, str(e)[:200]])
            answers.write(answer.encode() + b"\n")

if job["role"] == "judge":
    answers = open(job["fds"][0], "rb")
    questions = open(job["fds"][1], "wb", 0)

    class Stub:
        """Stands for an object of the program."""

        def __init__(self, name):
            self.__dict__["_name"] = name

    def name_object(x):
        if type(x) is not Stub:
            raise TypeError(f"a test cannot hand a {type(x).__name__} to the program")
        return x._name

    find_object = Stub

    def ask(op, *args, **named):
        question = json.dumps([op, [encode(a) for a in args], {k: encode(v) for k, v in named.items()}])
        try:
            questions.write(question.encode() + b"\n")
            line = answers.readline(2**24)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise EOFError(GONE)
        said = json.loads(line)
        if said[0] == "gives":
            return decode(said[1])
        kind = getattr(builtins, str(said[1]), None)
        is_error = isinstance(kind, type) and issubclass(kind, Exception)
        raise (kind if is_error else RuntimeError)(str(said[2]))

    def asking(op):
        return lambda self, *args, **named: ask(op, self, *args, **named)

    def comparing(op):
        # Never with a plain value: f(x) - 3.14 would tell the program what is wanted, and believe it.
        return lambda self, other: ask(op, self, other) if type(other) is Stub else NotImplemented

    for op in "call getattr len iter next bool str repr getitem".split():
        setattr(Stub, f"__{op}__", asking(op))
    for op in "eq lt le gt ge add sub mul".split():
        setattr(Stub, f"__{op}__", comparing(op))
    verdicts = os.fdopen(os.dup(1), "w")
    sys.stdout = open("/dev/null", "w")  # a test may print
    space = {name: Stub(name) for name in job["names"]} | {name: __import__(name) for name in job["modules"]}
    try:
        loaded = ask("bool", 1)  # or a test that asks nothing would pass with a program that cannot be loaded
    except EOFError:
        loaded = False
    for n, test in enumerate(job["tests"] if loaded else ()):
        try:
            exec(compile(test, f"test {n}", "exec"), space)
            verdict = "passed"
        except AssertionError:
            verdict = "wrong answer"
        except EOFError:
            verdict = GONE
        except BaseException as e:
            verdict = f"{type(e).__name__}: {str(e)[:200]}"
        print(json.dumps([n, verdict]), file=verdicts, flush=True)
'''


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


# ----------------------------------------------------------------------------------------- the verdicts
def check(source: str, tests: list, names=(), *, seconds: float = 4.0, memory_mb: int = 512) -> list[str]:
    """For each test of a program "passed", or why it has not.

    tests: statements (a str with an assert), or dicts with `input` (stdin) and `output` (stdout). names: what
    the tests call that Python has under that name too, as in `assert sum(3) == 6`; other names that the tests
    neither define nor find in Python are the program's. seconds: CPU of all statements together, and of each
    stdin test; PATIENCE times as many on the clock.

    Raises ValueError for a test that is no Python, SandboxError where a sandbox fails: then
    nothing is known of the program.
    """
    statements = [test for test in tests if isinstance(test, str)]
    judged = iter(())
    if statements:
        judged = iter(check_statements(source, statements, seconds, memory_mb, names))
    verdicts = []
    for test in tests:
        if isinstance(test, str):
            verdicts.append(next(judged))
        else:
            verdicts.append(check_script(source, test["input"], test["output"], seconds, memory_mb))
    return verdicts


def check_statements(source, tests, seconds, memory_mb, names) -> list[str]:
    asked, modules = foreign(tuple(tests), tuple(names))
    with contextlib.ExitStack() as stack:
        pipes = stack.enter_context(contextlib.ExitStack())
        program_reads, judge_writes = os.pipe()  # questions
        judge_reads, program_writes = os.pipe()  # answers
        for fd in (program_reads, judge_writes, judge_reads, program_writes):
            pipes.callback(os.close, fd)
        deadline = time.monotonic() + PATIENCE * seconds
        limits = dict(seconds=seconds, memory_mb=memory_mb)
        job = dict(role="program", source=source)
        stack.enter_context(started(job, fds=(program_reads, program_writes), **limits))
        job = dict(role="judge", tests=tests, names=asked, modules=modules)
        judging = started(job, fds=(judge_reads, judge_writes), stdout=subprocess.PIPE, **limits)
        judge = stack.enter_context(judging)
        pipes.close()  # with ours open nobody would see the other end close
        said, why = drained(judge, deadline)
    verdicts = dict(json.loads(line) for line in said.split(b"\n") if line.endswith(b"]"))
    return [verdicts.get(n, why or "the program has ended") for n in range(len(tests))]


def check_script(source, stdin, output, seconds, memory_mb) -> str:
    deadline = time.monotonic() + PATIENCE * seconds
    job = dict(role="script", source=source)
    limits = dict(seconds=seconds, memory_mb=memory_mb)
    with started(job, stdin=stdin.encode(), stdout=subprocess.PIPE, **limits) as process:
        said, why = drained(process, deadline)
        if not why:  # a program may close its stdout and go on
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.01, deadline - time.monotonic()))
        status = process.poll()
    if why:
        return why
    if status is None:
        return "too slow"
    if status != 0:
        return f"ended with status {status}"
    same = lines_of(said.decode(errors="replace")) == lines_of(
        output
    )  # the whole of it: a prefix is not enough
    return "passed" if same else "wrong output"


def lines_of(text: str) -> list[str]:
    """Lines of a text; white space at their ends, and empty lines at its end, do not count."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


@functools.lru_cache(1000)
def foreign(tests: tuple, names: tuple) -> tuple[list, list]:
    """What tests use that they do not define.

    Names that the program has to provide, and modules of the standard library that are not imported.
    """
    used = set()
    owners = set()  # names before a dot
    for test in tests:
        for node in ast.walk(ast.parse(test)):
            if isinstance(node, ast.Name):
                used.add(node.id)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owners.add(node.value.id)
    modules = owners & sys.stdlib_module_names
    asked = {name for name in used if name in names or not (hasattr(builtins, name) or name in modules)}
    return sorted(asked), sorted(modules - set(names))


def check_all(jobs: list[tuple], *, workers: int | None = None, **options) -> list:
    """check's verdicts for each (source, tests) or (source, tests, names).

    `workers` (default: one a core) are checked at once. In the place of verdicts stands the SandboxError or
    ValueError that check raised. Programs that all run into their limit take up to
    len(jobs) / workers * PATIENCE * seconds, and seconds apiece where they compute and do not wait.
    """
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(functools.partial(attempt, options), jobs))


def attempt(options: dict, job: tuple):
    try:
        return check(*job, **options)
    except (ValueError, SyntaxError, OSError) as e:  # SandboxError too
        return e
