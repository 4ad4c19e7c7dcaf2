"""LoRA: a frozen linear layer plus a trainable product of two thin matrices, with PEFT's files in and out.

    y = x W^T + b + (alpha / rank) * dropout(x) A^T B^T      A (r, D) random, B (rows, r) zero at the start

    lora.apply(model, rank=16, alpha=32, targets=("q_proj", "v_proj"))
    with lora.disabled(model): ...      # the model is its own reference: no second copy of the weights
    lora.merge(model)                   # from here on y = x W'^T + b with W' = round(W + (alpha / rank) B A)

The model stacks q, k, v (and gate, up) in one matmul; here their A's are stacked too, so the thin matmuls are
as few as the thick ones. Adapters are fp32 on a base of any dtype: a bf16 adapter would not move at lr 1e-5.

Merged, an adapter costs nothing in a forward, where unmerged its thin matmuls about double a decoding
step. The price is a second copy of the adapted layers' weights. A merged model is, to the bit, the
one that merged_state exports. `merge` has to be called again after every update; it writes in place,
so that CUDA graphs stay good.

Paper: arXiv:2106.09685. Dims: T tokens, D input width, r rank; a layer's output has its parts side by side,
and `rows` says where a target's are.
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

from kernels.lora_linear import lora_linear, merged_linear
from kernels.sample import signed, splitmix

# Keys of an adapter_config.json that, when set, make an adapter another function of its tensors than ours.
UNKNOWN_KINDS = (
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)

# Starts of an adapter that leave the base as it is. The others that PEFT knows by name change the base's
# weights too, so the adapter's tensors alone are not the model.
PLAIN_STARTS = ("gaussian", "eva", "orthogonal")


class LoRALinear(nn.Module):
    """Wraps a Linear of several parts and freezes it; its parts named in `targets` get an adapter."""

    enabled = True  # False: the layer is its base, see `disabled`
    keys: torch.Tensor | None = None  # (T,) int64, what dropout is drawn from, see `dropout_keys`

    # The weight (rows, D) with the adapter added in, or None: see `merge`. Neither a parameter nor a buffer,
    # so no optimiser and no file sees it.
    merged: torch.Tensor | None = None
    merged_from = None  # versions of A and B when it was made

    def __init__(self, base, rank, alpha, dropout, targets, generator):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.parts = base.parts
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scale = alpha / rank
        # The adapted parts, and where in the output each of them is.
        self.targets, self.rows = [], []
        start = 0
        for part, size in base.parts.items():
            if part in targets:
                self.targets.append(part)
                self.rows.append(slice(start, start + size))
            start += size
        D = base.width
        dtype = torch.promote_types(base.like.dtype, torch.float32)
        where = dict(device=base.like.device, dtype=dtype)
        # PEFT's start: A uniform like nn.Linear's weight, B zero. Drawn on the CPU, so
        # that every device starts alike.
        A = (torch.rand(len(self.targets) * rank, D, generator=generator) * 2 - 1) / math.sqrt(D)
        self.A = nn.Parameter(A.to(**where))
        # The A's lie under each other in one parameter for one matmul; each B has output rows of its own.
        self.B = nn.ParameterList()
        for part in self.targets:
            self.B.append(nn.Parameter(torch.zeros(base.parts[part], rank, **where)))

    def forward(self, x):
        if not self.enabled:
            return self.base(x)
        thin = (self.A, *self.B)
        if self.merged is not None:
            # A merged weight of some updates ago would sample, and train, another policy without a word.
            if versions(thin) != self.merged_from:
                raise RuntimeError(
                    "an adapter has changed since it was merged: call lora.merge(model) after each update"
                )
            return merged_linear(x, self.base, self.merged, self.scale, self.rows, *thin)
        mask = None
        if self.dropout and self.training:
            if self.keys is None:
                mask = F.dropout(torch.ones_like(x), self.dropout)
            else:
                mask = keyed_mask(self.keys, x, self.dropout)
        return lora_linear(x, mask, self.base, self.scale, self.rows, *thin)

    @torch.no_grad()
    def merged_weight(self):
        """W + scale * B A, (rows, D), added in fp32 and rounded once to the base's dtype."""
        # A copy, because the base stays what it is: the reference, and the start of the next merging.
        weight = self.base.dense().to(self.A.dtype, copy=True)
        for rows, A, B in zip(self.rows, self.A.split(self.rank), self.B):
            weight[rows].addmm_(B, A, alpha=self.scale)
        return weight.to(self.base.like.dtype)


def versions(tensors) -> list[tuple[int, int]]:
    """Changes with every write: torch counts those in place, and an exchanged tensor has another address."""
    return [(t.data_ptr(), t._version) for t in tensors]


def layers(model) -> dict[str, LoRALinear]:
    """The model's adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def apply(model, *, rank, alpha, dropout=0.0, targets, seed=0):
    """Freezes the model and puts an adapter on each projection named in targets. Returns the model.

    Raises ValueError, with nothing changed, for projections that the model does not have.
    """
    if layers(model):
        raise ValueError(
            "the model has adapters already: merge them first (lora.merged_state), "
            "or load into them (lora.load_adapter)"
        )
    adaptable = {name: module for name, module in model.named_modules() if hasattr(module, "parts")}
    known = {part for module in adaptable.values() for part in module.parts}
    wrong = sorted(set(targets) - known)
    if wrong or not targets:
        which = wrong or "are empty, and"
        raise ValueError(
            f"lora targets {which} are not projections of this model: {', '.join(sorted(known))}"
        )
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    # One generator for all layers, in their order, so that a seed means the same adapters on every device.
    for name, module in adaptable.items():
        if module.parts.keys() & set(targets):
            adapted = LoRALinear(module, rank, alpha, dropout, targets, generator)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, adapted.train(model.training))
    return model


def keyed_mask(keys, x, p: float):
    """Dropout's factors (T, D) for x (T, D): 0 with probability p, else 1 / (1 - p), from keys (T,) int64."""
    u = (splitmix(keys, 0, x.shape[1]) >> 40 & (1 << 24) - 1).float() * 2.0**-24  # in [0, 1)
    return ((u >= p) / (1 - p)).to(x.dtype)


@contextmanager
def dropout_keys(model, keys):
    """Inside, the adapters' dropout is a function of keys (T,) int64: 64 random bits a token of a stream.

    So a row's dropout does not depend on its place in the stream, on micro-batches or on ranks. The backward,
    which may run layers again, belongs inside.
    """
    adapted = layers(model).values()
    for i, layer in enumerate(adapted):
        layer.keys = keys + signed(i * 0xD1B54A32D192ED03)  # another stream for each layer
    try:
        yield
    finally:
        for layer in adapted:
            layer.keys = None


@contextmanager
def disabled(model):
    """Inside, the model is its frozen base, merged or not: the reference of the KL term."""
    # What was there is put back, rather than True: the end of an inner block must not end an outer one.
    before = {layer: layer.enabled for layer in layers(model).values()}
    for layer in before:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


# ---------------------------------------------------------------------------------------------------- merging
@torch.no_grad()
def merge(model):
    """Every adapted layer computes with W' = round(W + scale * B A), until the next update or `unmerge`.

    Returns the model. Call it again after each update, since W' does not follow A and B by itself; a forward
    with a W' that is out of date raises RuntimeError. A layer that is merged already gets the new numbers at
    the same address, which CUDA graphs hold. Gradients still reach A and B.

    Raises ValueError, with nothing changed, for an adapter with dropout: that acts on what goes into A alone,
    and W' has one input for all. And on a base in 4 bits, whose W' would be the memory that it saves.
    """
    adapted = layers(model).values()
    for layer in adapted:
        if not hasattr(layer.base, "weight"):
            raise ValueError(
                "an adapter on a base in 4 bits is not merged in place, since W' takes four times its "
                "memory: leave it unmerged, or write the merged model to a folder (lora.merged_state)"
            )
        if layer.dropout:
            raise ValueError(
                f"an adapter with dropout {layer.dropout} cannot be merged, since dropout acts on its input "
                "alone: set lora_dropout to 0, or leave it unmerged"
            )
    for layer in adapted:
        weight = layer.merged_weight()
        held = layer.merged
        if held is None or (held.device, held.dtype) != (weight.device, weight.dtype):
            layer.merged = weight
        else:
            held.copy_(weight)
        layer.merged_from = versions((layer.A, *layer.B))
    return model


def unmerge(model):
    """Drops the merged weights: base and adapter are computed apart again. Returns the model."""
    for layer in layers(model).values():
        layer.merged = layer.merged_from = None
    return model


@contextmanager
def unmerged(model):
    """Inside, base and adapter are computed apart; afterwards the merged weights count again, as they were.

    For a look at the model with other numbers in its adapters, which must be put back before the end.
    """
    held = {layer: layer.merged for layer in layers(model).values()}
    unmerge(model)
    try:
        yield model
    finally:
        for layer, merged in held.items():
            layer.merged = merged
            layer.merged_from = None if merged is None else versions((layer.A, *layer.B))


def merged_bytes(model) -> int:
    """What the merged weights take: a second copy of every adapted layer's weight."""
    return sum(layer.base.weight.nbytes for layer in layers(model).values())


def merged_state(model) -> dict[str, torch.Tensor]:
    """Parameter names of the model without LoRA -> tensors with the adapters added in, none in 4 bits.

    It is what model.save writes as a full checkpoint.
    """
    adapted = layers(model)
    state = {}
    for name, module in model.named_modules():
        # Of a layer in 4 bits no parameter holds the weight.
        in_4_bits = hasattr(module, "dense") and not hasattr(module, "weight")
        if in_4_bits and name.endswith(".base"):
            layer = name.removesuffix(".base")
            state[f"{layer}.weight"] = adapted[layer].merged_weight()
        elif in_4_bits:
            state[f"{name}.weight"] = module.dense().clone()
    for name, p in model.named_parameters():
        layer, is_base, last = name.rpartition(".base.")
        if is_base and last == "weight":
            state[f"{layer}.weight"] = adapted[layer].merged_weight()
        elif is_base:
            state[f"{layer}.{last}"] = p
        elif not is_adapter(name, adapted):
            state[name] = p
    return state


def is_adapter(name: str, adapted: dict[str, LoRALinear]) -> bool:
    """Whether a parameter's name is LAYER.A or LAYER.B.i of an adapted layer."""
    return name.removesuffix(".A") in adapted or name.rpartition(".B.")[0] in adapted


# ----------------------------------------------------------------------------------------------- PEFT's files
def peft_names(model) -> dict[str, torch.Tensor]:
    """PEFT's tensor names -> views of the adapter weights."""
    names = {}
    for name, layer in layers(model).items():
        number = name.split(".")[1]  # blocks.NUMBER.qkv
        for part, A, B in zip(layer.targets, layer.A.split(layer.rank), layer.B):
            parent = "self_attn" if part in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            theirs = f"base_model.model.model.layers.{number}.{parent}.{part}"
            names[f"{theirs}.lora_A.weight"] = A
            names[f"{theirs}.lora_B.weight"] = B
    return names


@torch.no_grad()
def save_adapter(model, folder: str, *, base: str):
    """Writes adapter_config.json and adapter_model.safetensors, for PEFT and vLLM to load on `base`.

    base: name or folder of the checkpoint that was adapted.
    """
    os.makedirs(folder, exist_ok=True)
    # Clones, because the A's of one layer are views of one tensor, and safetensors refuses shared storage.
    tensors = {name: t.detach().cpu().clone() for name, t in peft_names(model).items()}
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    adapted = list(layers(model).values())
    first = adapted[0]  # rank, alpha and dropout are the same in all
    # PEFT's field is an int, and vLLM insists.
    alpha = int(first.alpha) if first.alpha == int(first.alpha) else first.alpha
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=first.rank,
        lora_alpha=alpha,
        lora_dropout=first.dropout,
        target_modules=sorted({part for layer in adapted for part in layer.targets}),
        bias="none",
        fan_in_fan_out=False,
        inference_mode=True,
        use_rslora=False,
    )
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        json.dump(config, f, indent=2)


def read_config(folder: str) -> dict:
    """The adapter_config.json of a folder. ValueError for kinds of adapter that are not implemented."""
    path = os.path.join(folder, "adapter_config.json")
    if not os.path.exists(path):
        raise ValueError(f"{folder} has no adapter_config.json: it is not a PEFT adapter")
    with open(path) as f:
        config = json.load(f)
    odd = {key: config[key] for key in UNKNOWN_KINDS if config.get(key)}
    bias = config.get("bias", "none")
    if bias != "none":
        odd["bias"] = bias
    start = config.get("init_lora_weights")  # true, false or the name of a way to start
    if isinstance(start, str) and start not in PLAIN_STARTS:
        odd["init_lora_weights"] = start
    kind = config.get("peft_type")
    if kind != "LORA" or odd:
        with_what = f" with {odd}" if odd else ""
        raise ValueError(f"{folder}: an adapter of type {kind}{with_what} is not implemented, plain LoRA is")
    return config


@torch.no_grad()
def load_adapter(model, folder: str):
    """Reads a PEFT adapter into a model, which gets LoRA of the file's rank, alpha and targets if needed.

    Returns the model; a model that was merged has to be merged again. Raises ValueError, with no
    number changed, that names tensors that are missing, unknown or misshapen, and a rank or
    alpha that is not the model's.
    """
    config = read_config(folder)
    path = os.path.join(folder, "adapter_model.safetensors")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise ValueError(
            f"{path} cannot be read ({e}): the adapter is not there, not whole, or not safetensors"
        ) from None
    rank = config["r"]
    alpha = config["lora_alpha"]
    if config.get("use_rslora"):  # scales by alpha / sqrt(rank), arXiv:2312.03732
        alpha = alpha * math.sqrt(rank)
    if not layers(model):
        # Asked of the tensors and not of target_modules, which may be a pattern.
        targets = {name.split(".")[-3] for name in tensors if name.endswith(".lora_A.weight")}
        apply(model, rank=rank, alpha=alpha, dropout=config.get("lora_dropout", 0.0), targets=targets)
    first = next(iter(layers(model).values()))
    if first.rank != rank or not math.isclose(first.alpha, alpha):
        raise ValueError(
            f"{folder} has rank {rank} and alpha {alpha}, this run has {first.rank} and {first.alpha}"
        )
    ours = peft_names(model)
    # Everything is checked before anything is copied: half of a file is no adapter.
    refuse_other_tensors(folder, tensors, ours)
    for name, t in tensors.items():
        ours[name].copy_(t)
    return model


def refuse_other_tensors(folder: str, tensors: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]):
    """Raises ValueError unless a file's tensors have the names and shapes of the model's adapters."""
    if tensors.keys() != ours.keys():
        missing = sorted(ours.keys() - tensors.keys())
        unknown = sorted(tensors.keys() - ours.keys())
        raise ValueError(
            f"{folder}: the adapter is not for this model; missing {missing[:3]}, unknown {unknown[:3]}"
        )
    for name, t in tensors.items():
        if t.shape != ours[name].shape:
            raise ValueError(
                f"{folder}: tensor {name} has shape {tuple(t.shape)}, "
                f"this model asks for {tuple(ours[name].shape)}"
            )
