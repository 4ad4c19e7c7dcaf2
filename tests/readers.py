"""Forms that a reader of answers must take, and must not take, written by hand (readers.txt) for the tests.

    python tests/readers.py                   # one table: false negatives and positives of every reader

Each reader has 60 right forms at least. For gsm8k FORMULAS' sentence decides: the last line that starts with
#### holds one number and nothing else that could be part of one. GSM8K's own solutions and fuzzed texts count
too, where the data is there (NANOGRPO_GSM8K names its folder).
"""

import functools
import json
import os
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import rewards  # noqa: E402
from tasks.countdown import countdown  # noqa: E402
from tasks.judge import score_of  # noqa: E402
from tasks.math import mathematics  # noqa: E402


def forms(reader: str, kind: str) -> list:
    """The forms of a section of readers.txt; with an answer each, pairs of text and answer."""
    text = (ROOT / "tests" / "readers.txt").read_text()
    section = text.partition(f"\n[{reader}: {kind}]\n")[2].partition("\n\n[")[0]
    return [line.replace("⏎", "\n") for line in section.removesuffix("\n").split("\n")]


def boxed_pairs(kind: str) -> list[tuple[str, str]]:
    """(completion, answer) of each form of `math`."""
    pairs = [form.split(" ; ") for form in forms("math", kind)]
    return [(rf"So it is \boxed{{{said}}}.", right) for said, right in pairs]


# ------------------------------------------------------------------------------------------- the readers
def reads_score(texts: list[str]) -> list[bool]:
    scores = []
    for text in texts:
        try:
            scores.append(score_of(f"Well done.\n{text}") == 0.7)
        except ValueError:
            scores.append(False)
    return scores


def verdicts(reward, texts, **columns) -> list[bool]:
    """Whether a reward gives each text 1, with the same columns for each."""
    repeated = {name: [value] * len(texts) for name, value in columns.items()}
    return [score == 1.0 for score in reward(texts, **repeated)]


def of_pairs(pairs) -> list[bool]:
    texts = [text for text, _ in pairs]
    return [score == 1.0 for score in mathematics(texts, answer=[right for _, right in pairs])]


def readers(has_math: bool) -> dict:
    """name -> (a function of forms that says which it takes, right forms, wrong forms)."""
    gsm8k = functools.partial(verdicts, rewards.gsm8k, answer="72")
    signed = functools.partial(verdicts, rewards.gsm8k, answer="-5")
    lenient = functools.partial(verdicts, rewards.gsm8k_lenient, answer="72")
    puzzle = functools.partial(verdicts, countdown, numbers=[2, 4, 7], target=56)
    form = functools.partial(verdicts, rewards.format)
    takes = {
        "gsm8k": gsm8k,
        "gsm8k, below 0": signed,
        "gsm8k_lenient": lenient,
        "countdown": puzzle,
        "format": form,
        "judge": reads_score,
    }
    table = {name: (take, forms(name, "right"), forms(name, "wrong")) for name, take in takes.items()}
    if has_math:
        table["math"] = (of_pairs, boxed_pairs("right"), boxed_pairs("wrong"))
    return table


def errors(reader, right, wrong) -> tuple[list, list]:
    """The right forms that a reader refuses, and the wrong ones that it takes."""
    negatives = [form for form, taken in zip(right, reader(right)) if not taken]
    positives = [form for form, taken in zip(wrong, reader(wrong)) if taken]
    return negatives, positives


# ----------------------------------------------------------------------------- solutions and fuzzed texts
def solutions(folder: str) -> list[str]:
    """GSM8K's 8,792 solutions."""
    found = []
    for name in ("train.jsonl", "test.jsonl"):
        for line in Path(folder, name).read_text().split("\n"):
            if line:
                found.append(json.loads(line)["answer"])
    return found


def main():
    from test_rewards import fuzz  # the texts of the tests

    print(f"{'reader':16}{'texts':24}{'right':>7}{'refused':>9}{'wrong':>7}{'taken':>7}{'ms a text':>11}")

    def show(name, kind, reader, right, wrong):
        start = time.perf_counter()
        negatives, positives = errors(reader, right, wrong)
        each = 1000 * (time.perf_counter() - start) / (len(right) + len(wrong))
        counts = f"{len(right):7}{len(negatives):9}{len(wrong):7}{len(positives):7}{each:11.3f}"
        print(f"{name:16}{kind:24}{counts}")
        for form in (*negatives, *positives):
            print("   ", repr(form))

    try:
        of_pairs([(r"\boxed{x}", "x + 1")])  # starts the processes
        has_math = True
    except ImportError:
        has_math = False
    table = readers(has_math)
    for name, (reader, right, wrong) in table.items():
        show(name, "forms by hand", reader, right, wrong)
    rng = random.Random(0)
    texts = [fuzz(rng) for _ in range(10_000)]
    for name, (reader, _, _) in table.items():
        if name == "math":
            show(name, "fuzzed", reader, [], [(text, "1234567") for text in texts])
        else:
            show(name, "fuzzed", reader, [], texts)
    folder = os.environ.get("NANOGRPO_GSM8K", "data/gsm8k")
    if not Path(folder, "train.jsonl").exists():
        return print(f"no GSM8K in {folder}: NANOGRPO_GSM8K names its folder")
    right = solutions(folder)
    answers = [solution.rpartition("####")[2].strip().replace(",", "") for solution in right]
    changed = [s.rpartition("####")[0] + f"#### {int(a) + 1}" for s, a in zip(right, answers)]
    for name in ("gsm8k", "gsm8k_lenient", "math") if has_math else ("gsm8k", "gsm8k_lenient"):

        def reader(texts, reward=rewards.REWARDS[name]):
            return [score == 1.0 for score in reward(texts, answer=answers)]

        show(name, "GSM8K's solutions", reader, right, changed)


if __name__ == "__main__":
    main()
