"""A reward of your own: copy this file.

    python train.py configs/custom_reward.py

A real chat model learns on a laptop CPU to give short answers that name a colour.

A reward gets the completions, the prompts and every column of the rows (here `answer`), each as a list
with one entry a completion, and returns as many numbers, or None for what cannot be scored. It may be
async. Weight 0: shown, and not trained on. A name is a reward of rewards.py.
"""

_COLOURS = {"red", "green", "blue", "yellow", "black", "white"}


def names_a_colour(completions, **_):
    return [
        float(any(word.strip(".,!") in _COLOURS for word in text.lower().split())) for text in completions
    ]


def short(completions, completion_ids, max_new_tokens, **_):
    return [1 - len(ids) / max_new_tokens for ids in completion_ids]


model = "HuggingFaceTB/SmolLM2-135M-Instruct"
task = "arithmetic"
task_options = dict(style="words", low=1, high=9, held_out=0.3)
rewards = [(names_a_colour, 1.0), (short, 0.2), ("arithmetic_lenient", 0.0)]

prompts_per_step, group_size, micro_tokens = 4, 8, 2048
max_new_tokens = 24
lora_rank, lora_alpha = 16, 32.0
steps, lr = 40, 1e-4
eval_every, eval_problems, show_every = 20, 20, 5
