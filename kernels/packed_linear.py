"""Linear layers laid out for a CPU that multiplies a few rows by the same weights
hundreds of times: what sampling does.

    twin, head = packed_copy(model)      # the same parameters in modules of its own, the wide layers packed
    logits = head(twin(...))             # (n, V) fp32

F.linear hands the weights to the BLAS as they stand, which lays them out for its inner loop again in every
call. oneDNN can do that once: `_reorder_linear_weight` copies, `_linear_pointwise` multiplies. Measured on
one core without AVX-512, fp32, CPU time, SmolLM2-135M's layers, F.linear / packed:

    rows                   4      8     16     32     64
    head (49152, 576)    2.30   2.00   1.96   1.79   1.54
    gate_up (3072, 576)  1.61   1.52   1.43   1.48   1.31
    qkv (960, 576)       1.31   1.24   1.10   1.09   1.03
    o (576, 576)         1.01   1.05   0.98   0.96   0.97
    down (576, 1536)     1.04   0.99   0.96   1.01   0.94
    (384, 128): 0.8 at 128 rows, 0.5 at 16

So wide layers win and the others stay as they are. That is also more exact: packed, a row's sum runs straight
through its inputs, and with `down` packed SmolLM2's log-probabilities were up to 1.3e-4 nats from fp64 (a
one-token prompt, whose inputs there are huge); without, 5.9e-5; nothing packed, 1.9e-5. The copy costs about
2 ms a million weights and their memory while it lives: it is made once a call of `generate` and thrown away,
because a copy kept over an update of the weights would be a silent error. The model itself is not touched.

LoRA in fp32: the adapter is added into the copy, so that it costs nothing in sampling (unmerged: two more
matmuls and four more operations a layer). y = x (W + sBA)^T instead of x W^T + s (x A^T) B^T differs by
rounding, like the order of any sum (SmolLM2, rank 16 everywhere: sampler to unmerged trainer at most 3.6e-5
nats in 96 tokens; 2.4e-5 with nothing merged or packed). In bf16 the sum itself would be rounded to 8 bits:
there the base is packed and the adapter stays beside it. The head is packed in fp32 whatever the model's
dtype, because logits are fp32 (kernels/logprob.py).
"""

import copy
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

# Rows the layout is made for. Layouts made for 32 and 256 rows ran alike at every size
# tried; the one for 1 lost 20 %.
ROWS = 32
# Layers narrower than this are faster as they stand; so are those that do not widen (see above).
SMALLEST = 512


def packable(weight) -> bool:
    """Whether oneDNN has a packed matmul for this weight here, and it is worth it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    rows, width = weight.shape
    if min(rows, width) < SMALLEST or rows <= width:
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack(weight, bias=None):
    """A function x (n, D) -> x weight^T + bias (n, rows), with the weight (rows, D)
    copied into the fastest layout."""
    if not packable(weight):
        return partial(F.linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise
    return partial(multiply, W=packed, B=bias, attr="none", scalars=[], algorithm="")


class PackedLinear(nn.Module):
    """A linear layer that multiplies by a packed copy of `weight`."""

    def __init__(self, weight, bias):
        super().__init__()
        self.multiply = pack(weight, bias)

    def forward(self, x):
        return self.multiply(x)


def packed_copy(model):
    """A twin of the model whose wide layers are packed as they are now, and its head:
    hidden (n, D) -> logits (n, V) fp32.

    The twin shares every tensor with the model and has modules of its own, so the model stays as it is and
    the copies go when the twin does. On other devices than a CPU nothing is packed.
    """
    twin = share(model)
    replace_layers(twin)
    weight = model.head
    if weight.dtype in (torch.float32, torch.float64):
        return twin, pack(weight)
    multiply = pack(weight.float())
    return twin, lambda hidden: multiply(hidden.float())


def share(module):
    """New modules around the same tensors: a parameter of the copy is the module's
    own, and so is every attribute."""
    twin = copy.copy(module)
    twin._modules = {name: share(child) for name, child in module._modules.items()}
    return twin


def replace_layers(module):
    """Puts a PackedLinear in the place of each linear layer inside that is faster, or exact, with one."""
    for name, child in module._modules.items():
        packed = packed_layer(child)
        if packed is not None:
            module._modules[name] = packed
        else:
            replace_layers(child)


def packed_layer(layer):
    """The PackedLinear that does what this module does now; None for a module that stays, or is no linear
    layer.

    Layers are known by their `parts`, as in lora.py; one with a `base` is that base and an adapter.
    """
    if not hasattr(layer, "parts"):
        return None
    if not hasattr(getattr(layer, "base", layer), "weight"):
        return None  # in 4 bits: expanded in each step, since in full it would be what is saved
    if not hasattr(layer, "base"):
        if not packable(layer.weight):
            return None
        packed = PackedLinear(layer.weight, layer.bias)
        packed.weight, packed.bias = layer.weight, layer.bias  # an adapter beside it asks its base for them
        return packed
    base = layer.base
    merged = layer.enabled and getattr(layer, "merged", None) is not None
    if base.weight.device.type != "cpu" or not (base.weight.dtype == torch.float32 or merged):
        return None  # the adapter stays beside its base, which may be packed
    # Made from the adapter as it is now, and not the merged weight of some earlier moment.
    return PackedLinear(layer.merged_weight() if layer.enabled else base.weight, base.bias)
