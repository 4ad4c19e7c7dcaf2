"""A calculator between marks: an environment for models that reckon in text.

    env, env_role, turn_ends = "calculator", "", ("</calc>",)                   # in a config file

The model writes "48 / 2 = <calc>48/2</calc>", the environment replies "24" right there, in the same message,
and the model goes on (configs/gsm8k_calculator.py). Numbers, + - * / and parentheses, in exact fractions;
what is none of that gets the reply "error". Nothing is evaluated but a tree of numbers and four operators.

Tests: python -m pytest tests/test_calculator.py
"""

import ast
import operator
import re
from fractions import Fraction

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPEN, CLOSE = "<calc>", "</calc>"
NOTE = re.compile(r"<<([^<>=]{1,100})=[^<>]{0,100}>>")  # of GSM8K's solutions
LONGEST = 100  # characters of an expression, so that no number is long to reckon with
WRITTEN = re.compile(r"[0-9+\-*/(). ]+")
# What people write: thousands, currency, percent, and other signs for the operators.
GROUPS = re.compile(r"(?<=[0-9]),(?=[0-9]{3})")
SIGNS = str.maketrans("×·÷−", "**/-", "$=")


def env(row: dict, said: str) -> str | None:
    """What follows a turn: the value of the expression that it ends with, or None where it ends with none."""
    text, closed, _ = said.rpartition(CLOSE)
    if not closed or OPEN not in text:
        return None
    return answer(text.rpartition(OPEN)[2])


def conversation(annotated: str) -> list[str]:
    """A solution of GSM8K as texts of the model and the calculator in turn.

    Its notes "48/2 = <<48/2=24>>24 clips" become "48/2 = <calc>48/2</calc>", "24" and " clips", where the
    calculator gives what the text goes on with; other notes are left out.
    """
    texts, at = [""], 0
    for note in NOTE.finditer(annotated):
        texts[-1] += annotated[at : note.start()]
        at, value = note.end(), answer(note[1])
        if annotated.startswith(value, at):
            texts[-1] += OPEN + note[1] + CLOSE
            texts += [value, ""]
            at += len(value)
    texts[-1] += annotated[at:]
    return texts


def answer(expression: str) -> str:
    """ "24", "0.125", "3.333333" (rounded) or "error"."""
    expression = GROUPS.sub("", expression[: 2 * LONGEST].translate(SIGNS)).strip()
    expression = re.sub(r"([0-9.]+) ?%", r"(\1/100)", expression)
    if len(expression) > LONGEST or not WRITTEN.fullmatch(expression):
        return "error"
    try:
        return shown(value_of(ast.parse(expression, mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return "error"


def value_of(node: ast.AST) -> Fraction:
    """The value of a tree of numbers, signs and the four operators. ValueError for any other node."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = value_of(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.Constant) or type(node.value) not in (int, float):
        raise ValueError(f"{type(node).__name__} is not allowed")
    return Fraction(str(node.value))  # 0.1 as it is written, and not the float that is nearest to it


def shown(value: Fraction) -> str:
    """A whole number as it is, another with six decimals at most."""
    if value.denominator == 1:
        return str(value.numerator)
    rounded = round(value * 10**6)
    sign, (whole, part) = "-" * (rounded < 0), divmod(abs(rounded), 10**6)
    return f"{sign}{whole}.{part:06d}".rstrip("0").rstrip(".")
