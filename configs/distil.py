"""On-policy distillation: the model of configs/arithmetic.py teaches its own warm-up model, token by token.

    python train.py configs/arithmetic.py && python train.py configs/distil.py
"""

model, reference = "out/arithmetic/start", "out/arithmetic"
task, task_options = "arithmetic", dict(style="chars", digits=3)
rewards = [("arithmetic", 0.0)]
beta, kl = 1.0, "full"
lora_rank = 0
prompts_per_step, group_size, micro_tokens = 16, 8, 16384
max_new_tokens, temperature = 30, 0.7
steps, lr, warmup_steps = 33, 1e-3, 3
eval_every, eval_problems = 11, 500
save_every, show_every = 50, 11
