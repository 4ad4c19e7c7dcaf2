"""What always holds: one short test under each promise of docs/promises.md, in its words.

    python -m pytest tests/test_promises.py

This is the specification. Each promise has longer tests elsewhere: every option, every family, every fault.

Dims: B prompts, G completions a prompt, N = B * G rows, T completion tokens, V vocabulary.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

import lora
import loss
import model as models
import train
from conftest import ROOT, SHAPE, even, rows, same, settings, untimed, weights
from data import char_tokenizer
from rewards import REWARDS, resolve, score
from rollout import Sampler, generate
from run import Run
from turns import Conversations

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
SAMPLING = dict(group_size=3, max_new_tokens=9, stop_ids=[4, 17], seed=3, step=1)


def groups_of(out, G=3):
    return [out.group(b, G) for b in range(len(out.ids) // G)]


def gradients(net, prompts, groups, factors, cuts):
    """Of sum(factors * logp) over all tokens, computed in the given cuts of the prompts."""
    net.zero_grad()
    done = 0
    for first, last in cuts:
        logp, _, _ = net.completion_logprobs(prompts[first:last], groups[first:last])
        (logp * factors[done : done + len(logp)]).sum().backward()
        done += len(logp)
    return torch.cat([p.grad.flatten().clone() for p in net.parameters()])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def close(a, b, relative=1e-5):
    return float((a - b).norm()) <= relative * float(b.norm())


def flat(values):
    return torch.tensor([x for row in values for x in row])


# 1. Sampler log-probability == trainer log-probability, to rounding (fp32 CPU: 2e-5 nats on a tiny model,
#    1e-4 on a real one), whatever the batch.
@pytest.mark.parametrize("cut", [dict(), dict(temperature=0.7, top_k=9, top_p=0.9, min_p=0.02)], ids=str)
def test_01_sampler_logp_is_trainer_logp(tiny, cut):
    out = generate(tiny, PROMPTS, **SAMPLING, **cut)
    for some in (slice(0, 3), slice(1, 2), slice(2, 3)):
        logp, _, _ = tiny.completion_logprobs(PROMPTS[some], groups_of(out)[some], **cut)
        drawn = flat(out.logprobs[some.start * 3 : some.stop * 3])
        assert float((logp - drawn).abs().max()) < 2e-5


# 2. Gradients do not depend on how the step was cut into micro-batches or ranks (fp32: 1e-5 relative).
def test_02_gradients_do_not_depend_on_micro_batches(tmp_path):
    found = {}
    for micro_tokens in (100_000, 40):
        run = Run(settings(tmp_path, micro_tokens=micro_tokens, objective="clip", beta=0.1))
        run.optimizer.step = lambda lr, max_norm: 1.0  # keep the gradient and the weights
        run.optimizer.zero_grad = lambda: None
        train.train_step(run, 1)
        found[micro_tokens] = torch.cat([p.grad.flatten() for p in run.model.parameters()])
    assert float(found[40].norm()) > 1e-3
    assert close(found[40], found[100_000])


# 3. Shared-prompt training equals G separate sequences: logits, loss and every gradient (fp32: 1e-5).
def test_03_a_shared_prompt_is_separate_sequences(tiny):
    groups = groups_of(generate(tiny, PROMPTS, **SAMPLING))
    factors = torch.randn(sum(len(ids) for group in groups for ids in group))
    shared = gradients(tiny, PROMPTS, groups, factors, [(0, 3)])
    alone_prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    alone = [[ids] for group in groups for ids in group]
    separate = gradients(tiny, alone_prompts, alone, factors, [(i, i + 1) for i in range(9)])
    assert close(shared, separate)
    with torch.no_grad():
        logp, _, _ = tiny.completion_logprobs(PROMPTS[:1], groups[:1])
        one = PROMPTS[0] + groups[0][0]
        words = tiny.logits(torch.tensor(one)).log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
        naive = words.gather(1, torch.tensor(groups[0][0])[:, None])[:, 0]
    torch.testing.assert_close(logp[: len(naive)], naive, rtol=0, atol=1e-5)


# 4. Adding, removing or reordering other rows changes no row's tokens (fp32 CPU).
def test_04_no_row_depends_on_the_others(tiny):
    whole = generate(tiny, PROMPTS, **SAMPLING)
    for numbers in ([2], [1, 0], [2, 0, 1]):
        for slots in (2, 9):
            prompts = [PROMPTS[b] for b in numbers]
            out = generate(tiny, prompts, **SAMPLING, prompt_numbers=numbers, slots=slots)
            for i, b in enumerate(numbers):
                assert out.group(i, 3) == whole.group(b, 3)


# 5. The sampled stop id is scored and trained. Several stop ids work. A model whose pad id is its stop id
#    works.
def test_05_the_stop_id_is_a_token_like_any_other(tiny):
    ended = set()
    for seed in range(20):
        out = generate(tiny, PROMPTS, **SAMPLING | dict(seed=seed))
        for ids, logps, stopped in zip(out.ids, out.logprobs, out.stopped):
            assert len(ids) == len(logps)
            assert stopped == (ids[-1] in SAMPLING["stop_ids"])
            if stopped:
                ended.add(ids[-1])
                logp, _, _ = tiny.completion_logprobs([[5, 6, 7]], [[ids]])
                assert len(logp) == len(ids) and logp.requires_grad
    assert ended == {4, 17}
    pad_is_stop = generate(tiny, PROMPTS, **SAMPLING | dict(stop_ids=[0]))  # 0 is what padding would be
    assert all(0 not in ids[:-1] for ids in pad_is_stop.ids)


# 6. A group whose rewards are all equal has exactly zero advantage and gives exactly zero policy gradient.
def test_06_a_group_of_equal_rewards_teaches_exactly_nothing():
    rewards = torch.tensor([[0.1] * 8, [0.0] * 7 + [1.0], [float("nan")] * 7 + [3.0]])
    A = loss.advantages(rewards)
    assert not A[0].any() and A[1].all() and not A[2].any()
    for objective in loss.OBJECTIVES:
        logp = torch.full((8,), -50.0, requires_grad=True)
        value, _ = loss.policy_loss(logp, torch.zeros(8), A[0], torch.arange(8), objective=objective)
        value.backward()
        assert float(value) == 0 and not logp.grad.any()


# 7. Killed at any moment and resumed, a run ends with the same bits as one never killed (CPU).
def test_07_killed_and_resumed_a_run_ends_with_the_same_bits(tmp_path):
    keys = dict(steps=6, save_every=1, keep=0, lora_rank=2, lora_alpha=4.0, beta=0.1)
    whole = settings(tmp_path, out_dir=str(tmp_path / "whole"), **keys)
    cut = dataclasses.replace(whole, out_dir=str(tmp_path / "cut"))
    assert train.main(whole) == 0
    child = os.fork()
    if child == 0:  # a process of its own, to be killed where it happens to be
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train.main(cut)
        os._exit(0)
    while not (Path(cut.out_dir) / "ckpt" / "step_000002").is_dir():
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert train.main(dataclasses.replace(cut, resume=True)) == 0
    ends = [Path(cfg.out_dir) / "ckpt" / "step_000006" for cfg in (whole, cut)]
    assert same(*map(weights, ends))
    last = [untimed(rows(Path(cfg.out_dir) / "metrics.jsonl")[-1]) for cfg in (whole, cut)]
    assert last[0] == last[1]


# 8. Every option of the objective equals an independent fp64 oracle, and its gradient equals autograd's.
@pytest.mark.parametrize("aggregate", loss.AGGREGATES)
def test_08_the_objective_is_its_formula(aggregate):
    """PPO's clip with k3, by hand; every other option has its oracle in tests/test_loss.py."""
    lengths, A = [2, 3, 1], [1.5, -0.5, 2.0]
    g = torch.Generator().manual_seed(0)
    logp, noise, drift = torch.randn(3, 6, generator=g, dtype=torch.float64)
    numbers = torch.tensor([0, 0, 1, 1, 1, 2])

    def by_hand(logp):
        total = 0.0
        for t, row in enumerate(numbers.tolist()):
            ratio = (logp[t] - (logp[t].detach() + 0.4 * noise[t])).exp()
            gain = torch.minimum(ratio * A[row], ratio.clamp(0.8, 1.3) * A[row])
            d = drift[t] - (logp[t] - logp[t].detach())
            weigh = dict(token=1 / 6, sequence=1 / 3 / lengths[row], constant=1 / (3 * 7), group=1 / (3 / 3))
            total = total + weigh[aggregate] * (-gain + 0.1 * (d.exp() - d - 1))
        return total

    ours, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    options = dict(aggregate=aggregate, clip_high=0.3, beta=0.1, group_size=3, max_new_tokens=7)
    old, ref = logp + 0.4 * noise, logp + drift
    value, _ = loss.policy_loss(ours, old, torch.tensor(A).double(), numbers, ref_logp=ref, **options)
    wanted = by_hand(theirs)
    value.backward()
    wanted.backward()
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(ours.grad, theirs.grad)


# 9. Logits equal transformers' for every supported family (fp32: 1e-4), from real config.json files.
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_09_logits_are_transformers(tmp_path, family):
    small = {name: SHAPE[name] for name in SHAPE if name != "initializer_range"} | dict(vocab_size=61)
    if family == "mistral":
        small["sliding_window"] = None
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small)).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 61, (50,), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        wanted = theirs(ids[None]).logits[0]
        torch.testing.assert_close(models.load(str(tmp_path)).logits(ids), wanted, rtol=0, atol=1e-4)


# 10. An adapter saved here loads in PEFT, a model saved here in transformers, and both give the same logits.
def test_10_what_is_saved_here_loads_elsewhere(tiny, tmp_path):
    ids = torch.tensor([1, 5, 9, 30, 2, 2, 40])
    models.save(tiny, str(tmp_path / "base"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        torch.testing.assert_close(tiny.logits(ids), theirs(ids[None]).logits[0], rtol=0, atol=1e-4)
    lora.apply(tiny, rank=3, alpha=6, targets=("q_proj", "down_proj"))
    for p in tiny.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    lora.save_adapter(tiny, str(tmp_path / "adapter"), base=str(tmp_path / "base"))
    adapted = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(tiny.logits(ids), adapted(ids[None]).logits[0], rtol=0, atol=1e-4)


def raises(completions, **_):
    raise OSError("no such service")


def hangs(completions, **_):
    time.sleep(60)


def too_few(completions, **_):
    return [1.0]


def infinite(completions, **_):
    return [float("inf")] * len(completions)


def not_a_number(completions, **_):
    return [float("nan")] * len(completions)


# 11. A reward that raises, hangs, returns the wrong length, NaN or infinity ends in one clear sentence and
#     loses nothing.
@pytest.mark.parametrize("bad", [raises, hangs, too_few, infinite, not_a_number])
def test_11_a_bad_reward_loses_nothing(tmp_path, capsys, bad):
    calls = []

    def sometimes(completions, **columns):
        calls.append(1)
        return even(completions) if len(calls) < 3 else bad(completions, **columns)

    cfg = settings(tmp_path, rewards=[(sometimes, 1.0)], reward_timeout=0.5, save_every=0)
    assert train.main(cfg) == 1
    told = capsys.readouterr().out
    assert "sometimes" in told and "Traceback" not in told and "--resume=True" in told
    assert [p.name for p in (Path(cfg.out_dir) / "ckpt").iterdir()] == ["step_000002"]


# 12. Text written by a model is never evaluated in this process.
def test_12_model_text_is_never_evaluated_here(tmp_path):
    mark = tmp_path / "process"
    attack = f"__import__('pathlib').Path({str(mark)!r}).write_text(str(__import__('os').getpid()))"
    texts = [attack, f"```python\n{attack}\n```", f"\\boxed{{{attack}}}", f"<answer>{attack}</answer>"]
    columns = dict(answer="4", numbers=[2, 2], target=4, tests=["assert 1"])
    columns = {name: [value] * len(texts) for name, value in columns.items()}
    for name in REWARDS:
        if name in ("judge", "env"):
            continue  # one asks a model over the network, the other reads no text
        ids = [[5, 4]] * len(texts)
        options = dict(group_size=1, completion_ids=ids, max_new_tokens=8)
        score(resolve([(name, 1.0)]), texts, ["2+2"] * len(texts), columns, **options)
    # A sandbox that can hide no files may have let the program write; then it was in a process of its own.
    assert not mark.exists() or int(mark.read_text()) != os.getpid()


# 13. A folder holds one run. Nothing of another run (checkpoint, start, metrics) is ever taken up,
#     overwritten or deleted without being asked.
def test_13_a_folder_holds_one_run(tmp_path):
    first = settings(tmp_path, steps=2)
    train.main(first)
    other = dataclasses.replace(first, seed=1, steps=4, resume=True)
    with pytest.raises(ValueError, match="seed"):
        train.main(other)
    assert sorted(p.name for p in (Path(first.out_dir) / "ckpt").iterdir()) == ["step_000002"]


def test_13_a_used_folder_is_moved_aside(tmp_path):
    first = settings(tmp_path, steps=2)
    train.main(first)
    before = (Path(first.out_dir) / "metrics.jsonl").read_text()
    train.main(dataclasses.replace(first, seed=1))
    assert (Path(first.out_dir + ".1") / "metrics.jsonl").read_text() == before


# 14. The same run on 1, 2 or 4 processes draws the same ids and makes the same groups; weights differ by the
#     rounding of a sum. (An error on any rank is one sentence: tests/test_train.py.)
@pytest.mark.slow
def test_14_two_processes_draw_what_one_does(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import train\nfrom conftest import settings\nfrom pathlib import Path\n"
        "train.main(settings(Path(sys.argv[1]), steps=2, rollouts_every=1, save_every=2))\n"
    )
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    ]
    out = subprocess.run([*launcher, script, tmp_path / "two"], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    train.main(settings(tmp_path / "one", steps=2, rollouts_every=1, save_every=2))
    drawn = []
    for name in ("one", "two"):
        folder = tmp_path / name / "run" / "rollouts"
        # Rank 0 writes its own prompts: those of one process are a superset.
        drawn.append([(r["prompt"], r["ids"]) for r in rows(folder / "step_000001.jsonl")])
    assert 0 < len(drawn[1]) <= len(drawn[0]) and all(row in drawn[0] for row in drawn[1])
    one, two = [weights(tmp_path / name / "run" / "ckpt" / "step_000002") for name in ("one", "two")]
    for name, tensor in one.items():
        if name.startswith("model"):
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-4)
    told = [rows(tmp_path / name / "run" / "metrics.jsonl")[0] for name in ("one", "two")]
    assert told[0]["reward"] == pytest.approx(told[1]["reward"], abs=1e-12)


# 15. In a conversation with an environment the ids that are trained on are those that were drawn: replies are
#     made into ids once, are seen and never scored, and when they come changes nothing.
def test_15_what_is_given_is_seen_and_never_scored(tiny):
    tokenizer = char_tokenizer("".join(map(chr, range(48, 94))))

    def talk(delay):
        def env(row, said):
            time.sleep(delay * len(said))
            return said[::-1][:3]

        options = dict(role="", prefill="", turn_ends="ABCDEFGH", max_turns=4, timeout=30.0)
        turns = Conversations(env, tokenizer, stop_ids=[1], **options).begin([{}], 4)
        return Sampler(tiny, slots=3).generate(
            [[3, 4, 5]], group_size=4, max_new_tokens=20, stop_ids=[1], turns=turns
        )

    out, late = talk(0.0), talk(0.002)
    assert out.ids == late.ids and out.logprobs == late.logprobs
    logp, _, _ = tiny.completion_logprobs([[3, 4, 5]], [out.ids], drawn=out.drawn)
    sampled = torch.tensor([x for row in out.logprobs for x in row])
    assert len(logp) == len(sampled) < sum(map(len, out.ids))
    assert (logp - sampled).abs().max() < 2e-5
