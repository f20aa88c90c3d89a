"""What a candidate answer is worth: R = R_s (1 + beta R_a) + Omega (arXiv 2510.25441), graded by rules or by a language model.

    R_s    1 where the decision (ask on, or stop) equals s*
    R_a    1 asks for an element of I*, 0.5 relevant but not precise, 0 irrelevant or already answered;
           1 on a right stop, 0 on any wrong decision
    Omega  form: one question and no more, or the stop marker and nothing else

A wrong decision has R_a = 0, so `sum` (R_a + R_s + Omega) is `product` with beta = 1 in every outcome: comparing the
two compares beta 1 with beta 2.
"""
import config
import lexicon
import llm
from data import STOP
from hindsight import same, slot_key, spoken

OMEGA = {1: 1.0, 2: 0.5}  # by the number of questions; else 0


def decision(response):
    """"stop" wherever the marker occurs, else "continue"."""
    return "stop" if STOP in response else "continue"


def r_s(truth, decided):
    return float(truth == decided)


def omega_rule(response, decided, lex=None):
    """Form of an answer. Questions: by question marks, or by attributes asked for, whichever is more.

    >>> [omega_rule(r, "continue") for r in ("How long?", "How long? Any fever?", "A? B? C?", "Tell me.")]
    [1.0, 0.5, 0.0, 0.0]
    >>> [omega_rule(r, "stop") for r in (" <stop />\\n", "Thanks! <stop />")]
    [1.0, 0.0]
    """
    if decided == "stop":
        return float(response.strip() == STOP)
    n = lexicon.questions(response)
    if lex and n in (1, 2):  # without a question mark nothing is asked; three are too many already
        n = max(n, len(lexicon.asked(response, lex, strict=False)))
    return OMEGA.get(n, 0.0)


def fuse(r_a, right, omega, mode="product", beta=2.0):
    """R_a, R_s and Omega -> reward; None where the grading failed (R_a or Omega is None).

    >>> fuse(0.5, 1.0, 1.0), fuse(0.5, 1.0, 1.0, "sum"), fuse(0.5, 1.0, 1.0, "no_ra"), fuse(0.5, 1.0, 1.0, "no_rs")
    (3.0, 2.5, 4.0, 2.0)
    """
    if r_a is None or omega is None:
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


def grade_rules(turn, response, lex):
    """R_a of a candidate question at a turn whose truth is continue.

    1: every attribute it asks for is in I*. 0.5: some are, or some belong to this complaint and are unknown so far,
    or it is a generic question. 0: all known or irrelevant, or no well-formed question at all (lexicon.asked).
    """
    asked = lexicon.asked(response, lex)
    if not asked:
        return 0.5 if lexicon.asks_generic(response, lex) else 0.0
    wanted = {same(item)[0] for item in turn["target"]}
    hits = [slot_key(a) in wanted for a in asked]
    if all(hits):
        return 1.0
    known = {a for found in lexicon.facts(turn["context"], lex) for a in found}
    complaints = [lexicon.complaint_of(m["content"], lex) for m in turn["context"] if m["role"] == "user"]
    complaint = next((c for c in complaints if c), None)
    relevant = lex.complaints[complaint] if complaint else {a for a, _ in lex.asks}  # none named: the whole goal
    return 0.5 if any(hits) or any(a in relevant and a not in known for a in asked) else 0.0


# The language model as grader. What a group shares (instructions, conversation, I*) comes first and the candidate last, so that a
# server's prefix cache computes the shared part once. All texts are JSON strings: none can close its own delimiters.
GRADE = llm.object_schema(score={"type": "number", "enum": [0, 0.5, 1]}, questions={"type": "integer"})


def grader_messages(prompt, turn, response):
    shared = llm.dump({"conversation": spoken(turn["context"]), "targets": turn["target"]})
    return [{"role": "system", "content": prompt.replace("{goal}", turn.get("goal") or "")},
            {"role": "user", "content": f"{shared}\n\nCandidate: {llm.dump(response)}"}]


def check_grade(reply):
    """-> (R_a, questions); ValueError where the reply is no grade."""
    score, n = reply.get("score"), reply.get("questions")
    if isinstance(score, bool) or score not in (0, 0.5, 1):
        raise ValueError(f"score must be 0, 0.5 or 1, not {score!r}"[:200])
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"questions must be a whole number, not {n!r}"[:200])
    return float(score), n


def judges(cfg):
    """-> (lexicon, or None where the rules grader is not used and none is named; language model as grader, or None)."""
    if cfg.reward.grader == "rules":
        config.need(cfg, "data.lexicon")
    lex = lexicon.load(cfg.data.lexicon) if cfg.data.lexicon else None
    return lex, llm.open_source("grader", cfg) if cfg.reward.grader == "llm" else None


def needs_grader(turn, response, cfg):
    """The grader is asked only where truth and decision are both continue."""
    return cfg.reward.grader == "llm" and turn["decision"] == decision(response) == "continue"


def grade_one(turn, response, cfg, lex, sample=0, verdict=None):
    """One candidate -> its graded record. verdict: what the language model said (check_grade's pair, None: it failed)."""
    truth, decided = turn["decision"], decision(response)
    right, asked = r_s(truth, decided), needs_grader(turn, response, cfg)
    if not right:
        r_a = 0.0
    elif decided == "stop":
        r_a = 1.0
    else:
        r_a = (verdict and verdict[0]) if asked else grade_rules(turn, response, lex)
    if not (right or cfg.reward.omega_when_wrong == "score"):
        omega = 0.0
    elif asked and cfg.reward.omega == "llm":
        omega = verdict and OMEGA.get(verdict[1], 0.0)
    else:
        omega = omega_rule(response, decided, lex)
    return {"turn_id": turn["turn_id"], "sample": sample, "response": response, "truth": truth, "decision": decided,
            "r_a": r_a, "r_s": right, "omega": omega,
            "reward": fuse(r_a, right, omega, cfg.reward.mode, cfg.reward.beta)}


def grade(turns, responses, cfg, lex, verdicts=None):
    """responses[i] are the candidates at turns[i] -> flat list of graded records, in that order. Identical candidates
    of a turn are graded once. verdicts: {(turn_id, response): future} of the language model's."""
    records = []
    for turn, candidates in zip(turns, responses, strict=True):
        unique = {}
        for r in dict.fromkeys(candidates):
            verdict = verdicts[turn["turn_id"], r].result() if needs_grader(turn, r, cfg) else None
            unique[r] = grade_one(turn, r, cfg, lex, verdict=verdict)
        records += [{**unique[r], "sample": i} for i, r in enumerate(candidates)]
    return records
