"""What the judge of a sandbox does: runs a data set's tests on stubs that ask the program.

Nobody imports this file: tasks/launcher.py hands its code to tasks/inside.py, among whose names it runs where
the role is judge. A test meets plain data, which is decoded here, and stubs, which stand for the program's
objects. A stub can be called, and its attributes read. Whatever a test decides by (truth, equality, length,
what it contains) has to be plain data in the end. Where it is not, the test is refused: it fails whatever it
catches.

Two objects of the program are compared by what they are made of. The program says what that is, so it has to
say it before it knows what is wanted: see Judge.check_made.

Tests: python -m pytest tests/test_verdicts.py
"""

# ruff: noqa: F821 (the names of tasks/inside.py: encode, decode, job, ..)
import ast
import builtins
import contextlib
import json
import os
import sys


class Handle:
    """What the judge knows of an object of the program."""

    def __init__(self, reference):
        self.reference = reference
        self.kind, self.fields = "", None  # what it is made of, in plain data and other objects
        self.uncompared = {}  # fields too, that make no difference between objects
        self.packed = None  # the same as it came
        self.changed = 0  # the question whose answer told another making than was known before
        self.made = 0  # the last question, a call, whose answer it was; and what that call handed over
        self.handed = None
        self.retold = False  # given by a call again, and changed
        self.named = self.constant = (
            False  # stands under a name in the module; is the attribute of such a one
        )
        self.owner = None  # the object whose method this is
        self.tainted = False  # comes from arithmetic with a value of the test
        self.probed = False


class Stub:
    # Stands for an object of the program. No docstring: a program's object has its own.
    __slots__ = ("handle",)

    def __getattribute__(self, name):
        return judge.attribute(self, name)

    def __setattr__(self, name, value):
        judge.ask("setattr", self, name, value)

    def __delattr__(self, name):
        judge.ask("delattr", self, name)

    def __call__(self, *args, **named):
        return judge.call(self, args, named)

    def __eq__(self, other):
        return judge.same(self, other)

    def __hash__(self):
        handle = handle_of(self)
        return hash(handle.kind or str(handle.reference))

    def __bool__(self):
        handle = handle_of(self)
        if handle.fields is None or "" not in handle.fields:
            judge.refuse("the truth of an object is no plain data")
        return bool(handle.fields[""])

    def __contains__(self, item):
        return item in judge.all_of(self)

    def __instancecheck__(self, x):
        return handle_of(x) is not None and judge.ask_for(bool, "isinstance", x, self)

    def __subclasscheck__(self, x):
        return handle_of(x) is not None and judge.ask_for(bool, "issubclass", x, self)

    def __enter__(self):
        return judge.ask("enter", self)

    def __exit__(self, kind, error, trace):
        return judge.leave_context(self, error, trace)

    def __next__(self):
        return judge.ask("next", self)


Stub_handle = Stub.__dict__["handle"]
OWN = {}  # an immutable type -> its subclass whose other attributes are the program's


def handle_of(x):
    """None for what is no object of the program."""
    if type(x) is Stub:
        return Stub_handle.__get__(x)
    if type(x) in OWN.values():
        return object.__getattribute__(x, "__dict__")["handle"]
    return None


def asking(op, *wanted):
    """A method that asks, for an answer of a wanted type where there is one."""

    def method(self, *args):
        if wanted and handle_of(self).tainted and str not in wanted:
            judge.refuse("a program's object less a value of the test is no plain data")
        return judge.ask_for(wanted, op, self, *args)

    return method


def comparing(op):
    def method(self, other):
        if handle_of(other) is None or handle_of(self).tainted or handle_of(other).tainted:
            judge.refuse("an object is no plain data to compare with")
        return judge.ask_for(bool, op, self, other)

    return method


def calculating(op, swapped=False):
    """Never with a plain value for a plain answer: f(x) - 3.14 tells the program what is wanted."""

    def method(self, other):
        operands = [other, self] if swapped else [self, other]
        result = judge.ask(op, *operands)
        handles = [handle_of(x) for x in operands]
        if None in handles or handles[0].tainted or handles[1].tainted:
            if type(result) is not Stub and type(result) is not OWN[tuple]:
                judge.refuse("arithmetic of an object and a value of the test gives no object")
            handle_of(result).tainted = True
        return result

    return method


def changing_sign(op):
    def method(self):
        result = judge.ask(op, self)
        if handle_of(self).tainted:
            judge.refuse("a program's object less a value of the test is no plain data")
        return result

    return method


for op in ("len", "index"):
    setattr(Stub, f"__{op}__", asking(op, int))
for op in ("str", "repr", "format"):
    setattr(Stub, f"__{op}__", asking(op, str))
for op, kind in (("int", int), ("float", float), ("complex", complex)):
    setattr(Stub, f"__{op}__", asking(op, kind))
Stub.__round__ = asking("round", int, float)
for op in ("iter", "reversed"):
    setattr(Stub, f"__{op}__", asking(op))
for op in ("getitem", "setitem", "delitem"):
    setattr(Stub, f"__{op}__", asking(op))
for op in ("lt", "le", "gt", "ge"):
    setattr(Stub, f"__{op}__", comparing(op))
for op in ("abs", "neg", "pos", "invert"):
    setattr(Stub, f"__{op}__", changing_sign(op))
for op in [*ARITHMETIC, "divmod"]:
    setattr(Stub, f"__{op}__", calculating(op))
    setattr(Stub, f"__r{op}__", calculating(op, swapped=True))
for op in IN_PLACE:
    setattr(Stub, f"__{op}__", calculating(op))


def own_type(base):
    """The subclass of an immutable type: compared and calculated with as that, all else is asked."""

    def attribute(self, name):
        if name.startswith("_"):
            return base.__getattribute__(self, name)
        return judge.attribute(self, name)

    def asked(self, name):
        return judge.attribute(self, name)

    def equal(self, other):
        if handle_of(other):
            judge.check_made(self, other)
        return base.__eq__(self, other)

    def unequal(self, other):
        if handle_of(other):
            judge.check_made(self, other)
        return base.__ne__(self, other)

    methods = dict(__getattribute__=attribute, __getattr__=asked, __eq__=equal, __ne__=unequal)
    methods |= dict(__hash__=base.__hash__, __call__=Stub.__call__)
    names = ["str", "repr", "format"]
    if base is tuple:  # of a namedtuple: the program may calculate with it
        names += ["add", "sub", "mul", "radd", "rmul", "rsub", "truediv", "matmul", "neg", "abs"]
    methods |= {f"__{name}__": Stub.__dict__[f"__{name}__"] for name in names}
    return type(base.__name__, (base,), methods)


class Judge:
    """Runs the tests on stubs of what the program is asked for."""

    def __init__(self, job):
        self.answers = open(job["fds"][0], "rb")
        self.questions = open(job["fds"][1], "wb", 0)
        self.verdicts = os.fdopen(os.dup(1), "w")
        self.names = job["names"]
        self.space = {}  # the names of the tests
        self.put = {}  # those of them that are the program's, as last put there
        self.stubs = {}  # number -> Stub
        self.errors = {}  # number of an exception class of the program -> the class that stands for it here
        self.lent = []  # functions of the tests that the program may call
        self.asked = self.calls = self.depth = 0
        self.test, self.failed = 0, ""  # the number of the test under way, and why it has failed
        for name, module in job["modules"].items():
            with contextlib.suppress(ImportError):  # the test will miss it
                self.space[name] = __import__(module)

    def run(self, tests):
        for self.test, test in enumerate(tests):
            self.failed = ""
            try:
                self.look_up()
                code, self.raising = rewritten(test, self.test, self.names)
                exec(code, self.space)
                verdict = "passed"
            except AssertionError:
                verdict = "wrong answer"
            except BaseException as e:
                verdict = described(e)
            self.say(self.failed or verdict)

    def imported(self, name):
        """What `from solution import name` gives a test."""
        if name.startswith("__"):
            raise AttributeError(name)
        found = self.ask("names", name)
        return found[name] if found else self.stub(["name", name])

    def say(self, verdict):
        print(json.dumps([self.test, verdict]), file=self.verdicts, flush=True)

    def end(self, why):
        """The last verdict. Nothing more can be learned, and no `except` of a test makes an answer of it."""
        self.say(self.failed or why)
        os._exit(0)

    def refuse(self, why):
        """Fails this test, whatever it catches."""
        self.failed = self.failed or why
        raise Refused(why)

    def look_up(self):
        """Puts what the program has under the names that the tests use in their place, anew for each test."""
        found = self.ask("names", *self.names)
        if type(found) is not dict:
            self.end("the program's answer is nonsense")
        for name in self.names:
            if name in self.space and self.space[name] is not self.put.get(name, self):
                continue  # a test has defined it since
            self.put[name] = found[name] if name in found else self.stub(["name", name])
            self.space[name] = self.put[name]
            if type(self.put[name]) is Stub:
                handle_of(self.put[name]).named = True

    def stub(self, reference):
        stub = object.__new__(Stub)
        Stub_handle.__set__(stub, Handle(reference))
        return stub

    def spend(self):
        pass

    # ---- questions
    def ask(self, op, *args, **named):
        self.asked += 1
        everything = [*args, *named.values()]
        packed = [encode(a) for a in args], {k: encode(v) for k, v in named.items()}
        self.write([op, *packed])
        while True:
            said, *rest = self.heard()
            if said != "calls":
                break
            self.serve_call(*rest)
        if self.failed:
            raise Refused(self.failed)
        if said == "refuses":
            self.refuse(str(rest[0]))
        try:
            if said == "raises":
                error = self.error(*rest)
            else:
                result, news, changed = rest
                result = decode(result)
                for piece in news:
                    decode(piece)
                if changed and (op != "call" or result is not None):
                    raise ValueError("f(x) == sorted(x) would ask what f made of x")
                for n, content in changed:
                    replace(everything[n], decode(content))
        except (Exception, Refused) as e:
            self.end(f"the program's answer is nonsense: {type(e).__name__}")
        if said == "raises":
            raise stopped(error, op)
        return result

    def write(self, message):
        try:
            self.questions.write(json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            self.end(GONE)

    def heard(self):
        line = self.answers.readline(LINE)
        if not line.endswith(b"\n"):
            self.end(GONE if len(line) < LINE else "the program's answer is too large")
        try:
            said = json.loads(line)
            known = dict(gives=4, raises=5, refuses=2, calls=4)
            if len(said) == known[said[0]]:
                return said
        except (ValueError, TypeError, LookupError, RecursionError, MemoryError) as e:
            self.end(f"the program's answer is nonsense: {type(e).__name__}")
        self.end("the program's answer is nonsense")

    def ask_for(self, wanted, op, *args):
        """An answer of the wanted type or types: Python itself would turn another into a TypeError."""
        result = self.ask(op, *args)
        if wanted and type(result) not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            self.refuse(f"{op} of an object gives no plain data")
        if op in ("iter", "reversed") and type(result) is not Stub:
            self.refuse("an iterator that is none")
        if op == "len" and not 0 <= result < 2**63:
            self.refuse("a length that is none")
        return result

    def serve_call(self, n, args, named):
        """Calls a function of a test for the program, which may ask us meanwhile, and so on, to a depth."""
        self.calls += 1
        self.depth += 1
        if self.calls > CALLS or self.depth > DEPTH or type(n) is not int or not 0 <= n < len(self.lent):
            self.end("the program calls the test's functions too often")
        try:
            args = [decode(a) for a in args]
            named = {k: decode(v) for k, v in named.items()}
            reply = ["returns", encode(self.lent[n](*args, **named))]
        except BaseException as e:
            if isinstance(e, AssertionError):  # which the program might catch
                self.failed = self.failed or "wrong answer"
            reply = ["throws", self.encode_error(e)]
        self.depth -= 1
        self.write(reply)

    # ---- what tests do with objects
    def attribute(self, stub, name):
        if name == "__class__":
            return Stub
        handle = handle_of(stub)
        if not handle.probed:
            handle.probed = True
            self.probe(stub)
        result = self.ask("getattr", stub, name)
        if type(result) is Stub:
            found = handle_of(result)
            found.owner = handle
            found.made, found.handed, found.constant = self.asked, None, handle.named
        return result

    def probe(self, stub):
        """An object that has every attribute would make every `assert f(x).ok` true."""
        try:
            found = self.ask("getattr", stub, "a" + os.urandom(8).hex())
        except Exception:
            return
        if found is not None:
            self.refuse("an object that has every attribute")

    def call(self, stub, args, named):
        handed = [*args, *named.values()]
        leaves = leaves_of(handed)
        result = self.ask("call", stub, *args, **named)
        owner = handle_of(stub).owner
        if owner is not None:
            owner.handed = None  # a method may have changed what it was made from
        handle = handle_of(result)
        if handle is not None and handle is not owner:
            handle.retold = 0 < handle.made and handle.changed == self.asked
            handle.made, handle.handed = self.asked, leaves
        return result

    def same(self, a, b):
        """Whether two objects are made of the same plain data."""
        if b is None:
            return False
        mine = handle_of(a)
        if type(b) is not Stub:
            if mine.fields is None or "" not in mine.fields:
                self.refuse("the program's answer is an object and no plain data")
            return mine.fields[""] == b
        self.check_made(a, b)
        other = handle_of(b)
        if mine is other or mine.reference == other.reference:
            return True
        if mine.fields is None or other.fields is None:
            return False
        return mine.kind == other.kind and mine.fields == other.fields

    def check_made(self, a, b):
        """Of two objects compared, the one that was asked for last holds what it was made from.

        Point(1, 2) must hold 1 and 2, and the answer that it is compared with was given before. Else a
        program could give one object for all.
        """
        first, last = sorted([handle_of(a), handle_of(b)], key=lambda handle: handle.made)
        if last.retold:
            self.refuse("an object that was an answer before is no value to compare with")
        if first is not last and last.made and first.changed >= last.made:
            self.refuse("an object that changed after the other was asked for is no value to compare with")
        if last.handed is None or first.constant:  # Color.RED == f(1): what it is does not hang on f
            return
        x = b if handle_of(b) is last else a
        held = leaves_of([x])
        if not last.handed <= held:
            self.refuse("an object that does not hold what the test made it from is no value to compare with")

    def all_of(self, stub) -> list:
        """The items of an object: all of them, or an endless iterator would contain everything."""
        handle = handle_of(stub)
        if handle.fields is not None and "" in handle.fields:
            return handle.fields[""]
        try:
            iterator = iter(stub)
        except Exception as e:
            self.refuse(f"an object that is no collection: {described(e)}")
        found = []
        for item in iterator:
            found.append(item)
            if len(found) > ITEMS:
                self.refuse("an iterator without an end contains nothing")
        return found

    def leave_context(self, stub, error, trace):
        """A program may suppress what a test raises, and not what makes it fail."""
        if isinstance(error, Refused):
            return False
        said = self.ask("exit", stub, error)
        if error is None or isinstance(error, AssertionError) or said is not True:
            return False
        while trace.tb_next:
            trace = trace.tb_next
        place = (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        return place in self.raising

    # ---- objects as JSON
    def encode_object(self, x):
        handle = handle_of(x)
        if handle is not None:
            return handle.reference
        if isinstance(x, BaseException):
            return self.encode_error(x)
        if isinstance(x, type) and hasattr(x, "number"):
            return ["object", x.number]
        place = importable(x)
        if place:
            return ["import", *place]
        if hasattr(x, "__next__") or type(x).__name__ in ("dict_keys", "dict_values", "dict_items"):
            items = []
            for item in x:
                items.append(encode(item))
                if len(items) > ITEMS:
                    self.refuse("TypeError: a test cannot hand an endless iterator to the program")
            return ["iter", ["list", items]] if hasattr(x, "__next__") else ["list", items]
        if callable(x) and not isinstance(x, type):
            self.lent.append(x)
            return ["callback", len(self.lent) - 1]
        self.refuse(f"TypeError: a test cannot hand a {type(x).__name__} to the program")

    def encode_error(self, e):
        for kind in type(e).__mro__:
            if kind.__module__ == "builtins" or hasattr(kind, "number"):
                break
        if isinstance(e, Refused):
            kind = RuntimeError
        packed = [a if isinstance(a, (str, int, float)) else str(a) for a in e.args]
        reference = (
            ["object", kind.number] if hasattr(kind, "number") else ["import", "builtins", kind.__name__]
        )
        return ["error", reference, packed]

    def decode_object(self, name, *value):
        if name == "own":
            n, plain = value
            plain = decode(plain)
            found = OWN[type(plain)].__new__(OWN[type(plain)], plain)
            object.__getattribute__(found, "__dict__")["handle"] = Handle(["object", n])
            return found
        if name == "error":
            return self.error_class(*value)
        if name == "type":
            found = getattr(builtins, value[0])
            return found if isinstance(found, type) else self.end("the program's answer is nonsense")
        if name == "mine":
            return self.lent[value[0]]
        if name != "object" or type(value[0]) is not int:
            raise ValueError(name)
        n = value[0]
        if n not in self.stubs:
            self.stubs[n] = self.stub(["object", n])
        handle = handle_of(self.stubs[n])
        if len(value) == 2:
            if handle.packed != value[1]:
                handle.changed = self.asked
            handle.packed = value[1]
            handle.kind, handle.fields = "", None
            if value[1] is not None:
                handle.kind = str(value[1][0])
                handle.fields = {str(k): decode(v) for k, v in value[1][1]}
                handle.uncompared = {str(k): decode(v) for k, v in value[1][2]}
        return self.stubs[n]

    def error_class(self, family):
        """The class here for one of the program's: the nearest of Python's, and one for each below it."""
        *own, kind = family
        kind = getattr(builtins, str(kind), None)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            kind = RuntimeError
        for n, module, name in reversed(own):
            is_pythons = str(module).split(".")[0] in sys.stdlib_module_names
            theirs = getattr(sys.modules.get(module), name, None) if is_pythons else None
            if isinstance(theirs, type) and issubclass(theirs, BaseException):
                kind = theirs
            elif n in self.errors:
                kind = self.errors[n]
            else:
                methods = dict(number=n, __getattr__=error_attribute, __str__=error_text)
                kind = self.errors[n] = type(name, (kind,), methods)
        return kind

    def error(self, family, packed, text, n):
        kind = self.error_class(family)
        args = [decode(a) for a in packed] if packed is not None else [text]
        try:
            error = kind(*args)
        except Exception:
            error = kind.__new__(kind)
            error.args = tuple(args)
        error.text, error.stub = str(text), self.stub(["object", n])
        return error


def error_attribute(error, name):
    if "stub" not in error.__dict__:  # one that a test has made
        raise AttributeError(name)
    return judge.ask("getattr", error.stub, name)


def error_text(error):
    return error.__dict__.get("text") or BaseException.__str__(error)


def stopped(error, op):
    """The exception as it may be raised: only the end of an iterator is one to map, list and `in`."""
    if isinstance(error, (StopIteration, StopAsyncIteration)) and op != "next":
        return RuntimeError(f"{type(error).__name__}: {error}")
    return StopIteration(*error.args) if isinstance(error, StopIteration) else error


def described(e) -> str:
    try:
        return f"{type(e).__name__}: {str(e)[:200]}"
    except BaseException:
        return type(e).__name__


def leaves_of(x, depth=20) -> set:
    """The numbers and texts in a value, and in the objects in it."""
    if depth == 0 or x is None or isinstance(x, bool):
        return set()
    if type(x) is Stub:
        handle = handle_of(x)
        x = handle.uncompared | (handle.fields or {})
    if isinstance(x, dict):
        x = [*x.keys(), *x.values()] if "" not in x else [*x.values()]
    if isinstance(x, (list, tuple, set, frozenset)):
        return set().union(*(leaves_of(v, depth - 1) for v in x))
    return {x} if isinstance(x, (int, float, complex, str, bytes)) else set()


def replace(x, new):
    """Gives a list, dict or set that a test handed over the content that the program has given it."""
    if type(x) is not type(new):
        raise TypeError
    inside = []  # a list inside may have another name in the test
    if isinstance(x, list):
        inside = enumerate(zip(x, new))
    if isinstance(x, dict):
        inside = [(key, (x[key], new[key])) for key in x.keys() & new.keys()]
    for place, (old, item) in inside:
        if type(old) is type(item) and type(old) in MUTABLE:
            replace(old, item)
            new[place] = old
    x.clear()
    if isinstance(x, (dict, set)):
        x.update(new)
    else:
        x.extend(new)


def importable(x):
    """(module, name) of a function or class of Python's own."""
    owner = getattr(x, "__objclass__", x)
    module, name = getattr(owner, "__module__", None), getattr(x, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or handle_of(x):
        return None
    if module.split(".")[0] not in sys.stdlib_module_names or module not in sys.modules:
        return None
    found = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    return (module, name) if found is x else None


def rewritten(test, n, names):
    """(the test's code, its places of `raise`), with two questions made explicit.

    `while node:` asks whether there is a node, and not for the truth of an object. In `f(x) == Point(1, 2)`
    the right side has to be an object, or a program whose names all give 0 would be right.
    """
    tree = ast.parse(test)
    answers, made = assigned(tree, names)
    raising = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            raising.add((f"test {n}", node.lineno))
        if isinstance(node, (ast.While, ast.If, ast.IfExp)):
            node.test = present(node.test)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            known = [not any(part.id in answers for part in names_in(side)) for side in sides]
            objects = Objects(names, made)
            if not all(known[1:]):
                node.left = objects.visit(node.left)
            if not known[0]:
                node.comparators = [objects.visit(side) for side in node.comparators]
    ast.fix_missing_locations(tree)
    return compile(tree, f"test {n}", "exec", dont_inherit=True), raising


def names_in(tree) -> list:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Name)]


def assigned(tree, names) -> tuple[set, dict]:
    """Names that hold what the program said, and name -> class where a call of a class gave it."""
    answers, made = set(names), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(name.id in answers for name in names_in(node.value)):
            targets = {name.id for target in node.targets for name in names_in(target)}
            answers |= targets
            if gives_object(node.value, names):
                made |= dict.fromkeys(targets, node.value.func.id)
    return answers, made


def gives_object(node, names) -> bool:
    """Whether this is a call of what by its name is a class of the program."""
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return is_call and node.func.id in names and node.func.id[0].isupper()


def wrapped(function, node, *more):
    arguments = [node, *map(ast.Constant, more)]
    return ast.copy_location(ast.Call(ast.Name(function, ast.Load()), arguments, []), node)


def present(node):
    """A condition that asks for the presence of objects where it is a bare name or attribute."""
    if isinstance(node, (ast.Name, ast.Attribute)):
        return wrapped("__is_there__", node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        node.operand = present(node.operand)
    if isinstance(node, ast.BoolOp):
        node.values = [present(value) for value in node.values]
    return node


class Objects(ast.NodeTransformer):
    def __init__(self, names, made):
        self.names, self.made = names, made

    def visit_Call(self, node):
        is_object = gives_object(node, self.names)
        self.generic_visit(node)
        return wrapped("__an_object__", node, node.func.id) if is_object else node

    def visit_Name(self, node):
        kind = self.made.get(node.id)
        return wrapped("__an_object__", node, kind) if kind else node


def is_there(x):
    handle = handle_of(x) if type(x) is Stub else None
    return x if handle is None or handle.fields and "" in handle.fields else True


def an_object(x, name):
    """x, which the class of that name gave, unless a test has defined it."""
    is_theirs = judge.space.get(name) is judge.put.get(name)
    if is_theirs and handle_of(x) is None and not isinstance(x, BaseException):
        judge.refuse(f"{name} looks like a class and gives no object")
    return x


side = judge = Judge(job)
OWN |= {base: own_type(base) for base in IMMUTABLE}
solution = sys.modules["solution"] = type(sys)("solution")
solution.__getattr__ = judge.imported
judge.space |= dict(__is_there__=is_there, __an_object__=an_object)
sys.stdout = open("/dev/null", "w")  # a test may print
judge.run(job["tests"])
