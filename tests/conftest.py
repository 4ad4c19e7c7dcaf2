"""What the tests share: the repository on the path, one thread, one real two-layer model, one tiny run.

The real checkpoints are used where they are.
"""

import contextlib
import http.server
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# Set before anything imports Triton, which asks when a kernel is defined: without a GPU its kernels run in
# its interpreter. Nothing else notices, since CPU tensors take the torch form unless kernels.use("triton")
# says otherwise.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from safetensors.torch import load_file  # noqa: E402

import config as configs  # noqa: E402
import model as models  # noqa: E402
from sandboxes import mode, nothing_is_left, use  # noqa: E402, F401  (fixtures of two files)

torch.set_num_threads(1)
# An example is not too slow because the machine was busy.
hypothesis.settings.register_profile("no_clock", deadline=None)
hypothesis.settings.load_profile("no_clock")
# A shell that starts the suite in the background ignores Ctrl-C for it and for its children, and the tests of
# Ctrl-C send one.
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

# The same model for runs that start from nothing: the vocabulary comes from ALPHABET.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings")
SHAPE = {name: TINY[name] for name in SIZES} | dict(initializer_range=0.2)
ALPHABET = "0123456789+=<>,_^"


def pytest_addoption(parser):
    text = "how many faults tests/test_faults.py draws (slow)"
    parser.addoption("--faults", type=int, default=50, help=text)


@contextlib.contextmanager
def serving(handler):
    """A server of this http handler in a thread. Gives its address, http://127.0.0.1:PORT."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def quick(n: int, cases) -> list:
    """`cases` as parameters: the first n always run, the others with the slow tests.

    A case that is a tuple has several arguments.
    """
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*row, marks=() if i < n else pytest.mark.slow) for i, row in enumerate(rows)]


@pytest.fixture
def tiny():
    """A two-layer Llama of random weights, fp32: grouped heads, tied head.

    The weights are large enough that attention and logits are not flat.
    """
    return models.create(dict(TINY), seed=0)


@pytest.fixture(autouse=True)
def signals_and_threads_as_they_were():
    """A run in this process takes Ctrl-C over, and all cores; the test after it gets both back."""
    held = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in held.items():
        signal.signal(number, handler)
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------- one tiny run
def even(completions, **_):
    """A reward with signal on random text: the share of even digits."""
    return [sum(c in "02468" for c in text) / max(1, len(text)) for text in completions]


class Echo:
    """An environment that takes its time, and replies with what was said, backwards."""

    def __init__(self, row):
        self.longest = len(row["prompt"])
        self.heard = []

    def step(self, said):
        time.sleep(0.003 * (len(said) % 3))
        self.heard.append(said)
        return None if len(said) == 3 else (said[::-1] + "2" * (len(said) % 4))[: self.longest]

    def reward(self):
        return float(len("".join(self.heard)))


WITH_TURNS = dict(env=Echo, env_role="", turn_ends=("1", "5", "<", "_"), max_turns=4)


def settings(tmp_path, **keys):
    """The config of a run of four steps on random weights, in tmp_path / "run"."""
    base = dict(
        scratch=SHAPE,
        alphabet=ALPHABET,
        task="arithmetic",
        task_options=dict(style="chars", digits=2),
        rewards=[(even, 1.0)],
        lora_rank=0,
        prompts_per_step=4,
        group_size=4,
        max_new_tokens=12,
        micro_tokens=150,
        steps=4,
        lr=1e-2,
        warmup_steps=2,
        eval_every=0,
        save_every=2,
        rollouts_every=2,
        show_every=0,
        threads=1,
        device="cpu",
        out_dir=str(tmp_path / "run"),
        keep=0,
    )
    return configs.check_values(configs.Config(**(base | keys)))


def weights(path: Path) -> dict:
    """Every tensor a checkpoint holds, its optimiser's too."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= {f"{file.name}:{name}": tensor for name, tensor in load_file(file).items()}
    return found


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def untimed(metrics: dict) -> dict:
    """Metrics without the run's name, and those that a clock or the machine's memory decides."""
    clocks = ("run", "time/", "tokens_per_second/", "memory/", "step_time")
    return {key: value for key, value in metrics.items() if not key.startswith(clocks)}


# --------------------------------------------------------------------------------------- real checkpoints
def checkpoint(name: str) -> str:
    """Folder of a real checkpoint, models/NAME or $NANOGRPO_MODELS/NAME; without it the test is skipped."""
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


# ------------------------------------------------------------------------------------ Triton's interpreter
@pytest.fixture(scope="module")
def interpreter_without_two_faults():
    """Triton's interpreter with two faults mended.

    It keeps bf16 as its 16 bits and multiplies those as integers (3.6 to 3.9), so we widen them first. And
    3.6 makes loop bounds of arrays that hold one number, which numpy 2.4 no longer does. bench/gpu.py --dry,
    without these, needs a Triton newer than 3.6 or an older numpy.
    """
    tl = pytest.importorskip("triton.language")
    from triton.runtime import interpreter

    builder, scope = interpreter.InterpreterBuilder, interpreter._LangPatchScope
    dot, set_attr = builder.create_dot, scope.set_attr

    def widened(self, a, b, d, *options):
        wide = []
        for x in (a, b):
            wide.append(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x)
        return dot(self, *wide, d, *options)

    def set_index(self, thing, name, value):
        if name == "__index__":
            value = lambda x: int(x.handle.data.item())
        set_attr(self, thing, name, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", widened)
        patch.setattr(scope, "set_attr", set_index)
        yield
