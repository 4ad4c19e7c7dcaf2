"""The system calls that a sandboxed program may not make: a seccomp filter, which the kernel runs at each.

    install(shut_out=False)     from now on this process and what it starts are refused what stands in DENIED

The table is of what is denied, by the number of each call on x86_64 and on aarch64; every call that is newer
than the table is denied as well, except for NEWER, so that the filter does not age. A refused call fails with
EPERM, a newer one with ENOSYS as on the kernels before it, and a call by way of another architecture's
numbers (32 bits, x32), to which the table does not apply, ends the process.

Sockets are of the family AF_UNIX, and threads are all that a program starts: so its memory is that of one
process, which RLIMIT_AS limits, and nothing of it outlives the one process that is killed.

Linux only, standard library only. Nothing here has an effect before install().
Tests: python -m pytest tests/test_isolation.py
"""

import ctypes
import errno
import os
import struct

# Lines of: name, its number on x86_64, on aarch64 (- where it has none).
DENIED = """
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281
setns 308 268, unshare 272 97, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51
memfd_create 319 279, shmget 29 194, shmat 30 196, shmctl 31 195, io_setup 206 0, vmsplice 278 75
msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187
semget 64 190, semop 65 193, semtimedop 220 192, semctl 66 191
mq_open 240 180, mq_unlink 241 181, mq_timedsend 242 182, mq_timedreceive 243 183, mq_notify 244 184
mq_getsetattr 245 185
add_key 248 217, request_key 249 218, keyctl 250 219
bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, personality 135 92
init_module 175 105, finit_module 313 273, delete_module 176 106, kexec_load 246 104
kexec_file_load 320 294, reboot 169 142, swapon 167 224, swapoff 168 225, acct 163 89, syslog 103 116
quotactl 179 60, lookup_dcookie 212 18, nfsservctl 180 42, vhangup 153 58
iopl 172 -, ioperm 173 -, modify_ldt 154 -, uselib 134 -, _sysctl 156 -
settimeofday 164 170, clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266
sethostname 170 161, setdomainname 171 162
name_to_handle_at 303 264, open_by_handle_at 304 265, fanotify_init 300 262, fanotify_mark 301 263
mbind 237 235, set_mempolicy 238 237, migrate_pages 256 238, move_pages 279 239
"""
# Where no namespace keeps other processes and files apart, also what would reach them: sockets with a path,
# signals, and what changes a file that can't be opened.
DENIED_SHUT_OUT = """
socket 41 198, tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240
sched_setaffinity 203 122, sched_setparam 142 118, sched_setscheduler 144 119, sched_setattr 314 274
setpriority 141 140, ioprio_set 251 30
chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54
utime 132 -, utimes 235 -, utimensat 280 88, futimesat 261 -, truncate 76 45
setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15
fremovexattr 199 16
"""
CONDITIONAL = """
clone 56 220, socket 41 198, socketpair 53 199, prctl 157 167
kill 62 129, tgkill 234 131, prlimit64 302 261, fcntl 72 25, ioctl 16 29
"""
# From 424 on a call has the same number everywhere. These do what older ones do, or less.
FIRST_NEWER = 424
NEWER = dict(close_range=436, openat2=437, faccessat2=439, epoll_pwait2=441, futex_waitv=449)

ARCHITECTURES = dict(x86_64=0xC000003E, aarch64=0xC00000B7)  # AUDIT_ARCH_.. of linux/audit.h
X32 = 0x40000000  # the bit of a call by the x32 table, on x86_64
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000  # SECCOMP_RET_..
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF instructions
# Offsets in struct seccomp_data; of arguments the low half, since these are ints.
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, SECOND_ARGUMENT = 0, 4, 16, 24
CLONE_THREAD, AF_UNIX = 0x10000, 1
# F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP: who gets which signal when a file can be read
OWNERS_BY_FCNTL, OWNERS_BY_IOCTL = (8, 10, 15), (0x8901, 0x8902)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_MM = 1, 4, 35
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2


def numbers(table: str, machine: str) -> dict[str, int]:
    """name -> number of a table's calls, for "x86_64" or "aarch64"."""
    column = list(ARCHITECTURES).index(machine) + 1
    found = {}
    for entry in table.replace("\n", ",").split(","):
        words = entry.split()
        if words and words[column] != "-":
            found[words[0]] = int(words[column])
    return found


def program(machine: str, shut_out: bool, pid: int) -> list[tuple]:
    """The filter as BPF instructions (code, jump if true, jump if false, operand).

    pid: the process that it is for, the only one whom it may signal and limit where it is `shut_out`.
    """
    refused = (RETURN, 0, 0, ERRNO | errno.EPERM)
    unknown = (RETURN, 0, 0, ERRNO | errno.ENOSYS)
    allowed = (RETURN, 0, 0, ALLOW)
    number = numbers(CONDITIONAL, machine)
    lines = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, ARCHITECTURES[machine]), (RETURN, 0, 0, KILL)]
    lines.append((LOAD, 0, 0, NUMBER))
    if machine == "x86_64":
        lines += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    for newer in NEWER.values():
        lines += [(EQUAL, 0, 1, newer), allowed]
    lines += [(AT_LEAST, 0, 1, FIRST_NEWER), unknown]
    denied = numbers(DENIED, machine)
    if shut_out:
        denied |= numbers(DENIED_SHUT_OUT, machine)
    for n in denied.values():
        lines += [(EQUAL, 0, 1, n), refused]

    def decide(name: str, argument: int, values: tuple, found, else_):
        """What becomes of a call with one of these as its argument, and of it with another."""
        tests = [(EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        body = [(LOAD, 0, 0, argument), *tests, else_, found]
        lines.extend([(EQUAL, 0, len(body), number[name]), *body])

    lines += [(EQUAL, 0, 4, number["clone"]), (LOAD, 0, 0, FIRST_ARGUMENT)]
    lines += [(ANY_BIT, 1, 0, CLONE_THREAD), refused, allowed]
    options = (PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_MM)
    decide("prctl", FIRST_ARGUMENT, options, refused, allowed)
    decide("socketpair", FIRST_ARGUMENT, (AF_UNIX,), allowed, refused)
    decide("socket", FIRST_ARGUMENT, (AF_UNIX,), allowed, refused)
    if shut_out:
        decide("kill", FIRST_ARGUMENT, (pid,), allowed, refused)
        decide("tgkill", FIRST_ARGUMENT, (pid,), allowed, refused)
        decide("prlimit64", FIRST_ARGUMENT, (0, pid), allowed, refused)
        decide("fcntl", SECOND_ARGUMENT, OWNERS_BY_FCNTL, refused, allowed)
        decide("ioctl", SECOND_ARGUMENT, OWNERS_BY_IOCTL, refused, allowed)
    return [*lines, allowed]


class Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def install(shut_out: bool, lines: list[tuple] | None = None):
    """Puts the filter in force for this process, for good. lines: another program than this file's.

    Raises OSError where the kernel (or what filters this process already) has no seccomp for us.
    """
    if lines is None:
        machine = os.uname().machine
        if machine not in ARCHITECTURES:
            raise OSError(errno.ENOSYS, f"the numbers of system calls on {machine} are not known here")
        lines = program(machine, shut_out, os.getpid())
    packed = b"".join(struct.pack("HBBI", *line) for line in lines)
    libc = ctypes.CDLL(None, use_errno=True)
    passed = Program(len(lines), packed)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(passed), 0, 0):
        raise OSError(ctypes.get_errno(), "this process gets no seccomp filter")
