"""One decoder for Llama 3, SmolLM2, Qwen2/2.5, Qwen3 and Mistral, from and to Hugging Face folders.

    model = load("models/smollm2-135m")
    model.logits(torch.tensor([1, 2, 3]))                                        # (3, V)
    model.completion_logprobs([[1, 2]], [[[3, 4], [5]]])                         # one prompt, two completions

One forward serves prefill, decoding, scoring, the reference and training. It takes a packed stream: token ids
(T,), positions (T,) and a plan, whose `attend(layer, qk, v, cos, sin)` says which keys a token sees.
packing.py has the plan for streams in which a group's completions share their prompt, rollout.py and
decode.py those that read a cache. Padding never reaches a matmul.

The file goes from leaves to root: RMSNorm, Linear, Block, Transformer, then folders in and out. q, k, v are
one matmul and gate, up are one. Names are Hugging Face's only at the border (load, save). What a
config.json may say is in shape.py.

Dims: T tokens of a stream, D width, V vocabulary, H query heads, K key/value heads, E head width, L layers, M
scored tokens, B prompts, G completions a prompt. Sources of the architecture: arXiv:2307.09288, 2505.09388.
"""

import json
import os
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import nf4
from kernels import linear_logprob as scoring
from kernels.logprob import any_truncation, logits_fp32, logprob
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.swiglu import swiglu
from packing import Packed, micro_batches
from shape import ATTENTION, MLP, Shape, rope_frequencies

# What others import from here, wherever it is written.
__all__ = ["ATTENTION", "MLP", "Packed", "Shape", "Transformer", "micro_batches"]
__all__ += ["create", "find_checkpoint", "load", "logits_fp32", "save"]


# ------------------------------------------------------------------------------------------------ the modules
class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x, delta):
        """(x + delta, the norm of that), in one pass over memory. delta None: 0."""
        if delta is None:
            return x, self(x)
        return add_rms_norm(x, delta, self.weight, self.eps)


class Linear(nn.Module):
    """y = x W^T + b for one or several projections of the same input: parts = {"q_proj": rows, ...}, stacked.

    One matmul for several projections reads its input once, and a small model makes 4 calls a layer instead
    of 7. lora.py finds these layers by their `parts` and wraps them. Biases are all or none: where only some
    parts have one, the rest is 0.
    """

    def __init__(self, width: int, parts: dict[str, int], bias=frozenset()):
        super().__init__()
        self.parts, self.width = parts, width
        rows = sum(parts.values())
        # The parts lie under each other in this order; border_names cuts them apart again for the file.
        self.weight = nn.Parameter(torch.empty(rows, width))
        has_bias = not bias.isdisjoint(parts)
        self.bias = nn.Parameter(torch.zeros(rows)) if has_bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)

    # What lora.py asks of a layer that may also be in 4 bits (nf4.NF4Linear).
    def dense(self):
        """The weight (rows, width) in full."""
        return self.weight

    @property
    def like(self):
        """A tensor of the layer's dtype and device."""
        return self.weight


def nothing(*_):
    return nullcontext()


class MadeAgain(torch.autograd.graph.saved_tensors_hooks):
    """Inside, y = make(source) is not kept for the backward, but made again where the backward wants it.

    For what is dear to keep and cheap to make. The source is what somebody keeps anyway.
    """

    def __init__(self, y, source, make):
        address, shape, source = y.data_ptr(), y.shape, source.detach()

        def pack(kept):
            # Every tensor that is kept inside comes by, weights too; y is known by where it lies.
            is_y = kept.data_ptr() == address and kept.shape == shape
            return (make, source) if is_y else kept

        def unpack(kept):
            if isinstance(kept, torch.Tensor):
                return kept
            make, source = kept
            with torch.no_grad():
                return make(source)

        super().__init__(pack, unpack)


def offloaded(block, x, cos, sin, plan):
    """A block that is computed again in the backward, from an input that waits in the host's memory.

    Pinned, so that the copies are the bus's work. The reentrant form of torch's checkpoint keeps its inputs
    by way of hooks, the other does not; it wants an input with a gradient, which a frozen embedding does not
    give.
    """
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    with save_on_cpu(pin_memory=x.is_cuda):
        return checkpoint(block, x, None, cos, sin, plan, use_reentrant=True)


class Block(nn.Module):
    """One layer: attention, then a gated MLP, each reading the stream through a norm and adding to it.

    What the MLP adds is handed on beside the stream, because the next layer's norm adds it on its way: one
    pass over memory and one launch a layer less, 1/11 of a decoding step's.
    """

    def __init__(self, s: Shape, layer: int):
        super().__init__()
        self.layer = layer  # its number, by which a plan finds its part of the cache
        self.H, self.K, self.E = s.H, s.K, s.E
        self.input_norm = RMSNorm(s.D, s.eps)
        self.post_norm = RMSNorm(s.D, s.eps)
        self.qkv = Linear(s.D, {"q_proj": s.H * s.E, "k_proj": s.K * s.E, "v_proj": s.K * s.E}, s.bias)
        self.o = Linear(s.H * s.E, {"o_proj": s.D}, s.bias)
        self.gate_up = Linear(s.D, {"gate_proj": s.intermediate, "up_proj": s.intermediate}, s.bias)
        self.down = Linear(s.intermediate, {"down_proj": s.D}, s.bias)
        self.qk_norm = s.qk_norm
        if s.qk_norm:  # over each head by itself, before the rotation
            self.q_norm = RMSNorm(s.E, s.eps)
            self.k_norm = RMSNorm(s.E, s.eps)

    def forward(self, x, delta, cos, sin, plan, light=False):
        """The stream is x + delta: x, delta (T, D), cos and sin (T, 1, E/2) -> another such x and delta.

        light: for the backward, norms and SwiGLU's product are made again instead of kept.
        """
        T, H, K, E = len(x), self.H, self.K, self.E
        made_again = MadeAgain if light else nothing
        x, normed = self.input_norm.of_sum(x, delta)
        # One matmul makes all heads of a token: H of queries, then K of keys, then K of values.
        with made_again(normed, x, self.input_norm):
            heads = self.qkv(normed).view(T, H + 2 * K, E)
        # Queries and keys stand side by side, so that one rotation turns both.
        qk, v = heads.split([H + K, K], 1)
        if self.qk_norm:
            qk = torch.cat([self.q_norm(qk[:, :H]), self.k_norm(qk[:, H:])], 1)
        if light:  # as a part of `heads`, the values that attention keeps would keep the unrotated rest too
            v = v.clone()
        # Rotation and attention. Everything that differs between training, prefill and decoding happens in
        # here: which keys a token sees, and whether k and v also go into a cache.
        attended = plan.attend(self.layer, qk, v, cos, sin)  # (T, H, E)
        # The sum goes on as the stream, its norm is what the MLP reads.
        x, normed = self.post_norm.of_sum(x, self.o(attended.reshape(T, H * E)))
        with made_again(normed, x, self.post_norm):
            gate_up = self.gate_up(normed)
        product = swiglu(gate_up)
        with made_again(product, gate_up, swiglu):
            return x, self.down(product)


class Transformer(nn.Module):
    """The decoder: embedding, L blocks, final norm, and a head that may be the embedding itself."""

    # What training keeps for the backward. "none": all. "light": what is dear to make, so no norms and no
    # products of SwiGLU: 0.69 MB a token for 1.06 in 1.02 of the time (Qwen2.5-0.5B, LoRA, H200). "layers":
    # only the input of each layer, 1/L of it all, for one forward more of time.
    checkpointing = "none"
    # Where weights are kept in more bits than they compute in (shard.py); None: they are as they compute.
    computes_in = None

    def __init__(self, config: dict):
        """config: the dict of a config.json (kept, and written back by `save`). Weights are left unset."""
        super().__init__()
        # A copy, because what is saved must be what was loaded, whatever the caller does with the dict.
        self.config = dict(config)
        self.shape = s = Shape(config)
        self.embed = nn.Parameter(torch.empty(s.V, s.D))
        self.blocks = nn.ModuleList(Block(s, layer) for layer in range(s.L))
        self.norm = RMSNorm(s.D, s.eps)
        # Tied, the head is the embedding: one parameter, whose two gradients autograd adds up.
        self.untied_head = None if s.tied else nn.Parameter(torch.empty(s.V, s.D))
        # Made at the first forward, since here the device may be "meta". Not a buffer:
        # `model.to(torch.bfloat16)` would round it, and positions 257 and 258 would become one.
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
        return self.computes_in or self.embed.dtype

    @torch.no_grad()
    def cut_vocabulary(self, rows: int):
        """Keeps the first rows of embedding and head: no other id may come in, and none is predicted."""
        self.embed = nn.Parameter(self.embed[:rows].clone())
        if self.untied_head is not None:
            self.untied_head = nn.Parameter(self.untied_head[:rows].clone())
        self.shape.V = self.config["vocab_size"] = rows

    def forward(self, ids, positions, plan):
        """Hidden states (T, D) after the final norm.

        ids (T,), positions (T,) int64; each token sees what the plan lets it see.
        """
        assert ids.dim() == 1 and ids.shape == positions.shape, (
            f"ids {tuple(ids.shape)}, positions {tuple(positions.shape)}"
        )
        # The rotation is the same for every layer, so it is made once.
        cos, sin = self.rotation(positions)
        x, delta = F.embedding(ids, self.embed), None  # (T, D)
        learning = torch.is_grad_enabled()
        recompute = self.checkpointing in ("layers", "offload") and learning
        light = self.checkpointing == "light" and learning
        for block in self.blocks:
            if recompute:
                # The random state is put back before a layer runs again, so LoRA's dropout drops the same
                # numbers and the gradients are the same bits as without.
                # One tensor is kept of each layer, so the sum is made first.
                x, delta = x if delta is None else x + delta, None
                if self.checkpointing == "offload":
                    x, delta = offloaded(block, x, cos, sin, plan)
                else:
                    x, delta = checkpoint(block, x, delta, cos, sin, plan, use_reentrant=False)
            else:
                x, delta = block(x, delta, cos, sin, plan, light)
        _, hidden = self.norm.of_sum(x, delta)
        return hidden

    def rotation(self, positions):
        """cos and sin (T, 1, E/2) of the rotary embedding at positions (T,).

        A rotated pair depends on its position only, never on its place in the stream.
        """
        if self.inv_freq is None or self.inv_freq.device != positions.device:
            # Computed on the CPU wherever the model is, so that every device turns by the same angles.
            inv_freq, self.rope_scale = rope_frequencies(self.shape.E, self.shape.rope)
            self.inv_freq = inv_freq.to(positions.device)
        # Angles are fp32 whatever the weights are; only their cos and sin are rounded.
        angles = positions[:, None, None].float() * self.inv_freq
        cos = (torch.cos(angles) * self.rope_scale).to(self.dtype)
        sin = (torch.sin(angles) * self.rope_scale).to(self.dtype)
        return cos, sin

    def logits(self, ids):
        """Next-token logits (T, V) fp32 of one sequence ids (T,)."""
        # A sequence by itself is a prompt that nobody completes.
        packed = Packed(self, [ids.tolist()], [[]])
        hidden = self(packed.ids, packed.positions, packed)  # (T, D)
        return logits_fp32(hidden, self.head)

    def completion_hidden(self, prompts, completions, drawn=None):
        """(hidden (M, D), targets (M,) int64): all completion tokens, and the states that predict them.

        prompts: B lists of ids. completions: B groups, each a list of non-empty lists of ids. Tokens are in
        row order. A prompt is computed once. drawn: which ids were drawn (packing.Packed); M counts them.
        """
        packed = Packed(self, prompts, completions, drawn)
        return self.predictions(packed), packed.targets

    def predictions(self, packed: Packed):
        """Hidden states (M, D) of the positions in a packed stream from which its targets are predicted."""
        hidden = self(packed.ids, packed.positions, packed)  # (T, D)
        # The head runs only where something is predicted: in a small model it costs as much as the layers.
        return hidden.index_select(0, packed.sources)

    def completion_logprobs(self, prompts, completions, *, drawn=None, temperature=1.0, top_k=0, top_p=1.0,
                            min_p=0.0):  # fmt: skip
        """Log-probability of every completion token given all before it, and the entropy at its place.

        prompts: B lists of ids. completions: B groups, each a list of non-empty lists of ids. drawn: which
        ids were drawn (packing.Packed); only they are scored. temperature, top_k, top_p, min_p: of the
        distribution, as in sampling.

        Returns flat (M,) tensors over all completion tokens in row order: logp and entropy, both fp32 and in
        nats, and rows, int64, the completion (numbered over all groups) that a token belongs to. Gradients
        flow. A prompt is computed once.
        """
        packed = Packed(self, prompts, completions, drawn)
        hidden = self.predictions(packed)  # (M, D)
        whole = not any_truncation((top_k, top_p, min_p))
        if whole and scoring.on_triton(hidden) and not torch.is_grad_enabled():
            # Where nothing learns, one kernel goes from hidden states to log-probabilities without logits.
            logp, entropy = scoring.linear_logprob(hidden, self.head, packed.targets, temperature=temperature)
        else:
            options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            logp, entropy = logprob(hidden, self.head, packed.targets, **options)
        return logp, entropy, packed.rows


@torch.no_grad()
def create(config: dict, *, seed: int, dtype=torch.float32, device="cpu", base="dense") -> Transformer:
    """A model of random weights: normal with the config's initializer_range (0.02), norms 1, biases 0.

    config: as in a config.json. base: as in `load`. Returns it in evaluation mode.
    """
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    make_room(model, dtype, device, base)
    # Drawn on the CPU, so that every device starts from the same numbers.
    generator = torch.Generator().manual_seed(seed)
    spread = config.get("initializer_range", 0.02)
    for name, shape in shapes.items():
        if len(shape) == 1:  # norms and biases stay at 1 and 0
            continue
        weight = torch.randn(shape, generator=generator).mul_(spread)
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nf4.NF4Linear):
            module.fill(weight.to(module.like))
        else:
            model.get_parameter(name).copy_(weight)
    return model.eval()


@torch.no_grad()
def make_room(model: Transformer, dtype, device, base: str):
    """Gives a model from the device "meta" memory for its numbers: weights unset, norms 1, biases 0.

    base "nf4": linear layers get none, and are frozen (nf4.py). ValueError for another than that and "dense".
    """
    if base == "nf4":
        nf4.replace(model)
    elif base != "dense":
        raise ValueError(f"base = {base!r} is not one of 'dense', 'nf4'")
    # In this order, so that bf16 weights never take the room of fp32.
    model.to(dtype).to_empty(device=device)
    # to_empty's memory is not cleared, and a file does not fill the rows of parts without a bias.
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.fill_(0.0 if name.endswith(".bias") else 1.0)


# --------------------------------------------------------------------------------- Hugging Face's folders, in
# A tensor of old checkpoints that is computed from the config.
HARMLESS = "rotary_emb.inv_freq"

# Our names of the norms -> theirs.
NORMS = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


def border_names(model: Transformer) -> dict[str, tuple[str, slice]]:
    """Hugging Face's tensor name -> (our parameter's name, the rows of it)."""
    everything = slice(None)
    names = {
        "model.embed_tokens.weight": ("embed", everything),
        "model.norm.weight": ("norm.weight", everything),
    }
    # A tied head has no name of its own: the file holds the embedding once.
    if model.untied_head is not None:
        names["lm_head.weight"] = ("untied_head", everything)
    for i, block in enumerate(model.blocks):
        for ours, module in block.named_children():
            if isinstance(module, RMSNorm):
                names[f"model.layers.{i}.{NORMS[ours]}.weight"] = (f"blocks.{i}.{ours}.weight", everything)
                continue
            # q, k, v lie under each other in one of our parameters, and apart in the file.
            start = 0
            for part, size in module.parts.items():
                rows = slice(start, start + size)
                start += size
                parent = "mlp" if part in MLP else "self_attn"
                theirs = f"model.layers.{i}.{parent}.{part}"
                names[f"{theirs}.weight"] = (f"blocks.{i}.{ours}.weight", rows)
                if part in model.shape.bias:
                    names[f"{theirs}.bias"] = (f"blocks.{i}.{ours}.bias", rows)
    return names


def find_checkpoint(path: str) -> str:
    """A folder with a config.json: `path` itself, or the hub's model of that name, downloaded once.

    Raises ValueError, which says what to do.
    """
    if os.path.isdir(path):
        # The usual slip is out/NAME instead of out/NAME/ckpt/step_000100.
        if not os.path.exists(os.path.join(path, "config.json")):
            raise ValueError(
                f"the model folder {path} has no config.json: it is not a Hugging Face checkpoint"
            )
        return path
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(
            f"there is no model folder {path}: "
            "give a folder that exists, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    # Imported here, because it takes a quarter of a second that a model from a folder need not wait for.
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    # Some repositories hold the same weights twice, the second time in the names of the company's own code.
    unwanted = ["consolidated*", "*/*"]
    try:
        return snapshot_download(path, allow_patterns=wanted, ignore_patterns=unwanted)
    except Exception as e:  # the hub client raises many kinds: unknown name, no network, no rights
        reason = str(e).strip().partition("\n")[0]
        raise ValueError(
            f"{path} is not a folder here and could not be had from the hub ({type(e).__name__}: {reason}); "
            "check the name and the network, or give the path of a downloaded checkpoint folder"
        ) from e


def load(path: str, *, dtype=torch.float32, device="cpu", base="dense") -> Transformer:
    """A model from a Hugging Face folder or hub id: config.json and one or many safetensors shards.

    Weights are converted to dtype, whatever the file's; a checkpoint in NF4 as bitsandbytes writes it is
    expanded. base "nf4": the projections are held in 4 bits, quantised as they are read or as they stand in
    the file, and the model is frozen (nf4.py). Returns the model in evaluation mode, as transformers does: an
    adapter that is loaded on top drops nothing until training asks for it.

    Raises ValueError for a missing folder, an option that is not implemented, and every missing, extra or
    misshapen tensor, by name.
    """
    path = find_checkpoint(path)
    # On "meta" a model has shapes and no numbers, so a big one is never in memory twice.
    with torch.device("meta"):
        # Made before the weights are looked for: an option not implemented is the first thing to know.
        model = Transformer(read_json(path, "config.json"))
    shards = find_shards(path)
    make_room(model, dtype, device, base)
    fill(model, path, shards)
    return model.eval()


def find_shards(path: str) -> list[str]:
    """Names of the safetensors files with a checkpoint's weights. ValueError names those that are absent."""
    shards = ["model.safetensors"]
    index = "model.safetensors.index.json"
    # One whole file comes first, as in transformers: an index beside it may be left from an earlier save.
    whole = os.path.exists(os.path.join(path, shards[0]))
    if not whole and os.path.exists(os.path.join(path, index)):
        shards = sorted(set(read_json(path, index)["weight_map"].values()))
    # Asked before anything is allocated: a download that broke off is the most common damage, and
    # minutes of loading would hide it.
    absent = [shard for shard in shards if not os.path.exists(os.path.join(path, shard))]
    if absent:
        raise ValueError(
            f"{path} lacks {', '.join(absent)}: the download is incomplete, "
            "or the weights are not safetensors"
        )
    return shards


def fill(model: Transformer, path: str, shards: list[str]):
    """Copies the tensors of the shards into the model's parameters. ValueError names what does not fit.

    A tensor too many is as wrong as one too few: a bias, a norm or an expert that is left out changes every
    logit.
    """
    names = border_names(model)
    seen, unknown, second_head = set(), [], None
    for name, tensor in nf4.join(read_shards(path, shards)):
        if name in names:
            try:
                put(model, *names[name], name, tensor)
            except ValueError as e:
                raise ValueError(f"{path}: tensor {name} has {e}") from None
            seen.add(name)
        elif name == "lm_head.weight":  # and the config ties it, or it would be in names
            second_head = tensor
        elif not name.endswith(HARMLESS):
            unknown.append(name)
    # Told together, with the first few names of each: one slip (a prefix, a tied head) often explains all.
    missing = sorted(names.keys() - seen)
    if missing or unknown:
        told = [count_and_name("missing", missing), count_and_name("unknown", unknown)]
        raise ValueError(
            f"{path}: the tensors are not those of its config.json; {'; '.join(filter(None, told))}"
        )
    # Files made from torch's .bin hold a tied head a second time. One that differs was trained apart from
    # the embedding, and a model without it would be another model.
    if second_head is not None and not torch.equal(second_head.to(model.embed), model.embed):
        raise ValueError(
            f"{path}: config.json ties the head to the embedding, and lm_head.weight is not equal to it: "
            "set tie_word_embeddings to false there"
        )


@torch.no_grad()
def put(model: Transformer, ours: str, rows: slice, name: str, tensor):
    """Copies a file's tensor, which may be in 4 bits, to our parameter's rows: in its dtype, on its device.

    ValueError where it has another shape than these rows.
    """
    module = model.get_submodule(ours.rpartition(".")[0])
    if isinstance(module, nf4.NF4Linear) and ours.endswith(".weight"):
        part = name.split(".")[-2]
        if not isinstance(tensor, nf4.NF4Weight):
            # As transformers does it with bitsandbytes: first rounded to the model's dtype, then quantised.
            tensor = nf4.quantise(tensor.to(module.like))
        module.put(part, tensor)
        return
    # A view of our rows, so that the copy below lands in the parameter itself.
    target = model.get_parameter(ours).data[rows]
    if target.shape != tensor.shape:
        raise ValueError(f"shape {tuple(tensor.shape)}, config.json asks for {tuple(target.shape)}")
    if isinstance(tensor, nf4.NF4Weight):
        tensor = tensor.expand_into(torch.empty(tensor.shape, dtype=target.dtype))
    # To the model's device and dtype, whatever the file's.
    target.copy_(tensor)


def count_and_name(what: str, names: list[str]) -> str:
    """'missing 7: a, b, c, d ..', or nothing where there are none."""
    if not names:
        return ""
    more = " .." if len(names) > 4 else ""
    return f"{what} {len(names)}: {', '.join(names[:4])}{more}"


def read_json(folder: str, name: str) -> dict:
    """A JSON file of a checkpoint. ValueError where it is not whole."""
    path = os.path.join(folder, name)
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f)
        except ValueError as e:
            raise ValueError(f"{path} is not JSON ({e}): was its download cut short?") from None


def read_shards(path: str, shards: list[str]):
    """Names and tensors of all shards, one tensor in memory at a time."""
    for shard in shards:
        yield from read_tensors(os.path.join(path, shard))


def read_tensors(path: str):
    """Names and tensors of a safetensors file, one in memory at a time. ValueError where it is not whole."""
    try:
        with safe_open(path, framework="pt") as f:
            names = list(f.keys())
        for name in names:
            # The file is mapped, and a page that was read counts as ours until its mapping goes. With one for
            # all tensors the whole file was in memory at the end, beside the model.
            with safe_open(path, framework="pt") as f:
                tensor = f.get_tensor(name)
            yield name, tensor
            del tensor
    except SafetensorError as e:
        raise ValueError(
            f"{path} is not a whole safetensors file ({e}): was its download cut short?"
        ) from None


# -------------------------------------------------------------------------------- Hugging Face's folders, out
@torch.no_grad()
def save(model: Transformer, folder: str, state: dict | None = None):
    """Writes config.json and model.safetensors, a folder that transformers and vLLM load as it stands.

    state: our parameter names -> tensors to write instead of the model's own (lora.merged_state gives
    the merged weights). Raises ValueError for a model that carries adapters and no state: the base
    alone is not what was trained.
    """
    if state is None:
        state = dict(model.named_parameters())
    names = border_names(model)
    absent = sorted({ours for ours, _ in names.values()} - state.keys())
    if absent:
        raise ValueError(
            f"there is no {absent[0]} to save: a model with adapters is saved merged "
            "(state=lora.merged_state(model)) or as an adapter (lora.save_adapter)"
        )
    os.makedirs(folder, exist_ok=True)
    tensors = {}
    for name, (ours, rows) in names.items():
        tensor = state[ours][rows].detach().contiguous().cpu()
        # safetensors refuses tensors that share storage, and a range of rows shares its parameter's.
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        tensors[name] = tensor
    # Some readers refuse a file whose metadata does not say that its tensors are torch's.
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    # The key was torch_dtype before transformers 4.56. Both must say the same, or readers would disagree.
    dtype = str(model.dtype).removeprefix("torch.")
    config = model.config | {"dtype": dtype}
    config.pop("quantization_config", None)  # a checkpoint read in 4 bits is written in full
    if "torch_dtype" in config:
        config["torch_dtype"] = dtype
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
