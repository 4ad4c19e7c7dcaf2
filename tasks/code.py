"""Programs: problems that come with tests, and the reward that runs what a model wrote, in tasks/sandbox.py.

    task = load_task("code", show=1)
    rewards = [("code", 1.0)]                                        # in a config file: configs/code.py

No text of a model is run in this process. The sandbox is imported where it is needed and nowhere else.
Tests: python -m pytest tests/test_tasks.py
"""

import functools
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

from data import from_jsonl, text_of

PROBLEMS = Path(__file__).resolve().parent.parent / "configs" / "code.jsonl"


# --------------------------------------------------------------------------------------------- the rows
def task(*, data_dir, eval_problems, train_file=str(PROBLEMS), eval_file=None, show=1):
    """Problems with a `prompt` and `tests` (what sandbox.check takes), or with the columns of MBPP.

    By default the small set made for this repository. show: how many of the tests the prompt shows, since a
    text rarely says what the function is called.
    """
    convert = functools.partial(code_row, show=show)
    return from_jsonl(convert, data_dir, eval_problems, train_file, eval_file)


def code_row(row: dict, show: int) -> dict:
    """A row with the setup of MBPP's columns in front of each test, and `show` tests in its prompt."""
    setup = "\n".join([*row.get("test_imports", []), row.get("test_setup_code") or ""]).strip()
    tests = row.get("tests") or row["test_list"]
    prompt = row.get("prompt") or row["text"]
    shown = "".join(f"\n{test}" for test in tests[:show] if isinstance(test, str))
    if shown:
        prompt += f"\n\nIt must pass tests such as:{shown}"
    if setup:
        tests = [f"{setup}\n{test}" if isinstance(test, str) else test for test in tests]
    return dict(row, prompt=prompt, tests=list(tests))


# ------------------------------------------------------------------------------------------- the reward
def code(
    completions,
    prompts=None,
    *,
    tests,
    names=None,
    all_or_nothing=False,
    seconds=4.0,
    memory_mb=512,
    workers=None,
    **_,
):
    """The share of the row's `tests` that the text's program passes in the sandbox; 0 without one.

    all_or_nothing: 1 if it passes all, else 0. tests: lists of what sandbox.check takes. A column `names`
    lists what they call that Python has under that name too. None: no tests, a test that is no Python, a
    sandbox that failed. seconds: of CPU for each program; all at their limit take N / workers times that.
    """
    from tasks import sandbox

    jobs = []
    asked = []  # the rows with a program and tests
    for n, completion in enumerate(completions):
        own_names = tuple(names[n] or ()) if names else ()
        called = names_called(sandbox, tests[n] or [], own_names)
        program = python_block(text_of(completion), called)
        if program and tests[n]:
            asked.append(n)
            jobs.append((program, tests[n], own_names))
    verdicts = sandbox.check_all(jobs, workers=workers, seconds=seconds, memory_mb=memory_mb)
    verdict_of = dict(zip(asked, verdicts))
    return [share_passed(tests[n], verdict_of.get(n), all_or_nothing) for n in range(len(completions))]


def names_called(sandbox, tests, own_names: tuple) -> list[str]:
    """What the statements among the tests ask of a program; [] where one is no Python."""
    statements = tuple(test for test in tests if isinstance(test, str))
    try:
        return sandbox.foreign(statements, own_names)[0]
    except (SyntaxError, ValueError):
        return []  # which the sandbox says too, and the score is None


def share_passed(tests, verdicts, all_or_nothing: bool) -> float | None:
    """The score for one program's verdicts: a list, an exception, or None if there is no program."""
    if not tests or isinstance(verdicts, Exception):
        return None
    share = verdicts.count("passed") / len(verdicts) if verdicts else 0.0
    return float(share == 1.0) if all_or_nothing else share


# ------------------------------------------------------------------------------------- the program in a text
LANGUAGE = re.compile(r"[{. \t]*(?:python|py)[\d.]*(?![\w.+-])", re.IGNORECASE)
# What a fence may stand behind: a quote, a list, an indentation.
BEFORE = re.compile(r"[ \t>]*(?:[-*+]|\d{1,3}[.)])?[ \t]*")
FENCES = 1000  # lines with a fence, or three such signs, of a text that still counts as an answer
CODE = re.compile(r"\n[ \t\f\ufeff]*[^\s#]")  # a line that is more than a comment
SHELL = re.compile(r"\s*(?:>>> |\$ |% )")
BEGINS = re.compile(r"\n(?:@|(?:async +)?def |class |import \w|from [\w.]+ import )")


def python_block(text: str, names=()) -> str:
    """The program in a text: the last of its blocks that defines most of `names`, "" if there is no block.

    A block lies between lines of three or more ` or ~, of the same sign and at least as many at its end. The
    last may lack its end. One that is quoted or indented, as its fence is, is taken out of that. The first
    word behind the sign is the language: Python, or none, which counts less. Output and examples of use
    define nothing that the tests call. A text without any fence is a program from its first
    definition or import on, if it defines one of `names`. Takes linear time.
    """
    found = fenced(text)
    if found is None:
        return bare(text, names)
    best, block = None, ""
    for is_python, inside in found:
        if not CODE.search("\n" + inside) or SHELL.match(inside):
            continue
        rank = (defined(inside, names), is_python)
        if best is None or rank >= best:
            best, block = rank, inside
    return textwrap.dedent(block) if block[:1] in (" ", "\t") else block


def defined(source: str, names) -> int:
    """How many of the names a source's lines without indentation define or import."""
    source = "\n" + source
    return sum(definition_of(name).search(source) is not None for name in names)


@functools.lru_cache(1000)
def definition_of(name: str) -> re.Pattern:
    # Each begins with a newline, which is found faster than the beginning of a line.
    name = re.escape(name)
    forms = [rf"(?:def|class|async[ \t]+def)[ \t]+{name}\b", rf"{name}[ \t]*(?::[^=\n]*)?=(?!=)"]
    forms.append(rf"(?:import|from)[ \t][^\n]*\b{name}\b")
    return re.compile(rf"\n(?:{'|'.join(forms)})")


def bare(text: str, names) -> str:
    """A program without fences."""
    begin = BEGINS.search("\n" + text) if any(name in text for name in names) else None
    program = text[begin.start() :].rstrip() if begin else ""
    return program if defined(program, names) else ""


def fenced(text: str) -> list | None:
    """(whether the language is Python, what is inside) of each block that may be; None: there is no fence."""
    fences = fences_of(text)
    if not fences or len(fences) > FENCES:
        return [] if fences else None
    blocks = []
    opened = None
    for fence in [*fences, None]:
        if fence and opened and not closes(fence, opened):
            continue
        if opened and (LANGUAGE.match(opened.info) or not opened.info):
            end = fence.start if fence else len(text)
            inside = taken_out(text[opened.end + 1 : end].removesuffix("\n"), opened.before)
            blocks.append((bool(opened.info), inside))
        is_end = opened and fence and not fence.info
        opened = None if is_end else fence
    return blocks


class Fence(NamedTuple):
    start: int  # of its line
    end: int  # of its line
    before: str  # indentation, quote
    sign: str  # ``` or more
    info: str


def closes(fence, opened) -> bool:
    """Whether a fence ends a block. One with a language begins another: a model has forgotten the end."""
    return fence.sign[0] == opened.sign[0] and len(fence.sign) >= len(opened.sign)


def fences_of(text: str) -> list:
    """The fences, by their lines' order; FENCES + 1 where there are more."""
    found = []
    at = 0
    following = {sign: text.find(sign) for sign in ("```", "~~~")}
    for _ in range(FENCES + 1):
        for sign, place in following.items():
            if -1 < place < at:
                following[sign] = text.find(sign, at)
        places = [place for place in following.values() if place >= 0]
        if not places:
            return found
        place = min(places)
        end = text.find("\n", place)
        end = end if end >= 0 else len(text)
        start = text.rfind("\n", max(0, place - 40), place) + 1  # further away it is no fence
        before = text[max(start, place - 41) : place]
        sign = text[place:end]
        info = sign.lstrip(sign[0])
        if BEFORE.fullmatch(before) and sign[0] not in info and len(info) < 200:
            found.append(Fence(place - len(before), end, before, sign[: len(sign) - len(info)], info.strip()))
        at = end
    return [None] * (FENCES + 1)


def taken_out(inside: str, before: str) -> str:
    """A block without the indentation and the quote that its fence stands behind."""
    if not before:
        return inside
    depth = before.count(">")
    if depth:
        inside = re.sub(r"^(?: {0,3}>){0,%d} ?" % depth, "", inside, flags=re.MULTILINE)
    indent = len(before.rpartition(">")[2]) - bool(depth)  # the quote takes one space
    return re.sub(r"^[ \t]{1,%d}" % max(1, indent), "", inside, flags=re.MULTILINE) if indent > 0 else inside
