"""fingerprint.py and bench/same.py: whatever is other in two runs is seen, and said where it begins."""

import json
import subprocess
import sys
import time


import pytest
import torch
from hypothesis import given, settings as examples
from hypothesis import strategies as st

import train
from conftest import ROOT, even, rows, settings
from fingerprint import AS_INTEGERS, fingerprint, hash_of_ids, hash_of_weights

DTYPES = [torch.float32, torch.bfloat16]


@examples(max_examples=50, deadline=None)
@given(dtype=st.sampled_from(DTYPES), which=st.integers(0, 2), at=st.integers(0, 34), bit=st.integers(0, 31))
def test_a_flipped_bit_of_any_weight_is_seen(dtype, which, at, bit):
    tensors = [torch.randn(5, 7, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    before = hash_of_weights(list(enumerate(tensors)))
    bits = tensors[which].view(AS_INTEGERS[tensors[which].element_size()]).view(-1)
    flip = 1 << bit % (8 * tensors[which].element_size())
    bits[at] ^= flip if flip < torch.iinfo(bits.dtype).max else torch.iinfo(bits.dtype).min
    assert hash_of_weights(list(enumerate(tensors))) != before


def test_two_weights_that_change_places_are_seen():
    a, b = torch.randn(4), torch.randn(4)
    both = hash_of_weights([(0, a), (1, b)])
    assert both != hash_of_weights([(0, b), (1, a)])
    # as two processes have them, that share the optimiser
    assert (hash_of_weights([(1, b)]) + hash_of_weights([(0, a)])) & 0xFFFFFFFF == both
    assert hash_of_weights([]) == 0


def test_ids_their_order_and_whose_they_are_are_seen_and_the_order_of_prompts_is_not():
    ids = [[1, 2, 3], [4], [5, 6], []]
    whole = hash_of_ids([0, 1], 2, ids)
    others = [[[1, 2, 3], [4], [5, 6], [0]], [[2, 1, 3], [4], [5, 6], []], [[4], [1, 2, 3], [5, 6], []]]
    assert all(hash_of_ids([0, 1], 2, other) != whole for other in others)
    assert hash_of_ids([0, 2], 2, ids) != whole
    # as two processes have them
    assert (hash_of_ids([1], 2, ids[2:]) + hash_of_ids([0], 2, ids[:2])) & 0xFFFFFFFF == whole
    assert fingerprint(whole, 7) == f"{whole:08x}00000007"


def test_it_costs_less_than_a_percent_of_a_step(tmp_path):
    run = train.Run(settings(tmp_path))
    begin = time.perf_counter()
    train.train_step(run, 1)
    step = time.perf_counter() - begin
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        hash_of_ids([0, 1, 2, 3], 4, [[1] * 12] * 16)
        hash_of_weights(run.optimizer.masters())
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.01 * step


def compared(*folders):
    out = subprocess.run(
        [sys.executable, "bench/same.py", *map(str, folders)], cwd=ROOT, capture_output=True, text=True
    )
    return out.returncode, out.stdout + out.stderr


@pytest.mark.slow
def test_same_says_at_which_step_and_in_what_runs_part(tmp_path):
    for name in ("a", "b"):
        train.main(settings(tmp_path, out_dir=str(tmp_path / name)))
    a, b = tmp_path / "a", tmp_path / "b"
    assert compared(a, b) == (0, "the same for 4 steps\n")

    train.main(settings(tmp_path, out_dir=str(tmp_path / "c"), lr=1e-2 * (1 + 1e-6)))
    status, said = compared(a, tmp_path / "c")
    assert status == 1 and said.startswith(
        "lr: 0.01, 0.01000001\nthe same for 0 steps; at step 1 other: weights"
    )

    everything = rows(b / "metrics.jsonl")
    everything[2]["fingerprint"] = "0" * 8 + everything[2]["fingerprint"][8:]
    everything[3]["reward"] += 1e-15
    (b / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in everything))
    assert compared(a, b) == (1, "the same for 2 steps; at step 3 other: ids\n")


@pytest.mark.slow
def test_same_says_what_it_cannot_compare(tmp_path):
    status, said = compared(tmp_path / "none", tmp_path / "none")
    assert status == 2 and "metrics.jsonl cannot be read" in said and "Traceback" not in said
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rew')
    status, said = compared(tmp_path, tmp_path)
    assert status == 2 and "is not whole" in said
    for name, step in (("early", 1), ("late", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(dict(step=step, reward=1.0)) + "\n")
    status, said = compared(tmp_path / "early", tmp_path / "late")
    assert status == 2 and "no step in common" in said
    assert "without a fingerprint" in compared(tmp_path / "early", tmp_path / "early")[1]


@pytest.mark.slow
def test_a_resumed_run_has_the_fingerprints_of_one_that_was_never_stopped(tmp_path):
    train.main(settings(tmp_path, out_dir=str(tmp_path / "whole"), rewards=[(even, 1.0)]))
    train.main(settings(tmp_path, out_dir=str(tmp_path / "parts"), steps=2))
    train.main(settings(tmp_path, out_dir=str(tmp_path / "parts"), resume=True))
    assert compared(tmp_path / "whole", tmp_path / "parts") == (0, "the same for 4 steps\n")
