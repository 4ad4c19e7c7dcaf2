"""Talk to a checkpoint.

    python sample.py --model=out/gsm8k/ckpt/step_000100 "How many legs have two horses and three men?"
    python sample.py --model=Qwen/Qwen2.5-0.5B-Instruct --adapter=PATH --temperature=0 --samples=4 "..."

--model: a Hugging Face folder, a hub id, or the folder of an adapter, whose base is then looked up in its adapter_config.json.
`load_policy` below is what every script uses to get a model, its tokenizer and its stop ids.
"""
import json
import os
import sys

import torch

import data
import lora
import model as models
import rollout


def load_policy(path, *, adapter="", scratch=None, alphabet="", seed=0, dtype=torch.float32, device="cpu"):
    """(model, tokenizer, stop ids, path of the base) of a checkpoint folder or hub id, or of random weights where `scratch` gives sizes.

    An adapter (its own folder, or `path` itself being one) is put on with LoRA. Raises ValueError as model.load and lora.load_adapter do.
    """
    if scratch is not None:
        tokenizer = data.char_tokenizer(alphabet)
        config = dict(model_type="llama", architectures=["LlamaForCausalLM"], eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                      bos_token_id=None, vocab_size=len(tokenizer), **scratch)
        return models.create(config, seed=seed, dtype=dtype, device=device), tokenizer, [tokenizer.eos_token_id], ""
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        adapter, path = adapter or path, lora.read_config(path)["base_model_name_or_path"]
    from transformers import AutoTokenizer  # here, because importing transformers takes seconds

    folder = models.find_checkpoint(path)
    model = models.load(folder, dtype=dtype, device=device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if adapter:
        lora.load_adapter(model, adapter)
    return model, tokenizer, data.stop_ids(tokenizer, folder), path


def save_policy(model, tokenizer, stop_ids, folder, *, base):
    """Writes a checkpoint that transformers, vLLM or PEFT loads as it stands: the adapter where the model has one, else the whole model."""
    if lora.layers(model):
        lora.save_adapter(model, folder, base=base)
    else:
        models.save(model, folder)
        with open(os.path.join(folder, "generation_config.json"), "w") as f:
            json.dump({"eos_token_id": stop_ids}, f)
    tokenizer.save_pretrained(folder)


def pick_device(device: str, dtype: str, threads: int = 0) -> tuple[str, torch.dtype]:
    """("cuda" or "cpu", dtype) for a config's "auto": bf16 on a GPU; fp32 on a CPU, most of which have no bf16 and emulate it 50x slower."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device = {device!r}, but torch sees no GPU here: use --device=cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return device, getattr(torch, dtype)


FLAGS = dict(model="", adapter="", system="", prefill="", samples=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=256, seed=0, device="auto", dtype="auto", merge="")


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
    if not flags["model"] or not words and not flags["merge"]:
        raise ValueError('usage: python sample.py --model=PATH_OR_HUB_ID [--adapter=PATH] [--merge=FOLDER] "prompt"')
    return flags, " ".join(words)


def main(argv: list[str]):
    flags, prompt = parse(argv)
    device, dtype = pick_device(flags["device"], flags["dtype"])
    model, tokenizer, stop_ids, _ = load_policy(flags["model"], adapter=flags["adapter"], dtype=dtype, device=device)
    if flags["merge"]:
        models.save(model, flags["merge"], lora.merged_state(model))
        tokenizer.save_pretrained(flags["merge"])
        print(f"the merged model is in {flags['merge']}")
    if not prompt:
        return
    ids = data.prompt_ids(tokenizer, prompt, system=flags["system"], prefill=flags["prefill"])
    options = {key: flags[key] for key in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")}
    out = rollout.generate(model, [ids], group_size=flags["samples"], stop_ids=stop_ids, **options)
    for i, (completion, stopped) in enumerate(zip(out.ids, out.stopped)):
        text = tokenizer.decode(completion, skip_special_tokens=True)
        print(f"--- {i + 1}: {len(completion)} tokens{'' if stopped else ', cut'}, {sum(out.logprobs[i]):.1f} nats\n{flags['prefill']}{text}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as e:
        sys.exit(f"sample.py: {e}")
