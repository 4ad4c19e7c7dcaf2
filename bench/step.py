"""One GRPO step, phase by phase, against TRL's GRPOTrainer at the same shapes: seconds, ratios and peak memory.

    python bench/step.py MODEL_FOLDER [--lora=16] [--beta=0.04] [--prompts=4 --group=8 --plen=64 --new=64] [--threads=1] [--steps=2] [--dtype=float32]

Each side runs in a process of its own, so that its peak memory is its own, one after the other. Every completion has exactly --new tokens; one warm-up step is
dropped and the median of the others counts. Both take a group's rows as a micro-batch (for TRL, pip install trl peft, the size its users take).
--dtype: float32; bfloat16, the weights of both; autocast, TRL's fp32 weights under bf16 autocast and our bf16 weights with fp32 masters in the optimiser.
The floor is what the multiplications of the step alone would take at the speed of a large fp32 matmul measured on the spot.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TEXT = "The quick brown fox jumps over the lazy dog while seven wizards quietly mix bronze jugs of liquid. " * 40


def floor_seconds(model, a) -> float:
    """Multiplications of sampling, reference, forward and backward at the speed of a 1024^3 matmul."""
    x = torch.randn(1024, 1024)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start)
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not n.endswith((".A", "embed")) and ".B." not in n)
    rows = a.prompts * a.group * a.new
    stream, passes = a.prompts * a.plen + rows, 1 + bool(a.beta) + (2 if a.lora else 3)  # sampling, reference, forward and backward
    return 2 * (passes * weights * stream + (passes - 1) * model.head.numel() * rows) / (2 * 1024**3 / statistics.median(times))


def ours(a):
    import loss as losses, lora, model as models, optim, rollout
    from kernels.policy_head import policy_head

    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(a.model)(TEXT)["input_ids"]
    load = partial(models.load, a.model, dtype=torch.float32 if a.dtype == "float32" else torch.bfloat16)
    model = load()
    if a.lora:
        lora.apply(model, rank=a.lora, alpha=2 * a.lora, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    optimizer, steps = optim.AdamW(list(model.named_parameters()), lr=1e-6), []
    reference = load() if a.beta and not a.lora else model
    for step in range(a.steps + 1):
        prompts, marks = [words[i : i + a.plen] for i in range(4 * step, 4 * step + a.prompts)], [time.perf_counter()]
        out = rollout.generate(model, prompts, group_size=a.group, max_new_tokens=a.new, stop_ids=[], seed=0, step=step)
        marks.append(time.perf_counter())
        groups, ref_logp = [[out.group(b, a.group)] for b in range(a.prompts)], [None] * a.prompts
        if a.beta:
            with torch.no_grad(), lora.disabled(model):
                ref_logp = [reference.completion_logprobs([p], group)[0] for p, group in zip(prompts, groups)]
        marks.append(time.perf_counter())
        adv = losses.advantages(torch.arange(float(a.prompts * a.group)).sin().view(a.prompts, a.group))
        for b, (prompt, group) in enumerate(zip(prompts, groups)):
            hidden, packed = model.completion_hidden([prompt], group)
            old = torch.tensor([x for row in out.logprobs[b * a.group : (b + 1) * a.group] for x in row])

            def objective(logp, entropy, at):
                return losses.policy_loss(logp, old[at], adv[b], packed.rows[at], ref_logp=ref_logp[b][at] if a.beta else None, entropy=entropy, beta=a.beta,
                                          norm=a.prompts * a.group * a.new, lengths=torch.full((a.group,), a.new))
            policy_head(hidden, model.head, packed.targets, objective)[0].backward()
        optimizer.step(1e-6, max_norm=1.0)
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        steps.append(dict(zip(("sample", "reference", "update"), (b - x for x, b in zip(marks, marks[1:]))), step=marks[-1] - marks[0]))
    return steps[1:], floor_seconds(model, a)


def trl(a):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, spent, steps = AutoTokenizer.from_pretrained(a.model), defaultdict(float), []
    words = tokenizer(TEXT)["input_ids"]
    prompts = [tokenizer.decode(words[i : i + a.plen]) for i in range(16)]

    class Record(TrainerCallback):
        def on_step_begin(self, *_, **__):
            spent.clear()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            step = time.perf_counter() - self.start
            steps.append(dict(sample=spent["sample"], reference=spent["reference"], update=step - spent["sample"] - spent["reference"], step=step))

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(output_dir=folder, use_cpu=True, bf16=a.dtype != "float32", per_device_train_batch_size=a.group, gradient_accumulation_steps=a.prompts, num_generations=a.group,
                            max_completion_length=a.new, beta=a.beta, max_steps=a.steps + 1, learning_rate=1e-6, gradient_checkpointing=False, report_to="none",
                            save_strategy="no", logging_strategy="no", disable_tqdm=True, generation_kwargs=dict(min_new_tokens=a.new))
        peft = LoraConfig(r=a.lora, lora_alpha=2 * a.lora, target_modules="all-linear", task_type="CAUSAL_LM") if a.lora else None
        trainer = GRPOTrainer(AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16 if a.dtype == "bfloat16" else torch.float32), args=config, processing_class=tokenizer, peft_config=peft, callbacks=[Record()],
                              reward_funcs=lambda completions, **_: [float(len(c)) for c in completions], train_dataset=Dataset.from_dict(dict(prompt=prompts)))
        for name, phase in (("_generate_single_turn", "sample"), ("_get_per_token_logps_and_entropies", "reference")):
            setattr(trainer, name, Timed(getattr(trainer, name), phase, spent))
        trainer.train()
    return steps[1:], 0.0


class Timed:
    """A function whose wall time is added to spent[phase]; only calls without gradient count as the reference's."""

    def __init__(self, function, phase, spent):
        self.function, self.phase, self.spent = function, phase, spent

    def __call__(self, *args, **kw):
        start, counts = time.perf_counter(), self.phase == "sample" or not torch.is_grad_enabled()
        try:
            return self.function(*args, **kw)
        finally:
            self.spent[self.phase] += counts * (time.perf_counter() - start)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("--side", default="")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "autocast"))
    p.add_argument("--beta", type=float, default=0.04)
    for name, default in dict(lora=16, prompts=4, group=8, plen=64, new=64, threads=1, steps=2).items():
        p.add_argument(f"--{name}", type=int, default=default)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.side:
        steps, floor = dict(ours=ours, trl=trl)[a.side](a)
        result = {phase: statistics.median(s[phase] for s in steps) for phase in steps[0]} | dict(floor=floor, peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
        return print("RESULT" + json.dumps(result))
    results = {}
    for side in ("ours", "trl"):
        out = subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--side={side}"], capture_output=True, text=True)
        found = [x for x in out.stdout.splitlines() if x.startswith("RESULT")]
        results[side] = json.loads(found[0][6:]) if found else sys.exit(out.stderr[-2000:])
    print(f"{'':10} {'ours s':>8} {'TRL s':>8} {'ratio':>6}      floor {results['ours']['floor']:.1f} s")
    for key in ("sample", "reference", "update", "step", "peak_gb"):
        x, y = results["ours"][key], results["trl"][key]
        print(f"{key:10} {x:8.2f} {y:8.2f} {y / max(x, 1e-9):6.2f}")
    print(json.dumps(dict(args=vars(a), torch=torch.__version__, **results)))


if __name__ == "__main__":
    main()
