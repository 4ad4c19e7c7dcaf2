"""report.py and picture.py: a page of whatever a run left, in which a model's text is text.

The page's JavaScript is tried in a headless Chromium (apt-get install chromium), where there is one.
"""

import contextlib
import html.parser
import json
import math
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

import browser
import picture
import report
import train
from conftest import ROOT, rows, settings

HOSTILE = [
    "<script>window.taken = 1</script>",
    "</script><script>window.taken = 1</script>",
    "<!--<script>",
    "]]>",
    '"><img src=x onerror="window.taken = 1">',
    "{{data}} ${window.taken = 1} &amp; &lt;",
    "line\u2028separator\u2029and\x00NUL\x1b[31m",
    "lone \ud83d surrogates \ude00 \ud800",
    "right-to-left \u202e override",
]


def metrics_row(step, **more):
    return dict(step=step, reward=0.1 * step, reward_spread=0.2, step_time=0.5) | more


def rollout_row(step, group, text, **more):
    tokens = [*text, "<eos>"]
    row = dict(
        step=step, group=group, prompt=f"say {group}", completion=text, ids=[1] * len(tokens), tokens=tokens
    )
    row |= dict(reward=1.0, parts={"a": 1.0}, advantage=0.5, finish_reason="stop")
    row |= {name: [0.25] * len(tokens) for name in ("logprobs", "entropy", "difference")}
    return row | more


def write_run(folder, metrics, rollouts=(), config=None, answers=None):
    """A run's folder. rollouts: rows of any steps; answers: {step: rows}."""
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    for step in {row["step"] for row in rollouts}:
        lines = [json.dumps(row) + "\n" for row in rollouts if row["step"] == step]
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text("".join(lines))
    for step, some in (answers or {}).items():
        lines = [json.dumps(row) + "\n" for row in some]
        (folder / "rollouts" / f"eval_{step:06d}.jsonl").write_text("".join(lines))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


class Elements(html.parser.HTMLParser):
    """The names of a page's elements, and the text of its scripts, as a browser sees them."""

    def __init__(self, text):
        super().__init__()
        self.names, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, text):
        if self.names and self.names[-1] == "script" and text.strip():
            self.scripts.append(text)


def page_of(*folders):
    """(the page's text, its data) of runs; the data must be strict JSON, without NaN."""
    text = report.page([report.read_run(str(folder)) for folder in folders])

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return text, json.loads(Elements(text).scripts[0], parse_constant=refuse)


# ------------------------------------------------------------------------------------------ what a run leaves
@pytest.mark.parametrize(
    "keys", [{}, dict(objective="gspo"), dict(epochs=2)], ids=["clip", "gspo", "two epochs"]
)
def test_a_run_leaves_what_the_page_shows(tmp_path, capsys, keys):
    cfg = settings(tmp_path, rollouts_every=1, eval_every=2, eval_problems=3, steps=2, **keys)
    assert train.main(cfg) == 0
    folder = tmp_path / "run"
    assert f"report: {folder}/report.html" in capsys.readouterr().out
    of_step = {m["step"]: m for m in rows(folder / "metrics.jsonl")}
    for step in (1, 2):
        largest = 0.0
        for i, row in enumerate(rows(folder / "rollouts" / f"step_{step:06d}.jsonl")):
            assert row["group"] == i // cfg.group_size
            said = row["tokens"][:-1] if row["finish_reason"] == "stop" else row["tokens"]
            assert "".join(said).replace("<pad>", "").replace("<eos>", "") == row["completion"]
            assert len(row["tokens"]) == len(row["ids"])
            if row["advantage"]:
                assert len(row["difference"]) == len(row["ids"])
                largest = max(largest, *map(abs, row["difference"]))
        # The trainer's own log-probabilities, token by token, are those that the metrics speak of.
        assert abs(largest - of_step[step]["sampling/sampling_logp_difference/max"]) < 1e-6
    answers = rows(folder / "rollouts" / "eval_000002.jsonl")
    assert [a["problem"] for a in answers] == [0, 1, 2]
    assert sum(a["right"] for a in answers) / 3 == pytest.approx(of_step[2]["eval/strict"])
    text, data = page_of(folder)
    assert len(data["items"]) == 8 and data["items"][0]["runs"][0][0]["widths"]
    assert len(data["answers"]["pairs"]) == 3
    assert json.loads((folder / "config.json").read_text())["trained"] in text


def test_what_trainer_and_sampler_differ_by_is_found_by_token(tmp_path, monkeypatch):
    """A trainer made wrong by 0.01 nats: the rollouts say so."""
    right = train.policy_head

    def wrong(*arguments, logp_out, **options):
        found = right(*arguments, logp_out=logp_out, **options)
        logp_out += 0.01
        return found

    monkeypatch.setattr(train, "policy_head", wrong)
    train.main(settings(tmp_path, steps=1, rollouts_every=1))
    seen = [x for row in rows(tmp_path / "run/rollouts/step_000001.jsonl") for x in row["difference"] or []]
    assert seen and all(abs(x - 0.01) < 1e-4 for x in seen)


def test_a_report_that_cannot_be_written_fails_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "PAGE", tmp_path / "gone.html")
    assert train.main(settings(tmp_path, steps=1)) == 0
    assert "no report could be written (FileNotFoundError" in capsys.readouterr().out


def test_a_run_that_stops_early_leaves_its_page(tmp_path):
    calls = []

    def breaks(completions, **_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return [float(len(text) % 2) for text in completions]

    assert train.main(settings(tmp_path, rewards=[(breaks, 1.0)])) == 1
    text, data = page_of(tmp_path / "run")
    assert (tmp_path / "run/report.html").read_text() == text
    assert data["panels"][0]["x"] == [1, 2]


# --------------------------------------------------------------------------------------------------- text
def test_text_of_a_model_is_text(tmp_path):
    rollouts = [rollout_row(1, i, text, prompt=text, parts={text: 1.0}) for i, text in enumerate(HOSTILE)]
    config = dict(config={text: text for text in HOSTILE}, differs=HOSTILE, argv=HOSTILE, trained=HOSTILE[0])
    answers = [
        dict(step=0, problem=i, prompt=text, completion=text, right=None) for i, text in enumerate(HOSTILE)
    ]
    later = [answer | dict(step=1) for answer in answers]
    labels = {f"rewards/{text}/mean": float(i) for i, text in enumerate(HOSTILE)}
    write_run(tmp_path, [metrics_row(1, **labels)], rollouts, config, {0: answers, 1: later})
    plain = write_run(tmp_path / "plain", [metrics_row(1)], [rollout_row(1, 0, "a")], dict(git="x"), {})
    text, data = page_of(tmp_path)
    found = Elements(text).names
    assert found.count("script") == 2 and "img" not in found
    assert set(found) <= set(Elements(page_of(plain)[0]).names)
    assert [item["runs"][0][0]["text"] for item in data["items"]] == HOSTILE
    assert [item["prompt"] for item in data["items"]] == HOSTILE
    assert [pair["texts"][1] for pair in data["answers"]["pairs"]] == HOSTILE
    text.encode()  # it can be written
    ElementTree.fromstring(picture.draw([(HOSTILE[0], report.read_run(str(tmp_path)).rows)]))


@given(st.text(st.sampled_from("ab é→😀👩\u200d🚀\n")), st.data())
def test_pieces_of_a_text_are_its_tokens(text, data):
    """Bytes in any cut: a token's piece is its text, and a character of several tokens is the last one's."""
    raw = text.encode()
    cuts = sorted(
        data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=8)) if len(raw) > 1 else []
    )
    ends = [0, *cuts, len(raw)]
    tokens = [raw[a:b].decode(errors="replace") for a, b in zip(ends, ends[1:])]
    widths = report.token_widths(text, [*tokens, "<eos>"], 0, stopped=True)
    units = text.encode("utf-16-le")
    assert sum(widths) * 2 == len(units) and min(widths) >= 0 and widths[-1] == 0
    if all("\ufffd" not in token for token in tokens):
        at = 0
        for token, width in zip(tokens, widths):
            assert units[at : at + 2 * width].decode("utf-16-le") == token
            at += 2 * width


def test_a_prefill_stands_before_the_first_token(tmp_path):
    row = rollout_row(1, 0, "abc", completion="<think>abc")
    write_run(tmp_path, [metrics_row(1)], [row], dict(config=dict(prefill="<think>")))
    shown = page_of(tmp_path)[1]["items"][0]["runs"][0][0]
    assert shown["start"] == 7 and shown["widths"] == [1, 1, 1, 0] and shown["stop"] == "<eos>"


# ------------------------------------------------------------------------------------------- what is damaged
NAN = float("nan")
DAMAGED = {
    "empty": [],
    "only an evaluation": ['{"step": 0, "eval/strict": 0.5}'],
    "one step": [json.dumps(metrics_row(1))],
    "NaN and infinities": [
        json.dumps(metrics_row(i, reward=NAN, entropy=math.inf, grad_norm=-math.inf)) for i in (1, 2)
    ],
    "all zero": [
        json.dumps(metrics_row(i, reward=0.0, reward_spread=0.0, step_time=0.0, kl=0.0)) for i in (1, 2)
    ],
    "null": [json.dumps(metrics_row(i, reward=None, step_time=None)) for i in (1, 2)],
    "wrong types": ['{"step": 1, "reward": "high", "entropy": [1], "eval/strict": {}, "step_time": true}'],
    "half a line": [json.dumps(metrics_row(1)), json.dumps(metrics_row(2))[:30]],
    "no objects": ["1", "null", "[]", '"x"', "}{", "\x00\x00", "[" * 100_000],
    "steps that are none": ['{"step": "1"}', '{"step": 1.5}', '{"step": null}', '{"step": true}', "{}"],
    "numbers out of range": ['{"step": 1, "reward": 1e999, "kl": 1%s, "grad_norm": 5e-324}' % ("0" * 400)],
    "a step out of range": ['{"step": 1%s, "reward": 1.0}' % ("0" * 400)],
    "smallest numbers": ['{"step": %d, "grad_norm": 5e-324, "reward": 1e-310}' % i for i in (1, 2)],
    "a logarithm of nothing": [json.dumps({"step": i, f"{picture.DIFFERENCE}/mean": 0.0}) for i in (1, 2)],
    "written twice": [json.dumps(metrics_row(i)) for i in (1, 2, 3, 2, 3, 4)],
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_page_of_any_metrics(tmp_path, kind):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(DAMAGED[kind]))
    page, drawing = [file.read_text() for file in report.write([str(folder)])]
    svgs = re.findall("<svg.*</svg>", page)
    for number in re.findall(r' [dxy]="([^"]*)"', drawing + "".join(svgs)):
        assert not set(number) & set("naife"), number  # NaN, infinity, exponents
    ElementTree.fromstring(drawing)
    text, data = page_of(folder)
    if kind == "half a line":
        assert "1 lines of metrics.jsonl could not be read" in text
    if kind == "written twice":
        reward = next(panel for panel in data["panels"] if panel["title"] == "Reward")
        assert [step for step, _ in reward["curves"][0]["points"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "row",
    [
        {}, dict(completion=5), dict(step=1, completion="x"), dict(step="1", completion="x"),
        dict(step=1, completion="x", prompt=[dict(role="user", content="hi")], tokens=["x", 5]),
        dict(step=1, completion="x", prompt={"a": 1}, parts=[1], reward="1", advantage=NAN, ids=3),
        rollout_row(1, 0, "abc", logprobs=[NAN, None, "x", math.inf], entropy=None, difference=[1.0]),
        rollout_row(1, [], "", tokens=[], ids=[]), rollout_row(1, 0, "abc", tokens=["zzz"] * 3),
    ],
)  # fmt: skip
def test_a_page_of_any_rollouts(tmp_path, row):
    write_run(tmp_path, [metrics_row(1)])
    good = json.dumps(rollout_row(1, 7, "good"))
    lines = f"{json.dumps(row)}\n{good}\n{good[:40]}\n"
    (tmp_path / "rollouts/step_000001.jsonl").write_text(lines)
    for name in ("eval_000000", "eval_000001"):
        (tmp_path / f"rollouts/{name}.jsonl").write_text(lines)
    text, data = page_of(tmp_path)
    assert data["items"][-1]["runs"][0][0]["text"] == "good"
    assert "1 lines of rollouts could not be read" in text


@pytest.mark.parametrize(
    "config", ["", "[]", "{", '{"config": 5}', '{"config": {"steps": "many"}, "differs": 5}']
)
def test_a_page_without_a_config(tmp_path, config):
    write_run(tmp_path, [metrics_row(1)])
    (tmp_path / "config.json").write_text(config)
    assert "Reward" in page_of(tmp_path)[0]


def test_a_large_run_is_thinned_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FILES", 5)
    monkeypatch.setattr(report, "BYTES", 5 * 900)
    groups = [rollout_row(step, group, "abc") for step in range(1, 21) for group in (0, 0, 1, 1, 2, 2)]
    write_run(tmp_path, [metrics_row(i) for i in range(1, 3001)], groups)
    text, data = page_of(tmp_path)
    steps = sorted({item["step"] for item in data["items"]})
    assert steps[0] == 1 and steps[-1] == 20 and len(steps) == 5
    assert "5 of 20 files of rollouts are here" in text and "of 5 files of rollouts the first 0.0 MB" in text
    assert all(len(item["runs"][0]) == 2 for item in data["items"])  # whole groups
    points = data["panels"][0]["curves"][0]["points"]
    assert len(points) <= picture.POINTS
    assert points[0][1] == pytest.approx(
        sum(0.1 * i for i in range(1, 6)) / 5, rel=1e-4
    )  # a mean of neighbours


# ----------------------------------------------------------------------------------------- two runs, commands
def test_two_runs_stand_side_by_side(tmp_path):
    common = dict(lr=1.0, beta=0.0)
    a = write_run(
        tmp_path / "a", [metrics_row(1), metrics_row(2, kl=0.5)],
        [rollout_row(1, 0, "from a"), rollout_row(2, 0, "only a")], dict(config=common),
    )  # fmt: skip
    b = write_run(
        tmp_path / "b", [metrics_row(1)], [rollout_row(1, 0, "from b")], dict(config=common | dict(lr=2.0))
    )
    text, data = page_of(a, b)
    assert data["names"] == ["A", "B"]
    said = [[[row["text"] for row in run] for run in item["runs"]] for item in data["items"]]
    assert said == [[["from a"], ["from b"]], [["only a"], []]]
    differing = text[text.index("differs between A and B") : text.index("versions and command")]
    assert "lr" in differing and "beta" not in differing
    reward = next(panel for panel in data["panels"] if panel["title"] == "Reward")
    assert [(curve["name"], curve["color"]) for curve in reward["curves"]] == [("A", 0), ("B", 1)]
    assert report.write([str(a), str(b)]) == [a / "report_and_b.html"]


def command(*words):
    return subprocess.run(
        [sys.executable, "report.py", *map(str, words)], capture_output=True, text=True, cwd=ROOT
    )


def test_the_command_writes_a_page_or_says_one_sentence(tmp_path):
    write_run(tmp_path, [metrics_row(1)])
    out = command(tmp_path)
    assert out.stdout.split() == [f"{tmp_path}/report.html", f"{tmp_path}/curves.svg"], out.stderr
    missing = command(tmp_path / "none")
    assert missing.returncode and missing.stderr.count("\n") == 1 and "there is no run in" in missing.stderr
    assert "one run, or two" in command(tmp_path, tmp_path, tmp_path).stderr
    assert "--serve" in command("--help").stdout


def test_metrics_of_bench_results_make_a_page(tmp_path):
    file = next((ROOT / "bench/results").glob("2026-11-24*_metrics.jsonl"))
    report.main([str(file), f"--out={tmp_path}/page.html"])
    text = (tmp_path / "page.html").read_text()
    assert "24.2% → 38.6%" in text and "clip_high" in text


def get(url, host=None):
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


@contextlib.contextmanager
def served(folder):
    """The address at which report.py --serve shows a run, until it gets a Ctrl-C."""
    words = [sys.executable, "report.py", str(folder), "--serve", "--port=0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        url = server.stdout.readline().split()[0]
        assert url.startswith("http://127.0.0.1:")
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0
        server.stdout.close()


def test_serve_shows_the_run_as_it_is_now(tmp_path):
    write_run(tmp_path, [metrics_row(1)])
    with served(tmp_path) as url:
        before = get(f"{url}/stamp")
        assert f'"live":"{before}"' in get(url)
        write_run(tmp_path, [metrics_row(1), metrics_row(2, reward=7.5)])
        assert get(f"{url}/stamp") != before and "7.5" in get(url)
        for path, host in (("/metrics.jsonl", None), ("/../report.py", None), ("/", "elsewhere.example:80")):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(url + path, host)
        (tmp_path / "metrics.jsonl").unlink()
        assert "there is no run in" in get(url)


# ----------------------------------------------------------------------------------------------- in a browser
no_browser = pytest.mark.skipif(browser.BINARY is None, reason="no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def a_run(folder):
    rollouts = []
    for step in (10, 20):
        for group in range(3):
            for i in range(4):
                text = f"answer {i} of step {step} to {group}" + "!" * 10 * i
                more = dict(reward=float(i == 2), advantage=1.5 if i == 2 else -0.5)
                more |= dict(finish_reason="length") if i == 3 else {}
                rollouts.append(rollout_row(step, group, text, **more))
    metrics = [metrics_row(i, entropy=0.5) for i in range(1, 21)]
    answers = [dict(step=0, problem=i, prompt=f"p{i}", completion="bad", right=False) for i in range(3)]
    later = [dict(step=20, problem=i, prompt=f"p{i}", completion="good", right=i > 0) for i in range(3)]
    return write_run(folder, metrics, rollouts, dict(config=dict(steps=20)), {0: answers, 20: later})


def opened(tab, folder, hash=""):
    report.write([str(folder)])
    tab.open(f"file://{folder}/report.html{hash}")
    return tab


@pytest.mark.slow
@no_browser
def test_click_filter_and_keys(tab, tmp_path):
    opened(tab, a_run(tmp_path))
    assert tab.text("#count") == "24 of 24 completions, 6 of 6 prompts."
    assert tab.text(".prompt") == "say 0" and tab.ask("document.querySelectorAll('.card').length") == 4
    tab.click(".item:nth-child(3)")
    assert tab.text(".prompt") == "say 2"
    tab.key("ArrowDown")  # on to the next step
    assert tab.text(".prompt") == "say 0" and "step 20" in tab.text(".card .text")
    tab.key("ArrowLeft")
    assert "step 10" in tab.text(".card .text")
    tab.key("/")
    for letter in "step 20 to 1":
        tab.key(letter)
    assert tab.text("#count") == "4 of 24 completions, 1 of 6 prompts." and tab.text(".prompt") == "say 1"
    marks = "[...document.querySelectorAll('.card:first-child mark')].map(mark => mark.textContent).join('')"
    assert tab.ask(marks) == "step 20 to 1"  # over its tokens
    tab.key("Escape")
    tab.click("#clear")
    tab.ask("$('reward_from').value = 1, look()")
    assert (
        tab.text("#count").startswith("6 of 24")
        and tab.ask("document.querySelectorAll('.card.other').length") == 3
    )
    tab.ask("$('ended').value = 'cut', look()")
    assert tab.text("#group") == "No completion is like that."
    tab.ask("$('reward_from').value = '', $('length_from').value = 30, look()")
    assert tab.text("#count").startswith("6 of 24")
    tab.click("#clear")
    assert tab.text("#count").startswith("24 of 24")
    assert not tab.errors


@no_browser
@pytest.mark.slow
def test_colours_values_and_answers(tab, tmp_path):
    opened(tab, a_run(tmp_path))
    good = tab.ask(
        "getComputedStyle(document.querySelector('.card:nth-child(3) .text span')).backgroundColor"
    )
    bad = tab.ask("getComputedStyle(document.querySelector('.card:nth-child(1) .text span')).backgroundColor")
    assert good != bad and "advantage: -1.5" in tab.text("#legend")
    tab.key("c")
    assert "entropy" in tab.text("#legend") and "0.25 nats" in tab.text("#legend")
    tab.point(".card .text span")
    assert tab.text("#tip") == '"a"   probability 1.28   entropy 0.25 nats   trainer − sampler 0.25 nats'
    dark = tab.ask("getComputedStyle(document.body).backgroundColor")
    tab.key("t")
    assert tab.ask("getComputedStyle(document.body).backgroundColor") != dark
    tab.point("svg[data-panel='0']")
    assert tab.text("svg[data-panel='0'] .unit").startswith("step 1") and tab.text(
        "svg[data-panel='0'] .value"
    )
    tab.ask("document.querySelector(\"svg[data-panel='0']\").focus()")
    step = tab.text("svg[data-panel='0'] .unit")
    tab.key("ArrowRight")
    assert tab.text("svg[data-panel='0'] .unit") == f"step {int(step.split()[1]) + 1}"
    assert tab.ask("[...$('kinds').children].map(b => b.textContent)") == [
        "wrong, then right: 2",
        "wrong, then wrong: 1",
    ]
    tab.click("#kinds button:nth-child(2)")
    assert "p0" in tab.text("#answers") and "p1" not in tab.text("#answers")
    assert not tab.errors and len(tab.requests) == 1  # the page, and nothing from anywhere


@no_browser
@pytest.mark.slow
def test_a_served_page_follows_its_run(tab, tmp_path):
    write_run(tmp_path, [metrics_row(1)])
    with served(tmp_path) as url:
        tab.open(url)
        tab.loaded = False
        write_run(tmp_path, [metrics_row(1), metrics_row(2)])
        tab.wait()
        assert tab.ask("data.panels[0].x") == [1, 2] and not tab.errors
        tab.open("about:blank")  # before its server goes


@no_browser
@pytest.mark.slow
def test_the_address_brings_back_what_was_shown(tab, tmp_path):
    opened(tab, a_run(tmp_path), "#color=surprise&text=step+20&at=4")
    assert tab.text(".prompt") == "say 1" and tab.text("#count").startswith("12 of 24")
    assert "color=surprise" in tab.ask("location.hash")


@no_browser
def test_a_browser_runs_nothing_that_a_model_wrote(tab, tmp_path):
    rollouts = [
        rollout_row(1, i, text, prompt=text, parts={text: 1.0, "b": 0.0}) for i, text in enumerate(HOSTILE)
    ]
    answers = [
        dict(step=0, problem=i, prompt=text, completion=text, right=None) for i, text in enumerate(HOSTILE)
    ]
    later = [answer | dict(step=1, right=True) for answer in answers]
    config = dict(config={text: text for text in HOSTILE}, differs=HOSTILE, trained=HOSTILE[0])
    opened(tab, write_run(tmp_path, [metrics_row(1)], rollouts, config, {0: answers, 1: later}))
    shown = (
        "(() => {const some = []; for (const item of data.items) {go(item); some.push(%s)} return some})()"
    )
    said = tab.ask(shown % "document.querySelector('.prompt').textContent === item.prompt")
    assert said == [True] * len(HOSTILE)
    said = tab.ask(shown % "document.querySelector('.text').textContent.startsWith(item.prompt)")
    assert said == [True] * len(HOSTILE)
    assert tab.ask("typeof window.taken") == "undefined"
    assert tab.ask("document.querySelectorAll('script,img,iframe,object').length") == 2
    assert not tab.errors


@no_browser
@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_browser_opens_a_page_of_any_metrics(tab, tmp_path, kind):
    (tmp_path / "metrics.jsonl").write_text("\n".join(DAMAGED[kind]))
    opened(tab, tmp_path)
    if tab.ask("pictures.length"):
        tab.point("svg")
    assert not tab.errors


@no_browser
@pytest.mark.slow
def test_20_000_rollouts_open_in_two_seconds(tab, tmp_path):
    text = "The answer is forty-two. "
    groups = [rollout_row(10 * (i // 500), i % 500 // 8, text, reward=i % 3 / 2) for i in range(20_000)]
    folder = write_run(tmp_path, [metrics_row(i) for i in range(1, 400)], groups)
    report.write([str(folder)])
    seconds = []
    for _ in range(3):  # others may be at work on this machine
        start = time.perf_counter()
        tab.open(f"file://{folder}/report.html#text=forty")
        assert tab.text("#count").startswith("20,000 of 20,000")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2, seconds
    tab.ask("$('text').value = 'two', start = performance.now(), look()")
    assert tab.ask("performance.now() - start") < 500
