"""Qwen2.5-0.5B-Instruct on GSM8K with LoRA: one 24 GB GPU.

    python train.py configs/gsm8k.py

Group size, temperature and beta are DeepSeekMath's choices scaled to one GPU (arXiv:2402.03300, section 4.2);
LoRA takes about ten times the rate of full fine-tuning.
"""

model = "Qwen/Qwen2.5-0.5B-Instruct"
task = "gsm8k"
system_prompt = (
    "Solve the problem step by step. "
    "End with a line that has #### and then the final number, and nothing after it."
)
rewards = [("gsm8k", 1.0), ("gsm8k_lenient", 0.0)]

prompts_per_step, group_size = 16, 16
max_new_tokens, temperature = 320, 1.0
beta = 0.02
lora_rank, lora_alpha = 32, 64.0
steps, lr, warmup_steps = 400, 2e-5, 10
eval_every, eval_problems, save_every = 100, 400, 100
