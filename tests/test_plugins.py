"""docs/plugins.md does what it says: its config files are read from the page, and trained with."""

import re
import string

import pytest

import checkpoint
import config as configs
import train
from conftest import ALPHABET, ROOT, SHAPE, rows, same, weights

PAGE = (ROOT / "docs/plugins.md").read_text()
FILES = dict(re.findall(r"```python\n# configs/(\w+)\.py\n(.*?)```", PAGE, re.S))

# What makes any of them a run of seconds: appended to the file, so these keys win.
SMALL = f"""
model, scratch, alphabet = "", {SHAPE!r}, {ALPHABET!r}
lora_rank, prompts_per_step, group_size, max_new_tokens = 0, 4, 4, 12
steps, lr, warmup_steps, eval_every, save_every, rollouts_every, show_every = 4, 1e-2, 2, 0, 2, 1, 0
device, threads, force, eval_problems = "cpu", 1, True, 6
"""
ARITHMETIC = 'task, task_options = "arithmetic", dict(style="chars", digits=2)\n'
EVEN = """
def even(completions, **_):
    return [sum(c in "02468" for c in text) / max(1, len(text)) for text in completions]
rewards = [(even, 1.0)]
"""


def trained(tmp_path, name, more, *flags, out="run"):
    """Trains with a file of the page. Returns its folder."""
    path = tmp_path / f"{name}.py"
    path.write_text(FILES[name] + SMALL + more)
    folder = tmp_path / out
    assert train.main(configs.load([str(path), f"--out_dir={folder}", *flags])) == 0
    return folder


def metrics(folder):
    return rows(folder / "metrics.jsonl")


def rollouts(folder, step):
    return rows(folder / "rollouts" / f"step_{step:06d}.jsonl")


def last_weights(folder):
    return weights(folder / "ckpt" / "step_000004")


def test_the_page_has_five_files_of_at_most_ten_lines_beside_imports():
    assert set(FILES) == {"my_reward", "my_objective", "my_advantage", "my_task", "my_schedule"}
    for name, text in FILES.items():
        lines = [line for line in text.splitlines() if line.strip()]
        imports = [line for line in lines if line.startswith(("import ", "from "))]
        assert len(lines) - len(imports) <= 10, name


def test_a_reward(tmp_path):
    assert [name for name, _ in configs_rewards("my_reward", tmp_path)] == ["gsm8k", "short"]
    # The page's file with a task that needs no download. Its reward sees every completion.
    folder = trained(tmp_path, "my_reward", ARITHMETIC + "rewards = rewards[1:]\n")
    for m in metrics(folder):
        drawn = rollouts(folder, m["step"])
        wanted = [1 - len(r["completion"]) / 200 for r in drawn]
        assert m["rewards/short/mean"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)
        assert m["reward"] == pytest.approx(0.2 * m["rewards/short/mean"])


def configs_rewards(name, tmp_path):
    """(name, weight) of the rewards that a file of the page gives, as it stands."""
    path = tmp_path / "as_it_stands.py"
    path.write_text(FILES[name])
    loaded = configs.load([str(path)]).rewards
    return [(reward if isinstance(reward, str) else reward.__name__, weight) for reward, weight in loaded]


def test_an_objective_with_two_knobs(tmp_path):
    def run(*flags, out):
        return last_weights(trained(tmp_path, "my_objective", ARITHMETIC + EVEN, *flags, out=out))

    as_it_stands = run(out="a")
    assert same(as_it_stands, run("--tau_neg=1.2", "--tau_pos=1.0", out="b"))  # the file's and the default
    assert not same(as_it_stands, run("--tau_neg=3.0", out="c"))
    assert not same(as_it_stands, run("--tau_pos=3.0", out="d"))
    with pytest.raises(ValueError, match="'tau_nge'.*did you mean 'tau_neg'"):
        run("--tau_nge=1.0", out="e")


def test_an_objective_of_ones_own_has_the_gradient_of_its_formula(tmp_path):
    """At a ratio of 1 SAPO's gradient is the policy gradient's: with one update a batch, REINFORCE's run."""
    one_update = "epochs = 1\n"
    sapo = trained(tmp_path, "my_objective", ARITHMETIC + EVEN + one_update, out="sapo")
    plain = "objective, tau_neg = 'reinforce', 1.0\ndel tau_neg\n"
    policy_gradient = trained(tmp_path, "my_objective", ARITHMETIC + EVEN + one_update + plain, out="pg")
    for ours, theirs in zip(metrics(sapo), metrics(policy_gradient)):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_an_advantage_that_remembers_and_resumes_to_the_bit(tmp_path):
    # 12 prompts, so that every one comes back within the run.
    few = 'task, task_options = "arithmetic", dict(style="words", low=1, high=4, held_out=0.3)\n'
    few += (
        f"alphabet, steps = {string.digits + string.ascii_letters + string.punctuation + ' '!r}, 8\n" + EVEN
    )
    whole = trained(tmp_path, "my_advantage", few, out="whole")
    trained(tmp_path, "my_advantage", few, "--steps=4", out="cut")
    cut = trained(tmp_path, "my_advantage", few, "--resume=True", out="cut")
    ends = [folder / "ckpt" / "step_000008" for folder in (whole, cut)]
    assert same(*map(weights, ends))
    states = [checkpoint.load_state(end)[1]["advantage"] for end in ends]
    assert states[0] == states[1] and 1 < len(states[0]) < 32

    averages, seen_again = {}, 0
    for step in range(1, 9):
        drawn = rollouts(whole, step)
        groups = [drawn[i : i + 4] for i in range(0, 16, 4)]
        before = dict(averages)
        for group in groups:
            prompt, rewards = str(group[0]["prompt"]), [r["reward"] for r in group]
            mean = sum(rewards) / 4
            baseline = before.get(prompt, mean)
            seen_again += prompt in before
            averages[prompt] = 0.9 * baseline + 0.1 * mean
            wanted = [reward - baseline for reward in rewards]
            assert [r["advantage"] for r in group] == pytest.approx(wanted, abs=1e-5)
    assert seen_again > 8
    assert averages == pytest.approx(states[0], abs=1e-6)


def test_a_task(tmp_path):
    folder = trained(tmp_path, "my_task", "eval_every, sft_steps, sft_batch = 2, 3, 4\n")
    drawn = rollouts(folder, 1)
    assert all(re.fullmatch(r"\d{3}=", r["prompt"]) for r in drawn)
    assert len({r["prompt"] for r in drawn}) == 4
    for r in drawn:
        assert r["reward"] == float(r["completion"] == r["prompt"][:-1][::-1])
    assert metrics(folder)[0]["eval/problems"] == 6


def test_a_temperature_that_falls_over_the_run(tmp_path):
    folder = trained(tmp_path, "my_schedule", ARITHMETIC + EVEN)
    told = metrics(folder)
    assert [m["temperature"] for m in told] == pytest.approx([1.2, 1.1, 1.0, 0.9])
    # Sampler and trainer have the same temperature: their log-probabilities agree at every step.
    assert all(m["sampling/sampling_logp_difference/max"] < 2e-5 for m in told)
    # And it is used: at a constant 1.2 the first step is the same, and the second draws other tokens.
    constant = trained(tmp_path, "my_schedule", ARITHMETIC + EVEN + "temperature = 1.2\n", out="constant")
    assert [r["ids"] for r in rollouts(folder, 1)] == [r["ids"] for r in rollouts(constant, 1)]
    assert [r["ids"] for r in rollouts(folder, 2)] != [r["ids"] for r in rollouts(constant, 2)]


def test_a_group_of_one_learns_with_an_advantage_that_remembers(tmp_path):
    """The look at the first batch refused it: rewards of a group of one are always equal."""
    keys = ("--group_size=1", "--force=False", "--prompts_per_step=8")
    # Two problems only, so that both are soon seen again.
    rows_of_two = (
        "def task(*, data_dir, eval_problems):\n    return [dict(prompt=f'{i}+1=') for i in (1, 2)], []\n"
    )
    folder = trained(tmp_path, "my_advantage", rows_of_two + EVEN, *keys)
    told = metrics(folder)
    assert told[0]["grad_norm"] < 1e-6 and told[-1]["grad_norm"] > 1e-3  # nothing is remembered at first
    assert all(row["frac_reward_zero_std"] == 1 for row in told)
    with pytest.raises(ValueError, match="with group_size = 1 that is every group"):
        trained(tmp_path, "my_advantage", rows_of_two + EVEN, *keys, "--resample_zero_groups=True", out="two")
