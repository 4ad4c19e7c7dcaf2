"""How much memory a run will hold, phase by phase, and how much it held.

    memory.plan(cfg, shape, device="cuda", tokens=12_544, prompt_tokens=128)    # {phase: {what: bytes}}
    peaks = memory.Peaks("cuda:0")
    with peaks("sample"): ..                    # bytes: peaks.of["sample"]; over all so far: peaks.highest

The plan counts what the code makes: weights, their merged or packed copy, the optimiser's state, the cache,
what a forward keeps of each token, and the chunks of logits. It is within 10 % of what one H100 and one
H200 held (tests/test_memory.py has the figures). On a CPU it is told what the process held before, and is
within 8 % in fp32; bf16 there and "light" held up to 36 % more, in holes that the C library leaves between
tensors. With MALLOC_MMAP_THRESHOLD_=262144 in the environment it leaves none, and steps take a tenth longer.

Dims: V vocabulary, D width, L layers, H query heads, K key/value heads, E head width, r LoRA's rank.
"""

import contextlib
import resource
import sys

import torch

from cache import PACK_STEPS, PREFILL_TOKENS, PREFILL_TOKENS_TRITON
from cache import cache_bytes, group_places, logits_bytes
from kernels.logprob import CHUNK_BYTES, GPU_CHUNKS

TOKENIZER = 120_000_000  # bytes of transformers' tokenizers, once they are imported
NF4_BYTES = 0.5 + 1 / 64 + 4 / 16_384  # a weight: 4 bits, a byte a block of 64, fp32 a block of 256 of those
OFFLOADED_PIECE = 12 << 24  # bytes on a GPU of an optimiser whose state is in the host's memory (optim.PIECE)
CPU_TOKENS = 8192  # of a micro-batch that is chosen: a CPU gains nothing from more


# ------------------------------------------------------------------------------------------ how many numbers
def projections(shape) -> dict[str, int]:
    """Weights of each projection of a layer."""
    D, heads, keys, wide = shape.D, shape.H * shape.E, shape.K * shape.E, shape.intermediate
    return dict(
        q_proj=D * heads, k_proj=D * keys, v_proj=D * keys, o_proj=heads * D,
        gate_proj=D * wide, up_proj=D * wide, down_proj=wide * D,
    )  # fmt: skip


def embeddings(shape) -> int:
    """Weights of the embedding, and of the head where it has its own."""
    return (1 if shape.tied else 2) * shape.V * shape.D


def parameters(shape) -> int:
    """Weights of the decoder, norms and biases aside."""
    return embeddings(shape) + shape.L * sum(projections(shape).values())


def adapter_parameters(shape, rank: int, targets) -> int:
    """Weights of an adapter: rank times (input + output width) of each target."""
    widths, D, wide = projections(shape), shape.D, shape.intermediate
    total = 0
    for name in targets:
        into = {"o_proj": shape.H * shape.E, "down_proj": wide}.get(name, D)
        total += rank * (into + widths[name] // into)
    return shape.L * total


def kept_per_token(shape, checkpointing: str) -> int:
    """Numbers that a forward keeps of each token for the backward, without the head's chunks.

    A layer keeps its two inputs, their norms and the two sums, rotated q and k, v, the attention's output,
    and gate, up and their product. Light, two sums, rotated q and k, v, the output, gate and up. With
    "layers", its input alone; with "offload" that lies in the host's memory. One layer at a time has
    everything.
    """
    rotated, attended = (shape.H + shape.K) * shape.E, shape.H * shape.E
    everything = 6 * shape.D + rotated + shape.K * shape.E + attended + 3 * shape.intermediate
    light = 2 * shape.D + rotated + shape.K * shape.E + attended + 2 * shape.intermediate
    if checkpointing == "light":
        return shape.L * light + everything
    if checkpointing == "layers":
        return shape.L * shape.D + everything
    if checkpointing == "offload":
        return everything
    return shape.L * everything


def micro_tokens_for(free: float, cfg, shape, device: str, teacher=None) -> int:
    """Tokens of a micro-batch for so many free bytes, beside weights, optimiser and cache: 1,024 to 65,536.

    What the head and the gradients take is taken off, and 15 % are left for what is not counted. teacher: the
    shape of the key `reference`; one of its layers may hold more than training does.
    """
    width = number_width(cfg, device)
    one = kept_per_token(shape, checkpointing_of(cfg, device)) * width
    if teacher:
        one = max(one, kept_per_token(teacher, "offload") * width)
    beside = head_bytes(shape, device, 65_536, width) - 2 * 65_536 * shape.D * width
    beside += exact_kl_bytes(cfg, shape, device, 65_536)
    beside += head_gradient(cfg, shape, device) + 4 * trained_numbers(cfg, shape)
    tokens = int((0.85 * free - beside) / (one + 2 * shape.D * width))
    return max(1024, min(65_536, tokens // 1024 * 1024))


# --------------------------------------------------------------------------------------------- the plan
def plan(cfg, shape, *, device: str, tokens: int, prompt_tokens: int, one_batch=False, merged=None,
         before=0, world=1, teacher=None) -> dict:  # fmt: skip
    """What lies in memory in each phase: {"load": {"weights": bytes, ..}, "sample": .., "train": .., ..}.

    device: "cpu" or "cuda". tokens: of the largest micro-batch. one_batch: it is the update's only one.
    prompt_tokens: of a prompt. merged: whether adapters are merged (None: as on a GPU with room). before:
    bytes that the process holds before the model is loaded; on a GPU 0. world: processes that share the
    prompts. teacher: the shape of the key `reference`, where that is given.
    """
    shared_by = world if cfg.shard else 1
    held = held_always(cfg, shape, device, merged, shared_by, teacher)
    if before:
        held = {"Python and its packages": before} | held
    width = number_width(cfg, device)
    prompts = cfg.prompts_per_step // world
    rows = prompts * cfg.group_size
    seats = min(cfg.slots or 256, rows)
    slots = min(2 * seats, rows) if cfg.env else seats  # rows that wait for an environment keep their keys
    first = device == "cuda"  # all prompts are prefilled before the first token
    groups = prompts if first else group_places(slots, cfg.group_size, prompts)
    sizes = dict(groups=groups, slots=slots, prompt_tokens=prompt_tokens, new_tokens=own_tokens(cfg))
    cache = cache_bytes(shape, width, **sizes)
    one_layer = kept_per_token(shape, "offload")
    at_once = PREFILL_TOKENS_TRITON if first else PREFILL_TOKENS
    prefill = min(prompts * prompt_tokens, at_once) * one_layer * width
    sampling = {"keys and values": cache, "logits": logits_bytes(shape, slots), "prefill": prefill}
    if device == "cpu" and cfg.max_new_tokens >= PACK_STEPS:
        sampling["packed matrices"] = packed_bytes(cfg, shape, width)
    if shared_by > 1:
        sampling["gathered weights"] = parameters(shape) * width
    # On a GPU the sampler keeps its cache between the steps.
    kept = {"keys and values": cache} if first else {}
    head = head_bytes(shape, device, tokens, width)
    phases = {"load": held, "sample": held | sampling}
    if cfg.beta:
        its_layer = kept_per_token(teacher or shape, "offload")
        phases["reference"] = held | kept | {"one layer": tokens * its_layer * width, "head": head}
    gradients = {"gradients": 4 * trained_numbers(cfg, shape) // (1 if cfg.lora_rank else shared_by)}
    forward = {"activations": tokens * kept_per_token(shape, checkpointing_of(cfg, device)) * width}
    forward |= {"head": head + head_gradient(cfg, shape, device)}
    forward["head"] += exact_kl_bytes(cfg, shape, device, tokens)
    # At the end of a forward everything is kept and, in the first micro-batch, no gradient is there; at the
    # end of its backward it is the other way round.
    backward = gradients | {"one layer": tokens * one_layer * width}
    if not one_batch:
        forward |= gradients
    phases["train"] = held | kept | max(forward, backward, key=total)
    phases["save"] = held | kept
    return phases


def held_always(cfg, shape, device: str, merged=None, shared_by=1, teacher=None) -> dict[str, int]:
    """What a process holds from a run's start to its end. shared_by: processes over which it is sharded.

    teacher: the shape of the key `reference`, where that is given.
    """
    width, trained = number_width(cfg, device), trained_numbers(cfg, shape)
    held = {"weights": frozen_bytes(cfg, shape, width)}
    if cfg.base == "nf4":
        held["scratch of one layer"] = largest_projection(shape) * width
    moments = 8 if cfg.optimizer_bits == 32 else 2 * (1 + 4 / 256)
    if cfg.lora_rank:
        held["adapter"] = 4 * trained
        held["optimiser"] = int(moments * trained)
        if merged is None:
            merged = may_merge(cfg) and (cfg.lora_merge == "on" or device == "cuda")
        if merged:
            targets = [projections(shape)[name] for name in cfg.lora_targets]
            held["merged weights"] = shape.L * sum(targets) * width
    else:
        held["optimiser"] = int((moments + (4 if width < 4 else 0)) * trained)
    if cfg.beta and (teacher or not cfg.lora_rank):  # an adapter's start is the model without it
        held["reference"] = frozen_bytes(cfg, teacher or shape, width)
        if cfg.base == "nf4":
            held["reference"] += largest_projection(teacher) * width
    if cfg.offload_optimizer and device == "cuda":  # a piece of it is on the card
        held["optimiser"] = min(held["optimiser"], OFFLOADED_PIECE)
    if shared_by > 1:  # adapters every process has whole
        if not cfg.lora_rank:  # the sharded weights are fp32, and their own masters
            held |= {"weights": 4 * trained, "optimiser": int(moments * trained)}
        spread = ("weights", "reference") if cfg.lora_rank else ("weights", "reference", "optimiser")
        for name in spread:
            if name in held:
                held[name] //= shared_by
    return held


def frozen_bytes(cfg, shape, width: int) -> int:
    """A model's weights as they are read."""
    layers = shape.L * sum(projections(shape).values())
    return int(embeddings(shape) * width + layers * (NF4_BYTES if cfg.base == "nf4" else width))


def optimiser_on_host(cfg, shape) -> int:
    """Bytes of masters and moments that wait in the host's memory while a GPU trains."""
    if not cfg.offload_optimizer:
        return 0
    return (8 if cfg.lora_rank else 12) * trained_numbers(cfg, shape)


def may_merge(cfg) -> bool:
    """Whether adapters can be merged into a copy of their weights; on a GPU that is a matter of room, too."""
    if not cfg.lora_rank or cfg.lora_merge == "off" or cfg.lora_dropout:
        return False
    return cfg.base != "nf4" and not cfg.shard  # the copy would be four times what is held, or whole


def trained_numbers(cfg, shape) -> int:
    if cfg.lora_rank:
        return adapter_parameters(shape, cfg.lora_rank, cfg.lora_targets)
    return parameters(shape)


def number_width(cfg, device: str) -> int:
    """Bytes of a weight and of an activation."""
    if cfg.dtype == "auto":
        return 2 if device == "cuda" else 4
    return 4 if cfg.dtype == "float32" else 2


def checkpointing_of(cfg, device: str) -> str:
    if cfg.checkpointing == "auto":
        return "light" if device == "cuda" else "none"
    return cfg.checkpointing


def largest_projection(shape) -> int:
    """Weights of the widest matmul of a layer: gate and up are one, and so are q, k and v."""
    sizes = projections(shape)
    attention = sizes["q_proj"] + sizes["k_proj"] + sizes["v_proj"]
    return max(attention, sizes["o_proj"], sizes["gate_proj"] + sizes["up_proj"])


def packed_bytes(cfg, shape, width: int) -> int:
    """A CPU's second copy of the matrices while it samples, in the order that its matmul reads."""
    layers = 0 if cfg.base == "nf4" else shape.L * sum(projections(shape).values()) * width
    return layers + 4 * shape.V * shape.D  # the head's logits are fp32 in any case


def head_bytes(shape, device: str, tokens: int, width: int) -> int:
    """Logits of a chunk in fp32, their gradient in the model's dtype, and the states that go in and out."""
    room = CHUNK_BYTES * (GPU_CHUNKS if device == "cuda" else 1)
    logits = min(room, 4 * shape.V * tokens)
    gradient = logits * width // 4 if width < 4 else 0
    wide = 4 * shape.V * shape.D if device == "cpu" and width < 4 else 0  # a CPU multiplies in fp32
    return logits + gradient + 2 * tokens * shape.D * width + wide


def exact_kl_bytes(cfg, shape, device: str, tokens: int) -> int:
    """What the exact KL takes beside the head: it has four chunks of fp32 at a time and not one."""
    if cfg.kl != "full" or not cfg.beta:
        return 0
    room = CHUNK_BYTES * (GPU_CHUNKS if device == "cuda" else 1)
    return 3 * min(room, 4 * shape.V * tokens)


def head_gradient(cfg, shape, device: str) -> int:
    """The head's own gradient gathers in fp32 beside the others.

    Where the embedding is the same tensor it gets a second one, and a third is their sum. That is at the end
    of the backward, when a GPU has the memory of activations back; a CPU's C library keeps that of small
    tensors.
    """
    if cfg.lora_rank:
        return 0
    copies = 3 if shape.tied and device == "cpu" else 1
    return copies * 4 * shape.V * shape.D


def step_tokens(cfg, prompt_tokens: int, world=1) -> int:
    """Tokens of an update at most: every completion as long as it may be."""
    prompts = cfg.prompts_per_step // cfg.minibatches // world
    return prompts * (prompt_tokens + cfg.group_size * own_tokens(cfg))


def own_tokens(cfg) -> int:
    """Tokens of a completion at most, with what an environment gives it between its turns."""
    if not cfg.env:
        return cfg.max_new_tokens
    return cfg.max_context or 2 * cfg.max_new_tokens


def held_by_python() -> int:
    """Bytes of this process before it has loaded a model, with the tokenizer's package, imported or not."""
    return most(torch.device("cpu")) + (0 if "transformers" in sys.modules else TOKENIZER)


def total(parts: dict[str, int]) -> int:
    return int(sum(parts.values()))


def peak(phases: dict) -> int:
    """The most that any phase holds."""
    return max(total(parts) for parts in phases.values())


# ------------------------------------------------------------------------------------------ what was held
class Peaks:
    """The highest number of bytes of each phase, of all times that it ran, and of everything."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.of: dict[str, int] = {}
        self.highest = 0

    @contextlib.contextmanager
    def __call__(self, phase: str):
        self.note()  # what was held before is not this phase's
        restart(self.device)
        try:
            yield
        finally:
            self.of[phase] = max(self.of.get(phase, 0), self.note())

    def note(self) -> int:
        """Bytes held at most since the last phase began."""
        now = most(self.device)
        self.highest = max(self.highest, now)
        return now


def most(device) -> int:
    """Bytes held at most since `restart`: of torch on a GPU, of this process else."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in kilobytes elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def restart(device) -> None:
    """The high-water mark is what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
