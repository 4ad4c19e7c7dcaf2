"""What runs inside a sandbox: one of three roles, program, judge or script.

Nobody imports this file: tasks/launcher.py reads it as text and runs it in a fork that has shut itself in, so
that nothing of it can run in the process of the trainer. Its job is an open file, whose number is its first
argument; the numbers of the pipes between program and judge follow.
"""

import builtins
import json
import operator
import os
import sys

with open(int(sys.argv[1]), "rb") as f:
    job = json.loads(f.read())
job["fds"] = [int(fd) for fd in sys.argv[2:]]
sys.argv = ["solution.py"]
sys.set_int_max_str_digits(0)
builtins.exit = builtins.quit = sys.exit  # which Python's `site` would have made

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
