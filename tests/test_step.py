"""A whole training step against others' code: gradients of transformers' models on the naive formula, TRL's
GRPOTrainer, and a step with layers computed twice.

Run: python -m pytest tests/test_step.py
The oracle of the gradient is written as a paper would: every sequence by itself through transformers' model,
log_softmax over whole logits, the objective token by token, autograd. Nothing is shared with model.py,
kernels/ and loss.py but the weights.
"""

import itertools

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import loss as losses
import lora
import model as models
import optim
from conftest import TINY
from test_lora import adapted
from test_model import FAMILIES, oracle

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)  # PEFT's and TRL's
ALL = models.ATTENTION + models.MLP
G = torch.Generator


def ragged(seed=0, V=61):
    """Three groups of different sizes, prompts of 1 to 9 ids, completions of 1 to 13."""
    g = G().manual_seed(seed)
    draw = lambda n: torch.randint(0, V, (n,), generator=g).tolist()
    return [draw(7), draw(1), draw(9)], [
        [draw(13), draw(1), draw(4), draw(6)],
        [draw(5), draw(2)],
        [draw(11)],
    ]


def constants(prompts, completions, logp, dtype):
    """(old_logp (M,), ref_logp (M,), adv (N,)) near logp, of which some ratios are
    beyond the clip and one advantage is 0.
    """
    g, N = G().manual_seed(3), sum(map(len, completions))
    adv = torch.randn(N, generator=g, dtype=torch.float64)
    adv[2] = 0.0
    old, ref = (
        logp.detach().double() + 0.3 * torch.randn(len(logp), generator=g, dtype=torch.float64)
        for _ in range(2)
    )
    return old.to(dtype), ref.to(dtype), adv.to(dtype)


OPTIONS = dict(beta=0.1, entropy_coef=0.05)


def naive_loss(model, prompts, completions, old, ref, adv, temperature):
    """GRPO's Eq. 3 with k3 and an entropy bonus, mean over tokens: a loop over sequences and tokens. Returns
    the loss and log-probabilities.
    """
    total, logps, t = 0.0, [], 0
    flat = [(prompt, completion) for prompt, group in zip(prompts, completions) for completion in group]
    for i, (prompt, completion) in enumerate(flat):
        z = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
        logq = z.log_softmax(-1)
        for row, word in zip(logq, completion):
            logps.append(row[word])
            if old is not None:
                ratio, d = torch.exp(row[word] - old[t]), ref[t] - row[word]
                gain = torch.minimum(ratio * adv[i], ratio.clamp(0.8, 1.2) * adv[i])
                total = total - gain + 0.1 * (torch.exp(d) - d - 1) + 0.05 * (row.exp() * row).sum()
            t += 1
    return total / t, torch.stack(logps)


def exact_norm(self, x):
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def in_double(theirs, monkeypatch):
    """transformers' model in fp64 all the way: its norms would round to fp32 on the way."""
    for kind in {type(m) for m in theirs.modules() if type(m).__name__.endswith("RMSNorm")}:
        monkeypatch.setattr(kind, "forward", exact_norm)
    return theirs.double()


def assert_same_gradients(ours: dict, theirs: dict, tolerance):
    """Name by name, relative to the norm of the tensor and, for those near zero, to the largest one."""
    assert ours.keys() == theirs.keys() and ours
    scale = max(float(x.norm()) for x in theirs.values())
    assert scale > 1e-3, "no gradient proves nothing"
    for name, x in theirs.items():
        assert float((ours[name] - x).norm()) <= tolerance * (float(x.norm()) + 0.01 * scale), name


def our_loss(model, prompts, completions, old, ref, adv, temperature, micro_tokens):
    """Loss and backward over micro-batches, as train.py does it. Returns the loss and
    the number of micro-batches.
    """
    flat_numbers = dict(
        zip(((b, g) for b, group in enumerate(completions) for g in range(len(group))), itertools.count())
    )
    lengths = [len(c) for group in completions for c in group]
    (old, ref), total = (x.split(lengths) for x in (old, ref)), 0.0
    norm = losses.normaliser(lengths, aggregate="token")
    cuts = models.micro_batches(prompts, completions, micro_tokens)
    for cut in cuts:
        numbers = [flat_numbers[b, g] for b, members in cut for g in members]
        logp, entropy, rows = model.completion_logprobs(
            [prompts[b] for b, _ in cut],
            [[completions[b][g] for g in members] for b, members in cut],
            temperature=temperature,
        )
        loss, _ = losses.policy_loss(
            logp,
            torch.cat([old[n] for n in numbers]),
            adv[numbers],
            rows,
            ref_logp=torch.cat([ref[n] for n in numbers]),
            entropy=entropy,
            norm=norm,
            **OPTIONS,
        )
        loss.backward()
        total += float(loss.detach())
    return total, len(cuts)


# --------------------------------------------------------------- transformers, autograd and the naive formula
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize("name", ["llama with biases", "llama tied", "qwen2", "qwen3", "mistral wide heads"])
def test_every_gradient_of_a_step_equals_transformers_on_the_naive_formula(
    name, dtype, tolerance, tmp_path, monkeypatch
):
    """Full fine-tuning: embedding, tied or not, norms and biases included; and the same
    where groups are cut into micro-batches.
    """
    theirs, (prompts, completions) = oracle(FAMILIES[name], tmp_path), ragged()
    theirs = in_double(theirs, monkeypatch) if dtype == torch.float64 else theirs
    model = models.load(str(tmp_path), dtype=dtype)
    _, logp = naive_loss(theirs, prompts, completions, None, None, None, 0.8)
    batch = (prompts, completions, *constants(prompts, completions, logp, dtype), 0.8)
    want, _ = naive_loss(theirs, *batch)
    want.backward()
    named = dict(theirs.named_parameters())
    theirs = {hf: named[hf].grad for hf in models.border_names(model)}
    for micro_tokens in (1000, 22):  # 22: the first group alone is 31 tokens
        model.zero_grad()
        got, cuts = our_loss(model, *batch, micro_tokens)
        assert (cuts > 3) == (micro_tokens == 22)
        assert abs(got - float(want)) <= tolerance * max(1, abs(float(want)))
        ours = dict(model.named_parameters())
        assert_same_gradients(
            {hf: ours[mine].grad[rows] for hf, (mine, rows) in models.border_names(model).items()},
            theirs,
            tolerance,
        )


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize(
    "name, targets",
    [
        ("llama with biases", ("q_proj", "v_proj")),
        ("qwen2", ALL),
        ("qwen3", ("k_proj", "o_proj", "down_proj")),
        ("mistral wide heads", ALL),
    ],
    ids=["llama", "qwen2", "qwen3", "mistral"],
)
def test_every_gradient_of_an_adapter_equals_pefts_on_the_naive_formula(
    name, targets, dtype, tolerance, tmp_path, monkeypatch
):
    oracle(FAMILIES[name], tmp_path / "base")
    model = lora.apply(models.load(str(tmp_path / "base"), dtype=dtype), rank=3, alpha=6.0, targets=targets)
    g = G().manual_seed(1)
    for layer in lora.layers(model).values():
        for B in layer.B:
            B.data.copy_(torch.randn(B.shape, generator=g) * 0.2)
    lora.save_adapter(model, str(tmp_path / "adapter"), base="")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    base = in_double(base, monkeypatch) if dtype == torch.float64 else base
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).to(dtype)
    prompts, completions = ragged(1)
    _, logp = naive_loss(theirs, prompts, completions, None, None, None, 1.0)
    batch = (prompts, completions, *constants(prompts, completions, logp, dtype), 1.0)
    want, _ = naive_loss(theirs, *batch)
    want.backward()
    got, _ = our_loss(model, *batch, 22)
    assert abs(got - float(want)) <= tolerance * max(1, abs(float(want)))
    trained = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert_same_gradients(gradient_views(model), trained, tolerance)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def gradient_views(model) -> dict:
    """PEFT's names -> gradients of the adapters."""
    places = {p.data_ptr(): (name, p.shape) for name, p in lora.peft_names(model).items()}
    found = {}
    for layer in lora.layers(model).values():
        grads, parts = layer.A.grad.split(layer.rank), layer.A.split(layer.rank)
        for dA, A, B in zip(grads, parts, layer.B, strict=True):
            found[places[A.data_ptr()][0]], found[places[B.data_ptr()][0]] = dA, B.grad
    return found


# -------------------------------------------------------------------------------------- layers computed twice
class Kept:
    """Bytes that a forward keeps for its backward, weights aside: each storage once."""

    def __init__(self, model):
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)

    def pack(self, x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return x

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @property
    def bytes(self):
        return sum(self.storages.values())


def full(**options):
    return models.create(dict(TINY, num_hidden_layers=6), seed=0, **options)


@pytest.mark.parametrize(
    "make",
    [
        full,
        lambda: adapted(config=dict(TINY, num_hidden_layers=6)),
        lambda: adapted(("q_proj", "down_proj"), dropout=0.3, config=dict(TINY, num_hidden_layers=6)),
        lambda: full(dtype=torch.bfloat16),
    ],
    ids=["full", "lora", "lora with dropout", "full, bf16"],
)
@pytest.mark.parametrize("how, share", [("layers", 1 / 4), ("light", 0.8), ("offload", 1)])
def test_checkpointing_gives_the_same_bits_and_keeps_less(make, how, share):
    model, (prompts, completions) = make().train(), ragged(V=48)
    found = {}
    for checkpointing in ("none", how):
        model.checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(7)
        with Kept(model) as kept:
            logp, entropy, _ = model.completion_logprobs(prompts, completions)
            (logp.sum() - entropy.sum()).backward()
        after = torch.rand(3)  # the generator goes on as if no layer had run twice
        found[checkpointing] = (
            kept.bytes,
            [logp.detach(), entropy.detach(), after]
            + [p.grad for p in model.parameters() if p.requires_grad],
        )
    assert all(torch.equal(a, b) for a, b in zip(found["none"][1], found[how][1], strict=True))
    assert found[how][0] < share * found["none"][0]


def test_offloaded_inputs_are_not_kept_where_the_others_are():
    model, (prompts, completions) = full().train(), ragged(V=48)
    kept = {}
    for model.checkpointing in ("layers", "offload"):
        with Kept(model) as found:
            model.completion_logprobs(prompts, completions)
        kept[model.checkpointing] = found.bytes
    tokens = sum(map(len, prompts)) + sum(len(ids) for group in completions for ids in group)
    inputs = 6 * tokens * model.shape.D * 4
    assert kept["layers"] - kept["offload"] == pytest.approx(inputs, rel=0.2)


def test_checkpointing_does_nothing_where_nobody_learns(tiny, monkeypatch):
    monkeypatch.setattr(models, "checkpoint", lambda *a, **k: pytest.fail("a layer was to be computed twice"))
    tiny.checkpointing = "layers"
    with torch.no_grad():
        tiny.completion_logprobs([[1, 2]], [[[3], [4]]])


# -------------------------------------------------------------------------------------------------------- TRL
STEPS, LR = 3, 1e-2


def tokenizer():
    """Ids 0..47, each a word."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(48)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1", unk_token="w0")


def reward(completion_ids, **_):
    return [float(len(set(ids)) + 0.1 * sum(ids) / len(ids)) for ids in completion_ids]


@pytest.fixture(scope="module", params=["full", "lora"])
def trl_run(request, tmp_path_factory):
    """STEPS steps of TRL's GRPOTrainer on a tiny random Llama: the folder it began with, and for each step
    its inputs, loss, gradients and weights after it.
    """
    grpo = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import TrainerCallback

    folder, steps = tmp_path_factory.mktemp("trl"), []
    # weights small enough that the entropy of 48 words leaves completions of every length
    models.save(
        models.create(dict(TINY, initializer_range=0.15, architectures=["LlamaForCausalLM"]), seed=0),
        str(folder / "base"),
    )

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, *_, model, **__):  # after clipping
            steps[-1]["grads"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

        def on_optimizer_step(self, *_, model, **__):
            steps[-1]["weights"] = {
                n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
            }

    class Trainer(grpo.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            steps.append(dict(inputs=inputs, loss=loss.detach()))
            return loss

    config = grpo.GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=12,
        num_generations=4,
        max_completion_length=14,
        beta=0.05,
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.1,
        adam_epsilon=1e-4,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        temperature=0.9,
        seed=1,
        use_bias_correction_kl=request.param == "full",
    )
    adapters = (
        peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
        if request.param == "lora"
        else None
    )
    prompts = [" ".join(f"w{(7 * i + j * j) % 46 + 2}" for j in range(2 + i % 4)) for i in range(12)]
    trainer = Trainer(
        str(folder / "base"),
        args=config,
        processing_class=tokenizer(),
        peft_config=adapters,
        callbacks=[Record()],
        reward_funcs=reward,
        train_dataset=Dataset.from_dict(dict(prompt=prompts)),
    )
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    return folder / "base", start, steps


def rollouts(inputs):
    """TRL's padded, shuffled inputs as ragged groups: (prompts B, completions (B, G), flat old_logp or None,
    flat ref_logp, advantages (N,)).
    """
    real = lambda ids, mask: [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]
    prompts, completions = (
        real(inputs["prompt_ids"], inputs["prompt_mask"]),
        real(inputs["completion_ids"], inputs["completion_mask"]),
    )
    order = sorted(range(12), key=lambda n: prompts[n])
    groups = [order[i : i + 4] for i in (0, 4, 8)]
    assert all(prompts[n] == prompts[group[0]] for group in groups for n in group)
    flat = lambda x: x[order][inputs["completion_mask"][order].bool()] if x is not None else None
    return (
        [prompts[group[0]] for group in groups],
        [[completions[n] for n in group] for group in groups],
        flat(inputs.get("old_per_token_logps")),
        flat(inputs["ref_per_token_logps"]),
        inputs["advantages"][order],
    )


def test_whole_steps_equal_trls(trl_run):
    """Same rollouts, fp32: advantages, reference, loss, gradient and weights after the update, three steps
    in a row, so that Adam's moments count too.
    """
    folder, start, steps = trl_run
    model = models.load(str(folder))
    if with_lora := any("lora" in name for name in start):
        lora.apply(model, rank=3, alpha=6.0, targets=ALL)
        names = {name.replace(".weight", ".default.weight"): p for name, p in lora.peft_names(model).items()}
        for name, p in start.items():
            names[name].data.copy_(p)
        grads = lambda: {
            name.replace(".weight", ".default.weight"): x for name, x in gradient_views(model).items()
        }
    else:
        named = dict(model.named_parameters())
        names = {hf: named[mine].detach()[rows] for hf, (mine, rows) in models.border_names(model).items()}
        grads = lambda: {
            hf: named[mine].grad[rows] for hf, (mine, rows) in models.border_names(model).items()
        }
    reference = model if with_lora else models.load(str(folder))
    optimizer = optim.AdamW(list(model.named_parameters()), lr=LR, eps=1e-4)
    lengths = set()
    for step in steps:
        prompts, completions, old, ref, adv = rollouts(step["inputs"])
        lengths |= {len(c) for group in completions for c in group}
        ours = losses.advantages(torch.tensor([reward(group) for group in completions])).reshape(-1)
        torch.testing.assert_close(ours, adv, rtol=1e-4, atol=1e-5)
        with torch.no_grad(), lora.disabled(model):
            ref_logp, _, _ = reference.completion_logprobs(prompts, completions, temperature=0.9)
        torch.testing.assert_close(ref_logp, ref, rtol=1e-5, atol=1e-5)
        logp, entropy, rows = model.completion_logprobs(prompts, completions, temperature=0.9)
        loss, _ = losses.policy_loss(
            logp,
            logp.detach() if old is None else old,
            ours,
            rows,
            ref_logp=ref_logp,
            entropy=entropy,
            beta=0.05,
            kl_times_ratio=not with_lora,
        )
        torch.testing.assert_close(loss.detach(), step["loss"], rtol=1e-5, atol=2e-6)
        loss.backward()
        norm = optimizer.step(LR, max_norm=0.1)
        assert norm > 0.1  # so that clipping is in the comparison
        assert_same_gradients(grads(), step["grads"], 2e-5)
        for name, p in step["weights"].items():
            assert float((names[name].detach() - p).abs().max()) < 0.01 * LR, name
            # To the bit: Adam divides small gradients by themselves, so rounding would grow with the steps.
            names[name].data.copy_(p)
        optimizer.zero_grad()
    assert len(steps) == STEPS and len(lengths) > 3
