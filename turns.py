"""Turns: an environment answers what the model says, and its answer goes on in the same row, token for token.

    env = "guess"                                   # in a config: a name, a function or a class
    def env(row, said): return "text" or None       # None: the row is over

A *turn* is a run of ids that the model draws. It ends with a stop id, or where its text holds one of
`turn_ends` (the close of a tool call). Then the row's environment is asked, and its *reply* is made into ids
once, by itself: these are *given* to the model, which attends to them and goes on. What was drawn is never
text that comes back, so the ids that are trained on are those that were sampled.

Environments run in threads beside the sampler. What they do wrong is a state of their row and not an error of
the run: a row whose environment raises, hangs or replies with what cannot be given ends there, is counted,
and the first of them is said.

Dims: B prompts, G rows a prompt, N = B * G rows. Row n is sample n % G of prompt n // G.
"""

import asyncio
import copy
import functools
import importlib
import inspect
import math
import queue
import threading
import time
from dataclasses import dataclass, field

import data
from data import short
from rewards import is_async, outcome, place

# Names for the key `env` -> the module that holds the environment, as `env`.
ENVS = {"guess": "tasks.guess", "calculator": "tasks.calculator", "python_tool": "tasks.python_tool"}

# Calls of environments that run at once; an async environment's calls all do.
THREADS = 32
# No tokenizer has tokens that are all longer than this: a reply with more characters a token that is left is
# refused without being encoded.
CHARACTERS_A_TOKEN = 64


def resolve(env):
    """The environment of the key `env`: a name in ENVS, or a function or class as it is; None for ""."""
    if not env or not isinstance(env, str):
        return env or None
    if env not in ENVS:
        raise ValueError(f"unknown environment {env!r}{data.nearest(env, ENVS)}")
    return importlib.import_module(ENVS[env]).env


# ----------------------------------------------------------------------------------------- from text to ids
class Wrapper:
    """Makes a reply into ids: wrapped by the chat template's own turn markers, or as it is.

    role: of the reply's message, "user" or "tool"; "", or a tokenizer without a chat template: as it is.
    prefill: begins the model's next turn, where there are markers. ValueError for a role that the template
    refuses.
    """

    def __init__(self, tokenizer, *, role: str, prefill: str = "", stop_ids=()):
        self.tokenizer, self.stop_ids = tokenizer, set(stop_ids)
        # Ids up to the last special token before the reply, and from the first one after it. What stands
        # between these and the reply is encoded with it, because there tokens may span both.
        self.before, self.head, self.tail, self.after = [], "", "", []
        if role and tokenizer.chat_template:
            before, after = turn_markers(tokenizer, role)
            special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
            end = max([before.rfind(name) + len(name) for name in special if name in before], default=0)
            start = min([after.find(name) for name in special if name in after], default=len(after))
            self.before, self.head = data.encode(tokenizer, before[:end]), before[end:]
            self.tail, self.after = after[:start], data.encode(tokenizer, after[start:] + prefill)

    def ids(self, text: str, *, after_stop: bool) -> list[int]:
        """Ids of a reply. after_stop: the turn before it ended with a stop id, which is not repeated.

        The names of special tokens in it are only text: no tool can end a turn or speak in another role.
        """
        before = self.before
        if after_stop and before and before[0] in self.stop_ids:
            before = before[1:]
        text = self.head + text + self.tail
        return before + data.encode(self.tokenizer, text, split_special_tokens=True) + self.after


def of_demonstrations(tokenizer, stop_ids, options: dict) -> dict:
    """warmup.warm_up's keywords for conversations. options: Conversations's."""
    wrapper = Wrapper(tokenizer, role=options["role"], prefill=options["prefill"], stop_ids=stop_ids)
    return dict(wrapper=wrapper, turn_ends=options["turn_ends"])


def turn_markers(tokenizer, role: str) -> tuple[str, str]:
    """What the chat template puts between what the model says and a reply of this role, and after that."""
    said, reply = "[[said]]", "[[reply]]"
    messages = [dict(role="user", content="x"), dict(role="assistant", content=said)]
    messages.append(dict(role=role, content=reply))
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja2 has many kinds
        raise ValueError(
            f"the tokenizer's chat template takes no reply in the role {role!r} ({error}): "
            "set env_role to 'user', or to '' for replies as they are"
        ) from error
    between, found, after = text.partition(said)[2].partition(reply)
    if not found:
        raise ValueError(f"the tokenizer's chat template drops messages of the role {role!r}: set env_role")
    return between, after


def closing_ids(tokenizer, turn_ends) -> set[int] | None:
    """Ids whose text holds the last character of one of turn_ends: no other completes it. None: any may."""
    if not all(text.isascii() for text in turn_ends):
        return None  # a character of several bytes may be spread over several tokens
    last = {text[-1] for text in turn_ends}
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))] if last else [])
    return {i for i, text in enumerate(texts) if last & set(text)}


# ---------------------------------------------------------------------------------------------- environments
@dataclass
class Reply:
    """What follows a turn of row `row`."""

    row: int
    ids: list[int] | None  # given to the model; None: the row is over
    stopped: bool = False  # over because the environment has nothing to say, and not cut


@dataclass
class Talk:
    """One row's conversation."""

    env: object = None  # an object of the environment's class, made at the end of the first turn
    said: list[list[int]] = field(default_factory=list)  # the ids of each turn
    messages: list[dict] = field(default_factory=list)  # role and content, the model's and the environment's
    reward: float | None = None  # the environment's own
    failed: str = ""  # what went wrong with the environment
    last: bool = False  # the model has had as many whole turns as it may


class Conversations:
    """What is the same for all conversations of a run; `begin` starts those of one call of the sampler.

    env: a function (row, said) -> text or None; or a class with __init__(row), step(said) -> text or None and
    perhaps reward() -> float; async or not. role, prefill: see Wrapper. turn_ends: texts that end a turn.
    max_turns: of the model in a row. timeout: seconds for a call of the environment.
    """

    def __init__(self, env, tokenizer, *, role, prefill, stop_ids, turn_ends, max_turns, timeout):
        self.env, self.tokenizer = env, tokenizer
        self.role, self.stop_ids, self.turn_ends = role or "environment", set(stop_ids), tuple(turn_ends)
        self.max_turns, self.timeout, self.prefill = max_turns, timeout, prefill
        self.wrapper = Wrapper(tokenizer, role=role, prefill=prefill, stop_ids=stop_ids)
        self.closing = closing_ids(tokenizer, self.turn_ends)
        self.has_reward = inspect.isclass(env) and hasattr(env, "reward")
        self.is_async = is_async(env) or (inspect.isclass(env) and is_async(env.step))

    def begin(self, rows: list[dict], group_size: int) -> "Turns":
        return Turns(self, rows, group_size)


class Turns:
    """The conversations of N = len(rows) * group_size rows, for one call of the sampler."""

    def __init__(self, of: Conversations, rows: list[dict], group_size: int):
        self.of, self.rows, self.G = of, rows, group_size
        self.talks = [Talk() for _ in range(len(rows) * group_size)]
        self.asked: dict[int, tuple] = {}  # row -> (ticket, room, cut) of the call that is under way
        self.tickets = 0
        self.workers = Workers(len(self.talks) if of.is_async else THREADS)

    # -------------------------------------------------------------------------------------- for the sampler
    def ends(self, said: list[int]) -> bool:
        """Whether the text of a turn's ids holds one of turn_ends. Asked after each id."""
        closing = self.of.closing
        if not self.of.turn_ends or (closing is not None and said[-1] not in closing):
            return False
        text = self.text(said)
        return any(end in text for end in self.of.turn_ends)

    def ask(self, row: int, said: list[int], *, room: int, cut: bool = False):
        """A turn of these ids has ended, and the environment is asked what follows: `replies` will tell.

        room: ids that may be given; below 0 nothing may follow. cut: the turn was not ended but cut off, so
        the environment only says what the row is worth.
        """
        talk = self.talks[row]
        talk.said.append(said)
        text = self.text(said)
        begins = len(talk.said) == 1 or self.of.wrapper.after  # where the prefill has been given
        talk.messages.append(dict(role="assistant", content=self.of.prefill * bool(begins) + text))
        talk.last = len(talk.said) == self.of.max_turns and not cut
        self.call(row, -1 if talk.last or cut else room, cut=cut)

    def replies(self, *, wait: bool, every: bool) -> list[Reply]:
        """What has been replied since the last call, by row. wait: one at least; every: to all that ask."""
        found = []
        while self.asked and (every or (wait and not found)):
            found += self.collect(seconds=0.05)
        found += self.collect(seconds=0)
        return sorted(found, key=lambda reply: reply.row)

    def ready(self) -> int:
        """How many calls of environments have come back and are not collected yet."""
        return self.workers.results.qsize()

    def end(self):
        """The sampler is done: threads that are not stuck end."""
        self.workers.end()

    # -------------------------------------------------------------------------------------- for the rewards
    def heard(self, rows: range) -> dict:
        """What rewards are told of these rows, which must have ended: see rewards.score_completions."""
        talks = [self.talks[row] for row in rows]
        return dict(
            completions=[talk.messages[-1]["content"] for talk in talks],
            completion_ids=[[i for said in talk.said for i in said] for talk in talks],
            turns=[talk.messages for talk in talks],
            env_reward=[talk.reward for talk in talks],
        )

    def for_people(self, out, max_new_tokens: int) -> list[dict]:
        """What rollouts/ show of each row. out: the call's rollout.Rollout.

        finish_reason: "stop" of a row that came to its own end; else what ended it, "environment" (it
        failed), "turns" (max_turns), "length" (max_new_tokens) or "context" (max_context).
        """
        shown = []
        for talk, stopped, drawn in zip(self.talks, out.stopped, out.logprobs):
            columns = dict(turns=talk.messages)
            columns |= dict(env_reward=talk.reward) if self.of.has_reward else {}
            columns |= dict(env_failure=talk.failed) if talk.failed else {}
            reason = "length" if len(drawn) == max_new_tokens else "context"
            reason = "turns" if talk.last else reason
            reason = "environment" if talk.failed else reason
            shown.append(columns | dict(finish_reason="stop" if stopped else reason))
        return shown

    def failures(self) -> list[str]:
        return [talk.failed for talk in self.talks if talk.failed]

    # -------------------------------------------------------------------------------------------- one call
    def text(self, ids: list[int]) -> str:
        return self.of.tokenizer.decode(ids, skip_special_tokens=True)

    def call(self, row: int, room: int, cut: bool):
        self.tickets += 1
        self.asked[row] = (self.tickets, room, cut)
        turn = functools.partial(self.take_turn, row, last=room < 0, cut=cut)
        self.workers.submit((row, self.tickets), turn)

    def take_turn(self, row: int, *, last: bool, cut: bool):
        """(reply or None, reward or None) of the row's environment. Runs in a thread of its own.

        last: the reply will not be given; cut: the environment is not asked for one.
        """
        talk, env, seconds = self.talks[row], self.of.env, self.of.timeout
        said, text, reward = self.text(talk.said[-1]), None, None
        if inspect.isclass(env) and talk.env is None:
            talk.env = env(copy.deepcopy(self.rows[row // self.G]))
        if not cut and inspect.isclass(env):
            text = settled(talk.env.step(said), seconds)
        elif not cut:
            text = settled(env(copy.deepcopy(self.rows[row // self.G]), said), seconds)
        if self.of.has_reward and (last or text is None):
            reward = settled(talk.env.reward(), seconds)
        return text, reward

    def collect(self, seconds: float) -> list[Reply]:
        """Replies that are there, or come within so many seconds; a call that takes too long is one."""
        found = []
        for (row, ticket), result in self.workers.finished(seconds, self.of.timeout):
            if row not in self.asked or self.asked[row][0] != ticket:
                continue  # it was given up
            _, room, cut = self.asked.pop(row)
            reply = self.reply_of(row, room, cut, result)
            if reply is not None:
                found.append(reply)
        return found

    def reply_of(self, row: int, room: int, cut: bool, result) -> Reply | None:
        """What follows from the result of a call; None where one more call will tell."""
        talk = self.talks[row]
        if isinstance(result, BaseException):
            return self.fail(
                row, f"raised {type(result).__name__}: {short(result)}{place(self.of.env, result)}"
            )
        text, reward = result
        if reward is not None:
            talk.reward = number(reward)
            if not math.isfinite(talk.reward):
                talk.reward = None
                return self.fail(row, f"gave the reward {short(reward)}, which is no finite number")
        if text is None:
            return Reply(row, None, stopped=not cut)
        if room < 0:
            return Reply(row, None)
        if not isinstance(text, str):
            return self.fail(row, f"replied {short(text)}, which is no text")
        try:
            ids = self.encoded(text, room, after_stop=talk.said[-1][-1] in self.of.stop_ids)
        except ValueError as error:
            # The environment is well, so the row is still worth what it says; but it can't go on.
            self.fail(row, str(error))
            self.call(row, -1, cut=True)
            return None
        talk.messages.append(dict(role=self.of.role, content=text))
        return Reply(row, ids)

    def encoded(self, text: str, room: int, after_stop: bool) -> list[int]:
        """Ids of a reply. ValueError where it is more than `room`, or not encodable."""
        if len(text) > CHARACTERS_A_TOKEN * (room + 1):
            raise ValueError(f"replied {len(text):,} characters where {room} tokens are left (max_context)")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"replied {short(text)}, with half a surrogate pair, which is no character")
        ids = self.of.wrapper.ids(text, after_stop=after_stop)
        if len(ids) > room:
            raise ValueError(f"replied {len(ids)} tokens where {room} are left (max_context)")
        return ids

    def fail(self, row: int, what: str) -> Reply:
        """The environment of this row has failed: the row is over, and its environment gives no reward."""
        where = f"the environment of prompt {row // self.G}, sample {row % self.G} {what}"
        self.talks[row].failed = f"{where}; the row ends there"
        return Reply(row, None)


def settled(value, seconds: float):
    """A value, or what a coroutine returns. All coroutines run in one event loop."""
    if not inspect.isawaitable(value):
        return value
    try:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(value, seconds), event_loop()).result()
    except TimeoutError:
        raise TimeoutError(too_late(seconds)) from None


def too_late(seconds: float) -> str:
    return f"no reply in {seconds:g} seconds (env_timeout)"


@functools.cache
def event_loop():
    """The event loop of async environments, in a thread of its own: what they keep open serves all calls."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def number(x) -> float:
    """x as a float, NaN where it is none."""
    try:
        return math.nan if isinstance(x, (str, bytes)) else float(x)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


class Workers:
    """Daemon threads that make calls, at most `most` at once. One that is stuck is given up and replaced."""

    def __init__(self, most: int):
        self.most, self.threads = most, 0
        self.jobs, self.results = queue.SimpleQueue(), queue.SimpleQueue()
        self.open = 0  # calls that are neither finished nor given up
        self.started: dict = {}  # key -> when its call began

    def submit(self, key, call):
        """Has call() made in a thread, soon: `finished` gives its key and what came of it."""
        self.open += 1
        self.jobs.put((key, call))
        self.hire()

    def hire(self):
        """Starts threads, as many as there are calls for."""
        while self.threads < min(self.open, self.most):
            self.threads += 1
            threading.Thread(target=self.work, daemon=True).start()

    def work(self):
        for key, call in iter(self.jobs.get, None):
            self.started[key] = time.monotonic()
            self.results.put((key, outcome(call)))

    def finished(self, seconds: float, timeout: float) -> list:
        """(key, what its call returned or raised) of calls that are done, waiting so long for the first.

        A call that has run for `timeout` seconds counts as one that raised TimeoutError.
        """
        found = []
        while True:
            try:
                found.append(self.results.get(timeout=0 if found else seconds))
            except queue.Empty:
                break
        for key, _ in found:
            if self.started.pop(key, None) is not None:  # else it was given up before
                self.open -= 1
        late = [key for key, start in list(self.started.items()) if time.monotonic() - start > timeout]
        for key in late:
            del self.started[key]
            self.open -= 1
            self.threads -= 1
            found.append((key, TimeoutError(too_late(timeout))))
        self.hire()
        return found

    def end(self):
        for _ in range(self.threads):
            self.jobs.put(None)
