"""How fast is the sampler? The floor of the machine, transformers' generate and ours, side by side on the
same prompts and lengths.

    python bench/rollout.py --model=models/smollm2-135m    # 4 prompts x 8 completions, 64 + 64 tokens
    python bench/rollout.py --model=models/smollm2-135m --prompts=8 --threads=2 --lengths=early --lora=16

full: every completion has --new tokens. early: lengths like GSM8K's, 8 to --new, mean 40 % of --new before
clipping; what counts is the tokens before the end. transformers is made to emit EOS there; our rows get the
same limits. Each engine has a process of its own, so that its peak memory is its own, and they take turns, so
that a busy machine slows both. Seconds are wall time; `cpu` is the processor's time, which is steadier on a
shared machine. Ratios are medians over the turns. The floor is the matmuls alone, timed here: prompts once,
then live rows only.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lora  # noqa: E402
import model  # noqa: E402
import rollout  # noqa: E402
from kernels.packed_linear import pack  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", required=True)
    numbers = dict(prompts=4, group=8, plen=64, new=64, threads=1, reps=3, slots=0, lora=0)
    for name, default in numbers.items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--lengths", default="full,early")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="cpu")
    return p.parse_args()


def workload(a, lengths: str, vocab: int):
    """Prompts of 75-100 % of --plen random ids, and the length of each completion: the same for every
    engine."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(int(0.75 * a.plen), a.plen + 1, (a.prompts,), generator=g).tolist()
    sizes[0] = a.plen
    prompts = [torch.randint(10, vocab, (n,), generator=g).tolist() for n in sizes]
    if lengths != "early":
        return prompts, [a.new] * (a.prompts * a.group)
    # geometric: each token is the last one with the same probability, which makes the mean 40 % of --new
    last = torch.tensor(1 - 1 / (0.4 * a.new))
    u = torch.rand(a.prompts * a.group, generator=g)
    return prompts, (8 + torch.log1p(-u) / torch.log(last)).long().clamp(8, a.new).tolist()


class Ours:
    def __init__(self, a):
        self.a = a
        self.model = model.load(a.model, dtype=getattr(torch, a.dtype), device=a.device).requires_grad_(False)
        if a.lora:
            lora.apply(self.model, rank=a.lora, alpha=2 * a.lora, targets=TARGETS)
        self.vocab = self.model.shape.V
        self.sampler = rollout.Sampler(self.model, slots=a.slots or None)

    def run(self, prompts, lengths):
        out = self.sampler.generate(prompts, group_size=self.a.group, max_new_tokens=lengths, stop_ids=[])
        assert [len(ids) for ids in out.ids] == lengths
        return out.stats

    def floor(self, prompts, lengths) -> float:
        """Seconds of the matmuls alone: the prompts once, then the live rows of each step.

        A step's time is on a line through the times of a quarter of the rows and of all of them.
        """
        few, all_ = max(1, len(lengths) // 4), len(lengths)
        seconds_few, seconds_all = (statistics.median(self.matmuls(n) for _ in range(3)) for n in (few, all_))
        slope = (seconds_all - seconds_few) / max(1, all_ - few)
        seconds = self.matmuls(sum(map(len, prompts)))
        for step in range(1, max(lengths)):
            live = sum(n > step for n in lengths)
            seconds += seconds_all + slope * (live - all_)
        return seconds

    def matmuls(self, n: int) -> float:
        """The faster of the two matmuls this repository has for each layer, n rows through all of them."""
        seconds = 0.0
        for weight in self.model.parameters():
            if weight.dim() != 2 or min(weight.shape) <= self.a.lora:
                continue
            x = weight.new_zeros(n, weight.shape[1]).normal_()
            seconds += min(
                timed(pack(weight), x), timed(lambda x, w=weight: torch.nn.functional.linear(x, w), x)
            )
        return seconds


def timed(multiply, x) -> float:
    """Seconds of the second call: the first one warms up."""
    multiply(x)
    start = time.perf_counter()
    multiply(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Transformers:
    def __init__(self, a):
        from transformers import AutoModelForCausalLM

        self.a = a
        options = dict(dtype=getattr(torch, a.dtype), attn_implementation="sdpa")
        self.model = AutoModelForCausalLM.from_pretrained(a.model, **options).eval().to(a.device)
        if a.lora:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=a.lora, lora_alpha=2 * a.lora, target_modules="all-linear")
            self.model = get_peft_model(self.model, config)
        self.vocab, self.eos = self.model.config.vocab_size, 0

    def __call__(self, ids, scores):
        """The logits processor: EOS never before a row's length, always there."""
        stop = ids.shape[1] - self.a.plen + 1 >= self.lengths
        scores[:, self.eos] = -torch.inf
        scores[stop] = -torch.inf
        scores[stop, self.eos] = 0
        return scores

    def run(self, prompts, lengths):
        ids = torch.full((len(prompts), self.a.plen), self.eos)
        mask = torch.zeros(len(prompts), self.a.plen, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, -len(prompt) :] = torch.tensor(prompt)
            mask[i, -len(prompt) :] = 1
        ids, mask = (x.repeat_interleave(self.a.group, 0).to(self.a.device) for x in (ids, mask))
        self.lengths = torch.tensor(lengths, device=self.a.device)
        full = min(lengths) == self.a.new
        options = dict(max_new_tokens=self.a.new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        options |= dict(pad_token_id=self.eos, eos_token_id=None if full else self.eos)
        options["logits_processor"] = [] if full else [self]
        with torch.no_grad():
            out = self.model.generate(input_ids=ids, attention_mask=mask, **options)
        assert out.shape[1] == self.a.plen + max(lengths)
        return {}


def serve(engine, a, pipe):
    """One engine's process: answers (question, lengths) with a dict."""
    torch.set_num_threads(a.threads)
    made = engine(a)
    for question, lengths in iter(pipe.recv, None):
        work = workload(a, lengths, made.vocab)
        wall, cpu = time.perf_counter(), time.process_time()
        told = getattr(made, question)(*work)
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if a.device == "cuda":
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        pipe.send(dict(wall=wall, cpu=cpu, memory=memory, tokens=sum(work[1]), told=told))


def ask(pipe, *question):
    pipe.send(question)
    return pipe.recv()


HEADING = (
    "lengths  tokens/s: floor  transformers   ours   ours/transformers (cpu)  of floor  useful slot-steps"
    "  GB transformers, ours"
)


def compare(a, pipes, lengths: str):
    """One line of the table, and the same as JSON. `pipes`: engine -> its process."""
    turns = [[ask(pipe, "run", lengths) for pipe in pipes.values()] for _ in range(a.reps + 1)]
    turns = turns[1:]  # the first warms up
    medians = []
    for i in range(2):
        keys = ("wall", "cpu", "memory", "tokens")
        medians.append({key: statistics.median(turn[i][key] for turn in turns) for key in keys})
    ours, theirs = medians
    floor = ask(pipes[Ours], "floor", lengths)["told"]
    stats = turns[-1][0]["told"]
    ratio, cpu = (statistics.median(t[1][key] / t[0][key] for t in turns) for key in ("wall", "cpu"))
    useful = stats["useful_slot_steps"] / max(1, stats["slot_steps"])
    at_floor, at_theirs, at_ours = (
        ours["tokens"] / seconds for seconds in (floor, theirs["wall"], ours["wall"])
    )
    print(
        f"{lengths:8} {at_floor:14.0f} {at_theirs:12.0f} {at_ours:8.0f} {ratio:10.2f}x {cpu:9.2f}x"
        f" {floor / ours['wall']:14.0%} {useful:13.0%}"
        f" {theirs['memory'] / 1e9:17.2f} {ours['memory'] / 1e9:7.2f}",
        flush=True,
    )
    told = dict(vars(a), lengths=lengths, floor=at_floor, transformers=at_theirs, ours=at_ours)
    told |= dict(ratio=ratio, ratio_cpu=cpu, useful=useful, torch=torch.__version__)
    told |= dict(memory_transformers=theirs["memory"], memory_ours=ours["memory"])
    print(json.dumps(told))


def main():
    a, pipes, context = arguments(), {}, multiprocessing.get_context("spawn")
    for engine in (Ours, Transformers):
        pipes[engine], end = context.Pipe()
        context.Process(target=serve, args=(engine, a, end)).start()
    print(
        f"{a.model} {a.prompts} x {a.group}, {a.plen} + {a.new} tokens, {a.dtype}, {a.threads} threads, "
        f"lora {a.lora}\n{HEADING}"
    )
    for lengths in a.lengths.split(","):
        compare(a, pipes, lengths)
    for pipe in pipes.values():
        pipe.send(None)


if __name__ == "__main__":
    main()
