"""How much of a device's memory bandwidth decoding uses: its model-bandwidth utilisation (MBU).

    python bench/bandwidth.py configs/arithmetic.py --model=out/arithmetic
    python bench/bandwidth.py configs/gsm8k.py --model=out/gsm8k

A decoding step has to read every weight once, and for each row the keys and values of what stands before its
token; a group's prompt counts once, as our sampler keeps it. MBU is these bytes a second over the device's
peak: the vendor's figure for a GPU of PEAKS, else the speed of a large copy, measured here. It is a least
value: what a sampler reads twice is not counted. The batch is that of the config's first training step, drawn
from the model that is given, and what the prompts and first tokens alone take is subtracted.

Dims: B prompts, G rows a prompt, N = B * G rows.
"""

import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config as configs  # noqa: E402
import data  # noqa: E402
import lora  # noqa: E402
from policy import load_policy, pick_device  # noqa: E402
from rollout import Sampler  # noqa: E402

# Bytes a second, from the vendor's data sheets, by a part of the device's name; the first that fits counts.
PEAKS = {
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100": 3.35e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100-SXM4-40GB": 1.555e12,
    "RTX 4090": 1.008e12,
    "RTX 3090": 0.936e12,
}
COPIED = 1 << 28  # bytes of the copy that is timed: far more than any cache holds
REPEATS = 3


# ----------------------------------------------------------------------------------------- what must be read
def weight_bytes(model) -> int:
    """Bytes of the weights that a decoding step reads."""
    total = sum(p.nbytes for p in model.parameters())
    if model.untied_head is not None:
        total -= model.embed.nbytes  # of which a step reads one row for each of its tokens
    for layer in lora.layers(model).values():
        if layer.merged is not None:  # W' is as large as W, is read in its place, and has the adapter in it
            total -= sum(p.nbytes for p in (layer.A, *layer.B))
    return total


def token_bytes(model) -> int:
    """Bytes of one token's keys and values in all layers."""
    shape = model.shape
    return 2 * shape.L * shape.K * shape.E * model.embed.itemsize


def decode_bytes(prompts: list[int], lengths: list[int], *, weights: int, token: int, slots: int) -> int:
    """Bytes that decoding has to read at least.

    prompts: tokens of each of the B prompts; lengths: ids drawn of each of the N rows; weights, token: bytes
    of all weights, and of one token's keys and values; slots: rows decoded at once.
    """
    steps_of_row = [length - 1 for length in lengths]  # the first id is drawn from the prompt's last state
    # Weights are read once for all rows of a step. Rows that find no slot wait, which takes more steps.
    steps = max(max(steps_of_row), -(-sum(steps_of_row) // slots))
    # Step i of a row feeds its id i and reads the keys of ids 1..i.
    own = sum(steps * (steps + 1) // 2 for steps in steps_of_row)
    G, shared = len(lengths) // len(prompts), 0
    for b, prompt in enumerate(prompts):
        shared += prompt * max(steps_of_row[b * G : (b + 1) * G])
    return steps * weights + (own + shared) * token


# -------------------------------------------------------------------------------------------- what is reached
def peak_bandwidth(device: str) -> tuple[float, str]:
    """(bytes a second, what that is) of a device, for torch's threads as they are now."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return peak, f"data sheet of {name}"
    return copy_bandwidth(device), "a copy of 268 MB, measured"


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a large copy reads and writes: the best of five."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        seconds, _ = timed(device, target.copy_, source)
        best = min(best, seconds)
    return 2 * COPIED / best


def timed(device: str, call, *arguments, **options) -> tuple:
    """(seconds until the device is done, what the call returned)."""
    start = time.perf_counter()
    result = call(*arguments, **options)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def utilisation(model, prompts: list[list[int]], *, slots=None, **sampling) -> dict:
    """MBU of decoding these prompts' groups: share, bytes, seconds, peak and what that is.

    prompts: B lists of ids. sampling: Sampler.generate's keywords. The median of three counts; the first
    call makes kernels and graphs and does not count.
    """
    device = str(model.device)
    sampler = Sampler(model, slots=slots)
    out = sampler.generate(prompts, **sampling)
    first_token = sampling | dict(max_new_tokens=1)
    sampler.generate(prompts, **first_token)
    taken = []
    for _ in range(REPEATS):
        whole, out = timed(device, sampler.generate, prompts, **sampling)
        before, _ = timed(device, sampler.generate, prompts, **first_token)
        taken.append(whole - before)
    seconds = sorted(taken)[REPEATS // 2]
    read = decode_bytes(
        [len(prompt) for prompt in prompts], [len(ids) for ids in out.ids], weights=weight_bytes(model),
        token=token_bytes(model), slots=out.stats["slots"],
    )  # fmt: skip
    peak, of = peak_bandwidth(device)
    return dict(share=read / seconds / peak, bytes=read, seconds=seconds, peak_bytes_per_s=peak, peak_is=of)


def of_config(cfg, path: str) -> dict:
    """utilisation of the batch of the config's first step, drawn from the model in a folder."""
    device, dtype = pick_device(cfg.device, cfg.dtype, cfg.threads)
    model, tokenizer, stop_ids, _ = load_policy(path, dtype=dtype, device=device, base=cfg.base)
    if lora.layers(model) and device.startswith("cuda") and cfg.lora_merge != "off":
        lora.merge(model)  # as a run does there
    task = data.load_task(cfg.task, **configs.task_options(cfg))
    options = dict(system=cfg.system_prompt, prefill=cfg.prefill)
    rows = task.batch(0, cfg.prompts_per_step, cfg.seed)
    prompts = [data.prompt_ids(tokenizer, row["prompt"], **options) for row in rows]
    return utilisation(
        model.eval(), prompts, slots=cfg.slots, group_size=cfg.group_size, max_new_tokens=cfg.max_new_tokens,
        stop_ids=stop_ids, seed=cfg.seed, step=1, **configs.sampling_options(cfg, 1),
    )  # fmt: skip


if __name__ == "__main__":
    try:
        cfg = configs.load(sys.argv[1:])
        print(json.dumps(of_config(cfg, cfg.model)))
    except (ValueError, OSError) as e:
        sys.exit(f"bandwidth.py: {e}")
