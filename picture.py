"""The curves of a run, or of several, as SVG, with the standard library alone.

    picture.draw([("arithmetic", rows)])        # one picture of all panels; rows: of metrics.jsonl, by step

report.py puts the same panels into its page, where they answer to the pointer. A panel is drawn from what is
there: a key that no row has leaves its curve out, a value that is no number is a gap, and a run of one step
is a point. Of several runs each has a colour, and of one run each key.

Colours are names, var(--c0) and so on, which the page gives values for light and dark; `draw` puts in those
of paper. No two keys differ by colour alone.
"""

import html
import math
import re
from dataclasses import dataclass

POINTS = 600  # of a curve at most: a longer one is averaged over neighbours
WIDTH, HEIGHT = 400, 190  # of a panel, px
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 42, 22  # its margins

# For each name its value on light and on dark ground. The curves' can be told apart by a colour-blind reader.
COLORS = {
    "c0": ("#0b63b8", "#6cb2f7"),
    "c1": ("#c2570c", "#f29a5b"),
    "c2": ("#0d7d62", "#4fc7a4"),
    "c3": ("#8b3f8f", "#d79be0"),
    "c4": ("#62666d", "#a2a8b0"),
    "ink": ("#1c1e21", "#e6e7ea"),
    "muted": ("#6a6f78", "#9aa0aa"),
    "grid": ("#e7e8eb", "#2d3036"),
    "ground": ("#ffffff", "#15171a"),
}
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4")
STYLE = """svg text{font:11px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--muted)}
svg .title{font-size:13px;font-weight:600;fill:var(--ink)}svg .unit{font-weight:400;fill:var(--muted)}
svg .names tspan{fill:var(--ink)}svg .grid{stroke:var(--grid)}svg path{fill:none}
svg .cross{stroke:var(--muted)}svg .value{font-weight:600}"""

DIFFERENCE = "sampling/sampling_logp_difference"
PHASES = ("sample", "score", "reference", "train", "other")


@dataclass
class Panel:
    """One or more keys of metrics.jsonl over the steps."""

    title: str
    unit: str
    curves: dict  # key -> name
    band: tuple = ()  # keys of the lower and the upper end of a band around the first curve
    scale: float = 1.0  # what values are multiplied by
    style: str = "noisy"  # a smooth line over a thin one | plain | dots
    log: bool = False
    stack: bool = False  # areas, one upon the other
    total: str = ""  # the key of a stack's sum, by which several runs are compared


PANELS = [
    Panel(
        "Held-out accuracy", "%", {"eval/strict": "strict", "eval/lenient": "lenient"},
        band=("eval/strict_low", "eval/strict_high"), scale=100,
    ),
    Panel("Reward", "band: spread within groups", {"reward": "reward"}, band=("low", "high")),
    Panel("Length", "tokens", {"completions/mean_length": "mean", "completions/max_length": "longest"}),
    Panel(
        "Groups that teach nothing, answers cut", "%",
        {"frac_reward_zero_std": "all rewards equal", "completions/clipped_ratio": "cut"}, scale=100,
    ),
    Panel("Turns of the model", "a row", {"turns/mean": "mean", "turns/max": "most"}),
    Panel("Entropy and KL", "nats", {"entropy": "entropy", "kl": "KL to the reference"}),
    Panel(
        "Trainer against sampler", "|difference|, nats",
        {f"{DIFFERENCE}/mean": "mean", f"{DIFFERENCE}/max": "largest"}, log=True,
    ),
    Panel("Gradient norm", "before clipping", {"grad_norm": "norm"}),
    Panel(
        "Time of a step", "seconds", {f"time/{phase}": phase for phase in PHASES}, stack=True,
        total="step_time",
    ),
    Panel("Peak memory", "GB", {"memory/peak_gb": "peak"}, style="plain"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------- what to draw
def panels(runs: list[tuple]) -> list[dict]:
    """What there is to draw of runs (name, rows): for each panel its curves, bands and ranges x and y.

    A curve: name, color, dash (numbers of COLORS and DASHES), style (noisy, plain or dots), points [[step,
    value or None]]. A band: [[step, low, high]], one a run. All of it JSON can hold.
    """
    steps = [rows[i]["step"] for _, rows in runs if rows for i in (0, -1)]
    x = [min(steps), max(steps)] if steps else [0, 1]
    drawn = []
    for panel in PANELS:
        curves, bands = [], []
        for i, (name, rows) in enumerate(runs):
            found = curves_of(panel, rows, alone=len(runs) == 1)
            for dash, curve in enumerate(found):
                if len(runs) > 1:
                    label = f"{name} {curve['name']}" if len(found) > 1 else name
                    curves.append(curve | dict(name=label, color=i % 5, dash=dash % 5))
                else:
                    curves.append(curve | dict(color=dash % 5, dash=dash % 5))
            rows = with_spread(rows) if "low" in panel.band else rows
            points = points_of(rows, panel.band, panel.scale) if panel.band else []
            bands.append([[step, *ends] for step, ends in points if None not in ends])
        if curves:
            about = dict(title=panel.title, unit=panel.unit, log=panel.log)
            about |= dict(stack=panel.stack and len(runs) == 1, curves=curves, bands=bands, x=x)
            drawn.append(about | dict(y=y_range(about)))
    return drawn


def curves_of(panel: Panel, rows: list[dict], alone: bool) -> list[dict]:
    """The curves {name, style, points} of a run; of one that is not alone fewer, since they share a panel."""
    keys = dict(panel.curves)
    if not alone and panel.total:
        keys = {panel.total: "step"}
    if alone and "reward" in keys:
        found = dict.fromkeys(key for row in rows for key in row)
        parts = [key for key in found if re.fullmatch("rewards/.+/mean", key)]
        if len(parts) > 1 or "reward" not in found:  # a single one with a weight is the reward itself
            keys |= {key: key.removeprefix("rewards/").removesuffix("/mean") for key in parts}
    curves = []
    for key, name in keys.items():
        points = [[step, *values] for step, values in points_of(rows, [key], panel.scale)]
        same = [curve for curve in curves if curve["points"] == points]
        if same:  # which would hide the other, or be hidden
            same[0]["name"] += f" = {name}"
        elif any(value is not None for _, value in points):
            style = "dots" if key.startswith("eval/") else panel.style
            curves.append(dict(name=name, style=style, points=points))
    return curves


def with_spread(rows: list[dict]) -> list[dict]:
    """The rows' steps with "low" and "high": the reward less and more the spread within groups."""
    wider = []
    for row in rows:
        reward, spread = number(row.get("reward")), number(row.get("reward_spread"))
        if reward is not None and spread is not None:
            wider.append(dict(step=row["step"], low=reward - spread, high=reward + spread))
    return wider


def points_of(rows: list[dict], keys, scale: float) -> list[tuple]:
    """[(step, [value of each key])] of the rows that have them; None for a value that is no number.

    Of more than POINTS rows, neighbours are averaged.
    """
    points = []
    for row in rows:
        if all(key in row for key in keys):
            values = [number(row[key]) for key in keys]
            points.append((row["step"], [None if v is None else significant(v * scale) for v in values]))
    together = -(-len(points) // POINTS)
    if together <= 1:
        return points
    averaged = []
    for start in range(0, len(points), together):
        some = points[start : start + together]
        columns = zip(*[values for _, values in some])
        averaged.append((some[len(some) // 2][0], [mean_of(column) for column in columns]))
    return averaged


def number(value) -> float | None:
    """The value if it is a finite number; None for whatever else a line may hold."""
    if type(value) in (int, float) and abs(value) <= 1e300:  # which NaN is not
        return value
    return None


def mean_of(values) -> float | None:
    known = [value for value in values if value is not None]
    return significant(sum(known) / len(known)) if known else None


def significant(value: float) -> float:
    """To five digits, which is all that a page needs of a measurement. What is next to nothing is 0."""
    return float(f"{value:.5g}") if abs(value) > 1e-300 else 0.0


# ---------------------------------------------------------------------------------------- ranges, ticks
def y_range(panel: dict) -> list[float]:
    values = [y for curve in panel["curves"] for _, y in curve["points"] if y is not None]
    if panel["stack"]:
        sums = {}
        for curve in panel["curves"]:
            for step, y in curve["points"]:
                sums[step] = sums.get(step, 0.0) + max(0.0, y or 0.0)
        longest = sorted(sums.values())
        usual = 1.5 * longest[int(0.95 * (len(longest) - 1))]  # a first step that compiles is cut at the top
        return [0, min(longest[-1] * 1.05, usual) or 1]
    if panel["log"]:
        positive = [y for y in values if y > 0] or [1.0]
        low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        return [10.0**low, 10.0 ** max(high, low + 1)]
    values += [end for band in panel["bands"] for _, *ends in band for end in ends]
    low, high = min(values), max(values)
    if 0 <= low < 0.6 * high or low == high == 0:
        low = 0
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1
    return [low if low == 0 else low - margin, high + margin]


def ticks(low: float, high: float, log=False) -> list[float]:
    """About four round numbers from low to high."""
    if log:
        first, last = round(math.log10(low)), round(math.log10(high))
        return [10.0**n for n in range(first, last + 1, -(-(last - first) // 4))]
    if low == high:
        return [low]
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    unit *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * unit) <= 5)
    return [significant(unit * i) for i in range(math.ceil(low / unit), math.floor(high / unit) + 1)]


def short(value: float) -> str:
    """For an axis: 12,000 -> 12k, 0.00002 -> 2e-5."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    if 0 < abs(value) < 1e-3:
        return re.sub("e-0?", "e-", f"{value:.0e}")
    return f"{value:.4g}"


def smooth(points: list) -> list:
    """Centred running mean over an eleventh of the points, narrower at both ends."""
    half = len(points) // 22
    values = [value for _, value in points]
    return [[step, mean_of(values[max(0, i - half) : i + half + 1])] for i, (step, _) in enumerate(points)]


# --------------------------------------------------------------------------------------------- drawing
class Frame:
    """Where in a panel's picture a step and a value are."""

    def __init__(self, panel: dict):
        self.steps, self.values, self.log = panel["x"], panel["y"], panel["log"]

    def x(self, step: float) -> float:
        first, last = self.steps
        share = (step - first) / (last - first) if last > first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.values
        share = math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def path(self, points: list) -> str:
        """Through [step, value]s, with a gap where there is no value (or, for a logarithm, none above 0)."""
        path, command = [], "M"
        for step, value in points:
            if value is None or (self.log and value <= 0):
                command = "M"
                continue
            path.append(f"{command}{self.x(step):.1f} {self.y(value):.1f}")
            command = "L"
        return "".join(path)

    def area(self, band: list) -> str:
        """Around [step, low, high]s."""
        if not band:
            return ""
        there = self.path([[step, high] for step, _, high in band])
        back = self.path([[step, low] for step, low, _ in reversed(band)])
        return there + back.replace("M", "L", 1) + "Z"


def svg(panel: dict, index: int, where="") -> str:
    """One panel as an SVG element, which the page's JavaScript finds by data-panel. where: attributes."""
    frame = Frame(panel)
    inside = [*axes(panel, frame)]
    for i, band in enumerate(panel["bands"]):
        inside.append(f'<path d="{frame.area(band)}" style="fill:var(--c{i});fill-opacity:.14"/>')
    inside += areas(panel, frame) if panel["stack"] else lines(panel, frame)
    inside += heading(panel)
    inside.append('<path class="cross"/>')
    about = escape(f"{panel['title']}. " + "; ".join(map(in_words, panel["curves"])))
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f'<svg {size} data-panel="{index}" role="img" aria-label="{about}" {where}>{"".join(inside)}</svg>'


def axes(panel: dict, frame: Frame):
    for value in ticks(*panel["y"], log=panel["log"]):
        y = frame.y(value)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>'
    for step in ticks(*panel["x"]):
        if step == int(step):
            yield f'<text x="{frame.x(step):.1f}" y="{HEIGHT - 5}" text-anchor="middle">{short(step)}</text>'


def lines(panel: dict, frame: Frame):
    """Each curve as it is, thin, and smoothed over it; evaluations as points on a line."""
    for curve in panel["curves"]:
        color, points, style = f"var(--c{curve['color']})", curve["points"], curve["style"]
        known = [[step, value] for step, value in points if value is not None]
        dashes = DASHES[curve["dash"]]
        dash = f'stroke-dasharray="{dashes}"' if dashes else ""
        if style == "dots" or len(known) == 1:
            for step, value in known:
                if value > 0 or not panel["log"]:
                    place = f'cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}"'
                    yield f'<circle {place} r="3" style="fill:{color}"/>'
        if style == "noisy":
            thin = "stroke-width:.7;stroke-opacity:.45"
            yield f'<path d="{frame.path(points)}" style="stroke:{color};{thin}"/>'
            points = smooth(points)
        yield f'<path d="{frame.path(points)}" style="stroke:{color};stroke-width:1.8" {dash}/>'


def areas(panel: dict, frame: Frame):
    """The curves as areas, each upon those before it."""
    height, top = {}, panel["y"][1]
    for curve in panel["curves"]:
        band = []
        for step, value in curve["points"]:
            low = height.get(step, 0.0)
            height[step] = low + max(0.0, value or 0.0)
            band.append([step, min(low, top), min(height[step], top)])
        yield f'<path d="{frame.area(band)}" style="fill:var(--c{curve["color"]});fill-opacity:.75"/>'


def heading(panel: dict):
    """Title, unit, and each curve's name behind a piece of its line; `value` is filled in under a pointer."""
    title, unit = escape(panel["title"]), escape(panel["unit"])
    yield f'<text class="title" x="2" y="13">{title}<tspan class="unit" dx="8">{unit}</tspan></text>'
    names = []
    for i, curve in enumerate(panel["curves"]):
        mark = "■" if panel["stack"] or not curve["dash"] else "╍┄╌·"[curve["dash"] - 1]
        mark = f'<tspan dx="{10 if i else 0}" style="fill:var(--c{curve["color"]})">{mark}</tspan>'
        names.append(f'{mark}<tspan dx="4">{escape(curve["name"])}</tspan><tspan class="value" dx="4"/>')
    yield f'<text class="names" x="2" y="29">{"".join(names)}</text>'


def escape(text: str) -> str:
    """The text as XML and HTML hold it. Characters that XML has none for become U+FFFD."""
    return html.escape(re.sub("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def in_words(curve: dict) -> str:
    known = [[step, value] for step, value in curve["points"] if value is not None]
    (first, a), (last, b) = known[0], known[-1]
    return f"{curve['name']} {a:.4g} at step {first}, {b:.4g} at step {last}"


def draw(runs: list[tuple]) -> str:
    """All panels of runs (name, rows) in one SVG picture, three in a row, in the colours of paper."""
    drawn, gap = panels(runs), 24
    across = min(3, max(1, len(drawn)))
    down = -(-len(drawn) // across)
    width, height = gap + across * (WIDTH + gap), 36 + gap + down * (HEIGHT + gap)
    title = escape(" and ".join(name for name, _ in runs)) + ("" if drawn else ": no step yet")
    parts = [f'<text class="title" x="{gap}" y="34" style="font-size:16px">{title}</text>']
    for i, panel in enumerate(drawn):
        x, y = gap + i % across * (WIDTH + gap), 36 + gap + i // across * (HEIGHT + gap)
        parts.append(svg(panel, i, f'x="{x}" y="{y}"'))
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    ground = '<rect width="100%" height="100%" style="fill:var(--ground)"/>'
    inside = f"<style>{STYLE}</style>{ground}{''.join(parts)}"
    picture = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{inside}</svg>\n'
    return re.sub(r"var\(--(\w+)\)", lambda name: COLORS[name.group(1)][0], picture)
