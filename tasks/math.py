"""Mathematics: problems whose answers are compared as mathematics, so that 1/2, 0.5 and \\frac12 are one.

    task = load_task("math", train_file="math/train.jsonl")
    rewards = [("math", 1.0)]                                        # in a config file: configs/math.py

math-verify (pip install math-verify) compares, in a process of its own: it calls sympy, which may take
for ever and can't be stopped from outside in any other way. math-verify's own limits are signals, which
exist in a main thread only; in the threads that rewards are called in they made every score 0.

Tests: python -m pytest tests/test_tasks.py
"""

import contextlib
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading

from data import RewardError, any_number, from_jsonl, only_number, tagged, text_of


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
def mathematics(completions, prompts=None, *, answer, seconds=10.0, **_):
    """1 if the final answer equals the row's `answer` as mathematics, else 0.

    The last \\boxed{..} counts, else what is tagged <answer>, follows "####" or "answer is",
    the last formula, the last number. None: the row's answer is not mathematics, or the
    comparison took `seconds` or died.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("the reward 'math' needs math-verify: pip install math-verify")
    pairs = [(right_answer(str(a)), final_answer(text_of(c))) for c, a in zip(completions, answer)]
    same = {pair: equal(*pair, seconds) for pair in dict.fromkeys(pairs)}  # each pair is compared once
    return [same[pair] for pair in pairs]


def right_answer(text: str) -> str:
    """The answer of a row: the whole text, or what a solution has in its box."""
    return final_answer(text) if boxed(text) else text.strip()[:300]


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


def boxed(text: str) -> str:
    """What the last closed \\boxed{..} or \\fbox{..} holds, braces balanced, at most 300 characters."""
    at = len(text)
    for _ in range(20):  # boxes without an end or without content are passed over, but not for ever
        at = max(text.rfind("\\boxed", 0, at), text.rfind("\\fbox", 0, at))
        if at < 0:
            break
        after = text[at : at + 310].partition("box")[2].removeprefix("ed").lstrip()
        inside = braced(after)
        if inside:
            return inside
    return ""


def braced(text: str) -> str:
    """What stands between the brace that a text begins with and its partner; "" where there are not both."""
    if not text.startswith("{"):
        return ""
    depth = 0
    for i, c in enumerate(text):
        if c == "{":
            depth += 1
        elif c == "}":
            depth -= 1
        if depth == 0:
            return text[1:i].strip()
    return ""


def equal(right: str, said: str, seconds: float) -> float | None:
    """1 if two answers are the same, 0 if not, None if that cannot be told."""
    a, b = only_number(right), only_number(said)
    if a is not None and (b is not None or not said):  # plain numbers need nobody's help
        return float(b is not None and a == b)
    return EQUALS.ask([right, said], seconds)


# ---------------------------------------------------------------------------- the process that compares
START_SECONDS = 120  # importing sympy takes a second, on a busy disk many


class Equals:
    """A process that compares with math-verify, started when needed, also after it had to be killed."""

    # One question a line on stdin, one answer a line on stdout. Memory and CPU are limited, the latter
    # anew for each question, so that it ends also when nobody is left to kill it.
    PROGRAM = """
import json, logging, resource, sys, time
import math_verify

logging.disable(logging.CRITICAL)
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))

def parse(text):
    return math_verify.parse("$" + text + "$", parsing_timeout=None, fallback_mode="no_fallback")

print("ready", flush=True)
for line in sys.stdin:
    right, said, seconds = json.loads(line)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, -1))
    try:
        gold = parse(right)
        same = float(math_verify.verify(gold, parse(said), timeout_seconds=None)) if gold else None
        print(json.dumps(same), flush=True)
    except Exception:
        print("null", flush=True)
"""

    def __init__(self):
        self.process = None
        self.lock = threading.Lock()  # one question at a time, whatever thread it comes from

    def ask(self, question: list, seconds: float) -> float | None:
        """The process's answer to [right, said]; None where it gives none in time, and then it is killed."""
        with self.lock:
            if self.process is None:
                self.start()
            try:
                self.process.stdin.write(json.dumps([*question, seconds]) + "\n")
                self.process.stdin.flush()
                reply = self.reply(seconds)
            except OSError:  # it died before it could be asked
                reply = ""
            if not reply or not reply.endswith("\n"):  # too slow, dead, or killed while it wrote
                self.kill()
                return None
            return json.loads(reply)

    def start(self):
        path = os.pathsep.join(p for p in sys.path if p)
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=dict(PYTHONPATH=path),
        )
        if self.reply(START_SECONDS) is None:
            self.kill()
            raise RewardError(
                f"starting math-verify took more than {START_SECONDS} seconds: start the run again"
            )

    def reply(self, seconds: float) -> str | None:
        """The next line that the process writes; "" if it has ended, None if it takes too long.

        Nothing else of it can be in Python's buffer, since there is one line to a question.
        """
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return None
        return self.process.stdout.readline()

    def kill(self):
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):  # a question that it never read
            self.process.stdin.close()
        self.process.stdout.close()
        self.process = None


EQUALS = Equals()
