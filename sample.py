"""Talk to a checkpoint.

    python sample.py out/gsm8k                                # a chat with the newest checkpoint of a run
    python sample.py --model=out/gsm8k/ckpt/step_000100 "How many legs have two horses and three men?"
    python sample.py --model=Qwen/Qwen2.5-0.5B-Instruct --adapter=PATH --temperature=0 --samples=4 "..."
    python sample.py --model=out/gsm8k/ckpt/step_000100 --merge=FOLDER     # adapter into base

--model (or a folder as the first word): a Hugging Face folder, a hub id, the folder of a run, whose system
prompt, prefill and base are then the defaults, or the folder of an adapter, whose base is then looked up in
its adapter_config.json (one that was trained with base="nf4" wants --base=nf4). In a chat Ctrl-C ends an
answer and Ctrl-D the chat.
"""

import progress

if __name__ == "__main__":  # the imports below take seconds, and Ctrl-C is one sentence from here on
    progress.begin("sample.py")

import json
import signal
import sys
from pathlib import Path

import config as configs
import data
import lora
import model as models
from policy import load_policy, pick_device
from rollout import Sampler

FLAGS = dict(
    model="", adapter="", system="", prefill="", samples=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
    max_new_tokens=256, seed=0, device="auto", dtype="auto", threads=0, base="", merge="",
)  # fmt: skip
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
USAGE = 'usage: python sample.py --model=FOLDER_OR_HUB_ID [--merge=FOLDER] ["prompt"]; there are --'
USAGE += "=, --".join(FLAGS) + "="


def parse(argv: list[str]) -> tuple[dict, str | None]:
    """Flags, and the prompt or None; or a ValueError with the flags there are."""
    flags, words = dict(FLAGS), []
    left = list(argv)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if key not in FLAGS:
            raise ValueError(f"{word} is not a flag of sample.py; there are --{'=, --'.join(FLAGS)}=")
        if not equals:
            if not left:
                raise ValueError(f"{word} has no value: write {word}=VALUE")
            text = left.pop(0)
        flags[key] = number(key, text)
    if not flags["model"] and words and Path(words[0]).is_dir():
        flags["model"] = words.pop(0)
    if not flags["model"]:
        raise ValueError(USAGE)
    if words and not " ".join(words).strip():
        raise ValueError("the prompt is empty: write one, or leave it out for a chat")
    return flags, " ".join(words) if words else None


def as_trained(flags: dict) -> dict:
    """The flags with the system prompt and the prefill of the run whose folder `model` is, unless given."""
    path = Path(flags["model"]) / "config.json"
    about = json.loads(path.read_text()) if path.is_file() else {}
    if "run" not in about:
        return flags
    if about["config"].get("env"):
        told = "in a chat you answer in its place"
        if not about["config"].get("env_role"):  # replies stand inside the model's message
            told = "what looks like its replies is made up by the model"
        print(f"the environment that it was trained with is not asked here: {told}")
    keys = dict(system="system_prompt", prefill="prefill", base="base")
    return flags | {flag: flags[flag] or about["config"].get(key, "") for flag, key in keys.items()}


def number(key: str, text: str):
    """A flag's value, of the type of its default and in the range of the config's key of that name."""
    try:
        value = type(FLAGS[key])(text)
    except ValueError:
        kind = type(FLAGS[key]).__name__
        raise ValueError(f"--{key}={text} is no {kind}: for example --{key}={FLAGS[key]}") from None
    interval = "[1, 1000]" if key == "samples" else configs.RANGES.get(key)
    if interval:
        configs.check_range(f"--{key}", value, interval)
    return value


class Talker:
    """A model and how it is sampled from; prints answers while they are drawn."""

    def __init__(self, flags: dict):
        self.flags = flags
        device, dtype = pick_device(flags["device"], flags["dtype"], flags["threads"])
        with progress.doing(f"loading the model {flags['model']}"):
            loaded = load_policy(
                flags["model"], adapter=flags["adapter"], dtype=dtype, device=device,
                base=flags["base"] or "dense",
            )  # fmt: skip
        self.model, self.tokenizer, self.stop_ids, _ = loaded
        self.sampler = Sampler(self.model, block=1)  # every token at once
        self.options = {key: flags[key] for key in SAMPLING}

    def prompt_ids(self, prompt) -> list[int]:
        """Ids of a prompt, text or messages."""
        return data.prompt_ids(
            self.tokenizer, prompt, system=self.flags["system"], prefill=self.flags["prefill"]
        )

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def stream(self, prompt) -> str:
        """Draws one answer and prints it as it comes, then a line about it. Returns the text.

        Ctrl-C ends the answer: what is there by then is returned.
        """
        ids, shown = [], [""]

        def show(row, token):
            """The text of a token is known when the next ones are: a character may take several."""
            ids.append(token)
            text = self.text(ids)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                print(text[len(shown[0]) :], end="", flush=True)
                shown[0] = text

        prompts = [self.prompt_ids(prompt)]
        print(self.flags["prefill"], end="", flush=True)
        try:
            out = self.sampler.generate(
                prompts, group_size=1, stop_ids=self.stop_ids, on_token=show, label="", **self.options
            )
            rest = self.text(ids)[len(shown[0]) :]  # what never became a whole character
            print(f"{rest}\n--- {about(out, 0)}")
        except KeyboardInterrupt:
            print(f"\n--- {len(ids)} tokens, stopped by Ctrl-C")
        return self.text(ids)

    def several(self, prompt):
        """Draws and prints `samples` answers."""
        out = self.sampler.generate(
            [self.prompt_ids(prompt)],
            group_size=self.flags["samples"],
            stop_ids=self.stop_ids,
            **self.options,
        )
        for i, completion in enumerate(out.ids):
            print(f"--- {i + 1}: {about(out, i)}")
            print(self.flags["prefill"] + self.text(completion))

    def chat(self):
        """Answers one line after another until Ctrl-D. Where a chat template has turns, it remembers them."""
        print("a chat: Ctrl-C ends an answer, Ctrl-D the chat")
        messages, turns = [], bool(self.tokenizer.chat_template)
        while True:
            try:
                said = input("> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if not said.strip():
                continue
            messages = (
                [*messages, dict(role="user", content=said)] if turns else [dict(role="user", content=said)]
            )
            try:
                answer = self.flags["prefill"] + self.stream(messages)
            except ValueError as e:  # too long, or characters that the tokenizer does not know
                print(f"{e}; the chat begins anew")
                messages = []
                continue
            messages.append(dict(role="assistant", content=answer))
            self.options["seed"] += 1  # else every turn would draw the same random numbers


def about(out, i: int) -> str:
    """Length, whether it was cut, and log-probability of a completion."""
    cut = "" if out.stopped[i] else ", cut"
    return f"{len(out.ids[i])} tokens{cut}, {sum(out.logprobs[i]):.1f} nats"


def main(argv: list[str]):
    if any(word in ("-h", "--help") for word in argv):
        print(__doc__ + "\n" + USAGE)
        return
    flags, prompt = parse(argv)
    flags = as_trained(flags)
    talker = Talker(flags)
    if flags["merge"]:
        models.save(talker.model, flags["merge"], lora.merged_state(talker.model))
        talker.tokenizer.save_pretrained(flags["merge"])
        print(f"the merged model is in {flags['merge']}")
        if prompt is None:
            return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on it ends an answer
    if prompt is None:
        talker.chat()
    elif flags["samples"] == 1:
        talker.stream(prompt)
    else:
        talker.several(prompt)


if __name__ == "__main__":
    progress.imported()
    try:
        main(sys.argv[1:])
    except (ValueError, FloatingPointError, OSError, ImportError) as e:
        sys.exit(f"sample.py: {e}")
    except KeyboardInterrupt:
        sys.exit("\nsample.py: stopped")
