"""Tasks: where rows come from, in which order, and how a prompt becomes token ids.

    task = load_task("gsm8k", data_dir="data")
    rows = task.batch(step, 8, seed)                         # the 8 rows of a training step: a function of (seed, step)
    ids = prompt_ids(tokenizer, rows[0]["prompt"])           # through the chat template, once

A row is a dict with a `prompt` (text, or a list of chat messages) and any columns: rewards get every column, `solution` is the text
that supervised warm-up imitates. A new task is one function that returns a Task, and its name in TASKS.

There is no shuffle state and no iterator: row i of a run is computed from (seed, i), so a run that is resumed, or split over other
processes, sees the same rows.
"""
import dataclasses
import difflib
import functools
import hashlib
import http.client
import inspect
import json
import os
import re
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows to train on and rows to be judged on. `train` is a sequence of rows, or an endless function (seed, index) -> row."""

    name: str
    train: Sequence[dict] | Callable[[int, int], dict]
    eval: list[dict]
    seed: int = 0

    def batch(self, step: int, n: int, seed: int | None = None) -> list[dict]:
        """The n rows of training step `step` (from 0). Finite data comes in epochs, each in an order of its own that has every row once."""
        seed = int(self.seed if seed is None else seed)  # a numpy integer would hash differently
        numbers = range(step * n, (step + 1) * n)
        if callable(self.train):
            return [self.train(seed, i) for i in numbers]
        size = len(self.train)
        return [self.train[permutation(seed, i // size, size)[i % size]] for i in numbers]

    def epoch(self, step: int, n: int) -> float:
        """How often every row has been seen when `step` steps of n rows are done; 0 for endless data."""
        return 0.0 if callable(self.train) else step * n / len(self.train)


@functools.lru_cache(maxsize=4)  # a batch may lie across two epochs, and the warm-up has a seed of its own
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch, (size,): the ranks of raw Philox output, which numpy never changes, as it may Generator.permutation."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def columns(rows: list[dict], group_size: int) -> dict[str, list]:
    """Column -> its N = len(rows) * group_size values, each row's repeated for its group; None where a row lacks the column."""
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")  # a set that keeps the order
    return {name: [row.get(name) for row in rows for _ in range(group_size)] for name in names}


# ---------------------------------------------------------------------------------------------------------------- the tasks
def load_task(name: str, *, data_dir: str = "data", seed: int = 0, train_file: str | None = None, eval_file: str | None = None,
              eval_problems: int = 200, **options) -> Task:
    """The task called `name` in TASKS. A file or an option that it does not take, or a wrong one, is a ValueError: one sentence."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{nearest(name, TASKS)}")
    options |= {key: path for key, path in (("train_file", train_file), ("eval_file", eval_file)) if path}
    takes = [key for key in inspect.signature(TASKS[name]).parameters if key not in ("data_dir", "eval_problems")]
    if wrong := [key for key in options if key not in takes]:
        raise ValueError(f"the task {name!r} takes no {wrong[0]!r}{nearest(wrong[0], takes)}")
    return Task(name, *TASKS[name](data_dir=data_dir, eval_problems=eval_problems, **options), seed)


def nearest(name: str, known) -> str:
    near = difflib.get_close_matches(str(name), known, 1, 0.5)
    return (f", did you mean {near[0]!r}?" if near else "") + f" (known: {', '.join(known) or 'none'})"


def arithmetic(*, data_dir, eval_problems, style="chars", digits=3, low=None, high=None, worked_share=0.3, held_out=0.1):
    """Sums of two numbers from low to high (by default those with `digits` digits), made up as they are needed, without end.

    style "chars": prompt "347+585=" for a character model that starts from nothing. A share of the demonstrations is `worked`, the others
    are the bare answer. style "words": "What is 347 + 585?" for a chat model. A share `held_out` of the pairs is never trained on.
    """
    low = (10 ** (digits - 1) if digits > 1 else 0) if low is None else low
    high = 10**digits - 1 if high is None else high
    if style not in ("chars", "words") or not 0 <= low <= high or not 0 < held_out <= 0.9:
        raise ValueError(f"arithmetic needs style='chars' or 'words', 0 <= low <= high, 0 < held_out <= 0.9; got {style!r}, {low}, {high}, {held_out}")
    make = functools.partial(sum_row, low=low, high=high, style=style, worked_share=worked_share, held_out=held_out)
    # In draws that do not depend on the run's seed. A small range has fewer held-out pairs than were asked for: then about all are found.
    draws = (make("held out", i, wanted=True, tries=1) for i in range(int((500 + 2 * eval_problems) / held_out)))
    rows = list({row["prompt"]: row for row in draws if row}.values())[:eval_problems]  # no problem twice
    if not rows or not make(0, 0):
        raise ValueError(f"there are too few sums from {low} to {high} to hold out a share of {held_out}: widen low and high, or change held_out")
    return make, rows


def sum_row(seed, index, *, low, high, style, worked_share, held_out, wanted=False, tries=10_000):
    """Row `index` of the sums of `seed`: the first of its draws that is held out or not, as `wanted`. None if no draw is."""
    for attempt in range(tries):
        u = hashed(seed, index, attempt)
        a, u = low + u % (high - low + 1), u // (high - low + 1)
        b, u = low + u % (high - low + 1), u // (high - low + 1)
        # Held out is a property of the pair alone, whatever the seed; b + a goes with a + b, or its twin would give it away.
        if (hashed(min(a, b), max(a, b)) % 10**6 < held_out * 10**6) == wanted:
            if style == "words":
                return dict(prompt=f"What is {a} + {b}?", answer=str(a + b), solution=f"{a} + {b} = {a + b}")
            work = worked(a, b) if u % 10**6 < worked_share * 10**6 else ""
            return dict(prompt=f"{a}+{b}=", answer=str(a + b), solution=f"{work}{a + b}")
    return None


def hashed(*key) -> int:
    """256 bits that depend on the key and nothing else: not on the process, as hash() does, nor on a library's version."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=32).digest(), "little")


def worked(a: int, b: int) -> str:
    """347 + 585 -> "<75_=^2,48^=^3,35^=_9>": column by column from the right; digit, digit, carry in = carry out, digit of the sum.

    "^" is a carry and "_" none. Every column has the same six characters, so each character is a copy from a fixed distance or a sum of what
    stands just before it, and the answer that follows is the last digits read backwards. A small transformer learns such local rules first.
    Carries are no digits, because with 0 and 1 it looked for them among the digits and misread 0s and 1s of the second column.
    """
    steps, carry, width = [], 0, len(str(max(a, b)))
    for x, y in zip(reversed(f"{a:0{width}}"), reversed(f"{b:0{width}}")):
        total = int(x) + int(y) + carry
        steps.append(f"{x}{y}{'_^'[carry]}={'_^'[total // 10]}{total % 10}")
        carry = total // 10
    return f"<{','.join(steps)}>"


COUNTDOWN = ("Use the numbers {numbers}, each exactly once, to make {target}. You may use + - * / and parentheses. "
             "End with the expression between <answer> and </answer>, for example <answer>(1 + 2) * 3</answer>.")


def countdown(*, data_dir, eval_problems, least=3, most=4, high=25, largest=100, held_out=0.1, prompt=COUNTDOWN):
    """Numbers and a target to make of them, each solvable, made up as they are needed, without end (after arXiv:2504.01848 and TinyZero).

    From `least` to `most` numbers of 1 to `high`; a target of at most `largest`, reached over whole positive numbers. A share `held_out` of the problems
    is never trained on. `solution` is one of the ways, which the reward does not ask for.
    """
    if not 2 <= least <= most <= 6 or not 2 <= high <= largest or not 0 < held_out <= 0.9:
        raise ValueError(f"countdown needs 2 <= least <= most <= 6, 2 <= high <= largest, 0 < held_out <= 0.9; got {least}, {most}, {high}, {largest}, {held_out}")
    make = functools.partial(countdown_row, least=least, most=most, high=high, largest=largest, held_out=held_out, prompt=prompt)
    rows = {}
    for row in filter(None, (make("held out", i, wanted=True) for i in range(4 * eval_problems))):
        rows.setdefault((*sorted(row["numbers"]), row["target"]), row)  # no problem twice, in whatever order its numbers are
    if not rows or not make(0, 0):
        raise ValueError(f"there are too few problems of {least} to {most} numbers up to {high}: widen them, or change held_out")
    return make, list(rows.values())[:eval_problems]


def countdown_row(seed, index, *, least, most, high, largest, held_out, prompt, wanted=False, tries=10_000):
    """Problem `index` of `seed`: the first of its draws that works out and is held out or not, as `wanted`. None if no draw is."""
    for attempt in range(tries):
        u = hashed("countdown", seed, index, attempt)
        k, u = least + u % (most - least + 1), u // (most - least + 1)
        numbers = [1 + (u := u // high) % high for _ in range(k)]
        terms = [(n, str(n)) for n in numbers]
        while len(terms) > 1 and terms[-1][0]:  # any two become one, until one is left or a step does not work out
            (a, left), (b, right) = (terms.pop((u := u // 7) % len(terms)) for _ in range(2))
            op = "+-*/"[(u := u // 7) % 4]
            value = dict(zip("+-*/", (a + b, max(0, a - b), a * b, 0 if a % b else a // b)))[op]
            terms.append((value, f"({left} {op} {right})"))
        target, expression = terms[-1]
        # Held out is a property of the problem alone, whatever the seed and the order of its numbers.
        if len(terms) == 1 and 0 < target <= largest and target not in numbers and (hashed(sorted(numbers), target) % 10**6 < held_out * 10**6) == wanted:
            return dict(prompt=prompt.format(numbers=", ".join(map(str, numbers)), target=target), numbers=numbers, target=target,
                        solution=f"<answer>{expression[1:-1]}</answer>")
    return None


GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
GSM8K_ROWS = {"train.jsonl": 7473, "test.jsonl": 1319}


def gsm8k(*, data_dir, eval_problems):
    """Grade-school word problems (arXiv:2110.14168) from data_dir or data_dir/gsm8k; where they are not, downloaded once to the latter."""
    train, test = (gsm8k_file(data_dir, name) for name in GSM8K_ROWS)
    return train, test[:eval_problems]


def gsm8k_file(data_dir: str, name: str) -> list[dict]:
    path = Path(data_dir, "gsm8k", name)
    for there in filter(Path.exists, (path, Path(data_dir, name))):
        return gsm8k_rows(there.read_bytes(), there, "move it away to have GSM8K downloaded, or put the whole file there")
    url, part = f"{GSM8K_URL}/{name}", path.with_suffix(f".{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()  # raises where fewer bytes come than were announced
        rows = gsm8k_rows(content, path, f"{url} did not send the whole file, try again")
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)  # the final name is only ever given to a whole file, also when several processes download
    except (OSError, http.client.HTTPException) as e:
        raise ValueError(f"cannot download {url} ({e!r}): put that file and its neighbour, {' and '.join(GSM8K_ROWS)}, into {path.parent}") from e
    return rows


def gsm8k_rows(content: bytes, path: Path, remedy: str) -> list[dict]:
    """Rows of a GSM8K file. A file that is not whole is refused: training on part of it would go unnoticed."""
    wanted, rows = GSM8K_ROWS[path.name], []
    try:
        for line in content.splitlines():  # bytes are split at line ends only, text at U+2028 too
            row = json.loads(line)
            text = re.sub(r"<<.*?>>", "", row["answer"])  # notes to a calculator that no reader sees
            steps, number = re.fullmatch(r"(.*)#### (-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*", text, re.DOTALL).groups()
            answer = number.replace(",", "")
            rows.append(dict(prompt=row["question"], answer=answer, solution=f"{steps}#### {answer}", question=row["question"]))
    except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, no such column, no such text
        raise ValueError(f"{path} is broken in row {len(rows) + 1} of {wanted}: {remedy}") from None
    if len(rows) != wanted:
        raise ValueError(f"{path} has {len(rows)} rows and GSM8K has {wanted}: {remedy}")
    return rows


def jsonl(*, data_dir, eval_problems, train_file=None, eval_file=None):
    """Any file with one JSON object a line and a `prompt` in each; every other column is kept for the rewards.

    Without eval_file the last tenth of the rows, at most eval_problems, is held out and not trained on.
    """
    if not train_file:
        raise ValueError("the task 'jsonl' needs train_file=FILE, one JSON object with a `prompt` a line")
    return from_jsonl(dict, data_dir, eval_problems, train_file, eval_file)


def math(*, data_dir, eval_problems, train_file="math/train.jsonl", eval_file=None):
    """Problems with a `problem` and an `answer`, or a `solution` that ends in \\boxed{answer}, as MATH has them (arXiv:2103.03874): one a line."""
    return from_jsonl(as_math, data_dir, eval_problems, train_file, eval_file)


def as_math(row: dict) -> dict:
    return dict(row, prompt=row.get("prompt") or row["problem"], answer=row["answer"] if "answer" in row else row["solution"])


PROBLEMS = Path(__file__).resolve().parent / "configs" / "code.jsonl"


def code(*, data_dir, eval_problems, train_file=str(PROBLEMS), eval_file=None, show=1):
    """Problems with a `prompt` and `tests` (what sandbox.check takes); by default the small set made for this repository. MBPP's columns will do too.

    show: how many of the tests the prompt shows, since a text rarely says what the function is called.
    """
    return from_jsonl(functools.partial(as_code, show=show), data_dir, eval_problems, train_file, eval_file)


def as_code(row: dict, show: int) -> dict:
    setup = "\n".join([*row.get("test_imports", []), row.get("test_setup_code") or ""]).strip()
    tests = row.get("tests") or row["test_list"]
    shown = "".join(f"\n{t}" for t in tests[:show] if isinstance(t, str))
    tests = [f"{setup}\n{t}" if setup and isinstance(t, str) else t for t in tests]
    return dict(row, prompt=(row.get("prompt") or row["text"]) + (f"\n\nIt must pass tests such as:{shown}" if shown else ""), tests=tests)


def from_jsonl(convert, data_dir, eval_problems, train_file, eval_file):
    """Train and eval rows of jsonl's files, each made by convert(row)."""
    train = read_jsonl(train_file, data_dir, 1 if eval_file else 2, convert)
    if eval_file:
        return train, read_jsonl(eval_file, data_dir, 1, convert)[:eval_problems]
    n = max(1, min(len(train) // 10, eval_problems))
    return train[:-n], train[-n:]


def read_jsonl(path: str, data_dir: str, least: int, convert=dict) -> list[dict]:
    """Rows of a file, looked for as it is named and in data_dir, each made by convert(row). ValueError names the line that cannot be used."""
    found = next(filter(Path.is_file, (Path(path), Path(data_dir, path))), None)
    if found is None:
        raise ValueError(f"there is no file {path}, nor {Path(data_dir, path)}")
    rows, lines = [], enumerate(found.read_bytes().split(b"\n"), 1)
    for number, line in ((n, text) for n, text in lines if text.strip()):
        try:
            row = json.loads(line)
            row = convert(row) if isinstance(row, dict) else row
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{found}, line {number}: not JSON ({e})") from None
        except (KeyError, TypeError) as e:
            raise ValueError(f"{found}, line {number}: has no usable column {e}") from None
        if not isinstance(row, dict) or not is_prompt(row.get("prompt")):
            raise ValueError(f'{found}, line {number}: needs a `prompt`, text or [{{"role": "user", "content": "text"}}, ..], and is {row!r:.150}')
        rows.append(row)
    if len(rows) < least:
        raise ValueError(f"{found} has {len(rows)} rows, and {least} are needed, one of them to be held out where there is no eval_file")
    return rows


def is_prompt(prompt) -> bool:
    """Text, or messages with a role and text, and not empty."""
    if isinstance(prompt, list):
        return prompt != [] and all(isinstance(m, dict) and type(m.get("role")) is type(m.get("content")) is str for m in prompt)
    return isinstance(prompt, str) and prompt != ""


TASKS = {"arithmetic": arithmetic, "countdown": countdown, "gsm8k": gsm8k, "math": math, "code": code, "jsonl": jsonl}


# -------------------------------------------------------------------------------------------------------- from text to tokens
def prompt_ids(tokenizer, prompt, *, system: str = "", prefill: str = "") -> list[int]:
    """Ids of a prompt (text or messages), after a system message and up to and with `prefill`, the start of the answer.

    With a chat template the ids are the template's own, never those of its text tokenised again: that is where a second BOS comes from.
    Without one: system, blank line, prompt and prefill as one text. ValueError: empty, or not what template or tokenizer can take.
    """
    messages = [dict(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    if system and all(m["role"] != "system" for m in messages):
        messages.insert(0, dict(role="system", content=system))
    if tokenizer.chat_template:
        from jinja2 import TemplateError

        goes_on = messages[-1]["role"] == "assistant"  # the row brings the start of its answer: no new turn
        try:
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=not goes_on, continue_final_message=goes_on)
        except TemplateError as e:  # some have no system role
            raise ValueError(f"the tokenizer's chat template refuses the prompt with roles {', '.join(m['role'] for m in messages)}: {e}") from e
        ids += encode(tokenizer, prefill) if prefill else []
    else:
        text = "".join(m["content"] + "\n\n" for m in messages if m["role"] == "system")
        text += "\n".join(m["content"] for m in messages if m["role"] != "system") + prefill
        ids = encode(tokenizer, text, special=True)
        if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
            ids = ids[:-1]  # some tokenizers end every text with the stop token: an answer must not begin after it
    assert all(type(i) is int for i in ids), f"the tokenizer gave {type(ids).__name__} of {type(ids[0]).__name__}, not ids"
    if not ids:
        raise ValueError("a prompt is empty: a model needs one token at least to go on from")
    return ids


def encode(tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Ids of a text, with the tokenizer's own BOS and the like where `special`. ValueError names characters it does not know."""
    try:
        return tokenizer.encode(text, add_special_tokens=special)
    except Exception as e:  # tokenizers raises nothing narrower
        unknown = "".join(c for c in dict.fromkeys(text) if c not in tokenizer.get_vocab())
        raise ValueError(f"the tokenizer cannot encode {text!r:.80}: its alphabet lacks the characters {unknown!r} ({e})") from e


def char_tokenizer(alphabet: str):
    """A tokenizer with an id a character, after <pad> = 0 and <eos> = 1, the stop. It saves and loads as any Hugging Face tokenizer.

    There is no <unk>: a character it does not know is an error (see `encode`), not a token that means everything.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast  # here, because importing transformers takes seconds

    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"an alphabet must have every character once, and {alphabet!r} has not")
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # a name that is not in the vocabulary
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()  # the default puts spaces between tokens
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False)


def stop_ids(tokenizer, folder: str | None = None) -> list[int]:
    """All ids that end an answer: the tokenizer's, then those of generation_config.json and config.json in the checkpoint folder.

    Chat models often have two, one that ends a turn and one that ends a text, each named in another file.
    """
    found = [tokenizer.eos_token_id]
    files = [Path(folder, name) for name in ("generation_config.json", "config.json")] if folder else []
    for path in filter(Path.exists, files):
        ids = json.loads(path.read_text()).get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    if not (found := list(dict.fromkeys(i for i in found if i is not None))):  # no id twice, in this order
        raise ValueError(f"no stop token: neither the tokenizer nor a config in {folder} has an eos_token_id; set the tokenizer's eos_token")
    return found
