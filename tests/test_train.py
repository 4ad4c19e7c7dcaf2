"""The run as a whole, on a tiny model: what it writes, what it refuses, and that it ends with the same bits
however it is cut.
"""

import dataclasses
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
import head
import kernels.logprob
import lora
import loss
import model as models
import rewards as rewarding
import train
from conftest import ROOT, SHAPE, even, quick, rows, same, settings, untimed, weights
from head import policy_head_ref
from policy import save_policy
from rollout import Sampler

METRICS = """num_tokens step_time reward reward_std rewards/even/mean rewards/even/std rewards/arithmetic/mean
    frac_reward_zero_std loss policy_loss kl entropy grad_norm learning_rate clip_ratio/low_mean
    clip_ratio/high_mean clip_ratio/region_mean completions/mean_length completions/min_length
    completions/max_length completions/mean_terminated_length completions/clipped_ratio
    sampling/sampling_logp_difference/mean sampling/sampling_logp_difference/max
    sampling/importance_sampling_ratio/min sampling/importance_sampling_ratio/mean
    sampling/importance_sampling_ratio/max epoch time/sample time/score time/reference time/train time/other
    tokens_per_second/sample tokens_per_second/train memory/peak_gb reward_failures""".split()


def again(cfg, **keys):
    """The same config with some keys changed."""
    return dataclasses.replace(cfg, **keys)


def one_step(run) -> dict:
    """The next step of a run."""
    return train.train_step(run, run.state["step"] + 1)


def saved_step(folder) -> int:
    return checkpoint.load_state(checkpoint.newest(folder))[1]["step"]


def test_a_run_writes_what_the_design_promises(tmp_path, capsys):
    rewards = [(even, 1.0), ("arithmetic", 0.0)]
    cfg = settings(tmp_path, eval_every=2, eval_problems=5, rewards=rewards, beta=0.1)
    assert train.main(cfg) == 0
    out, run = capsys.readouterr().out, Path(cfg.out_dir)
    metrics = rows(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    assert not set(METRICS) - metrics[-1].keys()
    assert {"eval/strict", "eval/lenient", "eval/mean_length"} <= metrics[0].keys() & metrics[-1].keys()
    rollouts = rows(run / "rollouts" / "step_000002.jsonl")
    assert len(rollouts) == 16
    wanted = {"prompt", "completion", "parts", "reward", "advantage", "finish_reason", "logprobs", "entropy"}
    for r in rollouts:
        assert wanted <= r.keys()
        assert len(r["ids"]) == len(r["logprobs"]) and r["finish_reason"] in ("stop", "length")
    assert abs(sum(r["advantage"] for r in rollouts[:4])) < 1e-5
    saved = json.loads((run / "config.json").read_text())
    assert saved["config"]["lr"] == 1e-2 and saved["torch"] == torch.__version__
    assert sorted(p.name for p in (run / "ckpt").iterdir()) == ["step_000002", "step_000004"]
    for words in ("differs from the defaults", "the first prompt", "before:", "after:"):
        assert words in out


# --------------------------------------------------------------------------------- stopped and resumed
def by_prompt(completions, prompts, **_):
    """Signal in some groups: the share of even digits where the prompt's first number is odd, else 1."""
    scores = []
    for share, prompt in zip(even(completions), prompts):
        odd = int(prompt.partition("+")[0]) % 2
        scores.append(share if odd else 1.0)
    return scores


RESUMED = {
    "full": dict(),
    "lora": dict(lora_rank=4, lora_alpha=8.0, beta=0.1, lora_dropout=0.1),
    "merged lora": dict(lora_rank=4, lora_alpha=8.0, beta=0.1, lora_merge="on"),
    "warm-up and reference": dict(beta=0.1, sft_steps=3, sft_batch=4),
    "bf16": dict(dtype="bfloat16"),
    "fp16": dict(dtype="float16"),
    "8-bit moments": dict(dtype="bfloat16", optimizer_bits=8),
    "base in 4 bits": dict(base="nf4", lora_rank=4, lora_alpha=8.0, beta=0.1),
    "several updates": dict(epochs=2, minibatches=2, mismatch_clip=2.0),
    "moving reference": dict(beta=0.2, ref_sync_every=1, ref_mix=0.5),
    "dynamic sampling": dict(resample_zero_groups=True, rewards=[(by_prompt, 1.0)]),
    "entropy mask, exact KL": dict(top_entropy=0.3, beta=0.1, kl="full"),
}


@pytest.mark.parametrize("name", quick(2, RESUMED))
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, name):
    # The schedule is constant after the warm-up: one that depends on `steps` would not be the config's.
    whole = settings(tmp_path, out_dir=str(tmp_path / "whole"), **RESUMED[name])
    cut = again(whole, out_dir=str(tmp_path / "cut"))
    train.main(whole)
    train.main(again(cut, steps=2))
    train.main(again(cut, resume=True))
    folders = [Path(cfg.out_dir) for cfg in (whole, cut)]
    assert same(*[weights(folder / "ckpt" / "step_000004") for folder in folders])
    first, second = [[untimed(m) for m in rows(folder / "metrics.jsonl")] for folder in folders]
    assert first == second


CONFIG = """
from conftest import SHAPE as _shape, even
scratch, alphabet = _shape, "0123456789+=<>,_^"
task, task_options = "arithmetic", dict(style="chars", digits=2)
rewards, lora_rank, lr, micro_tokens, max_new_tokens = [(even, 1.0)], 0, 1e-2, 300, 12
prompts_per_step, group_size, eval_every, save_every, threads, device = 4, 4, 0, 3, 1, "cpu"
show_every, rollouts_every = 0, 0
"""


def start(tmp_path, name, *flags, launcher=()):
    path = tmp_path / "killed.py"
    path.write_text(CONFIG)
    env = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    command = [sys.executable, *launcher, str(ROOT / "train.py"), str(path)]
    command += [f"--out_dir={tmp_path / name}", *flags]
    return subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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
    assert same(*[weights(tmp_path / name / "ckpt" / "step_000040") for name in ("whole", "killed")])


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path, "stopped", "--steps=100000")
    wait_for_step(process, 5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "go on with: python train.py" in out and "--resume=True" in out
    step = saved_step(tmp_path / "stopped")
    assert step >= 5
    logged = [m["step"] for m in rows(tmp_path / "stopped" / "metrics.jsonl")]
    assert logged == list(range(1, step + 1))  # no row is lost, and none is there twice


def interrupting(step: int, signals: list):
    """A reward that sends this process signals while it scores the completions of a step."""
    calls = []

    def reward(completions, **_):
        calls.append(1)
        if len(calls) == step:
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.2)  # two signals of a kind at once would arrive as one
        return even(completions)

    return reward


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_the_middle_of_a_step_finishes_and_saves_it(tmp_path, capsys, number):
    cfg = settings(tmp_path, rewards=[(interrupting(2, [number]), 1.0)], save_every=0)
    assert train.main(cfg) == 1
    out = capsys.readouterr().out
    assert "stopping after this step" in out and "interrupted" in out and "--resume=True" in out
    assert saved_step(cfg.out_dir) == 2
    assert [m["step"] for m in rows(Path(cfg.out_dir) / "metrics.jsonl")] == [1, 2]


def test_a_second_ctrl_c_stops_at_once_without_the_step(tmp_path):
    twice = [signal.SIGINT, signal.SIGINT]
    cfg = settings(tmp_path, rewards=[(interrupting(3, twice), 1.0)], save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train.main(cfg)
    assert saved_step(cfg.out_dir) == 2


def test_ctrl_c_in_an_evaluation_ends_it_after_its_batch_of_problems(tmp_path, monkeypatch, capsys):
    """The evaluation before training is given up, and the run stops before its first step."""
    monkeypatch.setattr("evaluation.AT_ONCE", 2)
    seen = []
    reward = interrupting(2, [signal.SIGINT])

    def counted(completions, **_):
        seen.append(len(completions))
        return reward(completions)

    cfg = settings(tmp_path, rewards=[(counted, 1.0)], eval_every=1, eval_problems=20)
    assert train.main(cfg) == 1
    assert seen == [2, 2] and "before:" not in capsys.readouterr().out
    assert saved_step(cfg.out_dir) == 0


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(tmp_path):
    start(tmp_path, "one", "--steps=3").communicate()
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29507")
    process = start(tmp_path, "two", "--steps=3", launcher=launcher)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    finals = [tmp_path / name / "ckpt" / "step_000003" / "model.safetensors" for name in ("one", "two")]
    one, two = load_file(finals[0]), load_file(finals[1])
    for name in one:
        # AdamW divides by small roots, so rounding grows.
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-4)
    a, b = [rows(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "two")]
    assert a["reward"] == pytest.approx(b["reward"], abs=1e-12)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    for key in ("completions/mean_length", "num_tokens"):
        assert a[key] == b[key]


def infinite_loss_at(call: int):
    """policy_head whose loss is infinite at that call, counted from 1."""
    calls = []

    def broken(*arguments, **options):
        calls.append(1)
        loss, entropy, stats = head.policy_head(*arguments, **options)
        return loss * float("inf") if len(calls) == call else loss, entropy, stats

    return broken


@pytest.mark.parametrize(
    "call, words", quick(1, [(8, "nothing saved, since this step is half learnt"), (7, "saved ")])
)
def test_a_step_torn_between_its_updates_is_not_saved(tmp_path, monkeypatch, capsys, call, words):
    """Three updates a step. Calls 7 and 8 of the head are the first and the second update of step 3.

    After the first, the weights are those of no step: the last checkpoint stands.
    """
    cfg = settings(tmp_path, epochs=3, steps=4, save_every=1, micro_tokens=10_000)
    monkeypatch.setattr(train, "policy_head", infinite_loss_at(call))
    assert train.main(cfg) == 1
    out = capsys.readouterr().out
    assert words in out and "bad_batch.pt" in out
    bad = torch.load(Path(cfg.out_dir) / "bad_batch.pt", weights_only=True)
    assert len(bad["tokens"]["old_logp"]) == sum(len(ids) for group in bad["completions"] for ids in group)
    assert saved_step(cfg.out_dir) == 2
    monkeypatch.undo()
    whole = again(cfg, out_dir=str(tmp_path / "whole"))
    train.main(again(cfg, resume=True))
    train.main(whole)
    folders = [Path(c.out_dir) / "ckpt" / "step_000004" for c in (cfg, whole)]
    assert same(*[weights(folder) for folder in folders])


def test_a_step_torn_by_a_gradient_that_is_not_finite_is_not_saved_either(tmp_path, monkeypatch, capsys):
    """It was: only a loss counted as tearing a step, while the gradient of a finite loss may overflow."""
    cfg = settings(tmp_path, epochs=3, steps=4, save_every=1, micro_tokens=10_000)
    calls = []

    def broken(hidden, *arguments, **options):
        calls.append(1)
        loss, entropy, stats = head.policy_head(hidden, *arguments, **options)
        if len(calls) == 8:
            loss = loss + (hidden - hidden.detach()).square().sqrt().sum()  # 0, whose gradient is 0 * inf
        return loss, entropy, stats

    monkeypatch.setattr(train, "policy_head", broken)
    assert train.main(cfg) == 1
    out = capsys.readouterr().out
    assert "the gradient norm is nan" in out and "nothing saved" in out
    assert saved_step(cfg.out_dir) == 2


# ------------------------------------------------------------------------------------------- gradients
def one_step_gradients(tmp_path, **keys):
    """Gradients of the first update of a run, parameter by parameter."""
    run = train.Run(settings(tmp_path, **keys))
    seen, step = [], run.optimizer.step

    def keep_and_step(lr, max_norm):
        if not seen:
            seen.extend(g.clone() for g in run.optimizer.grads())
        return step(lr, max_norm=max_norm)

    run.optimizer.step = keep_and_step
    one_step(run)
    return seen


def assert_same_gradients(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max() + 1e-9))


EVERYTHING = [
    dict(),
    dict(beta=0.2, aggregate="sequence", entropy_coef=0.01),
    dict(lora_rank=4, beta=0.2, kl="full", kl_times_ratio=True),
    dict(epochs=2, minibatches=2, mismatch_clip=2.0),
    dict(preset="dapo", **configs.PRESETS["dapo"]),
    dict(objective="gspo", aggregate="group"),
    dict(lora_rank=4, beta=0.1, aggregate="constant"),
    dict(lora_rank=4, beta=0.1, lora_merge="on"),
    dict(beta=0.2, kl="full", top_p=0.9),
    dict(mask_truncated=True, aggregate="constant", beta=0.1),
    dict(top_entropy=0.3),
    dict(mismatch_clip=2.0),
    dict(checkpointing="layers", lora_rank=4),
    dict(combine="normalize_then_sum"),
]


@pytest.mark.parametrize("keys", quick(3, EVERYTHING), ids=str)
def test_gradient_does_not_depend_on_micro_batches(tmp_path, keys):
    whole = one_step_gradients(tmp_path, micro_tokens=100_000, **keys)
    for micro_tokens in (30, 77):
        cut = one_step_gradients(tmp_path, micro_tokens=micro_tokens, **keys)
        assert_same_gradients(cut, whole)


# The definition's exact KL is over the whole vocabulary, not over a truncated one.
@pytest.mark.parametrize("keys", quick(3, [keys for keys in EVERYTHING if "top_p" not in keys]), ids=str)
def test_the_head_in_chunks_gives_the_gradient_of_the_whole_objective_at_once(tmp_path, monkeypatch, keys):
    calls = []

    def whole(hidden, *arguments, **options):
        calls.append(len(hidden))
        return policy_head_ref(hidden, *arguments, **options)

    # Seven tokens a chunk, so that rows are cut: the vocabulary is the alphabet and a few special ids.
    monkeypatch.setattr(kernels.logprob, "CHUNK_BYTES", 4 * 20 * 7)
    chunked = one_step_gradients(tmp_path, micro_tokens=100_000, **keys)
    monkeypatch.setattr(train, "policy_head", whole)
    assert_same_gradients(chunked, one_step_gradients(tmp_path, micro_tokens=100_000, **keys))
    assert calls and max(calls) > 14


@pytest.mark.parametrize("how", ["layers", "light", "offload"])
def test_checkpointing_changes_no_bit_of_a_run(tmp_path, how):
    runs = []
    for checkpointing in ("none", how):
        cfg = settings(tmp_path, lora_rank=4, lora_dropout=0.2, beta=0.1, checkpointing=checkpointing)
        runs.append(train.Run(cfg))
    for run in runs:
        one_step(run)
        one_step(run)
    assert runs[1].model.checkpointing == how
    for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters()):
        assert torch.equal(p, q)


def all_alike(completions, **_):
    return [0.1] * len(completions)


def test_a_step_whose_groups_are_all_equal_leaves_every_weight_as_it_was(tmp_path):
    run = train.Run(settings(tmp_path, rewards=[(all_alike, 1.0)], steps=2, force=True))
    before = [p.detach().clone() for p in run.model.parameters()]
    metrics = one_step(run)
    assert metrics["grad_norm"] == 0.0 and metrics["frac_reward_zero_std"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters()))


def test_reference_is_the_start_also_where_training_starts_from_an_adapter(tmp_path):
    folder, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    run = train.Run(settings(tmp_path))  # only to borrow its tokenizer
    m = models.create({**run.model.config}, seed=3)
    save_policy(m, run.tokenizer, run.stop_ids, folder, base="")
    lora.apply(m, rank=4, alpha=8, targets=("q_proj", "down_proj"))
    for p in m.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    save_policy(m, run.tokenizer, run.stop_ids, adapter, base=folder)
    from_adapter = dict(scratch=None, model=folder, adapter=adapter)
    cfg = settings(tmp_path, **from_adapter, lora_rank=4, lora_alpha=8.0, beta=0.1, steps=2, save_every=1)
    train.main(cfg)
    first, second = rows(Path(cfg.out_dir) / "metrics.jsonl")
    assert first["kl"] == pytest.approx(0.0, abs=1e-7) and second["kl"] > 1e-6
    ids = torch.tensor([3, 4, 5])
    resumed = train.Run(again(cfg, resume=True))
    with resumed.as_reference() as reference, torch.no_grad():
        torch.testing.assert_close(reference.logits(ids), m.logits(ids), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert (resumed.model.logits(ids) - m.logits(ids)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="give --lora_rank=4"):
        train.Run(settings(tmp_path, **from_adapter, lora_rank=8))
    with pytest.raises(ValueError, match="merge it first"):
        train.Run(settings(tmp_path, scratch=None, model=adapter, lora_rank=0))


# ---------------------------------------------------------------------------------------- what it refuses
def bad_length(completions, **_):
    return [0.0]


def raises(completions, **_):
    return [1 / 0 for _ in completions]


def nan(completions, **_):
    return [float("nan")] * len(completions)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("reward", [bad_length, raises, nan])
def test_a_bad_reward_ends_in_one_sentence_and_loses_nothing(tmp_path, capsys, reward, overlap):
    """Also where it runs in the background, while other groups are sampled."""
    train.main(settings(tmp_path, steps=2))
    bad = settings(tmp_path, resume=True, rewards=[(reward, 1.0)], reward_overlap=overlap)
    assert train.main(bad) == 1
    out = capsys.readouterr().out
    assert reward.__name__ in out and "go on with" in out
    assert saved_step(bad.out_dir) == 2


def test_a_bad_reward_in_the_background_of_a_first_step_is_said(tmp_path):
    run = train.Run(settings(tmp_path, rewards=[(raises, 1.0)], reward_overlap=True))
    with pytest.raises(rewarding.RewardError, match="raises"):
        one_step(run)


def colder_sampler(monkeypatch):
    """A sampler that draws at nine tenths of the temperature it is asked for."""
    real = Sampler.generate

    def colder(self, *arguments, temperature, **options):
        return real(self, *arguments, temperature=0.9 * temperature, **options)

    monkeypatch.setattr(Sampler, "generate", colder)


@pytest.mark.parametrize("keys", [dict(), dict(top_p=0.9), dict(mismatch_clip=2.0)], ids=str)
def test_a_sampler_that_is_not_the_trainer_stops_the_run(tmp_path, capsys, monkeypatch, keys):
    colder_sampler(monkeypatch)
    assert train.main(settings(tmp_path, **keys)) == 1
    assert "do not compute the same model" in capsys.readouterr().out


@pytest.mark.parametrize("keys", [dict(), dict(epochs=2)], ids=str)
def test_with_mismatch_clip_the_metrics_still_compare_the_trainer_with_the_sampler(
    tmp_path, monkeypatch, keys
):
    """They were 0: the ratio is then the trainer's to itself, and what was logged was that ratio.

    So a run that weighs tokens because its sampler is another model could not see how far apart they are,
    and the guard of the first step was off.
    """
    colder_sampler(monkeypatch)
    monkeypatch.setattr(train, "MISMATCH", {torch.float32: ("max", 100.0)})
    plain, weighed = [
        one_step(train.Run(settings(tmp_path, mismatch_clip=clip, **keys))) for clip in (None, 2.0)
    ]
    for name in ("sampling_logp_difference/mean", "sampling_logp_difference/max"):
        difference = plain[f"sampling/{name}"]
        assert difference > 0.01
        assert weighed[f"sampling/{name}"] == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("cut, ends", [(dict(), 1), (dict(min_p=0.05), 0)])
def test_one_word_at_the_edge_of_the_kept_set_stops_no_run(tmp_path, monkeypatch, cut, ends):
    real = Sampler.generate

    def edged(self, *arguments, **options):
        out = real(self, *arguments, **options)
        out.logprobs[0][0] -= 0.03  # one word more in the sampler's set, of 3 %
        return out

    monkeypatch.setattr(Sampler, "generate", edged)
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


def all_wrong(completions, **_):
    return [0.0] * len(completions)


def all_right(completions, **_):
    return [1.0] * len(completions)


def unknown(completions, **_):
    return [None] * len(completions)


@pytest.mark.parametrize(
    "reward, keys, words",
    [
        (all_wrong, dict(max_new_tokens=50), "take easier problems"),
        (all_wrong, dict(max_new_tokens=3), "raise max_new_tokens"),
        (all_right, dict(), "take harder problems"),
        (unknown, dict(), "could not score one"),
    ],
)
def test_a_first_batch_without_signal_stops_the_run_with_the_knob_to_turn(tmp_path, reward, keys, words):
    cfg = settings(tmp_path, rewards=[(reward, 1.0)], steps=1, **keys)
    with pytest.raises(ValueError, match=words):
        train.main(cfg)
    assert train.main(again(cfg, force=True)) == 0


# ----------------------------------------------------------------------------- what FORMULAS adds to the loop
def step_and_batch(monkeypatch, run):
    """The metrics of a run's next step, and the batch that it learnt from."""
    batches, learn = [], train.learn

    def keep(run, step, batch):
        batches.append(batch)
        return learn(run, step, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learn", keep)
        return one_step(run), batches[0]


def test_groups_without_signal_are_replaced_by_new_prompts_and_the_rest_stay(tmp_path, monkeypatch):
    found = []
    for on in (False, True):
        options = dict(prompts_per_step=6, resample_zero_groups=on, resample_budget=12)
        run = train.Run(settings(tmp_path, rewards=[(by_prompt, 1.0)], **options))
        found.append(step_and_batch(monkeypatch, run))
    (a, first), (b, second) = found
    live = (first.adv.view(6, 4) != 0).any(1).tolist()
    assert 0 < sum(live) < 6 and (second.adv.view(6, 4) != 0).any(1).sum() > sum(live)
    assert a["resampled_prompts"] == 0 < b["resampled_prompts"] <= 12
    replaced = 0
    for i, alive in enumerate(live):
        same_prompt = first.rows[i]["prompt"] == second.rows[i]["prompt"]
        if alive:
            assert same_prompt and first.out.group(i, 4) == second.out.group(i, 4)
        replaced += not same_prompt
    assert replaced
    assert b["frac_tokens_with_advantage"] > a["frac_tokens_with_advantage"]
    # What is logged is of the prompts as drawn, so that the curve is that of the task and not of the filter.
    assert a["reward"] == b["reward"] and a["frac_reward_zero_std"] == b["frac_reward_zero_std"]
    assert b["num_tokens"] > a["num_tokens"]


def test_the_filter_looks_at_the_spread_and_not_at_the_mean():
    """A defect of others: groups whose mean is 0 or 1 were dropped.

    With rewards of -1 and 1 that drops those with the most signal.
    """
    reward = np.array([-1.0, 1.0, 0.5, 0.5, 0.0, 1.0, np.nan, np.nan, 2.0, np.nan])
    assert rewarding.flat_groups(reward.reshape(-1, 2)) == [1, 3, 4]


def test_truncated_completions_leave_loss_and_divisor_when_they_are_masked(tmp_path, monkeypatch):
    """Their tokens are not computed, and the others weigh what they would in a batch without them."""
    run = train.Run(settings(tmp_path, mask_truncated=True, aggregate="constant"))
    norms, computed = [], []
    normaliser = train.normaliser

    def counted_normaliser(lengths, **options):
        norms.append((list(lengths), normaliser(lengths, **options)))
        return norms[-1][1]

    def counted_head(hidden, *arguments, **options):
        computed.append(len(hidden))
        return head.policy_head(hidden, *arguments, **options)

    monkeypatch.setattr(train, "normaliser", counted_normaliser)
    monkeypatch.setattr(train, "policy_head", counted_head)
    m = one_step(run)
    assert 0 < m["completions/clipped_ratio"] < 1
    stopped = round((1 - m["completions/clipped_ratio"]) * 16)
    lengths, norm = norms[0]
    assert len(lengths) == stopped and norm == stopped * 12
    assert 0 < sum(computed) <= sum(lengths)


def test_several_updates_clip_and_move_further_than_one(tmp_path):
    one, many = [train.Run(settings(tmp_path, epochs=epochs, minibatches=2)) for epochs in (1, 4)]
    start = [p.detach().clone() for p in one.model.parameters()]
    a, b = one_step(one), one_step(many)

    def moved(run):
        squares = [(p.detach() - s).square().sum() for p, s in zip(run.model.parameters(), start)]
        return float(sum(squares)) ** 0.5

    assert moved(many) > 1.5 * moved(one)
    assert b["clip_ratio/region_mean"] > 0 and one.state["step"] == many.state["step"] == 1
    # That of the first update, where sampler and trainer have one set of weights.
    difference = "sampling/sampling_logp_difference/max"
    assert b[difference] == a[difference] < 2e-5


def test_weights_of_rewards_change_over_time_by_a_function_of_the_config(tmp_path):
    def later(step):
        return [1.0, 0.0] if step < 2 else [0.0, 1.0]

    rewards = [(even, 1.0), ("repetition", 1.0)]
    run = train.Run(settings(tmp_path, rewards=rewards, reward_weights=later))
    a, b = one_step(run), one_step(run)
    assert a["reward"] == pytest.approx(a["rewards/even/mean"])
    assert b["reward"] == pytest.approx(b["rewards/repetition/mean"])
    run.cfg = again(run.cfg, reward_weights=lambda step: [1.0])
    with pytest.raises(ValueError, match="1 weights at step 6 for 2 rewards"):
        train.train_step(run, 6)


def test_rewards_of_finished_groups_are_computed_while_others_are_sampled_and_change_nothing(
    tmp_path, monkeypatch
):
    heard, ends, real = [], [], Sampler.generate

    def slow(completions, **_):
        heard.append((len(completions), time.perf_counter()))
        time.sleep(0.02)
        return even(completions)

    def timed(self, *arguments, **options):
        out = real(self, *arguments, **options)
        ends.append(time.perf_counter())
        return out

    monkeypatch.setattr(Sampler, "generate", timed)
    runs = []
    for overlap in (False, True):
        rewards = [(slow, 1.0), ("length", 0.1)]
        runs.append(train.Run(settings(tmp_path, rewards=rewards, slots=4, reward_overlap=overlap)))
    a, b = [one_step(run) for run in runs]
    assert [n for n, _ in heard] == [16, 4, 4, 4, 4]
    assert heard[0][1] > ends[0]
    assert heard[1][1] < ends[1]  # the first group's, before the last row was drawn
    assert untimed(a) == untimed(b)
    assert all(torch.equal(p, q) for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters()))


def over_all(rewards, prompts, state):
    """Against a moving average of all rewards, so that one completion a prompt is enough."""
    mean = state.get("mean", 0.5)
    state = dict(mean=0.9 * mean + 0.1 * float(rewards.nanmean()))
    baseline = torch.full_like(rewards, mean)
    return loss.advantages(rewards, scale="none", baseline=baseline), state


def test_a_group_of_one_learns_from_a_baseline_of_its_own(tmp_path):
    cfg = settings(tmp_path, group_size=1, prompts_per_step=16, advantage=over_all)
    assert train.main(cfg) == 0
    assert all(row["grad_norm"] > 0 for row in rows(tmp_path / "run" / "metrics.jsonl"))
