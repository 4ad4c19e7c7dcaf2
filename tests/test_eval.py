"""Evaluation, warm-up, eval.py and sample.py on a tiny model, and the closed forms of the intervals."""

import subprocess
import sys
from itertools import combinations

import pytest
import torch

import config as configs
import data
import eval as eval_script
import lora
import model as models
import sample
import warmup
from conftest import ROOT
from evaluation import evaluate, lint, pass_at_k, pays, probes_of, refuse_hopeless, ten_guesses, wilson
from policy import load_policy, save_policy
from rewards import resolve
from rollout import Sampler

SHAPE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    initializer_range=0.1,
)
ALPHABET = "0123456789+=<>,_^"


def run(*argv):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def policy():
    return load_policy("", scratch=SHAPE, alphabet=ALPHABET, seed=0)


def test_wilson_interval_is_the_published_one():
    low, high = wilson(8, 10)  # Brown, Cai and DasGupta (2001), Wilson: 0.490 to 0.943
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(0, 50)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(50, 50)[1] == pytest.approx(1)


def test_pass_at_k_is_the_chance_of_a_right_one_among_k():
    for n, c, k in ((6, 2, 3), (5, 0, 2), (4, 4, 1), (7, 1, 7)):
        draws = list(combinations(range(n), k))
        with_a_right_one = sum(min(draw) < c for draw in draws)
        assert pass_at_k(n, c, k) == pytest.approx(with_a_right_one / len(draws))


def test_evaluation_counts_what_a_reference_count_does(policy):
    model, tokenizer, stops, _ = policy
    rows = data.load_task("arithmetic", digits=1, eval_problems=20).eval

    def odd_length(completions, **_):
        return [float(len(text) % 2) for text in completions]

    options = dict(stop_ids=stops, max_new_tokens=6)
    sampler, functions = Sampler(model), resolve([(odd_length, 1.0)])
    metrics, texts = evaluate(sampler, tokenizer, rows, functions, **options)
    assert len(texts) == len(rows)
    assert metrics["eval/strict"] == pytest.approx(sum(len(text) % 2 for text in texts) / len(texts))
    again, _ = evaluate(sampler, tokenizer, rows, functions, **options)
    assert again == metrics
    of_four, _ = evaluate(sampler, tokenizer, rows, functions, samples=4, **options)
    assert of_four["eval/pass@1"] == pytest.approx(of_four["eval/strict"])
    assert of_four["eval/pass@4"] >= of_four["eval/pass@2"] >= of_four["eval/pass@1"]


def test_an_evaluation_that_is_asked_to_stop_gives_nothing(policy):
    model, tokenizer, stops, _ = policy
    rows = data.load_task("arithmetic", digits=1, eval_problems=20).eval
    functions = resolve([("arithmetic", 1.0)])
    options = dict(stop_ids=stops, max_new_tokens=6)
    asked = evaluate(Sampler(model), tokenizer, rows, functions, stop=lambda: True, **options)
    assert asked == ({}, [])


@pytest.mark.slow
def test_warm_up_teaches_and_is_a_function_of_its_seed():
    task = data.load_task("arithmetic", digits=1, worked_share=0.0, eval_problems=5)
    losses = []
    for _ in range(2):
        model, tokenizer, stops, _ = load_policy("", scratch=SHAPE, alphabet=ALPHABET, seed=0)
        options = dict(steps=60, batch=16, lr=3e-3, seed=1, stop_id=stops[0], micro_tokens=100)
        losses.append(warmup.warm_up(model, tokenizer, task, say=lambda *_: None, **options))
    assert losses[0] == losses[1] and losses[0] < 1.7  # it starts at ln 17 = 2.8 nats a token


def test_warm_up_names_rows_without_a_demonstration(policy):
    tokenizer, stops = policy[1], policy[2]
    with pytest.raises(ValueError, match="solution"):
        warmup.demonstrations(tokenizer, [dict(prompt="1+1=")], stops[0], system="", prefill="")


def test_saved_policy_loads_again_whole_or_as_an_adapter(policy, tmp_path):
    model, tokenizer, stops, _ = policy
    base, adapter, merged = (str(tmp_path / name) for name in ("base", "adapter", "merged"))
    save_policy(model, tokenizer, stops, base, base="")
    ids = torch.tensor(data.prompt_ids(tokenizer, "12+34="))
    again, tokenizer_again, stops_again, _ = load_policy(base)
    assert torch.equal(again.logits(ids), model.logits(ids))
    assert stops_again == stops and tokenizer_again.decode(ids) == "12+34="
    lora.apply(again, rank=2, alpha=4, targets=("q_proj", "up_proj"))
    for p in again.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    save_policy(again, tokenizer, stops, adapter, base=base)
    with torch.no_grad():
        wanted = again.logits(ids)
        torch.testing.assert_close(load_policy(adapter)[0].logits(ids), wanted)
        sample.main([f"--model={adapter}", f"--merge={merged}"])
        torch.testing.assert_close(models.load(merged).logits(ids), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["hello"], "usage"),
        (["--model=x", ""], "the prompt is empty"),
        (["--model=x", "  "], "the prompt is empty"),
        (["--model"], "has no value"),
        (["--model=x", "--samples=many", "hi"], "is no int"),
        (["--model=x", "--samples=0", "hi"], "too small"),
        (["--model=x", "--temperature=-1", "hi"], "too small"),
        (["--model=x", "--top_p=7", "hi"], "too large"),
        (["--model=x", "--threads=1000000", "hi"], "too large"),
        (["--modle=x", "hi"], "not a flag"),
        (["--model=no/such/folder", "hi"], "no model folder"),
    ],
)
def test_sample_says_what_is_wrong(argv, words):
    with pytest.raises(ValueError, match=words):
        sample.main(argv)


@pytest.mark.slow
def test_eval_and_sample_run_as_commands_on_a_saved_checkpoint(policy, tmp_path):
    model, tokenizer, stops, _ = policy
    folder = tmp_path / "m"
    save_policy(model, tokenizer, stops, str(folder), base="")
    out = run("eval.py", "configs/arithmetic.py", f"--model={folder}", "--eval_problems=7", "--threads=1")
    assert out.returncode == 0 and "7 problems" in out.stdout, out.stderr
    # Before the accuracy: what the reward pays for answers that are none.
    assert "what the rewards pay, the mean over 4 prompts" in out.stdout and "warning" not in out.stdout
    out = run("sample.py", f"--model={folder}", "--max_new_tokens=5", "12+34=")
    assert out.returncode == 0 and "tokens" in out.stdout, out.stderr


@pytest.mark.slow
def test_a_wrong_flag_of_eval_is_one_sentence():
    out = run("eval.py", "configs/arithmetic.py", "--eval_problms=7")
    assert out.returncode == 1 and "eval_problems" in out.stderr
    assert out.stderr.strip().splitlines()[-1].startswith("eval.py:")


def test_a_batch_of_which_every_completion_was_cut_is_refused():
    with pytest.raises(ValueError, match="cut at 7 tokens: raise max_new_tokens"):
        refuse_hopeless(torch.rand(4, 4), [False] * 16, 7)
    refuse_hopeless(torch.rand(4, 4), [False] * 15 + [True], 7)
    one_group_with_signal = torch.tensor([[1.0, 1.0], [1.0, float("nan")], [0.0, 1.0]])
    refuse_hopeless(one_group_with_signal, [True] * 6, 7)


def test_evaluation_shows_what_training_would_meet_in_its_first_batch():
    cfg = configs.Config(
        scratch=SHAPE,
        alphabet=ALPHABET,
        task="arithmetic",
        task_options=dict(digits=1),
        prompts_per_step=3,
        group_size=4,
        max_new_tokens=6,
        device="cpu",
    )
    model, tokenizer, stops, _ = load_policy("", scratch=SHAPE, alphabet=ALPHABET, seed=0)
    task = data.load_task("arithmetic", **configs.task_options(cfg))

    def shown(reward):
        functions = resolve([(reward, 1.0)])
        return eval_script.show_first_batch(Sampler(model), tokenizer, task, functions, cfg, stops)

    always = ["3 prompts x 4", "mean reward", "spread within groups", "groups with any signal"]
    always += ["cut at 6 tokens", "--- "]
    for reward in ("last_number", "arithmetic"):
        text = shown(reward)
        assert all(words in text for words in always), text
        assert text.count("(reward ") == 3
    assert "no answer found in" in shown("last_number")

    def zero(completions, **_):
        return [0.0] * len(completions)

    text = shown(zero)
    assert "0% of the groups with any signal" in text and "train.py would not start" in text


# --------------------------------------------------------------- what rewards pay for answers that are none
ROWS = [dict(prompt=f"What is {a} + 30?", answer=str(a + 30)) for a in (42, 17, 8, 100, 5)]
OPTIONS = dict(prefill="", max_new_tokens=50, reward_messages=False, timeout=10)


def linted(*rewards, rows=ROWS, **options) -> str:
    tokenizer = data.char_tokenizer("abcdefghijklmnopqrstuvwxyz 0123456789#.,+=?<>/")
    return lint(tokenizer, rows, resolve(list(rewards)), **OPTIONS | options)


def warnings(text) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning")]


def anywhere(completions, answer, **_):
    return [float(a in text) for a, text in zip(answer, completions)]


def echoes(completions, prompts, **_):
    return [float(text == "" or prompt in text) for text, prompt in zip(completions, prompts)]


def short(completions, **_):
    return [1 - len(text) / 10_000 for text in completions]


def keeps_its_cool(completions, answer, **_):
    return [None if len(text) > 1000 else float(a in text[:9]) for a, text in zip(answer, completions)]


def rambles(completions, answer, **_):
    return [float(len(text) > 1000 or text.endswith(a)) for a, text in zip(answer, completions)]


@pytest.mark.parametrize(
    "reward, words",
    [
        (anywhere, ["anywhere pays 1.000 for ten answers at once and 1.000 for a right one"]),
        (short, ["for a wrong answer", "an empty answer"]),
        (echoes, ["an empty answer", "the question repeated", "a wrong answer", "ten answers", "nothing"]),
        (rambles, ["10,000 tokens of nothing"]),
        (keeps_its_cool, ["cannot score 10,000 tokens of nothing (None), so that goes unpunished"]),
    ],
)
def test_a_reward_that_pays_for_no_answer_what_it_pays_for_a_right_one_is_warned_of(reward, words):
    found = "\n".join(warnings(linted((reward, 1.0))))
    assert all(some in found for some in words), found


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_lenient", "arithmetic"])
def test_the_graders_of_this_repository_are_not_warned_of(name):
    text = linted((name, 1.0), ("format", 0.1), ("overlong", 1.0), (short, 0.0))
    assert not warnings(text), text
    assert [line.split()[:2] for line in text.splitlines()[2:4]] == [[name, "1.000"], ["format", "1.000"]]


def test_what_all_rewards_pay_together_is_warned_of_where_one_outweighs_the_other():
    assert not warnings(linted(("gsm8k", 1.0), (short, 0.2)))
    assert "all together pays" in warnings(linted(("gsm8k", 1.0), (echoes, 1.5)))[0]


def test_the_gold_answer_alone_is_a_note_and_no_warning():
    text = linted(("gsm8k_lenient", 1.0))
    assert "note: gsm8k_lenient pays 1.000 for the gold answer alone" in text and not warnings(text)


def test_a_reward_that_fails_on_such_a_text_is_named_with_the_text():
    def first_word(completions, **_):
        return [float(text.split()[0] == "so") for text in completions]

    found = warnings(linted((first_word, 1.0)))
    assert len(found) == 1 and found[0].startswith(
        "warning: an empty answer would stop a run: reward 'first_word'"
    )
    assert "IndexError" in found[0] and "test_eval.py, line" in found[0]


def test_rows_without_an_answer_are_shown_and_not_compared():
    text = linted((echoes, 1.0), rows=[dict(prompt="Say hello."), dict(prompt="Say it again.")])
    assert "empty" in text and "is not known" in text and not warnings(text)


def test_what_is_tried_on_a_row():
    guesses = ten_guesses("72", [])
    assert len(set(guesses)) == 10 and guesses.index("72") == 5
    guesses = ten_guesses("even", ["even", "odd"])
    assert len(set(guesses)) == 10 and guesses.index("even") == 5 and "odd" in guesses
    probes = [probes_of(row, ["72"]) for row in ROWS]
    assert len({tuple(column for column, _ in of_row) for of_row in probes}) == 1
    texts = {}

    def look(completions, completion_ids, **_):
        texts.update(zip(completions, map(len, completion_ids)))
        return [0.0] * len(completions)

    tokenizer = data.char_tokenizer("so 0123456789")
    pays(tokenizer, ROWS[:1], resolve([look]), ["empty", "gold", "nothing"], **OPTIONS | dict(prefill="so"))
    assert sorted(texts.values()) == [2, 4, 10_000] and set(texts) == {"so", "so72", "so" + " so" * 10_000}
