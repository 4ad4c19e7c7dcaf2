"""What stays the same over a run: model, tokenizer, task, rewards, optimiser, and the reference of the KL term.

train.py makes one Run and takes steps with it. Two things here are easily got wrong elsewhere. The reference is the function that training
started from, in all four cases: none (beta 0), the model with its adapters off, the model with the adapter it started from, a frozen copy. And
a run that is resumed rebuilds each of them from what the start left on the disk, not from what training has made of it.
"""
import contextlib
import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import eval as evaluation
import kernels
import lora
import optim
import rewards as rewarding
import sft
from log import rank, say, world
from sample import load_policy, pick_device, save_policy


class Run:
    """What stays the same over a run: model, tokenizer, task, rewards, optimiser, reference."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.device, self.dtype = pick_device(cfg.device, cfg.dtype, cfg.threads)
        self.kernels = kernels.use(cfg.kernels)
        if "LOCAL_RANK" in os.environ:  # torchrun
            if self.device == "cuda":
                self.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.startswith("cuda") else "gloo")
            if cfg.prompts_per_step % (world() * cfg.minibatches):
                raise ValueError(f"prompts_per_step = {cfg.prompts_per_step} does not divide among {world()} processes" + f" and {cfg.minibatches} minibatches" * (cfg.minibatches > 1))
        checkpoint.writable(cfg.out_dir)
        self.out = Path(cfg.out_dir)
        self.task, self.rewards = evaluation.load_task(cfg), rewarding.resolve(cfg.rewards)
        self.resumed = checkpoint.newest(cfg.out_dir) if cfg.resume else None
        if cfg.resume and self.resumed is None:
            say(f"nothing to resume in {cfg.out_dir}: starting from the beginning")
        self.fingerprint = {key: getattr(cfg, key) for key in ("model", "scratch", "alphabet", "adapter", "lora_rank", "lora_alpha", "lora_targets", "seed", "sft_steps")}
        self.step, self.num_tokens, self.checked, self.torn, saved = 0, 0, False, False, {}
        if self.resumed:  # before minutes of loading: is it this run's?
            saved, state = checkpoint.load_state(self.resumed)
            checkpoint.check_same_run(state, self.fingerprint)
            self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.load_models()
        self.model.checkpointing = cfg.checkpointing == "layers"
        self.optimizer = optim.AdamW(list(self.model.named_parameters()), lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2), weight_decay=cfg.weight_decay)
        if saved:
            self.optimizer.load_state(saved)

    def load_models(self):
        """The policy as it stands now, and the reference as it stood at the start."""
        cfg, start = self.cfg, self.out / "start"
        made_here = cfg.scratch is not None or cfg.sft_steps > 0  # a start that no folder outside this run holds
        if made_here and not self.resumed:
            self.model, self.tokenizer, self.stop_ids, _ = load_policy(
                cfg.model, scratch=cfg.scratch, alphabet=cfg.alphabet, seed=cfg.seed, dtype=self.dtype, device=self.device)
            if cfg.sft_steps:
                sft.warm_up(self.model, self.tokenizer, self.task, steps=cfg.sft_steps, batch=cfg.sft_batch, lr=cfg.sft_lr, seed=cfg.seed, stop_id=self.stop_ids[0],
                            micro_tokens=cfg.micro_tokens, system=cfg.system_prompt, prefill=cfg.prefill, say=say)
            if rank() == 0:
                save_policy(self.model, self.tokenizer, self.stop_ids, str(start), base="")
        self.base = str(start) if made_here else cfg.model
        whole = self.resumed if self.resumed and not cfg.lora_rank else self.base  # full fine-tuning: the checkpoint is the model
        if self.resumed or not made_here:
            self.model, self.tokenizer, self.stop_ids, base = load_policy(str(whole), adapter=cfg.adapter, dtype=self.dtype, device=self.device)
            self.base = base if cfg.lora_rank else self.base
        self.reference, self.start_adapter = None, None
        started = lora.layers(self.model)
        if started and not cfg.lora_rank:
            raise ValueError("full fine-tuning cannot start from an adapter: merge it first, python sample.py --model=ADAPTER --merge=FOLDER, and give --model=FOLDER")
        if cfg.lora_rank:
            if started:  # training goes on from an adapter, so the reference is the model with that adapter, not without
                self.start_adapter = [p.detach().clone() for p in self.model.parameters() if p.requires_grad]
                self.check_adapter(next(iter(started.values())))
            else:
                lora.apply(self.model, rank=cfg.lora_rank, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout, targets=cfg.lora_targets, seed=cfg.seed)
            if self.resumed:
                lora.load_adapter(self.model, str(self.resumed))
        elif cfg.beta:
            moved = self.resumed / "reference" if self.resumed and cfg.ref_sync_every else self.base
            self.reference = copy.deepcopy(self.model) if not self.resumed else load_policy(str(moved), dtype=self.dtype, device=self.device)[0]
            self.reference.requires_grad_(False)

    def check_adapter(self, layer):
        """The adapter that training starts from has its own rank and scale: a config that says otherwise would be ignored in silence."""
        if (layer.rank, layer.scale * layer.rank) != (self.cfg.lora_rank, self.cfg.lora_alpha):
            raise ValueError(f"the adapter to start from has rank {layer.rank} and alpha {layer.scale * layer.rank:g}: "
                             f"give --lora_rank={layer.rank} --lora_alpha={layer.scale * layer.rank:g}")

    @contextlib.contextmanager
    def as_reference(self):
        """The model of the KL term: a frozen copy, or this model with its adapters off or as they were at the start."""
        self.model.eval()  # no dropout in a reference
        if self.reference is not None:
            yield self.reference
        elif self.start_adapter is None:
            with lora.disabled(self.model):
                yield self.model
        else:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            now = [p.data for p in trained]
            for p, start in zip(trained, self.start_adapter):
                p.data = start
            try:
                yield self.model
            finally:
                for p, data_now in zip(trained, now):
                    p.data = data_now

    @torch.no_grad()
    def sync_reference(self):
        """Moves the reference towards the policy every ref_sync_every steps (TR-DPO, arXiv:2404.09656)."""
        if self.cfg.ref_sync_every and self.step % self.cfg.ref_sync_every == 0:
            for r, p in zip(self.reference.parameters(), self.model.parameters()):
                r.lerp_(p, self.cfg.ref_mix)

    def save(self) -> Path:
        """Writes ckpt/step_NNNNNN, whole or not at all."""
        state = dict(num_tokens=self.num_tokens, model=self.fingerprint)
        return checkpoint.save(self.out, self.step, write_model=self.write, optimizer_state=self.optimizer.state(), state=state, keep=self.cfg.keep)

    def write(self, folder: Path):
        save_policy(self.model, self.tokenizer, self.stop_ids, str(folder), base=self.base)
        if self.cfg.ref_sync_every:  # a reference that moves is state, too
            save_policy(self.reference, self.tokenizer, self.stop_ids, str(folder / "reference"), base="")
