"""The memory of sampling: keys and values of prompts and of drawn tokens, how many
bytes they take, and what fits.

    slots = plan_slots(shape, itemsize, usable_bytes(device), slots=64, group_size=8, prompts=16,
    prompt_tokens=100, new_tokens=256) cache = Cache(model, groups=group_places(slots, 8, 16), slots=slots,
    prompt_tokens=100, new_tokens=256)

A *place* holds the keys of one prompt, which all rows of its group read. A *slot* holds the keys
of the tokens that one row has drawn. A group of 16 therefore stores its prompt once, and a slot
is no longer than a completion.

Dims: L layers, K key/value heads, E head width, P prompt tokens of a place, C own
tokens of a slot, V vocabulary.
"""

import torch

# Prompt tokens in one prefill: enough to fill the matmuls, few enough to bound the activations.
PREFILL_TOKENS = 8192
# A GPU has the memory, and each prefill costs its host as much as a dozen steps.
PREFILL_TOKENS_TRITON = 32768

# Completions that may be this long are sampled on packed weights: copying them takes
# as long as a dozen steps save.
PACK_STEPS = 16


class Cache:
    """Keys and values: prompts (L, places, K, P, E), read by all rows of a group, and
    own tokens (L, slots, K, C, E)."""

    def __init__(self, model, *, groups: int, slots: int, prompt_tokens: int, new_tokens: int):
        s = model.shape
        options = dict(dtype=model.dtype, device=model.device)
        self.P, self.C = prompt_tokens, new_tokens
        # zeros, not empty: a masked key has weight 0, and 0 times a NaN found in memory is NaN
        self.prompt_k = torch.zeros(s.L, groups, s.K, prompt_tokens, s.E, **options)
        self.prompt_v = torch.zeros_like(self.prompt_k)
        self.own_k = torch.zeros(s.L, slots, s.K, new_tokens, s.E, **options)
        self.own_v = torch.zeros_like(self.own_k)

    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.prompt_k, self.prompt_v, self.own_k, self.own_v))

    def layer(self, layer: int):
        """prompt_k, prompt_v (places, K, P, E), own_k, own_v (slots, K, C, E) of one layer."""
        return self.prompt_k[layer], self.prompt_v[layer], self.own_k[layer], self.own_v[layer]

    def move_rows(self, source, target, length: int):
        """The first `length` own keys of slots source (i,) go to slots target (i,)."""
        for t in (self.own_k, self.own_v):
            t[:, target, :, :length] = t[:, source, :, :length]

    def move_group(self, source: int, target: int):
        """The prompt in place `source` goes to place `target`."""
        for t in (self.prompt_k, self.prompt_v):
            t[:, target] = t[:, source]


def cache_bytes(shape, itemsize: int, *, groups: int, slots: int, prompt_tokens: int, new_tokens: int) -> int:
    """Bytes of a Cache of these sizes, known before it is made. shape: model.Shape; itemsize: bytes of a
    number."""
    tokens = groups * prompt_tokens + slots * new_tokens
    return 2 * shape.L * shape.K * shape.E * itemsize * tokens


def logits_bytes(shape, slots: int) -> int:
    """Bytes of three fp32 rows of the vocabulary a slot: logits, probabilities, and what truncation needs."""
    return 3 * 4 * shape.V * slots


# -------------------------------------------------------------------------------------------------- what fits
def group_places(slots: int, group_size: int, prompts: int) -> int:
    """How many prompts are in the cache at once, where they are prefilled as slots become free.

    Three times the groups that fill the slots, and one being filled. A group keeps its place until its last
    row ends. With twice the groups, 4 x 64 jobs of GSM8K's lengths in 64 slots left 8 to 12 % of the
    slot-steps empty for want of a place; with three times none.
    """
    filling = -(-slots // group_size)  # groups that fill the slots
    times = 1 if group_size == 1 else 3
    return min(prompts, times * filling + 1)


def free_bytes(device) -> float:
    """Memory that can still be had on the device; infinite where it cannot be asked."""
    if device.type == "cuda":
        free_at_driver = torch.cuda.mem_get_info(device)[0]
        unused_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free_at_driver + unused_by_torch
    try:
        with open("/proc/meminfo") as f:
            lines = f.readlines()
    except OSError:  # not a Linux machine: nobody to ask
        return float("inf")
    for line in lines:
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    return float("inf")


def usable_bytes(device) -> float:
    """What sampling may take of the free memory: a fifth is left to activations, and to
    what else grows in the process."""
    return 0.8 * free_bytes(device)


def plan_slots(
    shape,
    itemsize: int,
    free: float,
    *,
    slots: int,
    group_size: int,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
) -> int:
    """The most slots, up to `slots`, whose cache and logits fit in `free` bytes; says so when that is fewer.

    Raises ValueError if not even one slot fits.
    """
    fit, need = slots, []
    while fit:
        places = group_places(fit, group_size, prompts)
        cache = cache_bytes(
            shape, itemsize, groups=places, slots=fit, prompt_tokens=prompt_tokens, new_tokens=new_tokens
        )
        need.append(cache + logits_bytes(shape, fit))
        if need[-1] <= free:
            break
        fit -= -(-fit // 8)  # an eighth fewer, at least one
    if not fit:
        raise ValueError(
            f"sampling one row at a time needs {need[-1] / 1e9:.2f} GB and {free / 1e9:.2f} GB is free: "
            "lower max_new_tokens or use shorter prompts"
        )
    if fit < slots:
        print(
            f"sampling {slots} rows at once would need {need[0] / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB is free: {fit} rows at once"
        )
    return fit


def plan_places(
    shape,
    itemsize: int,
    free: float,
    *,
    slots: int,
    group_size: int,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
) -> int:
    """How many prompts' keys to hold where all are to be prefilled before the first
    token: all, or as many as fit.

    Never fewer than group_places, which plan_slots has found room for.
    """
    slots_alone = cache_bytes(
        shape, itemsize, groups=0, slots=slots, prompt_tokens=prompt_tokens, new_tokens=new_tokens
    )
    a_place = cache_bytes(
        shape, itemsize, groups=1, slots=0, prompt_tokens=prompt_tokens, new_tokens=new_tokens
    )
    fit = (free - slots_alone - logits_bytes(shape, slots)) / a_place
    return int(min(prompts, max(fit, group_places(slots, group_size, prompts))))
