"""AdamW for training in bf16 without losing the small steps of RL, and the learning rate of a step.

Two roundings make RL in plain bf16 stand still, silently. A bf16 number keeps 8 bits, so a weight of
0.02 has its next neighbour 1.2e-4 away: an update of lr 1e-6 is rounded back to where it was, at every
step. And a sum of 16 micro-batches kept in bf16 drops whatever is below 1/256 of the sum so far. So here
every parameter below 32 bits has

    master  fp32   the weight that is updated; the model's own is its rounding, written in place afterwards
    grad    fp32   the sum over micro-batches; each bf16 gradient is added and freed as backward makes it

and parameters of 32 bits are updated where they are. The arithmetic is torch.optim.AdamW's fused kernel: one
pass over memory, and better tested than ours would be. Bytes a parameter: fp32 16 (weight, grad, two
moments), bf16 18 (and master).

    opt = AdamW(list(model.named_parameters()), lr=1e-6)
    for micro_batch in step: loss(micro_batch).backward()
    all_reduce(opt.grads())                                 # only with several ranks
    norm = opt.step(lr, max_norm=1.0); opt.zero_grad()

Several ranks may share the moments and masters (ZeRO-1, arXiv:1910.02054): each then keeps and updates those
of its own parameters alone, 12 of bf16's 18 bytes divided by the ranks, and gets the rest of the weights
from their owners after each step. Same arithmetic, same bits.

Papers: AdamW arXiv:1711.05101; mixed precision with master weights arXiv:1710.03740.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

# torch's names of Adam's running means of grad and grad ** 2.
MOMENTS = ("exp_avg", "exp_avg_sq")
# Numbers in a piece of a gradient when its norm is taken, see grad_norm.
NORM_PIECE = 1 << 18


class AdamW:
    """AdamW over `named_params`, [(name, parameter)]; those with requires_grad=False are left out.

    owners: the rank that updates each of the trained parameters, and `rank`, who we are; None: all are ours.
    weight_decay: decoupled (w -= lr * weight_decay * w), on tensors of at least `decay_from_dims` dims.
    Pulling norm gains and biases to zero changes the scale of whole layers and regularises nothing.

    Raises ValueError when nothing is trainable, or when one name or one tensor is listed twice.
    """

    summed = False  # whether backward itself adds gradients over ranks (shard.py)

    def __init__(
        self,
        named_params: list[tuple[str, nn.Parameter]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_from_dims: int = 2,
        owners: list[int] | None = None,
        rank: int = 0,
    ):
        trainable = [(name, param) for name, param in named_params if param.requires_grad]
        refuse_nothing_and_twice(trainable)
        self.names = [name for name, _ in trainable]
        self.params = [param for _, param in trainable]

        self.owners = owners
        self.mine = [owners is None or owners[i] == rank for i in range(len(self.params))]

        # fp32[i] is what AdamW updates, and where the gradient gathers: params[i] itself, or its master copy
        # where params[i] has fewer than 32 bits. Of another rank's parameter we gather the gradient alone.
        self.fp32 = []
        self.low = []  # (parameter, its master) of ours
        for param, mine in zip(self.params, self.mine):
            held = param
            if param.dtype.itemsize < 4 and mine:
                held = param.detach().float()
                self.low.append((param, held))
            elif param.dtype.itemsize < 4:
                held = GradientOnly()
            self.fp32.append(held)
        for param, master in zip(self.params, self.fp32):
            if master is param:
                continue
            # Of two optimisers on one tensor the first's hook would take every
            # gradient and the second see none.
            if hasattr(param, "fp32_grad_hook"):
                param.fp32_grad_hook.remove()
            param.fp32_grad_hook = param.register_post_accumulate_grad_hook(partial(_accumulate, master))

        # Two groups, because torch has one weight decay a group.
        self.updated = [t for t, mine in zip(self.fp32, self.mine) if mine]
        decayed = [t for t in self.updated if t.dim() >= decay_from_dims]
        plain = [t for t in self.updated if t.dim() < decay_from_dims]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") for p in self.params)
        # torch refuses no group at all: a rank may own nothing where there are more ranks than parameters
        groups = groups or [{"params": [torch.zeros(0, requires_grad=True)], "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
        self.updates = torch.zeros(())  # how many there were: what torch counts for each parameter
        self._make_moments(fused)

    def _make_moments(self, fused: bool) -> None:
        """Adam's running means, all zero.

        Made now and not at the first update: a run that has no memory for them fails before it has sampled
        anything, and state() of a run at step 0 has the same tensors as at any other.
        """
        for t in self.updated:
            counter = torch.zeros((), dtype=torch.float32, device=t.device if fused else "cpu")
            moments = {moment: torch.zeros_like(t) for moment in MOMENTS}
            self.adamw.state[t] = {"step": counter, **moments}

    def trained(self) -> int:
        """How many numbers are trained, over all ranks."""
        return sum(param.numel() for param in self.params)

    def masters(self) -> list[tuple[int, Tensor]]:
        """(number of the parameter, what is updated of it): of ours, where ranks share them."""
        return [(i, t) for i, (t, mine) in enumerate(zip(self.fp32, self.mine)) if mine]

    def grads(self) -> Iterator[Tensor]:
        """The fp32 gradient of every parameter, in the order given, to be changed in place (all-reduce).

        A parameter that backward has not reached gets zeros, never None. A rank whose rows all had zero
        advantage would otherwise enter fewer all-reduces than the others, and the run would hang. Its
        moments decay as they would have with the zero gradient that backward would have made, so
        skipping such rows changes no bit.
        """
        for param, t in zip(self.params, self.fp32):
            if t is not param:
                _accumulate(t, param)  # a gradient that was assigned by hand: no hook has seen it
            if t.grad is None:
                t.grad = torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
            yield t.grad

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """L2 norm over all gradients together, fp32, 0-d.

        It is taken of pieces of 2**18 numbers: one running fp32 sum over a whole embedding (136M numbers)
        loses 1.6 % of the norm on a CPU, pieces lose 1e-6 in the same time.
        """
        pieces = []
        for grad in self.grads():
            pieces.extend(grad.reshape(-1).split(NORM_PIECE))
        return get_total_norm(pieces)

    @torch.no_grad()
    def step(self, lr: float, max_norm: float | None = None) -> Tensor:
        """One update with exactly this `lr`: log this number. Returns the norm before clipping, 0-d.

        Gradients are scaled by min(1, max_norm / (norm + 1e-6)), as
        torch.nn.utils.clip_grad_norm_ does; None or 0: never.

        Raises FloatingPointError, with weights, moments and gradients untouched, if the norm is not
        finite. One NaN would stay in the moments for ever, and clipping by an infinite norm would
        quietly turn the step into zeros.
        """
        norm = self.grad_norm()
        # The one wait for the device in an update.
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {norm.item()}, no update was made; "
                f"non-finite gradients in: {self._non_finite()}"
            )
        if max_norm:  # with the norm that is known already: torch's clip_grad_norm_ would take it again
            clip_grads_with_norm_(self.updated, max_norm, norm)
        # No scheduler object: its state would have to be saved, and restored, beside everything else.
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.updates += 1
        # torch's fused kernel does not count its writes. Counted, a backward through weights of before the
        # update is an error and not a wrong gradient, and lora.py sees that a merged weight is out of date.
        increment_version(self.updated)
        self._round()
        return norm

    def non_finite(self) -> list[str]:
        """Names of all parameters with a NaN or an infinity in their gradient."""
        return [name for name, grad in zip(self.names, self.grads()) if not torch.isfinite(grad).all()]

    def _non_finite(self) -> str:
        """The first names of parameters with a NaN or an infinity in their gradient."""
        bad = self.non_finite()
        if not bad:
            return "none, their squares overflow"
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        return ", ".join(bad[:4]) + more

    def zero_grad(self) -> None:
        """Frees the gradients: sampling can have their memory, from the update to the next backward."""
        for param, t in zip(self.params, self.fp32):
            param.grad = None
            t.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything the next update depends on, beside gradients and 32-bit weights, under flat names.

        `step`, `exp_avg.NAME`, `exp_avg_sq.NAME`, and `master.NAME` for each parameter below 32 bits; of our
        parameters, where ranks share them. These are the live tensors, not copies (a copy of all would not
        fit): write them before the next update.
        """
        tensors = {}
        for name, param, t, mine in zip(self.names, self.params, self.fp32, self.mine):
            if mine:
                for moment in MOMENTS:
                    tensors[f"{moment}.{name}"] = self.adamw.state[t][moment]
                if t is not param:
                    tensors[f"master.{name}"] = t
        tensors["step"] = self.updates
        return tensors

    def whole_state(self) -> dict[str, Tensor]:
        """What state() is where nothing is shared, on the device "meta": names, shapes, dtypes and bytes."""
        tensors = {"step": torch.empty((), device="meta")}
        for name, param in zip(self.names, self.params):
            kinds = MOMENTS if param.dtype.itemsize >= 4 else (*MOMENTS, "master")
            wide = torch.promote_types(param.dtype, torch.float32)
            tensors |= {
                f"{kind}.{name}": torch.empty_like(param, dtype=wide, device="meta") for kind in kinds
            }
        return tensors

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Puts back what state() gave, to the bit, and the weights that are roundings of a master.

        state is whole, whoever owns what: a run may be resumed on another number of ranks. The 32-bit weights
        are the caller's to load. Raises ValueError, with nothing changed, naming missing, extra and misshapen
        tensors.
        """
        # Copied into the live tensors, so that CUDA graphs and torch's own state keep their addresses.
        refuse_other_state(state, self.whole_state())
        for name, t in self.state().items():
            t.copy_(state[name])
        for t in self.updated:
            self.adamw.state[t]["step"].copy_(state["step"])
        for name, param in zip(self.names, self.params):
            if param.dtype.itemsize < 4:  # in place: CUDA graphs hold these very addresses
                param.copy_(state[f"master.{name}"])

    def _round(self) -> None:
        """Our weights below 32 bits := their masters, in place: CUDA graphs hold these very addresses."""
        if self.low:
            torch._foreach_copy_([param for param, _ in self.low], [master for _, master in self.low])


class GradientOnly:
    """Stands for the master of a parameter that another rank updates: its gradient gathers here, in fp32."""

    grad: Tensor | None = None


def _accumulate(master, param: nn.Parameter) -> None:
    """master.grad += param.grad in fp32, and param.grad is freed.

    autograd calls it at once for each gradient it made, so of all the 16-bit gradients
    only one is in memory at a time.
    """
    if param.grad is None:
        return
    if master.grad is None:
        master.grad = param.grad.detach().float()
    else:
        master.grad.add_(param.grad.detach())  # fp32 += bf16 is added in fp32
    param.grad = None


def refuse_nothing_and_twice(trainable: list[tuple[str, nn.Parameter]]) -> None:
    """Raises ValueError for no parameter at all, and for one name or one tensor that is listed twice."""
    if not trainable:
        raise ValueError(
            "nothing to train: no parameter has requires_grad=True; "
            "switch the adapters on (lora_rank > 0) or train the whole model (lora_rank = 0)"
        )
    names = {name for name, _ in trainable}
    tensors = {id(param) for _, param in trainable}
    # A tied weight listed under two names would be updated twice a step, each time with the whole gradient.
    if len(names) < len(trainable) or len(tensors) < len(trainable):
        raise ValueError(
            "a name or a parameter is listed twice: a tied weight must be given once "
            "(nn.Module.named_parameters() does so)"
        )


def refuse_other_state(state: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    """Raises ValueError, naming what differs, unless both have the same names, shapes and dtypes."""

    def kind(t):
        return f"{tuple(t.shape)} {t.dtype}"

    missing = [name for name in mine if name not in state]
    unknown = [name for name in state if name not in mine]
    misshapen = []
    for name, t in mine.items():
        if name in state and kind(state[name]) != kind(t):
            misshapen.append(f"{name} {kind(state[name])}, here {kind(t)}")
    wrong = {"missing": missing, "not known here": unknown, "of another shape or dtype": misshapen}
    told = []
    for what, names in wrong.items():
        if names:
            more = ", ..." if len(names) > 4 else ""
            told.append(f"{len(names)} {what} ({', '.join(names[:4])}{more})")
    if told:
        raise ValueError("this optimiser state is of another model, lora_rank or dtype: " + "; ".join(told))


def learning_rate(
    step: int,
    *,
    lr: float,
    warmup_steps: int,
    steps: int,
    schedule: str = "constant",
    min_ratio: float = 0.0,
) -> float:
    """The learning rate of update `step`, counted from 0, of `steps`.

    schedule: "constant", "cosine" or "linear" after the warm-up. A function of the step and of nothing
    else: a scheduler object counts its own calls and so starts again, warm-up included, in a resumed
    run that forgets to restore it. Warm-up rises as lr * (step + 1) / warmup_steps: its first update
    moves (many libraries begin at 0 and waste it) and its last has the whole lr. After it the rate
    falls from lr towards min_ratio * lr, which update number `steps` would be the first to have. Raises
    ValueError on any other schedule.
    """
    decay_steps = max(1, steps - warmup_steps)
    done = min(1.0, max(0.0, (step - warmup_steps) / decay_steps))  # share of the decay behind us
    left = {"constant": 1.0, "cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "linear": 1.0 - done}
    if schedule not in left:
        raise ValueError(f"schedule {schedule!r} is not known: use one of {', '.join(left)}")
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    return lr * (min_ratio + (1.0 - min_ratio) * left[schedule])
