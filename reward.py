"""What a response is worth: R = R_s (1 + beta R_a) + Omega (arXiv 2510.25441); its advantage in the group.

    R_s    1 where the decision (ask on, or stop) equals s*
    R_a    1 asks for an element of I*, 0.5 relevant but not precise, 0 irrelevant or already answered;
           1 on a right stop, 0 on any wrong decision
    Omega  form: one question and no more, or the stop marker and nothing else

A wrong decision has R_a = 0, so `sum` (R_a + R_s + Omega) is `product` with beta = 1 in every outcome:
comparing the two compares beta 1 with beta 2.

This file stands alone: no torch, no server. R_a by rules is below; grading.py asks a language model instead.
"""
import lexicon
from records import STOP, is_named, same, slot_key

OMEGA = {1: 1.0, 2: 0.5}  # by the number of questions; else 0


def decision(response):
    """"stop" wherever the marker occurs, else "continue"."""
    return "stop" if STOP in response else "continue"


def r_s(truth, decided):
    return float(truth == decided)


def omega_rule(response, decided, lex=None):
    """Form of a response. Its questions: its question marks and requests, or the attributes it asks for,
    whichever is more. lex: the lexicon at the turn's goal.

    >>> [omega_rule(r, "continue") for r in ("How long?", "How long? Any fever?", "A? B? C?", "Tell me.")]
    [1.0, 0.5, 0.0, 0.0]
    >>> [omega_rule(r, "stop") for r in (" <stop />\\n", "Thanks! <stop />")]
    [1.0, 0.0]
    """
    if decided == "stop":
        return float(response.strip() == STOP)
    n = lexicon.questions(response, lex)
    if lex and n in (1, 2):  # without a question nothing is asked; three are too many already
        n = max(n, len(lexicon.asked(response, lex, strict=False)))
    return OMEGA.get(n, 0.0)


def fuse(r_a, right, omega, mode="product", beta=2.0):
    """R_a, R_s and Omega -> R, between 0 and 4; None where it needs what a failed grading left out (None).

    >>> [fuse(0.5, 1.0, 1.0, mode) for mode in ("product", "sum", "no_ra", "no_rs")]
    [3.0, 2.5, 4.0, 2.0]
    """
    if omega is None or r_a is None and mode != "no_ra":
        return None
    if mode == "product":
        return right * (1 + beta * r_a) + omega
    if mode == "sum":
        return r_a + right + omega
    if mode == "no_ra":
        return right * (1 + beta) + omega
    if mode == "no_rs":
        return beta * r_a + omega
    raise ValueError(f"unknown reward mode {mode!r}")


def r_a_rules(turn, response, lex, many_valued=(), garbled=None):
    """R_a by the lexicon's rules, at a turn whose truth is continue.

    1: every attribute the response asks for is in I*. 0.5: some are, or some belong to this complaint and are
    unknown so far or may have a further value, or the question is generic. 0: all known or irrelevant, or no
    well-formed question at all.

    lex: the lexicon at the turn's goal. many_valued: hindsight.many_valued. garbled(text): does it hold a
    question that no expert would put so?
    """
    if garbled and garbled(response):
        return 0.0
    asked = lexicon.asked(response, lex)
    if not asked:
        return lexicon.asks_generic(response, lex) / 2
    wanted = {same(item)[0] for item in turn.target}
    hits = [slot_key(attribute) in wanted for attribute in asked]
    if all(hits):
        return 1.0
    known = {same(item)[0] for item in turn.known}
    complaint = lexicon.complaint_in(turn, lex)
    relevant = lex.complaints[complaint].attributes if complaint else lex.attributes
    useful = any(slot_key(a) not in known or is_named(a, many_valued) for a in set(asked) & set(relevant))
    return 0.5 if any(hits) or useful else 0.0


def advantages(rewards, mode="std"):
    """The rewards of one group, None where the grading failed -> its advantages.

    (R - mean) / (std + 1e-6), sample std (DeepSeekMath, arXiv 2402.03300); mode "mean": R - mean (Dr.GRPO,
    arXiv 2503.20783). A failed grading gets 0 and stays out of mean and std. Fewer than two valid rewards,
    or equal ones, teach nothing: exactly 0 throughout, not the rounding error of the mean.

    >>> advantages([1.0, 3.0, None], "mean"), advantages([2.0, 2.0, 2.0])
    ([-1.0, 1.0, 0.0], [0.0, 0.0, 0.0])
    """
    valid = [r for r in rewards if r is not None]
    if len(set(valid)) < 2:
        return [0.0] * len(rewards)
    mean = sum(valid) / len(valid)
    scale = 1.0
    if mode == "std":
        variance = sum((r - mean) ** 2 for r in valid) / (len(valid) - 1)
        scale = variance ** 0.5 + 1e-6
    return [0.0 if r is None else (r - mean) / scale for r in rewards]
