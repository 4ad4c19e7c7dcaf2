"""A teacher (key `reference`): the KL's other side is another model, beside rewards or without any.

What exact_kl computes is in tests/test_exact_kl.py; here are runs, on a tiny model.
"""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch

import checks
import config as configs
import eval as eval_script
import memory
import plan
import train
from conftest import ALPHABET, ROOT, SHAPE, WITH_TURNS, even, rows, same, settings, untimed, weights
from policy import load_policy, load_teacher, save_policy
from run import Run
from test_ranks import CASES, case, on

# Another model than the policy's: wider, deeper, of other random numbers.
TEACHER = SHAPE | dict(hidden_size=48, num_hidden_layers=3)
LORA = dict(lora_rank=4, lora_alpha=8.0)


def saved(folder, *, alphabet=ALPHABET, seed=7, **sizes) -> str:
    """A teacher's folder."""
    model, tokenizer, stop_ids, _ = load_policy("", scratch=TEACHER | sizes, alphabet=alphabet, seed=seed)
    save_policy(model, tokenizer, stop_ids, str(folder), base="")
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("teacher"))


def taught(tmp_path, teacher, **keys):
    """The config of a run that learns from a teacher alone."""
    return settings(tmp_path, **dict(reference=teacher, beta=1.0, kl="full", rewards=[]) | keys)


def one_step(run) -> tuple[dict, torch.Tensor]:
    """The metrics of a first step, and its gradient; the weights stay."""
    run.optimizer.step = lambda lr, max_norm: 1.0
    run.optimizer.zero_grad = lambda: None
    metrics = train.train_step(run, 1)
    grads = [p.grad.flatten() for p in run.model.parameters() if p.requires_grad]
    return metrics, torch.cat(grads)


def whole_kl(run, prompts, out, direction, temperature):
    """The mean KL over drawn tokens, by whole logits of each sequence: a loop, and autograd."""
    total, count = 0.0, 0
    for n, (completion, drawn) in enumerate(zip(out.ids, out.drawn)):
        prompt = prompts[n // 4]
        sequence = torch.tensor(prompt + completion)
        places = slice(len(prompt) - 1, len(sequence) - 1)
        p = (run.model.logits(sequence)[places] / temperature).softmax(-1)
        q = (run.reference.logits(sequence)[places] / temperature).softmax(-1)
        if direction == "forward":
            p, q = q, p
        kl = (p * (p.log() - q.log())).sum(-1)
        total = total + kl[torch.tensor(drawn)].sum()
        count += sum(drawn)
    return total / count


STEPS = [dict(), dict(kl_direction="forward", **LORA), WITH_TURNS]


@pytest.mark.parametrize("keys", STEPS, ids=["full", "LoRA", "turns"])
def test_a_step_without_rewards_is_the_mean_kl_of_what_was_drawn(tmp_path, teacher, keys):
    run = Run(taught(tmp_path, teacher, temperature=0.7, beta=0.5, **keys))
    drawn = []
    real = run.sampler.generate

    def generate(prompts, **options):
        out = real(prompts, **options)
        drawn.append((prompts, out))
        return out

    run.sampler.generate = generate
    metrics, grads = one_step(run)
    ((prompts, out),) = drawn
    assert all(map(all, out.drawn)) == (keys is not WITH_TURNS)  # what an environment says is not learnt
    for p in run.model.parameters():
        p.grad = None
    kl = whole_kl(run, prompts, out, run.cfg.kl_direction, 0.7)
    (0.5 * kl).backward()
    kl = float(kl.detach())
    want = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.requires_grad])
    assert metrics["kl"] == pytest.approx(kl, rel=1e-4)
    assert metrics["loss"] == pytest.approx(0.5 * kl, rel=1e-4) and not metrics["policy_loss"]
    assert float(want.norm()) > 1e-3
    assert float((grads - want).norm()) < 1e-4 * float(want.norm())


@pytest.mark.slow
@pytest.mark.parametrize("keys", [dict(), dict(kl_direction="forward", kl_top=3)], ids=str)
def test_the_gradient_does_not_depend_on_micro_batches(tmp_path, teacher, keys):
    found = []
    for micro_tokens in (100_000, 40):
        run = Run(taught(tmp_path, teacher, micro_tokens=micro_tokens, **keys))
        found.append(one_step(run)[1])
    assert float((found[0] - found[1]).norm()) < 1e-5 * float(found[0].norm())


@pytest.mark.slow
def test_a_reward_of_weight_0_is_shown_and_changes_nothing(tmp_path, teacher):
    folders = []
    for name, rewards in (("none", []), ("shown", [("arithmetic", 0.0), (even, 0.0)])):
        cfg = taught(tmp_path, teacher, rewards=rewards, out_dir=str(tmp_path / name))
        assert train.main(cfg) == 0
        folders.append(Path(cfg.out_dir))
    assert same(*[weights(folder / "ckpt" / "step_000004") for folder in folders])
    none, shown = [[untimed(m) for m in rows(folder / "metrics.jsonl")] for folder in folders]
    assert {key for key in shown[0].keys() - none[0].keys()} == {
        "rewards/arithmetic/mean", "rewards/arithmetic/std", "rewards/even/mean", "rewards/even/std"
    }  # fmt: skip
    for a, b in zip(none, shown):
        assert all(b[key] == value for key, value in a.items())


def test_without_a_reward_the_screen_shows_the_kl_and_no_reward(tmp_path, teacher, capsys):
    cfg = taught(tmp_path, teacher, rewards=[(even, 0.0)], show_every=2, eval_every=4, eval_problems=3)
    assert train.main(cfg) == 0
    told = capsys.readouterr().out
    (heading,) = [line for line in told.splitlines() if line.startswith("  step ")]
    assert "kl" in heading and "even" in heading
    assert not {"reward", "spread", "same%", "none"} & set(heading.split())
    assert f"teacher: {teacher}: llama," in told and "distillation on arithmetic" in told
    assert "nan" not in told
    metrics = rows(Path(cfg.out_dir) / "metrics.jsonl")[1:]
    assert not {"reward", "reward_std", "reward_spread", "frac_reward_zero_std"} & metrics[-1].keys()
    assert metrics[-1]["kl"] < metrics[0]["kl"] and "eval/strict" in metrics[-1]
    rollouts = rows(Path(cfg.out_dir) / "rollouts" / "step_000002.jsonl")
    assert {(r["reward"], r["advantage"]) for r in rollouts} == {(None, 0.0)}
    page = (Path(cfg.out_dir) / "report.html").read_text()
    assert "KL to the reference" in page and "<dt>kl</dt>" in page and '"title":"Reward"' in page


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys, left",
    [
        (dict(lr=3e-3), 0.5),
        (dict(lr=3e-2, kl_top=4, **LORA), 0.75),
    ],  # adapters leave the random head as it is
    ids=["full", "LoRA"],
)
def test_the_policy_comes_nearer_to_its_teacher(tmp_path, teacher, keys, left):
    """One completion a prompt is enough: nothing is compared within a group."""
    cfg = taught(tmp_path, teacher, steps=60, save_every=0, rollouts_every=0, group_size=1, **keys)
    assert train.main(cfg) == 0
    kl = [m["kl"] for m in rows(Path(cfg.out_dir) / "metrics.jsonl")]
    assert sum(kl[-5:]) < left * sum(kl[:5])


def warmed_up(tmp_path, name, *flags, **options):
    """configs/arithmetic.py's model of two-digit sums, warmed up. Returns the run's folder."""
    folder = tmp_path / name
    options = dict(style="chars", digits=2) | options
    words = [str(ROOT / "configs/arithmetic.py"), "--sft_steps=150", f"--out_dir={folder}", *flags]
    words += [f"--task_options={options!r}", "--eval_problems=200", "--rollouts_every=0", "--threads=1"]
    assert train.main(configs.load([*words, "--device=cpu"])) == 0
    return folder


@pytest.mark.slow
def test_a_model_that_works_its_sums_teaches_one_that_guesses_in_eight_steps(tmp_path):
    """configs/distil.py in small. 2 % before and 79 % after, where the teacher has 94 %."""
    knows = warmed_up(tmp_path, "teacher", "--steps=0", worked_share=1.0)
    flags = [f"--reference={knows / 'start'}", "--beta=1", "--kl=full", "--rewards=[('arithmetic', 0.0)]"]
    flags += ["--steps=8", "--lr=2e-4", "--eval_every=8"]
    student = warmed_up(tmp_path, "student", *flags, worked_first=2880, worked_share=0.15)
    before, *_, after = [m["eval/strict"] for m in rows(student / "metrics.jsonl") if "eval/strict" in m]
    assert before < 0.2 and after > 0.6


def test_a_teacher_beside_rewards_leaves_the_policy_term_as_it_is(tmp_path, teacher):
    keys = dict(rewards=[(even, 1.0)], beta=0.1)
    metrics, grads = one_step(Run(taught(tmp_path, teacher, **keys)))
    alone, policy = one_step(Run(settings(tmp_path, rewards=[(even, 1.0)])))
    _, pulled = one_step(Run(taught(tmp_path, teacher, beta=0.1)))
    assert metrics["reward"] == alone["reward"] and metrics["kl"] > 0
    torch.testing.assert_close(grads, policy + pulled, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------- resumed
RESUMED = [
    pytest.param(dict(), id="full"),
    pytest.param(dict(kl_direction="forward", kl_top=3, **LORA), id="LoRA", marks=pytest.mark.slow),
    pytest.param(dict(base="nf4", **LORA), id="4 bits", marks=pytest.mark.slow),
    pytest.param(dict(rewards=[(even, 1.0)], kl="k3", beta=0.1), id="rewards", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("keys", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, teacher, keys):
    whole = taught(tmp_path, teacher, out_dir=str(tmp_path / "whole"), **keys)
    cut = dataclasses.replace(whole, out_dir=str(tmp_path / "cut"))
    train.main(whole)
    train.main(dataclasses.replace(cut, steps=2))
    train.main(dataclasses.replace(cut, resume=True))
    folders = [Path(cfg.out_dir) for cfg in (whole, cut)]
    assert same(*[weights(folder / "ckpt" / "step_000004") for folder in folders])
    first, second = [[untimed(m) for m in rows(folder / "metrics.jsonl")] for folder in folders]
    assert first == second


def test_a_run_is_not_resumed_with_another_teacher(tmp_path, teacher):
    """By its name, and where the name is the same by its weights: a run's folder is its newest checkpoint."""
    mine = saved(tmp_path / "mine")
    cfg = taught(tmp_path, mine, steps=2)
    assert train.main(cfg) == 0
    with pytest.raises(ValueError, match="made with reference"):
        train.main(dataclasses.replace(cfg, steps=4, resume=True, reference=teacher))
    saved(mine, seed=8)
    with pytest.raises(ValueError, match="not those of the teacher that this run was started with"):
        train.main(dataclasses.replace(cfg, steps=4, resume=True))
    saved(mine)
    assert train.main(dataclasses.replace(cfg, steps=4, resume=True)) == 0


@pytest.mark.slow
def test_a_run_with_adapters_teaches_by_its_folder(tmp_path):
    """A teacher may be an adapter on a base, and the newest checkpoint of a run's folder."""
    first = settings(tmp_path, out_dir=str(tmp_path / "first"), **LORA)
    assert train.main(first) == 0
    cfg = taught(tmp_path, first.out_dir, model=str(tmp_path / "first/start"), scratch=None, steps=1)
    run = Run(cfg)
    assert run.as_reference().__enter__() is run.reference
    whole, *_ = load_policy(str(tmp_path / "first/ckpt/step_000004"))
    ids = torch.tensor([3, 4, 5, 6])
    assert torch.equal(run.reference.logits(ids), whole.logits(ids))
    assert not torch.equal(run.reference.logits(ids), run.model.logits(ids))


# ---------------------------------------------------------------------------------------- the vocabulary
def test_a_teacher_of_another_vocabulary_is_refused_with_what_differs(tmp_path):
    other = saved(tmp_path / "other", alphabet=ALPHABET[1:] + "0")
    with pytest.raises(ValueError, match="'0', which is id 2 here, has id 18 there"):
        train.main(taught(tmp_path, other))
    fewer = saved(tmp_path / "fewer", alphabet=ALPHABET[:-1])
    with pytest.raises(ValueError, match=r"'\^', which is id 18 here, is unknown there"):
        train.main(taught(tmp_path, fewer))


def padded(folder, more):
    """The folder of the teacher with so many rows more in its embedding, of other random numbers."""
    model, tokenizer, stop_ids, _ = load_policy(folder)
    noise = torch.randn(more, model.shape.D, generator=torch.Generator().manual_seed(1))
    model.embed = torch.nn.Parameter(torch.cat([model.embed.data, noise]))
    model.config["vocab_size"] += more
    save_policy(model, tokenizer, stop_ids, f"{folder}_padded", base="")
    return f"{folder}_padded"


@pytest.mark.parametrize("kl", ["full", pytest.param("k3", marks=pytest.mark.slow)])
def test_rows_that_only_the_teacher_has_are_cut_off(tmp_path, kl):
    """Sizes of one family are padded differently; what is left must be the teacher's own distribution."""
    plain = saved(tmp_path / "plain")
    found = [one_step(Run(taught(tmp_path, name, kl=kl))) for name in (plain, padded(plain, 5))]
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][0]["kl"] == found[1][0]["kl"]


def test_a_teacher_with_fewer_rows_than_the_model_is_refused(tmp_path):
    folder = saved(tmp_path / "plain")
    model, tokenizer, _, _ = load_policy(padded(folder, 5))
    with pytest.raises(ValueError, match="19 rows in its embedding, and the model may draw 24"):
        load_teacher(folder, model, tokenizer, dtype=torch.float32, device="cpu")


# ------------------------------------------------------------------------------------------- refused
REFUSED = [
    (dict(beta=0.0), "give --beta=1"),
    (dict(reference=""), "--reference=FOLDER_OR_HUB_ID"),
    (dict(reference="", beta=0.0), "nothing to train on"),
    (dict(rewards=[(even, 0.0)], reference=""), "nothing to train on"),
    (dict(ref_sync_every=2), "a teacher stays as it is"),
    (dict(kl="k3", kl_top=8), "give --kl=full"),
    (dict(kl="k3", kl_direction="forward"), "give --kl=full"),
    (dict(kl="k1"), "has mean 0"),
    (dict(resample_zero_groups=True), "leave it out"),
    (dict(eval_every=5), "rewards = .*weight 0"),
    (dict(rewards=[(even, 1.0)], group_size=1), "no group to compare with"),
]


@pytest.mark.parametrize("keys, sentence", REFUSED, ids=str)
def test_what_cannot_be_meant_is_refused_with_what_to_type(tmp_path, keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        taught(tmp_path, "somewhere", **keys)


def test_an_evaluation_without_a_grader_is_refused(tmp_path, teacher):
    with pytest.raises(ValueError, match="nothing to grade answers with"):
        eval_script.main(taught(tmp_path, teacher))


def test_a_teacher_that_is_not_there_or_reads_too_little_is_refused_before_anything_is_moved(tmp_path):
    cfg = taught(tmp_path, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="there is no model folder .*nowhere"):
        train.main(cfg)
    assert not Path(cfg.out_dir).exists()
    short = saved(tmp_path / "short", max_position_embeddings=12)
    with pytest.raises(ValueError, match="no room for a prompt before the teacher"):
        checks.model(taught(tmp_path, short))


def test_the_commands_of_the_page_load_and_its_table_is_what_the_runs_measured():
    page = (ROOT / "docs/distillation.md").read_text()
    commands = re.findall(r"python train\.py ([^\n&`]+)", page)
    assert len(commands) >= 4
    for command in commands:
        configs.load(shlex.split(command.replace("=S", "=0")))
    found = re.findall(r"^\| \[seed \d\]\(\.\./(\S+)\) \|(.*)\|[^|]*\|$", page, re.M)
    assert len(found) == 5
    for file, cells in found:
        measured = [m["eval/strict"] for m in rows(ROOT / file) if "eval/strict" in m]
        assert [float(cell) for cell in cells.split("|")] == [round(100 * share, 1) for share in measured]


def test_names_of_other_trainers_lead_here():
    for name in ("teacher_model_name_or_path", "ref_model", "teacher_model"):
        with pytest.raises(ValueError, match="here it is reference"):
            configs.load([f"--{name}=x"])


def test_the_plan_counts_the_teacher(tmp_path, teacher):
    shape = checks.teacher_shape_of(taught(tmp_path, teacher))
    own = checks.shape_of(taught(tmp_path, teacher))
    for keys in (dict(), LORA):
        run = Run(taught(tmp_path, teacher, **keys))
        held = memory.held_always(run.cfg, own, "cpu", teacher=shape)
        assert held["reference"] == pytest.approx(sum(p.nbytes for p in run.reference.parameters()), rel=0.01)
    in_4_bits = configs.Config(base="nf4", beta=1.0, reference="Qwen/Qwen2.5-7B-Instruct")
    held = memory.held_always(in_4_bits, own, "cuda", teacher=plan.teacher_of(in_4_bits))
    # Embedding and head in bf16, half a byte a weight of the layers, and the scratch of one.
    assert held["reference"] == pytest.approx(2.18e9 + 0.516 * 6.525e9 + 0.27e9, rel=0.01)


# ------------------------------------------------------------------------------------- several processes
def several(**keys):
    """A case of test_ranks.py, whose teacher stands beside the run's folder."""

    def of(folder):
        place = Path(folder).parent / "teacher"
        return case(**dict(reference=str(place), beta=1.0, kl="full", rewards=[], **keys))(folder)

    return of


CASES |= {
    "teacher": several(),
    "teacher, lora": several(kl_direction="forward", kl_top=3, **LORA),
    "teacher, sharded": several(shard=True),
    "teacher, sharded lora": several(shard=True, **LORA),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("teacher")])
def test_two_processes_learn_what_one_does(tmp_path, name):
    saved(tmp_path / "teacher")
    out = on(2, tmp_path, name)
    assert out.returncode == 0, out.stdout + out.stderr
    assert train.main(dataclasses.replace(CASES[name](tmp_path / "one"), shard=False)) == 0
    one, two = [rows(tmp_path / folder / "run" / "metrics.jsonl") for folder in ("one", "several")]
    assert [m["fingerprint"][:8] for m in one] == [m["fingerprint"][:8] for m in two]
    for ours, theirs in zip(one, two, strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    step = f"run/ckpt/step_{len(one):06d}"
    last = [weights(tmp_path / folder / step) for folder in ("one", "several")]
    for key, tensor in last[0].items():
        if not key.startswith("optimizer"):
            torch.testing.assert_close(last[1][key], tensor, rtol=0, atol=1e-6)
