"""On-policy distillation: the trained model of configs/arithmetic.py teaches the model it started from.

python train.py configs/arithmetic.py && python train.py configs/distil.py

No reward is trained on. The student draws its own answers, and at each of their tokens the teacher says how
likely it holds every word. RL gives a whole answer one bit; this gives each of its 27 tokens a distribution.
docs/distillation.md has the formula and the figures.
"""

model = "out/arithmetic/start"  # the warmed-up model that RL began with
reference = "out/arithmetic"  # the teacher: a run's folder is its newest checkpoint
beta, kl = 1.0, "full"  # the loss is the exact KL(student || teacher) at every token that the student drew

task, task_options = "arithmetic", dict(style="chars", digits=3)
rewards = [("arithmetic", 0.0)]  # weight 0: shown, and what held-out answers are graded with

lora_rank = 0
prompts_per_step, group_size = 32, 1  # nothing is compared within a group, so one answer a prompt is enough
max_new_tokens, temperature = 30, 0.7
steps, lr, warmup_steps = 33, 2e-4, 3
eval_every, eval_problems = 11, 500
save_every, show_every = 0, 11
