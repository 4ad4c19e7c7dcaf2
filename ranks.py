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
    """Joins the other processes where torchrun started this one. Returns the device of this rank."""
    if "LOCAL_RANK" not in os.environ:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


class RankLost(Exception):
    """Another process of this run is gone, so nothing can be gathered any more."""

    seen = False


def finish():
    """Takes leave of the other processes. One that simply exits can abort while a peer still talks to it."""
    if dist.is_initialized() and not RankLost.seen:  # of one that is gone there is no leave to take
        dist.destroy_process_group()


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


def sum_over_ranks(tensors):
    """Adds each tensor over all ranks, in place."""
    if world() > 1:
        for tensor in tensors:
            collective(dist.all_reduce, tensor)


def share_from_first(tensors):
    """Gives every rank the numbers of rank 0, in place."""
    if world() > 1:
        for tensor in tensors:
            collective(dist.broadcast, tensor, 0)


def collective(function, *arguments):
    """A call that needs all ranks. RankLost where one of them is gone."""
    try:
        function(*arguments)
    except RuntimeError as error:
        RankLost.seen = True
        raise RankLost("a process of this run has died; what it said, if it had time to, is above") from error


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
    if error is not None:
        raise error
    if errors:
        raise errors[0]


def leave(sentence: str):
    """Ends the process with status 1; rank 0 says why. Also before `start`, by torchrun's own number."""
    first = rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"
    tell_launcher(sentence)
    sys.exit(sentence if first else 1)


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
