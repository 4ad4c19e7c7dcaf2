"""What the tests share: the repository on the path, one thread, one real two-layer model, and the real checkpoints where they are."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

# before anything imports Triton, which asks when a kernel is defined: without a GPU its kernels run in its interpreter. Nothing else notices:
# CPU tensors take the torch form unless kernels.use("triton") says otherwise
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import model as models

torch.set_num_threads(1)
# a shell that starts the suite in the background ignores Ctrl-C for it and for its children, and the tests of Ctrl-C send one
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = dict(
    model_type="llama",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    initializer_range=0.3,
)


@pytest.fixture
def tiny():
    """A two-layer Llama of random weights, fp32: grouped heads, tied head, weights large enough that attention and logits are not flat."""
    return models.create(dict(TINY), seed=0)


def checkpoint(name: str) -> str:
    """Folder of a real checkpoint, models/NAME or $NANOGRPO_MODELS/NAME; skips the test where it is absent."""
    folder = Path(os.environ.get("NANOGRPO_MODELS", ROOT / "models")) / name
    if not (folder / "config.json").exists():
        pytest.skip(f"needs the checkpoint {name} in models/ or in the folder that NANOGRPO_MODELS names")
    return str(folder)


@pytest.fixture(scope="session")
def smollm2():
    return checkpoint("smollm2-135m")


@pytest.fixture(scope="session")
def qwen():
    return checkpoint("qwen2.5-0.5b")


@pytest.fixture(scope="module")
def interpreter_without_two_faults():
    """Triton's keeps bf16 as its 16 bits and multiplies those as integers (3.6 to 3.9): widen them first. And 3.6 makes loop bounds of arrays that
    hold one number, which numpy 2.4 no longer does. bench/gpu.py --dry, without these, needs a Triton newer than 3.6 or an older numpy."""
    tl = pytest.importorskip("triton.language")
    from triton.runtime import interpreter

    dot, set_attr = interpreter.InterpreterBuilder.create_dot, interpreter._LangPatchScope.set_attr

    def widened(self, a, b, d, *options):
        return dot(
            self,
            *(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)),
            d,
            *options,
        )

    def set_index(self, thing, name, value):
        set_attr(self, thing, name, (lambda x: int(x.handle.data.item())) if name == "__index__" else value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)
        patch.setattr(interpreter._LangPatchScope, "set_attr", set_index)
        yield
