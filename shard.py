"""One model over several processes: each has a part of every weight, gradient and moment (key `shard`).

    copy = shard.hollow(model, dtype)                   # a plain model without weights
    shard.spread(model, dtype=dtype, device="cpu")      # in place; every rank must call all of these
    with shard.gathered(copy, model): Sampler(copy).generate(..)
    optimizer = shard.AdamW(model.named_parameters(), lr=1e-6, dtype=dtype)

It is torch's FSDP2 (arXiv:2304.11277), a layer a unit, and embedding, last norm and head another: a unit's
weights are gathered when it computes, in forward and backward, and freed after; its gradients are added over
ranks, and each rank keeps those of its own rows. What is trained is held in fp32 and gathered in the run's
dtype: weight, gradient and moments are 16 bytes a parameter, divided by the ranks.

Three things follow. Ranks go in step: one that has fewer micro-batches makes empty ones (`rounds`). Sampling
would gather every layer for every token, so it has all weights, once a step, in a plain model that is hollow
in between. And a checkpoint is whole, with the names and numbers of a run that is not sharded, so that a run
goes on with any number of processes. LoRA's adapters are small: every rank has them whole, as it has without.
"""

import copy as copying
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
import optim
import ranks
from cache import free_bytes


# ------------------------------------------------------------------------------------------ the model
def hollow(model, dtype):
    """A plain copy of the model without weights, which `fill` and `empty` put in and take out.

    To be made before `spread`. LoRA's adapters are the model's own, and so always up to date.
    """
    adapted, known = lora.layers(model), {}
    for name, param in model.named_parameters():
        shell = nn.Parameter(torch.empty(param.shape, dtype=dtype, device="meta"), requires_grad=False)
        known[id(param)] = param if lora.is_adapter(name, adapted) else shell
    return copying.deepcopy(model, known)


def spread(model, *, dtype, device: str):
    """Spreads a model that is on the CPU, and the same on every rank, over the ranks, in place.

    Weights that are trained become fp32 and are gathered in `dtype`; frozen ones stay as they are.
    """
    # Imported here, because most runs are not sharded and it takes a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    adapted, apart, policy = lora.layers(model), set(), MixedPrecisionPolicy()
    for name, param in model.named_parameters():
        if lora.is_adapter(name, adapted):
            param.data = param.data.to(device)
            apart.add(param)
        elif param.requires_grad:
            param.data = param.data.float()
    if not apart and dtype != torch.float32 and model.embed.requires_grad:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    model.computes_in = dtype
    mesh = ranks.collective(init_device_mesh, torch.device(device).type, (ranks.world(),))
    for unit in units(model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=apart)
    add_gradients(model, divisor=1.0)


def units(model) -> tuple:
    """What is gathered at once. The root is last, and has what no layer has."""
    return (*model.blocks, model)


def add_gradients(model, divisor: float):
    """A backward adds the ranks' gradients and divides the sum by this.

    1 where each rank computes rows of its own; their number where all compute the same rows.
    """
    for unit in units(model):
        unit.set_gradient_divide_factor(divisor)
        unit.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it adds


def is_spread(model) -> bool:
    """Whether it has gone through `spread`."""
    return hasattr(model, "unshard")


def free(*models):
    """Gives back what a forward without a backward leaves gathered: embedding, last norm and head."""
    for model in models:
        if model is not None and is_spread(model):
            model.reshard()


# ------------------------------------------------------------------------------------------ in step
def rounds(batches, model, nothing, reference=None) -> Iterator:
    """The micro-batches of this rank, and `nothing` as often as another rank has more of them.

    At the end nothing of the models stays gathered: it would be computed with after an update, too.
    """
    batches = list(batches)
    most = len(batches)
    if is_spread(model):
        most = max(ranks.gather(len(batches)))
    yield from batches
    for _ in range(most - len(batches)):
        yield nothing
    free(model, reference)


def learn_nothing(model):
    """A forward and backward that other ranks need of us: gradients of exactly 0 for all that is trained."""
    hidden, _ = model.completion_hidden(*NOTHING)
    loss = 0.0 * (hidden.sum() + F.linear(hidden, model.head).sum())
    with agreed(model):
        pass  # whether the others' losses are finite
    loss.backward()


# Prompts and completions of an empty micro-batch: one token that predicts another.
NOTHING = ([[0]], [[[0]]])


@contextmanager
def agreed(model):
    """ranks.together inside of a pass that goes in step, where an error on one rank must end it on all."""
    if not is_spread(model):
        yield
        return
    with ranks.together():
        yield


@contextmanager
def in_step(model):
    """Around passes of a spread model. RankLost where a rank is gone in one.

    Any other error that not all ranks have would leave the others in a pass that never ends. So this process
    says it and ends, and that they notice.
    """
    if not is_spread(model):
        yield
        return
    try:
        yield
    except Exception as error:
        if getattr(error, "on_all_ranks", False) or isinstance(error, ranks.RankLost):
            raise
        if ranks.is_of_network(error):
            raise ranks.RankLost(ranks.LOST) from error
        traceback.print_exc()
        print(f"rank {ranks.rank()}: {error}", file=sys.stderr)
        ranks.leave(f"rank {ranks.rank()}: {type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------ whole weights
def whole(tensor) -> Tensor:
    """All rows of a spread tensor, on every rank; any other as it is. RankLost where a rank is gone."""
    if not is_part(tensor):
        return tensor
    return ranks.collective(tensor.full_tensor)


def on_first(tensors: dict) -> dict:
    """Whole tensors on rank 0's CPU, one gathered at a time; {} on the others. Every rank must call it."""
    found = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor)
        if ranks.rank() == 0:
            found[name] = tensor.cpu()
    return found


@torch.no_grad()
def fill(copy, model, for_save: bool = False):
    """Gathers the weights of a spread model into its hollow copy, one at a time. Every rank must call it.

    for_save: only on rank 0, and into the CPU's memory.
    """
    free(model)  # of weights gathered before an update nothing may be left
    shells = dict(copy.named_parameters())
    for name, param in model.named_parameters():
        if not is_part(param):
            continue
        weight = whole(param.detach().to(shells[name].dtype))
        if not for_save:
            put(copy, name, weight)
        elif ranks.rank() == 0:
            put(copy, name, weight.cpu())


@torch.no_grad()
def empty(copy, model):
    """Drops the weights that `fill` put in."""
    for name, param in model.named_parameters():
        if is_part(param):
            put(copy, name, copy.get_parameter(name).to("meta"))


def is_part(tensor) -> bool:
    """Whether this process holds some rows of the tensor, and others the rest: a DTensor."""
    return hasattr(tensor, "full_tensor")


def ours(tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_part(tensor) else tensor


def put(copy, name: str, weight):
    """Puts a tensor in the place of the parameter of this name."""
    parent, _, child = name.rpartition(".")
    setattr(copy.get_submodule(parent), child, nn.Parameter(weight, requires_grad=False))


@contextmanager
def gathered(copy, model):
    """Inside, the hollow copy has the model's weights. Nothing to do where it is the model itself."""
    if copy is model:
        yield
        return
    fill(copy, model)
    try:
        yield
    finally:
        empty(copy, model)


def refuse_too_large(copy, device: str):
    """ValueError where the gathered weights have no room. Says what they take."""
    need = sum(param.nbytes for param in copy.parameters() if param.device.type == "meta")
    if device.startswith("cuda"):
        room = torch.cuda.mem_get_info(device)[0]
    else:
        whole_machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = min(free_bytes(torch.device("cpu")), whole_machine)
        room = available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if need > room:
        raise ValueError(
            f"shard = True gathers all weights for sampling, {need / 1e9:.3g} GB in each process, and "
            f"{room / 1e9:.3g} GB are free: take --dtype=bfloat16, or a smaller model"
        )
    ranks.say(f"sharded over {ranks.world()} processes; for sampling each gathers {need / 1e9:.3g} GB")


# ------------------------------------------------------------------------------------------ the optimiser
class AdamW(optim.AdamW):
    """optim.AdamW over this rank's rows of spread parameters, which are the fp32 masters themselves.

    dtype: the run's. Its state is that of optim.AdamW in that dtype, in tensors spread like the parameters.
    """

    summed = True

    def __init__(self, named_params, *, dtype, **options):
        self.spread = [(name, param) for name, param in named_params if param.requires_grad]
        self.dtype = dtype
        parts = [(name, nn.Parameter(param.detach().to_local())) for name, param in self.spread]
        super().__init__(parts, **options)

    def trained(self) -> int:
        return sum(param.numel() for _, param in self.spread)

    def grads(self) -> Iterator[Tensor]:
        for (_, param), part in zip(self.spread, self.params):
            if param.grad is not None:
                part.grad, param.grad = param.grad.to_local(), None
        yield from super().grads()

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Over the parts of all ranks."""
        square = super().grad_norm().double() ** 2
        ranks.sum_over_ranks([square])
        return square.sqrt().float()

    def non_finite(self) -> list[str]:
        """Of all ranks, so that all say the same."""
        everyones = {name for names in ranks.gather(super().non_finite()) for name in names}
        return [name for name in self.names if name in everyones]

    def zero_grad(self) -> None:
        super().zero_grad()
        for _, param in self.spread:
            param.grad = None

    def state(self) -> dict[str, Tensor]:
        tensors = {}
        for (name, param), part in zip(self.spread, self.params):
            for moment in optim.MOMENTS:
                tensors[f"{moment}.{name}"] = spread_like(param, self.adamw.state[part][moment])
            if self.dtype.itemsize < 4:
                tensors[f"master.{name}"] = param.detach()
        tensors["step"] = self.updates
        return tensors

    def whole_state(self) -> dict[str, Tensor]:
        tensors = {"step": torch.empty((), device="meta")}
        kinds = optim.MOMENTS if self.dtype.itemsize >= 4 else (*optim.MOMENTS, "master")
        for name, param in self.spread:
            for kind in kinds:
                tensors[f"{kind}.{name}"] = torch.empty(param.shape, dtype=torch.float32, device="meta")
        return tensors

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        optim.refuse_other_state(state, self.whole_state())
        for (name, _), part in zip(self.spread, self.params):
            for moment in optim.MOMENTS:
                self.adamw.state[part][moment].copy_(rows_of_ours(state[f"{moment}.{name}"]))
            self.adamw.state[part]["step"].copy_(state["step"])
            if self.dtype.itemsize < 4:
                part.copy_(rows_of_ours(state[f"master.{name}"]))
        self.updates.copy_(state["step"])


def spread_like(param, part: Tensor):
    """Our part of a tensor that is spread as `param` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part.detach(), param.device_mesh, param.placements, run_check=False, shape=param.shape,
        stride=param.stride(),
    )  # fmt: skip


def rows_of_ours(tensor: Tensor) -> Tensor:
    """This rank's rows of a whole tensor, perhaps none of a short one: FSDP cuts as torch.chunk does."""
    pieces = tensor.chunk(ranks.world())
    if ranks.rank() < len(pieces):
        return pieces[ranks.rank()]
    return tensor[:0]
