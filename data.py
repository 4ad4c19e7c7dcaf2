"""Tasks: where rows come from, in which order, and how a prompt becomes token ids.

    task = load_task("gsm8k", data_dir="data")
    rows = task.batch(step, 8, seed)                         # the 8 rows of a training step
    ids = prompt_ids(tokenizer, rows[0]["prompt"])           # through the chat template, once

A row is a dict with a `prompt` (text, or a list of chat messages) and any columns: rewards get every column,
and `solution` is the text that supervised warm-up imitates.

A new task is one function, named in TASKS or given as `task` in a config file:

    def task(*, data_dir, eval_problems, **options):
        return train, eval_rows          # train: a list of rows, or an endless function (seed, index) -> row

This file holds what all tasks share, and the two that need nothing else, gsm8k and jsonl. A task that grades
in a way of its own has a file in tasks/, its rows and its reward together. Those files import this one;
load_task imports them by name, when they are asked for.

There is no shuffle state and no iterator: row i of a run is computed from (seed, i), so a run that is
resumed, or split over other processes, sees the same rows.
"""

import dataclasses
import difflib
import functools
import hashlib
import http.client
import importlib
import inspect
import json
import math
import os
import re
import urllib.request
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np


class RewardError(Exception):
    """A reward did what it must not. The message is one sentence that names it, the row and the value."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows to train on, a sequence or an endless function (seed, index) -> row, and rows to be judged on."""

    name: str
    train: Sequence[dict] | Callable[[int, int], dict]
    eval: list[dict]
    seed: int = 0

    def batch(self, step: int, n: int, seed: int | None = None) -> list[dict]:
        """The n rows of training step `step` (from 0).

        Finite data comes in epochs, each in an order of its own that has every row once.
        """
        seed = int(self.seed if seed is None else seed)  # a numpy integer would hash differently
        numbers = range(step * n, (step + 1) * n)
        if callable(self.train):
            return [self.train(seed, i) for i in numbers]
        rows = []
        size = len(self.train)
        for i in numbers:
            epoch, place = divmod(i, size)
            rows.append(self.train[permutation(seed, epoch, size)[place]])
        return rows

    def epoch(self, step: int, n: int) -> float:
        """How often every row has been seen when `step` steps of n rows are done; 0 for endless data."""
        if callable(self.train):
            return 0.0
        return step * n / len(self.train)


@functools.lru_cache(maxsize=4)  # a batch may lie across two epochs, and the warm-up has a seed of its own
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch, (size,).

    It is the ranks of raw Philox output, which numpy promises never to change, as it may change
    Generator.permutation: then a resumed run would see other rows after an update of numpy.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def columns(rows: list[dict], group_size: int) -> dict[str, list]:
    """Column -> its N = len(rows) * group_size values, each row's repeated for its group.

    None where a row lacks the column.
    """
    names = dict.fromkeys(
        name for row in rows for name in row if name != "prompt"
    )  # a set that keeps the order
    return {name: [row.get(name) for row in rows for _ in range(group_size)] for name in names}


# ----------------------------------------------------------------------------------- a task by its name
def load_task(
    task: str | Callable,
    *,
    data_dir: str = "data",
    seed: int = 0,
    train_file: str | None = None,
    eval_file: str | None = None,
    eval_problems: int = 200,
    **options,
) -> Task:
    """The Task of a name in TASKS, or of a function of a config file (see the top of this file).

    A file or an option that it does not take, or a wrong one, is a ValueError: one sentence.
    """
    if train_file:
        options["train_file"] = train_file
    if eval_file:
        options["eval_file"] = eval_file
    if callable(task):
        name = name_of(task)
        check_options(name, task, options)
        made = task(data_dir=data_dir, eval_problems=eval_problems, **options)
        train, eval_rows = checked_rows(name, made)
    else:
        name = task
        make = task_function(name)
        check_options(name, make, options)
        try:
            train, eval_rows = make(data_dir=data_dir, eval_problems=eval_problems, **options)
        except TypeError as error:  # text where a number is wanted, and the like
            raise ValueError(f"task_options = {options} cannot be meant for {name!r}: {error}") from error
    return Task(name, train, eval_rows, seed)


def task_function(name: str) -> Callable:
    """The function that TASKS has for a name, imported where it only names a module."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{nearest(name, TASKS)}")
    entry = TASKS[name]
    if callable(entry):
        return entry
    return importlib.import_module(entry).task


def check_options(name: str, make: Callable, options: dict):
    """ValueError where the function of a task does not take what it would be called with."""
    parameters = inspect.signature(make).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    takes = [p.name for p in parameters]
    for key in ("data_dir", "eval_problems"):
        if key not in takes:
            raise ValueError(
                f"a task is a function (*, data_dir, eval_problems), and {name!r} takes no {key!r}"
            )
        takes.remove(key)
    for key in options:
        if key not in takes:
            raise ValueError(f"the task {name!r} takes no {key!r}{nearest(key, takes)}")


def checked_rows(name: str, made) -> tuple:
    """What a config file's function returned, (train, eval rows); ValueError where it is something else."""
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise ValueError(f"the task {name!r} must return (train, eval_rows), and returned {short(made)}")
    train, eval_rows = made
    if not (callable(train) or isinstance(train, Sequence)) or not isinstance(eval_rows, Sequence):
        raise ValueError(
            f"the task {name!r} must return lists of rows, or for train a function (seed, index) -> row, "
            f"and returned {short(made)}"
        )
    some = [train(0, 0)] if callable(train) else train
    if not some:
        raise ValueError(f"the task {name!r} returned no rows to train on")
    for row in [*some, *eval_rows]:
        if not isinstance(row, dict) or not is_prompt(row.get("prompt")):
            raise ValueError(
                f"the task {name!r} made a row without a `prompt`, text or messages: {short(row)}"
            )
    return train, list(eval_rows)


def is_prompt(prompt) -> bool:
    """Text, or messages with a role and text, and not empty."""
    if isinstance(prompt, list):
        return prompt != [] and all(is_message(message) for message in prompt)
    return isinstance(prompt, str) and prompt.strip() != ""


def is_message(message) -> bool:
    if not isinstance(message, dict):
        return False
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def nearest(name: str, known) -> str:
    """What an error sentence says after an unknown name: the nearest known one, and all of them."""
    near = difflib.get_close_matches(str(name), known, 1, 0.5)
    guess = f", did you mean {near[0]!r}?" if near else ""
    return f"{guess} (known: {', '.join(known) or 'none'})"


def name_of(function) -> str:
    """A function's name, without the brackets of <lambda> and the partial around it, or a class's."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__).strip("<>")


def short(value) -> str:
    """A value on one line of an error sentence, 160 characters at most: arrays and messages may have many."""
    text = str(value) if isinstance(value, BaseException) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:160] + ".."


# ---------------------------------------------------------------------------- for rows that are made up
def hashed(*key) -> int:
    """256 bits that depend on the key alone: not on the process, as hash() does, nor on a library."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=32).digest(), "little")


def is_held_out(share: float, *problem) -> bool:
    """Whether a problem is in the held-out share: its own property, whatever the seed of the run."""
    return hashed(*problem) % 10**6 < share * 10**6


# ------------------------------------------------------------------------------------------------ GSM8K
GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
GSM8K_ROWS = {"train.jsonl": 7473, "test.jsonl": 1319}
SOLUTION = re.compile(r"(.*)#### (-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*", re.DOTALL)  # the steps, then the answer


def gsm8k(*, data_dir, eval_problems, calculator=False):
    """Grade-school word problems (arXiv:2110.14168) from data_dir or data_dir/gsm8k.

    Where they are not, they are downloaded once, to the latter. calculator: the solutions, for a warm-up, are
    conversations with tasks/calculator.py, made of the data's own notes.
    """
    train = gsm8k_file(data_dir, "train.jsonl", calculator)
    test = gsm8k_file(data_dir, "test.jsonl", calculator)
    return train, test[:eval_problems]


def gsm8k_file(data_dir: str, name: str, calculator=False) -> list[dict]:
    """Rows of GSM8K's file `name`, from where it is or from the web."""
    path = Path(data_dir, "gsm8k", name)
    for there in (path, Path(data_dir, name)):
        if there.exists():
            remedy = "move it away to have GSM8K downloaded, or put the whole file there"
            return gsm8k_rows(there.read_bytes(), there, remedy, calculator)
    url = f"{GSM8K_URL}/{name}"
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()  # raises where fewer bytes come than were announced
        rows = gsm8k_rows(content, path, f"{url} did not send the whole file, try again", calculator)
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)  # only a whole file ever has the final name, also when several processes download
    except (OSError, http.client.HTTPException) as e:
        files = " and ".join(GSM8K_ROWS)
        raise ValueError(
            f"cannot download {url} ({e!r}): put that file and its neighbour, {files}, into {path.parent}"
        ) from e
    return rows


def gsm8k_rows(content: bytes, path: Path, remedy: str, calculator=False) -> list[dict]:
    """Rows of a GSM8K file. Part of a file is refused: training on it would go unnoticed."""
    wanted = GSM8K_ROWS[path.name]
    rows = []
    try:
        for line in content.splitlines():  # bytes are split at line ends only, text at U+2028 too
            rows.append(gsm8k_row(json.loads(line), calculator))
    except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, no such column, no such text
        raise ValueError(f"{path} is broken in row {len(rows) + 1} of {wanted}: {remedy}") from None
    if len(rows) != wanted:
        raise ValueError(f"{path} has {len(rows)} rows and GSM8K has {wanted}: {remedy}")
    return rows


def gsm8k_row(row: dict, calculator=False) -> dict:
    question = row["question"]
    text = re.sub(r"<<.*?>>", "", row["answer"])  # notes to a calculator that no reader sees
    steps, number = SOLUTION.fullmatch(text).groups()
    answer = number.replace(",", "")
    solution = f"{steps}#### {answer}"
    if calculator:
        from tasks.calculator import conversation  # which imports this file

        solution = conversation(row["answer"])
    return dict(prompt=question, answer=answer, solution=solution, question=question)


# ---------------------------------------------------------------------------------------- files of rows
def jsonl(*, data_dir, eval_problems, train_file=None, eval_file=None):
    """Any file with one JSON object a line and a `prompt` in each.

    Every other column is kept for the rewards. Without eval_file the last tenth of the rows, at most
    eval_problems, is held out and not trained on.
    """
    if not train_file:
        raise ValueError("the task 'jsonl' needs train_file=FILE, one JSON object with a `prompt` a line")
    return from_jsonl(dict, data_dir, eval_problems, train_file, eval_file)


def from_jsonl(convert, data_dir, eval_problems, train_file, eval_file):
    """Train and eval rows of jsonl's files, each made by convert(row)."""
    if eval_file:
        train = read_jsonl(train_file, data_dir, 1, convert)
        return train, read_jsonl(eval_file, data_dir, 1, convert)[:eval_problems]
    train = read_jsonl(train_file, data_dir, 2, convert)
    held_out = max(1, min(len(train) // 10, eval_problems))
    return train[:-held_out], train[-held_out:]


def read_jsonl(path: str, data_dir: str, least: int, convert=dict) -> list[dict]:
    """Rows of a file, looked for as it is named and in data_dir, each made by convert(row).

    ValueError names the line that cannot be used, and a file with fewer than `least` rows.
    """
    places = [Path(path), Path(data_dir, path)]
    found = next(filter(Path.is_file, places), None)
    if found is None:
        raise ValueError(f"there is no file {path}, nor {places[1]}")
    rows = []
    for number, line in enumerate(found.read_bytes().split(b"\n"), 1):
        if line.strip():
            rows.append(jsonl_row(line, convert, where=f"{found}, line {number}"))
    if len(rows) < least:
        raise ValueError(
            f"{found} has {len(rows)} rows, and {least} are needed, "
            "one of them to be held out where there is no eval_file"
        )
    return rows


def jsonl_row(line: bytes, convert, where: str) -> dict:
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            row = convert(row)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: not JSON ({e})") from None
    except (KeyError, TypeError) as e:
        raise ValueError(f"{where}: has no usable column {e}") from None
    if not isinstance(row, dict) or not is_prompt(row.get("prompt")):
        wanted = 'text or [{"role": "user", "content": "text"}, ..]'
        raise ValueError(f"{where}: needs a `prompt`, {wanted}, and is {row!r:.150}")
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON has none, and Python reads them
            raise ValueError(f"{where}: `{name}` is {value}, which no answer equals: correct or drop the row")
    if isinstance(row["prompt"], list):
        refuse_roles([message["role"] for message in row["prompt"]], where)
    return row


ROLES = ("system", "developer", "user", "assistant", "tool")


def refuse_roles(roles: list[str], where: str):
    """ValueError for a role that no chat template knows, and for messages that nobody would answer."""
    for role in roles:
        if role not in ROLES:
            raise ValueError(f"{where}: the role {role!r} is unknown: it is one of {', '.join(ROLES)}")
    if roles[-1] in ("system", "developer"):
        raise ValueError(f"{where}: the messages end with {roles[-1]!r}: the last one is what is answered")


TASKS = {  # name -> the function that makes its rows, or the module that holds it as `task`
    "arithmetic": "tasks.arithmetic",
    "countdown": "tasks.countdown",
    "guess": "tasks.guess",
    "gsm8k": gsm8k,
    "math": "tasks.math",
    "code": "tasks.code",
    "jsonl": jsonl,
}


# ---------------------------------------------------------------------------------- from text to tokens
def prompt_ids(tokenizer, prompt, *, system: str = "", prefill: str = "") -> list[int]:
    """Ids of a prompt (text or messages).

    They begin with a system message and end with `prefill`, the start of the answer.
    With a chat template the ids are the template's own, never those of its text tokenised again: that is
    where a second BOS comes from. Without one: system, blank line, prompt and prefill as one text.
    ValueError: empty, or not what template or tokenizer can take.
    """
    messages = [dict(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    if system and all(m["role"] != "system" for m in messages):
        messages.insert(0, dict(role="system", content=system))
    if tokenizer.chat_template:
        ids = chat_ids(tokenizer, messages)
        if prefill:
            ids += encode(tokenizer, prefill)
    else:
        ids = plain_ids(tokenizer, messages, prefill)
    assert all(type(i) is int for i in ids), (
        f"the tokenizer gave {type(ids).__name__} of {type(ids[0]).__name__}, not ids"
    )
    if not ids:
        raise ValueError("a prompt is empty: a model needs one token at least to go on from")
    return ids


def chat_ids(tokenizer, messages: list[dict]) -> list[int]:
    """Ids that the tokenizer's chat template gives, up to where the answer begins."""
    from jinja2 import TemplateError

    goes_on = messages[-1]["role"] == "assistant"  # the row brings the start of its answer: no new turn
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
        )
    except TemplateError as e:  # some have no system role
        roles = ", ".join(m["role"] for m in messages)
        raise ValueError(f"the tokenizer's chat template refuses the prompt with roles {roles}: {e}") from e


def plain_ids(tokenizer, messages: list[dict], prefill: str) -> list[int]:
    """Ids of the messages as one text, for a tokenizer without a chat template."""
    system = "".join(m["content"] + "\n\n" for m in messages if m["role"] == "system")
    said = "\n".join(m["content"] for m in messages if m["role"] != "system")
    text = system + said + prefill
    ids = encode(tokenizer, text, special=True)
    # Some tokenizers end every text with the stop token, and an answer must not begin after it.
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids


def encode(tokenizer, text: str, *, special: bool = False, **options) -> list[int]:
    """Ids of a text, with the tokenizer's own BOS and the like where `special`. options: of its encode().

    ValueError names characters that it does not know.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=special, **options)
    except Exception as e:  # tokenizers raises nothing narrower
        known = tokenizer.get_vocab()
        unknown = "".join(c for c in dict.fromkeys(text) if c not in known)
        raise ValueError(
            f"the tokenizer cannot encode {text!r:.80}: its alphabet lacks the characters {unknown!r} ({e})"
        ) from e


def char_tokenizer(alphabet: str):
    """A tokenizer with an id a character, after <pad> = 0 and <eos> = 1, the stop.

    It saves and loads as any Hugging Face tokenizer. There is no <unk>: a character it does not know is an
    error (see `encode`), not a token that means everything.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast  # here, because importing transformers takes seconds

    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"an alphabet must have every character once, and {alphabet!r} has not")
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # a name that is not in the vocabulary
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()  # the default puts spaces between tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def stop_ids(tokenizer, folder: str | None = None) -> list[int]:
    """All ids that end an answer: the tokenizer's, then those of the checkpoint folder's two config files.

    Chat models often have two, one that ends a turn and one that ends a text, each named in another file.
    """
    found = [tokenizer.eos_token_id]
    files = [Path(folder, name) for name in ("generation_config.json", "config.json")] if folder else []
    for path in filter(Path.exists, files):
        ids = json.loads(path.read_text()).get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    stops = list(dict.fromkeys(i for i in found if i is not None))  # no id twice, in this order
    if not stops:
        raise ValueError(
            f"no stop token: neither the tokenizer nor a config in {folder} has an eos_token_id; "
            "set the tokenizer's eos_token"
        )
    return stops


# -------------------------------------------------------------------------- what graders read in a text
# A number: its sign, then 1,234,567 or 1234567, with or without decimals, or .5. A minus after a letter, a
# digit or ")" is not a sign: 5-3, x-3. int() and float() are no parsers for this: they take "٣", "1_000" and
# "nan"; and \d takes "٣" too. All counts are bounded and possessive (++), so that no text is slow.
SIGN = r"((?:(?<![\w)])[-+−])?)"
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,60}(?![0-9])|[0-9]{1,200}+)"
NUMBER = rf"{SIGN}\$?({DIGITS}(?:\.[0-9]{{1,200}}+)?|(?<![0-9])\.[0-9]{{1,200}}+)"
ANYWHERE = re.compile(NUMBER)
WHOLE = re.compile(rf"\s*\\?\$?{NUMBER}\s*%?\.?\s*")
# Words after a number that make another one of it: 72 million, 72 or more and 72 squared are not 72.
CHANGE_A_NUMBER = set(
    """k dozen hundred thousand million billion trillion dozens hundreds thousands millions billions trillions
    half halves third thirds fourth fourths fifth fifths tenth tenths hundredth hundredths thousandth
    thousandths quarter point or nor not squared cubed factorial power zero one two three four five six seven
    eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty
    forty fifty sixty seventy eighty ninety""".split()
)


def text_of(completion) -> str:
    """The text of a completion, which is a list of messages under reward_messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def prompt_text(prompt) -> str:
    """The text of a prompt, which may be a list of messages."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def transcript(messages) -> str:
    """A conversation for people: the model's turns as they are, each reply on a line behind its role."""
    lines = []
    for message in messages:
        who = "" if message["role"] == "assistant" else f"[{message['role']}] "
        lines.append(who + message["content"])
    return "\n".join(lines)


def exact(sign: str, digits: str) -> Decimal:
    """The exact number: 0.1 + 0.2 is not 0.3 in floats, and 72, 72.0 and 072 are one answer."""
    minus = "-" if sign in ("-", "−") else ""
    return Decimal(minus + digits.replace(",", ""))


def only_number(text: str) -> Decimal | None:
    """The number that a text is and nothing else: "72", "$1,234.50", "50%"."""
    match = WHOLE.fullmatch(text)
    return exact(*match.groups()) if match else None


def any_number(text: str) -> Decimal | None:
    """The last number of a text, looked for in the 200 characters before the last digit."""
    end = max(map(text.rfind, "0123456789")) + 1
    start = max(0, end - 200)
    last = None
    for match in ANYWHERE.finditer(text, start, end):
        last = match
    if last is None or last.start(2) == start > 0:  # the latter is the end of a number longer than that
        return None
    return exact(*last.groups())


def tagged(text: str) -> str:
    """What the last <answer>..</answer> holds, at most 300 characters of it; "" where there is none."""
    _, opened, rest = text.rpartition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    return inside.strip()[:300] if opened and closed else ""


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
