"""Other people's code that the benches run beside ours: transformers, TRL, Liger, cut-cross-entropy.

Nothing is imported before it is called, and `missing` says what is not installed.
"""

import importlib.util
import tempfile
import time


def missing(*packages: str) -> list[str]:
    return [name for name in packages if not importlib.util.find_spec(name)]


# -------------------------------------------------------------------------------------------------- the head
def liger_loss(hidden, weight, targets, tokens, length: int):
    """LigerFusedLinearGRPOLoss, uncompiled, of sequences of `length` tokens. tokens: loss.Tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    n = len(tokens.adv)
    head = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo")
    mask = hidden.new_ones(n, length, dtype=hidden.dtype).float()
    old = tokens.old_logp.view(n, length)
    whole = hidden.view(n, length, -1)
    return head(whole, weight, targets.view(n, length), mask, tokens.adv, old_per_token_logps=old)[0]


def cut_logprob(hidden, weight, targets):
    """Log-probabilities by cut-cross-entropy (arXiv:2411.09009)."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


# ---------------------------------------------------------------------------------------------- whole models
def random_transformer(sizes: dict, *, dtype, device):
    """transformers' model of these sizes, random."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def generate(model, prompts, C: int):
    """transformers' generate: C tokens after each of these prompts of one length, by plain sampling."""
    import torch

    ids = torch.tensor(prompts, device=model.device)
    plain = dict(do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None)
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=C, **plain)


def word_tokenizer(V: int):
    """A tokenizer of the words w0, w1, .. with their numbers as ids, for TRL, which wants text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


class Timed:
    """A function whose seconds are added to spent[phase]."""

    def __init__(self, function, phase, spent, counts=lambda: True):
        self.function, self.phase, self.spent, self.counts = function, phase, spent, counts

    def __call__(self, *args, **kw):
        counts, start = self.counts(), time.perf_counter()
        try:
            return self.function(*args, **kw)
        finally:
            if counts:
                self.spent[self.phase] += time.perf_counter() - start


def trl_steps(model, tokenizer, prompts, *, B, G, C, steps, rank, beta, cpu, bf16) -> list[dict]:
    """Seconds of each of TRL's GRPO steps: sample, reference, update and the whole step.

    B prompts of text and G completions of exactly C tokens a step, a group a micro-batch; LoRA of this rank,
    0 for full fine-tuning.
    """
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    spent, found = dict(sample=0.0, reference=0.0), []

    class Record(TrainerCallback):
        def on_step_begin(self, *_, **__):
            spent.update(sample=0.0, reference=0.0)
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            if not cpu:
                torch.cuda.synchronize()
            whole = time.perf_counter() - self.start
            found.append(dict(spent, update=whole - sum(spent.values()), step=whole))

    def reward(completions, **_):
        return [float(len(c)) for c in completions]

    adapter = None
    if rank:
        options = dict(target_modules="all-linear", task_type="CAUSAL_LM")
        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, **options)
    quiet = dict(report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            use_cpu=cpu,
            bf16=bf16,
            per_device_train_batch_size=G,
            gradient_accumulation_steps=B,
            num_generations=G,
            max_completion_length=C,
            generation_kwargs=dict(min_new_tokens=C),
            beta=beta,
            max_steps=steps,
            learning_rate=1e-6,
            gradient_checkpointing=False,
            **quiet,
        )
        trainer = trl.GRPOTrainer(
            model,
            args=config,
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[Record()],
            reward_funcs=reward,
            train_dataset=Dataset.from_dict(dict(prompt=prompts)),
        )
        sampling, scoring = trainer._generate_single_turn, trainer._get_per_token_logps_and_entropies
        trainer._generate_single_turn = Timed(sampling, "sample", spent)
        # the same function scores with a gradient in the update: only calls without are the reference's
        without_gradient = lambda: not torch.is_grad_enabled()
        trainer._get_per_token_logps_and_entropies = Timed(scoring, "reference", spent, without_gradient)
        trainer.train()
    return found
