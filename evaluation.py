"""How good a model is on held-out problems, and whether a first batch has anything to learn from.

A completion is right when the config's first reward gives it 1 or more; leniently right, when that reward's
lenient twin does (rewards.LENIENT), so the two differ by those who know the answer and not the form.
train.py calls `evaluate` before, during and after; eval.py is the script, and also shows what the rewards pay
for texts that answer nothing: an optimiser finds those.

Dims: B prompts of a batch, G completions a prompt; N problems, k samples of each.
"""

import math
from collections import Counter

import numpy as np

import data
import rewards as rewarding
from rewards import flat_groups, score_completions

AT_ONCE = 512  # problems between looks at Ctrl-C; more at once would fill the slots no better


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion right / n: Wilson's score interval (1927),
    inside 0..1 and honest at 0 and n.
    """
    p, zz = right / n, z * z / n
    middle = p + zz / 2
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return (middle - half) / (1 + zz), (middle + half) / (1 + zz)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples is right, when c of n were: unbiased (Eq. 1,
    arXiv:2107.03374).
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(sampler, tokenizer, rows, functions, *, stop_ids, max_new_tokens, system="", prefill="",
             samples=1, temperature=1.0, seed=0, reward_messages=False, timeout=None, stop=None,
             on_answers=None, converse=None, max_context=0):  # fmt: skip
    """Metrics (a dict: eval/strict, eval/lenient, ..) and each problem's first completion, on rows of a task.

    functions: rewards.resolve's list; every reward's mean is reported, whatever its weight. One sample is
    drawn greedily, several at `temperature`; then strict and lenient are means over samples (pass@1) and
    eval/pass@j is there for j = 1, 2, 4, .. samples. stop: asked between batches of problems; where it says
    True there is no result, ({}, []). on_answers: called at the end with the rows, each problem's first
    completion, whether it is right, and its messages where it is a conversation, else None. converse,
    max_context: where an environment answers, (rows, group_size) -> turns.Turns, and the most tokens of a
    row; then completions are transcripts.
    """
    lengths, stopped, texts, parts, talks = [], [], [], [], []
    twin = rewarding.LENIENT.get(functions[0][0])  # without one lenient is strict: nobody runs programs twice
    graded = [*functions, ("lenient", twin, 0.0)] if twin else functions
    for start in range(0, len(rows), AT_ONCE):
        if stop is not None and stop():
            return {}, []
        some = rows[start : start + AT_ONCE]
        prompts = [data.prompt_ids(tokenizer, row["prompt"], system=system, prefill=prefill) for row in some]
        numbers = list(range(start, start + len(some)))
        label = f"evaluating problems {start + 1} to {start + len(some)} of {len(rows)}:"
        turns = converse and converse(some, samples)
        out = sampler.generate(
            prompts, group_size=samples, max_new_tokens=max_new_tokens, stop_ids=stop_ids, seed=seed,
            temperature=0.0 if samples == 1 else temperature, prompt_numbers=numbers, label=label,
            turns=turns, max_context=max_context,
        )  # fmt: skip
        some_texts, some_parts, _ = score_completions(
            tokenizer, some, out.ids, graded, prefill=prefill, max_new_tokens=max_new_tokens,
            reward_messages=reward_messages, timeout=timeout,
            heard=turns and turns.heard(range(len(out.ids))),
        )  # fmt: skip
        lengths += map(len, out.logprobs)
        talks += turns.talks if turns else []
        stopped += out.stopped
        texts += [data.transcript(talk.messages) for talk in turns.talks] if turns else some_texts
        parts.append(some_parts)
    parts = np.concatenate(parts)  # (N * samples, R)
    metrics = summarise(lengths, stopped, parts, functions, samples, has_twin=twin is not None)
    if talks:
        metrics["eval/turns"] = sum(len(talk.said) for talk in talks) / len(talks)
    first = texts[::samples]
    if on_answers is not None:
        messages = [talk.messages for talk in talks[::samples]] or None
        on_answers(rows, first, (parts[::samples, 0] >= 1.0).tolist(), messages)
    return metrics, first


def summarise(lengths, stopped, parts, functions, samples, has_twin) -> dict:
    """The metrics of N * samples completions with reward parts (N * samples, R), the lenient twin's last.

    lengths: drawn tokens.
    """
    N = len(lengths) // samples
    right = parts[:, 0] >= 1.0
    lenient = parts[:, -1] >= 1.0 if has_twin else right
    low, high = wilson(
        right.mean() * N, N
    )  # samples of one problem are not independent: N problems, not N * k
    metrics = {
        "eval/strict": right.mean(),
        "eval/strict_low": low,
        "eval/strict_high": high,
        "eval/lenient": lenient.mean(),
        "eval/mean_length": sum(lengths) / len(lengths),
        "eval/clipped_ratio": 1 - sum(stopped) / len(stopped),
        "eval/problems": N,
    }
    for i, (name, _, _) in enumerate(functions):
        scored = parts[:, i][~np.isnan(parts[:, i])]
        metrics[f"eval/rewards/{name}"] = scored.mean() if len(scored) else float("nan")
    if samples > 1:
        hits = right.reshape(N, samples).sum(1)
        k = 1
        while k <= samples:
            metrics[f"eval/pass@{k}"] = sum(pass_at_k(samples, int(c), k) for c in hits) / N
            k *= 2
    return {key: float(value) for key, value in metrics.items()}


def summary(metrics: dict) -> str:
    """One line: accuracy with its interval, and what else differs."""
    m = {key.removeprefix("eval/"): value for key, value in metrics.items()}
    words = [f"accuracy {m['strict']:.1%} [{m['strict_low']:.1%}, {m['strict_high']:.1%}]"]
    words.append(f"lenient {m['lenient']:.1%}")
    words += [f"{key} {value:.1%}" for key, value in m.items() if key.startswith("pass@")]
    for key, value in m.items():
        if key.startswith("rewards/"):
            words.append(f"{key.removeprefix('rewards/')} {value:.3f}")
    words += [
        f"{m['mean_length']:.0f} tokens",
        f"{m['clipped_ratio']:.1%} cut",
        f"{m['problems']:.0f} problems",
    ]
    words += [f"{m['turns']:.2f} turns"] if "turns" in m else []
    return ", ".join(words)


def first_batch(reward, stopped, texts, rows, lengths, answers, finds, *, temperature, max_new_tokens,
                reasons=None) -> str:  # fmt: skip
    """What training would meet in its first batch, for a person: spread, groups with signal, truncation,
    samples.

    reward (B, G), NaN for None; stopped, texts, lengths (drawn tokens), answers (what was graded: the texts,
    or the last turns of conversations): B * G; rows: B; finds: a function text -> answer or None. reasons: of
    conversations what ended each (turns.Turns.for_people).
    """
    (B, G), flat = reward.shape, reward.reshape(-1)
    limit = f"cut at {max_new_tokens} tokens"
    if reasons is not None:
        of_all = Counter(reason for reason in reasons if reason != "stop")
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(of_all.items()))
        limit = f"cut ({counts or 'none'})"
    spread = [float(row[~row.isnan()].std(correction=0)) if (~row.isnan()).any() else 0.0 for row in reward]
    words = [
        f"a first training batch, {B} prompts x {G} at temperature {temperature:g}: "
        f"mean reward {reward.nanmean():.3f}",
        f"spread within groups {sum(spread) / B:.3f}",
        f"{1 - len(flat_groups(reward)) / B:.0%} of the groups with any signal",
        f"{1 - sum(stopped) / (B * G):.0%} {limit}",
    ]
    if finds:
        lost = sum(finds(text) in (None, "") for text in answers)
        words.append(f"no answer found in {lost / (B * G):.0%}")
    unscored = int(reward.isnan().sum())
    if unscored:
        words.append(f"{unscored} not scored")
    lines = [", ".join(words)]
    for n in dict.fromkeys((0, B * G // 2, B * G - 1)):
        cut = "" if stopped[n] else ", cut"
        if cut and reasons is not None:
            cut += f" ({reasons[n]})"
        lines.append(
            f"--- {rows[n // G]['prompt']}\n{texts[n]}\n(reward {flat[n]:g}, {lengths[n]} tokens{cut})"
        )
    try:
        refuse_hopeless(reward, stopped, max_new_tokens, has_turns=reasons is not None)
    except ValueError as e:
        lines.append(f"train.py would not start: {e}")
    return "\n".join(lines)


# What the graders that look for a form look for (rewards.FINDS), and what else would help.
FORMS = {
    "gsm8k": "#### and then a number, and gsm8k_lenient takes the last number anywhere",
    "gsm8k_lenient": "a number",
    "arithmetic_lenient": "a number",
    "last_number": "a number",
    "math": "\\boxed{..} or <answer>..</answer>",
    "code": "a block between ```python and ```",
}


def missing_form(functions, texts) -> tuple[str, int] | None:
    """(label, completions without an answer) of the trained reward that finds none most often, or None.

    functions: rewards.resolve's list. Only rewards that look for a form have something to find.
    """
    worst = None
    for label, _, weight in functions:
        finds = rewarding.FINDS.get(label)
        if finds and weight:
            lost = sum(finds(text) in (None, "") for text in texts)
            if worst is None or lost > worst[1]:
                worst = label, lost
    return worst


def refuse_hopeless(reward, stopped, max_new_tokens: int, within_groups=True, missing=None,
                    has_turns=False):  # fmt: skip
    """ValueError, with the knob to turn, where nothing can be learnt from a batch.

    reward (B, G), NaN for None; stopped: B * G bools. within_groups: completions are compared within their
    groups, and not by an advantage of the config's own with a baseline from elsewhere. missing: (label,
    share) of a reward that found no answer to grade in this share of the completions. has_turns: they are
    conversations, which more limits cut.
    """
    (B, G), known = reward.shape, reward[~reward.isnan()].tolist()
    go_on = "or go on with --force=True"
    if not any(stopped) and has_turns:
        raise ValueError(
            f"every conversation of the first batch was cut, by max_turns, max_context or max_new_tokens = "
            f"{max_new_tokens}: see which in python eval.py, raise it, let the environment end rows, {go_on}"
        )
    if not any(stopped):
        raise ValueError(
            f"every completion of the first batch was cut at {max_new_tokens} tokens: "
            f"raise max_new_tokens, ask for shorter answers in system_prompt, {go_on}"
        )
    if not known:
        raise ValueError(
            "the rewards could not score one completion of the first batch (all None): "
            f"look at the rows' columns with python eval.py, {go_on}"
        )
    if len(flat_groups(reward)) < B or not within_groups:
        return
    cut = 1 - sum(stopped) / len(stopped)
    if max(known) == min(known) > 0:
        knob = "take harder problems"
    elif missing and missing[1] > max(0.5, cut):  # a form that the model does not know: more room won't help
        label, share = missing
        knob = (
            f"no answer was found in {share:.0%} of the completions, and the reward {label!r} looks for "
            f"{FORMS[label]}: show that form in system_prompt, or warm up with sft_steps"
        )
    elif cut > 0.5:
        knob = "raise max_new_tokens"
    else:
        knob = (
            "take easier problems or a larger group_size, say in system_prompt what the reward wants, "
            "add a reward for part of the way, or warm up with sft_steps"
        )
    raise ValueError(
        f"in the first batch all {G} rewards of each of {B} groups are equal "
        f"(from {min(known):g} to {max(known):g}; {cut:.0%} of the completions cut), "
        f"so every advantage is 0: {knob}, {go_on}"
    )


# --------------------------------------------------------------- what rewards pay for answers that are none
RIGHT, WRONG = "right", "wrong"
TEMPTS = {  # column of the table -> what it is, and what a policy learns that finds out that it pays
    "empty": ("an empty answer", "to say nothing"),
    "question": ("the question repeated", "to repeat the question"),
    "gold": ("the gold answer alone", "not to show its work (no fault where only the answer counts)"),
    "ten": ("ten answers at once", "to list guesses"),
    "nothing": ("10,000 tokens of nothing", "to ramble"),
}
# How answers are marked. Which of them a reward reads is seen from what it pays.
MARKS = (
    "#### {}",
    "\\boxed{{{}}}",
    "The answer is {}.",
    "<answer>{}</answer>",
    "<think>So it is.</think>\n<answer>{}</answer>",
    "```python\n{}\n```",
)
GOLD = ("answer", "ground_truth", "target", "solution", "label")  # columns that may hold a row's answer
ROWS = 4  # of the first batch: enough to see what is paid, and few calls of a slow reward
NOTHING = " so" * 10_000


def gold_of(row: dict) -> str:
    """A row's answer without its work: the first of GOLD's columns that it has; "" where it has none."""
    for name in GOLD:
        if isinstance(row.get(name), (str, int, float)):
            text = str(row[name])
            return text.rpartition("####")[2].strip() or text
    return ""


def ten_guesses(gold: str, others: list[str]) -> list[str]:
    """Ten answers with the right one in the middle: who reads the first or the last finds a wrong one."""
    number = data.only_number(gold)
    if number is not None and abs(number) < 10**15:
        guesses = [f"{number + i:f}" for i in range(1, 10)]
    else:
        guesses = [*"01234", *dict.fromkeys(other for other in others if other != gold), *"56789"]
    return [*guesses[:5], gold, *guesses[5:9]]


def probes_of(row: dict, others: list[str]) -> list[tuple[str, str]]:
    """(column, text) of all that is tried on a row. Every row gets as many, in the same order.

    others: answers of other rows.
    """
    gold = gold_of(row)
    guesses = ten_guesses(gold, others)
    probes = [("empty", ""), ("question", data.prompt_text(row["prompt"])), ("gold", gold)]
    probes += [("ten", " ".join(guesses)), ("ten", ", ".join(guesses)), ("nothing", NOTHING)]
    solution = row.get("solution")
    probes += [(RIGHT, solution if isinstance(solution, str) else gold), (WRONG, guesses[-1])]
    for mark in MARKS:
        probes.append((RIGHT, mark.format(gold)))
        probes.append((WRONG, mark.format(guesses[-1])))
        probes.append(("ten", "\n".join(mark.format(guess) for guess in guesses)))
        probes.append(("ten", mark.format(", ".join(guesses))))
    return probes


def pays(tokenizer, rows, functions, columns, *, prefill, max_new_tokens, reward_messages, timeout) -> dict:
    """Column -> (R + 1,): what each reward, and all together, pay for it, the mean over rows, NaN for None.

    columns: which are tried. Of several texts in one column the best counts.
    """
    golds = [gold_of(row) for row in rows]
    probes = [probe for row in rows for probe in probes_of(row, golds) if probe[0] in columns]
    K = len(probes) // len(rows)
    texts = [prefill + text.removeprefix(prefill) for _, text in probes]
    parts, reward = rewarding.score(
        functions,
        texts,
        [row["prompt"] for row in rows for _ in range(K)],
        data.columns(rows, K),
        group_size=K,
        completion_ids=[ids_of(tokenizer, text) for text in texts],
        max_new_tokens=max_new_tokens,
        reward_messages=reward_messages,
        timeout=timeout,
        state=rewarding.TrainerState(),
        logged=rewarding.Logged(len(texts)),
    )
    paid = np.column_stack([parts, reward]).reshape(len(rows), K, -1)
    names = [name for name, _ in probes[:K]]
    found = {}
    for column in columns:
        of_column = [i for i, name in enumerate(names) if name == column]
        found[column] = nan_mean(nan_max(paid[:, of_column]))
    return found


def ids_of(tokenizer, text: str) -> list[int]:
    """A text's ids; one for each character where the tokenizer does not know them all."""
    if text.endswith(NOTHING):
        return [0] * 10_000
    try:
        return data.encode(tokenizer, text)
    except ValueError:
        return [0] * len(text)


def nan_max(values):
    """Over axis 1; NaN only where all are."""
    highest = np.where(np.isnan(values), -np.inf, values).max(1)
    return np.where(np.isinf(highest), np.nan, highest)


def nan_mean(values):
    """Over axis 0, of those that are not NaN."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def lint(tokenizer, rows, functions, **options) -> str:
    """A table of what each reward pays for answers that are none, and warnings where that is too much.

    functions: rewards.resolve's list; options: rewards.score_completions's keywords.
    """
    rows = rows[:ROWS]
    has_gold = all(gold_of(row) for row in rows)
    columns = [*([RIGHT, WRONG] if has_gold else []), *TEMPTS]
    try:
        paid = pays(tokenizer, rows, functions, columns, **options)
    except rewarding.RewardError:
        return what_fails(tokenizer, rows, functions, columns, options)
    labels = [label for label, _, _ in functions]
    labels += ["all together"] if len(functions) > 1 else []
    width = max(map(len, labels))
    heading = "".join(f"{column:>10}" for column in columns)
    lines = [f"what the rewards pay, the mean over {len(rows)} prompts:", " " * (width + 2) + heading]
    for i, label in enumerate(labels):
        cells = ["none" if np.isnan(paid[column][i]) else f"{paid[column][i]:.3f}" for column in columns]
        lines.append(f"  {label:{width}}" + "".join(f"{cell:>10}" for cell in cells))
    if not has_gold:
        lines.append(
            f"what a right answer earns is not known: the rows have none of the columns {', '.join(GOLD)}"
        )
        return "\n".join(lines)
    for i, label in enumerate(labels):
        is_trained_on = i == len(functions) or functions[i][2] > 0
        of_reward = {column: float(paid[column][i]) for column in columns}
        # A reward for the form or the length alone grades nothing. It must not outweigh those that do.
        if is_trained_on and (i == len(labels) - 1 or of_reward[RIGHT] > of_reward[WRONG]):
            lines += warnings_of(label, of_reward)
    return "\n".join(lines)


def warnings_of(label: str, paid: dict) -> list[str]:
    """A line for each column that earns as much as a right answer, or is not scored where a right one is."""
    right = paid[RIGHT]
    lines = []
    if paid[WRONG] >= right:
        lines.append(
            f"warning: {label} pays {paid[WRONG]:.3f} for a wrong answer and {right:.3f} for a right one"
        )
    for column, (what, lesson) in TEMPTS.items():
        kind = "note" if column == "gold" else "warning"
        if paid[column] >= right:
            sums = f"{paid[column]:.3f} for {what} and {right:.3f} for a right one"
            lines.append(f"{kind}: {label} pays {sums}: a policy may learn {lesson}")
        elif np.isnan(paid[column]) and not np.isnan(right):
            lines.append(f"warning: {label} cannot score {what} (None), so that goes unpunished")
    return lines


def what_fails(tokenizer, rows, functions, columns, options) -> str:
    """What a reward raises, and for which of the columns."""
    lines = []
    for column in columns:
        try:
            pays(tokenizer, rows, functions, [column], **options)
        except rewarding.RewardError as e:
            what = TEMPTS[column][0] if column in TEMPTS else f"a {column} answer"
            lines.append(f"warning: {what} would stop a run: {e}")
    return "\n".join(
        lines or ["warning: the rewards fail on some of several texts, and on none of them alone"]
    )
