"""Rows that wait for their environment: where their keys are meanwhile, and how a reply is appended.

A row that has ended its turn (turns.py) leaves its seat, so that another row can be decoded there. Its keys
are *parked* in one of the last slots, which no decoding step reads. When the reply has come, its ids go into
the cache behind the row's own, in one forward for several rows (`Extend`), which draws the first token of
the next turn; then the row takes a seat again. Given ids enter no decoding step, and no CUDA graph.

    live -> away -> (replied) -> returning -> live         or, where the environment ends it: away -> ended

Dims: i rows of an extension, T tokens of it, c of its longest row, H query heads, K key/value heads, R = H /
K, E head width, P prompt tokens of a place, C own tokens of a slot.
"""

from collections import deque

import torch
import torch.nn.functional as F

import decode
from cache import PREFILL_TOKENS, PREFILL_TOKENS_TRITON
from decode import upload
from kernels import flash_attention as flash
from kernels.rope import rotate


class Parking:
    """What the sampler knows of rows that are not seated because they have ended a turn.

    sampler: rollout.Sampler, whose lists of rows these are. turns: turns.Turns; None: nothing ever waits.
    """

    def __init__(self, sampler, turns):
        self.sampler, self.turns = sampler, turns
        N = len(sampler.ids)
        self.away: set[int] = set()  # rows that wait for their environment
        self.replied: deque = deque()  # (row, ids) of replies that are not appended yet
        self.returning: deque = deque()  # rows that have the first token of their next turn and no seat
        self.rows: list[int] = []  # the row in the last slot, the last but one, ..
        self.start = [0] * N  # where a row's turn began, in its ids
        self.turn = [0] * N  # how many turns it has ended

    def slot(self, row: int) -> int:
        """The slot of a parked row."""
        return self.sampler.slots.count - 1 - self.rows.index(row)

    # -------------------------------------------------------------------------------------- the end of a turn
    def end_turn(self, row: int, stop: bool):
        """Asks the row's environment, if the token just drawn ends a turn or is the last that may be."""
        s = self.sampler
        said = s.ids[row][self.start[row] :]
        whole, left = stop or self.turns.ends(said), s.limits[row] - len(s.ids[row])
        if whole or not left:
            self.away.add(row)
            self.turn[row] += 1
            # One more than is given must fit, since the model has the last word.
            room = s.rooms[row] - len(s.ids[row]) - 1 if left else -1
            self.turns.ask(row, said, room=room, cut=not whole)

    def park(self):
        """Live rows that wait for their environment leave their seats: their keys go to the last slots."""
        s = self.sampler
        leaving = [slot for slot, row in enumerate(s.live) if row in self.away]
        if not leaving:
            return
        rows = [s.live[slot] for slot in leaving]
        first = s.slots.count - 1 - len(self.rows)
        ended = [slot for slot, row in enumerate(s.live) if s.ended[row]]
        # In one move with the rows that close up, because a parking place may be the slot of one of them.
        s.close_up(sorted(leaving + ended), leaving, [first - i for i in range(len(rows))])
        self.rows += rows
        self.hold(rows)

    def hold(self, rows: list[int]):
        """Tells the slots how many own keys these parked rows have: all but that of their last token.

        A step that computes more slots than are live writes there, where `Extend` or the row's next step
        writes again before anybody reads it.
        """
        own = [len(self.sampler.ids[row]) - 1 for row in rows]
        where = upload([[self.slot(row) for row in rows], own], self.sampler.keys.device)
        self.sampler.slots.park(*where, longest=max(own))

    # ---------------------------------------------------------------------------------------------- the reply
    def worth_hearing(self) -> bool:
        """Whether to take replies now.

        On a CPU only when nothing is left to decode. When a reply comes depends on the clock; then so would
        which rows share a matmul, and with it the last bits of their log-probabilities, and a run that is
        resumed would not have the same ones. A GPU takes the replies that are there, several at once, because
        each forward costs its host as much as a dozen steps.
        """
        s = self.sampler
        if not self.away or not s.live:
            return bool(self.away)
        return s.prompts_first and 8 * self.turns.ready() >= len(s.live)

    def hear(self):
        """Takes replies, and appends them to their rows. Waits for some where there is nothing else to do."""
        s = self.sampler
        for reply in self.turns.replies(wait=not s.live, every=not s.prompts_first):
            if reply.ids is not None:
                self.replied.append((reply.row, reply.ids))
                continue
            self.away.discard(reply.row)
            s.stopped[reply.row] = reply.stopped
            s.leave(reply.row)
        self.leave([row for row in self.rows if s.ended[row]], [])
        while self.replied:
            batch = self.next_replies()
            if not batch:
                break
            self.extend(batch)

    def next_replies(self) -> list[tuple]:
        """(row, ids) of replies that one forward takes. Rows without a slot get one, as far as there are."""
        s = self.sampler
        most_tokens = PREFILL_TOKENS_TRITON if s.prompts_first else PREFILL_TOKENS
        batch, later, tokens = [], deque(), 0
        for row, given in self.replied:
            full = batch and (tokens + len(given) >= most_tokens or len(batch) == s.slot_count)
            # A row whose first token ended its turn has never had a slot.
            homeless = row not in self.rows
            if full or (homeless and len(s.live) + len(self.rows) == s.slots.count):
                later.append((row, given))
                continue
            if homeless:
                self.rows.append(row)
            batch.append((row, given))
            tokens += len(given) + 1
        self.replied = later
        return batch

    def extend(self, batch):
        """One forward over the last token of each row and what it is given, and a draw from where that ends.

        batch: (row, ids) pairs. The keys of these rows are parked.
        """
        s, pieces = self.sampler, []
        place = {b: i for i, b in enumerate(s.placed)}
        for row, given in batch:
            b, own = row // s.G, len(s.ids[row]) - 1
            piece = dict(slot=self.slot(row), place=place[b], prompt=len(s.prompts[b]), own=own)
            pieces.append(piece | dict(ids=[s.ids[row][-1], *given]))
            s.ids[row] += given
            s.limits[row] = min(s.limits[row] + len(given), s.rooms[row])
            self.start[row] = len(s.ids[row])
            s.given[row].append(range(own + 1, self.start[row]))
            self.away.discard(row)
        rows = [row for row, _ in batch]
        plan = Extend(s.model, s.slots.cache, pieces)
        hidden = s.twin(plan.ids, plan.positions, plan)[plan.last]  # (i, D)
        s.draw_first(rows, hidden, numbers=[len(s.logprobs[row]) for row in rows])
        self.returning.extend(row for row in rows if s.goes_on(row))
        self.hold(rows)

    # ----------------------------------------------------------------------------------------- back to a seat
    def unpark(self):
        """Returning rows take seats, before all others."""
        s = self.sampler
        ended = [slot for slot, row in enumerate(s.live) if s.ended[row]]
        if ended:
            s.close_up(ended)
        seats = s.slot_count - len(s.live)
        rows = [self.returning.popleft() for _ in range(min(seats, len(self.returning)))]
        if rows:
            slots = list(range(len(s.live), len(s.live) + len(rows)))
            self.leave(rows, slots)
            s.enter(slots, rows)

    def leave(self, rows: list[int], slots: list[int]):
        """Parked rows go to these slots, or are forgotten where there are none; the others close up."""
        gone = set(rows)
        staying = [row for row in self.rows if row not in gone]
        source = [self.slot(row) for row in rows[: len(slots)]]
        target = list(slots)
        for i, row in enumerate(staying):
            if self.rows[i] != row:
                source.append(self.slot(row))
                target.append(self.sampler.slots.count - 1 - i)
        self.rows = staying
        if source:
            self.sampler.slots.move(*upload([source, target], self.sampler.keys.device))


class Extend:
    """The plan of given ids: each row's go into the cache behind its own keys, and see them and its prompt.

    pieces: of each row its slot and its prompt's place in the cache, how many tokens these hold (`own` and
    `prompt`), and the ids to append, a dict each. last: where the next token of each row is predicted from.
    """

    def __init__(self, model, cache, pieces: list[dict]):
        self.cache, device = cache, model.device
        lengths = torch.tensor([len(piece["ids"]) for piece in pieces])
        T = int(lengths.sum())
        # All is computed on the CPU and uploaded at once, so that a GPU is never waited for.
        names = ("slot", "place", "prompt", "own")
        of_rows = torch.tensor([[piece[name] for piece in pieces] for name in names])  # (4, i)
        first = lengths.cumsum(0) - lengths  # of each row, in the stream
        slot, place, prompt, own = of_rows.repeat_interleave(lengths, 1)  # (T,) each
        own += torch.arange(T) - first.repeat_interleave(lengths)
        ids = torch.tensor([i for piece in pieces for i in piece["ids"]])
        columns = upload(torch.stack([ids, prompt + own, slot, place, prompt, own]), device)
        self.ids, self.positions, self.slot, place, prompt, self.own = columns
        self.last = upload(lengths.cumsum(0) - 1, device)
        if flash.on_triton(model.embed):
            self.table = decode.table_of(cache, self.slot, place, self.own, prompt)
        else:
            self.lay_out(lengths, first, of_rows)

    def lay_out(self, lengths, first, of_rows):
        """The torch form: rows as a rectangle of queries (i, c), and which keys each of these sees."""
        self.slots, self.places, prompt, own = of_rows
        i, c = len(lengths), int(lengths.max())
        step = torch.minimum(
            torch.arange(c), lengths[:, None] - 1
        )  # (i, c); past a row's end, its last again
        self.queries = (first[:, None] + step).flatten()  # in the stream
        number = torch.arange(i * c).view(i, c)
        self.back = torch.cat([row[:length] for row, length in zip(number, lengths)])  # (T,)
        in_prompt = (torch.arange(self.cache.P) < prompt[:, None])[:, None].expand(i, c, -1)
        behind = torch.arange(self.cache.C) <= (own[:, None] + step)[..., None]  # (i, c, C)
        self.seen = torch.cat([in_prompt, behind], 2)[:, None]  # (i, 1, c, P + C)

    def attend(self, layer, qk, v, cos, sin):
        """qk (T, H + K, E), v (T, K, E), cos and sin (T, 1, E/2) -> (T, H, E)."""
        K = v.shape[1]
        q, k = rotate(qk, cos, sin).split([qk.shape[1] - K, K], 1)
        prompt_k, prompt_v, own_k, own_v = self.cache.layer(layer)
        own_k[self.slot, :, self.own] = k
        own_v[self.slot, :, self.own] = v
        if flash.on_triton(q):
            return flash.flash_decode(q, prompt_k, prompt_v, own_k, own_v, self.table)
        keys = torch.cat([prompt_k[self.places], own_k[self.slots]], 2)  # (i, K, P + C, E)
        values = torch.cat([prompt_v[self.places], own_v[self.slots]], 2)
        return self.attend_rows(q, keys, values)

    def attend_rows(self, q, keys, values):
        """q (T, H, E), keys and values (i, K, P + C, E) -> (T, H, E). Query heads of a key head are rows."""
        (_, H, E), (i, K, _, _) = q.shape, keys.shape
        R, c = H // K, self.seen.shape[2]
        rows = q.index_select(0, self.queries).view(i, c, K, R, E).permute(0, 2, 3, 1, 4)
        seen = self.seen.repeat(1, 1, R, 1)  # (i, 1, R * c, P + C)
        out = F.scaled_dot_product_attention(rows.reshape(i, K, R * c, E), keys, values, attn_mask=seen)
        out = out.view(i, K, R, c, E).permute(0, 3, 1, 2, 4).reshape(i * c, H, E)
        return out.index_select(0, self.back)
