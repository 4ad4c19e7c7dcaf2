"""One decoder for Llama 3, SmolLM2, Qwen2/2.5, Qwen3 and Mistral, read from and written to Hugging Face folders.

    model = load("models/smollm2-135m")
    model.logits(torch.tensor([1, 2, 3]))                                        # (3, V)
    model.completion_logprobs([[1, 2]], [[[3, 4], [5]]])                         # one prompt, two completions

One forward serves prefill, decoding, scoring, the reference and training. It takes a packed stream: token ids (T,), positions
(T,) and a plan, whose `attend(layer, q, k, v)` says which keys a token sees. `Packed` below is the plan for streams
in which a group's completions share their prompt; rollout.py has the one that reads a cache. Padding never reaches a matmul.

q, k, v are one matmul and gate, up are one. Names are Hugging Face's only at the border (load, save).

Dims: T tokens of a stream, D width, V vocabulary, H query heads, K key/value heads, E head width, L layers, P prompt length,
C completion length, B prompts, G completions a prompt, M scored tokens. Source of the architecture: arXiv:2307.09288, 2505.09388.
"""
import json
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from kernels.attention import Buckets, attention
from kernels.logprob import logits_fp32, logprob

# ---------------------------------------------------------------------------------------------- what a config.json may say
# what each family does where its config.json is silent: transformers' own defaults
FAMILIES = {
    "llama": dict(bias=(), rope_theta=10000.0, sliding_window=None),
    "mistral": dict(bias=(), rope_theta=10000.0, sliding_window=4096),
    "qwen2": dict(bias=("q_proj", "k_proj", "v_proj"), rope_theta=10000.0, sliding_window=None),
    "qwen3": dict(bias=(), rope_theta=10000.0, sliding_window=None),
}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
HARMLESS = ("rotary_emb.inv_freq",)  # tensors old checkpoints carry that are computed from the config


class Shape:
    """Sizes and options of a decoder, checked: from a config.json's dict. What is not implemented is refused by name.

    Raises ValueError for an unknown architecture or an option that would change the result and is not implemented.
    """

    def __init__(self, config: dict):
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type {family!r} is not implemented; known: {', '.join(FAMILIES)}")
        defaults = FAMILIES[family]
        self.family, self.V, self.D, self.L = family, config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]
        self.H = config["num_attention_heads"]
        # null means different things: llama takes H key heads, the others' classes have a number there, which real files state
        self.K = config.get("num_key_value_heads") or self.H
        self.E = config.get("head_dim") or (128 if family == "qwen3" else self.D // self.H)
        self.intermediate = config["intermediate_size"]
        self.eps = config.get("rms_norm_eps", 1e-6)
        self.context = config.get("max_position_embeddings", 2048)
        self.tied = config.get("tie_word_embeddings", False)
        self.qk_norm = family == "qwen3"
        bias = defaults["bias"]
        if family in ("llama", "qwen3") and config.get("attention_bias"):
            bias = ATTENTION
        if family == "llama" and config.get("mlp_bias"):
            bias = bias + MLP
        self.bias = frozenset(bias)
        self.rope = rope_parameters(config, defaults["rope_theta"])
        refuse_unsupported(config, defaults)
        if self.H % self.K:
            raise ValueError(f"num_attention_heads {self.H} is not a multiple of num_key_value_heads {self.K}")


def refuse_unsupported(config: dict, defaults: dict):
    """Raises ValueError naming the first option of config.json that is in use and not implemented."""
    window = config.get("sliding_window", defaults["sliding_window"])
    if config["model_type"].startswith("qwen") and not config.get("use_sliding_window", False):
        window = None  # Qwen states a width and switches it off
    mixed = set(config.get("layer_types") or []) - {"full_attention"}
    checks = {
        "sliding_window": window, "layer_types": sorted(mixed), "quantization_config": config.get("quantization_config"),
        "attn_logit_softcapping": config.get("attn_logit_softcapping"), "final_logit_softcapping": config.get("final_logit_softcapping"),
        "num_local_experts": config.get("num_local_experts"), "num_experts": config.get("num_experts"),
        "attention_dropout": config.get("attention_dropout"), "partial_rotary_factor": config.get("partial_rotary_factor", 1.0) != 1.0,
        "hidden_act": config.get("hidden_act", "silu") != "silu" and config["hidden_act"],
        "pretraining_tp": config.get("pretraining_tp", 1) != 1 and config["pretraining_tp"],
    }
    for name, value in checks.items():
        if value:
            raise ValueError(f"config.json has {name} = {value!r}, which is not implemented: the model would give wrong results")


def rope_parameters(config: dict, default_theta: float) -> dict:
    """{rope_type, rope_theta, ...} from the new spelling (`rope_parameters`) or the old (`rope_theta` + `rope_scaling`)."""
    rope = dict(config.get("rope_scaling") or {})
    rope.update(config.get("rope_parameters") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", config.get("rope_theta", default_theta))
    rope.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings", config.get("max_position_embeddings", 2048)))
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rope {rope} is not implemented; known rope types: default, linear, llama3, yarn, over the whole head")
    return rope


def rope_frequencies(E: int, rope: dict) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair of dimensions (E/2,) fp32, and the factor on cos and sin.

    llama3: Meta's Llama 3.1 release; yarn: arXiv:2309.00071, section 3.
    """
    theta, factor, original = rope["rope_theta"], rope.get("factor", 1.0), rope["original_max_position_embeddings"]
    inv_freq = 1.0 / theta ** (torch.arange(0, E, 2, dtype=torch.float32) / E)
    if rope["rope_type"] == "linear":
        return inv_freq / factor, 1.0
    if rope["rope_type"] == "llama3":
        # long waves are slowed by factor, short ones kept, those between blended
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * inv_freq / (2 * math.pi)  # how often a wave turns over the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * inv_freq / factor + kept * inv_freq, 1.0
    if rope["rope_type"] == "yarn":
        edges = [E * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                 for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)]
        if rope.get("truncate", True):
            edges = [math.floor(edges[0]), math.ceil(edges[1])]
        low, high = max(edges[0], 0), min(edges[1], E - 1)
        slowed = ((torch.arange(E // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
        scale = rope.get("attention_factor")
        if scale is None:
            mscale = [1.0 if factor <= 1 else 0.1 * (m or 1) * math.log(factor) + 1 for m in (rope.get("mscale"), rope.get("mscale_all_dim"))]
            scale = mscale[0] / mscale[1] if rope.get("mscale") and rope.get("mscale_all_dim") else (1.0 if factor <= 1 else 0.1 * math.log(factor) + 1)
        return slowed * inv_freq / factor + (1 - slowed) * inv_freq, scale
    return inv_freq, 1.0


# ------------------------------------------------------------------------------------------------------------- the modules
class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 (arXiv:1910.07467)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Linear(nn.Module):
    """y = x W^T + b for one or several projections of the same input, stacked: parts = {"q_proj": rows, ...} in order.

    lora.py finds these by their `parts` and wraps them. Biases are all or none: where only some parts have one, the rest is 0.
    """

    def __init__(self, width, parts: dict[str, int], bias=frozenset()):
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), width))
        self.bias = nn.Parameter(torch.zeros(sum(parts.values()))) if bias & parts.keys() else None

    fast = None  # while sampling on a CPU: the same function on a copy of the weights that is laid out for it (kernels/packed_linear.py)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) if self.fast is None else self.fast(x)


def rotate(x, cos, sin):
    """Rotary embedding of x (T, heads, E) by cos and sin (T, 1, E/2); pairs are (i, i + E/2), as in Hugging Face checkpoints."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    def __init__(self, s: Shape, layer: int):
        super().__init__()
        self.layer, self.H, self.K, self.E = layer, s.H, s.K, s.E
        self.input_norm, self.post_norm = RMSNorm(s.D, s.eps), RMSNorm(s.D, s.eps)
        self.qkv = Linear(s.D, {"q_proj": s.H * s.E, "k_proj": s.K * s.E, "v_proj": s.K * s.E}, s.bias)
        self.o = Linear(s.H * s.E, {"o_proj": s.D}, s.bias)
        self.gate_up = Linear(s.D, {"gate_proj": s.intermediate, "up_proj": s.intermediate}, s.bias)
        self.down = Linear(s.intermediate, {"down_proj": s.D}, s.bias)
        if s.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(s.E, s.eps), RMSNorm(s.E, s.eps)
        self.qk_norm = s.qk_norm

    def forward(self, x, cos, sin, plan):
        T, (H, K, E) = len(x), (self.H, self.K, self.E)
        qk, v = self.qkv(self.input_norm(x)).view(T, H + 2 * K, E).split([H + K, K], 1)
        if self.qk_norm:
            qk = torch.cat([self.q_norm(qk[:, :H]), self.k_norm(qk[:, H:])], 1)
        q, k = rotate(qk, cos, sin).split([H, K], 1)
        x = x + self.o(plan.attend(self.layer, q, k, v).reshape(T, H * E))
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    def __init__(self, config: dict):
        """config: the dict of a Hugging Face config.json (kept, and written back by `save`). Weights are left unset."""
        super().__init__()
        self.config, self.shape = dict(config), Shape(config)
        s = self.shape
        self.embed = nn.Parameter(torch.empty(s.V, s.D))
        self.blocks = nn.ModuleList(Block(s, layer) for layer in range(s.L))
        self.norm = RMSNorm(s.D, s.eps)
        self.untied_head = None if s.tied else nn.Parameter(torch.empty(s.V, s.D))

    @property
    def head(self):
        """Weight (V, D) of the final linear layer: the embedding itself where the checkpoint ties them."""
        return self.embed if self.untied_head is None else self.untied_head

    @property
    def device(self):
        return self.embed.device

    @property
    def dtype(self):
        return self.embed.dtype

    def forward(self, ids, positions, plan):
        """Hidden states (T, D) after the final norm, of ids (T,) at positions (T,), each token seeing what the plan lets it see."""
        assert ids.shape == positions.shape and ids.dim() == 1, f"ids {tuple(ids.shape)}, positions {tuple(positions.shape)}"
        if not hasattr(self, "inv_freq"):  # fp32 for ever: in bf16 position 257 and 258 would be one
            inv_freq, self.rope_scale = rope_frequencies(self.shape.E, self.shape.rope)
            self.inv_freq = inv_freq.to(self.device)
        angles = positions[:, None, None].float() * self.inv_freq  # (T, 1, E/2)
        cos, sin = ((f(angles) * self.rope_scale).to(self.dtype) for f in (torch.cos, torch.sin))
        x = F.embedding(ids, self.embed)
        for block in self.blocks:
            x = block(x, cos, sin, plan)
        return self.norm(x)

    def logits(self, ids):
        """Next-token logits (T, V) fp32 of one sequence ids (T,)."""
        packed = Packed(self, [ids.tolist()], [[]])
        return logits_fp32(self(packed.ids, packed.positions, packed), self.head)

    def completion_logprobs(self, prompts, completions, *, temperature=1.0, **truncation):
        """Log-probability (nats) of every completion token given its prompt and what comes before it, and the entropy there.

        prompts: B lists of ids. completions: B groups, each a list of completions, each a non-empty list of ids. Returns flat
        (M,) fp32 tensors over all completion tokens in row order, logp and entropy, and rows (M,) int64, the completion (numbered over
        all groups) each token belongs to. Gradients flow. A prompt is computed once. truncation: top_k, top_p, min_p.
        """
        packed = Packed(self, prompts, completions)
        hidden = self(packed.ids, packed.positions, packed)
        logp, entropy = logprob(hidden.index_select(0, packed.sources), self.head, packed.targets, temperature=temperature, **truncation)
        return logp, entropy, packed.rows


class Packed:
    """The plan of a stream [prompt, completion, completion, .., prompt, ..] in which a group shares its prompt.

    The last token of a completion predicts nothing and is left out of the stream. `sources` (M,) is where in the stream each
    completion token is predicted from: the shift by one exists here and nowhere else. `targets` (M,) is the token itself, `rows` (M,) its
    completion's number over all groups.
    """

    def __init__(self, model: Transformer, prompts: list[list[int]], completions: list[list[list[int]]]):
        assert len(prompts) == len(completions), f"{len(prompts)} prompts, {len(completions)} groups of completions"
        ids, positions, segments, sources, targets, rows = [], [], [], [], [], []
        row = 0
        for prompt, group in zip(prompts, completions):
            start, P = len(ids), len(prompt)
            if not P:
                raise ValueError("a prompt is empty: at least one token must come before a completion")
            segments.append((start, P, start, 0))
            ids += prompt
            positions += range(P)
            for completion in group:
                if not completion:
                    raise ValueError(f"completion {row} is empty: it has no token to score")
                own, C = len(ids), len(completion)
                segments.append((own, C - 1, start, P))
                ids += completion[:-1]
                positions += range(P, P + C - 1)
                sources.append(start + P - 1)  # the first token follows the prompt, all G of them the same position
                sources += range(own, own + C - 1)
                targets += completion
                rows += [row] * C
                row += 1
        limit = model.shape.context
        if max(positions) >= limit:
            raise ValueError(f"a sequence of {max(positions) + 1} tokens is longer than the model's context of {limit}")
        dev = model.device
        self.ids, self.positions, self.sources, self.targets, self.rows = (
            torch.tensor(x, dtype=torch.long, device=dev) for x in (ids, positions, sources, targets, rows))
        self.segments = segments
        self.buckets = Buckets(segments, model.shape.H // model.shape.K, dtype=model.dtype, device=dev)

    def attend(self, layer, q, k, v):
        """q (T, H, E), k and v (T, K, E) -> (T, H, E). The seam where a faster kernel goes."""
        return attention(q, k, v, self.buckets)


def micro_batches(prompts: list[list[int]], completions: list[list[list[int]]], micro_tokens: int) -> list[list[tuple[int, list[int]]]]:
    """Cuts a step into micro-batches of at most micro_tokens tokens: each a list of (prompt number b, numbers of its completions).

    Whole groups, balanced so that none is nearly empty; a group too large for one micro-batch is split and its prompt computed again, with the
    same gradient. Completions that are empty lists are left out (rows the caller has dropped). A single completion longer than
    micro_tokens gets a micro-batch of its own: it has to run somewhere.
    """
    pieces = []  # (tokens, b, completions)
    for b, (prompt, group) in enumerate(zip(prompts, completions)):
        size, members = len(prompt), []
        for g, completion in enumerate(group):
            if not completion:
                continue
            if members and size + len(completion) > micro_tokens:
                pieces.append((size, b, members))
                size, members = len(prompt), []
            size += len(completion)
            members.append(g)
        if members:
            pieces.append((size, b, members))
    # longest first into the emptiest: the fewest bins that could do, one more whenever that does not fit
    bins = max(1, -(-sum(p[0] for p in pieces) // micro_tokens))
    while True:
        load, cut = [0] * bins, [[] for _ in range(bins)]
        for size, b, members in sorted(pieces, key=lambda p: (-p[0], p[1])):
            i = load.index(min(load))
            load[i] += size
            cut[i].append((b, members))
        if bins >= len(pieces) or max(load) <= micro_tokens:
            return [sorted(c) for c in cut if c]
        bins += 1


# ----------------------------------------------------------------------------------------------- Hugging Face's folders
def border_names(model: Transformer) -> dict[str, tuple[str, slice]]:
    """Hugging Face's tensor name -> (our parameter's name, the rows of it)."""
    names = {"model.embed_tokens.weight": ("embed", slice(None)), "model.norm.weight": ("norm.weight", slice(None))}
    if model.untied_head is not None:
        names["lm_head.weight"] = ("untied_head", slice(None))
    theirs = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    for i, block in enumerate(model.blocks):
        for ours, module in block.named_children():
            if isinstance(module, RMSNorm):
                names[f"model.layers.{i}.{theirs[ours]}.weight"] = (f"blocks.{i}.{ours}.weight", slice(None))
                continue
            row = 0
            for part, size in module.parts.items():
                place = f"model.layers.{i}.{'mlp' if part in MLP else 'self_attn'}.{part}"
                names[place + ".weight"] = (f"blocks.{i}.{ours}.weight", slice(row, row + size))
                if part in model.shape.bias:
                    names[place + ".bias"] = (f"blocks.{i}.{ours}.bias", slice(row, row + size))
                row += size
    return names


def find_checkpoint(path: str) -> str:
    """A folder with a config.json: `path` itself, or the hub's model of that name, downloaded once. ValueError says what to do."""
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "config.json")):
            raise ValueError(f"the model folder {path} has no config.json: it is not a Hugging Face checkpoint")
        return path
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"there is no model folder {path}: give a folder that exists, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"])
    except Exception as e:  # the hub client raises many kinds: unknown name, no network, no rights; its own words follow ours
        raise ValueError(f"{path} is not a folder here and could not be had from the hub ({type(e).__name__}: {str(e).splitlines()[0]}); "
                         "check the name and the network, or give the path of a downloaded checkpoint folder") from e


def load(path: str, *, dtype=torch.float32, device="cpu") -> Transformer:
    """Model from a Hugging Face checkpoint folder or hub id: config.json and one or many safetensors shards.

    Raises ValueError for a missing folder, an option that is not implemented, and every missing, extra or misshapen tensor, by name.
    """
    path = find_checkpoint(path)
    with open(os.path.join(path, "config.json")) as f:
        config = json.load(f)
    with torch.device("meta"):  # shapes only: a big model is never in memory twice
        model = Transformer(config)
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(index):
        with open(index) as f:
            shards = sorted(set(json.load(f)["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    absent = [shard for shard in shards if not os.path.exists(os.path.join(path, shard))]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}: the download is incomplete, or the weights are not safetensors")
    model.to_empty(device=device).to(dtype)
    names, parameters, seen, extra = border_names(model), dict(model.named_parameters()), set(), []
    for name, p in parameters.items():
        if name.endswith(".bias"):
            nn.init.zeros_(p)  # rows of parts without a bias
    for shard in shards:
        with safe_open(os.path.join(path, shard), framework="pt") as f:
            for name in f.keys():
                if name not in names:
                    if not name.endswith(HARMLESS) and not (name == "lm_head.weight" and model.shape.tied):
                        extra.append(name)
                    continue
                target, rows = names[name]
                ours, tensor = parameters[target].data[rows], f.get_tensor(name)
                if ours.shape != tensor.shape:
                    raise ValueError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(ours.shape)}")
                ours.copy_(tensor)
                seen.add(name)
    missing = sorted(names.keys() - seen)
    if missing or extra:
        told = [f"{what} {len(which)}: {', '.join(which[:4])}{' ..' if len(which) > 4 else ''}" for what, which in (("missing", missing), ("unknown", extra)) if which]
        raise ValueError(f"{path}: the tensors are not those of its config.json; {'; '.join(told)}")
    return model


def create(config: dict, *, seed: int, dtype=torch.float32, device="cpu") -> Transformer:
    """Model of random weights: normal, config's initializer_range (0.02), norms 1, biases 0. config as in config.json."""
    model = Transformer(config).to(dtype)
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.copy_(torch.randn(p.shape, generator=g) * config.get("initializer_range", 0.02))
    return model.to(device)


@torch.no_grad()
def save(model: Transformer, folder: str, state: dict | None = None):
    """Writes config.json and model.safetensors with Hugging Face's names; transformers and vLLM load the folder as it stands.

    state: our parameter names -> tensors to write instead of the model's own (lora.merged_state gives the merged weights).
    """
    os.makedirs(folder, exist_ok=True)
    state = dict(model.named_parameters()) if state is None else state
    tensors = {name: state[ours][rows].detach().contiguous().cpu() for name, (ours, rows) in border_names(model).items()}
    # views of one tensor share storage, which safetensors refuses: a row range is its own tensor only when cloned
    tensors = {name: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t for name, t in tensors.items()}
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    config = dict(model.config)
    config["dtype" if "torch_dtype" not in config else "torch_dtype"] = str(model.dtype).removeprefix("torch.")
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
