"""The run as a whole, on a tiny model of random weights: what it writes, what it refuses, and that it ends with the same bits however it is cut."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import config as configs
import eval as evaluation
import kernels.logprob
import loss as losses
import lora
import model as models
import rewards as rewarding
import rollout
import train
from conftest import ROOT
from kernels.logprob import logprob_ref
from sample import save_policy

SHAPE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    initializer_range=0.2,
)


def even(completions, **_):
    """A reward with signal on random text: the share of even digits."""
    return [sum(c in "02468" for c in text) / max(1, len(text)) for text in completions]


def settings(tmp_path, **keys):
    base = dict(
        scratch=SHAPE,
        alphabet="0123456789+=<>,_^",
        task="arithmetic",
        task_options=dict(style="chars", digits=2),
        rewards=[(even, 1.0)],
        lora_rank=0,
        prompts_per_step=4,
        group_size=4,
        max_new_tokens=12,
        micro_tokens=150,
        steps=4,
        lr=1e-2,
        warmup_steps=2,
        eval_every=0,
        save_every=2,
        rollouts_every=2,
        show_every=0,
        threads=1,
        device="cpu",
        out_dir=str(tmp_path / "run"),
        keep=0,
    )
    return configs.check_values(configs.Config(**(base | keys)))


def weights(path: Path) -> dict:
    """Every tensor a checkpoint holds, its optimiser's too."""
    return {
        f"{f.name}:{name}": t for f in sorted(path.glob("*.safetensors")) for name, t in load_file(f).items()
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_run_writes_what_the_design_promises(tmp_path, capsys):
    cfg = settings(
        tmp_path, eval_every=2, eval_problems=5, rewards=[(even, 1.0), ("arithmetic", 0.0)], beta=0.1
    )
    assert train.main(cfg) == 0
    out, run = capsys.readouterr().out, Path(cfg.out_dir)
    metrics = rows(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    wanted = """num_tokens step_time reward reward_std rewards/even/mean rewards/even/std rewards/arithmetic/mean frac_reward_zero_std loss policy_loss kl entropy
        grad_norm learning_rate clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean completions/mean_length completions/min_length completions/max_length
        completions/mean_terminated_length completions/clipped_ratio sampling/sampling_logp_difference/mean sampling/sampling_logp_difference/max
        sampling/importance_sampling_ratio/min sampling/importance_sampling_ratio/mean sampling/importance_sampling_ratio/max epoch time/sample time/score time/reference
        time/train time/other tokens_per_second/sample tokens_per_second/train memory/peak_gb reward_failures""".split()
    assert not set(wanted) - metrics[-1].keys()
    assert {"eval/strict", "eval/lenient", "eval/mean_length"} <= metrics[0].keys() & metrics[-1].keys()
    rollouts = rows(run / "rollouts" / "step_000002.jsonl")
    assert len(rollouts) == 16
    for r in rollouts:
        assert {
            "prompt",
            "completion",
            "parts",
            "reward",
            "advantage",
            "finish_reason",
            "logprobs",
            "entropy",
        } <= r.keys()
        assert len(r["ids"]) == len(r["logprobs"]) and r["finish_reason"] in ("stop", "length")
    assert abs(sum(r["advantage"] for r in rollouts[:4])) < 1e-5
    saved = json.loads((run / "config.json").read_text())
    assert saved["config"]["lr"] == 1e-2 and saved["torch"] == torch.__version__
    assert sorted(p.name for p in (run / "ckpt").iterdir()) == ["step_000002", "step_000004"]
    assert (
        "differs from the defaults" in out
        and "the first prompt" in out
        and "before:" in out
        and "after:" in out
    )


@pytest.mark.parametrize(
    "keys",
    [
        dict(),
        dict(lora_rank=4, lora_alpha=8.0, beta=0.1, lora_dropout=0.1),
        dict(beta=0.1, sft_steps=3, sft_batch=4),
        dict(dtype="bfloat16"),
    ],
    ids=["full", "lora", "warm-up and reference", "bf16"],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, keys):
    whole, cut = (
        settings(tmp_path, out_dir=str(tmp_path / "whole"), **keys),
        settings(tmp_path, out_dir=str(tmp_path / "cut"), **keys),
    )
    train.main(whole)
    train.main(configs.Config(**{**vars(cut), "steps": 2}))
    # a schedule that depends on steps is the config's: constant here
    train.main(configs.Config(**{**vars(cut), "resume": True}))
    a, b = (weights(Path(c.out_dir) / "ckpt" / "step_000004") for c in (whole, cut))
    assert same(a, b)
    first, second = (rows(Path(c.out_dir) / "metrics.jsonl") for c in (whole, cut))
    timed = lambda m: {
        k: v
        for k, v in m.items()
        if not k.startswith(("time/", "tokens_per_second/", "memory/")) and k != "step_time"
    }
    assert [timed(m) for m in first] == [timed(m) for m in second]


CONFIG = """
from tests.test_train import SHAPE as _shape, even
scratch, alphabet, task, task_options = _shape, "0123456789+=<>,_^", "arithmetic", dict(style="chars", digits=2)
rewards, lora_rank, lr, micro_tokens = [(even, 1.0)], 0, 1e-2, 300
prompts_per_step, group_size, max_new_tokens, eval_every, save_every, show_every, rollouts_every, threads, device = 4, 4, 12, 0, 3, 0, 0, 1, "cpu"
"""


def start(tmp_path, name, *flags, launcher=()):
    path = tmp_path / "killed.py"
    path.write_text(CONFIG)
    env = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    return subprocess.Popen(
        [
            sys.executable,
            *launcher,
            str(ROOT / "train.py"),
            str(path),
            f"--out_dir={tmp_path / name}",
            *flags,
        ],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process, step):
    for text in process.stdout:
        if text.split()[:1] == [str(step)]:
            return
    raise AssertionError("the run ended before that step")


@pytest.mark.slow
def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bits(tmp_path):
    start(tmp_path, "whole", "--steps=40").communicate()
    first = start(tmp_path, "killed", "--steps=40")
    wait_for_step(first, 7)
    first.kill()
    second = start(tmp_path, "killed", "--steps=40", "--resume=True")
    wait_for_step(second, 20)
    time.sleep(0.05)
    second.kill()
    start(tmp_path, "killed", "--steps=40", "--resume=True").communicate()
    assert same(*(weights(tmp_path / name / "ckpt" / "step_000040") for name in ("whole", "killed")))


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path, "stopped", "--steps=100000")
    wait_for_step(process, 5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "go on with: python train.py" in out and "--resume=True" in out
    state = checkpoint.load_state(checkpoint.newest(tmp_path / "stopped"))[1]
    assert state["step"] >= 5
    assert [m["step"] for m in rows(tmp_path / "stopped" / "metrics.jsonl")] == list(
        range(1, state["step"] + 1)
    )  # no row is lost, and none is there twice


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(tmp_path):
    start(tmp_path, "one", "--steps=3").communicate()
    process = start(
        tmp_path,
        "two",
        "--steps=3",
        launcher=("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29507"),
    )
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    one, two = (
        load_file(tmp_path / name / "ckpt" / "step_000003" / "model.safetensors") for name in ("one", "two")
    )
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], rtol=0, atol=2e-4
        )  # AdamW divides by small roots: rounding grows
    a, b = (rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert a[0]["reward"] == pytest.approx(b[0]["reward"], abs=1e-12) and a[0]["grad_norm"] == pytest.approx(
        b[0]["grad_norm"], rel=1e-5
    )
    assert (
        a[0]["completions/mean_length"] == b[0]["completions/mean_length"]
        and a[0]["num_tokens"] == b[0]["num_tokens"]
    )


def one_step(run):
    """A step of a run, as main does it."""
    with contextlib.ExitStack() as whole:
        return train.train_step(run, whole)


def one_step_gradients(tmp_path, **keys):
    """Gradients of the first update of a run, by name."""
    run = train.Run(settings(tmp_path, **keys))
    seen = []
    step = run.optimizer.step
    run.optimizer.step = lambda lr, max_norm: (
        seen.extend([g.clone() for g in run.optimizer.grads()] if not seen else []),
        step(lr, max_norm=max_norm),
    )[1]
    one_step(run)
    return seen


EVERYTHING = [
    dict(),
    dict(beta=0.2, aggregate="sequence", entropy_coef=0.01),
    dict(objective="gspo", aggregate="group"),
    dict(lora_rank=4, beta=0.1, aggregate="constant"),
    dict(beta=0.2, kl="full", top_p=0.9),
    dict(lora_rank=4, beta=0.2, kl="full", kl_times_ratio=True),
    dict(mask_truncated=True, aggregate="constant", beta=0.1),
    dict(top_entropy=0.3),
    dict(mismatch_clip=2.0),
    dict(checkpointing="layers", lora_rank=4),
    dict(epochs=2, minibatches=2, mismatch_clip=2.0),
    dict(combine="normalize_then_sum"),
    dict(preset="dapo", **configs.PRESETS["dapo"]),
]


@pytest.mark.parametrize("keys", EVERYTHING, ids=str)
def test_gradient_does_not_depend_on_micro_batches(tmp_path, keys):
    whole = one_step_gradients(tmp_path, micro_tokens=100000, **keys)
    for micro_tokens in (30, 77, 200):
        for a, b in zip(whole, one_step_gradients(tmp_path, micro_tokens=micro_tokens, **keys), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max() + 1e-9))


@pytest.mark.parametrize(
    "keys",
    [keys for keys in EVERYTHING if keys.get("objective") != "gspo" and keys.get("kl") != "full"],
    ids=str,
)
def test_the_head_in_chunks_gives_the_gradient_of_the_whole_objective_at_once(tmp_path, monkeypatch, keys):
    def whole(hidden, weight, targets, objective, **options):
        logp, entropy = logprob_ref(hidden, weight, targets, **options)
        loss, sums = objective(logp, entropy, slice(None))
        return loss, logp, entropy, [sums]

    monkeypatch.setattr(
        kernels.logprob, "CHUNK_BYTES", 4 * 20 * 7
    )  # rows of the batch are cut: 16 words and a few special ones
    calls, chunked = [], one_step_gradients(tmp_path, micro_tokens=100000, **keys)
    monkeypatch.setattr(train, "policy_head", lambda *a, **k: calls.append(len(a[0])) or whole(*a, **k))
    for a, b in zip(one_step_gradients(tmp_path, micro_tokens=100000, **keys), chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max() + 1e-9))
    assert calls and max(calls) > 14


def test_checkpointing_changes_no_bit_of_a_run(tmp_path):
    runs = [
        train.Run(settings(tmp_path, lora_rank=4, lora_dropout=0.2, beta=0.1, checkpointing=how))
        for how in ("none", "layers")
    ]
    for run in runs:
        one_step(run), one_step(run)
    assert runs[1].model.checkpointing and all(
        torch.equal(p, q) for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters())
    )


def test_a_step_whose_groups_are_all_equal_leaves_every_weight_as_it_was(tmp_path):
    cfg = settings(
        tmp_path, rewards=[(lambda completions, **_: [0.1] * len(completions), 1.0)], steps=2, force=True
    )
    run = train.Run(cfg)
    before = [p.detach().clone() for p in run.model.parameters()]
    metrics = one_step(run)
    assert metrics["grad_norm"] == 0.0 and metrics["frac_reward_zero_std"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters()))


def test_reference_is_the_start_also_where_training_starts_from_an_adapter(tmp_path, tiny):
    folder, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    run = train.Run(settings(tmp_path))  # only to borrow its tokenizer
    m = models.create({**run.model.config}, seed=3)
    save_policy(m, run.tokenizer, run.stop_ids, folder, base="")
    lora.apply(m, rank=4, alpha=8, targets=("q_proj", "down_proj"))
    for p in m.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    save_policy(m, run.tokenizer, run.stop_ids, adapter, base=folder)
    cfg = settings(
        tmp_path,
        scratch=None,
        model=folder,
        adapter=adapter,
        lora_rank=4,
        lora_alpha=8.0,
        beta=0.1,
        steps=2,
        save_every=1,
    )
    train.main(cfg)
    assert rows(Path(cfg.out_dir) / "metrics.jsonl")[0]["kl"] == pytest.approx(0.0, abs=1e-7)
    assert rows(Path(cfg.out_dir) / "metrics.jsonl")[1]["kl"] > 1e-6
    ids = torch.tensor([3, 4, 5])
    resumed = train.Run(configs.Config(**{**vars(cfg), "resume": True}))
    with resumed.as_reference() as reference, torch.no_grad():
        torch.testing.assert_close(reference.logits(ids), m.logits(ids), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert (resumed.model.logits(ids) - m.logits(ids)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="give --lora_rank=4"):
        train.Run(settings(tmp_path, scratch=None, model=folder, adapter=adapter, lora_rank=8))
    with pytest.raises(ValueError, match="merge it first"):
        train.Run(settings(tmp_path, scratch=None, model=adapter, lora_rank=0))


def bad_length(completions, **_):
    return [0.0]


def raises(completions, **_):
    return [1 / 0 for _ in completions]


def nan(completions, **_):
    return [float("nan")] * len(completions)


@pytest.mark.parametrize("reward, words", [(bad_length, "bad_length"), (raises, "raises"), (nan, "nan")])
def test_a_bad_reward_ends_in_one_sentence_and_loses_nothing(tmp_path, capsys, reward, words):
    train.main(settings(tmp_path, steps=2))
    calls = settings(tmp_path, steps=4, resume=True, rewards=[(reward, 1.0)])
    assert train.main(calls) == 1
    out = capsys.readouterr().out
    assert words in out and "go on with" in out
    assert checkpoint.load_state(checkpoint.newest(calls.out_dir))[1]["step"] == 2


def test_a_sampler_that_is_not_the_trainer_stops_the_run(tmp_path, capsys, monkeypatch):
    real = rollout.generate
    monkeypatch.setattr(
        rollout, "generate", lambda *a, temperature, **k: real(*a, temperature=0.9 * temperature, **k)
    )
    for cut in (dict(), dict(top_p=0.9)):
        assert train.main(settings(tmp_path / str(cut), **cut)) == 1
        assert "do not compute the same model" in capsys.readouterr().out


@pytest.mark.parametrize("cut, ends", [(dict(), 1), (dict(min_p=0.05), 0)])
def test_one_word_at_the_edge_of_the_kept_set_stops_no_run(tmp_path, monkeypatch, cut, ends):
    def edged(*a, real=rollout.generate, **k):
        out = real(*a, **k)
        out.logprobs[0][0] -= 0.03  # one word more in the sampler's set, of 3 %
        return out

    monkeypatch.setattr(rollout, "generate", edged)
    assert train.main(settings(tmp_path, steps=1, **cut)) == ends


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(scratch=None, model="no/such/folder"), "no model folder"),
        (dict(task="arithmetics"), "arithmetic"),
        (dict(rewards=[("gsmk8", 1.0)]), "gsm8k"),
        (dict(lora_rank=4, lora_targets=("wq",)), "lora targets"),
        (dict(device="cuda"), "no GPU"),
        (dict(alphabet="01"), "alphabet|character"),
        (dict(scratch=SHAPE | dict(max_position_embeddings=4)), "context"),
    ],
)
def test_bad_input_stops_with_a_sentence(tmp_path, keys, words):
    if keys.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match=words):
        train.main(settings(tmp_path, **keys))


def test_resume_refuses_the_checkpoint_of_another_model(tmp_path):
    train.main(settings(tmp_path, steps=2))
    with pytest.raises(ValueError, match="checkpoint"):
        train.main(settings(tmp_path, steps=4, resume=True, scratch=SHAPE | dict(hidden_size=64)))


def test_out_dir_that_cannot_be_written_is_said_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        train.main(settings(tmp_path, out_dir=str(tmp_path / "file" / "run")))


# ---------------------------------------------------------------------------------------- what FORMULAS adds to the loop
def by_prompt(completions, prompts, **_):
    """Signal in some groups only: prompts whose first number is odd score the share of even digits, the others 1."""
    return [
        sum(c in "02468" for c in text) / max(1, len(text)) if int(p.partition("+")[0]) % 2 else 1.0
        for text, p in zip(completions, prompts)
    ]


def test_groups_without_signal_are_replaced_by_new_prompts_and_the_rest_stay(tmp_path):
    plain, dynamic = (
        train.Run(
            settings(
                tmp_path,
                rewards=[(by_prompt, 1.0)],
                prompts_per_step=6,
                resample_zero_groups=on,
                resample_budget=12,
            )
        )
        for on in (False, True)
    )
    seen = []
    for run in (plain, dynamic):
        written = {}
        write = train.learn

        def keep(run, batch, adv, timer, whole, written=written):
            written |= dict(prompts=[row["prompt"] for row in batch.rows], ids=list(batch.out.ids), adv=adv)
            return write(run, batch, adv, timer, whole)

        train.learn, restored = keep, train.learn
        try:
            seen.append((one_step(run), written))
        finally:
            train.learn = restored
    (a, first), (b, second) = seen
    live = (first["adv"].view(6, 4) != 0).any(1).tolist()
    assert 0 < sum(live) < 6 and (second["adv"].view(6, 4) != 0).any(1).sum() > sum(live)
    assert a["resampled_prompts"] == 0 < b["resampled_prompts"] <= 12
    for i, alive in enumerate(live):
        assert (first["prompts"][i] == second["prompts"][i]) == alive or not alive
        if alive:
            assert first["ids"][4 * i : 4 * i + 4] == second["ids"][4 * i : 4 * i + 4]
    assert b["frac_tokens_with_advantage"] > a["frac_tokens_with_advantage"]
    # what is logged is of the prompts as drawn, so that the curve is that of the task and not of the filter
    assert (
        a["reward"] == b["reward"]
        and a["frac_reward_zero_std"] == b["frac_reward_zero_std"]
        and b["num_tokens"] > a["num_tokens"]
    )


def test_the_filter_looks_at_the_spread_and_not_at_the_mean():
    """A defect of others: groups whose mean is 0 or 1 were dropped, which with rewards of -1 and 1 drops those with the most signal."""
    reward = np.array([-1.0, 1.0, 0.5, 0.5, 0.0, 1.0, np.nan, np.nan, 2.0, np.nan])
    assert evaluation.flat_groups(reward.reshape(-1, 2)) == [1, 3, 4]


def test_truncated_completions_leave_loss_and_divisor_when_they_are_masked(tmp_path):
    """Their tokens are not computed, and the others weigh what they would in a batch without them."""
    run = train.Run(settings(tmp_path, mask_truncated=True, aggregate="constant"))
    norms, scored = [], []
    normaliser, policy_loss = losses.normaliser, losses.policy_loss
    losses.normaliser = lambda lengths, **k: (
        norms.append((list(lengths), normaliser(lengths, **k))) or norms[-1][1]
    )
    losses.policy_loss = lambda logp, *a, **k: scored.append(len(logp)) or policy_loss(logp, *a, **k)
    try:
        m = one_step(run)
    finally:
        losses.normaliser, losses.policy_loss = normaliser, policy_loss
    assert 0 < m["completions/clipped_ratio"] < 1
    stopped = round((1 - m["completions/clipped_ratio"]) * 16)
    assert len(norms[0][0]) == stopped and norms[0][1] == stopped * 12 and sum(scored) <= sum(norms[0][0])


@pytest.mark.parametrize(
    "keys",
    [
        dict(epochs=2, minibatches=2, mismatch_clip=2.0),
        dict(beta=0.2, ref_sync_every=1, ref_mix=0.5),
        dict(resample_zero_groups=True, rewards=[(by_prompt, 1.0)]),
        dict(top_entropy=0.3, beta=0.1, kl="full"),
    ],
    ids=["several updates", "moving reference", "dynamic sampling", "entropy mask, exact KL"],
)
def test_a_resumed_run_ends_with_the_same_bits_whatever_the_options(tmp_path, keys):
    test_a_resumed_run_ends_with_the_same_bits(tmp_path, keys)


def test_several_updates_clip_and_move_further_than_one(tmp_path):
    one, many = (train.Run(settings(tmp_path, epochs=epochs, minibatches=2)) for epochs in (1, 4))
    start = [p.detach().clone() for p in one.model.parameters()]
    a, b = one_step(one), one_step(many)
    moved = lambda run: (
        sum(float((p.detach() - s).norm() ** 2) for p, s in zip(run.model.parameters(), start)) ** 0.5
    )
    assert moved(many) > 1.5 * moved(one)
    assert b["clip_ratio/region_mean"] > 0 and one.step == many.step == 1
    assert (
        b["sampling/sampling_logp_difference/max"] == a["sampling/sampling_logp_difference/max"] < 2e-5
    )  # of the first update, where both have one set of weights


def test_weights_of_rewards_change_over_time_by_a_function_of_the_config(tmp_path):
    def later(step):
        return [1.0, 0.0] if step < 2 else [0.0, 1.0]

    run = train.Run(settings(tmp_path, rewards=[(even, 1.0), ("repetition", 1.0)], reward_weights=later))
    a, b = one_step(run), one_step(run)
    assert a["reward"] == pytest.approx(a["rewards/even/mean"]) and b["reward"] == pytest.approx(
        b["rewards/repetition/mean"]
    )
    run.step, run.cfg = 5, configs.Config(**{**vars(run.cfg), "reward_weights": lambda step: [1.0]})
    with pytest.raises(ValueError, match="1 weights at step 6 for 2 rewards"):
        one_step(run)


@pytest.mark.parametrize(
    "reward, keys, words",
    [
        (lambda completions, **_: [0.0] * len(completions), dict(max_new_tokens=50), "take easier problems"),
        (lambda completions, **_: [0.0] * len(completions), dict(max_new_tokens=3), "raise max_new_tokens"),
        (lambda completions, **_: [1.0] * len(completions), {}, "take harder problems"),
        (lambda completions, **_: [None] * len(completions), {}, "could not score one"),
    ],
)
def test_a_first_batch_without_signal_stops_the_run_with_the_knob_to_turn(tmp_path, reward, keys, words):
    with pytest.raises(ValueError, match=words):
        train.main(settings(tmp_path, rewards=[(reward, 1.0)], **keys))
    assert train.main(settings(tmp_path, rewards=[(reward, 1.0)], steps=1, force=True, **keys)) == 0


def test_a_step_torn_between_its_updates_is_not_saved(tmp_path):
    """With several updates a step, the weights of a failure between them are no step's: the last checkpoint stands."""
    cfg = settings(tmp_path, epochs=3, steps=4, save_every=1)
    gradients, calls = train.gradients, []

    def fail(*a, **k):
        calls.append(1)
        if len(calls) == 8:
            raise train.Stop("as if the loss were infinite")
        return gradients(*a, **k)

    train.gradients = fail
    try:
        with pytest.raises(train.Stop):
            train.main(cfg)
    finally:
        train.gradients = gradients
    assert checkpoint.load_state(checkpoint.newest(cfg.out_dir))[1]["step"] == 2


def test_rewards_of_finished_groups_are_computed_while_others_are_sampled_and_change_nothing(tmp_path):
    heard = []

    def slow(completions, **_):
        heard.append((len(completions), time.perf_counter()))
        time.sleep(0.02)
        return even(completions)

    ends = []
    generate = train.rollout.generate
    train.rollout.generate = lambda *a, **k: (out := generate(*a, **k), ends.append(time.perf_counter()))[0]
    try:
        plain, overlapped = (
            train.Run(settings(tmp_path, rewards=[(slow, 1.0), ("length", 0.1)], slots=4, reward_overlap=on))
            for on in (False, True)
        )
        a, b = one_step(plain), one_step(overlapped)
    finally:
        train.rollout.generate = generate
    assert [n for n, _ in heard] == [16, 4, 4, 4, 4]
    assert heard[0][1] > ends[0] and heard[1][1] < ends[1]  # the first group's before the last row was drawn
    assert {k: v for k, v in a.items() if "time" not in k and "second" not in k and "memory" not in k} == {
        k: v for k, v in b.items() if "time" not in k and "second" not in k and "memory" not in k
    }
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), overlapped.model.parameters()))


@pytest.mark.parametrize("reward, words", [(bad_length, "bad_length"), (raises, "raises"), (nan, "nan")])
def test_a_bad_reward_in_the_background_ends_in_the_same_sentence(tmp_path, capsys, reward, words):
    test_a_bad_reward_ends_in_one_sentence_and_loses_nothing(tmp_path, capsys, reward, words)
    with pytest.raises(rewarding.RewardError, match=words):
        one_step(train.Run(settings(tmp_path, rewards=[(reward, 1.0)], reward_overlap=True)))
