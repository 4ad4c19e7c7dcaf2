"""GSM8K with a calculator: the model writes <calc>48/2</calc>, and 24 comes back. One 24 GB GPU.

    python train.py configs/gsm8k_calculator.py

The reply is given, and not drawn: the model sees it and is not trained on it. Nothing rewards the calculator
itself; it is used where it helps. turns/mean in metrics.jsonl shows how often.
"""

model = "Qwen/Qwen2.5-0.5B-Instruct"
task = "gsm8k"
env, env_role, turn_ends = "calculator", "", ("</calc>",)
system_prompt = (
    "Please reason step by step. For each calculation write an expression between <calc> and </calc>: its "
    "value is written behind it, and you go on from there. For example: 48 clips / 2 = <calc>48/2</calc>24 "
    "clips. Put your final answer within \\boxed{}."
)
rewards = [("gsm8k_lenient", 1.0), ("gsm8k", 0.0)]

prompts_per_step, group_size = 16, 16
max_new_tokens, max_context, max_turns = 512, 1024, 12
temperature = 1.0
beta, clip_high = 0.0, 0.28
lora_rank, lora_alpha = 32, 64.0
steps, lr, warmup_steps = 300, 4e-5, 10
eval_every, eval_problems, save_every = 100, 400, 100
