"""Everything cheap is looked at before anything dear: before a model is loaded, downloaded or moved aside.

    cfg = checks.config_of("train.py", sys.argv[1:])     # help, a config that is whole, or one sentence

config.py knows what each key may be by itself. Here is what it takes to look at the machine, at the files and
at several keys together: packages, device, rewards and the columns they want, the model's config.json, and
memory. Each check is a function of the config that raises ValueError, one sentence with what to type instead.
"""

import importlib.util
import inspect
import json
import netrc
import os
import re
from pathlib import Path

import torch

import config as configs
import data
import memory
import progress
import rewards as rewarding
import turns
import usage
from policy import newest_of_run
from shape import Shape

# A token of a step, in bytes of Python lists and tensors: its id, its log-probability, its entropy, its draw.
BYTES_A_TOKEN = 150


def config_of(script: str, argv: list[str]) -> configs.Config:
    """The config of a script's command line, checked. Prints the usage and exits where that is asked for.

    ValueError and RewardError are one sentence for a person.
    """
    progress.imported()
    if usage.asked_for(argv):
        if os.environ.get("RANK", "0") == "0":
            print(usage.page(script, argv, configs.OPTIONS))
        raise SystemExit(0 if argv else 2)
    cfg = configs.load(argv)
    for check in (packages, hub, device, out_dir, schedules, environment, model, room):
        check(cfg)
    rewarding.check_sandbox(rewarding.resolve(cfg.rewards), cfg.sandbox, turns.resolve(cfg.env))
    if isinstance(cfg.task, str):
        data.task_function(cfg.task)  # there is one of this name
    return cfg


def packages(cfg):
    """What the config needs beside torch and transformers is installed, and wandb knows who we are."""
    names = [entry[0] if isinstance(entry, (tuple, list)) and entry else entry for entry in cfg.rewards]
    if "math" in names and importlib.util.find_spec("math_verify") is None:
        raise ValueError("the reward 'math' needs math-verify: pip install math-verify")
    if cfg.kernels == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError("kernels = 'triton' needs Triton: pip install triton, or --kernels=auto")
    if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tensorboard is switched on and not installed: pip install tensorboard")
    if not cfg.wandb:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb is switched on and not installed: pip install wandb, or leave out --wandb")
    if cfg.wandb == "online" and not knows_wandb_key():
        raise ValueError("wandb = 'online' needs a key: type wandb login first, or use --wandb=offline")


def knows_wandb_key() -> bool:
    """Whether wandb would find a key: in the environment, or where `wandb login` writes it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def hub(cfg):
    """Somebody is logged in where the model is to go, and its name can be one."""
    if not cfg.push_to_hub:
        return
    import huggingface_hub

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", cfg.push_to_hub):
        raise ValueError(f"push_to_hub = {cfg.push_to_hub!r:.80} is no repository: write it as user/name")
    if not huggingface_hub.get_token():
        raise ValueError("push_to_hub needs a token: type hf auth login first, or set HF_TOKEN")


def device(cfg):
    """The device is there."""
    kind, _, index = cfg.device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {cfg.device!r}, but torch sees no GPU here: use --device=cpu")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise ValueError(
            f"device = {cfg.device!r}, and torch sees {torch.cuda.device_count()} GPUs, counted from cuda:0"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device = 'mps', but torch has no Metal here: use --device=cpu")


def out_dir(cfg):
    """The run's folder can be one: it is no file, and neither is a folder above it."""
    if "\0" in cfg.out_dir:
        raise ValueError("out_dir has a zero character in it: choose another, --out_dir=PATH")
    path = Path(cfg.out_dir)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"out_dir = {cfg.out_dir!r}: {part} is a file, choose another, --out_dir=PATH")


def schedules(cfg):
    """Functions of the step give what their keys take."""
    for step in (1, max(1, cfg.steps)):
        if callable(cfg.temperature):
            value = called("temperature", cfg.temperature, step)
            if type(value) not in (int, float) or not 0 < value <= 100:
                raise ValueError(f"temperature gave {value!r:.40} at step {step}: a number above 0 is wanted")
        if cfg.reward_weights is not None:
            weights = called("reward_weights", cfg.reward_weights, step)
            good = isinstance(weights, (list, tuple)) and all(type(w) in (int, float) for w in weights)
            if not good or len(weights) != len(cfg.rewards):
                raise ValueError(
                    f"reward_weights gave {weights!r:.80} at step {step}: "
                    f"{len(cfg.rewards)} numbers are wanted, one for each of `rewards`"
                )


def environment(cfg):
    """The environment can be made and asked, and a row has room for more than one turn."""
    names = [entry[0] if isinstance(entry, (tuple, list)) and entry else entry for entry in cfg.rewards]
    env = turns.resolve(cfg.env)
    name = cfg.env if isinstance(cfg.env, str) else data.name_of(cfg.env)
    if env is None:
        if "env" in names:
            raise ValueError(
                "the reward 'env' is what an environment says that a row is worth, and there is none: "
                f"give env, one of {', '.join(turns.ENVS)} or your own (docs/turns.md)"
            )
        return
    if inspect.isclass(env) and not callable(getattr(env, "step", None)):
        raise ValueError(f"the environment {name} is a class without step(said): add one (docs/turns.md)")
    if inspect.isclass(env):
        takes(f"the environment {name}", env, ["row"])
        bound = isinstance(inspect.getattr_static(env, "step"), (staticmethod, classmethod))
        takes(f"step of the environment {name}", env.step, ["said"] if bound else ["self", "said"])
    else:
        takes(f"the environment {name}", env, ["row", "said"])
    if "env" in names and not (inspect.isclass(env) and callable(getattr(env, "reward", None))):
        raise ValueError(
            f"the reward 'env' asks the environment's reward(), and {name} has none: "
            "make it a class with reward(), or name another reward"
        )
    wrong = [end for end in cfg.turn_ends if not isinstance(end, str) or not end]
    if wrong:
        raise ValueError(f"turn_ends has {wrong[0]!r}: it takes texts of a character or more, ('</tool>',)")
    if 0 < cfg.max_context <= cfg.max_new_tokens:
        raise ValueError(
            f"max_context = {cfg.max_context} is of a prompt, all turns and their replies, and "
            f"max_new_tokens = {cfg.max_new_tokens} is of the turns alone: give max_context more, or 0"
        )


def takes(what: str, function, arguments: list[str]):
    """ValueError where a function cannot be called with so many arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        given = ", ".join(name for name in arguments if name != "self")
        raise ValueError(f"{what} must take ({given}): it takes {inspect.signature(function)}") from None


def called(key: str, function, step: int):
    try:
        return function(step)
    except Exception as error:  # the config's own code, which may raise anything
        raise ValueError(f"{key} raised {type(error).__name__} at step {step}: {error}") from error


# ------------------------------------------------------------------------------------------- the model
def shape_of(cfg) -> Shape | None:
    """The sizes of the model, where they can be read without a download."""
    if cfg.scratch is not None:
        if not cfg.alphabet:
            raise ValueError("scratch needs an alphabet: the characters that its tokenizer is to know")
        special = dict(model_type="llama", vocab_size=len(cfg.alphabet) + 2)
        return Shape(special | cfg.scratch)
    if not cfg.model:
        raise ValueError("model is empty: give a folder, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct")
    return shape_in(cfg.model)


def teacher_shape_of(cfg) -> Shape | None:
    """The sizes of the model that the key `reference` names; None where it names none, or a hub id."""
    return shape_in(cfg.reference) if cfg.reference else None


def shape_in(place: str) -> Shape | None:
    """The sizes of a model in a folder, a run's or an adapter's; None for a hub id."""
    path = Path(newest_of_run(place))
    if (path / "adapter_config.json").is_file():
        path = Path(json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"])
    if not (path / "config.json").is_file():
        return None  # a hub id, or a folder that policy.find_model refuses
    return Shape(json.loads((path / "config.json").read_text()))


def model(cfg):
    """Rank, targets, context and adapter fit the model, as far as its config.json says."""
    if cfg.adapter and not (Path(cfg.adapter) / "adapter_config.json").is_file():
        raise ValueError(f"adapter = {cfg.adapter!r} is no folder of a PEFT adapter: no adapter_config.json")
    known = configs.FIELDS["lora_targets"].default
    wrong = [name for name in cfg.lora_targets if name not in known]
    if cfg.lora_rank and (wrong or not cfg.lora_targets):
        which = f"has {wrong[0]!r}" if wrong else "is empty"
        raise ValueError(f"lora_targets {which}: it takes some of {', '.join(known)}")
    shape = shape_of(cfg)
    if shape is None:
        return
    if cfg.lora_rank > shape.D:
        raise ValueError(
            f"lora_rank = {cfg.lora_rank} is above the model's width, {shape.D}: 8 to 64 are usual"
        )
    for key in ("max_new_tokens", "eval_max_new_tokens"):
        if getattr(cfg, key) >= shape.context:
            raise ValueError(
                f"{key} = {getattr(cfg, key)} leaves no room for a prompt: "
                f"the model's context is {shape.context} tokens"
            )
    teacher = teacher_shape_of(cfg)
    if teacher and cfg.max_new_tokens >= teacher.context:
        raise ValueError(
            f"max_new_tokens = {cfg.max_new_tokens} leaves no room for a prompt before the teacher: "
            f"the context of reference = {cfg.reference!r:.80} is {teacher.context} tokens"
        )


def room(cfg):
    """Weights, optimiser and the tokens of a step fit into the machine, by a count that leaves things out."""
    rows = cfg.prompts_per_step * cfg.group_size
    tokens, room = rows * memory.own_tokens(cfg), host_bytes()
    if tokens * BYTES_A_TOKEN > room:
        raise ValueError(
            f"a step of {rows:,} completions of up to {memory.own_tokens(cfg):,} tokens needs about "
            f"{tokens * BYTES_A_TOKEN / 1e9:,.0f} GB beside the model, and {room / 1e9:.0f} GB are there: "
            "lower prompts_per_step, group_size or max_new_tokens"
        )
    shape = shape_of(cfg)
    if shape is None:
        return
    on_gpu = cfg.device.startswith("cuda") or (cfg.device == "auto" and torch.cuda.is_available())
    if on_gpu:
        room = torch.cuda.get_device_properties(0).total_memory
    processes = int(os.environ.get("WORLD_SIZE", 1)) if cfg.shard else 1
    merged = cfg.lora_merge == "on"
    options = dict(shared_by=processes, teacher=teacher_shape_of(cfg))
    held = memory.held_always(cfg, shape, "cuda" if on_gpu else "cpu", merged, **options)
    trained = memory.trained_numbers(cfg, shape)
    need = memory.total(held) + 4 * trained // processes  # and a gradient
    if processes > 1:  # whole are only the weights that the sampler gathers
        need += memory.parameters(shape) * memory.number_width(cfg, "cuda" if on_gpu else "cpu")
    if need > room:
        weights = memory.parameters(shape)
        raise ValueError(
            f"a model of {weights / 1e9:.2f} billion weights, with {trained / 1e9:.2f} billion to train, "
            f"needs {need / 1e9:,.0f} GB, and {room / 1e9:.0f} GB are there: take a smaller model, or see "
            "what fits with python plan.py --table"
        )
    away = memory.optimiser_on_host(cfg, shape) if on_gpu else 0
    if away > host_bytes():
        raise ValueError(
            f"offload_optimizer = True needs {away / 1e9:,.0f} GB of the host's memory, and "
            f"{host_bytes() / 1e9:.0f} GB are there: take a smaller model, or --lora_rank=32"
        )


def host_bytes() -> float:
    """The machine's memory, or what the container that we are in may have of it."""
    room = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        room = min(room, float(limit.read_text()))
    return room


# ---------------------------------------------------------------------------------- rewards and columns
def columns(cfg, functions, task):
    """Every reward finds the columns it wants in the task's rows. functions: rewards.resolve's list."""
    row = task.batch(0, 1, cfg.seed)[0]
    known = dict(completions=[""], prompts=[row["prompt"]], group_size=1, completion_ids=[[0]])
    logged = rewarding.Logged(1)
    known |= dict(trainer_state=None, log_extra=logged.log_extra, log_metric=logged.log_metric)
    known |= dict(max_new_tokens=1) | data.columns([row], 1)
    env = turns.resolve(cfg.env)
    if env is not None:
        known["turns"] = [[]]
    if hasattr(env, "reward"):
        known["env_reward"] = [None]
    for label, function, _ in functions:
        try:
            rewarding.arguments(label, function, known)
        except TypeError as error:
            raise ValueError(f"reward {label!r} cannot be called: {error}") from error
