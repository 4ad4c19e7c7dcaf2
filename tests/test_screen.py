"""screen.py: what a run shows fits the terminal, explains itself, and ends in commands that run."""

import os
import re
import subprocess
import sys
import time

import pytest

import eval as eval_script
import report
import sample
import screen
import train
from conftest import ROOT, even, settings


def odd_one_out_by_a_long_name(completions, **_):
    return [float(len(text) % 2) for text in completions]


def odd_one_out_by_another_name(completions, **_):
    return [0.0 for text in completions]


REWARDS = [(even, 1.0), (odd_one_out_by_a_long_name, 0.0), (odd_one_out_by_another_name, 0.0)]


class Terminal:
    """A stdout that is a terminal of some width and keeps what it is told."""

    def __init__(self):
        self.told = []

    def write(self, text):
        self.told.append(text)

    def flush(self):
        pass

    def isatty(self):
        return True


def on_a_terminal(monkeypatch, width: int, **environment) -> Terminal:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(COLUMNS=str(width), **environment).items():
        monkeypatch.setenv(name, value)
    return terminal


def test_the_first_line_says_what_the_run_is_and_each_difference_has_a_line(tmp_path, capsys):
    cfg = settings(tmp_path, rewards=REWARDS, steps=1)
    train.main(cfg)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  ..")]
    assert lines[0].startswith("GRPO on arithmetic: 1 steps of 4 prompts x 4 completions of up to 12 tokens")
    begin = lines.index("differs from the defaults:") + 1
    differences = [line for line in lines[begin:] if re.match(r"  \w+ = ", line)]
    assert "  group_size = 4" in differences and max(map(len, differences)) <= 110


def test_labels_are_whole_and_columns_have_a_legend_once(tmp_path, capsys):
    """Two rewards whose names begin alike had one heading."""
    train.main(settings(tmp_path, rewards=REWARDS, steps=4))
    told = capsys.readouterr().out
    heading = next(line for line in told.splitlines() if line.startswith("  step   reward"))
    assert heading.split()[2:5] == ["even", "odd_one_out_by_a_long_name", "odd_one_out_by_another_name"]
    assert told.count("same%: groups") == told.count("  step   reward") == 1
    assert told.index("same%: groups") < told.index("  step   reward")
    rows = [line for line in told.splitlines() if re.match(r" {5}[1-4] ", line)]
    assert len(rows) == 4 and {len(row) for row in rows} == {len(heading)}
    # Whatever is a heading is explained, or says itself what it is.
    for name in heading.split():
        plain = ("step", "reward", "even", "entropy", "length", "|grad|", "sample", "train")
        assert name in plain or f"{name}:" in " ".join(told.split()) or name.startswith("odd"), name


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_lines_fit_the_terminal(tmp_path, monkeypatch, width):
    terminal = on_a_terminal(monkeypatch, width)
    train.main(settings(tmp_path, rewards=[(even, 1.0)], steps=2, beta=0.1, rollouts_every=0))
    told = re.sub(r"\033\[\d*m", "", "".join(terminal.told))
    heading = next(line for line in told.splitlines() if line.startswith("  step   "))
    rows = [line for line in told.splitlines() if re.match(r" {5}[12] ", line)]
    assert {len(line) for line in rows} == {len(heading)} and len(heading) <= width
    assert heading.split()[:2] == ["step", "reward"] and ("kl" in heading.split()) == (width >= 80)
    assert ("train t/s" in heading) == (width == 200)
    differences = told.split("differs from the defaults:\n")[1].split("kernels:")[0]
    assert max(map(len, differences.splitlines())) <= width


@pytest.mark.parametrize("environment", [dict(NO_COLOR="1"), dict(TERM="dumb")])
def test_colour_is_for_terminals_whose_owner_has_not_said_no(monkeypatch, environment):
    assert screen.paint("x", "bold") == "x"  # here stdout is no terminal
    on_a_terminal(monkeypatch, 80)
    assert screen.paint("x", "bold") == "\033[1mx\033[0m"
    on_a_terminal(monkeypatch, 80, **environment)
    assert screen.paint("x", "bold") == "x"


def test_what_the_end_says_to_type_next_runs(tmp_path, capsys, monkeypatch):
    config = tmp_path / "mine.py"
    cfg = settings(tmp_path, steps=1, save_every=1)
    keys = "task model scratch alphabet task_options max_new_tokens eval_problems device threads".split()
    config.write_text("".join(f"{key} = {getattr(cfg, key)!r}\n" for key in keys))
    monkeypatch.setattr(sys, "argv", ["train.py", str(config)])
    train.main(cfg)
    said = capsys.readouterr().out.rpartition("next: ")[2].splitlines()
    commands = [line.partition("#")[0].split()[1:] for line in said if line.strip()]
    assert [words[0] for words in commands] == ["sample.py", "eval.py", "report.py"]
    sample.main([*commands[0][1:], "1+1=", "--max_new_tokens=2", "--device=cpu"])
    eval_script.main(eval_script.checks.config_of("eval.py", commands[1][1:]))
    report.main([word for word in commands[2][1:] if word != "--serve"])
    said = capsys.readouterr().out
    assert "2 tokens" in said and f"{cfg.out_dir} on arithmetic: accuracy" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["train.py", "--steps=3"], ["sft.py", "--sft_steps=150"], ["eval.py", "--eval_problems=2000"]]
)
def test_a_log_file_is_never_silent_for_more_than_five_seconds(tmp_path, words):
    """Loading, warm-up and evaluation were silent for 22 to 39 s where no terminal was looking."""
    script, *flags = words
    command = [
        sys.executable,
        script,
        "configs/arithmetic.py",
        *flags,
        f"--out_dir={tmp_path}",
        "--threads=1",
    ]
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    told = [time.monotonic()]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        for _ in process.stdout:
            told.append(time.monotonic())
        told.append(time.monotonic())
    assert process.returncode == 0
    gaps = [after - before for before, after in zip(told, told[1:])]
    assert told[-1] - told[0] > 5  # there was something to say
    assert max(gaps) < 6, gaps  # the first, of Python's own start, included
