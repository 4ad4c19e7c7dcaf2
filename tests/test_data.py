"""Rows and prompts: the same rows for the same (seed, step), no half file taken for whole, no second BOS."""

import functools
import http.server
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
from conftest import serving
from data import char_tokenizer, load_task, prompt_ids

ROOT = Path(__file__).resolve().parent.parent
ALPHABET = "0123456789+=<>,_^"


# --------------------------------------------------------------------------------------- rows of a step
def finite(n, **keys):
    return data.Task("mine", [dict(prompt=str(i)) for i in range(n)], [], **keys)


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 6))
def test_every_epoch_has_every_row_once(size, n, seed, epoch):
    task = finite(size)
    stream = [
        row["prompt"] for step in range((epoch + 1) * size // n + 1) for row in task.batch(step, n, seed)
    ]
    assert sorted(stream[epoch * size : (epoch + 1) * size]) == sorted(map(str, range(size)))


def test_rows_do_not_depend_on_batch_size_or_on_what_was_asked_before():
    for task in (finite(7), load_task("arithmetic", eval_problems=1)):
        stream = task.batch(0, 24, 3)
        got = [row for step in (2, 0, 1) for row in task.batch(step, 8, 3)]
        assert got == stream[16:24] + stream[:8] + stream[8:16]
        assert task.batch(0, 24, 4) != stream
    assert finite(50).batch(0, 50, 0) != finite(50).batch(1, 50, 0)  # epochs differ in order
    assert finite(9, seed=5).batch(1, 4) == finite(9).batch(1, 4, 5)


def test_rows_are_the_same_in_another_process_and_for_ever():
    """hash() differs between processes, a library's shuffle between versions: these are written down."""
    assert [r["prompt"] for r in finite(10).batch(0, 10, 0)] == list("0291854367")
    got = [r["prompt"] for r in load_task("arithmetic").batch(0, 3, 0)]
    assert got == ["319+866=", "913+591=", "589+367="]
    code = "import data; print([r['prompt'] for r in data.load_task('arithmetic', seed=7).batch(5, 4)])"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ, PYTHONHASHSEED="1"),
    )
    assert out.stdout.strip() == str([r["prompt"] for r in load_task("arithmetic").batch(5, 4, 7)])


def test_epoch_is_the_share_of_the_data_seen():
    assert finite(8).epoch(3, 4) == 1.5 and load_task("arithmetic").epoch(100, 8) == 0.0


def test_columns_repeat_each_row_for_its_group_and_give_none_where_a_row_has_none():
    rows = [dict(prompt="a", answer="1"), dict(prompt="b", tests=[2])]
    assert data.columns(rows, 2) == dict(answer=["1", "1", None, None], tests=[None, None, [2], [2]])


# -------------------------------------------------------------------------------- a task of one's own
def colours(*, data_dir, eval_problems, names=("red", "green", "blue")):
    rows = [dict(prompt=f"Name {name}.", answer=name, folder=data_dir) for name in names]
    return rows[1:], rows[:1][:eval_problems]


def endless(*, data_dir, eval_problems, **options):
    def row(seed, index):
        return dict(prompt=f"{seed} {index}", **options)

    return row, [row("held out", i) for i in range(eval_problems)]


def test_a_function_of_a_config_file_is_a_task():
    task = load_task(colours, data_dir="here", seed=3)
    assert task.name == "colours" and task.seed == 3
    assert task.eval == [dict(prompt="Name red.", answer="red", folder="here")]
    assert sorted(row["answer"] for row in task.batch(0, 2)) == ["blue", "green"]
    assert load_task(colours, names=("a", "b")).train == [dict(prompt="Name b.", answer="b", folder="data")]
    partial = load_task(functools.partial(colours, names=("a", "b")))
    assert partial.name == "colours" and len(partial.train) == 1
    task = load_task(endless, eval_problems=2, tone="kind", train_file="rows.jsonl")
    got = task.batch(1, 2, 5)
    assert got == [
        dict(prompt="5 2", tone="kind", train_file="rows.jsonl"),
        dict(prompt="5 3", tone="kind", train_file="rows.jsonl"),
    ]
    assert [row["prompt"] for row in task.eval] == ["held out 0", "held out 1"]


def returning(value):
    def mine(*, data_dir, eval_problems):
        return value

    return mine


ROWS = [dict(prompt="p")]


@pytest.mark.parametrize(
    "task, words",
    [
        (returning(None), "'mine' must return .train, eval_rows., and returned None"),
        (returning(ROWS), "'mine' must return"),
        (returning((3, ROWS)), "'mine' must return lists of rows, or for train a function"),
        (returning((ROWS, iter(ROWS))), "'mine' must return lists of rows"),
        (returning(([], ROWS)), "'mine' returned no rows to train on"),
        (returning(([dict(question="q")], ROWS)), "'mine' made a row without a `prompt`.*question"),
        (returning((ROWS, ["p"])), "'mine' made a row without a `prompt`"),
        (returning((lambda seed, index: None, ROWS)), "'mine' made a row without a `prompt`.*None"),
        (lambda *, eval_problems: (ROWS, ROWS), "a task is a function .*'lambda' takes no 'data_dir'"),
    ],
)
def test_a_task_of_ones_own_that_is_none_is_one_sentence(task, words):
    with pytest.raises(ValueError, match=words) as e:
        load_task(task)
    assert "\n" not in str(e.value)


def test_an_option_that_a_task_of_ones_own_does_not_take_is_named():
    with pytest.raises(ValueError, match="the task 'colours' takes no 'name', did you mean 'names'"):
        load_task(colours, name=["red"])
    with pytest.raises(ValueError, match="the task 'colours' takes no 'train_file'"):
        load_task(colours, train_file="rows.jsonl")


def test_data_is_imported_without_the_tasks():
    """Imports point one way: a task's file imports data.py, which imports it by name when it is asked for."""
    code = "import data, sys; print({'tasks', 'torch', 'transformers'} & sys.modules.keys())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "set()", out.stderr


# ------------------------------------------------------------------------------------------------ GSM8K
def gsm8k_line(i):
    return (
        json.dumps(
            dict(
                question=f"What is {i} thousand?\u2028",
                answer=f"It is {i} * 1000 = <<{i}*1000={i}000>>{i}000.\n#### {i},000",
            ),
            ensure_ascii=False,
        )
        + "\n"
    )


def whole_file(name):
    return "".join(map(gsm8k_line, range(1, data.GSM8K_ROWS[name] + 1))).encode()


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves /mode/NAME. The mode is one of

    whole; cut (fewer bytes than announced); short (half the rows, announced as such); page (not the data);
    none (404).
    """

    asked = []

    def do_GET(self):
        _, mode, name = self.path.split("/")
        self.asked.append(self.path)
        if mode == "none":
            return self.send_error(404)
        content = b"<html>sign in</html>" if mode == "page" else whole_file(name)
        content = content[: len(content) // 2] if mode == "short" else content
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if mode == "cut" else content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    with serving(Hub) as address:
        yield address


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_gsm8k_is_downloaded_once_and_whole(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(data, "GSM8K_URL", f"{hub}/whole")
    Hub.asked.clear()
    task = load_task("gsm8k", data_dir=str(tmp_path / "new" / "data"), eval_problems=30)
    assert files(tmp_path) == ["new/data/gsm8k/test.jsonl", "new/data/gsm8k/train.jsonl"]
    assert len(Hub.asked) == 2
    assert (tmp_path / "new/data/gsm8k/train.jsonl").read_bytes() == whole_file("train.jsonl")
    assert len(task.train) == 7473 and len(task.eval) == 30
    got = task.eval[0]
    assert got == dict(
        prompt="What is 1 thousand?\u2028",
        question="What is 1 thousand?\u2028",
        answer="1000",
        solution="It is 1 * 1000 = 1000.\n#### 1000",
    )
    again = load_task(
        "gsm8k", data_dir=str(tmp_path / "new" / "data" / "gsm8k"), eval_problems=30
    )  # the folder itself will do
    assert again == load_task("gsm8k", data_dir=str(tmp_path / "new" / "data"), eval_problems=30) == task
    assert len(Hub.asked) == 2


@pytest.mark.parametrize(
    "mode, words",
    [
        ("cut", "cannot download .*IncompleteRead"),
        ("none", "cannot download .*404"),
        ("short", "is broken in row|has .* rows and GSM8K has 7473: .*try again"),
        ("page", "broken in row 1 of 7473: .*did not send the whole file"),
    ],
)
def test_a_half_download_never_takes_the_name_of_a_whole_one(tmp_path, hub, monkeypatch, mode, words):
    monkeypatch.setattr(data, "GSM8K_URL", f"{hub}/{mode}")
    with pytest.raises(ValueError, match=words):
        load_task("gsm8k", data_dir=str(tmp_path))
    assert files(tmp_path) == []
    monkeypatch.setattr(data, "GSM8K_URL", f"{hub}/whole")
    assert len(load_task("gsm8k", data_dir=str(tmp_path)).train) == 7473


def test_a_hub_out_of_reach_says_which_files_to_put_where(tmp_path, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            data, "GSM8K_URL", f"http://127.0.0.1:{s.getsockname()[1]}"
        )  # bound and not listening: refuses
        with pytest.raises(
            ValueError, match=r"cannot download .*train\.jsonl and test\.jsonl, into .*gsm8k"
        ) as e:
            load_task("gsm8k", data_dir=str(tmp_path))
    assert str(tmp_path / "gsm8k") in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda b: b[: len(b) // 2], "broken in row|rows and GSM8K has 7473"),
        (lambda b: b"\n".join(b.split(b"\n")[:100]), "has 100 rows and GSM8K has 7473"),
        (lambda b: b.replace(b"####", b"so", 1), "broken in row 1 of 7473"),
        (lambda b: b.replace(b'"answer"', b'"reply"'), "broken in row 1"),
        (lambda b: b + b, "has 14946 rows"),
        (lambda b: b"", "has 0 rows"),
        (lambda b: b"\xff" + b, "broken in row 1"),
        (lambda b: b"3\n" + b, "broken in row 1"),
    ],
)
def test_a_file_that_is_not_whole_is_named(tmp_path, damage, words):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_bytes(damage(whole_file("train.jsonl")))
    with pytest.raises(ValueError, match=words) as e:
        load_task("gsm8k", data_dir=str(tmp_path))
    assert "train.jsonl" in str(e.value) and "put the whole file there" in str(e.value)


def test_the_real_gsm8k():
    places = [Path(os.environ.get("NANOGRPO_GSM8K") or ROOT), ROOT / "data" / "gsm8k"]
    folder = next((str(place) for place in places if (place / "test.jsonl").exists()), None)
    if folder is None:
        pytest.skip(
            "needs GSM8K's train.jsonl and test.jsonl in data/gsm8k or in the folder that NANOGRPO_GSM8K "
            "names"
        )
    task = load_task("gsm8k", data_dir=folder, eval_problems=2000)
    assert len(task.train) == 7473 and len(task.eval) == 1319
    assert task.train[0]["answer"] == "72"
    assert task.train[0]["solution"].startswith("Natalia sold 48/2 = 24 clips in May.\n")
    for row in [*task.train, *task.eval]:
        assert "<<" not in row["solution"]
        assert row["solution"].endswith(f"#### {row['answer']}")
        assert row["prompt"] == row["question"]
    assert not {r["prompt"] for r in task.train} & {r["prompt"] for r in task.eval}


# ------------------------------------------------------------------------------------------------ jsonl
def write(path, rows):
    path.write_bytes(
        b"\n".join(
            row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows
        )
    )
    return str(path)


def test_jsonl_keeps_every_column_and_holds_out_the_last_rows(tmp_path):
    rows = [dict(prompt=f"p\u2028{i}", tests=[i], **({"extra": i} if i % 2 else {})) for i in range(25)]
    path = write(tmp_path / "rows.jsonl", rows)
    task = load_task("jsonl", train_file=path, eval_problems=100)
    assert task.train == rows[:23] and task.eval == rows[23:]
    got = load_task("jsonl", train_file="rows.jsonl", data_dir=str(tmp_path), eval_problems=1).eval
    assert got == rows[24:]
    assert Counter(r["tests"][0] for r in task.batch(0, 23, 0)) == Counter(range(23))
    got = load_task("jsonl", train_file=write(tmp_path / "two.jsonl", rows[:2]), eval_problems=100).eval
    assert got == rows[1:2]
    both = load_task(
        "jsonl",
        train_file=path,
        eval_file=write(tmp_path / "eval.jsonl", [*rows[:3], b"", b""]),
        eval_problems=2,
    )
    assert both.train == rows and both.eval == rows[:2]


CHAT = [dict(role="user", content="6 * 7?")]


@pytest.mark.parametrize(
    "rows, words",
    [
        ([dict(prompt="a"), b'{"prompt": "b"', dict(prompt="c")], "line 2: not JSON"),
        ([dict(prompt="a"), b"", b"   ", b"oops"], "line 4: not JSON"),
        ([dict(prompt="a"), dict(question="b")], "line 2: needs a `prompt`.*question"),
        ([["a"]], "line 1: needs"),
        ([dict(prompt="")], "line 1"),
        ([dict(prompt=3)], "line 1"),
        ([dict(prompt=[])], "line 1"),
        ([dict(prompt=CHAT), dict(prompt=[dict(role="user")])], "line 2"),
        ([dict(prompt=[dict(role="user", content=None)])], "line 1"),
        ([dict(prompt=["a"])], "line 1"),
        ([b'{"prompt": "\xff"}'], "line 1: not JSON"),
        ([b"[" * 100_000], "line 1: not JSON"),
        ([], "has 0 rows, and 2 are needed"),
        ([dict(prompt="a")], "has 1 rows"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, rows, words):
    with pytest.raises(ValueError, match=words) as e:
        load_task("jsonl", train_file=write(tmp_path / "rows.jsonl", rows))
    assert "rows.jsonl" in str(e.value) and "\n" not in str(e.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="no file no.jsonl, nor .*no.jsonl"):
        load_task("jsonl", train_file="no.jsonl", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="needs train_file=FILE"):
        load_task("jsonl")


# ---------------------------------------------------------------------------------------------- prompts
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + TEMPLATE
)


def bpe(template=None, *, bos=True, eos=False):
    """A byte-level tokenizer with a few merges, which begins every text with <s>, as Llama's does."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("Ġ", "the"), ("s", "t")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|system|>", "<|assistant|>", "<|end|>"],
    )
    ids = dict(zip(("<s>", "</s>"), tokenizer.convert_tokens_to_ids(["<s>", "</s>"])))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{'<s> ' * bos}$A{' </s>' * eos}", special_tokens=list(ids.items())
    )
    tokenizer.chat_template = template
    return tokenizer


def rendered(tokenizer, messages, **keys):
    return tokenizer(
        tokenizer.apply_chat_template(messages, tokenize=False, **keys), add_special_tokens=False
    )["input_ids"]


@given(st.text(min_size=1, max_size=30), st.text(max_size=10), st.text(max_size=10))
def test_ids_are_those_of_the_rendered_template_tokenised_once(text, system, prefill):
    tokenizer = bpe(TEMPLATE)
    messages = [dict(role="system", content=system)] * bool(system) + [dict(role="user", content=text)]
    ids = prompt_ids(tokenizer, text, system=system, prefill=prefill)
    start = tokenizer.encode(prefill, add_special_tokens=False)
    assert ids == rendered(tokenizer, messages, add_generation_prompt=True) + start
    assert all(type(i) is int for i in ids)


def test_there_is_one_bos_whoever_writes_it():
    """Elsewhere the rendered template, BOS and all, was tokenised again by a tokenizer that adds a BOS."""
    for tokenizer in (bpe(TEMPLATE), bpe(TEMPLATE, bos=False), bpe()):
        for prompt in ("the answer", CHAT):
            ids = prompt_ids(tokenizer, prompt, system="Be brief.", prefill="the")
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert prompt_ids(bpe(bos=False), "a").count(bpe().bos_token_id) == 0


def test_messages_are_the_same_prompt_as_their_text():
    tokenizer = bpe(TEMPLATE)
    assert prompt_ids(tokenizer, CHAT, system="s") == prompt_ids(tokenizer, "6 * 7?", system="s")
    own = [dict(role="system", content="mine"), *CHAT]
    assert (
        prompt_ids(tokenizer, own, system="s")
        == prompt_ids(tokenizer, own)
        == prompt_ids(tokenizer, CHAT, system="mine")
    )
    assert own[0]["content"] == "mine" and len(own) == 2 and len(CHAT) == 1  # the row is as it was


def test_a_row_may_bring_the_start_of_its_answer():
    tokenizer = bpe(TEMPLATE)
    ids = prompt_ids(tokenizer, [*CHAT, dict(role="assistant", content="It is")])
    assert tokenizer.decode(ids) == "<s><|user|>6 * 7?<|end|>\n<|assistant|>It is"


def test_without_a_chat_template_the_prompt_is_plain_text():
    tokenizer = bpe()
    got = tokenizer.decode(prompt_ids(tokenizer, "the sum", system="Be brief.", prefill=" is"))
    assert got == "<s>Be brief.\n\nthe sum is"
    got = tokenizer.decode(prompt_ids(tokenizer, [*CHAT, dict(role="user", content="8 * 9?")], system="x"))
    assert got == "<s>x\n\n6 * 7?\n8 * 9?"
    assert prompt_ids(tokenizer, "in t", prefill="he") == prompt_ids(
        tokenizer, "in the"
    )  # one text, tokenised once


def test_an_answer_does_not_begin_after_a_stop_token():
    """Some tokenizers end every text with the stop token: after it a model starts another text."""
    assert prompt_ids(bpe(eos=True), "the") == prompt_ids(bpe(), "the")


def test_a_template_that_refuses_is_one_sentence():
    assert prompt_ids(bpe(NO_SYSTEM), "a") == prompt_ids(bpe(TEMPLATE), "a")
    with pytest.raises(
        ValueError, match="refuses the prompt with roles system, user: System role not supported"
    ):
        prompt_ids(bpe(NO_SYSTEM), "a", system="s")


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="empty"):
        prompt_ids(char_tokenizer(ALPHABET), "")


# ------------------------------------------------------------------------------ characters, stop tokens
@given(st.text(alphabet="aB 0.,'!?<>\n\té√", max_size=30))
def test_characters_come_back_as_they_were(text):
    tokenizer = char_tokenizer("aB 0.,'!?<>\n\té√")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    got = tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True)
    assert got == text


def test_a_char_tokenizer_saves_and_loads_as_any_other(tmp_path):
    tokenizer = char_tokenizer(ALPHABET)
    assert len(tokenizer) == len(ALPHABET) + 2 and (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<750=12,481=13>932"
    assert prompt_ids(again, text) == prompt_ids(tokenizer, text) == [2 + ALPHABET.index(c) for c in text]
    assert again.batch_decode([[*prompt_ids(again, text), 1]], skip_special_tokens=True) == [text]
    assert data.stop_ids(again, str(tmp_path)) == [1]
    with pytest.raises(ValueError, match="'Wat'"):
        prompt_ids(again, "Wat")


def test_a_character_outside_the_alphabet_is_named():
    with pytest.raises(ValueError, match="alphabet lacks the characters '−é'"):
        prompt_ids(char_tokenizer(ALPHABET), "1−2=é")
    for bad in ("", "011"):
        with pytest.raises(ValueError, match="alphabet"):
            char_tokenizer(bad)


def test_stop_ids_are_those_of_all_files(tmp_path):
    tokenizer = char_tokenizer(ALPHABET)
    assert data.stop_ids(tokenizer) == data.stop_ids(tokenizer, str(tmp_path)) == [1]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 1, 7]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert data.stop_ids(tokenizer, str(tmp_path)) == [1, 5, 7, 9]
    (tmp_path / "config.json").write_text('{"eos_token_id": null}')
    tokenizer.eos_token = None
    assert data.stop_ids(tokenizer, str(tmp_path)) == [5, 1, 7]
    with pytest.raises(ValueError, match="no stop token"):
        data.stop_ids(tokenizer)
