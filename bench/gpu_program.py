"""The program's rows of bench/gpu.py: sampling, updates, a whole step, on random weights of real shapes.

decode   B prompts of P tokens, each its own, G completions of C tokens. The floor is prompts and steps:
         prompts by their multiplications; a step reads the weights once and each row's keys, half of its own
         on average. "prompts": the same with one token each. LoRA's adapter beside the weights, or merged
         into them. Checked where asked for: the sampler's log-probabilities are the model's, in torch.
early    four times as many rows as slots, lengths as of GSM8K's answers: the share of slot-steps that drew a
         token somebody wants.
update   train.update on a random batch: forward, backward, AdamW, merging. MB a token is what it needs beyond
         what lay there before. Checked: the gradient is that of the torch forms.
step     train.train_step with made-up rewards. TRL's is GRPOTrainer on the same shapes and rank, a group a
         micro-batch; one step to warm up and one that counts.
shared   the gradient of groups whose prompt is computed once, against the same completions each with a prompt
         of its own. Checked: it is the same gradient.

Dims: B prompts, G completions each, P prompt and C completion length, N = B G rows.
"""

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from gpu_rows import DEV, DRY, ROOT, TYPE, Case, Row, clock, in_torch

import torch  # noqa: I001
import lora
import train
from peers import generate, missing, random_transformer, trl_steps, word_tokenizer
from random_run import MadeRun, add_adapter, make_config, random_ids, random_model, ready_update
from rollout import Sampler


def config(family, V, D, I, L, H, K, tied) -> dict:  # noqa: E741
    return dict(
        model_type=family, vocab_size=V, hidden_size=D, intermediate_size=I, num_hidden_layers=L,
        num_attention_heads=H, num_key_value_heads=K, max_position_embeddings=32_768, rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
    )  # fmt: skip


SHAPES = {
    "tiny": config("qwen2", 64, 32, 48, 1, 4, 2, True),
    "135M": config("llama", 49_152, 576, 1536, 30, 9, 3, True),
    "0.5B": config("qwen2", 151_936, 896, 4864, 24, 14, 2, True),
    "1.5B": config("qwen2", 151_936, 1536, 8960, 28, 12, 2, True),
    "7B": config("qwen2", 152_064, 3584, 18_944, 28, 28, 4, False),
}


# ----------------------------------------------------------------------------------------------------- models
def create(name, dtype, rank=0, merged=False):
    net = random_model(SHAPES[name], dtype=dtype, device=DEV)
    if rank:
        add_adapter(net, rank)
    if merged:
        lora.merge(net)
    return net.eval()


def sizes(s) -> tuple[int, int, int]:
    """Weights in the layers, in the head, and numbers of a token's keys and values. s: model.Shape."""
    layer = s.D * (2 * s.H * s.E + 2 * s.K * s.E + 3 * s.intermediate)
    return s.L * layer, s.V * s.D, 2 * s.L * s.K * s.E


def random_prompts(net, B, P):
    return random_ids(net.shape.V, *[P] * B)


# --------------------------------------------------------------------------------------------------- sampling
def same_logprobs(sampler, prompts, C):
    """What the sampler noted, and the model's torch form of the same tokens: (M,) each."""
    out = sampler.generate(prompts, group_size=2, max_new_tokens=C, stop_ids=[])
    groups = [out.group(b, 2) for b in range(len(prompts))]

    @torch.no_grad()
    def score():
        return sampler.model.completion_logprobs(prompts, groups)[0]

    noted = torch.tensor([logp for row in out.logprobs for logp in row])
    return [noted], [in_torch(score).cpu()]


def transformers_generate(name, prompts, C):
    """Seconds of transformers' generate on a model of its own, twice after a warm-up."""
    model = random_transformer(SHAPES[name], dtype=TYPE, device=DEV)
    times = []
    for tokens in (8, C, C):
        begin = clock()
        generate(model, prompts, tokens)
        times.append(clock() - begin)
    counted = sorted(times[1:])
    return dict(seconds=[sum(counted) / 2, *counted])


def decode(name, B, G, P, C, dtype, rank=0, merged=False, checked=False, peers=()):
    net = create(name, dtype, rank, merged)
    prompts, (layers, head, kv) = random_prompts(net, B, P), sizes(net.shape)
    sampler, options = Sampler(net, slots=B * G), dict(group_size=G, max_new_tokens=C, stop_ids=[])
    calls = dict(ours=partial(sampler.generate, prompts, **options))
    calls["prompts"] = partial(sampler.generate, prompts, **options | dict(max_new_tokens=1))
    without = []
    if "graphs" in peers:
        launching = Sampler(net, slots=B * G, cuda_graphs=False)
        calls["no CUDA graphs"] = partial(launching.generate, prompts, **options)
    if "transformers" in peers:
        without = missing("transformers")
        if not without:
            every_row = [prompt for prompt in prompts for _ in range(G)]
            calls["transformers"] = partial(transformers_generate, name, every_row, C)
    keys = (B * P + B * G * C / 2) * kv  # of prompts once a group, of own tokens half on average
    phases = [(0, 2 * B * (P * layers + head)), (C * dtype.itemsize * (layers + head + keys), 0)]
    pair = partial(same_logprobs, sampler, prompts[:4], min(C, 32)) if checked else None
    return Case(calls, pair, phases, tokens=B * G * C, slack=2.5, without=without)


def early(name, slots, G, P, C, dtype):
    net, N = create(name, dtype), 4 * slots
    u = torch.rand(N, generator=torch.Generator().manual_seed(0))
    falling = torch.log1p(-u) / torch.log(
        torch.tensor(1 - 1 / (0.4 * C))
    )  # geometric, as in bench/rollout.py
    lengths = (8 + falling).long().clamp(min(8, C), C).tolist()
    prompts, (layers, head, kv) = random_prompts(net, N // G, P), sizes(net.shape)
    sampler = Sampler(net, slots=slots)

    def ours():
        out = sampler.generate(prompts, group_size=G, max_new_tokens=lengths, stop_ids=[])
        useful = out.stats["useful_slot_steps"] / max(1, out.stats["slot_steps"])
        return dict(useful=useful, useful_of_a_static_batch=sum(lengths) / (N * max(lengths)))

    steps, keys = sum(lengths) / slots, sum(n * (P / G + n / 2) for n in lengths)
    read = dtype.itemsize * (steps * (layers + head) + keys * kv)
    return Case(dict(ours=ours), None, [(0, 2 * len(prompts) * P * layers), (read, 0)], tokens=sum(lengths))


# --------------------------------------------------------------------------------------------------- updating
def update_operations(shape, P, C, G, B, frozen) -> int:
    """Forward and backward; a frozen weight has no gradient."""
    layers, head, _ = sizes(shape)
    return (4 if frozen else 6) * B * ((P + G * C) * layers + G * C * head)


def made_run(name, B, G, P, C, dtype, rank, merged, **keys):
    """A run of train.py on random weights, all of an update in one micro-batch unless keys say otherwise."""
    keys = dict(micro_tokens=B * (P + G * C), checkpointing="none") | keys
    cfg = make_config(
        V=SHAPES[name]["vocab_size"],
        P=P,
        prompts_per_step=B,
        group_size=G,
        max_new_tokens=C,
        lora_rank=rank,
        lora_alpha=2.0 * rank,
        lora_merge="on" if merged else "off",
        lr=1e-6,
        dtype=str(dtype).removeprefix("torch."),
        device=DEV,
        kernels="triton" if DRY else "auto",
        **keys,
    )
    return MadeRun(cfg, model=partial(random_model, SHAPES[name]))


def gradient(net, prompts, groups):
    """The mean log-probability's gradient, one vector of all trained weights."""
    trained = [p for p in net.parameters() if p.requires_grad]
    logp, _, _ = net.completion_logprobs(prompts, groups)
    return [torch.cat([grad.flatten() for grad in torch.autograd.grad(logp.mean(), trained)])]


def random_groups(net, B, G, C):
    return [random_ids(net.shape.V, *[C] * G, seed=1 + b) for b in range(B)]


def update(name, B, G, P, C, dtype, rank, merged=False, checked=False, **keys):
    run = made_run(name, B, G, P, C, dtype, rank, merged, **keys)
    once, tokens = ready_update(run), B * (P + G * C)

    def ours():
        held = 0 if DRY else torch.cuda.memory_allocated()
        once()
        peak = 0 if DRY else torch.cuda.max_memory_allocated()
        return dict(MB_a_token=(peak - held) / 1e6 / tokens)

    def pair():
        run.model.train()
        prompts, groups = random_prompts(run.model, B, P), random_groups(run.model, B, G, C)
        found = gradient(run.model, prompts, groups)
        return found, in_torch(partial(gradient, run.model, prompts, groups))

    phase = (0, update_operations(run.model.shape, P, C, G, B, frozen=bool(rank)))
    return Case(dict(ours=ours), pair if checked else None, [phase], slack=2.5)


def shared(name, B, G, P, C, dtype, rank):
    """A group's prompt computed once, beside one for each completion."""
    net = create(name, dtype, rank)
    prompts, groups = random_prompts(net, B, P), random_groups(net, B, G, C)
    each_prompt = [prompt for prompt in prompts for _ in range(G)]
    each_row = [[ids] for group in groups for ids in group]
    ours, separate = partial(gradient, net, prompts, groups), partial(gradient, net, each_prompt, each_row)
    phase = (0, update_operations(net.shape, P, C, G, B, frozen=True))
    calls = dict(ours=ours, separate=separate)
    return Case(calls, lambda: (ours(), separate()), [phase], slack=2.5)


# ------------------------------------------------------------------------------------------------ whole steps
def trl_step(name, B, G, P, C, rank):
    V = SHAPES[name]["vocab_size"]
    model = random_transformer(SHAPES[name], dtype=TYPE, device=DEV)
    prompts = [" ".join(f"w{i}" for i in ids) for ids in random_ids(V, *[P] * B)]
    options = dict(B=B, G=G, C=C, steps=2, rank=rank, beta=0.0, cpu=DEV == "cpu", bf16=DEV == "cuda")
    last = trl_steps(model, word_tokenizer(V), prompts, **options)[-1]
    return dict(seconds=[last["step"]] * 3, sample=last["sample"], update=last["update"])


def step(name, B, G, P, C, dtype, rank, merged=False):
    micro_tokens = max(49_152, P + G * C)
    run = made_run(name, B, G, P, C, dtype, rank, merged, micro_tokens=micro_tokens, checkpointing="auto")
    number = [0]

    def ours():
        number[0] += 1
        metrics = train.train_step(run, number[0])
        return dict(sample=metrics["time/sample"], update=metrics["time/train"])

    without = missing("trl", "peft", "datasets", "transformers")
    calls = dict(ours=ours)
    if not without:
        calls["TRL"] = partial(trl_step, name, B, G, P, C, rank)
    layers, head, kv = sizes(run.model.shape)
    rounds = B * G / min(256, B * G)  # of 256 rows at once
    read = C * dtype.itemsize * (rounds * (layers + head) + (B * P + B * G * C / 2) * kv)
    operations = update_operations(run.model.shape, P, C, G, B, frozen=True)
    return Case(calls, None, [(0, 2 * B * P * layers), (read, 0), (0, operations)], without=without)


def gsm8k(seconds: float, model: str, data_dir: str, flags: list[str]) -> dict:
    """A run of configs/gsm8k.py, ended after `seconds`: its accuracies by step. flags: more for train.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "configs/gsm8k.py", f"--data_dir={data_dir}", *flags]
        if model:
            command.append(f"--model={model}")
        begin = time.perf_counter()
        process = subprocess.Popen([*command, f"--out_dir={folder}"], cwd=ROOT)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        took, metrics = time.perf_counter() - begin, Path(folder, "metrics.jsonl")
        if not metrics.exists():
            raise ValueError(f"{' '.join(command)} made no step; what it said is above")
        lines = metrics.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = {row["step"]: row["eval/strict"] for row in rows if "eval/strict" in row}
    shown = ", ".join(f"step {number}: {accuracy:.1%}" for number, accuracy in found.items())
    told = f"{shown}; {rows[-1]['step']} steps in {took:.0f} s"
    return dict(accuracy=found, steps=rows[-1]["step"], took=took, command=command, told=told)


# ------------------------------------------------------------------------------------------------------- rows
SMALL = ("tiny", 2, 2, 3, 4)


def decode_row(name, B, G=1, P=256, C=256, goal="", **options):
    rank = options.get("rank", 0)
    title = f"decode {name}, {B} x {G}, {P} + {C}"
    if rank:
        title += f", LoRA {rank} {'merged' if options.get('merged') else 'beside'}"
    return Row(title, partial(decode, **options), (name, B, G, P, C), SMALL, goal)


def update_row(name, B, rank, goal="", **options):
    title = f"update {name}, {B} x 16 x (128 + 384)"
    if rank:
        title += f", LoRA {rank} {'merged' if options.get('merged') else 'beside'}"
    if "checkpointing" in options:
        title += f", {options['checkpointing']}"
    return Row(title, partial(update, rank=rank, **options), (name, B, 16, 128, 384), SMALL, goal)


BOTH = ("graphs", "transformers")
STEP, WHOLE = "whole step 0.5B, 32 x 16 x (128 + 384), LoRA 16", ("0.5B", 32, 16, 128, 384)
ROWS = [
    decode_row("0.5B", 16, 16, 128, 256, "150k, then 200k tok/s", checked=True, peers=BOTH),
    decode_row("0.5B", 16, 16, 128, 256, "1.15x of none", rank=32, merged=True, checked=True),
    decode_row("0.5B", 16, 16, 128, 256, rank=32, checked=True),
    update_row("0.5B", 2, 32, "busy 90%", merged=True, checked=True),
    update_row("0.5B", 8, 32, "250 ms, 0.6 MB", merged=True),
    update_row("0.5B", 8, 32, "250 ms, 0.6 MB", merged=True, checkpointing="light"),
    update_row("0.5B", 2, 32, "busy 90%", checked=True),
    update_row("0.5B", 8, 32, "250 ms, 0.6 MB"),
    Row(STEP, partial(step, rank=16, merged=True), WHOLE, SMALL, "2.5 s"),
    Row("early lengths 0.5B, 1,024 rows, 256 slots", early, ("0.5B", 256, 16, 256, 256), ("tiny", 2, 4, 3, 4),
        "130k tok/s, useful 0.95"),
    decode_row("0.5B", 256, goal="150k tok/s", peers=BOTH),
    decode_row("0.5B", 1, goal="1.5k tok/s", peers=("graphs",)),
    decode_row("0.5B", 1, 1, 16_384, 64, "1k tok/s without prompts"),
    decode_row("0.5B", 16, 1, 8192, 64),
    Row("shared prompt, P 150 / C 200, G 16", partial(shared, rank=16), ("0.5B", 4, 16, 150, 200), SMALL,
        "separate 1.45x"),
    decode_row("1.5B", 256, goal="65k tok/s", peers=("transformers",)),
    decode_row("7B", 256, goal="19k tok/s"),
    update_row("0.5B", 2, 0, checked=True),
    update_row("1.5B", 2, 0),
    Row("update 7B, 1 x 16 x (128 + 384), LoRA 16, layers computed twice",
        partial(update, rank=16, checkpointing="layers"), ("7B", 1, 16, 128, 384), SMALL),
    decode_row("0.5B", 64, checked=True),
    decode_row("135M", 256),
    decode_row("1.5B", 1),
    decode_row("7B", 1),
]  # fmt: skip
