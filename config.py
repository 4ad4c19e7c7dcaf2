"""Everything a run can be told, one field a line: defaults here, an experiment's values in configs/NAME.py,
overrides on the command line.

    python train.py configs/gsm8k.py --lr=2e-6 --wandb=offline

A config file is plain Python, run in a namespace of its own: its top-level names are keys of Config, and
what it defines besides (functions, classes, modules, names that start with an underscore) is its own
business. So it may define a reward, an objective, an advantage or a task, and give it as the value of that
key. The keyword arguments of an objective are keys, too, whether it stands in loss.py or in the config
file. An unknown key or a wrong type stops, in file and flag alike, and the nearest known name is given.
"""

import ast
import dataclasses
import difflib
import math
import operator
import os
import re
import runpy
import traceback
import types
import typing
from dataclasses import dataclass, field
from types import FunctionType

from loss import AGGREGATES, KL, OBJECTIVES, SCALES, options_of
from usage import ELSEWHERE, find_config

# The options of the objectives in loss.py, which declare them, and their defaults.
OPTIONS = {name: default for objective in OBJECTIVES for name, default in options_of(objective).items()}


@dataclass(frozen=True)
class Config:
    # -- model
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # checkpoint folder, or hub id
    adapter: str = ""  # PEFT adapter folder to start from; "" starts from a fresh adapter
    base: str = "dense"  # the weights under LoRA: dense (in dtype) | nf4 (projections in 4 bits, QLoRA)
    scratch: dict | None = None  # instead of `model`: sizes, as in a config.json, of random weights
    alphabet: str = ""  # the characters a scratch model's tokenizer knows
    dtype: str = "auto"  # float32 | bfloat16 | float16; auto: float32 on a CPU, bfloat16 on a GPU that has it
    device: str = "auto"  # cpu | cuda | cuda:1; auto: the GPU if there is one
    threads: int = 0  # CPU threads of torch; 0: one a core
    # -- data
    task: str | FunctionType = "gsm8k"  # arithmetic | countdown | gsm8k | math | code | jsonl, or a function
    task_options: dict = field(default_factory=dict)  # passed to the task's function
    data_dir: str = "data"  # where a task's files are, or are downloaded to once
    train_file: str = ""  # jsonl, math, code: file of training rows
    eval_file: str = ""  # the same of held-out rows; "": the last tenth of train_file
    system_prompt: str = ""  # goes first in every chat; with a plain-text tokenizer, before the prompt
    prefill: str = ""  # start of every answer, put into the model's mouth, e.g. "<think>"
    # -- rewards: pairs of a name in rewards.py, or a function, and a weight; 0 is logged and not trained on.
    # [], or weights of 0 alone: a teacher is all there is to learn from (`reference`)
    rewards: list = field(default_factory=lambda: [("gsm8k", 1.0)])
    reward_messages: bool = False  # rewards get TRL's conversational form where the prompt is messages
    sandbox: str = "auto"  # for reward `code`; strict: full isolation or stop; trust: go on without any
    reward_overlap: bool = False  # score a group while others are sampled, for slow rewards: one call a group
    reward_timeout: float = 300.0  # seconds one reward function may take for a batch
    # -- the batch: these three knobs and no others
    prompts_per_step: int = 8  # B, prompts of one update, over all ranks
    group_size: int = 8  # G, completions a prompt
    micro_tokens: int = 0  # tokens of one forward and backward, same gradient; 0: by memory (a CPU: 8,192)
    # -- sampling
    max_new_tokens: int = 256  # longest completion, tokens
    temperature: float | FunctionType = 1.0  # of sampler and trainer alike; or a function of the step
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    slots: int | None = None  # rows decoded at once; None: all, at most 256
    cuda_graphs: bool = True  # on a GPU: the decoding step is recorded once and replayed
    # -- turns: an environment that answers the model (turns.py)
    env: str | FunctionType | type = ""  # a name in turns.ENVS, a function (row, said) or a class; "": none
    env_role: str = "user"  # its replies are messages of this role: user | tool | "" (as they are, inline)
    turn_ends: tuple = ()  # texts that end a turn, e.g. "</tool>", beside the stop ids
    max_turns: int = 8  # turns of the model in a row
    max_context: int = 0  # tokens of a row, prompt and replies included; 0: 2 * max_new_tokens and the prompt
    env_timeout: float = 60.0  # seconds a call of the environment may take
    # -- dynamic sampling (DAPO): groups whose rewards are all equal teach nothing
    resample_zero_groups: bool = False  # replace them by new prompts
    resample_budget: int = 0  # extra prompts a step at most, over all ranks; 0: prompts_per_step
    # -- objective (loss.py has the formulas)
    preset: str = ""  # grpo | dapo | dr_grpo | gspo | cispo | reinforce: sets several keys; given ones win
    objective: str | FunctionType = "clip"  # reinforce | clip | cispo | gspo, or a function as in loss.py
    objective_options: dict = field(default_factory=dict)  # options of an objective that are no keys below
    aggregate: str = "token"  # token | sequence | constant | group
    advantage: str | FunctionType = "group"  # scale: group | none | batch | rloo, or a function (train.py)
    combine: str = "sum"  # several rewards: sum | normalize_then_sum (GDPO; each normalised in its group)
    reward_weights: FunctionType | None = None  # a function: step -> weights, for those in `rewards`
    mask_truncated: bool = False  # completions cut by max_new_tokens leave the loss and its divisor
    top_entropy: float = 1.0  # policy term on this share of the tokens, of highest entropy (arXiv:2506.01939)
    mismatch_clip: float | None = None  # weigh a token by min(exp(trainer - sampler), this); 2 is usual
    epochs: int = 1  # passes over the completions of a step
    minibatches: int = 1  # updates in a pass, each on its share of the groups
    clip_low: float = OPTIONS["clip_low"]  # clip, gspo: the ratio counts down to 1 - clip_low
    clip_high: float = OPTIONS["clip_high"]  # clip, gspo: and up to 1 + clip_high
    dual_clip: float | None = OPTIONS["dual_clip"]  # clip, gspo: cap of the ratio where A < 0; 3 is usual
    cispo_max: float = OPTIONS["cispo_max"]  # cispo: cap of the ratio
    beta: float = 0.0  # weight of the KL to the starting model, or to `reference`; 0: no reference pass
    reference: str = ""  # a teacher instead of the start: folder, run or hub id, of the same vocabulary
    kl: str = "k3"  # k1 | k2 | k3 | full (exact, over the vocabulary)
    kl_direction: str = "reverse"  # of full: reverse, KL(policy || reference), or forward, the other way
    kl_top: int = 0  # of full: the reference's likeliest words by themselves, the rest as one; 0: all words
    kl_times_ratio: bool = False
    ref_sync_every: int = 0  # steps between moves of the reference to the policy (TR-DPO, full only)
    ref_mix: float = 0.6  # reference = ref_mix * policy + (1 - ref_mix) * reference
    entropy_coef: float = 0.0
    # -- optimiser
    steps: int = 500  # updates
    lr: float = 1e-5
    schedule: str = "constant"  # after the warm-up: constant | cosine | linear
    warmup_steps: int = 10  # the rate climbs to lr over these
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    weight_decay: float = 0.0
    optimizer_bits: int = 32  # 8: Adam's moments of large tensors in 8 bits, 2 bytes a parameter for 8
    offload_optimizer: bool = False  # masters and moments in the host's memory: 12 of bf16's 18 bytes
    shard_optimizer: bool = False  # several processes share moments and masters (ZeRO-1): the same bits
    shard: bool = False  # several processes share weights and gradients, too (FSDP2)
    max_grad_norm: float = 1.0
    # -- LoRA
    lora_rank: int = 32  # 0: full fine-tuning
    lora_alpha: float = 64.0  # the adapter's output counts alpha / rank
    lora_dropout: float = 0.0
    lora_merge: str = "auto"  # auto (on a GPU with room) | on | off: compute with W + BA, made once an update
    lora_targets: tuple = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # -- supervised warm-up on the task's demonstrations, before the first step
    sft_steps: int = 0  # 0: none
    sft_batch: int = 64  # demonstrations a step
    sft_lr: float = 1e-3
    # -- evaluation on held-out problems: before, during and after
    eval_every: int = 50  # steps; 0: never
    eval_problems: int = 200
    eval_samples: int = 1  # 1: greedy; K > 1: pass@1..K from K samples at eval_temperature
    eval_temperature: float = 1.0
    eval_max_new_tokens: int = 0  # 0: max_new_tokens
    # -- the run
    force: bool = False  # go on although the first batch shows that nothing can be learnt
    # none | light: norms and SwiGLU again in the backward | layers: all again, from a layer's input |
    # offload: which waits in the host's memory | auto: light on a GPU
    checkpointing: str = "auto"
    kernels: str = "auto"  # auto (Triton on a GPU) | torch | triton
    seed: int = 0
    out_dir: str = ""  # "": out/NAME of the config file; a run that is there already is moved to out/NAME.1
    resume: bool = False  # go on from the newest whole checkpoint of out_dir
    stop_at: str = ""  # end early, saved and evaluated, where a metric is so far: "eval/strict>=0.97"
    save_every: int = 100  # steps; 0: only at the end and on Ctrl-C
    save_failure: str = "warn"  # a checkpoint that cannot be written: warn and go on to the next | stop
    keep: int = 2  # checkpoints kept; 0: all
    rollouts_every: int = 10  # steps between rollouts/ files; 0: none
    show_every: int = 10  # steps between samples printed; 0: none
    wandb: str = ""  # "" (off) | online | offline
    wandb_project: str = "nanogrpo"
    tensorboard: bool = False  # the same numbers in out_dir/tensorboard
    push_to_hub: str = ""  # "user/name": the model goes there at the end, with a card


# What papers of these names do, where it differs in loss and sampling; rates and
# lengths are the task's business.
PRESETS = {
    "grpo": dict(  # arXiv:2402.03300
        objective="clip", aggregate="sequence", advantage="group", clip_low=0.2, clip_high=0.2, beta=0.04,
        kl="k3",
    ),
    "dapo": dict(  # arXiv:2503.14476
        objective="clip", aggregate="token", advantage="group", clip_low=0.2, clip_high=0.28, beta=0.0,
        mask_truncated=True, resample_zero_groups=True,
    ),
    "dr_grpo": dict(  # arXiv:2503.20783
        objective="clip", aggregate="constant", advantage="none", clip_low=0.2, clip_high=0.2, beta=0.0
    ),
    "gspo": dict(  # arXiv:2507.18071
        objective="gspo", aggregate="sequence", advantage="group", clip_low=3e-4, clip_high=4e-4, beta=0.0
    ),
    "cispo": dict(  # arXiv:2506.13585
        objective="cispo", aggregate="token", advantage="group", cispo_max=5.0, beta=0.0
    ),
    "reinforce": dict(  # arXiv:2402.14740
        objective="reinforce", aggregate="token", advantage="rloo", beta=0.0
    ),
}  # fmt: skip

# A switch as people write it. 0 and 1 are left to the types: an option may be a number, too.
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)


# --------------------------------------------------------------------------------------------- loading
def load(argv: list[str]) -> Config:
    """Config from command-line words: at most one config file, then --key=value.

    ValueError says what is wrong and what to type instead.
    """
    words, given = split(argv)
    if len(words) > 1:
        raise ValueError(f"{words[1]} is one config file too many: flags are written --key=value")
    values, functions = {}, {}
    if words:
        path = find_config(words[0])
        values, functions = read(str(path))
        values.setdefault("out_dir", os.path.join("out", path.stem))
    else:
        values["out_dir"] = os.path.join("out", "run")
    objective = dict(given).get("objective")
    flags = read_flags(given, functions.get(objective, values.get("objective")), functions)
    if "model" in flags:  # a checkpoint named by hand is the one meant, also over a start from nothing
        values["scratch"] = None
    # From the weakest: the file's preset, the file's keys, the command line's preset, its keys.
    values = preset(values) | values | preset(flags) | flags
    values = collect_options(values)
    config = Config(**{key: check_type(key, value) for key, value in values.items()})
    return check_values(config)


def split(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Command-line words -> the words that are no flags, and the flags: (key, text).

    --lr=2e-6 and --lr 2e-6 are the same, as are --resume, --resume=True and --resume true, and a hyphen in a
    key is an underscore.
    """
    words, flags, left = [], [], list(argv)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            if word.startswith("-"):
                raise ValueError(f"{word} is no flag: flags are written --key=value, such as --lr=2e-6")
            words.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            switch = TYPES.get(key) is bool
            follows = left and not left[0].startswith("--")
            if follows and (not switch or left[0].lower() in (*BOOLS, "0", "1")):
                text = left.pop(0)
            elif switch:
                text = "True"
            elif key in TYPES:
                raise ValueError(f"{word} has no value: write {word}=VALUE")
        flags.append((key, text))
    return words, flags


def read(path: str) -> tuple[dict, dict]:
    """The keys a config file sets, and the functions and classes that it defines, by name.

    ValueError where it is no config, or has an error, with its line.
    """
    if not path.endswith(".py"):
        raise ValueError(f"{path} is no config: that is a Python file that sets keys, such as lr = 1e-5")
    try:
        found = runpy.run_path(path)
    except Exception as error:
        raise ValueError(f"{place_of(error, path)}: {type(error).__name__}: {error}") from error
    except SystemExit as error:
        raise ValueError(f"{path} ends Python by itself: a config only sets keys") from error
    values, functions = {}, {name: value for name, value in found.items() if callable(value)}
    for key, value in found.items():
        helper = callable(value) or isinstance(value, types.ModuleType)
        if key.startswith("_") or (helper and key not in FIELDS):
            continue
        check_known(key, path, found.get("objective"))
        values[key] = value
    if not values:
        raise ValueError(f"{path} sets no key, so it is no config: it needs one at least, such as lr = 1e-5")
    return values, functions


def place_of(error: Exception, path: str) -> str:
    """The file and line in a config where an error arose, as far as it is known."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == path:
            line = frame.lineno
    return f"{path}, line {line}" if line else path


def read_flags(given: list[tuple[str, str]], objective, functions: dict) -> dict:
    """The keys that flags set. objective: the one that is meant, whose options are keys too. functions: of
    the config file, which a flag may name where its key takes a function, such as --objective=sapo.
    """
    flags = {}
    for key, text in given:
        check_known(key, "flag", objective)
        named = text in functions and accepted(key) & {FunctionType, type}
        flags[key] = functions[text] if named else parse(key, text)
    return flags


def preset(values: dict) -> dict:
    """The keys that the preset named in `values` sets."""
    name = values.get("preset", "")
    if name and name not in PRESETS:
        raise ValueError(f"preset = {name!r} is not one of {', '.join(map(repr, PRESETS))}")
    return PRESETS.get(name, {})


def known_keys(objective) -> list[str]:
    """Fields of Config, options of the objectives in loss.py, and those of an objective that is a
    function.
    """
    own = options_of(objective) if callable(objective) else {}
    return [*FIELDS, *OPTIONS, *own]


def check_known(key: str, where: str, objective):
    known = known_keys(objective)
    if key in ELSEWHERE and key not in known:
        raise ValueError(f"{where}: {key!r} is another trainer's name; here it is {ELSEWHERE[key]}")
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else "python train.py --help lists all keys"
        raise ValueError(f"{where}: unknown key {key!r}; {hint}")


def collect_options(values: dict) -> dict:
    """The same values, with options that are no fields of Config put together in `objective_options`."""
    fields = {key: value for key, value in values.items() if key in FIELDS}
    options = {key: value for key, value in values.items() if key not in FIELDS}
    if options:
        fields["objective_options"] = fields.get("objective_options", {}) | options
    return fields


def parse(key: str, text: str):
    """The value a flag's text stands for: strings verbatim, the rest as Python literals."""
    kinds = accepted(key)
    if kinds == {str}:
        return text
    if bool in kinds and text.lower() in BOOLS:
        return BOOLS[text.lower()]
    if kinds == {bool} and text in ("0", "1"):
        return text == "1"
    if types.NoneType in kinds and text.lower() in ("none", "null"):
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        if kinds & {list, tuple} and re.fullmatch(r"\w+(,\w+)*", text):  # names: --lora_targets=q_proj,v_proj
            return text.split(",")
        if str in kinds:
            return text
        return wrong_type(key, text)
    whole = type(value) is float and value.is_integer() and float not in kinds
    return int(value) if whole and int in kinds else value  # --steps=1e3


def accepted(key: str) -> set[type]:
    """The types that a key takes. An option of an objective that is no field takes
    what can be written as a literal.
    """
    if key not in TYPES:
        return {bool, int, float, types.NoneType}
    return set(typing.get_args(TYPES[key])) or {TYPES[key]}


def check_type(key: str, value):
    """The value, its type checked against the field's: an int promotes to float, a
    list to tuple; no more than that.
    """
    kinds = accepted(key)
    if float in kinds and type(value) is int:
        return float(value)
    if tuple in kinds and type(value) is list:
        return tuple(value)
    return value if type(value) in kinds else wrong_type(key, value)


def wrong_type(key: str, value):
    kinds = ["None" if kind is types.NoneType else kind.__name__ for kind in accepted(key)]
    sentence = f"{key} = {value!r:.80} has the wrong type: {' or '.join(sorted(kinds))} is wanted"
    if key in FIELDS and FIELDS[key].default is not dataclasses.MISSING:
        sentence += f", for example {key}={FIELDS[key].default!r}"
    raise ValueError(sentence)


# ---------------------------------------------------------------------------------------------- values
CHOICES = dict(
    base=("dense", "nf4"),
    optimizer_bits=(32, 8),
    dtype=("auto", "float32", "bfloat16", "float16"),
    objective=tuple(OBJECTIVES),
    aggregate=tuple(AGGREGATES),
    advantage=tuple(SCALES),
    kl=tuple(KL),
    kl_direction=("reverse", "forward"),
    combine=("sum", "normalize_then_sum"),
    kernels=("auto", "torch", "triton"),
    checkpointing=("auto", "none", "light", "layers", "offload"),
    lora_merge=("auto", "on", "off"),
    schedule=("constant", "cosine", "linear"),
    wandb=("", "online", "offline"),
    sandbox=("auto", "strict", "trust"),
    save_failure=("warn", "stop"),
    env_role=("user", "tool", ""),
)
# What a number may be, as an interval: [ and ] include the end, ( and ) do not. The upper ends are far beyond
# what a run can use; a number above them is a slip that would take the machine's memory.
RANGES = dict(
    threads="[0, 1024]", prompts_per_step="[1, 100000]", group_size="[1, 10000]", micro_tokens="[0, 1e9]",
    max_new_tokens="[1, 1e6]", temperature="[0, 100]", top_k="[0, 1e7]", top_p="(0, 1]", min_p="[0, 1]",
    max_turns="[1, 10000]", max_context="[0, 1e7]", env_timeout="(0, 1e7]", slots="[1, 100000]",
    resample_budget="[0, 100000]", reward_timeout="(0, 1e7]", top_entropy="(0, 1]",
    mismatch_clip="(0, inf)", epochs="[1, 1000]", minibatches="[1, 100000]", clip_low="[0, 1]",
    clip_high="[0, inf)", dual_clip="(1, inf)", cispo_max="(0, inf)", beta="[0, inf)",
    kl_top="[0, 1e7]", ref_sync_every="[0, inf)",
    ref_mix="[0, 1]", entropy_coef="(-inf, inf)", steps="[0, 1e9]", lr="[0, 1]", warmup_steps="[0, 1e9]",
    adam_beta1="[0, 1)", adam_beta2="[0, 1)", weight_decay="[0, inf)", max_grad_norm="(0, inf]",
    lora_rank="[0, 16384]", lora_alpha="(0, inf)", lora_dropout="[0, 1)", sft_steps="[0, 1e9]",
    sft_batch="[1, 100000]", sft_lr="[0, 1]", eval_every="[0, 1e9]", eval_problems="[1, 1e9]",
    eval_samples="[1, 10000]", eval_temperature="[0, 100]", eval_max_new_tokens="[0, 1e6]",
    seed="[0, 1e15]", save_every="[0, 1e9]", keep="[0, 1e9]", rollouts_every="[0, 1e9]",
    show_every="[0, 1e9]",
)  # fmt: skip
WHY = dict(  # what to type instead, where the interval does not say it
    top_p="1 switches it off",
    mismatch_clip="it is the largest weight of a token: 2 is usual, None switches it off",
    slots="None takes as many as are useful",
    threads="0 is one a core",
    dual_clip="3 is usual, None switches it off",
    lr="1e-6 for all weights and 1e-5 for LoRA are usual",
    lora_rank="8 to 64 are usual, 0 trains all weights",
    max_grad_norm="1 is usual, 1e9 never clips",
)


def check_values(c: Config) -> Config:
    """The config, or a ValueError for a value that can't be meant."""
    for key, choices in CHOICES.items():
        value = getattr(c, key)
        if value not in choices and not callable(value):
            near = difflib.get_close_matches(str(value), map(str, choices), 1, 0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{key} = {value!r:.80} is not one of {', '.join(map(repr, choices))}{hint}")
    for key, interval in RANGES.items():
        check_range(key, getattr(c, key), interval)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", c.device):
        raise ValueError(f"device = {c.device!r:.80} is not one of 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    checks = (refuse_batch, refuse_reference, refuse_no_reward, refuse_merging, refuse_sharing, refuse_goal)
    for refuse in checks:
        refuse(c)
    return c


def check_range(key: str, value, interval: str):
    """ValueError for a number outside an interval such as "(0, 1]". None and functions are not numbers."""
    if value is None or callable(value):
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    hint = f"; {WHY[key]}" if key in WHY else ""
    shown = f"{key} = {value!r:.40}"
    if math.isnan(value):
        raise ValueError(f"{shown} is not a number{hint}")
    if value < low or (value == low and interval[0] == "("):
        least = f"{low:g} is the least" if interval[0] == "[" else f"it must be above {low:g}"
        raise ValueError(f"{shown} is too small: {least}{hint}")
    if value > high or (value == high and interval[-1] == ")"):
        most = f"{high:g} is the most" if interval[-1] == "]" else f"it must be below {high:g}"
        raise ValueError(f"{shown} is too large: {most}{hint}")


def refuse_batch(c: Config):
    if c.group_size == 1 and not callable(c.advantage) and has_reward(c):
        raise ValueError(
            "group_size = 1 has no group to compare with, so every advantage would be 0: use 2 or more, "
            "or an advantage of your own with another baseline (docs/plugins.md has a moving average)"
        )
    if c.group_size == 1 and c.resample_zero_groups:
        raise ValueError(
            "resample_zero_groups replaces groups whose rewards are all equal, and with group_size = 1 "
            "that is every group: leave it out"
        )
    if c.prompts_per_step % c.minibatches:
        raise ValueError(
            f"prompts_per_step = {c.prompts_per_step} does not divide into "
            f"{c.minibatches} minibatches of whole groups"
        )
    if c.combine == "normalize_then_sum" and c.advantage != "group":
        raise ValueError(
            "combine = 'normalize_then_sum' normalises in the group and over the step: "
            f"it has no advantage = {c.advantage!r}, leave that at 'group'"
        )
    if c.temperature == 0:
        raise ValueError(
            "temperature = 0 draws the same completion for a whole group, so nothing could be learnt: "
            "use about 0.7 to 1"
        )


def refuse_reference(c: Config):
    if c.reference and not c.beta:
        raise ValueError(
            f"reference = {c.reference!r:.80} is what the KL is measured to, and beta = 0 gives that no "
            "weight: give --beta=1 to learn from it alone, about 0.05 beside rewards"
        )
    if c.reference and c.ref_sync_every:
        raise ValueError(
            "ref_sync_every moves the reference towards the policy, and a teacher stays as it is: "
            "leave out one of reference and ref_sync_every"
        )
    for key in ("kl_direction", "kl_top"):
        value = getattr(c, key)
        if c.kl != "full" and value != FIELDS[key].default:
            raise ValueError(
                f"{key} = {value!r} is about whole distributions, and kl = {c.kl!r} looks at the drawn word "
                "alone: give --kl=full"
            )
    if c.ref_sync_every and (c.lora_rank or not c.beta):
        raise ValueError(
            "ref_sync_every moves a copy of the model towards the policy: "
            "it needs beta > 0 and full fine-tuning, lora_rank = 0"
        )


def has_reward(c: Config) -> bool:
    """Whether a reward has a weight. Without one the KL to a teacher is all there is to learn from."""
    shown = [isinstance(entry, (tuple, list)) and len(entry) == 2 and entry[1] == 0 for entry in c.rewards]
    return not all(shown) or (bool(shown) and c.reward_weights is not None)


def refuse_no_reward(c: Config):
    """Without a reward there must be a teacher, and nothing that compares rewards."""
    if has_reward(c):
        return
    if not c.reference:
        raise ValueError(
            "no reward has a weight other than 0, so there is nothing to train on: give one a weight, "
            "or a teacher, --reference=FOLDER_OR_HUB_ID --beta=1 --kl=full"
        )
    if c.kl == "k1" and not c.kl_times_ratio:
        raise ValueError(
            "without a reward the KL is all there is to learn from, and the gradient of kl = 'k1' has "
            "mean 0: give --kl=full"
        )
    if c.resample_zero_groups:
        raise ValueError(
            "resample_zero_groups looks for groups whose rewards differ, and no reward has a weight: "
            "leave it out"
        )
    if not c.rewards and c.eval_every:
        raise ValueError(
            "rewards = [] has nothing to grade held-out problems with: give a reward of weight 0, "
            "rewards = [('gsm8k', 0.0)], which is shown and not trained on, or --eval_every=0"
        )


def refuse_merging(c: Config):
    if c.base == "nf4" and not c.lora_rank:
        raise ValueError(
            "base = 'nf4' holds frozen weights, which full fine-tuning (lora_rank = 0) would have to change: "
            "give --lora_rank=16, or --base=dense"
        )
    if c.base == "nf4" and c.lora_merge == "on":
        raise ValueError(
            "lora_merge = 'on' keeps the merged weights in full, four times what base = 'nf4' holds: "
            "leave lora_merge at 'auto'"
        )
    if c.lora_merge == "on" and c.lora_dropout:
        raise ValueError(
            "lora_merge = 'on' has one input for base and adapter, so it cannot have lora_dropout: "
            "set that to 0, or lora_merge to 'off'"
        )


def refuse_goal(c: Config):
    if not c.stop_at:
        return
    name, _, _ = goal_of(c.stop_at)
    if name.startswith("eval/") and not c.eval_every:
        raise ValueError(f"stop_at = {c.stop_at!r} waits for an evaluation, and eval_every = 0 makes none")


COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def goal_of(text: str) -> tuple[str, str, float]:
    """A goal such as "eval/strict>=0.97" as (metric, comparison, number)."""
    found = re.fullmatch(r"\s*([^\s<>=]+)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*", text)
    try:
        return found[1], found[2], float(found[3])
    except (TypeError, ValueError):
        raise ValueError(
            f"stop_at = {text!r:.80} is no goal: write a metric, >= or <=, and a number, as eval/strict>=0.97"
        ) from None


def goal_reached(goal: str, metrics: dict) -> bool:
    """Whether metrics are what a goal waits for. Those without an evaluation do not reach eval/..

    ValueError, with the nearest name, where there are metrics of that kind and none has this name.
    """
    name, comparison, number = goal_of(goal)
    kind = "eval/" if name.startswith("eval/") else "completions/mean_length"  # which every step has
    value = metrics.get(name)
    if value is None:
        if name not in metrics and any(key.startswith(kind) for key in metrics):
            near = difflib.get_close_matches(name, metrics, 3, 0.1)
            raise ValueError(
                f"stop_at = {goal!r:.80}: there is no metric {name!r:.60}, but {', '.join(near)} and others"
            )
        return False
    return COMPARISONS[comparison](value, number)


def refuse_sharing(c: Config):
    if c.offload_optimizer and c.optimizer_bits == 8:
        raise ValueError(
            "offload_optimizer = True takes the moments off the GPU, so there is nothing to gain from "
            "optimizer_bits = 8: leave one of the two out"
        )
    if c.shard and c.shard_optimizer:
        raise ValueError("shard = True shares the optimiser too: leave shard_optimizer out")
    if c.shard and c.lora_merge == "on":
        raise ValueError(
            "lora_merge = 'on' keeps a whole copy of the weights, which shard = True spreads over processes: "
            "set one of them to off"
        )
    for key, value in (
        ("base", "nf4"),
        ("optimizer_bits", 8),
        ("dtype", "float16"),
        ("checkpointing", "offload"),
        ("offload_optimizer", True),
    ):
        if c.shard and getattr(c, key) == value:
            raise ValueError(f"shard = True has no {key} = {value!r}: leave one of the two out")


def model_name(c: Config) -> str:
    """The model for a person: its folder or hub id, or what it is made of."""
    return "of random weights" if c.scratch is not None else c.model


def task_name(c: Config) -> str:
    """The task for a person: its name, or that of the config file's function."""
    return c.task if isinstance(c.task, str) else c.task.__name__


def shown(value) -> str:
    """A key's value as a config file would have it."""
    return getattr(value, "__name__", repr(value))


def differences(c: Config) -> dict:
    """The keys whose values differ from the defaults."""
    defaults = dataclasses.asdict(Config())
    return {name: value for name, value in dataclasses.asdict(c).items() if value != defaults[name]}


# ------------------------------------------------------------------------ what other modules are given
# The config object stops at the scripts. These are its parts as keyword arguments.
def sampling_options(c: Config, step: int) -> dict:
    """The distribution that training step `step` (from 1) samples from, and scores on."""
    temperature = float(c.temperature(step)) if callable(c.temperature) else c.temperature
    return dict(temperature=temperature, top_k=c.top_k, top_p=c.top_p, min_p=c.min_p)


def objective_options(c: Config) -> dict:
    """loss.policy_loss's keywords, but for the step's divisor `norm`."""
    names = ("objective", "aggregate", "beta", "kl", "kl_times_ratio", "entropy_coef", "group_size")
    names += ("max_new_tokens", "mismatch_clip", *OPTIONS)
    known = {name: getattr(c, name) for name in names if name in FIELDS}
    return known | c.objective_options


def turn_options(c: Config) -> dict:
    """turns.Conversations's keywords, but for the stop ids."""
    return dict(
        role=c.env_role,
        prefill=c.prefill,
        turn_ends=c.turn_ends,
        max_turns=c.max_turns,
        timeout=c.env_timeout,
    )


def reward_options(c: Config) -> dict:
    """rewards.score_completions's keywords."""
    return dict(
        prefill=c.prefill, max_new_tokens=c.max_new_tokens, reward_messages=c.reward_messages,
        timeout=c.reward_timeout,
    )  # fmt: skip


def task_options(c: Config) -> dict:
    """data.load_task's keywords."""
    return dict(
        data_dir=c.data_dir, seed=c.seed, train_file=c.train_file or None, eval_file=c.eval_file or None,
        eval_problems=c.eval_problems, **c.task_options,
    )  # fmt: skip


def evaluation_options(c: Config) -> dict:
    """evaluation.evaluate's keywords."""
    return dict(
        max_new_tokens=c.eval_max_new_tokens or c.max_new_tokens, system=c.system_prompt, prefill=c.prefill,
        samples=c.eval_samples, temperature=c.eval_temperature, seed=c.seed, max_context=c.max_context,
        reward_messages=c.reward_messages, timeout=c.reward_timeout,
    )  # fmt: skip


def warm_up_options(c: Config) -> dict:
    """warmup.warm_up's keywords."""
    return dict(
        steps=c.sft_steps, batch=c.sft_batch, lr=c.sft_lr, seed=c.seed, micro_tokens=c.micro_tokens or 8192,
        system=c.system_prompt, prefill=c.prefill,
    )  # fmt: skip
