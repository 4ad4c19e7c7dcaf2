"""tasks/guess.py: the games, who plays them badly, who learns to halve; and conversations in the warm-up."""

import statistics

import pytest

import train
from config import load
from conftest import rows
from data import char_tokenizer, load_task
from rollout import Sampler
from tasks.guess import env, fewest_guesses, played, task
from turns import Conversations, Wrapper
from warmup import conversation, demonstrations

TOKENIZER = char_tokenizer("0123456789:?<>")


def test_rows_are_functions_of_seed_and_index_and_each_number_comes_once_in_a_step():
    games = load_task("guess", high=32, eval_problems=32)
    assert games.batch(3, 32, seed=5) == games.batch(3, 32, seed=5) != games.batch(3, 32, seed=6)
    assert sorted(row["number"] for row in games.batch(3, 32, seed=5)) == list(range(1, 33))
    assert sorted(row["number"] for row in games.eval) == list(range(1, 33))


@pytest.mark.parametrize("high", [2, 3, 32, 999])
@pytest.mark.parametrize("walks", [True, False])
def test_a_demonstration_is_what_the_environment_would_have_said(high, walks):
    for number in range(1, high + 1, max(1, high // 40)):
        texts = played(number, high, walks, 12345678901234567890 * number)
        game = env(dict(number=number, high=high))
        for said, reply in zip(texts[::2], [*texts[1::2], None]):
            assert game.step(said) == reply
        most = high.bit_length()
        assert game.found and game.reward() == pytest.approx(1 + (most - len(texts[::2])) / 10)


@pytest.mark.parametrize("said", ["", "?", "x?", "-3?", "٣?", "1" * 1_000_000 + "?", "3\0?", "3 ?", "16"])
def test_what_is_no_guess_loses_the_game_and_breaks_nothing(said):
    game = env(dict(number=5, high=32))
    if said == "16":
        assert game.step(said) == "<"
    else:
        assert game.step(said) is None and game.reward() == 0.0


def test_the_best_player_halves():
    assert fewest_guesses(1) == 1 and fewest_guesses(3) == 5 / 3 and fewest_guesses(32) == 135 / 32


def test_options_that_make_no_game_are_one_sentence():
    for options in (dict(high=1), dict(high=1000), dict(walkers=1.5)):
        with pytest.raises(ValueError, match="guess needs 2 <= high <= 999"):
            task(data_dir="", eval_problems=3, **options)


# ---------------------------------------------------------------------------- conversations in the warm-up
def test_a_demonstration_has_the_ids_that_the_sampler_would_have_made(tiny):
    """Whatever the model says, the row that it made is the demonstration of the same conversation."""

    def reply(row, said):
        return None if len(said) > 6 else "<" * (1 + len(said) % 3)

    tokenizer = char_tokenizer("".join(map(chr, range(48, 94))))  # all that the model can say
    options = dict(role="", prefill="", turn_ends=tuple("?ABCDE"), max_turns=9, timeout=30.0)
    conversations = Conversations(reply, tokenizer, stop_ids=[1], **options)
    turns = conversations.begin([{}], 12)
    drawing = dict(max_new_tokens=20, stop_ids=[1], seed=3, turns=turns)
    out = Sampler(tiny).generate([[4, 5]], group_size=12, **drawing)
    compared = 0
    for n, talk in enumerate(turns.talks):
        if not out.stopped[n] or 0 in out.ids[n]:
            continue  # a cut conversation would end in another way, and <pad> has no text
        texts = [message["content"] for message in talk.messages]
        ids, drawn = conversation(tokenizer, texts, 1, conversations.wrapper, options["turn_ends"])
        assert (ids, drawn) == (out.ids[n], out.drawn[n])
        compared += len(talk.said) > 1
    assert compared


def test_only_what_the_model_says_is_learnt():
    wrapper = Wrapper(TOKENIZER, role="", stop_ids=[1])
    rows = [dict(prompt="32:", solution=["9?", ">", "16?"]), dict(prompt="32:", solution=["9?", ">", "1"])]
    options = dict(system="", prefill="", wrapper=wrapper, turn_ends=("?",))
    prompts, completions, drawn = demonstrations(TOKENIZER, rows, 1, **options)
    said = [
        [TOKENIZER.decode([i for i, d in zip(*x) if d]) for x in zip(group, [d])]
        for group, d in zip(completions, drawn)
    ]
    assert said == [["9?16?"], ["9?1<eos>"]] and [len(p) for p in prompts] == [3, 3]


@pytest.mark.parametrize("solution", [["9?", ">"], [], ["9?", ">", "1?", "<"]])
def test_a_conversation_that_does_not_end_with_the_model_is_refused(solution):
    wrapper = Wrapper(TOKENIZER, role="", stop_ids=[1])
    with pytest.raises(ValueError, match="solution"):
        demonstrations(
            TOKENIZER, [dict(prompt="1:", solution=solution)], 1, system="", prefill="", wrapper=wrapper
        )


def test_a_conversation_without_an_environment_is_refused():
    row = dict(prompt="1:", solution=["9?", ">", "1?"])
    with pytest.raises(ValueError, match="which needs `env`"):
        demonstrations(TOKENIZER, [row], 1, system="", prefill="")


@pytest.mark.slow
def test_guess_learns(tmp_path):
    """A short run of configs/guess.py: from 8 guesses a game to fewer than 6."""
    flags = ["--steps=24", "--eval_every=0", "--threads=1", f"--out_dir={tmp_path / 'run'}"]
    train.main(load(["configs/guess.py", *flags]))
    mean = [row["turns/mean"] for row in rows(tmp_path / "run/metrics.jsonl") if row["step"]]
    assert mean[0] > 7.5 and statistics.mean(mean[-4:]) < 5.8
