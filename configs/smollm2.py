"""SmolLM2-135M-Instruct learns easy sums asked in words: a laptop CPU, about twenty minutes.

python train.py configs/smollm2.py                                    # downloads the model from the hub
python train.py configs/smollm2.py --model=models/smollm2-135m        # or takes a checkpoint folder
"""

model = "HuggingFaceTB/SmolLM2-135M-Instruct"
task = "arithmetic"
task_options = dict(style="words", low=1, high=9, held_out=0.3)  # 81 pairs: a tenth would be 7 problems
rewards = [("arithmetic_lenient", 1.0)]

prompts_per_step, group_size, micro_tokens = 6, 8, 2048
max_new_tokens, temperature = 16, 1.0
beta = 0.0
lora_rank, lora_alpha = 16, 32.0
steps, lr, warmup_steps = 50, 1e-4, 5
eval_every, eval_problems = 25, 50
save_every, show_every = 25, 5
