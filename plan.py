"""What fits: the memory of a run, phase by phase, before it is started, and a config for a card.

    python plan.py configs/gsm8k.py                     # for the GPU at hand, else for this machine's memory
    python plan.py configs/gsm8k.py --gpu_gb=24         # for a card of 24 GB
    python plan.py configs/gsm8k.py --reference=Qwen/Qwen2.5-7B-Instruct --beta=1     # and a teacher
    python plan.py --table                              # model x card: the setting that fits

    plan.configure(task="gsm8k", gpu_gb=24)             # keys of a config, and why

No weight is loaded and nothing is drawn: sizes come from config.json, or from SIZES for well-known models.
memory.py has the arithmetic. Times are of one H100, by the shares of its limits that were measured there
(docs/performance.md), and marked so.
"""

import re
import sys

import torch

import checks
import config as configs
import memory
from shape import Shape

# vocab, D, layers, query heads, key heads, head width, intermediate, tied: from the models' config.json.
SIZES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (49152, 576, 30, 9, 3, 64, 1536, True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (49152, 960, 32, 15, 5, 64, 2560, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (49152, 2048, 24, 32, 32, 64, 8192, True),
    "Qwen/Qwen2.5-0.5B-Instruct": (151936, 896, 24, 14, 2, 64, 4864, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (151936, 1536, 28, 12, 2, 128, 8960, True),
    "Qwen/Qwen2.5-3B-Instruct": (151936, 2048, 36, 16, 2, 128, 11008, True),
    "Qwen/Qwen2.5-7B-Instruct": (152064, 3584, 28, 28, 4, 128, 18944, False),
    "Qwen/Qwen2.5-14B-Instruct": (152064, 5120, 48, 40, 8, 128, 13824, False),
    "Qwen/Qwen3-0.6B": (151936, 1024, 28, 16, 8, 128, 3072, True),
    "Qwen/Qwen3-1.7B": (151936, 2048, 28, 16, 8, 128, 6144, True),
    "Qwen/Qwen3-4B": (151936, 2560, 36, 32, 8, 128, 9728, True),
    "Qwen/Qwen3-8B": (151936, 4096, 36, 32, 8, 128, 12288, False),
    "meta-llama/Llama-3.2-1B-Instruct": (128256, 2048, 16, 32, 8, 64, 8192, True),
    "meta-llama/Llama-3.2-3B-Instruct": (128256, 3072, 28, 24, 8, 128, 8192, True),
    "meta-llama/Llama-3.1-8B-Instruct": (128256, 4096, 32, 32, 8, 128, 14336, False),
}
CARDS = (16, 24, 48, 80)  # GB
USABLE = 0.93  # of a card's GB: the driver, CUDA's own context and what torch cannot use for fragments
LEAST_TOKENS = 4096  # of a micro-batch: below that a GPU waits for its host
# The lengths of tasks: tokens of a prompt and of the longest completion.
LENGTHS = {
    "arithmetic": (40, 128),
    "countdown": (120, 512),
    "guess": (3, 60),
    "gsm8k": (150, 512),
    "math": (150, 1024),
    "code": (250, 512),
    "jsonl": (250, 512),
}
# One H100, bf16: bytes/s, operations/s, and what share of them sampling and updates were measured to reach.
H100 = dict(bandwidth=3.0e12, operations=800e12, sample_share=0.48, update_share=0.42)


def shape_of_name(model: str) -> Shape:
    """Sizes of a well-known model, or of its sister of other data. ValueError names those that there are."""
    for name, sizes in SIZES.items():
        if size_of(model) == size_of(name):
            V, D, L, H, K, E, wide, tied = sizes
            return Shape(dict(
                model_type="llama", vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=H,
                num_key_value_heads=K, head_dim=E, intermediate_size=wide, tie_word_embeddings=tied,
                max_position_embeddings=32768,
            ))  # fmt: skip
    known = ", ".join(SIZES)
    raise ValueError(f"the sizes of {model} are not known without its config.json: give a folder, or {known}")


def size_of(model: str) -> str:
    """A model's name without who made it and what it learnt: Qwen2.5-Coder-0.5B-Instruct has 0.5B's sizes."""
    return re.sub(r"-(coder|math|instruct|base|chat)", "", model.split("/")[-1].lower())


# ----------------------------------------------------------------------------------------- a card's plan
def teacher_of(cfg) -> Shape | None:
    """The sizes of the model that the key `reference` names; None where it names none."""
    if not cfg.reference:
        return None
    return checks.teacher_shape_of(cfg) or shape_of_name(cfg.reference)


def on_a_card(cfg, shape, gpu_gb: float, prompt_tokens: int) -> tuple[dict, int]:
    """(phases, tokens of a micro-batch) on a GPU of so many GB. micro_tokens=0 is chosen as train.py does."""
    tokens = cfg.micro_tokens or automatic_tokens(cfg, shape, gpu_gb, prompt_tokens)
    whole = memory.step_tokens(cfg, prompt_tokens)
    options = dict(prompt_tokens=prompt_tokens, one_batch=whole <= tokens, merged=merges(cfg, shape, gpu_gb))
    options["teacher"] = teacher_of(cfg)
    return memory.plan(cfg, shape, device="cuda", tokens=min(tokens, whole), **options), min(tokens, whole)


def merges(cfg, shape, gpu_gb: float) -> bool:
    """Whether adapters are merged: run.merges_adapters, before there is a model."""
    if not memory.may_merge(cfg):
        return False
    with_copy = memory.held_always(cfg, shape, "cuda", merged=True, teacher=teacher_of(cfg))
    free = USABLE * gpu_gb * 1e9 - memory.total(with_copy) + with_copy["merged weights"]
    return cfg.lora_merge == "on" or 4 * with_copy["merged weights"] < free


def automatic_tokens(cfg, shape, gpu_gb: float, prompt_tokens: int) -> int:
    """What train.choose_micro_tokens will find, from what weights, optimiser and cache leave."""
    phases = memory.plan(
        cfg, shape, device="cuda", tokens=0, prompt_tokens=prompt_tokens, merged=merges(cfg, shape, gpu_gb),
        teacher=teacher_of(cfg),
    )  # fmt: skip
    free = USABLE * gpu_gb * 1e9 - memory.total(phases["save"])
    return memory.micro_tokens_for(free, cfg, shape, "cuda", teacher_of(cfg))


def what_to_change(cfg) -> str:
    """The cheapest thing to change where a config does not fit, in the order of what it costs."""
    if cfg.checkpointing not in ("layers", "offload"):
        return "--checkpointing=layers keeps a layer's input alone, for a third more time in the update"
    if cfg.checkpointing == "layers":
        return "--checkpointing=offload keeps those inputs in the host's memory"
    if cfg.micro_tokens == 0 or cfg.micro_tokens > LEAST_TOKENS:
        return f"--micro_tokens={LEAST_TOKENS} takes fewer tokens at once"
    if not cfg.lora_rank and not cfg.offload_optimizer and cfg.optimizer_bits == 32:
        return "--offload_optimizer=True keeps masters and moments in the host's memory"
    if not cfg.lora_rank:
        return "--lora_rank=32 trains an adapter: no gradients, masters and moments of all weights"
    if cfg.base != "nf4":
        return "--base=nf4 holds the frozen weights in 4 bits"
    if (cfg.slots or 256) > 32:
        return "--slots=32 decodes fewer rows at once"
    return "a smaller model, or shorter completions"


def times(cfg, shape, prompt_tokens: int) -> dict[str, float]:
    """Seconds of a step on one H100 to expect, if completions are half as long as they may be."""
    weights, rows = memory.parameters(shape), cfg.prompts_per_step * cfg.group_size
    slots, drawn = min(cfg.slots or 256, rows), rows * cfg.max_new_tokens / 2
    width = memory.NF4_BYTES if cfg.base == "nf4" else 2
    keys = 4 * shape.L * shape.K * shape.E * slots * (prompt_tokens + cfg.max_new_tokens / 4)
    step = (weights * width + keys) / H100["bandwidth"] / H100["sample_share"]
    tokens = drawn + cfg.prompts_per_step * prompt_tokens
    passes = 4 if cfg.lora_rank else 6  # forward, and the gradients of states, and of weights
    if cfg.checkpointing in ("layers", "offload"):
        passes += 2
    judging = memory.parameters(teacher_of(cfg) or shape) if cfg.beta else 0  # a forward of the reference
    update = (passes * weights + 2 * judging) * cfg.epochs * tokens / H100["operations"]
    return dict(sample=drawn / slots * step, update=update / H100["update_share"])


# ------------------------------------------------------------------------------------- a config for a card
def configure(task: str = "gsm8k", gpu_gb: float = 24, model: str = "") -> dict:
    """Keys of a config that fits a card, with `reasons`: the largest model, trained as fully as fits.

    model: a name of SIZES, to keep that one. ValueError where nothing fits.
    """
    if task not in LENGTHS:
        raise ValueError(f"task {task!r} is not one of {', '.join(LENGTHS)}")
    prompt_tokens, new_tokens = LENGTHS[task]
    names = [model] if model else sorted(SIZES, key=lambda name: -memory.parameters(shape_of_name(name)))
    for name in names:
        shape = shape_of_name(name)
        for keys, reason in settings_of(shape):
            keys = dict(model=name, task=task, max_new_tokens=new_tokens, prompts_per_step=16) | keys
            cfg = configs.check_values(configs.Config(**keys))
            phases, tokens = on_a_card(cfg, shape, gpu_gb, prompt_tokens)
            if memory.peak(phases) <= USABLE * gpu_gb * 1e9 and tokens >= LEAST_TOKENS:
                top = max(phases, key=lambda phase: memory.total(phases[phase]))
                said = f"{reason}; at most {memory.peak(phases) / 1e9:.1f} of {gpu_gb:g} GB, in phase {top}"
                return keys | dict(reasons=said)
    raise ValueError(f"nothing fits a card of {gpu_gb:g} GB{f' with {model}' if model else ''}")


def settings_of(shape) -> list[tuple[dict, str]]:
    """Ways to train a model, the one that asks for most first."""
    billions = memory.parameters(shape) / 1e9
    lora = dict(lora_rank=32, lora_alpha=64.0, group_size=16, lr=4e-5 if billions < 1 else 2e-5)
    small = lora | dict(group_size=8, slots=64)
    ways = [(lora, "LoRA in bf16"), (lora | dict(checkpointing="layers"), "LoRA in bf16, layers again")]
    ways.append((small | dict(checkpointing="layers"), "LoRA in bf16, layers again, 64 rows at once"))
    four = dict(base="nf4", checkpointing="layers")
    ways.append((lora | four, "LoRA on 4 bits, layers again"))
    ways.append((small | four, "LoRA on 4 bits, layers again, 64 rows at once"))
    least = dict(prompts_per_step=8, slots=32)
    ways.append((small | four | least, "LoRA on 4 bits, layers again, 8 prompts, 32 rows at once"))
    return ways


# ------------------------------------------------------------------------------------------------ the page
def page(cfg, shape, gpu_gb: float, prompt_tokens: int) -> str:
    """The plan of a config on a card, for a person."""
    phases, tokens = on_a_card(cfg, shape, gpu_gb, prompt_tokens)
    lines = [f"{cfg.model}: {memory.parameters(shape) / 1e9:.2f} billion weights"]
    if cfg.reference:
        lines.append(f"taught by {cfg.reference}: {memory.parameters(teacher_of(cfg)) / 1e9:.2f} billion")
    lines.append(f"a card of {gpu_gb:g} GB, of which {USABLE * gpu_gb:.1f} are usable")
    lines.append(f"prompts of {prompt_tokens} tokens, completions of {cfg.max_new_tokens} at most")
    if cfg.env:
        lines[-1] += f", {memory.own_tokens(cfg)} with what an environment replies"
        lines.append("twice as many slots as are decoded at once, for rows that wait for it")
    lines.append(f"micro-batches of {tokens:,} tokens")
    for phase, parts in phases.items():
        lines.append(f"\n{phase:10}{memory.total(parts) / 1e9:8.2f} GB")
        for what, size in parts.items():
            if size >= 5e6:
                lines.append(f"  {size / 1e9:16.2f}    {what}")
    away = memory.optimiser_on_host(cfg, shape)
    if away:
        lines.append(f"\nin the host's memory {away / 1e9:.2f} GB of masters and moments")
    peak, room = memory.peak(phases) / 1e9, USABLE * gpu_gb
    lines.append(f"\nat most {peak:.2f} GB of {room:.1f}")
    if peak > room:
        lines[-1] += f": it does not fit. {what_to_change(cfg)}"
    spent = times(cfg, shape, prompt_tokens)
    lines.append(
        f"a step on one H100, by what was measured there: sampling {spent['sample']:.1f} s, "
        f"update {spent['update']:.1f} s, if completions are half as long as they may be"
    )
    return "\n".join(lines)


def table() -> str:
    """Markdown: for each model and card the setting that fits."""
    lines = ["| model | " + " | ".join(f"{card} GB" for card in CARDS) + " |"]
    lines.append("|---|" + "---|" * len(CARDS))
    for name in SIZES:
        cells = []
        for card in CARDS:
            try:
                how, most = configure("gsm8k", card, name)["reasons"].split("; at most ")
                cells.append(f"{how}: {most.split(' of ')[0]} GB")
            except ValueError:
                cells.append("-")
        lines.append(f"| {name.split('/')[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]):
    if "--table" in argv:
        print(table())
        return
    words = [word for word in argv if not word.startswith("--gpu_gb")]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    cfg = configs.load(words)
    shape = checks.shape_of(cfg) or shape_of_name(cfg.model)
    asked = [word.partition("=")[2] for word in argv if word.startswith("--gpu_gb")]
    gpu_gb = float(asked[0]) if asked else memory_at_hand()
    task = cfg.task if isinstance(cfg.task, str) else "jsonl"
    print(page(cfg, shape, gpu_gb, LENGTHS[task][0]))


def memory_at_hand() -> float:
    """GB of the GPU, or of this machine where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 1e9
    return checks.host_bytes() / 1e9


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as e:
        sys.exit(f"plan.py: {e}")
