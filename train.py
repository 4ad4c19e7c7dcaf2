"""GRPO, top to bottom: sample groups of answers, score them, make what beat its group likelier.

    python train.py configs/arithmetic.py                      # a laptop, three minutes
    python train.py configs/gsm8k.py --lr=2e-6                 # one GPU; any key of config.py may follow
    python train.py configs/gsm8k.py --resume=True             # go on from the newest whole checkpoint
    torchrun --nproc_per_node=4 train.py configs/gsm8k.py      # the same run on four processes

One step: B prompts -> G completions each (rollout.py) -> rewards (rewards.py) -> advantages (loss.py) -> forward, loss and backward in
micro-batches of whole groups (model.py, loss.py) -> one update (optim.py) -> one line on the screen and one row in metrics.jsonl.

What a step draws and learns is a function of the config, the seed and the step's number, so a run killed and resumed ends with the
same bits as one that was not. out/NAME/ holds what a run made: config.json, metrics.jsonl, rollouts/, ckpt/.

Dims: B prompts a step, G completions a prompt, N = B * G rows, T completion tokens of a micro-batch.
"""
import contextlib
import copy
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import config as configs
import data
import eval as evaluation
import lora
import loss as losses
import model as models
import optim
import rewards as rewarding
import rollout
import sft
from log import Log, Timer, finish, gather, header, length_metrics, line, loss_metrics, peak_gb, rank, reward_metrics, say, show_sample, world, write_rollouts
from sample import load_policy, pick_device, save_policy

# Largest |trainer - sampler| in nats that rounding explains. fp32 is compared by its worst token. In bf16 single tokens differ by
# tenths between two correct implementations, so there the mean is what tells a wrong model from a rounded one.
MISMATCH = {torch.float32: ("max", 1e-3), torch.bfloat16: ("mean", 0.05)}


class Stop(Exception):
    """The run cannot go on, for the reason given; what was learnt so far is saved."""


# -------------------------------------------------------------------------------------------------------------- preparation
class Run:
    """What stays the same over a run: model, tokenizer, task, rewards, optimiser, reference."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.device, self.dtype = pick_device(cfg.device, cfg.dtype, cfg.threads)
        if "LOCAL_RANK" in os.environ:  # torchrun
            if self.device == "cuda":
                self.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.startswith("cuda") else "gloo")
            if cfg.prompts_per_step % world():
                raise ValueError(f"prompts_per_step = {cfg.prompts_per_step} does not divide among {world()} processes")
        checkpoint.writable(cfg.out_dir)
        self.out = Path(cfg.out_dir)
        self.task, self.rewards = evaluation.load_task(cfg), rewarding.resolve(cfg.rewards)
        self.resumed = checkpoint.newest(cfg.out_dir) if cfg.resume else None
        if cfg.resume and self.resumed is None:
            say(f"nothing to resume in {cfg.out_dir}: starting from the beginning")
        self.fingerprint = {key: getattr(cfg, key) for key in ("model", "scratch", "alphabet", "adapter", "lora_rank", "lora_alpha", "lora_targets", "seed", "sft_steps")}
        self.step, self.num_tokens, self.checked, saved = 0, 0, False, {}
        if self.resumed:  # before minutes of loading: is it this run's?
            saved, state = checkpoint.load_state(self.resumed)
            checkpoint.check_same_run(state, self.fingerprint)
            self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.load_models()
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
            self.reference = copy.deepcopy(self.model) if not self.resumed else load_policy(self.base, dtype=self.dtype, device=self.device)[0]
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

    def save(self) -> Path:
        """Writes ckpt/step_NNNNNN, whole or not at all."""
        state = dict(num_tokens=self.num_tokens, model=self.fingerprint)
        return checkpoint.save(self.out, self.step, write_model=lambda folder: save_policy(self.model, self.tokenizer, self.stop_ids, str(folder), base=self.base),
                               optimizer_state=self.optimizer.state(), state=state, keep=self.cfg.keep)


# ----------------------------------------------------------------------------------------------------------------- one step
def sample_and_score(run, rows, timer):
    """This rank's share of a step: its prompts, Rollout, texts, reward parts (n, R) and rewards (n,), NaN for None."""
    cfg, mine = run.cfg, range(rank(), len(rows), world())
    rows = [rows[b] for b in mine]
    prompts = [data.prompt_ids(run.tokenizer, row["prompt"], system=cfg.system_prompt, prefill=cfg.prefill) for row in rows]
    with timer("sample"):
        run.model.eval()  # no LoRA dropout in the sampler
        out = rollout.generate(run.model, prompts, group_size=cfg.group_size, max_new_tokens=cfg.max_new_tokens, stop_ids=run.stop_ids,
                               temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, min_p=cfg.min_p, slots=cfg.slots, seed=cfg.seed,
                               step=run.step + 1, prompt_numbers=list(mine))
    with timer("score"):
        texts = [cfg.prefill + text for text in run.tokenizer.batch_decode(out.ids, skip_special_tokens=True)]
        parts, reward = rewarding.score(run.rewards, texts, [row["prompt"] for row in rows for _ in range(cfg.group_size)], data.columns(rows, cfg.group_size),
                                        group_size=cfg.group_size, completion_ids=out.ids, max_new_tokens=cfg.max_new_tokens,
                                        reward_messages=cfg.reward_messages, timeout=cfg.reward_timeout)
    return prompts, out, texts, parts, reward


def gradients(run, prompts, out, adv, norm, timer):
    """Backward over this rank's rows in micro-batches. adv (n,). Returns the sums policy_loss gives, and token entropies by row."""
    cfg, G = run.cfg, run.cfg.group_size
    # without a KL or an entropy term a row of advantage 0 has gradient 0: its tokens count in `norm` and are not computed
    needed = (adv != 0) | bool(cfg.beta or cfg.entropy_coef)
    groups = [[out.ids[b * G + g] if needed[b * G + g] else [] for g in range(G)] for b in range(len(prompts))]
    stats, entropies = {}, {}
    for cut in models.micro_batches(prompts, groups, cfg.micro_tokens):
        numbers = [b * G + g for b, members in cut for g in members]  # this micro-batch's rows
        batch = [prompts[b] for b, _ in cut], [[groups[b][g] for g in members] for b, members in cut]
        options = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, min_p=cfg.min_p)
        ref_logp = None
        if cfg.beta:
            with timer("reference"), torch.no_grad(), run.as_reference() as reference:
                ref_logp, _, _ = reference.completion_logprobs(*batch, **options)
        with timer("train"):
            run.model.train()
            logp, entropy, rows = run.model.completion_logprobs(*batch, **options)
            old_logp = torch.tensor([lp for n in numbers for lp in out.logprobs[n]], device=logp.device)
            loss, sums = losses.policy_loss(
                logp, old_logp, adv[numbers].to(logp.device), rows, ref_logp=ref_logp, entropy=entropy, objective=cfg.objective, aggregate=cfg.aggregate,
                clip_low=cfg.clip_low, clip_high=cfg.clip_high, dual_clip=cfg.dual_clip, cispo_max=cfg.cispo_max, beta=cfg.beta, kl=cfg.kl,
                kl_times_ratio=cfg.kl_times_ratio, entropy_coef=cfg.entropy_coef, group_size=G, max_new_tokens=cfg.max_new_tokens, norm=norm)
            if not torch.isfinite(loss.detach()):
                torch.save(dict(prompts=batch[0], completions=batch[1], logp=logp.detach(), old_logp=old_logp), run.out / "bad_batch.pt")
                raise Stop(f"the loss is {loss.item()} at step {run.step + 1}; the micro-batch that made it is in {run.out / 'bad_batch.pt'}")
            loss.backward()
        stats = losses.add_stats(stats, sums)
        for n, row in zip(numbers, entropy.detach().split([len(out.ids[n]) for n in numbers])):
            entropies[n] = row
    return stats, entropies


def train_step(run) -> dict:
    """One update. Returns the row for metrics.jsonl; writes the step's rollouts when they are due."""
    cfg, timer = run.cfg, Timer()
    torch.manual_seed(hash((cfg.seed, run.step, rank())))  # LoRA dropout, the only torch randomness there is
    rows = run.task.batch(run.step, cfg.prompts_per_step, cfg.seed)
    prompts, out, texts, parts, reward = sample_and_score(run, rows, timer)

    # rewards of all ranks: a mean is a ratio of two sums over the whole step, and scale "batch" needs them all
    lengths = [len(ids) for ids in out.ids]
    everyone = gather((parts, reward, lengths, out.stopped))
    rewards = torch.from_numpy(np.concatenate([r.reshape(-1, cfg.group_size) for _, r, _, _ in everyone]))  # (B, G), rank by rank
    all_adv = losses.advantages(rewards, scale=cfg.advantage)
    adv = all_adv.chunk(world())[rank()].reshape(-1).float()
    all_lengths = [n for _, _, lengths_of, _ in everyone for n in lengths_of]
    norm = losses.normaliser(all_lengths, aggregate=cfg.aggregate, group_size=cfg.group_size, max_new_tokens=cfg.max_new_tokens)

    stats, entropies = gradients(run, prompts, out, adv, norm, timer)
    stats = reduce_stats(stats)
    difference = stats["diff_sum"] / max(1, stats["tokens"]) if stats else 0.0
    check_mismatch(run, stats, difference)
    lr = optim.learning_rate(run.step, lr=cfg.lr, warmup_steps=cfg.warmup_steps, steps=cfg.steps, schedule=cfg.schedule)
    with timer("train"), checkpoint.uninterrupted():  # an update torn in half could not be saved
        for grad in run.optimizer.grads() if world() > 1 else ():
            dist.all_reduce(grad)
        grad_norm = float(run.optimizer.step(lr, max_norm=cfg.max_grad_norm))
        run.optimizer.zero_grad()
        run.step += 1
        run.num_tokens += sum(all_lengths) + cfg.group_size * sum(gather(sum(map(len, prompts))))

    metrics = dict(step=run.step, num_tokens=run.num_tokens, epoch=run.task.epoch(run.step, cfg.prompts_per_step), learning_rate=lr, grad_norm=grad_norm)
    metrics |= reward_metrics(run, everyone, rewards) | length_metrics(all_lengths, [s for _, _, _, stops in everyone for s in stops])
    metrics |= loss_metrics(stats, difference) | timer.metrics(sum(all_lengths))
    metrics["memory/peak_gb"] = peak_gb(run.device)
    if cfg.rollouts_every and run.step % cfg.rollouts_every == 0:
        write_rollouts(run, rows, out, texts, parts, reward, adv, entropies)
    if cfg.show_every and run.step % cfg.show_every == 0:
        show_sample(rows[rank()], texts[0], reward[0])
    return metrics


def check_mismatch(run, stats, difference):
    """Stops a run whose first step shows that the trainer does not give the sampler's log-probabilities: all of it would be off-policy in secret."""
    if run.checked or not stats:
        return
    run.checked = True
    which, limit = MISMATCH.get(run.dtype, ("max", 1e-3))
    worst = stats.get("diff_max", 0.0) if which == "max" else difference
    if worst > limit and not run.cfg.lora_dropout:
        raise Stop(f"the sampler's and the trainer's log-probabilities differ by {worst:.2g} nats ({which} over tokens) at step {run.step + 1}; rounding explains {limit}: "
                   "the two do not compute the same model, so every ratio would be wrong")


def reduce_stats(stats: dict) -> dict:
    """policy_loss's sums over all ranks, as floats. Empty if no rank had a row to train on."""
    total = {}
    for part in gather({key: float(value) for key, value in stats.items()}):
        total = losses.add_stats({k: torch.tensor(v) for k, v in total.items()}, {k: torch.tensor(v, dtype=torch.float64) for k, v in part.items()})
    return {key: float(value) for key, value in total.items()}


def evaluate(run) -> tuple[dict, list]:
    """Held-out problems, on rank 0 while the others wait: (metrics, texts)."""
    result = ({}, [])
    if rank() == 0:
        run.model.eval()
        result = evaluation.evaluate(run.model, run.tokenizer, run.task.eval[: run.cfg.eval_problems], run.rewards, stop_ids=run.stop_ids, **evaluation.options(run.cfg))
    if world() > 1:
        dist.barrier()
    return result


def main(cfg):
    run = Run(cfg)
    log, before, after = Log(run), None, None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster that takes its machine back gets a checkpoint too
    header(run)
    if cfg.eval_every and not run.resumed:
        before = evaluate(run)
        say(f"before: {evaluation.summary(before[0])}" if before[0] else "")
        log.write(dict(step=run.step) | before[0])
    say(line(run))
    started, first = time.perf_counter(), run.step
    try:
        while run.step < cfg.steps:
            metrics = train_step(run)
            left = (time.perf_counter() - started) / (run.step - first) * (cfg.steps - run.step)
            say(line(run, metrics, left))
            if cfg.eval_every and (run.step % cfg.eval_every == 0 or run.step == cfg.steps):
                after = evaluate(run)
                metrics |= after[0]
                say(f"      = {evaluation.summary(after[0])}" if after[0] else "")
            log.write(metrics)
            if rank() == 0 and (cfg.save_every and run.step % cfg.save_every == 0 or run.step == cfg.steps):
                run.save()
    except (KeyboardInterrupt, Stop, rewarding.RewardError, FloatingPointError, ValueError) as e:
        if isinstance(e, ValueError) and run.step == first:
            raise  # a config that cannot run at all: there is nothing to save
        # weights and optimiser change only inside `uninterrupted`, so what stands here is a whole step: nothing is lost
        path = run.save() if rank() == 0 else ""
        say(f"\n{'interrupted' if isinstance(e, KeyboardInterrupt) else e}\nsaved {path}; go on with: python train.py {' '.join(a for a in sys.argv[1:] if 'resume' not in a)} --resume=True")
        return 1
    finish(run, before, after)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(configs.load(sys.argv[1:])))
    except (ValueError, rewarding.RewardError) as e:
        sys.exit(f"train.py: {e}")
