"""The decoding step, on static buffers: a token for every row in a slot. On a GPU it runs in CUDA graphs.

    slots = Slots(model, groups=9, slots=64, prompt_tokens=128, new_tokens=255, block=8)
    slots.begin(model, choose, stop_ids=[2], slots=64, cuda_graphs=True)
    slots.enter(...)                          # rows go into slots
    slots.seat(...)                           # where their prompts are
    slots.run(n, 8, longest)                  # starts 8 steps of slots 0..n-1 and returns at once
    tokens, logps, entropies = slots.read()   # of the oldest block that has not been read; waits for it

A *slot* is one row's seat in the batch: the token to feed next, how many tokens it has drawn, its own
keys. A *block* is a number of steps between two looks of the host: 1 on a CPU, 8 on a GPU. A *place*
holds a prompt's keys (cache.py).

Why static buffers. A step of a 0.5B model is about 400 kernel launches, each of which costs the host more
time than the GPU. So all of a step (model, draw, stop flags, positions, output) reads and writes tensors that
never move, is recorded once for each of a few batch sizes, and is replayed. The host looks only after a
block, and at the block before, while the next one runs: what it does is hidden behind the GPU's work, and a
row that has finished costs up to 2 * block - 1 steps that nobody wants. A CPU runs the same step, one at a
time, and looks after each.

Why the wasted steps are harmless. A finished row's flag freezes it: it writes the key of the same place again
and again, inside its slot and below the end of the context, and what it draws is not recorded. Empty slots,
up to the graph's size, do the same. A draw depends on the row's own key (kernels/sample.py), so no block or
graph size can change a token.

Two forms of attention over the cache have the same methods. `GridAttention` is torch: it reads a prompt's
keys once a group, and needs the host between blocks. `TableAttention` is one Triton kernel that finds keys by
a table on the device, so it can be recorded.

Dims: n live rows, g places in use, m rows of a group at most, L layers, H query heads, K key/value heads, R =
H / K, E head width, P prompt tokens of a place, C own tokens of a slot, V vocabulary.
"""

from collections import deque

import torch

from cache import Cache
from kernels import flash_attention as flash
from kernels import rope, switch
from kernels.attention import decode_ref

# Decode steps launched before the host reads the results. A larger block hides launch cost but notices a
# finished row later: on average 11 wasted steps at 8, half of the row's own block and all of the next one.
BLOCK = 8

# Batch sizes that graphs are recorded for, when first needed; the number of slots is one more. With 32, 64,
# 128, 256 alone, 4 x 64 jobs of 8 to 384 tokens took 14 % more slot-steps while the last rows ran out.
SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)

# Buffers that take more than this share of the GPU are not kept between two calls: training needs the memory.
LARGEST = 1 / 8


# ----------------------------------------------------------------------------------- attention over the cache
class GridAttention:
    """The torch form: row i adds its key to slot i and sees its group's prompt and its own tokens.

    The prompt's part runs once a group: the rows of a group stand together as queries, so a prompt's keys
    are read once and not G times. For that, rows are laid on a grid of g places x m rows (`grid`; unused
    cells hold any row), and `back` finds each row on it. The R query heads of a key head are R rows of
    queries, so no key is expanded.
    """

    # The grid's shape and the longest row are Python numbers: a recording would keep old ones.
    records = False

    def __init__(self, cache: Cache, slots: int, model):
        self.cache = cache
        device, K = model.device, model.shape.K
        # Additive mask over the [prompt | own] keys of each slot. Own keys open one by one as they are
        # written.
        shape = (slots, 1, 1, cache.P + cache.C)
        self.mask = torch.full(shape, float("-inf"), dtype=model.dtype, device=device)
        self.state = (self.mask,)  # moves with its row
        self.prompt_position = torch.arange(cache.P, device=device)
        self.own_position = torch.arange(cache.C, device=device)
        self.slots = torch.arange(slots, device=device)
        # where each slot's and key head's own keys start, as if own_k were flat
        self.first_key = torch.arange(slots * K, device=device).view(slots, K) * cache.C

    def enter(self, slots, prompt_lengths, own):
        """Rows are in slots (i,): each sees its prompt, prompt_lengths (i,), and its first own (i,) keys."""
        prompt = self.prompt_position < prompt_lengths[:, None]  # (i, P)
        seen = torch.cat([prompt, self.own_position < own[:, None]], 1)  # (i, P + C)
        self.mask[slots, 0, 0] = torch.where(seen, 0.0, float("-inf")).to(self.mask.dtype)

    def seat(self, places: list[int]):
        """Lays the grid for live rows whose prompts are in `places`. It costs about as much as a layer."""
        members: list[list[int]] = [[] for _ in range(max(places) + 1)]
        for row, place in enumerate(places):
            members[place].append(row)
        n, m = len(places), max(map(len, members))
        grid, back = [0] * (len(members) * m), [0] * n
        for place, rows in enumerate(members):
            for i, row in enumerate(rows):
                grid[place * m + i] = row
                back[row] = place * m + i
        self.g, self.m = len(members), m
        # whole groups in order are a grid already: four gathers a layer less, 10-20 % of attend
        self.is_grid = grid == list(range(n))
        self.grid = torch.tensor(grid, device=self.mask.device)
        self.back = torch.tensor(back, device=self.mask.device)

    def advance(self, own, prompt_lengths, longest: int):
        """Before a step: rows have `own` (n,) tokens in their slots, `longest` at
        most, and their next key opens.
        """
        n = len(own)
        self.visible = longest + 1  # own keys that any row sees
        self.write = (self.first_key[:n] + own[:, None]).flatten()
        self.mask[self.slots[:n], 0, 0, self.cache.P + own] = 0.0

    def attend(self, layer, qk, v, cos, sin):
        """qk (n, H + K, E), v (n, K, E), cos and sin (n, 1, E/2) -> (n, H, E)."""
        n, K, E = v.shape
        H = qk.shape[1] - K
        q, k = rope.rotate(qk, cos, sin).split([H, K], 1)
        g, m, R, P, c = self.g, self.m, H // K, self.cache.P, self.visible
        prompt_k, prompt_v, own_k, own_v = self.cache.layer(layer)
        # as own_k[slots, :, own] = k, in 0.7x of the time
        own_k.view(-1, E).index_copy_(0, self.write, k.reshape(n * K, E))
        own_v.view(-1, E).index_copy_(0, self.write, v.reshape(n * K, E))
        own_k, own_v = own_k[:n, :, :c].flatten(0, 1), own_v[:n, :, :c].flatten(0, 1)  # (n*K, c, E)
        prompt_k, prompt_v = prompt_k[:g].flatten(0, 1), prompt_v[:g].flatten(0, 1)  # (g*K, P, E)

        q = q * E**-0.5
        own = torch.bmm(q.reshape(n * K, R, E), own_k.transpose(1, 2)).view(n, K, R, c)
        queries = self.to_grid(q).view(g, m, K, R, E).transpose(1, 2).reshape(g * K, m * R, E)
        scores = torch.bmm(queries, prompt_k.transpose(1, 2)).view(g, K, m, R, P)
        prompt = self.from_grid(scores.transpose(1, 2).reshape(g * m, K, R, P))  # (n, K, R, P)
        # one softmax over both parts: a row's keys are its prompt's and its own
        w = torch.cat([prompt, own], -1).add_(self.mask[:n, ..., : P + c]).softmax(-1)

        out = torch.bmm(w[..., P:].reshape(n * K, R, c), own_v).view(n, H, E)
        weights = self.to_grid(w[..., :P]).view(g, m, K, R, P).transpose(1, 2).reshape(g * K, m * R, P)
        values = torch.bmm(weights, prompt_v).view(g, K, m, R, E)
        return out.add_(self.from_grid(values.transpose(1, 2).reshape(g * m, H, E)))

    def to_grid(self, x):
        return x if self.is_grid else x.index_select(0, self.grid)

    def from_grid(self, x):
        return x if self.is_grid else x.index_select(0, self.back)


class TableAttention:
    """The Triton form: the kernel finds a row's keys by its line of a table on the
    device. The host is not needed.
    """

    records = True

    def __init__(self, cache: Cache, slots: int, model):
        self.cache = cache
        slot = torch.arange(slots, device=model.device)
        nothing = torch.zeros_like(slot)
        self.table = table_of(cache, slot, nothing, nothing, nothing)
        self.state = ()  # `seat` and `advance` write all that depends on the row

    def enter(self, slots, prompt_lengths, own):
        """Rows are in slots (i,); `seat` and `advance` say the rest."""

    def seat(self, places: list[int]):
        """The prompts of live rows are in these places."""
        tokens = self.cache.P * self.cache.prompt_k.shape[2]  # of a place, over its key heads
        self.table[: len(places), 3] = upload(places, self.table.device) * tokens

    def advance(self, own, prompt_lengths, longest: int):
        """Before a step: rows have `own` (n,) tokens in their slots and prompts of prompt_lengths (n,)."""
        self.table[: len(own), 2] = own
        self.table[: len(own), 4] = prompt_lengths

    def attend(self, layer, qk, v, cos, sin):
        """qk (n, H + K, E), v (n, K, E), cos and sin (n, 1, E/2) -> (n, H, E)."""
        n = len(qk)
        prompt_k, prompt_v, own_k, own_v = self.cache.layer(layer)
        q = rope.rotate_into_cache(qk, v, cos, sin, own_k, own_v, self.table[:n, 2])
        decode = flash.flash_decode if flash.on_triton(q) else decode_ref
        return decode(q, prompt_k, prompt_v, own_k, own_v, self.table[:n])


def table_of(cache: Cache, slots, places, own, prompt_lengths):
    """The table (n, 6) of n queries, as flash.Tiles.queries. All arguments are (n,) int64.

    That is a query's number, 1, how many own keys come before it, where its prompt's keys lie, how many these
    are, and where its own lie. slots, places: of the cache.
    """
    K = cache.own_k.shape[2]
    number = torch.arange(len(slots), device=slots.device)
    columns = (number, torch.ones_like(number), own, places * (K * cache.P), prompt_lengths)
    return torch.stack([*columns, slots * (K * cache.C)], 1)


def attention_form(model):
    """Which of the two runs for this model, here and now."""
    return TableAttention if flash.on_triton(model.embed) else GridAttention


# --------------------------------------------------------------------------------------------------- the step
class Slots:
    """The static buffers of `slots` rows, their decoding step, and its graphs. Attributes in
    `state` have one entry a slot.

    groups, slots, prompt_tokens, new_tokens: sizes of the cache. block: most steps of a run. asked: sizes
    that were wanted where fewer fitted in memory, so that `holds` does not send the next call to try again.
    """

    def __init__(self, model, *, groups, slots, prompt_tokens, new_tokens, block, asked=None):
        device = model.device
        self.sizes = dict(groups=groups, slots=slots, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        self.asked = self.sizes | (asked or {})
        self.cache = Cache(model, **self.sizes)
        self.attention = attention_form(model)(self.cache, slots, model)
        self.count, self.block, self.addresses = slots, block, addresses(model)

        def zeros(*shape, dtype=torch.long):
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.token = zeros(slots)  # to feed in the next step
        self.own = zeros(slots)  # tokens in the slot's part of the cache: one fewer than were drawn
        self.prompt_length = zeros(slots)
        self.limit = zeros(slots)  # longest completion, tokens
        self.done = torch.ones(slots, dtype=torch.bool, device=device)
        self.keys = zeros(slots, new_tokens + 1)  # of the draws, by position (kernels/sample.py)
        self.state = (self.token, self.own, self.prompt_length, self.limit, self.done, self.keys)

        self.stop = zeros(model.shape.V, dtype=torch.bool)  # whether an id ends a row
        self.policy = zeros(3, dtype=torch.float64)  # temperature, top_p, min_p, where a graph reads them
        self.number = zeros(1)  # of the step in its block
        # id, log-probability and entropy, in one tensor for one copy to the host; fp64 holds them all exactly
        self.drawn = zeros(3, block, slots, dtype=torch.float64)
        self.on_gpu = device.type == "cuda"
        # two of them, since the host reads one block while the next one is written
        shape = self.drawn.shape
        self.host = [torch.zeros(shape, dtype=torch.float64, pin_memory=self.on_gpu) for _ in range(2)]
        self.events = [torch.cuda.Event() for _ in range(2)] if self.on_gpu else []
        self.unread: deque = deque()  # (which of the two, steps, rows) of blocks that run or have run
        self.launched = 0
        self.graphs: dict = {}
        # one memory pool for all graphs: they never run side by side
        self.pool = torch.cuda.graph_pool_handle() if self.on_gpu else None

    def holds(self, *, block: int, **sizes) -> bool:
        """Whether a call of these sizes can run here, with fewer slots and places only
        if these were all that fitted.
        """
        exact = ("prompt_tokens", "new_tokens")
        room = {
            name: self.sizes[name] if name in exact else max(self.sizes[name], self.asked[name])
            for name in sizes
        }
        return block <= self.block and all(n <= room[name] for name, n in sizes.items())

    def bytes(self) -> int:
        return self.cache.bytes()

    # ------------------------------------------------------------------------------- what the host says to it
    def begin(self, model, choose, *, stop_ids, slots: int, cuda_graphs: bool, static=()):
        """A call of generate begins: no row is in, and whatever an earlier call left behind is forgotten.

        choose(hidden (n, D), key (n,)) -> token, logp, entropy (n,) or None: the head and the draw. static:
        what of `choose` a recorded step has in it, hashable. slots: how many of them this call uses.
        """
        self.model, self.choose = model, choose
        self.recording = self.can_record(cuda_graphs)
        self.batches = sorted({size for size in SIZES if size < slots} | {slots})
        adapters_on = [m.enabled for m in model.modules() if hasattr(m, "enabled")]
        self.static = (static, switch.MODE, model.training, *adapters_on)
        self.unread.clear()
        self.done.fill_(True)
        for x in (self.own, self.limit, self.stop):
            x.zero_()
        known = [
            i for i in stop_ids if 0 <= i < len(self.stop)
        ]  # a tokenizer may have ids that the model lacks
        self.stop[known] = True
        self.longest = self.filled = 0

    def can_record(self, cuda_graphs: bool) -> bool:
        return cuda_graphs and self.on_gpu and self.attention.records

    def end(self):
        """Forgets the model and the draw of the call, and with them the packed weights."""
        self.model = self.choose = None

    def enter(self, slots, token, prompt_lengths, own, limits, keys):
        """Rows go into slots (i,): each feeds `token`, behind own (i,) tokens there. keys (i, <= C + 1)."""
        self.token[slots] = token
        self.own[slots] = own
        self.prompt_length[slots] = prompt_lengths
        self.limit[slots] = limits
        self.done[slots] = False
        self.keys[slots, : keys.shape[1]] = keys
        self.attention.enter(slots, prompt_lengths, own)

    def park(self, slots, own, longest: int):
        """The rows in slots (i,) wait there with own (i,) tokens, longest at most: no step advances them."""
        self.own[slots] = own
        self.done[slots] = True
        self.filled = max(self.filled, longest)

    def seat(self, places: list[int]):
        """The prompts of live rows, which are in slots 0, 1, .., are in these places of the cache."""
        self.attention.seat(places)

    def move(self, source, target):
        """The rows in slots source (i,) go to slots target (i,), with their keys."""
        self.cache.move_rows(source, target, self.filled)
        for x in (*self.state, *self.attention.state):
            x[target] = x[source]

    # ------------------------------------------------------------------------------------------- what it does
    def step(self, n: int):
        """One token for slots 0..n-1.

        All it reads and writes is in static buffers, and with TableAttention nothing depends on a value that
        the host knows: so it can be recorded.
        """
        own, done, prompt_length = self.own[:n], self.done[:n], self.prompt_length[:n]
        self.attention.advance(own, prompt_length, self.longest)
        hidden = self.model(self.token[:n], prompt_length + own, self.attention)  # (n, D)
        key = self.keys[:n].gather(1, own[:, None] + 1)[:, 0]  # token number 0 was drawn from the prompt
        token, logp, entropy = self.choose(hidden, key)
        if entropy is None:  # nobody asked: the row in the output is not read
            entropy = logp
        drawn = torch.stack([token.double(), logp.double(), entropy.double()])  # (3, n)
        self.drawn[:, :, :n].index_copy_(1, self.number, drawn[:, None])
        self.number += 1
        self.token[:n] = token
        last = self.stop[token] | (own + 2 >= self.limit[:n])
        # A row that is done writes the key of its last token again and again, at its own place in its slot.
        own += ~done
        done |= last

    def run(self, n: int, steps: int, longest: int) -> int:
        """Starts `steps` steps of slots 0..n-1, and the copying of what they draw.
        Returns how many slots they compute.

        longest: the most own tokens that any of these rows can have in its slot now.
        """
        assert 1 <= n <= self.batches[-1] and 1 <= steps <= self.block, (
            f"{n} rows of {self.batches[-1]}, {steps} steps of {self.block}"
        )
        assert len(self.unread) < 2, "a block that has not been read would be written over"
        size = n
        if self.recording:
            size = next(size for size in self.batches if size >= n)
        self.number.zero_()
        for i in range(steps):
            self.longest = min(longest + i, self.cache.C - 1)
            if self.recording:
                self.graph(size).replay()
            else:
                self.step(size)
        self.filled = max(self.filled, min(longest + steps, self.cache.C))  # own keys of any row, for `move`
        which = self.launched % 2
        self.launched += 1
        self.host[which].copy_(self.drawn, non_blocking=True)
        if self.on_gpu:
            self.events[which].record()
        self.unread.append((which, steps, n))
        return size

    def read(self):
        """What the oldest unread block drew: ids, log-probabilities, entropies, each
        steps lists of n. Waits for it.
        """
        which, steps, n = self.unread.popleft()
        if self.on_gpu:
            self.events[which].synchronize()
        token, logp, entropy = self.host[which][:, :steps, :n]
        return token.long().tolist(), logp.tolist(), entropy.tolist()

    # ------------------------------------------------------------------------------------------------- graphs
    def graph(self, size: int):
        """The recorded step of `size` slots, made when it is first needed."""
        kind = (size, *self.static)
        if kind not in self.graphs:
            self.graphs[kind] = self.capture(size)
        return self.graphs[kind]

    def capture(self, size: int):
        """Records a step of `size` slots.

        It runs once before, which compiles kernels and makes cuBLAS's workspace. That draws tokens nobody
        asked for, so the state is put back.
        """
        state = (self.token, self.own, self.done, self.number)
        before = [x.clone() for x in state]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.step(size)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: rewards may be computed in a thread meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.step(size)
        for x, was in zip(state, before):
            x.copy_(was)
        return graph


def upload(x, device):
    """Integers, in a list or on the CPU, as an int64 tensor on the device, without waiting for what runs
    there.
    """
    x = torch.as_tensor(x, dtype=torch.long)
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def addresses(model):
    """What a recorded step knows of the weights: where they lie, and as what."""
    tensors = [*model.parameters(), *model.buffers()]  # the buffers of weights in 4 bits
    for module in model.modules():
        # A weight with the adapter added in (lora.merge) is read instead of the base's.
        if getattr(module, "merged", None) is not None:
            tensors.append(module.merged)
    return [(t.data_ptr(), t.shape, t.dtype, t.device) for t in tensors]


def kept_bytes(device) -> float:
    """The largest cache that is kept between two calls."""
    if device.type != "cuda":
        return float("inf")
    return LARGEST * torch.cuda.mem_get_info(device)[1]
