"""R1's discovery on a laptop: a model of under a million weights finds out that thinking pays.

    python train.py configs/arithmetic.py

It starts from random numbers. The supervised warm-up shows two ways to add three-digit numbers: first the sum
worked digit by digit, then mostly the bare answer, which is too hard to learn in a minute. After it the model
answers straight away and is wrong. GRPO rewards right answers and nothing else, and the model learns to work.
"""


def worked(completions, **_):
    return [float("<" in c) for c in completions]


scratch = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    rope_theta=30.0,  # 40 positions: fast waves tell them apart
    initializer_range=0.05,
    tie_word_embeddings=True,
)
alphabet = "0123456789+=<>,_^"
task = "arithmetic"
# 150 steps of worked sums, so that every seed knows how, and then 18 % of them. The model begins its answer
# with the likeliest character: at 28 % "<" is about as likely as the likeliest digit, and the seed decides.
task_options = dict(style="chars", digits=3, worked_first=4800, worked_share=0.18)
rewards = [("arithmetic", 1.0), (worked, 0.0)]  # weight 0: shown, not rewarded

sft_steps, sft_batch, sft_lr = 360, 32, 2e-3
lora_rank = 0
prompts_per_step, group_size, micro_tokens = 16, 8, 16384
max_new_tokens, temperature = 30, 0.7
steps, lr, warmup_steps = 100, 5e-5, 5
eval_every, eval_problems = 25, 500
save_every, show_every = 50, 25
