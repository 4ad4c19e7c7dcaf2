"""How good a model is on held-out problems: greedy accuracy, strict and lenient, or
pass@k, each with its interval.

    python eval.py configs/gsm8k.py --model=Qwen/Qwen2.5-0.5B-Instruct --eval_problems=1319
    python eval.py configs/gsm8k.py --model=out/gsm8k/ckpt/step_000500 --eval_samples=8

It is also the check before a run: it samples one step's batch of training prompts and shows what GRPO would
learn from, and what it would trip over. And it shows what the rewards pay for an empty answer, the question
repeated, the gold answer alone, ten answers at once and 10,000 tokens of nothing, with a warning where that
is as much as for a right answer.
"""

import progress

if __name__ == "__main__":  # the imports below take seconds, and Ctrl-C is one sentence from here on
    progress.begin("eval.py")

import sys

import torch

import checks
import config as configs
import data
import rewards as rewarding
from evaluation import evaluate, first_batch, lint, summary
from policy import load_policy, pick_device
from rollout import Sampler
from turns import Conversations, resolve


def show_first_batch(sampler, tokenizer, task, functions, cfg, stop_ids, conversations=None) -> str:
    """Samples and scores one training batch as train.py's first step would, and describes it."""
    rows = task.batch(0, cfg.prompts_per_step, cfg.seed)
    prompts = []
    for row in rows:
        prompts.append(
            data.prompt_ids(tokenizer, row["prompt"], system=cfg.system_prompt, prefill=cfg.prefill)
        )
    sampling = configs.sampling_options(cfg, step=1)
    turns = conversations and conversations.begin(rows, cfg.group_size)
    out = sampler.generate(
        prompts, group_size=cfg.group_size, max_new_tokens=cfg.max_new_tokens, stop_ids=stop_ids,
        seed=cfg.seed, step=1, turns=turns, max_context=cfg.max_context, **sampling,
    )  # fmt: skip
    heard = turns and turns.heard(range(len(out.ids)))
    texts, _, reward = rewarding.score_completions(
        tokenizer, rows, out.ids, functions, heard=heard, **configs.reward_options(cfg)
    )
    reward = torch.from_numpy(reward).view(len(rows), cfg.group_size)
    finds = rewarding.FINDS.get(functions[0][0])
    lengths = [len(drawn) for drawn in out.logprobs]
    answers = heard["completions"] if heard else texts
    reasons = None
    if turns:
        texts = [data.transcript(talk.messages) for talk in turns.talks]
        reasons = [shown["finish_reason"] for shown in turns.for_people(out, cfg.max_new_tokens)]
    return first_batch(
        reward, out.stopped, texts, rows, lengths, answers, finds, temperature=sampling["temperature"],
        max_new_tokens=cfg.max_new_tokens, reasons=reasons,
    )  # fmt: skip


def main(cfg):
    device, dtype = pick_device(cfg.device, cfg.dtype, cfg.threads)
    functions = rewarding.resolve(cfg.rewards)
    if not functions:
        raise ValueError("rewards = [] has nothing to grade answers with: give --rewards=gsm8k, for example")
    rewarding.check_sandbox(functions, cfg.sandbox, resolve(cfg.env))
    task = data.load_task(cfg.task, **configs.task_options(cfg))
    checks.columns(cfg, functions, task)
    with progress.doing(f"loading the model {configs.model_name(cfg)}"):
        model, tokenizer, stop_ids, _ = load_policy(
            cfg.model, adapter=cfg.adapter, scratch=cfg.scratch, alphabet=cfg.alphabet, seed=cfg.seed,
            dtype=dtype, device=device, base=cfg.base,
        )  # fmt: skip
    sampler = Sampler(model, slots=cfg.slots, cuda_graphs=cfg.cuda_graphs)
    conversations = None
    if cfg.env:
        options = configs.turn_options(cfg)
        conversations = Conversations(resolve(cfg.env), tokenizer, stop_ids=stop_ids, **options)
    print(show_first_batch(sampler, tokenizer, task, functions, cfg, stop_ids, conversations))
    rows = task.batch(0, cfg.prompts_per_step, cfg.seed)
    if not conversations:  # which the lint's texts are none of
        print(lint(tokenizer, rows, functions, **configs.reward_options(cfg)))
    rows = task.eval[: cfg.eval_problems]
    options = configs.evaluation_options(cfg)
    options["converse"] = conversations and conversations.begin
    metrics, _ = evaluate(sampler, tokenizer, rows, functions, stop_ids=stop_ids, **options)
    print(f"{cfg.model} on {configs.task_name(cfg)}: {summary(metrics)}")


if __name__ == "__main__":
    try:
        cfg = checks.config_of("eval.py", sys.argv[1:])
        with progress.doing("preparing the evaluation", drawn=False):
            main(cfg)
    except (
        ValueError,
        rewarding.RewardError,
        FloatingPointError,
        OSError,
        ImportError,
    ) as e:  # SandboxError too
        sys.exit(f"eval.py: {e}")
