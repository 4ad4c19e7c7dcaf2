"""GRPO's mathematics: from rewards to advantages, from log-probabilities to one scalar to minimise.

A group is G completions of one prompt. A completion is good if it beats its group: that difference is its advantage A.
The loss then makes every token of a good completion likelier and every token of a bad one less likely:

    A    = (r - mean of the group) / std of the group              advantages()
    l_t  = -min(rho A, clip(rho) A),  rho = exp(logp - old_logp)   one of OBJECTIVES; equals -A logp in gradient at rho = 1
    loss = sum over tokens of (l_t + beta KL_t - entropy_coef H_t), divided by one number        policy_loss()

All of it is pure functions of plain tensors and keywords, with no config object: copy the file out, or check it against a paper
line by line. A new objective is one function and one entry in OBJECTIVES. FORMULAS in the design notes has the same in a table.

Shapes: B prompts in a step, G completions of each, N = B * G rows, T completion tokens laid end to end without padding.
`rows` (T,) says whose token each is, so nothing here ever sees a pad or a mask. Log-probabilities, KL and entropy are in nats.

Papers: GRPO 2402.03300; Dr. GRPO 2503.20783; DAPO 2503.14476; RLOO 2402.14740; GSPO 2507.18071; CISPO 2506.13585;
dual clip 1912.09729; LitePPO 2508.08221; KL with the ratio 2512.02556, Eq. 7. Tests: python -m pytest tests/test_loss.py
"""
import difflib
import math

import torch


def pick(table, name, what):
    """`table[name]`, or a ValueError that lists the known names and the nearest one."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1)
    raise ValueError(f"unknown {what} {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
                     + f" Known: {', '.join(table)}.")


# ---------------------------------------------------------------------------------------------- advantages

def std_without_nan(r, ddof):
    """Standard deviation along the last axis of r (.., G) float64, NaN left out; (.., 1). Where too few are left: 0."""
    valid = ~r.isnan()
    n = valid.sum(-1, keepdim=True)
    centred = torch.where(valid, r - r.nanmean(-1, keepdim=True), 0.0)
    return (centred.square().sum(-1, keepdim=True) / (n - ddof).clamp(min=1)).sqrt()


# What r - mean is divided by. All four estimators of the table in FORMULAS are this one division.
SCALES = {
    "group": lambda r, n, ddof, eps: std_without_nan(r, ddof) + eps,                  # GRPO: every prompt weighs the same
    "none": lambda r, n, ddof, eps: torch.ones_like(r),                               # Dr. GRPO: easy prompts not blown up
    "batch": lambda r, n, ddof, eps: std_without_nan(r.reshape(1, -1), ddof) + eps,   # LitePPO: one scale for the step
    "rloo": lambda r, n, ddof, eps: (n - 1) / n,     # r - mean of the OTHERS = (r - mean) n / (n - 1): unbiased baseline
}


def advantages(rewards, *, scale="group", ddof=1, eps=1e-4):
    """How much better each completion is than the others of its group.

    rewards (B, G): NaN means None, 'cannot be scored': left out of mean and std, A = 0. `scale` is a name in SCALES; `ddof` 1
    (as TRL) or 0 divides the variance by n - ddof; `eps` is added to a std. "batch" must be given the rewards of the whole step,
    of all ranks. Returns (B, G) on the same device, float64 for float64 rewards, else float32. ValueError: an infinite reward, a
    group of one (with scale="none" it is allowed, and A is 0: a lone completion is its own mean), an unknown scale.
    """
    assert rewards.dim() == 2, f"rewards must be (B, G), one row a prompt, got {tuple(rewards.shape)}"
    B, G = rewards.shape
    divisor = pick(SCALES, scale, "scale")
    if ddof not in (0, 1) or eps < 0:
        raise ValueError(f"ddof must be 0 or 1 and eps >= 0, got ddof={ddof}, eps={eps}")
    if G < 2 and scale != "none":
        raise ValueError(f'group size {G} leaves nobody to compare with: use group_size >= 2 (scale="none" accepts 1, with A = 0)')
    # float64, on the CPU (MPS has none): (B, G) is tiny, and the numbers then do not depend on the device.
    r = rewards.detach().cpu().double()
    if r.isinf().any():
        where = [tuple(i) for i in r.isinf().nonzero().tolist()[:4]]
        raise ValueError(f"infinite reward at (prompt, sample) {where}: return None for 'cannot be scored', or a finite number")
    valid = ~r.isnan()
    n = valid.sum(1, keepdim=True).double()                                           # (B, 1) int / int would be float32
    # A group that says nothing, all equal or at most one scored, is found by an exact comparison. Its std is not 0 but rounding
    # noise: eight rewards of 0.1 need not average to 0.1, and noise / (noise + eps) has been a gradient of 7,000 elsewhere.
    differ = torch.where(valid, r, -math.inf).amax(1, keepdim=True) > torch.where(valid, r, math.inf).amin(1, keepdim=True)
    A = (r - r.nanmean(1, keepdim=True)) / divisor(r, n, ddof, eps)
    # where, not a product with the mask: NaN * 0 is NaN.
    A = torch.where(valid & differ, A, 0.0)                                           # (B, G)
    return A.to(rewards.device, torch.float64 if rewards.dtype == torch.float64 else torch.float32)


def normalize_then_sum(parts, weights, *, ddof=1, eps=1e-4):
    """Advantages of R rewards at once: each normalised in its group, weighted and summed, the sums normalised over the step (GDPO, 2601.05242).

    parts (B, G, R), NaN for None, of the whole step; weights (R,). Returns (B, G), in the dtype that `advantages` returns. Summing first
    gives (0, 2), (1, 1) and (2, 0) one reward and one advantage, and a reward of large spread drowns one of small spread; here each counts
    as its weight says. A part that is None adds nothing. A row without any part, and a group all of whose parts are equal, have A = 0.
    """
    assert parts.dim() == 3 and weights.shape == parts.shape[2:], f"parts must be (B, G, R), weights (R,), got {tuple(parts.shape)}, {tuple(weights.shape)}"
    each = torch.stack([advantages(part.double(), ddof=ddof, eps=eps) for part in parts.unbind(2)], 2)  # (B, G, R), 0 for NaN
    counted = weights.double().to(each.device) != 0
    total = (each * weights.double().to(each.device)).sum(2)                          # (B, G)
    live = (each[:, :, counted] != 0).any(2).any(1, keepdim=True) & ~parts[:, :, counted].isnan().all(2)
    # over the rows that have an advantage: those without would only shrink the spread, and must stay at exactly 0
    chosen = total[live]
    std = chosen.std(correction=ddof) if len(chosen) > ddof else chosen.new_zeros(())
    A = torch.where(live, (total - (chosen.mean() if len(chosen) else 0.0)) / (std + eps), 0.0)
    return A.to(torch.float64 if parts.dtype == torch.float64 else torch.float32)


# ---------------------------------------------------------------------------------------------- ratios and KL

def tamed(f, x):
    """f(x) for f = exp or expm1, continued along its tangent above x = 80 (float32) or 701 (float64): no overflow.

    Below, bit for bit f(x), and so is the gradient. Above, exp would soon be infinite, and then a token that clipping has
    switched off still ruins the step, since its gradient is 0 * inf = NaN. A plain clamp would be finite too, but its
    gradient is 0: k3 would then push the wrong way, exactly on the tokens that have drifted furthest.
    """
    top = math.log(torch.finfo(x.dtype).max) - 8    # 8 nats of room, a factor of 3,000, for advantages and sums
    return f(x.clamp(max=top)) * (1 + (x - top).clamp(min=0))


def row_mean(x, rows, lengths):
    """The mean of x (T,) over each row, handed to each of its tokens (T,); gradients flow. lengths (N,): tokens of each row."""
    # index_add and index_select, not x[rows]: on the CPU their sums run in a fixed order, forward and backward, so a resumed
    # run gets the same bits. (On a GPU torch.use_deterministic_algorithms(True) does that.)
    sums = x.new_zeros(lengths.shape[0]).index_add(0, rows, x)                        # (N,)
    return (sums / lengths.clamp(min=1)).index_select(0, rows)                        # (T,)


# Estimators of KL(policy || reference) from d = ref_logp - logp at the sampled token (http://joschu.net/blog/kl-approx.html).
KL = {
    "k1": lambda d: -d,                               # unbiased, but of either sign. Its gradient alone has mean 0 under the
                                                      # policy: as a loss term it does nothing unless kl_times_ratio is set
    "k2": lambda d: d.square() / 2,                   # biased value, unbiased gradient on-policy
    "k3": lambda d: tamed(torch.expm1, d) - d,        # unbiased, never negative; expm1: exp(d) - 1 - d is all rounding near 0
    "full": None,                                     # the exact KL over the vocabulary, `exact_kl`: no estimate, no variance
}


# ---------------------------------------------------------------------------------------------- objectives
# Each takes logp, ratio and adv, all (T,), and the keywords that it wants; returns l (T,) to be minimised and two bool (T,):
# tokens held back at the lower and at the upper bound, for the log. `ratio` carries the gradient of logp.

def reinforce(logp, ratio, adv, **_):
    """-A logp: the policy gradient as it is, for data that the policy itself has just sampled."""
    none = torch.zeros_like(adv, dtype=torch.bool)
    return -adv * logp, none, none


def clip(logp, ratio, adv, *, clip_low, clip_high, dual_clip, **_):
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A): PPO's bound; Eq. 3 of GRPO. No gradient once far enough."""
    gain = torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    if dual_clip is not None:
        # min() leaves one side open: A < 0 and a token that became much likelier, where -rho A has no bound. Cap rho at c.
        gain = torch.where(adv < 0, torch.maximum(gain, dual_clip * adv), gain)
    # In TRL's sense: clipped is a token past the bound in the direction that its advantage pushes, not just any outside.
    return -gain, (ratio < 1 - clip_low) & (adv < 0), (ratio > 1 + clip_high) & (adv > 0)


def cispo(logp, ratio, adv, *, cispo_max, **_):
    """-sg(min(rho, cispo_max)) A logp: bounds the weight of a token and never its gradient, so rare words keep learning."""
    weight = ratio.detach().clamp(max=cispo_max)
    return -weight * adv * logp, torch.zeros_like(adv, dtype=torch.bool), (ratio > cispo_max) & (adv != 0)


OBJECTIVES = {"reinforce": reinforce, "clip": clip, "cispo": cispo, "gspo": clip}

# GSPO is clip with ONE ratio for a sequence, the geometric mean over its tokens, since that is what the reward judged. These
# objectives need whole rows in a call; the others are elementwise and may be called on any chunk of tokens.
SEQUENCE_LEVEL = {"gspo"}


# ---------------------------------------------------------------------------------------------- the loss

# What the sum over tokens is divided by, from counts of the whole step. Each is linear in the rows: ranks add theirs up.
AGGREGATES = {
    "token": lambda tokens, rows, group_size, max_new_tokens: tokens,                 # DAPO: every token weighs the same
    "sequence": lambda tokens, rows, group_size, max_new_tokens: rows,                # GRPO: each token first divided by C_i
    "constant": lambda tokens, rows, group_size, max_new_tokens: rows * max_new_tokens,   # Dr. GRPO: length cannot dilute
    "group": lambda tokens, rows, group_size, max_new_tokens: rows / group_size,      # whole-sequence sums, mean over prompts
}


def highest(entropy, fraction):
    """Bool (T,): the `fraction` of the tokens with the highest entropy (T,), nats; ties are kept. At least one token.

    The forking tokens of arXiv:2506.01939: a policy term on the highest fifth alone learns as well, or better. Give it the tokens of the
    whole step, or what is kept depends on the micro-batch.
    """
    assert 0 < fraction <= 1, f"fraction must be in (0, 1], got {fraction}"
    keep = max(1, math.ceil(fraction * len(entropy))) if len(entropy) else 0
    return entropy >= entropy.topk(keep).values[-1] if keep else torch.zeros_like(entropy, dtype=torch.bool)


def mismatch_weight(trainer_logp, sampler_logp, most):
    """min(exp(trainer - sampler), most) per token (T,), without gradient: corrects for a sampler that is not the trainer's model.

    Truncated importance sampling (https://fengyao.notion.site/off-policy-rl): for `weight` of policy_loss, with old_logp the trainer's.
    """
    return tamed(torch.exp, (trainer_logp - sampler_logp).detach()).clamp(max=most)


def divide_by(aggregate, tokens, rows, group_size, max_new_tokens):
    """The divisor of `aggregate` as a float, or a sentence about the keyword that it lacks."""
    divisor = pick(AGGREGATES, aggregate, "aggregate")
    needed = {"group": ("group_size", group_size), "constant": ("max_new_tokens", max_new_tokens)}.get(aggregate)
    if needed and not needed[1]:
        raise ValueError(f"aggregate={aggregate!r} divides by {needed[0]}: pass {needed[0]}= (or norm= to policy_loss)")
    return float(divisor(tokens, rows, group_size, max_new_tokens))


def normaliser(lengths, *, aggregate, group_size=None, max_new_tokens=None):
    """The number that a whole optimiser step is divided by; `norm` of policy_loss. Call it once, before the first micro-batch.

    lengths: list or (N,) tensor of ints, the completion tokens of every row that is in the loss; a row of no tokens counts as a
    row, a row that was masked out is left out by the caller. Ranks call it on their own rows and add the results.
    Dividing by a micro-batch's own count instead makes a short completion weigh more when it sits among short ones.
    """
    lengths = torch.as_tensor(lengths)
    return divide_by(aggregate, int(lengths.sum()), lengths.numel(), group_size, max_new_tokens)


def refuse_nonsense(logp, old_logp, adv, rows, ref_logp, entropy, lengths, weight, exact_kl, objective, clip_low, clip_high, dual_clip,
                    cispo_max, beta, kl, entropy_coef, norm):
    """Everything that would train on silently wrong numbers stops here, in a sentence. No check reads a tensor's values."""
    assert logp.dim() == 1 and adv.dim() == 1, f"logp must be (T,) and adv (N,), got {tuple(logp.shape)} and {tuple(adv.shape)}"
    per_token = {"old_logp": old_logp, "rows": rows, "ref_logp": ref_logp, "entropy": entropy, "weight": weight, "exact_kl": exact_kl}
    for name, x in per_token.items():
        assert x is None or x.shape == logp.shape, f"{name} must be (T,) like logp, got {tuple(x.shape)} and {tuple(logp.shape)}"
    assert lengths is None or lengths.shape == adv.shape, f"lengths {tuple(lengths.shape)} must be (N,) like adv {tuple(adv.shape)}"
    for name, x in {"logp": logp, "old_logp": old_logp, "ref_logp": ref_logp}.items():
        if x is not None and x.dtype not in (torch.float32, torch.float64):
            # At logp = -8 neighbouring bf16 numbers are 0.06 apart: every ratio would be noise as wide as a clip range.
            raise ValueError(f"{name} is {x.dtype}: compute log-probabilities in float32, the ratio of rounded ones is noise")
    if min(clip_low, clip_high) < 0 or (dual_clip is not None and dual_clip <= 1):
        raise ValueError(f"need clip_low, clip_high >= 0 and dual_clip > 1, got {clip_low}, {clip_high}, {dual_clip}")
    if cispo_max < 1:
        raise ValueError(f"cispo_max={cispo_max} caps the ratio itself: use about 5.0, not a width such as clip_high's 0.28")
    if (beta and (exact_kl if kl == "full" else ref_logp) is None) or (entropy_coef and entropy is None):
        raise ValueError('a KL term (beta) needs ref_logp=, or exact_kl= with kl="full"; an entropy bonus (entropy_coef) needs entropy=')
    if objective in SEQUENCE_LEVEL and lengths is not None:
        raise ValueError(f"{objective} has one ratio for a whole row, so rows cannot be cut into chunks: leave out lengths=")
    if len(logp) and norm <= 0:
        raise ValueError(f"norm={norm} for {len(logp)} tokens: it is the divisor of the whole step, see normaliser()")


def policy_loss(logp, old_logp, adv, rows, *, ref_logp=None, entropy=None, objective="clip", aggregate="token",
                clip_low=0.2, clip_high=0.2, dual_clip=None, cispo_max=5.0, beta=0.0, kl="k3", kl_times_ratio=False,
                entropy_coef=0.0, group_size=None, max_new_tokens=None, norm=None, lengths=None, weight=None, exact_kl=None):
    """The loss of T completion tokens, and the sums that the log needs.

    logp (T,) float32 or float64 with gradient; old_logp (T,) the sampler's, ref_logp (T,) the reference's, both detached here.
    adv (N,); rows (T,) int64 indexes it. entropy (T,) nats, with gradient if entropy_coef is to do anything.
    norm: the step's divisor, a float from `normaliser`; default: that of the tokens given. With it, the losses and gradients of
    any split of the rows add up to those of the whole step, whatever the options.
    lengths (N,) int: tokens of each row, default: counted here. Give it, and norm, to call this on chunks that cut rows.
    weight (T,) >= 0: multiplies the policy term alone: 0 / 1 to keep only some tokens, or a truncated trainer / sampler ratio.
    exact_kl (T,) with gradient: KL(policy || reference) over the whole vocabulary at each token, for kl="full" (kernels/exact_kl.py).

    The KL (times beta) and the entropy (times -entropy_coef) are added after clipping, under the same aggregation.
    kl_times_ratio multiplies the estimator by the token's own rho, with the gradient through rho (DeepSeek-V3.2, Eq. 7; TRL's
    use_bias_correction_kl, except that TRL takes the sequence's ratio in GSPO). Value and gradient of k3, and of k1, are then
    unbiased. It matters on-policy too: the gradient of k3 alone is that of KL(reference || policy), the other way round.

    A token whose advantage is exactly 0 adds exactly 0, with a gradient of exactly 0, to the policy term: also where
    logp - old_logp is infinite. Elsewhere a ratio above e^80 (float32) is continued linearly (see `tamed`); NaN stays NaN.

    Returns (loss, stats): loss 0-d, in logp's dtype; stats a dict of 0-d detached tensors of that dtype, made without waiting
    for the GPU; merge them with `add_stats`. Sums: tokens; loss and policy_loss (shares: already divided by norm); kl (only with
    ref_logp), entropy (only with entropy); clip_low, clip_high, clip_region = either (tokens held back at that bound; cispo: at
    cispo_max); diff_sum of |logp - old_logp|; ratio_sum. Extremes: diff_max, ratio_min, ratio_max. diff and ratio are the
    token's own, in GSPO too: on-policy they measure the trainer against the sampler.
    """
    T, N = logp.numel(), adv.numel()
    loss_of, kl_of, _ = pick(OBJECTIVES, objective, "objective"), pick(KL, kl, "kl"), pick(AGGREGATES, aggregate, "aggregate")
    norm = divide_by(aggregate, T, N, group_size, max_new_tokens) if norm is None else norm
    refuse_nonsense(logp, old_logp, adv, rows, ref_logp, entropy, lengths, weight, exact_kl, objective, clip_low, clip_high, dual_clip,
                    cispo_max, beta, kl, entropy_coef, norm)

    # Everything but logp and entropy is a constant. Passing old_logp=logp, the on-policy call with its detach() forgotten, would
    # otherwise give a ratio of 1 whose gradient is 0: a run that learns nothing and says nothing.
    old, A = old_logp.detach().to(logp), adv.detach().to(logp)[rows]                  # (T,), (T,)
    if lengths is None:
        lengths = rows.new_zeros(N).index_add(0, rows, torch.ones_like(rows))         # (N,) bincount would wait for the GPU
    # Tokens of advantage 0 leave before the exponential, not after it: 0 * inf = NaN cannot be repaired.
    live = A != 0
    lp = torch.where(live, logp, 0.0)
    d = lp - torch.where(live, old, 0.0)
    if objective in SEQUENCE_LEVEL:
        d = row_mean(d, rows, lengths)      # the mean of the log-ratios: their sum leaves any clip range on a long answer
    if weight is not None:
        A = A * weight.detach().to(logp)    # into A: every objective is linear in |A|
    term, low, high = loss_of(lp, tamed(torch.exp, d), A, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
                              cispo_max=cispo_max)
    # What one token weighs. It knows the step (norm) and its row (1 / C_i) but not who else is in this call: hence the invariance.
    share = 1 / (norm or 1)                                                           # a step without tokens: 0, not 0 / 0
    if aggregate == "sequence":
        share = share / lengths.to(logp)[rows]                                        # (T,)
    loss = policy = (share * term).sum()

    kls = None
    if (exact_kl if kl == "full" else ref_logp) is not None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and beta != 0):           # beta = 0: watched, not trained on
            kls = exact_kl.to(logp) if kl == "full" else kl_of(ref_logp.detach().to(logp) - logp)   # (T,)
            if kl_times_ratio:
                kls = kls * tamed(torch.exp, logp - old)
    if beta:
        loss = loss + beta * (share * kls).sum()
    if entropy_coef:
        loss = loss - entropy_coef * (share * entropy).sum()
    return loss, measure(logp, old, low, high, loss=loss, policy_loss=policy, kl=kls, entropy=entropy)


@torch.no_grad()
def measure(logp, old, low, high, **sums):
    """The stats of policy_loss; `sums` are tensors to be summed up, or None for what was not computed."""
    diff = logp - old                                                                 # (T,)
    ratio = tamed(torch.exp, diff)
    # One value of no effect at the end: a rank may have no tokens, and min and max of nothing raise.
    zero, inf = logp.new_zeros(1), logp.new_full((1,), math.inf)
    stats = {k: v.sum() for k, v in sums.items() if v is not None}
    stats |= {"tokens": logp.new_full((), len(logp)), "diff_sum": diff.abs().sum(), "ratio_sum": ratio.sum(),
              "clip_low": low.sum(), "clip_high": high.sum(), "clip_region": (low | high).sum(),
              "diff_max": torch.cat((diff.abs(), zero)).amax(),
              "ratio_min": torch.cat((ratio, inf)).amin(), "ratio_max": torch.cat((ratio, zero)).amax()}
    return {k: v.detach().to(logp.dtype) for k, v in stats.items()}


def add_stats(total, stats):
    """Two stats of policy_loss as one: sums add up, *_max and *_min take the extreme. A mean is then a ratio of two sums."""
    join = {"_max": torch.maximum, "_min": torch.minimum}
    return stats | {k: join.get(k[-4:], torch.add)(v, stats[k]) if k in stats else v for k, v in total.items()}
