"""Objectives of the last year as functions of a config file, on the model and data of configs/arithmetic.py.

    python train.py configs/objectives_2026.py --objective=sapo
    python train.py configs/objectives_2026.py --objective=gmpo --aggregate=sequence --gmpo_low=0.3
    python train.py configs/objectives_2026.py --objective=clip --advantage=maxrl

Copy one into a config of your own. Each is its paper's formula, in the form that loss.py has: logp, the ratio
to what the tokens were drawn with, and the advantage, (T,) each; keyword arguments are keys. Each stands
beside a loop over rows and tokens in tests/test_objectives_2026.py. TIS is `cispo`, or the key mismatch_clip.
"""

import runpy

import torch

globals().update(runpy.run_path("configs/arithmetic.py"))


def sapo(logp, ratio, adv, *, tau_pos=1.0, tau_neg=1.05):
    """A sigmoid gate instead of the clip: SAPO, arXiv:2511.20347 (TRL's loss_type "sapo").

    f(rho) = 4 / tau * sigmoid(tau (rho - 1)): its slope at 1 is 1, and falls smoothly on both sides, faster
    where A < 0.
    """
    tau = tau_neg + (tau_pos - tau_neg) * (adv > 0).to(adv)
    return -adv * torch.sigmoid(tau * (ratio - 1)) * 4 / tau


def gmpo(logp, ratio, adv, row_mean, *, gmpo_low=0.4, gmpo_high=0.4):
    """The geometric mean of a row's ratios, each clipped first in logarithms: GMPO, arXiv:2507.20673.

    With aggregate="sequence" the mean over rows of -exp(mean log rho) A, as in TRL's GMPOTrainer.
    """
    log_ratio = ratio.clamp(min=1e-30).log()
    clipped = log_ratio.clamp(-gmpo_low, gmpo_high)
    kept = torch.where(adv > 0, torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped))
    low, high = (log_ratio < -gmpo_low) & (adv < 0), (log_ratio > gmpo_high) & (adv > 0)
    return -row_mean(kept).exp() * adv, low, high


gmpo.takes_row_mean = True


def dppo(logp, ratio, adv, *, delta=0.15, binary_kl=False):
    """A trust region of probabilities instead of ratios: DPPO, arXiv:2602.04879, binary TV or binary KL.

    A token whose probability has moved by more than delta in the direction in which A pushes it is left out:
    a rare word may double, a likely one may not halve. 0.15 is the paper's for TV, 0.05 for KL. TRL's
    DPPOTrainer also caps the ratio at 20.
    """
    now = logp.detach().exp()
    before = (now / ratio.detach()).clamp(max=1.0)
    moved = bernoulli_kl(before, now) if binary_kl else (now - before).abs()
    low, high = (moved > delta) & (now < before) & (adv < 0), (moved > delta) & (now > before) & (adv > 0)
    return -torch.where(low | high, 0.0, ratio) * adv, low, high


def bernoulli_kl(p, q):
    """KL between coins that show the word with probability p and q (T,), nats."""
    p, q = p.clamp(1e-7, 1 - 1e-7), q.clamp(1e-7, 1 - 1e-7)
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def icepop(logp, ratio, adv, *, ratio_low=0.5, ratio_high=5.0):
    """Tokens whose ratio leaves [ratio_low, ratio_high] are dropped, not clipped: IcePop, arXiv:2510.18855.

    As Eq. 1 of arXiv:2512.16144 has it; rho compares the trainer with the sampler.
    """
    low, high = (ratio < ratio_low) & (adv != 0), (ratio > ratio_high) & (adv != 0)
    return -torch.where(low | high, 0.0, ratio) * adv, low, high


def maxrl(rewards, prompts, state):
    """(r - mean) / mean of the group: MaxRL, arXiv:2602.02710. For rewards of 0 and 1.

    The gradient approaches that of log p, of the probability p that a prompt is solved, instead of p: a
    prompt that is seldom solved weighs more, by 1 / p. A mean that is not above 0 gives no advantage.
    """
    mean = rewards.nanmean(1, keepdim=True)  # (B, 1)
    return torch.where(rewards.isnan() | (mean <= 0), 0.0, (rewards - mean) / mean), state


objective = sapo
epochs = 2  # with one update a batch the ratio is 1, and all of them are the same
