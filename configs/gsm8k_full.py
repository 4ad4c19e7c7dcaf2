"""Qwen2.5-1.5B-Instruct on GSM8K, every weight trained: one 80 GB GPU.

    python train.py configs/gsm8k_full.py

fp32 master weights and AdamW's two moments live in the optimiser (16 bytes a weight); without a KL term there
is no second copy of the model.
"""

model = "Qwen/Qwen2.5-1.5B-Instruct"
task = "gsm8k"
system_prompt = (
    "Solve the problem step by step. "
    "End with a line that has #### and then the final number, and nothing after it."
)
rewards = [("gsm8k", 1.0), ("gsm8k_lenient", 0.0)]

lora_rank = 0
prompts_per_step, group_size = 32, 16
max_new_tokens, temperature = 400, 1.0
beta, clip_high = 0.0, 0.28  # DAPO's settings, arXiv:2503.14476
steps, lr, warmup_steps = 300, 1e-6, 10
eval_every, eval_problems, save_every = 50, 400, 100
