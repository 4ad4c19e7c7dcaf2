"""tasks/calculator.py: exact, bounded, and text back in any case."""

import json
import os
import time
from pathlib import Path

import pytest

import turns
from conftest import ROOT
from tasks.calculator import answer, conversation, env

TRAIN = Path(os.environ.get("NANOGRPO_GSM8K", ROOT / "data/gsm8k")) / "train.jsonl"


@pytest.mark.parametrize(
    "expression, value",
    [
        ("48/2", "24"), ("48 + 24", "72"), ("0.1+0.2", "0.3"), ("1/3", "0.333333"), ("2/3", "0.666667"),
        ("-5*3", "-15"), ("1-1.5", "-0.5"), ("(2+3)*4", "20"), ("1,250 * 2", "2500"), ("$12.50*4", "50"),
        ("20% * 50", "10"), ("6 × 7", "42"), ("84 ÷ 2 =", "42"), ("1/8", "0.125"), ("0", "0"),
        ("007", "error"), ("1/0", "error"), ("2**99", "error"), ("7//2", "error"), ("", "error"),
        ("x+1", "error"), ("1e5", "error"), ("__import__('os')", "error"), ("1 2", "error"),
        ("((((", "error"), ("٣+1", "error"), ("5!", "error"), ("9" * 101, "error"), ("1+" * 49 + "1", "50"),
        ("-1/3000000", "0"),
    ],
)  # fmt: skip
def test_values_are_exact_and_anything_else_is_an_error(expression, value):
    assert answer(expression) == value


def test_only_a_turn_that_ends_with_an_expression_is_answered():
    assert env({}, "48 clips / 2 = <calc>48/2</calc>") == "24"
    assert env({}, "<calc>1+1</calc> and <calc>2*3</calc>\n") == "6"
    assert env({}, "The answer is \\boxed{72}.") is None
    assert env({}, "1+1</calc>") is None
    assert env({}, "<calc>1+1") is None


@pytest.mark.parametrize(
    "said", ["<calc>" * 200_000 + "</calc>", "<calc>" + "(" * 1_000_000 + "</calc>", "<calc>\0</calc>",
             "<calc>" + "9*" * 500_000 + "9</calc>", "<calc>" + "-" * 99 + "1</calc>", "</calc>" * 100_000],
)  # fmt: skip
def test_hostile_text_gets_a_short_reply_at_once(said):
    start = time.perf_counter()
    reply = env({}, said)
    assert reply is None or len(reply) <= 102
    assert time.perf_counter() - start < 0.1


def test_the_environment_has_a_name():
    assert turns.resolve("calculator") is env
    with pytest.raises(ValueError, match="unknown environment 'calculater', did you mean 'calculator'"):
        turns.resolve("calculater")


def test_a_solutions_notes_are_what_the_calculator_would_have_said():
    text = "She sold 48/2 = <<48/2=24>>24 clips.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72"
    texts = conversation(text)
    first, second = "She sold 48/2 = <calc>48/2</calc>", " clips.\nShe sold 48+24 = <calc>48+24</calc>"
    assert texts == [first, "24", second, "72", " clips.\n#### 72"]
    for said, reply in zip(texts[::2], [*texts[1::2], None]):
        assert env({}, said) == reply
    assert conversation("about <<x/2=3>>3 of <<7*1=7>>8") == ["about 3 of 8"]


@pytest.mark.slow
def test_most_of_gsm8ks_notes_are_taken():
    """Of all solutions, where the data is at hand."""
    if not TRAIN.is_file():
        pytest.skip("needs GSM8K's train.jsonl")
    rows = [json.loads(line)["answer"] for line in TRAIN.read_text().splitlines()]
    notes, taken = sum(text.count("<<") for text in rows), 0
    for text in rows:
        texts = conversation(text)
        taken += len(texts) // 2
        assert all(env({}, said) == reply for said, reply in zip(texts[::2], [*texts[1::2], None]))
    assert taken > 0.9 * notes
