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

With bits=8 the moments of large tensors are held in 8 bits (blocks.py), 2 bytes a parameter for 8: of bf16's
18 bytes 12 remain. They are expanded a piece at a time, updated in fp32 and rounded again.

With offload=True masters and moments lie in the host's memory, pinned: of bf16's 18 bytes 6 remain on the
GPU. A piece at a time goes to the GPU, is updated there by the same kernel, and goes back, without a wait in
between: the same bits. Nothing goes while the backward runs, since clipping needs the norm of all gradients
before the first piece.

Papers: AdamW arXiv:1711.05101; mixed precision with master weights arXiv:1710.03740; 8 bits arXiv:2110.02861.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.adamw import adamw

import blocks

# torch's names of Adam's running means of grad and grad ** 2.
MOMENTS = ("exp_avg", "exp_avg_sq")
# Numbers in a piece of a gradient when its norm is taken, see grad_norm.
NORM_PIECE = 1 << 18

# Moments of 8 bits, as in bitsandbytes: numbers that share a scale, and the least that a tensor must have.
# Biases and norms are below it: they take no memory and are the most easily upset. Nor are they offloaded.
BLOCK = 256
LARGE = 4096
# Numbers updated at once: on a CPU what a cache holds, on a GPU so few that their fp32 moments are no memory.
PIECE = {"cpu": 1 << 16, "cuda": 1 << 24}


class AdamW:
    """AdamW over `named_params`, [(name, parameter)]; those with requires_grad=False are left out.

    bits: 32, or 8 for the moments of tensors with at least 4,096 numbers.
    offload: masters and moments of tensors with at least 4,096 numbers are in the host's memory.
    scaled: the loss is multiplied by `loss_scale` before its backward, for fp16 (LossScale).
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
        bits: int = 32,
        scaled: bool = False,
        offload: bool = False,
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
            if offload and mine and param.numel() >= LARGE:
                held = Offloaded(param)
            elif param.dtype.itemsize < 4 and mine:
                held = param.detach().float()
                self.low.append((param, held))
            elif param.dtype.itemsize < 4:
                held = GradientOnly()
            self.fp32.append(held)
        for param, master in zip(self.params, self.fp32):
            if master is param:
                continue
            # Of two optimisers on one tensor the first's hook would take every gradient, and the second
            # see none.
            if hasattr(param, "fp32_grad_hook"):
                param.fp32_grad_hook.remove()
            param.fp32_grad_hook = param.register_post_accumulate_grad_hook(partial(_accumulate, master))

        # Two groups, because torch has one weight decay a group.
        self.updated = [t for t, mine in zip(self.fp32, self.mine) if mine]
        self.bits = bits
        away = [t for t in self.updated if isinstance(t, Offloaded)]
        self.away = AdamWOffloaded(away, betas, eps, weight_decay, decay_from_dims)
        here = [t for t in self.updated if not isinstance(t, Offloaded)]
        large = [t for t in here if is_8_bit(t, bits)]
        self.eight = AdamW8bit(large, betas, eps, weight_decay, decay_from_dims)
        others = [t for t in here if not is_8_bit(t, bits)]
        decayed = [t for t in others if t.dim() >= decay_from_dims]
        plain = [t for t in others if t.dim() < decay_from_dims]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") for p in self.params)
        # torch refuses no group at all: a rank may own nothing where there are more ranks than parameters
        groups = groups or [{"params": [torch.zeros(0, requires_grad=True)], "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
        self.scale = LossScale() if scaled else None
        self.updates = torch.zeros(())  # how many there were: what torch counts for each parameter
        self._make_moments(fused)

    def _make_moments(self, fused: bool) -> None:
        """Adam's running means, all zero.

        Made now and not at the first update: a run that has no memory for them fails before it has sampled
        anything, and state() of a run at step 0 has the same tensors as at any other.
        """
        self.moments = {t: first_moments(t, self.bits, t.device) for t in self.updated}
        self.away.moments = {t: self.moments[t] for t in self.away.tensors}
        self.counters = []  # torch's, one a tensor
        for t, moments in self.moments.items():
            if isinstance(t, Offloaded):
                continue
            if is_8_bit(t, self.bits):
                self.eight.moments[t] = moments
                continue
            counter = torch.zeros((), dtype=torch.float32, device=t.device if fused else "cpu")
            self.counters.append(counter)
            self.adamw.state[t] = {"step": counter, **moments}

    def trained(self) -> int:
        """How many numbers are trained, over all ranks."""
        return sum(param.numel() for param in self.params)

    def masters(self) -> list[tuple[int, Tensor]]:
        """(number of the parameter, what is updated of it): of ours, where ranks share them."""
        self.away.wait()
        return [(i, updated_of(t)) for i, (t, mine) in enumerate(zip(self.fp32, self.mine)) if mine]

    @property
    def loss_scale(self) -> float:
        """What to multiply a loss by before its backward: a power of two, 1 where nothing is scaled."""
        return 1.0 if self.scale is None else float(self.scale.value)

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
        quietly turn the step into zeros. Where the loss is scaled the update is left out, the scale halved,
        and the norm returned as it is.
        """
        if self.scale is not None:
            for grad in self.grads():
                grad.div_(self.scale.value.to(grad.device))
        norm = self.grad_norm()
        if self.scale is not None and self.scale.overflows(norm):
            return norm
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
        self.eight.step(lr, int(self.updates))
        self.away.step(lr, int(self.updates))
        # torch's fused kernel does not count its writes. Counted, a backward through weights of before the
        # update is an error and not a wrong gradient, and lora.py sees that a merged weight is out of date.
        increment_version([updated_of(t) for t in self.updated])
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
        parameters, where ranks share them. Moments of 8 bits have a second tensor each, `exp_avg_absmax.NAME`
        and `exp_avg_sq_absmax.NAME`. These are the live tensors, not copies (a copy of all would not
        fit): write them before the next update.
        """
        tensors = {}
        for name, param, t, mine in zip(self.names, self.params, self.fp32, self.mine):
            if mine:
                for moment, tensor in self.moments[t].items():
                    tensors[f"{moment}.{name}"] = tensor
                if updated_of(t) is not param:
                    tensors[f"master.{name}"] = updated_of(t)
        tensors["step"] = self.updates
        self.away.wait()
        if self.scale is not None:
            tensors |= {"loss_scale": self.scale.value, "loss_scale_good": self.scale.good}
        return tensors

    def whole_state(self) -> dict[str, Tensor]:
        """What state() is where nothing is shared, on the device "meta": names, shapes, dtypes and bytes."""
        names = ["step"] if self.scale is None else ["step", "loss_scale", "loss_scale_good"]
        tensors = {name: torch.empty((), device="meta") for name in names}
        for name, param in zip(self.names, self.params):
            found = first_moments(param, self.bits, "meta")
            if param.dtype.itemsize < 4:
                found["master"] = torch.empty_like(param, dtype=torch.float32, device="meta")
            tensors |= {f"{kind}.{name}": tensor for kind, tensor in found.items()}
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
        for counter in self.counters:
            counter.copy_(state["step"])
        for name, param in zip(self.names, self.params):
            if param.dtype.itemsize < 4:  # in place: CUDA graphs hold these very addresses
                param.copy_(state[f"master.{name}"])

    def _round(self) -> None:
        """Our weights below 32 bits := their masters, in place: CUDA graphs hold these very addresses."""
        if self.low:
            torch._foreach_copy_([param for param, _ in self.low], [master for _, master in self.low])


class LossScale:
    """How much a loss is multiplied by, so that fp16's gradients neither vanish nor overflow.

    fp16 has no number below 6e-8, and most gradients of a model are. As torch.amp.GradScaler has it: halved
    when a gradient overflows, and that update is left out; doubled after 2,000 updates without
    (arXiv:1710.03740). A power of two, so that multiplying and dividing round nothing.
    """

    FIRST, PATIENCE = 65_536.0, 2000

    def __init__(self):
        self.value = torch.tensor(self.FIRST)
        self.good = torch.zeros(())  # updates since it was changed

    def overflows(self, norm: Tensor) -> bool:
        """Whether a gradient of this norm has overflowed; the scale follows.

        FloatingPointError where a loss that is not scaled up at all still overflows.
        """
        if torch.isfinite(norm):
            self.good += 1
            if self.good >= self.PATIENCE:
                self.value *= 2
                self.good.zero_()
            return False
        if self.value <= 1:
            raise FloatingPointError(
                f"the gradient norm is {norm.item()} in fp16 and the loss is not scaled up any more: "
                "fp16 is too narrow for this model, use --dtype=float32, or bfloat16 where there is one"
            )
        self.value /= 2
        self.good.zero_()
        return True


def updated_of(t) -> Tensor:
    """The fp32 tensor that is updated, of an entry of AdamW.fp32."""
    return t.updated if isinstance(t, Offloaded) else t


def is_8_bit(t: Tensor, bits: int) -> bool:
    """Whether the moments of a parameter, or of its master, are held in 8 bits."""
    return bits == 8 and t.numel() >= LARGE and t.dtype.itemsize <= 4


def first_moments(t: Tensor, bits: int, device) -> dict[str, Tensor]:
    """A parameter's moments before the first update: all zero. 8 bits: numbers uint8, and fp32 a block."""
    if isinstance(t, Offloaded):
        return {moment: t.on_host(torch.zeros(t.param.shape, dtype=torch.float32)) for moment in MOMENTS}
    if not is_8_bit(t, bits):
        wide = torch.promote_types(t.dtype, torch.float32)
        return {moment: torch.zeros_like(t, dtype=wide, device=device) for moment in MOMENTS}
    found = {}
    for moment in MOMENTS:
        found[moment] = torch.zeros(t.shape, dtype=torch.uint8, device=device)
        found[f"{moment}_absmax"] = torch.zeros(-(-t.numel() // BLOCK), device=device)
    return found


class AdamW8bit:
    """AdamW's update of fp32 tensors whose moments are held in 8 bits, blocks of 256 (arXiv:2110.02861).

    moments: tensor -> first_moments. The first moment is signed, the second not. Both are what bitsandbytes
    holds, to the rounding of a number, but for one thing: a second moment that is not 0 never becomes 0. A
    gradient of 1/2,000 of its block's largest would have such a one, its first moment would be divided by eps
    alone at the next update, and the weight would jump.
    """

    def __init__(self, tensors, betas, eps, weight_decay, decay_from_dims):
        self.tensors, self.betas, self.eps = tensors, betas, eps
        self.decay = [weight_decay if t.dim() >= decay_from_dims else 0.0 for t in tensors]
        self.moments: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float, number: int):
        """Update `number`, counted from 1. Every tensor has a gradient."""
        for t, decay in zip(self.tensors, self.decay):
            size = PIECE.get(t.device.type, PIECE["cuda"])
            moments = [x.view(-1) for x in self.moments[t].values()]
            # Views of the live tensors: what is written into a piece is written into them.
            pieces = [x.split(size if len(x) == t.numel() else size // BLOCK) for x in moments]
            weight, grad = t.detach().view(-1), t.grad.reshape(-1)
            for w, g, m, m_absmax, v, v_absmax in zip(weight.split(size), grad.split(size), *pieces):
                mean = blocks.expand(m, m_absmax, blocks.dynamic_map(True, t.device), BLOCK)
                square = blocks.expand(v, v_absmax, blocks.dynamic_map(False, t.device), BLOCK)
                self.update(w, g, mean, square, lr, number, decay)
                keep(mean, m, m_absmax, signed=True)
                keep(square, v, v_absmax, signed=False)

    def update(self, w, g, mean, square, lr, number, decay):
        """Moves moments and weights (n,), all fp32, in place by the gradient g."""
        beta1, beta2 = self.betas
        mean.mul_(beta1).add_(g, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        deviation = (square.sqrt() / math.sqrt(1 - beta2**number)).add_(self.eps)
        w.mul_(1 - lr * decay)
        w.addcdiv_(mean, deviation, value=-lr / (1 - beta1**number))


def keep(moment: Tensor, numbers: Tensor, absmax: Tensor, signed: bool):
    """Writes an fp32 moment (n,) into its 8 bits and their scales."""
    found, scales = blocks.quantise(moment, BLOCK, signed)
    if not signed:
        found += (found == 0) & (moment > 0)
    numbers.copy_(found)
    absmax.copy_(scales)


class Offloaded:
    """Stands for what is updated of a parameter with its state in the host's memory: its gradient is here.

    updated: the fp32 master, in the host's memory; of a parameter of 32 bits itself, on its device.
    """

    grad: Tensor | None = None
    device = torch.device("cpu")

    def __init__(self, param: nn.Parameter):
        self.param = param
        self.updated = param if param.dtype.itemsize == 4 else self.on_host(param.detach().float())

    def on_host(self, tensor: Tensor) -> Tensor:
        """Pinned where the parameter is on a GPU: only from and to there a copy waits for nobody."""
        tensor = tensor.to("cpu", copy=True)
        return tensor.pin_memory() if self.param.device.type == "cuda" else tensor

    def dim(self) -> int:
        return self.param.dim()


class AdamWOffloaded:
    """AdamW's update of Offloaded tensors: a piece at a time on the parameter's device, by torch's kernel.

    All is queued on the current stream, so that a piece is back before its memory is taken again.
    """

    def __init__(self, tensors: list[Offloaded], betas, eps, weight_decay, decay_from_dims):
        self.tensors, self.betas, self.eps = tensors, betas, eps
        self.decay = [weight_decay if t.dim() >= decay_from_dims else 0.0 for t in tensors]
        self.moments: dict[Offloaded, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float, number: int):
        """Update `number`, counted from 1. Every tensor has a gradient."""
        for t, decay in zip(self.tensors, self.decay):
            held = [t.updated, *self.moments[t].values(), t.param]
            pieces = [x.detach().view(-1).split(PIECE["cuda"]) for x in held]
            for grad, *state in zip(t.grad.reshape(-1).split(PIECE["cuda"]), *pieces):
                self.update(grad, *state, lr, number, decay)

    def update(self, grad, updated, mean, square, param, lr, number, decay):
        """Moves a piece (n,) of state and parameter by its gradient. All fp32 but param, which is rounded."""
        device = grad.device
        here = [x.to(device, copy=True, non_blocking=True) for x in (updated, mean, square)]
        count = torch.full((), number - 1.0, device=device)  # the kernel counts it up
        beta1, beta2 = self.betas
        adamw(
            [here[0]], [grad], [here[1]], [here[2]], [], [count], fused=True, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=lr, weight_decay=decay, eps=self.eps, maximize=False,
        )  # fmt: skip
        for x, moved in zip((updated, mean, square), here):
            x.copy_(moved, non_blocking=True)
        if param.dtype != updated.dtype:
            param.copy_(here[0])

    def wait(self):
        """Until what has been moved is in the host's memory, and can be read there."""
        if any(t.param.device.type == "cuda" for t in self.tensors):
            torch.cuda.synchronize()


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
        raise ValueError(
            "this optimiser state is of another model, lora_rank, dtype or optimizer_bits: " + "; ".join(told)
        )


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
