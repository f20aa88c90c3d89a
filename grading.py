"""From a response to a graded rollout, by the lexicon's rules or a language model, and a phase of rollouts.

A language model is asked only where truth and decision are both continue, once for identical responses to a
turn, and as soon as a response is there, while others are still being sampled. A second one, the auditor, may
grade a share of the responses too (reward.audit). Its score is kept beside the first and rewards nothing.
"""
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch.distributed as dist
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from tqdm import tqdm

import config
import lexicon
import llm
import model as decoder
import parallel
import reward
import wording
from prompts import Prompt, chat, dump, fill_goal, load_turns, spoken
from records import InputError, Reply, Rollout, Score, same, slot_key
from rollout import Response, Sampling, generate


class Grade(Reply):
    """What the grader replies about one candidate. A rationale is welcome but not in the schema."""
    rationale: SkipJsonSchema[str] = ""
    score: Score
    questions: int = Field(ge=0)


class Reasoned(Grade):
    """A Grade to a prompt that asks for a rationale: it stands first, as a model writes in that order.

    The schema is a part of the cache's key: what changes Grade's has every grading asked again.
    """
    rationale: str


@dataclass
class Judge:
    """What gives the rewards."""
    lexicon: lexicon.Lexicon | None  # None where the rules do not grade and none is named
    grader: object  # the language model's source (llm.py), or None where the rules grade
    reward: config.RewardConfig
    many_valued: list = ()  # slots, as hindsight.many_valued names them
    garbled: Callable | None = None  # see wording.learn
    auditor: object = None  # the source of a second score for the share reward.audit


@dataclass
class Group:
    """The responses to one prompt, graded."""
    prompt: Prompt
    responses: list[Response]
    graded: list[Rollout]


def open_judge(cfg):
    """The judge that a config names. The rules learn from the experts of the training turns what is garbled.

    Raises InputError where the lexicon, the turns or the language model are missing.
    """
    grader = garbled = None
    lex = lexicon.load(cfg.data.lexicon) if cfg.data.lexicon else None
    if cfg.reward.grader == "llm":
        grader = llm.open_source("grader", cfg)
    else:
        config.need(cfg, "data.lexicon")
        if cfg.reward.wording:
            turns = load_turns(cfg, "train")
            slots = {same(item)[0] for turn in turns for item in turn.target}
            if slots and slots.isdisjoint(map(slot_key, lex.attributes)):
                raise InputError(f"data.lexicon={cfg.data.lexicon} has none of the slots of the turns "
                                 f"({', '.join(sorted(slots)[:5])}, ...): name that of these logs")
            heard = (m.content for turn in turns for m in turn.context[-2:])
            garbled = wording.learn([turn.expert or "" for turn in turns], heard, lex)
    auditor = cfg.reward.audit and llm.open_source("auditor", cfg)
    return Judge(lex, grader, cfg.reward, cfg.hindsight.many_valued, garbled, auditor)


def needs_grader(truth, response, judge):
    """Is a language model to be asked about this response to a turn with this s*?"""
    return judge.reward.grader == "llm" and truth == reward.decision(response) == "continue"


def grader_question(prompt, turn, response):
    """What a grader is asked -> (messages, class of its reply).

    All that a group shares (instructions, conversation, I*) comes first and the candidate last, so that a
    server's prefix cache computes the shared part once. Texts are JSON strings: none can close its own
    delimiters."""
    shared = dump({"conversation": spoken(turn.context), "known": turn.known, "targets": turn.target})
    messages = chat(fill_goal(prompt, turn.goal), f"{shared}\n\nCandidate: {dump(response)}")
    return messages, Reasoned if '"rationale"' in prompt else Grade


def grade_one(turn, response, judge, verdict=None):
    """One response -> Rollout. verdict: the language model's Grade (None: it failed, or was not asked)."""
    how, truth, decided = judge.reward, turn.decision, reward.decision(response)
    lex = judge.lexicon and judge.lexicon.at(turn.goal)
    right = reward.r_s(truth, decided)
    asked = needs_grader(truth, response, judge)
    if not right or decided == "stop":
        r_a = right  # 0 on a wrong decision, 1 on a right stop
    elif asked:
        r_a = verdict and verdict.score
    else:
        r_a = reward.r_a_rules(turn, response, lex, judge.many_valued, judge.garbled)
    if not (right or how.omega_when_wrong == "score"):
        omega = 0.0
    elif asked and how.omega == "llm":
        omega = verdict and reward.OMEGA.get(verdict.questions, 0.0)
    else:
        omega = reward.omega_rule(response, decided, lex)
    return Rollout(turn_id=turn.turn_id, session_id=turn.session_id, response=response, truth=truth,
                   decision=decided, r_a=r_a, r_s=right, omega=omega,
                   reward=reward.fuse(r_a, right, omega, how.mode, how.beta))


def grade(turn, responses, judge, verdicts={}):
    """The responses to a turn, as texts -> their Rollouts. Identical ones are graded once.

    verdicts: {(source, turn_id, response): future of the Grade} of those that the judge's grader and auditor
    were asked about. An auditor that is down raises nothing.
    """
    once = {}
    for response in dict.fromkeys(responses):
        asked = verdicts.get((judge.grader, turn.turn_id, response))
        verdict = asked and asked.result()
        graded = once[response] = grade_one(turn, response, judge, verdict)
        if why := verdict and verdict.rationale.strip()[:300]:
            graded.rationale = why
        if audit := verdicts.get((judge.auditor, turn.turn_id, response)):
            graded.audit = getattr(audit.exception() or audit.result(), "score", None)
    return [once[response].model_copy(update={"sample": i}) for i, response in enumerate(responses)]


def sampling_of(cfg, evaluation=False, greedy=False):
    """How a config samples in training, or in an evaluation; never more prompts at once than in training."""
    r = cfg.rollout
    how = cfg.eval if evaluation else r
    samples = 1 if greedy else how.samples
    return Sampling(samples, r.max_new_tokens, 0 if greedy else how.temperature,
                    cfg.eval.top_p if evaluation else 1.0, cfg.seed,
                    min(r.max_rows, r.max_rows // r.samples * samples))


def sample_graded(policy, judge, prompts, keys, sampling, desc="rollout"):
    """A rollout phase (collective): each rank samples and grades a share of the prompts, and gets all groups.

    prompts [B]; keys [B]: what names the noise of each -> (groups [B], figures: seconds of sampling and of
    grading beyond it on this rank, and over all ranks what the language model did).
    """
    rank, world, grader = dist.get_rank(), dist.get_world_size(), judge.grader
    shares = {grader: 1, judge.auditor: judge.reward.audit}
    sources = {source: share for source, share in shares.items() if source}
    mine, verdicts = prompts[rank::world], {}
    start = time.perf_counter()
    bar = tqdm(total=len(mine) * sampling.samples, unit="response", desc=desc, leave=False, disable=rank > 0)

    def on_response(i, response):
        bar.update()
        if not sources:
            return
        turn, said = mine[i].turn, policy.text(response.tokens)
        if not turn.decision == reward.decision(said) == "continue":
            return
        for source, share in sources.items():
            key = source, turn.turn_id, said
            # A hash of turn and response draws the share: the same ones on any number of ranks.
            if key not in verdicts and Random(f"{turn.turn_id} {said}").random() < share:
                verdicts[key] = source.submit(*grader_question(source.prompt, turn, said))

    with decoder.gathered(policy.model), bar:
        responses = generate(policy.model, [p.tokens for p in mine], policy.ends, sampling,
                             keys[rank::world], on_response)
    sampled = time.perf_counter()
    for source in sources:
        source.drain()
    graded, down = [], None
    try:
        for prompt, group in zip(mine, responses):
            graded.append(grade(prompt.turn, [policy.text(r.tokens) for r in group], judge, verdicts))
    except llm.Unanswered as error:  # on this rank: the others must learn of it
        down = str(error)
    figures = {"rollout_s": sampled - start, "grade_s": time.perf_counter() - sampled}
    tally = grader and grader.tally.take()
    shares, tallies, reasons = zip(*parallel.all_gather((list(zip(responses, graded)), tally, down)))
    for reason in filter(None, reasons):
        raise llm.Unanswered(reason)
    if tally:
        figures |= {f"grade_{name}": value for name, value in llm.summary(tallies).items()}
    return [Group(prompt, *shares[i % world][i // world]) for i, prompt in enumerate(prompts)], figures


def check_failed(groups, judge, when, way_out):
    """Raise llm.Unanswered, on all ranks, where more gradings of these groups failed than reward.max_failed.

    A failed grading is in no mean, and its decision to go on was right: many of them bias all figures.
    """
    asked = [g.reward for group in groups for g in group.graded
             if needs_grader(g.truth, g.response, judge)]
    failed, most = asked.count(None), judge.reward.max_failed
    if failed > most * len(asked):
        raise llm.Unanswered(f"{failed} of {len(asked)} gradings failed {when}, more than reward.max_failed="
                             f"{most} of them (the last on this rank: {judge.grader.tally.why}): look at the "
                             f"grader ({judge.grader.settings.model}). Once it answers, {way_out}")
