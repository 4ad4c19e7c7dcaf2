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
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from kernels import flash_attention as flash
from kernels.attention import Buckets, attention
from kernels import linear_logprob as scoring
from kernels.exact_kl import exact_kl
from kernels.logprob import logits_fp32, logprob, truncate_
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rotate
from kernels.swiglu import swiglu

# ---------------------------------------------------------------------------------------------- what a config.json may say
# What a config.json leaves out is what transformers' class of that family has there; a null is a null, which for key heads
# means "as many as query heads". Sizes have no default: a file without them is not a checkpoint's.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DEFAULTS = dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, tie_word_embeddings=False, sliding_window=None, hidden_act="silu")
FAMILIES = {
    "llama": dict(max_position_embeddings=2048),
    "mistral": dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
    "qwen2": dict(max_position_embeddings=32768, num_key_value_heads=32, sliding_window=4096),
    "qwen3": dict(max_position_embeddings=32768, num_key_value_heads=32, head_dim=128, sliding_window=4096),
}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
HARMLESS = "rotary_emb.inv_freq"  # a tensor of old checkpoints that is computed from the config
# what each way of stretching the context must state; a factor left out would silently be a factor of 1
ROPE = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}


class Shape:
    """Sizes and options of a decoder, checked: from a config.json's dict. What is not implemented is refused by name.

    Raises ValueError for an unknown architecture, a size that is missing, or an option that would change the result and is not implemented.
    """

    def __init__(self, config: dict):
        # model_type alone decides: `architectures` is what a file was saved as, and derived models often carry another's name there
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type {family!r} is not implemented; known: {', '.join(FAMILIES)}")
        absent = [key for key in SIZES if not config.get(key)]
        if absent:
            raise ValueError(f"config.json lacks {', '.join(absent)}: it is not the config of a {family} checkpoint")
        config = DEFAULTS | FAMILIES[family] | config
        refuse_unsupported(config)
        self.family, (self.V, self.D, self.intermediate, self.L, self.H) = family, (config[key] for key in SIZES)
        self.K = config["num_key_value_heads"] or self.H
        # not always D / H: Qwen3-0.6B has 16 heads of 128 over a width of 1,024
        self.E = config["head_dim"] or self.D // self.H
        self.eps, self.context, self.tied = config["rms_norm_eps"], config["max_position_embeddings"], config["tie_word_embeddings"]
        self.qk_norm = family == "qwen3"
        # a bias that exists and is left out, or the other way round, would be found by its tensor's name; its place is fixed here:
        # qwen2 has its biases whatever the file says; llama and qwen3 ask, and o_proj then has one too
        bias = ATTENTION[:3] if family == "qwen2" else ATTENTION if family in ("llama", "qwen3") and config.get("attention_bias") else ()
        self.bias = frozenset(bias + MLP if family == "llama" and config.get("mlp_bias") else bias)
        self.rope = rope_parameters(config)
        if self.H % self.K or self.E % 2:
            raise ValueError(f"{self.H} query heads over {self.K} key heads of width {self.E}: the first must be a multiple of the second, the third even")


def refuse_unsupported(config: dict):
    """Raises ValueError naming the first option of config.json that is in use and not implemented."""
    window = config["sliding_window"]
    # Qwen states a width and switches it off; a window no shorter than the context hides nothing
    if config["model_type"].startswith("qwen") and not config.get("use_sliding_window") or window and window >= config["max_position_embeddings"]:
        window = None
    # each of these loads without an error and changes the logits; a name we have never heard of cannot be caught here, but the
    # architectures that need one have tensors or a model_type of their own, which are
    checks = {
        "sliding_window": window, "layer_types": sorted(set(config.get("layer_types") or []) - {"full_attention"}),
        "hidden_act": config["hidden_act"] not in ("silu", "swish") and config["hidden_act"],
    }
    checks |= {name: config.get(name) for name in (
        "quantization_config", "attn_logit_softcapping", "final_logit_softcapping", "num_local_experts", "num_experts", "attention_dropout")}
    for name, value in checks.items():
        if value:
            raise ValueError(f"config.json has {name} = {value!r}, which is not implemented: the model would give wrong results")


def rope_parameters(config: dict) -> dict:
    """{rope_type, rope_theta, ...} from the new spelling (`rope_parameters`) or the old (`rope_theta` + `rope_scaling`)."""
    # the same numbers have had three spellings: "type" and "rope_type" in rope_scaling, then all of it in rope_parameters;
    # where a file has both transformers reads the old one, and so do we
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    # a dict inside is one rope for each kind of layer
    if kind not in ROPE or partial != 1.0 or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope {rope} with partial_rotary_factor {partial} is not implemented; known rope types: {', '.join(ROPE)}, over the whole head")
    absent = [key for key in ROPE[kind] if rope.get(key) is None]
    if absent:
        raise ValueError(f"config.json asks for rope of type {kind} and lacks its {', '.join(absent)}")
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["original"] = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    return rope


def rope_frequencies(E: int, rope: dict) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair of dimensions (E/2,) fp32, and the factor on cos and sin.

    llama3: Meta's Llama 3.1 release; yarn: arXiv:2309.00071, section 3.
    """
    # in fp32 and in this order, as transformers does it: at position 30,000 the last bit of a frequency moves the angle by 0.002
    theta, factor, original = rope["rope_theta"], rope.get("factor", 1.0), rope["original"]
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
        # the same idea with a straight ramp over dimensions, between those that turn beta_fast and beta_slow times
        edges = [E * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                 for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)]
        if rope.get("truncate", True):
            edges = [math.floor(edges[0]), math.ceil(edges[1])]
        low, high = max(edges[0], 0), min(edges[1], E - 1)
        slowed = ((torch.arange(E // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
        return slowed * inv_freq / factor + (1 - slowed) * inv_freq, yarn_scale(factor, rope)
    return inv_freq, 1.0


def yarn_scale(factor: float, rope: dict) -> float:
    """What yarn multiplies queries and keys by, so that attention over a longer context stays as sharp (section 3.4)."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    sharp = [0.1 * m * math.log(max(factor, 1)) + 1 for m in (rope.get("mscale") or 0, rope.get("mscale_all_dim") or 0, 1)]
    # DeepSeek's pair counts only where both are stated
    return sharp[0] / sharp[1] if rope.get("mscale") and rope.get("mscale_all_dim") else sharp[2]


# ------------------------------------------------------------------------------------------------------------- the modules
class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 (arXiv:1910.07467)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x, delta=None):
        """The norm of x; with delta, x + delta and its norm."""
        return rms_norm(x, self.weight, self.eps) if delta is None else add_rms_norm(x, delta, self.weight, self.eps)


# one matmul for several projections: the input is read once, and a small model makes 4 calls a layer instead of 7
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


class Block(nn.Module):
    def __init__(self, s: Shape, layer: int):
        super().__init__()
        self.layer, self.H, self.K, self.E = layer, s.H, s.K, s.E
        self.input_norm, self.post_norm = RMSNorm(s.D, s.eps), RMSNorm(s.D, s.eps)
        self.qkv = Linear(s.D, {"q_proj": s.H * s.E, "k_proj": s.K * s.E, "v_proj": s.K * s.E}, s.bias)
        self.o = Linear(s.H * s.E, {"o_proj": s.D}, s.bias)
        self.gate_up = Linear(s.D, {"gate_proj": s.intermediate, "up_proj": s.intermediate}, s.bias)
        self.down = Linear(s.intermediate, {"down_proj": s.D}, s.bias)
        if s.qk_norm:  # over each head by itself, before the rotation
            self.q_norm, self.k_norm = RMSNorm(s.E, s.eps), RMSNorm(s.E, s.eps)
        self.qk_norm = s.qk_norm

    def forward(self, x, cos, sin, plan):
        T, (H, K, E) = len(x), (self.H, self.K, self.E)
        # x is the stream that everything is added to: both halves read it through a norm and write back to it.
        # Queries and keys stand side by side, so that one rotation turns both
        qk, v = self.qkv(self.input_norm(x)).view(T, H + 2 * K, E).split([H + K, K], 1)
        if self.qk_norm:
            qk = torch.cat([self.q_norm(qk[:, :H]), self.k_norm(qk[:, H:])], 1)
        q, k = rotate(qk, cos, sin).split([H, K], 1)
        x, normed = self.post_norm(x, self.o(plan.attend(self.layer, q, k, v).reshape(T, H * E)))
        return x + self.down(swiglu(self.gate_up(normed)))


WHOLE = dict(top_k=0, top_p=1.0, min_p=0.0)  # no truncation: the whole vocabulary


class Transformer(nn.Module):
    # training keeps the input of each layer alone and makes the rest again in the backward: a forward more of time for 1/L of the memory
    checkpointing = False

    def __init__(self, config: dict):
        """config: the dict of a Hugging Face config.json (kept, and written back by `save`). Weights are left unset."""
        super().__init__()
        self.config, self.shape = dict(config), Shape(config)
        s = self.shape
        self.embed = nn.Parameter(torch.empty(s.V, s.D))
        self.blocks = nn.ModuleList(Block(s, layer) for layer in range(s.L))
        self.norm = RMSNorm(s.D, s.eps)
        # tied: one parameter with two gradients, which autograd adds up
        self.untied_head = None if s.tied else nn.Parameter(torch.empty(s.V, s.D))
        # no buffer: `model.to(torch.bfloat16)` would round it, and then position 257 and 258 were one
        self.inv_freq = None

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
        if self.inv_freq is None or self.inv_freq.device != ids.device:  # made here and not at the start: there the device may be "meta"
            inv_freq, self.rope_scale = rope_frequencies(self.shape.E, self.shape.rope)
            self.inv_freq = inv_freq.to(ids.device)
        angles = positions[:, None, None].float() * self.inv_freq  # (T, 1, E/2)
        # the same for every layer, so made once; a rotated pair depends on its position only, never on its place in the stream
        cos, sin = ((f(angles) * self.rope_scale).to(self.dtype) for f in (torch.cos, torch.sin))
        x, again = F.embedding(ids, self.embed), self.checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            # the random state is put back before a layer runs again: LoRA's dropout drops the same numbers, gradients are the same bits
            x = checkpoint(block, x, cos, sin, plan, use_reentrant=False) if again else block(x, cos, sin, plan)
        return self.norm(x)

    def logits(self, ids):
        """Next-token logits (T, V) fp32 of one sequence ids (T,)."""
        # a sequence by itself is a prompt that nobody completes
        packed = Packed(self, [ids.tolist()], [[]])
        return logits_fp32(self(packed.ids, packed.positions, packed), self.head)

    def completion_logprobs(self, prompts, completions, *, temperature=1.0, **truncation):
        """Log-probability (nats) of every completion token given its prompt and what comes before it, and the entropy there.

        prompts: B lists of ids. completions: B groups, each a list of completions, each a non-empty list of ids. Returns flat
        (M,) fp32 tensors over all completion tokens in row order, logp and entropy, and rows (M,) int64, the completion (numbered over
        all groups) each token belongs to. Gradients flow. A prompt is computed once. truncation: top_k, top_p, min_p.
        """
        hidden, packed = self.completion_hidden(prompts, completions)
        if scoring.on_triton(hidden) and WHOLE | truncation == WHOLE and not torch.is_grad_enabled():  # nothing learns: no logits at all
            return *scoring.linear_logprob(hidden, self.head, packed.targets, temperature=temperature), packed.rows
        logp, entropy = logprob(hidden, self.head, packed.targets, temperature=temperature, **truncation)
        return logp, entropy, packed.rows

    def completion_hidden(self, prompts, completions):
        """Hidden states (M, D) from which the completion tokens are predicted, and the Packed stream that they come from."""
        packed = Packed(self, prompts, completions)
        # only where something is predicted: the head of a small model costs as much as its layers
        return self(packed.ids, packed.positions, packed).index_select(0, packed.sources), packed

    def scores(self, hidden, targets, reference, *, temperature=1.0, **truncation):
        """logp, entropy (M,) of the targets (M,) after hidden (M, D), and the exact KL (M,) to a reference: its (hidden (M, D), head (V, D)), or None for none."""
        logp, entropy = logprob(hidden, self.head, targets, temperature=temperature, **truncation)
        if reference is None:
            return logp, entropy, None
        truncate = None if WHOLE | truncation == WHOLE else partial(truncate_rows, targets=targets, **truncation)
        return logp, entropy, exact_kl(hidden, self.head, *reference, temperature=temperature, truncate=truncate)


def truncate_rows(z, rows, *, targets, **truncation):
    """The trainer's truncation of the scaled logits z (m, V) of a slice of rows, in place."""
    return truncate_(z, keep=targets[rows], **truncation)


class Packed:
    """The plan of a stream [prompt, completion, completion, .., prompt, ..] in which a group shares its prompt.

    The last token of a completion predicts nothing and is left out of the stream. `sources` (M,) is where in the stream each
    completion token is predicted from: the shift by one exists here and nowhere else. `targets` (M,) is the token itself, `rows` (M,) its
    completion's number over all groups.
    """

    def __init__(self, model: Transformer, prompts: list[list[int]], completions: list[list[list[int]]]):
        assert prompts and len(prompts) == len(completions), f"{len(prompts)} prompts, {len(completions)} groups of completions"
        ids, positions, segments, sources, targets, rows = [], [], [], [], [], []
        row = 0
        # Python lists are fast enough: 16,000 tokens take 10 ms, once for a forward and a backward of seconds
        for prompt, group in zip(prompts, completions):
            start, P = len(ids), len(prompt)
            if not P:  # the first token of a completion is predicted from the prompt's last one
                raise ValueError("a prompt is empty: at least one token must come before a completion")
            longest = P + max(map(len, group), default=0)
            if longest > model.shape.context:  # nothing breaks there, the answers just become nonsense
                raise ValueError(f"a prompt and its completion are {longest} tokens, longer than the model's context of {model.shape.context}")
            segments.append((start, P, start, 0))
            ids += prompt
            positions += range(P)
            for completion in group:
                if not completion:
                    raise ValueError(f"completion {row} is empty: it has no token to score")
                own, C = len(ids), len(completion)
                # what the ids are is never asked: a pad id, a stop id in the middle, a repeated prompt are all just tokens
                segments.append((own, C - 1, start, P))
                ids += completion[:-1]
                # every completion goes on from its prompt, wherever in the stream it stands
                positions += range(P, P + C - 1)
                sources.append(start + P - 1)  # the first token follows the prompt, all G of them the same position
                sources += range(own, own + C - 1)
                targets += completion
                rows += [row] * C
                row += 1
        dev = model.device
        self.ids, self.positions, self.sources, self.targets, self.rows = (
            torch.tensor(x, dtype=torch.long, device=dev) for x in (ids, positions, sources, targets, rows))
        # the plan of attention is made of lengths, before any tensor is: no mask is inferred from values
        self.segments = segments
        s, kw = model.shape, dict(dtype=model.dtype, device=dev)
        # the same function of the same segments: stacked for torch, or as a table for one kernel
        self.layout = flash.Tiles(segments, s.H // s.K, E=s.E, **kw) if flash.on_triton(model.embed) else Buckets(segments, s.H // s.K, **kw)

    def attend(self, layer, q, k, v):
        """q (T, H, E), k and v (T, K, E) -> (T, H, E)."""
        return attention(q, k, v, self.layout) if isinstance(self.layout, Buckets) else flash.flash_attention(q, k, v, self.layout)


def micro_batches(prompts: list[list[int]], completions: list[list[list[int]]], micro_tokens: int) -> list[list[tuple[int, list[int]]]]:
    """Cuts a step into micro-batches of at most micro_tokens tokens: each a list of (prompt number b, numbers of its completions).

    Whole groups, so that a prompt is computed once; a group too large for one micro-batch is split and its prompt computed again, with the
    same gradient. Completions that are empty lists are left out (rows the caller has dropped). A single completion longer than
    micro_tokens gets a micro-batch of its own: it has to run somewhere. The fullest comes first: what does not fit in memory fails at once.
    """
    pieces = []
    for b, (prompt, group) in enumerate(zip(prompts, completions)):
        # parts of about the same size, where filling one after another would leave a last one that is mostly prompt
        members = [(len(completion), g) for g, completion in enumerate(group) if completion]
        for part in spread(members, micro_tokens - len(prompt)):
            pieces.append((len(prompt) + sum(len(group[g]) for g in part), (b, part)))
    cut = []
    for together in spread(pieces, micro_tokens):
        groups: dict[int, list[int]] = {}
        for b, part in together:  # two parts of one group can meet again: then their prompt is one
            groups.setdefault(b, []).extend(part)
        cut.append([(b, sorted(part)) for b, part in sorted(groups.items())])
    return cut


def spread(items: list, room: int) -> list[list]:
    """Spreads items (size, what) over few bins of at most `room`; returns each bin's whats, the fullest first. An item larger than room is alone.

    Largest first into the emptiest bin, with one bin more whenever that does not fit. So the emptiest bin has at least half
    of the fullest, unless that is a single item: the last item to enter the fullest found it the emptiest.
    """
    items = sorted(items, key=lambda item: -item[0])
    # no fewer can do; an item that is too large fills its bin and no more
    bins = max(1, -(-sum(min(size, room) for size, _ in items) // max(room, 1)))
    while True:
        load, cut = [0] * bins, [[] for _ in range(bins)]
        for size, what in items:
            i = load.index(min(load))
            load[i] += size
            cut[i].append(what)
        if all(size <= room or len(bin) <= 1 for size, bin in zip(load, cut)):
            return [bin for _, bin in sorted(zip(load, cut), key=lambda x: -x[0]) if bin]
        bins += 1


# ----------------------------------------------------------------------------------------------- Hugging Face's folders
def border_names(model: Transformer) -> dict[str, tuple[str, slice]]:
    """Hugging Face's tensor name -> (our parameter's name, the rows of it)."""
    names = {"model.embed_tokens.weight": ("embed", slice(None)), "model.norm.weight": ("norm.weight", slice(None))}
    if model.untied_head is not None:
        names["lm_head.weight"] = ("untied_head", slice(None))
    # a tied head has no name of its own: the file holds the embedding once
    theirs = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    for i, block in enumerate(model.blocks):
        for ours, module in block.named_children():
            if isinstance(module, RMSNorm):
                names[f"model.layers.{i}.{theirs[ours]}.weight"] = (f"blocks.{i}.{ours}.weight", slice(None))
                continue
            # q, k, v lie under each other in one of our parameters, and apart in the file
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
        # the usual slip: out/NAME instead of out/NAME/ckpt/step_000100
        if not os.path.exists(os.path.join(path, "config.json")):
            raise ValueError(f"the model folder {path} has no config.json: it is not a Hugging Face checkpoint")
        return path
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"there is no model folder {path}: give a folder that exists, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct")
    # here, because it takes a quarter of a second that a model from a folder need not wait for
    from huggingface_hub import snapshot_download

    try:
        # some repositories hold the same weights twice, the second time in the names of the company's own code
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"], ignore_patterns=["consolidated*", "*/*"])
    except Exception as e:  # the hub client raises many kinds: unknown name, no network, no rights; its own words follow ours
        raise ValueError(f"{path} is not a folder here and could not be had from the hub ({type(e).__name__}: {str(e).strip().partition(chr(10))[0]}); "
                         "check the name and the network, or give the path of a downloaded checkpoint folder") from e


def read_json(folder: str, name: str) -> dict:
    with open(os.path.join(folder, name), encoding="utf-8") as f:
        try:
            return json.load(f)
        except ValueError as e:
            raise ValueError(f"{os.path.join(folder, name)} is not JSON ({e}): was its download cut short?") from None


def load(path: str, *, dtype=torch.float32, device="cpu") -> Transformer:
    """Model from a Hugging Face checkpoint folder or hub id: config.json and one or many safetensors shards.

    Raises ValueError for a missing folder, an option that is not implemented, and every missing, extra or misshapen tensor, by name.
    """
    path = find_checkpoint(path)
    with torch.device("meta"):  # shapes only: a big model is never in memory twice
        model = Transformer(read_json(path, "config.json"))
    shards = ["model.safetensors"]
    # one whole file comes first, as in transformers: the index beside it may be what an earlier save left behind
    if not os.path.exists(os.path.join(path, shards[0])) and os.path.exists(os.path.join(path, "model.safetensors.index.json")):
        shards = sorted(set(read_json(path, "model.safetensors.index.json")["weight_map"].values()))
    # before anything is allocated: a download that broke off is the most common damage, and minutes of loading would hide it
    absent = [shard for shard in shards if not os.path.exists(os.path.join(path, shard))]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}: the download is incomplete, or the weights are not safetensors")
    # rotary angles are no parameters and are made at the first forward
    model.to(dtype).to_empty(device=device)  # in this order, so that bf16 weights never take fp32's room
    names, parameters, seen, extra, second_head = border_names(model), dict(model.named_parameters()), set(), [], None
    # what the file does not fill: memory comes uncleared from to_empty
    for name, p in parameters.items():
        if name.endswith(".bias"):
            nn.init.zeros_(p)  # rows of parts without a bias
    for shard in shards:
        for name, tensor in read_tensors(os.path.join(path, shard)):
            if name == "lm_head.weight" and model.shape.tied:
                second_head = tensor
            elif name not in names:
                extra += [] if name.endswith(HARMLESS) else [name]
            else:
                target, rows = names[name]
                ours = parameters[target].data[rows]
                if ours.shape != tensor.shape:
                    raise ValueError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(ours.shape)}")
                ours.copy_(tensor)  # to the device and dtype asked for, whatever the file's
                seen.add(name)
    # a tensor too many is as wrong as one too few: a bias, a norm or an expert that is left out changes every logit
    missing = sorted(names.keys() - seen)
    if missing or extra:
        told = [f"{what} {len(which)}: {', '.join(which[:4])}{' ..' if len(which) > 4 else ''}" for what, which in (("missing", missing), ("unknown", extra)) if which]
        raise ValueError(f"{path}: the tensors are not those of its config.json; {'; '.join(told)}")
    # files made from torch's .bin hold a tied head a second time; one that differs was trained apart and is not the embedding
    if second_head is not None and not torch.equal(second_head.to(model.embed), model.embed):
        raise ValueError(f"{path}: config.json ties the head to the embedding, and lm_head.weight is not equal to it: set tie_word_embeddings to false there")
    return model.eval()  # as transformers does: an adapter that is loaded on top drops nothing until training asks for it


def read_tensors(path: str):
    """Names and tensors of a safetensors file, one in memory at a time."""
    try:
        with safe_open(path, framework="pt") as f:
            for name in f.keys():
                yield name, f.get_tensor(name)
    except SafetensorError as e:
        raise ValueError(f"{path} is not a whole safetensors file ({e}): was its download cut short?") from None


def create(config: dict, *, seed: int, dtype=torch.float32, device="cpu") -> Transformer:
    """Model of random weights: normal, config's initializer_range (0.02), norms 1, biases 0. config as in config.json."""
    model = Transformer(config).to(dtype)
    g = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts from the same numbers
    for p in model.parameters():
        if p.dim() > 1:
            p.data.copy_(torch.randn(p.shape, generator=g) * config.get("initializer_range", 0.02))
    return model.to(device).eval()


@torch.no_grad()
def save(model: Transformer, folder: str, state: dict | None = None):
    """Writes config.json and model.safetensors with Hugging Face's names; transformers and vLLM load the folder as it stands.

    state: our parameter names -> tensors to write instead of the model's own (lora.merged_state gives the merged weights). Raises
    ValueError for a model that carries adapters and no state: the base alone is not what was trained.
    """
    names, state = border_names(model), dict(model.named_parameters()) if state is None else state
    absent = sorted({ours for ours, _ in names.values()} - state.keys())
    if absent:
        raise ValueError(f"there is no {absent[0]} to save: a model with adapters is saved merged (state=lora.merged_state(model)) or as an adapter (lora.save_adapter)")
    os.makedirs(folder, exist_ok=True)
    tensors = {name: state[ours][rows].detach().contiguous().cpu() for name, (ours, rows) in names.items()}
    # views of one tensor share storage, which safetensors refuses: a row range is its own tensor only when cloned
    tensors = {name: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t for name, t in tensors.items()}
    # some readers refuse a file whose metadata does not say that its tensors are torch's
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    # the key was torch_dtype before transformers 4.56: both say the same, or old and new readers would disagree
    config = model.config | {key: str(model.dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key == "dtype" or key in model.config}
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
