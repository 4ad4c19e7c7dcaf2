"""A model in 4 bits beside itself: what it loses in perplexity, and what loading takes in memory and time.

    python bench/four_bits.py --model=models/smollm2-135m --file=data/gsm8k/test.jsonl --rows=200
    python bench/four_bits.py --model=.. --only=load              # without a text

Perplexity is exp of the mean surprise of all tokens but the first of a row, which is its "question" and
"answer" (all values that are texts). Compared are the weights in `--dtype`, the same in 4 bits as
base="nf4" holds them, and, where bitsandbytes is installed, what it makes of them. Loading is measured in a
process of its own each, by the resident memory beyond what was there before: Linux only.
"""

import argparse
import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import model as models  # noqa: E402
import nf4  # noqa: E402

BATCH_TOKENS = 2048


# --------------------------------------------------------------------------------------------- perplexity
def texts(file: str, rows: int) -> list[str]:
    found = []
    for line in Path(file).read_text().splitlines()[:rows]:
        values = json.loads(line).values()
        found.append("\n".join(value for value in values if isinstance(value, str)))
    return found


@torch.no_grad()
def surprise(model, sequences: list[list[int]]) -> list[float]:
    """Mean surprise of each sequence's tokens but its first, nats; and their counts are len - 1."""
    found, batch, tokens = [], [], 0
    for i, ids in enumerate(sequences):
        batch.append(ids)
        tokens += len(ids)
        if tokens >= BATCH_TOKENS or i + 1 == len(sequences):
            logp, _, _ = model.completion_logprobs([s[:1] for s in batch], [[s[1:]] for s in batch])
            found += [-float(row.mean()) for row in logp.split([len(s) - 1 for s in batch])]
            batch, tokens = [], 0
    return found


def perplexity(model, sequences) -> float:
    counts = [len(ids) - 1 for ids in sequences]
    total = sum(n * s for n, s in zip(counts, surprise(model, sequences), strict=True))
    return math.exp(total / sum(counts))


def as_bitsandbytes(model, double: bool):
    """The model with each projection as bitsandbytes quantises and expands it; None where it is absent."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return None
    for layer in nf4.linear_layers(model).values():
        for rows in layer.weight.data.split(list(layer.parts.values())):
            numbers, state = functional.quantize_4bit(rows, quant_type="nf4", compress_statistics=double)
            rows.copy_(functional.dequantize_4bit(numbers, state))
    return model


def compare(args):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sequences = [tokenizer(text)["input_ids"] for text in texts(args.file, args.rows)]
    options = dict(dtype=getattr(torch, args.dtype), device=args.device)
    print(f"{len(sequences)} rows, {sum(map(len, sequences))} tokens of {args.file}, {args.dtype}")
    makers = {
        "dense": lambda: models.load(args.model, **options),
        "nf4": lambda: models.load(args.model, base="nf4", **options),
        "bitsandbytes": lambda: as_bitsandbytes(models.load(args.model, **options), double=True),
        "the same, scales of fp32": lambda: as_bitsandbytes(models.load(args.model, **options), double=False),
    }
    for name, make in makers.items():
        model = make()
        if model is None:
            print(f"{name:26} is not installed")
            continue
        begin = time.perf_counter()
        print(f"{name:26} perplexity {perplexity(model, sequences):.4f}", end="")
        print(f"   {time.perf_counter() - begin:.0f} s", flush=True)


# ------------------------------------------------------------------------------------------------ loading
def resident() -> int:
    """Bytes of this process in memory."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("VmRSS:")[2].split()[0])


def measure_load(args):
    """Loads the model in this process, and prints one line."""
    peak, done = resident(), threading.Event()
    before = peak

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    model = models.load(args.model, dtype=getattr(torch, args.dtype), base=args.base)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    print(
        f"{args.base:6} {args.dtype:9} weights {held / 1e9:.3f} GB, peak while loading "
        f"{(peak - before) / 1e9:.3f} GB, {seconds:.1f} s",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--file", default="data/gsm8k/test.jsonl")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("load", "perplexity"))
    parser.add_argument("--base", help="measure this load alone, here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.base:
        return measure_load(args)
    if args.only != "perplexity":
        for base, dtype in (("dense", "float32"), ("dense", "bfloat16"), ("nf4", "bfloat16")):
            flags = [f"--model={args.model}", f"--dtype={dtype}", f"--base={base}"]
            subprocess.run([sys.executable, __file__, *flags], check=True)
    if args.only != "load":
        compare(args)


if __name__ == "__main__":
    main()
