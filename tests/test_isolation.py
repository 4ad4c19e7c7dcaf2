"""What shuts a program in, each part with the attack that it is for, in each mode that this machine has."""

import contextlib
import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sandboxes import (
    GOOD,
    MODES,
    close_launchers,
    TEST,
    launched,
    needs,
    probe,
    processes,
    program,
    scratch_folders,
)
from tasks import isolation as apart
from tasks import seccomp
from tasks.sandbox import FULL, SandboxError, check, check_all, isolation

ROOT = Path(__file__).resolve().parent.parent
SYSTEM_PYTHON = "/usr/bin/python3"
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux"),
    pytest.mark.usefixtures("nothing_is_left"),
]
libc = ctypes.CDLL(None, use_errno=True)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# --------------------------------------------------------------------------------------- the system calls
def numbers_in(header: str) -> dict[str, int]:
    path = Path("/usr/include", header)
    if not path.exists():
        pytest.skip(f"no {path}: install linux-libc-dev")
    found = re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", path.read_text())
    return {name: int(number) for name, number in found}


@pytest.mark.parametrize(
    "machine, header",
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_the_table_has_the_kernels_numbers(machine, header):
    known = numbers_in(header)
    table = seccomp.DENIED + seccomp.DENIED_SHUT_OUT + seccomp.CONDITIONAL
    ours = seccomp.numbers(table, machine) | seccomp.NEWER
    assert ours == {name: known.get(name, number) for name, number in ours.items()}
    assert len(ours.keys() & known.keys()) > 0.95 * len(ours)  # a header may be older than the table
    names = {entry.split()[0] for entry in table.replace("\n", ",").split(",") if entry}
    missing = names - ours.keys()  # those that the table says this machine has not
    assert not missing & known.keys()


def outcome(lines, machine, number, *arguments) -> int:
    """What a filter returns for a call: the kernel's interpreter, as far as our filters need it."""
    words = [number, seccomp.ARCHITECTURES[machine], 0, 0]  # struct seccomp_data, in words of 4 bytes
    for argument in [*arguments, 0, 0][:2]:
        words += [argument & 0xFFFFFFFF, argument >> 32]
    at = value = 0
    while True:
        code, if_true, if_false, operand = lines[at]
        at += 1
        if code == seccomp.LOAD:
            value = words[operand // 4]
        elif code == seccomp.RETURN:
            return operand
        else:
            true = dict(
                [
                    (seccomp.EQUAL, value == operand),
                    (seccomp.AT_LEAST, value >= operand),
                    (seccomp.ANY_BIT, value & operand),
                ]
            )[code]
            at += if_true if true else if_false


@pytest.mark.parametrize("shut_out", [False, True], ids=["namespaces", "plain"])
@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_the_filter_decides_as_it_says_on_either_machine(machine, shut_out):
    me = 4321
    lines = seccomp.program(machine, shut_out, me)
    assert len(lines) < 4096 and max(jump for _, *jumps, _ in lines for jump in jumps) < 256

    def does(name, *arguments):
        got = outcome(lines, machine, known[name], *arguments)
        return {seccomp.ALLOW: "", seccomp.ERRNO | 1: "EPERM", seccomp.ERRNO | 38: "ENOSYS"}[got]

    shut = seccomp.numbers(seccomp.DENIED_SHUT_OUT, machine)
    known = seccomp.numbers(seccomp.CONDITIONAL, machine) | seccomp.NEWER | shut
    known |= seccomp.numbers(seccomp.DENIED, machine)
    assert {does(name) for name in seccomp.numbers(seccomp.DENIED, machine)} == {"EPERM"}
    assert {does(name) for name in shut} == ({"EPERM"} if shut_out else {"", "EPERM"})
    assert {does(name) for name in seccomp.NEWER} == {""}
    for number in (424, 425, 435, 438, 447, 470, 2**30 - 1):
        assert outcome(lines, machine, number) == seccomp.ERRNO | 38
    for name in ("read", "write", "mmap", "futex", "openat", "exit_group"):
        table = dict(read=(0, 63), write=(1, 64), mmap=(9, 222), futex=(202, 98), openat=(257, 56))
        number = table.get(name, (231, 94))[list(seccomp.ARCHITECTURES).index(machine)]
        assert outcome(lines, machine, number) == seccomp.ALLOW
    assert does("clone", 17) == does("clone", 0x10000000) == "EPERM" and does("clone", 0x3D0F00) == ""
    assert does("socketpair", 1) == "" and does("socketpair", 2) == does("socket", 40) == "EPERM"
    assert does("socket", 1) == ("EPERM" if shut_out else "")
    assert does("prctl", 1) == does("prctl", 4) == does("prctl", 35) == "EPERM" and does("prctl", 15) == ""
    refused = "EPERM" if shut_out else ""
    assert does("kill", me) == does("tgkill", me) == does("prlimit64", 0) == does("prlimit64", me) == ""
    for name in ("kill", "tgkill", "prlimit64"):
        assert does(name, 1) == does(name, 2**32 - 1) == refused
    assert does("fcntl", me, 8) == does("fcntl", me, 10) == does("ioctl", me, 0x8901) == refused
    assert does("fcntl", 8, 1) == does("ioctl", 0x8901, 0x5401) == ""
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[machine]
    assert outcome(lines, other, 0) == seccomp.KILL
    if machine == "x86_64":
        assert outcome(lines, machine, seccomp.X32 | 1) == seccomp.KILL


def test_denied_system_calls_fail_and_what_programs_need_works(mode):
    needs("system calls")
    denied = seccomp.numbers(seccomp.DENIED, os.uname().machine) | dict(io_uring_setup=425, clone3=435)
    del denied["execve"], denied["fork"]  # of which more below
    body = program(
        f"""
        import ctypes, threading, asyncio
        libc = ctypes.CDLL(None, use_errno=True)
        r = []
        for name, number in {denied!r}.items():
            result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(0)] * 6)
            if result != -1 or ctypes.get_errno() not in (1, 38): r.append((name, result))
        def execute(): os.execv('/usr/bin/env', ['env'])
        def spawn(): os.posix_spawn('/bin/true', ['x'], {{}})
        for f in os.fork, execute, spawn:
            try: r.append(f())
            except OSError: pass
        for family in [2, 10, 16, 17, 38, 40]:  # INET, INET6, NETLINK, PACKET, ALG, VSOCK
            for make in socket.socket, socket.socketpair:
                try: r.append((family, make(family)))
                except OSError: pass
        if os.system('true') == 0: r.append('system')
        box = []
        if {mode != "plain" or os.geteuid() == 0}:
            thread = threading.Thread(target=box.append, args=(1,))
            thread.start()
            thread.join()
            if not box: r.append('thread')
        async def two(): return 2
        if asyncio.run(two()) != 2: r.append('asyncio')
        """
    )
    assert probe(body, "[]") == ["passed"]


def test_a_call_by_another_architectures_numbers_ends_the_program(mode):
    needs("system calls")
    if os.uname().machine != "x86_64":
        pytest.skip("only x86_64 has other numbers to call by")
    x32 = "import ctypes\nctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 | 39))\nr = 1"
    assert probe(x32, "1") == ["the program has ended"]
    i386 = program(
        """
        import ctypes, mmap
        code = b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3'  # mov eax, 20 (getpid); int 0x80; ret
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(code)
        r = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        """
    )
    assert probe(i386, "1") == ["the program has ended"]


def test_without_a_filter_isolation_says_so(mode, use):
    use("landlock")
    held = apart.probed(mode)
    assert "system calls" not in held
    # In a user namespace that root makes the kernel does not count its processes.
    assert "limits" in held or (mode == "user" and os.geteuid() == 0)


def test_a_program_makes_no_user_namespace_where_there_is_no_filter(mode, use):
    """In one of its own it would have all privileges again, over its copies of the mounts at least."""
    if mode == "plain":
        pytest.skip("there the filter alone prevents it")
    use("landlock")
    body = "import ctypes\nr = ctypes.CDLL(None).unshare(0x10000000)"
    assert probe(body, "-1") == ["passed"]


def test_memory_is_not_had_beside_its_limit(mode):
    """A file in memory, System V shared memory, more processes: a program held 2.2 GB with 512 MB allowed."""
    needs("system calls")
    body = program(
        """
        import ctypes, mmap
        libc = ctypes.CDLL(None)
        r = []
        try:
            fd = os.memfd_create('x')
            os.ftruncate(fd, 2**30)
            r.append('memfd')
        except OSError: pass
        if libc.shmget(0, ctypes.c_size_t(2**28), 0o1600) != -1: r.append('shm')
        try:
            if os.fork() == 0: os._exit(0)
            r.append('fork')
        except OSError: pass
        """
    )
    assert probe(body, "[]", memory_mb=512) == ["passed"]


# ------------------------------------------------------------------------------------------------- keys
def keyctl(*arguments):
    number = dict(x86_64=250, aarch64=219)[os.uname().machine]
    return libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in arguments])


KEYS = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
long = lambda x: ctypes.c_long(x) if isinstance(x, int) else x
call = lambda n, *a: libc.syscall(*map(long, (n, *a)))
add, ctl = {numbers!r}
r = call(ctl, 10, -3, b'user', b'{name}', 0) > 0  # KEYCTL_SEARCH in the session key ring
if r: call(ctl, 9, call(ctl, 10, -3, b'user', b'{name}', 0), -3)  # KEYCTL_UNLINK
for ring in {rings}:
    if call(ctl, 10, ring, b'user', b'left-behind', 0) > 0: r = True
    call(add, b'user', b'left-behind', b'x', 1, ring)
"""


@pytest.mark.parametrize("filters", [("seccomp", "landlock"), ("landlock",)], ids=["filter", "no filter"])
def test_no_key_of_the_trainers_is_found_and_none_is_left_for_the_next(mode, use, filters):
    """A program read and unlinked a key in the session key ring that it inherited."""
    use(*filters)
    numbers = dict(x86_64=(248, 250), aarch64=(217, 219)).get(os.uname().machine)
    if numbers is None or keyctl(0, -3, 1) < 0:
        pytest.skip("this kernel, or what it is filtered by, has no keys")
    name = f"nanogrpo-{os.getpid()}"
    key = libc.syscall(ctypes.c_long(numbers[0]), b"user", name.encode(), b"secret", ctypes.c_long(6), -3)
    assert key > 0
    # Any process with the key's id might read it: a random one of 31 bits, which no program is told.
    rings = [-3, -5]  # the session's, and the user's session's
    if mode == "plain" and os.geteuid() != 0 and "seccomp" not in filters:
        rings = [-3]  # there a program is this user
    body = KEYS.format(numbers=numbers, name=name, rings=rings).strip("\n")
    try:
        assert probe(body, "False") == ["passed"]
        assert probe(body, "False") == ["passed"]
        assert keyctl(10, -3, *map(address, (b"user", name.encode())), 0) == key  # still there
    finally:
        keyctl(9, key, -3)


def address(text: bytes) -> int:
    KEPT.append(ctypes.create_string_buffer(text))
    return ctypes.addressof(KEPT[-1])


KEPT = []


# ----------------------------------------------------------------------------------------- what survives
SURVIVOR = """
import ctypes, os, signal, time
libc = ctypes.CDLL(None, use_errno=True)
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
libc.prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG: no signal when its parent ends
for pid in (1, os.getppid()):
    libc.ptrace(16, pid, 0, 0)  # PTRACE_ATTACH, which stops it
    for number in (19, 9):
        try: os.kill(pid, number)
        except OSError: pass
try: os.setsid()
except OSError: pass
while True:
    time.sleep(1)
"""


@pytest.mark.slow
def test_a_program_does_not_survive_a_killed_trainer(mode):
    """Killed with no chance to clean up: after the limit and a second nothing of it is there.

    A program that stopped process 1 of its namespace by ptrace, or forgot its parent's signal, lived on. And
    the trainer has forked, as data loaders do: the fork holds open whatever the trainer had open.
    """
    code = program(
        f"""
        import os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from tasks import isolation, sandbox
        isolation.choose = lambda: ({mode!r}, ())
        isolation.launcher_of({mode!r})
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        print('up', flush=True)
        sandbox.check({SURVIVOR!r}, [{TEST!r}], seconds=1)
        """
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    run.stdout.readline()
    deadline = time.monotonic() + 10
    while len(launched(run.pid)) < 4 and time.monotonic() < deadline:  # watcher, launcher, program and judge
        time.sleep(0.02)
    assert len(launched(run.pid)) == 4
    time.sleep(0.3)  # the attack
    run.kill()
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 3 + 1
    while launched(run.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = launched(run.pid), list(Path(tempfile.gettempdir()).glob(f"sandbox-{run.pid}-*"))
    os.killpg(run.pid, signal.SIGKILL)  # its fork
    assert left == ({}, [])


def test_a_launcher_that_is_killed_takes_its_programs_with_it_and_is_started_anew(mode):
    launcher = apart.launcher_of(mode)
    slow = dict(role="script", source="import time\ntime.sleep(60)")
    with pytest.raises(SandboxError, match="its launcher has ended"):  # nothing is known of the program
        with apart.started(slow, seconds=4) as sandbox:
            while not sandbox.ready:
                sandbox.hear(1)
            for pid, parent in launched().items():
                if parent == str(launcher.process.pid):
                    os.kill(int(pid), signal.SIGKILL)
            assert sandbox.wait(5) == 128 + 9
    launcher.process.wait(5)  # what it is asked while it dies is lost, and an error
    assert check(GOOD, [TEST]) == ["passed"]


def test_a_fork_of_the_trainer_has_a_launcher_of_its_own():
    apart.launcher_of(apart.choose()[0])
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, repr((check(GOOD, [TEST]), len(launched(os.getpid())))).encode())
        close_launchers(apart.USE)
        os._exit(0)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(read, 100) == b"(['passed'], 2)"
    os.close(read)
    assert launched(child) == {} and check(GOOD, [TEST]) == ["passed"]


def test_nothing_of_a_job_is_in_the_memory_of_the_next(monkeypatch, use):
    """Programs are forks of one process: had it read a test, they could look for it.

    Without namespaces and Landlock a program can read in /proc where its memory lies, and so can be searched.
    """
    use("seccomp")
    monkeypatch.setattr(apart, "choose", lambda: ("plain", ()))
    secret = f"{os.getpid()}-secret"
    assert check("def f(): return 1", [f"assert f() != {secret!r}"]) == ["passed"]
    body = program(
        f"""
        import ctypes, re
        r = [0, 0]
        for line in open('/proc/self/maps'):
            start, stop = (int(x, 16) for x in line.split()[0].split('-'))
            if ' rw' in line:
                memory = ctypes.string_at(start, stop - start)
                for n, ending in enumerate((b'-s[e]cret', b'-k[n]own')):
                    r[n] += len(re.findall(b'{os.getpid()}' + ending, memory))
        r = [bool(n) for n in r]
        """
    )
    known = f"kept = ['{os.getpid()}-known']\n"
    assert probe(known + body, "[False, True]") == ["passed"]


# ------------------------------------------------------------------------------------- without namespaces
@pytest.mark.slow
def test_without_namespaces_no_program_plants_anything_in_a_neighbours_scratch_folder(monkeypatch):
    """As root, a program that watched the folders put a json.py in its neighbour's, which ran as root."""
    if os.geteuid() != 0:
        pytest.skip("an ordinary user's programs are one user")
    monkeypatch.setattr(apart, "choose", lambda: ("plain", ()))
    plant = program(
        f"""
        import glob, os, time
        end = time.monotonic() + 1
        here = os.getcwd()
        planted = []
        while time.monotonic() < end:
            for folder in glob.glob('{tempfile.gettempdir()}/sandbox-*/*') + ['.', '/', '/tmp']:
                if os.path.abspath(folder) != here:
                    for name in 'json.py', 'file', 'random.py':
                        try:
                            open(folder + '/' + name, 'w').write('raise SystemExit')
                            planted.append(folder)
                        except OSError: pass
        def look(): return planted
        """
    )
    own = program(
        """
        import os, sys, time, random
        time.sleep(0.1)
        def look():
            own = os.stat('.')
            listed = os.listdir('.')
            return oct(own.st_mode & 0o777), own.st_uid == os.getuid() > 60000, '' in sys.path, listed
        """
    )
    jobs = [(plant, ["assert look() == []"])]
    jobs += [(own, ["assert look() == ('0o700', True, False, [])"])] * 6
    assert check_all(jobs, workers=2, seconds=4) == [["passed"]] * 7


def test_a_program_has_no_descriptor_but_its_own(mode, use):
    """However many files the trainer has open, and however high their numbers are."""
    use("landlock", "seccomp")  # a launcher that starts here
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(4096, limits[1]) if limits[1] != resource.RLIM_INFINITY else 4096
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    held = []
    try:
        with contextlib.suppress(OSError):
            held += [os.open(os.devnull, os.O_RDONLY) for _ in range(1500)]
        body = "r = []\nfor n in range(10000):\n    try: os.fstat(n); r.append(n)\n    except OSError: pass"
        assert probe(f"{body}\nr = r[:3], len(r)", "([0, 1, 2], 5)") == ["passed"]  # and two pipes
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_holds_is_shown_when_a_run_starts():
    from screen import what_is_isolated

    said = what_is_isolated("auto")
    assert said.startswith("sandbox (auto, ") and apart.way() in said
    assert all((f"NOT {name}" in said) != (name in isolation()) for name in FULL)


@pytest.mark.slow
def test_more_programs_than_the_launcher_has_descriptors_for_are_an_error_and_not_its_end(use):
    use("landlock", "seccomp")  # a launcher that starts here
    launcher = apart.launcher_of(apart.choose()[0])
    (own,) = [pid for pid, parent in launched().items() if parent == str(launcher.process.pid)]
    resource.prlimit(int(own), resource.RLIMIT_NOFILE, (14, 200))
    slow = ("import time\ntime.sleep(60)", [dict(input="", output="")])
    got = check_all([slow] * 12, workers=12, seconds=0.3)
    assert {str(type(one)) for one in got} == {str(list), str(SandboxError)}
    assert launcher.process.poll() is None and check(GOOD, [TEST]) == ["passed"]


def test_a_machine_with_lower_limits_of_its_own_keeps_them():
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
source = 'import resource\\ndef f(): return resource.getrlimit(resource.RLIMIT_FSIZE)'
print(sandbox.check(source, ['assert f() == ({2**20}, {2**20})']))
"""
    assert as_other_user(code) == "['passed']\n"


def test_users_of_programs_differ():
    if os.geteuid() != 0:
        pytest.skip("only root makes programs other users")
    for mode in ("root", "plain"):
        source = "import os\nprint(os.getuid())"
        said = []
        for _ in range(3):
            job = dict(role="script", source=source)
            with apart.started(job, seconds=4, mode=mode, stdout=subprocess.PIPE) as process:
                said.append(int(apart.drained(process, time.monotonic() + 5)[0]))
        assert len(set(said)) == 3 and min(said) > 60000


FORGE = """
import os, time
said = b'[0, "passed"]\\n' * 3
end = time.monotonic() + 0.5
reached = set()
while time.monotonic() < end:
    for pid in map(str, range(trainer, os.getpid() + 50)):
        for fd in range(20):
            try:
                if int(pid) == os.getpid(): continue
                out = os.open(f'/proc/{pid}/fd/{fd}', os.O_WRONLY | os.O_NONBLOCK)
                reached.add(pid)
                if forging: os.write(out, said)
                os.close(out)
            except OSError: pass
def add(a, b): return 4
def ours():
    return ['launcher.py\\0' in open(f'/proc/{pid}/cmdline').read() for pid in reached].count(True)
"""


def as_other_user(code: str, refuse: str = "", user: int | None = 61234) -> str:
    """What code prints, run by the system's Python as an ordinary user, on a kernel that refuses some calls.

    refuse: entries of seccomp's tables; "seccomp" alone: a kernel without filters. user None: as it is.
    """
    if not os.path.exists(SYSTEM_PYTHON) or (user and (os.geteuid() != 0 or not shutil.which("setpriv"))):
        pytest.skip("needs root, to become somebody else, and the system's Python")
    prelude = program(
        f"""
        import os, sys
        sys.path.append('tasks')
        import seccomp
        refused = seccomp.numbers({refuse.replace("seccomp", "prctl 157 167")!r}, os.uname().machine)
        lines = [(seccomp.LOAD, 0, 0, seccomp.NUMBER)]
        for name, number in refused.items():
            error = (seccomp.RETURN, 0, 0, seccomp.ERRNO | (22 if name == 'prctl' else 1))
            if name == 'prctl':  # with PR_SET_SECCOMP alone
                lines += [(seccomp.EQUAL, 0, 3, number), (seccomp.LOAD, 0, 0, seccomp.FIRST_ARGUMENT)]
                lines += [(seccomp.EQUAL, 0, 1, 22), error, (seccomp.LOAD, 0, 0, seccomp.NUMBER)]
            else:
                lines += [(seccomp.EQUAL, 0, 1, number), error]
        if refused:
            seccomp.install(False, lines + [(seccomp.RETURN, 0, 0, seccomp.ALLOW)])
        sys.path = [os.getcwd(), *sys.path[:-1]]
        from tasks import isolation, sandbox
        """
    )
    command = [SYSTEM_PYTHON, "-c", prelude + "\n" + code]
    if user:
        command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a place that the other user can read
        os.chmod(folder, 0o755)
        shutil.copytree(ROOT / "tasks", f"{folder}/tasks", ignore=shutil.ignore_patterns("__pycache__"))
        env = dict(PATH=os.environ["PATH"])
        out = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    assert out.returncode == 0, out.stderr
    return out.stdout


UNSHARE, LANDLOCK = "unshare 272 97", "landlock_create_ruleset 444 444"
ASK = """
try:
    print(isolation.choose()[0], *isolation.isolation(), sep=', ')
    sandbox.demand('auto')
except sandbox.SandboxError as e:
    print('refused:', e)
"""


@pytest.mark.slow
def test_an_ordinary_user_without_namespaces_forges_no_verdict():
    """Through /proc a program wrote into the judge's descriptors, and the trainer's.

    Landlock keeps it from both; where there is none the judge at least is closed.
    """
    forged = f"""
isolation.choose = lambda: ('plain', ())
import os
source = f'forging, trainer = True, {{os.getpid()}}' + {FORGE!r}
print(sandbox.check(source, [{TEST!r}, 'assert add(0, 0) == 0'], seconds=4))
print(sandbox.check({GOOD!r}, [{TEST!r}], seconds=4))
"""
    assert as_other_user(forged) == "['wrong answer', 'wrong answer']\n['passed']\n"
    judge = f"""
isolation.choose = lambda: ('plain', ())
import os
source = f'forging, trainer = False, {{os.getpid()}}' + {FORGE!r}
print(sandbox.check(source, ["assert len(reached) > 0 and ours() == 0"], seconds=4))
"""
    assert as_other_user(judge, refuse=LANDLOCK) == "['passed']\n"  # the trainer it reaches, so auto refuses
    assert as_other_user("import sys\n" + ASK, refuse=UNSHARE) == "plain, " + ", ".join(FULL) + "\n"


def test_where_a_program_could_forge_its_verdict_auto_refuses_and_trust_goes_on():
    """As an ordinary user without namespaces and Landlock, say in an old container."""
    said = as_other_user(ASK, refuse=f"{UNSHARE}, {LANDLOCK}")
    assert said.startswith(
        "plain, limits, privileges, network, system calls\nrefused: programs can't be kept"
    )
    assert "user namespaces" in said and "sandbox='trust'" in said
    go_on = f"sandbox.demand('trust')\nprint(sandbox.check({GOOD!r}, [{TEST!r}]))"
    assert as_other_user(go_on, refuse=f"{UNSHARE}, {LANDLOCK}") == "['passed']\n"


@pytest.mark.slow
@needs_root
def test_where_the_kernel_has_nothing_root_still_keeps_verdicts_by_another_user():
    """No namespaces, no Landlock, no seccomp: what holds is said, and the rest is not."""
    said = as_other_user(ASK, refuse=f"{UNSHARE}, {LANDLOCK}, seccomp", user=None)
    assert said == "plain, limits, privileges\n"
    fork = program(
        """
        import os
        def f():
            try: return os.fork() > -1
            except OSError: return 'refused'
        """
    )
    # There what a program starts would outlive it.
    code = f"print(sandbox.check({fork!r}, ['assert f() == \\'refused\\'']))"
    assert as_other_user(code, refuse=f"{UNSHARE}, {LANDLOCK}, seccomp", user=None) == "['passed']\n"
    # What Docker refuses to root by default.
    said = as_other_user(ASK, refuse=f"{UNSHARE}, keyctl 250 219, mount 165 40, setns 308 268", user=None)
    assert said == "plain, " + ", ".join(FULL) + "\n"
    said = as_other_user(ASK, refuse="seccomp", user=None)
    assert said == "root, limits, privileges, processes, network, files\n"


def test_a_run_starts_only_where_programs_can_be_kept_from_their_verdicts(monkeypatch):
    import config
    import rewards

    def start(name, *flags):
        cfg = config.load([str(ROOT / "configs" / name), *flags])
        rewards.check_sandbox(rewards.resolve(cfg.rewards), cfg.sandbox)

    monkeypatch.setattr(apart, "choose", lambda: ("plain", ("limits",)))
    with pytest.raises(SandboxError, match="sandbox='trust' runs them anyway"):
        start("code.py", "--sandbox=auto")
    start("code.py", "--sandbox=trust")
    start("countdown.py", "--sandbox=auto")  # nothing is run there
    monkeypatch.setattr(apart, "choose", lambda: ("plain", ("verdicts", "limits")))
    start("code.py", "--sandbox=auto")


# -------------------------------------------------------------------------------------- the file system
@needs_root
@pytest.mark.parametrize("refuse", ["", "mount_setattr 442 442"], ids=["at once", "mount by mount"])
def test_what_is_mounted_below_the_systems_folders_is_read_only_too(refuse):
    """A bind mount that is made read-only leaves the mounts below it as they were."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare, to mount something here alone")
    code = program(
        """
        place = '/usr/local/games'
        import ctypes, subprocess
        c = ctypes.CDLL(None)
        assert c.unshare(0x20000) == 0 and c.mount(None, b'/', None, 16384 | 1 << 18, None) == 0
        os.makedirs(place, exist_ok=True)
        subprocess.run(['mount', '-t', 'tmpfs', '-o', 'mode=1777', 'none', place], check=True)
        for mode in 'root', 'user':
            isolation.choose = lambda: (mode, ())
            source = 'def f(): open("/usr/local/games/x", "w")'
            print(sandbox.check(source, ['f()']))
        """
    )
    said = as_other_user(code, refuse=refuse, user=None)
    assert said.count("Read-only file system") == 2, said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copy", "venv"])
def test_python_in_a_closed_home_folder_or_a_venv_works(kind):
    """In each mode: where another user can't run it, the system's takes its place, and is named."""
    if os.geteuid() != 0 or not os.path.exists(SYSTEM_PYTHON):
        pytest.skip("needs root, to make a home folder of somebody's, and the system's Python")
    code = "from tasks import isolation, sandbox; import sys; "
    code += f"isolation.choose = lambda: (sys.argv[1], ()); print(sandbox.check({GOOD!r}, [{TEST!r}]))"
    code += "; print(isolation.python_of(sys.argv[1]), sys.prefix, sys.base_prefix)"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as top:
        os.chmod(top, 0o755)
        home = Path(top, "home")
        home.mkdir()
        python = home / "python/bin/python3"
        if kind == "copy":
            version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
            ignored = shutil.ignore_patterns("site-packages", "test", "__pycache__", "*.a", "config-*")
            shutil.copytree(f"{sys.base_prefix}/lib", home / "python/lib", symlinks=True, ignore=ignored)
            python.parent.mkdir()
            shutil.copy(os.path.realpath(apart.PYTHON), python)
            assert (home / "python/lib" / version).is_dir()
        else:
            subprocess.run([SYSTEM_PYTHON, "-m", "venv", "--without-pip", home / "python"], check=True)
        shutil.copytree(ROOT / "tasks", home / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
        for path in [home, *home.rglob("*")]:
            os.chown(path, 61234, 61234, follow_symlinks=False)
        home.chmod(0o700)
        for mode in MODES:
            command = [python, "-c", code, mode]
            if mode != "root":
                command = ["setpriv", "--reuid=61234", "--regid=61234", "--clear-groups", *command]
            out = subprocess.run(command, capture_output=True, text=True, cwd=home, env=dict(PATH="/usr/bin"))
            assert out.stdout.startswith("['passed']\n"), (mode, out.stdout, out.stderr)
        command = [python, "-c", code, "plain"]  # as root, programs as another user
        out = subprocess.run(command, capture_output=True, text=True, cwd=home, env=dict(PATH="/usr/bin"))
        assert out.stdout.startswith("['passed']\n" + os.path.realpath(SYSTEM_PYTHON)[:16]), out


def test_programs_may_run_with_another_version_of_python(monkeypatch, use):
    """As those of a trainer whose Python another user can't run: its own compiled code is no use there."""
    version = (
        f"import sys; assert sys.version_info[:2] not in ({sys.version_info[:2]},) and sys.flags.safe_path"
    )
    found = [SYSTEM_PYTHON, *map(str, Path(sys.base_prefix).parent.glob("*/bin/python3"))]
    others = [
        p for p in found if subprocess.run([p, "-P", "-c", version], capture_output=True).returncode == 0
    ]
    if not others:
        pytest.skip("only one version of Python from 3.11 on is here")
    use("landlock", "seccomp")  # a launcher that starts here
    monkeypatch.setattr(apart, "choose", lambda: ("user", ()))
    monkeypatch.setattr(apart, "PYTHON", os.path.realpath(others[0]))
    seen = "import sys\ndef f(): return list(sys.version_info[:2])"
    got = check(seen, [f"assert f() != {list(sys.version_info[:2])}", "assert len(f()) == 2"])
    assert got == ["passed"] * 2


def test_a_mode_that_cannot_start_is_not_chosen(monkeypatch):
    """choose() runs a program and its test, so that it notices whatever else is missing there."""
    monkeypatch.setattr(apart, "LAUNCHERS", {})
    started = apart.started

    def failing(*args, mode, **options):
        if mode in ("root", "user"):
            raise SandboxError(f"no {mode} today")
        return started(*args, mode=mode, **options)

    monkeypatch.setattr(apart, "started", failing)
    assert apart.choose.__wrapped__()[0] == "plain"
    close_launchers(apart.USE)
    monkeypatch.setattr(apart, "TRIAL", "import json, math, no_such_module\ndef add(a, b): return a + b")
    with pytest.raises(SandboxError, match="no program can be run apart.*does not pass in mode plain"):
        apart.choose.__wrapped__()
    close_launchers(apart.USE)


# ------------------------------------------------------------------------------------------ what is left
HOSTILE = [
    "import os\nfor i in range(2000):\n    try: open(f'f{i}', 'w').write('x')\n    except OSError: break",
    "import os\ntry:\n    for i in range(3000): os.mkdir('d'); os.chdir('d')\nexcept OSError: pass",
    "import os\nos.mkdir('closed', 0)\nos.mkdir('open')\nopen('open/f', 'w')\nos.chmod('open', 0)",
    "import os\nos.symlink('/etc', 'etc')\nos.mkfifo('fifo')\nos.link('fifo', 'link')",
    SURVIVOR,
    "import os, sys\nos.close(0); os.close(1); os.close(2)\nwhile True: pass",
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "x = [0]\nwhile True: x += x",
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "import ctypes\nctypes.string_at(0)",
]


def machine_state():
    """What programs might leave on this machine."""
    memory = Path("/proc/sysvipc/shm").read_text()
    keys = Path("/proc/keys")
    listed = keys.read_text() if keys.exists() else ""
    named = sorted(re.findall(r"user +(left-\S+)", listed))
    mounts = Path("/proc/self/mountinfo").read_text()
    here = sorted(name for name in os.listdir(tempfile.gettempdir()) if name.startswith("sandbox-"))
    own = [name for name in here if name.startswith(f"sandbox-{os.getpid()}-")]
    return memory, named, mounts, own, sorted(os.listdir("/dev/shm"))


@pytest.mark.slow
def test_nothing_is_left_of_two_hundred_hostile_programs(mode):
    numbers = dict(x86_64=(248, 250), aarch64=(217, 219)).get(os.uname().machine, (-1, -1))
    keys = KEYS.format(numbers=numbers, name="none", rings=[-3, -5]).strip("\n")
    shared = "import ctypes\nctypes.CDLL(None).shmget(1234, 4096, 0o1666)"
    before = machine_state()
    jobs = [(source, [TEST]) for source in [*HOSTILE, keys, shared] * 17][:200]
    verdicts = check_all(jobs, workers=8, seconds=0.3)
    assert len(verdicts) == 200 and not any(verdict == ["passed"] for verdict in verdicts)
    assert machine_state() == before
    assert processes() == [] and scratch_folders() == []
    assert check(GOOD, [TEST]) == ["passed"]
