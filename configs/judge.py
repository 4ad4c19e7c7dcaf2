"""Answers graded by another model, behind any endpoint of OpenAI's form: one GPU of 24 GB.

    vllm serve Qwen/Qwen2.5-7B-Instruct                 # or llama.cpp, Ollama, a paid service
    python train.py configs/judge.py --train_file=prompts.jsonl

The server's key, if it wants one, is taken from OPENAI_API_KEY. A judge likes long answers, and a policy
finds that out: the length is held down by a reward of its own. Read rollouts/.
"""

from functools import partial

from rewards import judge

model = "Qwen/Qwen2.5-0.5B-Instruct"
task, train_file = (
    "jsonl",
    "prompts.jsonl",
)  # each line {"prompt": ..}, and "answer" where there is a reference
rewards = [
    (partial(judge, url="http://localhost:8000/v1", model="Qwen/Qwen2.5-7B-Instruct"), 1.0),
    ("overlong", 0.5),
]
reward_timeout, reward_overlap = 600.0, True

prompts_per_step, group_size = 8, 8
max_new_tokens, temperature = 300, 1.0
beta = 0.02
lora_rank, lora_alpha = 32, 64.0
steps, lr, warmup_steps = 200, 1e-5, 10
eval_every, eval_problems, save_every = 50, 50, 100
