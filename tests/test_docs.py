"""The README's commands run, its links lead somewhere, and docs/walkthrough.md is what its script prints."""

import re
import shlex
import string
import subprocess
import sys

import pytest

import config as configs
import data
import eval as eval_script
import report
import sample
import sft
import train
from conftest import ROOT, SHAPE
from policy import load_policy, save_policy

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)


def commands() -> list[str]:
    """Every command of the README: the lines of its sh blocks, cut at `&&`, and what it quotes in a line."""
    found = []
    for line in "\n".join(BLOCKS).splitlines():
        found += [part.strip() for part in line.partition("  #")[0].split("&&")]
    in_a_line = re.findall(r"`((?:python|torchrun) [^`]+)`", README)
    return [command for command in dict.fromkeys(found + in_a_line) if command]


COMMANDS = commands()
ABOUT_PYTHON = ("python3 -m venv", ". venv/", "pip install", "python -m pytest")
TRAINING = [c for c in COMMANDS if c.startswith(("python train.py", "torchrun"))]
OTHERS = [c for c in COMMANDS if c not in TRAINING and not c.startswith(ABOUT_PYTHON)]

# What makes a training command one of a second. Its own flags stay, and are read.
ALPHABET = string.digits + string.ascii_letters + string.punctuation + " \n"
SMALL = [
    f"--scratch={SHAPE | dict(max_position_embeddings=512)!r}",
    f"--alphabet={ALPHABET}",
    "--task=arithmetic",
    "--rewards=[('arithmetic', 1.0)]",
    "--lora_rank=0",
    "--sft_steps=2",
    "--prompts_per_step=4",
    "--group_size=4",
    "--max_new_tokens=6",
    "--steps=2",
    "--eval_problems=4",
    "--device=cpu",
    "--threads=1",
    "--force=True",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model in a folder, for the commands that need one."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer, stop_ids, _ = load_policy("", scratch=SHAPE, alphabet=ALPHABET, seed=0)
    save_policy(model, tokenizer, stop_ids, str(folder), base="")
    return folder


def python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)


def test_the_readme_has_the_commands_of_every_script():
    scripts = {word for command in COMMANDS for word in shlex.split(command) if word.endswith(".py")}
    assert {"train.py", "eval.py", "sample.py", "sft.py", "bench/gpu.py"} <= scripts
    assert len(TRAINING) >= 6


STARTED = []  # test_promises.py starts two processes faster
for command in TRAINING:
    marks = pytest.mark.slow if command.startswith("torchrun") else ()
    STARTED.append(pytest.param(command, marks=marks))


@pytest.mark.parametrize("command", STARTED)
def test_a_training_command_of_the_readme_starts(tmp_path, capsys, command):
    """The config with the command's own flags loads; and with a small model over them it trains.

    As a command train.py runs in tests/test_train.py; here its main, which saves two seconds each.
    """
    words = [word.replace("--seed=S", "--seed=3") for word in shlex.split(command)]
    flags = words[words.index("train.py") + 1 :]
    configs.load(flags)
    flags = [flag for flag in flags if not flag.startswith("--wandb")]  # wandb has a test of its own
    flags += [*SMALL, f"--out_dir={tmp_path}"]
    if "--task_options" not in command:
        flags.append("--task_options={'digits': 2}")
    if words[0] == "torchrun":
        two = ("-m", "torch.distributed.run", "--nproc_per_node=2", "train.py")
        out = python(*two, *flags)
        assert out.returncode == 0, out.stdout + out.stderr
        told = out.stdout
    else:
        assert train.main(configs.load(flags)) == 0
        told = capsys.readouterr().out
    assert "step   reward" in told and (tmp_path / "ckpt" / "step_000002").is_dir()


@pytest.mark.parametrize("command", OTHERS)
def test_any_other_command_of_the_readme_runs(saved, tmp_path, capsys, command):
    script, *words = shlex.split(command)[1:]
    words = [f"--model={saved}" if word.startswith("--model=") else word for word in words]
    if script == "eval.py":
        configs.load(words)
        small = ["configs/arithmetic.py", "--eval_problems=4", "--threads=1", "--device=cpu"]
        eval_script.main(configs.load([*small, *words[1:]]))
        assert "4 problems" in capsys.readouterr().out
    elif script == "sft.py":
        configs.load(words)
        sft.main(configs.load([*words, *SMALL, f"--out_dir={tmp_path}"]))
        assert "warm-up" in capsys.readouterr().out
    elif script == "sample.py":
        sample.main([*words, "--max_new_tokens=4"])
        assert "tokens" in capsys.readouterr().out
    elif script == "report.py":
        runs = []
        for name in [word for word in words if not word.startswith("--")]:
            runs.append(tmp_path / name)
            runs[-1].mkdir(parents=True)
            (runs[-1] / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
        if "--serve" not in words:  # tests/test_report.py serves one
            report.main([str(folder) for folder in runs])
            assert "report" in capsys.readouterr().out
    else:
        out = python(script, "--help")
        assert out.returncode == 0 and "usage: " in out.stdout, out.stdout + out.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert links or page.name == "walkthrough.md"
    for link in links:
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_readme_names_every_file_of_the_house():
    for path in ROOT.glob("*.py"):
        assert f"]({path.name})" in README, path.name
    for folder in ("kernels", "tasks", "configs", "bench", "tests"):
        assert f"]({folder})" in README


def test_the_pages_name_keys_and_presets_that_exist():
    for page in PAGES:
        for line in page.read_text().splitlines():
            if "bench/" in line or "plugins" in page.name:
                continue  # a bench has flags of its own, and a plug-in's knobs are its keys
            for key in re.findall(r"--(\w+)=", line):
                others = ("nproc_per_node", "faults")  # of torchrun and of pytest
                assert key in configs.FIELDS or key in others, f"{page.name}: {key}"
    objectives = (ROOT / "docs/objectives.md").read_text()
    assert all(f"| `{name}` |" in objectives for name in configs.PRESETS)


def test_the_readmes_config_file_loads(tmp_path):
    text = re.search(r"```python\n(# configs/mine\.py\n.*?)```", README, re.S).group(1)
    rows = tmp_path / "problems.jsonl"
    rows.write_text('{"prompt": "1+1", "answer": "2"}\n' * 20)
    path = tmp_path / "mine.py"
    path.write_text(text.replace("problems.jsonl", str(rows)))
    cfg = configs.load([str(path)])
    assert [weight for _, weight in cfg.rewards] == [1.0, 0.2]
    assert cfg.rewards[1][0](["abc"]) == [1 - 3 / 2000]
    assert data.load_task(cfg.task, **configs.task_options(cfg)).batch(0, 2)[0]["answer"] == "2"


def words_and_numbers(text):
    """The text with its numbers taken out, and the numbers: (value, how far it may be off)."""
    found = []
    for number in re.findall(r"-?\d+\.\d+", text):
        digits = len(number.partition(".")[2])
        found.append((float(number), 3 * 10**-digits))
    return re.sub(r"-?\d+\.\d+", "#", text), found


@pytest.mark.slow
def test_the_walkthrough_is_what_its_script_prints():
    """Words, ids and shapes to the letter; measured numbers to rounding, which processors differ by."""
    out = python("bench/walkthrough.py", "--print")
    assert out.returncode == 0, out.stderr
    words, numbers = words_and_numbers(out.stdout)
    written_words, written_numbers = words_and_numbers((ROOT / "docs/walkthrough.md").read_text())
    assert words == written_words
    for (value, tolerance), (written, _) in zip(numbers, written_numbers, strict=True):
        assert abs(value - written) <= tolerance
    assert len(numbers) > 60
