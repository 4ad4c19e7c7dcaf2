"""A policy is a model with its tokenizer and its stop ids: from a folder, from the hub or
from random weights, and back.

    model, tokenizer, stop_ids, base = load_policy("out/gsm8k/ckpt/step_000100")
    save_policy(model, tokenizer, stop_ids, "somewhere", base=base)

Every script gets its model here.
"""

import json
import os

import torch

import checkpoint
import data
import lora
import model as models


def load_policy(path, *, adapter="", scratch=None, alphabet="", seed=0, dtype=torch.float32, device="cpu",
                base="dense"):  # fmt: skip
    """(model, tokenizer, stop ids, path of the base) of a checkpoint folder or hub id.

    scratch: sizes (keys of a config.json) of a model of random weights instead, whose tokenizer knows
    `alphabet`. An adapter (its own folder, or `path` itself being one) is put on with LoRA. base: "nf4" holds
    the projections in 4 bits (nf4.py). Raises ValueError as model.load and lora.load_adapter do.
    """
    if scratch is not None:
        tokenizer = data.char_tokenizer(alphabet)
        special = dict(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
        )
        config = dict(model_type="llama", architectures=["LlamaForCausalLM"], **special)
        config |= dict(vocab_size=len(tokenizer), **scratch)
        model = models.create(config, seed=seed, dtype=dtype, device=device, base=base)
        return model, tokenizer, [tokenizer.eos_token_id], ""

    from transformers import AutoTokenizer  # here, because importing transformers takes seconds

    folder, its_adapter, path = find_model(path)
    adapter = adapter or its_adapter
    model = models.load(folder, dtype=dtype, device=device, base=base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if adapter:
        lora.load_adapter(model, adapter)
    return model, tokenizer, data.stop_ids(tokenizer, folder), path


def find_model(path: str) -> tuple[str, str, str]:
    """(checkpoint folder, adapter folder or "", path of the base) of a model's or adapter's folder or hub id.

    A run's folder, out/NAME, is its newest whole checkpoint. Downloads what is not there. Raises ValueError
    where there is no such model.
    """
    adapter, path = "", newest_of_run(path)
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        adapter, path = path, lora.read_config(path)["base_model_name_or_path"]
    return models.find_checkpoint(path), adapter, path


def newest_of_run(path: str) -> str:
    """The newest whole checkpoint where `path` is the folder of a run, else `path` itself."""
    if not os.path.isdir(os.path.join(path, "ckpt")):
        return path
    found = checkpoint.newest(path)
    if found is None:
        raise ValueError(f"{path} is a run without a whole checkpoint: give the folder of a model")
    return str(found)


def load_teacher(name: str, model, tokenizer, *, dtype, device, base="dense"):
    """The frozen model of a folder, run or hub id, whose word i is word i of `model`.

    It may know more tokens than the model, and its head may be padded further (Qwen2.5 has 151,936 rows at 3B
    and 152,064 at 7B): rows beyond the model's are cut off. ValueError where it knows a token of the model by
    another id or not at all, or has fewer rows.
    """
    from transformers import AutoTokenizer

    folder, _, _ = find_model(name)
    refuse_vocabulary(name, AutoTokenizer.from_pretrained(folder).get_vocab(), tokenizer.get_vocab())
    teacher, *_ = load_policy(name, dtype=dtype, device=device, base=base)
    rows, its_rows = model.shape.V, teacher.shape.V
    if its_rows < rows:
        raise ValueError(
            f"reference = {name!r} has {its_rows} rows in its embedding, and the model may draw {rows} ids: "
            "take a teacher with at least as many"
        )
    if its_rows > rows:
        teacher.cut_vocabulary(rows)
    return teacher.requires_grad_(False)


def refuse_vocabulary(name: str, its_ids: dict, ids: dict):
    """ValueError where a teacher would read another token than the model wrote. ids: token -> id of each."""
    for token, i in sorted(ids.items(), key=lambda pair: pair[1]):
        if its_ids.get(token) != i:
            there = f"has id {its_ids[token]}" if token in its_ids else "is unknown"
            raise ValueError(
                f"reference = {name!r} has another vocabulary: {token!r}, which is id {i} here, {there} "
                "there, and both models must read the same ids: take a teacher of the same family"
            )


def save_policy(model, tokenizer, stop_ids, folder, *, base):
    """Writes a checkpoint that transformers, vLLM or PEFT loads as it stands.

    That is the adapter where the model has one (which names `base` as what it sits on), else the whole model.
    """
    if lora.layers(model):
        lora.save_adapter(model, folder, base=base)
    else:
        models.save(model, folder)
        with open(os.path.join(folder, "generation_config.json"), "w") as f:
            json.dump({"eos_token_id": stop_ids}, f)
    tokenizer.save_pretrained(folder)


def pick_device(device: str, dtype: str, threads: int = 0) -> tuple[str, torch.dtype]:
    """("cuda", "cpu" or "mps", dtype) for a config's "auto"; sets torch's CPU threads (0: one a core).

    "auto" is fp32 on a CPU, most of which have no bf16 and emulate it 50 times slower, and bf16 on a GPU, or
    fp16 with a scaled loss on one that has no bf16 (V100, T4).
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun, on this machine
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // processes))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device = {device!r}, but torch sees no GPU here: use --device=cpu")
    if device == "mps":  # every kernel takes its torch form there
        print("device = 'mps' is untested: look at the first steps, and compare with --device=cpu")
    if dtype == "auto":
        dtype = "float32"
        if device.startswith("cuda"):
            dtype = "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
            if dtype == "float16":
                print("this GPU has no bfloat16: float16, with a scaled loss (--dtype=float32 is slower)")
    return device, getattr(torch, dtype)
