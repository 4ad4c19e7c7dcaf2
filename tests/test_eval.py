"""Evaluation, warm-up and sample.py on a tiny model, and the closed forms of the intervals."""

import subprocess
import sys

import pytest
import torch

import config as configs
import data
import eval as evaluation
import lora
import model as models
import rewards as rewarding
import sample
import sft
from conftest import ROOT

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


@pytest.fixture
def policy():
    return sample.load_policy("", scratch=SHAPE, alphabet=ALPHABET, seed=0)


def test_wilson_interval_is_the_published_one():
    low, high = evaluation.wilson(8, 10)  # Brown, Cai and DasGupta (2001), Wilson: 0.490 to 0.943
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert evaluation.wilson(0, 50)[0] == pytest.approx(0, abs=1e-12) and evaluation.wilson(50, 50)[
        1
    ] == pytest.approx(1)


def test_pass_at_k_is_the_chance_of_a_right_one_among_k():
    from itertools import combinations

    for n, c, k in ((6, 2, 3), (5, 0, 2), (4, 4, 1), (7, 1, 7)):
        draws = list(combinations(range(n), k))
        assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(min(d) < c for d in draws) / len(draws))


def test_evaluation_counts_what_a_reference_count_does(policy):
    model, tokenizer, stops, _ = policy
    task = data.load_task("arithmetic", digits=1, eval_problems=20)
    functions = rewarding.resolve([(lambda completions, **_: [float(len(c) % 2) for c in completions], 1.0)])
    m, texts = evaluation.evaluate(model, tokenizer, task.eval, functions, stop_ids=stops, max_new_tokens=6)
    assert m["eval/strict"] == pytest.approx(sum(len(t) % 2 for t in texts) / len(texts)) and len(
        texts
    ) == len(task.eval)
    again, _ = evaluation.evaluate(model, tokenizer, task.eval, functions, stop_ids=stops, max_new_tokens=6)
    assert again == m
    k, _ = evaluation.evaluate(
        model, tokenizer, task.eval, functions, stop_ids=stops, max_new_tokens=6, samples=4
    )
    assert (
        k["eval/pass@1"] == pytest.approx(k["eval/strict"])
        and k["eval/pass@4"] >= k["eval/pass@2"] >= k["eval/pass@1"]
    )


def test_warm_up_teaches_and_is_a_function_of_its_seed(policy):
    task = data.load_task("arithmetic", digits=1, worked_share=0.0, eval_problems=5)
    losses = []
    for _ in range(2):
        model, tokenizer, stops, _ = sample.load_policy("", scratch=SHAPE, alphabet=ALPHABET, seed=0)
        losses.append(
            sft.warm_up(
                model,
                tokenizer,
                task,
                steps=60,
                batch=16,
                lr=3e-3,
                seed=1,
                stop_id=stops[0],
                micro_tokens=100,
                say=lambda *_: None,
            )
        )
    assert losses[0] == losses[1] and losses[0] < 1.7  # it starts at ln 17 = 2.8 nats a token


def test_warm_up_names_rows_without_a_demonstration(policy):
    with pytest.raises(ValueError, match="solution"):
        sft.demonstrations(policy[1], [dict(prompt="1+1=")], 1, system="", prefill="")


def test_saved_policy_loads_again_whole_or_as_an_adapter(policy, tmp_path):
    model, tokenizer, stops, _ = policy
    base, adapter, merged = (str(tmp_path / name) for name in ("base", "adapter", "merged"))
    sample.save_policy(model, tokenizer, stops, base, base="")
    ids = torch.tensor(data.prompt_ids(tokenizer, "12+34="))
    again, tokens, stops_again, _ = sample.load_policy(base)
    assert (
        torch.equal(again.logits(ids), model.logits(ids))
        and stops_again == stops
        and tokens.decode(ids) == "12+34="
    )
    lora.apply(again, rank=2, alpha=4, targets=("q_proj", "up_proj"))
    for p in again.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    sample.save_policy(again, tokenizer, stops, adapter, base=base)
    with torch.no_grad():
        wanted = again.logits(ids)
        torch.testing.assert_close(sample.load_policy(adapter)[0].logits(ids), wanted)
        sample.main([f"--model={adapter}", f"--merge={merged}"])
        torch.testing.assert_close(models.load(merged).logits(ids), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["hello"], "usage"),
        (["--model=x"], "usage"),
        (["--modle=x", "hi"], "not a flag"),
        (["--model=no/such/folder", "hi"], "no model folder"),
    ],
)
def test_sample_says_what_is_wrong(argv, words):
    with pytest.raises(ValueError, match=words):
        sample.main(argv)


def test_eval_and_sample_run_as_commands_on_a_saved_checkpoint(policy, tmp_path):
    model, tokenizer, stops, _ = policy
    sample.save_policy(model, tokenizer, stops, str(tmp_path / "m"), base="")
    out = subprocess.run(
        [
            sys.executable,
            str(ROOT / "eval.py"),
            str(ROOT / "configs/arithmetic.py"),
            f"--model={tmp_path / 'm'}",
            "--eval_problems=7",
            "--threads=1",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert out.returncode == 0 and "7 problems" in out.stdout, out.stderr
    out = subprocess.run(
        [
            sys.executable,
            str(ROOT / "sample.py"),
            f"--model={tmp_path / 'm'}",
            "--max_new_tokens=5",
            "12+34=",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert out.returncode == 0 and "tokens" in out.stdout, out.stderr
    out = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), str(ROOT / "configs/arithmetic.py"), "--eval_problms=7"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (
        out.returncode == 1
        and out.stderr.strip().splitlines()[-1].startswith("eval.py:")
        and "eval_problems" in out.stderr
    )


def test_a_batch_of_which_every_completion_was_cut_is_refused():
    with pytest.raises(ValueError, match="cut at 7 tokens: raise max_new_tokens"):
        evaluation.refuse_hopeless(torch.rand(4, 4), [False] * 16, 7)
    evaluation.refuse_hopeless(torch.rand(4, 4), [False] * 15 + [True], 7)
    evaluation.refuse_hopeless(
        torch.tensor([[1.0, 1.0], [1.0, float("nan")], [0.0, 1.0]]), [True] * 6, 7
    )  # one group with signal is enough


def test_evaluation_shows_what_training_would_meet_in_its_first_batch(tmp_path):
    cfg = configs.Config(
        scratch=SHAPE,
        alphabet=ALPHABET,
        task="arithmetic",
        task_options=dict(digits=1),
        rewards=[("arithmetic", 1.0), ("last_number", 0.0)],
        prompts_per_step=3,
        group_size=4,
        max_new_tokens=6,
        device="cpu",
    )
    model, tokenizer, stops, _ = sample.load_policy("", scratch=SHAPE, alphabet=ALPHABET, seed=0)
    task = evaluation.load_task(cfg)
    for name, share in (("last_number", "no answer found in"), ("arithmetic", None)):
        text = evaluation.first_batch(model, tokenizer, task, rewarding.resolve([(name, 1.0)]), cfg, stops)
        for words in (
            "3 prompts x 4",
            "mean reward",
            "spread within groups",
            "groups with any signal",
            "cut at 6 tokens",
            "--- ",
            share,
        ):
            assert words is None or words in text, words
    zero = evaluation.first_batch(
        model,
        tokenizer,
        task,
        rewarding.resolve([(lambda completions, **_: [0.0] * len(completions), 1.0)]),
        cfg,
        stops,
    )
    assert (
        "0% of the groups with any signal" in zero
        and "train.py would not start" in zero
        and text.count("(reward ") == 3
    )
