"""fingerprint.py and bench/same.py: whether two runs are the same, and where they part."""

import dataclasses
import sys

import pytest
import torch

import fingerprint
import train
from conftest import ROOT, rows, settings

sys.path.append(str(ROOT / "bench"))
import same as same_runs  # noqa: E402


def by_hand(tensors) -> int:
    """The definition, in Python's unbounded integers."""
    total = 0
    for tensor in tensors:
        width = torch.int32 if tensor.element_size() == 4 else torch.int16
        total += sum(x * (2 * x + 1) for x in tensor.reshape(-1).view(width).tolist())
    return total % 2**32


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_half_is_its_definition_however_it_is_cut(chunk, dtype, monkeypatch):
    monkeypatch.setattr(fingerprint, "CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=g).to(dtype) for size in [(3, 5), (1,), (17, 9), ()]]
    assert fingerprint.of_weights(tensors) == by_hand(tensors)
    turned = [t.clone() for t in reversed(tensors)]
    assert fingerprint.of_weights(turned) == by_hand(tensors)


def test_every_flipped_bit_of_a_weight_is_seen():
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    before = fingerprint.of_weights([weights])
    for place in (0, 511, 999):
        for bit in range(32):
            # -2^31 is the sign bit: a shifted 1 would not fit.
            flip = torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            weights.view(torch.int32)[place] ^= flip
            assert fingerprint.of_weights([weights]) != before
            weights.view(torch.int32)[place] ^= flip
    assert fingerprint.of_weights([weights]) == before


def test_two_opposite_roundings_do_not_cancel():
    weights = torch.ones(2)
    before = fingerprint.of_weights([weights])
    weights.view(torch.int32)[0] += 1
    weights.view(torch.int32)[1] -= 1
    assert fingerprint.of_weights([weights]) != before


def test_every_flipped_bit_of_an_id_is_seen_and_where_it_was_drawn():
    groups = [[[5, 0, 131071], [4]], [[], [9, 9]]]
    before = fingerprint.of_ids([3, 8], groups)
    for bit in range(18):
        for place in range(3):
            changed = [[[*groups[0][0]], [4]], groups[1]]
            changed[0][0][place] ^= 1 << bit
            assert fingerprint.of_ids([3, 8], changed) != before
    others = [([3, 9], groups), ([3, 8], groups[::-1]), ([3, 8], [groups[0][::-1], groups[1]])]
    others.append(([3, 8], [[[5, 0, 131071], [4, 0]], groups[1]]))
    for numbers, drawn in others:
        assert fingerprint.of_ids(numbers, drawn) != before
    # As two ranks have them: a sum of parts.
    parts = [fingerprint.of_ids([number], [group]) for number, group in zip((3, 8), groups)]
    assert sum(parts) % 2**32 == before


def test_same_says_at_which_step_and_in_what_two_runs_part(tmp_path, capsys):
    cfg = settings(tmp_path, steps=3, out_dir=str(tmp_path / "a"), save_every=0)
    calls = []

    def flipped(completions, **columns):
        """The reward of `even`, but for one completion of the second step."""
        calls.append(1)
        scores = cfg.rewards[0][0](completions)
        if len(calls) == 2:
            scores[0] += 1e-3
        return scores

    flipped.__name__ = "even"
    runs = dict(
        b=dict(),
        longer=dict(steps=4, lr=1e-2),
        other_reward=dict(rewards=[(flipped, 1.0)]),
        other_seed=dict(seed=1),
    )
    train.main(cfg)
    for name, keys in runs.items():
        train.main(dataclasses.replace(cfg, out_dir=str(tmp_path / name), **keys))

    def told(name):
        capsys.readouterr()
        status = same_runs.main(str(tmp_path / "a"), str(tmp_path / name))
        return status, capsys.readouterr().out

    assert told("b") == (0, "the same for 3 steps, up to step 3\n")
    status, text = told("longer")
    assert status == 0 and "config: steps = 3, 4" in text and "longer has 1 more, up to step 4" in text
    # The draws of the step were the same, and what was learnt from them was not.
    status, text = told("other_reward")
    assert status == 1 and "they part at step 2: weights, grad_norm" in text and " ids" not in text
    status, text = told("other_seed")
    assert status == 1 and "config: seed = 0, 1" in text and "they part at step 1: ids, weights" in text
    assert all(len(row["fingerprint"]) == 16 for row in rows(tmp_path / "a" / "metrics.jsonl"))


def test_same_refuses_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run"):
        same_runs.main(str(tmp_path), str(tmp_path))
