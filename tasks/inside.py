"""What runs inside a sandbox: one of three roles, program, judge or script.

Nobody imports this file: tasks/launcher.py reads it as text and runs it in a fork that has shut itself in, so
that nothing of it can run in the process of the trainer. Its job is an open file, whose number is its first
argument; the numbers of the pipes between program and judge follow.
"""

import ast  # noqa: F401 (for the judge, who may be a user that cannot read it later)
import builtins
import contextlib
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
LINE = 2**24  # bytes of a question or an answer
CALLS, DEPTH = 100_000, 40  # how often a program may call functions of the tests, and how deeply nested
ITEMS = 10_000  # of an iterator of which all have to be seen, and of one that a test hands over
LEAVES = 20_000  # values that are told, with one answer, of what the program's objects are made of


# ------------------------------------------------------------------------------------------- plain data
# Program and judge talk in JSON. A value of a type that JSON has not got is a list: its type's name, and what
# it is made of. `side`, the program or the judge, does the same for what is no plain data.
def pack_list(x):
    return [encode(v) for v in x]


def unpack_list(kind, value):
    return kind(map(decode, value))


def pack_dict(x):
    return [[encode(k), encode(v)] for k, v in dict.items(x)]


def unpack_dict(kind, value):
    return kind({decode(k): decode(v) for k, v in value})


def spread(kind, value):
    return kind(*value)


def parts_of(*names):
    return lambda x: [getattr(x, name) for name in names]


def iso(x):
    return x.isoformat()


def from_iso(kind, value):
    return kind.fromisoformat(value)


def from_hex(kind, value):
    return kind.fromhex(value)


LIST, DICT = (pack_list, unpack_list), (pack_dict, unpack_dict)
# name -> (module, type to JSON, JSON to type). Modules are not imported before a value of theirs is met: that
# would take longer than many a program.
PLAIN = {name: ("builtins", *LIST) for name in ("list", "tuple", "set", "frozenset")}
PLAIN |= {
    "dict": ("builtins", *DICT),
    "Counter": ("collections", *DICT),
    "OrderedDict": ("collections", *DICT),
    "deque": ("collections", *LIST),
    "bytes": ("builtins", bytes.hex, from_hex),
    "bytearray": ("builtins", bytearray.hex, from_hex),
    "complex": ("builtins", parts_of("real", "imag"), spread),
    "range": ("builtins", parts_of("start", "stop", "step"), spread),
    "slice": ("builtins", parts_of("start", "stop", "step"), spread),
    "Decimal": ("decimal", str, lambda kind, value: kind(value)),
    "Fraction": ("fractions", parts_of("numerator", "denominator"), spread),
    "date": ("datetime", iso, from_iso),
    "time": ("datetime", iso, from_iso),
    "datetime": ("datetime", iso, from_iso),
    "timedelta": ("datetime", parts_of("days", "seconds", "microseconds"), spread),
}


class TooLarge(Exception):
    """What an object is made of is more than can be told."""


def encode(x):
    side.spend()
    kind = type(x)
    if x is None or kind in (bool, int, float, str):
        return x
    name = kind.__name__
    if name == "defaultdict" and kind.__module__ == "collections":
        return ["dict", pack_dict(x)]
    if name in PLAIN:
        module, pack, _ = PLAIN[name]
        if getattr(sys.modules.get(module), name, None) is kind:
            return [name, pack(x)]
    return side.encode_object(x)


def decode(x):
    if not isinstance(x, list):
        return x
    name, *value = x
    if name not in PLAIN:
        return side.decode_object(name, *value)
    module, _, unpack = PLAIN[name]
    return unpack(getattr(__import__(module), name), *value)


def compiled(source, name):
    """Code of a source that may begin with the mark of its encoding."""
    return compile(source.removeprefix("\ufeff"), name, "exec", dont_inherit=True)


# ------------------------------------------------------------------------------------------ the program
def call(f, *args, **named):
    return f(*args, **named)


def enter(x):
    return type(x).__enter__(x)


def leave(x, error):
    return type(x).__exit__(x, error and type(error), error, error and error.__traceback__)


# What the judge may ask: a method's name -> the function that does it.
OPERATIONS = {"call": call, "enter": enter, "exit": leave, "and": operator.and_, "or": operator.or_}
for name in "getattr setattr delattr len iter next reversed isinstance issubclass divmod".split():
    OPERATIONS[name] = getattr(builtins, name)
for name in "str repr format int float complex round abs".split():
    OPERATIONS[name] = getattr(builtins, name)
for name in "getitem setitem delitem index lt le gt ge neg pos invert".split():
    OPERATIONS[name] = getattr(operator, name)
ARITHMETIC = "add sub mul truediv floordiv mod pow matmul lshift rshift xor and or".split()
for name in ARITHMETIC:
    OPERATIONS.setdefault(name, getattr(operator, name, None))
IN_PLACE = "iadd isub imul iand ior ixor".split()
for name in IN_PLACE:
    OPERATIONS[name] = getattr(operator, name)

# A subclass stands for what it is built on. The base type's own methods are called: a subclass may lie.
IMMUTABLE = {
    int: int.__int__,
    float: float.__float__,
    complex: complex.__complex__,
    str: str.__str__,
    bytes: lambda x: bytes(memoryview(x)),
    tuple: lambda x: tuple(tuple.__iter__(x)),
    frozenset: lambda x: frozenset(frozenset.__iter__(x)),
}
MUTABLE = {
    list: lambda x: list(list.__iter__(x)),
    dict: lambda x: dict(dict.items(x)),
    set: lambda x: set(set.__iter__(x)),
    bytearray: lambda x: bytearray(memoryview(x)),
}


class Refused(BaseException):
    """The test fails whatever it makes of this: what it asks has no answer in plain data."""


class Program:
    """Answers the judge's questions about one module."""

    def __init__(self, job):
        self.questions = open(job["fds"][0], "rb")
        self.answers = open(job["fds"][1], "wb", 0)
        self.module = sys.modules["solution"] = type(sys)("solution")
        self.kept = []  # objects that the judge knows by their number here
        self.numbers = {}  # id of an object -> its number
        self.borrowed = {}  # id of a function that calls one of the tests' -> that one's number
        self.told = set()  # the objects of which this answer has told what they are made of
        self.spent, self.telling = 0, False  # values told of objects in this answer; whether we are at it

    def serve(self):
        """Answers until the judge goes or, where we wait for a function of the tests, that has returned."""
        for line in self.questions:
            op, *rest = json.loads(line)
            if op == "returns":
                return decode(*rest)
            if op == "throws":
                raise decode(*rest)
            self.answers.write(self.answer(op, *rest).encode() + b"\n")
        os._exit(0)

    def answer(self, op, packed, packed_named) -> str:
        try:
            args = [decode(a) for a in packed]
            named = {k: decode(v) for k, v in packed_named.items()}
            if op == "names":
                result = {name: self.module.__dict__[name] for name in args if name in self.module.__dict__}
            else:
                result = OPERATIONS[op](*args, **named)
        except Refused as e:
            return json.dumps(["refuses", str(e)])
        except BaseException as e:
            return json.dumps(self.failure(e))
        self.spent = 0
        self.told.clear()
        try:
            news = [] if op in ("names", "getattr") else self.news([*args, *named.values()])
            changed = []
            if result is None and op == "call":
                changed = self.changed([*packed, *packed_named.values()], [*args, *named.values()])
            said = json.dumps(["gives", encode(result), news, changed])
        except BaseException as e:
            return json.dumps(["refuses", f"{type(e).__name__} in the program's answer"])
        return said if len(said) < LINE else json.dumps(["refuses", "the program's answer is too large"])

    def news(self, taking_part) -> list:
        """What the objects that took part are made of now."""
        bound = ("method", "builtin_function_or_method", "method-wrapper")
        objects = [x.__self__ if type(x).__name__ in bound else x for x in taking_part]
        return [encode(x) for x in objects if type(x).__module__ == "solution"]

    def changed(self, packed, args) -> list:
        """[which argument, its content now] of lists and the like that a function without result changed."""
        again = [encode(x) if type(x) in (*MUTABLE, *deques()) else None for x in args]
        return [[n, new] for n, new in enumerate(again) if new is not None and new != packed[n]]

    def failure(self, e) -> list:
        """What is said of an exception: its classes, arguments and text."""
        text = ""
        packed = None
        self.spent = 0
        try:
            text = str(e)[:1000]
            packed = [encode(a) for a in e.args]
            if len(json.dumps(packed)) > 10_000:
                packed = None
        except BaseException as another:  # of the program's own __str__
            text = text or type(another).__name__
        return ["raises", self.family(type(e)), packed, text, self.number(e)]

    def family(self, kind) -> list:
        """An exception's class and its bases: number, module, name of each, and Python's own by its name."""
        found = []
        for base in kind.__mro__:
            if base.__module__ == "builtins":
                return [*found, base.__name__]
            found.append([self.number(base), str(base.__module__), str(base.__name__)])
        return found

    def number(self, x) -> int:
        if id(x) not in self.numbers:
            self.numbers[id(x)] = len(self.kept)
            self.kept.append(x)
        return self.numbers[id(x)]

    def encode_object(self, x):
        if id(x) in self.borrowed:
            return ["mine", self.borrowed[id(x)]]
        if isinstance(x, type) and issubclass(x, BaseException):
            return ["error", self.family(x)]
        if isinstance(x, type) and getattr(builtins, x.__name__, None) is x:
            return ["type", x.__name__]
        for base, value in IMMUTABLE.items():
            if isinstance(x, base):
                return ["own", self.number(x), encode(value(x))]
        if id(x) in self.told:
            return ["object", self.number(x)]
        self.told.add(id(x))
        return ["object", self.number(x), self.made_of(x)]

    def made_of(self, x):
        """[class, fields, fields that == leaves out] of an object that can be told by them, else None."""
        for base, value in MUTABLE.items():
            if isinstance(x, base):
                return self.tell(x, {"": value(x)}, {})
        return self.tell(x, *fields_of(x)) if type(x).__module__ == "solution" else None

    def tell(self, x, fields, uncompared):
        outermost, self.telling = not self.telling, True
        try:
            packed = [[[k, encode(v)] for k, v in some.items()] for some in (fields, uncompared)]
            return [type(x).__name__, *packed]
        except TooLarge:
            if outermost:
                return None
            raise
        finally:
            self.telling = not outermost

    def spend(self):
        """One value more. A large object, told of with each answer, would cost more than the calls."""
        self.spent += self.telling
        if self.telling and self.spent > LEAVES:
            raise TooLarge

    def decode_object(self, name, *value):
        if name == "object":
            return self.kept[value[0]]
        if name == "name":
            if value[0] not in self.module.__dict__:
                raise Refused(f"NameError: name {value[0]!r} is not defined")
            return self.module.__dict__[value[0]]
        if name == "import":
            found = __import__(value[0], fromlist=["."])
            for part in value[1].split("."):
                found = getattr(found, part)
            return found
        if name == "iter":
            return iter(decode(value[0]))
        if name == "error":
            return decode(value[0])(*map(decode, value[1]))
        return self.borrow(*value)

    def borrow(self, n):
        """A function that calls the tests' function n."""

        def function(*args, **named):
            packed = [[encode(a) for a in args], {k: encode(v) for k, v in named.items()}]
            self.answers.write(json.dumps(["calls", n, *packed]).encode() + b"\n")
            return self.serve()

        self.borrowed[id(function)] = n
        self.number(function)  # which keeps it, or its id would be another's
        return function


def deques():
    return [sys.modules["collections"].deque] if "collections" in sys.modules else []


def fields_of(x) -> tuple[dict, dict]:
    """name -> value of what makes an object of the program's own class, and of what does not count in ==."""
    kind = type(x)
    if "enum" in sys.modules and isinstance(x, sys.modules["enum"].Enum):
        return dict(name=x._name_, value=x._value_), {}
    fields = {}
    for base in reversed(kind.__mro__):
        slots = base.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{base.__name__.lstrip('_')}{name}"
            if name not in ("__dict__", "__weakref__") and hasattr(x, name):
                fields[name] = getattr(x, name)
    with contextlib.suppress(AttributeError):  # a class with __slots__ alone
        fields |= object.__getattribute__(x, "__dict__")
    compared = getattr(kind, "__dataclass_fields__", {})
    apart = {k: v for k, v in fields.items() if k in compared and not compared[k].compare}
    return {k: v for k, v in fields.items() if k not in apart}, apart


# ------------------------------------------------------------------------------------------- the role
if job["role"] == "script":
    module = sys.modules["__main__"] = type(sys)("__main__")
    exec(compiled(job["source"], "solution.py"), module.__dict__)

if job["role"] == "program":
    side = Program(job)
    exec(compiled(job["source"], "solution.py"), side.module.__dict__)
    side.serve()

if job["role"] == "judge":
    exec(JUDGING)  # noqa: F821 (tasks/judging.py, which tasks/launcher.py has compiled)
