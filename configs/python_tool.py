"""GSM8K with Python as a tool: the model may write programs, and sees what they print. One GPU of 24 GB.

    python train.py configs/python_tool.py

A message with a Python block is run in the sandbox and its output comes back as the next message; a message
without one is the answer. sandbox = "strict" refuses to start on a machine that cannot shut a program in.
"""

model = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
task = "gsm8k"
env, env_role, sandbox = "python_tool", "user", "strict"
system_prompt = (
    "You can run Python: write one block between ```python and ``` that prints what you want to know, and "
    "end your message. You are then shown what it prints. When you know the answer, reply without a program "
    "and put the final number within \\boxed{}."
)
rewards = [("gsm8k_lenient", 1.0), ("gsm8k", 0.0)]

prompts_per_step, group_size = 16, 16
max_new_tokens, max_context, max_turns = 512, 1536, 4
temperature = 1.0
beta, clip_high = 0.0, 0.28
lora_rank, lora_alpha = 32, 64.0
steps, lr, warmup_steps = 300, 4e-5, 10
eval_every, eval_problems, save_every = 100, 400, 100
