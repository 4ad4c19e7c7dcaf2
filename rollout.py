"""Sampling: each prompt is prefilled once, its group's rows decode in slots, a free slot is refilled from the queue.

    rollout = generate(model, prompts, group_size=8, max_new_tokens=256, stop_ids=[2], seed=0, step=0)
    rollout.ids[n], rollout.logprobs[n], rollout.stopped[n]                      # row n answers prompt n // group_size

A completion is the list of ids that were drawn, the stop id included, each with the log-probability of the distribution it was
drawn from (temperature and truncation included): ids never become text and come back.

How it is laid out. The keys and values of a prompt lie once in the cache and are read by all rows of its group; each slot has its own
for the tokens it drew. Live rows are always slots 0..n-1: a finished row's place goes to the next row of the queue, and when
that is empty to the last live row, whose own keys move. So the matmuls see live rows only, and the batch shrinks by itself.

What a row draws depends on (seed, step, prompt, sample, position) and on its logits alone: see kernels/sample.py.

Dims: B prompts, G rows a prompt, N = B*G rows, n live rows, g live groups, m rows of a group at most, P prompt length, C own
length, L layers, H query heads, K key/value heads, R = H / K, E head width, V vocabulary.
"""
import sys
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from kernels.logprob import logits_fp32, truncate_
from kernels.sample import draw, greedy, uniforms
from model import Packed

PREFILL_TOKENS = 8192  # prompt tokens in one prefill: enough to fill the matmuls, few enough to bound the activations


@dataclass
class Rollout:
    """N = B * group_size completions. Row n answers prompt n // group_size."""

    ids: list[list[int]]  # drawn ids, the stop id included
    logprobs: list[list[float]]  # nats, of the distribution each id was drawn from; at temperature 0, of the untempered one
    stopped: list[bool]  # ended by a stop id; False: cut by the length limit
    stats: dict = field(default_factory=dict)  # seconds, tokens, slot_steps, useful_slot_steps, cache_bytes

    def group(self, b: int, group_size: int) -> list[list[int]]:
        return self.ids[b * group_size : (b + 1) * group_size]


class Cache:
    """Keys and values: prompts (L, groups, K, P, E), read by all rows of a group, and own tokens (L, slots, K, C, E)."""

    def __init__(self, model, *, groups: int, slots: int, prompt_tokens: int, new_tokens: int):
        s, kw = model.shape, dict(dtype=model.dtype, device=model.device)
        self.P = prompt_tokens
        # zeros, not empty: a masked key has weight 0, and 0 times a NaN found in memory is NaN
        self.prompt_k, self.prompt_v = (torch.zeros(s.L, groups, s.K, prompt_tokens, s.E, **kw) for _ in range(2))
        self.own_k, self.own_v = (torch.zeros(s.L, slots, s.K, new_tokens, s.E, **kw) for _ in range(2))

    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.prompt_k, self.prompt_v, self.own_k, self.own_v))

    def move_row(self, source: int, target: int, length: int):
        for t in (self.own_k, self.own_v):
            t[:, target, :, :length] = t[:, source, :, :length]

    def move_group(self, source: int, target: int):
        for t in (self.prompt_k, self.prompt_v):
            t[:, target] = t[:, source]


def cache_bytes(shape, itemsize: int, *, groups: int, slots: int, prompt_tokens: int, new_tokens: int) -> int:
    """Bytes of a Cache of these sizes, known before it is made. shape: model.Shape; itemsize: bytes of a number."""
    return 2 * shape.L * shape.K * shape.E * itemsize * (groups * prompt_tokens + slots * new_tokens)


def group_places(slots: int, group_size: int, prompts: int) -> int:
    """How many prompts lie in the cache at once: twice the groups that fill the slots, since groups end raggedly, and one being filled."""
    return min(prompts, 2 * -(-slots // group_size) + 1)


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
        self.mask = torch.full((slots, 1, 1, cache.P + cache.own_k.shape[3]), float("-inf"), dtype=dtype, device=device)
        self.slots = torch.arange(slots, device=device)

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
        self.grid, self.back = (torch.tensor(x, device=self.mask.device) for x in (grid, back))

    def enter(self, slot: int, prompt_length: int):
        """Opens a slot for a new row: it sees its prompt and nothing of its own yet."""
        self.mask[slot] = float("-inf")
        self.mask[slot, ..., :prompt_length] = 0.0

    def advance(self, own, longest: int):
        """Before a step: own (n,) is how many tokens each row has in its slot, longest the most of them; their next key opens."""
        self.own, self.c = own, longest + 1
        self.mask[self.slots[: self.n], 0, 0, self.cache.P + own] = 0.0

    def attend(self, layer, q, k, v):
        """q (n, H, E), k and v (n, K, E) -> (n, H, E)."""
        (n, H, E), (_, K, _), g, m, c, P = q.shape, k.shape, self.g, self.m, self.c, self.cache.P
        R, slots = H // K, self.slots[:n]
        own_k, own_v = self.cache.own_k[layer], self.cache.own_v[layer]
        own_k[slots, :, self.own], own_v[slots, :, self.own] = k, v
        own_k, own_v = own_k[:n, :, :c].flatten(0, 1), own_v[:n, :, :c].flatten(0, 1)  # (n*K, c, E), views
        prompt_k, prompt_v = self.cache.prompt_k[layer][:g].flatten(0, 1), self.cache.prompt_v[layer][:g].flatten(0, 1)  # (g*K, P, E)

        q = q * E**-0.5
        own = torch.bmm(q.reshape(n * K, R, E), own_k.transpose(1, 2)).view(n, K, R, c)
        on_grid = q.index_select(0, self.grid).view(g, m, K, R, E).transpose(1, 2).reshape(g * K, m * R, E)
        prompt = torch.bmm(on_grid, prompt_k.transpose(1, 2)).view(g, K, m, R, P).transpose(1, 2).reshape(g * m, K, R, P).index_select(0, self.back)
        # one softmax over both parts: a row's keys are its prompt's and its own
        w = torch.cat([prompt, own], -1).add_(self.mask[:n, ..., : P + c]).softmax(-1)
        out = torch.bmm(w[..., P:].reshape(n * K, R, c), own_v).view(n, H, E)
        on_grid = w[..., :P].index_select(0, self.grid).view(g, m, K, R, P).transpose(1, 2).reshape(g * K, m * R, P)
        prompt = torch.bmm(on_grid, prompt_v).view(g, K, m, R, E).transpose(1, 2).reshape(g * m, H, E).index_select(0, self.back)
        return out.add_(prompt)


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
             seed=0, step=0, prompt_numbers=None, label="sampling") -> Rollout:
    """Draws group_size completions of each prompt.

    prompts: B non-empty lists of ids. max_new_tokens: the longest completion, tokens; a prompt near the end of the model's context gets
    what is left. stop_ids: any of them ends a row and stays in it. temperature 0 is greedy. slots: rows decoded at once
    (default: all, at most 256). seed, step, prompt_numbers (default 0..B-1): the keys of the draws. label: of the progress bar.

    Raises ValueError for an empty prompt, a prompt that fills the context, or options out of range.
    """
    check_options(model, prompts, group_size, max_new_tokens, temperature, top_k, top_p, min_p, slots)
    sampler = Sampler(model, prompts, group_size, max_new_tokens, set(stop_ids), (temperature, top_k, top_p, min_p), slots,
                      (seed, step, range(len(prompts)) if prompt_numbers is None else prompt_numbers), label)
    return sampler.run()


class Sampler:
    """One call of `generate`: the queue, the rows in slots, and what they have drawn so far."""

    def __init__(self, model, prompts, group_size, max_new_tokens, stop_ids, policy, slots, key, label):
        B, G, dev = len(prompts), group_size, model.device
        self.model, self.prompts, self.G, self.stop_ids = model, prompts, G, stop_ids
        self.temperature, self.top_k, self.top_p, self.min_p = policy
        self.slots = min(slots or 256, B * G)
        self.limits = [min(max_new_tokens, model.shape.context - len(p)) for p in prompts]
        # the last token of a row is never read back, so a slot holds one key fewer than the row may have tokens
        sizes = dict(groups=group_places(self.slots, G, B), slots=self.slots, prompt_tokens=max(map(len, prompts)), new_tokens=max(1, max(self.limits) - 1))
        self.cache, self.places = Cache(model, **sizes), sizes["groups"]
        self.plan = Decode(self.cache, self.slots, dev, model.dtype)
        # every random number of the batch at once: ten rounds of integer arithmetic a token would be a third of a small model's step
        seed, step, numbers = key
        self.u = uniforms(seed, step, torch.tensor(numbers)[:, None, None], torch.arange(G)[None, :, None],
                          torch.arange(max(self.limits))[None, None]).view(B * G, -1).to(dev)
        self.ids, self.logprobs, self.stopped = ([[] for _ in range(B * G)], [[] for _ in range(B * G)], [False] * (B * G))
        self.queue = deque(range(B))  # prompts not prefilled yet
        self.waiting = deque()  # rows that have their first token and no slot
        self.live: list[int] = []  # the row in slot 0, 1, ..
        self.placed: list[int] = []  # the prompt in place 0, 1, .. of the cache
        self.left = [G] * B  # rows of each prompt that are not finished
        # of each slot: its row, the token to feed, how many own tokens are in the cache, its prompt's length
        self.row, self.token, self.own, self.prompt_length = (torch.zeros(self.slots, dtype=torch.long, device=dev) for _ in range(4))
        self.slot_steps = self.done = self.drawn = 0
        self.changed = False  # rows came or went since the decode plan was composed
        self.progress, self.start = Progress(B * G, label), time.perf_counter()

    @torch.no_grad()
    def run(self) -> Rollout:
        self.seat([])
        while self.live:
            self.seat(self.decode())
        self.progress.close()
        stats = dict(seconds=time.perf_counter() - self.start, tokens=self.drawn, slot_steps=self.slot_steps,
                     useful_slot_steps=self.drawn - len(self.ids), cache_bytes=self.cache.bytes())
        return Rollout(self.ids, self.logprobs, self.stopped, stats)

    def decode(self) -> list[int]:
        """One token for every live row. Returns the slots whose rows are finished."""
        n = len(self.live)
        own, rows = self.own[:n], self.row[:n]
        longest = max(len(self.ids[row]) for row in self.live)
        self.plan.advance(own, longest - 1)  # a row has drawn one token more than it has keys
        hidden = self.model(self.token[:n], self.prompt_length[:n] + own, self.plan)
        own += 1
        token, logp = self.choose(hidden, rows, own)
        self.token[:n] = token
        self.slot_steps += self.slots if self.queue or self.waiting else n
        finished = [self.record(row, t, lp) for row, t, lp in zip(self.live, token.tolist(), logp.tolist())]
        self.progress.show(self.done, self.drawn)
        return [slot for slot, end in enumerate(finished) if end]

    def choose(self, hidden, rows, t):
        """Draws token number t (n,) of each row from its hidden state (n, D) -> ids (n,), log-probabilities (n,)."""
        logits = logits_fp32(hidden, self.model.head)
        if self.temperature == 0:
            return greedy(logits)
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        return draw(truncate_(logits, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p), self.u[rows, t])

    def record(self, row: int, token: int, logp: float) -> bool:
        """Notes what a row drew; True when that was its last."""
        b = row // self.G
        self.ids[row].append(token)
        self.logprobs[row].append(logp)
        self.drawn += 1
        self.stopped[row] = token in self.stop_ids
        finished = self.stopped[row] or len(self.ids[row]) == self.limits[b]
        if finished:
            self.changed = True
            self.done += 1
            self.left[b] -= 1
            if not self.left[b]:  # nobody reads this prompt any more: the last one takes its place
                place, last = self.placed.index(b), self.placed.pop()
                if last != b:
                    self.cache.move_group(len(self.placed), place)
                    self.placed[place] = last
        return finished

    def seat(self, free: list[int]):
        """Gives free slots to waiting rows, prefilling prompts for them as needed; what stays free is closed up."""
        vacant = len(free) + self.slots - len(self.live)
        while self.queue and len(self.waiting) < vacant and len(self.placed) < self.places:
            self.prefill(vacant - len(self.waiting))
        while self.waiting and (free or len(self.live) < self.slots):
            row = self.waiting.popleft()
            if not free:
                self.live.append(row)
            self.enter(free.pop() if free else len(self.live) - 1, row)
        for slot in sorted(free, reverse=True):
            row, last = self.live.pop(), len(self.live)
            if slot != last:
                self.live[slot] = row
                self.cache.move_row(last, slot, int(self.own[last]))
                for x in (self.row, self.token, self.own, self.prompt_length, self.plan.mask):
                    x[slot] = x[last]
        if self.live and self.changed:  # the grid costs about as much as one layer, so it is laid again only when rows came or went
            place = {b: i for i, b in enumerate(self.placed)}
            self.plan.compose([place[row // self.G] for row in self.live])
            self.changed = False

    def enter(self, slot: int, row: int):
        """Puts a row whose first token is drawn into a slot."""
        P = len(self.prompts[row // self.G])
        self.live[slot], self.changed = row, True
        self.row[slot], self.token[slot], self.own[slot], self.prompt_length[slot] = row, self.ids[row][0], 0, P
        self.plan.enter(slot, P)

    def prefill(self, wanted: int):
        """Prefills whole groups, as many as `wanted` rows and the cache's places ask for; their first tokens are drawn, they wait."""
        batch, tokens = [], 0
        while self.queue and len(batch) * self.G < wanted and len(self.placed) < self.places and (
                not batch or tokens + len(self.prompts[self.queue[0]]) <= PREFILL_TOKENS):
            batch.append(self.queue.popleft())
            tokens += len(self.prompts[batch[-1]])
            self.placed.append(batch[-1])
        plan = Prefill(self.model, [self.prompts[b] for b in batch], self.cache, list(range(len(self.placed) - len(batch), len(self.placed))))
        hidden = self.model(plan.ids, plan.positions, plan)[plan.last]  # (groups, D)
        for b, h in zip(batch, hidden):
            rows = torch.arange(b * self.G, (b + 1) * self.G, device=h.device)
            # all G rows draw from one row of logits, each with its own random number
            token, logp = self.choose(h.expand(self.G, -1), rows, torch.zeros_like(rows))
            ended = [self.record(*x) for x in zip(rows.tolist(), token.tolist(), logp.tolist())]
            self.waiting.extend(row for row, end in zip(rows.tolist(), ended) if not end)


def check_options(model, prompts, group_size, max_new_tokens, temperature, top_k, top_p, min_p, slots):
    """Raises ValueError, in one sentence, for what `generate` cannot do."""
    if not prompts:
        raise ValueError("there is no prompt to sample from")
    for b, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {b} is empty: at least one token must come before a completion")
        if len(prompt) >= model.shape.context:
            raise ValueError(f"prompt {b} has {len(prompt)} tokens and the model's context is {model.shape.context}: nothing could be sampled after it")
    for name, value, good in (("group_size", group_size, group_size >= 1), ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
                              ("temperature", temperature, temperature >= 0), ("top_k", top_k, top_k >= 0), ("top_p", top_p, 0 < top_p <= 1),
                              ("min_p", min_p, 0 <= min_p <= 1), ("slots", slots, slots is None or slots >= 1)):
        if not good:
            raise ValueError(f"{name}={value} makes no sense: see the comment of its key in config.py")
