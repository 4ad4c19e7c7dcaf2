"""LoRA: a frozen linear layer plus a trainable product of two thin matrices (arXiv:2106.09685), and PEFT's files in and out.

    y = x W^T + b + (alpha / rank) * dropout(x) A^T B^T          A (r, D) random, B (rows, r) zero: training starts from the base

The model stacks q, k, v (and gate, up) in one matmul; here their A's are stacked too, so the thin matmuls are as few as the thick
ones. Adapters are fp32 on a base of any dtype: a bf16 adapter would not move at lr 1e-5.

With `disabled(model)` the model is its own reference: no second copy of the weights. Dims: D input width, r rank.
"""
import json
import math
import os
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file


class LoRALinear(nn.Module):
    """Wraps a Linear of several parts; `targets` of them get an adapter. base.weight and base.bias are frozen."""

    def __init__(self, base, rank, alpha, dropout, targets, generator):
        super().__init__()
        self.base, self.parts, self.rank, self.scale, self.dropout = base, base.parts, rank, alpha / rank, dropout
        self.enabled = True
        base.requires_grad_(False)
        self.targets = [part for part in base.parts if part in targets]
        D, dev = base.weight.shape[1], base.weight.device
        # PEFT's start: A uniform as nn.Linear's weight, B zero
        bound = 1 / math.sqrt(D)
        A = (torch.rand(len(self.targets) * rank, D, generator=generator) * 2 - 1) * bound
        self.A = nn.Parameter(A.to(dev))
        self.B = nn.ParameterList(nn.Parameter(torch.zeros(base.parts[part], rank, device=dev)) for part in self.targets)

    fast = None  # as Linear's, with the adapter added in

    def forward(self, x):
        if self.fast is not None:
            return self.fast(x)
        y = self.base(x)
        if not self.enabled:
            return y
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        h = F.linear(x.to(self.A.dtype), self.A * self.scale).split(self.rank, -1)  # thin: (T, r) for each target
        deltas = {part: F.linear(hi, B) for part, hi, B in zip(self.targets, h, self.B)}
        if len(self.parts) == 1:
            return y + deltas[self.targets[0]].to(y.dtype)
        none = [deltas[p] if p in deltas else y.new_zeros(len(x), rows) for p, rows in self.parts.items()]
        return y + torch.cat(none, -1).to(y.dtype)

    @torch.no_grad()
    def merged_weight(self):
        """base.weight + scale * B A, (rows, D), added in fp32 and rounded once to the base's dtype."""
        weight, row = self.base.weight.float().clone(), dict(zip(self.parts, offsets(self.parts)))
        for part, A, B in zip(self.targets, self.A.split(self.rank), self.B):
            weight[row[part] : row[part] + self.parts[part]].addmm_(B, A, alpha=self.scale)
        return weight.to(self.base.weight.dtype)


def offsets(parts: dict[str, int]) -> list[int]:
    """First row of each part."""
    return [sum(list(parts.values())[:i]) for i in range(len(parts))]


def layers(model) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def apply(model, *, rank, alpha, dropout=0.0, targets, seed=0):
    """Freezes the model and puts an adapter on each projection named in targets. ValueError for names the model does not have."""
    model.requires_grad_(False)
    wrappable = {name: m for name, m in model.named_modules() if hasattr(m, "parts")}
    known = {part for m in wrappable.values() for part in m.parts}
    if not set(targets) or set(targets) - known:
        raise ValueError(f"lora targets {sorted(set(targets) - known) or 'are empty, and'} are not projections of this model: {', '.join(sorted(known))}")
    generator = torch.Generator().manual_seed(seed)
    for name, module in wrappable.items():
        if set(targets) & module.parts.keys():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(module, rank, alpha, dropout, targets, generator))
    return model


@contextmanager
def disabled(model):
    """Inside, the model is its frozen base: the reference of the KL term."""
    adapters = layers(model).values()
    for layer in adapters:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in adapters:
            layer.enabled = True


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
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, r=layer.rank, lora_alpha=layer.scale * layer.rank,
                  lora_dropout=layer.dropout, target_modules=targets, bias="none", fan_in_fan_out=False, inference_mode=True, use_rslora=False)
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        json.dump(config, f, indent=2)


def read_config(folder: str) -> dict:
    """The adapter_config.json of a folder, checked: rank, alpha, targets. ValueError for kinds of adapter that are not implemented."""
    path = os.path.join(folder, "adapter_config.json")
    if not os.path.exists(path):
        raise ValueError(f"{folder} has no adapter_config.json: it is not a PEFT adapter")
    with open(path) as f:
        config = json.load(f)
    odd = {key: config.get(key) for key in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "layers_to_transform") if config.get(key)}
    if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none" or not isinstance(config["target_modules"], list):
        raise ValueError(f"{folder}: adapters of type {config.get('peft_type')} with {odd or config.get('target_modules')} are not implemented, plain LoRA is")
    return config


@torch.no_grad()
def load_adapter(model, folder: str):
    """Reads a PEFT adapter into a model: applies LoRA of the file's rank, alpha and targets unless that is there already.

    Returns the model. ValueError names tensors that are missing, unknown or misshapen, and a rank or alpha that is not the model's.
    """
    config = read_config(folder)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    if not layers(model):
        apply(model, rank=config["r"], alpha=scale * config["r"], dropout=config.get("lora_dropout", 0.0), targets=config["target_modules"])
    layer = next(iter(layers(model).values()))
    if (layer.rank, layer.scale) != (config["r"], scale):
        raise ValueError(f"{folder} has rank {config['r']} and alpha {config['lora_alpha']}, this run has {layer.rank} and {layer.scale * layer.rank}")
    tensors, ours = load_file(os.path.join(folder, "adapter_model.safetensors")), peft_names(model)
    if tensors.keys() != ours.keys():
        missing, extra = sorted(ours.keys() - tensors.keys()), sorted(tensors.keys() - ours.keys())
        raise ValueError(f"{folder}: the adapter is not for this model; missing {missing[:3]}, unknown {extra[:3]}")
    for name, t in tensors.items():
        if t.shape != ours[name].shape:
            raise ValueError(f"{folder}: tensor {name} has shape {tuple(t.shape)}, this model asks for {tuple(ours[name].shape)}")
        ours[name].copy_(t)
    return model


def merged_state(model) -> dict[str, torch.Tensor]:
    """Parameter names of the model without LoRA -> tensors with the adapters added in: what model.save writes as a full checkpoint."""
    state = {}
    for name, p in model.named_parameters():
        if name.rpartition(".base.")[1]:
            name = name.replace(".base.", ".")
            layer = model.get_submodule(name.rpartition(".")[0])
            p = layer.merged_weight() if name.endswith(".weight") else p
        elif name.split(".")[-1] == "A" or ".B." in name:
            continue
        state[name] = p
    return state
