"""Kill -9 at every stage of every script, signals, other numbers of ranks: a resume gives what an
uninterrupted run gives, to the bit. The full form (make soak) has a hundred kills, CI a handful."""
import collections
import random
import signal

import pytest

from faulty import result
from world import read_lines

pytestmark = [pytest.mark.soak, pytest.mark.slow]  # the short form is slow too
COMMON = "os.replace os.fsync".split()
TRAINING = [*COMMON, *"""rollout.load_tokenizer run.base_model run.optimizer_step
    checkpoint.Log.write:half_a_line
    checkpoint.save checkpoint.save_tensors:half_a_file checkpoint.put_in_place shutil.rmtree
    model.save_tensors:half_a_file model.put_in_place run.show_groups report.write""".split()]
PLACES = {  # and what happens there (a kill, unless something else is named)
    "train_sft": TRAINING, "train_dpo": [*TRAINING, "train_dpo.reference_logprobs"],
    "train_grpo": [*TRAINING, "grading.grade", "train_grpo.prepare"], "pairs": [*COMMON, "pairs.write_json"],
    "eval": [*COMMON, *"eval.load_policy grading.grade eval.write_jsonl eval.write_json".split()],
    "hindsight": [*COMMON, *"""llm.Cache.put hindsight.build_turns hindsight.write_json
                               hindsight.show""".split()],
    "autoprompt": [*COMMON, *"llm.Cache.put autoprompt.try_held_out autoprompt.write_jsonl".split()]}
CASES = {  # script, ranks: kills of the full form
    ("train_sft", 1): 18, ("train_sft", 2): 10, ("train_dpo", 1): 14, ("train_dpo", 2): 4,
    ("train_grpo", 1): 16, ("train_grpo", 2): 10, ("eval", 1): 6, ("eval", 2): 4, ("pairs", 1): 2,
    ("hindsight", 1): 8, ("autoprompt", 1): 8}
SHORT = {("train_sft", 1): 1, ("hindsight", 1): 1}


@pytest.mark.parametrize("script, ranks", CASES)
def test_kill_9_anywhere(trial, soak, script, ranks):
    """At any call of each place in turn, on each rank in turn."""
    kills = (CASES if soak else SHORT).get((script, ranks), 0)
    if not kills:
        pytest.skip("in the full form")
    rng, done = random.Random(f"{script} {ranks}"), collections.Counter()
    blows = dict((place + ":kill").split(":")[:2] for place in PLACES[script])
    trial = trial(script)
    calls = trial.stage.count(trial.folder, script, *trial.arguments, places=list(blows), ranks=ranks)
    whole = result(trial.folder)
    while done.total() < kills:
        for place, blow in rng.sample(sorted(blows.items()), len(blows)):
            rank = done.total() % ranks
            if not calls[rank][place] or done.total() == kills:
                continue
            n = rng.randint(1, calls[rank][place])
            trial.again()
            codes, said, _ = trial.run(ranks=ranks, faults=[(rank, place, n, blow)])
            assert codes[rank] == -signal.SIGKILL, (place, n, codes, said)
            trial.ends_as(whole, (place, n, blow), ranks=ranks)
            done[place] += 1
    print(f"\n{script}, {ranks} ranks: {kills} kills, each resume equal to the bit: "
          + ", ".join(f"{place} {n}" for place, n in done.items()), end="")


@pytest.mark.parametrize("script", ["train_sft", "train_dpo", "train_grpo"])
def test_other_numbers_of_ranks(trial, soak, script):
    """Two ranks, killed and resumed on one, killed and resumed on two: the same data in the same order, the
    same losses but for rounding."""
    if not soak:
        pytest.skip("in the full form")
    trial = trial(script, "train.steps=8", "train.lr=1e-3")
    assert not any(trial.run(ranks=2)[0])
    whole = result(trial.folder)["run/metrics.jsonl"]
    trial.again()
    for ranks, n in ((2, 4), (1, 3)):
        codes, said, _ = trial.run(ranks=ranks, faults=[(0, "run.optimizer_step", n, "kill")])
        assert codes[0] == -signal.SIGKILL, said
    codes, said, _ = trial.run(ranks=2)
    assert not any(codes), said
    found = result(trial.folder)["run/metrics.jsonl"]
    same_data = ("step", "epoch", "trained_tokens", "lr")
    assert [[m.get(k) for k in same_data] for m in found] == [[m.get(k) for k in same_data] for m in whole]
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(found[1:], whole[1:]))
    print(f"\n{script}: 2 ranks, 1, 2: the largest difference of a step's loss {apart:.1e}", end="")
    assert apart < 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("script, number", [("train_grpo", "SIGTERM"), ("train_sft", "SIGINT")])
def test_signals(trial, soak, script, number, ranks):
    """SIGTERM (143 in a shell) and Ctrl-C (130) end a run within five seconds; the last checkpoint stands,
    and the same command goes on from it."""
    if not soak and (ranks == 2 or script == "train_grpo"):
        pytest.skip("in the full form")
    steps = 60  # seconds of work: the signal must not come too late on a busy machine
    trial = trial(script, f"train.steps={steps}", "train.eval_every=null")
    assert not any(trial.run(ranks=ranks)[0])
    whole, log = result(trial.folder), trial.folder / "run" / "metrics.jsonl"
    trial.again()
    codes, said, seconds = trial.run(ranks=ranks, signal=getattr(signal, number), mark=str(log), lines=4)
    assert {*codes} <= {130, -signal.SIGTERM} and seconds < 5, (codes, said)
    if number == "SIGINT":
        assert 130 in codes and "interrupted: started again, a training run goes on" in said
    assert "Traceback" not in said and len(list(trial.folder.glob("run/checkpoints/step_*"))) >= 1
    assert 4 < len(read_lines(log)) < steps
    trial.ends_as(whole, number, ranks=ranks)
    print(f"\n{script}, {ranks} ranks, {number}: {seconds:.1f} s, exit codes {codes}", end="")
