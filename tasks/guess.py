"""Find a number with higher and lower: the task that shows a conversation with an environment on a laptop.

    task = load_task("guess", high=32)
    env = "guess"; rewards = [("env", 1.0)]                           # in a config file: configs/guess.py

The model says "16?", the environment replies ">" where the number is higher, "<" where it is lower, and
nothing where it is right. Demonstrations know the rules and play badly: most walk up or down in small steps,
the others guess anywhere in what is left. A model that is rewarded for few guesses learns to halve that.

Tests: python -m pytest tests/test_guess.py
"""

import functools

from data import hashed

STEP = 3  # a walker's longest step


def task(*, data_dir, eval_problems, high=32, walkers=0.7):
    """Games with a number from 1 to high, without end.

    walkers: the share of demonstrations that walk. No number is held out: the prompt does not name it, so
    there is nothing to learn by heart.
    """
    if not 2 <= high <= 999 or not 0 <= walkers <= 1:
        raise ValueError(f"guess needs 2 <= high <= 999 and 0 <= walkers <= 1; got {high}, {walkers}")
    make = functools.partial(game, high=high, walkers=walkers)
    return make, [make("held out", i) | dict(number=1 + i % high) for i in range(eval_problems)]


def game(seed, index: int, *, high: int, walkers: float) -> dict:
    """Row `index` of the games of `seed`: a number, and how somebody found it.

    Every number comes once in each run of `high` rows, so a step of so many prompts has no luck in it.
    """
    number = 1 + (hashed(seed, index // high) + index) % high
    walks = int((index + 1) * walkers) > int(index * walkers)  # exactly a share of any run of rows
    solution = played(number, high, walks, hashed(seed, index))
    return dict(prompt=f"{high}:", number=number, high=high, solution=solution)


def played(number: int, high: int, walks: bool, u: int) -> list[str]:
    """A game as texts of the model and the environment in turn. u: random bits, used up from the low end."""
    low, texts = 1, []
    u, down = divmod(u, 2)  # which end a walker starts from
    while True:
        size = high - low + 1
        u, place = divmod(u, min(STEP, size) if walks else size)
        guess = high - place if walks and down else low + place
        texts.append(f"{guess}?")
        if guess == number:
            return texts
        texts.append(">" if number > guess else "<")
        low, high = (guess + 1, high) if number > guess else (low, guess - 1)


class env:
    """Compares each guess with the row's number, says which way it is, and rewards few guesses."""

    def __init__(self, row):
        self.number, self.most = row["number"], row["high"].bit_length()
        self.guesses, self.found = 0, False

    def step(self, said: str) -> str | None:
        self.guesses += 1
        text = said.removesuffix("?")
        if not (text.isascii() and text.isdigit() and len(text) <= 6):
            return None  # not a guess: the game is lost
        guess = int(text)
        self.found = guess == self.number
        if self.found:
            return None
        return ">" if self.number > guess else "<"

    def reward(self) -> float:
        """1 for as many guesses as who halves ever needs, 1/10 less for each more; 0 if not found."""
        return 1 + (self.most - self.guesses) / 10 if self.found else 0.0


def fewest_guesses(high: int) -> float:
    """The mean number of guesses of the best player, over numbers 1 to high: those of a balanced tree."""
    total, depth, left = 0, 1, high
    while left:
        here = min(left, 2 ** (depth - 1))
        total, left, depth = total + depth * here, left - here, depth + 1
    return total / high
