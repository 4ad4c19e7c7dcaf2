"""What people see of conversations: rollouts/, page, screen, evaluations, and sentences before a run."""

import json
import math

import pytest
import torch

import checks
import config as configs
import data
import eval as eval_script
import evaluation
import plan
import report
import rewards
import sample
import screen
import train
import turns
from conftest import WITH_TURNS, rows, settings
from policy import load_policy
from rollout import Sampler
from test_report import metrics_row, no_browser, opened, rollout_row, tab, write_run  # noqa: F401
from test_turns import conversations, run_of
from test_turns import sample as converse


# ------------------------------------------------------------------------------------------------ rollouts/
def test_what_is_shown_of_a_conversation(tmp_path, capsys):
    """Numbers of tokens stand beside their tokens, and given ones have none."""
    cfg = run_of(tmp_path, rollouts_every=1, show_every=1, eval_every=2, eval_problems=3, steps=2)
    assert train.main(cfg) == 0
    told = capsys.readouterr().out
    assert "environment: Echo, replies as they are, at most 4 turns and 40 tokens a row behind" in told
    assert " turns\n" in told  # of the evaluations
    assert "      |   [environment] " in told and "turns: of the model in a row" in " ".join(told.split())
    folder = tmp_path / "run"
    assert rows(folder / "metrics.jsonl")[-1]["eval/turns"] >= 1
    shown = rows(folder / "rollouts/step_000001.jsonl")
    assert any(row["given"] for row in shown)
    assert {row["finish_reason"] for row in shown} <= {"stop", "turns", "length"}
    for row in shown:
        given = [first + i for first, count in row["given"] for i in range(count)]
        for name in ("logprobs", "entropy", "difference"):
            values = row[name]
            if values is not None:
                assert [i for i, x in enumerate(values) if x is None] == given
        assert len(row["logprobs"]) == len(row["tokens"]) == len(row["ids"])
        replies = "".join(row["tokens"][i] for i in given)
        assert replies == "".join(m["content"] for m in row["turns"][1::2])
        assert row["env_reward"] is not None and "env_failure" not in row
    run = report.read_run(str(folder))
    assert run.groups[0]["rows"][0]["given"] == shown[0]["given"]
    assert len(run.groups[0]["rows"][0]["logprobs"]) == len(shown[0]["ids"])
    for group in run.groups:
        for row in group["rows"]:
            assert sum(row["widths"]) == len(row["text"])
    assert "turns" in {what for what, _, _ in report.key_figures(run)}
    for answer in rows(folder / "rollouts/eval_000002.jsonl"):
        assert answer["completion"] == data.transcript(answer["turns"])


def test_rollouts_without_an_environment_have_no_column_of_turns(tmp_path):
    train.main(settings(tmp_path, rollouts_every=1, eval_every=1, eval_problems=2, steps=1))
    row = rows(tmp_path / "run/rollouts/step_000001.jsonl")[0]
    assert not row.keys() & {"turns", "given", "env_reward", "env_failure"}
    assert len(row["logprobs"]) == len(row["ids"])
    assert list(row)[-4:] == ["finish_reason", "logprobs", "entropy", "difference"]
    assert "turns" not in rows(tmp_path / "run/rollouts/eval_000001.jsonl")[0]


def goes_on(row, said):
    return "9"


def breaks(row, said):
    raise KeyError(said)


@pytest.mark.parametrize(
    "reason, env, options",
    [
        ("turns", goes_on, dict(of=conversations(goes_on, max_turns=1))),
        ("environment", breaks, {}),
        ("context", goes_on, dict(of=conversations(goes_on, max_turns=99), max_context=12)),
        ("length", goes_on, dict(of=conversations(goes_on, turn_ends=()), max_new_tokens=6)),
    ],
)
def test_the_finish_reason_says_what_ended_a_conversation(tiny, reason, env, options):
    most = options.setdefault("max_new_tokens", 24)
    out, talks = converse(tiny, env, **options)
    found = [row["finish_reason"] for row in talks.for_people(out, most)]
    assert reason in found and "stop" not in found  # these environments never end a row
    for row, talk, drawn in zip(found, talks.talks, out.logprobs):
        assert (row == "environment") == bool(talk.failed)
        assert row != "length" or len(drawn) == most


# ------------------------------------------------------------------------------------------------- the page
def conversation_row(**more):
    """A conversation in a chat's markers, which ends by its third turn."""
    tokens = ["hel", "lo", "<eos>", "<start>", "user\n", "no\n", "<start>", "so", "?", "\nuser\n", "y", "es."]
    text = "hellouser\nno\nso?\nuser\nyes."
    turns = [dict(role="assistant", content=said) for said in ("hello", "so?", "yes.")]
    row = rollout_row(10, 0, text, tokens=tokens, ids=list(range(12)), given=[[3, 4], [9, 1]], turns=turns)
    numbers = [None if i in (3, 4, 5, 6, 9) else 0.25 for i in range(12)]
    return row | dict(logprobs=numbers, entropy=numbers, difference=None) | more


def test_each_token_of_a_conversation_is_its_own_piece_of_the_text():
    shown = report.row_for_page(conversation_row(), "")
    ends, pieces = 0, []
    for width in shown["widths"]:
        pieces.append(shown["text"][ends : ends + width])
        ends += width
    assert pieces == ["hel", "lo", "", "", "user\n", "no\n", "", "so", "?", "\nuser\n", "y", "es."]
    assert shown["length"] == 7 and shown["turns"] == 3 and shown["stop"] == "" and shown["cut"] is None
    assert shown["logprobs"][0] == 250 and shown["logprobs"][4] == 0


@pytest.mark.parametrize("given", [None, 3, [], [[1]], [["a", 2]], [[0, None], 7]])
def test_a_damaged_list_of_replies_is_no_reason_to_stop(given):
    assert report.row_for_page(conversation_row(given=given), "")["widths"]


def test_the_page_says_what_cut_a_conversation_off():
    for reason, said in report.CUT.items():
        assert report.row_for_page(conversation_row(finish_reason=reason), "")["cut"] == said
    assert report.row_for_page(conversation_row(finish_reason=[1]), "")["cut"] is None


@pytest.mark.slow
@no_browser
def test_replies_are_blocks_of_their_own_without_colour(tab, tmp_path):  # noqa: F811
    failed = conversation_row(finish_reason="environment", env_failure="it raised KeyError")
    write_run(
        tmp_path, [metrics_row(10, **{"turns/mean": 2.0, "turns/max": 3})], [conversation_row(), failed]
    )
    opened(tab, tmp_path, "#color=advantage")
    assert tab.ask("[...document.querySelectorAll('.card:nth-child(1) .given')].map(n => n.textContent)") == [
        "user\nno\n",
        "\nuser\n",
    ]
    assert tab.text(".card .text") == "hellouser\nno\nso?\nuser\nyes."
    assert "7 tokens, 3 turns" in tab.text(".card header")
    style = "getComputedStyle(document.querySelector('.card .given span')).backgroundColor"
    assert tab.ask(style) == "rgba(0, 0, 0, 0)"
    assert tab.ask("document.querySelector('.card:nth-child(2) .end').title") == "it raised KeyError"
    assert "Turns of the model" in tab.text("#curves") and not tab.errors
    tab.ask("tell(document.querySelector('.card .given span'), data.items[0].runs[0][0])")
    assert tab.text("#tip").endswith("given by the environment")


# ----------------------------------------------------------------------------------------------- the screen
def messages_of(turns: int) -> list[dict]:
    talk = [dict(role="assistant", content="0?")]
    for i in range(1, turns):
        talk += [dict(role="tool", content="<"), dict(role="assistant", content=f"{i}?")]
    return talk


def test_a_sample_is_shown_turn_by_turn_and_a_long_one_from_both_ends(capsys):
    screen.show_sample(dict(prompt="32:"), "", 0.5, dict(turns=messages_of(2), finish_reason="turns"))
    assert capsys.readouterr().out.splitlines() == [
        "      | 32:   reward 0.50   cut: turns", "      |   0?", "      |   [tool] <", "      |   1?",
    ]  # fmt: skip
    screen.show_sample(dict(prompt="32:"), "", math.nan, dict(turns=messages_of(20), finish_reason="stop"))
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == "      | 32:"
        and len(lines) == 10
        and lines[5] == "      |   .. 31 messages more .."
        and lines[-1].endswith("19?")
    )


def test_the_plan_counts_what_an_environment_gives():
    cfg = configs.load(["configs/guess.py"])
    said = plan.page(cfg, checks.shape_of(cfg), 16, 3)
    assert "completions of 60 at most, 90 with what an environment replies\ntwice as many slots" in said


def test_sample_says_that_the_environment_is_not_asked(tmp_path, capsys):
    for role, words in (("user", "you answer in its place"), ("", "made up by the model")):
        about = dict(run="x", config=dict(env="guess", env_role=role))
        (tmp_path / "config.json").write_text(json.dumps(about))
        sample.as_trained(dict(model=str(tmp_path), system="", prefill="", base=""))
        assert words in capsys.readouterr().out


def test_a_first_batch_is_shown_as_conversations_with_what_cut_each(tiny_policy):
    model, tokenizer, stop_ids, cfg = tiny_policy
    talks = turns.Conversations(goes_on, tokenizer, stop_ids=stop_ids, **configs.turn_options(cfg))
    task = data.load_task(cfg.task, **configs.task_options(cfg))
    functions = rewards.resolve(cfg.rewards)
    told = eval_script.show_first_batch(Sampler(model), tokenizer, task, functions, cfg, stop_ids, talks)
    assert "100% cut (length " in told and "\n[environment] 9\n" in told and "tokens, cut (" in told
    assert "train.py would not start: every conversation of the first batch was cut" in told


@pytest.fixture
def tiny_policy(tmp_path):
    cfg = settings(tmp_path, **WITH_TURNS | dict(env=goes_on, max_turns=6))
    return *load_policy("", scratch=cfg.scratch, alphabet=cfg.alphabet, seed=0)[:3], cfg


def test_a_first_batch_in_which_every_conversation_was_cut_names_all_limits():
    with pytest.raises(ValueError, match="max_turns, max_context or max_new_tokens = 7"):
        evaluation.refuse_hopeless(torch.rand(4, 4), [False] * 16, 7, has_turns=True)


# ---------------------------------------------------------------------------------- before a model is loaded
class NoStep:
    def __init__(self, row):
        pass


class NoRow:
    def step(self, said):
        return None


class NothingSaid(NoStep):
    def step(self):
        return None


class NoReward(NoStep):
    def step(self, said):
        return None


class Whole(NoReward):
    def reward(self):
        return 1.0


class Static(Whole):
    @staticmethod
    def step(said):
        return None


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(env="gues"), "did you mean 'guess'?"),
        (dict(env=NoStep), "NoStep is a class without step(said)"),
        (dict(env=NoRow), "NoRow must take (row)"),
        (dict(env=NothingSaid), "step of the environment NothingSaid must take (said)"),
        (dict(env=lambda said: None), "must take (row, said): it takes (said)"),
        (dict(env=NoReward, rewards=[("env", 1.0)]), "NoReward has none"),
        (dict(env=goes_on, rewards=["env"]), "goes_on has none"),
        (dict(rewards=[("env", 1.0)]), "there is none: give env"),
        (dict(env=Whole, turn_ends=("",)), "turn_ends has ''"),
        (dict(env=Whole, turn_ends=(3,)), "turn_ends has 3"),
        (dict(env=Whole, max_new_tokens=64, max_context=64), "max_context = 64 is of a prompt, all turns"),
    ],
)
def test_what_can_not_be_an_environment_is_one_sentence(keys, words):
    with pytest.raises(ValueError) as error:
        checks.environment(configs.Config(**dict(rewards=["gsm8k"]) | keys))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_whole_environments_pass():
    checks.environment(configs.Config(env=Whole, rewards=[("env", 1.0)], turn_ends=("</tool>",)))
    for env in (Static, *turns.ENVS):
        checks.environment(configs.Config(env=env))
