"""The processes of a run: which one this is, how many there are, and what they tell each other.

    torchrun --nproc_per_node=4 train.py configs/gsm8k.py        # four ranks; without torchrun there is one

Every rank holds the whole model and takes a share of each step's prompts. Gradients are summed over ranks
(train.py), and everything that a step decides (advantages, divisors, metrics) is made from values gathered
from all of them. An error on one rank is raised on all (`together`), so that all stop at the same point with
the same sentence, which rank 0 says once.
"""

import json
import os
import pickle
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist


def start(device: str) -> str:
    """Joins the other processes where torchrun started this one. Returns the device of this rank.

    RankLost where one of them is gone before all have met.
    """
    if "LOCAL_RANK" not in os.environ:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RankLost(f"the processes of this run have not met ({reason}): start it again") from error
    return device


class RankLost(Exception):
    """Another process of this run is gone, so nothing can be gathered any more."""


def end(status: int):
    """Ends the process, when all is written.

    One of several leaves without the destructors of torch's threads: gloo's aborted one run in ten after its
    last line, and torchrun then called the run failed (torch 2.13, two cores).
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """The value of every rank, in rank order. Every rank must call it."""
    if world() == 1:
        return [value]
    values = [None] * world()
    collective(dist.all_gather_object, values, value)
    return values


# Numbers that go over the wire in one call: 64 MB in fp32.
BUCKET = 1 << 24


def sum_over_ranks(tensors):
    """Adds each tensor over all ranks, in place: in buckets, one call for many small ones."""
    if world() == 1:
        return
    for bucket in in_buckets(tensors):
        if len(bucket) == 1:
            collective(dist.all_reduce, bucket[0])
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        collective(dist.all_reduce, flat)
        take_apart(flat, bucket)


def in_buckets(tensors):
    """Lists of neighbours of one dtype, of BUCKET numbers or one tensor at most: the same on every rank."""
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def take_apart(flat, tensors):
    """The numbers of a bucket back into its tensors, in place."""
    pieces = flat.split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces):
        tensor.copy_(piece.view_as(tensor))


# ------------------------------------------------------------------------- an optimiser that ranks share
def share_out(tensors) -> list[int]:
    """A rank for each tensor: each goes to the rank that has the fewest numbers yet, the largest first."""
    owners, held = [0] * len(tensors), [0] * world()
    for i in sorted(range(len(tensors)), key=lambda i: -tensors[i].numel()):
        owners[i] = held.index(min(held))
        held[owners[i]] += tensors[i].numel()
    return owners


@torch.no_grad()
def take_from_owners(tensors, owners: list[int] | None):
    """Gives every rank the numbers of each tensor's owner, in place. None: they are everybody's already."""
    if owners is None:
        return
    for owner in range(world()):
        owned = [tensor for tensor, of in zip(tensors, owners) if of == owner]
        for bucket in in_buckets(owned):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            collective(dist.broadcast, flat, owner)
            if rank() != owner:
                take_apart(flat, bucket)


def gather_to_first(tensors: dict) -> dict:
    """All ranks' tensors in one dict on rank 0, those of others on the CPU; {} on the others.

    Names are of one rank each, except those that all have. Every rank must call it.
    """
    whole = {}
    kinds = gather({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    for owner, known in enumerate(kinds):
        for name, (shape, dtype) in known.items():
            if name in kinds[0] and owner:
                continue  # rank 0 has it
            tensor = tensors.get(name)
            if owner:
                tensor = one_to_first(tensor, owner, shape, dtype, next(iter(tensors.values())).device)
            if rank() == 0:
                whole[name] = tensor
    return whole


def one_to_first(tensor, owner: int, shape, dtype, device):
    """A tensor of `owner`, on rank 0's CPU; None on the others."""
    if rank() == owner:
        collective(dist.send, tensor.contiguous(), 0)
    elif rank() == 0:
        room = torch.empty(shape, dtype=dtype, device=device)
        collective(dist.recv, room, owner)
        return room.cpu()
    return None


def share_from_first(tensors):
    """Gives every rank the numbers of rank 0, in place."""
    if world() > 1:
        for tensor in tensors:
            collective(dist.broadcast, tensor, 0)


LOST = "a process of this run has died; what it said, if it had time to, is above"


def collective(function, *arguments):
    """A call that needs all ranks. RankLost where one of them is gone."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        raise RankLost(LOST) from error


def is_of_network(error: Exception) -> bool:
    """Whether an error from inside of a pass is that another process could not be reached."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "NCCL")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextmanager
def together():
    """An error inside, on any rank, is raised on every rank at the end of the block.

    Otherwise the others would wait for one that has left, and die of that without knowing why. Inside must be
    no collective call. Every rank must enter.
    """
    error = None
    try:
        yield
    except Exception as e:
        if world() == 1:
            raise
        error = e
    errors = [e for e in gather(portable(error)) if e is not None]
    if error is None and not errors:
        return
    error = error or errors[0]
    error.on_all_ranks = True
    raise error


def leave(sentence: str):
    """Ends the process with status 1; rank 0 says why. Also before `start`, by torchrun's own number."""
    first = rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"
    tell_launcher(sentence)
    if first:
        print(sentence, file=sys.stderr)
    end(1)


def tell_launcher(sentence: str):
    """torchrun ends a failed run with a page of its own, which hides the sentence: it is said there too."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        about = dict(message=sentence, extraInfo=dict(py_callstack=sentence, timestamp=str(int(time.time()))))
        with open(path, "w") as file:
            json.dump(dict(message=about), file)


def portable(error):
    """The error as it can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def say(*words):
    """print, once: on rank 0."""
    if rank() == 0:
        print(*words, flush=True)
