"""bench/speedrun.py: what its line says, what the rules refuse, and decoding's bytes counted by hand."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import config as configs
import data
import lora
import model as models
from conftest import ROOT, TINY

sys.path.insert(0, str(ROOT / "bench"))
import bandwidth  # noqa: E402
import speedrun  # noqa: E402

LAPTOP = speedrun.TRACKS["laptop"]
ARITHMETIC = str(ROOT / "configs" / "arithmetic.py")


def load(*words):
    return speedrun.load(LAPTOP, ARITHMETIC, list(words))


def step_row(step, seconds, **evaluation):
    row = {"step": step, "step_time": seconds, "time/sample": 0.5, "tokens_per_second/sample": 200.0}
    return row | {f"eval/{name}": value for name, value in evaluation.items()}


ROWS = [
    {"step": 0, "eval/strict": 0.02},
    step_row(1, 2.0),
    step_row(2, 3.0, strict=0.98, strict_low=0.96, strict_high=0.99),
]


def result(seed, **changes):
    return speedrun.result_of(ROWS, "eval/strict>=0.97") | dict(seed=seed, fresh=0.98) | changes


# ------------------------------------------------------------------------------------------------ the clock
def test_the_clock_is_the_sum_of_the_steps_and_the_last_row_says_how_good():
    found = speedrun.result_of(ROWS, "eval/strict>=0.97")
    assert (found["seconds"], found["steps"], found["tokens"]) == (5.0, 2, 200)
    assert found["sampling_seconds"] == 1.0
    assert (found["before"], found["watched"], found["reached"]) == (0.02, 0.98, True)
    assert found["watched_interval"] == [0.96, 0.99]


def test_a_run_that_ends_below_the_target_has_not_reached_it():
    assert not speedrun.result_of(ROWS, "eval/strict>=0.99")["reached"]


def test_the_summary_is_the_mean_of_the_seeds_with_its_spread():
    runs = [result(0), result(1, seconds=7.0, fresh=0.96)]
    found = speedrun.summary(LAPTOP, runs)
    assert found["seconds"] == dict(mean=6.0, sd=pytest.approx(2**0.5), least=5.0, most=7.0)
    assert found["fresh"] == pytest.approx(0.97) and found["reached"]
    assert found["tokens"] == 400 and found["tokens_per_s"] == 200.0
    low, high = found["fresh_interval"]
    assert 0.95 < low < 0.97 < high < 0.98  # of 1,000 problems


def test_a_lucky_evaluation_is_no_record():
    """Every run has stopped at 98 %, and their models answer 96 % of problems that nobody looked at."""
    runs = [result(seed, fresh=0.96) for seed in LAPTOP.seeds]
    found = speedrun.summary(LAPTOP, runs) | dict(runs=runs)
    assert not found["reached"]
    assert "96.00%" in speedrun.objections(LAPTOP, found, list(LAPTOP.seeds), dirty=False)[0]


def test_a_record_is_the_given_seeds_at_a_commit():
    runs = [result(seed) for seed in LAPTOP.seeds]
    found = speedrun.summary(LAPTOP, runs) | dict(runs=runs)
    assert speedrun.objections(LAPTOP, found, list(LAPTOP.seeds), dirty=False) == []
    assert len(speedrun.objections(LAPTOP, found, [5, 6, 7, 8, 9], dirty=False)) == 1
    assert len(speedrun.objections(LAPTOP, found, list(LAPTOP.seeds), dirty=True)) == 1
    assert len(speedrun.objections(LAPTOP, found, list(LAPTOP.seeds), dirty=None)) == 1


# ------------------------------------------------------------------------------------------------- the rules
def test_rates_batches_objectives_and_schedules_are_free():
    cfg = load("--lr=1e-4", "--prompts_per_step=4", "--preset=dr_grpo", "--max_new_tokens=28")
    assert cfg.lr == 1e-4 and cfg.eval_problems == 500 and cfg.stop_at == "eval/strict>=0.97"
    assert load("--stop_at=eval/strict>=0.99").stop_at == "eval/strict>=0.99"
    assert load("--eval_every=1").eval_every == 1 and load().eval_every == 5


@pytest.mark.parametrize(
    "word, says",
    [
        ("--task_options={'digits': 2}", "task_options"),
        ("--task=countdown", "task ="),
        ("--scratch={'hidden_size': 256}", "scratch"),
        ("--model=Qwen/Qwen2.5-0.5B-Instruct", "scratch"),  # a model by name takes the place of scratch
        ("--sft_steps=5000", "sft_steps"),
        ("--rewards=[('length', 1.0)]", "rewards"),
        ("--rewards=[('arithmetic', 1.0), ('length', 0.1)]", "rewards"),
        ("--rewards=[('length', 0.0), ('arithmetic', 1.0)]", "rewards"),
        ("--reference=a_teacher", "reference"),
        ("--eval_problems=20", "eval_problems"),
        ("--seed=7", "seed"),
        ("--eval_samples=4", "eval_samples"),
        ("--stop_at=eval/strict>=0.5", "stop_at"),
        ("--stop_at=eval/lenient>=0.97", "stop_at"),
        ("--threads=4", "threads"),
    ],
)
def test_what_the_rules_refuse(word, says):
    beside = ["--beta=1"] if "reference" in word else []
    with pytest.raises(ValueError, match=says):
        load(word, *beside)


def test_a_reward_of_the_same_name_in_a_config_file_is_refused(tmp_path):
    text = (ROOT / "configs" / "arithmetic.py").read_text()
    text += "\n\ndef arithmetic(completions, **_):\n    return [1.0] * len(completions)\n\n\n"
    cheat = tmp_path / "cheat.py"
    cheat.write_text(text + "rewards = [(arithmetic, 1.0)]\n")
    with pytest.raises(ValueError, match="rewards"):
        speedrun.load(LAPTOP, str(cheat), [])


def test_a_checkpoint_of_another_size_is_refused(tiny, tmp_path):
    models.save(tiny, str(tmp_path))
    with pytest.raises(ValueError, match="has vocab_size = 48 and breaks the rules"):
        speedrun.check_sizes(speedrun.TRACKS["gpu"], str(tmp_path))
    track = dataclasses.replace(LAPTOP, sizes={name: TINY[name] for name in speedrun.QWEN_05B})
    speedrun.check_sizes(track, str(tmp_path))


def test_the_laptops_problems_are_the_known_ones_and_the_watched_come_first():
    cfg, eval_problems = load(), LAPTOP.watched + LAPTOP.fresh
    options = configs.task_options(cfg)
    task = data.load_task(cfg.task, **options | dict(eval_problems=eval_problems))
    speedrun.check_data(LAPTOP, cfg, task, [0])
    watched = data.load_task(cfg.task, **options).eval
    assert [row["prompt"] for row in watched] == [row["prompt"] for row in task.eval[:500]]
    with pytest.raises(ValueError, match="not the track's"):
        task.eval[0]["answer"] = "1"
        speedrun.check_data(LAPTOP, cfg, task, [0])


def test_training_on_a_held_out_problem_is_refused():
    row = dict(prompt="1+1=", answer="2")
    task = data.Task("leak", [row], [row])
    track = dataclasses.replace(LAPTOP, held_out=speedrun.hash_of_rows([row]))
    with pytest.raises(ValueError, match="step 1 of seed 3 would train on a held-out problem"):
        speedrun.check_data(track, load(), task, [3])


# ---------------------------------------------------------------------------------------------------- the MBU
def test_bytes_of_decoding_by_hand():
    """Two prompts of 3 and 5 tokens, two rows each, which draw 1, 3, 2 and 4 ids."""
    # 3 steps of 100 bytes. Rows read 0, 1 + 2, 1 and 1 + 2 + 3 keys of their own; prompts are read in 2 and
    # in 3 steps.
    expected = 3 * 100 + 7 * (3 + 1 + 6 + 2 * 3 + 3 * 5)
    found = bandwidth.decode_bytes([3, 5], [1, 3, 2, 4], weights=100, token=7, slots=4)
    assert found == expected
    one_at_a_time = bandwidth.decode_bytes([3, 5], [1, 3, 2, 4], weights=100, token=7, slots=1)
    assert one_at_a_time == expected + 3 * 100  # 6 steps


def test_bytes_of_a_models_weights_and_keys(tiny):
    numbers = sum(p.numel() for p in tiny.parameters())
    assert bandwidth.weight_bytes(tiny) == 4 * numbers  # its head is its embedding
    assert bandwidth.token_bytes(tiny) == 2 * 2 * 2 * 8 * 4  # k and v, L, K, E, fp32
    untied = models.create(dict(TINY, tie_word_embeddings=False), seed=0)
    assert bandwidth.weight_bytes(untied) == 4 * numbers  # the embedding is not read
    lora.merge(lora.apply(tiny, rank=2, alpha=4.0, targets=["q_proj"]))
    assert bandwidth.weight_bytes(tiny) == 4 * numbers


def test_utilisation_is_bytes_over_seconds_over_the_peak(tiny):
    found = bandwidth.utilisation(tiny, [[1, 2, 3]], group_size=2, max_new_tokens=6, stop_ids=[])
    assert found["share"] == found["bytes"] / found["seconds"] / found["peak_bytes_per_s"]
    assert found["peak_bytes_per_s"] > 1e8 and "measured" in found["peak_is"]
    own, shared = 2 * (1 + 2 + 3 + 4 + 5), 5 * 3
    weights, token = bandwidth.weight_bytes(tiny), bandwidth.token_bytes(tiny)
    assert found["bytes"] == 5 * weights + (own + shared) * token


# ------------------------------------------------------------------------------------------------ the script
def speedrun_command(*words):
    command = [sys.executable, str(ROOT / "bench" / "speedrun.py"), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_seeds_are_numbers():
    assert speedrun.seeds_of("0,1,12") == [0, 1, 12] and speedrun.seeds_of("") == []
    with pytest.raises(ValueError, match="write them as 0,1,2"):
        speedrun.seeds_of("0-4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs for good")
def test_the_gpu_track_says_that_it_needs_a_gpu():
    with pytest.raises(ValueError, match="needs a GPU, and torch sees none here"):
        speedrun.attempt("gpu", speedrun.TRACKS["gpu"], "configs/gsm8k.py", [], [0], None)


@pytest.mark.slow
def test_a_target_that_is_not_reached_ends_with_status_1_and_says_so(tmp_path):
    out = speedrun_command("--seeds=3", "--steps=1", f"--out={tmp_path}")
    assert out.returncode == 1, out.stderr[-2000:]
    found = json.loads(out.stdout)
    assert not found["reached"] and not found["record"]
    assert "not reached from seeds [3]" in found["objections"][0]


@pytest.mark.slow
def test_a_cheat_ends_with_status_2_and_one_sentence():
    out = speedrun_command("--task_options={'digits': 1}")
    assert out.returncode == 2 and out.stdout == ""
    assert out.stderr.startswith("speedrun.py: task_options") and "Traceback" not in out.stderr


@pytest.mark.slow
def test_the_line_of_a_tiny_run_is_what_its_files_say(tmp_path):
    """One digit and hardly a warm-up: two runs of three steps, which do not get far."""
    config = tmp_path / "one_digit.py"
    text = (ROOT / "configs" / "arithmetic.py").read_text()
    text += "\ntask_options, sft_steps = dict(style='chars', digits=1, held_out=0.3), 2\n"
    text += "force, steps, group_size, prompts_per_step = True, 3, 2, 2\n"
    config.write_text(text)
    task = data.load_task("arithmetic", style="chars", digits=1, held_out=0.3, eval_problems=10)
    changes = dict(config=str(config), seeds=(0, 1), watched=6, fresh=4)
    track = dataclasses.replace(LAPTOP, **changes, held_out=speedrun.hash_of_rows(task.eval))
    found = speedrun.attempt("small", track, str(config), [], [0, 1], tmp_path)
    for run in found["runs"]:
        rows = (tmp_path / f"small_seed{run['seed']}" / "metrics.jsonl").read_text().splitlines()
        times = [json.loads(row).get("step_time", 0.0) for row in rows]
        assert run["seconds"] == sum(times) and run["steps"] == 3
        assert run["wall_seconds"] > run["seconds"]
        assert run["watched"] == json.loads(rows[-1])["eval/strict"] and not run["reached"]
    assert found["seconds"]["mean"] == sum(run["seconds"] for run in found["runs"]) / 2
    assert not found["reached"] and not found["record"]
    assert 0 < found["mbu"]["share"] and found["torch"] == torch.__version__ and found["threads"] == 1
    assert len(found["commit"]) == 40 and found["load"] and "cores" in found["device"]
