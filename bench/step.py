"""One GRPO step, phase by phase, against TRL's GRPOTrainer at the same shapes: seconds, ratios, peak memory.

    python bench/step.py MODEL_FOLDER
    python bench/step.py MODEL_FOLDER --lora=16 --beta=0.04 --prompts=4 --group=8 --plen=64 --new=64
    python bench/step.py MODEL_FOLDER --threads=1 --steps=2 --dtype=bfloat16

Ours is train.py's train_step; only its prompts (as many random ids as --plen) and rewards are made up. Each
side runs in a process of its own, so that its peak memory is its own, one after the other. Every completion
has exactly --new tokens. One warm-up step is dropped and the median of the others counts. Both take a group's
rows as a micro-batch (for TRL, pip install trl peft, the size its users take).

--dtype: float32; bfloat16, the weights of both; autocast, TRL's fp32 weights under bf16 autocast and our bf16
weights with fp32 masters in the optimiser. The floor is what the multiplications of the step alone would take
at the speed of a large fp32 matmul measured on the spot.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as models  # noqa: E402
import train  # noqa: E402
from peers import trl_steps  # noqa: E402
from random_run import MadeRun, make_config  # noqa: E402

TEXT = "The quick brown fox jumps over the lazy dog while seven wizards quietly mix bronze jugs of liquid. "


def floor_seconds(model, a) -> float:
    """Multiplications of sampling, reference, forward and backward at the speed of a 1024^3 matmul."""
    x = torch.randn(1024, 1024)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start)
    speed = 2 * 1024**3 / statistics.median(times)

    weights = 0  # of the layers, without adapters
    for name, p in model.named_parameters():
        adapter = name.endswith(".A") or ".B." in name
        if p.dim() == 2 and not adapter and not name.endswith("embed"):
            weights += p.numel()
    completions = a.prompts * a.group * a.new
    tokens = a.prompts * a.plen + completions
    passes = (
        1 + 2 if a.lora else 1 + 3
    )  # sampling, then forward and backward: a frozen weight has no gradient
    if a.beta:
        passes += 1
    layers = passes * weights * tokens
    head = (passes - 1) * model.head.numel() * completions
    return 2 * (layers + head) / speed


def ours(a):
    """(seconds of each step by phase, the floor)."""
    sizes = json.loads(Path(a.model, "config.json").read_text())
    cfg = make_config(
        V=sizes["vocab_size"],
        P=a.plen,
        prompts_per_step=a.prompts,
        group_size=a.group,
        max_new_tokens=a.new,
        micro_tokens=a.plen + a.group * a.new,
        lora_rank=a.lora,
        lora_alpha=2.0 * a.lora,
        beta=a.beta,
        lr=1e-6,
        dtype="float32" if a.dtype == "float32" else "bfloat16",
        device="cpu",
        threads=a.threads,
    )
    run = MadeRun(cfg, model=partial(models.load, a.model))
    steps = []
    for number in range(1, a.steps + 2):
        m = train.train_step(run, number)
        phases = dict(sample=m["time/sample"], reference=m["time/reference"], update=m["time/train"])
        steps.append(dict(phases, step=m["step_time"]))
    return steps[1:], floor_seconds(run.model, a)


def trl(a):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    words = tokenizer(TEXT * 40)["input_ids"]
    prompts = [tokenizer.decode(words[i : i + a.plen]) for i in range(16)]
    dtype = torch.bfloat16 if a.dtype == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype)
    shape = dict(B=a.prompts, G=a.group, C=a.new)
    options = dict(rank=a.lora, beta=a.beta, cpu=True, bf16=a.dtype != "float32")
    return trl_steps(model, tokenizer, prompts, **shape, steps=a.steps + 1, **options)[1:], 0.0


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("model")
    p.add_argument("--side", default="")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "autocast"))
    p.add_argument("--beta", type=float, default=0.04)
    numbers = dict(lora=16, prompts=4, group=8, plen=64, new=64, threads=1, steps=2)
    for name, default in numbers.items():
        p.add_argument(f"--{name}", type=int, default=default)
    return p.parse_args()


def one_side(a):
    """Prints the medians of this process's side, for `main` to read."""
    torch.set_num_threads(a.threads)
    steps, floor = dict(ours=ours, trl=trl)[a.side](a)
    result = {phase: statistics.median(s[phase] for s in steps) for phase in steps[0]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT" + json.dumps(dict(result, floor=floor, peak_gb=peak / 1e9)))


def main():
    a = arguments()
    if a.side:
        return one_side(a)
    results = {}
    for side in ("ours", "trl"):
        command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}"]
        out = subprocess.run(command, capture_output=True, text=True)
        found = [line for line in out.stdout.splitlines() if line.startswith("RESULT")]
        if not found:
            sys.exit(out.stderr[-2000:])
        results[side] = json.loads(found[0].removeprefix("RESULT"))
    print(f"{'':10} {'ours s':>8} {'TRL s':>8} {'ratio':>6}      floor {results['ours']['floor']:.1f} s")
    for key in ("sample", "reference", "update", "step", "peak_gb"):
        x, y = results["ours"][key], results["trl"][key]
        print(f"{key:10} {x:8.2f} {y:8.2f} {y / max(x, 1e-9):6.2f}")
    print(json.dumps(dict(args=vars(a), torch=torch.__version__, **results)))


if __name__ == "__main__":
    main()
