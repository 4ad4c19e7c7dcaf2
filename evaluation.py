"""How good a model is on held-out problems, and whether a first batch has anything to learn from.

A completion is right when the config's first reward gives it 1 or more; leniently right, when that reward's
lenient twin does (rewards.LENIENT), so the two differ by those who know the answer and not the form.
train.py calls `evaluate` before, during and after; eval.py is the script.

Dims: B prompts of a batch, G completions a prompt; N problems, k samples of each.
"""

import math

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
             samples=1, temperature=1.0, seed=0, reward_messages=False, timeout=None, stop=None):  # fmt: skip
    """Metrics (a dict: eval/strict, eval/lenient, ..) and each problem's first completion, on rows of a task.

    functions: rewards.resolve's list; every reward's mean is reported, whatever its weight. One sample is
    drawn greedily, several at `temperature`; then strict and lenient are means over samples (pass@1) and
    eval/pass@j is there for j = 1, 2, 4, .. samples. stop: asked between batches of problems; where it says
    True there is no result, ({}, []).
    """
    ids, stopped, texts, parts = [], [], [], []
    twin = rewarding.LENIENT.get(functions[0][0])  # without one lenient is strict: nobody runs programs twice
    graded = [*functions, ("lenient", twin, 0.0)] if twin else functions
    for start in range(0, len(rows), AT_ONCE):
        if stop is not None and stop():
            return {}, []
        some = rows[start : start + AT_ONCE]
        prompts = [data.prompt_ids(tokenizer, row["prompt"], system=system, prefill=prefill) for row in some]
        numbers = list(range(start, start + len(some)))
        out = sampler.generate(
            prompts, group_size=samples, max_new_tokens=max_new_tokens, stop_ids=stop_ids, seed=seed,
            temperature=0.0 if samples == 1 else temperature, prompt_numbers=numbers, label="evaluating",
        )  # fmt: skip
        some_texts, some_parts, _ = score_completions(
            tokenizer, some, out.ids, graded, prefill=prefill, max_new_tokens=max_new_tokens,
            reward_messages=reward_messages, timeout=timeout,
        )  # fmt: skip
        ids += out.ids
        stopped += out.stopped
        texts += some_texts
        parts.append(some_parts)
    parts = np.concatenate(parts)  # (N * samples, R)
    metrics = summarise(ids, stopped, parts, functions, samples, has_twin=twin is not None)
    return metrics, texts[::samples]


def summarise(ids, stopped, parts, functions, samples, has_twin) -> dict:
    """The metrics of N * samples completions with reward parts (N * samples, R), the lenient twin's last."""
    N, lengths = len(ids) // samples, [len(completion) for completion in ids]
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
    return ", ".join(words)


def first_batch(reward, stopped, texts, rows, ids, finds, *, temperature, max_new_tokens) -> str:
    """What training would meet in its first batch, for a person: spread, groups with signal, truncation,
    samples.

    reward (B, G), NaN for None; stopped, texts, ids: B * G; rows: B; finds: a
    function text -> answer or None.
    """
    (B, G), flat = reward.shape, reward.reshape(-1)
    spread = [float(row[~row.isnan()].std(correction=0)) if (~row.isnan()).any() else 0.0 for row in reward]
    words = [
        f"a first training batch, {B} prompts x {G} at temperature {temperature:g}: "
        f"mean reward {reward.nanmean():.3f}",
        f"spread within groups {sum(spread) / B:.3f}",
        f"{1 - len(flat_groups(reward)) / B:.0%} of the groups with any signal",
        f"{1 - sum(stopped) / (B * G):.0%} cut at {max_new_tokens} tokens",
    ]
    if finds:
        lost = sum(finds(text) in (None, "") for text in texts)
        words.append(f"no answer found in {lost / (B * G):.0%}")
    unscored = int(reward.isnan().sum())
    if unscored:
        words.append(f"{unscored} not scored")
    lines = [", ".join(words)]
    for n in dict.fromkeys((0, B * G // 2, B * G - 1)):
        cut = "" if stopped[n] else ", cut"
        lines.append(
            f"--- {rows[n // G]['prompt']}\n{texts[n]}\n(reward {flat[n]:g}, {len(ids[n])} tokens{cut})"
        )
    try:
        refuse_hopeless(reward, stopped, max_new_tokens)
    except ValueError as e:
        lines.append(f"train.py would not start: {e}")
    return "\n".join(lines)


def refuse_hopeless(reward, stopped, max_new_tokens: int, own_baseline: bool = False):
    """ValueError, with the knob to turn, where nothing can be learnt from a batch.

    reward (B, G), NaN for None; stopped: B * G bools. own_baseline: the advantage compares with something
    else than the group, so that equal rewards may teach.
    """
    (B, G), known = reward.shape, reward[~reward.isnan()].tolist()
    go_on = "or go on with --force=True"
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
    if own_baseline or len(flat_groups(reward)) < B:
        return
    cut = 1 - sum(stopped) / len(stopped)
    if max(known) == min(known) > 0:
        knob = "take harder problems"
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
