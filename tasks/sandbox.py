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

Linux only. Needs the standard library, tasks/isolation.py and what that needs.
Tests: python -m pytest tests/test_sandbox.py, speed: python bench/sandbox.py
"""

import ast
import builtins
import concurrent.futures
import contextlib
import functools
import json
import os
import subprocess
import sys
import time

from tasks.isolation import (
    FULL,
    PATIENCE,
    SandboxError,
    conversation,
    demand,
    drained,
    isolation,
    started,
    way,
)

__all__ = ["FULL", "SandboxError", "check", "check_all", "demand", "isolation", "way"]


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
    program = dict(role="program", source=source)
    judge = dict(role="judge", tests=tests, names=asked, modules=modules)
    said, why = conversation(program, judge, seconds=seconds, memory_mb=memory_mb)
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
