"""The program's rows of bench/gpu.py: sampling, an update, a whole step, with random weights in the shapes of real models, beside their peers.

decode     prompts of 256 tokens, each its own, 256 new ones. The floor is prompts and steps: prompts by their multiplications; a step reads the weights
           once and each row's keys, 3/4 of the full context on average. PERF.md's floor beside it takes the full 512 at every step and no prompts.
           "prompts": the same with one token each. B 64 is checked: the sampler's log-probabilities against the model's in torch.
early      four times as many rows as slots, lengths as of GSM8K's answers: the share of slot-steps that drew a token somebody wants.
step       sample, micro-batches forward and backward, Adam. TRL's is GRPOTrainer on the same shapes and rank (pip install trl peft), a group a
           micro-batch, a tokenizer made here of words w0, w1, ..; one step to warm up and one that counts.
shared     the update of groups whose prompt is computed once, against the same completions each with a prompt of its own. Checked: same gradients.

Dims: B prompts, G completions each, P prompt and C completion length, N = B G rows.
"""
import tempfile
from functools import partial

import torch

from gpu_rows import DEV, TYPE, Case, Row, clock, in_torch, missing
import loss as losses
import lora
import model as models
import optim
import rollout
from step import Timed


def config(family, V, D, I, L, H, K, tied) -> dict:
    return dict(model_type=family, vocab_size=V, hidden_size=D, intermediate_size=I, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=K,
                max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=tied)


SHAPES = {"tiny": config("qwen2", 64, 32, 48, 1, 4, 2, True), "135M": config("llama", 49_152, 576, 1536, 30, 9, 3, True),
          "0.5B": config("qwen2", 151_936, 896, 4864, 24, 14, 2, True), "1.5B": config("qwen2", 151_936, 1536, 8960, 28, 12, 2, True),
          "7B": config("qwen2", 152_064, 3584, 18_944, 28, 28, 4, False)}
PERF = {"135M": {256: 234e3, 1: 10.7e3}, "0.5B": {256: 296e3, 1: 3.0e3}, "1.5B": {256: 112e3, 1: 967}, "7B": {256: 35.5e3, 1: 212}}  # tokens a second, H100


def create(name, dtype, rank=0):
    """Random weights, made where they will be: models.create makes them on the CPU, which takes minutes for 7B."""
    with torch.device("meta"):
        net = models.Transformer(SHAPES[name])
    net.to(dtype).to_empty(device=DEV)
    if rank:
        lora.apply(net, rank=rank, alpha=2 * rank, targets=[part for m in net.blocks[0].modules() for part in getattr(m, "parts", ())])
    for name, p in net.named_parameters():  # adapters too: a B of zeros would leave A without a gradient
        p.data.normal_(0, 0.02) if p.dim() > 1 else p.data.fill_(float(name.endswith("norm.weight")))
    return net.eval()


def numbers(s) -> tuple[int, int, int]:
    """Weights in the layers, in the head, and numbers of a token's keys and values. s: model.Shape."""
    return s.L * s.D * (2 * s.H * s.E + 2 * s.K * s.E + 3 * s.intermediate), s.V * s.D, 2 * s.L * s.K * s.E


def random_prompts(net, B, P):
    return torch.randint(1, net.shape.V, (B, P)).tolist()


def same_logprobs(net, prompts, C):
    """What the sampler noted, and the model's torch form of the same tokens: (M,) each."""
    out = rollout.generate(net, prompts, group_size=2, max_new_tokens=C, stop_ids=[])
    scored = in_torch(lambda: torch.no_grad()(net.completion_logprobs)(prompts, [out.group(b, 2) for b in range(len(prompts))]))[0]
    return [torch.tensor([x for row in out.logprobs for x in row])], [scored.cpu()]


def theirs(name):
    """transformers' model of that shape, random."""
    from transformers import AutoConfig, AutoModelForCausalLM
    with torch.device(DEV):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]), dtype=TYPE, attn_implementation="sdpa").eval()


def transformers_generate(name, prompts, C):
    """Times itself, since it makes its model: every row its C tokens."""
    net, ids, times = theirs(name), torch.tensor(prompts, device=DEV), []
    for tokens in (8, C, C):
        begin = clock()
        net.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None)
        times.append(clock() - begin)
    return dict(seconds=[sum(times[1:]) / 2, *sorted(times[1:])])


def decode(name, B, P, C, dtype, perf, peers):
    net = create(name, dtype)
    prompts, (layers, head, kv), absent = random_prompts(net, B, P), numbers(net.shape), missing("transformers") if "transformers" in peers else []
    sample = partial(rollout.generate, net, prompts, group_size=1, max_new_tokens=C, stop_ids=[], slots=B)
    calls = dict(ours=sample, prompts=partial(sample, max_new_tokens=1)) | ({"no CUDA graphs": partial(sample, cuda_graphs=False)} if "graphs" in peers else {})
    calls |= dict(transformers=partial(transformers_generate, name, prompts, C)) if "transformers" in peers and not absent else {}
    phases = [(0, 2 * B * (P * layers + head)), (C * dtype.itemsize * (layers + head + B * (P + C / 2) * kv), 0)]
    return Case(calls, partial(same_logprobs, net, prompts[:4], min(C, 32)) if "check" in peers else None, phases, tokens=B * C, perf=perf, slack=2.5, without=absent)


def early(name, slots, G, P, C, dtype):
    net, u = create(name, dtype), torch.rand(4 * slots)
    lengths = (8 + torch.log1p(-u) / torch.log(torch.tensor(1 - 1 / (0.4 * C)))).long().clamp(min(8, C), C).tolist()  # as in bench/rollout.py
    prompts, (layers, head, kv) = random_prompts(net, 4 * slots // G, P), numbers(net.shape)

    def ours():
        stats = rollout.Sampler(net, prompts, G, lengths, [], (1.0, 0, 1.0, 0.0), slots, (0, 0, range(len(prompts))), "").run().stats
        return dict(useful=stats["useful_slot_steps"] / max(1, stats["slot_steps"]), useful_of_a_static_batch=sum(lengths) / (len(lengths) * max(lengths)))
    read = dtype.itemsize * (sum(lengths) / slots * (layers + head) + sum(n * (P + n / 2) for n in lengths) * kv)
    return Case(dict(ours=ours), None, [(0, 2 * len(prompts) * P * layers), (read, 0)], tokens=sum(lengths))


def update_ops(net, P, C, G, B, trained=False):
    """Operations forward and backward; a frozen weight has no gradient."""
    return (4 + 2 * trained) * B * sum(n * tokens for n, tokens in zip(numbers(net.shape), (P + G * C, G * C)))


def gradients(net, prompts, groups):
    """The mean log-probability's gradient, one vector of all trained weights."""
    return [torch.cat([g.flatten() for g in torch.autograd.grad(net.completion_logprobs(prompts, groups)[0].mean(), [p for p in net.parameters() if p.requires_grad])])]


def update(name, P, C, G, B, dtype, rank, peer):
    """peer: "torch", every kernel in its torch form, or "separate", a prompt for each completion."""
    net = create(name, dtype, rank)
    prompts, groups = random_prompts(net, B, P), [random_prompts(net, G, C) for _ in range(B)]
    ours, apart = partial(gradients, net, prompts, groups), partial(gradients, net, [p for p in prompts for _ in range(G)], [[c] for group in groups for c in group])
    other = apart if peer == "separate" else partial(in_torch, ours)
    return Case({"ours": ours, peer: other}, lambda: (ours(), other()), [(0, update_ops(net, P, C, G, B, not rank))], slack=2.5)


def one_step(net, optimizer, prompts, G, C, micro_tokens):
    """A GRPO step without a reference; rewards are made up. Returns the seconds of its two halves."""
    start, N = clock(), len(prompts) * G
    out = rollout.generate(net, prompts, group_size=G, max_new_tokens=C, stop_ids=[])
    sampled = clock()
    adv = losses.advantages(torch.arange(float(N)).sin().view(-1, G)).view(-1).to(DEV)
    for cut in models.micro_batches(prompts, [out.group(b, G) for b in range(len(prompts))], micro_tokens):
        rows = [b * G + g for b, members in cut for g in members]
        logp, entropy, row = net.completion_logprobs([prompts[b] for b, _ in cut], [[out.ids[b * G + g] for g in members] for b, members in cut])
        losses.policy_loss(logp, torch.tensor([x for n in rows for x in out.logprobs[n]], device=DEV), adv[rows], row, entropy=entropy, norm=float(N * C))[0].backward()
    optimizer.step(1e-6, max_norm=1.0)
    optimizer.zero_grad()
    return dict(sample=sampled - start, update=clock() - sampled)


def trl_step(name, B, G, P, C):
    import datasets, peft, tokenizers, transformers, trl

    V, marks, spent = SHAPES[name]["vocab_size"], [], dict(sample=0.0)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    begin, end = lambda *_, **__: spent.update(sample=0.0) or marks.append(clock()), lambda *_, **__: marks.append(clock())
    watch = type("Watch", (transformers.TrainerCallback,), dict(on_step_begin=begin, on_step_end=end))()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    adapter = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    prompts = [" ".join(f"w{i}" for i in ids) for ids in torch.randint(2, V, (2 * B, P)).tolist()]
    with tempfile.TemporaryDirectory() as folder:
        quiet = dict(report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False, output_dir=folder)
        options = trl.GRPOConfig(**quiet, use_cpu=DEV == "cpu", bf16=DEV == "cuda", per_device_train_batch_size=G, gradient_accumulation_steps=B, num_generations=G,
                                 max_completion_length=C, beta=0.0, max_steps=2, learning_rate=1e-6, generation_kwargs=dict(min_new_tokens=C))
        trainer = trl.GRPOTrainer(theirs(name), args=options, processing_class=tokenizer, callbacks=[watch], peft_config=adapter,
                                  reward_funcs=lambda completions, **_: [float(len(c)) for c in completions], train_dataset=datasets.Dataset.from_dict(dict(prompt=prompts)))
        trainer._generate_single_turn = Timed(trainer._generate_single_turn, "sample", spent)
        trainer.train()
    return dict(seconds=[marks[3] - marks[2]] * 3, sample=spent["sample"], update=marks[3] - marks[2] - spent["sample"])


def step(name, B, G, P, C, dtype):
    net, absent = create(name, dtype, 16), missing("trl", "peft", "datasets", "transformers")
    optimizer, prompts, (layers, head, kv) = optim.AdamW(list(net.named_parameters()), lr=1e-6), random_prompts(net, B, P), numbers(net.shape)
    calls = dict(ours=partial(one_step, net, optimizer, prompts, G, C, 16_384)) | ({} if absent else dict(TRL=partial(trl_step, name, B, G, P, C)))
    read = C * dtype.itemsize * (B * G / min(256, B * G) * (layers + head) + B * G * (P + C / 2) * kv)
    return Case(calls, None, [(0, 2 * B * P * layers), (read, 0), (0, update_ops(net, P, C, G, B))], without=absent)


def decode_row(name, B, goal="", peers=()):
    return Row(f"decode {name}, B {B}", partial(decode, perf=PERF[name].get(B, 0.0), peers=peers), (name, B, 256, 256), ("tiny", 2, 3, 4), goal)


GOALS = [
    decode_row("0.5B", 256, "150k, then 200k tok/s", ("graphs", "transformers")), decode_row("0.5B", 1, "1.3k, then 1.7k tok/s", ("graphs",)),
    Row("whole step 0.5B LoRA, 32 x 16 x (128 + 384)", step, ("0.5B", 32, 16, 128, 384), ("tiny", 2, 2, 3, 4), "3.5 s, then 2.5 s"),
    Row("shared prompt, P 150 / C 200, G 16", partial(update, rank=16, peer="separate"), ("0.5B", 150, 200, 16, 4), ("tiny", 5, 4, 3, 2), "separate 1.45x"),
    Row("early lengths 0.5B, 1,024 rows, 256 slots", early, ("0.5B", 256, 16, 256, 256), ("tiny", 2, 4, 3, 4), "useful 0.9")]
ROWS = GOALS + [
    decode_row("0.5B", 64, "", ("check", "graphs", "transformers")), decode_row("1.5B", 256, "75k tok/s", ("transformers",)), decode_row("7B", 256, "27k tok/s"), decode_row("135M", 256),
    *[Row(f"update 0.5B{told}, 4 x 16 x (128 + 384)", partial(update, rank=r, peer="torch"), ("0.5B", 128, 384, 16, 4), ("tiny", 5, 4, 3, 2)) for r, told in ((16, " LoRA"), (0, ""))],
    *[decode_row(name, B, "", ("check",) if B == 64 else ()) for name in ("135M", "1.5B", "7B") for B in (64, 1)]]
