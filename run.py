"""What stays the same over a run: model, tokenizer, task, rewards, optimiser, and the reference of the KL
term.

train.py makes one Run and takes steps with it. Two things here are easily got wrong elsewhere. The
reference is the function that training started from, in all four cases: none (beta 0), the model with its
adapters off, the model with the adapter it started from, a frozen copy; or it is a teacher, another model.
And a run that is resumed rebuilds each of them from what the start left on the disk, not from what training
has made of it; a teacher is read again from where it is, and must be the same.
"""

import contextlib
import copy
import dataclasses
import shutil
import time
from functools import partial
from pathlib import Path

import torch

import checkpoint
import checks
import config as configs
import data
import kernels
import lora
import loss
import nf4
import optim
import progress
import ranks
import rewards as rewarding
import rundir
import shard
import turns
import warmup
from fingerprint import hash_of_weights
from memory import Peaks, held_by_python, may_merge
from policy import find_model, load_policy, load_teacher, newest_of_run, pick_device, save_policy
from rollout import Sampler


class Run:
    """What stays the same over a run, and `state`: all that changes beside weights and optimiser."""

    def __init__(self, cfg):
        self.cfg, self.out = cfg, Path(cfg.out_dir)
        device, self.dtype = pick_device(cfg.device, cfg.dtype, cfg.threads)
        self.kernels = kernels.use(cfg.kernels)
        with progress.doing("waiting for the other processes"):
            self.device = ranks.start(device)
        self.peaks = Peaks(self.device)
        self.before = 0 if self.device.startswith("cuda") else held_by_python()
        refuse_uneven_ranks(cfg)
        self.rewards = rewarding.resolve(cfg.rewards)
        env = turns.resolve(cfg.env)  # before minutes of loading
        rewarding.check_sandbox(self.rewards, cfg.sandbox, env)
        with progress.doing(f"reading the task {configs.task_name(cfg)}"):
            self.task = data.load_task(cfg.task, **configs.task_options(cfg))
        checks.columns(cfg, self.rewards, self.task)
        self.advantages = advantage_function(cfg)
        self.objective = configs.objective_options(cfg)

        # One home for all that lasts from step to step: saved and restored as it stands, and replaced at one
        # point, when a step is complete (train.py). `advantage` is whatever an advantage function keeps.
        self.state = dict(step=0, num_tokens=0, advantage={})
        self.whole = True  # whether the weights are those of state["step"], and not in the middle of a step
        self.checked_memory = False  # whether the plan has been compared with what was held
        self.checked = False  # whether sampler and trainer have been compared
        self.keys = rundir.plain(dataclasses.asdict(cfg))
        self.identity = {key: self.keys[key] for key in rundir.IDENTITY}
        self.teacher = None  # [dtype, hash] of a teacher's weights; at first as the resumed checkpoint has it
        with ranks.together():  # before minutes of loading: is there a checkpoint, and is it this run's?
            self.id, self.resumed, moments, changed = self.find_checkpoint()
            if not cfg.resume:
                with progress.doing(f"looking for the model {configs.model_name(cfg)}"):
                    self.look_for_model()
        self.claim_folder(changed)
        with ranks.together(), progress.doing("loading the model"):
            self.load_models()
        for model in (self.model, self.reference):
            if model is not None:
                self.share(model)
        self.copies = {}  # of a model that is spread: its hollow copy
        if self.spreads:
            self.spread_models()
        self.samples = self.copies.get(self.model, self.model)  # what draws, see `whole_weights`
        self.model.checkpointing = cfg.checkpointing
        if cfg.checkpointing == "auto":
            self.model.checkpointing = "light" if self.model.device.type == "cuda" else "none"
        self.merges = merges_adapters(cfg, self.model)
        self.weights_changed()
        self.micro_tokens = cfg.micro_tokens  # 0: chosen by memory before the first update
        self.sampler = Sampler(self.samples, slots=cfg.slots, cuda_graphs=cfg.cuda_graphs)
        self.conversations = None
        if env is not None:
            options = configs.turn_options(cfg)
            self.conversations = turns.Conversations(env, self.tokenizer, stop_ids=self.stop_ids, **options)
        self.optimizer = self.make_optimizer()
        if moments is not None:
            self.optimizer.load_state(moments)
        self.peaks.of["load"] = self.peaks.note()
        with ranks.together():
            if ranks.rank() == 0:
                self.check_room()

    @property
    def spreads(self) -> bool:
        """Whether each process has a part of the weights."""
        return self.cfg.shard and ranks.world() > 1

    @property
    def loads_on(self) -> str:
        """The device that a model is loaded on: what is to be spread is whole in the CPU's memory first."""
        return "cpu" if self.spreads else self.device

    @property
    def teacher_shape(self):
        """The sizes of a teacher, or None: a copy of the start has the model's."""
        return self.reference.shape if self.cfg.reference else None

    def share(self, model):
        """Every rank starts from the weights of rank 0. Those that are to be spread must be so already."""
        if not self.spreads:
            ranks.share_from_first(model.state_dict().values())
            return
        with ranks.together():
            sums = hash_of_weights(list(enumerate(model.parameters())))
        if len(set(ranks.gather(sums))) > 1:
            raise ValueError("the processes have read different weights: give all the same model and out_dir")

    def spread_models(self):
        """Each process keeps its part of the weights, which all have loaded into the CPU's memory."""
        for model in (self.model, self.reference):
            if model is None:
                continue
            if model is self.model or self.cfg.ref_sync_every:  # others are neither drawn from nor saved
                self.copies[model] = shard.hollow(model, self.dtype)
            shard.spread(model, dtype=self.dtype, device=self.device)
        if self.start_adapter is not None:
            self.start_adapter = [tensor.to(self.device) for tensor in self.start_adapter]
        with ranks.together():
            shard.refuse_too_large(self.copies[self.model], self.device)

    def whole_weights(self):
        """The context in which the sampler has its weights. Every rank must enter it."""
        return shard.gathered(self.samples, self.model)

    def converse(self, rows: list[dict], group_size: int):
        """The conversations of one call of the sampler, or None where the run has no environment."""
        return self.conversations and self.conversations.begin(rows, group_size)

    def make_optimizer(self):
        cfg, params = self.cfg, list(self.model.named_parameters())
        options = dict(lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2), weight_decay=cfg.weight_decay)
        if self.spreads and not cfg.lora_rank:
            return shard.AdamW(params, dtype=self.dtype, **options)
        owners = None
        if cfg.shard_optimizer and ranks.world() > 1:
            owners = ranks.share_out([p for _, p in params if p.requires_grad])
        options |= dict(bits=cfg.optimizer_bits, scaled=self.dtype == torch.float16)
        options["offload"] = cfg.offload_optimizer
        return optim.AdamW(params, owners=owners, rank=ranks.rank(), **options)

    def find_checkpoint(self):
        """(identity, folder, optimiser state, keys that have changed) of the run to go on with.

        The state of its newest checkpoint is taken over. None, None, None, [] for a run that starts.
        """
        if not self.cfg.resume:
            return None, None, None, []
        before = rundir.read(self.out)
        keys = before.get("config", {})
        if keys:  # a run of an older version has fewer keys, and meant what is the default of the others
            keys = rundir.plain(dataclasses.asdict(configs.Config())) | keys
        changed = rundir.check_resumable(keys, self.keys, self.out)
        found = checkpoint.newest(self.out, before.get("run"))
        if found is None:
            if checkpoint.has_any(self.out):
                raise ValueError(
                    f"no checkpoint in {self.out / 'ckpt'} is whole and of this run, so there is nothing to "
                    "resume: to begin anew, leave out --resume, and what is there is moved aside"
                )
            ranks.say(f"nothing to resume in {self.cfg.out_dir}: starting from the beginning")
            return before.get("run"), None, None, changed
        moments, stored = checkpoint.load_state(found)
        known = stored.get("model", {})
        if known:  # a checkpoint of an older version knows fewer keys
            checkpoint.check_same_run(
                stored, {key: self.identity[key] for key in known if key in self.identity}
            )
        self.state |= {key: stored[key] for key in self.state if key in stored}
        self.teacher = stored.get("teacher")
        return before.get("run") or stored.get("run"), found, moments, changed

    def claim_folder(self, changed: list[str]):
        """Makes the folder this run's, and says what was found there. An earlier run's is moved aside."""
        moved = None
        with ranks.together():
            if ranks.rank() == 0:
                if self.cfg.resume:
                    checkpoint.writable(self.out)
                    self.id = self.id or rundir.new_identity()
                else:
                    self.id, moved = rundir.claim(self.out)
        if ranks.world() > 1 and ranks.rank() == 0:
            self.lock = rundir.hold(self.out)
        self.id = ranks.gather(self.id)[0]
        if moved:
            ranks.say(f"{self.out} held an earlier run, which is now {moved}")
        if self.resumed:
            ranks.say(f"resumed from step {self.state['step']}: {self.resumed}")
        if changed:
            ranks.say(f"changed since the run was started: {', '.join(changed)}")

    def look_for_model(self):
        """Before a folder is moved: is there a model at all, and a teacher? ValueError where there is not."""
        if self.cfg.scratch is None:
            find_model(self.cfg.model)
        if self.cfg.reference:
            find_model(self.cfg.reference)

    def load_models(self):
        """The policy as it stands now, and the reference as it stood at the start."""
        cfg, start = self.cfg, self.out / "start"
        # A start that no folder outside this run holds is written to `start` once,
        # and resumed runs read it there.
        made_here = cfg.scratch is not None or cfg.sft_steps > 0
        if made_here and not self.resumed:
            self.make_start(start)
        self.base = str(start) if made_here else cfg.model
        # A model that is to be spread is read again, whole, from the start that was written.
        if self.resumed or not made_here or self.spreads:
            full_checkpoint = self.resumed is not None and not cfg.lora_rank  # then it is the whole model
            path = str(self.resumed) if full_checkpoint else self.base
            loaded = load_policy(
                path, adapter=cfg.adapter, dtype=self.dtype, device=self.loads_on, base=cfg.base
            )
            self.model, self.tokenizer, self.stop_ids, base = loaded
            if cfg.lora_rank:
                self.base = base
        self.reference, self.start_adapter = None, None
        if cfg.lora_rank:
            self.load_adapter()
        elif lora.layers(self.model):
            raise ValueError(
                "full fine-tuning cannot start from an adapter: merge it first, "
                "python sample.py --model=ADAPTER --merge=FOLDER, and give --model=FOLDER"
            )
        if cfg.reference:
            self.load_teacher()
        elif cfg.beta and not cfg.lora_rank:
            self.load_reference()

    def make_start(self, folder: Path):
        """The model that training starts from: random weights or a checkpoint, warmed up on
        demonstrations.
        """
        cfg = self.cfg
        self.model, self.tokenizer, self.stop_ids, _ = load_policy(
            cfg.model,
            scratch=cfg.scratch,
            alphabet=cfg.alphabet,
            seed=cfg.seed,
            dtype=self.dtype,
            device=self.loads_on,
        )
        whole = self.model
        if cfg.sft_steps:
            whole = self.warm_up()
        with ranks.together():  # another rank may read it next
            self.write_start(whole, folder)

    def warm_up(self):
        """Trains self.model on demonstrations. Returns what holds the weights on rank 0."""
        options = configs.warm_up_options(self.cfg)
        if self.cfg.env:
            options |= turns.of_demonstrations(self.tokenizer, self.stop_ids, configs.turn_options(self.cfg))
        whole = self.model
        if self.spreads:
            whole = shard.hollow(self.model, self.dtype)
            shard.spread(self.model, dtype=self.dtype, device=self.device)
            shard.add_gradients(self.model, divisor=ranks.world())  # each computes all rows
            options["make_optimizer"] = partial(shard.AdamW, dtype=self.dtype)
        with shard.in_step(self.model):
            warmup.warm_up(
                self.model, self.tokenizer, self.task, stop_id=self.stop_ids[0], say=ranks.say, **options
            )
        if whole is not self.model:
            shard.fill(whole, self.model, for_save=True)
        return whole

    def write_start(self, model, folder: Path):
        if ranks.rank() == 0:
            try:
                with checkpoint.os_errors():
                    save_policy(model, self.tokenizer, self.stop_ids, str(folder), base="")
            except OSError as error:
                raise ValueError(
                    f"the model that training starts from could not be written to {folder} "
                    f"({error.strerror}): free some room, or choose another disk, --out_dir=PATH"
                ) from error
        if self.cfg.base == "nf4":  # as it will be read from the folder when the run is resumed
            nf4.quantise_model(self.model)

    def load_adapter(self):
        """Puts LoRA on the model: a fresh adapter, the one that training starts
        from, or the resumed checkpoint's.
        """
        cfg, started = self.cfg, lora.layers(self.model)
        if started:
            # Training goes on from an adapter, so the reference is the model with that adapter, not without.
            self.start_adapter = [p.detach().clone() for p in self.model.parameters() if p.requires_grad]
            layer = next(iter(started.values()))
            alpha = layer.scale * layer.rank
            if (layer.rank, alpha) != (cfg.lora_rank, cfg.lora_alpha):  # would else be ignored in silence
                raise ValueError(
                    f"the adapter to start from has rank {layer.rank} and alpha {alpha:g}: "
                    f"give --lora_rank={layer.rank} --lora_alpha={alpha:g}"
                )
        else:
            lora.apply(
                self.model, rank=cfg.lora_rank, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout,
                targets=cfg.lora_targets, seed=cfg.seed,
            )  # fmt: skip
        if self.resumed:
            lora.load_adapter(self.model, str(self.resumed))

    def load_reference(self):
        """A frozen copy of the start, or of where a moving reference stood."""
        if not self.resumed:
            self.reference = copy.deepcopy(self.model)
        else:
            folder = self.resumed / "reference" if self.cfg.ref_sync_every else self.base
            self.reference, *_ = load_policy(str(folder), dtype=self.dtype, device=self.loads_on)
        self.reference.requires_grad_(False)

    def load_teacher(self):
        """The model that the key `reference` names, frozen. ValueError where it cannot teach this one."""
        name, options = self.cfg.reference, dict(dtype=self.dtype, device=self.loads_on, base=self.cfg.base)
        self.reference = load_teacher(name, self.model, self.tokenizer, **options)
        # A run's folder stands for its newest checkpoint, which may be another one when we are resumed.
        weights = hash_of_weights(list(enumerate(self.reference.parameters())))
        before, self.teacher = self.teacher, [str(self.dtype), weights]
        if before and before[0] == self.teacher[0] and before != self.teacher:
            raise ValueError(
                f"the weights in {newest_of_run(name)} are not those of the teacher that this run was "
                "started with: put those back, or start anew in another out_dir"
            )

    @contextlib.contextmanager
    def as_reference(self):
        """The model of the KL term: a teacher or a frozen copy, or this model with its
        adapters off or as they were at the start.
        """
        self.model.eval()  # no dropout in a reference
        if self.reference is not None:
            yield self.reference
        elif self.start_adapter is None:
            with lora.disabled(self.model):
                yield self.model
        else:
            with lora.unmerged(self.model), self.adapter_of_the_start():
                yield self.model

    @contextlib.contextmanager
    def adapter_of_the_start(self):
        """Puts the numbers of the adapter that training started from in the place of today's."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        now = [p.data for p in trained]
        for p, start in zip(trained, self.start_adapter):
            p.data = start
        try:
            yield
        finally:
            for p, data_now in zip(trained, now):
                p.data = data_now

    def weights_changed(self):
        """To be called after each update: what is made from the weights is made again."""
        if self.merges:
            lora.merge(self.model)

    @torch.no_grad()
    def sync_reference(self, step: int):
        """Moves the reference towards the policy every ref_sync_every steps (TR-DPO, arXiv:2404.09656)."""
        if self.cfg.ref_sync_every and step % self.cfg.ref_sync_every == 0:
            for r, p in zip(self.reference.parameters(), self.model.parameters()):
                r.lerp_(p.to(r.dtype), self.cfg.ref_mix)

    def rank_0_is_gone(self) -> bool:
        """Whether rank 0 has died, and we are the first to ask. Not known without a shared folder."""
        end = time.monotonic() + 2
        while time.monotonic() < end:  # its sockets may be closed a moment before its files are
            if not (self.out / ".lock").exists():
                return False
            self.lock = rundir.hold(self.out)
            if self.lock:
                saved = self.out / "ckpt" / f"step_{self.state['step']:06d}"
                return not saved.exists()  # else rank 0 lived, saved, and has left
            time.sleep(0.05)
        return False

    def moments(self) -> dict:
        """The optimiser's state, on rank 0 whole whoever owns what. Every rank must call it.

        A spread model's weights come to rank 0, too, in its copy: `save` is rank 0's alone.
        """
        if self.optimizer.summed:
            for model, copy in self.copies.items():
                shard.fill(copy, model, for_save=True)
            return shard.on_first(self.optimizer.state())
        if self.optimizer.owners is None:
            return self.optimizer.state()
        return ranks.gather_to_first(self.optimizer.state())

    def weights_hash(self) -> int:
        """fingerprint.hash_of_weights of all that is trained. Every rank must call it."""
        mine = hash_of_weights(self.optimizer.masters())
        everybodys = self.optimizer.owners is None and not self.optimizer.summed
        return mine if everybodys else sum(ranks.gather(mine))

    def save(self, moments: dict) -> Path:
        """Writes ckpt/step_NNNNNN, whole or not at all. moments: the optimiser's, from `moments`."""
        state = {key: value for key, value in self.state.items() if key != "step"}
        state |= dict(model=self.identity, run=self.id, teacher=self.teacher)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.peaks("save"))
            for model, copy in self.copies.items():
                stack.callback(shard.empty, copy, model)
            return checkpoint.save(
                self.out, self.state["step"], write_model=self.write, optimizer_state=moments, state=state,
                keep=self.cfg.keep,
            )  # fmt: skip

    def check_room(self):
        """Says, before the first step, that the disk is too small for the checkpoints that are to come.

        With save_failure="stop" that is a ValueError. What the run has written before counts as written.
        """
        cfg, done = self.cfg, self.state["step"]
        every = cfg.save_every or cfg.steps  # the last step is saved in any case
        coming = -(-cfg.steps // every) - done // every if cfg.steps > done else 0
        there = len(list((self.out / "ckpt").glob("step_*")))
        if cfg.keep:
            coming = min(coming, max(1, cfg.keep + 1 - there))  # an old one goes when the new one is whole
        need, free = coming * self.checkpoint_bytes(), shutil.disk_usage(self.out).free
        if need <= free:
            return
        sentence = (
            f"{coming} more checkpoints of {need / coming / 1e9:.3g} GB need {need / 1e9:.3g} GB, and "
            f"{free / 1e9:.3g} GB are free in {self.out}: make room, take another --out_dir, or --keep fewer"
        )
        if cfg.save_failure == "stop":
            raise ValueError(sentence)
        ranks.say(f"warning: {sentence}")

    def checkpoint_bytes(self) -> int:
        """Of one checkpoint, about: what is saved of the model, and the optimiser's state."""
        trained = sum(p.nbytes for p in self.optimizer.params)
        model = sum(p.numel() * self.dtype.itemsize for p in self.model.parameters())
        weights = trained if self.cfg.lora_rank else model
        if self.cfg.ref_sync_every:
            weights += model
        return weights + sum(t.nbytes for t in self.optimizer.whole_state().values())

    def write(self, folder: Path):
        save_policy(self.samples, self.tokenizer, self.stop_ids, str(folder), base=self.base)
        if self.cfg.ref_sync_every:  # a reference that moves is state, too
            reference = self.copies.get(self.reference, self.reference)
            save_policy(reference, self.tokenizer, self.stop_ids, str(folder / "reference"), base="")


def merges_adapters(cfg, model) -> bool:
    """Whether sampler and trainer both compute with W' = W + scale * B A, made once an update (lora.merge).

    The adapter then costs nothing in sampling, where its thin products double a decoding step on a GPU, and
    the policy is to the bit the model that is exported. It takes a second copy of the adapted weights, since
    the reference needs W. "auto": on a GPU with room for that copy four times over, without dropout, and
    never on a base in 4 bits, which that copy would be four times of.
    """
    if not may_merge(cfg):
        return False
    if cfg.lora_merge == "on":
        return True
    if model.device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(model.device)
    return 4 * lora.merged_bytes(model) < free


def refuse_uneven_ranks(cfg):
    if cfg.prompts_per_step % ranks.world():
        raise ValueError(
            f"prompts_per_step = {cfg.prompts_per_step} does not divide among {ranks.world()} processes"
        )


def advantage_function(cfg):
    """(rewards (B, G), prompts B, state dict) -> (A (B, G), state): the config's own
    function, or one of loss.SCALES.

    State is what an advantage keeps from step to step (a moving average, say): a dict that JSON can hold,
    saved with every checkpoint. Those of loss.py keep nothing.
    """
    if callable(cfg.advantage):
        return cfg.advantage
    return partial(within_the_group, scale=cfg.advantage)


def within_the_group(rewards, prompts, state, *, scale):
    return loss.advantages(rewards, scale=scale), state
