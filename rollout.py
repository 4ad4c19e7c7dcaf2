"""Sampling: each prompt is prefilled once, its group's rows decode in slots, a free slot is refilled from the queue.

    rollout = generate(model, prompts, group_size=8, max_new_tokens=256, stop_ids=[2], seed=0, step=0)
    rollout.ids[n], rollout.logprobs[n], rollout.stopped[n]                      # row n answers prompt n // group_size

A completion is the list of ids that were drawn, the stop id included, each with the log-probability of the distribution it was
drawn from (temperature and truncation included): ids never become text and come back.

How it is laid out. The keys and values of a prompt lie once in the cache and are read by all rows of its group; each slot has its own
for the tokens it drew. Live rows are always slots 0..n-1: a finished row's place goes to the next row of the queue, and when
that is empty to the last live row, whose own keys move. So the matmuls see live rows only, and the batch shrinks by itself.

On a GPU the host looks only after a block of steps, at the block before: decode.py has the step, `decode_block` below the looking.

What a row draws depends on (seed, step, prompt, sample, position) and on its logits alone: see kernels/sample.py.

Dims: B prompts, G rows a prompt, N = B*G rows, n live rows, g live groups, m rows of a group at most, P prompt length, C own
length, L layers, H query heads, K key/value heads, R = H / K, E head width, V vocabulary.
"""
import math
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from kernels.logprob import logits_fp32, truncate_
from kernels.packed_linear import packed
from kernels import flash_attention as flash, sample as sampling
import decode
from decode import Blocks, Cache, cache_bytes, upload
from model import Packed

PREFILL_TOKENS = 8192  # prompt tokens in one prefill: enough to fill the matmuls, few enough to bound the activations
PACK_STEPS = 16  # completions that may be longer than this are sampled on packed weights (kernels/packed_linear.py)


@dataclass
class Rollout:
    """N = B * group_size completions. Row n answers prompt n // group_size."""

    ids: list[list[int]]  # drawn ids, the stop id included
    logprobs: list[list[float]]  # nats, of the distribution each id was drawn from; at temperature 0, of the untempered one
    stopped: list[bool]  # ended by a stop id; False: cut by the length limit
    entropies: list[list[float]]  # nats, of the distribution each id was drawn from; empty lists where they were not asked for
    stats: dict = field(default_factory=dict)  # seconds, tokens, slot_steps, useful_slot_steps, cache_bytes

    def group(self, b: int, group_size: int) -> list[list[int]]:
        return self.ids[b * group_size : (b + 1) * group_size]


def group_places(slots: int, group_size: int, prompts: int) -> int:
    """How many prompts lie in the cache at once: three times the groups that fill the slots, and one being filled.

    A group keeps its place until its last row ends. With twice the groups, 4 x 64 jobs of GSM8K's lengths in 64 slots left 8 to 12 % of the
    slot-steps empty for want of a place; with three times none.
    """
    return min(prompts, (1 if group_size == 1 else 3) * -(-slots // group_size) + 1)


def free_bytes(device) -> float:
    """Memory that can still be had on the device; infinite where it cannot be asked."""
    if device.type == "cuda":  # what the driver has, and what torch holds and does not use
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as f:
            return 1024 * next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def plan_slots(shape, itemsize: int, free: float, *, slots: int, group_size: int, prompts: int, prompt_tokens: int, new_tokens: int) -> int:
    """The most slots, up to `slots`, whose cache and logits fit in `free` bytes; says so when that is fewer. ValueError if not even one does.

    Beside the cache a slot has three rows of fp32 numbers as wide as the vocabulary at once: logits, probabilities, and what truncation needs.
    """
    fit, need = slots, []
    while fit:
        cache = cache_bytes(shape, itemsize, groups=group_places(fit, group_size, prompts), slots=fit, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        need.append(cache + 3 * 4 * shape.V * fit)
        if need[-1] <= free:
            break
        fit -= -(-fit // 8)
    if not fit:
        raise ValueError(f"sampling one row at a time needs {need[-1] / 1e9:.2f} GB and {free / 1e9:.2f} GB is free: lower max_new_tokens or use shorter prompts")
    if fit < slots:
        print(f"sampling {slots} rows at once would need {need[0] / 1e9:.1f} GB and {free / 1e9:.1f} GB is free: {fit} rows at once")
    return fit


def usable_bytes(device) -> float:
    """What sampling may take: a fifth of the free memory is left to the activations, and to what else grows in the process."""
    return 0.8 * free_bytes(device)


def static_blocks(model, block: int, keep: bool, *, slots: int, group_size: int, prompts: int, prompt_tokens: int, new_tokens: int) -> Blocks:
    """Buffers for decoding in blocks: those the model holds from an earlier call where they are large enough, else new ones.

    The new ones are large enough for the earlier call too, so that training and evaluation do not take turns in building them, unless that
    takes more than half of the memory.
    """
    held = decode.kept(model) if keep else None
    places = partial(group_places, group_size=group_size, prompts=prompts)
    if held and held.holds(groups=places(min(slots, held.slots)), slots=slots, block=block, prompt_tokens=prompt_tokens, new_tokens=new_tokens):
        return held
    before = held.sizes if held else {}
    held = model.decode_graphs = None  # gives its memory back, before what is free is counted
    # in steps of 64, since the longest prompt is another in every batch
    sizes, size, room = dict(prompt_tokens=-(-prompt_tokens // 64) * 64, new_tokens=new_tokens), (model.shape, model.embed.itemsize), usable_bytes(model.device)
    fit = plan_slots(*size, room, slots=slots, group_size=group_size, prompts=prompts, **sizes)
    asked = dict(groups=places(fit), slots=fit, **sizes)
    both = {name: max(n, before.get(name, 0)) for name, n in asked.items()}
    if cache_bytes(*size, **both) > max(cache_bytes(*size, **asked), room / 2):
        both = asked
    blocks = Blocks(model, block=block, wanted=max(slots, both["slots"]), **both)
    if keep:
        decode.keep(model, blocks)
    return blocks


class Prefill(Packed):
    """The plan of prompts alone, which also leaves their keys and values in the cache, prompt i in place groups[i]."""

    def __init__(self, model, prompts, cache: Cache, groups: list[int]):
        super().__init__(model, prompts, [[] for _ in prompts])
        self.cache = cache
        lengths = torch.tensor([len(p) for p in prompts])
        self.group = torch.tensor(groups).repeat_interleave(lengths).to(model.device)
        self.last = (lengths.cumsum(0) - 1).to(model.device)  # where the first token of every completion is predicted from

    def attend(self, layer, q, k, v):
        self.cache.prompt_k[layer][self.group, :, self.positions] = k
        self.cache.prompt_v[layer][self.group, :, self.positions] = v
        return super().attend(layer, q, k, v)


class Decode:
    """The plan of one decoding step: row i adds its key to slot i and sees its group's prompt and its own tokens.

    The prompt's part runs once a group: the rows of a group stand together as queries, so a prompt's keys are read once and not G times. For
    that, rows are laid on a grid of g groups x m places (`grid`, unused places hold any row), and `back` finds each row on it. The R query
    heads of a key head are R rows of queries, so no key is expanded.
    """

    def __init__(self, cache: Cache, slots: int, device, dtype):
        self.cache, self.n, self.g, self.m, self.c = cache, 0, 0, 0, 0
        # additive mask over [prompt | own] keys of each slot; own keys open one by one as they are written
        self.mask = torch.full((slots, 1, 1, cache.P + cache.C), float("-inf"), dtype=dtype, device=device)
        self.key_position = torch.arange(cache.P, device=device)
        self.slots = torch.arange(slots, device=device)
        K = cache.own_k.shape[2]
        self.first_key = torch.arange(slots * K, device=device).view(slots, K) * cache.C  # of each slot and key head, as if own_k were flat

    def compose(self, groups: list[int]):
        """Lays the grid for live rows whose groups' places are `groups`; called when a row leaves or enters."""
        members: list[list[int]] = [[] for _ in range(max(groups) + 1)]
        for row, group in enumerate(groups):
            members[group].append(row)
        self.n, self.g, self.m = len(groups), len(members), max(map(len, members))
        grid, back = [0] * (self.g * self.m), [0] * self.n
        for group, rows in enumerate(members):
            for i, row in enumerate(rows):
                grid[group * self.m + i] = row
                back[row] = group * self.m + i
        # whole groups in order are a grid already: four gathers a layer less, 10-20 % of attend
        self.is_grid = grid == list(range(self.n))
        self.grid, self.back = (torch.tensor(x, device=self.mask.device) for x in (grid, back))

    def enter(self, slots, prompt_lengths):
        """Opens slots (i,) for new rows: each sees its prompt, prompt_lengths (i,), and nothing of its own yet."""
        self.mask[slots] = float("-inf")
        self.mask[slots, 0, 0, : self.cache.P] = torch.where(self.key_position < prompt_lengths[:, None], 0.0, float("-inf")).to(self.mask.dtype)

    def advance(self, own, longest: int):
        """Before a step: own (n,) is how many tokens each row has in its slot, longest the most of them; their next key opens."""
        self.c, self.write = longest + 1, (self.first_key[: self.n] + own[:, None]).flatten()
        self.mask[self.slots[: self.n], 0, 0, self.cache.P + own] = 0.0

    def attend(self, layer, q, k, v):
        """q (n, H, E), k and v (n, K, E) -> (n, H, E)."""
        (n, H, E), (_, K, _), g, m, c, P = q.shape, k.shape, self.g, self.m, self.c, self.cache.P
        R, own_k, own_v = H // K, self.cache.own_k[layer], self.cache.own_v[layer]
        own_k.view(-1, E).index_copy_(0, self.write, k.reshape(n * K, E))  # as [slots, :, own] = k, in 0.7x of the time
        own_v.view(-1, E).index_copy_(0, self.write, v.reshape(n * K, E))
        own_k, own_v = own_k[:n, :, :c].flatten(0, 1), own_v[:n, :, :c].flatten(0, 1)  # (n*K, c, E), views
        prompt_k, prompt_v = self.cache.prompt_k[layer][:g].flatten(0, 1), self.cache.prompt_v[layer][:g].flatten(0, 1)  # (g*K, P, E)

        q = q * E**-0.5
        own = torch.bmm(q.reshape(n * K, R, E), own_k.transpose(1, 2)).view(n, K, R, c)
        on_grid = self.to_grid(q).view(g, m, K, R, E).transpose(1, 2).reshape(g * K, m * R, E)
        prompt = self.from_grid(torch.bmm(on_grid, prompt_k.transpose(1, 2)).view(g, K, m, R, P).transpose(1, 2).reshape(g * m, K, R, P))
        # one softmax over both parts: a row's keys are its prompt's and its own
        w = torch.cat([prompt, own], -1).add_(self.mask[:n, ..., : P + c]).softmax(-1)
        out = torch.bmm(w[..., P:].reshape(n * K, R, c), own_v).view(n, H, E)
        on_grid = self.to_grid(w[..., :P]).view(g, m, K, R, P).transpose(1, 2).reshape(g * K, m * R, P)
        return out.add_(self.from_grid(torch.bmm(on_grid, prompt_v).view(g, K, m, R, E).transpose(1, 2).reshape(g * m, H, E)))

    def to_grid(self, x):
        return x if self.is_grid else x.index_select(0, self.grid)

    def from_grid(self, x):
        return x if self.is_grid else x.index_select(0, self.back)


class Progress:
    """A line that moves while rows finish, when standard error is a terminal; nothing otherwise."""

    def __init__(self, total: int, label: str):
        self.total, self.label, self.start, self.last = total, label, time.perf_counter(), 0.0
        self.shown = sys.stderr.isatty()

    def show(self, done: int, tokens: int):
        now = time.perf_counter()
        if self.shown and now - self.last > 0.2:
            self.last = now
            bar = "#" * (20 * done // self.total)
            print(f"\r{self.label} [{bar:20}] {done}/{self.total}  {tokens / (now - self.start):,.0f} tokens/s ", end="", file=sys.stderr, flush=True)

    def close(self):
        if self.shown:
            print("\r" + " " * 70 + "\r", end="", file=sys.stderr, flush=True)


def generate(model, prompts, *, group_size, max_new_tokens, stop_ids, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, slots=None,
             seed=0, step=0, prompt_numbers=None, entropy=False, on_group=None, label="sampling", cuda_graphs=True, block=None) -> Rollout:
    """Draws group_size completions of each prompt.

    prompts: B non-empty lists of ids. max_new_tokens: the longest completion, tokens; a prompt near the end of the model's context gets
    what is left. stop_ids: any of them ends a row and stays in it. temperature 0 is greedy. slots: rows decoded at once
    (default: all, at most 256). seed, step, prompt_numbers (default 0..B-1): the keys of the draws. entropy: note that of every
    distribution drawn from, too. on_group(b, ids): called when the last row of prompt b is finished. label: of the progress bar.
    block: steps between looks of the host at what was drawn; 0: the plan for a CPU, which looks after every step (default: 8 where Triton runs,
    else 0). cuda_graphs: with blocks, record their step on a GPU, and leave buffers and graphs with the model for the next call (decode.py).

    Raises ValueError for an empty prompt, a prompt that fills the context, or options out of range.
    """
    numbers = list(range(len(prompts)) if prompt_numbers is None else prompt_numbers)
    check_options(model, prompts, group_size, max_new_tokens, temperature, top_k, top_p, min_p, slots, numbers, block)
    limits = [min(max_new_tokens, model.shape.context - len(p)) for p in prompts for _ in range(group_size)]
    sampler = Sampler(model, prompts, group_size, limits, stop_ids, (temperature, top_k, top_p, min_p), slots, (seed, step, numbers), label, entropy, on_group,
                      cuda_graphs, block)
    return sampler.run()


class Sampler:
    """One call of `generate`: the queue, the rows in slots, and what they have drawn so far.

    limits: N, the longest completion of each row; policy: temperature, top_k, top_p, min_p; key: seed, step and the prompts' numbers.
    """

    def __init__(self, model, prompts, group_size, limits, stop_ids, policy, slots, key, label, entropy=False, on_group=None, cuda_graphs=True, block=None):
        B, G, dev = len(prompts), group_size, model.device
        self.model, self.prompts, self.G, self.limits, self.stop_ids = model, prompts, G, limits, set(stop_ids)
        self.temperature, self.top_k, self.top_p, self.min_p = policy
        # the last token of a row is never read back, so a slot holds one key fewer than the row may have tokens
        sizes = dict(prompt_tokens=max(map(len, prompts)), new_tokens=max(1, max(limits) - 1))
        self.block = (decode.BLOCK if flash.on_triton(model.embed) else 0) if block is None else block
        slots = min(slots or 256, B * G)
        if self.block:
            self.plan = static_blocks(model, self.block, cuda_graphs, slots=slots, group_size=G, prompts=B, **sizes)
            self.slots, self.cache = min(slots, self.plan.slots), self.plan.cache
            self.plan.begin(slots=self.slots, stop_ids=stop_ids, graphs=cuda_graphs)
        else:
            self.slots = plan_slots(model.shape, model.embed.itemsize, usable_bytes(dev), slots=slots, group_size=G, prompts=B, **sizes)
            self.cache = Cache(model, groups=group_places(self.slots, G, B), slots=self.slots, **sizes)
            self.plan = Decode(self.cache, self.slots, dev, model.dtype)
            # of each slot: its row, the token to feed, how many own tokens are in the cache, its prompt's length
            self.row, self.token, self.own, self.prompt_length = (torch.zeros(self.slots, dtype=torch.long, device=dev) for _ in range(4))
        self.state = self.plan.state if self.block else (self.row, self.token, self.own, self.prompt_length, self.plan.mask)
        self.places = group_places(self.slots, G, B)
        self.flying = None  # the block that runs: its number, steps and rows
        # every key of the batch at once: ten rounds of integer arithmetic a token would be a third of a small model's step
        seed, step, numbers = key
        self.keys = sampling.token_keys(seed, step, torch.tensor(numbers)[:, None, None], torch.arange(G)[None, :, None],
                               torch.arange(max(limits) if self.temperature else 0)).view(B * G, -1).to(dev)
        self.ids, self.logprobs, self.entropies, self.stopped = *([[] for _ in range(B * G)] for _ in range(3)), [False] * (B * G)
        self.ended = [False] * (B * G)
        self.wants_entropy, self.on_group = entropy, on_group
        self.queue = deque(range(B))  # prompts not prefilled yet
        self.waiting = deque()  # rows that have their first token and no slot
        self.live: list[int] = []  # the row in slot 0, 1, ..
        self.placed: list[int] = []  # the prompt in place 0, 1, .. of the cache
        self.left = [G] * B  # rows of each prompt that are not finished
        self.slot_steps = self.done = self.drawn = 0
        self.progress, self.start = Progress(B * G, label), time.perf_counter()

    @torch.no_grad()
    def run(self) -> Rollout:
        # copying the weights takes as long as a dozen steps save
        with packed(self.model) if max(self.limits) >= PACK_STEPS else nullcontext() as head:
            self.head = head or partial(logits_fp32, weight=self.model.head)
            self.seat([])
            while self.live:
                self.seat(self.decode_block() if self.block else self.decode())
        self.progress.close()
        stats = dict(seconds=time.perf_counter() - self.start, tokens=self.drawn, slot_steps=self.slot_steps, useful_slot_steps=self.drawn - len(self.ids),
                     slots=self.slots, cache_bytes=self.cache.bytes())
        return Rollout(self.ids, self.logprobs, self.stopped, self.entropies, stats)

    def decode(self) -> list[int]:
        """One token for every live row. Returns the slots whose rows are finished."""
        n = len(self.live)
        own, rows = self.own[:n], self.row[:n]
        self.plan.advance(own, max([len(self.ids[row]) for row in self.live]) - 1)  # a row has drawn one token more than it has keys
        hidden = self.model(self.token[:n], self.prompt_length[:n] + own, self.plan)
        own += 1
        token, logp, entropies = self.choose(hidden, self.keys[rows, own] if self.temperature else None)
        self.token[:n] = token
        self.slot_steps += self.slots if self.queue or self.waiting else n  # an empty slot is waste while somebody waits for it
        return self.record(self.live, *lists(token, logp, entropies))

    def decode_block(self) -> list[int]:
        """Launches up to `block` steps of every live row, then records what the block before drew. Returns the slots whose rows are finished."""
        before, (number, steps, rows) = self.flying, self.flying or (0, 0, [])
        coming = {row: steps for row in rows}
        left = max(self.limits[row] - len(self.ids[row]) - coming.get(row, 0) for row in self.live)
        self.flying = None
        if left > 0:  # else all rows are through once that block is
            ahead = min(self.block, left)
            size = self.plan.launch(self.model, len(self.live), ahead, self.choose, (self.temperature, self.top_k, self.top_p, self.min_p, self.wants_entropy))
            self.slot_steps += ahead * (max(size, self.slots) if self.queue or self.waiting else size)
            self.flying = self.plan.launched, ahead, list(self.live)
        for tokens, logps, entropies in zip(*self.plan.read(number, steps, len(rows))) if before else ():
            on = [i for i, row in enumerate(rows) if not self.ended[row]]  # what a finished row went on to draw is nothing
            self.record([rows[i] for i in on], *([x[i] for i in on] for x in (tokens, logps, entropies)))
        # own keys of any row at most, for moves
        self.plan.c = min(self.cache.C, max(len(self.ids[row]) for row in self.live) + (self.flying[1] if self.flying else 0))
        return [slot for slot, row in enumerate(self.live) if self.ended[row]]

    def choose(self, hidden, key, times=1):
        """Draws a token of each row from its hidden state and its key (n,) -> ids (n,), log-probabilities (n,), entropies (n,) or None.

        hidden (n / times, D): the first tokens of a group are `times` draws from the same logits. key: not read at temperature 0.
        """
        logits, key = self.head(hidden), key if self.temperature else None
        if sampling.on_triton(logits):  # all that follows in one launch
            return sampling.sample(logits, key, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, times=times)
        if self.temperature not in (0, 1):
            logits.div_(self.temperature)
        if self.temperature and (self.top_k or self.top_p < 1 or self.min_p):
            truncate_(logits, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        if times > 1:
            logits = logits.repeat_interleave(times, 0)
        entropies = sampling.entropy(logits) if self.wants_entropy else None  # a pass over the logits, which few objectives need
        return *(sampling.draw(logits, key) if self.temperature else sampling.greedy(logits)), entropies

    def record(self, rows: list[int], tokens: list[int], logps: list[float], entropies: list[float] | None) -> list[int]:
        """Notes what each row drew. Returns the indices of the rows for which that was the last, and closes their accounts."""
        if self.wants_entropy:
            for row, h in zip(rows, entropies):
                self.entropies[row].append(h)
        if not math.isfinite(sum(logps)):
            raise FloatingPointError("the model's logits are not finite: its weights are broken (a learning rate too high, or a damaged checkpoint)")
        ended = []
        for i, row in enumerate(rows):
            ids = self.ids[row]
            ids.append(tokens[i])
            self.logprobs[row].append(logps[i])
            if tokens[i] in self.stop_ids or len(ids) == self.limits[row]:
                self.stopped[row], self.ended[row] = tokens[i] in self.stop_ids, True
                ended.append(i)
        for i in ended:
            self.leave(rows[i] // self.G)
        self.drawn += len(rows)
        self.done += len(ended)
        self.progress.show(self.done, self.drawn)
        return ended

    def leave(self, b: int):
        """A row of prompt b is finished. When it was the last, nobody reads the prompt any more: the last one placed takes its place."""
        self.left[b] -= 1
        if not self.left[b]:
            if self.on_group:
                self.on_group(b, self.ids[b * self.G : (b + 1) * self.G])
            place, last = self.placed.index(b), self.placed.pop()
            if last != b:
                self.cache.move_group(len(self.placed), place)
                self.placed[place] = last

    def seat(self, free: list[int]):
        """Gives free slots to waiting rows, prefilling prompts for them as needed; what stays free is closed up."""
        vacant = free + list(range(len(self.live), self.slots))
        while self.queue and len(self.waiting) < len(vacant) and len(self.placed) < self.places:
            self.prefill(len(vacant) - len(self.waiting))
        taken, empty = vacant[: len(self.waiting)], free[len(self.waiting) :]
        if taken:
            self.enter(taken, [self.waiting.popleft() for _ in taken])
        if empty:
            self.close_up(empty)
        if self.live and (taken or free):  # the grid costs about as much as a layer, so it is laid again only when rows came or went
            place = {b: i for i, b in enumerate(self.placed)}
            self.plan.compose([place[row // self.G] for row in self.live])

    def enter(self, slots: list[int], rows: list[int]):
        """Puts rows whose first token is drawn into slots."""
        for slot, row in zip(slots, rows):
            self.live[slot : slot + 1] = [row]  # a new slot is always the next one
        prompts = [len(self.prompts[row // self.G]) for row in rows]
        slot, row, token, length, limit = upload([slots, rows, [self.ids[row][0] for row in rows], prompts, [self.limits[row] for row in rows]], self.keys.device)
        if self.block:
            self.plan.enter(slot, token, length, limit, self.keys[row])
        else:
            self.row[slot], self.token[slot], self.own[slot], self.prompt_length[slot] = row, token, 0, length
            self.plan.enter(slot, length)

    def close_up(self, empty: list[int]):
        """The last live rows move into empty slots, so that live rows are slots 0..n-1 again."""
        n, gone = len(self.live) - len(empty), set(empty)
        holes, movers = [s for s in empty if s < n], [s for s in range(n, len(self.live)) if s not in gone]
        if holes:
            for hole, mover in zip(holes, movers):
                self.live[hole] = self.live[mover]
            source, target = upload([movers, holes], self.keys.device)
            self.cache.move_rows(source, target, self.plan.c)
            for x in self.state:
                x[target] = x[source]
        del self.live[n:]

    def prefill(self, wanted: int):
        """Prefills whole groups, as many as `wanted` rows and the cache's places ask for; their first tokens are drawn, they wait."""
        batch, tokens, first = [], 0, len(self.placed)
        while self.queue and len(batch) * self.G < wanted and len(self.placed) < self.places and (
                not batch or tokens + len(self.prompts[self.queue[0]]) <= PREFILL_TOKENS):
            batch.append(self.queue.popleft())
            tokens += len(self.prompts[batch[-1]])
            self.placed.append(batch[-1])
        plan = Prefill(self.model, [self.prompts[b] for b in batch], self.cache, list(range(first, len(self.placed))))
        hidden = self.model(plan.ids, plan.positions, plan)[plan.last]  # (groups, D)
        rows = [row for b in batch for row in range(b * self.G, (b + 1) * self.G)]
        key = self.keys[upload(rows, hidden.device), 0] if self.temperature else None
        ended = set(self.record(rows, *lists(*self.choose(hidden, key, times=self.G))))
        self.waiting.extend(row for i, row in enumerate(rows) if i not in ended)


def lists(*tensors) -> list:
    return [t if t is None else t.tolist() for t in tensors]


def check_options(model, prompts, group_size, max_new_tokens, temperature, top_k, top_p, min_p, slots, numbers, block=None):
    """Raises ValueError, in one sentence, for what `generate` cannot do."""
    if not prompts:
        raise ValueError("there is no prompt to sample from")
    if len(numbers) != len(prompts):
        raise ValueError(f"{len(numbers)} prompt_numbers for {len(prompts)} prompts: each prompt needs its own")
    for b, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {b} is empty: at least one token must come before a completion")
        if min(prompt) < 0 or max(prompt) >= model.shape.V:
            raise ValueError(f"prompt {b} has ids from {min(prompt)} to {max(prompt)} and the model knows 0 to {model.shape.V - 1}: was it made by another tokenizer?")
        if len(prompt) >= model.shape.context:
            raise ValueError(f"prompt {b} has {len(prompt)} tokens and the model's context is {model.shape.context}: nothing could be sampled after it")
    for name, value, good in (("group_size", group_size, group_size >= 1), ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
                              ("temperature", temperature, temperature >= 0), ("top_k", top_k, top_k >= 0), ("top_p", top_p, 0 < top_p <= 1),
                              ("min_p", min_p, 0 <= min_p <= 1), ("slots", slots, slots is None or slots >= 1), ("block", block, block is None or block >= 0)):
        if not good:
            raise ValueError(f"{name}={value} makes no sense: see the comment of its key in config.py")
