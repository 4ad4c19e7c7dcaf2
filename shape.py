"""What a Hugging Face config.json may say about a decoder: sizes, options, and its rotary embedding.

    shape = Shape(json.load(open("models/smollm2-135m/config.json")))
    shape.L, shape.H, shape.K, shape.E                      # 30, 9, 3, 64

A checkpoint loads without an error under many configs that give other logits than its author's: a sliding
window, another activation, a stretched rope. So whatever is stated and not implemented here is refused by
name, before any weight is read.

Dims: V vocabulary, D width, L layers, H query heads, K key/value heads, E head width, T tokens. Sources:
Llama 2 arXiv:2307.09288, Qwen3 arXiv:2505.09388, rotary embedding arXiv:2104.09864, yarn arXiv:2309.00071.
"""

import math

import torch

# Names of the projections, as Hugging Face spells them; lora.py's targets are these.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

# Sizes have no default: a file without them is not a checkpoint's config.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# A key that config.json leaves out means what it means to transformers' class of that family. A null stays a
# null: for key heads it means "as many as query heads".
DEFAULTS = dict(
    num_key_value_heads=None,
    head_dim=None,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    sliding_window=None,
    hidden_act="silu",
)
FAMILIES = {
    "llama": dict(max_position_embeddings=2048),
    "mistral": dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
    "qwen2": dict(max_position_embeddings=32768, num_key_value_heads=32, sliding_window=4096),
    "qwen3": dict(max_position_embeddings=32768, num_key_value_heads=32, head_dim=128, sliding_window=4096),
}

# Options that change the result and are not implemented; refuse_unsupported has three
# more that need a closer look.
UNSUPPORTED = (
    "quantization_config",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_local_experts",
    "num_experts",
    "attention_dropout",
)

# Each way of stretching the context and what it must state: a factor left out would silently be a factor of
# 1.
ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


class Shape:
    """Sizes and options of a decoder, read from the dict of a config.json and checked.

    Raises ValueError for an unknown architecture, a size that is missing, or an option that would change the
    result and is not implemented.
    """

    def __init__(self, config: dict):
        # model_type alone decides. `architectures` says what a file was saved as, and derived models often
        # carry another model's name there.
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type {family!r} is not implemented; known: {', '.join(FAMILIES)}")
        absent = [key for key in SIZES if not config.get(key)]
        if absent:
            raise ValueError(
                f"config.json lacks {', '.join(absent)}: it is not the config of a {family} checkpoint"
            )
        config = DEFAULTS | FAMILIES[family] | config
        refuse_unsupported(config)

        self.family = family
        self.V = config["vocab_size"]
        self.D = config["hidden_size"]
        self.intermediate = config["intermediate_size"]
        self.L = config["num_hidden_layers"]
        self.H = config["num_attention_heads"]
        self.K = config["num_key_value_heads"] or self.H
        # The head width is not always D / H: Qwen3-0.6B has 16 heads of 128 over a width of 1,024.
        self.E = config["head_dim"] or self.D // self.H
        if self.H % self.K or self.E % 2:
            raise ValueError(
                f"{self.H} query heads over {self.K} key heads of width {self.E}: "
                "the first must be a multiple of the second, the third even"
            )
        self.eps = config["rms_norm_eps"]
        self.context = config["max_position_embeddings"]
        self.tied = config["tie_word_embeddings"]
        self.qk_norm = family == "qwen3"
        self.bias = biased_projections(config)
        self.rope = rope_parameters(config)


def biased_projections(config: dict) -> frozenset[str]:
    """Names of the projections that have a bias; loading refuses a bias tensor too many as well as one too
    few."""
    family = config["model_type"]
    biased = set()
    if family == "qwen2":  # has its three biases whatever the file says
        biased.update(("q_proj", "k_proj", "v_proj"))
    if family in ("llama", "qwen3") and config.get("attention_bias"):  # o_proj then has one too
        biased.update(ATTENTION)
    if family == "llama" and config.get("mlp_bias"):
        biased.update(MLP)
    return frozenset(biased)


def refuse_unsupported(config: dict):
    """Raises ValueError naming the first option of config.json that is in use and not implemented."""
    # Each of these loads without an error and changes the logits. A name we have never heard of
    # cannot be caught here, but architectures that need one have tensors or a model_type of
    # their own, and those are caught.
    checks = {"sliding_window": effective_window(config)}
    checks["layer_types"] = sorted(set(config.get("layer_types") or []) - {"full_attention"})
    if config["hidden_act"] not in ("silu", "swish"):
        checks["hidden_act"] = config["hidden_act"]
    for name in UNSUPPORTED:
        checks[name] = config.get(name)
    if is_nf4(checks["quantization_config"] or {}):
        checks["quantization_config"] = None  # which nf4.py reads
    for name, value in checks.items():
        if value:
            raise ValueError(
                f"config.json has {name} = {value!r}, which is not implemented: "
                "the model would give wrong results"
            )


def is_nf4(quantization: dict) -> bool:
    """Whether a quantization_config says that the tensors are bitsandbytes' NF4."""
    kind = quantization.get("quant_method"), quantization.get("bnb_4bit_quant_type")
    return kind == ("bitsandbytes", "nf4") and bool(quantization.get("load_in_4bit"))


def effective_window(config: dict) -> int | None:
    """The sliding window in tokens, or None where every token sees the whole context."""
    window = config["sliding_window"]
    # Qwen states a width and switches it off by another key.
    if config["model_type"].startswith("qwen") and not config.get("use_sliding_window"):
        return None
    # A window no shorter than the context hides nothing.
    if window and window >= config["max_position_embeddings"]:
        return None
    return window


# --------------------------------------------------------------------------------------- the rotary embedding
def rope_parameters(config: dict) -> dict:
    """{rope_type, rope_theta, original, ...} of a config.json; `original` is the context before stretching.

    The same numbers have had three spellings: "type" and later "rope_type" in `rope_scaling` with
    `rope_theta` beside it, then all of it in `rope_parameters`. Where a file has both transformers
    reads the old one, and so do we.
    """
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_type"] = kind
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    # A dict inside is one rope for each kind of layer.
    nested = any(isinstance(value, dict) for value in rope.values())
    if kind not in ROPE or partial != 1.0 or nested:
        raise ValueError(
            f"rope {rope} with partial_rotary_factor {partial} is not implemented; "
            f"known rope types: {', '.join(ROPE)}, over the whole head"
        )
    absent = [key for key in ROPE[kind] if rope.get(key) is None]
    if absent:
        raise ValueError(f"config.json asks for rope of type {kind} and lacks its {', '.join(absent)}")
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["original"] = (
        config.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )
    return rope


def rope_frequencies(E: int, rope: dict) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair of dimensions (E/2,) fp32, and the factor on cos and sin.

    rope: what rope_parameters returned.
    """
    # In fp32 and in this order, as transformers does it: at position 30,000 the last bit of a
    # frequency moves the angle by 0.002.
    exponents = torch.arange(0, E, 2, dtype=torch.float32) / E  # (E/2,)
    inv_freq = 1.0 / rope["rope_theta"] ** exponents
    if rope["rope_type"] == "linear":
        return inv_freq / rope["factor"], 1.0
    if rope["rope_type"] == "llama3":
        return llama3_frequencies(inv_freq, rope), 1.0
    if rope["rope_type"] == "yarn":
        return yarn_frequencies(inv_freq, E, rope), yarn_scale(rope)
    return inv_freq, 1.0


def llama3_frequencies(inv_freq: torch.Tensor, rope: dict) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended (Meta's Llama 3.1)."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original"] * inv_freq / (2 * math.pi)  # how often a wave turns over the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inv_freq / rope["factor"] + kept * inv_freq


def yarn_frequencies(inv_freq: torch.Tensor, E: int, rope: dict) -> torch.Tensor:
    """The same idea with a straight ramp over dimensions (arXiv:2309.00071, section 3).

    It goes from those that turn beta_fast times over the original context to those that turn beta_slow times.
    """
    low = yarn_dimension(rope.get("beta_fast") or 32, E, rope)
    high = yarn_dimension(rope.get("beta_slow") or 1, E, rope)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, E - 1)
    width = high - low or 0.001  # a ramp of no width would divide by zero
    dimension = torch.arange(E // 2, dtype=torch.float32)
    slowed = ((dimension - low) / width).clamp(0, 1)
    return slowed * inv_freq / rope["factor"] + (1 - slowed) * inv_freq


def yarn_dimension(turns: float, E: int, rope: dict) -> float:
    """The dimension, not yet rounded, whose wave turns so many times over the original context."""
    return E * math.log(rope["original"] / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))


def yarn_scale(rope: dict) -> float:
    """What yarn multiplies queries and keys by: attention over a longer context stays as sharp (section
    3.4)."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def sharpness(mscale):
        return 0.1 * mscale * math.log(max(rope["factor"], 1)) + 1

    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all_dim:  # DeepSeek's pair counts only where both are stated
        return sharpness(mscale) / sharpness(mscale_all_dim)
    return sharpness(1)
