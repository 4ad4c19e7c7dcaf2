"""docs/environments.md does what it says, where the packages are installed."""

import re
import string

import pytest

import train
from config import load
from conftest import ROOT, SHAPE, rows

PAGE = (ROOT / "docs/environments.md").read_text()
FILES = dict(re.findall(r"```python\n# configs/(\w+)\.py\n(.*?)```", PAGE, re.S))
ALPHABET = string.digits + string.ascii_letters + string.punctuation + " \n"
SMALL = f"""
model, scratch, alphabet, system_prompt = "", {SHAPE | dict(max_position_embeddings=2048)!r}, {ALPHABET!r}, ""
lora_rank, prompts_per_step, group_size, max_new_tokens = 0, 2, 4, 24
steps, lr, eval_every, save_every, rollouts_every, show_every, eval_problems = 2, 1e-2, 2, 0, 1, 0, 2
device, threads, force = "cpu", 1, True
"""


def test_no_adapter_is_longer_than_a_hundred_lines():
    assert FILES.keys() == {"my_reasoning_gym", "my_verifiers"}
    assert all(len(text.splitlines()) <= 100 for text in FILES.values())


def trained(tmp_path, name, text):
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    assert train.main(load([str(path), f"--out_dir={tmp_path / 'run'}"])) == 0
    return rows(tmp_path / "run/metrics.jsonl")


def test_reasoning_gym(tmp_path):
    gym = pytest.importorskip("reasoning_gym")
    metrics = trained(tmp_path, "my_reasoning_gym", FILES["my_reasoning_gym"] + SMALL)
    assert metrics[-1]["step"] == 2 and metrics[-1]["reward_failures"] == 0
    # The grader is the data set's: its own answer is right.
    problem = gym.create_dataset("leg_counting", size=10_000, seed=0)[0]
    found = {}
    exec(compile(FILES["my_reasoning_gym"], "my_reasoning_gym.py", "exec"), found)
    texts = [f"so <answer>{problem['answer']}</answer>", "<answer>-1</answer>"]
    assert found["graded"](texts, [problem, problem]) == [1.0, 0.0]


# An environment of verifiers' own kind: it asks for longer answers, three times at most.
LONGER = """
from datasets import Dataset


class Longer(vf.MultiTurnEnv):
    @vf.stop
    async def long_enough(self, state):
        turns = state["trajectory"]
        return len(turns) >= 3 or bool(turns) and len(turns[-1]["completion"][-1].content) > 15

    async def env_response(self, messages, state, **_):
        return [dict(role="user", content="longer")]


def length(completion, answer, **_):
    return len(completion[-1].content) / 24 + (answer == "x")


_questions = Dataset.from_list([dict(question="Say something", answer="x")] * 3)
_games = Longer(dataset=_questions, rubric=vf.Rubric(funcs=[length]))
turn_ends = tuple("aeiou0123")
"""


def test_verifiers(tmp_path):
    vf = pytest.importorskip("verifiers")
    if not hasattr(vf, "stop") or not hasattr(vf, "MultiTurnEnv"):
        pytest.skip("another generation of verifiers: the page names 0.1.14")
    text = FILES["my_verifiers"]
    named = (
        '_games = vf.load_environment("wordle")  # any chat environment of several turns that is installed\n'
    )
    assert text.count(named) == 1
    metrics = trained(tmp_path, "my_verifiers", text.replace(named, LONGER) + SMALL)
    assert metrics[-1]["turns/mean"] > 1.2 and metrics[-1]["turns/env_failures"] == 0
    for row in rows(tmp_path / "run/rollouts/step_000001.jsonl"):
        said = [m["content"] for m in row["turns"] if m["role"] == "assistant"]
        if row["finish_reason"] == "stop":  # else its last turn was cut, and is none of the rubric's
            assert row["env_reward"] == pytest.approx(len(said[-1]) / 24 + 1)
