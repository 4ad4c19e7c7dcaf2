"""The decode step for a GPU: on static buffers, in blocks of steps between looks of the host, captured in CUDA graphs.

    blocks = Blocks(model, groups=9, slots=64, prompt_tokens=128, new_tokens=255, block=8)
    blocks.begin(slots=64, stop_ids=[2], graphs=True);  blocks.enter(...);  blocks.compose(...)
    size = blocks.launch(model, n, 8, choose, kind)       # returns at once
    token, logp, entropy = blocks.read(blocks.launched, 8, n)   # or blocks.launched - 1: the block launched before the last one

A step of a 0.5B model is about 400 launches, each of which costs the host more time than the GPU. So the whole step (model, draw, stop
flags, positions, what was drawn) reads and writes tensors that never move, is recorded once for each of a few slot counts, and is
replayed. The host looks only after `block` steps, and at the block before, while the next one runs: what it does (recording, refilling) is
hidden behind the GPU's work, and a row that has finished costs up to 2 * block - 1 steps that nobody wants.

What keeps that harmless. A finished row's flag freezes it: it writes the key of the same place again and again, inside its slot and below the
context's end, and what it draws is not recorded. Empty slots, up to the graph's size, are frozen the same way. Draws depend on the row's own
keys and nothing else (kernels/sample.py), so neither the block nor the graph's size can change a token.

Who owns the buffers and graphs: the model, as `model.decode_graphs`, because a graph has the addresses of its weights in it. An optimiser writes
weights in place, so graphs stay good over training. `kept` drops them where a weight has moved (another dtype or device, an adapter
applied), and a call that needs larger buffers replaces them. They are never copied with the model, and not kept at all where the cache
takes over an eighth of the GPU: training needs the memory between two calls.

Dims: n live rows, L layers, K key/value heads, E head width, P prompt length, C own length, V vocabulary.
"""
import torch

from kernels import flash_attention as flash, rope
from kernels.attention import decode_ref

BLOCK = 8  # steps between looks of the host: a row's end is seen 11 steps late by mean, half of its own block and the whole next one
# slots of the graphs, and the number asked for is one more. Recorded when first needed. With 32, 64, 128, 256 alone, 4 x 64 jobs of 8 to 384
# tokens took 14 % more slot-steps while the last rows ran out
SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
LARGEST = 1 / 8  # of the device's memory, for what is kept between two calls


class Cache:
    """Keys and values: prompts (L, groups, K, P, E), read by all rows of a group, and own tokens (L, slots, K, C, E)."""

    def __init__(self, model, *, groups: int, slots: int, prompt_tokens: int, new_tokens: int):
        s, kw = model.shape, dict(dtype=model.dtype, device=model.device)
        self.P, self.C = prompt_tokens, new_tokens
        # zeros, not empty: a masked key has weight 0, and 0 times a NaN found in memory is NaN
        self.prompt_k, self.prompt_v = (torch.zeros(s.L, groups, s.K, prompt_tokens, s.E, **kw) for _ in range(2))
        self.own_k, self.own_v = (torch.zeros(s.L, slots, s.K, new_tokens, s.E, **kw) for _ in range(2))

    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.prompt_k, self.prompt_v, self.own_k, self.own_v))

    def move_rows(self, source, target, length: int):
        """The first `length` own keys of slots source (i,) go to slots target (i,)."""
        for t in (self.own_k, self.own_v):
            t[:, target, :, :length] = t[:, source, :, :length]

    def move_group(self, source: int, target: int):
        for t in (self.prompt_k, self.prompt_v):
            t[:, target] = t[:, source]


def cache_bytes(shape, itemsize: int, *, groups: int, slots: int, prompt_tokens: int, new_tokens: int) -> int:
    """Bytes of a Cache of these sizes, known before it is made. shape: model.Shape; itemsize: bytes of a number."""
    return 2 * shape.L * shape.K * shape.E * itemsize * (groups * prompt_tokens + slots * new_tokens)


class Blocks:
    """Static buffers of `slots` rows, the plan of a decoding step on them, and its graphs.

    wanted: slots that were asked for; fewer may have fitted. The attributes with one entry a slot are listed in `state`.
    """

    def __init__(self, model, *, groups: int, slots: int, prompt_tokens: int, new_tokens: int, block: int, wanted: int | None = None):
        dev, shape = model.device, model.shape
        self.sizes = dict(groups=groups, slots=slots, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        self.cache, self.slots, self.wanted, self.block, self.addresses = Cache(model, **self.sizes), slots, wanted or slots, block, addresses(model)
        # (slots, 6) as flash.Tiles.queries: a slot's one query, how many own keys come before it, where its prompt and its own keys lie
        self.table, slot = torch.zeros(slots, 6, dtype=torch.long, device=dev), torch.arange(slots, device=dev)
        self.table[:, 0], self.table[:, 1], self.table[:, 5] = slot, 1, slot * shape.K * new_tokens
        self.prompt_length = self.table[:, 4]  # a view
        # the token to feed, how many own tokens are in the cache, the longest completion
        self.token, self.own, self.limit = (torch.zeros(slots, dtype=torch.long, device=dev) for _ in range(3))
        self.done = torch.ones(slots, dtype=torch.bool, device=dev)
        self.keys = torch.zeros(slots, new_tokens + 1, dtype=torch.long, device=dev)  # of the draws, by position
        self.state = (self.token, self.own, self.limit, self.done, self.keys, self.prompt_length)
        self.stop = torch.zeros(shape.V, dtype=torch.bool, device=dev)
        self.number = torch.zeros(1, dtype=torch.long, device=dev)  # of the step in its block
        # id, log-probability and entropy, in one tensor for one copy; fp64 holds them all exactly
        self.drawn = torch.zeros(3, block, slots, dtype=torch.float64, device=dev)
        self.on_gpu = dev.type == "cuda"
        self.host = [torch.zeros(self.drawn.shape, dtype=torch.float64, pin_memory=self.on_gpu) for _ in range(2)]
        self.events = [torch.cuda.Event() for _ in range(2)] if self.on_gpu else []
        self.pool = torch.cuda.graph_pool_handle() if self.on_gpu else None  # one for all graphs: they never run side by side
        self.graphs, self.use_graphs, self.launched, self.c = {}, False, 0, 0

    def __deepcopy__(self, memo):
        return None  # a copied model has other weights

    def holds(self, *, slots: int, block: int, **sizes) -> bool:
        """Whether a call of these sizes can run here; with fewer slots than it asks for only if these were all that fitted."""
        return slots <= max(self.slots, self.wanted) and block <= self.block and all(n <= self.sizes[name] for name, n in sizes.items())

    def begin(self, *, slots: int, stop_ids, graphs: bool):
        """A call of generate begins, with this many slots: no row is in. Whatever the one before left behind, an error included, is forgotten."""
        self.use_graphs, self.batches = graphs and self.on_gpu, sorted({s for s in SIZES if s < slots} | {slots})
        self.done.fill_(True)
        for x in (self.own, self.limit, self.stop):
            x.zero_()
        self.stop[[i for i in stop_ids if 0 <= i < len(self.stop)]] = True

    def enter(self, slots, token, prompt_lengths, limits, keys):
        """Rows go into slots (i,): each feeds `token`, sees its prompt and nothing of its own yet. keys (i, <= C + 1)."""
        self.token[slots], self.own[slots], self.limit[slots], self.done[slots], self.prompt_length[slots] = token, 0, limits, False, prompt_lengths
        self.keys[slots, : keys.shape[1]] = keys

    def compose(self, groups: list[int]):
        """The prompts of live rows lie in the cache's places `groups`."""
        self.table[: len(groups), 3] = upload(groups, self.table.device) * (self.cache.P * self.cache.prompt_k.shape[2])

    def attend(self, layer, q, k, v):
        """q (n, H, E), k and v (n, K, E) -> (n, H, E)."""
        cached = [t[layer] for t in (self.cache.prompt_k, self.cache.prompt_v, self.cache.own_k, self.cache.own_v)]
        rope.store_keys(k, v, *cached[2:], self.own[: len(q)])
        return (flash.flash_decode if flash.on_triton(q) else decode_ref)(q, *cached, self.table[: len(q)])

    def step(self, model, n: int, choose):
        """One token for slots 0..n-1. What it reads and writes lies in static buffers, and nothing depends on a value that the host knows: so it can be recorded."""
        own, done = self.own[:n], self.done[:n]
        self.table[:n, 2] = own
        key = self.keys[:n].gather(1, own[:, None] + 1)[:, 0]  # token number 0 was drawn from the prompt
        token, logp, entropy = choose(model(self.token[:n], self.prompt_length[:n] + own, self), key)
        drawn = torch.stack([x.double() for x in (token, logp, logp if entropy is None else entropy)])  # (3, n)
        self.drawn[:, :, :n].index_copy_(1, self.number, drawn[:, None])
        self.number += 1
        self.token[:n] = token
        done |= self.stop[token] | (own + 2 >= self.limit[:n])
        own += ~done  # a row that is done stays where it is: its key's place is inside its slot

    def launch(self, model, n: int, steps: int, choose, kind) -> int:
        """Starts `steps` steps of slots 0..n-1, and the copying of what they draw. Returns how many slots they compute, n or more.

        choose(hidden (m, D), key (m,)) -> token, logp, entropy (m,). kind: whatever else a recorded step depends on, hashable.
        """
        assert 1 <= n <= self.batches[-1] and 1 <= steps <= self.block, f"{n} rows of {self.batches[-1]}, {steps} steps of {self.block}"
        size = next(s for s in self.batches if s >= n)
        self.number.zero_()
        kind = (size, kind, flash.MODE, model.training, *(m.enabled for m in model.modules() if hasattr(m, "enabled")))
        if self.use_graphs and kind not in self.graphs:
            self.graphs[kind] = self.capture(model, size, choose)
        for _ in range(steps):
            self.graphs[kind].replay() if self.use_graphs else self.step(model, size, choose)
        self.launched += 1
        self.host[self.launched % 2].copy_(self.drawn, non_blocking=True)
        if self.on_gpu:
            self.events[self.launched % 2].record()
        return size

    def capture(self, model, size: int, choose):
        """Records a step of `size` slots."""
        # it runs once before, which compiles kernels and makes cuBLAS's workspace; that draws tokens nobody asked for, so the state is put back
        state = (self.token, self.own, self.done, self.number)
        before, current, side, graph = [x.clone() for x in state], torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.step(model, size, choose)
        current.wait_stream(side)
        # thread_local: rewards may be computed in a thread meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.step(model, size, choose)
        for x, was in zip(state, before):
            x.copy_(was)
        return graph

    def read(self, launched: int, steps: int, n: int):
        """What block number `launched` (the last or the one before) drew: ids, log-probabilities, entropies, each steps lists of n. Waits for it."""
        assert self.launched - 2 < launched <= self.launched, "its buffer has been written over"
        if self.on_gpu:
            self.events[launched % 2].synchronize()
        token, logp, entropy = self.host[launched % 2][:, :steps, :n]
        return token.long().tolist(), logp.tolist(), entropy.tolist()


def upload(x: list, device):
    """A list of integers as an int64 tensor on the device, without waiting for what runs there."""
    x = torch.tensor(x, dtype=torch.long)
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


def addresses(model):
    """What a recorded step knows of the weights: where they lie, and as what."""
    return [(p.data_ptr(), p.shape, p.dtype, p.device) for p in model.parameters()]


def kept(model) -> Blocks | None:
    """The buffers and graphs of earlier calls; None, and they are dropped, where the weights have moved since."""
    blocks = getattr(model, "decode_graphs", None)
    if blocks is not None and blocks.addresses != addresses(model):
        blocks = model.decode_graphs = None
    return blocks


def keep(model, blocks: Blocks):
    """Lets the model own them, unless training would miss the memory."""
    small = not blocks.on_gpu or blocks.cache.bytes() <= LARGEST * torch.cuda.mem_get_info(model.device)[1]
    model.decode_graphs = blocks if small else None
