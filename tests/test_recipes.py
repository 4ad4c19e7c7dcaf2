"""docs/recipes.md does what it says: its files, commands and tables are read from the page.

Each recipe runs small: its own file, with a model of random weights and two or three steps laid over it.
Run: python -m pytest -m "slow or not slow" tests/test_recipes.py
"""

import ast
import dataclasses
import inspect
import http.server
import json
import re
import shlex
import string
import sys

import pytest

import config as configs
import data
import eval as eval_script
import rewards as rewarding
import train
from conftest import ROOT, SHAPE, rows, serving
from evaluation import lint
from policy import load_policy
from usage import ELSEWHERE

PAGE = (ROOT / "docs/recipes.md").read_text()
# A block ends at a fence that begins its line: one config has fences inside its text.
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.S | re.M)
FILES, COMMANDS, SHOWN = {}, [], []
for _kind, _text in BLOCKS:
    _name = re.match(r"# (?:configs/)?(\w+)\.py\n", _text)
    if _kind == "python":
        FILES[_name[1]] = _text
    elif _kind == "sh":
        COMMANDS += _text.splitlines()
    else:
        SHOWN.append(_text)
PREPARES = FILES.pop("make_reviews")
TRAINING = [command for command in COMMANDS if command.startswith("python train.py")]

# What makes any of the files a run of a second: appended to it, so these keys win.
ALPHABET = string.digits + string.ascii_letters + string.punctuation + " \n"
SMALL = f"""
model, scratch, alphabet = "", {SHAPE | dict(max_position_embeddings=512)!r}, {ALPHABET!r}
lora_rank, prompts_per_step, group_size, max_new_tokens, sft_steps = 0, 4, 4, 12, 0
steps, lr, warmup_steps, eval_every, save_every, rollouts_every, show_every = 3, 1e-2, 1, 0, 3, 1, 0
device, threads, force, eval_problems = "cpu", 1, True, 6
"""
ADDITION = 'task, task_options = "arithmetic", dict(style="chars", digits=2)\n'


def written(folder, name, more=""):
    """A file of the page in a folder, with lines after it."""
    path = folder / f"{name}.py"
    path.write_text(FILES[name] + more)
    return path


def trained(folder, name, more="", *flags):
    """Trains small with a file of the page. Returns its metrics and the rollouts of every step."""
    path = written(folder, name, SMALL + more)
    out = folder / "out"
    assert train.main(configs.load([str(path), f"--out_dir={out}", *flags])) == 0
    told = rows(out / "metrics.jsonl")
    drawn = [rows(path) for path in sorted((out / "rollouts").glob("step_*.jsonl"))]
    told = [m for m in told if "reward" in m]
    assert len(told) == len(drawn) == 3
    return told, drawn


def questions(folder, n=12, messages=False):
    """Writes rows with a prompt, text or messages, and an answer. Returns the line of a config for them."""
    path = folder / "rows.jsonl"
    lines = []
    for i in range(n):
        prompt = [dict(role="user", content=f"{i}+1=")] if messages else f"{i}+1="
        lines.append(json.dumps(dict(prompt=prompt, answer=str(i + 1))))
    path.write_text("\n".join(lines))
    return f'task, train_file = "jsonl", {str(path)!r}\n'


def mean(values):
    return sum(values) / len(values)


# ------------------------------------------------------------------------------------- the page as a whole
def test_the_page_has_its_recipes_and_each_has_a_command():
    parts = re.split(r"^## \d\. ", PAGE, flags=re.M)[1:]
    assert len(parts) == 8
    for part in parts:
        title = part.partition("\n")[0]
        assert "```sh\npython " in part or "\npython train.py" in part, title
        link = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        assert f"-{link})" in PAGE, title
    for command in COMMANDS:
        assert command.startswith(
            ("python train.py", "python eval.py", "python make_reviews.py", "vllm serve")
        )


def test_every_command_of_the_page_loads(tmp_path):
    """A config of the page by its file, one of the repository by its name, with the flags beside it."""
    used = set()
    for command in COMMANDS:
        script, *words = shlex.split(command)[1:]
        if script not in ("train.py", "eval.py"):
            continue
        name = re.fullmatch(r"configs/(\w+)\.py", words[0]).group(1)
        if name in FILES:
            words[0] = str(written(tmp_path, name))
        configs.load(words)
        used.add(name)
    assert FILES.keys() <= used


@pytest.mark.parametrize("name, ours", [("my_gsm8k", "gsm8k"), ("my_code", "code"), ("my_judge", "judge")])
def test_a_file_that_is_said_to_be_one_of_configs_is(tmp_path, name, ours):
    here = dataclasses.asdict(configs.load([str(written(tmp_path, name))]))
    there = dataclasses.asdict(configs.load([f"configs/{ours}.py"]))
    del here["out_dir"], there["out_dir"]
    assert str(here) == str(there)


def measured_rows():
    """(file, step, {metric: what the page says}) of every row of a table that names a file of metrics."""
    header = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        named = re.match(r"\[[^]]+\]\(\.\./(bench/results/\S+_metrics\.jsonl)\), (\d+)$", cells[0])
        if named:
            said = {key.strip("`"): cell for key, cell in zip(header[1:], cells[1:], strict=True)}
            yield named[1], int(named[2]), said
        elif line.startswith("| "):
            header = cells


def test_the_tables_are_what_the_runs_measured():
    checked = 0
    for file, step, said in measured_rows():
        found = {}
        for row in rows(ROOT / file):
            if row["step"] == step:
                found |= row
        for key, cell in said.items():
            if cell == "-":
                assert key not in found, f"{file} has a {key} at step {step}"
            else:
                digits = len(cell.partition(".")[2])
                assert round(found[key], digits) == float(cell), f"{file}, step {step}: {key}"
                checked += 1
    assert checked > 60


# ------------------------------------------------------------------------------------------- 1. your own rows
def with_reviews(folder, monkeypatch):
    """In a folder where reviews.jsonl was made by the page's script."""
    monkeypatch.chdir(folder)
    exec(compile(PREPARES, "make_reviews.py", "exec"), {})


@pytest.mark.slow
def test_your_own_jsonl(tmp_path, monkeypatch):
    with_reviews(tmp_path, monkeypatch)
    told, drawn = trained(tmp_path, "reviews", "eval_every, eval_problems = 3, 12\n")
    assert told[-1]["eval/problems"] == 12
    lines = rows(tmp_path / "reviews.jsonl")
    assert len(lines) == 128 and {row["answer"] for row in lines[-12:]} == {"positive", "negative"}
    for m, batch in zip(told, drawn):
        assert {"rewards/right_word/mean", "rewards/one_word/mean"} <= m.keys()
        assert m["reward"] == pytest.approx(m["rewards/right_word/mean"] + 0.5 * m["rewards/one_word/mean"])
        assert {r["prompt"] for r in batch} <= {row["prompt"] for row in lines[:-12]}


def test_the_rewards_of_ones_own_rows_pay_for_part_of_the_way(tmp_path):
    right_word, one_word = [f for f, _ in configs.load([str(written(tmp_path, "reviews"))]).rewards]
    texts = ["The review was positive.", "Positive.", "positive or negative", "negative", ""]
    assert right_word(texts, answer=["positive"] * 5) == [1, 1, 0, 0, 0]
    assert one_word(texts, answer=["positive"] * 5) == [0, 1, 0, 0, 0]


@pytest.mark.slow
def test_one_reward_alone_is_refused_as_the_page_says(tmp_path, monkeypatch):
    with_reviews(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="rewards of each of 4 groups are equal"):
        trained(tmp_path, "reviews", "rewards, force = [(one_word, 0.5)], False\nmax_new_tokens = 60\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reviews", "steps_hacked", "tags"])
def test_the_look_before_a_run(tmp_path, monkeypatch, capsys, name):
    with_reviews(tmp_path, monkeypatch)
    more = SMALL + {"steps_hacked": ADDITION, "tags": questions(tmp_path)}.get(name, "")
    eval_script.main(configs.load([str(written(tmp_path, name, more))]))
    out = capsys.readouterr().out
    assert "a first training batch" in out and "what the rewards pay" in out and "accuracy" in out


# ------------------------------------------------------------------------------- 2. a form that is not hacked
def said_by_lint(cfg, task_rows):
    """The lint of a config's rewards over rows, with the tokenizer of a model that starts from nothing."""
    _, tokenizer, _, _ = load_policy("", scratch=SHAPE, alphabet=ALPHABET, seed=0)
    return lint(tokenizer, task_rows, rewarding.resolve(cfg.rewards), **configs.reward_options(cfg))


def arithmetic_rows(cfg):
    return data.load_task(cfg.task, **configs.task_options(cfg)).batch(0, cfg.prompts_per_step, cfg.seed)


def test_the_lint_says_of_the_hackable_reward_what_the_page_shows(tmp_path):
    cfg = configs.load([str(written(tmp_path, "steps_hacked"))])
    said = said_by_lint(cfg, arithmetic_rows(cfg))
    assert SHOWN[1].splitlines() == [line for line in said.splitlines() if not line.startswith("note")]
    assert "warning: all together pays 1.500 for ten answers at once" in said


def test_the_lint_finds_nothing_in_the_mended_rewards(tmp_path):
    cfg = configs.load([str(written(tmp_path, "steps_mended"))])
    assert "warning" not in said_by_lint(cfg, arithmetic_rows(cfg))
    tags = configs.load([str(written(tmp_path, "tags"))])
    problems = [dict(prompt=f"What is {i} + 1?", answer=str(i + 1)) for i in range(10, 14)]
    said = said_by_lint(tags, problems)
    assert "format" in said and "tag_count" in said and "warning" not in said


def test_the_mended_reward_pays_for_the_whole_form_beside_a_right_answer_only(tmp_path):
    work_shown = configs.load([str(written(tmp_path, "steps_mended"))]).rewards[1][0]
    right = "<39_=^2,28^=^1,19^=^1>1112"
    others = [",,,,,", "<,,,>1112", right[:-1] + "3", right + ",", right * 2, "1112", "", "<>1112"]
    assert work_shown([right, *others], answer=["1112"] * 9) == [1] + [0] * 8


@pytest.mark.slow
def test_the_hackable_and_the_mended_reward_run(tmp_path):
    told, drawn = trained(tmp_path, "steps_hacked", ADDITION)
    for m, batch in zip(told, drawn):
        paid = mean([r["completion"].count(",") / 3 for r in batch])
        assert m["rewards/steps_shown/mean"] == pytest.approx(paid, abs=1e-6) and paid > 0
    told, _ = trained(tmp_path, "steps_mended", ADDITION + "out_dir = 'again'\n", "--force=True")
    assert all("rewards/work_shown/mean" in m for m in told)


# -------------------------------------------------------------------------------------------- 3. arithmetic
ONE_FLAG = [command for command in TRAINING if "configs/arithmetic.py" in command]


def test_each_experiment_changes_one_key():
    default, *others = [dataclasses.asdict(configs.load(shlex.split(c)[2:])) for c in ONE_FLAG]
    changed = []
    for other in others:
        # The config's own function is made anew by each reading of its file.
        keys = {key for key in default if key != "rewards" and default[key] != other[key]}
        changed.append(keys - {"out_dir"})
    assert changed == [{"group_size"}, {"lr"}, {"task_options"}]


@pytest.mark.slow
@pytest.mark.parametrize("command", ONE_FLAG)
def test_arithmetic_runs(tmp_path, command):
    small = ["--steps=2", "--sft_steps=2", "--eval_problems=4", "--threads=1", "--device=cpu", "--force=True"]
    flags = [*shlex.split(command)[2:], *small, f"--out_dir={tmp_path}"]
    assert train.main(configs.load(flags)) == 0
    told = rows(tmp_path / "metrics.jsonl")[-1]
    listed = PAGE.split("| column | in metrics.jsonl |")[1].partition("\n\n")[0]
    columns = re.findall(r"^\| .*? \| `([a-z_/]+)` \|", listed, re.M)
    assert len(columns) == 8 and set(columns) <= told.keys()


# ------------------------------------------------------------------------------------------------- 4. GSM8K
@pytest.mark.slow
def test_gsm8k_trains_on_one_reward_and_shows_the_other(tmp_path):
    """Its file with rows of the same columns, which need no download."""
    told, _ = trained(tmp_path, "my_gsm8k", questions(tmp_path) + "eval_every = 3\n")
    for m in told:
        assert m["reward"] == pytest.approx(m["rewards/gsm8k_lenient/mean"])
        assert "rewards/gsm8k/mean" in m
    assert told[-1]["eval/strict_low"] <= told[-1]["eval/strict"] <= told[-1]["eval/strict_high"]


# -------------------------------------------------------------------------------------------------- 5. code
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_code_runs_programs_in_the_sandbox(tmp_path):
    """Every answer begins with a whole program, right in two of three tests, and the reward says so."""
    program = "```python\ndef double(n):\n    return 2 * n if n < 9 else 0\n```\n"
    tests = ["assert double(1) == 2", "assert double(3) == 6", "assert double(10) == 20"]
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps(dict(prompt=f"Double n, {i}.", tests=tests)) + "\n" for i in range(8)))
    more = f"train_file, prefill, sandbox = {str(path)!r}, {program!r}, 'auto'\nsystem_prompt = 'Go.'\n"
    told, drawn = trained(tmp_path, "my_code", more, "--prompts_per_step=2", "--group_size=2")
    assert all(r["completion"].startswith(program) for batch in drawn for r in batch)
    unspoilt = [r["reward"] for batch in drawn for r in batch if "```" not in r["completion"][len(program) :]]
    assert unspoilt and unspoilt == pytest.approx([2 / 3] * len(unspoilt))


# ------------------------------------------------------------------------------------------------- 6. a judge
def grade(text: str) -> int:
    """What the judge of the test gives an answer."""
    return min(10, sum(c in "02468aeiou" for c in text))


class Judge(http.server.BaseHTTPRequestHandler):
    """An endpoint of OpenAI's form that counts in the text between the marks, and ends with its score."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = body["messages"][0]["content"]
        mark = next(line for line in words.split("\n") if line.startswith("==="))
        text = words.split(mark + "\n")[1].removesuffix("\n")
        content = f"I counted.\nScore: {grade(text)}"
        reply = json.dumps(dict(choices=[dict(message=dict(content=content))])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge_at(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Judge) as address:
        yield f"{address}/v1"


@pytest.mark.slow
def test_a_judge_grades_every_answer(tmp_path, monkeypatch, judge_at):
    assert FILES["my_judge"].count("http://localhost:8000/v1") == 1
    here = FILES["my_judge"].replace("http://localhost:8000/v1", judge_at)
    monkeypatch.setitem(FILES, "my_judge", here)
    told, drawn = trained(tmp_path, "my_judge", questions(tmp_path))
    # The judge sees a space more where a completion holds a chat template's token: next to never here.
    for m, batch in zip(told, drawn):
        wanted = [grade(r["completion"]) / 10 for r in batch]
        assert m["rewards/judge/mean"] == pytest.approx(mean(wanted), abs=0.02)
        assert "kl" in m and m["reward_failures"] == 0
        assert len(set(wanted)) > 1


# ----------------------------------------------------------------------------------------- 7. coming from TRL
def table(recipe: int) -> list[list[str]]:
    """The cells of a recipe's table of names: theirs, ours, a note."""
    part = PAGE.split(f"## {recipe}. ")[-1].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


@pytest.mark.parametrize("recipe, least", [(7, 25), (8, 9)])
def test_the_tables_of_names_say_what_a_person_is_told_who_types_them(recipe, least):
    theirs_told = 0
    for theirs, ours, _ in table(recipe):
        for name in names(theirs):
            theirs_told += 1
            for key in names(ours):
                assert key in configs.FIELDS and re.search(rf"\b{key}\b", ELSEWHERE[name]), (name, key)
            if ours == "nothing":
                assert ELSEWHERE[name].startswith("nothing"), name
            with pytest.raises(ValueError, match="another trainer's name"):
                configs.load([f"--{name}=1"])
    assert theirs_told >= least


def same_names() -> list[str]:
    sentence = re.search(r"\n(`beta`, [^.]*) are called the same", PAGE).group(1)
    return names(sentence)


def test_names_that_are_called_the_same_are_keys():
    assert len(same_names()) == 11 and set(same_names()) <= configs.FIELDS.keys()


@pytest.mark.slow
def test_trls_names_and_defaults_are_trls(tmp_path):
    trl = pytest.importorskip("trl")
    theirs = {field.name: field.default for field in dataclasses.fields(trl.GRPOConfig)}
    listed = [name for cell, _, _ in table(7) for name in names(cell)]
    known = theirs.keys() | inspect.signature(trl.GRPOTrainer).parameters.keys()
    assert set(listed) | set(same_names()) <= known
    cfg = configs.load([str(written(tmp_path, "from_trl"))])
    ours = dict(
        learning_rate=cfg.lr,
        lr_scheduler_type=cfg.schedule,
        loss_type=cfg.preset,
        scale_rewards=cfg.advantage,
        num_generations=cfg.group_size,
        per_device_train_batch_size=cfg.prompts_per_step * cfg.group_size,
        max_completion_length=cfg.max_new_tokens,
        num_iterations=cfg.epochs,
        epsilon=cfg.clip_low,
        delta=cfg.dual_clip,
        mask_truncated_completions=cfg.mask_truncated,
        top_entropy_quantile=cfg.top_entropy,
    )
    same = {name: getattr(cfg, name) for name in same_names() if name not in ("seed", "min_p")}
    for name, value in (ours | same).items():
        assert theirs[name] == value, name
    assert theirs["epsilon_high"] is None and cfg.clip_high == cfg.clip_low


def test_a_reward_of_trls_moves_over_unchanged(tmp_path):
    """The page's function, called by hand as TRL calls it, gives what the run recorded."""
    told, drawn = trained(tmp_path, "from_trl", questions(tmp_path, messages=True))
    theirs = configs.load([str(written(tmp_path, "from_trl"))]).rewards[0][0]
    for m, batch in zip(told, drawn):
        completions = [[dict(role="assistant", content=r["completion"])] for r in batch]
        logged = {}
        scores = theirs(completions, log_metric=logged.__setitem__, prompts=[r["prompt"] for r in batch])
        assert [r["reward"] for r in batch] == pytest.approx(scores)
        assert m["letters"] == pytest.approx(logged["letters"])


# ----------------------------------------------------------------------------------------- 8. coming from PPO
@pytest.mark.slow
def test_four_updates_from_a_batch_are_clipped_and_one_is_not(tmp_path):
    more = (
        questions(tmp_path, 40) + "rewards = [(lambda completions, **_: [len(c) for c in completions], 1)]\n"
    )
    several, _ = trained(tmp_path, "like_ppo", more)
    assert all("kl" in m for m in several) and several[-1]["kl"] > 0
    assert max(m["clip_ratio/region_mean"] for m in several) > 0
    command = next(c for c in TRAINING if "like_ppo" in c and "reinforce" in c)
    one, _ = trained(tmp_path, "like_ppo", more + "out_dir = 'one'\n", *shlex.split(command)[3:])
    assert all("kl" not in m and not m.get("clip_ratio/region_mean") for m in one)


def test_no_recipe_is_left_out():
    """Every file of the page is trained with, or looked at, by a test above."""
    source = ast.parse((ROOT / "tests/test_recipes.py").read_text())
    said = {node.value for node in ast.walk(source) if isinstance(node, ast.Constant)}
    assert FILES.keys() <= said
