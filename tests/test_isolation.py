"""What shuts a program in, each part with the attack that it is there for, in each mode that this machine has."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sandboxes import GOOD, MODES, TEST, launched, needs, probe, processes, program, scratch_folders
from tasks import isolation as apart
from tasks import seccomp
from tasks.sandbox import FULL, SandboxError, check, check_all, isolation

ROOT = Path(__file__).resolve().parent.parent
SYSTEM_PYTHON = "/usr/bin/python3"
pytest_plugins = ["sandboxes"]  # the fixtures
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


def test_memory_is_not_had_beside_its_limit(mode):
    """A file in memory, System V shared memory, other processes: a program held 2.2 GB at a limit of 512 MB."""
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
call = lambda n, *a: libc.syscall(ctypes.c_long(n), *[ctypes.c_long(x) if isinstance(x, int) else x for x in a])
add, ctl = {numbers!r}
r = call(ctl, 10, -3, b'user', b'{name}', 0) > 0  # KEYCTL_SEARCH in the session key ring
if r: call(ctl, 9, call(ctl, 10, -3, b'user', b'{name}', 0), -3)  # KEYCTL_UNLINK
for ring in (-3, -5):  # the session's and the user session's
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
    body = KEYS.format(numbers=numbers, name=name).strip("\n")
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
