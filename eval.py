"""How good a model is on held-out problems: greedy accuracy, strict and lenient, or pass@k, each with its interval.

    python eval.py configs/gsm8k.py --model=Qwen/Qwen2.5-0.5B-Instruct --eval_problems=1319
    python eval.py configs/gsm8k.py --model=out/gsm8k/ckpt/step_000500 --eval_samples=8

It is also the check before a run: it samples one step's batch of training prompts and shows what GRPO would learn from, and what it would trip over.

A completion is right when the config's first reward gives it 1 or more; leniently right, when that reward's lenient twin does
(rewards.LENIENT), so the two differ by those who know the answer and not the form. train.py calls `evaluate` before, during and after.

Dims: N problems, k samples of each.
"""
import math
import sys

import torch

import config as configs
import data
import rewards as rewarding
import rollout
import sandbox
from sample import load_policy, pick_device


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion right / n: Wilson's score interval (1927), which stays inside 0..1 and is honest at 0 and at n."""
    p, zz = right / n, z * z / n
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return (middle - half) / (1 + zz), (middle + half) / (1 + zz)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples is right, when c of n were: unbiased (Eq. 1, arXiv:2107.03374)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def score_completions(tokenizer, rows, ids, functions, *, prefill, max_new_tokens, reward_messages, timeout):
    """Texts, reward parts (n, R) and rewards (n,), NaN for None, of n completions `ids`, as many of each row; functions: rewards.resolve's list."""
    G = len(ids) // len(rows)
    texts = [prefill + text for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return texts, *rewarding.score(functions, texts, [row["prompt"] for row in rows for _ in range(G)], data.columns(rows, G), group_size=G, completion_ids=ids,
                                   max_new_tokens=max_new_tokens, reward_messages=reward_messages, timeout=timeout)


def evaluate(model, tokenizer, rows, functions, *, stop_ids, max_new_tokens, system="", prefill="", samples=1, temperature=1.0, slots=None,
             cuda_graphs=True, seed=0, reward_messages=False, timeout=None):
    """Metrics (a dict: eval/strict, eval/lenient, ..) and, for each problem, its first completion, on rows of a task.

    functions: rewards.resolve's list; every reward's mean is reported, whatever its weight. One sample is drawn greedily, several at
    `temperature`, and then strict and lenient are means over samples (pass@1) and eval/pass@j is there for j = 1, 2, 4, .. samples.
    """
    prompts = [data.prompt_ids(tokenizer, row["prompt"], system=system, prefill=prefill) for row in rows]
    out = rollout.generate(model, prompts, group_size=samples, max_new_tokens=max_new_tokens, stop_ids=stop_ids, slots=slots, cuda_graphs=cuda_graphs, seed=seed,
                           temperature=0.0 if samples == 1 else temperature, label="evaluating")
    twin = rewarding.LENIENT.get(functions[0][0])  # where there is none lenient is strict: nobody runs programs, or asks a judge, twice
    graded = [*functions, ("lenient", twin, 0.0)] if twin else functions
    texts, parts, _ = score_completions(tokenizer, rows, out.ids, graded, prefill=prefill, max_new_tokens=max_new_tokens, reward_messages=reward_messages, timeout=timeout)
    right, lenient = parts[:, 0] >= 1.0, parts[:, -1 if twin else 0] >= 1.0
    N, lengths = len(rows), [len(ids) for ids in out.ids]
    low, high = wilson(right.mean() * N, N)  # samples of one problem are not independent: the interval is that of N problems
    metrics = {"eval/strict": right.mean(), "eval/strict_low": low, "eval/strict_high": high, "eval/lenient": lenient.mean(),
               "eval/mean_length": sum(lengths) / len(lengths), "eval/clipped_ratio": 1 - sum(out.stopped) / len(out.stopped), "eval/problems": N}
    for i, (name, _, _) in enumerate(functions):
        scored = parts[:, i][parts[:, i] == parts[:, i]]  # without None
        metrics[f"eval/rewards/{name}"] = scored.mean() if len(scored) else float("nan")
    k = 1
    while samples > 1 and k <= samples:
        metrics[f"eval/pass@{k}"] = sum(pass_at_k(samples, int(c), k) for c in right.reshape(N, samples).sum(1)) / N
        k *= 2
    return {key: float(value) for key, value in metrics.items()}, texts[::samples]


def summary(metrics: dict) -> str:
    """One line: accuracy with its interval, and what else differs."""
    m = {key.removeprefix("eval/"): value for key, value in metrics.items()}
    line = f"accuracy {m['strict']:.1%} [{m['strict_low']:.1%}, {m['strict_high']:.1%}], lenient {m['lenient']:.1%}"
    line += "".join(f", {key} {value:.1%}" for key, value in m.items() if key.startswith("pass@"))
    line += "".join(f", {key.removeprefix('rewards/')} {value:.3f}" for key, value in m.items() if key.startswith("rewards/"))
    return line + f", {m['mean_length']:.0f} tokens, {m['clipped_ratio']:.1%} cut, {m['problems']:.0f} problems"


def first_batch(model, tokenizer, task, functions, cfg, stop_ids) -> str:
    """What training would meet in its first batch: truncation, answers that can't be found, spread of rewards, groups with signal, three rollouts."""
    B, G, rows = cfg.prompts_per_step, cfg.group_size, task.batch(0, cfg.prompts_per_step, cfg.seed)
    prompts = [data.prompt_ids(tokenizer, row["prompt"], system=cfg.system_prompt, prefill=cfg.prefill) for row in rows]
    out = rollout.generate(model, prompts, group_size=G, max_new_tokens=cfg.max_new_tokens, stop_ids=stop_ids, **sampled_from(cfg), slots=cfg.slots,
                           seed=cfg.seed, step=1, cuda_graphs=cfg.cuda_graphs)
    texts, _, reward = score_completions(tokenizer, rows, out.ids, functions, prefill=cfg.prefill, max_new_tokens=cfg.max_new_tokens,
                                         reward_messages=cfg.reward_messages, timeout=cfg.reward_timeout)
    reward, finds = torch.from_numpy(reward).view(B, G), rewarding.FINDS.get(functions[0][0])
    spread = [float(row[~row.isnan()].std(correction=0)) if (~row.isnan()).any() else 0.0 for row in reward]
    lines = [f"a first training batch, {B} prompts x {G} at temperature {cfg.temperature:g}: mean reward {reward.nanmean():.3f}, spread within groups {sum(spread) / B:.3f}, "
             f"{1 - len(flat_groups(reward)) / B:.0%} of the groups with any signal, {1 - sum(out.stopped) / (B * G):.0%} cut at {cfg.max_new_tokens} tokens"]
    if finds:
        lines[0] += f", no answer found in {sum(finds(text) in (None, '') for text in texts) / (B * G):.0%}"
    if unscored := int(reward.isnan().sum()):
        lines[0] += f", {unscored} not scored"
    for n in dict.fromkeys((0, B * G // 2, B * G - 1)):
        lines.append(f"--- {rows[n // G]['prompt']}\n{texts[n]}\n(reward {reward.view(-1)[n]:g}, {len(out.ids[n])} tokens{'' if out.stopped[n] else ', cut'})")
    try:
        refuse_hopeless(reward, out.stopped, cfg.max_new_tokens)
    except ValueError as e:
        lines.append(f"train.py would not start: {e}")
    return "\n".join(lines)


def flat_groups(rewards) -> list[int]:
    """Groups of rewards (B, G) that teach nothing: all equal, or none scored. By their spread, not their mean: rewards need not be 0 and 1."""
    groups = [[r for r in group if r == r] for group in rewards.tolist()]
    return [b for b, group in enumerate(groups) if not group or max(group) == min(group)]


def refuse_hopeless(rewards, stopped, max_new_tokens: int):
    """ValueError, with the knob to turn, where nothing can be learnt from a batch: rewards (B, G), NaN for None; stopped, N bools."""
    (B, G), known = rewards.shape, rewards[~rewards.isnan()].tolist()
    go_on = "or go on with --force=True"
    if not any(stopped):
        raise ValueError(f"every completion of the first batch was cut at {max_new_tokens} tokens: raise max_new_tokens, ask for shorter answers in system_prompt, {go_on}")
    if not known:
        raise ValueError(f"the rewards could not score one completion of the first batch (all None): look at the rows' columns with python eval.py, {go_on}")
    if len(flat_groups(rewards)) == B:
        cut = 1 - sum(stopped) / len(stopped)
        knob = ("take harder problems" if max(known) == min(known) > 0 else "raise max_new_tokens" if cut > 0.5 else
                "take easier problems or a larger group_size, say in system_prompt what the reward wants, add a reward for part of the way, or warm up with sft_steps")
        raise ValueError(f"in the first batch all {G} rewards of each of {B} groups are equal (from {min(known):g} to {max(known):g}; {cut:.0%} of the "
                         f"completions cut), so every advantage is 0: {knob}, {go_on}")


def sampled_from(cfg) -> dict:
    """What a Config says of the distribution that training samples from, and scores on."""
    return dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, min_p=cfg.min_p)


def options(cfg) -> dict:
    """The keyword arguments of `evaluate` that a Config gives."""
    return dict(max_new_tokens=cfg.eval_max_new_tokens or cfg.max_new_tokens, system=cfg.system_prompt, prefill=cfg.prefill, samples=cfg.eval_samples,
                temperature=cfg.eval_temperature, slots=cfg.slots, cuda_graphs=cfg.cuda_graphs, seed=cfg.seed, reward_messages=cfg.reward_messages, timeout=cfg.reward_timeout)


def runs_code(functions) -> bool:
    """Whether one of rewards.resolve's functions runs what the model wrote."""
    return any(rewarding.name_of(function) == "code" for _, function, _ in functions)


def load_task(cfg):
    """The task of a Config. SandboxError where its rewards run code, and this machine cannot isolate it as the config wants."""
    if cfg.sandbox == "strict" and runs_code(rewarding.resolve(cfg.rewards)):
        sandbox.isolation(strict=True)
    return data.load_task(cfg.task, data_dir=cfg.data_dir, seed=cfg.seed, train_file=cfg.train_file or None, eval_file=cfg.eval_file or None,
                          eval_problems=cfg.eval_problems, **cfg.task_options)


def main(cfg):
    device, dtype = pick_device(cfg.device, cfg.dtype, cfg.threads)
    task, functions = load_task(cfg), rewarding.resolve(cfg.rewards)
    model, tokenizer, stop_ids, _ = load_policy(cfg.model, adapter=cfg.adapter, scratch=cfg.scratch, alphabet=cfg.alphabet, seed=cfg.seed, dtype=dtype, device=device)
    print(first_batch(model, tokenizer, task, functions, cfg, stop_ids))
    rows = task.eval[: cfg.eval_problems]
    metrics, _ = evaluate(model, tokenizer, rows, functions, stop_ids=stop_ids, **options(cfg))
    print(f"{cfg.model} on {cfg.task}: {summary(metrics)}")


if __name__ == "__main__":
    try:
        main(configs.load(sys.argv[1:]))
    except (ValueError, rewarding.RewardError) as e:  # SandboxError too
        sys.exit(f"eval.py: {e}")
