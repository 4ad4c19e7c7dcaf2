"""Rewards: holes that were seen elsewhere are closed; whatever a reward does, it ends in one sentence."""

import asyncio
import functools
import importlib.util
import json
import math
import os
import random
import re
import threading
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import readers
import rewards
import train
import conftest
from rewards import REWARDS, RewardError, resolve, score

ROOT = Path(__file__).resolve().parent.parent
HAS_MATH = importlib.util.find_spec("math_verify") is not None
EXTRA = dict(
    countdown=dict(numbers=[[1, 2, 3]], target=[9]), code=dict(tests=[["assert f(1) == 2"]])
)  # columns of a row, where a reward wants more than `answer`
ON_TEXT = [
    name for name in REWARDS if name not in ("judge", "env") and (HAS_MATH or name != "math")
]  # the judge asks a server


def one(name, text, answer="42", **columns):
    """The score of one completion by the reward called name."""
    return REWARDS[name]([text], ["question"], answer=[answer], **columns)[0]


# --------------------------------------------------------------------------------------- right or wrong
@pytest.mark.parametrize(
    "text",
    [
        "#### 42",
        "so 6 * 7 = 42\n#### 42",
        "####42",
        "#### 42.",
        "#### 42.0",
        "#### 42.00",
        "#### $42",
        r"#### \$42",
        "#### $42.00",
        "#### 042",
        "#### +42",
        "#### 41\nno, wait\n#### 42",
        "#### 42 apples",
        "#### 42\n\n",
        "#### 42 ####",
        "####\t42",
        "#### 42, because",
    ],
)
def test_gsm8k_takes_every_way_to_write_the_number(text):
    assert one("gsm8k", text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "The answer is 42",
        "#### ",
        "####\n42",
        "### 42",
        "#### 41",
        "#### 42\n#### 41",
        "#### 4.2",
        "#### 420",
        "#### 42.1",
        "#### .42",
        "#### -42",
        "#### 4 2",
        "#### 42/7",
        "#### 42.0.1",
        "#### 42,7",
        "#### 42e3",
        "#### 1,42",
        "#### x42",
        "#### forty-two",
        "#### ٤٢",
        "#### 4٢",
        "#### 42٠",
        "#### ４２",
        "#### ⁴²",
        "#### 0x2a",
        "#### 4_2",
        "#### \0 42",
        "#### 42" + "0" * 300,
        "#### " + "0" * 300 + "42",
        "#### NaN",
        "#### inf",
    ],
)
def test_gsm8k_refuses_what_is_not_the_number_in_its_place(text):
    assert one("gsm8k", text) == 0.0


@pytest.mark.parametrize(
    "text, answer",
    [
        ("#### 1,234", "1234"),
        ("#### 1234", "1,234"),
        ("#### $1,234,567.50", "1234567.5"),
        ("#### -5", "-5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### −5", "-5"),
        ("#### 0.5", ".5"),
        ("#### .50", "0.5"),
        ("#### 0", "-0"),
        ("#### 72", 72),
        ("#### 72", 72.0),
        ("#### 25%", "25%"),
        ("#### 25", "25%"),
        ("#### 72", "He has 70 + 2 = <<70+2=72>>72.\n#### 72"),
        ("#### 12345678901234567890123456789012345678901", "12345678901234567890123456789012345678901"),
        ("#### -12345678901234567890123456789012345678901", "-12345678901234567890123456789012345678901"),
    ],
)
def test_gsm8k_compares_numbers_not_strings(text, answer):
    assert one("gsm8k", text, answer) == one("gsm8k_lenient", text, answer) == 1.0


@pytest.mark.parametrize(
    "text, answer",
    [
        ("#### 0.30000000000000004", "0.3"),
        ("#### 12345678901234567890123456789012345678901", "12345678901234567890123456789012345678902"),
        ("#### 9007199254740993", "9007199254740992"),
        ("#### -12345678901234567890123456789012345678901", "-12345678901234567890123456789012345678902"),
    ],
)
def test_numbers_are_compared_as_exact_decimals(text, answer):
    assert one("gsm8k", text, answer) == one("gsm8k_lenient", text, answer) == 0.0


@pytest.mark.parametrize("answer", [None, "", "many", "1/2", True, "72 apples", "٤٢", [], float("nan")])
def test_an_answer_that_is_not_a_number_cannot_be_scored(answer):
    assert one("gsm8k", "#### 42", answer) is None and one("gsm8k_lenient", "#### 42", answer) is None


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("The answer is 42.", "42", 1),
        ("It costs $42.", "42", 1),
        ("**42**", "42", 1),
        (r"\boxed{42}", "42", 1),
        ("1,042", "1042", 1),
        ("1,042", "42", 0),
        ("41.42", "42", 0),
        ("10-3=7", "7", 1),
        ("5-3", "3", 1),
        ("5-3", "-3", 0),
        ("it is -3", "-3", 1),
        ("(-3)", "-3", 1),
        ("x-3", "3", 1),
        ("first 42, then 43", "42", 0),
        ("1,2,42", "42", 1),
        ("no number", "42", 0),
        ("", "42", 0),
        ("٤٢", "42", 0),
        ("42" + " and so on" * 1000, "42", 1),
        ("1" * 300 + "42", "42", 0),
        ("7" + "0" * 300 + "42", "42", 0),
        ("v4.1.42", "42", 1),
        ("<750=12,301=04>42", "42", 1),
    ],
)
def test_the_lenient_grader_takes_the_last_number(text, answer, right):
    for name in ("gsm8k_lenient", "arithmetic_lenient", "last_number"):
        assert one(name, text, answer) == right


@given(
    st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9),
    st.sampled_from(["{:f}", "{:,f}", "{:f}0", "0{:f}"]),
    st.text(alphabet="ab .!?\n", max_size=20),
)
def test_a_number_is_found_however_it_is_written(number, shape, before):
    shown = shape.format(abs(number))
    if shape == "0{:f}" and "," in shown:
        return
    sign = "-" if number < 0 else ""
    for name in ("gsm8k", "gsm8k_lenient"):
        assert one(name, f"{before}\n#### {sign}{shown}", str(number)) == 1.0
        assert one(name, f"{before}\n#### {sign}{shown}", str(number + Decimal("0.001"))) == 0.0


READERS = readers.readers(HAS_MATH)


@pytest.mark.parametrize("name", READERS)
def test_every_form_written_by_hand_is_taken_or_refused(name):
    """gsm8k gave 1 to `#### 72 or 73` and `72 million`, and 0 to `#### **72**` and `\\boxed{72}`."""
    reader, right, wrong = READERS[name]
    assert len(right) >= 60 or name == "gsm8k, below 0"
    assert readers.errors(reader, right, wrong) == ([], [])


def gsm8k_solutions():
    folder = next(
        (
            Path(f)
            for f in (os.environ.get("NANOGRPO_GSM8K"), ROOT / "data/gsm8k", ROOT / "shared/data/gsm8k")
            if f and (Path(f) / "test.jsonl").exists()
        ),
        None,
    )
    if folder is None:
        pytest.skip(
            "needs GSM8K's train.jsonl and test.jsonl in data/gsm8k or in the folder that NANOGRPO_GSM8K "
            "names"
        )
    return [
        json.loads(line)["answer"]
        for name in ("train.jsonl", "test.jsonl")
        for line in (folder / name).read_text().split("\n")
        if line
    ]


def test_gsm8ks_own_solutions_are_all_right_and_none_with_another_number():
    solutions = gsm8k_solutions()
    answers = [s.rpartition("####")[2].strip() for s in solutions]
    changed = [
        s.rpartition("####")[0] + f"#### {int(a.replace(',', '')) + 1}" for s, a in zip(solutions, answers)
    ]
    assert len(solutions) == 8792
    graders = [rewards.gsm8k, rewards.gsm8k_lenient, *([rewards.mathematics] if HAS_MATH else [])]
    for grader in graders:
        assert sum(grader(solutions, answer=answers)) == 8792
        assert sum(grader(solutions, answer=solutions)) == 8792  # the data set's own column as it stands
        assert sum(grader(changed, answer=answers)) == 0
    assert sum(rewards.gsm8k([s.replace("####", "so") for s in solutions], answer=answers)) == 0


# --------------------------------------------------------------------------------------------- the form
@pytest.mark.parametrize(
    "text, right",
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>a\nb</think>\n\n<answer>c\nd</answer>\n", 1),
        ("<think></think><answer>b</answer>", 0),
        ("<think> \n</think><answer>b</answer>", 0),
        ("</think><answer>b</answer>", 0),
        ("<think>a</think><answer>\n</answer>", 0),
        ("a</think><answer>b</answer>", 1),
        ("\na</think>\n<answer>b</answer>", 1),
        ("<think>a</think><answer>b</answer> junk", 0),
        ("junk <think>a</think><answer>b</answer>", 0),
        ("<think>a</think> junk <answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a<think>b</think><answer>c</answer>", 0),
        ("<think>a</think><answer></answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<answer>b</answer>", 0),
        ("<think>a</think>b", 0),
        ("</think></answer><answer>", 0),
        ("", 0),
        ("b", 0),
        ("<THINK>a</THINK><ANSWER>b</ANSWER>", 0),
        ("<think>a<answer>b</think></answer>", 0),
    ],
)
def test_format_is_the_whole_completion(text, right):
    assert one("format", text) == right


def test_format_allows_for_a_tag_that_the_template_wrote():
    """Elsewhere the reward stays 0 if the chat template ends in <think>: the completion begins after it."""
    assert rewards.format(["a</think><answer>b</answer>"]) == [1.0]
    got = rewards.format(
        ["a</think><answer>b</answer>", "<think>a</think><answer>b</answer>"], prefilled=False
    )
    assert got == [0.0, 1.0]


@pytest.mark.parametrize(
    "text, share",
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("a</think><answer>b</answer>", 0.75),
        ("<think>", 0.25),
        ("<think><think></think>", 0.25),
        ("", 0),
        ("<answer></answer>" * 2, 0),
        ("</answer><answer></think><think>", 0.25),
        ("<answer>b</answer><think>a</think>", 0.5),
        ("<think>a<answer></think>b</answer>", 0.75),
    ],
)
def test_tag_count_gives_a_quarter_for_each_tag_that_is_there_once(text, share):
    assert one("tag_count", text) == share


@pytest.mark.parametrize(
    "text, hits",
    [
        ("1. a\n2. b\n3. c", 3),
        ("1. a\n2. b", 2),
        ("1) a\n2) b", 2),
        ("- a\n* b\n• c\n- d", 3),
        ("First, a. Next, b. Finally, c.", 3),
        ("Step 1: a\nStep 2: b", 2),
        ("1. First, a", 1),
        ("  - First, a", 1),
        ("1.5 apples\n-3 pears", 0),
        ("a 1. b", 0),
        ("**bold**\n---", 0),
        ("the First, of them", 1),
        ("", 0),
        ("1.\n2.\n", 2),
        ("٣. a", 0),
    ],
)
def test_reasoning_steps_are_counted_line_by_line(text, hits):
    """Elsewhere '^' without MULTILINE saw one marker in '1. ..\\n2. ..\\n3. ..'."""
    assert one("reasoning_steps", text) == pytest.approx(hits / 3)


# ------------------------------------------------------------------------------------------- the length
def ids(*lengths):
    return [list(range(n)) for n in lengths]


def test_length_compares_tokens_within_the_group():
    right, wrong = "#### 42", "#### 41"
    texts = [right, right, right, wrong, wrong] + [right, wrong, right, right, right]
    got = rewards.length(
        texts,
        ["q"] * 10,
        completion_ids=ids(10, 20, 30, 10, 30, 1000, 3000, 2000, 2000, 2000),
        group_size=5,
        answer=["42"] * 10,
    )
    assert got == [0.5, 0.0, -0.5, 0.0, -0.5] + [0.5, -0.5, 0.0, 0.0, 0.0]


def test_length_is_zero_where_all_are_as_long_and_none_where_the_answer_is_no_number():
    got = rewards.length(["#### 42"] * 2, completion_ids=ids(7, 7), group_size=2, answer=["42"] * 2)
    assert got == [0.0, 0.0]
    got = rewards.length(["#### 42"] * 2, completion_ids=ids(7, 9), group_size=2, answer=["?"] * 2)
    assert got == [None, None]
    got = rewards.length(
        ["5", "6"], completion_ids=ids(7, 9), group_size=2, answer=["5", "5"], grade=rewards.arithmetic
    )
    assert got == [0.5, -0.5]


def test_cosine_is_the_formula_clamped_at_the_maximum():
    def got(text, n):
        return rewards.cosine([text], completion_ids=ids(n), max_new_tokens=100, answer=["42"])[0]

    for n in (0, 1, 25, 50, 99, 100):
        assert got("#### 42", n) == pytest.approx(0.5 + 0.5 * (1 + math.cos(math.pi * n / 100)) / 2)
        assert got("#### 41", n) == pytest.approx(-0.5 - 0.5 * (1 + math.cos(math.pi * n / 100)) / 2)
    assert got("#### 42", 200) == got("#### 42", 100) == pytest.approx(0.5)
    assert got("#### 41", 150) == pytest.approx(-0.5)
    assert got("#### 42", 10) > got("#### 42", 90) > got("#### 41", 90) > got("#### 41", 10)


def test_repetition_counts_distinct_ngrams_of_ids():
    cases = [[1, 2, 3, 4, 5], [7] * 10, [1, 2, 3, 1, 2, 3], [1, 2], [], [1, 2, 3]]
    got = rewards.repetition([""] * 6, completion_ids=cases)
    assert got == [0.0, pytest.approx(-7 / 8), pytest.approx(-1 / 4), 0.0, 0.0, 0.0]
    assert rewards.repetition([""], completion_ids=[[1, 2, 1, 2]], n=2, worst=-0.3) == [pytest.approx(-0.1)]


def test_overlong_falls_in_a_line_to_minus_one_at_the_limit():
    got = rewards.overlong([""] * 6, completion_ids=ids(0, 80, 90, 95, 100, 150), max_new_tokens=100)
    assert got == pytest.approx([0, 0, -0.5, -0.75, -1, -1])
    got = rewards.overlong([""] * 2, completion_ids=ids(60, 75), max_new_tokens=100, margin=50)
    assert got == pytest.approx([-0.2, -0.5])


def test_small_rules():
    assert rewards.words(["Because I say so", "becauses"]) == [1.0, 0.0]
    got = rewards.words(["red and green", "red", "x"], words=[["red", "green"], ["red", "green"], []])
    assert got == [1.0, 0.5, None]
    assert rewards.ends_with(["Yes. \n", "Yes", ""]) == [1.0, 0.0, 0.0]
    assert rewards.ends_with(["Yes!"], ending="!") == [1.0]
    assert rewards.weighted(["because.", "because", "."]) == [1.0, 0.5, 0.5]
    got = rewards.weighted(
        ["#### 42", "#### 42"], parts=((rewards.gsm8k, 2.0), (rewards.ends_with, 1.0)), answer=["42", "?"]
    )
    assert got == [2.0, None]


# ----------------------------------------------------------------------------------------- hostile text
HOSTILE = {
    "tags": "<think>" * 10**5,
    "all tags": "<think></think><answer></answer>" * 25_000,
    "hashes": "#" * 10**6,
    "marks": "#### " * 200_000,
    "marked": "#### 1 " * 140_000,
    "spaces": "####" + " " * 10**6,
    "digits": "9" * 10**6,
    "marked digits": "####" + "9" * 10**6,
    "commas": "1," * 500_000,
    "thousands": "####" + "111," * 250_000 + "x",
    "dots": ".1" * 500_000,
    "lines": "\n" * 10**6,
    "list": "\n1. " * 250_000,
    "letters": "a" * 10**6,
    "nul": "\0" * 10**6,
    "arabic": "٣" * 10**6,
    "minus": "-" * 10**6,
    "dollars": "####" + "$" * 10**6,
    "step": "Step " * 200_000,
    "surrogate": "\ud800" * 1000,
    "tabs": "####\t" * 200_000,
}


@pytest.mark.parametrize("name", ON_TEXT)
def test_no_text_is_slow_or_raises(name):
    """Goal: 10 ms a text; the limit here leaves room for a busy machine."""
    if name == "math":
        one(name, r"\boxed{x + 1}", "1 + x")  # the process that compares is started with the first question
    for kind, text in HOSTILE.items():
        took = []
        for _ in range(3):
            start = time.perf_counter()
            one(
                name,
                text,
                completion_ids=[[1] * 1000],
                group_size=1,
                max_new_tokens=100,
                **EXTRA.get(name, {}),
            )
            took.append(time.perf_counter() - start)
            if took[-1] < 0.05:
                break
        assert min(took) < 0.1, (kind, took)


def fuzz(rng) -> str:
    """A text of pieces that parsers trip over."""
    pieces = [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "#### ",
        "\\boxed{",
        "}",
        "{",
        "$",
        "$$",
        "```python\n",
        "```\n",
        "\n",
        " ",
        "42",
        "1,2",
        "-",
        "+",
        "*",
        "/",
        "(",
        ")",
        "=",
        "٣",
        "²",
        "\0",
        "\ud800",
        "é",
        "Step 1:",
        "answer is ",
        "\\frac",
        "99**99",
        "9" * 50,
        "\\(",
        "\\)",
        "\u2028",
        "e5",
        "0x",
        "1_0",
        "." * 9,
        "Score: 10",
    ]
    return "".join(rng.choice(pieces) * rng.choice((1, 1, 1, 2, 300)) for _ in range(rng.randint(0, 12)))


@pytest.mark.parametrize("name", conftest.quick(2, [n for n in ON_TEXT if n not in ("math", "code")]))
def test_ten_thousand_fuzzed_texts_raise_nothing_and_take_a_tenth_of_the_time_allowed(name):
    rng = random.Random(name)
    texts = [fuzz(rng) for _ in range(10_000)]
    columns = dict(answer=["42"], completion_ids=[[1, 2, 3]], **EXTRA.get(name, {}))
    start = time.process_time()
    scores = REWARDS[name](
        texts,
        ["q"] * len(texts),
        group_size=1,
        max_new_tokens=100,
        **{k: v * len(texts) for k, v in columns.items()},
    )
    assert all(math.isfinite(s) for s in scores) and (time.process_time() - start) / len(texts) < 0.001


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text() | st.text(alphabet="0123456789#.,$%-+<>/ \nthinkaswer"), min_size=1, max_size=4),
    st.data(),
)
def test_rewards_give_finite_numbers_on_any_text(texts, data):
    extra = dict(
        completion_ids=[data.draw(st.lists(st.integers(0, 5), max_size=9)) for _ in texts],
        group_size=1,
        max_new_tokens=8,
    )
    answers = [data.draw(st.text(max_size=5) | st.integers() | st.none()) for _ in texts]
    for name in ON_TEXT:
        scores = REWARDS[name](
            texts,
            ["q"] * len(texts),
            answer=answers,
            **extra,
            **{k: v * len(texts) for k, v in EXTRA.get(name, {}).items()},
        )
        assert len(scores) == len(texts) and all(s is None or math.isfinite(s) for s in scores)


# ------------------------------------------------------------------------------------------- the runner
def run(reward, completions=("a", "b", "c"), prompts=None, columns=None, **keys):
    """Parts and reward of one function, or of pairs of function and weight."""
    pairs = reward if isinstance(reward, list) else [(reward, 1.0)]
    return score(
        resolve(pairs),
        list(completions),
        prompts or ["q"] * len(completions),
        columns or {},
        **dict(group_size=1) | keys,
    )


def test_an_unknown_reward_stops_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown reward 'gsmk8', did you mean 'gsm8k'"):
        resolve([("gsmk8", 1.0)])
    for bad in ([(3, 1.0)], [("gsm8k", "1")], [("gsm8k", float("nan"))], [("gsm8k", True)], [None]):
        with pytest.raises(ValueError, match="rewards are pairs"):
            resolve(bad)


def test_labels_are_distinct():
    class Judge:
        def __call__(self, completions, **_):
            return [0.0] * len(completions)

    got = resolve(
        [
            ("gsm8k", 1),
            ("gsm8k", 0.5),
            (lambda completions: [], 1),
            (functools.partial(rewards.overlong, margin=3), 1),
            ("overlong", 1),
            (Judge(), 1),
            rewards.words,
            "words",
        ]
    )
    assert [label for label, _, _ in got] == [
        "gsm8k",
        "gsm8k_2",
        "lambda",
        "overlong",
        "overlong_2",
        "Judge",
        "words",
        "words_2",
    ]
    assert [w for _, _, w in got] == [1, 0.5, 1, 1, 1, 1, 1, 1] and all(type(w) is float for _, _, w in got)


def test_rewards_are_weighted_and_summed_and_none_is_left_out():
    first, second, shown = (
        (lambda values: lambda completions: values)([1, None, None]),
        lambda completions: [0.5, 2, None],
        lambda completions: [None, 100, 7],
    )
    parts, reward = run([(first, 2.0), (second, -1.0), (shown, 0.0)])
    assert parts.shape == (3, 3) and parts.dtype == reward.dtype == np.float64
    np.testing.assert_array_equal(parts, [[1, 0.5, np.nan], [np.nan, 2, 100], [np.nan, np.nan, 7]])
    np.testing.assert_array_equal(reward, [1.5, -2.0, np.nan])


def test_a_reward_is_called_once_with_every_column():
    calls = []

    def reward(completions, prompts, **columns):
        calls.append((completions, prompts, columns))
        return [0.0] * len(completions)

    run(
        reward,
        "abcd",
        list("ppqq"),
        dict(answer=[1, 1, 2, 2]),
        group_size=2,
        completion_ids=ids(1, 2, 3, 4),
        max_new_tokens=9,
    )
    got = calls
    assert got == [
        (
            list("abcd"),
            list("ppqq"),
            dict(answer=[1, 1, 2, 2], group_size=2, completion_ids=ids(1, 2, 3, 4), max_new_tokens=9),
        )
    ]


@pytest.mark.parametrize(
    "reward",
    [
        lambda completions: [1] * len(completions),
        lambda prompts, completions: [len(p) for p in prompts],
        lambda completions, answer, tone=None: answer,
        lambda completions, answer, absent=1, **_: [absent] * len(answer),
        lambda **columns: [1] * len(columns["completions"]),
        lambda texts, questions: [len(q) for q in questions],
        lambda c, **_: [len(t) for t in c],
        lambda *, completions, answer: [float(a) for a in answer],
    ],
)
def test_a_reward_gets_only_what_its_signature_takes(reward):
    np.testing.assert_array_equal(run(reward, columns=dict(answer=[1, 1, 1]))[1], [1, 1, 1])


def test_a_column_that_a_reward_needs_and_rows_lack_is_named():
    with pytest.raises(
        RewardError,
        match="reward 'gsm8k' wants 'answer', "
        "and a row gives only completions, prompts, group_size, question",
    ):
        run("gsm8k", columns=dict(question=list("abc")))
    with pytest.raises(RewardError, match="column 'completions'.*rename"):
        run(lambda completions: [0] * 3, columns=dict(completions=[1, 2, 3]))


def test_what_a_partial_fixes_stays_fixed():
    overlong = functools.partial(rewards.overlong, max_new_tokens=10, margin=10)
    assert run(overlong, "a", completion_ids=ids(5), max_new_tokens=1000)[1] == [-0.5]


def test_a_reward_cannot_change_what_the_next_one_gets():
    def greedy(completions, answer, **_):
        answer.clear()
        completions[:] = ["stolen"] * 3
        return [0.0] * 3

    _, reward = run(
        [(greedy, 1.0), (lambda completions, answer: [c == a for c, a in zip(completions, answer)], 1.0)],
        columns=dict(answer=list("abc")),
    )
    np.testing.assert_array_equal(reward, [1, 1, 1])


def test_numbers_of_other_kinds_are_numbers():
    torch = pytest.importorskip("torch")
    values = [True, 2, np.float32(0.5)]
    for result in (values, tuple(values), np.array([1.0, 2.0, 0.5]), torch.tensor([1.0, 2.0, 0.5])):
        _, reward = run(functools.partial(lambda completions, result: result, result=result))
        np.testing.assert_array_equal(reward, [1.0, 2.0, 0.5])


@pytest.mark.parametrize(
    "result, words",
    [
        ([1.0], "returned 1 values for 3 completions"),
        ([], "returned 0 values"),
        (None, "returned no list"),
        (1.0, "returned no list"),
        ("abc", "it must return a list"),
        ({0: 1, 1: 1, 2: 1}, "it must return a list"),
        ((x for x in "abc"), "no list"),
        ([0, float("nan"), 0], "gave nan for row 1"),
        ([0, 0, float("inf")], "gave inf for row 2"),
        ([float("-inf"), 0, 0], "gave -inf for row 0"),
        ([0, "1.0", 0], "gave '1.0' for row 1"),
        ([0, [1], 0], r"gave \[1\] for row 1"),
        ([0, 1j, 0], "gave 1j for row 1"),
        ([0, 10**400, 0], "for row 1"),
        ([0, np.float64("nan"), 0], "row 1"),
        ([object(), 0, 0], "row 0"),
        (np.zeros((40, 2)), "returned 40 values"),
        ([0, np.zeros((3, 3)), 0], "row 1"),
    ],
)
def test_a_bad_return_value_is_one_sentence_with_name_row_and_value(result, words):
    def mine(completions, **_):
        return result

    with pytest.raises(RewardError, match=words) as e:
        run(mine)
    assert "reward 'mine'" in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("by\nzero" * 1000),
        KeyError("x"),
        SystemExit(0),
        KeyboardInterrupt(),
        RecursionError("deep"),
        asyncio.CancelledError(),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_whatever_a_reward_raises_is_a_reward_error(error, later):
    def fails(completions, **_):
        raise error

    async def fails_later(completions, **_):
        await asyncio.sleep(0)
        raise error

    with pytest.raises(
        RewardError, match=rf"^reward 'fails.*' raised {type(error).__name__}: .{{0,170}} \(.*\)$"
    ):
        run(fails_later if later else fails)


def test_a_reward_that_hangs_is_named_and_left_behind():
    release = threading.Event()

    def hangs(completions, **_):
        release.wait(20)

    async def hangs_too(completions, **_):
        await asyncio.sleep(20)

    for reward in (hangs, hangs_too):
        start = time.perf_counter()
        with pytest.raises(
            RewardError, match=f"reward '{reward.__name__}' took more than 0.2 seconds: .*reward_timeout"
        ):
            run(reward, timeout=0.2)
        assert time.perf_counter() - start < 5
    release.set()
    np.testing.assert_array_equal(run(lambda completions: [1] * 3, timeout=None)[1], [1, 1, 1])


def test_async_rewards_run_together():
    arrived = []

    async def slow(completions, **_):
        arrived.append(asyncio.current_task())
        while len(arrived) < 3:  # ends only if the three are under way at once
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)

    class Judge:
        async def __call__(self, completions, answer):
            return await slow(completions)

    parts, reward = run(
        [(slow, 1.0), ("ends_with", 1.0), (functools.partial(slow), 1.0), (Judge(), 1.0)],
        columns=dict(answer=[0, 0, 0]),
        timeout=10,
    )
    np.testing.assert_array_equal(reward, [3, 3, 3])
    np.testing.assert_array_equal(parts[0], [1, 0, 1, 1])


def test_scoring_works_where_a_loop_is_running():
    async def reward(completions, **_):
        return [1.0] * len(completions)

    async def caller():
        return run(reward)

    np.testing.assert_array_equal(asyncio.run(caller())[1], [1, 1, 1])


def test_two_rewards_of_one_label_keep_their_scores():
    functions = [("same", lambda completions: [1] * 3, 1.0), ("same", lambda completions: [2] * 3, 1.0)]
    parts, _ = score(functions, list("abc"), ["q"] * 3, {}, group_size=1)
    np.testing.assert_array_equal(parts, [[1, 2]] * 3)


CHAT = [dict(role="system", content="Be brief."), dict(role="user", content="6 * 7?")]


def test_prompts_and_completions_are_text_unless_messages_are_asked_for():
    seen = {}

    def look(completions, prompts, **_):
        seen.update(completions=completions, prompts=prompts)
        return [0.0] * len(completions)

    run(look, ["#### 42", "plain"], [CHAT, "text"])
    assert seen == dict(completions=["#### 42", "plain"], prompts=["Be brief.\n6 * 7?", "text"])
    run(look, ["#### 42", "plain"], [CHAT, "text"], reward_messages=True)
    got = seen
    assert got == dict(
        completions=[[dict(role="assistant", content="#### 42")], "plain"], prompts=[CHAT, "text"]
    )


@pytest.mark.parametrize("name", ON_TEXT)
def test_rewards_give_the_same_for_text_and_for_messages(name):
    texts = ["#### 42", "1. First, 42.", "<think>a</think><answer>b</answer>", "", "42"]
    keys = dict(
        columns=dict(answer=["42"] * 5) | {k: v * 5 for k, v in EXTRA.get(name, {}).items()},
        group_size=5,
        completion_ids=ids(3, 4, 5, 6, 7),
        max_new_tokens=9,
    )
    for a, b in zip(
        run(name, texts, [CHAT] * 5, **keys), run(name, texts, [CHAT] * 5, reward_messages=True, **keys)
    ):
        np.testing.assert_array_equal(a, b)


def test_a_reward_written_for_trl_runs_unchanged():
    def accuracy(prompts, completions, completion_ids, solution, **kwargs):
        contents = [completion[0]["content"] for completion in completions]
        assert all(p[-1]["role"] == "user" for p in prompts)
        return [1.0 if s in c else 0.0 for c, s in zip(contents, solution)]

    _, reward = run(
        accuracy,
        ["42", "41"],
        [CHAT] * 2,
        dict(solution=["42", "42"]),
        reward_messages=True,
        completion_ids=ids(1, 1),
        group_size=2,
    )
    np.testing.assert_array_equal(reward, [1, 0])


TRL_ROWS = [  # a line each, as TRL's data sets have them
    dict(prompt=[dict(role="user", content="What is 1/2 + 1/4?")], solution=r"$\frac{3}{4}$", level=1),
    dict(prompt=[dict(role="user", content="What is 2 * 3?")], solution="$6$", level=2),
    dict(
        prompt=[dict(role="system", content="Think."), dict(role="user", content="2?")],
        solution="$2$",
        level=3,
    ),
]
TRL_SAID = [
    r"<think>a</think>\boxed{0.75}",
    r"\boxed{3}",
    "<think>b</think> I do not know",
    r"<think>c</think>\boxed{6}",
    r"\boxed{2}",
    "",
]


def reward_len(completions, **kwargs):
    return [-abs(20 - len(completion[0]["content"])) for completion in completions]


def boxed_reward(completions, solution, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    matches = [re.search(r"\\boxed\{(.*?)\}", content) for content in contents]
    answers = [match.group(1) if match else "" for match in matches]
    return [1.0 if f"${a}$" == s else 0.0 for a, s in zip(answers, solution)]


async def async_reward(prompts, completions, **kwargs):
    await asyncio.sleep(0.001)
    return [
        float("<think>" in c[0]["content"] and p[-1]["role"] == "user") for p, c in zip(prompts, completions)
    ]


def only_hard_ones(completions, level, **kwargs):
    return [None if n < 2 else 1.0 for n in level]


def annealed(completions, trainer_state, log_extra, log_metric, **kwargs):
    share = trainer_state.global_step / trainer_state.max_steps
    lengths = [len(completion[0]["content"]) for completion in completions]
    log_extra("letters", lengths)
    log_metric("share", share)
    return [share * length for length in lengths]


def score_trl(tmp_path, functions, said=TRL_SAID):
    """Parts (6, R) and what was logged, of two completions of each row of a file of TRL's."""
    path = tmp_path / "trl.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TRL_ROWS))
    held_out = tmp_path / "one.jsonl"
    held_out.write_text(json.dumps(TRL_ROWS[0]) + "\n")
    task = data.load_task("jsonl", train_file=str(path), eval_file=str(held_out))
    assert task.train == TRL_ROWS
    logged = rewards.Logged(6)
    _, parts, _ = rewards.score_completions(
        Texts(said),
        task.train,
        [[n] * (n + 5) for n in range(6)],
        resolve(functions),
        prefill="",
        max_new_tokens=10,
        reward_messages=True,
        timeout=60,
        state=rewards.TrainerState(step=3, max_steps=8),
        logged=logged,
    )
    return parts, logged


class Texts:
    """A tokenizer that decodes row n as the n-th of these texts."""

    def __init__(self, texts):
        self.texts = texts

    def batch_decode(self, ids, skip_special_tokens):
        return self.texts


def test_rewards_in_trls_style_run_from_a_file_of_trls(tmp_path):
    """Its documentation's examples: conversational, async, with a column, some rows only, with the state."""
    functions = [reward_len, boxed_reward, async_reward, only_hard_ones, annealed]
    parts, logged = score_trl(tmp_path, functions)
    lengths = [len(text) for text in TRL_SAID]
    np.testing.assert_array_equal(parts[:, 0], [-abs(20 - n) for n in lengths])
    np.testing.assert_array_equal(parts[:, 1], [0, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(parts[:, 2], [1, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(parts[:, 3], [math.nan] * 2 + [1] * 4)
    np.testing.assert_array_equal(parts[:, 4], [n / 4 for n in lengths])
    assert logged.columns == dict(letters=lengths) and logged.metrics == dict(share=[0.25])


@pytest.mark.slow
def test_trls_own_rewards_run_from_a_file_of_trls(tmp_path):
    theirs = pytest.importorskip("trl.rewards")
    pytest.importorskip("math_verify")
    overlong = theirs.get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)
    cosine = theirs.get_cosine_scaled_reward(max_len=10)
    functions = [theirs.accuracy_reward, theirs.think_format_reward, overlong, cosine]
    parts, logged = score_trl(tmp_path, functions)
    np.testing.assert_array_equal(parts[:, 0], [1, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(parts[:, 1], [1, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(parts[:, 2], [0, 0, -0.25, -0.5, -0.75, -1])
    assert np.isfinite(parts).all()
    assert logged.columns["solution"] == [row["solution"] for row in TRL_ROWS for _ in range(2)]
    assert set(logged.columns) == {"solution", "gold_parsed", "answer_parsed"}


def test_a_reward_that_fails_on_text_as_on_a_message_names_the_key_that_helps(tmp_path):
    for fails in (
        reward_len,
        boxed_reward,
        lambda completions, **_: [c[0].get("content") for c in completions],
    ):
        with pytest.raises(RewardError, match=r"set reward_messages=True, which .* list of them$"):
            run(fails, ["a", "b"], [CHAT] * 2, dict(solution=["$1$"] * 2))
    with pytest.raises(RewardError, match=r"set reward_messages=True"):
        run(reward_len, ["", ""], [CHAT] * 2)
    with pytest.raises(RewardError, match="this row's prompt is text"):
        run(reward_len, ["a", "b"], ["q", "q"], reward_messages=True)
    with pytest.raises(RewardError, match="leave reward_messages out"):
        run(lambda completions: [re.search("a", c) for c in completions], ["a"], [CHAT], reward_messages=True)
    with pytest.raises(RewardError) as e:
        run(lambda completions: completions["no message"], ["a"])
    assert "reward_messages" not in str(e.value)


def test_a_reward_that_raises_is_named_with_file_and_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import json\n\n\ndef mine(completions, **_):\n    return json.loads('no')\n"
    )
    namespace = {}
    source = (tmp_path / "mine.py").read_text()
    exec(compile(source, str(tmp_path / "mine.py"), "exec"), namespace)
    for function in (namespace["mine"], functools.partial(namespace["mine"], x=1)):
        with pytest.raises(RewardError, match=r"raised JSONDecodeError: .* \(.*mine.py, line 5\)$"):
            run(function)

    class Mine:
        def __call__(self, completions):
            return 1 / 0

    with pytest.raises(
        RewardError, match=r"raised ZeroDivisionError: division by zero \(.*test_rewards.py, line"
    ):
        run(Mine())


def test_what_rewards_log_is_checked_and_made_fit_for_json():
    logged = rewards.Logged(2)
    logged.log_extra("kind", (math.nan, {1, 2}))
    logged.log_extra("text", ["a", [1, None]])
    logged.log_metric("m", np.float32(0.5))
    assert logged.columns == dict(kind=["nan", "{1, 2}"], text=["a", [1, None]])
    assert logged.metrics == dict(m=[0.5])
    json.dumps(logged.columns, allow_nan=False)

    def mine(completions, log_extra, log_metric, trainer_state, wrong):
        log_extra("x", [1])
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"log_extra\('x', ..\) got 1 values for 3 completions"):
        run(mine, columns=dict(wrong=[0] * 3), state=rewards.TrainerState(), logged=rewards.Logged(3))
    with pytest.raises(ValueError, match="finite"):
        logged.log_metric("m", math.inf)
    other = rewards.Logged(1)
    other.log_extra("text", ["b"])
    joined = rewards.joined_columns([logged, other])
    assert joined == dict(kind=["nan", "{1, 2}", None], text=["a", [1, None], "b"])


@pytest.mark.parametrize("keys", [dict(), dict(reward_overlap=True), dict(resample_zero_groups=True)])
def test_what_rewards_log_lands_in_rollouts_and_metrics(tmp_path, capsys, keys):
    def mine(completions, answer, trainer_state, log_extra, log_metric, **_):
        lengths = [len(text) for text in completions]
        log_extra("letters", lengths)
        log_metric("letters/mean", sum(lengths) / len(lengths))
        log_metric("step_seen", trainer_state.step + 1000 * trainer_state.max_steps)
        log_metric("reward", 7)  # the run's own metric of that name stays what it is
        return [None if answer[i] is None or n == 0 else min(n, 5) / 5 for i, n in enumerate(lengths)]

    cfg = conftest.settings(
        tmp_path, rollouts_every=1, rewards=[(mine, 1.0)], steps=2, eval_every=2, eval_problems=3, **keys
    )
    assert train.main(cfg) == 0
    for m in conftest.rows(Path(cfg.out_dir) / "metrics.jsonl")[1:]:
        drawn = conftest.rows(Path(cfg.out_dir) / "rollouts" / f"step_{m['step']:06d}.jsonl")
        assert all(r["extra"] == dict(letters=len(r["completion"])) for r in drawn)
        assert m["step_seen"] == m["step"] + 2000 and m["logged/reward"] == 7 and m["reward"] <= 1
        if not m["resampled_prompts"]:
            mean = sum(r["extra"]["letters"] for r in drawn) / len(drawn)
            assert m["letters/mean"] == pytest.approx(mean)
    assert "none" in capsys.readouterr().out.split("\n  step   ")[1].split("\n")[0].split()


def test_every_strict_reward_with_a_lenient_twin_is_no_more_generous():
    forms = [("42", text) for text in ("#### 42", "42", "#### 41", "the 42nd, 7")]
    forms += [("72", form) for form in readers.forms("gsm8k", "right")]
    forms += [("-5", form) for form in readers.forms("gsm8k, below 0", "right")]
    answers, texts = zip(*forms)
    for name, twin in rewards.LENIENT.items():
        assert all(a <= b for a, b in zip(REWARDS[name](texts, answer=answers), twin(texts, answer=answers)))


# ---------------------------------------------------------------------------- a batch, and in the background
def test_calls_in_the_background_are_made_in_order_and_returned_by_number():
    background = rewards.InBackground()
    made = []

    def call(number, factor=1):
        made.append(number)
        return number * factor

    for number, args in ((2, (2, 10)), (0, (0,)), (1, (1, 5))):
        background.submit(number, call, *args)
    assert background.results() == [0, 5, 20] and made == [2, 0, 1]
    assert rewards.InBackground().results() == []


def test_the_first_failure_in_the_background_is_raised_when_all_are_done():
    background = rewards.InBackground()
    done = []

    def fails(number):
        raise RewardError(f"number {number}")

    background.submit(3, fails, 3)
    background.submit(1, fails, 1)
    background.submit(0, done.append, 0)
    with pytest.raises(RewardError, match="number 1"):
        background.results()
    assert done == [0]


class Letters:
    """A tokenizer with an id a letter, as far as scoring needs one."""

    def batch_decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return ["".join(chr(96 + i) for i in row if i) for row in ids]


def test_completions_are_scored_as_text_after_the_prefill_with_the_columns_of_their_row():
    def mine(completions, prompts, answer, completion_ids, group_size, max_new_tokens):
        assert completions == [">a", ">bb", ">", ">c"] and prompts == ["p", "p", "q", "q"]
        assert answer == [1, 1, None, None] and completion_ids == [[1, 0], [2, 2], [], [3]]
        assert (group_size, max_new_tokens) == (2, 9)
        return [1, 2, None, 4]

    rows = [dict(prompt="p", answer=1), dict(prompt="q")]
    texts, parts, reward = rewards.score_completions(
        Letters(),
        rows,
        [[1, 0], [2, 2], [], [3]],
        resolve([(mine, 0.5), ("ends_with", 0.0)]),
        prefill=">",
        max_new_tokens=9,
        reward_messages=False,
        timeout=10,
    )
    assert texts == [">a", ">bb", ">", ">c"]
    np.testing.assert_array_equal(parts, [[1, 0], [2, 0], [np.nan, 0], [4, 0]])
    np.testing.assert_array_equal(reward, [0.5, 1, np.nan, 2])


def test_a_group_teaches_nothing_if_its_scores_are_equal_or_missing():
    nan = math.nan
    groups = np.array([[1, 1, 1], [0, 1, nan], [nan, nan, nan], [0.5, nan, 0.5], [nan, 2, nan], [-1, 0, 0]])
    assert rewards.flat_groups(groups) == [0, 2, 3, 4]


def test_it_is_known_whether_a_reward_runs_what_a_model_wrote():
    assert rewards.runs_code(resolve(["gsm8k", "code"]))
    assert rewards.runs_code(resolve([functools.partial(REWARDS["code"], seconds=1)]))
    assert not rewards.runs_code(resolve(["gsm8k", "countdown", "math"]))


def test_every_reward_can_be_imported_from_here():
    """Config files say `from rewards import judge`, wherever the function has its home."""
    for name, function in REWARDS.items():
        assert function is REWARDS[function.__name__] if function.__name__ in REWARDS else name == "math"
        assert getattr(rewards, function.__name__) is function
