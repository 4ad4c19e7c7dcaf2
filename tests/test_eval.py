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
from evaluation import evaluate, pass_at_k, refuse_hopeless, wilson
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


def test_eval_and_sample_run_as_commands_on_a_saved_checkpoint(policy, tmp_path):
    model, tokenizer, stops, _ = policy
    folder = tmp_path / "m"
    save_policy(model, tokenizer, stops, str(folder), base="")
    out = run("eval.py", "configs/arithmetic.py", f"--model={folder}", "--eval_problems=7", "--threads=1")
    assert out.returncode == 0 and "7 problems" in out.stdout, out.stderr
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
