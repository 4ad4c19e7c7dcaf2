"""Supervised warm-up on a task's demonstrations, alone: what train.py does before its first step (warmup.py).

    python sft.py configs/arithmetic.py

Writes the warmed-up model to out/NAME_sft, a folder of its own, since out/NAME is a run's; or to --out_dir. A
folder that is used already is moved aside.
"""

import progress

if __name__ == "__main__":  # the imports below take seconds, and Ctrl-C is one sentence from here on
    progress.begin("sft.py")

import os
import sys
from pathlib import Path

import torch

import checks
import config as configs
import data
import rundir
import turns
from policy import load_policy, pick_device, save_policy
from warmup import warm_up


def main(cfg, folder=None):
    """folder: where the model goes; None: beside cfg.out_dir."""
    folder = folder or cfg.out_dir + "_sft"
    if not cfg.sft_steps:
        raise ValueError("the config has sft_steps = 0: there is no warm-up to do; give --sft_steps=N")
    device, dtype = pick_device(cfg.device, cfg.dtype, cfg.threads)
    if dtype != torch.float32:
        print("the warm-up trains all weights; they are kept in fp32 inside the optimiser")
    with progress.doing(f"loading the model {configs.model_name(cfg)}"):
        model, tokenizer, stop_ids, base = load_policy(
            cfg.model, scratch=cfg.scratch, alphabet=cfg.alphabet, seed=cfg.seed, dtype=dtype, device=device
        )
    task = data.load_task(cfg.task, **configs.task_options(cfg))
    options = configs.warm_up_options(cfg)
    if cfg.env:
        options |= turns.of_demonstrations(tokenizer, stop_ids, configs.turn_options(cfg))
    warm_up(model, tokenizer, task, stop_id=stop_ids[0], **options)
    if os.path.exists(os.path.join(folder, "config.json")):
        print(f"{folder} held an earlier model, which is now {rundir.move_aside(Path(folder))}")
    save_policy(model, tokenizer, stop_ids, folder, base=base)
    print(f"saved {folder}")


if __name__ == "__main__":
    try:
        config = checks.config_of("sft.py", sys.argv[1:])
        asked = any(word.startswith("--out_dir") for word in sys.argv[1:])
        with progress.doing("preparing the warm-up", drawn=False):
            main(config, config.out_dir if asked else None)
    except (ValueError, FloatingPointError, OSError, ImportError) as e:
        sys.exit(f"sft.py: {e}")
