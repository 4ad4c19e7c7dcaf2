"""Countdown: make a target of three or four numbers. Endless problems made here, one GPU of 24 GB.

    python train.py configs/countdown.py

The task of TinyZero (github.com/Jiayi-Pan/TinyZero): the base model guesses, and learns to try
and to check. Accuracy is what counts; the small reward for the form alone, which is easy, makes
the first steps teach something.
"""

model = "Qwen/Qwen2.5-1.5B-Instruct"
task = "countdown"
task_options = dict(least=3, most=4, high=25, largest=100)
system_prompt = (
    "Think step by step between <think> and </think>, then give the answer between <answer> and </answer>."
)
rewards = [("countdown", 1.0), ("format", 0.1)]

prompts_per_step, group_size = 16, 16
max_new_tokens, temperature = 512, 1.0
beta, clip_high = 0.0, 0.28
lora_rank, lora_alpha = 32, 64.0
steps, lr, warmup_steps = 300, 1e-5, 10
eval_every, eval_problems, save_every = 50, 200, 100
