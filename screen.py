"""The screen of a run: what it is, one line a step, and what to type when it has ended.

On a terminal colours help (NO_COLOR switches them off, no-color.org) and lines fit its width: differences
are cut, and the columns that matter least are left out. In a log file everything is there, without colour.
"""

import math
import os
import shutil
import sys
import textwrap

import torch

import config as configs
import data
import memory
import nf4
import rewards as rewarding
from evaluation import summary
from policy import newest_of_run
from ranks import say, world

STYLES = dict(bold="1", dim="2", green="32")


def paint(text: str, style: str) -> str:
    """The text in one of STYLES, where a person looks at a terminal and has not said NO_COLOR."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[{STYLES[style]}m{text}\033[0m"


def columns_of_screen() -> int | None:
    """Characters that fit into a line; None where no terminal limits them."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


# ------------------------------------------------------------------------------------- the first lines
def header(run):
    """What this run is, what differs from the defaults, what memory it takes, and the first prompt as ids."""
    cfg = run.cfg
    say(paint(what_it_is(run), "bold"))
    say(what_is_trained(run))
    if cfg.reference:
        say(what_teaches(run))
    if cfg.env:
        say(what_answers(cfg))
    say("differs from the defaults:")
    width = columns_of_screen() or 110
    for key, value in configs.differences(cfg).items():
        say(paint(cut(f"  {key} = {configs.shown(value)}", width), "dim"))
    say(run.kernels)
    if rewarding.runs_code(run.rewards, run.conversations and run.conversations.env):
        say(what_is_isolated(cfg.sandbox))
    row = run.task.batch(0, 1, cfg.seed)[0]
    ids = data.prompt_ids(run.tokenizer, row["prompt"], system=cfg.system_prompt, prefill=cfg.prefill)
    say(memory_plan(run, len(ids)))
    pieces = [repr(run.tokenizer.decode([i]))[1:-1] for i in ids]
    say(f"the first prompt, {len(ids)} tokens: " + "|".join(pieces))


def what_it_is(run) -> str:
    """GRPO on gsm8k: 300 steps of 16 prompts x 16 completions of up to 512 tokens, into out/gsm8k"""
    cfg = run.cfg
    how = "GRPO" if configs.has_reward(cfg) else "on-policy distillation"
    size = (
        f"{cfg.prompts_per_step} prompts x {cfg.group_size} completions of up to {cfg.max_new_tokens} tokens"
    )
    return f"{how} on {configs.task_name(cfg)}: {cfg.steps} steps of {size}, into {run.out}"


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + " .."


def what_is_trained(run) -> str:
    cfg, model = run.cfg, run.model
    total = sum(p.numel() for p in model.parameters()) + nf4.weights_in(model)
    trained = run.optimizer.trained()
    how = f"LoRA {cfg.lora_rank}" if cfg.lora_rank else "full"
    if cfg.base == "nf4":
        how += " on a base in 4 bits"
    device = f"CPU, {torch.get_num_threads()} threads"
    if run.device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    sentence = f"{'scratch' if cfg.scratch else cfg.model}: {model.shape.family}, {total:,} parameters, "
    sentence += f"{trained:,} trained ({how}), {str(run.dtype).removeprefix('torch.')} on {device}"
    if world() > 1:
        sentence += f", {world()} processes"
    return sentence


def what_teaches(run) -> str:
    """What the KL is measured to, and in which way."""
    cfg, teacher = run.cfg, run.reference
    size = sum(p.numel() for p in teacher.parameters()) + nf4.weights_in(teacher)
    sentence = f"teacher: {newest_of_run(cfg.reference)}: {teacher.shape.family}, {size:,} parameters; "
    sentence += f"beta {cfg.beta:g}, kl {cfg.kl}"
    if cfg.kl == "full":
        sentence += f", {cfg.kl_direction}"
        sentence += f", the {cfg.kl_top} likeliest words and the rest as one" if cfg.kl_top else ""
    return sentence


def what_answers(cfg) -> str:
    """environment: guess, replies as they are, at most 20 turns and 90 tokens a row with its prompt"""
    how = f"replies in the role {cfg.env_role!r}" if cfg.env_role else "replies as they are"
    tokens = f"{cfg.max_context} tokens a row with its prompt" if cfg.max_context else ""
    tokens = tokens or f"{memory.own_tokens(cfg)} tokens a row behind its prompt"
    name = cfg.env if isinstance(cfg.env, str) else cfg.env.__name__
    return f"environment: {name}, {how}, at most {cfg.max_turns} turns and {tokens}"


def what_is_isolated(mode: str) -> str:
    from tasks import sandbox

    held = sandbox.isolation()
    missing = [name for name in sandbox.FULL if name not in held]
    said = f"sandbox ({mode}, {sandbox.way()}): isolates {', '.join(held)}"
    return said + "".join(f"; NOT {name}" for name in missing)


def planned(run, prompt_tokens: int, tokens: int, one_batch: bool) -> dict:
    """memory.plan of a run. tokens: of its largest micro-batch."""
    return memory.plan(
        run.cfg, run.model.shape, device=run.model.device.type, tokens=tokens, one_batch=one_batch,
        prompt_tokens=prompt_tokens, merged=run.merges, before=run.before, world=world(),
        teacher=run.teacher_shape,
    )  # fmt: skip


def memory_plan(run, prompt_tokens: int) -> str:
    """What each phase will hold, if every completion is as long as it may be."""
    cfg, device = run.cfg, run.model.device
    step = memory.step_tokens(cfg, prompt_tokens, world())
    tokens = run.micro_tokens or memory.CPU_TOKENS
    if device.type == "cuda" and not run.micro_tokens:
        held = memory.total(planned(run, prompt_tokens, 0, True)["save"])
        room = torch.cuda.get_device_properties(device).total_memory
        tokens = memory.micro_tokens_for(room - held, cfg, run.model.shape, "cuda", run.teacher_shape)
    phases = planned(run, prompt_tokens, min(tokens, step), one_batch=step <= tokens)
    parts = [f"{what} {size / 1e9:.2f}" for what, size in phases["load"].items()]
    peaks = [f"{phase} {memory.total(held) / 1e9:.2f}" for phase, held in phases.items() if phase != "load"]
    return f"memory, planned in GB: {', '.join(parts)}; at most in {', '.join(peaks)}"


def say_memory(run, step, batch):
    """Compares the plan with what was held by the end of a first step, and says where they are apart."""
    longest = max(map(len, batch.prompts))
    tokens = max(step.micro_batches, default=0)
    plan = memory.peak(planned(run, longest, tokens, one_batch=len(step.micro_batches) <= 1))
    held = max(run.peaks.highest, run.peaks.note())
    if abs(held / plan - 1) > 0.1:
        say(
            f"memory: {held / 1e9:.2f} GB were held at most, where {plan / 1e9:.2f} were planned "
            f"for micro-batches of {tokens:,} tokens"
        )


# ------------------------------------------------------------------------------------- a line a step
# Heading, metric, format, and how early the column goes where a terminal is narrow (0: it stays).
COLUMNS = [
    ("reward", "reward", "7.3f", 0),
    ("spread", "reward_spread", "7.3f", 3),
    ("kl", "kl", "8.4f", 2),
    ("entropy", "entropy", "7.3f", 5),
    ("length", "completions/mean_length", "7.1f", 1),
    ("turns", "turns/mean", "6.2f", 3),
    ("cut%", "completions/clipped_ratio", "6.1%", 1),
    ("same%", "frac_reward_zero_std", "6.0%", 2),
    ("none", "reward_failures", "4.0f", 6),
    ("|grad|", "grad_norm", "7.3f", 4),
    ("sample t/s", "tokens_per_second/sample", "10,.0f", 7),
    ("train t/s", "tokens_per_second/train", "10,.0f", 8),
]
# Metrics that a run without a reward does not have: what it learns from is the KL to a teacher.
OF_REWARD = ("reward", "reward_spread", "frac_reward_zero_std", "reward_failures")
LEGEND = (
    "spread: of the rewards within a group (std); cut%: completions that met max_new_tokens; same%: groups "
    "whose rewards are all equal, which teach nothing; none: completions that no reward could score; t/s: "
    "tokens a second; left: minutes and seconds; -: a step does not have it"
)
WITH_TURNS = "max_new_tokens, max_turns or max_context; turns: of the model in a row"


def legend(cfg):
    """What the columns mean, once, above their headings."""
    width = min(columns_of_screen() or 110, 110)
    words = LEGEND.replace("max_new_tokens", WITH_TURNS) if cfg.env else LEGEND
    for text in textwrap.wrap(words, width - 2):
        say(paint("  " + text, "dim"))


def shown_columns(run) -> list:
    """(heading, metric, format, characters) of the columns that fit, one for each reward among them."""
    parts, rewarded = [], configs.has_reward(run.cfg)
    if len(run.rewards) > 1 or not rewarded:
        for label, _, _ in run.rewards:
            parts.append((label, f"rewards/{label}/mean", "7.3f", 1))
    columns = []
    for heading, metric, spec, goes in [COLUMNS[0], *parts, *COLUMNS[1:]]:
        if heading == "kl" and not run.cfg.beta:
            continue
        if metric in OF_REWARD and not rewarded or (metric == "turns/mean" and not run.cfg.env):
            continue
        width = max(int(spec.split(",")[0].split(".")[0]), len(heading))
        columns.append((heading, metric, spec, width, goes))
    room = columns_of_screen()
    while room and sum(width + 2 for *_, width, _ in columns) + 14 > room and any(c[-1] for c in columns):
        columns.remove(max(columns, key=lambda column: column[-1]))
    return [column[:-1] for column in columns]


def line(run, m=None, seconds_left=0.0) -> str:
    """One aligned line of the screen for metrics m, or its heading."""
    cells = [f"{'step':>6}" if m is None else f"{m['step']:6d}"]
    for heading, metric, spec, width in shown_columns(run):
        cells.append(f"{cell(heading, metric, spec, m):>{width}}")
    if m is None:
        return paint("  ".join(cells) + "    left", "bold")
    minutes, seconds = divmod(int(seconds_left), 60)
    return "  ".join(cells) + f"  {minutes:3d}:{seconds:02d}"


def cell(heading, metric, spec, m) -> str:
    if m is None:
        return heading
    value = m.get(metric)
    return "-" if value is None else format(value, spec)


def evaluated(name: str, metrics: dict) -> str:
    """A line for an evaluation."""
    return paint(f"{name} {summary(metrics)}", "green")


MOST_MESSAGES = 8  # of a conversation on the screen


def show_sample(row, text, reward, conversation=None):
    """A prompt and its completion; of a conversation (turns.Turns.for_people) each turn, and what cut it."""
    paid = "" if math.isnan(reward) else f"   reward {reward:.2f}"
    if conversation is None:
        return say(f"      | {shorten(last_words(row['prompt']))} -> {shorten(text)}{paid}")
    reason, lines = conversation["finish_reason"], []
    cut = "" if reason == "stop" else f"   cut: {reason}"
    say(f"      | {shorten(last_words(row['prompt']))}{paid}{cut}")
    for message in conversation["turns"]:
        lines.append(data.transcript([message | dict(content=shorten(message["content"]))]))
    if len(lines) > MOST_MESSAGES:
        half = MOST_MESSAGES // 2
        lines[half:-half] = [f".. {len(lines) - 2 * half} messages more .."]
    for line_of_talk in lines:
        say(f"      |   {line_of_talk}".rstrip())


def last_words(prompt) -> str:
    """The prompt as text: of a list of messages, the last one."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def shorten(text: str, n: int = 70) -> str:
    text = " ".join(text.split())
    return text if len(text) <= n else text[: n // 2] + " .. " + text[-n // 2 :]


# --------------------------------------------------------------------------------------- the last lines
def finish(run, before, after):
    """Before, after, one problem answered before and after, where everything is, and what to type next.

    before, after: (metrics, texts) of an evaluation, or None.
    """
    if before and after and before[0] and after[0]:
        say("")
        say(evaluated("before:", before[0]))
        say(evaluated("after: ", after[0]))
        changed = [i for i, (b, a) in enumerate(zip(before[1], after[1])) if b != a] or [0]
        i = changed[0]
        say(f"\n  {shorten(last_words(run.task.eval[i]['prompt']), 400)}")
        say(f"  before: {shorten(before[1][i], 400)}\n  after:  {shorten(after[1][i], 400)}\n")
    folder = run.out / "ckpt" / f"step_{run.state['step']:06d}"
    curve, rollouts = run.out / "metrics.jsonl", run.out / "rollouts"
    say(f"curve: {curve}   rollouts: {rollouts}   checkpoint: {folder}")


def what_next(run):
    """The commands that a person may want now, with this run's paths in them."""
    say(f"next:   python sample.py {run.out}" + "   # talk to it")
    files = [word for word in sys.argv[1:] if not word.startswith("-")]
    if files and files[0].endswith(".py"):
        say(f"        python eval.py {files[0]} --model={run.out}   # its accuracy")
    say(f"        python report.py {run.out} --serve   # curves and rollouts in a page")
