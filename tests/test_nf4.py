"""nf4.py: 4-bit weights are bitsandbytes' to the bit, and the model they make trains, samples and resumes."""

import dataclasses
import gc
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
import model as models
import nf4
import sample
import train
from conftest import TINY, rows, same, settings
from kernels.nf4 import NF4, expand, expand_ref
from policy import load_policy
from rollout import generate

ALL = models.ATTENTION + models.MLP
BATCH = [[1, 2, 3], [4, 5]], [[[5, 6], [7]], [[8, 9, 10]]]
LOW = [torch.float32, torch.bfloat16]
BIASED = TINY | dict(model_type="qwen2")  # q, k and v have biases

# What bitsandbytes 0.50.2 (CPU) makes of `frozen_matrix`: quantize_4bit(.., compress_statistics=True).
PATTERN = (
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d18e2a"
)
FROZEN = dict(
    packed=bytes.fromhex((PATTERN * 4)[: 2 * 192]),
    absmax=[0, 28, 56, 198, 226, 255],
    nested=[1.953125],
    offset=2.734375,
    first={torch.float32: -0.79498291015625, torch.bfloat16: -0.796875},
    sha256={  # of dequantize_4bit's result, widened to fp32
        torch.float32: "a3ef5767f56cb7a2663b96f2a73e51e138c7362a0802f8caca89aab5c112ffe4",
        torch.bfloat16: "89d22bef20c40efddb2fa3e2f6c410149b1de1f7f68fd6d83ec2a996033070c0",
    },
)


def frozen_matrix() -> torch.Tensor:
    i = torch.arange(3 * 128)
    return (((i * 37) % 101 - 50).float() / 64 * (1 + i // 64)).view(3, 128)


def bitsandbytes():
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is the oracle here")


def in_full(weight: nf4.NF4Weight, dtype=torch.float32) -> torch.Tensor:
    return weight.expand_into(torch.full(weight.shape, torch.nan, dtype=dtype))


def parts_of(weight: nf4.NF4Weight):
    return weight.packed, weight.absmax, weight.nested_absmax, weight.code, weight.offset


def randn(*shape, seed=0, scale=0.02):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# ---------------------------------------------------------------------------------------------- one matrix
@pytest.mark.parametrize("dtype", LOW)
def test_a_matrix_is_what_bitsandbytes_made_of_it(dtype):
    weight = nf4.quantise(frozen_matrix().to(dtype))
    assert bytes(weight.packed.tolist()) == FROZEN["packed"]
    assert weight.absmax.tolist() == FROZEN["absmax"] and weight.nested_absmax.tolist() == FROZEN["nested"]
    assert weight.offset.item() == FROZEN["offset"]
    w = in_full(weight, dtype)
    assert w[0, 0] == FROZEN["first"][dtype]
    assert hashlib.sha256(w.float().numpy().tobytes()).hexdigest() == FROZEN["sha256"][dtype]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(1, 1), (3, 21), (5, 64), (7, 130), (300, 96)])
def test_expansion_is_its_definition_whatever_the_size(shape, dtype):
    """Odd sizes, blocks that end early, one and several blocks of scales, scales of fp32."""
    weight = nf4.quantise(randn(*shape))
    n = weight.shape.numel()
    assert torch.equal(in_full(weight, dtype), expand_ref(*parts_of(weight), n).view(shape).to(dtype))
    scales = torch.rand(len(weight.absmax))
    once = nf4.NF4Weight(shape, weight.packed, scales)
    assert torch.equal(in_full(once, dtype), expand_ref(*parts_of(once), n).view(shape).to(dtype))


def test_every_weight_gets_the_nearest_value_of_its_block():
    w = randn(90, 70)
    weight = nf4.quantise(w)
    blocks = torch.nn.functional.pad(w.flatten(), (0, -w.numel() % 64)).view(-1, 64)
    shares = blocks / blocks.abs().amax(1, keepdim=True)
    distance = (shares[..., None] - torch.tensor(NF4)).abs()
    byte = weight.packed.int()
    nibbles = torch.stack([byte >> 4, byte & 15], 1).flatten()[: w.numel()]
    chosen = distance.view(-1, 16)[: w.numel()].gather(1, nibbles.long()[:, None])[:, 0]
    assert (chosen - distance.view(-1, 16)[: w.numel()].amin(1) < 1e-6).all()
    # and half the widest gap of the 16 values, times the block's largest, bounds the error
    error = (in_full(weight) - w).flatten()
    largest = blocks.abs().amax(1).repeat_interleave(64)[: w.numel()]
    assert (error.abs() <= 0.16 * largest).all() and error.norm() < 0.1 * w.norm()


def test_zeros_stay_zeros_and_an_empty_block_spoils_no_other():
    w = randn(3, 64)
    w[1] = 0
    full = in_full(nf4.quantise(w))
    assert full.isfinite().all() and (full[0] != 0).any()
    alone = nf4.quantise(torch.zeros(2, 64))
    assert (in_full(alone) == 0).all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(300, 128), (1000, 576), (5, 64)])
def test_bitsandbytes_quantises_and_expands_to_the_same_bits(shape, dtype):
    """Rows of whole blocks, as real models have: on a CPU theirs takes wrong scales for others (0.50.2)."""
    theirs = bitsandbytes()
    w = randn(*shape).to(dtype)
    packed, state = theirs.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantise(w)
    assert torch.equal(ours.packed, packed.flatten()) and torch.equal(ours.offset, state.offset)
    assert torch.equal(ours.code, state.state2.code)
    torch.testing.assert_close(ours.nested_absmax, state.state2.absmax, rtol=0, atol=0)
    # Their CPU form does not always take the nearest of the 256 shares, their CUDA form does.
    assert (ours.absmax != state.absmax).float().mean() < 0.01
    theirs_here = nf4.NF4Weight(
        shape, packed.flatten(), state.absmax, state.state2.absmax, state.state2.code, state.offset
    )
    assert torch.equal(in_full(theirs_here, dtype), theirs.dequantize_4bit(packed, state))
    packed, once = theirs.quantize_4bit(w, quant_type="nf4", compress_statistics=False)
    singly = nf4.NF4Weight(shape, packed.flatten(), once.absmax)
    assert torch.equal(in_full(singly, dtype), theirs.dequantize_4bit(packed, once))


def test_a_change_of_dtype_rounds_no_scale():
    """model.to(torch.bfloat16) would otherwise round the fp32 scales, and every weight with them."""
    weight = nf4.quantise(randn(300, 96))
    before = in_full(weight)
    moved = weight.to(torch.bfloat16)
    assert moved.nested_absmax.dtype == torch.float32 and torch.equal(in_full(moved), before)
    model = nf4.quantise_model(models.create(dict(TINY), seed=0)).to(torch.bfloat16)
    assert model.blocks[0].qkv.dense().dtype == torch.bfloat16
    assert model.logits(torch.tensor([1, 2, 3])).isfinite().all()


# ------------------------------------------------------------------------------------------------ a model
def in_4_bits(config=TINY, dtype=torch.float32, **options):
    """A tiny model in 4 bits with adapters that have learnt something, and the same with weights in full."""
    quantised = nf4.quantise_model(models.create(dict(config), seed=0, dtype=dtype))
    dense = models.create(dict(config), seed=0, dtype=dtype)
    dense.load_state_dict(lora.merged_state(quantised))
    for model in (quantised, dense):
        lora.apply(model, rank=3, alpha=6.0, targets=ALL, **options)
        g = torch.Generator().manual_seed(9)
        for layer in lora.layers(model).values():
            for B in layer.B:
                B.data = torch.randn(B.shape, generator=g, dtype=B.dtype) * 0.3
    return quantised, dense


def adapter_grads(model):
    model.zero_grad()
    model.train()
    torch.manual_seed(3)
    logp, entropy, _ = model.completion_logprobs(*BATCH)
    (logp.sum() + 0.3 * entropy.sum()).backward()
    return logp, [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("checkpointing", ["none", "light", "layers"])
def test_gradients_are_those_of_the_expanded_model(checkpointing, dtype):
    """The backward of a layer comes when the scratch buffer holds another layer's weight."""
    quantised, dense = in_4_bits(BIASED, dtype=dtype)
    quantised.checkpointing = dense.checkpointing = checkpointing
    (ours, grads), (theirs, wanted) = adapter_grads(quantised), adapter_grads(dense)
    assert torch.equal(ours, theirs) and len(grads) == len(wanted) > 0
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(grads, wanted))


def test_gradients_pass_layers_without_an_adapter_and_dropout():
    for options in (dict(), dict(dropout=0.3)):
        found = []
        for model in in_4_bits():
            adapted = lora.layers(model)
            for name, layer in adapted.items():  # only the first block's qkv keeps its adapter
                if name != "blocks.0.qkv":
                    nf4.set_module(model, name, layer.base)
                layer.dropout = options.get("dropout", 0.0)
            found.append(adapter_grads(model)[1])
        assert len(found[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*found))


def test_nothing_learns_but_adapters_and_no_weight_is_kept_in_full():
    quantised, _ = in_4_bits(BIASED)
    learns = {name for name, p in quantised.named_parameters() if p.requires_grad}
    assert learns and all(".A" in name or ".B." in name for name in learns)
    matrices = [p for name, p in quantised.named_parameters() if p.dim() == 2 and name not in learns]
    assert [p.shape for p in matrices] == [quantised.embed.shape]
    names = {name.rpartition(".")[2] for name, _ in quantised.named_buffers()}
    assert {"packed", "absmax", "nested_absmax", "code", "offset", "like"} == names
    linear = 2 * (64 * 32 + 32 * 32 + 128 * 32 + 64 * 32)
    assert nf4.weights_in(quantised) == linear
    packed = sum(t.nbytes for name, t in quantised.named_buffers() if name.endswith(".packed"))
    assert packed == linear // 2
    scratches = {id(layer.scratch) for layer in nf4.layers(quantised).values()}
    assert len(scratches) == 1 and next(iter(nf4.layers(quantised).values())).scratch.numbers == 128 * 32


@pytest.mark.parametrize("dtype", LOW)
def test_sampler_logp_is_trainer_logp_on_a_base_in_4_bits(dtype):
    """20 tokens, so that the sampler packs what it can."""
    quantised, dense = in_4_bits(dtype=dtype)
    options = dict(group_size=3, max_new_tokens=20, stop_ids=[4], seed=3, step=1)
    prompts = [[5, 6, 7], [8, 9]]
    out, full = (generate(model.eval(), prompts, **options) for model in (quantised, dense))
    assert out.ids == full.ids
    logp, _, _ = quantised.completion_logprobs(prompts, [out.group(b, 3) for b in range(2)])
    drawn = torch.tensor([x for row in out.logprobs for x in row])
    difference = (logp.detach() - drawn).abs()
    assert difference.max() < 2e-5 if dtype == torch.float32 else difference.mean() < 0.05


@pytest.mark.model
@pytest.mark.slow
def test_a_real_models_sampler_logp_is_its_trainers_in_4_bits(smollm2):
    model = lora.apply(models.load(smollm2, base="nf4"), rank=8, alpha=16.0, targets=ALL)
    g = torch.Generator().manual_seed(9)
    for layer in lora.layers(model).values():
        for B in layer.B:
            B.data = torch.randn(B.shape, generator=g) * 0.01
    prompts = [[504, 3575, 282, 1190, 314], [3725, 314, 260, 2240, 1517, 47]]
    out = generate(model, prompts, group_size=3, max_new_tokens=20, stop_ids=[2])
    with torch.no_grad():
        logp, _, _ = model.completion_logprobs(prompts, [out.group(b, 3) for b in range(2)])
    drawn = torch.tensor([x for row in out.logprobs for x in row])
    assert (logp - drawn).abs().max() < 1e-4


def test_what_is_exported_is_the_expanded_model_with_its_adapters(tmp_path):
    quantised, dense = in_4_bits(BIASED, dtype=torch.bfloat16)
    assert same(lora.merged_state(quantised), lora.merged_state(dense))
    models.save(quantised, str(tmp_path), lora.merged_state(quantised))
    again = models.load(str(tmp_path), dtype=torch.bfloat16)
    assert same(dict(again.named_parameters()), lora.merged_state(dense))
    with pytest.raises(ValueError, match="4 bits"):
        lora.merge(quantised)
    assert all(layer.merged is None for layer in lora.layers(quantised).values())


# ------------------------------------------------------------------------------------------------ loading
def buffers(model) -> dict:
    return {name: t for name, t in model.state_dict().items()}


@pytest.mark.parametrize("dtype", LOW)
def test_loading_quantises_as_a_model_in_memory_is(tmp_path, dtype):
    models.save(models.create(BIASED | dict(tie_word_embeddings=False), seed=0), str(tmp_path))
    loaded = models.load(str(tmp_path), dtype=dtype, base="nf4")
    here = nf4.quantise_model(models.load(str(tmp_path), dtype=dtype))
    assert same(buffers(loaded), buffers(here)) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    ids = torch.tensor([1, 2, 3])
    assert torch.equal(loaded.logits(ids), here.logits(ids))
    # and so does making one of random weights
    made = models.create(dict(BIASED), seed=0, dtype=dtype, base="nf4")
    here = nf4.quantise_model(models.create(dict(BIASED), seed=0, dtype=dtype))
    assert same(buffers(made), buffers(here)) and torch.equal(made.logits(ids), here.logits(ids))
    with pytest.raises(ValueError, match="'dense', 'nf4'"):
        models.load(str(tmp_path), base="nf3")


def test_the_model_is_never_whole_in_memory_while_it_loads(tmp_path, monkeypatch):
    """At each matrix: how many matrices are there in floating point, beside the embedding?"""
    models.save(models.create(TINY | dict(num_hidden_layers=5), seed=0), str(tmp_path))
    alive, quantise = [], nf4.quantise

    def counted(weight):
        found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in found
            if t.is_floating_point() and t.dim() == 2 and t.device.type == "cpu" and len(t) != 48
        }
        alive.append(sum(storages.values()))
        return quantise(weight)

    monkeypatch.setattr(nf4, "quantise", counted)
    gc.collect()
    gc.freeze()  # get_objects() lists what is made from here on
    try:
        models.load(str(tmp_path), base="nf4")
    finally:
        gc.unfreeze()
    # Of 35 matrices, fp32, at most the file's, its copy in the model's dtype, and the norms.
    assert len(alive) == 5 * 7 and 0 < max(alive) <= 2 * 4 * 64 * 32


def write_as_bitsandbytes(folder: Path, *, double=True, change=None):
    """A tiny model's folder with the projections as bitsandbytes stores them, and the weights in full."""
    models.save(models.create(dict(BIASED), seed=0), str(folder))
    path = folder / "model.safetensors"
    tensors, stored, full = load_file(path), {}, {}
    for name, t in tensors.items():
        if ".layers." not in name or t.dim() < 2:
            stored[name] = full[name] = t
            continue
        weight = nf4.quantise(t)
        about = dict(quant_type="nf4", blocksize=64, dtype="float32", shape=list(t.shape))
        if double:
            stored |= {f"{name}.nested_absmax": weight.nested_absmax}
            stored |= {f"{name}.nested_quant_map": weight.code.clone(), f"{name}.absmax": weight.absmax}
            about |= dict(nested_blocksize=256, nested_dtype="float32", nested_offset=weight.offset.item())
        else:
            scales = torch.rand(len(weight.absmax)) * 0.1
            weight = nf4.NF4Weight(t.shape, weight.packed, scales)
            stored[f"{name}.absmax"] = scales
        stored[name], full[name] = weight.packed[:, None], in_full(weight)
        stored[f"{name}.quant_map"] = torch.tensor(NF4)
        about = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
        stored[f"{name}.quant_state.bitsandbytes__nf4"] = about
    if change:
        change(stored)
    config = json.loads((folder / "config.json").read_text())
    kind = dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    (folder / "config.json").write_text(json.dumps(config | dict(quantization_config=kind)))
    # In two files, cut in the middle of a matrix.
    names = sorted(stored)
    halves = {"model-1.safetensors": names[:53], "model-2.safetensors": names[53:]}
    path.unlink()
    for file, some in halves.items():
        save_file({name: stored[name] for name in some}, folder / file)
    where = {name: file for file, some in halves.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=where)))
    return full


@pytest.mark.parametrize("double", [True, False])
def test_a_checkpoint_of_bitsandbytes_loads_in_4_bits_and_in_full(tmp_path, double):
    full = write_as_bitsandbytes(tmp_path, double=double)
    for base in ("nf4", "dense"):
        model = models.load(str(tmp_path), base=base)
        assert bool(nf4.layers(model)) == (base == "nf4")
        models.save(model, str(tmp_path / base), lora.merged_state(model))
        assert same(load_file(tmp_path / base / "model.safetensors"), full)
        # What was written is in full: its config must not say otherwise.
        assert "quantization_config" not in json.loads((tmp_path / base / "config.json").read_text())


def test_what_bitsandbytes_writes_is_read(tmp_path):
    theirs = bitsandbytes()
    w, names = randn(96, 64), "model.layers.0.mlp.down_proj.weight"
    packed, state = theirs.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    stored = {f"{names}.{end}": t for end, t in state.as_dict(packed=True).items()} | {names: packed}
    save_file(stored, tmp_path / "a.safetensors")
    ((name, weight),) = nf4.join(models.read_tensors(str(tmp_path / "a.safetensors")))
    assert name == names and torch.equal(in_full(weight), theirs.dequantize_4bit(packed, state))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("double", [True, False])
def test_what_transformers_saves_in_4_bits_is_read(tmp_path, double, dtype):
    """Every projection to the bit; and doubly quantised it is what we make of the weights in full."""
    theirs = bitsandbytes()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BIASED | dict(hidden_size=64, intermediate_size=128, architectures=["Qwen2ForCausalLM"])
    models.save(models.create(config, seed=0), str(tmp_path / "full"))
    kind = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    saved = AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "full"), dtype=dtype, quantization_config=BitsAndBytesConfig(**kind)
    )
    saved.save_pretrained(str(tmp_path / "4"))
    ours = models.load(str(tmp_path / "4"), dtype=dtype, base="nf4")
    made = models.load(str(tmp_path / "full"), dtype=dtype, base="nf4")
    for i, layer in enumerate(saved.model.layers):
        parts = [getattr(layer.self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj")]
        want = torch.cat([theirs.dequantize_4bit(p.data, p.quant_state) for p in parts])
        assert torch.equal(ours.blocks[i].qkv.dense(), want)
        assert torch.equal(made.blocks[i].qkv.dense(), want) == double


def lose(end):
    def change(stored):
        stored.pop(f"model.layers.0.mlp.up_proj.weight{end}")

    return change


def as_fp4(stored):
    for name in stored:
        if name.endswith("quant_map") and "nested" not in name:
            stored[name] = stored[name].flip(0).contiguous()


def in_blocks_of_128(stored):
    for name in [name for name in stored if "quant_state" in name]:
        text = bytes(stored[name].tolist()).replace(b'"blocksize": 64', b'"blocksize": 128')
        stored[name] = torch.tensor(list(text), dtype=torch.uint8)


def misshapen(stored):
    for name in [name for name in stored if "quant_state" in name and "down_proj" in name]:
        text = bytes(stored[name].tolist()).replace(b"[32, 64]", b"[64, 32]")
        stored[name] = torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize(
    "change, said",
    [
        (lose(".absmax"), "not complete"),
        (lose(".nested_absmax"), "not complete"),
        (lose(""), "not complete"),
        (as_fp4, "is not implemented"),
        (in_blocks_of_128, "blocks of 128"),
        (misshapen, "down_proj.weight has shape (64, 32), config.json asks for (32, 64)"),
    ],
)
def test_other_kinds_and_damaged_ones_are_refused_by_name(tmp_path, change, said, base):
    write_as_bitsandbytes(tmp_path, change=change)
    with pytest.raises(ValueError) as e:
        models.load(str(tmp_path), base=base)
    assert said in str(e.value) and "model.layers.0" in str(e.value) and "\n" not in str(e.value)


# ------------------------------------------------------------------------------------------------- a run
KEYS = dict(base="nf4", lora_rank=4, lora_alpha=8.0, steps=1)


def test_a_run_on_4_bits_says_so_and_is_not_the_run_on_the_weights_in_full(tmp_path, capsys):
    """That it resumes to the bit is in test_train.py."""
    norms = []
    for base in ("nf4", "dense"):
        assert train.main(settings(tmp_path, out_dir=str(tmp_path / base), **KEYS | dict(base=base))) == 0
        told = capsys.readouterr().out
        assert ("on a base in 4 bits" in told) == (base == "nf4")
        # The same number of weights, however they are held.
        assert "23,296 parameters" in told
        norms.append(rows(tmp_path / base / "metrics.jsonl")[0]["grad_norm"])
    assert norms[0] != norms[1] and norms[0] == pytest.approx(norms[1], rel=0.5)


def test_a_runs_adapter_is_sampled_and_merged_on_the_base_it_was_trained_on(tmp_path, capsys):
    """Merged into the weights in full, it would be another model than the one that was trained."""
    assert train.main(settings(tmp_path, **KEYS)) == 0
    saved, merged = tmp_path / "run" / "ckpt" / "step_000001", tmp_path / "merged"
    sample.main([f"--model={saved}", "--base=nf4", f"--merge={merged}", "--device=cpu"])
    model, *_ = load_policy(str(saved), base="nf4")
    assert nf4.layers(model) and lora.layers(model)
    found = dict(models.load(str(merged)).named_parameters())
    assert same(found, lora.merged_state(model))
    dense, *_ = load_policy(str(saved))
    assert not same(found, lora.merged_state(dense))
    sample.main([f"--model={saved}", "--base=nf4", "--device=cpu", "--max_new_tokens=3", "1+1="])
    assert "tokens" in capsys.readouterr().out


def test_a_run_goes_on_with_the_base_it_was_started_on(tmp_path):
    cfg = settings(tmp_path, **KEYS)
    assert train.main(cfg) == 0
    with pytest.raises(ValueError, match="base"):
        train.main(dataclasses.replace(cfg, base="dense", resume=True, steps=2))


@pytest.mark.slow
def test_a_run_on_4_bits_learns(tmp_path):
    keys = KEYS | dict(steps=60, lora_rank=8, lora_alpha=16.0, save_every=0, lr=2e-2)
    assert train.main(settings(tmp_path, group_size=8, prompts_per_step=4, **keys)) == 0
    reward = [row["reward"] for row in rows(tmp_path / "run" / "metrics.jsonl")]
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.2


@pytest.mark.parametrize(
    "keys, said",
    [
        (dict(lora_rank=0), "lora_rank"),
        (dict(lora_merge="on"), "lora_merge"),
        (dict(base="nf5"), "'dense', 'nf4'"),
    ],
)
def test_what_4_bits_cannot_do_is_refused_in_one_sentence(tmp_path, keys, said):
    with pytest.raises(ValueError) as e:
        settings(tmp_path, **KEYS | keys)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_adapters_are_never_merged_for_a_run_on_4_bits(tmp_path):
    from run import merges_adapters

    class OnGPU:
        device = torch.device("cuda")

    assert not merges_adapters(settings(tmp_path, **KEYS), OnGPU())


def test_blocks_are_written_to_a_tensor_of_their_size_alone():
    weight = nf4.quantise(randn(3, 64))
    with pytest.raises(AssertionError, match="128 weights"):
        expand(*parts_of(weight), torch.empty(2, 64))
