"""MATH with math-verify: one GPU of 24 GB.

    pip install math-verify
    python train.py configs/math.py --train_file=math/train.jsonl --eval_file=math/test.jsonl

Each line of the files, in data_dir or where they are named, has a `problem` and an `answer` (or
a `solution` that ends in \\boxed{answer}). Dr. GRPO's choices: no division by the spread or by
the length (arXiv:2503.20783).
"""

model = "Qwen/Qwen2.5-1.5B-Instruct"
task, train_file = "math", "math/train.jsonl"
system_prompt = "Please reason step by step, and put your final answer within \\boxed{}."
rewards = [("math", 1.0)]

prompts_per_step, group_size = 16, 16
max_new_tokens, temperature = 1024, 1.0
advantage, aggregate, beta = "none", "constant", 0.0
lora_rank, lora_alpha = 32, 64.0
steps, lr, warmup_steps = 300, 1e-5, 10
eval_every, eval_problems, save_every = 50, 200, 100
