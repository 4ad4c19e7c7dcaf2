"""A Run of train.py without files: a made model, prompts of random ids, made-up rewards.

What the benches time is then train.py's own `train_step` and `update`, and nothing that imitates them.

    run = MadeRun(make_config(V=49_152, P=64, lora_rank=16), model=partial(random_model, sizes))
    train.train_step(run, 1)                     # a whole step
    update = ready_update(run)                   # the update alone, on a batch of random completions
    update()

Dims: B prompts a step, G completions of each, P prompt and C completion length, V vocabulary.
"""

import math
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import loss  # noqa: E402
import lora  # noqa: E402
import train  # noqa: E402
from batch import Batch  # noqa: E402
from config import Config, check_values  # noqa: E402
from model import ATTENTION, MLP, Transformer  # noqa: E402
from rollout import Rollout  # noqa: E402
from run import Run  # noqa: E402

TARGETS = ATTENTION + MLP  # every projection, as TRL's "all-linear"


class Ids:
    """A tokenizer whose text is the ids: "12 7 3". So a prompt has as many tokens as was asked for."""

    chat_template, eos_token, eos_token_id = None, "", None

    def encode(self, text, add_special_tokens=False):
        return [int(word) for word in text.split()]

    def batch_decode(self, rows, skip_special_tokens=False):
        return [" ".join(map(str, ids)) for ids in rows]


def made_up(completions, **_):
    """A reward that differs within a group, so that every row has an advantage."""
    return [math.sin(n) for n in range(len(completions))]


def random_ids(V: int, *lengths: int, seed: int = 0) -> list[list[int]]:
    """A list of ids below V for each length; 0 is left out."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, V, (n,), generator=g).tolist() for n in lengths]


def random_prompts(V: int, P: int):
    """A task of endless prompts of P random ids."""

    def row(seed, i):
        (ids,) = random_ids(V, P, seed=seed * 1_000_003 + i)
        return dict(prompt=" ".join(map(str, ids)))

    def task(*, data_dir, eval_problems):
        return row, []

    return task


def make_config(*, V: int, P: int, **keys) -> Config:
    """A config of random prompts of P ids that writes and shows nothing. keys: any of config.py."""
    silent = dict(eval_every=0, save_every=0, rollouts_every=0, show_every=0, force=True)
    keys = silent | dict(task=random_prompts(V, P), rewards=[(made_up, 1.0)]) | keys
    return check_values(Config(**keys))


class MadeRun(Run):
    """A Run whose model is made by a function (dtype, device) -> Transformer; rows never stop early."""

    def __init__(self, cfg, model):
        self.make_model = model
        self.folder = tempfile.TemporaryDirectory()  # gone with the run
        super().__init__(replace(cfg, out_dir=self.folder.name))

    def look_for_model(self):
        """It is made."""

    def load_models(self):
        self.model = self.make_model(dtype=self.dtype, device=self.device)
        self.tokenizer, self.stop_ids, self.base = Ids(), [], ""
        self.reference, self.start_adapter = None, None
        if self.cfg.lora_rank:
            self.load_adapter()
            randomise_adapter(self.model)
        elif self.cfg.beta:
            self.load_reference()


def random_model(sizes: dict, *, dtype, device):
    """A model of random weights with the sizes of a config.json.

    It is made where it will be: model.create draws on the CPU, which takes minutes for 7B.
    """
    with torch.device("meta"):
        model = Transformer(sizes)
    model.to(dtype).to_empty(device=device)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.02)
        else:
            p.data.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    return model.eval()


def add_adapter(model, rank: int):
    """Puts a random adapter on every projection. Returns the model."""
    lora.apply(model, rank=rank, alpha=2 * rank, targets=TARGETS)
    return randomise_adapter(model)


def randomise_adapter(model):
    """B starts at zero, which would leave A without a gradient. Returns the model."""
    for layer in lora.layers(model).values():
        for B in layer.B:
            B.data.normal_(0, 0.01)
    return model


def random_batch(run, step) -> Batch:
    """A batch as if sampled: random completions of the full length, near-uniform log-probabilities."""
    cfg, V = run.cfg, run.model.shape.V
    B, G, C = cfg.prompts_per_step, cfg.group_size, cfg.max_new_tokens
    N = B * G
    prompts = [run.tokenizer.encode(row["prompt"]) for row in step.rows]
    ids = random_ids(V, *[C] * N)
    logprobs = [[-math.log(V)] * C for _ in range(N)]  # what random weights give a word, nearly
    out = Rollout(ids, logprobs, stopped=[True] * N, entropies=[[] for _ in range(N)])
    reward = np.array(made_up(ids))
    adv = loss.advantages(torch.from_numpy(reward).view(B, G)).view(-1)
    return Batch(step.rows, prompts, out, [""] * N, reward[:, None], reward, adv=adv)


def ready_update(run):
    """train.update of a random batch, as a function without arguments."""
    step = train.begin_step(run, 1)
    batch = random_batch(run, step)
    train.choose_tokens(run, step, batch, updates=1)
    # not the first: random log-probabilities must not be compared with the trainer's
    return partial(train.update, run, step, batch, range(len(batch.prompts)), first=False)
