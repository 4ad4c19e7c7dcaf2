"""Conversations in the sampler: what is drawn does not depend on when, where or beside whom, and is what is
trained on."""

import asyncio
import random
import re
import string
import time

import pytest
import torch

import kernels
import train
from config import load
from conftest import ALPHABET, ROOT, SHAPE, WITH_TURNS, Echo, checkpoint, quick, rows, same, settings, weights
from data import char_tokenizer, chat_ids, encode, prompt_ids
from policy import load_policy
from rollout import Sampler
from turns import Conversations, Wrapper

TOKENIZER = char_tokenizer(ALPHABET + "abcdefghijklmnopqrstuvwxyz?")
PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11, 12], [13], [14, 15, 16]]
STOP = [1, 20]
ROWS = [dict(prompt=str(b), number=b) for b in range(len(PROMPTS))]


class Tells:
    """Replies with what it was told, backwards, until the turn's length says that it is enough."""

    def __init__(self, row):
        self.row, self.heard = row, []

    def step(self, said):
        self.heard.append(said)
        if len(said) == 3:
            return None
        return (said[::-1] + str(self.row["number"]) * (len(said) % 4))[:9]

    def reward(self):
        return float(len("".join(self.heard)))


class TellsLate(Tells):
    """The same, at any time and in any order."""

    def step(self, said):
        time.sleep(random.random() * 0.02)
        return super().step(said)


class TellsAsync(Tells):
    """The same as a coroutine."""

    async def step(self, said):
        await asyncio.sleep(random.random() * 0.02)
        return super().step(said)


def conversations(env, **options):
    defaults = dict(
        role="", prefill="", stop_ids=STOP, turn_ends=tuple("aeiou0123"), max_turns=5, timeout=30.0
    )
    return Conversations(env, TOKENIZER, **defaults | options)


def sample(model, env=Tells, *, slots=None, block=None, G=3, prompts=PROMPTS, numbers=None, **options):
    """(rollout, turns) of a call on these prompts."""
    of = options.pop("of", None) or conversations(env)
    rows = [ROWS[b] for b in numbers] if numbers else ROWS[: len(prompts)]
    turns = of.begin(rows, G)
    defaults = dict(max_new_tokens=24, stop_ids=STOP, seed=3, step=2, entropy=True)
    sampler = Sampler(model, slots=slots, block=block)
    out = sampler.generate(prompts, group_size=G, turns=turns, prompt_numbers=numbers, **defaults | options)
    return out, turns


def heard(turns):
    return turns.heard(range(len(turns.talks)))


def test_the_conversations_of_these_tests_have_several_turns_and_every_kind_of_end(tiny):
    """Else the tests below would say little."""
    out, turns = sample(tiny)
    counts = [len(talk.said) for talk in turns.talks]
    assert max(counts) >= 4 and min(counts) == 1 and sum(counts) / len(counts) > 2
    assert any(out.stopped) and not all(out.stopped)
    assert sum(not d for drawn in out.drawn for d in drawn) > 60
    assert all(drawn[-1] for drawn in out.drawn)


@pytest.mark.parametrize("slots", quick(2, [3, 16, 1, 2, 5]))
@pytest.mark.parametrize("block", quick(1, [8, 1, 2]))
def test_ids_do_not_depend_on_slots_or_blocks(tiny, slots, block):
    expected, turns = sample(tiny)
    out, found = sample(tiny, slots=slots, block=block)
    assert out.ids == expected.ids and out.drawn == expected.drawn and out.stopped == expected.stopped
    assert heard(found) == heard(turns)


@pytest.mark.parametrize("env", quick(1, [TellsLate, TellsAsync]))
@pytest.mark.parametrize("slots", quick(1, [3, 1, 16]))
def test_ids_do_not_depend_on_when_an_environment_answers(tiny, env, slots):
    """On a CPU not even the last bit of a log-probability does."""
    expected, _ = sample(tiny, slots=slots)
    out, _ = sample(tiny, env, slots=slots)
    assert out.ids == expected.ids and out.logprobs == expected.logprobs


def test_a_row_does_not_depend_on_the_others(tiny):
    expected, _ = sample(tiny)
    for numbers in ([4, 2, 0], [1], [3, 1]):
        out, _ = sample(tiny, numbers=numbers, prompts=[PROMPTS[b] for b in numbers], slots=4)
        assert out.ids == [ids for b in numbers for ids in expected.group(b, 3)]


@pytest.mark.parametrize("options", [{}, dict(temperature=0.7, top_k=9, top_p=0.8)])
@pytest.mark.parametrize("slots", [2, 16])
def test_the_trainer_gives_the_samplers_log_probabilities(tiny, options, slots):
    out, _ = sample(tiny, slots=slots, **options)
    groups = [out.group(b, 3) for b in range(len(PROMPTS))]
    logp, entropy, rows = tiny.completion_logprobs(PROMPTS, groups, drawn=out.drawn, **options)
    sampled = torch.tensor([x for row in out.logprobs for x in row])
    assert len(logp) == len(sampled) == sum(map(sum, out.drawn))
    assert (logp - sampled).abs().max() < 2e-5
    assert (entropy - torch.tensor([x for row in out.entropies for x in row])).abs().max() < 2e-4
    assert rows.tolist() == [n for n, row in enumerate(out.logprobs) for _ in row]


def test_what_was_drawn_stands_in_ids_and_what_was_given_between_it(tiny):
    out, turns = sample(tiny)
    for n, talk in enumerate(turns.talks):
        ids, drawn = [], []
        replies = [m["content"] for m in talk.messages if m["role"] == "environment"]
        for said, reply in zip(talk.said, [*replies, None]):
            ids += said
            drawn += [True] * len(said)
            if reply is not None:
                given = TOKENIZER.encode(reply, add_special_tokens=False)
                ids += given
                drawn += [False] * len(given)
        assert out.ids[n] == ids and out.drawn[n] == drawn
        assert [m["role"] for m in talk.messages[::2]] == ["assistant"] * len(talk.said)


def test_draws_are_numbered_by_drawn_tokens(tiny):
    """An environment that replies with more text moves no key: the first turns are the same ids."""

    class Chatty(Tells):
        def step(self, said):
            reply = super().step(said)
            return reply and "0" * 5 + reply

    out, turns = sample(tiny)
    more, chatty = sample(tiny, Chatty)
    assert [talk.said[0] for talk in turns.talks] == [talk.said[0] for talk in chatty.talks]
    assert out.ids != more.ids


def test_greedy_turns(tiny):
    out, _ = sample(tiny, temperature=0.0, G=1)
    again, _ = sample(tiny, temperature=0.0, G=1, slots=2, block=3)
    assert out.ids == again.ids and sum(map(len, out.ids)) > sum(map(len, out.logprobs))


@pytest.mark.parametrize("slots", quick(1, [5, 2, 16]))
def test_the_table_form_of_attention_gives_the_same_ids(tiny, monkeypatch, slots):
    """The form of a GPU: all prompts first, blocks of eight, and replies as they come."""
    import decode

    expected, _ = sample(tiny)
    monkeypatch.setattr(decode, "attention_form", lambda model: decode.TableAttention)
    for env in (Tells, TellsLate):
        out, _ = sample(tiny, env, slots=slots)
        assert out.ids == expected.ids


@pytest.mark.slow
def test_the_kernels_give_the_same_ids(tiny):
    expected, _ = sample(tiny, prompts=PROMPTS[:3])
    kernels.use("triton")
    try:
        out, _ = sample(tiny, prompts=PROMPTS[:3], slots=5)
    finally:
        kernels.use("auto")
    assert out.ids == expected.ids


# ------------------------------------------------------------------------------------------------- limits
def test_limits_of_turns_drawn_tokens_and_context(tiny):
    one = sample(tiny, of=conversations(Tells, max_turns=1))[0]
    assert all(all(drawn) for drawn in one.drawn)
    two, turns = sample(tiny, of=conversations(Tells, max_turns=2))
    assert max(len(talk.said) for talk in turns.talks) == 2
    few, _ = sample(tiny, max_new_tokens=5)
    assert max(map(len, few.logprobs)) == 5 and max(map(len, few.ids)) <= 10
    tight, turns = sample(tiny, max_context=14)
    assert max(len(PROMPTS[n // 3]) + len(ids) for n, ids in enumerate(tight.ids)) <= 14
    assert all("tokens where" in failed for failed in turns.failures()) and turns.failures()
    assert all(talk.reward is not None for talk in turns.talks)


def test_a_prompt_that_fills_max_context_is_one_sentence(tiny):
    with pytest.raises(ValueError, match="prompt 2 has 5 tokens and max_context=5 leaves no room"):
        sample(tiny, max_context=5)


# ------------------------------------------------------------------------------ environments that misbehave
def misbehaving(reply):
    """An environment that does this at every second turn of prompts 1 and 3."""

    class Env(Tells):
        def step(self, said):
            if self.row["number"] in (1, 3) and self.heard:
                return reply()
            return super().step(said)

    return Env


def raises():
    raise KeyError("no such tool")


def leaves():
    raise SystemExit(3)


BAD = {
    "raises": (raises, "raised KeyError: 'no such tool' (tests/test_turns.py, line "),
    "leaves": (leaves, "raised SystemExit: 3"),
    "number": (lambda: 7, "replied 7, which is no text"),
    "bytes": (lambda: b"7", "replied b'7', which is no text"),
    "nul": (lambda: "7\0", "its alphabet lacks the characters '\\x00'"),
    "large": (lambda: "7" * 1_000_000, "replied 1,000,000 characters where"),
    "long": (lambda: "7" * 50, "replied 50 tokens where"),
    "surrogate": (lambda: "\ud800", "half a surrogate pair"),
    "hangs": (lambda: time.sleep(30), "raised TimeoutError: no reply in 0.3 seconds (env_timeout)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_failure_ends_its_row_and_is_one_sentence_and_nothing_else_changes(tiny, kind):
    reply, sentence = BAD[kind]
    good, turns = sample(tiny)
    out, found = sample(tiny, of=conversations(misbehaving(reply), timeout=0.3), slots=4)
    failed, shorter = found.failures(), 0
    assert failed and all(sentence in text and text.endswith("; the row ends there") for text in failed)
    assert all("the environment of prompt 1, sample" in f or "of prompt 3, sample" in f for f in failed)
    for n, talk in enumerate(found.talks):
        if talk.failed:
            assert not out.stopped[n] and out.ids[n] == good.ids[n][: len(out.ids[n])] and out.drawn[n][-1]
            shorter += len(out.ids[n]) < len(good.ids[n])
            alive = kind in ("nul", "large", "long", "surrogate")
            assert (talk.reward is not None) == alive
        else:
            assert out.ids[n] == good.ids[n] and talk.reward == turns.talks[n].reward
    assert shorter


def test_a_coroutine_that_hangs_is_given_up(tiny):
    class Env(Tells):
        async def step(self, said):
            await asyncio.sleep(60)

    start = time.monotonic()
    _, turns = sample(tiny, of=conversations(Env, timeout=0.2))
    assert time.monotonic() - start < 5
    assert "no reply in 0.2 seconds (env_timeout)" in turns.failures()[0]


@pytest.mark.parametrize("value", ["1", float("nan"), float("inf"), [1]])
def test_a_reward_that_is_no_number_is_a_failure(tiny, value):
    class Env(Tells):
        def reward(self):
            return value

    _, turns = sample(tiny, Env)
    assert len(turns.failures()) == len(turns.talks) and "no finite number" in turns.failures()[0]
    assert all(talk.reward is None for talk in turns.talks)


@pytest.mark.slow
def test_more_hangs_than_threads_hold_nobody_up(tiny, monkeypatch):
    import turns as module

    monkeypatch.setattr(module, "THREADS", 2)
    start = time.monotonic()
    out, found = sample(tiny, of=conversations(misbehaving(lambda: time.sleep(30)), timeout=0.2))
    assert len(found.failures()) >= 4 and time.monotonic() - start < 5
    assert len(out.ids) == 15


def test_an_environment_as_a_function_gets_its_row_and_cannot_change_it(tiny):
    rows = [dict(prompt="x", number=b, seen=[]) for b in range(5)]

    def env(row, said):
        row["seen"].append(said)
        assert len(row["seen"]) == 1
        return "12" if len(said) < 4 else None

    turns = conversations(env).begin(rows, 3)
    out = Sampler(tiny).generate(PROMPTS, group_size=3, max_new_tokens=16, stop_ids=STOP, seed=3, turns=turns)
    assert not turns.failures() and rows[0]["seen"] == []
    assert any(not all(drawn) for drawn in out.drawn)
    assert all(talk.reward is None for talk in turns.talks)


# ------------------------------------------------------------------------------------------- what is trained
def padded_loss(model, prompts, groups, drawn, adv, old):
    """The loss of `clip`, the usual way: a sequence a row, with a mask of what was drawn."""
    loss, tokens, n = 0.0, sum(map(sum, drawn)), 0
    for prompt, group in zip(prompts, groups):
        for ids in group:
            logp = model.logits(torch.tensor(prompt + ids)).log_softmax(-1)[len(prompt) - 1 : -1]
            logp = logp.gather(1, torch.tensor(ids)[:, None])[:, 0]
            mask = torch.tensor(drawn[n])
            ratio = (logp[mask] - torch.tensor(old[n])).exp()
            gain = torch.minimum(ratio * adv[n], ratio.clamp(0.8, 1.2) * adv[n])
            loss, n = loss - gain.sum() / tokens, n + 1
    return loss


def test_gradients_are_those_of_padded_rows_with_a_mask(tiny):
    from loss import policy_loss

    out, _ = sample(tiny)
    groups, adv = [out.group(b, 3) for b in range(5)], torch.randn(15)
    padded_loss(tiny, PROMPTS, groups, out.drawn, adv, out.logprobs).backward()
    expected = [p.grad.clone() for p in tiny.parameters()]
    tiny.zero_grad()
    logp, _, rows = tiny.completion_logprobs(PROMPTS, groups, drawn=out.drawn)
    old = torch.tensor([x for row in out.logprobs for x in row])
    loss, _ = policy_loss(logp, old, adv, rows)
    loss.backward()
    for p, gradient in zip(tiny.parameters(), expected):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def pays(completions, turns, env_reward, **_):
    """The environment's reward, and what was said last."""
    assert all(t[-1]["content"] == c for t, c in zip(turns, completions))
    return [worth + c.count("4") for worth, c in zip(env_reward, completions)]


def run_of(tmp_path, **keys):
    options = dict(max_new_tokens=20, rewards=[("env", 0.1), (pays, 1.0)], lora_rank=4, lora_alpha=8.0)
    return settings(tmp_path, **WITH_TURNS | options | keys)


class SlowEcho(Echo):
    def step(self, said):
        time.sleep(random.random() * 0.02)
        return super().step(said)


SlowEcho.__name__ = SlowEcho.__qualname__ = "Echo"


VARIANTS = {
    "adapters": {},
    "full, kl, moving reference": dict(lora_rank=0, beta=0.1, ref_sync_every=2),
    "dynamic, overlapped": dict(resample_zero_groups=True, reward_overlap=True),
    "epochs, dropout": dict(epochs=2, minibatches=2, lora_dropout=0.1, mismatch_clip=2.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_with_turns_resumes_to_the_bit(tmp_path, name):
    """Also where its environment takes another time to answer."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train.main(run_of(whole, **VARIANTS[name]))
    train.main(run_of(halves, **VARIANTS[name], env=SlowEcho, steps=2))
    train.main(run_of(halves, **VARIANTS[name], env=SlowEcho, resume=True))
    assert same(weights(whole / "run/ckpt/step_000004"), weights(halves / "run/ckpt/step_000004"))
    metrics = rows(whole / "run/metrics.jsonl")
    assert all(row["turns/mean"] > 1.5 and row["turns/env_failures"] == 0 for row in metrics)
    assert all(row["sampling/sampling_logp_difference/max"] < 2e-5 for row in metrics[:1])
    assert metrics[0]["completions/mean_length"] <= 20


# -------------------------------------------------------------------------------------- the chat template
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def with_template(template=TEMPLATE):
    tokenizer = char_tokenizer("0123456789<>abcdefghijklmnopqrstuvwxyz")
    tokenizer.chat_template = template
    return tokenizer


def said_by(tokenizer, *contents, role="user"):
    """A conversation as messages: the person, the model, an environment of this role, the model, .."""
    roles = ["user", *["assistant", role] * len(contents)]
    return [dict(role=r, content=c) for r, c in zip(roles, contents)]


def test_a_reply_is_wrapped_as_the_template_wraps_it():
    tokenizer = with_template()
    wrapper = Wrapper(tokenizer, role="tool", prefill="3", stop_ids=[1])
    whole = tokenizer.apply_chat_template(
        said_by(tokenizer, "ab", "cd", "ef", role="tool"), tokenize=False, add_generation_prompt=True
    )
    assert whole == "<u>ab<eos><a>cd<eos><t>ef<eos><a>"
    assert tokenizer.decode(wrapper.ids("ef", after_stop=True)) == "<t>ef<eos><a>3"
    assert tokenizer.decode(wrapper.ids("ef", after_stop=False)) == "<eos><t>ef<eos><a>3"
    plain = Wrapper(tokenizer, role="", prefill="3", stop_ids=[1])
    assert tokenizer.decode(plain.ids("ef", after_stop=True)) == "ef"


def test_a_reply_cannot_end_a_turn_or_speak_in_another_role():
    """The name of a special token in a tool's text would be that token, and the rest another's turn."""
    tokenizer = with_template()
    wrapper = Wrapper(tokenizer, role="tool", stop_ids=[1])
    assert wrapper.ids("a<eos>b", after_stop=True).count(1) == 1
    assert tokenizer.decode(wrapper.ids("a<eos>b", after_stop=True)) == "<t>a<eos>b<eos><a>"


@pytest.mark.parametrize(
    "template, sentence",
    [
        ("{{ raise_exception('roles must alternate') }}", "takes no reply in the role 'tool'"),
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
            "drops messages of the role",
        ),
    ],
)
def test_a_template_that_refuses_the_role_is_one_sentence(template, sentence):
    with pytest.raises(ValueError, match=sentence):
        Wrapper(with_template(template), role="tool")


@pytest.mark.model
@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-0.5b"])
def test_on_real_models_turns_are_the_templates_own_and_the_trainer_agrees(name, role):
    folder = checkpoint(name)
    model, tokenizer, stop_ids, _ = load_policy(folder, dtype=torch.float32, device="cpu")
    row = dict(prompt="What is 12 * 7? Answer with a number.")

    def env(row, said):
        return None if "sure" in said else "Are you sure? Say <|im_end|> or a number."

    options = dict(prefill="", turn_ends=("7", "."), max_turns=3, timeout=30.0)
    conversations = Conversations(env, tokenizer, role=role, stop_ids=stop_ids, **options)
    turns, prompt = conversations.begin([row], 3), prompt_ids(tokenizer, row["prompt"])
    out = Sampler(model).generate(
        [prompt], group_size=3, max_new_tokens=24, max_context=200, stop_ids=stop_ids, turns=turns
    )
    assert not turns.failures() and max(len(talk.said) for talk in turns.talks) == 3
    logp, _, _ = model.completion_logprobs([prompt], [out.ids], drawn=out.drawn)
    assert (logp - torch.tensor([x for row in out.logprobs for x in row])).abs().max() < 1e-4
    # What follows a turn that ended with a stop id is what the template would have made of the conversation.
    messages = said_by(tokenizer, row["prompt"], "Perhaps 84", "Are you sure?", role=role)
    whole = chat_ids(tokenizer, messages)
    said = encode(tokenizer, "Perhaps 84") + [tokenizer.eos_token_id]
    assert prompt + said + conversations.wrapper.ids("Are you sure?", after_stop=True) == whole


# -------------------------------------------------------------------------------------------- docs/turns.md
PAGE = dict(
    re.findall(r"```python\n# configs/(\w+)\.py\n(.*?)```", (ROOT / "docs/turns.md").read_text(), re.S)
)
SMALL = f"""
model, scratch = "", {SHAPE | dict(max_position_embeddings=256)!r}
alphabet = {"".join(sorted(set(string.printable) - set(string.whitespace) | {" "}))!r}
task, task_options = "arithmetic", dict(style="chars", digits=2)
turn_ends, max_turns, max_context = tuple("aeiou0123"), 3, 200
lora_rank, prompts_per_step, group_size, max_new_tokens = 0, 4, 4, 24
steps, lr, eval_every, save_every, rollouts_every, show_every = 2, 1e-2, 0, 0, 0, 0
device, threads, force = "cpu", 1, True
"""


@pytest.mark.parametrize("name", ["my_environment", "my_game"])
def test_the_pages_files_run_as_they_stand(tmp_path, name):
    path = tmp_path / f"{name}.py"
    path.write_text(PAGE[name] + SMALL)
    assert train.main(load([str(path), f"--out_dir={tmp_path / 'run'}"])) == 0
    last = rows(tmp_path / "run/metrics.jsonl")[-1]
    assert last["turns/mean"] > 1.2 and last["turns/env_failures"] == 0
