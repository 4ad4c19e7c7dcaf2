"""Sums of two numbers, made up as they are needed: the task that teaches a tiny model on a laptop.

    task = load_task("arithmetic", style="chars", digits=3, worked_share=0.3)
    rewards = [("arithmetic", 1.0)]                                  # in a config file: configs/arithmetic.py

A demonstration (`solution`) is either the bare answer or the sum worked column by column. The second is
longer and easier to get right, so a model that is rewarded for right answers alone learns to work.

Tests: python -m pytest tests/test_tasks.py
"""

import functools

from data import hashed, is_held_out, text_of


def task(*, data_dir, eval_problems, style="chars", digits=3, low=None, high=None, worked_share=0.3,
         worked_first=0, held_out=0.1):  # fmt: skip
    """Sums of two numbers from low to high (by default those with `digits` digits), without end.

    style "chars": prompt "347+585=" for a character model that starts from nothing. Of its demonstrations the
    first `worked_first` are all worked, and then a share `worked_share`, evenly spread; the others are the
    bare answer. style "words": "What is 347 + 585?" for a chat model. A share `held_out` of the pairs is
    never trained on.
    """
    if low is None:
        low = 10 ** (digits - 1) if digits > 1 else 0
    if high is None:
        high = 10**digits - 1
    if style not in ("chars", "words") or not 0 <= low <= high or not 0 < held_out <= 0.9:
        raise ValueError(
            "arithmetic needs style='chars' or 'words', 0 <= low <= high, 0 < held_out <= 0.9; "
            f"got {style!r}, {low}, {high}, {held_out}"
        )
    is_worked = functools.partial(shows_work, first=worked_first, share=worked_share)
    make = functools.partial(sum_row, low=low, high=high, style=style, is_worked=is_worked, held_out=held_out)
    # The held-out rows come from draws that do not depend on the run's seed, one try each. A small range has
    # fewer held-out pairs than were asked for: this many draws find about all of them.
    found = {}
    for i in range(int((500 + 2 * eval_problems) / held_out)):
        row = make("held out", i, wanted=True, tries=1)
        if row:
            found[row["prompt"]] = row  # no problem twice
    rows = list(found.values())[:eval_problems]
    if not rows or not make(0, 0):
        raise ValueError(
            f"there are too few sums from {low} to {high} to hold out a share of {held_out}: "
            "widen low and high, or change held_out"
        )
    return make, rows


def shows_work(index: int, *, first: int, share: float) -> bool:
    """Whether demonstration `index` is worked. Exactly a share of any batch is: were it drawn for each row, a
    last batch with a few more or less would decide how a small model answers.
    """
    return index < first or int((index + 1) * share) > int(index * share)


def sum_row(seed, index, *, low, high, style, is_worked, held_out, wanted=False, tries=10_000):
    """Row `index` of the sums of `seed`: the first of its draws that is held out or not, as `wanted`.

    None if no draw is.
    """
    numbers = high - low + 1
    for attempt in range(tries):
        u = hashed(seed, index, attempt)  # 256 random bits, used up from the low end
        u, a = divmod(u, numbers)
        _, b = divmod(u, numbers)
        a, b = low + a, low + b
        # b + a is held out together with a + b, or its twin would give it away.
        if is_held_out(held_out, min(a, b), max(a, b)) != wanted:
            continue
        if style == "words":
            return dict(prompt=f"What is {a} + {b}?", answer=str(a + b), solution=f"{a} + {b} = {a + b}")
        work = worked(a, b) if is_worked(index) else ""
        return dict(prompt=f"{a}+{b}=", answer=str(a + b), solution=f"{work}{a + b}")
    return None


def worked(a: int, b: int) -> str:
    """347 + 585 -> "<75_=^2,48^=^3,35^=_9>": column by column from the right.

    A column is digit, digit, carry in = carry out, digit of the sum, where "^" is a carry and "_" none. Every
    column has the same six characters, so each character is a copy from a fixed distance or a sum of what
    stands just before it, and the answer that follows is the last digits read backwards. A small transformer
    learns such local rules first. Carries are no digits, because with 0 and 1 it looked for them among the
    digits and misread 0s and 1s of the second column.
    """
    width = len(str(max(a, b)))
    steps = []
    carry = 0
    for x, y in zip(reversed(f"{a:0{width}}"), reversed(f"{b:0{width}}")):
        total = int(x) + int(y) + carry
        steps.append(f"{x}{y}{'_^'[carry]}={'_^'[total // 10]}{total % 10}")
        carry = total // 10
    return f"<{','.join(steps)}>"


def arithmetic(completions, prompts=None, *, answer, **_):
    """1 if what follows the worked part "<..>" is exactly the row's `answer`, else 0.

    Of a completion that has no worked part all of it counts.
    """
    scores = []
    for completion, right in zip(completions, answer):
        said = text_of(completion).rpartition(">")[2].strip()
        scores.append(float(said == str(right)))
    return scores
