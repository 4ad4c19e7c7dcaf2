"""What a GPU would trip over, found without one: on torch's "meta" device tensors have a place and no values.

There, reading a value back raises (on a GPU: the host waits, and a CUDA graph cannot be recorded), and so does an operation on tensors of two
devices. Triton's kernels are launched and do nothing. So whatever passes here neither waits for the device nor mixes it with the host.
"""

import pytest
import torch

import decode
import kernels
import lora
import loss as losses
import model as models
import optim
import rollout
from conftest import TINY
from kernels.policy_head import policy_head
from kernels.sample import greedy, sample

META, PROMPTS, GROUPS = (
    torch.device("meta"),
    [[1, 2, 3], [4, 5]],
    [[[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]]],
)


@pytest.fixture(params=["triton", "torch"])
def launched(request, monkeypatch):
    """Every kernel in its Triton form, or in torch's; gives the names of the kernels that were launched, in order."""
    names = []
    if request.param == "triton":
        pytest.importorskip("triton")
        import kernels.flash_attention as flash
        import kernels.rms_norm as norm

        monkeypatch.setattr(flash, "capability", lambda device: 90)

        def launch(self, *args, grid, warmup, **options):
            assert all(a.device == META for a in args if isinstance(a, torch.Tensor)), self
            names.append(self.__name__)

        monkeypatch.setattr(type(norm._norm_kernel), "run", launch)
    kernels.use(request.param)
    yield names
    kernels.use("auto")


def on_meta(rank=0):
    with META:
        net = models.Transformer(dict(TINY, model_type="qwen3", vocab_size=1000, head_dim=16))
    net = net.to(torch.bfloat16)
    return (
        lora.apply(
            net,
            rank=rank,
            alpha=8,
            dropout=0.1,
            targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        )
        if rank
        else net
    )


def numbers(*x):
    return torch.tensor(x).to(META)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kl", ["k3", "full"])
def test_an_update_waits_for_the_gradient_norm_only(launched, monkeypatch, rank, kl):
    net = on_meta(rank).train()
    net.checkpointing = kl == "k3"
    with torch.no_grad(), lora.disabled(net):
        ref_logp, _, rows = net.completion_logprobs(PROMPTS, GROUPS)
    hidden, packed = net.completion_hidden(PROMPTS, GROUPS)
    adv, lengths = torch.ones(4, device=META), numbers(3, 1, 2, 4)

    def objective(logp, entropy, at, exact_kl=None):
        return losses.policy_loss(
            logp,
            ref_logp[at],
            adv,
            rows[at],
            ref_logp=ref_logp[at],
            entropy=entropy,
            exact_kl=exact_kl,
            beta=0.1,
            kl=kl,
            entropy_coef=0.01,
            aggregate="sequence",
            norm=4.0,
            lengths=lengths,
        )

    if kl == "k3":
        loss = policy_head(hidden, net.head, packed.targets, objective, temperature=0.9)[0]
    else:
        logp, entropy, exact_kl = net.scores(
            hidden, packed.targets, (hidden.detach(), net.head.detach()), temperature=0.9
        )
        loss, _ = objective(logp, entropy, slice(None), exact_kl)
    loss.backward()
    assert all(p.grad.device == META for p in net.parameters() if p.requires_grad)
    optimizer = optim.AdamW(list(net.named_parameters()), lr=1e-3)
    with pytest.raises(RuntimeError, match="item"):
        optimizer.step(1e-3, max_norm=1.0)
    monkeypatch.setattr(torch, "isfinite", lambda x: True)
    optimizer.step(1e-3, max_norm=1.0)


@pytest.mark.parametrize("rank", [0, 4])
def test_prefill_and_a_decoding_step_never_wait(launched, rank):
    net = on_meta(rank).eval()
    blocks = decode.Blocks(net, groups=3, slots=4, prompt_tokens=16, new_tokens=8, block=2)

    def choose(hidden, key):
        logits = models.logits_fp32(hidden, net.head)
        return (
            sample(logits, key, temperature=0.7, top_k=5, top_p=0.9) if launched else (*greedy(logits), None)
        )

    with torch.no_grad():
        blocks.begin(slots=4, stop_ids=[2], graphs=True)
        prefill = rollout.Prefill(net, PROMPTS, blocks.cache, [0, 1])
        assert net(prefill.ids, prefill.positions, prefill)[prefill.last].shape == (2, 32)
        blocks.enter(
            numbers(0, 1),
            numbers(5, 6),
            numbers(3, 2),
            numbers(8, 8),
            torch.zeros(2, 9, dtype=torch.long, device=META),
        )
        blocks.compose([0, 1])
        launched.clear()
        blocks.step(net, 2, choose)
        if launched:
            assert {"_store_kernel", "_sample_kernel"} <= set(launched)
            # a layer: two norms, those of queries and keys, rotation, keys, attention, SwiGLU; LoRA: x A^T of q, k, v and of gate, up at once, so four, and seven h B^T
            assert len(launched) == 1 + 1 + 2 * (8 + 11 * bool(rank)), launched
        blocks.step(net, 4, choose)
        blocks.cache.move_rows(numbers(1), numbers(0), 3)
        blocks.cache.move_group(0, 1)


def test_the_meta_device_finds_such_faults():
    x = torch.ones(3, device=META)
    with pytest.raises(RuntimeError):
        bool(x.sum() > 0)
    with pytest.raises(RuntimeError):
        x + torch.ones(3)
