"""AdamW for training in bf16 without losing the small steps of RL, and the learning rate as a function of the step.

Two roundings make RL in plain bf16 stand still, silently. A bf16 number keeps 8 bits, so a weight of 0.02 has its next
neighbour 1.2e-4 away: an update of lr 1e-6 is rounded back to where it was, at every step. And a sum of 16 micro-batches
kept in bf16 drops whatever is below 1/256 of the sum so far. So here every parameter below 32 bits has

    master  fp32   the weight that is updated; the model's own weight is its rounding, written in place after the update
    grad    fp32   the sum over micro-batches; the bf16 gradient of each is added and freed as soon as backward makes it

and parameters of 32 bits are updated where they are. The arithmetic is torch.optim.AdamW's fused kernel: one pass over
memory, and better tested than ours would be. Bytes a parameter: fp32 16 (weight, grad, two moments), bf16 18 (and master).

    opt = AdamW(list(model.named_parameters()), lr=1e-6)
    for micro_batch in step: loss(micro_batch).backward()
    for grad in opt.grads(): all_reduce(grad)               # only with several ranks
    norm = opt.step(lr, max_norm=1.0); opt.zero_grad()

Papers: AdamW arXiv:1711.05101; mixed precision with master weights arXiv:1710.03740.
"""
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of Adam's running means of grad and grad ** 2


class AdamW:
    """AdamW over `named_params`, [(name, parameter)]; those with requires_grad=False are left out.

    `weight_decay` (decoupled: w -= lr * weight_decay * w) acts on tensors of at least `decay_from_dims` dims: pulling
    norm gains and biases to zero changes the scale of whole layers and regularises nothing.
    Raises ValueError when nothing is trainable, or when one name or one tensor is listed twice.
    """

    def __init__(self, named_params: list[tuple[str, nn.Parameter]], lr: float, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, decay_from_dims: int = 2):
        trainable = [(name, param) for name, param in named_params if param.requires_grad]
        if not trainable:
            raise ValueError("nothing to train: no parameter has requires_grad=True; "
                             "switch the adapters on (lora_rank > 0) or train the whole model (lora_rank = 0)")
        self.names = [name for name, _ in trainable]
        self.params = [param for _, param in trainable]
        # A tied weight listed under two names would be updated twice a step, each time with the whole gradient.
        if len(set(self.names)) < len(trainable) or len(set(map(id, self.params))) < len(trainable):
            raise ValueError("a name or a parameter is listed twice: a tied weight must be given once "
                             "(nn.Module.named_parameters() does so)")
        # fp32[i] is what AdamW updates: params[i] itself, or its master copy where params[i] has fewer than 32 bits.
        self.fp32 = [p.detach().float() if p.dtype.itemsize < 4 else p for p in self.params]
        self.low = [(p, m) for p, m in zip(self.params, self.fp32) if p is not m]
        for param, master in self.low:
            # Of two optimisers on one tensor the first's hook would take every gradient and the second see none.
            if hasattr(param, "fp32_grad_hook"):
                param.fp32_grad_hook.remove()
            param.fp32_grad_hook = param.register_post_accumulate_grad_hook(partial(_accumulate, master))

        decayed = [t for t in self.fp32 if t.dim() >= decay_from_dims]
        plain = [t for t in self.fp32 if t.dim() < decay_from_dims]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") for p in self.params)
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=fused)
        # The moments are made now, not at the first update: a run that has no memory for them fails before it has sampled
        # anything, and state() of a run at step 0 has the same tensors as at any other.
        for t in self.fp32:
            self.adamw.state[t] = {"step": torch.zeros((), dtype=torch.float32, device=t.device if fused else "cpu"),
                                   **{moment: torch.zeros_like(t) for moment in MOMENTS}}

    def grads(self) -> Iterator[Tensor]:
        """The fp32 gradient of every parameter, in the order given; change them in place (all-reduce, scaling).

        A parameter that backward has not reached gets zeros, never None: a rank whose rows all had zero advantage would
        otherwise enter fewer all-reduces than the others and the run would hang; and its moments decay as they would
        have with the zero gradient that backward would have made, so skipping such rows changes no bit.
        """
        for param, t in zip(self.params, self.fp32):
            if t is not param:
                _accumulate(t, param)  # a gradient that was assigned by hand: no hook has seen it
            if t.grad is None:
                t.grad = torch.zeros_like(t)
            yield t.grad

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """L2 norm over all gradients together, fp32, 0-d.

        Of pieces of 2**18 numbers: one running fp32 sum over a whole embedding (136M numbers) loses 1.6 % of the norm on a
        CPU, pieces 1e-6, in the same time.
        """
        return get_total_norm([piece for grad in self.grads() for piece in grad.reshape(-1).split(1 << 18)])

    @torch.no_grad()
    def step(self, lr: float, max_norm: float | None = None) -> Tensor:
        """One update with exactly this `lr` (log this number: it is the one used). Returns the norm before clipping, 0-d.

        Gradients are scaled by min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ does; None or 0: never.
        Raises FloatingPointError, with weights, moments and gradients untouched, if the norm is not finite: one NaN
        would stay in the moments for ever, and clipping by an infinite norm would quietly turn the step into zeros.
        """
        norm = self.grad_norm()
        if not torch.isfinite(norm):  # the one wait for the device in an update
            bad = [name for name, g in zip(self.names, self.grads()) if not torch.isfinite(g).all()]
            more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
            raise FloatingPointError(f"the gradient norm is {norm.item()}, no update was made; non-finite gradients in: "
                                     f"{', '.join(bad[:4]) or 'none, their squares overflow'}{more}")
        if max_norm:
            clip_grads_with_norm_(self.fp32, max_norm, norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self._round()
        return norm

    def zero_grad(self) -> None:
        """Frees the gradients: they are needed only from the first backward to the update, sampling can have the memory."""
        for param, t in zip(self.params, self.fp32):
            param.grad = t.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything the next update depends on, beside the gradients and the 32-bit weights, under flat names.

        `step`, `exp_avg.NAME`, `exp_avg_sq.NAME`, and `master.NAME` for each parameter below 32 bits. These are the live
        tensors, not copies (a copy of all would not fit): write them before the next update.
        """
        moments = self.adamw.state
        tensors = {f"{m}.{name}": moments[t][m] for m in MOMENTS for name, t in zip(self.names, self.fp32)}
        tensors |= {f"master.{n}": t for n, p, t in zip(self.names, self.params, self.fp32) if t is not p}
        return tensors | {"step": moments[self.fp32[0]]["step"]}  # all parameters are always updated together

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Puts back what state() gave, to the bit, and the weights that are roundings of a master. The 32-bit weights are
        the caller's to load. Raises ValueError, with nothing changed, naming missing, extra and misshapen tensors."""
        mine = self.state()
        shape = {name: f"{tuple(t.shape)} {t.dtype}" for name, t in state.items()}
        wrong = {"missing": [name for name in mine if name not in state],
                 "not known here": [name for name in state if name not in mine],
                 "of another shape or dtype": [
                     f"{name} {shape[name]}, here {tuple(t.shape)} {t.dtype}" for name, t in mine.items()
                     if name in state and shape[name] != f"{tuple(t.shape)} {t.dtype}"]}
        if any(wrong.values()):
            raise ValueError("this optimiser state is of another model, lora_rank or dtype: " + "; ".join(
                f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
                for what, names in wrong.items() if names))
        for name, t in mine.items():
            t.copy_(state[name])
        for t in self.fp32:  # torch keeps one counter a tensor
            self.adamw.state[t]["step"].copy_(state["step"])
        self._round()

    def _round(self) -> None:
        """Weights below 32 bits := their masters, in place: CUDA graphs and tied layers hold these very addresses."""
        if self.low:
            torch._foreach_copy_([p for p, _ in self.low], [m for _, m in self.low])


def _accumulate(master: Tensor, param: nn.Parameter) -> None:
    """master.grad += param.grad in fp32, and param.grad is freed; autograd calls it at once for each gradient it made, so
    of all the 16-bit gradients only one is in memory at a time."""
    if param.grad is None:
        return
    if master.grad is None:
        master.grad = param.grad.detach().float()
    else:
        master.grad.add_(param.grad.detach())  # fp32 += bf16 is added in fp32
    param.grad = None


def learning_rate(step: int, *, lr: float, warmup_steps: int, steps: int, schedule: str = "constant",
                  min_ratio: float = 0.0) -> float:
    """The learning rate of update `step` (counted from 0) of `steps`; "constant", "cosine" or "linear" after the warm-up.

    A function of the step and of nothing else: a scheduler object counts its own calls and so starts again, warm-up
    included, in a resumed run that forgets to restore it. Warm-up rises as lr * (step + 1) / warmup_steps: its first update
    moves (many libraries begin at 0 and waste it) and its last has the whole lr. After it the rate falls from lr towards
    min_ratio * lr, which update number `steps` would be the first to have. Raises ValueError on any other schedule.
    """
    done = min(1.0, max(0.0, (step - warmup_steps) / max(1, steps - warmup_steps)))  # share of the decay behind us
    left = {"constant": 1.0, "cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "linear": 1.0 - done}
    if schedule not in left:
        raise ValueError(f"schedule {schedule!r} is not known: use one of {', '.join(left)}")
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return lr if schedule == "constant" else lr * (min_ratio + (1.0 - min_ratio) * left[schedule])
