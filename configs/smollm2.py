"""SmolLM2-135M-Instruct learns easy sums asked in words: a real chat model on a laptop CPU, about twenty minutes.

    python train.py configs/smollm2.py                                    # downloads the model from the hub
    python train.py configs/smollm2.py --model=models/smollm2-135m        # or takes a checkpoint folder
"""
model = "HuggingFaceTB/SmolLM2-135M-Instruct"
task = "arithmetic"
task_options = dict(style="words", low=1, high=9)
rewards = [("arithmetic_lenient", 1.0)]

prompts_per_step, group_size, micro_tokens = 8, 8, 4096
max_new_tokens, temperature = 24, 1.0
beta = 0.0
lora_rank, lora_alpha = 16, 32.0
steps, lr, warmup_steps = 60, 1e-4, 5
eval_every, eval_problems, save_every, show_every = 20, 50, 20, 5
