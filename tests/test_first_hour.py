"""What a person types in the first hour, and what comes back: one sentence, before a model is loaded."""

import re
import signal
import subprocess
import sys
import time

import pytest

import checks
import config as configs
import data
import progress
import rewards as rewarding
import sample
import train
import usage
from conftest import ROOT, SHAPE, settings


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


# ------------------------------------------------------------------------------- a value that can't be meant
ARITHMETIC, SMOLLM, GSM8K = "configs/arithmetic.py", "configs/smollm2.py", "configs/gsm8k.py"
# What is typed after `python train.py`, and words of what comes back. {} is a folder with the files below.
TYPED = [
    # -- the form of a flag
    ("configs/arithmatic.py", "did you mean configs/arithmetic.py"),
    ("nowhere.py", "there are configs/arithmetic.py"),
    ("configs", "no config file configs"),
    (f"{ARITHMETIC} {GSM8K}", "one config file too many"),
    (f"{ARITHMETIC} lr=3", "one config file too many"),
    (f"{ARITHMETIC} -lr=3", "flags are written --key=value"),
    (f"{ARITHMETIC} -lr 3", "flags are written --key=value"),
    (f"{ARITHMETIC} --lr", "write --lr=VALUE"),
    (f"{ARITHMETIC} --lr=", "float is wanted"),
    (f"{ARITHMETIC} --=3", "unknown key ''"),
    (f"{ARITHMETIC} --", "unknown key ''"),
    (f"{ARITHMETIC} --lrr=3", "did you mean 'lr'"),
    (f"{ARITHMETIC} --LR=3", "unknown key 'LR'"),
    (f"{ARITHMETIC} --groupsize=4", "did you mean 'group_size'"),
    (f"{ARITHMETIC} --zzz=1", "--help lists all keys"),
    # -- types
    (f"{ARITHMETIC} --steps=many", "int is wanted"),
    (f"{ARITHMETIC} --steps=1.5", "int is wanted"),
    (f"{ARITHMETIC} --steps=1,000", "int is wanted"),
    (f"{ARITHMETIC} --steps=[1]", "int is wanted"),
    (f"{ARITHMETIC} --lr=fast", "float is wanted"),
    (f"{ARITHMETIC} --lr=True", "float is wanted"),
    (f"{ARITHMETIC} --lr=1e", "float is wanted"),
    (f"{ARITHMETIC} --resume=perhaps", "bool is wanted"),
    (f"{ARITHMETIC} --resume=2", "bool is wanted"),
    (f"{ARITHMETIC} --scratch=big", "dict is wanted"),
    (f"{ARITHMETIC} --task_options=digits", "dict is wanted"),
    (f"{ARITHMETIC} --rewards=3", "list is wanted"),
    (f"{ARITHMETIC} --temperature=None", "float or function is wanted"),
    (f"{ARITHMETIC} --reward_weights=1", "function is wanted"),
    (f"{ARITHMETIC} --steps={'(' * 3000}", "int is wanted"),
    (f"{ARITHMETIC} --steps={'9' * 5000}", "int is wanted"),
    # -- numbers
    (f"{ARITHMETIC} --threads=1000000", "too large: 1024 is the most"),
    (f"{ARITHMETIC} --threads=-1", "0 is one a core"),
    (f"{ARITHMETIC} --lora_rank=100000", "too large"),
    (f"{ARITHMETIC} --lora_rank=-1", "too small"),
    (f"{ARITHMETIC} --lora_rank=200", "above the model's width, 128"),
    (f"{ARITHMETIC} --group_size=1000000000", "too large"),
    (f"{ARITHMETIC} --group_size=0", "too small"),
    (f"{ARITHMETIC} --group_size=1", "no group to compare with"),
    (f"{ARITHMETIC} --group_size=-8", "too small"),
    (f"{ARITHMETIC} --prompts_per_step=0", "too small"),
    (f"{ARITHMETIC} --prompts_per_step=1000000000", "too large"),
    (f"{ARITHMETIC} --prompts_per_step=100000 --group_size=10000", "lower prompts_per_step"),
    (
        f"{SMOLLM} --max_new_tokens=1000000 --group_size=10000",
        "lower prompts_per_step, group_size or max_new_tokens",
    ),
    (f"{ARITHMETIC} --prompts_per_step=7 --minibatches=2", "does not divide into"),
    (f"{ARITHMETIC} --seed=123456789012345678901234567890", "too large"),
    (f"{ARITHMETIC} --seed=-1", "too small"),
    (f"{ARITHMETIC} --max_new_tokens=0", "too small"),
    (f"{ARITHMETIC} --max_new_tokens=64", "the model's context is 64"),
    (f"{ARITHMETIC} --eval_max_new_tokens=9999", "the model's context is 64"),
    (f"{ARITHMETIC} --micro_tokens=-1", "too small"),
    (f"{ARITHMETIC} --temperature=0", "about 0.7 to 1"),
    (f"{ARITHMETIC} --temperature=-1", "too small"),
    (f"{ARITHMETIC} --temperature=1e9", "too large"),
    (f"{ARITHMETIC} --top_p=0", "above 0; 1 switches it off"),
    (f"{ARITHMETIC} --top_p=1.5", "too large: 1 is the most"),
    (f"{ARITHMETIC} --top_p=-0.1", "too small"),
    (f"{ARITHMETIC} --min_p=2", "too large"),
    (f"{ARITHMETIC} --top_k=-5", "too small"),
    (f"{ARITHMETIC} --slots=0", "None takes as many as are useful"),
    (f"{ARITHMETIC} --slots=-3", "too small"),
    (f"{ARITHMETIC} --clip_low=-0.2", "too small"),
    (f"{ARITHMETIC} --clip_low=2", "too large"),
    (f"{ARITHMETIC} --clip_high=-1", "too small"),
    (f"{ARITHMETIC} --dual_clip=0.5", "3 is usual"),
    (f"{ARITHMETIC} --cispo_max=0", "above 0"),
    (f"{ARITHMETIC} --mismatch_clip=0", "2 is usual"),
    (f"{ARITHMETIC} --top_entropy=0", "above 0"),
    (f"{ARITHMETIC} --top_entropy=20", "too large"),
    (f"{ARITHMETIC} --lora_dropout=1", "below 1"),
    (f"{ARITHMETIC} --lora_dropout=-0.1", "too small"),
    (f"{ARITHMETIC} --lora_alpha=0", "above 0"),
    (f"{ARITHMETIC} --adam_beta1=1", "below 1"),
    (f"{ARITHMETIC} --adam_beta2=1.5", "too large"),
    (f"{ARITHMETIC} --adam_beta1=-0.1", "too small"),
    (f"{ARITHMETIC} --weight_decay=-1", "too small"),
    (f"{ARITHMETIC} --lr=-1e-5", "too small"),
    (f"{ARITHMETIC} --lr -1", "too small"),
    (f"{ARITHMETIC} --lr=5", "1e-5 for LoRA are usual"),
    (f"{ARITHMETIC} --lr=1e999", "too large"),
    (f"{ARITHMETIC} --sft_lr=-1", "too small"),
    (f"{ARITHMETIC} --max_grad_norm=0", "above 0"),
    (f"{ARITHMETIC} --max_grad_norm=-1", "too small"),
    (f"{ARITHMETIC} --reward_timeout=0", "above 0"),
    (f"{ARITHMETIC} --reward_timeout=-5", "too small"),
    (f"{ARITHMETIC} --beta=-0.1", "too small"),
    (f"{ARITHMETIC} --ref_mix=2", "too large"),
    (f"{ARITHMETIC} --ref_sync_every=5", "needs beta > 0"),
    (f"{ARITHMETIC} --steps=-1", "too small"),
    (f"{ARITHMETIC} --epochs=0", "too small"),
    (f"{ARITHMETIC} --eval_problems=0", "too small"),
    (f"{ARITHMETIC} --eval_samples=0", "too small"),
    (f"{ARITHMETIC} --eval_temperature=-1", "too small"),
    (f"{ARITHMETIC} --keep=-1", "too small"),
    # -- names
    (f"{ARITHMETIC} --device=foo", "'cuda:1'"),
    (f"{ARITHMETIC} --device=gpu", "is not one of 'auto'"),
    (f"{ARITHMETIC} --device=cuda:x", "is not one of 'auto'"),
    (f"{ARITHMETIC} --dtype=fp16", "'bfloat16'"),
    (f"{ARITHMETIC} --dtype=bf16", "did you mean 'bfloat16'"),
    (f"{ARITHMETIC} --objective=ppo", "'clip'"),
    (f"{ARITHMETIC} --aggregate=tokens", "did you mean 'token'"),
    (f"{ARITHMETIC} --advantage=grpo", "'group'"),
    (f"{ARITHMETIC} --kl=k4", "'k3'"),
    (f"{ARITHMETIC} --preset=ppo", "'dapo'"),
    (f"{ARITHMETIC} --schedule=cos", "'cosine'"),
    (f"{ARITHMETIC} --checkpointing=all", "'layers'"),
    (f"{ARITHMETIC} --sandbox=none", "'strict'"),
    (f"{ARITHMETIC} --kernels=cuda", "'triton'"),
    (f"{ARITHMETIC} --wandb=True", "'online'"),
    (f"{ARITHMETIC} --task=arithmatic", "did you mean 'arithmetic'"),
    (f"{ARITHMETIC} --task=", "unknown task ''"),
    (f"{ARITHMETIC} --rewards=arithmatic", "did you mean 'arithmetic'"),
    (f"{ARITHMETIC} --rewards=[('arithmetic',0)]", "no reward has a weight other than 0"),
    (f"{ARITHMETIC} --rewards=[]", "no reward has a weight other than 0"),
    (f"{ARITHMETIC} --rewards=[('arithmetic',1,2)]", "pairs such as"),
    (f"{ARITHMETIC} --rewards=[('arithmetic','much')]", "pairs such as"),
    (f"{ARITHMETIC} --rewards=[3]", "pairs such as"),
    (f"{ARITHMETIC} --rewards=[('words',1e999)]", "finite weight"),
    (f"{SMOLLM} --lora_targets=[]", "lora_targets is empty"),
    (f"{SMOLLM} --lora_targets=query", "lora_targets has 'query'"),
    (f"{SMOLLM} --lora_targets=all-linear", "tuple is wanted"),
    (f"{ARITHMETIC} --task_options={{'digit':3}}", "takes no 'digit'"),
    (f"{ARITHMETIC} --task_options={{'digits':'three'}}", "digits"),
    (f"{ARITHMETIC} --task_options={{'digits':-1}}", "arithmetic needs style"),
    (f"{ARITHMETIC} --combine=normalize_then_sum --advantage=rloo", "leave that at 'group'"),
    (f"{SMOLLM} --lora_merge=on --lora_dropout=0.1", "cannot have lora_dropout"),
    # -- models and folders
    (f"{ARITHMETIC} --alphabet=", "scratch needs an alphabet"),
    (f"{ARITHMETIC} --scratch={{'hidden_size':8}}", "lacks"),
    (f"{ARITHMETIC} --scratch={{'hidden_size':10000000}}", "lacks"),
    (f"{GSM8K} --model=", "model is empty"),
    (f"{SMOLLM} --adapter=nowhere", "no folder of a PEFT adapter"),
    (f"{ARITHMETIC} --out_dir={{}}/file", "is a file"),
    (f"{ARITHMETIC} --out_dir={{}}/file/run", "is a file"),
    # -- data
    ("{}/own.py --train_file={}/nowhere.jsonl", "there is no file"),
    ("{}/own.py --train_file={}/not_json.jsonl", "line 2: not JSON"),
    ("{}/own.py --train_file={}/no_prompt.jsonl", "line 2: needs a `prompt`"),
    ("{}/own.py --train_file={}/empty_prompt.jsonl", "line 2: needs a `prompt`"),
    ("{}/own.py --train_file={}/blank_prompt.jsonl", "line 2: needs a `prompt`"),
    ("{}/own.py --train_file={}/role.jsonl", "line 2: the role 'bot'"),
    ("{}/own.py --train_file={}/system_last.jsonl", "line 2: the messages end with 'system'"),
    ("{}/own.py --train_file={}/nan.jsonl", "line 2: `answer` is nan"),
    ("{}/own.py --train_file={}/one.jsonl", "1 rows, and 2 are needed"),
    ("{}/own.py --train_file={}/empty.jsonl", "0 rows"),
    ("{}/own.py --train_file={}/list.jsonl", "line 1: needs a `prompt`"),
    ("{}/own.py --train_file={}/no_answer.jsonl", "wants 'answer'"),
    ("{}/own.py --train_file={}", "there is no file"),
    ("{}/own.py --train_file=", "needs train_file"),
    ("{}/column.py", "wants 'solutions'"),
    ("{}/weights.py", "2 numbers are wanted"),
    ("{}/weights_raise.py", "reward_weights raised ZeroDivisionError"),
    ("{}/hot.py", "a number above 0 is wanted"),
]
GOOD = '{"prompt": "1+1", "answer": "2"}\n'
FILES = {
    "file": "x",
    "own.py": "task = 'jsonl'\nrewards = [('gsm8k', 1.0)]\nscratch, alphabet = %r, '0123456789+'\n"
    "max_new_tokens = 8\n",
    "not_json.jsonl": GOOD + "{'prompt': 'x'}\n",
    "no_prompt.jsonl": GOOD + '{"question": "x"}\n',
    "empty_prompt.jsonl": GOOD + '{"prompt": ""}\n',
    "blank_prompt.jsonl": GOOD + '{"prompt": "  "}\n',
    "role.jsonl": GOOD + '{"prompt": [{"role": "bot", "content": "x"}]}\n',
    "system_last.jsonl": GOOD + '{"prompt": [{"role": "system", "content": "x"}]}\n',
    "nan.jsonl": GOOD + '{"prompt": "1+1", "answer": NaN}\n',
    "one.jsonl": GOOD,
    "empty.jsonl": "",
    "list.jsonl": "[1]\n",
    "no_answer.jsonl": '{"prompt": "1+1"}\n' * 3,
    "column.py": "def f(completions, solutions):\n    return []\ntask = 'arithmetic'\nrewards = [(f, 1.0)]\n",
    "weights.py": "rewards = ['gsm8k', 'format']\ndef reward_weights(step):\n    return [1.0]\n",
    "weights_raise.py": "def reward_weights(step):\n    return 1 / 0\n",
    "hot.py": "def temperature(step):\n    return 1 - step\n",
}


def folder_of_files(path):
    for name, text in FILES.items():
        (path / name).write_text(text % SHAPE if "%r" in text else text)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return folder_of_files(tmp_path_factory.mktemp("typed"))


@pytest.mark.parametrize("typed, words", TYPED, ids=[typed[:60] for typed, _ in TYPED])
def test_what_can_not_be_meant_is_one_sentence_before_a_model_is_loaded(files, typed, words):
    began = time.perf_counter()
    sentence = answer(*typed.replace("{}", str(files)).replace("{{", "{").replace("}}", "}").split(" "))
    assert words in sentence
    assert time.perf_counter() - began < 2


def test_there_are_a_hundred_of_them():
    assert len(TYPED) + len(NO_CONFIGS) + len(usage.ELSEWHERE) > 200


# ------------------------------------------------------------------------------------------------ sample.py
@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of one step, with a checkpoint of random weights."""
    cfg = settings(tmp_path_factory.mktemp("talk"), steps=1, save_every=1, rollouts_every=0)
    assert train.main(cfg) == 0
    return cfg.out_dir


def test_an_answer_is_streamed_and_is_what_the_sampler_draws(run_folder, capsys):
    """--model=out/NAME, a run's folder, failed: its config.json is not a model's."""
    words = [f"--model={run_folder}", "--threads=1", "--max_new_tokens=9", "--seed", "3"]
    sample.main([*words, "12+34="])
    streamed = capsys.readouterr().out
    sample.main([*words, "--samples=2", "12+34="])
    several = capsys.readouterr().out
    text, _, rest = streamed.partition("\n--- ")
    assert re.match(r"\d tokens", rest)
    assert f"--- 1: {rest.strip()}\n{text}\n--- 2: " in several


def test_without_a_prompt_sample_is_a_chat_until_ctrl_d(run_folder, capsys, monkeypatch):
    lines = iter(["12+34=", "", "what?", "5+6="])

    def typed(prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    sample.main([f"--model={run_folder}", "--threads=1", "--max_new_tokens=5"])
    out = capsys.readouterr().out
    assert "Ctrl-D" in out and len(re.findall(r"^--- \d tokens", out, re.M)) == 2
    assert "alphabet lacks the characters" in out  # `what?`, which ends neither the chat nor Python


def test_ctrl_c_ends_an_answer_and_keeps_what_is_there(run_folder, capsys):
    flags, _ = sample.parse([f"--model={run_folder}", "--threads=1", "--max_new_tokens=40", "--seed=1"])
    talker = sample.Talker(flags)
    decode, calls = talker.text, []

    def interrupted(ids):
        calls.append(ids)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(ids)

    talker.text = interrupted
    talker.stop_ids = [47]  # none that it knows, so that it would go on
    assert len(talker.stream("12+34=")) >= 3
    assert "4 tokens, stopped by Ctrl-C" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_is_no_model(tmp_path):
    (tmp_path / "ckpt").mkdir()
    with pytest.raises(ValueError, match="a run without a whole checkpoint"):
        sample.main([f"--model={tmp_path}", "hi"])


# --------------------------------------------------------------------------------------------------- Ctrl-C
@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("script", ["train.py", "eval.py", "sft.py", "sample.py"])
def test_ctrl_c_before_a_run_begins_is_one_sentence(tmp_path, script, seconds):
    """It was a traceback of 24 to 74 lines while packages were imported, or a model was warmed up."""
    words = [script, "configs/arithmetic.py", f"--out_dir={tmp_path / 'run'}", "--threads=1"]
    if script == "sample.py":
        words = [script, f"--model={tmp_path}", "hello"]
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert "Traceback" not in out
    # On a fast machine sample.py may have found by then that the folder is no model, and be on its way out,
    # when Python has given the signal back to the system.
    assert process.returncode in ((130, 1, -signal.SIGINT) if script == "sample.py" else (130, 1))
    last = out.strip().splitlines()[-1]
    assert last.startswith(f"{script}: stopped") or script == "sample.py"


def test_a_missing_package_is_one_sentence(monkeypatch):
    """A machine without transformers ended in a traceback, after torch had been imported."""
    monkeypatch.setattr(progress, "NEEDED", ("json", "no_such_package"))
    with pytest.raises(SystemExit, match="no_such_package cannot be imported: pip install -r"):
        progress.begin("train.py")


def test_wandb_online_without_a_key_is_said_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: True)
    assert "type wandb login first" in answer(ARITHMETIC, "--wandb=online")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "x" * 40 + "\n")
    assert answer(ARITHMETIC, "--wandb=online") == ""
    (tmp_path / "netrc").unlink()
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert "pip install wandb" in answer(ARITHMETIC, "--wandb", "offline")


# ------------------------------------------------------------------------------ a first batch without signal
def test_a_first_batch_whose_form_the_reward_does_not_find_says_so(tmp_path):
    """Answers stood in \\boxed{}, the reward looked for ####, and max_new_tokens was named as the cure."""
    cfg = settings(tmp_path, rewards=[("gsm8k", 1.0)], steps=1, max_new_tokens=50)
    with pytest.raises(ValueError, match="no answer was found in 100% of the completions.*looks for ####"):
        train.main(cfg)


def test_an_answer_of_the_models_own_form_is_found_by_the_reward_of_the_gsm8k_config():
    cfg = configs.load([GSM8K])
    (label, graded, weight), *_ = rewarding.resolve(cfg.rewards)
    assert weight == 1 and "boxed" in cfg.system_prompt and cfg.max_new_tokens >= 512
    assert graded(["So it is \\boxed{72}.", "\\boxed{71}"], answer=["72", "72"]) == [1.0, 0.0]
