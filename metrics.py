"""The seven metrics of the paper's Tables 1 and 2 (arXiv 2510.25441) over graded rollouts, with numpy alone.

    wa      mean R_a where truth and decision are both continue     wa_gh  share of those with R_a = 1
    wc, ws  share of right decisions among truth continue, stop     aa     share among all
    fc      mean Omega                                              tr     mean of R_s (1 + 2 R_a) + Omega
    wa_all  mean R_a over truth continue, a wrong stop counts 0     top_share, distinct: how varied it is

TR is computed here, always as the product with beta 2, whatever reward the rollouts were trained on. wa_all
stands beside wa because the paper's DPO row fits only that reading. A failed grading (null) is left out of
the means that need it and is counted in `failed`. Intervals are bootstrapped by session, as turns of one
session are not independent.

Shapes: N rollouts, K metrics (MEANS), S sessions.
"""
from collections import Counter

import numpy as np

from records import InputError, Rollout, read_records
from reward import fuse

MEANS = "wa wa_gh wc ws aa fc tr wa_all".split()
OTHERS = "top_share distinct n failed".split()


def scores_of(g):
    """One rollout -> its value for each of MEANS; None where it does not count for that mean.

    A right question graded 0.5 with Omega 1 gives wa .5, wa_gh 0, wc 1, ws None, aa 1, fc 1, tr 3, wa_all .5.
    """
    r_a, right, omega = g.r_a, g.r_s, g.omega
    tr = fuse(r_a, right, omega)  # its defaults: the product, beta 2
    if g.truth == "stop":
        return None, None, None, right, right, omega, tr, None
    if not right:
        return None, None, right, None, right, omega, tr, 0.0
    best = r_a and r_a // 1  # 1 where R_a is 1, None where the grading failed, else 0
    return r_a, best, right, None, right, omega, tr, r_a


def score_matrix(graded):
    """-> [N, K]: scores_of each rollout, NaN for None."""
    return np.array([scores_of(g) for g in graded], dtype=float).reshape(-1, len(MEANS))


def agreement(pairs):
    """How far two judges agree. pairs: scores (first, second) of each response, None where a judge failed.

    audit_n       pairs with two scores
    audit_failed  pairs without the second score
    audit_error   mean squared difference
    audit_kappa   Cohen's kappa with quadratic weights (Cohen 1968, Psychological Bulletin 70, 213-220):
                  1 - sum_ij w_ij O_ij / sum_ij w_ij E_ij, where w_ij = (i - j)^2, O_ij is the share of pairs
                  (i, j), and E_ij that share by chance, if the judges were independent

    The sum over O is the error, the sum over E is the error + 2 cov(first, second). Error and kappa are None
    for fewer than two pairs, kappa also where all scores are the same. If one judge gives all responses one
    score and the other does not, kappa is 0.

    >>> agreement([(0, 0), (0.5, 1), (1, 1), (1, None)])["audit_n"]
    3
    """
    known = [pair for pair in pairs if None not in pair]
    kappa = error = None
    if len(known) > 1:
        error = np.mean(np.diff(known) ** 2)
        chance = error + 2 * np.cov(known, rowvar=False, ddof=0)[0, 1]
        kappa = 1 - error / chance if chance else None
    return {"audit_n": len(known), "audit_failed": sum(b is None for _, b in pairs), "audit_kappa": kappa,
            "audit_error": error}


def metrics(graded):
    """Graded rollouts -> {metric: number, or None where nothing counts for it}.

    With what `agreement` says of the responses that llm.auditor was asked about, if there are any.
    """
    scores = score_matrix(graded)
    means = {name: float(total / count) if count else None
             for name, total, count in zip(MEANS, np.nansum(scores, 0), np.isfinite(scores).sum(0))}
    said = Counter(g.response.strip() for g in graded if g.truth == "continue")
    audited = [(g.r_a, g.audit) for g in graded if "audit" in g.model_fields_set]
    return {**means, "n": len(graded), "failed": [g.r_a for g in graded].count(None),
            "top_share": max(said.values()) / said.total() if said else None, "distinct": len(said),
            **(agreement(audited) if audited else {})}


def session_of(g):
    """A rollout's session; where the file does not name it, what stands before the turn id's last "_"."""
    return g.session_id or g.turn_id.rpartition("_")[0] or g.turn_id


def by_session(graded):
    """-> (sessions [S] in order, [2, S, K]: the sums of their scores and how many scores each sum holds)."""
    scores = score_matrix(graded)
    sessions, row = np.unique([session_of(g) for g in graded], return_inverse=True)
    sums, counts = part = np.zeros((2, len(sessions), len(MEANS)))
    np.add.at(sums, row, np.nan_to_num(scores))
    np.add.at(counts, row, np.isfinite(scores))
    return sessions, part


def bootstrap(*parts):
    """Draw whole sessions with replacement, 2000 times, the same ones for every part.

    parts: P times sums and counts [2, S, K] over the same S sessions -> means [P, 2000, K], NaN where nothing
    that counts was drawn.
    """
    n = parts[0].shape[1]
    rng, blocks = np.random.default_rng(0), []
    for _ in range(10):  # blocks of 200 draws, so that many sessions fit in memory
        times = rng.multinomial(n, np.full(n, 1 / n), 200)  # [200, S]: how often each session is drawn
        with np.errstate(invalid="ignore"):
            blocks.append([times @ sums / (times @ counts) for sums, counts in parts])
    return np.concatenate(blocks, axis=1)


def interval(drawn):
    """Means of the draws -> their 95% interval [low, high], or None where all are NaN."""
    drawn = drawn[np.isfinite(drawn)]
    return np.quantile(drawn, (0.025, 0.975)).tolist() if drawn.size else None


def intervals(graded):
    """95% intervals of one rollout or more, bootstrapped by session -> {metric: [low, high], or
    None where nothing counts}."""
    means, = bootstrap(by_session(graded)[1])  # [2000, K]
    return {name: interval(drawn) for name, drawn in zip(MEANS, means.T)}


def paired(a, b, metric):
    """Difference of a metric between two lists of graded rollouts, on the sessions that both hold.
    -> {"difference", its 95% "interval", "verdict"}, or None where they share none or nothing counts.
    """
    k = MEANS.index(metric)
    names_a, part_a = by_session(a)
    names_b, part_b = by_session(b)
    _, in_a, in_b = np.intersect1d(names_a, names_b, return_indices=True)
    if not in_a.size:
        return None
    parts = part_a[:, in_a], part_b[:, in_b]
    drawn_a, drawn_b = bootstrap(*parts)[:, :, k]
    found = interval(drawn_a - drawn_b)
    if not found:
        return None
    mean_a, mean_b = (sums[:, k].sum() / counts[:, k].sum() for sums, counts in parts)
    return {"difference": float(mean_a - mean_b), "interval": found, "verdict": verdict(*found)}


def verdict(low, high):
    """What the 95% interval of a difference says about "the first is better"."""
    if low > 0:
        return "holds"
    return "the reverse" if high < 0 else "undecided"


def summarise(graded):
    """-> the metrics and their intervals, as eval.json holds them."""
    return {**metrics(graded), "intervals": intervals(graded)}


def heading(metric):
    return metric.upper().replace("_", "-")


def cell(value, spec=".3f", interval=None):
    """A figure as a table shows it, with its interval where there is one."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    bracket = f" [{interval[0]:{spec}}, {interval[1]:{spec}}]" if interval else ""
    return f"{value:{spec}}{bracket}"


def table(name, summary, others):
    """A summary with its 95% intervals below it, then other rows {name: metrics} -> an aligned Markdown
    table; "-" where a figure is None or missing."""
    low, high = {}, {}
    for metric, found in summary["intervals"].items():
        low[metric], high[metric] = found or (None, None)
    grid = [["", *map(heading, MEANS), *OTHERS]]
    for row, found in {name: summary, "95% from": low, "95% to": high, **others}.items():
        grid.append([row, *(cell(found.get(key)) for key in MEANS + OTHERS)])
    return aligned(grid)


def aligned(grid):
    """Rows of cells, the head first -> a Markdown table whose columns line up, the first to the left."""
    first, *others = (max(map(len, column)) for column in zip(*grid))
    rule = ["-" * first, *(":".rjust(width, "-") for width in others)]
    lines = []
    for name, *cells in [grid[0], rule, *grid[1:]]:
        cells = [name.ljust(first), *map(str.rjust, cells, others)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def load_graded(path):
    """A file of graded rollouts -> list of Rollout. Raises InputError for a bad line or an empty file."""
    graded = [g for _, g in read_records(path, Rollout)]
    if not graded:
        raise InputError(f"{path} holds no graded rollouts")
    return graded
