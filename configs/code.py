"""Python problems, graded by running the answers in the sandbox: one GPU of 24 GB.

    python train.py configs/code.py                                  # the 40 problems of configs/code.jsonl
    python train.py configs/code.py --train_file=mbpp.jsonl          # MBPP's own columns will do

The 40 problems are enough to see it work. sandbox = "strict" refuses to start on a machine that cannot shut a
program in; "auto" takes what there is, and the run's first lines say what that is.
"""

model = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
task = "code"
sandbox = "strict"
system_prompt = (
    "Write Python. Answer with one block between ```python and ```, with no examples of use in it."
)
rewards = [("code", 1.0)]

prompts_per_step, group_size = 8, 16
max_new_tokens, temperature = 400, 1.0
reward_overlap = True  # programs run while other groups are sampled
beta = 0.0
lora_rank, lora_alpha = 32, 64.0
steps, lr, warmup_steps = 200, 1e-5, 10
eval_every, eval_problems, save_every = 50, 100, 100
