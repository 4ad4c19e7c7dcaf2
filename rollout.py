"""Sampling: a prompt is prefilled once, its group's rows decode in slots, a free slot goes to the next row.

    sampler = Sampler(model, slots=64)          # once a run
    rollout = sampler.generate(prompts, group_size=8, max_new_tokens=256, stop_ids=[2], seed=0, step=0)
    rollout.ids[n], rollout.logprobs[n], rollout.stopped[n]       # row n answers prompt n // group_size

A completion is the list of ids that were drawn, the stop id included, each with the log-probability of the
distribution it was drawn from (temperature and truncation included). Ids never become text and come back.

The words. A *row* is one completion, a *group* the rows of one prompt. A *slot* is a row's seat in
the batch, with the keys and values of the tokens that it drew. A *place* holds the keys and values of
one prompt, which all rows of its group read. A *block* is a number of decoding steps between two
looks of the host at what was drawn.

Live rows are always in slots 0..n-1. A finished row's slot goes to the next row that waits, and when none
does to the last live row, whose own keys move. So the matmuls see live rows only, and the batch shrinks by
itself. Readers of vLLM: this is continuous batching with one fixed-size page a prompt and one a row.

One loop serves a CPU and a GPU. A CPU runs blocks of one step and looks at each. A GPU runs blocks of eight
in CUDA graphs, and the host looks at the block before while the next one runs (decode.py has the step). Where
Triton runs, all prompts are prefilled before the first token, because a prefill costs the host 16-35 ms
whatever its size; a CPU, which pays for each token anyway, prefills when slots are free.

What a row draws depends on (seed, step, prompt, sample, number of the drawn token) and on its logits alone:
see kernels/sample.py.

With an environment (turns.py) a row has several turns, and gives its seat to another while it waits for a
reply (parking.py). The reply's ids are its own then, too: given, and not drawn.

Dims: B prompts, G rows a prompt, N = B*G rows, n live rows, P prompt length, D width, V vocabulary.
"""

import math
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import torch

import cache
import decode
import progress
from cache import PACK_STEPS, PREFILL_TOKENS, PREFILL_TOKENS_TRITON
from cache import cache_bytes, group_places, plan_places, plan_slots
from decode import Slots, upload
from kernels import sample as sampling
from kernels.logprob import logits_fp32, truncate_
from kernels.packed_linear import packed_copy
from model import Packed
from parking import Parking


@dataclass
class Rollout:
    """N = B * group_size completions. Row n answers prompt n // group_size."""

    ids: list[list[int]]  # drawn ids, the stop id included, and between turns those that were given
    # nats, of the distribution each drawn id was drawn from; at temperature 0, of the untempered one
    logprobs: list[list[float]]
    stopped: list[bool]  # ended by a stop id, or by its environment; False: cut by a limit
    # nats, of the distribution each drawn id was drawn from; empty lists where they were not asked for
    entropies: list[list[float]]
    # seconds, tokens, slot_steps, useful_slot_steps, slots, cache_bytes
    stats: dict = field(default_factory=dict)
    drawn: list[list[bool]] = field(default_factory=list)  # of each id: drawn, and not given; left out: all

    def __post_init__(self):
        self.drawn = self.drawn or [[True] * len(ids) for ids in self.ids]

    def group(self, b: int, group_size: int) -> list[list[int]]:
        return self.ids[b * group_size : (b + 1) * group_size]


def generate(model, prompts, *, slots=None, cuda_graphs=True, block=None, **options) -> Rollout:
    """One call of a Sampler that is made for it: see Sampler and its `generate` for the arguments."""
    return Sampler(model, slots=slots, cuda_graphs=cuda_graphs, block=block).generate(prompts, **options)


class Sampler:
    """Draws completions of prompts. Made once for a run, because it owns what is expensive to make.

    That is the cache, the static buffers and the CUDA graphs of a GPU (`self.kept`), which serve the next
    call as they are; a call that needs larger ones replaces them. An optimiser writes weights in place, so
    graphs stay good over training; they are dropped where a weight has moved (another dtype or device, an
    adapter applied). On a CPU nothing is kept: the packed weights of a call would be wrong after an update.
    The model carries nothing of all this.

    slots: rows decoded at once (default: all, at most 256). cuda_graphs: record the step on a GPU,
    and keep buffers between calls. block: steps between looks of the host at what was drawn
    (default: 8 where Triton runs, else 1).
    """

    def __init__(self, model, slots=None, cuda_graphs=True, block=None):
        self.model = model
        self.asked_slots, self.cuda_graphs, self.asked_block = slots, cuda_graphs, block
        self.kept: Slots | None = None
        self.slots: Slots | None = None  # of the call that runs

    @torch.no_grad()
    def generate(
        self,
        prompts,
        *,
        group_size,
        max_new_tokens,
        stop_ids,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        seed=0,
        step=0,
        prompt_numbers=None,
        entropy=False,
        on_group=None,
        on_token=None,
        turns=None,
        max_context=0,
        label="sampling",
    ) -> Rollout:
        """Draws group_size completions of each prompt.

        prompts: B non-empty lists of ids. max_new_tokens: the most tokens that a row draws, or a list of N,
        one a row; a prompt near the end of the model's context gets what is left. stop_ids: any of them ends
        a row and stays in it. temperature 0 is greedy. seed, step, prompt_numbers (default 0..B-1): the keys
        of the draws. entropy: note that of every distribution drawn from, too. on_group(b, ids): called when
        the last row of prompt b is finished. on_token(row, id): called for every token as it is recorded.
        turns: the rows' conversations (turns.Turns); max_context: then the most tokens of a row, its prompt
        and what it was given included (0: twice max_new_tokens behind the prompt). label: of the progress
        bar; "" shows none.

        Raises ValueError for an empty prompt, a prompt that fills the context, or options out of range.
        """
        numbers = list(range(len(prompts)) if prompt_numbers is None else prompt_numbers)
        policy = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        check_prompts(self.model.shape, prompts, numbers)
        check_options(
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            **policy,
            slots=self.asked_slots,
            block=self.asked_block,
        )
        limits = self.row_limits(prompts, group_size, max_new_tokens)
        rooms = limits if turns is None else self.row_rooms(prompts, group_size, limits, max_context)
        self.open_accounts(prompts, group_size, limits, rooms, stop_ids, entropy, on_group)
        self.on_token, self.turns = on_token, turns
        self.parking = Parking(self, turns)
        self.prepare_slots()
        with progress.doing(label, len(limits)) as self.progress:
            try:
                self.prepare_draws(seed, step, numbers, **policy)
                self.loop()
                return self.result()
            finally:
                self.release()

    def loop(self):
        """The whole of sampling: seat rows, run a block, record what was drawn, until no row is live."""
        if self.prompts_first:
            # All prompts before the first token, as far as their keys fit: refills then only seat rows.
            while self.queue and len(self.placed) < self.places:
                self.prefill(len(self.limits))
        self.seat()  # which row is in which slot
        while self.live or self.parking.away:
            # A GPU goes on with the next block before the host has read this one. Whatever the host decides
            # between two blocks (who leaves, who enters, who moves) is queued behind the block that runs, so
            # it acts on the state that the block leaves.
            started = self.live and self.run_block()
            if self.running and (not started or len(self.running) > self.lag):
                self.record_block()  # a CPU the one just run, a GPU the one before
            self.seat()
            if self.parking.worth_hearing():
                self.parking.hear()
                self.seat()

    # --------------------------------------------------------------------------------- before the first token
    def row_limits(self, prompts, group_size: int, max_new_tokens) -> list[int]:
        """The longest completion of each of the N rows: what was asked for, or what the context leaves."""
        N = len(prompts) * group_size
        if not isinstance(max_new_tokens, list):
            max_new_tokens = [max_new_tokens] * N
        if len(max_new_tokens) != N:
            raise ValueError(
                f"{len(max_new_tokens)} max_new_tokens for {N} rows: give one number, or one a row"
            )
        # A row that would leave the context is cut there, as one that reaches max_new_tokens: positions
        # beyond it were never trained, and no check later would notice.
        context = self.model.shape.context
        return [
            min(longest, context - len(prompts[row // group_size]))
            for row, longest in enumerate(max_new_tokens)
        ]

    def row_rooms(self, prompts, group_size: int, limits, max_context: int) -> list[int]:
        """The most ids of each of the N rows behind its prompt, drawn and given together."""
        rooms, context = [], self.model.shape.context
        for row, limit in enumerate(limits):
            P = len(prompts[row // group_size])
            room = min(max_context or P + 2 * limit, context) - P
            if room < 1:
                raise ValueError(
                    f"prompt {row // group_size} has {P} tokens and max_context={max_context} leaves no room "
                    "behind it: raise max_context"
                )
            rooms.append(room)
        return rooms

    def open_accounts(self, prompts, group_size: int, limits, rooms, stop_ids, entropy: bool, on_group):
        """What is known of each row and prompt during a call."""
        # Lists of Python numbers, because the host decides with them who leaves and who enters. The device
        # has its own copy of what a step needs (decode.Slots), and the two meet in `record`.
        B, N = len(prompts), len(limits)
        self.prompts, self.G, self.rooms = prompts, group_size, rooms
        # The most ids of each row: what it may draw, and what it has been given so far.
        self.limits = [min(limit, room) for limit, room in zip(limits, rooms)]
        self.stop_ids, self.wants_entropy, self.on_group = set(stop_ids), entropy, on_group
        self.ids: list[list[int]] = [[] for _ in range(N)]
        self.given: list[list[range]] = [[] for _ in range(N)]  # which of them were not drawn
        self.logprobs: list[list[float]] = [[] for _ in range(N)]
        self.entropies: list[list[float]] = [[] for _ in range(N)]
        self.stopped = [False] * N
        self.ended = [False] * N
        self.left = [group_size] * B  # rows of each prompt that are not finished

        # A row goes from left to right: queue (its prompt), waiting, live, ended. Between turns: parking.
        self.queue = deque(range(B))  # prompts that are not prefilled yet
        self.placed: list[int] = []  # the prompt in place 0, 1, .. of the cache
        self.waiting: deque = deque()  # rows that have their first token and no slot
        self.live: list[int] = []  # the row in slot 0, 1, ..
        # (rows, their turns, steps) of blocks that run and are not recorded yet
        self.running: deque = deque()
        self.moved = False  # whether rows or prompts have other places than the slots know of
        self.slot_steps = self.finished = self.total = self.first_tokens = 0

    def prepare_slots(self):
        """Finds or makes slots and a cache large enough for this call."""
        B, N = len(self.prompts), len(self.limits)
        self.prompts_first = decode.attention_form(self.model).records
        self.block = self.asked_block or (decode.BLOCK if self.prompts_first else 1)
        # A block of one step is for looking at each token at once.
        self.lag = 1 if self.block > 1 else 0
        # 256 rows are where a GPU stops gaining: 512 add under 3 % to its tokens a second.
        seats = min(256 if self.asked_slots is None else self.asked_slots, N)
        # With turns as many slots again, for the keys of rows that wait.
        slots = seats if self.turns is None else min(2 * seats, N)
        sizes = dict(prompt_tokens=max(map(len, self.prompts)), new_tokens=max(self.rooms))
        self.keeps = self.cuda_graphs and self.prompts_first
        if self.keeps:
            self.slots = self.kept = self.kept_slots(slots, **sizes)
        else:
            self.kept = None
            self.slots = self.new_slots(slots, **sizes)
        self.slot_count = min(seats, self.slots.count)
        self.places = min(B, self.slots.sizes["groups"])

    def kept_slots(self, slots: int, **sizes) -> Slots:
        """The slots of an earlier call where they are large enough and the weights
        have not moved; else new ones.

        The new ones are large enough for the earlier calls too, so that training and evaluation do not take
        turns in building them, unless that takes more than half of the memory.
        """
        # In steps of 64: the longest prompt is another in every batch, and a cache of the exact size would be
        # made anew at every call, with all graphs that read it.
        sizes = {name: -(-tokens // 64) * 64 for name, tokens in sizes.items()}
        held, self.kept = self.kept, None
        before = {}
        if held is not None and held.addresses == decode.addresses(self.model):
            if held.holds(block=self.block, slots=slots, groups=len(self.prompts), **sizes):
                return held
            before = held.sizes
        held = self.slots = None  # gives its memory back, before what is free is counted
        return self.new_slots(slots, **sizes, before=before)

    def new_slots(self, slots: int, *, prompt_tokens: int, new_tokens: int, before=None) -> Slots:
        """Slots as many as fit, up to `slots`. before: sizes to reach as well where memory is plentiful."""
        device, B = self.model.device, len(self.prompts)
        number = (self.model.shape, self.model.embed.itemsize)
        tokens = dict(prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        batch = dict(group_size=self.G, prompts=B)
        # Fewer slots where memory is short, never an error: the rows that find none wait for their turn, and
        # what they draw does not depend on when that is.
        room = cache.usable_bytes(device)
        fit = plan_slots(*number, room, slots=slots, **batch, **tokens)
        sizes = dict(groups=group_places(fit, self.G, B), slots=fit, **tokens)
        if self.prompts_first:
            # Places for all prompts at once if they fit, but not so many that the cache is too large to be
            # kept between two calls: recording its graphs again would cost more than a few more prefills.
            largest = decode.kept_bytes(device)
            if cache_bytes(*number, **sizes) > largest:
                largest = room  # it will not be kept in any case
            sizes["groups"] = plan_places(*number, min(room, largest), slots=fit, **batch, **tokens)
        if before:
            both = {name: max(size, before[name]) for name, size in sizes.items()}
            if cache_bytes(*number, **both) <= max(cache_bytes(*number, **sizes), room / 2):
                sizes = both
        asked = dict(slots=slots, groups=B)
        return Slots(self.model, **sizes, block=self.block, asked=asked)

    def prepare_draws(self, seed: int, step: int, numbers: list[int], *, temperature, top_k, top_p, min_p):
        """The model and head that draw, the keys of all draws, and how they are drawn."""
        # The twin is what computes: the model itself, or on a CPU a copy whose matrices lie as the matmul
        # wants them. Same numbers up to the order of sums.
        self.twin, self.head = self.model, partial(logits_fp32, weight=self.model.head)
        if max(self.limits) >= PACK_STEPS and self.model.device.type == "cpu":
            self.twin, self.head = packed_copy(self.model)
        # Every key of the batch at once: ten rounds of integer arithmetic a token would be a
        # third of a small model's step.
        # A greedy row draws nothing, so it needs none.
        positions = torch.arange(0 if temperature == 0 else max(self.limits))
        samples = torch.arange(self.G)[None, :, None]
        keys = sampling.token_keys(seed, step, torch.tensor(numbers)[:, None, None], samples, positions)
        self.keys = keys.view(len(self.limits), -1).to(self.model.device)  # (N, longest)

        self.greedy, self.temperature = temperature == 0, temperature
        self.top_k, self.top_p, self.min_p = top_k, top_p, min_p
        static = (temperature, top_k, top_p, min_p, self.wants_entropy)
        if self.slots.can_record(self.cuda_graphs):
            static = self.put_policy_on_device()
        self.slots.begin(
            self.twin,
            self.choose,
            stop_ids=self.stop_ids,
            slots=self.slot_count,
            cuda_graphs=self.cuda_graphs,
            static=static,
        )

    def put_policy_on_device(self):
        """Lets a recorded step read temperature, top_p and min_p from memory.
        Returns what it still has in it.

        Otherwise a schedule of the temperature would record new graphs at every step.
        """
        numbers = self.slots.policy
        numbers.copy_(torch.tensor([self.temperature, self.top_p, self.min_p]))
        self.temperature = numbers[0]
        if not sampling.on_triton(numbers.float()):  # torch's truncation asks what its options are
            return self.greedy, self.top_k, self.top_p, self.min_p, self.wants_entropy
        static = (self.greedy, self.top_k, self.top_p < 1, self.min_p > 0, self.wants_entropy)
        # without a cut other kernels run, which has to be known when they are launched
        if self.top_p < 1:
            self.top_p = numbers[1]
        if self.min_p > 0:
            self.min_p = numbers[2]
        return static

    # ------------------------------------------------------------------------------------------------ prefill
    def prefill(self, wanted: int):
        """Prefills whole groups, as many as `wanted` rows and the free places ask
        for, and draws their first tokens.
        """
        most_tokens = PREFILL_TOKENS_TRITON if self.prompts_first else PREFILL_TOKENS
        first, batch, tokens = len(self.placed), [], 0
        while self.queue and len(batch) * self.G < wanted and len(self.placed) < self.places:
            b = self.queue[0]
            # the logits of as many rows as there are slots are planned for
            full = tokens + len(self.prompts[b]) > most_tokens or len(batch) == self.slot_count
            if batch and full:
                break
            batch.append(self.queue.popleft())
            tokens += len(self.prompts[b])
            self.placed.append(b)
        places = list(range(first, len(self.placed)))
        # The last position of each prompt predicts the first token of all rows of its group: one row of
        # logits and G draws from it.
        plan = Prefill(self.model, [self.prompts[b] for b in batch], self.slots.cache, places)
        hidden = self.twin(plan.ids, plan.positions, plan)[plan.last]  # (groups, D)
        rows = [row for b in batch for row in range(b * self.G, (b + 1) * self.G)]
        self.draw_first(rows, hidden, numbers=[0] * len(rows), times=self.G)
        # A row may end with its first token; then it never needs a slot.
        self.waiting.extend(row for row in rows if self.goes_on(row))

    def draw_first(self, rows: list[int], hidden, numbers: list[int], times=1):
        """Draws and records the first token of each row's turn, its draw number `numbers` (from 0)."""
        key = None if self.greedy else self.keys[tuple(upload([rows, numbers], hidden.device))]
        token, logp, entropy = self.choose(hidden, key, times=times)
        self.first_tokens += len(rows)
        self.record(rows, token.tolist(), logp.tolist(), None if entropy is None else entropy.tolist())

    # -------------------------------------------------------------------------------------------------- seats
    def seat(self):
        """Gives free slots to waiting rows, prefilling prompts for them as needed; what stays free is closed
        up.
        """
        if self.parking.away:
            self.parking.park()
        if self.parking.returning:
            self.parking.unpark()
        # `free` are the slots of finished rows, `vacant` these and those behind the last live row.
        free = [slot for slot, row in enumerate(self.live) if self.ended[row]]
        seats = min(self.slot_count, self.slots.count - len(self.parking.rows))
        vacant = free + list(range(len(self.live), seats))
        while self.queue and len(self.waiting) < len(vacant) and len(self.placed) < self.places:
            missing = len(vacant) - len(self.waiting)
            # where a prefill costs the same whatever its size, every free place is filled at once
            self.prefill(len(self.limits) if self.prompts_first else missing)
        # Waiting rows take the first vacant slots. What is left of `free` is a hole among live rows.
        taken, empty = vacant[: len(self.waiting)], free[len(self.waiting) :]
        if taken:
            self.enter(taken, [self.waiting.popleft() for _ in taken])
        if empty:
            self.close_up(empty)
        if self.live and self.moved:  # else all sit where they sat
            place = {b: i for i, b in enumerate(self.placed)}
            self.slots.seat([place[row // self.G] for row in self.live])
            self.moved = False

    def enter(self, slots: list[int], rows: list[int]):
        """Puts rows into slots: the last token of each is drawn, and its key not made yet."""
        self.moved = True
        for slot, row in zip(slots, rows):
            self.live[slot : slot + 1] = [row]  # a new slot is always the next one
        tokens = [self.ids[row][-1] for row in rows]
        lengths = [len(self.prompts[row // self.G]) for row in rows]
        own = [len(self.ids[row]) - 1 for row in rows]
        given = [len(self.ids[row]) - len(self.logprobs[row]) for row in rows]
        limits = [self.limits[row] for row in rows]
        # One copy to the device for all seven columns: a copy costs the host the same whatever its size.
        columns = upload([slots, rows, tokens, lengths, own, given, limits], self.keys.device)
        slot, row, token, length, own, given, limit = columns
        keys = self.keys[row]
        if self.turns and not self.greedy:
            # A slot takes a draw's key by the token's place, which given ids have moved.
            place = torch.arange(self.slots.keys.shape[1], device=keys.device)
            keys = keys.gather(1, (place - given[:, None]).clamp(0, keys.shape[1] - 1))
        self.slots.enter(slot, token, length, own, limit, keys)

    def close_up(self, empty: list[int], source=(), target=()):
        """The last live rows move into empty slots, so that live rows are in slots 0..n-1 again.

        source, target: slots whose rows move elsewhere at the same time.
        """
        self.moved = True
        n, gone = len(self.live) - len(empty), set(empty)
        holes = [slot for slot in empty if slot < n]
        movers = [slot for slot in range(n, len(self.live)) if slot not in gone]
        for hole, mover in zip(holes, movers):
            self.live[hole] = self.live[mover]
        if holes or source:
            self.slots.move(*upload([[*movers, *source], [*holes, *target]], self.keys.device))
        del self.live[n:]

    # ------------------------------------------------------------------------------------- running, recording
    def run_block(self) -> bool:
        """Starts a block of steps of all live rows. False: the blocks that run take
        every row to its limit already.
        """
        # Tokens that a row has, and those that the block which still runs will add at most. A row that ends
        # in that block adds fewer, and its slot is then wasted until the host reads the block.
        coming = {}
        for rows, turns, steps in self.running:
            coming |= {row: steps for row, turn in zip(rows, turns) if self.parking.turn[row] == turn}
        tokens = [len(self.ids[row]) + coming.get(row, 0) for row in self.live]
        left = max(self.limits[row] - n for row, n in zip(self.live, tokens))
        if left <= 0:
            return False
        # No more steps than some row can use: the last block of a call is a short one.
        steps = min(self.block, left)
        # a row has drawn one token more than it has keys
        size = self.slots.run(len(self.live), steps, longest=max(tokens) - 1)
        if self.queue or self.waiting:
            size = max(size, self.slot_count)  # an empty slot is waste while somebody waits for it
        self.slot_steps += steps * size
        self.running.append((list(self.live), [self.parking.turn[row] for row in self.live], steps))
        return True

    def record_block(self):
        """Records what the oldest block drew that nobody has looked at."""
        # `rows` as they sat when the block began: since then some may have left their slots to others.
        rows, turns, steps = self.running.popleft()
        tokens, logps, entropies = self.slots.read()
        ended, now = self.ended, self.parking.turn
        for i in range(steps):
            # what a row went on to draw after its end, or that of its turn, is nothing
            on = [slot for slot, row in enumerate(rows) if not ended[row] and now[row] == turns[slot]]
            self.record(
                [rows[slot] for slot in on],
                [tokens[i][slot] for slot in on],
                [logps[i][slot] for slot in on],
                [entropies[i][slot] for slot in on],
            )

    def record(self, rows: list[int], tokens: list[int], logps: list[float], entropies: list[float] | None):
        """Notes what each row drew, and closes the accounts of rows for which that was the last."""
        # A NaN in the logits would be drawn from without a word, and trained on. One look at the sum finds
        # it, wherever it is.
        if not math.isfinite(sum(logps)):
            raise FloatingPointError(
                "the model's logits are not finite: its weights are broken "
                "(a learning rate too high, or a damaged checkpoint)"
            )
        if self.wants_entropy:
            for row, entropy in zip(rows, entropies):
                self.entropies[row].append(entropy)
        ended = []
        for row, token, logp in zip(rows, tokens, logps):
            ids = self.ids[row]
            ids.append(token)
            self.logprobs[row].append(logp)
            if self.on_token:
                self.on_token(row, token)
            stop = token in self.stop_ids
            if self.turns:
                self.parking.end_turn(row, stop)
            elif stop or len(ids) == self.limits[row]:
                self.stopped[row] = stop
                ended.append(row)
        self.total += len(rows)
        for row in ended:
            self.leave(row)
        rate = self.total / (time.perf_counter() - self.progress.start)
        self.progress.show(self.finished, f"{self.total:,} tokens, {rate:,.0f}/s")

    def goes_on(self, row: int) -> bool:
        return not self.ended[row] and row not in self.parking.away

    def leave(self, row: int):
        """A row is finished. After the last of a prompt nobody reads that, and the last prompt takes its
        place.
        """
        self.ended[row] = True
        self.finished += 1
        b = row // self.G
        self.left[b] -= 1
        if self.left[b]:
            return
        if self.on_group:
            self.on_group(b, self.ids[b * self.G : (b + 1) * self.G])
        # Prompts in use stay in places 0, 1, .., so that the torch attention can take them as one slice.
        place, last = self.placed.index(b), self.placed.pop()
        if last != b:
            self.moved = True
            self.slots.cache.move_group(len(self.placed), place)
            self.placed[place] = last

    def choose(self, hidden, key, times=1):
        """Draws a token of each row -> ids (n,), log-probabilities (n,), entropies (n,) or None.

        hidden (n / times, D): the first tokens of a group are `times` draws from the same logits. key (n,):
        of each draw; not read at temperature 0.
        """
        # In fp32: logits rounded to bf16 are the largest source of a sampler that differs from the trainer.
        logits = self.head(hidden)  # (n / times, V) fp32
        if self.greedy:
            key = None
        if sampling.on_triton(logits):  # all that follows in one launch
            policy = dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
            return sampling.sample(logits, key, **policy, times=times)
        # Temperature first, then truncation, as transformers and TRL do, and in place: these are the largest
        # tensors of a step. The log-probability that is noted is of the distribution after both.
        if not self.greedy:
            if torch.is_tensor(self.temperature) or self.temperature != 1:
                logits.div_(self.temperature)
            if self.top_k or self.top_p < 1 or self.min_p:
                truncate_(logits, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        if times > 1:
            logits = logits.repeat_interleave(times, 0)
        if self.greedy:
            entropy = sampling.entropy(logits) if self.wants_entropy else None
            return *sampling.greedy(logits), entropy
        if self.wants_entropy:
            if self.top_k or self.top_p < 1 or self.min_p:
                logits.clamp_(min=-1e30)  # as good as -inf, and 0 times it is 0
            return sampling.draw(logits, key, entropy=True)
        return *sampling.draw(logits, key), None

    # ------------------------------------------------------------------------------------- after the last one
    def result(self) -> Rollout:
        stats = dict(
            seconds=time.perf_counter() - self.progress.start,
            tokens=self.total,
            slot_steps=self.slot_steps,
            useful_slot_steps=self.total - self.first_tokens,
            slots=self.slot_count,
            cache_bytes=self.slots.bytes(),
        )
        drawn = [[True] * len(ids) for ids in self.ids]
        for flags, given in zip(drawn, self.given):
            for some in given:
                flags[some.start : some.stop] = [False] * len(some)
        return Rollout(self.ids, self.logprobs, self.stopped, self.entropies, stats, drawn)

    def release(self):
        """Drops what belongs to this call alone: packed weights, keys, and slots that are not kept."""
        self.slots.end()
        if self.turns:
            self.turns.end()
        self.turns = None
        self.twin = self.head = self.keys = None
        if self.kept is not None and self.kept.bytes() > decode.kept_bytes(self.model.device):
            self.kept = None
        self.slots = None


class Prefill(Packed):
    """The plan of prompts alone, which also leaves their keys and values in the cache: prompt i in
    places[i].
    """

    def __init__(self, model, prompts, cache, places: list[int]):
        super().__init__(model, prompts, [[] for _ in prompts])
        self.cache = cache
        lengths = torch.tensor([len(p) for p in prompts])
        self.place = torch.tensor(places).repeat_interleave(lengths).to(model.device)  # of each token
        # where the first token of every completion is predicted from
        self.last = (lengths.cumsum(0) - 1).to(model.device)

    def keep(self, layer, k, v):
        self.cache.prompt_k[layer][self.place, :, self.positions] = k
        self.cache.prompt_v[layer][self.place, :, self.positions] = v


def check_prompts(shape, prompts, numbers):
    """Raises ValueError, in one sentence, for prompts that nothing can be sampled after."""
    if not prompts:
        raise ValueError("there is no prompt to sample from")
    if len(numbers) != len(prompts):
        raise ValueError(
            f"{len(numbers)} prompt_numbers for {len(prompts)} prompts: each prompt needs its own"
        )
    for b, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {b} is empty: at least one token must come before a completion")
        if min(prompt) < 0 or max(prompt) >= shape.V:
            raise ValueError(
                f"prompt {b} has ids from {min(prompt)} to {max(prompt)} and the model knows 0 to "
                f"{shape.V - 1}: was it made by another tokenizer?"
            )
        if len(prompt) >= shape.context:
            raise ValueError(
                f"prompt {b} has {len(prompt)} tokens and the model's context is {shape.context}: "
                "nothing could be sampled after it"
            )


def check_options(*, group_size, max_new_tokens, temperature, top_k, top_p, min_p, slots, block):
    """Raises ValueError, in one sentence, for an option that is out of range."""
    shortest = min(max_new_tokens, default=1) if isinstance(max_new_tokens, list) else max_new_tokens
    checks = [
        ("group_size", group_size, group_size >= 1),
        ("max_new_tokens", max_new_tokens, shortest >= 1),
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
        ("min_p", min_p, 0 <= min_p <= 1),
        ("slots", slots, slots is None or slots >= 1),
        ("block", block, block is None or block >= 1),
    ]
    for name, value, good in checks:
        if not good:
            raise ValueError(f"{name}={value} makes no sense: see the comment of its key in config.py")
