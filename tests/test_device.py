"""What a GPU would trip over, found without one: on torch's "meta" device tensors have a place and no values.

There, reading a value back raises (on a GPU the host would wait, and a CUDA graph cannot be recorded), and so
does an operation on tensors of two devices. Triton's kernels are launched and do nothing. So whatever passes
here neither waits for the device nor mixes it with the host.
"""

import pytest
import torch

import decode
import kernels
import lora
import model as models
import optim
import parking
import rollout
from conftest import TINY
from head import policy_head
from kernels.sample import greedy, sample
from loss import Tokens

META = torch.device("meta")
PROMPTS = [[1, 2, 3], [4, 5]]
GROUPS = [[[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]]]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(params=["triton", "torch"])
def launched(request, monkeypatch):
    """Every kernel in its Triton form, or in torch's; gives the names of the kernels launched, in order."""
    names = []
    if request.param == "triton":
        pytest.importorskip("triton")
        import kernels.flash_attention as flash
        import kernels.rms_norm as norm

        monkeypatch.setattr(flash, "capability", lambda device: 90)

        def launch(self, *args, grid, warmup, **options):
            assert all(x.device == META for x in args if isinstance(x, torch.Tensor)), self
            names.append(self.__name__)

        monkeypatch.setattr(type(norm._norm_kernel), "run", launch)
    kernels.use(request.param)
    yield names
    kernels.use("auto")


def on_meta(rank=0, dropout=0.1):
    with META:
        net = models.Transformer(dict(TINY, model_type="qwen3", vocab_size=1000, head_dim=16))
    net = net.to(torch.bfloat16)
    if rank:
        net = lora.apply(net, rank=rank, alpha=8, dropout=dropout, targets=list(TARGETS))
    return net


def numbers(*x):
    return torch.tensor(x).to(META)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kl", ["k3", "full", "forward, top 3"])
def test_an_update_waits_for_the_gradient_norm_only(launched, monkeypatch, rank, kl):
    net = on_meta(rank).train()
    net.checkpointing = "layers" if kl == "k3" else "light"
    with torch.no_grad(), lora.disabled(net):
        ref_logp, _, rows = net.completion_logprobs(PROMPTS, GROUPS)
    hidden, targets = net.completion_hidden(PROMPTS, GROUPS)
    tokens = Tokens(
        rows=rows,
        adv=torch.ones(4, device=META),
        lengths=numbers(3, 1, 2, 4),
        sampler_logp=ref_logp,
        old_logp=ref_logp,
        ref_logp=ref_logp if kl == "k3" else None,
    )
    reference = None
    if kl != "k3":
        reference = (hidden.detach(), net.head.detach(), *(("forward", 3) if "top" in kl else ()))
        kl = "full"
    objective = dict(objective="clip", beta=0.1, kl=kl, entropy_coef=0.01, aggregate="sequence", norm=4.0)
    loss, _, _ = policy_head(
        hidden, net.head, targets, tokens, objective, reference=reference, temperature=0.9
    )
    loss.backward()
    assert all(p.grad.device == META for p in net.parameters() if p.requires_grad)
    optimizer = optim.AdamW(list(net.named_parameters()), lr=1e-3)
    with pytest.raises(RuntimeError, match="item"):
        optimizer.step(1e-3, max_norm=1.0)
    monkeypatch.setattr(torch, "isfinite", lambda x: True)
    optimizer.step(1e-3, max_norm=1.0)


@pytest.mark.parametrize("rank, merged", [(0, False), (4, False), (4, True)])
def test_prefill_and_a_decoding_step_never_wait(launched, rank, merged):
    net = on_meta(rank, dropout=0.0).eval()
    if merged:
        lora.merge(net)
    slots = decode.Slots(net, groups=3, slots=4, prompt_tokens=16, new_tokens=8, block=2)

    def choose(hidden, key):
        logits = models.logits_fp32(hidden, net.head)
        if launched:
            return sample(logits, key, temperature=0.7, top_k=5, top_p=0.9)
        return *greedy(logits), None

    with torch.no_grad():
        slots.begin(net, choose, slots=4, stop_ids=[2], cuda_graphs=True)
        prefill = rollout.Prefill(net, PROMPTS, slots.cache, [0, 1])
        assert net(prefill.ids, prefill.positions, prefill)[prefill.last].shape == (2, 32)
        keys = torch.zeros(2, 9, dtype=torch.long, device=META)
        slots.enter(numbers(0, 1), numbers(5, 6), numbers(3, 2), numbers(0, 0), numbers(8, 8), keys)
        slots.seat([0, 1])
        launched.clear()
        slots.step(2)
        if launched:
            assert {"_cache_kernel", "_sample_kernel"} <= set(launched)
            # A layer: two norms, those of queries and keys, rotation with the cache, attention, SwiGLU. The
            # adapter beside it: x A^T of q, k, v and of gate, up at once, so four, and seven h B^T. Merged it
            # adds none. The last norm, and the draw's blocks, cut, blocks above the cut, and choice.
            beside = bool(rank) and not merged
            assert len(launched) == 2 * (7 + 11 * beside) + 1 + 4, launched
        slots.seat([0, 1, 0, 1])
        slots.step(4)
        slots.move(numbers(1), numbers(0))
        slots.cache.move_group(0, 1)
        if launched:  # given ids between two turns
            pieces = [
                dict(slot=3, place=1, prompt=2, own=1, ids=[5, 6]),
                dict(slot=2, place=0, prompt=3, own=0, ids=[7]),
            ]
            plan = parking.Extend(net, slots.cache, pieces)
            assert net(plan.ids, plan.positions, plan)[plan.last].shape == (2, 32)


def test_the_meta_device_finds_such_faults():
    x = torch.ones(3, device=META)
    with pytest.raises(RuntimeError):
        bool(x.sum() > 0)
    with pytest.raises(RuntimeError):
        x + torch.ones(3)
