"""How a process shuts itself in: namespaces, a file system, no privileges, limits, Landlock, a filter.

    fork_into_namespace()       a fork that is process 1 of its own
    enter_namespaces(settings)  its own mounts, network, IPC and host name, and a file system of nothing but
                                the system's folders (read-only), /dev/null and a scratch folder
    shut_in(settings, ..)       and from then on it can do no harm

By system calls through ctypes, in the process itself: a chain of unshare, mount, chroot and setpriv does the
same in five programs' time. Everything fails with OSError, and nothing that fails is gone without.

Linux only. Needs the standard library and tasks/seccomp.py. Tests: python -m pytest tests/test_isolation.py
"""

import contextlib
import ctypes
import errno
import os
import resource
import signal
import stat
import struct
import sys
from pathlib import Path

import seccomp

libc = ctypes.CDLL(None, use_errno=True)
MACHINE = os.uname().machine
# Numbers of system calls that the C library has no function for, on x86_64 and aarch64.
PIVOT_ROOT = dict(x86_64=155, aarch64=41).get(MACHINE, -1)
KEYCTL = dict(x86_64=250, aarch64=219).get(MACHINE, -1)
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446

# Namespaces, as unshare's flags: process ids, users; mounts, host name, IPC, network.
PROCESSES, USERS = 0x20000000, 0x10000000
OTHERS = 0x00020000 | 0x04000000 | 0x08000000 | 0x40000000
RDONLY, NOSUID, NODEV, REMOUNT, BIND, MOVE, REC, PRIVATE = 1, 2, 4, 32, 4096, 8192, 16384, 1 << 18
# of statvfs and mount(2): what a bind mount keeps when it is made read-only (nosuid, nodev, noexec, no*atime)
KEPT = 2 | 4 | 8 | 1024 | 2048
KEPT_RELATIVE = 1 << 21  # MS_RELATIME, 4096 in statvfs
DETACH, AT_RECURSIVE, AT_FDCWD = 2, 0x8000, -100
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
JOIN_SESSION_KEYRING = 1
CAPABILITIES = 64  # numbers to try; a kernel has 41
INSIDE_USER = 60001  # who a program is in a user namespace
HIGHEST_FD = 1024  # none of the launcher's is as high
FDS = 4  # descriptors of every job: its channel, its file, stdin and stdout


def checked(what: str, result: int) -> int:
    """A C function's result, or OSError with its errno."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int = 0):
    checked(f"prctl {option}", libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def syscall(what: str, number: int, *arguments) -> int:
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return checked(what, libc.syscall(ctypes.c_long(number), *passed))


def close_all_but(*kept: int):
    start = 0
    for fd in [*sorted(kept), HIGHEST_FD]:
        if fd > start:
            os.closerange(start, fd)
        start = fd + 1


# ----------------------------------------------------------------------------------------- the namespaces
def system_folders() -> list[str]:
    """What a program needs to run: /usr and, where they are not inside it, the libraries and Python."""
    folders = ["/usr"]
    for folder in ("/bin", "/lib", "/lib64", "/lib32", "/nix", os.path.realpath(sys.base_prefix)):
        inside = any(f"{folder}/".startswith(f"{other}/") for other in folders)
        if os.path.isdir(folder) and not inside:
            folders.append(folder)
    return folders


def enter_process_namespace():
    """The next fork is process 1 of a new namespace, with which all processes of it end."""
    checked("unshare", libc.unshare(PROCESSES))


def fork_into_namespace() -> int:
    """os.fork(), with the child as process 1 of a new process namespace; this process stays in its own."""
    own = os.open("/proc/self/ns/pid", os.O_RDONLY)
    child = None
    try:
        enter_process_namespace()
        child = os.fork()
    finally:
        if child != 0 and libc.setns(own, PROCESSES):
            os._exit(1)  # and so ends what it has just forked
        os.close(own)
    return child


def enter_user_namespace():
    """A user namespace, in which this user has all privileges over what is in it, and nothing outside."""
    user, group = os.geteuid(), os.getegid()
    checked("unshare", libc.unshare(USERS))
    prctl(PR_SET_DUMPABLE, 1)  # or its files in /proc are not its own
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{INSIDE_USER} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{INSIDE_USER} {group} 1")
    prctl(PR_SET_DUMPABLE, 0)


def enter_namespaces(settings: dict):
    """Own mounts, network, IPC and host name, and the sandbox's file system."""
    if settings["mode"] == "user":
        enter_user_namespace()  # one for each program: the kernel counts processes by it
    checked("unshare", libc.unshare(OTHERS))
    make_file_system(settings)


def mount(source, target: str, kind=None, flags: int = 0, options: str | None = None):
    texts = [text.encode() if text else None for text in (source, target, kind)]
    passed = options.encode() if options else None
    checked(f"mount {target}", libc.mount(*texts, ctypes.c_ulong(flags), passed))


def make_file_system(settings: dict):
    """The system's folders read-only, /dev/null and /tmp, on a file system of their own, and nothing else."""
    mount(None, "/", None, REC | PRIVATE)
    with contextlib.suppress(OSError):  # System V shared memory would be memory beside the limit
        Path("/proc/sys/kernel/shmall").write_text("0")
    mount("none", settings["folder"], "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    os.chdir(settings["folder"])
    os.mkdir("inside")
    os.chdir("inside")
    os.mkdir("dev")
    os.close(os.open("dev/null", os.O_CREAT | os.O_WRONLY))
    mount("/dev/null", "dev/null", None, BIND)
    os.mkdir("tmp")
    room = f"size={settings['file_mb']}m,nr_inodes={settings['files']},mode=1777"
    mount("none", "tmp", "tmpfs", NOSUID | NODEV, room)
    for folder in settings["folders"]:
        here = "." + folder
        if os.path.islink(folder):  # where /lib is a link to usr/lib, a link it stays
            os.symlink(os.readlink(folder), here)
        else:
            os.makedirs(here, exist_ok=True)
            mount(folder, here, None, BIND | REC)
            make_read_only(os.path.realpath(here))
    os.chdir("..")
    mount(None, ".", None, REMOUNT | RDONLY | NOSUID | NODEV, "size=1m,mode=755")
    change_root("inside")


def make_read_only(folder: str):
    """Makes a bind mount read-only, and each mount below it, which a remount of the one would leave out."""
    with contextlib.suppress(OSError):
        attributes = struct.pack("QQQQ", RDONLY | NOSUID | NODEV, 0, 0, 0)
        path = folder.encode()
        syscall("mount_setattr", MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, attributes, len(attributes))
        return
    for line in Path("/proc/self/mountinfo").read_text().splitlines():  # kernels before 5.12
        place = line.split()[4].encode().decode("unicode_escape")
        if f"{place}/".startswith(f"{folder}/"):
            has = os.statvfs(place).f_flag
            flags = has & KEPT | (KEPT_RELATIVE if has & 4096 else 0)
            mount(None, place, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV | flags)


def change_root(folder: str):
    """The current folder's mount takes the place of the root, which is gone, and `folder` in it becomes root.

    A process whose root is not its namespace's may make no user namespace, in which it had privileges again.
    """
    try:
        syscall("pivot_root", PIVOT_ROOT, b".", b".")  # the old root lies on the new one now
        checked("umount", libc.umount2(b".", DETACH))
    except OSError:  # the root of an initial ramdisk can't be moved away
        mount(".", "/", None, MOVE)
        os.chroot(".")
    os.chdir("/")
    os.chroot(folder)
    os.chdir("/")


# ------------------------------------------------------------------------------------------- the program
def shut_in(settings: dict, job: dict, channel, fds: list[int]):
    """Limits, another user, no privileges, no keys, no descriptors but its own, the filter: for good."""
    plain = settings["mode"] == "plain"
    _, file, stdin, stdout, *others = fds
    null = os.open("/dev/null", os.O_RDWR)
    for fd, number in ((stdin, 0), (stdout, 1), (null, 2)):
        os.dup2(fd, number)
    close_all_but(0, 1, 2, channel.fileno(), file, *others)
    os.setsid()
    os.umask(0o022)
    if not plain:
        os.chdir("/tmp")
    os.environ.clear()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)  # as in a Python that has just started
    limits = job["limits"]
    if plain and not (settings["filter"] and os.geteuid() == 0):
        # What it starts would outlive it. And of an ordinary user all processes count.
        limits = limits | dict(NPROC=1)
    for name, value in limits.items():
        kind = getattr(resource, "RLIMIT_" + name)
        already = resource.getrlimit(kind)[1]
        if already != resource.RLIM_INFINITY:
            value = min(value, already)
        resource.setrlimit(kind, (value, value))
    drop_privileges(job["user"])
    new_keyring()
    if settings["landlock"]:
        restrict_files(settings["landlock"], settings["folders"], ".")
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # with the launcher
    if plain and os.getppid() != settings["launcher"]:
        raise ProcessLookupError("the launcher has ended")
    if settings["filter"]:
        seccomp.install(plain)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = open(number, mode, errors="surrogateescape", closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["inside.py", str(file), *map(str, others)]
    channel.send(b"ready")
    channel.close()


def drop_privileges(user: int):
    """Another user where this one is root, and no privilege over anything, now or by starting a program."""
    for number in range(CAPABILITIES):
        libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0)  # refused where there are none to drop
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)  # _LINUX_CAPABILITY_VERSION_3, this process
    checked("capset", libc.capset(header, none))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)


def new_keyring():
    """A session key ring of its own: the trainer's keys are in the one that it would inherit."""
    try:
        syscall("keyctl", KEYCTL, JOIN_SESSION_KEYRING, None)
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.EPERM):  # no keys in this kernel, or none for anybody here
            raise


# ----------------------------------------------------------------------------------------------- Landlock
# Where there are no namespaces the kernel may still keep a process to some folders: landlock(7).
READ = 1 | 4 | 8  # execute, read a file, read a folder
WRITE = 2 | 0b1111111110000  # write a file, remove and make things
BY_VERSION = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}  # move between folders, truncate, ioctl of devices


def landlock_version() -> int:
    """Of the kernel's Landlock, 0 where it has none."""
    try:
        return syscall("landlock", LANDLOCK_CREATE, None, 0, 1)
    except OSError:
        return 0


def restrict_files(version: int, folders: list[str], scratch: str):
    """The system's folders can be read and the scratch folder written; no other file can be opened, no TCP
    port bound or reached, and no process outside be signalled or traced (each as far as `version` goes)."""
    handled = READ | WRITE
    for since, right in BY_VERSION.items():
        if version >= since:
            handled |= right
    # What older kernels do not know of is left out of the structure's end.
    words = 1 if version < 4 else 2 if version < 6 else 3
    attributes = struct.pack("QQQ", handled, 3, 3)[: 8 * words]
    rules = syscall("landlock", LANDLOCK_CREATE, attributes, len(attributes), 0)
    allowed = [(folder, READ) for folder in folders] + [(scratch, handled), ("/dev/null", 2 | 4)]
    for path, rights in allowed:
        fd = os.open(path, os.O_PATH)
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= ~8
        syscall("landlock rule", LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights & handled, fd), 0)
        os.close(fd)
    syscall("landlock", LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)
