"""model.py, shape.py, packing.py: transformers' logits, options refused by name, a packed forward.

The oracles are transformers' own classes with random weights, in files that save_pretrained wrote.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import model as models
from conftest import ROOT, TINY
from kernels.logprob import truncate_

SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.25,
    rms_norm_eps=1e-5,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
FAMILIES = {
    "llama": dict(model_type="llama"),
    "llama tied": dict(model_type="llama", tie_word_embeddings=True),
    "llama with biases": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "llama wide heads": dict(model_type="llama", head_dim=24, attention_bias=True),
    "llama one key head": dict(model_type="llama", num_key_value_heads=1),
    "llama no groups": dict(model_type="llama", num_key_value_heads=4),
    "smollm2": dict(
        model_type="llama",
        tie_word_embeddings=True,
        hidden_size=36,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=3,
        rope_parameters=dict(rope_type="default", rope_theta=100000.0),
    ),
    "qwen2": dict(
        model_type="qwen2",
        tie_word_embeddings=True,
        num_attention_heads=8,
        num_key_value_heads=1,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    ),
    "qwen2 untied": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=16, tie_word_embeddings=True),
    "qwen3 with biases": dict(model_type="qwen3", head_dim=8, attention_bias=True),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "mistral wide heads": dict(model_type="mistral", sliding_window=None, head_dim=12),
    "mistral with a window as long as its context": dict(model_type="mistral", sliding_window=512),
}
ROPES = {
    "default": dict(rope_type="default", rope_theta=500.0),
    "linear": dict(rope_type="linear", factor=3.0, rope_theta=10000.0),
    "llama3": LLAMA3 | dict(rope_theta=10000.0),
    "yarn": YARN | dict(rope_theta=10000.0),
    "yarn, edges not rounded": YARN | dict(truncate=False, rope_theta=10000.0),
    "yarn, attention factor": YARN | dict(attention_factor=0.8, rope_theta=10000.0),
    "yarn, mscale": YARN | dict(mscale=0.7, mscale_all_dim=1.3, rope_theta=10000.0),
    "yarn, half of mscale": YARN | dict(mscale=0.7, rope_theta=10000.0),
    "yarn, betas": YARN | dict(beta_fast=8, beta_slow=2, rope_theta=300.0),
    "yarn that stretches nothing": YARN | dict(factor=1.0, rope_theta=10000.0),
}


def oracle(options, folder, **save):
    """transformers' model of random weights, biases and norms, written to folder by save_pretrained."""
    torch.manual_seed(0)
    options = dict(options)
    family = options.pop("model_type")
    config = AutoConfig.for_model(family, **SMALL | options)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.dim() == 1:  # their start is 0 for biases and 1 for norms, which would hide a missing one
            p.data = p.data + torch.randn_like(p) * 0.3
    model.save_pretrained(folder, **save)
    return model


def rewrite(folder, **changes):
    """Changes keys of config.json by hand; a value of None deletes the key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None or k not in changes}))


def assert_same_logits(theirs, ours, ids=None, tolerance=5e-5):
    if ids is None:
        ids = torch.randint(0, ours.shape.V, (150,), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        a, b = theirs(ids[None]).logits[0], ours.logits(ids)
    assert b.dtype == torch.float32
    assert a.std() > 0.3, "flat logits prove nothing"
    torch.testing.assert_close(b, a.float(), rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------- the same function as transformers
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, tmp_path):
    assert_same_logits(oracle(FAMILIES[name], tmp_path), models.load(str(tmp_path)))


@pytest.mark.parametrize("spelling", ["new", "old", "oldest"])
@pytest.mark.parametrize("name", ROPES)
def test_every_rope_equals_transformers_in_every_spelling_beyond_the_original_context(
    name, spelling, tmp_path
):
    """150 positions, of which the original context has 64.

    Old files say rope_theta and rope_scaling, the oldest "type" for "rope_type".
    """
    theirs = oracle(dict(model_type="llama", rope_parameters=dict(ROPES[name])), tmp_path)
    if spelling != "new":
        rope = dict(ROPES[name])
        theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
        scaling = None if kind == "default" else {"rope_type" if spelling == "old" else "type": kind} | rope
        rewrite(tmp_path, rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
        assert "rope_parameters" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_logits(theirs, models.load(str(tmp_path)))


@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=["llama3", "yarn"])
@pytest.mark.parametrize("place", ["inside", "beside", "both", "nowhere"])
def test_original_context_is_found_where_transformers_finds_it(rope, place, tmp_path):
    """A number beside the rope dict counts more than one inside; without any it is the context."""
    oracle(dict(model_type="llama"), tmp_path)
    inside = {k: v for k, v in rope.items() if k != "original_max_position_embeddings"}
    if place in ("inside", "both"):
        inside["original_max_position_embeddings"] = 100
    rewrite(
        tmp_path,
        rope_parameters=None,
        rope_theta=10000.0,
        rope_scaling=inside,
        original_max_position_embeddings=200 if place in ("beside", "both") else None,
    )
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path), models.load(str(tmp_path)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_keys_left_out_mean_what_they_mean_to_transformers(family, tmp_path):
    sizes = dict(
        num_attention_heads=32,
        num_key_value_heads=8 if family == "mistral" else 32,
        hidden_size=64,
        head_dim=128 if family == "qwen3" else 2,
        rms_norm_eps=1e-6,
    )
    oracle(dict(model_type=family, sliding_window=None) | sizes, tmp_path)
    gone = [
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "hidden_act",
        "layer_types",
        "max_position_embeddings",
        "use_sliding_window",
    ]
    rewrite(tmp_path, **dict.fromkeys(gone + ["sliding_window"] * (family != "mistral")))
    ours = models.load(str(tmp_path))
    assert ours.shape.context == transformers.CONFIG_MAPPING[family]().max_position_embeddings
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path), ours)


def test_null_key_heads_are_as_many_as_query_heads(tmp_path):
    theirs = oracle(dict(model_type="llama", num_key_value_heads=4), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_key_value_heads": None, "head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(theirs, models.load(str(tmp_path)))


def resident_file_bytes() -> int:
    """Pages of mapped files in this process's memory."""
    try:
        text = open("/proc/self/status").read()
    except OSError:
        pytest.skip("reads /proc, which only Linux has")
    return 1024 * int(text.partition("RssFile:")[2].split()[0])


def test_a_file_is_read_a_tensor_at_a_time(tmp_path):
    """With one mapping for the whole file all of it was in memory at the end, beside the model."""
    size = 4 << 20  # bytes
    save_file({f"{i}": torch.full((size // 4,), float(i)) for i in range(12)}, tmp_path / "a.safetensors")
    before, peak = resident_file_bytes(), 0
    for name, tensor in models.read_tensors(str(tmp_path / "a.safetensors")):
        assert tensor.sum() == float(name) * len(tensor)  # every page is read
        peak = max(peak, resident_file_bytes() - before)
    assert size / 2 < peak < 3 * size


def test_many_shards_are_one_model(tmp_path):
    theirs = oracle(dict(model_type="qwen2"), tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert_same_logits(theirs, models.load(str(tmp_path)))


@pytest.mark.parametrize("family", ["llama with biases", "qwen2", "qwen3", "mistral"])
def test_bf16_logits_are_as_near_to_fp32_as_transformers_are(family, tmp_path):
    theirs = oracle(FAMILIES[family], tmp_path)
    ids = torch.randint(0, 61, (100,), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        exact = theirs(ids[None]).logits[0]
        rounded = theirs.to(torch.bfloat16)(ids[None]).logits[0].float()
    ours = models.load(str(tmp_path), dtype=torch.bfloat16).logits(ids)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() < 1.2 * (rounded - exact).norm() < 0.1 * exact.norm()


@pytest.mark.model
@pytest.mark.parametrize(
    "which, dtype",
    [("smollm2", torch.float32), ("smollm2", torch.bfloat16), ("qwen", torch.float32)],
    ids=str,
)
def test_real_checkpoint_gives_transformers_logits(which, dtype, request):
    folder = request.getfixturevalue(which)
    ids = torch.arange(1000, 1024)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids[None]).logits[0]
        ours = models.load(folder, dtype=dtype).logits(ids)
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    else:  # single logits move by tenths in bf16; the distributions stay together
        divergence = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1)
        assert divergence.mean() < 0.02


# -------------------------------------------------------------------------------------------- refused by name
REFUSED = {
    "sliding_window": dict(model_type="mistral", sliding_window=4096, max_position_embeddings=32768),
    "sliding_window = 4096": dict(
        model_type="mistral", sliding_window="absent", max_position_embeddings=32768
    ),
    "sliding_window = 16": dict(model_type="qwen2", use_sliding_window=True, sliding_window=16),
    "sliding_window = 32": dict(model_type="qwen3", use_sliding_window=True, sliding_window=32),
    "layer_types = ['sliding_attention']": dict(
        model_type="qwen2", layer_types=["full_attention", "sliding_attention"]
    ),
    "model_type 'mixtral'": dict(model_type="mixtral"),
    "model_type 'qwen2_moe'": dict(model_type="qwen2_moe"),
    "model_type 'gemma2'": dict(model_type="gemma2"),
    "model_type None": dict(model_type=None),
    "num_local_experts = 8": dict(num_local_experts=8),
    "num_experts = 4": dict(num_experts=4),
    "attn_logit_softcapping = 50.0": dict(attn_logit_softcapping=50.0),
    "final_logit_softcapping = 30.0": dict(final_logit_softcapping=30.0),
    "'dynamic'": dict(rope_scaling=dict(type="dynamic", factor=2.0)),
    "'longrope'": dict(rope_parameters=dict(rope_type="longrope", factor=2.0)),
    "partial_rotary_factor 0.5": dict(partial_rotary_factor=0.5),
    "partial_rotary_factor 0.25": dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.25)),
    "full_attention": dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e4))),
    "type linear and lacks its factor": dict(rope_scaling=dict(type="linear")),
    "type yarn and lacks its factor": dict(rope_scaling=dict(rope_type="yarn", factor=None)),
    "lacks its low_freq_factor": dict(
        rope_scaling=dict(rope_type="llama3", factor=8.0, high_freq_factor=4.0)
    ),
    "hidden_act = 'gelu'": dict(hidden_act="gelu"),
    "quantization_config": dict(quantization_config=dict(quant_method="gptq", bits=4)),
    "attention_dropout = 0.1": dict(attention_dropout=0.1),
    "lacks num_attention_heads": dict(num_attention_heads="absent"),
    "lacks vocab_size, hidden_size": dict(vocab_size="absent", hidden_size="absent"),
    "4 query heads over 3 key heads": dict(num_key_value_heads=3),
    "4 query heads over 8 key heads": dict(
        model_type="mistral", sliding_window=None, num_key_value_heads="absent"
    ),
    "of width 7": dict(head_dim=7),
}


@pytest.mark.parametrize("said", REFUSED)
def test_option_that_is_not_implemented_is_refused_by_name(said):
    config = {k: v for k, v in (dict(TINY) | REFUSED[said]).items() if v != "absent"}
    with pytest.raises(ValueError) as e:
        models.create(config, seed=0)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_options_that_are_switched_off_are_not_refused():
    qwen = dict(
        model_type="qwen2",
        use_sliding_window=False,
        sliding_window=32,
        max_window_layers=1,
        layer_types=["full_attention"] * 2,
    )
    neutral = dict(
        attention_dropout=0.0,
        pretraining_tp=2,
        quantization_config=None,
        rope_scaling=None,
        rope_parameters=None,
        partial_rotary_factor=1.0,
    )
    models.Shape(TINY | qwen)
    models.Shape(TINY | neutral)


def damaged(tmp_path, change):
    """A tiny checkpoint whose tensors `change` has been at."""
    models.save(models.create(dict(TINY), seed=0), str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return str(tmp_path)


def refusal(*args, **kwargs) -> str:
    with pytest.raises(ValueError) as e:
        models.load(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    def lose(tensors):
        del tensors["model.layers.1.self_attn.k_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)

    said = refusal(damaged(tmp_path, lose))
    assert "missing 2: model.layers.1.self_attn.k_proj.weight, model.norm.weight" in said
    assert "unknown 1: model.layers.7.mlp.up_proj.weight" in said

    def bend(tensors):
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(32, 63)

    said = refusal(damaged(tmp_path, bend))
    assert "model.layers.0.mlp.down_proj.weight" in said and "(32, 63)" in said and "(32, 64)" in said


def test_bias_that_the_config_does_not_ask_for_is_unknown_and_not_dropped(tmp_path):
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    said = refusal(damaged(tmp_path, lambda tensors: tensors.update(bias)))
    assert "unknown 1: model.layers.0.self_attn.q_proj.bias" in said


def test_tensors_that_old_checkpoints_compute_from_the_config_are_harmless(tmp_path):
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    models.load(damaged(tmp_path, lambda tensors: tensors.update(frequencies)))


def test_tied_head_stored_a_second_time_is_harmless_only_when_equal(tmp_path):
    """transformers unties a head that differs; ignoring the tensor gave another model in silence."""

    def store_head(tensors, difference):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + difference

    same = damaged(tmp_path, lambda tensors: store_head(tensors, 0))
    assert models.load(same).untied_head is None
    said = refusal(damaged(tmp_path, lambda tensors: store_head(tensors, 1)))
    assert "lm_head.weight" in said and "tie_word_embeddings" in said


def test_untied_checkpoint_without_a_head_is_refused(tmp_path):
    folder = damaged(tmp_path, lambda t: None)
    rewrite(tmp_path, tie_word_embeddings=False)
    assert "missing 1: lm_head.weight" in refusal(folder)


def test_folders_that_are_no_checkpoints_are_named(tmp_path):
    assert "no model folder" in refusal(str(tmp_path / "nowhere"))
    assert "no model folder nowhere" in refusal("nowhere")
    assert "no config.json" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert "lacks model.safetensors" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    assert "config.json is not JSON" in refusal(str(tmp_path))


def test_missing_and_cut_shards_are_named(tmp_path):
    oracle(dict(model_type="llama"), tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert f"{shard.name} is not a whole safetensors file" in refusal(str(tmp_path))
    shard.unlink()
    assert f"lacks {shard.name}" in refusal(str(tmp_path))


def test_whole_file_counts_more_than_an_index_left_beside_it(tmp_path):
    """The index used to win: a model was saved where shards had been, and the old shards were read."""
    oracle(dict(model_type="llama"), tmp_path, max_shard_size="10KB")
    changed = models.load(str(tmp_path))
    changed.embed.data += 1
    models.save(changed, str(tmp_path))
    assert torch.equal(models.load(str(tmp_path)).embed, changed.embed)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.get_input_embeddings().weight, changed.embed)


UNREACHABLE = dict(HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param(dict(HF_HUB_OFFLINE="1"), id="offline", marks=pytest.mark.slow),
        pytest.param(UNREACHABLE, id="unreachable", marks=pytest.mark.slow),
    ],
)
def test_hub_out_of_reach_is_one_sentence_and_quick(environment, tmp_path):
    code = "import model\ntry: model.load('nobody/nothing')\nexcept ValueError as e: print(e)"
    start = time.perf_counter()
    environment = os.environ | environment | dict(HF_HOME=str(tmp_path))
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = "nobody/nothing is not a folder here and could not be had from the hub"
    assert out.stdout.startswith(said) and out.stdout.count("\n") == 1, out.stderr
    assert "give the path of a downloaded checkpoint folder" in out.stdout
    assert time.perf_counter() - start < 60


# -------------------------------------------------------------------------------------------------- files out
@pytest.mark.parametrize("name", ["llama with biases", "smollm2", "qwen2", "qwen3", "mistral wide heads"])
def test_saved_model_loads_in_transformers_and_here(name, tmp_path):
    oracle(FAMILIES[name] | dict(rope_parameters=YARN | dict(rope_theta=10000.0)), tmp_path / "theirs")
    ours = models.load(str(tmp_path / "theirs"))
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(1.01)  # not what was read
    models.save(ours, str(tmp_path / "ours"))
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert_same_logits(theirs, ours)
    again = models.load(str(tmp_path / "ours"))
    for a, b in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_saved_config_names_the_dtype_of_the_weights_in_its_own_key(key, tmp_path):
    model = models.create(dict(TINY) | {key: "float32"}, seed=0, dtype=torch.bfloat16)
    models.save(model, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config[key] == config["dtype"] == "bfloat16"
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "model.safetensors").values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_loading_in_bf16_never_takes_fp32s_memory(tmp_path):
    """Weights were made in fp32 and then converted: 28 GB instead of 14 for a 7B model, on a GPU of 24."""
    models.save(models.create(dict(TINY), seed=0), str(tmp_path))
    made = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if "empty" in str(function) and out.device.type == "cpu" and out.dtype.is_floating_point:
                made.append(out.dtype)
            return out

    with Sizes():
        assert models.load(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert made and set(made) == {torch.bfloat16}


def test_create_is_a_function_of_the_seed_and_of_the_configs_spread():
    a, b, c = (models.create(dict(TINY, hidden_size=64), seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed, c.embed)
    assert abs(float(a.embed.detach().std()) / TINY["initializer_range"] - 1) < 0.1
    assert torch.equal(a.norm.weight, torch.ones(64))


# ------------------------------------------------------- always true 3: a shared prompt is separate sequences
ODD = dict(
    TINY,
    model_type="qwen3",
    head_dim=8,
    num_attention_heads=6,
    num_key_value_heads=2,
    attention_bias=True,
    tie_word_embeddings=False,
)
CASES = {
    "ragged groups": (
        [[1, 2, 3, 4, 5], [6], [7, 8]],
        [[[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]], [[1, 1, 1, 1]], [[9, 8], [2]]],
    ),
    "one token completions": ([[3, 4], [5]], [[[1], [1], [2]], [[7]]]),
    "one token prompts": ([[0], [0], [47]], [[[0, 0]], [[0, 1], [0, 0, 0]], [[47]]]),
    "one sequence": ([[5, 6, 7]], [[[8, 9]]]),
    "an empty group between": ([[5, 6], [7, 8], [9]], [[[1, 2]], [], [[3]]]),
    "stop ids in the middle": ([[2, 2, 1], [2]], [[[2, 5, 2], [2, 2]], [[5, 2]]]),
    "lengths far apart": ([list(range(40)), [1]], [[[3] * 20, [4]], [[5] * 60, [6] * 2, [7]]]),
}


def one_by_one(model, prompts, completions):
    """The ten-line oracle: logp and entropy from the whole logits of each sequence by itself."""
    logps, entropies = [], []
    for prompt, group in zip(prompts, completions):
        for completion in group:
            packed = models.Packed(model, [prompt + completion], [[]])
            hidden = model(packed.ids, packed.positions, packed)
            logp = F.log_softmax(hidden @ model.head.t(), -1)[len(prompt) - 1 : -1]
            logps.append(logp.gather(1, torch.tensor(completion)[:, None])[:, 0])
            entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(logps), torch.cat(entropies)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize("config", [TINY, ODD], ids=["llama", "qwen3"])
@pytest.mark.parametrize("case", CASES)
def test_shared_prompt_equals_separate_sequences_in_logits_loss_and_every_gradient(
    case, config, dtype, tolerance
):
    model = models.create(dict(config), seed=3, dtype=dtype)
    prompts, completions = CASES[case]
    g = torch.Generator().manual_seed(1)
    results = []

    def together(model, prompts, completions):
        return model.completion_logprobs(prompts, completions)[:2]

    for function in (together, one_by_one):
        logp, entropy = function(model, prompts, completions)
        a, b = (torch.randn(len(logp), generator=g.manual_seed(s), dtype=dtype) for s in (1, 2))
        loss = (logp * a).sum() + (entropy * b).sum()
        model.zero_grad()
        loss.backward()
        results.append([logp, entropy, loss] + [p.grad.clone() for p in model.parameters()])
    scale = max(x.detach().norm() for x in results[1][3:])
    for i, (ours, theirs) in enumerate(zip(*results)):
        difference = (ours - theirs).detach().norm()
        assert difference <= tolerance * (theirs.detach().norm() + (scale * 1e-2 if i > 2 else 1.0)), i


def test_logp_equals_transformers_token_by_token(tmp_path):
    """The whole way: files, packing, shift by one, head; rows number completions over all groups."""
    theirs = oracle(FAMILIES["qwen2"], tmp_path)
    prompts, completions = CASES["ragged groups"]
    model = models.load(str(tmp_path))
    logp, entropy, rows = model.completion_logprobs(prompts, completions, temperature=0.7)
    flat = [(p, c) for p, group in zip(prompts, completions) for c in group]
    assert rows.tolist() == [i for i, (_, c) in enumerate(flat) for _ in c]
    for i, (prompt, completion) in enumerate(flat):
        logits = theirs(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        z = (logits / 0.7).log_softmax(-1)
        expected = z[range(len(completion)), completion]
        torch.testing.assert_close(logp[rows == i], expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(entropy[rows == i], -(z.exp() * z).sum(-1), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_targets_are_what_the_log_probabilities_are_made_of(tiny, case):
    prompts, completions = CASES[case]
    hidden, targets = tiny.completion_hidden(prompts, completions)
    assert targets.tolist() == [i for group in completions for completion in group for i in completion]
    logp = (hidden @ tiny.head.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logp, tiny.completion_logprobs(prompts, completions)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("truncation", [dict(top_k=5), dict(top_p=0.7), dict(min_p=0.2)], ids=str)
def test_truncated_log_probabilities_are_renormalised_over_the_kept_set(tiny, truncation):
    prompts, completions = CASES["ragged groups"]
    hidden, targets = tiny.completion_hidden(prompts, completions)
    logits = (hidden @ tiny.head.t() / 0.8).detach()
    kept = truncate_(logits.clone(), keep=targets, **truncation).isfinite()
    assert not kept.all(1).any(), "nothing is cut off"
    expected = logits.masked_fill(~kept, float("-inf")).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    logp, _, _ = tiny.completion_logprobs(prompts, completions, temperature=0.8, **truncation)
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.model
def test_shared_prompt_equals_separate_sequences_on_a_real_model(smollm2):
    model = models.load(smollm2)
    prompts, completions = [list(range(100, 130)), [9]], [[[5, 6, 7, 8], [9, 2]], [[11, 2]]]
    with torch.no_grad():
        ours = model.completion_logprobs(prompts, completions)[:2]
        theirs = one_by_one(model, prompts, completions)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "prompts, completions, said",
    [
        ([[]], [[[1]]], "prompt is empty"),
        ([[1]], [[[2], []]], "completion 1 is empty"),
        ([[1] * 40], [[[1] * 25]], "65 tokens"),
        ([[1] * 65], [[]], "65 tokens"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_a_sentence(tiny, prompts, completions, said):
    with pytest.raises(ValueError, match=said):
        tiny.completion_logprobs(prompts, completions)


def test_sequence_that_fills_the_context_is_taken(tiny):
    assert len(tiny.completion_logprobs([[1] * 40], [[[1] * 24]])[0]) == 24
    assert tiny.logits(torch.ones(64, dtype=torch.long)).shape == (64, 48)


def test_rope_angles_stay_fp32_in_a_bf16_model():
    """Position 257 does not exist in bf16: cos and sin of it must be made before rounding."""
    model = models.create(dict(TINY, max_position_embeddings=600), seed=0).to(torch.bfloat16)
    model.logits(torch.arange(10))
    assert model.to(torch.bfloat16).inv_freq.dtype == torch.float32 and "inv_freq" not in model.state_dict()


# ------------------------------------------------------------------------------- always true 2: micro-batches
def loss_and_gradients(model, prompts, completions, micro_tokens):

    def weights(b, g):
        """Random weights of a completion's tokens, the same in every cut."""
        return torch.randn(len(completions[b][g]), generator=torch.Generator().manual_seed(31 * b + g))

    model.zero_grad()
    total, cuts = 0.0, models.micro_batches(prompts, completions, micro_tokens)
    for cut in cuts:
        chosen_prompts = [prompts[b] for b, _ in cut]
        chosen = [[completions[b][g] for g in members] for b, members in cut]
        logp, entropy, _ = model.completion_logprobs(chosen_prompts, chosen)
        w = torch.cat([weights(b, g) for b, members in cut for g in members])
        loss = (logp * w).sum() - 0.1 * entropy.sum()
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in model.parameters()], len(cuts)


def test_gradient_does_not_depend_on_micro_batches(tiny):
    g = torch.Generator().manual_seed(5)
    length = lambda low, high: int(torch.randint(low, high, (), generator=g))
    prompts = [torch.randint(0, 48, (length(1, 20),), generator=g).tolist() for _ in range(4)]
    ids = lambda: torch.randint(0, 48, (length(0, 20),), generator=g).tolist()
    completions = [[ids() for _ in range(5)] for _ in range(4)]
    whole, counts = loss_and_gradients(tiny, prompts, completions, 10**6), set()
    for micro_tokens in (200, 100, 60, 35, 20, 5, 1):  # from 50 on a group is larger than one micro-batch
        cut = loss_and_gradients(tiny, prompts, completions, micro_tokens)
        counts.add(cut[2])
        assert abs(cut[0] - whole[0]) < 1e-5 * abs(whole[0])
        for a, b in zip(cut[1], whole[1]):
            assert (a - b).norm() <= 1e-5 * b.norm()
    assert whole[2] == 1 and len(counts) >= 5


LENGTHS = st.tuples(
    st.integers(1, 60), st.lists(st.integers(0, 90), max_size=9)
)  # a prompt and its completions
BATCH = st.lists(LENGTHS, min_size=1, max_size=12)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(BATCH, st.integers(1, 400))
@example([(10, [20] * 9)], 120)
@example([(10, [500]), (10, [20, 20]), (10, [20, 20])], 100)
@example([(50, [10, 10])], 20)
@example([(50, [0, 0])], 20)  # once looped for ever: an empty micro-batch does not fit into less than nothing
def test_micro_batches_hold_every_completion_once_within_the_limit_and_balanced(batch, micro_tokens):
    prompts, completions = [[1] * P for P, _ in batch], [[[1] * C for C in owns] for _, owns in batch]
    cuts = models.micro_batches(prompts, completions, micro_tokens)
    found = sorted((b, g) for cut in cuts for b, members in cut for g in members)
    assert found == sorted((b, g) for b, (_, owns) in enumerate(batch) for g, C in enumerate(owns) if C)
    assert all(members and members == sorted(members) for cut in cuts for _, members in cut)
    assert all([b for b, _ in cut] == sorted({b for b, _ in cut}) for cut in cuts), (
        "a prompt stands twice in a micro-batch"
    )
    sizes = [sum(batch[b][0] + sum(batch[b][1][g] for g in members) for b, members in cut) for cut in cuts]
    for size, cut in zip(sizes, cuts):
        assert size <= micro_tokens or [len(members) for _, members in cut] == [1]
    # balanced: only a fullest one that is a single piece can leave another under a third of it; parts of a
    # group that meet save a prompt
    if cuts and len(cuts[0]) > 1:
        some_split = any(sum(b in dict(cut) for cut in cuts) > 1 for b in range(len(batch)))
        assert min(sizes) >= max(sizes) / 3 or some_split
    # few: more would be needed only if every one were less than half full
    pieces = [batch[b][0] + sum(batch[b][1][g] for g in members) for cut in cuts for b, members in cut]
    if max(pieces, default=0) <= micro_tokens / 2:
        assert len(cuts) <= max(1, -(-2 * sum(pieces) // micro_tokens))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(50, 300))
def test_micro_batches_are_hardly_more_than_first_fit_needs(sizes, micro_tokens):
    bins: list[int] = []
    for size in sorted((s + 1 for s in sizes), reverse=True):  # first fit decreasing, within 2/9 of the best
        i = next((i for i, load in enumerate(bins) if load + size <= micro_tokens), None)
        if i is None:
            bins.append(size)
        else:
            bins[i] += size
    cuts = models.micro_batches([[1]] * len(sizes), [[[1] * C] for C in sizes], micro_tokens)
    assert len(cuts) <= 1.25 * len(bins) + 1


def test_group_too_large_is_cut_evenly():
    """Filled one after another, 9 completions of 20 after a prompt of 10 went 5 + 4."""
    for n in (6, 9, 10, 11, 16):
        cuts = models.micro_batches([[1] * 10], [[[1] * 20] * n], 110)
        parts = [len(members) for cut in cuts for _, members in cut]
        assert max(parts) - min(parts) <= 1 and len(parts) == -(-n // 5)


def test_one_long_completion_does_not_scatter_the_rest():
    """One more was added while any was over the limit: one very long completion gave every group its own."""
    cuts = models.micro_batches([[1] * 5] * 9, [[[1] * 500]] + [[[1] * 20]] * 8, 100)
    assert sorted(len(cut) for cut in cuts) == [1, 4, 4]
    assert cuts[0] == [(0, [0])], "the fullest is first: what does not fit in memory fails at once"


def test_a_step_without_completions_has_no_micro_batches():
    assert models.micro_batches([[1], [2]], [[], [[], []]], 100) == []
