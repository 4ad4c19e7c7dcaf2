"""What a person is told before anything runs: how a script is called, every key, and where a name is ours.

    python train.py --help

The keys and their comments are read from config.py's own lines, so this page cannot differ from them.
ELSEWHERE has the names that other trainers use (TRL, nanoGPT, verl, PEFT), each with what it is here.
"""

import difflib
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent

# What a person types who comes from elsewhere -> what it is here.
ELSEWHERE = {
    # TRL's GRPOConfig and Hugging Face's TrainingArguments
    "model_name_or_path": "model",
    "model_id": "model",
    "dataset": "task, or train_file for your own JSONL",
    "dataset_name": "task, or train_file for your own JSONL",
    "train_dataset": "train_file",
    "eval_dataset": "eval_file",
    "reward_funcs": "rewards",
    "output_dir": "out_dir",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup_steps, counted in steps",
    "max_steps": "steps",
    "num_train_epochs": "steps, counted in updates; `epochs` are passes over a step's completions",
    "per_device_train_batch_size": "prompts_per_step (prompts, not completions) and micro_tokens",
    "train_batch_size": "prompts_per_step (prompts, not completions)",
    "per_device_eval_batch_size": "slots, the rows that are decoded at once",
    "gradient_accumulation_steps": "micro_tokens: tokens of one forward and backward, with the same gradient",
    "generation_batch_size": "prompts_per_step times group_size",
    "num_generations": "group_size",
    "max_completion_length": "max_new_tokens",
    "max_length": "max_new_tokens",
    "max_prompt_length": "nothing: a prompt is never cut",
    "num_iterations": "epochs",
    "steps_per_generation": "minibatches",
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
    "delta": "dual_clip",
    "loss_type": "objective and aggregate, or a preset (dapo, dr_grpo, ..)",
    "importance_sampling_level": "objective (gspo is the sequence's)",
    "scale_rewards": "advantage",
    "mask_truncated_completions": "mask_truncated",
    "top_entropy_quantile": "top_entropy",
    "sync_ref_model": "ref_sync_every",
    "ref_model_sync_steps": "ref_sync_every",
    "ref_model_mixup_alpha": "ref_mix",
    "vllm_importance_sampling_cap": "mismatch_clip",
    "ref_model": "reference",
    "teacher_model": "reference",
    "teacher_model_name_or_path": "reference",
    "lmbda": "nothing: every completion is the policy's own, which is lmbda = 1",
    "gkd_logits_topk": "kl_top",
    "use_vllm": "nothing: the sampler is part of the trainer",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "logging_steps": "nothing: every step is logged",
    "save_total_limit": "keep",
    "resume_from_checkpoint": "resume",
    "report_to": "wandb, or tensorboard",
    "hub_model_id": "push_to_hub",
    "run_name": "out_dir, whose last word names the run",
    "bf16": "dtype, bfloat16",
    "fp16": "dtype, float16",
    "torch_dtype": "dtype",
    "gradient_checkpointing": "checkpointing",
    "load_in_4bit": "base, nf4",
    "optim": "nothing: it is AdamW; optimizer_bits=8 is its 8-bit form, offload_optimizer its paged one",
    # environments and tools, as TRL, verl and verifiers spell them
    "tools": "env, a function (row, said) that reads the call and gives its result",
    "environment": "env",
    "environment_factory": "env, a class with step(said) and perhaps reward()",
    "rollout_func": "env: the sampler stays, and between the turns the environment answers",
    "interaction_config_path": "env, a class in the config file itself",
    "tool_config_path": "env, a function in the config file itself",
    "max_tool_calling_iterations": "max_turns, one more than calls of a tool",
    "max_assistant_turns": "max_turns",
    "max_user_turns": "max_turns, which counts the model's",
    "max_env_turns": "max_turns, which counts the model's",
    "max_tool_response_length": "nothing: what is too long ends the row (max_context); an env cuts by itself",
    "max_parallel_calls": "nothing: one environment a row, and all rows' at once",
    "max_seq_len": "max_context, the most tokens of a row",
    "max_model_len": "max_context, the most tokens of a row",
    "mask_env_responses": "nothing: replies are never trained on",
    # PEFT
    "r": "lora_rank",
    "lora_r": "lora_rank",
    "use_peft": "lora_rank, above 0",
    "target_modules": "lora_targets",
    "lora_target_modules": "lora_targets",
    # nanoGPT
    "batch_size": "prompts_per_step, and micro_tokens for what fits into memory",
    "max_iters": "steps",
    "num_steps": "steps",
    "eval_interval": "eval_every",
    "eval_iters": "eval_problems",
    "log_interval": "nothing: every step is logged",
    "init_from": "model, or resume",
    "warmup_iters": "warmup_steps",
    "decay_lr": "schedule",
    "grad_clip": "max_grad_norm",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "block_size": "max_new_tokens",
    "dropout": "lora_dropout",
    "wandb_log": "wandb, online or offline",
    "dataset_dir": "data_dir",
    "compile": "nothing: kernels and cuda_graphs are what makes it fast",
    # PPO, as TRL and others spell it
    "vf_coef": "nothing: a group's mean stands for the value model (group_size)",
    "cliprange_value": "nothing: a group's mean stands for the value model (group_size)",
    "gamma": "nothing: one advantage a completion (advantage)",
    "lam": "nothing: one advantage a completion (advantage)",
    "gae_lambda": "nothing: one advantage a completion (advantage)",
    "whiten_rewards": "advantage: group, batch or none",
    "cliprange": "clip_low and clip_high",
    "num_ppo_epochs": "epochs",
    "num_mini_batches": "minibatches",
    "missing_eos_penalty": "mask_truncated, or the reward overlong",
    "response_length": "max_new_tokens",
    "reward_model_path": "rewards: functions, one of which may ask a model (configs/judge.py)",
    # verl, OpenRLHF and papers
    "kl_coef": "beta",
    "init_kl_coef": "beta",
    "kl_loss_coef": "beta",
    "rollout_n": "group_size",
    "n_samples_per_prompt": "group_size",
    "clip_range": "clip_low and clip_high",
    "clip_eps": "clip_low and clip_high",
    "eps_clip": "clip_low and clip_high",
    "max_tokens": "max_new_tokens",
    "generate_max_len": "max_new_tokens",
    "actor_learning_rate": "lr",
    "rollout_batch_size": "prompts_per_step",
    "num_epochs": "steps, counted in updates",
    "gpus": "torchrun --nproc_per_node=N",
    "num_gpus": "torchrun --nproc_per_node=N",
}

SCRIPTS = {
    "train.py": "python train.py configs/NAME.py [--key=value ..]",
    "eval.py": "python eval.py configs/NAME.py [--model=FOLDER_OR_HUB_ID] [--key=value ..]",
    "sft.py": "python sft.py configs/NAME.py [--key=value ..]",
}


def asked_for(argv: list[str]) -> bool:
    """Whether the words ask for help rather than for a run."""
    return not argv or any(word in ("-h", "--help", "-help", "help", "--usage") for word in argv)


def page(script: str, argv: list[str], options: dict) -> str:
    """The usage of a script; with --help every key, its default and its comment; without, how to get them.

    options: the defaults that config.py takes from the objectives of loss.py.
    """
    lines = [f"usage: {SCRIPTS[script]}", "", "configs at hand:"]
    for path in config_files():
        title = path.read_text().split('"""')[1].splitlines()[0]
        lines.append(f"  {'configs/' + path.name:28}{title}")
    if argv:
        lines += ["", "keys, with their defaults; a config file sets them, and --key=value here wins:"]
        lines += keys(options)
    else:
        lines += ["", f"python {script} --help lists every key"]
    return "\n".join(lines)


def config_files() -> list[Path]:
    return sorted((HERE / "configs").glob("*.py"))


def keys(options: dict) -> list[str]:
    """One line a key, its group above it, from the lines of config.py's dataclass."""
    source = (HERE / "config.py").read_text()
    body = source.partition("class Config:\n")[2].partition("\n\n\n")[0]
    lines = []
    for line in body.splitlines():
        group = re.fullmatch(r"    # -- (.*)", line)
        field = re.fullmatch(r"    (\w+): .*? = (.*?)(?:  # (.*))?", line)
        if group:
            lines += ["", group.group(1)]
        elif field:
            name, default, comment = field.groups()
            lines.append(f"  {'--' + name + '=' + plain(default, options):38} {comment or ''}".rstrip())
        else:
            lines.append("  " + line.strip())  # a comment above its key
    return lines


def plain(default: str, options: dict) -> str:
    """A default as one would type it."""
    default = re.sub(r'OPTIONS\["(\w+)"\]', lambda match: str(options[match.group(1)]), default)
    default = re.sub(r"field\(default_factory=(?:lambda: )?(.*)\)", r"\1", default)
    return {"dict": "{}"}.get(default, default.strip('"'))


def find_config(path: str) -> Path:
    """The file that a word on the command line means: itself, with .py, or in configs/.

    ValueError with the nearest of the configs at hand.
    """
    given = Path(path)
    for folder in (Path(), HERE, HERE / "configs"):
        for name in (given, given.with_name(given.name + ".py")):
            if (folder / name).is_file():
                return folder / name
    names = [file.stem for file in config_files()]
    near = difflib.get_close_matches(given.stem, names, 1, 0.5)
    hint = f"did you mean configs/{near[0]}.py?" if near else f"there are configs/{'.py, '.join(names)}.py"
    raise ValueError(f"there is no config file {path}; {hint}")
