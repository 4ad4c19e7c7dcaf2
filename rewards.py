"""Rewards: functions that say how good a completion is, and the runner that scores a batch with them.

    rewards = [("gsm8k", 1.0), (my_reward, 0.5), ("format", 0.0)]                    # in a config file

A pair is a name of REWARDS or a function, and its weight. A reward is `f(completions, prompts, **columns)
-> list[float | None]`, TRL's signature, plain or async, and one written for TRL runs unchanged. Arguments
go by name. Every column of the rows arrives as a list with an entry a completion, and the runner adds
`completion_ids` (the sampled ids, the stop included), `group_size` and `max_new_tokens`, and in a run TRL's
`trainer_state` (step, max_steps), `log_extra(column, values)` for a column of rollouts/, and
`log_metric(name, value)` for metrics.jsonl, the mean over a step. A function gets what its signature names,
or everything if it takes **kwargs. The keyword defaults below are changed with functools.partial in a config
file.

None means 'cannot be scored': the grader could not do its work, or the row's answer is none. What a
completion does to itself (too large to evaluate, hanging, unreadable) is 0, or None were a shelter from
punishment. Anything else that is not a finite number stops the run with one sentence (RewardError).

Text written by a model is read, never evaluated: numbers are parsed by a regular expression that knows
ASCII digits only, into exact decimals. No function here raises on any text, and none takes more than
milliseconds, however long or hostile the text is. Three in tasks/ ask others: `math` processes of its own,
which the kernel ends after a second, `code` the sandbox (tasks/sandbox.py, imported only there), `judge` a
server.

Here are the rewards that read a text or count tokens, then the runner. arithmetic, countdown, math, code and
judge are in tasks/, each beside its rows.

N completions = B prompts * G of each; row n answers prompt n // G; R rewards.
Tests: python -m pytest tests/test_rewards.py
"""

import asyncio
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import queue
import re
import threading
import traceback
from decimal import Decimal

import numpy as np

import data
from data import CHANGE_A_NUMBER, DIGITS, NUMBER, RewardError
from data import any_number, exact, name_of, only_number, prompt_text, short, text_of
from tasks.arithmetic import arithmetic
from tasks.code import code, python_block
from tasks.countdown import countdown
from tasks.judge import judge
from tasks.math import final_answer, mathematics


# --------------------------------------------------------------------------------------- right or wrong
def gsm8k(completions, prompts=None, *, answer, **_):
    """1 if the last line that starts with #### holds one number, the row's `answer`, and no part of another.

    Around the number may stand a currency sign, bold or round brackets or \\boxed{}, a final dot and a unit
    of letters, and a percent sign where the answer has one. None where `answer` is not a number.
    """
    return [same_number(marked_number(text_of(c), right), right) for c, right in zip(completions, answer)]


def gsm8k_lenient(completions, prompts=None, *, answer, **_):
    """1 if the number that a completion gives as its answer equals the row's `answer`, else 0.

    It is the one that the last "####", \\boxed or "answer" points at, else the last of the text. None where
    `answer` is not a number.
    """
    return [same_number(stated_number(text_of(c)), right) for c, right in zip(completions, answer)]


def same_number(said: Decimal | None, answer) -> float | None:
    """Whether a number is a row's answer, such as 72, "72", "$1,234.50" or a solution's "#### 72"."""
    right = only_number(str(answer).rpartition("####")[2])
    return None if right is None else float(said == right)


# What may stand in the line of an answer: the number, a sign, brackets, a percent sign, currency, words.
TOKEN = re.compile(
    rf"(?P<number>{DIGITS}(?:\.[0-9]{{1,200}}+)?|\.[0-9]{{1,200}}+)|(?P<word>[^\W\d_]+)|(?P<sign>[-+−])"
    r"|(?P<bracket>\*\*|__|\\(?:boxed|textbf) ?\{|\\[()]|[()}])|(?P<percent>\\?%)"
    r"|(?P<other>[ ,.'’]|\\?\$|[€£¥])|(?P<wrong>.)",
    re.DOTALL,
)
CLOSING = {"(": ")", "\\(": "\\)", "**": "**", "__": "__"}  # and } of all others
LETTER_UNITS = set("gLlmsha")  # grams, litres, metres, seconds, hours; "a" day. Any other may be a variable.
LONGEST = 400  # characters of a line with an answer


def marked_number(text: str, answer="") -> Decimal | None:
    """The number that the last line starting with #### holds; None where it holds none, or more than that.

    answer: the row's. A percent sign is part of the number if that has none.
    """
    _, marked, line = f"\n{text}".rpartition("\n####")
    line = line[:LONGEST].partition("\n")[0]
    if not marked or len(line) == LONGEST:
        return None
    line = re.sub(r"\\text ?\{([^{}\d]*)\}", r" \1", line.replace("\t", " "))
    found = read_line(TOKEN.finditer(line.strip("# \r")))
    if not found or ("percent" in found and "%" not in str(answer)):
        return None
    return exact(found.get("sign", ""), found["number"])


def read_line(tokens) -> dict | None:
    """The number, sign and percent sign of a line; None if it has two of one, or what is part of a number."""
    found = {}
    closing = []
    for token in tokens:
        kind, text = token.lastgroup, token.group()
        if kind == "bracket" and closing and text == closing[-1] and "number" in found:
            closing.pop()
        elif kind == "bracket" and text not in (")", "\\)", "}"):
            closing.append(CLOSING.get(text, "}"))
        elif kind in ("number", "sign", "percent"):
            too_late = "number" in found if kind != "percent" else "number" not in found
            if kind in found or too_late:
                return None
            found[kind] = text
        elif kind == "word" and ("number" not in found or not is_unit(text)):
            return None
        elif kind in ("bracket", "wrong"):
            return None
    return found if "number" in found and not closing else None


def is_unit(word: str) -> bool:
    """Whether a word leaves the number before it what it is: 72 apples, and not 72 million or 72 x."""
    return word in LETTER_UNITS if len(word) == 1 else word.casefold() not in CHANGE_A_NUMBER


POINTER = re.compile(r"####|\\boxed|(?<!/)\banswers?\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"\n|[.!?](?:\s|$)")
POINTED = re.compile(rf"(?:[\s:=>*_({{$\\\[~≈]|is\b|are\b|now\b)*+{NUMBER}")
SPACED_SIGN = re.compile(r"^([\s:$(*]{0,9}[-−]) (?=[$0-9.])")  # "- 5" is -5
# After a number: what makes it part of another, or one of several.
GOES_ON = re.compile(
    r"[ }]{0,3}(?:[=%]|\*{0,2} {0,2}[-+−*/^×÷]? {0,2}(?:and |or )?,? ?\$?[(0-9])|[.,:]?[0-9]"
)
JOINED = re.compile(r"[/^*×÷][ (]*\$?[-−]?[0-9.,]+\W*$|\\[dt]?frac|[0-9] *[/^*×÷] *[0-9]")
POINTERS = 20  # looked at, from the last


def stated_number(text: str) -> Decimal | None:
    """The number that the last "####", \\boxed or "answer" of a text points at, else its last number.

    72 in "the answer is 72 apples in 3 boxes"; where something else stands between, the last of the sentence.
    """
    end = text[-4000:]
    for pointer in reversed(list(POINTER.finditer(end))[-POINTERS:]):
        sentence = SENTENCE_END.split(end[pointer.end() : pointer.end() + 300], maxsplit=1)[0]
        sentence = SPACED_SIGN.sub(r"\1", sentence)
        match = POINTED.match(sentence)
        if match and not GOES_ON.match(sentence, match.end()):
            word = re.match(r" ?([^\W\d_]+)", sentence[match.end() :])
            return None if word and word.group(1).casefold() in CHANGE_A_NUMBER else exact(*match.groups())
        number = any_number(sentence)
        if number is not None:
            return None if JOINED.search(sentence.rpartition("=")[2]) else number
    return any_number(text)


# --------------------------------------------------------------------------------------------- the form
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format(completions, prompts=None, *, prefilled=True, **_):
    """1 if the whole completion is <think>..</think><answer>..</answer>, with something in both, else 0.

    Each tag is there once and nothing before, between or after. prefilled: the opening <think> may be
    missing, since a chat template that writes it puts it into the prompt, not the completion.
    """
    return [float(well_formed(text_of(c).strip(), prefilled)) for c in completions]


def well_formed(text: str, prefilled: bool) -> bool:
    if prefilled and not text.startswith("<think>"):
        text = f"<think>{text}"
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    # With one of each tag the two ends and the middle settle the order.
    thought, _, rest = text.removeprefix("<think>").partition("</think>")
    between, _, answer = rest.partition("<answer>")
    ends = text.startswith("<think>") and text.endswith("</answer>")
    said = thought.strip() and answer.removesuffix("</answer>").strip()
    return ends and not between.strip() and bool(said)


def tag_count(completions, prompts=None, *, tags=TAGS, **_):
    """The share of the tags that are there exactly once, and after those of `tags` before it that count."""
    return [tags_in_order(text_of(c), tags) / len(tags) for c in completions]


def tags_in_order(text: str, tags) -> int:
    count = 0
    end = 0  # of the last tag that counts
    for tag in tags:
        at = text.find(tag)
        if at >= end and text.count(tag) == 1:
            count += 1
            end = at + len(tag)
    return count


READ = 30_000  # the rewards that search for patterns (reasoning_steps, words) read no further than this

# A list marker at the start of a line, with or without a step word after it, or a step word anywhere.
STEP_WORD = r"(?:Step [0-9]{1,3}:|(?:First|Second|Third|Next|Then|Finally|Lastly),)"
LIST_MARKER = r"^[ \t]{0,8}(?:[0-9]{1,3}[.)]|[-*•])(?!\S)"
STEP = re.compile(rf"{LIST_MARKER}(?:[ \t]{STEP_WORD})?|\b{STEP_WORD}", re.MULTILINE)


def reasoning_steps(completions, prompts=None, *, enough=3, **_):
    """min(1, steps / enough): list markers at the start of a line and step words ("First,", "Step 2:")."""
    scores = []
    for completion in completions:
        steps = STEP.finditer(text_of(completion)[:READ])
        scores.append(len(list(itertools.islice(steps, enough))) / enough)
    return scores


# ------------------------------------------------------------------------------------------- the length
def length(completions, prompts=None, *, completion_ids, group_size, grade=gsm8k, **columns):
    """0.5 - (tokens - min) / (max - min), min and max within the group; a wrong answer gets at most 0.

    Kimi k1.5, arXiv:2501.12599, 2.3.3. grade: the reward that says who is right (1 or more). A group whose
    completions are all as long gets 0, one it cannot grade None.
    """
    graded = grade(completions, prompts, completion_ids=completion_ids, group_size=group_size, **columns)
    lengths = [len(ids) for ids in completion_ids]
    scores = []
    for n, right in enumerate(graded):
        first = n - n % group_size
        group = lengths[first : first + group_size]
        shortest, longest = min(group), max(group)
        score = 0.0
        if longest > shortest:
            score = 0.5 - (lengths[n] - shortest) / (longest - shortest)
        if right is None:
            scores.append(None)
        else:
            scores.append(score if right >= 1 else min(0.0, score))
    return scores


def cosine(
    completions,
    prompts=None,
    *,
    completion_ids,
    max_new_tokens,
    grade=gsm8k,
    right=(1.0, 0.5),
    wrong=(-1.0, -0.5),
    **columns,
):
    """From the first value of `right` or `wrong` for an empty completion to the second at max_new_tokens.

    The way between is half a cosine. Right answers had better be short, wrong ones long: think more when
    it does not work out (arXiv:2502.03373). The length is clamped at max_new_tokens, or the cosine would
    rise again. grade: as in `length`; None where it cannot say.
    """
    columns |= dict(completion_ids=completion_ids, max_new_tokens=max_new_tokens)
    scores = []
    for ids, verdict in zip(completion_ids, grade(completions, prompts, **columns)):
        if verdict is None:
            scores.append(None)
            continue
        start, end = right if verdict >= 1 else wrong
        share = min(len(ids), max_new_tokens) / max_new_tokens
        scores.append(end + (start - end) * (1 + math.cos(math.pi * share)) / 2)
    return scores


def repetition(completions, prompts=None, *, completion_ids, n=3, worst=-1.0, **_):
    """worst * (1 - distinct n-grams / n-grams) of the token ids: 0 when nothing is said twice."""
    scores = []
    for ids in completion_ids:
        grams = list(zip(*(ids[i:] for i in range(n))))
        scores.append(worst * (1 - len(set(grams)) / len(grams)) if grams else 0.0)
    return scores


def overlong(completions, prompts=None, *, completion_ids, max_new_tokens, margin=None, **_):
    """0 up to max_new_tokens - margin tokens, then a line down to -1 at max_new_tokens.

    DAPO, arXiv:2503.14476, Eq. 13; margin: a fifth of max_new_tokens by default.
    """
    if margin is None:
        margin = max_new_tokens / 5
    return [max(-1.0, min(0.0, (max_new_tokens - margin - len(ids)) / margin)) for ids in completion_ids]


# ----------------------------------------------------------------------------- small rules, as examples
def words(completions, prompts=None, *, words=("because",), **_):
    """The share of `words` that are in the completion as whole words, in any case.

    A column `words` (lists) gives each row its own.
    """
    wanted = words if isinstance(words, list) else [words] * len(completions)
    scores = []
    for completion, row_words in zip(completions, wanted):
        said = set(re.findall(r"\w++", text_of(completion)[:READ].lower()))
        found = sum(word.lower() in said for word in row_words)
        scores.append(found / len(row_words) if row_words else None)
    return scores


def ends_with(completions, prompts=None, *, ending=".", **_):
    """1 if the completion, white space at its end aside, ends with `ending`, else 0."""
    return [float(text_of(c).rstrip().endswith(ending)) for c in completions]


def weighted(completions, prompts=None, *, parts=((words, 0.5), (ends_with, 0.5)), **columns):
    """Several rewards as one: the weighted sum of `parts`, pairs of function and weight.

    None where one of them is None.
    """
    weights = [weight for _, weight in parts]
    scores = zip(*(function(completions, prompts, **columns) for function, _ in parts))
    return [None if None in row else sum(w * s for w, s in zip(weights, row)) for row in scores]


def env(completions, prompts=None, *, env_reward, **_):
    """What each row's environment says that it is worth: its reward() (turns.py)."""
    return env_reward


REWARDS = {
    "env": env,
    "gsm8k": gsm8k,
    "gsm8k_lenient": gsm8k_lenient,
    "arithmetic": arithmetic,
    "format": format,
    "tag_count": tag_count,
    "reasoning_steps": reasoning_steps,
    "length": length,
    "cosine": cosine,
    "repetition": repetition,
    "overlong": overlong,
    "words": words,
    "ends_with": ends_with,
    "weighted": weighted,
    "countdown": countdown,
    "code": code,
    "judge": judge,
    "arithmetic_lenient": gsm8k_lenient,
    "last_number": gsm8k_lenient,
    "math": mathematics,
}

# Who is right in substance if not in form: reported beside the strict reward.
LENIENT = {"gsm8k": gsm8k_lenient, "arithmetic": gsm8k_lenient}

# What a grader looks for in a text. To find nothing to grade is another trouble than a wrong answer, and
# eval.py tells the two apart. The other rewards grade any text.
FINDS = {
    "gsm8k": marked_number,
    "gsm8k_lenient": stated_number,
    "arithmetic_lenient": stated_number,
    "last_number": stated_number,
    "math": final_answer,
    "code": python_block,
}


# ------------------------------------------------------------------------------------------- the runner
def resolve(rewards) -> list[tuple]:
    """[(name or function, weight), ..] -> [(label, function, weight), ..], with distinct labels.

    A bare name or function has weight 1. ValueError for what is none.
    """
    resolved = []
    for entry in rewards:
        is_pair = isinstance(entry, (tuple, list)) and len(entry) == 2
        reward, weight = entry if is_pair else (entry, 1.0)
        function = reward
        if isinstance(reward, str):
            if reward not in REWARDS:
                raise ValueError(f"unknown reward {reward!r}{data.nearest(reward, REWARDS)}")
            function = REWARDS[reward]
        if not callable(function) or type(weight) not in (int, float) or not math.isfinite(weight):
            raise ValueError(
                'rewards are pairs such as ("gsm8k", 1.0), of a name or function and a finite weight, '
                f"not {entry!r:.80}"
            )
        name = reward if isinstance(reward, str) else name_of(function)
        label = distinct(name, [taken for taken, _, _ in resolved])
        resolved.append((label, function, float(weight)))
    return resolved


def distinct(name: str, taken: list[str]) -> str:
    """`name`, or name_2, name_3, .. where that is taken."""
    label = name
    number = 1
    while label in taken:
        number += 1
        label = f"{name}_{number}"
    return label


def runs_code(functions, env=None) -> bool:
    """Whether one of resolve's functions, or the environment, runs what the model wrote."""
    return getattr(env, "runs_code", False) or any(
        name_of(function) == "code" for _, function, _ in functions
    )


def check_sandbox(functions, mode: str, env=None):
    """SandboxError where a run would run code on a machine that isolates it less than the run wants.

    functions: resolve's list; mode: the config's sandbox, "strict", "auto" or "trust".
    """
    if runs_code(functions, env):
        from tasks import sandbox

        sandbox.demand(mode)


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """Where a run stands, for rewards that ask for `trainer_state`; all 0 in an evaluation."""

    step: int = 0  # the step under way, from 1
    max_steps: int = 0  # the run's

    @property
    def global_step(self) -> int:
        """Steps that are done, TRL's name."""
        return max(0, self.step - 1)


class Logged:
    """What rewards log beside their scores of N completions: TRL's `log_extra` and `log_metric`."""

    def __init__(self, N: int):
        self.N = N
        self.columns = {}  # name -> N values
        self.metrics = {}  # name -> the numbers that were logged, whose mean counts

    def log_extra(self, column: str, values):
        """A column of rollouts/: a value for each completion."""
        values = [json_value(value) for value in values]
        if len(values) != self.N:
            raise ValueError(f"log_extra({column!r}, ..) got {len(values)} values for {self.N} completions")
        self.columns[str(column)] = values

    def log_metric(self, name: str, value):
        """A metric of the step."""
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"log_metric({name!r}, {number}): a finite number is wanted")
        self.metrics.setdefault(str(name), []).append(number)


def json_value(value):
    """A value as it stands where JSON can say it, else its text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)
    return value


def joined_columns(logged: list[Logged]) -> dict[str, list]:
    """The columns of several calls laid end to end, None where one of them lacks a column."""
    names = dict.fromkeys(name for some in logged for name in some.columns)
    columns = {}
    for name in names:
        columns[name] = []
        for some in logged:
            columns[name] += some.columns.get(name, [None] * some.N)
    return columns


def score_completions(
    tokenizer,
    rows,
    ids,
    functions,
    *,
    prefill,
    max_new_tokens,
    reward_messages,
    timeout,
    state=None,
    logged=None,
    heard=None,
):
    """Texts, reward parts (n, R) and rewards (n,), NaN for None, of n completions `ids`, as many of each row.

    functions: resolve's list. state: a TrainerState; logged: a Logged, which takes what the rewards log.
    heard: of conversations, turns.Turns.heard. Their texts hold all turns and replies, but a reward's
    `completions` are what the model said last: what an environment says is not the model's answer.
    """
    G = len(ids) // len(rows)
    texts = [prefill + text for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    prompts = [row["prompt"] for row in rows for _ in range(G)]
    completions, columns = texts, data.columns(rows, G)
    if heard:
        completions, ids = heard["completions"], heard["completion_ids"]
        columns |= dict(turns=heard["turns"], env_reward=heard["env_reward"])
    parts, reward = score(
        functions,
        completions,
        prompts,
        columns,
        group_size=G,
        completion_ids=ids,
        max_new_tokens=max_new_tokens,
        reward_messages=reward_messages,
        timeout=timeout,
        state=state or TrainerState(),
        logged=logged or Logged(len(ids)),
    )
    return texts, parts, reward


def score(
    rewards,
    completions,
    prompts,
    columns,
    *,
    group_size,
    completion_ids=None,
    max_new_tokens=None,
    reward_messages=False,
    timeout=60.0,
    state=None,
    logged=None,
):
    """Scores N completions: (parts (N, R), reward (N,)), float64 numpy arrays, NaN where a score is None.

    rewards: resolve's list. prompts: each completion's, text or messages. columns: name -> N values. Every
    reward is called once, on the whole batch; async ones run together. reward = sum of weight * part over the
    parts that are not None, and None only where all of them are, as TRL has it; parts of weight 0 are only
    reported. timeout: seconds for each call (for all async ones together), None: no limit. state, logged: as
    in score_completions; without them no reward is offered TRL's three keywords.

    Raises RewardError where a reward raises, hangs, or returns anything but N numbers or None. A call
    runs in a thread that is left behind when its time is up: unlike a signal that works in any process,
    but a call that never lets go of the interpreter can't be ended.
    """
    N = len(completions)
    assert len(prompts) == N and all(len(v) == N for v in columns.values()), (
        f"{N} completions need {N} prompts and values of each column"
    )
    if reward_messages:
        completions, prompts = as_messages(completions, prompts)
    else:
        prompts = [prompt_text(prompt) for prompt in prompts]
    known = dict(completions=completions, prompts=prompts, group_size=group_size)
    if completion_ids is not None:
        known["completion_ids"] = completion_ids
    if max_new_tokens is not None:
        known["max_new_tokens"] = max_new_tokens
    if logged is not None:
        known |= dict(trainer_state=state, log_extra=logged.log_extra, log_metric=logged.log_metric)
    clash = sorted(known.keys() & columns.keys())
    if clash:
        raise RewardError(
            f"the rows have a column {clash[0]!r}, which is a name that rewards get from the runner: "
            "rename the column"
        )
    results = call_all(rewards, known | columns, timeout)
    for (label, function, _), result in zip(rewards, results):
        if isinstance(result, BaseException):
            raise failure(label, function, result, reward_messages) from result
    parts = [checked(label, result, N) for (label, _, _), result in zip(rewards, results)]
    parts = np.array(parts, dtype=np.float64).reshape(len(rewards), N).T  # (N, R)
    weights = np.array([weight for _, _, weight in rewards])
    counted = ~np.isnan(parts) & (weights != 0)
    reward = np.where(counted, parts * weights, 0.0).sum(1)
    return parts, np.where(counted.any(1), reward, np.nan)


def as_messages(completions, prompts) -> tuple[list, list]:
    """Completions and prompts in TRL's conversational form where the prompt is a list of messages.

    Text stays text.
    """
    shown_completions = []
    shown_prompts = []
    for completion, prompt in zip(completions, prompts):
        if isinstance(prompt, str):
            shown_completions.append(completion)
            shown_prompts.append(prompt)
        else:
            shown_completions.append([dict(role="assistant", content=completion)])
            shown_prompts.append([dict(message) for message in prompt])
    return shown_completions, shown_prompts


def flat_groups(rewards) -> list[int]:
    """Groups of rewards (B, G) that teach nothing: all equal, or none scored.

    By their spread, not their mean: rewards need not be 0 and 1.
    """
    flat = []
    for b, group in enumerate(rewards.tolist()):
        scored = [reward for reward in group if not math.isnan(reward)]
        if not scored or max(scored) == min(scored):
            flat.append(b)
    return flat


class InBackground:
    """Calls, numbered, made one after another in a thread of their own while the caller goes on.

    So a slow reward hides behind sampling: train.py submits a group when it is finished, while
    others are still being sampled.
    """

    def __init__(self):
        self.calls = queue.SimpleQueue()  # (number, call), then None for the end
        self.done = {}  # number -> what its call returned or raised
        self.thread = threading.Thread(
            target=self.work, daemon=True
        )  # a daemon, so that Ctrl-C need not wait for it
        self.thread.start()

    def submit(self, number: int, function, *args):
        """Have function(*args) called as soon as those submitted before it are done."""
        self.calls.put((number, functools.partial(function, *args)))

    def work(self):
        for number, call in iter(self.calls.get, None):
            self.done[number] = outcome(call)

    def results(self) -> list:
        """What the calls returned, in the order of their numbers, when all are done.

        Raises what the first of them to fail raised.
        """
        self.calls.put(None)
        self.thread.join()
        results = [self.done[number] for number in sorted(self.done)]
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


# ---------------------------------------------------------- one call of a reward, which may do anything
def call_all(rewards, known: dict, timeout: float | None) -> list:
    """What each reward returned or raised: the plain ones one after another, then the async ones together."""
    # All arguments first: a column that the last reward lacks is noticed before a slow one runs.
    calls = []
    for label, function, _ in rewards:
        calls.append(functools.partial(function, **arguments(label, function, known)))
    later = [i for i, (_, function, _) in enumerate(rewards) if is_async(function)]
    results = [None] * len(rewards)
    for i, call in enumerate(calls):
        if i not in later:
            results[i] = in_time(call, timeout, f"reward {rewards[i][0]!r}")
    if later:
        names = ", ".join(repr(rewards[i][0]) for i in later)
        together = functools.partial(asyncio.run, gather([calls[i] for i in later]))
        returned = in_time(together, timeout, f"async reward {names}")
        if not isinstance(returned, list):  # sys.exit() in one of them ends the loop itself
            returned = [returned] * len(later)
        for i, result in zip(later, returned):
            results[i] = result
    return results


def arguments(label: str, function, known: dict) -> dict:
    """What `function` is called with: everything if it takes **kwargs, else what its signature names.

    RewardError if it wants more.
    """
    parameters = inspect.signature(function).parameters.values()
    fixed = getattr(function, "keywords", {})  # what a partial has fixed stays as it is
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    required = [p.name for p in parameters if p.name in named and p.default is p.empty]
    if named and named[0] in required and named[0] not in known:
        # f(texts, questions): the first two are completions and prompts, whatever they are called.
        for name, meant in zip(named, ("completions", "prompts")):
            if name in required and name not in known:
                known = known | {name: known[meant]}
    for name in required:
        if name not in known:
            raise RewardError(f"reward {label!r} wants {name!r}, and a row gives only {', '.join(known)}")
    given = {}
    for name, value in known.items():
        if name not in fixed and (takes_all or name in named):
            # A copy, so that a reward that changes its list changes nothing for the next one.
            given[name] = list(value) if isinstance(value, list) else value
    return given


def is_async(function) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


async def gather(calls):
    return await asyncio.gather(*(call() for call in calls), return_exceptions=True)


def in_time(call, seconds: float | None, who: str):
    """What call() returns or raises, or a RewardError that it took too long.

    The thread dies with the process, so a hung one holds nothing up.
    """
    box = queue.SimpleQueue()

    def work():
        box.put(outcome(call))

    threading.Thread(target=work, daemon=True).start()
    try:
        return box.get(timeout=seconds)
    except queue.Empty:
        raise RewardError(
            f"{who} took more than {seconds:g} seconds: make it faster, or raise reward_timeout"
        ) from None


def outcome(call):
    """What call() returns, or the exception that it raises."""
    try:
        return call()
    except BaseException as e:  # sys.exit() in a reward as well: whatever it is, it is the reward's failure
        return e


def failure(label: str, function, error: BaseException, reward_messages: bool) -> RewardError:
    """One sentence about what a reward raised, where, and what may help."""
    if isinstance(error, RewardError) and error.__traceback__ is None:  # the runner's own: it took too long
        return error
    sentence = f"reward {label!r} raised {type(error).__name__}: {short(error)}"
    return RewardError(sentence + place(function, error) + advice(error, reward_messages))


def place(function, error: BaseException) -> str:
    """ " (configs/mine.py, line 12)": the last line of the reward's own file on the way to its error."""
    frames = traceback.extract_tb(error.__traceback__)
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    own = [frame for frame in frames if code and frame.filename == code.co_filename]
    frames = own or [frame for frame in frames if frame.filename != __file__]
    if not frames and not code:
        return ""
    # asyncio drops the way to a cancellation: then it is the line where the reward begins.
    file, line = (
        (frames[-1].filename, frames[-1].lineno) if frames else (code.co_filename, code.co_firstlineno)
    )
    if file.startswith(os.getcwd() + os.sep):
        file = os.path.relpath(file)
    return f" ({file}, line {line})"


# What Python says to c[0]["content"] and the like where c is text, and to text functions given messages.
WANTS_MESSAGES = (
    "string indices must be integers",
    "string index out of range",
    "'str' object has no attribute",
)
WANTS_TEXT = ("expected string or bytes-like object, got 'list'", "'list' object has no attribute")


def advice(error: BaseException, reward_messages: bool) -> str:
    """What to try where a reward seems to want messages and got text, or the other way round."""
    said = str(error)
    if not reward_messages and said.startswith(WANTS_MESSAGES):
        return (
            "; it got text and seems to want messages: set reward_messages=True, which gives completions and "
            "prompts as messages where a row's prompt is a list of them"
        )
    if reward_messages and said.startswith(WANTS_MESSAGES):
        return "; this row's prompt is text and not a list of messages, and then its completion is text too"
    if reward_messages and said.startswith(WANTS_TEXT):
        return "; it got messages and seems to want text: leave reward_messages out"
    return ""


def checked(label: str, result, N: int) -> list[float]:
    """N floats, NaN for None, of what a reward returned; RewardError for anything else."""
    has_length = hasattr(result, "__len__")
    if isinstance(result, (str, dict)) or not has_length or len(result) != N:
        size = f"{len(result)} values" if has_length else "no list"
        raise RewardError(
            f"reward {label!r} returned {size} for {N} completions: "
            f"it must return a list with a number or None for each ({short(result)})"
        )
    return [math.nan if x is None else finite(label, row, x) for row, x in enumerate(result)]


def finite(label: str, row: int, x) -> float:
    """x as a float; RewardError where it is no finite number."""
    number = math.nan
    if not isinstance(x, (str, bytes)):
        try:
            number = float(x)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f"reward {label!r} gave {short(x)} for row {row}: a finite number is wanted, "
            "or None for 'cannot be scored'"
        )
    return number
