"""LoRA: a frozen linear layer plus a trainable product of two thin matrices (arXiv:2106.09685), and PEFT's files in and out.

    y = x W^T + b + (alpha / rank) * dropout(x) A^T B^T          A (r, D) random, B (rows, r) zero: training starts from the base

The model stacks q, k, v (and gate, up) in one matmul; here their A's are stacked too, so the thin matmuls are as few as the thick
ones. Adapters are fp32 on a base of any dtype: a bf16 adapter would not move at lr 1e-5.

With `disabled(model)` the model is its own reference: no second copy of the weights.

Dims: D input width, r rank; a layer's output has its parts side by side, and `rows` says where a target's are.
"""
import json
import math
import os
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kernels.lora_linear import lora_linear

# keys of an adapter_config.json that, when set, make an adapter another function of its tensors than the one above
UNKNOWN_KINDS = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "layer_replication", "target_parameters",
                 "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config")


class LoRALinear(nn.Module):
    """Wraps a Linear of several parts; `targets` of them get an adapter. base.weight and base.bias are frozen."""

    fast = None  # as Linear's, with the adapter added in
    enabled = True

    def __init__(self, base, rank, alpha, dropout, targets, generator):
        super().__init__()
        self.base, self.parts, self.rank, self.alpha, self.scale, self.dropout = base, base.parts, rank, alpha, alpha / rank, dropout
        base.requires_grad_(False)
        ends = torch.tensor(list(base.parts.values())).cumsum(0).tolist()
        rows = {part: slice(end - size, end) for (part, size), end in zip(base.parts.items(), ends)}
        self.targets = [part for part in base.parts if part in targets]
        self.rows = [rows[part] for part in self.targets]
        D, kw = base.weight.shape[1], dict(device=base.weight.device, dtype=torch.promote_types(base.weight.dtype, torch.float32))
        # PEFT's start: A uniform as nn.Linear's weight, B zero. Drawn on the CPU, so that every device starts alike
        A = (torch.rand(len(self.targets) * rank, D, generator=generator) * 2 - 1) / math.sqrt(D)
        self.A = nn.Parameter(A.to(**kw))
        self.B = nn.ParameterList(nn.Parameter(torch.zeros(base.parts[part], rank, **kw)) for part in self.targets)

    def forward(self, x):
        if self.fast is not None:
            return self.fast(x)
        if not self.enabled:
            return self.base(x)
        mask = F.dropout(torch.ones_like(x), self.dropout) if self.dropout and self.training else None
        return lora_linear(x, mask, self.base, self.scale, self.rows, self.A, *self.B)

    @torch.no_grad()
    def merged_weight(self):
        """base.weight + scale * B A, (rows, D), added in fp32 and rounded once to the base's dtype."""
        weight = self.base.weight.to(self.A.dtype, copy=True)
        for rows, A, B in zip(self.rows, self.A.split(self.rank), self.B):
            weight[rows].addmm_(B, A, alpha=self.scale)
        return weight.to(self.base.weight.dtype)


def layers(model) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def apply(model, *, rank, alpha, dropout=0.0, targets, seed=0):
    """Freezes the model and puts an adapter on each projection named in targets. ValueError for names the model does not have."""
    if layers(model):
        raise ValueError("the model has adapters already: merge them first (lora.merged_state), or load into them (lora.load_adapter)")
    wrappable = {name: m for name, m in model.named_modules() if hasattr(m, "parts")}
    known = {part for m in wrappable.values() for part in m.parts}
    if not set(targets) or set(targets) - known:
        raise ValueError(f"lora targets {sorted(set(targets) - known) or 'are empty, and'} are not projections of this model: {', '.join(sorted(known))}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in wrappable.items():
        if set(targets) & module.parts.keys():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(module, rank, alpha, dropout, targets, generator).train(model.training))
    return model


@contextmanager
def disabled(model):
    """Inside, the model is its frozen base: the reference of the KL term."""
    before = {layer: layer.enabled for layer in layers(model).values()}
    for layer in before:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def peft_names(model) -> dict[str, torch.Tensor]:
    """PEFT's tensor names -> views of the adapter weights."""
    names = {}
    for name, layer in layers(model).items():
        i = name.split(".")[1]
        for part, A, B in zip(layer.targets, layer.A.split(layer.rank), layer.B):
            place = f"base_model.model.model.layers.{i}.{'mlp' if part in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{part}"
            names[place + ".lora_A.weight"], names[place + ".lora_B.weight"] = A, B
    return names


@torch.no_grad()
def save_adapter(model, folder: str, *, base: str):
    """Writes adapter_config.json and adapter_model.safetensors, which PEFT and vLLM load on the checkpoint named `base`."""
    os.makedirs(folder, exist_ok=True)
    tensors = {name: t.detach().cpu().clone() for name, t in peft_names(model).items()}
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    layer = next(iter(layers(model).values()))
    targets = sorted({part for m in layers(model).values() for part in m.targets})
    alpha = int(layer.alpha) if layer.alpha == int(layer.alpha) else layer.alpha  # PEFT's field is an int, and vLLM insists
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, r=layer.rank, lora_alpha=alpha, lora_dropout=layer.dropout,
                  target_modules=targets, bias="none", fan_in_fan_out=False, inference_mode=True, use_rslora=False)
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        json.dump(config, f, indent=2)


def read_config(folder: str) -> dict:
    """The adapter_config.json of a folder, checked. ValueError for kinds of adapter that are not implemented."""
    path = os.path.join(folder, "adapter_config.json")
    if not os.path.exists(path):
        raise ValueError(f"{folder} has no adapter_config.json: it is not a PEFT adapter")
    with open(path) as f:
        config = json.load(f)
    odd = {key: config[key] for key in UNKNOWN_KINDS if config.get(key)}
    odd |= {"bias": config["bias"]} if config.get("bias", "none") != "none" else {}
    # these starts change the base's weights too, so the adapter's tensors alone are not the model
    odd |= {"init_lora_weights": start} if isinstance(start := config.get("init_lora_weights"), str) and start not in ("gaussian", "eva", "orthogonal") else {}
    if config.get("peft_type") != "LORA" or odd:
        raise ValueError(f"{folder}: an adapter of type {config.get('peft_type')}{' with ' if odd else ''}{odd or ''} is not implemented, plain LoRA is")
    return config


@torch.no_grad()
def load_adapter(model, folder: str):
    """Reads a PEFT adapter into a model: applies LoRA of the file's rank, alpha and targets unless that is there already.

    Returns the model. ValueError names tensors that are missing, unknown or misshapen, and a rank or alpha that is not the model's.
    """
    config, path = read_config(folder), os.path.join(folder, "adapter_model.safetensors")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path} cannot be read ({e}): the adapter is not there, not whole, or not safetensors") from None
    rank = config["r"]
    alpha = config["lora_alpha"] * (math.sqrt(rank) if config.get("use_rslora") else 1)
    if not layers(model):
        # from the tensors, not from target_modules, which may be a pattern
        targets = {name.split(".")[-3] for name in tensors if name.endswith(".lora_A.weight")}
        apply(model, rank=rank, alpha=alpha, dropout=config.get("lora_dropout", 0.0), targets=targets)
    layer, ours = next(iter(layers(model).values())), peft_names(model)
    if layer.rank != rank or not math.isclose(layer.alpha, alpha):
        raise ValueError(f"{folder} has rank {rank} and alpha {alpha}, this run has {layer.rank} and {layer.alpha}")
    if tensors.keys() != ours.keys():
        missing, extra = sorted(ours.keys() - tensors.keys()), sorted(tensors.keys() - ours.keys())
        raise ValueError(f"{folder}: the adapter is not for this model; missing {missing[:3]}, unknown {extra[:3]}")
    for name, t in tensors.items():
        if t.shape != ours[name].shape:
            raise ValueError(f"{folder}: tensor {name} has shape {tuple(t.shape)}, this model asks for {tuple(ours[name].shape)}")
    for name, t in tensors.items():
        ours[name].copy_(t)
    return model


def merged_state(model) -> dict[str, torch.Tensor]:
    """Parameter names of the model without LoRA -> tensors with the adapters added in: what model.save writes as a full checkpoint."""
    state, adapters = {}, layers(model)
    for name, p in model.named_parameters():
        layer, base, last = name.rpartition(".base.")
        if base:
            state[f"{layer}.{last}"] = adapters[layer].merged_weight() if last == "weight" else p
        elif name.removesuffix(".A") not in adapters and name.rpartition(".B.")[0] not in adapters:
            state[name] = p
    return state
