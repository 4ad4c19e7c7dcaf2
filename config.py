"""Everything a run can be told, one field a line: defaults here, an experiment's values in configs/NAME.py, overrides on the command line.

    python train.py configs/gsm8k.py --lr=2e-6 --wandb=offline

A config file is plain Python, run in a namespace of its own: its top-level names are keys of Config, and what it defines besides
(functions, classes, modules, names that start with an underscore) is its own business, so it may define rewards. An unknown key or a wrong
type stops, in file and flag alike, and the nearest known name is given.
"""
import ast
import dataclasses
import difflib
import os
import runpy
import types
import typing
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Config:
    # -- model
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # checkpoint folder, or hub id
    adapter: str = ""  # PEFT adapter folder to start from; "" starts from a fresh adapter
    scratch: dict | None = None  # instead of `model`: sizes (keys of a Hugging Face config.json) of a model of random weights
    alphabet: str = ""  # the characters a scratch model's tokenizer knows
    dtype: str = "auto"  # float32 | bfloat16; auto: bfloat16 on a GPU, float32 on a CPU
    device: str = "auto"  # cpu | cuda | cuda:1; auto: the GPU if there is one
    threads: int = 0  # CPU threads of torch; 0: one a core
    # -- data
    task: str = "gsm8k"  # arithmetic | countdown | gsm8k | math | code | jsonl
    task_options: dict = field(default_factory=dict)  # passed to the task's function in data.py
    data_dir: str = "data"  # where a task's files are, or are downloaded to once
    train_file: str = ""  # jsonl, math, code: file of training rows
    eval_file: str = ""  # the same of held-out rows; "": the last tenth of train_file
    system_prompt: str = ""  # goes first in every chat; with a plain-text tokenizer, before the prompt
    prefill: str = ""  # start of every answer, put into the model's mouth, e.g. "<think>"
    # -- rewards: (name in rewards.py or a function of this config file, weight); weight 0 is logged and not trained on
    rewards: list = field(default_factory=lambda: [("gsm8k", 1.0)])
    reward_messages: bool = False  # rewards get TRL's conversational form where the prompt is a list of messages
    sandbox: str = "auto"  # for the reward `code`; strict: refuses to start where a program cannot be fully isolated
    reward_overlap: bool = False  # score a group while others are still sampled: for slow rewards; each is then called once a group, not once a step
    reward_timeout: float = 300.0  # seconds one reward function may take for a batch
    # -- the batch: these three knobs and no others
    prompts_per_step: int = 8  # B, prompts of one update, over all ranks
    group_size: int = 8  # G, completions a prompt
    micro_tokens: int = 8192  # tokens of one forward and backward; smaller needs less memory and gives the same gradient
    # -- sampling
    max_new_tokens: int = 256  # longest completion, tokens
    temperature: float = 1.0  # of the sampler and of the trainer alike
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    slots: int | None = None  # rows decoded at once; None: all, at most 256
    cuda_graphs: bool = True  # on a GPU: the decoding step is recorded once and replayed
    # -- dynamic sampling (DAPO): groups whose rewards are all equal teach nothing
    resample_zero_groups: bool = False  # replace them by new prompts
    resample_budget: int = 0  # extra prompts a step at most, over all ranks; 0: prompts_per_step
    # -- objective (FORMULAS in loss.py)
    preset: str = ""  # grpo | dapo | dr_grpo | gspo | cispo | reinforce: several of these keys at once (PRESETS); a key given beside it wins
    objective: str = "clip"  # reinforce | clip | cispo | gspo
    aggregate: str = "token"  # token | sequence | constant | group
    advantage: str = "group"  # scale of the advantages: group | none | batch | rloo
    combine: str = "sum"  # several rewards: sum | normalize_then_sum (GDPO; each normalised in its group)
    reward_weights: types.FunctionType | None = None  # a function of the config file: step -> list of weights, instead of those in `rewards`
    mask_truncated: bool = False  # completions cut by max_new_tokens count neither in the loss nor in its divisor
    top_entropy: float = 1.0  # policy term on this share of the step's tokens only, those of the highest entropy; 0.2 in arXiv:2506.01939
    mismatch_clip: float | None = None  # weight of a token min(exp(trainer - sampler), this), for a sampler that differs on purpose; 2 is usual
    epochs: int = 1  # passes over the completions of a step
    minibatches: int = 1  # updates in a pass, each on its share of the groups
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # cap of the ratio for negative advantages, e.g. 3
    cispo_max: float = 5.0
    beta: float = 0.0  # weight of the KL to the starting model; 0: no reference pass
    kl: str = "k3"  # k1 | k2 | k3 | full (exact, over the vocabulary)
    kl_times_ratio: bool = False
    ref_sync_every: int = 0  # steps between moves of the reference towards the policy (TR-DPO, full fine-tuning only); 0: it stays
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
    max_grad_norm: float = 1.0
    # -- LoRA
    lora_rank: int = 32  # 0: full fine-tuning
    lora_alpha: float = 64.0  # the adapter's output counts alpha / rank
    lora_dropout: float = 0.0
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
    checkpointing: str = "none"  # none | layers: keep only what enters a layer and compute it again in the backward; less memory, a third more time
    kernels: str = "auto"  # auto (Triton on a GPU) | torch | triton
    seed: int = 0
    out_dir: str = ""  # "": out/NAME of the config file
    resume: bool = False  # go on from the newest whole checkpoint of out_dir
    save_every: int = 100  # steps; 0: only at the end and on Ctrl-C
    keep: int = 2  # checkpoints kept; 0: all
    rollouts_every: int = 10  # steps between rollouts/ files; 0: none
    show_every: int = 10  # steps between samples printed; 0: none
    wandb: str = ""  # "" (off) | online | offline
    wandb_project: str = "nanogrpo"


# What papers of these names do, where it differs in loss and sampling; their rates and lengths are the task's business.
PRESETS = {
    "grpo": dict(objective="clip", aggregate="sequence", advantage="group", clip_low=0.2, clip_high=0.2, beta=0.04, kl="k3"),  # arXiv:2402.03300
    "dapo": dict(objective="clip", aggregate="token", advantage="group", clip_low=0.2, clip_high=0.28, beta=0.0, mask_truncated=True, resample_zero_groups=True),  # 2503.14476
    "dr_grpo": dict(objective="clip", aggregate="constant", advantage="none", clip_low=0.2, clip_high=0.2, beta=0.0),  # 2503.20783
    "gspo": dict(objective="gspo", aggregate="sequence", advantage="group", clip_low=3e-4, clip_high=4e-4, beta=0.0),  # 2507.18071
    "cispo": dict(objective="cispo", aggregate="token", advantage="group", cispo_max=5.0, beta=0.0),  # 2506.13585
    "reinforce": dict(objective="reinforce", aggregate="token", advantage="rloo", beta=0.0),  # 2402.14740
}

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)


def load(argv: list[str]) -> Config:
    """Config from command-line words: at most one config file, then --key=value. ValueError says what is wrong and what to type instead."""
    values: dict = {}
    flags = {}
    for word in argv:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            known(key, "flag")
            if not equals:
                raise ValueError(f"{word} has no value: write {word}=VALUE")
            flags[key] = parse(key, text)
        elif "out_dir" in values:
            raise ValueError(f"{word} is one config file too many: flags are written --key=value")
        else:
            values = read(word)
            values.setdefault("out_dir", os.path.join("out", os.path.splitext(os.path.basename(word))[0]))
    if "model" in flags:  # a checkpoint named by hand is the one meant, also where the config starts from random weights
        values["scratch"] = None
    # from the weakest: the file's preset, the file's keys, the command line's preset, its keys
    values = preset(values) | values | preset(flags) | flags
    config = Config(**{key: check(key, value) for key, value in values.items()})
    return check_values(config)


def preset(values: dict) -> dict:
    """The keys that the preset named in `values` sets."""
    name = values.get("preset", "")
    if name and name not in PRESETS:
        raise ValueError(f"preset = {name!r} is not one of {', '.join(map(repr, PRESETS))}")
    return PRESETS.get(name, {})


def read(path: str) -> dict:
    """The keys a config file sets."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no config file {path}")
    values = {}
    for key, value in runpy.run_path(path).items():
        if key.startswith("_") or key not in FIELDS and (callable(value) or isinstance(value, types.ModuleType)):
            continue
        known(key, path)
        values[key] = value
    return values


def known(key: str, where: str):
    if key not in FIELDS:
        near = difflib.get_close_matches(key, FIELDS, 1, 0.5)
        raise ValueError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "; config.py lists all keys"))


def parse(key: str, text: str):
    """The value a flag's text stands for: strings verbatim, the rest as Python literals."""
    kinds = accepted(key)
    if kinds == {str}:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text if str in kinds else wrong(key, text)


def accepted(key: str) -> set[type]:
    return set(typing.get_args(TYPES[key])) or {TYPES[key]}


def check(key: str, value):
    """The value, its type checked against the field's: an int promotes to float, a list to tuple, and nothing else is converted."""
    kinds = accepted(key)
    if float in kinds and type(value) is int:
        return float(value)
    if tuple in kinds and type(value) is list:
        return tuple(value)
    return value if type(value) in kinds else wrong(key, value)


def wrong(key: str, value):
    names = " or ".join(sorted("None" if t is types.NoneType else t.__name__ for t in accepted(key)))
    raise ValueError(f"{key} = {value!r} has the wrong type: {names} is wanted, for example {key}={FIELDS[key].default!r}"
                     if FIELDS[key].default is not dataclasses.MISSING else f"{key} = {value!r} has the wrong type: {names} is wanted")


CHOICES = dict(dtype=("auto", "float32", "bfloat16"), objective=("reinforce", "clip", "cispo", "gspo"), aggregate=("token", "sequence", "constant", "group"),
               advantage=("group", "none", "batch", "rloo"), kl=("k1", "k2", "k3", "full"), combine=("sum", "normalize_then_sum"), kernels=("auto", "torch", "triton"), checkpointing=("none", "layers"), schedule=("constant", "cosine", "linear"), wandb=("", "online", "offline"),
               sandbox=("auto", "strict"))
AT_LEAST = dict(prompts_per_step=1, group_size=1, micro_tokens=1, max_new_tokens=1, temperature=0, top_k=0, steps=0, lr=0, beta=0, lora_rank=0,
                sft_steps=0, sft_batch=1, eval_every=0, eval_problems=1, eval_samples=1, save_every=0, keep=0, rollouts_every=0, show_every=0, warmup_steps=0, epochs=1, minibatches=1,
                resample_budget=0, ref_sync_every=0, ref_mix=0)


def check_values(c: Config) -> Config:
    """The config, or a ValueError for a value that can't be meant."""
    for key, choices in CHOICES.items():
        if getattr(c, key) not in choices:
            raise ValueError(f"{key} = {getattr(c, key)!r} is not one of {', '.join(map(repr, choices))}")
    for key, least in AT_LEAST.items():
        if getattr(c, key) < least:
            raise ValueError(f"{key} = {getattr(c, key)!r} is too small: {least} is the least")
    if c.group_size == 1 and c.advantage != "none":
        raise ValueError("group_size = 1 has no group to compare with, so every advantage would be 0: use 2 or more, or advantage=none")
    if not 0 < c.top_entropy <= 1 or not 0 <= c.ref_mix <= 1:
        raise ValueError(f"top_entropy = {c.top_entropy!r} and ref_mix = {c.ref_mix!r} are shares: above 0 and at most 1")
    if c.mismatch_clip is not None and c.mismatch_clip <= 0:
        raise ValueError(f"mismatch_clip = {c.mismatch_clip!r} is the largest weight of a token: 2 is usual, None switches it off")
    if c.ref_sync_every and (c.lora_rank or not c.beta):
        raise ValueError("ref_sync_every moves a copy of the model towards the policy: it needs beta > 0 and full fine-tuning, lora_rank = 0")
    if c.prompts_per_step % c.minibatches:
        raise ValueError(f"prompts_per_step = {c.prompts_per_step} does not divide into {c.minibatches} minibatches of whole groups")
    if c.combine == "normalize_then_sum" and c.advantage != "group":
        raise ValueError(f"combine = 'normalize_then_sum' normalises in the group and over the step: it has no advantage = {c.advantage!r}, leave that at 'group'")
    if c.temperature == 0:
        raise ValueError("temperature = 0 draws the same completion for a whole group, so nothing could be learnt: use about 0.7 to 1")
    return c


def differences(c: Config) -> dict:
    """The keys whose values differ from the defaults."""
    return {name: value for name, value in dataclasses.asdict(c).items() if value != dataclasses.asdict(Config())[name]}
