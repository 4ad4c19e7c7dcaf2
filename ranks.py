"""The processes of a run: which one this is, how many there are, and what they tell each other.

    torchrun --nproc_per_node=4 train.py configs/gsm8k.py        # four ranks; without torchrun there is one

Every rank holds the whole model and takes a share of each step's prompts. Gradients are summed over
ranks (train.py), and everything that a step decides (advantages, divisors, metrics) is made from
values gathered from all of them.
"""

import os

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


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """The value of every rank, in rank order. Every rank must call it."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(tensors):
    """Adds each tensor over all ranks, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def wait_for_all():
    if world() > 1:
        dist.barrier()


def say(*words):
    """print, once: on rank 0."""
    if rank() == 0:
        print(*words, flush=True)
