"""One page of a run, or of two side by side: its curves, every rollout, what it answered, how it was set.

    python report.py out/arithmetic              # writes out/arithmetic/report.html and curves.svg
    python report.py out/grpo out/dapo           # two runs: out/grpo/report_and_dapo.html
    python report.py out/arithmetic --serve      # a run that is under way, at http://127.0.0.1:8000
    python report.py bench/results/X_metrics.jsonl --out=page.html   # a metrics file, X_config.json beside it

All it reads is what a run leaves: metrics.jsonl, config.json, rollouts/. The loop knows nothing of it;
train.py calls `at_the_end` when a run is over. The page is one file that needs no network and no server.
Its HTML, CSS and JavaScript are in report_page.html, since an editor knows them only in a file of their own.

Text of a model, a prompt or a config is text and never markup: whatever this file puts into HTML passes
`escape`, the rest goes through `as_json`, of which the page's JavaScript makes text nodes. Files may be half
written or damaged: a line that is no JSON object is counted and left out, a value that is no number is a gap.
"""

import argparse
import base64
import glob
import hashlib
import json
import re
import shlex
import sys
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import picture
from picture import escape, number

PAGE = Path(__file__).with_name("report_page.html")
# finish_reason of rollouts/ -> what is said of a row that was cut off.
CUT = dict(
    length="cut off", turns="cut off by max_turns", context="cut off by max_context",
    environment="its environment failed",
)  # fmt: skip
FILES, BYTES = 100, 100_000_000  # of rollouts/ in a page at most: files, evenly spaced, and bytes of all


# ---------------------------------------------------------------------------------------- what a run left
@dataclass
class Recorded:
    """A run as its files tell it."""

    name: str
    prefix: str  # before metrics.jsonl in its path: the folder and "/", or a file's own
    about: dict  # config.json; {} where there is none
    rows: list[dict]  # of metrics.jsonl, by step
    groups: list[dict] = field(default_factory=list)  # of rollouts/step_*, as the page takes them
    first: list[dict] = field(default_factory=list)  # of rollouts/eval_*: the answers before training
    last: list[dict] = field(default_factory=list)  # and those after the last evaluation
    notes: list[str] = field(default_factory=list)  # what could not be read, or was left out

    @property
    def config(self) -> dict:
        config = self.about.get("config")
        return config if isinstance(config, dict) else {}


def find(path: str) -> Path:
    """The metrics.jsonl of a run: of its folder, or a file whose name ends so. ValueError: there is none."""
    place = Path(path)
    if place.is_dir():
        place = place / "metrics.jsonl"
    if not place.name.endswith("metrics.jsonl") or not place.is_file():
        raise ValueError(f"there is no run in {path}: a run is its folder, such as out/arithmetic")
    return place


def read_run(path: str) -> Recorded:
    """All that there is of a run. path: as `find` takes it."""
    place = find(path)
    stem = place.name.removesuffix("metrics.jsonl")
    name = stem.rstrip("_") or place.resolve().parent.name
    config, _ = read_objects(place.with_name(stem + "config.json"), whole=True)
    lines, damaged = read_objects(place)
    by_step = {}
    for row in lines:
        if type(row.get("step")) is int and number(row["step"]) is not None:
            by_step[row["step"]] = row  # of a step that was written twice, the later
    about = config[0] if config else {}
    prefix = str(place).removesuffix("metrics.jsonl")
    run = Recorded(name, prefix, about, [by_step[step] for step in sorted(by_step)])
    if damaged:
        run.notes.append(f"{damaged} lines of metrics.jsonl could not be read")
    read_rollouts(run, place.parent, stem)
    return run


def read_objects(path: Path, whole=False, limit=-1) -> tuple[list[dict], int]:
    """The JSON objects of a file, one a line or `whole`, and how many lines are none. [], 0: no such file.

    limit: read no more lines after this many bytes.
    """
    try:
        with open(path, "rb") as f:
            lines = [f.read()] if whole else f.readlines(limit)
    except OSError:
        return [], 0
    found = []
    lines = [line for line in lines if line.strip()]
    for line in lines:
        try:
            value = json.loads(line.decode(errors="replace"))
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found, len(lines) - len(found)


def read_rollouts(run: Recorded, parent: Path, stem: str):
    """Fills in the run's groups, answers and notes. stem: what the names of its files begin with."""
    files = []
    for pattern in ("rollouts/*.jsonl", "rollouts_*.jsonl"):
        files += parent.glob(glob.escape(stem) + pattern)
    files.sort(key=lambda file: (len(file.name), file.name))
    evaluations = [file for file in files if re.search(r"eval_\d+\.jsonl$", file.name)]
    training = [file for file in files if file not in evaluations]
    chosen = evenly(training, FILES)
    share = BYTES // max(1, len(chosen))
    unread = shortened = 0
    for file in chosen:
        rows, damaged = read_objects(file, limit=share)
        groups = groups_of(rows, run.config.get("prefill"))
        if file.stat().st_size > share and len(groups) > 1:
            groups.pop()  # which is not whole
            shortened += 1
        run.groups += groups
        unread += damaged
    if len(chosen) < len(training):
        run.notes.append(f"{len(chosen)} of {len(training)} files of rollouts are here, evenly spaced")
    if shortened:
        run.notes.append(f"of {shortened} files of rollouts the first {share / 1e6:.1f} MB are here")
    if unread:
        run.notes.append(f"{unread} lines of rollouts could not be read")
    if evaluations:
        run.first, run.last = answers_of(evaluations[0]), answers_of(evaluations[-1])


def answers_of(file: Path) -> list[dict]:
    """The answers to held-out problems after a step: {step, problem, prompt, text, right}."""
    answers = []
    for row in read_objects(file)[0]:
        if is_text(row.get("completion")) and type(row.get("step")) is type(row.get("problem")) is int:
            right = row.get("right") if type(row.get("right")) is bool else None
            kept = dict(step=row["step"], problem=row["problem"], prompt=prompt_text(row.get("prompt")))
            answers.append(kept | dict(text=row["completion"], right=right))
    return answers


def evenly(items: list, most: int) -> list:
    """At most so many of the items, the first and the last among them, evenly spaced."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def groups_of(rows: list[dict], prefill) -> list[dict]:
    """Completions to the same prompt, side by side: {step, prompt, rows} in the order of the file."""
    groups, last = [], None
    for row in rows:
        if not is_text(row.get("completion")) or type(row.get("step")) is not int:
            continue
        key = row["step"], row.get("group"), row.get("prompt")
        if not groups or key != last:
            groups.append(dict(step=row["step"], prompt=prompt_text(row.get("prompt")), rows=[]))
            last = key
        groups[-1]["rows"].append(row_for_page(row, prefill))
    return groups


def row_for_page(row: dict, prefill) -> dict:
    """A rollout as the page takes it: its text cut into tokens, and of each token thousandths of a nat."""
    tokens, text = row.get("tokens"), row["completion"]
    ids = row.get("ids")
    parts = row.get("parts") if isinstance(row.get("parts"), dict) else {}
    shown = dict(
        reward=number(row.get("reward")),
        advantage=number(row.get("advantage")),
        parts={label: number(part) for label, part in parts.items()},
        cut=CUT.get(row.get("finish_reason")) if is_text(row.get("finish_reason")) else None,
        length=len(ids) if isinstance(ids, list) else None,
        text=text,
    )
    if not isinstance(tokens, list) or not tokens or not set(map(type, tokens)) == {str}:
        return shown
    start = len(prefill) if is_text(prefill) and text.startswith(prefill) else 0
    shown["start"] = start
    given = spans_of(row.get("given"))
    # A conversation may end by what it says, a token that its text ends with.
    stopped = not shown["cut"] and not (given is not None and text.endswith(tokens[-1]))
    shown["widths"] = token_widths(text, tokens, start, stopped=stopped)
    shown["stop"] = tokens[-1] if stopped else ""
    if given is not None:
        shown["given"] = given
        if shown["length"] is not None:
            shown["length"] -= sum(count for _, count in given)
        shown["turns"] = len(given) + 1
    if is_text(row.get("env_failure")):
        shown["failure"] = row["env_failure"]
    for name, unit in (("logprobs", 1e3), ("entropy", 1e3), ("difference", 1e6)):
        values = row.get(name)
        if isinstance(values, list) and len(values) == len(tokens):
            shown[name] = in_units(values, unit)
    return shown


def spans_of(given) -> list[list[int]] | None:
    """[first, number] of each run of given tokens; None where the file has no such list."""
    if not isinstance(given, list):
        return None
    return [span for span in given if isinstance(span, list) and list(map(type, span)) == [int, int]]


def token_widths(text: str, tokens: list[str], start: int, stopped: bool) -> list[int]:
    """How much of the text from `start` each token is, in UTF-16 units, as JavaScript counts.

    0 for a token that shows nothing: the stop token, or all but the last of the tokens that are one
    character together (the text of each of them is U+FFFD).
    """
    said = tokens[:-1] if stopped else tokens
    units = len(text.encode("utf-16-le", "surrogatepass")) // 2
    if "".join(said) == text[start:] and units == len(text):  # most often so, of millions of tokens
        return [*map(len, said), *[0] * stopped]
    ends, at = [], start
    for token in tokens:
        whole = token.replace("\ufffd", "")
        found = text.find(whole, at, at + len(whole) + 8) if whole else -1
        if found > at and ends:
            ends[-1] = found  # between this token and the last stands the character that some made together
        if found >= 0:
            at = found + len(whole)
        ends.append(at)
    closing = 2 if stopped and len(ends) > 1 else 1
    ends[-closing:] = [len(text)] * closing
    widths, at = [], start
    for end in ends:
        widths.append(len(text[at:end].encode("utf-16-le", "surrogatepass")) // 2)
        at = end
    return widths


def in_units(values: list, unit: float) -> list[int]:
    """The values as whole multiples of 1 / unit; 0 for one that is no number."""
    try:
        return [round(unit * value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return [round(unit * (number(value) or 0.0)) for value in values]


def prompt_text(prompt) -> str:
    """A prompt as text; of a list of messages, each with who speaks."""
    if is_text(prompt):
        return prompt
    if not isinstance(prompt, list):
        return ""
    spoken = []
    for message in prompt:
        if isinstance(message, dict):
            spoken.append(f"{message.get('role')}: {message.get('content')}")
    return "\n".join(spoken)


def is_text(value) -> bool:
    return isinstance(value, str)


# ----------------------------------------------------------------------------------------------- the page
def page(runs: list[Recorded], live="") -> str:
    """The page of one run or of two. live: their stamp, where the page is to look for news at its server."""
    names = [run.name for run in runs]
    if len(runs) > 1:  # letters fit into a panel, and two runs may have one name
        names = ["A", "B"]
    panels = picture.panels([(name, run.rows) for name, run in zip(names, runs)])
    svgs = [picture.svg(panel, i, 'tabindex="0"') for i, panel in enumerate(panels)]
    data = dict(
        names=names,
        items=side_by_side(runs),
        answers=answer_pairs(runs),
        panels=panels,
        frame=[picture.LEFT, picture.WIDTH - picture.RIGHT, picture.TOP, picture.HEIGHT - picture.BOTTOM],
        live=live,
    )
    holes = dict(
        title=escape(" and ".join(run.name for run in runs)),
        colors=colors(),
        svg_style=picture.STYLE,
        head="".join(head(run, name, i) for i, (run, name) in enumerate(zip(runs, names))),
        curves="".join(svgs) or "<p>No step has been taken yet.</p>",
        settings=settings(runs, names),
        data=as_json(data),
    )
    template = PAGE.read_text(encoding="utf-8")
    script = re.search("<script>(.*)</script>", template, re.S).group(1)
    # Only this script may run, whatever else might find its way into the page.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return re.sub(r"{{(\w+)}}", lambda hole: (holes | dict(digest=digest))[hole.group(1)], template)


def as_json(value) -> str:
    """JSON that can stand in a script element: ASCII, no "<" that could end it or begin a comment."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def colors() -> str:
    """The colours of picture.py for light and dark ground, as the variables of a style sheet."""
    return "".join(f"--{name}:light-dark({light},{dark});" for name, (light, dark) in picture.COLORS.items())


def side_by_side(runs: list[Recorded]) -> list[dict]:
    """The groups of all runs, by step: {step, prompt, runs: of each run its rows, or none}.

    Groups of two runs are one item where step, prompt and place in the step are the same.
    """
    items = {}
    for i, run in enumerate(runs):
        seen = {}  # how often a step has had a prompt
        for group in run.groups:
            key = group["step"], group["prompt"]
            seen[key] = seen.get(key, 0) + 1
            empty = dict(step=group["step"], prompt=group["prompt"], runs=[[] for _ in runs])
            items.setdefault((*key, seen[key]), empty)["runs"][i] = group["rows"]
    return sorted(items.values(), key=lambda item: item["step"])


def answer_pairs(runs: list[Recorded]) -> dict | None:
    """Two answers to each held-out problem: of one run its first and its last, of two runs their last."""
    old, new = (runs[0].first, runs[0].last) if len(runs) == 1 else (runs[0].last, runs[1].last)
    after = {(answer["problem"], answer["prompt"]): answer for answer in new}
    pairs = []
    for answer in old:
        other = after.get((answer["problem"], answer["prompt"]))
        if other is not None and other is not answer:
            texts, right = [answer["text"], other["text"]], [answer["right"], other["right"]]
            pairs.append(dict(prompt=answer["prompt"], texts=texts, right=right))
    if not pairs:
        return None
    names = ["A", "B"]
    if len(runs) == 1:
        names = [
            f"after step {some[0]['step']}" if some[0]["step"] else "before training" for some in (old, new)
        ]
    return dict(names=names, pairs=pairs)


def head(run: Recorded, name: str, color: int) -> str:
    """A run's name, what it trained, and its few numbers that matter most."""
    badge = "" if name == run.name else f'<b style="color:var(--c{color})">{escape(name)}</b> '
    figures = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd><dd class=note>{escape(note)}</dd></div>"
        for label, value, note in key_figures(run)
    )
    about = run.about.get("trained")
    said = [about] if is_text(about) else []
    said += run.notes
    words = "".join(f"<p class=muted>{escape(sentence)}</p>" for sentence in said)
    return f"<header><h1>{badge}{escape(run.name)}</h1>{words}<dl class=figures>{figures}</dl></header>"


def key_figures(run: Recorded):
    """(what, value, what one should know about it) of what there is."""
    evaluated = [row for row in run.rows if number(row.get("eval/strict")) is not None]
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        value = f"{last['eval/strict']:.1%}"
        if first is not last:
            value = f"{first['eval/strict']:.1%} → {value}"
        yield "held-out accuracy", value, interval(last)
    learnt = [key for key in ("reward", "kl") if any(number(row.get(key)) is not None for row in run.rows)]
    if not learnt:
        return
    main = learnt[0]  # a run without a reward learns from the KL to a teacher
    steps = [row for row in run.rows if number(row.get(main)) is not None]
    some = max(1, len(steps) // 10)
    told = [(main, main, ".3f"), ("length", "completions/mean_length", ".0f")]
    told.append(("turns", "turns/mean", ".2f"))
    for what, key, spec in told:
        first, last = mean(steps[:some], key), mean(steps[-some:], key)
        if first is not None and last is not None:
            yield what, f"{first:{spec}} → {last:{spec}}", f"mean of {some} first and last steps"
    planned, done = number(run.config.get("steps")), steps[-1]["step"]
    tokens = number(steps[-1].get("num_tokens"))
    words = [] if planned is None else [f"of {planned:,}"]
    words += [] if tokens is None else [f"{picture.short(tokens)} tokens"]
    yield "steps", f"{done:,}", ", ".join(words)
    spent = sum(number(row.get("step_time")) or 0.0 for row in steps)
    yield "time in steps", duration(spent), f"{duration(spent / len(steps))} a step"
    peaks = [number(row.get("memory/peak_gb")) or 0.0 for row in steps]
    yield "peak memory", f"{max(peaks):.3g} GB", ""


def interval(row: dict) -> str:
    ends = [number(row.get(f"eval/strict_{end}")) for end in ("low", "high")]
    problems = number(row.get("eval/problems"))
    words = [] if None in ends else [f"95 %: {100 * ends[0]:.1f} to {100 * ends[1]:.1f}"]
    if problems is not None:
        words.append(f"of {problems:.0f} problems")
    return ", ".join(words)


def mean(rows: list[dict], key: str) -> float | None:
    return picture.mean_of([number(row.get(key)) for row in rows])


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def settings(runs: list[Recorded], names: list[str]) -> str:
    """What each run was started with: first the keys that are not the defaults or that differ, then all."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    listed = [run.about["differs"] for run in runs if isinstance(run.about.get("differs"), list)]
    telling = {key for some in listed for key in some if is_text(key)}
    if len(runs) > 1:
        telling = {key for key in keys if len({json.dumps(run.config.get(key)) for run in runs}) > 1}
    about = dict.fromkeys(key for run in runs for key in run.about)
    about = [key for key in about if key not in ("config", "differs", "trained")]
    sections = []
    if telling:
        what = "differs from the defaults" if len(runs) == 1 else "differs between A and B"
        rows = [[key, *(run.config.get(key) for run in runs)] for key in keys if key in telling]
        sections.append(f"<h3>{what}</h3>{table(names, rows)}")
    rows = [[key, *(in_a_line(run.about.get(key)) for run in runs)] for key in about]
    sections.append(f"<h3>versions and command</h3>{table(names, rows)}")
    rows = [[key, *(run.config.get(key) for run in runs)] for key in keys]
    sections.append(f"<details><summary>all {len(rows)} keys</summary>{table(names, rows)}</details>")
    return "".join(sections)


def in_a_line(value):
    """A list of words, such as the command, as a shell takes it; any other value as it is."""
    if isinstance(value, list) and all(map(is_text, value)):
        return shlex.join(value)
    return value


def table(names: list[str], rows: list[list]) -> str:
    """A table of keys and, in a column a run, values."""
    lines = []
    if len(names) > 1:
        lines.append("<tr><th></th>" + "".join(f"<th>{escape(name)}</th>" for name in names) + "</tr>")
    for key, *values in rows:
        cells = [value if is_text(value) else json.dumps(value) for value in values]
        lines.append(
            f"<tr><th>{escape(key)}</th>" + "".join(f"<td>{escape(x)}</td>" for x in cells) + "</tr>"
        )
    return f"<table>{''.join(lines)}</table>"


# ------------------------------------------------------------------------------------- files, and a server
def write(paths: list[str], out="") -> list[Path]:
    """Writes the page of these runs, and of a single one its curves.svg. Returns the files' paths."""
    runs = [read_run(path) for path in paths]
    with_name = "".join(f"_and_{run.name}" for run in runs[1:])
    target = Path(out or f"{runs[0].prefix}report{with_name}.html")
    target.write_text(page(runs), encoding="utf-8")
    if len(runs) > 1 or out:
        return [target]
    drawing = Path(f"{runs[0].prefix}curves.svg")
    drawing.write_text(picture.draw([(run.name, run.rows) for run in runs]), encoding="utf-8")
    return [target, drawing]


def at_the_end(out) -> str:
    """Writes the page and the picture of a run that is over. Returns a sentence for the screen."""
    try:
        target, drawing = write([str(out)])
    except Exception as error:  # of whatever kind: the run is whole, and does not fail for its picture
        reason = f"{type(error).__name__}: {error}"
        return f"no report could be written ({reason}); python report.py {out} tries again"
    return f"report: {target}   curves: {drawing}"


def stamp(paths: list[str]) -> str:
    """What changes when a run goes on: the size of its metrics."""
    return "-".join(str(find(path).stat().st_size) for path in paths)


def serve(paths: list[str], port: int):
    """Shows the runs as they are now, at each request anew. For this machine alone."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            # A page elsewhere may have this address under a name of its own: only ours is answered.
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in ("127.0.0.1", "localhost") or self.path not in ("/", "/stamp"):
                return self.send_error(404)
            try:
                now = stamp(paths)
                text = now if self.path == "/stamp" else page([read_run(path) for path in paths], live=now)
            except (ValueError, OSError) as error:
                text = escape(f"{error}: reload when the run has begun")
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Requests are nobody's business."""

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}   Ctrl-C ends it", flush=True)
        server.serve_forever()


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="report.py", description="A page of a run, or of two side by side.")
    parser.add_argument("runs", nargs="+", help="a run's folder, or its metrics.jsonl")
    parser.add_argument("--out", default="", help="where the page goes; else report.html in the run's folder")
    parser.add_argument("--serve", action="store_true", help="show a run that is under way")
    parser.add_argument("--port", type=int, default=8000)
    words = parser.parse_args(argv)
    if len(words.runs) > 2:
        parser.error("one run, or two side by side")
    if words.serve:
        return serve(words.runs, words.port)
    for path in write(words.runs, words.out):
        print(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        sys.exit(f"report.py: {e}")
    except KeyboardInterrupt:
        sys.exit(0)
