"""lora.py: adapters start as nothing, learn by the formula, and go to PEFT and back with the same logits."""

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lora
import model as models
from conftest import TINY
from optim import AdamW
from test_model import FAMILIES, assert_same_logits, oracle

# PEFT's warnings, about options it is asked to write.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
ALL = models.ATTENTION + models.MLP
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
BATCH = [[1, 2, 3], [4]], [[[5, 6], [7]], [[8, 9, 10]]]


def adapted(targets=ALL, *, rank=3, alpha=6.0, dtype=torch.float32, config=TINY, trained=True, **options):
    """A tiny model with adapters; trained: B is not zero, as after some updates."""
    base = models.create(dict(config), seed=0, dtype=dtype)
    model = lora.apply(base, rank=rank, alpha=alpha, targets=targets, **options)
    g = torch.Generator().manual_seed(9)
    for layer in lora.layers(model).values():
        for B in layer.B:
            B.data = torch.randn(B.shape, generator=g, dtype=B.dtype) * 0.3 * trained
    return model


@pytest.mark.parametrize(
    "targets", [ALL, ("q_proj", "v_proj"), ("down_proj",), ("up_proj", "o_proj")], ids=str
)
def test_training_starts_from_the_base_and_only_adapters_learn(targets):
    base, model = models.create(dict(TINY), seed=0), adapted(targets, trained=False)
    assert torch.equal(model.logits(IDS), base.logits(IDS))
    model.completion_logprobs(*BATCH)[0].sum().backward()
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(".A" in name or ".B." in name for name in learns)
    assert sum(len(layer.B) for layer in lora.layers(model).values()) == len(targets) * 2  # layers


@pytest.mark.parametrize("rank, alpha", [(1, 1.0), (4, 32.0), (40, 8.0)])
def test_start_is_pefts_and_a_function_of_the_seed(rank, alpha):

    def start(seed):
        model = adapted(rank=rank, alpha=alpha, trained=False, seed=seed)
        return torch.cat([layer.A.detach().flatten() for layer in lora.layers(model).values()])

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))
    for layer in lora.layers(adapted(rank=rank, alpha=alpha, trained=False)).values():
        bound = layer.base.weight.shape[1] ** -0.5  # kaiming_uniform(a=sqrt(5)), as nn.Linear's weight
        assert layer.scale == alpha / rank and layer.A.abs().max() <= bound
        assert abs(float(layer.A.detach().std()) / (bound / 3**0.5) - 1) < 0.35
        assert not any(B.any() for B in layer.B)


@pytest.mark.parametrize(
    "targets", [ALL, ("q_proj", "v_proj"), ("down_proj",), ("k_proj", "gate_proj")], ids=str
)
def test_gradients_equal_those_of_a_merged_weight(targets):
    """fp64: W + scale * B A written out and differentiated by autograd, for every adapter of the model."""
    model = adapted(targets, dtype=torch.float64, config=dict(TINY, attention_bias=True))
    logp, entropy, _ = model.completion_logprobs(*BATCH)
    loss = (logp * torch.linspace(-1, 1, len(logp))).sum() + entropy.sum()
    loss.backward()

    plain = models.create(dict(TINY, attention_bias=True), seed=0, dtype=torch.float64)
    leaves, weights = {}, dict(plain.named_parameters())
    for name, layer in lora.layers(model).items():
        weight, row = weights[f"{name}.weight"].detach(), 0
        A = leaves[f"{name}.A"] = layer.A.detach().clone().requires_grad_()
        pieces = []
        for part, size in layer.parts.items():
            piece = weight[row : row + size]
            if part in layer.targets:
                i = layer.targets.index(part)
                B = leaves[f"{name}.B.{i}"] = layer.B[i].detach().clone().requires_grad_()
                piece = piece + 6.0 / 3 * B @ A[3 * i : 3 * i + 3]
            pieces.append(piece)
            row += size
        weights[f"{name}.weight"] = torch.cat(pieces)
    weights = {f"model.{name}": weight for name, weight in weights.items()}
    logp, entropy, _ = torch.func.functional_call(_Scored(plain), weights, BATCH)
    theirs = (logp * torch.linspace(-1, 1, len(logp))).sum() + entropy.sum()
    torch.testing.assert_close(loss, theirs, rtol=1e-12, atol=1e-12)
    ours = dict(model.named_parameters())
    for name, grad in zip(leaves, torch.autograd.grad(theirs, list(leaves.values()))):
        torch.testing.assert_close(ours[name].grad, grad, rtol=1e-10, atol=1e-12)


class _Scored(torch.nn.Module):
    """completion_logprobs as a forward, so that functional_call can put other weights under it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, prompts, completions):
        return self.model.completion_logprobs(prompts, completions)


def test_dropout_acts_in_training_on_the_adapter_alone():
    model, base = adapted(dropout=0.5), models.create(dict(TINY), seed=0)
    sure = adapted()
    model.eval()
    assert torch.equal(model.logits(IDS), sure.logits(IDS))
    model.train()
    torch.manual_seed(0)
    first, second = model.logits(IDS), model.logits(IDS)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(model.logits(IDS), first)  # torch's generator is the only source: a seeded run repeats
    with lora.disabled(model):
        assert torch.equal(model.logits(IDS), base.logits(IDS))
    layer, x = next(iter(lora.layers(model).values())), torch.randn(4, 32)
    mean = sum(layer(x) for _ in range(2000)).detach() / 2000
    torch.testing.assert_close(mean, layer.eval()(x).detach(), rtol=0.1, atol=0.15)


def test_disabled_is_the_base_and_comes_back_on_errors_and_when_nested():
    """The inner of two nested blocks used to switch the adapters on again for the rest of the outer one."""
    model, base = adapted(), models.create(dict(TINY), seed=0).logits(IDS)
    on = model.logits(IDS)
    assert not torch.allclose(on, base)
    with pytest.raises(RuntimeError, match="inside"), lora.disabled(model) as inside:
        assert inside is model and torch.equal(model.logits(IDS), base)
        with lora.disabled(model):
            pass
        assert torch.equal(model.logits(IDS), base)
        raise RuntimeError("inside")
    assert torch.equal(model.logits(IDS), on)


def test_bf16_base_has_fp32_adapters_that_learn():
    model = adapted(dtype=torch.bfloat16)
    exact = adapted()
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
    for m in (model, exact):
        m.completion_logprobs(*BATCH)[0].sum().backward()
    for (name, a), b in zip(model.named_parameters(), exact.parameters()):
        if a.requires_grad:
            alike = F.cosine_similarity(a.grad.flatten(), b.grad.flatten(), 0)
            assert a.grad.dtype == torch.float32 and alike > 0.98, name
    assert (model.logits(IDS) - exact.logits(IDS)).norm() < 0.05 * exact.logits(IDS).norm()


@pytest.mark.parametrize(
    "targets, said", [((), "are empty"), (("q_proj", "qproj"), r"\['qproj'\]"), (("lm_head",), "lm_head")]
)
def test_targets_the_model_does_not_have_are_named_and_nothing_is_frozen(targets, said):
    model = models.create(dict(TINY), seed=0)
    with pytest.raises(ValueError, match=said):
        lora.apply(model, rank=2, alpha=2.0, targets=targets)
    assert all(p.requires_grad for p in model.parameters()) and not lora.layers(model)


def test_adapters_are_not_put_on_adapters():
    """The wrapper has `parts` like what it wraps, so a second apply used to adapt the adapter."""
    with pytest.raises(ValueError, match="has adapters already"):
        lora.apply(adapted(), rank=2, alpha=2.0, targets=ALL)


# -------------------------------------------------------------------------------------- PEFT and transformers
@pytest.mark.parametrize("name", ["llama with biases", "smollm2", "qwen2", "qwen3", "mistral wide heads"])
def test_adapter_saved_here_loads_in_peft_merges_to_transformers_and_loads_here(name, tmp_path):
    oracle(FAMILIES[name], tmp_path / "base")
    model = lora.apply(models.load(str(tmp_path / "base")), rank=4, alpha=8.0, targets=ALL)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn_like(p) * 0.2
    lora.save_adapter(model, str(tmp_path / "adapter"), base=str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same_logits(theirs, model)

    models.save(model, str(tmp_path / "merged"), lora.merged_state(model))
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert_same_logits(whole, model)
    assert_same_logits(whole, models.load(str(tmp_path / "merged")))

    again = lora.load_adapter(models.load(str(tmp_path / "base")), str(tmp_path / "adapter"))
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def peft_adapter(tmp_path, name="llama", **options):
    """transformers' model with a PEFT adapter of random weights, both written to tmp_path."""
    plain = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = plain | dict(init_lora_weights=False) | options
    theirs = peft.get_peft_model(oracle(FAMILIES[name], tmp_path / "base"), peft.LoraConfig(**options)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    return theirs


OPTIONS = {
    "llama": dict(),
    "qwen2": dict(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_dropout=0.1,
    ),
    "qwen3": dict(target_modules="all-linear", r=7, lora_alpha=3),
    "mistral": dict(target_modules=r".*\.mlp\.(up|down)_proj"),
    "smollm2": dict(use_rslora=True, r=5, lora_alpha=10),
    "llama tied": dict(target_modules=["down_proj"], init_lora_weights=False),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_adapter_made_by_peft_loads_here(name, tmp_path):
    theirs = peft_adapter(tmp_path, name, **OPTIONS[name])
    model = lora.load_adapter(models.load(str(tmp_path / "base")), str(tmp_path / "adapter"))
    assert_same_logits(theirs, model)
    # into the model that has it already, as on resume; and out again in our own words
    lora.load_adapter(model, str(tmp_path / "adapter"))
    lora.save_adapter(model, str(tmp_path / "ours"), base=str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert_same_logits(again, model)


def test_merged_weights_are_added_in_fp32_and_rounded_once():
    model = adapted(dtype=torch.bfloat16)
    state = lora.merged_state(model)
    layer = lora.layers(model)["blocks.0.down"]
    exact = layer.base.weight.double() + layer.scale * layer.B[0].double() @ layer.A.double()
    merged = state["blocks.0.down.weight"]
    through_fp32 = torch.equal(merged, exact.float().bfloat16())
    assert through_fp32 or (merged != exact.bfloat16()).float().mean() < 0.01
    assert state.keys() == dict(models.create(dict(TINY), seed=0).named_parameters()).keys()
    assert all(t.dtype == torch.bfloat16 for t in state.values())


# ------------------------------------------------------------------------------------- merged while it trains
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), ("down_proj",)], ids=str)
def test_merged_policy_is_the_exported_model_to_the_bit(targets, dtype, tmp_path):
    config = dict(TINY, attention_bias=True)
    model = lora.merge(adapted(targets, dtype=dtype, config=config))
    models.save(model, str(tmp_path), lora.merged_state(model))
    exported = models.load(str(tmp_path), dtype=dtype)
    assert torch.equal(model.logits(IDS), exported.logits(IDS))
    ours, theirs = model.completion_logprobs(*BATCH), exported.completion_logprobs(*BATCH)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_merged_and_unmerged_are_one_function_with_the_same_gradients():
    """fp64, where nothing but the order of sums tells them apart."""
    results = []
    for merged in (True, False):
        model = adapted(dtype=torch.float64)
        if merged:
            lora.merge(model)
        logp, entropy, _ = model.completion_logprobs(*BATCH)
        loss = (logp * torch.linspace(-1, 1, len(logp))).sum() + entropy.sum()
        loss.backward()
        results.append([logp, entropy] + [p.grad for p in model.parameters() if p.requires_grad])
    assert len(results[0]) > 20 and any(grad.any() for grad in results[0][2:])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merging_again_after_an_update_writes_the_new_weights_to_the_same_place(dtype):
    """CUDA graphs hold the addresses: a new tensor would leave them with the policy of the step before."""
    model = lora.merge(adapted(dtype=dtype))
    adapters = lora.layers(model).values()
    places = [layer.merged.data_ptr() for layer in adapters]
    before = [layer.merged.clone() for layer in adapters]
    optimizer = AdamW(list(model.named_parameters()), lr=0.1)
    model.completion_logprobs(*BATCH)[0].sum().backward()
    optimizer.step(0.1)
    lora.merge(model)
    assert places == [layer.merged.data_ptr() for layer in adapters]
    for layer, was in zip(adapters, before):
        assert torch.equal(layer.merged, layer.merged_weight()) and not torch.equal(layer.merged, was)


def test_merged_weights_that_are_out_of_date_are_refused():
    """After an update, a write by hand or an exchanged tensor the old policy would go on in silence."""
    model = lora.merge(adapted())
    optimizer = AdamW(list(model.named_parameters()), lr=0.1)
    layer = next(iter(lora.layers(model).values()))

    def refused():
        with pytest.raises(RuntimeError, match="lora.merge"):
            model.logits(IDS)
        lora.merge(model).logits(IDS)

    optimizer.step(0.1)
    refused()
    with torch.no_grad():
        layer.B[0].add_(1.0)
    refused()
    layer.A.data = layer.A.data.clone()
    refused()


def test_merged_or_not_disabled_is_the_base_and_unmerged_is_the_adapter_again():
    model = adapted()
    base, apart = models.create(dict(TINY), seed=0).logits(IDS), model.logits(IDS)
    together = lora.merge(model).logits(IDS)
    with lora.disabled(model):
        assert torch.equal(model.logits(IDS), base)
    assert torch.equal(model.logits(IDS), together)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert torch.equal(lora.unmerge(model).logits(IDS), apart)


def test_merged_weights_are_in_no_file_and_no_optimiser(tmp_path):
    model = adapted()
    names, state = [name for name, _ in model.named_parameters()], model.state_dict().keys()
    exported = lora.merged_state(model)
    lora.save_adapter(model, str(tmp_path / "apart"), base="x")
    lora.merge(model)
    lora.save_adapter(model, str(tmp_path / "merged"), base="x")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "apart" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert names == [name for name, _ in model.named_parameters()] and state == model.state_dict().keys()
    again = lora.merged_state(model)
    assert exported.keys() == again.keys() and all(torch.equal(exported[k], again[k]) for k in again)


def test_an_adapter_with_dropout_is_not_merged():
    model = adapted(dropout=0.1)
    with pytest.raises(ValueError, match="dropout 0.1 cannot be merged"):
        lora.merge(model)
    assert all(layer.merged is None for layer in lora.layers(model).values())


# ------------------------------------------------------------------------------------------------------ files
def test_alpha_is_written_as_an_int_where_it_is_one(tmp_path):
    """PEFT's lora_alpha is an int and vLLM refuses 32.0; 10 / 3 * 3 must not come back as 9.999."""
    for alpha, written in ((32.0, 32), (10.0, 10), (0.5, 0.5)):
        lora.save_adapter(adapted(alpha=alpha), str(tmp_path), base="x/y")
        found = json.loads((tmp_path / "adapter_config.json").read_text())
        assert found["lora_alpha"] == written and type(found["lora_alpha"]) is type(written)
        assert found["base_model_name_or_path"] == "x/y"


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(use_dora=True), "use_dora"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (dict(alpha_pattern={"q_proj": 2}), "alpha_pattern"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(bias="all"), "bias"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(layers_to_transform=[1]), "not for this model"),
        (dict(init_lora_weights="olora"), "init_lora_weights"),
        (dict(target_modules=["q_proj", "embed_tokens"]), "embed_tokens"),
        (dict(target_modules=["v_proj", "lm_head"]), "lm_head"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_adapters_that_are_not_plain_lora_are_refused_by_name(options, said, tmp_path):
    peft_adapter(tmp_path, **options)
    model = models.load(str(tmp_path / "base"))
    with pytest.raises(ValueError) as e:
        lora.load_adapter(model, str(tmp_path / "adapter"))
    assert said in str(e.value) and "\n" not in str(e.value)


def test_adapter_of_another_kind_model_rank_or_alpha_is_refused_and_nothing_is_changed(tmp_path):
    """Tensors were checked while they were copied: the last one being misshapen left half of the file."""
    model = adapted()
    lora.save_adapter(model, str(tmp_path), base="")
    path, tensors = tmp_path / "adapter_config.json", load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads(path.read_text())
    before = [p.clone() for p in model.parameters()]

    def refused(said, change=None, drop=(), **keys):
        path.write_text(json.dumps(config | keys))
        changed = {name: t + 1 for name, t in tensors.items() if name not in drop} | (change or {})
        save_file(changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError) as e:
            lora.load_adapter(model, str(tmp_path))
        assert said in str(e.value) and "\n" not in str(e.value)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))

    last = sorted(tensors)[-1]
    refused("type IA3", peft_type="IA3")
    refused("rank 4", r=4)
    refused("alpha 7", lora_alpha=7)
    refused("fan_in_fan_out", fan_in_fan_out=True)
    refused("missing ['" + last, drop=[last])
    refused(
        "unknown ['base_model.model.model.layers.9",
        change={"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(2)},
    )
    refused(f"{last} has shape (7, 7)", change={last: torch.zeros(7, 7)})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="cannot be read"):
        lora.load_adapter(model, str(tmp_path))
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        lora.load_adapter(model, str(tmp_path))
    path.unlink()
    with pytest.raises(ValueError, match="no adapter_config.json"):
        lora.load_adapter(model, str(tmp_path))


def test_full_checkpoint_of_an_adapted_model_needs_the_merged_state(tmp_path):
    """Writing the base alone under the trained model's name would lose the training without a word."""
    with pytest.raises(ValueError, match="merged_state"):
        models.save(adapted(), str(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.model
def test_real_model_with_an_adapter_equals_peft(smollm2, tmp_path):
    model = lora.apply(models.load(smollm2), rank=8, alpha=16.0, targets=ALL)
    torch.manual_seed(0)
    for layer in lora.layers(model).values():
        for B in layer.B:
            B.data.normal_(std=0.02)
    lora.save_adapter(model, str(tmp_path), base=smollm2)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    ids = torch.arange(500, 512)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), theirs(ids[None]).logits[0], rtol=1e-4, atol=2e-4)
