"""Runs Python that a model wrote, with its tests, without trusting it.

    check(source, ["assert add(1, 2) == 3", {"input": "1 2\\n", "output": "3\\n"}])   -> ["passed", "passed"]
    check_all([(source, tests), ..])                        the same for many, several at once
    run("print(6 * 7)")                                     -> ("42\\n", "")
    isolation()                                             what holds on this machine, found out by trying

A naive harness runs program and tests in one interpreter, where the program can print the success mark,
leave with exit(0), replace `assert`'s operands by objects that equal everything, or read the expected
values off the stack. Here three parties never share a process:

    program   the model's code, in a sandbox of its own. It is asked "what is add(1, 2)?" and answers with
              plain data in JSON: Python's own types, Decimal, Fraction, dates, or the number of an object.
    judge     the data set's tests, in another sandbox. Names that the tests neither define nor import are
              stubs that ask the program; `== 3` is evaluated here, on plain data, and 3 is never sent.
              Without the judge the data set's code would run in this process.
    this one  reads the judge's verdicts from a pipe that the program has not got, and for tests of stdin and
              stdout compares the text itself.

So the program can only be right by giving right answers, to inputs it sees and expected values it does not.

Objects of the program (stubs) may be called, and their attributes read. Their truth, equality with a value,
order beside a value, and what they contain is plain data decoded in the judge, or the test fails and says so.
Two of them are equal if they are of one class and made of equal fields, told before the later was asked for.
An exception is the program's failure, which only an `except` with its class, or a base of it, makes anything
else; StopIteration is one in `next` alone. After a program's end no test passes.

What remains forgeable: answers known by heart, from the prompt or from a test that ran before. A test without
an expected value: `assert f(x)` takes any true plain answer, `assert f(x).ok` and `len`, `isinstance`, `<` of
two objects what the program says, a `try` the exception that is always raised, `except:` any. A test that
tells the program what it wants: `f(x).equals(3)`, `f(x) == CONSTANT` of the program's own, or two of its
functions compared with each other.

What is lost, and fails a right program: an object's own __eq__ is not asked, nor its __bool__ and
__contains__ (it is iterated over, to its end); `f(x) == p` where p is an object made before f(x) was asked;
an object that does not keep the values it was made from; arithmetic of an object and a value that gives no
object; `class Any` whose every attribute exists. Arguments, and lists in the program's objects, are copies:
what a function changes in its argument comes back if it returns None, and `obj.items.append(1)` does nothing.
Objects of the tests' own classes cannot be handed over, functions can. A program's `__exit__` suppresses what
a test raises by `raise` alone. What it prints is not seen, coroutines are not run, and only the standard
library is there.

Linux only. Needs the standard library, tasks/isolation.py and what that needs, and tasks/judging.py.
Tests: python -m pytest tests/test_sandbox.py tests/test_verdicts.py, speed: python bench/sandbox.py
"""

import ast
import builtins
import concurrent.futures
import contextlib
import functools
import json
import os
import subprocess
import symtable
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

# Modules that tests use under these names, and may forget to import.
ALIASES = dict(np="numpy", pd="pandas", plt="matplotlib", nx="networkx", sp="scipy", tf="tensorflow")
ALIASES |= {name: name for name in "numpy pandas scipy sympy torch pytest networkx sklearn".split()}

__all__ = ["FULL", "SandboxError", "check", "check_all", "demand", "isolation", "run", "way"]


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
    statements = [test.removeprefix("\ufeff") for test in tests if isinstance(test, str)]
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
    said, why = run(source, stdin, seconds=seconds, memory_mb=memory_mb)
    if why:
        return why
    same = lines_of(said) == lines_of(output)  # the whole of it: a prefix is not enough
    return "passed" if same else "wrong output"


def run(source: str, stdin: str = "", *, seconds: float = 4.0, memory_mb: int = 512) -> tuple[str, str]:
    """What a program writes to stdout, and why it did not end well: "too slow" and the like, or "".

    Raises SandboxError where the sandbox fails.
    """
    deadline = time.monotonic() + PATIENCE * seconds
    job = dict(role="script", source=source)
    limits = dict(seconds=seconds, memory_mb=memory_mb)
    with started(job, stdin=stdin.encode(), stdout=subprocess.PIPE, **limits) as process:
        said, why = drained(process, deadline)
        if not why:  # a program may close its stdout and go on
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.01, deadline - time.monotonic()))
        status = process.poll()
    if not why and status is None:
        why = "too slow"
    if not why and status != 0:
        why = f"ended with status {status}"
    return said.decode(errors="replace"), why


def lines_of(text: str) -> list[str]:
    """Lines of a text; white space at their ends, and empty lines at its end, do not count."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


@functools.lru_cache(1000)
def foreign(tests: tuple, names: tuple) -> tuple[list, dict]:
    """What tests use that they do not define: names that the program has to provide, and modules.

    modules: name -> module, of what is used with a dot and never imported: `math.isclose`, `np.allclose`. A
    program that has a class of that name is not asked. Nor is it for a name that a test imports anywhere, or
    that this test or one before it assigns: if that fails, the name is missing.
    """
    asked = set()
    bound = set()
    imported = set()
    owners = set()  # names before a dot
    for test in tests:
        table = symtable.symtable(test, "test", "exec")
        used = set(globals_used(table))
        imports = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_imported()}
        bound |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}
        asked |= used - bound
        for node in ast.walk(ast.parse(test)):
            if isinstance(node, ast.ImportFrom) and node.module == "solution":  # which is the program
                imports -= {alias.asname or alias.name for alias in node.names}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owners.add(node.value.id)
        imported |= imports
    modules = {name: name for name in owners & sys.stdlib_module_names} | {
        name: ALIASES[name] for name in owners & ALIASES.keys()
    }
    for name in [*names, *bound, *imported]:
        modules.pop(name, None)
    asked = {name for name in asked if name in names or not hasattr(builtins, name)}
    return sorted(asked - imported - modules.keys()), modules


def globals_used(table):
    """The names that a test reads, in itself or in a function of its own, and that no function defines."""
    for symbol in table.get_symbols():
        is_top = table.get_type() == "module"
        if symbol.is_referenced() and (is_top or symbol.is_global()):
            yield symbol.get_name()
    for child in table.get_children():
        yield from globals_used(child)


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
