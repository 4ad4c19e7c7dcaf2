"""GSM8K with a calculator: the model writes <calc>48/2</calc>, and 24 comes back. One 24 GB GPU.

    python train.py configs/gsm8k_calculator.py

The reply is given, and not drawn: the model sees it and is not trained on it. Asked in the prompt alone,
Qwen2.5-Coder-0.5B does not use it, so a short warm-up shows it: GSM8K's solutions have notes for one. Nothing
rewards the calculator itself; turns/mean in metrics.jsonl shows how often it is used.
"""

model = "Qwen/Qwen2.5-0.5B-Instruct"
task = "gsm8k"
task_options = dict(calculator=True)
env, env_role, turn_ends = "calculator", "", ("</calc>",)
system_prompt = (
    "Please reason step by step. For each calculation write an expression between <calc> and </calc>: its "
    "value is written behind it, and you go on from there. For example: 48 clips / 2 = <calc>48/2</calc>24 "
    "clips. End with #### and the final number."
)
rewards = [("gsm8k_lenient", 1.0), ("gsm8k", 0.0)]

sft_steps, sft_batch, sft_lr = 60, 16, 1e-5
prompts_per_step, group_size = 16, 16
max_new_tokens, max_context, max_turns = 512, 1024, 12
temperature = 1.0
beta, clip_high = 0.0, 0.28
lora_rank, lora_alpha = 32, 64.0
steps, lr, warmup_steps = 300, 4e-5, 10
eval_every, eval_problems, save_every = 100, 400, 100
