"""Sharded runs (FSDP2) on several processes beside the same run on one: the same ids, groups and weights."""

import dataclasses

import pytest
import torch

import train
from conftest import rows, weights
from test_ranks import CASES, case, on

pytestmark = pytest.mark.slow

LORA = dict(lora_rank=4, lora_alpha=8.0)
KEYS = {
    "full": dict(steps=20, beta=0.1, save_every=10),
    "lora": dict(steps=5, beta=0.1, lora_dropout=0.2, **LORA),
    "updates": dict(minibatches=2, epochs=2, mismatch_clip=2.0, checkpointing="layers"),
    "reference": dict(beta=0.1, kl="full", ref_sync_every=1),
    "sft": dict(sft_steps=3, sft_batch=4, eval_every=2, eval_problems=2),
    "bf16": dict(dtype="bfloat16", checkpointing="light"),
}
CASES |= {f"{name}, whole": case(**keys) for name, keys in KEYS.items()}
CASES |= {f"{name}, sharded": case(shard=True, **keys) for name, keys in KEYS.items()}


def prints(folder) -> list[str]:
    return [row["fingerprint"][:8] for row in rows(folder / "run" / "metrics.jsonl")]


def last(folder) -> dict:
    return weights(sorted((folder / "run" / "ckpt").iterdir())[-1])


@pytest.mark.parametrize(
    "name, processes",
    [("full", 2), ("full", 4), ("lora", 2), ("updates", 2), ("reference", 2), ("sft", 2)],
)
def test_a_sharded_run_is_the_run_of_one_process(tmp_path, name, processes):
    out = on(processes, tmp_path, f"{name}, sharded")
    assert out.returncode == 0, out.stdout + out.stderr
    assert "Warning" not in out.stderr
    assert f"sharded over {processes} processes" in out.stdout
    assert train.main(CASES[f"{name}, whole"](tmp_path / "one")) == 0
    assert prints(tmp_path / "several") == prints(tmp_path / "one")
    one, several = last(tmp_path / "one"), last(tmp_path / "several")
    assert one.keys() == several.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(several[key], tensor, rtol=1e-4, atol=1e-6)
