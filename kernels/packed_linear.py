"""Linear layers laid out for a CPU that multiplies a few rows by the same weights hundreds of times: what sampling does.

    with packed(model) as head:          # a CPU: every Linear and LoRALinear now runs on its packed copy
        logits = head(model(...))        # (n, V) fp32

F.linear hands the weights to the BLAS as they stand, which lays them out for its inner loop again in every call. oneDNN can do that once:
`_reorder_linear_weight` copies, `_linear_pointwise` multiplies. Measured on one core without AVX-512, fp32, CPU time, SmolLM2-135M's
layers, F.linear / packed:

    rows                   4      8     16     32     64
    head (49152, 576)    2.30   2.00   1.96   1.79   1.54
    gate_up (3072, 576)  1.61   1.52   1.43   1.48   1.31
    qkv (960, 576)       1.31   1.24   1.10   1.09   1.03
    o (576, 576)         1.01   1.05   0.98   0.96   0.97
    down (576, 1536)     1.04   0.99   0.96   1.01   0.94
    (384, 128): 0.8 at 128 rows, 0.5 at 16

So wide layers win and the others stay as they are. That is also more exact: packed, a row's sum runs straight through its inputs, and with
`down` packed SmolLM2's log-probabilities were up to 1.3e-4 nats from fp64 (a one-token prompt, whose inputs there are huge); without,
5.9e-5; nothing packed, 1.9e-5. The copy costs about 2 ms a million weights and their memory while it lives: it is made once a call of
`generate` and thrown away, because a copy kept over an update of the weights would be a silent error.

LoRA in fp32: the adapter is added into the copy, so that it costs nothing in sampling (unmerged: two more matmuls and four more operations
a layer). y = x (W + sBA)^T instead of x W^T + s (x A^T) B^T differs by rounding, like the order of any sum (SmolLM2, rank 16 everywhere:
sampler to unmerged trainer at most 3.6e-5 nats in 96 tokens; 2.4e-5 with nothing merged or packed). In bf16 the sum
itself would be rounded to 8 bits: there the base is packed and the adapter stays beside it.
"""
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F

ROWS = 32  # rows the layout is made for; layouts made for 32 and 256 rows ran alike at every size tried, the one for 1 lost 20 %
SMALLEST = 512  # layers narrower than this are faster as they stand; so are those that do not widen (see above)


def packable(weight) -> bool:
    """Whether oneDNN has a packed matmul for this weight here, and it is worth it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or min(weight.shape) < SMALLEST or len(weight) <= weight.shape[1]:
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight, bias=None):
    """A function x (n, D) -> x weight^T + bias (n, rows), with the weight (rows, D) copied into the layout that is fastest here."""
    if not packable(weight):
        return partial(F.linear, weight=weight, bias=bias)
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    return partial(torch.ops.mkldnn._linear_pointwise, W=weight, B=bias, attr="none", scalars=[], algorithm="")


@contextmanager
def packed(model):
    """Inside, the model's linear layers run on packed copies. Yields the head: hidden (n, D) -> logits (n, V) fp32; None on a GPU.

    The layers are found by `parts`, as lora.py does; one with a `base` is that base and an adapter.
    """
    layers = [m for m in model.modules() if hasattr(m, "parts") and not hasattr(m, "base")]
    merged = [m for m in model.modules() if hasattr(m, "base") and m.base.weight.dtype == torch.float32 and m.base.weight.device.type == "cpu"]
    try:
        for m in merged:
            m.fast = pack(m.merged_weight() if m.enabled else m.base.weight, m.base.bias)
        inside = {id(m.base) for m in merged}
        for m in layers:
            if id(m) not in inside and packable(m.weight):
                m.fast = pack(m.weight, m.bias)
        head = model.head
        yield pack(head if head.dtype in (torch.float32, torch.float64) else head.float()) if head.device.type == "cpu" else None
    finally:
        for m in [*layers, *merged]:
            m.fast = None
