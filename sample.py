"""Talk to a checkpoint.

    python sample.py --model=out/gsm8k/ckpt/step_000100 "How many legs have two horses and three men?"
    python sample.py --model=Qwen/Qwen2.5-0.5B-Instruct --adapter=PATH --temperature=0 --samples=4 "..."
    python sample.py --model=out/gsm8k/ckpt/step_000100 --merge=FOLDER     # adapter into base

--model: a Hugging Face folder, a hub id, or the folder of an adapter, whose base is then looked
up in its adapter_config.json. An adapter that was trained with base="nf4" wants --base=nf4 here, too.
"""

import sys

import data
import lora
import model as models
import rollout
from policy import load_policy, pick_device

FLAGS = dict(
    model="", adapter="", system="", prefill="", samples=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
    max_new_tokens=256, seed=0, device="auto", dtype="auto", base="dense", merge="",
)  # fmt: skip
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")


def parse(argv: list[str]) -> tuple[dict, str]:
    """Flags and the prompt, or a ValueError with the flags there are."""
    flags, words = dict(FLAGS), []
    for word in argv:
        key, equals, text = word[2:].partition("=")
        if not word.startswith("--"):
            words.append(word)
        elif key in FLAGS and equals:
            flags[key] = type(FLAGS[key])(text)
        else:
            raise ValueError(f"{word} is not a flag of sample.py; there are --{'=, --'.join(FLAGS)}=")
    if not flags["model"] or not (words or flags["merge"]):
        raise ValueError(
            'usage: python sample.py --model=PATH_OR_HUB_ID [--adapter=PATH] [--merge=FOLDER] "prompt"'
        )
    return flags, " ".join(words)


def main(argv: list[str]):
    flags, prompt = parse(argv)
    device, dtype = pick_device(flags["device"], flags["dtype"])
    model, tokenizer, stop_ids, _ = load_policy(
        flags["model"], adapter=flags["adapter"], dtype=dtype, device=device, base=flags["base"]
    )
    if flags["merge"]:
        models.save(model, flags["merge"], lora.merged_state(model))
        tokenizer.save_pretrained(flags["merge"])
        print(f"the merged model is in {flags['merge']}")
    if not prompt:
        return
    ids = data.prompt_ids(tokenizer, prompt, system=flags["system"], prefill=flags["prefill"])
    options = {key: flags[key] for key in SAMPLING}
    out = rollout.generate(model, [ids], group_size=flags["samples"], stop_ids=stop_ids, **options)
    for i, completion in enumerate(out.ids):
        text = tokenizer.decode(completion, skip_special_tokens=True)
        cut = "" if out.stopped[i] else ", cut"
        print(f"--- {i + 1}: {len(completion)} tokens{cut}, {sum(out.logprobs[i]):.1f} nats")
        print(flags["prefill"] + text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as e:
        sys.exit(f"sample.py: {e}")
