"""GRPO's mathematics: from rewards to advantages, from log-probabilities to one scalar to minimise.

A group is G completions of one prompt. A completion is good if it beats its group: that
difference is its advantage A. The loss makes every token of a good completion likelier and every
token of a bad one less likely:

    A    = (r - mean of the group) / std of the group             advantages()
    l_t  = -min(rho A, clip(rho) A),  rho = exp(logp - old_logp)  one of OBJECTIVES
    loss = sum over tokens of (l_t + beta KL_t - entropy_coef H_t), divided by one number       policy_loss()

All of it is pure functions of plain tensors and keywords, with no config object: copy the file out, or
check it against a paper line by line. A new objective is one function, here with an entry in OBJECTIVES or
in a config file as it is; its keyword arguments are config keys by themselves.

Shapes: B prompts in a step, G completions of each, N = B * G rows, T completion tokens laid end to end
without padding. `rows` (T,) says whose token each is, so nothing here ever sees a pad or a mask.
Log-probabilities, KL and entropy are in nats.

Papers: GRPO 2402.03300; Dr. GRPO 2503.20783; DAPO 2503.14476; RLOO 2402.14740; GSPO 2507.18071; CISPO
2506.13585; dual clip 1912.09729; LitePPO 2508.08221; KL with the ratio 2512.02556, Eq. 7.
Tests: python -m pytest tests/test_loss.py
"""

import dataclasses
import difflib
import functools
import inspect
import math
from dataclasses import dataclass

import torch
from torch import Tensor


def pick(table, name, what):
    """`table[name]`, or a ValueError that lists the known names and the nearest one."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}{hint} Known: {', '.join(table)}.")


# ------------------------------------------------------------------------------------------ advantages


def std_without_nan(r, ddof):
    """Standard deviation along the last axis of r (.., G) float64, NaN left out; (..,
    1). Where too few are left: 0.
    """
    valid = ~r.isnan()
    n = valid.sum(-1, keepdim=True)
    centred = torch.where(valid, r - r.nanmean(-1, keepdim=True), 0.0)
    variance = centred.square().sum(-1, keepdim=True) / (n - ddof).clamp(min=1)
    return variance.sqrt()


def group_std(r, n, ddof, eps):
    """GRPO: every prompt weighs the same, whether its rewards are far apart or close."""
    return std_without_nan(r, ddof) + eps


def no_scale(r, n, ddof, eps):
    """Dr. GRPO: dividing by the spread would blow up the prompts that are almost solved or almost
    hopeless.
    """
    return torch.ones_like(r)


def batch_std(r, n, ddof, eps):
    """LitePPO: one scale for the whole step."""
    return std_without_nan(r.reshape(1, -1), ddof) + eps


def leave_one_out(r, n, ddof, eps):
    """RLOO: r - mean of the OTHERS = (r - mean) * n / (n - 1), an unbiased baseline, so this is a division
    too.
    """
    return (n - 1) / n


# What r - baseline is divided by: divisor(r (B, G) float64, n (B, 1) scored rows of each group, ddof, eps).
SCALES = {"group": group_std, "none": no_scale, "batch": batch_std, "rloo": leave_one_out}


def advantages(rewards, *, scale="group", ddof=1, eps=1e-4, baseline=None):
    """How much better each completion is than the others of its group.

    rewards (B, G): NaN means None, 'cannot be scored': left out of mean and std, A = 0. `scale` is a name
    in SCALES; `ddof` 1 (as TRL) or 0 divides the variance by n - ddof; `eps` is added to a std. "batch"
    must be given the rewards of the whole step, of all ranks. baseline (B, 1) or (B, G): subtracted instead
    of the group's mean, by an advantage of your own that keeps, say, a moving average; a group of equal
    rewards then has an advantage.

    Returns (B, G) on the same device, float64 for float64 rewards, else float32. ValueError: an infinite
    reward, a group of one (allowed with scale="none", where A is 0: a lone completion is its own mean; and
    with a baseline), an unknown scale.
    """
    assert rewards.dim() == 2, f"rewards must be (B, G), one row a prompt, got {tuple(rewards.shape)}"
    B, G = rewards.shape
    divisor = pick(SCALES, scale, "scale")
    if ddof not in (0, 1) or eps < 0:
        raise ValueError(f"ddof must be 0 or 1 and eps >= 0, got ddof={ddof}, eps={eps}")
    if G < 2 and scale != "none" and baseline is None:
        raise ValueError(
            f"group size {G} leaves nobody to compare with: use group_size >= 2, or give a baseline"
        )
    # float64, on the CPU (MPS has none): (B, G) is tiny, and the numbers then do not depend on the device.
    r = rewards.detach().cpu().double()
    if r.isinf().any():
        where = [tuple(i) for i in r.isinf().nonzero().tolist()[:4]]
        raise ValueError(
            f"infinite reward at (prompt, sample) {where}: "
            "return None for 'cannot be scored', or a finite number"
        )
    valid = ~r.isnan()
    n = valid.sum(1, keepdim=True).double()  # (B, 1): an int divided by an int would be float32
    if baseline is None:
        baseline, counted = r.nanmean(1, keepdim=True), valid & ~equal_rewards(r)
    else:
        counted = valid
    A = (r - baseline) / divisor(r, n, ddof, eps)
    A = torch.where(counted, A, 0.0)  # not a product with the mask: NaN * 0 is NaN
    return A.to(rewards.device, torch.float64 if rewards.dtype == torch.float64 else torch.float32)


def equal_rewards(r):
    """Bool (B, 1): groups of r (B, G) that say nothing, because all rewards are
    equal or at most one is scored.

    Found by an exact comparison. The std of equal rewards is not 0 but rounding noise: eight rewards of 0.1
    need not average to 0.1, and noise / (noise + eps) has been an advantage of 7,000 elsewhere.
    """
    valid = ~r.isnan()
    largest = torch.where(valid, r, -math.inf).amax(1, keepdim=True)
    smallest = torch.where(valid, r, math.inf).amin(1, keepdim=True)
    return largest <= smallest


def normalize_then_sum(parts, weights, *, ddof=1, eps=1e-4):
    """Advantages of R rewards at once (GDPO, arXiv:2601.05242).

    Each reward is normalised in its group, weighted and summed, and the sums are normalised over the step.
    parts (B, G, R), NaN for None, of the whole step; weights (R,). Returns (B, G), in the dtype that
    `advantages` returns. Summing first gives (0, 2), (1, 1) and (2, 0) one reward and one advantage, and a
    reward of large spread drowns one of small spread; here each counts as its weight says. A part that is
    None adds nothing. A row without any part, and a group all of whose parts are equal, have A = 0.
    """
    assert parts.dim() == 3 and weights.shape == parts.shape[2:], (
        f"parts must be (B, G, R), weights (R,), got {tuple(parts.shape)}, {tuple(weights.shape)}"
    )
    each = [advantages(part.double(), ddof=ddof, eps=eps) for part in parts.unbind(2)]
    each = torch.stack(each, 2)  # (B, G, R), 0 where a part is NaN
    weights = weights.double().to(each.device)
    total = (each * weights).sum(2)  # (B, G)
    weighted = weights != 0
    some_spread = (each[:, :, weighted] != 0).any(2).any(1, keepdim=True)
    some_part = ~parts[:, :, weighted].isnan().all(2)
    live = some_spread & some_part
    # Over the rows that have an advantage: those without would only shrink the
    # spread, and must stay at exactly 0.
    chosen = total[live]
    std = chosen.std(correction=ddof) if len(chosen) > ddof else chosen.new_zeros(())
    mean = chosen.mean() if len(chosen) else 0.0
    A = torch.where(live, (total - mean) / (std + eps), 0.0)
    return A.to(torch.float64 if parts.dtype == torch.float64 else torch.float32)


# --------------------------------------------------------------------------------------- ratios and KL


def tamed(f, x):
    """f(x) for f = exp or expm1, continued along its tangent above x = 80 (float32)
    or 701 (float64): no overflow.

    Below, bit for bit f(x), and so is the gradient. Above, exp would soon be infinite, and then a
    token that clipping has switched off still ruins the step, since its gradient is 0 * inf = NaN.
    A plain clamp would be finite too, but its gradient is 0: k3 would then push the wrong way, on
    the tokens that drifted furthest.
    """
    top = math.log(torch.finfo(x.dtype).max) - 8  # 8 nats of room, a factor of 3,000, for advantages and sums
    return f(x.clamp(max=top)) * (1 + (x - top).clamp(min=0))


def row_mean(x, rows, lengths):
    """The mean of x (T,) over each row, handed to each of its tokens (T,); gradients
    flow. lengths (N,): row lengths.
    """
    # index_add and index_select, not x[rows]: on the CPU their sums run in a fixed order, forward and
    # backward, so a resumed run gets the same bits. (On a GPU
    # torch.use_deterministic_algorithms(True) does that.)
    sums = x.new_zeros(lengths.shape[0]).index_add(0, rows, x)  # (N,)
    return (sums / lengths.clamp(min=1)).index_select(0, rows)  # (T,)


# Estimators of KL(policy || reference) from d = ref_logp - logp at the sampled token
# (http://joschu.net/blog/kl-approx.html).


def k1(d):
    """Unbiased, of either sign. Its gradient alone has mean 0 under the policy: as a loss term it does
    nothing unless kl_times_ratio is set.
    """
    return -d


def k2(d):
    """A biased value with an unbiased gradient on-policy."""
    return d.square() / 2


def k3(d):
    """Unbiased and never negative. expm1, because exp(d) - 1 - d is nothing but rounding near 0."""
    return tamed(torch.expm1, d) - d


# "full" is the exact KL over the vocabulary, given as `exact_kl`: no estimate and no variance.
KL = {"k1": k1, "k2": k2, "k3": k3, "full": None}


# ------------------------------------------------------------------------------------------ objectives
# objective(logp, ratio, adv, *, options) -> l (T,) to be minimised, or (l, low, high) with two bool (T,):
# tokens held back at the lower and at the upper bound, for the log. All arguments are (T,); `ratio` =
# exp(logp - old_logp) carries the gradient of logp. The keyword arguments are the config keys of the
# objective, with their defaults.


def reinforce(logp, ratio, adv):
    """-A logp: the policy gradient as it is, for data that the policy itself has just sampled."""
    return -adv * logp


def clip(logp, ratio, adv, *, clip_low=0.2, clip_high=0.2, dual_clip=None):
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A): PPO's bound; Eq. 3 of
    GRPO. No gradient once far enough.
    """
    if min(clip_low, clip_high) < 0 or (dual_clip is not None and dual_clip <= 1):
        raise ValueError(
            f"need clip_low, clip_high >= 0 and dual_clip > 1, got {clip_low}, {clip_high}, {dual_clip}"
        )
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * adv, clipped * adv)
    if dual_clip is not None:
        # min() leaves one side open: A < 0 and a token that became much likelier, where -rho A has no bound.
        gain = torch.where(adv < 0, torch.maximum(gain, dual_clip * adv), gain)
    # In TRL's sense a token is clipped if it is past the bound in the direction in which its advantage
    # pushes.
    low = (ratio < 1 - clip_low) & (adv < 0)
    high = (ratio > 1 + clip_high) & (adv > 0)
    return -gain, low, high


def cispo(logp, ratio, adv, *, cispo_max=5.0):
    """-sg(min(rho, cispo_max)) A logp: bounds the weight of a token, never its
    gradient; rare words keep learning.
    """
    if cispo_max < 1:
        raise ValueError(
            f"cispo_max={cispo_max} caps the ratio itself: "
            "use about 5.0, not a width such as clip_high's 0.28"
        )
    weight = ratio.detach().clamp(max=cispo_max)
    low = torch.zeros_like(adv, dtype=torch.bool)
    high = (ratio > cispo_max) & (adv != 0)
    return -weight * adv * logp, low, high


def gspo(logp, ratio, adv, *, clip_low=0.2, clip_high=0.2, dual_clip=None):
    """`clip` with ONE ratio for a sequence, the geometric mean over its tokens,
    since that is what was rewarded.
    """
    return clip(logp, ratio, adv, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


# An objective with this attribute gets the sequence's ratio at each token, and is called on whole rows
# only. So is one with `takes_row_mean`: after `adv` it gets a function, x (T,) -> the mean over each token's
# row (T,). The others are elementwise and may be called on any run of tokens, which is cheaper (head.py).
gspo.sequence_ratio = True

OBJECTIVES = {"reinforce": reinforce, "clip": clip, "cispo": cispo, "gspo": gspo}


def objective_function(objective):
    """The function of an objective that is given by its name in OBJECTIVES, or itself."""
    return objective if callable(objective) else pick(OBJECTIVES, objective, "objective")


def takes_whole_rows(objective) -> bool:
    function = objective_function(objective)
    return getattr(function, "sequence_ratio", False) or getattr(function, "takes_row_mean", False)


def options_of(objective) -> dict:
    """The options of an objective (name or function) and their defaults: its keyword-only arguments."""
    parameters = inspect.signature(objective_function(objective)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


# ----------------------------------------------------------------------------------------- the divisor


def per_token(tokens, rows, group_size, max_new_tokens):
    """DAPO: every token weighs the same."""
    return tokens


def per_sequence(tokens, rows, group_size, max_new_tokens):
    """GRPO: every completion weighs the same; each token is first divided by the length of its own."""
    return rows


def per_constant(tokens, rows, group_size, max_new_tokens):
    """Dr. GRPO: a constant, so that no length can dilute a completion."""
    if not max_new_tokens:
        raise ValueError(
            "aggregate='constant' divides by max_new_tokens: pass max_new_tokens= (or norm= to policy_loss)"
        )
    return rows * max_new_tokens


def per_group(tokens, rows, group_size, max_new_tokens):
    """Whole-sequence sums, and their mean over prompts."""
    if not group_size:
        raise ValueError(
            "aggregate='group' divides by group_size: pass group_size= (or norm= to policy_loss)"
        )
    return rows / group_size


# What the sum over tokens is divided by, from counts of the whole step. Each is linear in tokens and rows:
# ranks may add theirs up.
AGGREGATES = {"token": per_token, "sequence": per_sequence, "constant": per_constant, "group": per_group}


def normaliser(lengths, *, aggregate, group_size=None, max_new_tokens=None):
    """The number that a whole optimiser step is divided by; `norm` of policy_loss. Call it
    once, before the first micro-batch.

    lengths: list or (N,) tensor of ints, the completion tokens of every row that is in the loss; a row of
    no tokens counts as a row, a row that was masked out is left out by the caller. Ranks call it on their
    own rows and add the results. Dividing by a micro-batch's own count instead makes a short completion
    weigh more when it sits among short ones.
    """
    lengths = torch.as_tensor(lengths)
    divisor = pick(AGGREGATES, aggregate, "aggregate")
    return float(divisor(int(lengths.sum()), lengths.numel(), group_size, max_new_tokens))


# ------------------------------------------------------------------------------ which tokens, how much


def highest(entropy, fraction):
    """Bool (T,): the `fraction` of the tokens with the highest entropy (T,), nats;
    ties are kept. At least one token.

    The forking tokens of arXiv:2506.01939: a policy term on the highest fifth alone learns as well, or
    better. Give it the tokens of the whole step, or what is kept depends on the micro-batch.
    """
    assert 0 < fraction <= 1, f"fraction must be in (0, 1], got {fraction}"
    if not len(entropy):
        return torch.zeros_like(entropy, dtype=torch.bool)
    keep = max(1, math.ceil(fraction * len(entropy)))
    return entropy >= entropy.topk(keep).values[-1]


def mismatch_weight(trainer_logp, sampler_logp, most):
    """min(exp(trainer - sampler), most) per token (T,), without gradient: corrects for a sampler that is
    not the trainer's model.

    Truncated importance sampling (https://fengyao.notion.site/off-policy-rl): multiplies the policy term
    where old_logp is the trainer's.
    """
    return tamed(torch.exp, (trainer_logp - sampler_logp).detach()).clamp(max=most)


# -------------------------------------------------------------------------------------------- the loss


@dataclass
class Tokens:
    """What the T completion tokens of n rows carry beside their ids, laid end to
    end. tokens[a:b] is a run of them.

    All of it is constant in a backward. The names are those of policy_loss's arguments.
    """

    rows: Tensor  # (T,) int64, whose token it is: 0 .. n - 1
    adv: Tensor  # (n,)
    lengths: Tensor  # (n,) int64, tokens of each whole row
    sampler_logp: Tensor  # (T,) nats, as the token was drawn
    old_logp: Tensor | None  # (T,) nats, what the ratio compares with; None: the policy as it is now
    weight: Tensor | None = None  # (T,) >= 0, multiplies the policy term
    ref_logp: Tensor | None = None  # (T,) nats, of the reference

    def __getitem__(self, run: slice) -> "Tokens":
        per_token = ("rows", "sampler_logp", "old_logp", "weight", "ref_logp")
        values = {name: getattr(self, name) for name in per_token}
        cut = {name: None if value is None else value[run] for name, value in values.items()}
        return dataclasses.replace(self, **cut)

    def arguments(self) -> dict:
        """As keyword arguments of policy_loss."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def policy_loss(logp, old_logp, adv, rows, *, ref_logp=None, entropy=None, objective="clip",
                aggregate="token", beta=0.0, kl="k3", kl_times_ratio=False, entropy_coef=0.0,
                group_size=None, max_new_tokens=None, norm=None, lengths=None, weight=None, exact_kl=None,
                sampler_logp=None, mismatch_clip=None, stats=True, **options):  # fmt: skip
    """The loss of T completion tokens, and the sums that the log needs.

    Of each token, constant but for logp and entropy, detached here if they are not:
    logp (T,)          nats, float32 or float64, with gradient
    old_logp (T,)      what the ratio compares logp with: the sampler's; None: logp itself, at a ratio of 1
    rows (T,)          int64, whose token it is; adv (N,) is each row's advantage
    ref_logp (T,)      the reference's, for the KL;  exact_kl (T,) with gradient, for kl="full"
    entropy (T,)       nats, with gradient if entropy_coef is to do anything
    weight (T,)        >= 0, multiplies the policy term alone, for example 0 or 1 to keep only some tokens
    sampler_logp (T,)  what the log compares logp with, by default old_logp; mismatch_clip weighs each token's
                       policy term by `mismatch_weight` of old_logp to it
    Of the step:
    objective          a name in OBJECTIVES or a function like those; **options its keywords (clip_low=0.2,
                       clip_high=0.2, dual_clip=None, cispo_max=5.0); those of other objectives are not read
    norm               the step's divisor, a float from `normaliser`; by default that of the tokens given.
                       With it, losses and gradients of any split of the rows add up to those of the step
    lengths (N,)       tokens of each whole row, by default counted here. Give it, and norm, to call this on
                       runs of tokens that cut rows; not where the objective has one ratio for a row
    stats              False: the loss alone is wanted, and the dict comes empty

    The KL (times beta) and the entropy (times -entropy_coef) are added after clipping, under the same
    aggregation. kl_times_ratio multiplies the estimator by the token's own rho, with the gradient through
    rho (DeepSeek-V3.2, Eq. 7; TRL's use_bias_correction_kl, except that TRL takes the sequence's ratio in
    GSPO). Value and gradient of k3, and of k1, are then unbiased. It matters on-policy too: the gradient of
    k3 alone is that of KL(reference || policy), the other way round.

    A token whose advantage is exactly 0 adds exactly 0, with a gradient of exactly 0, to the policy term:
    also where logp - old_logp is infinite. Elsewhere a ratio above e^80 (float32) is continued linearly
    (see `tamed`); NaN stays NaN.

    Returns (loss, stats): loss 0-d, in logp's dtype; stats a dict of 0-d detached tensors of that dtype,
    made without waiting for the GPU; merge them with `add_stats`. Sums: tokens; loss and policy_loss (already
    divided by norm); kl and entropy, where given; clip_low, clip_high, clip_region = either (tokens held back
    at that bound; cispo: at cispo_max); diff_sum of |logp - sampler_logp|; ratio_sum. Extremes: diff_max,
    ratio_min, ratio_max. diff and ratio are the token's own, in GSPO too: on-policy they measure the trainer
    against the sampler. ValueError: an unknown name, a term without its tensor, a divisor of 0.
    """
    T, N = logp.numel(), adv.numel()
    pick(KL, kl, "kl")
    divisor = pick(AGGREGATES, aggregate, "aggregate")
    options = options_for(objective, options)
    old_logp = logp.detach() if old_logp is None else old_logp
    check_shapes(logp, adv, lengths, old_logp=old_logp, rows=rows, ref_logp=ref_logp, entropy=entropy,
                 weight=weight, exact_kl=exact_kl, sampler_logp=sampler_logp)  # fmt: skip
    if norm is None:
        norm = float(divisor(T, N, group_size, max_new_tokens))
    reference = exact_kl if kl == "full" else ref_logp
    check_terms(T, objective, lengths, norm, beta, reference, entropy_coef, entropy)

    # Everything but logp and entropy is a constant. Passing old_logp=logp, the on-policy call with
    # its detach() forgotten, would otherwise give a ratio of 1 whose gradient is 0: a run that
    # learns nothing and says nothing.
    old = old_logp.detach().to(logp)  # (T,)
    A = adv.detach().to(logp)[rows]  # (T,)
    sampler = old if sampler_logp is None else sampler_logp.detach().to(logp)
    if lengths is None:
        # bincount would wait for the GPU
        lengths = rows.new_zeros(N).index_add(0, rows, torch.ones_like(rows))
    if mismatch_clip:
        weight = mismatch_weight(old, sampler, mismatch_clip) * (1.0 if weight is None else weight)
    live_logp, ratio, A = ratios(logp, old, A, rows, lengths, weight, objective)
    given, function = [live_logp, ratio, A], objective_function(objective)
    if getattr(function, "takes_row_mean", False):
        given.append(functools.partial(row_mean, rows=rows, lengths=lengths))
    term, low, high = with_bounds(function(*given, **options))

    # What one token weighs. It knows the step (norm) and its row (1 / C_i) but not who else is in this call:
    # that is why any split into micro-batches gives the same gradient. A step without tokens has norm 0.
    share = 1 / (norm or 1)
    if aggregate == "sequence":
        share = share / lengths.to(logp)[rows]  # (T,)
    loss = policy = (share * term).sum()

    kls = None
    if beta or stats:
        trained = torch.is_grad_enabled() and beta != 0  # at beta 0 the KL is logged and not trained on
        with torch.set_grad_enabled(trained):
            kls = kl_terms(logp, old, ref_logp, exact_kl, kl, kl_times_ratio)
    if beta:
        loss = loss + beta * (share * kls).sum()
    if entropy_coef:
        loss = loss - entropy_coef * (share * entropy).sum()
    if not stats:
        return loss, {}
    sums = dict(loss=loss, policy_loss=policy, kl=kls, entropy=entropy)
    return loss, measure(logp, sampler, low, high, **sums)


def ratios(logp, old, A, rows, lengths, weight, objective):
    """What an objective is given: log-probability, ratio and weighted advantage of each token, (T,) each."""
    # Tokens of advantage 0 leave before the exponential, not after it: 0 * inf = NaN cannot be repaired.
    live = A != 0
    logp = torch.where(live, logp, 0.0)
    log_ratio = logp - torch.where(live, old, 0.0)
    if getattr(objective_function(objective), "sequence_ratio", False):
        # The mean of the log-ratios: their sum leaves any clip range on a long answer.
        log_ratio = row_mean(log_ratio, rows, lengths)
    if weight is not None:
        A = A * weight.detach().to(logp)  # into A: every objective is linear in |A|
    return logp, tamed(torch.exp, log_ratio), A


def with_bounds(result):
    """(l, low, high) of what an objective gives: l (T,); bool (T,) twice, the tokens held back at a bound."""
    if isinstance(result, tuple):
        return result
    nowhere = torch.zeros_like(result, dtype=torch.bool)
    return result, nowhere, nowhere


def kl_terms(logp, old, ref_logp, exact_kl, kl, kl_times_ratio):
    """KL to the reference at each token (T,), or None where there is no reference."""
    if kl == "full":
        kls = None if exact_kl is None else exact_kl.to(logp)
    else:
        kls = None if ref_logp is None else KL[kl](ref_logp.detach().to(logp) - logp)
    if kls is not None and kl_times_ratio:
        kls = kls * tamed(torch.exp, logp - old)
    return kls


def options_for(objective, options):
    """Those of the options that the objective takes. TypeError for one that no known objective takes."""
    wanted = options_of(objective)
    known = {name for other in OBJECTIVES for name in options_of(other)} | wanted.keys()
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(f"policy_loss() got an unexpected keyword argument {unknown[0]!r}")
    return {name: value for name, value in options.items() if name in wanted}


def check_shapes(logp, adv, lengths, **per_token):
    """Shapes and dtypes that would train on silently wrong numbers stop here. No
    check reads a tensor's values.
    """
    assert logp.dim() == 1 and adv.dim() == 1, (
        f"logp must be (T,) and adv (N,), got {tuple(logp.shape)} and {tuple(adv.shape)}"
    )
    for name, x in per_token.items():
        assert x is None or x.shape == logp.shape, (
            f"{name} must be (T,) like logp, got {tuple(x.shape)} and {tuple(logp.shape)}"
        )
    assert lengths is None or lengths.shape == adv.shape, (
        f"lengths {tuple(lengths.shape)} must be (N,) like adv {tuple(adv.shape)}"
    )
    for name, x in dict(logp=logp, old_logp=per_token["old_logp"], ref_logp=per_token["ref_logp"]).items():
        if x is not None and x.dtype not in (torch.float32, torch.float64):
            # At logp = -8 neighbouring bf16 numbers are 0.06 apart: every ratio would be
            # noise as wide as a clip range.
            raise ValueError(
                f"{name} is {x.dtype}: compute log-probabilities in float32, "
                "the ratio of rounded ones is noise"
            )


def check_terms(T, objective, lengths, norm, beta, reference, entropy_coef, entropy):
    """A term that is switched on and lacks its tensor, a row that is cut where it must not be, a divisor of
    0.
    """
    if (beta and reference is None) or (entropy_coef and entropy is None):
        raise ValueError(
            'a KL term (beta) needs ref_logp=, or exact_kl= with kl="full"; '
            "an entropy bonus (entropy_coef) needs entropy="
        )
    if takes_whole_rows(objective) and lengths is not None:
        raise ValueError(
            f"{objective} looks at whole rows, so rows cannot be cut into chunks: leave out lengths="
        )
    if T and norm <= 0:
        raise ValueError(f"norm={norm} for {T} tokens: it is the divisor of the whole step, see normaliser()")


@torch.no_grad()
def measure(logp, sampler, low, high, **sums):
    """The stats of policy_loss; `sums` are tensors to be summed up, or None for what was not computed."""
    diff = logp - sampler  # (T,)
    ratio = tamed(torch.exp, diff)
    # One value of no effect at the end: a rank may have no tokens, and min and max of nothing raise.
    zero, inf = logp.new_zeros(1), logp.new_full((1,), math.inf)
    stats = {name: x.sum() for name, x in sums.items() if x is not None}
    stats |= dict(tokens=logp.new_full((), len(logp)), diff_sum=diff.abs().sum(), ratio_sum=ratio.sum())
    stats |= dict(clip_low=low.sum(), clip_high=high.sum(), clip_region=(low | high).sum())
    stats["diff_max"] = torch.cat((diff.abs(), zero)).amax()
    stats["ratio_min"] = torch.cat((ratio, inf)).amin()
    stats["ratio_max"] = torch.cat((ratio, zero)).amax()
    return {name: x.detach().to(logp.dtype) for name, x in stats.items()}


def add_stats(total, stats):
    """Two stats of policy_loss as one: sums add up, *_max and *_min take the extreme. A
    mean is then a ratio of two sums.
    """
    extreme = {"_max": torch.maximum, "_min": torch.minimum}
    joined = dict(stats)
    for name, value in total.items():
        join = extreme.get(name[-4:], torch.add)
        joined[name] = join(value, stats[name]) if name in stats else value
    return joined
