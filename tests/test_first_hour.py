"""What a person types in the first hour, and what comes back: one sentence, before a model is loaded."""

import re

import pytest

import checks
import config as configs
import data
import rewards as rewarding
import usage
from conftest import ROOT


def answer(*words, script="train.py") -> str:
    """What a script says to these words, in this process: a sentence, or "" where it would start.

    Everything up to the moment where the model is loaded is done, as train.py and eval.py do it.
    """
    try:
        cfg = checks.config_of(script, [str(word) for word in words])
        task = data.load_task(cfg.task, **configs.task_options(cfg))
        checks.columns(cfg, rewarding.resolve(cfg.rewards), task)
    except (ValueError, rewarding.RewardError) as error:
        sentence = str(error)
        assert "\n" not in sentence.strip() and len(sentence) < 500, sentence
        return sentence
    return ""


# ----------------------------------------------------------------------------------- help, and how flags are
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_names_every_key_with_its_default_and_its_comment(capsys, word):
    """`--help` was an unknown key, with 'schedule' proposed instead."""
    with pytest.raises(SystemExit) as ended:
        checks.config_of("train.py", [word])
    page = capsys.readouterr().out
    assert ended.value.code == 0 and "usage: python train.py" in page
    listed = dict(re.findall(r"^  --(\w+)=(\S*)", page, re.M))
    assert listed.keys() == configs.FIELDS.keys()
    assert listed["clip_low"] == "0.2" and listed["lr"] == "1e-5" and listed["task_options"] == "{}"
    assert "the rate climbs to lr over these" in page and "OPTIONS[" not in page and "field(" not in page
    assert all(f"configs/{path.name}" in page for path in (ROOT / "configs").glob("*.py"))


def test_no_words_at_all_give_the_usage_and_no_run(capsys):
    with pytest.raises(SystemExit) as ended:
        checks.config_of("train.py", [])
    page = capsys.readouterr().out
    assert ended.value.code == 2 and "configs/gsm8k.py" in page and "--help" in page and "--lr" not in page


def test_flags_are_taken_as_people_write_them():
    def config(*words):
        return configs.load(["configs/arithmetic.py", *words])

    assert config("--lr", "2e-6").lr == config("--lr=2e-6").lr == 2e-6
    for words in (["--resume"], ["--resume=True"], ["--resume", "true"], ["--resume=1"], ["--resume=yes"]):
        assert config(*words).resume is True, words
    for words in (["--resume", "False"], ["--resume=off"], ["--resume", "0"]):
        assert config(*words).resume is False, words
    assert config("--resume", "--steps", "7").steps == 7
    assert config("--group-size=4").group_size == 4
    assert config("--steps=1e3").steps == 1000
    assert config("--slots=none").slots is None
    assert config("--lora_targets=q_proj,v_proj").lora_targets == ("q_proj", "v_proj")
    assert rewarding.resolve(config("--rewards=arithmetic,format").rewards)[1][0] == "format"
    assert configs.load(["--resume", "configs/arithmetic.py"]).scratch


@pytest.mark.parametrize("name", ["configs/smollm2", "smollm2", "smollm2.py", "configs/smollm2.py"])
def test_a_config_is_found_by_any_of_its_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # wherever one stands
    assert configs.load([name]).out_dir.endswith("smollm2")


def test_names_of_other_trainers_are_answered_with_ours():
    for name, ours in usage.ELSEWHERE.items():
        assert name not in configs.FIELDS
        sentence = answer("configs/arithmetic.py", f"--{name}=3")
        assert "another trainer's name" in sentence and ours in sentence
        known = re.findall(r"\w+", ours)
        assert ours.startswith(("nothing", "torchrun")) or any(word in configs.FIELDS for word in known), name


# --------------------------------------------------------------------------------------- files that are none
NO_CONFIGS = {
    "a.json": ('{"lr": 1e-5}', "Python file that sets keys"),
    "json_inside.py": ('{"lr": 1e-5}', "sets no key"),
    "true.py": ('{"resume": true}', r"true.py, line 1: NameError"),
    "empty.py": ("", "sets no key"),
    "comment.py": ("# lr = 1e-5\n", "sets no key"),
    "helper.py": ("import math\n_x = 1\ndef f():\n    pass\n", "sets no key"),
    "syntax.py": ("lr = 1e-5\nsteps = = 3\n", "syntax.py, line 2: SyntaxError"),
    "indent.py": ("lr = 1e-5\n  steps = 3\n", "indent.py, line 2: IndentationError"),
    "name.py": ("lr = 1e-5\n\nsteps = stepps\n", "name.py, line 3: NameError"),
    "package.py": ("import no_such_package\nlr = 1e-5\n", "package.py, line 1: ModuleNotFoundError"),
    "inside.py": ("def f():\n    return 1 / 0\nlr = f()\n", "inside.py, line 2: ZeroDivisionError"),
    "exits.py": ("import sys\nsys.exit()\n", "ends Python by itself"),
    "zero.py": ("lr = 1\0", "zero.py"),
    "latin.py": (b"model = '\xe9'\n", "latin.py"),
    "text.txt": ("lr = 1e-5\n", "Python file that sets keys"),
    "yaml.yaml": ("lr: 1e-5\n", "Python file that sets keys"),
}


@pytest.mark.parametrize("name", NO_CONFIGS)
def test_a_file_that_is_no_config_is_one_sentence_with_its_line(tmp_path, name):
    """A JSON file was run as Python, set nothing, and the default run started."""
    text, words = NO_CONFIGS[name]
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert re.search(words, answer(path))
