"""Runs Python that a model wrote, with its tests, without trusting it.

    check(source, ["assert add(1, 2) == 3", {"input": "1 2\\n", "output": "3\\n"}])  -> ["passed", "wrong output"]
    check_all([(source, tests), ..])                                                  the same for many, several at once
    isolation()                                                                       -> what holds on this machine, found out by trying

A naive harness runs program and tests in one interpreter, where the program can print the success mark, leave with exit(0), replace `assert`'s
operands by objects that equal everything, or read the expected values off the stack. Here three parties never share a process:

    program   the model's code, in a sandbox of its own. It is asked "what is add(1, 2)?" and may answer with data (JSON of plain types).
    judge     the data set's tests, in another sandbox. Names that the tests do not define are stubs that ask the program; `== 3` is evaluated
              here, on plain data, and 3 is never sent. Without the judge the data set's code would run in this process.
    this one  reads the judge's verdicts from a pipe that the program has not got, and for tests of stdin and stdout compares the text itself.

So the program can only be right by giving right answers, to inputs it sees and expected values it does not. What remains forgeable: answers
known by heart; a test without an expected value (`assert f(x)`), or one that asks the returned object about itself (`assert f(x).ok()`) or hands
it the expected value (`f(x).equals(3)`). What is lost: arguments are copies (a function that sorts its argument in place has no effect), a test cannot
hand over a function or catch an exception class of the program's own, and only the standard library is there. The kernel itself is trusted: there is no
seccomp filter, and memory is capped for each process, not for all of a program's `PROCESSES` together.

A sandbox is made by the system's own unshare, mount, chroot, setpriv and timeout (util-linux, coreutils), as root or through a user namespace:
a file system of nothing but /usr, Python (both read-only), /dev/null and a scratch folder of FILE_MB; no /proc, no /home, no keys in the environment; own
process, network, IPC and mount namespaces; no privileges; limits. bwrap would do the same, and a second way would be tested half as well. Where the kernel
allows no namespaces, what is left is: limits, no child processes, another user if we are root. isolation() then says so, and strict refuses.

Linux only. Tests: python -m pytest tests/test_sandbox.py, speed: python bench/sandbox.py
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
FILE_MB, FILES, PROCESSES, OUTPUT = 16, 1000, 8, 2**20  # a scratch folder's size and number of files, processes and threads, bytes of stdout that are read
PATIENCE = 3  # seconds on the clock for each second of CPU: on a busy machine a verdict should not depend on the neighbours
PYTHON, PREFIX = os.path.realpath(getattr(sys, "_base_executable", sys.executable)), os.path.realpath(sys.base_prefix)


class SandboxError(ValueError):
    """The sandbox itself failed, or isolation is too weak: nothing is known about the program."""


# What runs in the sandboxes: limits first, then one of three roles. It is text, so that nothing of it can run here.
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
    os.setgroups([]), os.setgid(job["uid"]), os.setuid(job["uid"])
sys.argv, sys.path = ["solution.py"], [p for p in sys.path if p]
os.write(job["ready"], b"1"), os.close(job["ready"])

GONE = "the program has ended"
PLAIN = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}

def encode(x):  # exact types stand for themselves, subclasses (Counter, namedtuple) for what they are built on, other objects for a number
    if x is None or isinstance(x, (bool, int, float, str)):
        return x if x is None or isinstance(x, bool) else int.__int__(x) if isinstance(x, int) else float.__float__(x) if isinstance(x, float) else str.__str__(x)
    if isinstance(x, dict):
        return ["dict", [[encode(k), encode(v)] for k, v in dict.items(x)]]
    if isinstance(x, (bytes, bytearray, complex)):
        return [type(x).__name__, x.hex() if not isinstance(x, complex) else [x.real, x.imag]]
    kind = next((k for k in PLAIN if isinstance(x, k)), None)
    return [PLAIN[kind], [encode(v) for v in kind.__iter__(x)]] if kind else ["object", name_object(x)]

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
    return complex(*value) if kind == "complex" else {v: k for k, v in PLAIN.items()}[kind](map(decode, value))

if job["role"] == "script":
    module = sys.modules["__main__"] = type(sys)("__main__")
    exec(compile(job["source"], "solution.py", "exec"), module.__dict__)

if job["role"] == "program":
    module, kept = type(sys)("solution"), []
    sys.modules["solution"] = module
    def name_object(x):
        kept.append(x)
        return len(kept) - 1
    def find_object(name):
        if isinstance(name, str) and name not in module.__dict__:
            raise NameError(f"name {name!r} is not defined")
        return module.__dict__[name] if isinstance(name, str) else kept[name]
    exec(compile(job["source"], "solution.py", "exec"), module.__dict__)
    with open(job["fds"][0], "rb") as questions, open(job["fds"][1], "wb", 0) as answers:
        for line in questions:
            try:
                op, args, named = json.loads(line)
                args, named = [decode(a) for a in args], {k: decode(v) for k, v in named.items()}
                result = args[0](*args[1:], **named) if op == "call" else (getattr(builtins, op, None) or getattr(operator, op))(*args)
                answer = json.dumps(["gives", encode(result)])
            except BaseException as e:
                answer = json.dumps(["raises", type(e).__name__, str(e)[:200]])
            answers.write(answer.encode() + b"\n")

if job["role"] == "judge":
    answers, questions = open(job["fds"][0], "rb"), open(job["fds"][1], "wb", 0)
    class Stub:  # stands for an object of the program
        def __init__(self, name): self.__dict__["_name"] = name
    def name_object(x):
        if type(x) is not Stub:
            raise TypeError(f"a test cannot hand a {type(x).__name__} to the program")
        return x._name
    find_object = Stub
    def ask(op, *args, **named):
        try:
            questions.write(json.dumps([op, [encode(a) for a in args], {k: encode(v) for k, v in named.items()}]).encode() + b"\n")
            line = answers.readline(2**24)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise EOFError(GONE)
        said = json.loads(line)
        if said[0] == "gives":
            return decode(said[1])
        kind = getattr(builtins, str(said[1]), None)
        raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(str(said[2]))
    for op in "call getattr len iter next bool str repr getitem".split():
        setattr(Stub, f"__{op}__", lambda self, *a, _op=op, **k: ask(_op, self, *a, **k))
    for op in "eq lt le gt ge add sub mul".split():  # never with a plain value: f(x) - 3.14 would tell the program what is wanted, and believe it
        setattr(Stub, f"__{op}__", lambda self, other, _op=op: ask(_op, self, other) if type(other) is Stub else NotImplemented)
    verdicts, sys.stdout = os.fdopen(os.dup(1), "w"), open("/dev/null", "w")  # a test may print
    space = {name: Stub(name) for name in job["names"]} | {name: __import__(name) for name in job["modules"]}
    try:
        loaded = ask("bool", 1)  # else a test that asks nothing would pass with a program that cannot even be loaded
    except EOFError:
        loaded = False
    for n, test in enumerate(job["tests"] if loaded else ()):
        try:
            exec(compile(test, f"test {n}", "exec"), space)
            verdict = "passed"
        except BaseException as e:
            verdict = "wrong answer" if isinstance(e, AssertionError) else f"{type(e).__name__}: {str(e)[:200]}"
            verdict = GONE if isinstance(e, EOFError) else verdict
        print(json.dumps([n, verdict]), file=verdicts, flush=True)
'''


# ------------------------------------------------------------------------------------------------------------- the sandbox
def wrapper(mode: str, seconds: float) -> list[str]:
    """The command that a sandboxed command follows. The mount point is the folder it starts in.

    timeout is the first process of the namespace: should this process be killed, it ends the sandbox, and with the first process all others.
    """
    ended = ["timeout", "-s", "KILL", f"{PATIENCE * seconds + 1:g}"]
    if mode == "plain":
        return ended
    folders = ["/usr", *(d for d in ("/bin", "/lib", "/lib64", "/lib32", "/nix", PREFIX) if os.path.isdir(d) and not (d + "/").startswith("/usr/"))]
    lines = ["set -e", "mount -t tmpfs -o size=1m,mode=755 none .", 'cd "$PWD"', "mkdir -p dev tmp", "touch dev/null", "mount --bind /dev/null dev/null",
             f"mount -t tmpfs -o nosuid,nodev,size={FILE_MB}m,nr_inodes={FILES},mode=1777 none tmp"]
    for d in folders:  # where /lib is a link to usr/lib, a link it stays
        there, here = shlex.quote(d), shlex.quote("." + d)
        lines.append(f"ln -s {shlex.quote(os.readlink(d))} {here}" if os.path.islink(d) else f"mkdir -p {here}; mount --rbind -o ro {there} {here}")
    lines += ["mount -o remount,ro,size=1m,mode=755 none .", "echo 0 > /proc/sys/kernel/shmall || :",  # System V shared memory would be memory beside the limit
              'exec chroot . "$@"']
    # Another user each time: the kernel counts processes by user, and a fork bomb must not use up its neighbour's.
    user = [f"--reuid={(uid := random.randint(60001, 64999))}", f"--regid={uid}", "--clear-groups"] if mode == "root" else []
    return ["unshare", *(["--user", "--map-root-user"] if mode == "user" else []), "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child",
            "sh", "-c", "\n".join(lines), "sh", "setpriv", *user, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", *ended]


@contextlib.contextmanager
def started(job: dict, *, seconds: float, memory_mb: int = 512, stdin: bytes = b"", stdout=subprocess.DEVNULL, fds=(), mode=None):
    """A CHILD in a sandbox: the Popen of its outermost process, ended on the way out with all it started. SandboxError if it never got as far as the job."""
    mode = mode or choose()[0]
    limits = dict(AS=memory_mb * 2**20, CPU=math.ceil(seconds), FSIZE=FILE_MB * 2**20, NOFILE=64, CORE=0, NPROC=1 if mode == "plain" else PROCESSES + 2)
    uid = random.randint(60001, 64999) if mode == "plain" and os.geteuid() == 0 else 0
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"sandbox-{os.getpid()}-", ignore_cleanup_errors=True))
        os.chmod(scratch, 0o777 if uid else 0o700)
        ready, told = os.pipe()
        stack.callback(os.close, ready)
        with open(told, "wb"):
            job = job | dict(limits=limits, uid=uid, ready=told, fds=list(fds), scratch=scratch if mode == "plain" else "/tmp")
            with read_only(scratch, json.dumps(job).encode()) as file, read_only(scratch, stdin) as typed:
                process = subprocess.Popen([*wrapper(mode, seconds), PYTHON, "-s", "-S", "-B", "-X", "utf8", "-c", CHILD, str(file.fileno())], stdin=typed, stdout=stdout,
                                           stderr=subprocess.DEVNULL, cwd=scratch, start_new_session=True, pass_fds=(file.fileno(), told, *fds),
                                           env=dict(PATH="/usr/sbin:/usr/bin:/sbin:/bin", PYTHONHASHSEED="0"))
        stack.callback(end, process)
        yield process
        end(process)
        if not os.read(ready, 1):
            raise SandboxError(f"a sandbox did not start (mode {mode}, status {process.returncode}): the machine is out of processes, memory or time")


def read_only(folder: str, content: bytes):
    """An open file without a name that can only be read: a pipe would block on long content, and a file open for writing is a place to write."""
    Path(folder, "file").write_bytes(content)
    file = open(Path(folder, "file"), "rb")
    os.unlink(file.name)
    return file


def end(process):
    """Kills from the inside out: the first process of the namespace takes all others with it, and each parent reaps its own child, so that no zombie is left
    to whatever this machine's process 1 is. When wait() returns, the namespace is gone."""
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if process.poll() is None else ():
            os.kill(int(child), signal.SIGKILL)
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout:
        process.stdout.close()


def drained(process, deadline: float) -> tuple[bytes, str]:
    """What a process writes before it closes its stdout, and why that is not all: "", "too slow" or "too much output". No signal is needed for the time."""
    said, poll = bytearray(), select.poll()
    poll.register(process.stdout, select.POLLIN)
    while poll.poll(max(0, deadline - time.monotonic()) * 1000):
        piece = os.read(process.stdout.fileno(), 2**16)
        said += piece
        if not piece or len(said) > OUTPUT:
            return bytes(said), "too much output" if piece else ""
    return bytes(said), "too slow"


# --------------------------------------------------------------------------------------------------------------- isolation
PROBE = '''
import os, resource, socket
def refused(f, *a):
    try: f(*a)
    except OSError: return True
def forks():
    for n in range(%(processes)d + 5):
        if os.fork() == 0: os._exit(0)
folder, port, said = %(folder)r, %(port)d, []
said += ["privileges"] * (os.getuid() != 0 or refused(os.chroot, "/"))
said += ["processes"] * (os.getppid() == 1)
said += ["network"] * bool(refused(socket.create_connection, ("127.0.0.1", port), 2))
said += ["files"] * all(refused(open, p, m) for p, m in [(folder + "/open", "r"), (folder + "/new", "w"), ("/usr/new", "w"), ("/new", "w"), ("/dev/new", "w")])
said += ["limits"] * bool(refused(forks) and refused(os.posix_fallocate, os.open("big", os.O_CREAT | os.O_RDWR), 0, 2**30) and resource.getrlimit(resource.RLIMIT_AS)[1] > 0)
print(*said)
'''


@functools.cache
def choose() -> tuple[str, tuple]:
    """(mode, what it isolates): the first way that gives everything, else the one that gives most. A program inside tries what it must not be able to."""
    found = []
    for mode in [*(["root"] if os.geteuid() == 0 else []), "user", "plain"]:
        with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server, contextlib.suppress(SandboxError, OSError):
            os.chmod(folder, 0o777)
            Path(folder, "open").touch()
            source = PROBE % dict(folder=folder, port=server.getsockname()[1], processes=PROCESSES)
            with started(dict(role="script", source=source), seconds=10, stdout=subprocess.PIPE, mode=mode) as process:
                found.append((mode, tuple(sorted(drained(process, time.monotonic() + 10)[0].decode().split(), key=FULL.index))))
        if found and set(found[-1][1]) == set(FULL):
            break
    if not found:
        raise SandboxError("no program can be run apart on this machine: the sandbox needs Linux and the commands timeout and, for isolation, unshare, mount, setpriv")
    return max(found, key=lambda f: len(f[1]))


def isolation(strict: bool = False) -> list[str]:
    """Which of FULL hold here, found out once by trying. strict: SandboxError where one is missing.

    limits: time, memory, file size and processes. privileges: none. processes: sees and reaches no others. network: none. files: the system read-only, its
    scratch folder, and nothing else.
    """
    mode, found = choose()
    if strict and (missing := [name for name in FULL if name not in found]):
        raise SandboxError(f"sandbox='strict' needs {', '.join(FULL)}, and this machine gives no {', '.join(missing)}: install util-linux and allow user namespaces "
                           "(in a container: --cap-add=SYS_ADMIN, or --security-opt seccomp=unconfined), or accept less with sandbox='auto'")
    return list(found)


# ------------------------------------------------------------------------------------------------------------- the verdicts
def check(source: str, tests: list, names=(), *, seconds: float = 4.0, memory_mb: int = 512) -> list[str]:
    """"passed", or why not, for each test of a program: statements (a str with an assert), or dicts with `input` (stdin) and `output` (stdout).

    seconds: CPU of all statements together, and of each stdin test; PATIENCE times as many on the clock. names: what the tests call that Python has under that name too, as in
    `assert sum(3) == 6`; other names that the tests neither define nor find in Python are the program's. Raises ValueError for a test that is no Python,
    SandboxError where a sandbox fails: then nothing is known of the program.
    """
    statements = [t for t in tests if isinstance(t, str)]
    judged = iter(check_statements(source, statements, seconds, memory_mb, names) if statements else ())
    return [next(judged) if isinstance(t, str) else check_script(source, t["input"], t["output"], seconds, memory_mb) for t in tests]


def check_statements(source, tests, seconds, memory_mb, names) -> list[str]:
    asked, modules = foreign(tuple(tests), tuple(names))
    with contextlib.ExitStack() as stack:
        fds = [fd for _ in range(2) for fd in os.pipe()]  # questions: judge writes 1, program reads 0; answers: program writes 3, judge reads 2
        pipes = stack.enter_context(contextlib.ExitStack())
        for fd in fds:
            pipes.callback(os.close, fd)
        deadline = time.monotonic() + PATIENCE * seconds
        stack.enter_context(started(dict(role="program", source=source), seconds=seconds, memory_mb=memory_mb, fds=(fds[0], fds[3])))
        judge = stack.enter_context(started(dict(role="judge", tests=tests, names=asked, modules=modules), seconds=seconds, memory_mb=memory_mb, fds=(fds[2], fds[1]),
                                            stdout=subprocess.PIPE))
        pipes.close()  # with ours open nobody would see the other end close
        said, why = drained(judge, deadline)
    verdicts = dict(json.loads(line) for line in said.split(b"\n") if line.endswith(b"]"))
    return [verdicts.get(n, why or "the program has ended") for n in range(len(tests))]


def check_script(source, stdin, output, seconds, memory_mb) -> str:
    deadline = time.monotonic() + PATIENCE * seconds
    with started(dict(role="script", source=source), seconds=seconds, memory_mb=memory_mb, stdin=stdin.encode(), stdout=subprocess.PIPE) as process:
        said, why = drained(process, deadline)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0 if why else max(0.01, deadline - time.monotonic()))  # a program may close its stdout and go on
        status = process.poll()
    if why or status != 0:
        return why or ("too slow" if status is None else f"ended with status {status}")
    same = lines(said.decode(errors="replace")) == lines(output)  # the whole of it: a prefix is not enough
    return "passed" if same else "wrong output"


def lines(text: str) -> list[str]:
    """Lines of a text; white space at their ends, and empty lines at its end, do not count."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


@functools.lru_cache(1000)
def foreign(tests: tuple, names: tuple) -> tuple[list, list]:
    """Names in the tests that the program has to provide, and modules of the standard library that they use without an import."""
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    used = {n.id for n in nodes if isinstance(n, ast.Name)}
    modules = {n.value.id for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)} & sys.stdlib_module_names
    return sorted(n for n in used if n in names or not hasattr(builtins, n) and n not in modules), sorted(modules - set(names))


def check_all(jobs: list[tuple], *, workers: int | None = None, **options) -> list:
    """check's verdicts for each (source, tests) or (source, tests, names), or the SandboxError or ValueError that it raised; `workers` (default: one a core) at a time.

    Programs that all run into their limit take up to len(jobs) / workers * PATIENCE * seconds, and seconds apiece where they compute and do not wait.
    """
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(functools.partial(attempt, options), jobs))


def attempt(options: dict, job: tuple):
    try:
        return check(*job, **options)
    except (ValueError, SyntaxError, OSError) as e:  # SandboxError too
        return e
