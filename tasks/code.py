"""Programs: problems that come with tests, and the reward that runs what a model wrote, in tasks/sandbox.py.

    task = load_task("code", show=1)
    rewards = [("code", 1.0)]                                        # in a config file: configs/code.py

No text of a model is run in this process. The sandbox is imported where it is needed and nowhere else.
Tests: python -m pytest tests/test_tasks.py
"""

import functools
import re
from pathlib import Path

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
    """The share of the row's `tests` that the last Python block passes in the sandbox; 0 without a block.

    all_or_nothing: 1 if it passes all, else 0. tests: lists of what sandbox.check takes. A column `names`
    lists what they call that Python has under that name too. None: no tests, a test that is no Python, a
    sandbox that failed. seconds: of CPU for each program; all at their limit take N / workers times that.
    """
    from tasks import sandbox

    blocks = [python_block(text_of(completion)) for completion in completions]
    asked = [n for n, block in enumerate(blocks) if block and tests[n]]
    jobs = []
    for n in asked:
        own_names = names[n] if names else None
        jobs.append((blocks[n], tests[n], tuple(own_names or ())))
    verdicts = sandbox.check_all(jobs, workers=workers, seconds=seconds, memory_mb=memory_mb)
    verdict_of = dict(zip(asked, verdicts))
    return [share_passed(tests[n], verdict_of.get(n), all_or_nothing) for n in range(len(blocks))]


def share_passed(tests, verdicts, all_or_nothing: bool) -> float | None:
    """The score for one program's verdicts: a list, an exception, or None if there is no program."""
    if not tests or isinstance(verdicts, Exception):
        return None
    share = verdicts.count("passed") / len(verdicts) if verdicts else 0.0
    return float(share == 1.0) if all_or_nothing else share


FENCE = re.compile(r"^```([^\n]{0,99})", re.MULTILINE)


def python_block(text: str) -> str:
    """The last closed block between lines that begin with ```, of those marked python, py or not at all."""
    found = ""
    opened = None  # the fence that the block began with, where we are in one
    for fence in FENCE.finditer(text):
        if opened is None:
            opened = fence
            continue
        language = opened.group(1).strip().lower()
        inside = text[opened.end() + 1 : fence.start() - 1]
        if inside and language in ("", "python", "py", "python3"):
            found = inside
        opened = None
    return found
