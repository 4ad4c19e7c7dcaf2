"""A conversation on a laptop: a model of under half a million weights finds out how to guess a number.

    python train.py configs/guess.py

It says "16?", the environment replies ">" or "<", and so on until it is right: 32:16?>24?<20?. The warm-up
shows games that know the rules and are played badly. GRPO rewards few guesses and nothing else, and the model
learns to halve what is left. docs/turns.md has its games and its curve.
"""

scratch = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=96,
    rope_theta=100.0,
    initializer_range=0.05,
    tie_word_embeddings=True,
)
alphabet = "0123456789:?<>"
task, env = "guess", "guess"
task_options = dict(high=32, walkers=0.7)
env_role, turn_ends, max_turns = "", ("?",), 20
rewards = [("env", 1.0)]

sft_steps, sft_batch, sft_lr = 300, 64, 2e-3
lora_rank = 0
prompts_per_step, group_size, micro_tokens = 32, 8, 16384  # every number once a step
max_new_tokens, max_context, temperature = 60, 90, 1.0
steps, lr, warmup_steps = 80, 3e-4, 5
eval_every, eval_problems = 20, 32
save_every, show_every = 0, 20
