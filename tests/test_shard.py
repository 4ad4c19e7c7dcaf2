"""Sharded runs (FSDP2) on several processes beside the same run on one: the same ids, groups and weights."""

import json

import pytest
import torch

import model as models
import ranks
import run
import train
from conftest import rows, weights
from fingerprint import hash_of_weights
from test_ranks import CASES, case, dies_on_rank_1, on

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


class CountsWhatIsHeld(run.Run):
    """Writes the bytes that each rank holds between steps into a file of its own."""

    def weights_hash(self):
        held = dict(weights=0, moments=0)
        for param in self.model.parameters():
            held["weights"] += param.to_local().untyped_storage().nbytes()
        for moments in self.optimizer.adamw.state.values():
            held["moments"] += moments["exp_avg"].nbytes + moments["exp_avg_sq"].nbytes
        held["sampler"] = sum(p.nbytes for p in self.samples.parameters() if p.device.type != "meta")
        (self.out / f"held_{ranks.rank()}.json").write_text(json.dumps(held))
        return super().weights_hash()


def counting(folder):
    train.Run = CountsWhatIsHeld
    return case(shard=True)(folder)


def at_the_third_loss(change):
    """A case in which rank 1 meets something in the third micro-batch of a run."""

    def of(folder):
        real, calls = train.policy_head, []

        def policy_head(*arguments, **keywords):
            calls.append(1)
            loss, entropy, stats = real(*arguments, **keywords)
            if ranks.rank() == 1 and len(calls) == 3:
                loss = change(loss)
            return loss, entropy, stats

        train.policy_head = policy_head
        return case(shard=True, micro_tokens=1000, beta=0.1)(folder)

    return of


def out_of_memory(loss):
    raise RuntimeError("no memory for 3 GB")


def resumed(steps, **keys):
    return case(steps=steps, resume=True, **keys)


CASES |= {
    "counting": counting,
    "a loss that is none": at_the_third_loss(lambda loss: loss * float("nan")),
    "out of memory": at_the_third_loss(out_of_memory),
    "a killed process, sharded": case(rewards=[(dies_on_rank_1, 1.0)], save_every=1, shard=True),
}
for steps in (3, 5, 8):
    CASES[f"sharded, fp32, {steps} steps"] = resumed(steps, shard=True)
    CASES[f"sharded, bf16, {steps} steps"] = resumed(steps, shard=True, dtype="bfloat16")
CASES |= {f"{name}, whole": case(**keys) for name, keys in KEYS.items()}
CASES |= {f"{name}, sharded": case(shard=True, **keys) for name, keys in KEYS.items()}


def prints(folder, half=slice(0, 8)) -> list[str]:
    """The hashes of a run's steps: of what was drawn, or of the weights."""
    found = rows(folder / "run" / "metrics.jsonl")
    return [row["fingerprint"][half] for row in found if "fingerprint" in row]  # others are evaluations


def close(name, found, wanted):
    """Weights to 1e-6; Adam's moments, which are of any size, relatively."""
    relative = 1e-4 if name.startswith("optimizer") else 0.0
    torch.testing.assert_close(found, wanted, rtol=relative, atol=1e-6, msg=lambda m: f"{name}: {m}")


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
        close(key, several[key], tensor)
    if "lora" not in name:
        # The hash that four parts add up to is that of the whole weights, as they were saved.
        folder = sorted((tmp_path / "several/run/ckpt").iterdir())[-1]
        whole = hash_of_weights(list(enumerate(models.load(str(folder)).parameters())))
        assert whole == int(prints(tmp_path / "several", slice(8, 16))[-1], 16)


def test_a_sharded_bf16_run_keeps_fp32_masters_and_is_that_of_one_process_within_rounding(tmp_path):
    out = on(2, tmp_path, "bf16, sharded")
    assert out.returncode == 0, out.stdout + out.stderr
    assert train.main(CASES["bf16, whole"](tmp_path / "one")) == 0
    assert prints(tmp_path / "several")[0] == prints(tmp_path / "one")[0]
    one, several = last(tmp_path / "one"), last(tmp_path / "several")
    assert {key: t.dtype for key, t in one.items()} == {key: t.dtype for key, t in several.items()}
    moved = 0.0
    for key, tensor in one.items():
        if key.startswith("optimizer.safetensors:master."):
            # three steps of Adam move a number by 3 * lr = 3e-4 at most
            difference = (several[key] - tensor).abs()
            assert difference.max() <= 6e-4 and difference.mean() < 1e-4
            moved += float(tensor.bfloat16().float().sub(tensor).abs().sum())
    assert moved > 0  # else masters would be roundings


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sharded_run_goes_on_on_any_number_of_processes(tmp_path, dtype):
    """3 steps on four, to the 5th on two, to the 7th on one without shard, to the 8th on two."""
    key = dict(dtype="bfloat16") if dtype == "bf16" else {}
    for processes, name in ((4, f"{dtype}, 3 steps"), (2, f"{dtype}, 5 steps")):
        out = on(processes, tmp_path, f"sharded, {name}")
        assert out.returncode == 0, out.stdout + out.stderr
    before = last(tmp_path / "several")
    assert train.main(resumed(7, **key)(tmp_path / "several")) == 0
    out = on(2, tmp_path, f"sharded, {dtype}, 8 steps")
    assert out.returncode == 0, out.stdout + out.stderr
    assert train.main(case(steps=8, **key)(tmp_path / "one")) == 0
    one, several = last(tmp_path / "one"), last(tmp_path / "several")
    assert before.keys() == one.keys() == several.keys()
    if dtype == "fp32":
        assert prints(tmp_path / "several") == prints(tmp_path / "one")
        for name, tensor in one.items():
            close(name, several[name], tensor)


def test_a_rank_holds_its_part_and_no_more(tmp_path):
    out = on(4, tmp_path, "counting")
    assert out.returncode == 0, out.stdout + out.stderr
    found = [json.loads((tmp_path / "several/run" / f"held_{rank}.json").read_text()) for rank in range(4)]
    whole = 4 * 19200  # bytes of the tiny model in fp32
    for held in found:
        assert held["sampler"] == 0  # between sampling and the next step
        assert whole / 4 <= held["weights"] < 1.1 * whole / 4
        assert held["moments"] == pytest.approx(2 * whole / 4, rel=0.1)


def test_a_killed_process_takes_its_part_of_the_weights_with_it(tmp_path):
    out = on(2, tmp_path, "a killed process, sharded")
    assert out.returncode != 0
    told = "not saved, because a part of the weights was that process's"
    assert told in out.stdout and "step_000002 is safe" in out.stdout, out.stdout + out.stderr


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_the_last_step_is_saved(tmp_path):
    out = on(2, tmp_path, "a loss that is none")
    assert out.returncode != 0
    assert out.stdout.count("the loss is nan at step 3") == 1, out.stdout + out.stderr
    assert "step_000002; go on with" in out.stdout


def test_an_error_of_one_rank_in_the_middle_of_a_pass_is_said_and_the_others_end(tmp_path):
    """They would wait for its part of a layer, for half an hour."""
    out = on(2, tmp_path, "out of memory")
    assert out.returncode != 0
    assert "rank 1: no memory for 3 GB" in out.stderr, out.stdout + out.stderr
    assert "a process of this run has died" in out.stdout
