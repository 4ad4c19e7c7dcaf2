"""Our metrics beside those that TRL logs, of the same completions and rewards; and docs/metrics.md names all.

Run: python -m pytest -m slow tests/test_metrics.py
"""

import re

import numpy as np
import pytest
import torch

import log
import model as models
import rewards as rewarding
import train
from batch import Scores
from conftest import ROOT, TINY, rows, settings
from test_step import tokenizer

B, G, C = 6, 4, 14


def variety(completion_ids, prompts, **_):
    """None for every ninth completion or so, and all equal in the first group."""
    scores = [None if sum(ids) % 9 == 0 else float(len(set(ids))) for ids in completion_ids]
    return [1.0 if prompt.startswith("w2 ") else score for prompt, score in zip(prompts, scores)]


def length(completion_ids, prompts, **_):
    longer = [float(len(ids) >= 4) for ids in completion_ids]
    return [0.0 if prompt.startswith("w2 ") else score for prompt, score in zip(prompts, longer)]


REWARDS = [(variety, 0.3), (length, 1.0)]


def trl_step(folder):
    """(completions in TRL's order, prompts, what it logged) of one GRPO step of a tiny random Llama."""
    grpo = pytest.importorskip("trl")
    from datasets import Dataset

    tiny = models.create(dict(TINY, initializer_range=0.15, architectures=["LlamaForCausalLM"]), seed=0)
    models.save(tiny, str(folder / "base"))
    seen = {}

    class Trainer(grpo.GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids, *more):
            seen.update(prompts=list(prompts), ids=[list(map(int, ids)) for ids in completion_ids])
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids, *more)

    config = grpo.GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=B * G,
        num_generations=G,
        max_completion_length=C,
        max_steps=1,
        temperature=0.9,
        logging_steps=1,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        reward_weights=[weight for _, weight in REWARDS],
        seed=2,
    )
    trainer = Trainer(
        str(folder / "base"),
        args=config,
        processing_class=tokenizer(),
        reward_funcs=[function for function, _ in REWARDS],
        train_dataset=Dataset.from_dict(dict(prompt=[f"w{7 * i + 2} w{i + 3}" for i in range(B)])),
    )
    trainer.train()
    return seen["prompts"], seen["ids"], trainer.state.log_history[0]


def our_metrics(folder, prompts, completions) -> dict:
    """log.py's metrics of these completions, scored by rewards.py, with entropies from model.py."""
    rewards = rewarding.resolve(REWARDS)
    columns = dict(group_size=G, completion_ids=completions)
    parts, reward = rewarding.score(rewards, [""] * B * G, prompts, {}, **columns)
    words = tokenizer()
    groups = [completions[b * G : b * G + G] for b in range(B)]
    assert all(len(set(prompts[b * G : b * G + G])) == 1 for b in range(B))
    ids = [words(prompts[b * G])["input_ids"] for b in range(B)]
    with torch.no_grad():
        model = models.load(str(folder / "base"))
        _, entropy, _ = model.completion_logprobs(ids, groups, temperature=0.9)
    lengths = [len(row) for row in completions]
    scores = Scores(
        prompts=prompts[::G],
        parts=torch.from_numpy(parts).view(B, G, -1),
        rewards=torch.from_numpy(reward).view(B, G),
        lengths=lengths,
        stopped=[row[-1] == words.eos_token_id for row in completions],
        entropy=[float(row.sum()) for row in entropy.split(lengths)],
    )
    return log.reward_metrics(scores, rewards) | log.completion_metrics(scores)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_metrics_are_trls_of_the_same_completions_and_rewards(tmp_path):
    """reward_std was the mean of the groups' stds, rewards/NAME/std divided by n, and entropy was over the
    tokens that were trained on.
    """
    prompts, completions, theirs = trl_step(tmp_path)
    ours = our_metrics(tmp_path, prompts, completions)
    compared = set()
    for name, value in ours.items():
        if name in theirs:
            assert value == pytest.approx(theirs[name], rel=2e-5, abs=1e-6), name
            compared.add(name)
    assert ours.keys() - compared == {"reward_spread", "reward_failures"}  # which TRL does not have
    # The rollouts were such that the metrics differ from one another.
    assert 0 < ours["frac_reward_zero_std"] < 1 and 0 < ours["completions/clipped_ratio"] < 1
    assert ours["reward_failures"] > 0 and ours["reward_std"] != pytest.approx(ours["reward_spread"])
    assert np.ptp([len(ids) for ids in completions]) > 3


def test_the_page_of_metrics_names_what_a_run_writes(tmp_path):
    cfg = settings(tmp_path, steps=2, beta=0.1, resample_zero_groups=True, eval_every=2, eval_problems=2)
    assert train.main(cfg) == 0
    page = (ROOT / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"`([\w/@.]+)`", "\n".join(re.findall(r"^\|(.*?)\|", page, re.M))))
    written = {key for row in rows(tmp_path / "run" / "metrics.jsonl") for key in row}
    written = {re.sub(r"(?<=rewards/)\w+", "NAME", key) for key in written}
    assert written <= named, written - named
