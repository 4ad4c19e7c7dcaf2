"""The packed stream in which a group shares its prompt, and the cut of a step into micro-batches of groups.

    packed = Packed(model, [[1, 2]], [[[3, 4], [5]]])       # one prompt, two completions
    hidden = model(packed.ids, packed.positions, packed)    # (T, D)
    hidden[packed.sources]                                  # (M, D): what predicts each completion token

    stream      1  2 | 3 |          the prompt once, then each completion without its last token
    positions   0  1 | 2 |          every completion goes on from its prompt
    sources     1  2    1           where 3, 4 and 5 are predicted from
    targets     3  4    5

`drawn` says which ids of a completion the model drew: the others were given to it (turns.py), are seen by
what follows, and are not scored.

A group of G completions costs P + G C tokens instead of G (P + C), and the prompt gets the gradients of all
G. No padding reaches a matmul, and nothing here asks what a token's value is: a pad id, a stop id in the
middle of a completion or a repeated prompt are all just tokens.

Dims: T tokens of the stream, M scored tokens, B prompts, G completions a prompt, P prompt length, C
completion length, D width, H query heads, K key/value heads, E head width.
"""

from itertools import compress

import torch

from kernels import flash_attention as flash
from kernels.attention import Buckets, attention
from kernels.rope import rotate

Ids = list[int]
Part = tuple[int, list[int]]  # a prompt's number b, and the numbers of some of its completions


class Packed:
    """The plan of a stream [prompt, completion, completion, .., prompt, ..]: a group shares its prompt.

    model: a Transformer, asked for its context, heads, device and dtype only. prompts: B non-empty lists of
    ids. completions: B groups, each a list of non-empty lists of ids; a group may be empty.

    drawn: of each completion, in their order, which of its ids were drawn, a bool an id; None: all.

    ids, positions (T,): the stream. The last token of a completion predicts nothing and is left out of it.
    sources (M,): where in the stream each completion token is predicted from. The shift by one exists here
    and nowhere else. targets (M,): the token itself. M counts drawn tokens. rows (M,): its completion's
    number, counted over all groups. All int64. segments: what kernels/attention.py makes its plan from.

    Raises ValueError for an empty prompt or completion, and for a sequence longer than the model's context.
    """

    def __init__(self, model, prompts: list[Ids], completions: list[list[Ids]], drawn=None):
        assert prompts and len(prompts) == len(completions), (
            f"{len(prompts)} prompts, {len(completions)} groups of completions"
        )
        self.segments = []  # start, length, prompt_start, prompt_length
        ids, positions, sources, targets, rows = [], [], [], [], []
        row = 0  # of the next completion, counted over all groups
        # Python lists are fast enough: 16,000 tokens take 10 ms, before a forward and backward of seconds.
        for prompt, group in zip(prompts, completions):
            refuse_unusable(prompt, group, model.shape.context, first_row=row)
            start, P = len(ids), len(prompt)
            # A prompt is a segment that sees only itself. It stands once, however many completions it has.
            self.segments.append((start, P, start, 0))
            ids += prompt
            positions += range(P)
            for completion in group:
                own, C = len(ids), len(completion)
                # A completion sees all of its prompt and, causally, itself; never another completion.
                self.segments.append((own, C - 1, start, P))
                ids += completion[:-1]
                # It goes on from its prompt, however far from it in the stream it stands.
                positions += range(P, P + C - 1)
                # The first token follows the prompt's last, which is one position for all G completions.
                predicted_from = [start + P - 1, *range(own, own + C - 1)]
                scored = completion
                if drawn is not None and not all(drawn[row]):
                    predicted_from = list(compress(predicted_from, drawn[row]))
                    scored = list(compress(completion, drawn[row]))
                sources += predicted_from
                targets += scored
                rows += [row] * len(scored)
                row += 1

        def tensor(numbers):
            return torch.tensor(numbers, dtype=torch.long, device=model.device)

        self.ids = tensor(ids)  # (T,)
        self.positions = tensor(positions)  # (T,)
        self.sources = tensor(sources)  # (M,)
        self.targets = tensor(targets)  # (M,)
        self.rows = tensor(rows)  # (M,)
        self.layout = attention_layout(model, self.segments)

    def attend(self, layer, qk, v, cos, sin):
        """Attention of one layer: qk (T, H + K, E), v (T, K, E), cos and sin (T, 1, E/2) -> (T, H, E)."""
        K = v.shape[1]
        q, k = rotate(qk, cos, sin).split([qk.shape[1] - K, K], 1)
        self.keep(layer, k, v)
        if isinstance(self.layout, Buckets):
            return attention(q, k, v, self.layout)
        return flash.flash_attention(q, k, v, self.layout)

    def keep(self, layer, k, v):
        """What becomes of k and v (T, K, E): nothing here; rollout.Prefill puts them into the cache."""


def refuse_unusable(prompt: Ids, group: list[Ids], context: int, *, first_row: int):
    """Raises ValueError for a group that cannot be packed. first_row: the number of its first completion."""
    if not prompt:  # the first token of a completion is predicted from the prompt's last one
        raise ValueError("a prompt is empty: at least one token must come before a completion")
    longest = len(prompt) + max(map(len, group), default=0)
    if longest > context:  # nothing breaks beyond the context, the answers just become nonsense
        raise ValueError(
            f"a prompt and its completion are {longest} tokens, longer than the model's context of {context}"
        )
    for row, completion in enumerate(group, first_row):
        if not completion:
            raise ValueError(f"completion {row} is empty: it has no token to score")


def attention_layout(model, segments: list[tuple[int, int, int, int]]):
    """The plan of attention, made from lengths: no mask is inferred from the values of a tensor.

    Both forms are the same function of the same segments: Tiles are tables for one Triton kernel, Buckets
    stack segments of similar size for torch.
    """
    R = model.shape.H // model.shape.K  # query heads that share a key head
    where = dict(dtype=model.dtype, device=model.device)
    if flash.on_triton(model.embed):
        return flash.Tiles(segments, R, E=model.shape.E, **where)
    return Buckets(segments, R, **where)


# ---------------------------------------------------------------------------------------------- micro-batches
def micro_batches(prompts: list[Ids], completions: list[list[Ids]], micro_tokens: int) -> list[list[Part]]:
    """Cuts a step into micro-batches of at most micro_tokens tokens of prompts and completions.

    prompts: B lists of ids. completions: B groups of lists of ids; an empty list is a row that the caller has
    dropped, and is left out. Returns the micro-batches, each a list of (b, members): a prompt's number and
    the numbers of its completions, both ascending, so that

        for cut in micro_batches(prompts, completions, 16384):
            hidden, targets = model.completion_hidden(
                [prompts[b] for b, members in cut],
                [[completions[b][g] for g in members] for b, members in cut])

    Groups stay whole, so that a prompt is computed once. A group too large for one micro-batch is split and
    its prompt computed again, with the same gradient. A single completion that is longer than micro_tokens
    with its prompt gets a micro-batch of its own, since it has to run somewhere. The fullest micro-batch
    comes first: what does not fit in memory fails at once and not after minutes.
    """
    pieces = []  # (tokens, (b, members)) of whole groups and of parts of large ones
    for b, (prompt, group) in enumerate(zip(prompts, completions)):
        P = len(prompt)
        lengths = []
        for g, completion in enumerate(group):
            if completion:
                lengths.append((len(completion), g))
        # Parts of about the same size; filled one after another, the last one would be mostly prompt.
        for members in spread(lengths, micro_tokens - P):
            tokens = P + sum(len(group[g]) for g in members)
            pieces.append((tokens, (b, members)))
    return [join_parts(parts) for parts in spread(pieces, micro_tokens)]


def join_parts(parts: list[Part]) -> list[Part]:
    """A micro-batch in ascending order; two parts of one group that met in it become one, with one prompt."""
    groups: dict[int, list[int]] = {}
    for b, members in parts:
        groups.setdefault(b, []).extend(members)
    return [(b, sorted(members)) for b, members in sorted(groups.items())]


def spread(items: list, room: int) -> list[list]:
    """Spreads items (size, what) over few bins of at most `room`; returns the whats of each, fullest first.

    An item larger than room is alone in its bin. Each item, the largest first, goes into the
    emptiest bin, and all starts again with one bin more whenever that does not fit. So the emptiest
    bin holds at least half of the fullest, unless that is a single item: the last item to enter the
    fullest bin found it the emptiest.
    """
    # Python's sort is stable: equal sizes keep their order, so the cut is a function of the lengths alone.
    items = sorted(items, key=lambda item: -item[0])
    # Fewer bins cannot do. An item that is too large fills its bin and no more.
    total = sum(min(size, room) for size, _ in items)
    count = max(1, -(-total // max(room, 1)))
    while True:
        loads = [0] * count
        bins = [[] for _ in range(count)]
        for size, what in items:
            emptiest = loads.index(min(loads))
            loads[emptiest] += size
            bins[emptiest].append(what)
        if all(load <= room or len(held) <= 1 for load, held in zip(loads, bins)):
            break
        count += 1
    by_load = sorted(zip(loads, bins), key=lambda pair: -pair[0])
    return [held for _, held in by_load if held]
