"""memory.py and plan.py: what is planned is what the code makes, and near what was measured on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config as configs
import lora
import memory
import model as models
import nf4
import optim
import plan
from conftest import ROOT, TINY
from model import Packed
from shape import Shape

WIDE = dict(TINY, hidden_size=128, intermediate_size=384, num_hidden_layers=3, vocab_size=500)
WIDE |= dict(max_position_embeddings=512)
LORA = dict(lora_rank=4, lora_alpha=8.0)


def net(dtype=torch.float32, **more):
    return models.create(dict(WIDE, **more), seed=0, dtype=dtype)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_adapters_are_counted_as_they_are_made(tied):
    model = net(tie_word_embeddings=tied)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert memory.parameters(model.shape) == matrices
    cfg = configs.Config(**LORA, lora_targets=("q_proj", "o_proj", "gate_proj", "down_proj"))
    lora.apply(model, rank=4, alpha=8, targets=cfg.lora_targets)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.trained_numbers(cfg, model.shape) == trained
    assert memory.trained_numbers(configs.Config(lora_rank=0), model.shape) == matrices


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keys", [dict(lora_rank=0), dict(lora_rank=0, optimizer_bits=8), LORA])
def test_the_optimisers_state_takes_what_is_planned(dtype, keys):
    cfg = configs.Config(dtype=dtype, **keys)
    model = net(getattr(torch, dtype))
    if cfg.lora_rank:
        lora.apply(model, rank=4, alpha=8, targets=cfg.lora_targets)
    optimizer = optim.AdamW(list(model.named_parameters()), lr=1e-3, bits=cfg.optimizer_bits)
    state = sum(t.nbytes for t in optimizer.state().values())
    held = memory.held_always(cfg, model.shape, "cpu")
    assert held["optimiser"] == pytest.approx(state, rel=0.02)  # norms and biases are not counted


def test_a_base_in_4_bits_takes_what_is_planned():
    model = net(torch.bfloat16)
    nf4.quantise_model(model)
    held = memory.held_always(configs.Config(dtype="bfloat16", base="nf4", **LORA), model.shape, "cpu")
    there = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert held["weights"] == pytest.approx(there, rel=0.02)


def test_merged_weights_take_what_is_planned():
    model = net()
    cfg = configs.Config(dtype="float32", lora_merge="on", **LORA)
    lora.apply(model, rank=4, alpha=8, targets=cfg.lora_targets)
    assert memory.held_always(cfg, model.shape, "cpu")["merged weights"] == lora.merged_bytes(model)


@pytest.mark.parametrize("checkpointing, within", [("none", 0.1), ("light", 0.2), ("layers", 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_forward_keeps_what_is_planned(checkpointing, within, dtype):
    """Of torch's forms, as a CPU runs them; the kernels' are beside the H100's figures below."""
    per_layer = []
    for layers in (2, 4):
        model = net(dtype, num_hidden_layers=layers).train()
        model.checkpointing = checkpointing
        per_layer.append(bytes_kept(model, [64], [[56] * 8]))
    one = (per_layer[1] - per_layer[0]) / 2
    shapes = [Shape(dict(WIDE, num_hidden_layers=layers)) for layers in (2, 4)]
    two, four = [memory.kept_per_token(shape, checkpointing) for shape in shapes]
    assert one == pytest.approx((four - two) / 2 * dtype.itemsize, rel=within)


def bytes_kept(model, prompt_lengths, completion_lengths) -> float:
    """Bytes a token that autograd keeps of a forward, weights aside."""
    prompts = [list(range(1, n + 1)) for n in prompt_lengths]
    completions = [[list(range(1, n + 1)) for n in group] for group in completion_lengths]
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden, _ = model.completion_hidden(prompts, completions)
    assert hidden.requires_grad
    return sum(kept.values()) / len(Packed(model, prompts, completions).ids)


# What one H100 held, GB, of an update with one micro-batch of so many tokens: bench/results/
# 2026-11-24_h100_experiments.txt, "update B2 beside", "update B8 beside", and its last two lines of updates.
MEASURED = [
    ("Qwen2.5-0.5B-Instruct", dict(lora_rank=16, checkpointing="none"), 12_544, 15.5),
    ("Qwen2.5-0.5B-Instruct", dict(lora_rank=16, checkpointing="none"), 50_176, 54.4),
    ("Qwen2.5-7B-Instruct", dict(lora_rank=16, checkpointing="layers"), 6_272, 19.2),
    ("Qwen2.5-1.5B-Instruct", dict(lora_rank=0, checkpointing="layers"), 12_544, 29.5),
]


@pytest.mark.parametrize("model, keys, tokens, held", MEASURED)
def test_the_plan_of_an_update_is_within_a_tenth_of_an_h100s(model, keys, tokens, held):
    cfg = configs.Config(**keys, prompts_per_step=1, group_size=16, max_new_tokens=1, lora_merge="off")
    options = dict(device="cuda", tokens=tokens, prompt_tokens=1, one_batch=True)
    phases = memory.plan(cfg, plan.shape_of_name(model), **options)
    assert memory.total(phases["train"]) / 1e9 == pytest.approx(held, rel=0.1)


def test_a_token_takes_what_an_h200_measured():
    """docs/performance.md: 1.06 MB a token with everything kept, 0.69 light (Qwen2.5-0.5B, bf16)."""
    shape = plan.shape_of_name("Qwen2.5-0.5B-Instruct")
    for checkpointing, megabytes in (("none", 1.056), ("light", 0.688)):
        assert 2e-6 * memory.kept_per_token(shape, checkpointing) == pytest.approx(megabytes, rel=0.03)


# ------------------------------------------------------------------------------------------------ peaks
def test_a_phase_has_a_peak_of_its_own():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system's high-water mark cannot be set back")
    peaks = memory.Peaks("cpu")
    with peaks("large"):
        large = torch.ones(64_000_000)  # 256 MB, given back to the system as soon as it is freed
        del large
    with peaks("small"):
        pass
    assert peaks.of["large"] - peaks.of["small"] > 200e6
    assert peaks.highest >= peaks.of["large"]


# ------------------------------------------------------------------------------------------------- plan.py
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_has_a_plan(path, capsys):
    models = []
    if path.stem == "distil":  # its model and its teacher are what another run made
        models = ["--model=Qwen/Qwen2.5-0.5B-Instruct", "--reference=Qwen/Qwen2.5-3B-Instruct"]
    plan.main([str(path), "--gpu_gb=24", *models])
    said = capsys.readouterr().out
    assert "at most" in said and "micro-batches of" in said and "a step on one H100" in said


@pytest.mark.parametrize("task", plan.LENGTHS)
@pytest.mark.parametrize("gpu_gb", [8, 16, 24, 48, 80])
def test_what_is_configured_fits_and_is_a_config(task, gpu_gb):
    keys = plan.configure(task=task, gpu_gb=gpu_gb)
    reasons = keys.pop("reasons")
    cfg = configs.check_values(configs.Config(**keys))
    phases, tokens = plan.on_a_card(cfg, plan.shape_of_name(cfg.model), gpu_gb, plan.LENGTHS[task][0])
    assert memory.peak(phases) <= plan.USABLE * gpu_gb * 1e9 and tokens >= plan.LEAST_TOKENS
    assert f"of {gpu_gb} GB" in reasons


def test_a_larger_card_takes_a_larger_model_and_a_model_may_be_asked_for():
    found = [plan.configure("gsm8k", gpu_gb)["model"] for gpu_gb in (8, 16, 24, 48, 80)]
    sizes = [memory.parameters(plan.shape_of_name(name)) for name in found]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert plan.configure("gsm8k", 24, "Qwen2.5-7B-Instruct")["base"] == "nf4"
    with pytest.raises(ValueError, match="nothing fits a card of 2 GB with Qwen2.5-7B-Instruct"):
        plan.configure("gsm8k", 2, "Qwen2.5-7B-Instruct")
    with pytest.raises(ValueError, match="is not one of arithmetic"):
        plan.configure("chess", 24)


def test_what_does_not_fit_is_told_what_to_change(capsys):
    flags = [
        "--model=Qwen/Qwen2.5-7B-Instruct",
        "--gpu_gb=16",
        "--checkpointing=offload",
        "--micro_tokens=4096",
    ]
    plan.main(["configs/gsm8k.py", *flags])
    assert "it does not fit. --base=nf4" in capsys.readouterr().out
    plan.main(["configs/gsm8k.py", *flags, "--base=nf4", "--slots=64"])
    assert "does not fit" not in capsys.readouterr().out


def test_the_readmes_table_is_the_plans(capsys):
    plan.main(["--table"])
    lines = capsys.readouterr().out.splitlines()
    readme = (ROOT / "README.md").read_text()
    for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B"):
        (line,) = [line for line in lines if name in line]
        assert line in readme


# Sizes that README.md and docs/performance.md name; a real model, a step, in a process of its own.
SETTINGS = [
    dict(dtype="float32", **LORA),
    dict(dtype="bfloat16", **LORA),
    dict(dtype="float32", lora_rank=0),
    dict(dtype="bfloat16", base="nf4", **LORA),
    dict(dtype="bfloat16", lora_rank=0, optimizer_bits=8),
    dict(dtype="float32", checkpointing="layers", group_size=16, **LORA),
]
STEP = """
import json, sys
import config as configs, memory, screen, train
def spread(completions, **_):
    return [0.37 * i % 1 for i in range(len(completions))]
told = {}
def note(run, step, batch):
    told.update(plan=memory.peak(screen.planned(run, max(map(len, batch.prompts)), max(step.micro_batches),
                                                one_batch=len(step.micro_batches) <= 1)),
                held=max(run.peaks.highest, run.peaks.note()))
train.say_memory = note
keys = json.loads(sys.argv[1]) | dict(rewards=[(spread, 1.0)])
train.main(configs.Config(**keys))
print(json.dumps(told))
"""


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_a_step_of_a_real_model_holds_what_was_planned(tmp_path, smollm2, keys):
    small = dict(
        task="arithmetic", task_options=dict(style="words"), steps=1, prompts_per_step=2, group_size=4
    )
    small |= dict(max_new_tokens=64, threads=1, eval_every=0, rollouts_every=0, show_every=0, device="cpu")
    small |= dict(model=str(smollm2), out_dir=str(tmp_path / "run"), force=True)
    words = [sys.executable, "-c", STEP, json.dumps(small | keys)]
    out = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stdout + out.stderr
    told = json.loads(out.stdout.splitlines()[-1])
    assert told["held"] == pytest.approx(told["plan"], rel=0.1), told


def test_a_plan_takes_an_offloaded_optimiser_off_the_card():
    full = dict(lora_rank=0, model="Qwen/Qwen2.5-1.5B-Instruct")
    shape = plan.shape_of_name(full["model"])
    here, there = configs.Config(**full), configs.Config(**full, offload_optimizer=True)
    held, without = [memory.held_always(cfg, shape, "cuda") for cfg in (here, there)]
    trained = memory.parameters(shape)
    assert held["optimiser"] == 12 * trained == memory.optimiser_on_host(there, shape)
    assert without["optimiser"] < 0.3e9 and without["weights"] == held["weights"]
    assert memory.held_always(there, shape, "cpu")["optimiser"] == 8 * trained
