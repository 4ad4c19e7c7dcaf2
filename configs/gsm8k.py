"""Qwen2.5-0.5B-Instruct on GSM8K with LoRA: one 24 GB GPU.

    python train.py configs/gsm8k.py

Qwen2.5's instruct models, the Coder ones too, write \\boxed{} when asked and hardly ever ####. So the prompt
asks for what they know, the reward takes the last number wherever it stands, and the strict form is shown
beside it.
"""

model = "Qwen/Qwen2.5-0.5B-Instruct"
task = "gsm8k"
system_prompt = "Please reason step by step, and put your final answer within \\boxed{}."
rewards = [("gsm8k_lenient", 1.0), ("gsm8k", 0.0)]

prompts_per_step, group_size = 16, 16
# With 320 a third of the first answers of the Coder model were cut (bench/results, H100).
max_new_tokens, temperature = 512, 1.0
beta, clip_high = 0.0, 0.28
lora_rank, lora_alpha = 32, 64.0
steps, lr, warmup_steps = 300, 4e-5, 10
eval_every, eval_problems, save_every = 100, 400, 100
