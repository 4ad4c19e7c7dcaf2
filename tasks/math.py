"""Mathematics: problems whose answers are compared as mathematics, so that 1/2, 0.5 and \\frac12 are one.

    task = load_task("math", train_file="math/train.jsonl")
    rewards = [("math", 1.0)]                                        # in a config file: configs/math.py

Numbers and fractions are compared here, exactly. All else goes to math-verify (pip install math-verify), in
processes of their own: it calls sympy, which may take for ever and can't be stopped from outside in any other
way. math-verify's own limits are signals, which exist in a main thread only; in the threads that rewards are
called in they made every score 0.

Tests: python -m pytest tests/test_tasks.py
"""

import contextlib
import importlib.machinery
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from fractions import Fraction

from data import CHANGE_A_NUMBER, RewardError, any_number, boxed, from_jsonl, tagged, text_of


# --------------------------------------------------------------------------------------------- the rows
def task(*, data_dir, eval_problems, train_file="math/train.jsonl", eval_file=None):
    """A file with one JSON object a line, as MATH has them (arXiv:2103.03874).

    Each has a `problem` and an `answer`, or a `solution` that ends in \\boxed{answer}.
    """
    return from_jsonl(math_row, data_dir, eval_problems, train_file, eval_file)


def math_row(row: dict) -> dict:
    prompt = row.get("prompt") or row["problem"]
    answer = row["answer"] if "answer" in row else row["solution"]
    return dict(row, prompt=prompt, answer=answer)


# ------------------------------------------------------------------------------------------- the reward
def mathematics(completions, prompts=None, *, answer, evaluated=True, seconds=1.0, **_):
    """1 if the final answer equals the row's `answer` as mathematics, else 0.

    The last \\boxed{..} counts, else what is tagged <answer>, follows "####" or "answer is", the last
    formula, the last number. evaluated: where the row's answer is a number, that of the completion must be
    one too and not a sum, a power or a function still to be computed, so that to repeat the question is no
    answer. seconds: CPU time that a comparison may take, a tenth of it after MANY that took it all.

    An answer that is too large, takes too long or cannot be read gets 0. None is for what is not its fault:
    the row's answer is not mathematics, or the processes that compare were lost.
    """
    if math_verify_path() is None:
        raise ImportError("the reward 'math' needs math-verify: pip install math-verify")
    pairs = [(right_answer(str(a)), final_answer(text_of(c))) for c, a in zip(completions, answer)]
    same = compared(list(dict.fromkeys(pairs)), evaluated, seconds)  # each pair once
    return [same[pair] for pair in pairs]


# Comparisons that may take their whole time in one call. The others then get a tenth, still several times
# what an answer takes that does not hang, so that a batch of such answers cannot use up reward_timeout.
MANY = 16


def compared(pairs: list, evaluated: bool, seconds: float) -> dict:
    """(right, said) -> its verdict, with as many threads as there are processes to ask."""
    waiting = queue.SimpleQueue()
    verdicts = {}
    hung_before = EQUALS.hung

    def work():
        with contextlib.suppress(queue.Empty):
            while True:
                pair = waiting.get_nowait()
                patience = seconds
                if EQUALS.hung - hung_before > MANY:
                    patience = seconds / 10
                try:
                    verdicts[pair] = equal(*pair, evaluated, patience)
                except RewardError as e:
                    verdicts[pair] = e

    for pair in pairs:
        waiting.put(pair)
    # Daemons: a run that is stopped does not wait for them.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for verdict in verdicts.values():
        if isinstance(verdict, RewardError):
            raise verdict
    return verdicts


def right_answer(text: str) -> str:
    """The answer of a row: the whole text, or what a solution has in its box or after "####"."""
    return final_answer(text) if boxed(text) or "####" in text else text.strip()[:300]


ANSWER_IS = re.compile(r"answer(?: is|:)[ :]{0,3}([^\n]{1,300})", re.IGNORECASE)
FORMULA = re.compile(  # \(..\), \[..\], $..$ or $$..$$
    r"\\\(([^\n]{1,200}?)\\\)"
    r"|\\\[([^\n]{1,200}?)\\\]"
    r"|\$\$?([^$\n]{1,200})\$\$?(?![0-9])"
)


def final_answer(text: str) -> str:
    """The answer a text ends in, without the dollars around it; "" where there is none."""
    found = boxed(text) or tagged(text)
    if found:
        return found.strip("$ ")
    end = text[-4000:]
    found = announced(text, end)
    formulas = FORMULA.findall(found or end)  # three groups each, of which one is not empty
    if formulas:
        found = "".join(formulas[-1])
    elif not found:
        number = any_number(end)
        found = "" if number is None else f"{number:f}"
    return found.strip().strip("$*").rstrip(".").strip()


def announced(text: str, end: str) -> str:
    """The rest of the line after the last "####" of a text, else after the last "answer is" of its end."""
    if "####" in text:
        return text.rpartition("####")[2].lstrip()[:300].partition("\n")[0]
    said = ANSWER_IS.findall(end)
    return said[-1] if said else ""


# ------------------------------------------------------------------------------------- numbers, compared here
THOUSANDS = re.compile(r"(?<=[0-9])(?:\\[,!;:]|\{,\})(?=[0-9]{3}(?![0-9]))")  # 1\,234 and 1{,}234
GAP = re.compile(r"\\(?:left|right|displaystyle|big|Big)(?![a-zA-Z])|\\[,!;: ]|\\q?quad|~|\\?\$|[£€¥]")
# \text{ cm}^2: a unit with its power. What holds a digit is no unit.
UNIT = re.compile(r"\\(?:text|textrm|mathrm|mbox|textbf|mathbf) ?\{([^{}0-9]{0,60})\}(?:\^\{?[23]\}?)?")
IN_A_BOX = re.compile(r"\\(?:text|textrm|mathrm|mbox|textbf|mathbf|bf) ?\{([^{}]{0,200})\}")
DEGREES = re.compile(r"\^ ?\{?\\circ\}?|\\degree|°")
WORDS = re.compile(r"[a-zA-Z]{2,30}(?: [a-zA-Z]{2,30}){0,4}\.?$")  # a unit; one letter alone is a variable

INTEGER = r"[+-]?[0-9]{1,200}"
DECIMAL = r"(?=\.?[0-9])(?:[0-9]{1,3}(?:,[0-9]{3}){1,60}|[0-9]{1,200})?(?:\.[0-9]{0,200})?"
FRACTION = (
    rf"\\frac ?(?:\{{ ?({INTEGER}) ?\}}|([0-9])) ?(?:\{{ ?({INTEGER}) ?\}}|([0-9]))"  # \frac{1}{2}, \frac12
)
SLASHED = rf"(?:([0-9]{{1,200}}) )?({INTEGER}) ?/ ?([0-9]{{1,200}})"  # 1/2, and 1 1/2
RATIONAL = re.compile(rf"([+-]?) ?(?:({DECIMAL})|([0-9]{{1,200}})? ?{FRACTION}|{SLASHED})")
REPEATING = re.compile(r"([+-]?[0-9]{0,20}\.([0-9]{0,20}))\\(?:overline|bar) ?\{([0-9]{1,20})\}")
SCIENTIFIC = re.compile(
    r"([+-]?[1-9](?:\.[0-9]{1,50})?) ?(?:\\times|\\cdot|×|\*) ?10 ?\^ ?\{?([+-]?[0-9]{1,2})\}?"
)


def rational(text: str) -> tuple[Fraction, bool] | None:
    """The number that an answer is, as an exact fraction, and whether it is a percentage; None if it is none.

    A decimal, a fraction or a mixed number, with a unit or without: nothing that is still to be computed.
    """
    text, percents = re.subn(r"\\?%", "", plain(text))
    text = REPEATING.sub(repeating, text.strip())
    match = RATIONAL.fullmatch(text)
    if not match or percents > 1:
        return None
    sign, decimal = match.group(1, 2)
    if decimal is not None:
        value = Fraction(decimal.replace(",", "").rstrip("."))
    else:
        value = fraction(*match.groups()[2:])
    if value is None:
        return None
    return (-value if sign == "-" else value), percents == 1


def fraction(whole, top, one_digit, bottom, other_digit, before_slash, over, under) -> Fraction | None:
    """The value of FRACTION's or SLASHED's groups; None where it is over 0, or has a sign inside."""
    whole = int(whole or before_slash or 0)
    above = int(top or one_digit or over)
    below = int(bottom or other_digit or under)
    if below == 0 or (whole and (above < 0 or below < 0)):
        return None
    return whole + Fraction(above, below)


def repeating(match) -> str:
    """0.1\\overline{6} as a fraction, in the form that RATIONAL knows."""
    head, decimals, period = match.groups()
    tens = 10 ** len(decimals)
    nines = 10 ** len(period) - 1
    before = int(head.lstrip("+-").replace(".", "") or 0)
    sign = "-" if head.startswith("-") else ""
    return f"{sign}\\frac{{{before * nines + int(period)}}}{{{tens * nines}}}"


def plain(text: str) -> str:
    """An answer without what is only written around a number: spaces, currency, units, degrees, brackets."""
    text = GAP.sub(" ", THOUSANDS.sub("", text).replace("−", "-"))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = DEGREES.sub("", UNIT.sub(without_unit, text))
    text = " ".join(IN_A_BOX.sub(r"\1", text).split())
    words = WORDS.search(text)
    if words and not CHANGE_A_NUMBER & set(words.group().lower().rstrip(".").split()):
        text = text[: words.start()]
    text = text.strip()
    while len(text) > 1 and text[0] + text[-1] in ("()", "{}", "[]"):
        text = text[1:-1].strip()
    return text


def without_unit(match) -> str:
    """Nothing in the place of a unit; words that change the value stay, and make it no number."""
    words = match.group(1).lower().split()
    is_unit = any(word.isalpha() for word in words) and not CHANGE_A_NUMBER & set(words)
    return " " if is_unit or not words and "^" not in match.group() else match.group()


def same_rational(right: tuple[Fraction, bool], said: tuple[Fraction, bool]) -> bool:
    """Whether two numbers are equal: 50 % is 50 and a half."""
    meanings = []
    for value, is_percentage in (right, said):
        meanings.append({value, value / 100} if is_percentage else {value})
    return bool(meanings[0] & meanings[1])


def scientific(right: str, said: str) -> tuple[Fraction, bool] | None:
    """The value of 3 \\times 10^8, where the row's answer is written so too or is as long as that."""
    match = SCIENTIFIC.fullmatch(plain(said))
    is_long = sum(c.isdigit() for c in right) >= 7
    if not match or not (is_long or "10^" in right):
        return None
    return Fraction(match.group(1)) * Fraction(10) ** int(match.group(2)), False


# ---------------------------------------------------------------------------------- everything is compared
DEEPEST = 8  # brackets in brackets; math-verify's parser takes exponential time for them
TOWER = re.compile(r"\^\{?[^{}^]{1,40}\^\{?[^{}^]{1,40}\^|![ )}\]]{0,9}!")  # a^{b^{c^d}} and (n!)!
NAMED = re.compile(r"(?:^|(?<=,)|(?<= or )|(?<=\})) ?([a-zA-Z]) ?=")  # each x = of x = 1, x = 2
# What a number is written with when there is nothing left to compute. `text` is a unit or a word.
OF_NUMBERS = {"frac", "dfrac", "tfrac", "sqrt", "pi", "cdot", "times", "pm", "mp", "infty", "cup", "cap"}
OF_NUMBERS |= {"left", "right", "text", "mathrm", "textrm", "mbox", "quad", "circ", "begin", "end", "in"}
LETTERS = {"e", "i"}


def equal(right: str, said: str, evaluated: bool, seconds: float) -> float | None:
    """1 if two answers are the same, 0 if not, None if that cannot be told."""
    if not said:
        return 0.0
    words = word(right), word(said)
    if all(words) and "\\text" in right + said:  # math-verify would multiply the letters
        return float(words[0] == words[1])
    sides = sides_of(right, said)
    if not sides or max(map(depth, sides)) > DEEPEST or (TOWER.search(said) and not TOWER.search(right)):
        return 0.0
    gold = rational(right)
    if gold is None and evaluated and is_a_number(right) and not uses(sides[-1]) <= OF_NUMBERS | uses(right):
        return 0.0
    for side in sides:
        must_be_a_number = evaluated and side is sides[-1]
        verdict = same_side(gold, right, side, must_be_a_number, seconds)
        if verdict != 1.0:
            return verdict
    return 1.0


def word(text: str) -> str:
    """An answer that is a word, such as \\text{even}, in small letters; "" where it is something else."""
    text = " ".join(IN_A_BOX.sub(r"\1", text).casefold().split())
    return text if len(text) > 1 and text.replace(" ", "").isalpha() else ""


def same_side(gold, right: str, said: str, must_be_a_number: bool, seconds: float) -> float | None:
    if gold is not None:
        number = rational(said) or scientific(right, said)
        if number is not None:
            return float(same_rational(gold, number))
        if must_be_a_number:
            return 0.0
    return EQUALS.ask([right, said], seconds)


def sides_of(right: str, said: str) -> list[str]:
    """What an answer says that the value is: each side of a chain of equations, without a name at its start.

    `x = 4` says 4. `2 + 2 = 4` says it twice, `3 = 4` says 3 as well: every side has to be right, or any list
    of guesses were an answer. An equation that is asked for stays whole. [] where it says too much.
    """
    if "=" in right:
        return [said] if said.count("=") <= right.count("=") else []
    if "\\in" not in right:
        said = re.sub(r"^[a-zA-Z] ?\\in(?![a-zA-Z])", "", said)
    names = NAMED.findall(said)
    if len(names) == said.count("=") > 1 and len(set(names)) == 1:  # x = 1 or x = 2
        said = NAMED.sub(" ", said)
        said = re.sub(r"\\text ?\{ ?or ?\}| or ", ",", said)
    sides = re.split(r"(?<![<>!\\])=", said)
    if len(sides) > 1 and is_a_name(sides[0]):
        sides = sides[1:]
    sides = [side.strip() for side in sides]
    return sides if all(sides) and len(sides) <= 4 else []


def is_a_name(side: str) -> bool:
    """Whether the left side of an equation has a letter in it, and so only says what the right side is."""
    return bool(uses(side) - OF_NUMBERS - {"!", "|"})


def uses(text: str) -> set[str]:
    """The commands and the letters of a formula, and "!" and "|"; what \\text holds is not looked at."""
    text = re.sub(r"\\(?:text|mathrm|textrm|mbox|begin|end) ?\{[a-zA-Z ]{0,60}\}", "", text)
    commands = set(re.findall(r"\\([a-zA-Z]+)", text))
    return commands | set(re.findall(r"[a-zA-Z!|]", re.sub(r"\\[a-zA-Z]+", " ", text)))


def is_a_number(right: str) -> bool:
    """Whether a row's answer is a number, or some: no variable in it, and nothing left to compute."""
    return uses(right) <= OF_NUMBERS | LETTERS


def depth(text: str) -> int:
    """How deep brackets of any kind stand in each other."""
    deepest = now = 0
    for c in text:
        if c in "({[":
            now += 1
            deepest = max(deepest, now)
        elif c in ")}]":
            now -= 1
    return deepest


# ---------------------------------------------------------------------------- the processes that compare
START_SECONDS = 120  # importing sympy takes a second, on a busy disk many
SLACK = 30.0  # seconds of waiting beyond the CPU time, for a machine that is busy with something else
WORKERS = min(8, os.cpu_count() or 1)


def math_verify_path() -> list[str] | None:
    """Where Python looks for modules, but for the current folder and the script's; None without math-verify.

    A file math_verify.py that happens to lie in the folder where a run is started is not the grader.
    """
    here = {os.path.realpath(os.getcwd())}
    if getattr(sys.modules.get("__main__"), "__file__", None):
        here.add(os.path.realpath(os.path.dirname(sys.modules["__main__"].__file__)))
    path = [folder for folder in sys.path if folder and os.path.realpath(folder) not in here]
    found = importlib.machinery.PathFinder.find_spec("math_verify", path)
    return path if found else None


class Equals:
    """Processes that compare with math-verify (tasks/equals.py), started with the first question."""

    def __init__(self):
        self.process = None
        self.hung = 0  # answers that took all their time
        self.free = None  # sockets, each to a process that has nothing to do
        self.lock = threading.Lock()

    def ask(self, question: list, seconds: float) -> float | None:
        """1 or 0 for [right, said], 0 where that takes more than `seconds` of CPU time.

        None: `right` cannot be read, or the process was lost, and then that is so for a second one too.
        """
        line = json.dumps([*question, seconds]).encode() + b"\n"
        for _ in range(2):
            process, free = self.running()
            connection = free.get()
            try:
                gold, *same = exchange(connection, line, seconds + SLACK)
            except OSError:  # a timeout is one
                self.kill(process)
                continue
            finally:
                free.put(connection)
            if gold is not True:
                return None
            if same == ["hung"]:
                self.hung += 1
                return 0.0
            if same != ["lost"]:
                return same[0]
        return None

    def running(self) -> tuple:
        """The process and its free sockets, started where it does not run."""
        with self.lock:
            if self.process is None:
                self.start()
            return self.process, self.free

    def start(self):
        pairs = [socket.socketpair() for _ in range(WORKERS)]
        theirs = [there.fileno() for _, there in pairs]
        program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "equals.py")
        setup = json.dumps([math_verify_path(), theirs])
        self.process = subprocess.Popen(
            [sys.executable, "-I", program, setup],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer; and the group can be killed whole
        )
        self.free = queue.SimpleQueue()
        for _, there in pairs:
            there.close()
        try:
            for here, _ in pairs:
                exchange(here, b"", START_SECONDS, lines=1)
                self.free.put(here)
        except OSError:
            self.end()
            raise RewardError(
                f"math-verify did not start in {START_SECONDS} seconds: try `python -c 'import math_verify'`"
            ) from None

    def kill(self, process):
        """Ends the processes, unless another thread has done so. The next question starts new ones."""
        with self.lock:
            if self.process is process:
                self.end()

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


def exchange(connection, line: bytes, seconds: float, lines: int = 2) -> list:
    """The lines that a process answers, as JSON: `lines` of them, or one that says how the process ended.

    OSError where there is nobody at the other end, or nothing comes for so long.
    """
    connection.settimeout(seconds)
    connection.sendall(line)
    reply = b""
    while reply.count(b"\n") < lines and not reply.endswith(b'"\n'):
        more = connection.recv(4096)
        if not more:
            raise ConnectionError("the process has ended")
        reply += more
    return [json.loads(value) for value in reply.split()]


EQUALS = Equals()
