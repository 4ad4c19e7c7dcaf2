"""The processes in which tasks/math.py has answers compared by math-verify.

    python -I tasks/equals.py '[["/path/of/modules", ..], [3, 4]]'      # sockets; tasks/math.py starts it

It imports math-verify once and forks: a watcher for each socket, and under it a child that answers. The
kernel ends a child that has used up its CPU time, whatever it is computing; the watcher says so and forks the
next, without another import. When the other end of a socket is closed, its processes end.

A question is a line of JSON, [right, said, seconds]. An answer is two: whether `right` can be read, and 1.0
or 0.0, or one word for what became of the child. Numbers of more than LARGEST bits are not computed: sympy
would start with 9^{9^{9^9}} as soon as it parses it.

Tests: python -m pytest tests/test_tasks.py
"""

import functools
import json
import logging
import os
import resource
import signal
import sys

LARGEST = 40_000  # bits of a number: about 12,000 decimal digits
GOLD_SECONDS = 5.0  # CPU time to read the row's own answer, which no completion can make longer
MEMORY = 2**30  # bytes of address space of a process
# Ends that come from outside. By any other signal a child ends because of what it computed: its time is up,
# its stack too deep, or GMP, where sympy has it, aborts over a number.
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class TooLarge(Exception):
    """A number is not computed because of its size."""


def is_large_power(base, exponent=1, *_) -> bool:
    if not exponent.is_Rational or base.is_Symbol:
        return False
    bits = 1
    if base.is_Rational:
        bits = max(abs(base.p), base.q).bit_length()
    elif base.is_Add:
        bits = 100  # it may be multiplied out: as many terms as the exponent, and then their sizes
    return abs(exponent.p) * bits > LARGEST


def is_large_factorial(*numbers) -> bool:
    """Numbers n, or n and k: n * (n - 1) * .. over at most n factors, or k of them."""
    if not all(number.is_Integer for number in numbers):
        return False
    largest, factors = max(abs(number.p) for number in numbers), min(abs(number.p) for number in numbers)
    return largest.bit_length() * factors > LARGEST


def guard(owner, name: str, is_large):
    """Has a method of a sympy class raise TooLarge before it computes a number that is."""
    import sympy

    before = getattr(owner, name)

    def guarded(cls, *args, **options):
        if is_large(*map(sympy.sympify, args)):
            raise TooLarge
        return before(cls, *args, **options) if name == "__new__" else before(*args, **options)

    setattr(owner, name, guarded if name == "__new__" else classmethod(guarded))


def guard_all():
    from sympy.core.power import Pow
    from sympy.functions.combinatorial import factorials

    guard(Pow, "__new__", is_large_power)
    for name in (
        "factorial",
        "factorial2",
        "subfactorial",
        "binomial",
        "RisingFactorial",
        "FallingFactorial",
    ):
        guard(getattr(factorials, name), "eval", is_large_factorial)


def parse(text: str) -> list:
    import math_verify

    return math_verify.parse(f"${text}$", parsing_timeout=None, fallback_mode="no_fallback")


known = functools.lru_cache(10_000)(parse)  # a group's completions share their row's answer


def answer(right: str, said: str):
    """Yields the two parts of an answer."""
    import math_verify

    gold = known(right)
    yield bool(gold)
    try:
        yield float(bool(gold) and math_verify.verify(gold, parse(said), timeout_seconds=None))
    except (Exception, RecursionError, MemoryError):  # what a parser says to such a formula can be anything
        yield 0.0


def serve(questions, answers):
    """Answers every question, each with CPU time of its own; the kernel ends this process where it is up."""
    for line in questions:
        right, said, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, GOLD_SECONDS)
        for part in answer(right, said):
            print(json.dumps(part), file=answers, flush=True)
            signal.setitimer(signal.ITIMER_PROF, seconds)  # that of the answer begins when `right` is read
        signal.setitimer(signal.ITIMER_PROF, 0)


def watch(connection: int):
    """Keeps a child that serves a socket, until its other end is closed."""
    os.write(connection, b"true\n")
    while True:
        child = os.fork()
        if child == 0:
            with open(connection, closefd=False) as questions:
                with open(connection, "w", closefd=False) as answers:
                    serve(questions, answers)
            return
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            return
        became = "lost" if os.WTERMSIG(status) in FROM_OUTSIDE else "hung"
        os.write(connection, json.dumps(became).encode() + b"\n")


def main(setup: str):
    sys.path[:], connections = json.loads(setup)
    import math_verify  # noqa: F401  once, before the forks

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(5000)
    guard_all()
    list(answer(r"x + \frac{1}{2}", r"\sqrt{2}"))  # what is compiled and cached then, every child inherits
    for connection in connections:
        if os.fork() == 0:
            watch(connection)
            return
    for connection in connections:
        os.close(connection)  # else the trainer would not see that a watcher has ended
        os.wait()


if __name__ == "__main__":
    main(sys.argv[1])
