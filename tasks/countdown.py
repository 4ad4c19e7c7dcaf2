"""Countdown: make a target of a few numbers. Endless solvable problems, graded in exact fractions.

    task = load_task("countdown", least=3, most=4, high=25, largest=100)
    rewards = [("countdown", 1.0)]                                   # in a config file: configs/countdown.py

The task of TinyZero (github.com/Jiayi-Pan/TinyZero) and arXiv:2504.01848. An expression that a model
wrote is parsed into a tree and its value computed node by node; it is never evaluated by Python, where
99**99**99 hangs.
Tests: python -m pytest tests/test_tasks.py
"""

import ast
import functools
import re
from fractions import Fraction

from data import boxed, hashed, is_held_out, tagged, text_of

PROMPT = (
    "Use the numbers {numbers}, each exactly once, to make {target}. You may use + - * / and parentheses. "
    "End with the expression between <answer> and </answer>, for example <answer>(1 + 2) * 3</answer>."
)


# --------------------------------------------------------------------------------------------- the rows
def task(*, data_dir, eval_problems, least=3, most=4, high=25, largest=100, held_out=0.1, prompt=PROMPT):
    """Numbers and a target to make of them, each solvable, without end.

    From `least` to `most` numbers of 1 to `high`; a target of at most `largest`, reached over whole positive
    numbers. A share `held_out` of the problems is never trained on. `solution` is one of the ways, which the
    reward does not ask for.
    """
    if not 2 <= least <= most <= 6 or not 2 <= high <= largest or not 0 < held_out <= 0.9:
        raise ValueError(
            "countdown needs 2 <= least <= most <= 6, 2 <= high <= largest, 0 < held_out <= 0.9; "
            f"got {least}, {most}, {high}, {largest}, {held_out}"
        )
    make = functools.partial(
        countdown_row, least=least, most=most, high=high, largest=largest, held_out=held_out, prompt=prompt
    )
    found = {}
    for i in range(4 * eval_problems):
        row = make("held out", i, wanted=True)
        if row:  # no problem twice, in whatever order its numbers are
            found.setdefault((*sorted(row["numbers"]), row["target"]), row)
    if not found or not make(0, 0):
        raise ValueError(
            f"there are too few problems of {least} to {most} numbers up to {high}: "
            "widen them, or change held_out"
        )
    return make, list(found.values())[:eval_problems]


def countdown_row(seed, index, *, least, most, high, largest, held_out, prompt, wanted=False, tries=10_000):
    """Problem `index` of `seed`: the first of its draws that works out and is held out or not, as `wanted`.

    None if no draw is.
    """
    for attempt in range(tries):
        u = hashed("countdown", seed, index, attempt)
        numbers, target, expression = drawn(u, least, most, high)
        if not 0 < target <= largest or target in numbers:
            continue
        if is_held_out(held_out, sorted(numbers), target) != wanted:  # in whatever order the numbers are
            continue
        text = prompt.format(numbers=", ".join(map(str, numbers)), target=target)
        solution = f"<answer>{expression[1:-1]}</answer>"
        return dict(prompt=text, numbers=numbers, target=target, solution=solution)
    return None


def drawn(u: int, least: int, most: int, high: int) -> tuple[list[int], int, str]:
    """Numbers, a target and an expression that makes it; target 0 where a step does not work out.

    u: random bits, used up from the low end. These divisions decide which problems there are: a change of
    one of them changes every run.
    """
    counts = most - least + 1
    u, more = divmod(u, counts)
    numbers = []
    for _ in range(least + more):
        u //= high
        numbers.append(1 + u % high)
    terms = [(n, str(n)) for n in numbers]
    while len(terms) > 1:  # any two become one, until one is left
        u //= 7
        a, left = terms.pop(u % len(terms))
        u //= 7
        b, right = terms.pop(u % len(terms))
        u //= 7
        op = "+-*/"[u % 4]
        value = combined(a, op, b)
        if value == 0:
            return numbers, 0, ""
        terms.append((value, f"({left} {op} {right})"))
    return numbers, *terms[0]


def combined(a: int, op: str, b: int) -> int:
    """a op b, or 0 where that is no whole positive number."""
    if op == "+":
        return a + b
    if op == "-":
        return max(0, a - b)
    if op == "*":
        return a * b
    return a // b if a % b == 0 else 0


# ------------------------------------------------------------------------------------------- the reward
OPERATORS = {
    ast.Add: Fraction.__add__,
    ast.Sub: Fraction.__sub__,
    ast.Mult: Fraction.__mul__,
    ast.Div: Fraction.__truediv__,
}
# What else Python takes for a number (1_0, 0x1f, 1e5, letters, ٣) never gets as far as its parser.
SUM = re.compile(r"[0-9+\-*/() ]{1,200}")
PLAIN = str.maketrans("×·÷−–[]", "**/--()")
LATEX = [
    (re.compile(r"\\(?:times|cdot|ast)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\div(?![a-zA-Z])"), "/"),
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[()\[\],;! ]"), " "),
    (re.compile(r"\\[dt]?frac ?\{([^{}]{1,60})\} ?\{([^{}]{1,60})\}"), r"((\1)/(\2))"),
    (re.compile(r"(?<=[0-9)]) ?[xX] ?(?=[0-9(])"), "*"),
]


def countdown(completions, prompts=None, *, numbers, target, **_):
    """1 if the completion's expression makes `target` of `numbers`, each used once, else 0.

    The expression is what the last <answer>..</answer> or \\boxed{..} holds, else the last line, after a
    colon if there is one: + - * / and parentheses, or LaTeX's for them, in exact fractions. "= target" may
    follow and "target =" come first. No powers, no //, no signs, at most 200 characters. None: the row's
    numbers or target are no integers.
    """
    scores = []
    for completion, given, wanted in zip(completions, numbers, target):
        if type(wanted) is not int or not isinstance(given, list) or any(type(n) is not int for n in given):
            scores.append(None)
        else:
            scores.append(float(makes(expression_of(text_of(completion)), given, wanted)))
    return scores


def expression_of(text: str) -> str:
    """The answer in a text, or the end of its last line, without what is written around a formula."""
    found = tagged(text)
    found = boxed(found or text[-4000:]) or found
    if not found:
        found = text.rstrip().rpartition("\n")[2][-300:].rpartition(":")[2]
    for latex, python in LATEX:
        found = latex.sub(python, found)
    return found.translate(PLAIN).strip(" \t\n$`.").removeprefix("**").removesuffix("**").strip(" $")


def makes(expression: str, numbers: list, target: int) -> bool:
    """Whether an expression, with or without "= target" or "target =", is `target` made of all `numbers`."""
    left, equals, right = expression.partition("=")
    if equals and left.strip() == str(target):
        left, right = right, left
    if equals and right.strip() != str(target):
        return False
    left = left.strip()
    if not SUM.fullmatch(left):
        return False
    used = []
    try:
        value = value_of(ast.parse(left, mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False  # MemoryError is what the parser says to too many parentheses
    return value == target and sorted(used) == sorted(numbers)


def value_of(node: ast.AST, used: list) -> Fraction:
    """The value of a tree of numbers and the four operators; its numbers go to `used`.

    ValueError for any other node.
    """
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        operator = OPERATORS[type(node.op)]
        return operator(value_of(node.left, used), value_of(node.right, used))
    if not isinstance(node, ast.Constant) or type(node.value) is not int:
        raise ValueError(f"{type(node).__name__} is not allowed")
    used.append(node.value)
    return Fraction(node.value)
