"""A frozen model whose projections are held in 4 bits (NF4, QLoRA, arXiv:2305.14314): base="nf4".

    model = models.load(path, dtype=torch.bfloat16, base="nf4")     # quantised as it is read
    lora.apply(model, rank=16, ...)                                 # and LoRA trains on it

A 7B model's weights take 3.5 GB instead of 13. The file is read a tensor at a time, and each projection is
quantised before the next is read, so the model is never whole in memory. Embedding, head, norms and biases
stay as they are. A forward expands one layer's weight into a scratch buffer that all layers share, and uses
the ordinary matmul; the backward expands it again. So what is computed is exactly the model of the expanded
weights, in sampling as in training, and that is the model to export, too (lora.merged_state).

The format is bitsandbytes': its checkpoints are read as they stand, and what is read expands to the same
bits as there. One difference: a weight is rounded once, from fp32 to the model's dtype, where bitsandbytes
rounds to the dtype that was quantised and then to the model's.

Bytes a weight: 0.516 (4 bits, 8 bits a block of 64, fp32 a block of 16,384), and the scratch once. Time on
one CPU core: quantise 12 ns a weight, expand 1.1. Sampling pays for it: 32 rows of SmolLM2-135M with LoRA 16
take 2.2 times the dense model's time, whose adapter is merged and whose matrices are packed; an update takes
1.1 times. kernels/nf4.py has the expansion and its limits on a GPU.

Dims: T tokens, D input width, rows output width of a layer, which has its parts side by side.
"""

import json
from collections.abc import Iterable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import blocks
from kernels.nf4 import BLOCK, NESTED, NF4, expand

# A number's nibble is how many of these it exceeds: the midpoints between the 16 values, in fp32.
VALUES = torch.tensor(NF4)
MIDPOINTS = ((VALUES[:-1] + VALUES[1:]) / 2).tolist()

# Numbers quantised at once: on a CPU as many as a cache holds, on a GPU few enough to be no memory.
PIECE = {"cpu": 1 << 17, "cuda": 1 << 24}

# The ends of the names under which bitsandbytes stores what belongs to NAME.weight.
STATE = "quant_state.bitsandbytes__nf4"
ENDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)


# --------------------------------------------------------------------------------------------- one projection
class NF4Weight(nn.Module):
    """A matrix of 4-bit numbers, as bitsandbytes stores it.

    packed (ceil(n / 2),) uint8. Doubly quantised, absmax is uint8, nested_absmax, code and offset fp32;
    singly, absmax is fp32 and the other three None. See kernels/nf4.py for what they mean.
    """

    def __init__(self, shape, packed, absmax, nested_absmax=None, code=None, offset=None):
        super().__init__()
        self.shape = torch.Size(shape)
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("code", code)
        self.register_buffer("offset", offset)

    def _apply(self, fn, recurse=True):
        # model.to(torch.bfloat16) would round the scales, and every weight with them: here it only moves.
        def move(t):
            return t.to(fn(t).device)

        return super()._apply(move, recurse)

    def expand_into(self, out: Tensor) -> Tensor:
        """Writes the weights into a contiguous tensor of their shape, in its dtype. Returns it."""
        return expand(self.packed, self.absmax, self.nested_absmax, self.code, self.offset, out)


@torch.no_grad()
def quantise(weight: Tensor) -> NF4Weight:
    """NF4 of a floating matrix, doubly quantised, where the matrix is."""
    n, device = weight.numel(), weight.device
    flat = weight.reshape(-1)
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // BLOCK), device=device)
    size = PIECE.get(device.type, PIECE["cuda"])
    for start in range(0, n, size):
        nibbles, most = quantise_piece(flat[start : start + size])
        pairs = (nibbles[:, ::2] << 4 | nibbles[:, 1::2]).view(-1)
        count = min(len(pairs), len(packed) - start // 2)
        packed[start // 2 : start // 2 + count] = pairs[:count]
        absmax[start // BLOCK : start // BLOCK + len(most)] = most
    # All scales are positive. Without their mean they use both halves of the signed map.
    offset = absmax.mean()
    numbers, nested = blocks.quantise(absmax - offset, NESTED, signed=True)
    return NF4Weight(weight.shape, packed, numbers, nested, blocks.dynamic_map(True, device), offset)


def quantise_piece(x: Tensor) -> tuple[Tensor, Tensor]:
    """(nibbles (blocks, 64) uint8, absmax (blocks,) fp32) of some floating numbers (n,)."""
    x = F.pad(x.float(), (0, -len(x) % BLOCK)).view(-1, BLOCK)
    absmax = x.abs().amax(1)
    shares = x * (1 / absmax.clamp(min=blocks.TINY))[:, None]
    nibbles = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for middle in MIDPOINTS:
        nibbles += shares > middle
    return nibbles, absmax


# ------------------------------------------------------------------------------------------------ the layers
class Scratch:
    """Room for one layer's weight in full. Every layer of a model writes over what the last one left."""

    def __init__(self, numbers: int):
        # The largest layer's, from the start: CUDA graphs hold the address.
        self.numbers = numbers
        self.memory: Tensor | None = None

    def take(self, rows: int, width: int, like: Tensor) -> Tensor:
        """(rows, width) of like's dtype and device, whatever stands in it."""
        held = self.memory
        if held is None or (held.dtype, held.device) != (like.dtype, like.device):
            self.memory = torch.empty(self.numbers, dtype=like.dtype, device=like.device)
        return self.memory[: rows * width].view(rows, width)


class NF4Linear(nn.Module):
    """y = x W^T + b of a frozen W in 4 bits, in the place of a model.Linear of the same parts."""

    def __init__(self, linear, scratch: Scratch):
        super().__init__()
        self.parts, self.width = linear.parts, linear.width
        self.rows = sum(self.parts.values())
        self.scratch = scratch
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        # Of no numbers: its dtype and device are the model's, which W is expanded to.
        self.register_buffer("like", linear.weight.new_empty(0), persistent=False)
        # By name, because each part is quantised by itself, as it stands in a checkpoint.
        self.quantised = nn.ModuleDict()

    def put(self, part: str, weight: NF4Weight):
        """Takes a part's weight. ValueError where it has another shape."""
        shape = (self.parts[part], self.width)
        if weight.shape != shape:
            raise ValueError(f"shape {tuple(weight.shape)}, config.json asks for {shape}")
        self.quantised[part] = weight.to(self.like.device)

    def fill(self, weight: Tensor):
        """Takes the weights (rows, D) of all parts, quantised here."""
        for part, rows in zip(self.parts, weight.split(list(self.parts.values()))):
            self.put(part, quantise(rows))

    def forward(self, x):
        return _NF4Linear.apply(x, self)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """W (rows, D) in the model's dtype. It lies in the scratch: good until the next layer is expanded."""
        weight = self.scratch.take(self.rows, self.width, self.like)
        for part, rows in zip(self.parts, weight.split(list(self.parts.values()))):
            self.quantised[part].expand_into(rows)
        return weight

    def input_grad(self, dy: Tensor) -> Tensor:
        """dx (T, D) of dy (T, rows)."""
        return dy @ self.dense()


class _NF4Linear(torch.autograd.Function):
    """Nothing is kept for the backward: kept, the expanded weights of all layers would be the whole model."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dense(), layer.bias)

    @staticmethod
    def backward(ctx, dy):
        return ctx.layer.input_grad(dy), None


def replace(model: nn.Module) -> nn.Module:
    """Puts an NF4Linear without weights in the place of every linear layer. Returns the model, frozen."""
    found = linear_layers(model)
    scratch = Scratch(max(linear.weight.numel() for linear in found.values()))
    for name, linear in found.items():
        set_module(model, name, NF4Linear(linear, scratch))
    return model.requires_grad_(False)


def quantise_model(model: nn.Module) -> nn.Module:
    """Quantises a model that is in memory, a layer at a time, in place. Returns it, frozen.

    It is then, to the bit, what loading it from a file of its dtype with base="nf4" would give.
    """
    found = linear_layers(model)
    scratch = Scratch(max(linear.weight.numel() for linear in found.values()))
    for name in list(found):
        linear = found.pop(name)
        layer = NF4Linear(linear, scratch)
        layer.fill(linear.weight.detach())
        set_module(model, name, layer.train(linear.training))
    return model.requires_grad_(False)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """model.Linear layers by name, known by their parts and their weight."""
    named = model.named_modules()
    return {name: module for name, module in named if hasattr(module, "parts") and hasattr(module, "weight")}


def layers(model: nn.Module) -> dict[str, NF4Linear]:
    """The layers in 4 bits by name; those below an adapter have a name that ends in `.base`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def set_module(model: nn.Module, name: str, module: nn.Module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def weights_in(model: nn.Module) -> int:
    """How many weights are held in 4 bits: no parameter counts them."""
    return sum(layer.rows * layer.width for layer in layers(model).values())


# ---------------------------------------------------------------------------------- bitsandbytes' checkpoints
def join(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor | NF4Weight]]:
    """The same names and tensors, with those that make up one 4-bit matrix joined to an NF4Weight.

    tensors: of all files of a checkpoint.
    Raises ValueError for other kinds of 4-bit numbers than NF4 in blocks of 64, and for incomplete ones.
    """
    held: dict[str, dict[str, Tensor]] = {}  # what has come so far of NAME.weight
    for name, tensor in tensors:
        weight, end = split_name(name)
        if end == "" and tensor.dtype != torch.uint8:
            yield name, tensor
            continue
        found = held.setdefault(weight, {})
        found[end] = tensor
        if is_complete(found):
            yield weight, from_state(weight, held.pop(weight))
    for weight, found in held.items():
        raise ValueError(f"{weight}: its 4-bit numbers are not complete, there is only {', '.join(found)}")


def split_name(name: str) -> tuple[str, str]:
    """("X.weight", "absmax") of "X.weight.absmax"; (name, "") of a tensor that is no part of another."""
    weight, dot, end = name.partition(".weight.")
    return (f"{weight}.weight", end) if dot else (name, "")


def is_complete(found: dict[str, Tensor]) -> bool:
    """Whether these are all parts of one matrix. Unknown parts complete it too: from_state refuses them."""
    wanted = {"", "absmax", "quant_map", STATE}
    if STATE in found and "nested_offset" in read_state(found[STATE]):
        wanted |= {"nested_absmax", "nested_quant_map"}
    return wanted <= found.keys() or not found.keys() <= {"", *ENDS}


def read_state(tensor: Tensor) -> dict:
    """The JSON that bitsandbytes stores as a tensor of bytes."""
    return json.loads(bytes(tensor.tolist()))


def from_state(name: str, found: dict[str, Tensor]) -> NF4Weight:
    """An NF4Weight of the tensors that bitsandbytes stores for one matrix."""
    if not {"", STATE} <= found.keys():
        raise ValueError(
            f"{name} is stored with {', '.join(sorted(found))}, which is not NF4 as bitsandbytes writes it"
        )
    state = read_state(found[STATE])
    values = found["quant_map"].tolist()
    size, nested = state["blocksize"], state.get("nested_blocksize", NESTED)
    if (size, nested) != (BLOCK, NESTED) or values != list(NF4):
        raise ValueError(
            f"{name}: {state['quant_type']} in blocks of {size} and {nested} is not implemented, "
            f"NF4 in blocks of {BLOCK} and {NESTED} is"
        )
    # Stored as bytes, or as the bits of another dtype.
    packed = found[""].contiguous().view(torch.uint8).view(-1).clone()  # else it would stay the file's
    absmax = found["absmax"].clone()
    if "nested_offset" not in state:
        return NF4Weight(state["shape"], packed, absmax)
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
    nested = found["nested_absmax"].clone(), found["nested_quant_map"].clone()
    return NF4Weight(state["shape"], packed, absmax, *nested, offset)
