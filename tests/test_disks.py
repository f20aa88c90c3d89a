"""Disks that are full or read-only, files that are damaged, ranks that die while others wait: one line, no
exit code of success, nothing lost that was there. And no pickle is ever read."""
import collections
import pickle
import random
import re
import shutil
import sqlite3
from pathlib import Path

import pytest

import train_dpo
from faulty import result
from records import file_hash, hash_of, read_json, write_json
from world import REPO, make_baseline

WRITES = """os.fsync os.replace shutil.copyfile checkpoint.save_tensors model.save_tensors
    checkpoint.Log.write""".split()
SCRIPTS = ["train_sft", "train_dpo", "train_grpo", "eval", "pairs", "hindsight", "autoprompt"]


def soaking(test):
    """A campaign: one of the slow tests in its short form."""
    return pytest.mark.soak(pytest.mark.slow(test))


def is_told(codes, said, after):
    """Was a fault told in one line? -> whether it was of the page alone, which ends nothing."""
    assert "Traceback" not in said, (after, said)
    page_alone = "was not written (" in said and not any(codes)
    assert page_alone or codes == [2] and len(re.findall("^error: ", said, re.M)) == 1, (after, codes, said)
    return page_alone


@soaking
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_disk_that_is_full_at_any_write(trial, soak, script):
    """The n-th write finds no room; in the full form so does whatever is larger than so many bytes, in the
    kernel's own words. Started again, with room, the script ends as if nothing had been."""
    if not soak and script not in ("train_sft", "hindsight"):
        pytest.skip("in the full form")
    trial, rng, done = trial(script), random.Random(script), collections.Counter()
    calls, = trial.stage.count(trial.folder, script, *trial.arguments, places=WRITES)
    whole = result(trial.folder)
    blows = collections.defaultdict(lambda: "full", {"checkpoint.Log.write": "full_amid_a_line"})
    faults = [{"faults": [(0, place, n, blows[place])]}
              for place in WRITES for n in range(1, calls[place] + 1)]
    faults = rng.sample(faults, min(len(faults), 20 if soak else 2))
    if soak:
        faults += [{"fsize": size} for size in (0, 50, 300, 2000, 10_000, 40_000, 90_000, 200_000, 400_000)]
    for fault in faults:
        trial.again()
        codes, said, _ = trial.run(**fault)
        if "fsize" in fault and not any(codes) and "was not written" not in said:
            continue  # nothing is as large
        done["page alone" if is_told(codes, said, fault) else "refused"] += 1
        trial.ends_as(whole, fault)
    print(f"\n{script}, full disk: {done}", end="")


@soaking
@pytest.mark.parametrize("script, place", [
    ("train_sft", "run"), ("train_sft", "run/checkpoints"), ("train_dpo", "run"), ("eval", "run"),
    ("pairs", "run"), ("hindsight", "run"), ("hindsight", "run/turns"), ("autoprompt", "run")])
def test_a_folder_that_is_read_only(trial, soak, script, place):
    if not soak and (script, place) != ("train_sft", "run/checkpoints"):
        pytest.skip("in the full form")
    trial = trial(script)
    assert not any(trial.run()[0])
    whole = result(trial.folder)
    trial.again()
    folder = trial.folder / place
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o555)
    codes, said, _ = trial.run(unprivileged=True)
    folder.chmod(0o755)
    assert not is_told(codes, said, place) and "Permission denied: '" in said, said
    trial.ends_as(whole, place)


@soaking
@pytest.mark.parametrize("script, spoil", [
    ("hindsight", lambda file: file.write_bytes(b"SQLite format 3\0AAA")),
    ("hindsight", lambda file: file.write_bytes(pickle.dumps({"key": "text"}))),
    ("hindsight", lambda file: file.chmod(0o444)), ("autoprompt", lambda file: file.write_bytes(bytes(99)))],
    ids="damaged pickle read-only zeros".split())
def test_a_file_of_replies_that_fails(trial, soak, script, spoil):
    """One line that names it, and where it can be read at all, no end: what it cannot keep is asked again."""
    if not soak and script == "autoprompt":
        pytest.skip("in the full form")
    trial = trial(script)
    assert not any(trial.run()[0])
    whole, run = result(trial.folder), trial.folder / "run"
    path, = run.rglob("scores.sqlite" if script == "autoprompt" else "llm_cache.sqlite")
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM reply")
    spoil(path)
    codes, said, _ = trial.run(unprivileged=True)
    if any(codes):
        assert not is_told(codes, said, script) and f"llm.cache: {path} cannot be used (" in said
    else:
        assert said.count(f"warning: llm.cache: {path}: ") == 1 and "Traceback" not in said
    path.unlink()
    trial.ends_as(whole, script)


@soaking
@pytest.mark.parametrize("script", ["train_sft", "train_grpo", "eval"])
def test_a_rank_that_dies_in_any_collective(trial, soak, script):
    """Nobody ends the other (as torchrun would): it ends within a minute, in one line."""
    if not soak:
        pytest.skip("in the full form")
    trial, slowest, deaths = trial(script), 0, 0
    places = """torch.distributed.all_gather_object torch.distributed.barrier
        torch.distributed.all_gather_into_tensor torch.distributed.reduce_scatter_tensor
        torch.nn.utils.clip_grad_norm_ torch.distributed.tensor.DTensor.full_tensor""".split()
    counts = trial.stage.count(trial.folder, script, *trial.arguments, places=places, ranks=2)
    whole, rng = result(trial.folder), random.Random(script)
    for rank, calls in enumerate(counts):
        for place in filter(calls.get, places):
            for n in {1, calls[place], rng.randint(1, calls[place])}:
                trial.again()
                fault = rank, place, n, "kill"
                codes, said, seconds = trial.run(ranks=2, grace=60, wait=0.2, faults=[fault])
                after = fault, codes, said
                assert codes[rank] == -9 and codes[1 - rank] == 2 and seconds < 60, after
                assert said.count("error: another process of this run has ended") == 1, after
                assert "Traceback" not in said, after
                slowest, deaths = max(slowest, seconds), deaths + 1
                if n == 1:
                    trial.ends_as(whole, after, ranks=2)
    print(f"\n{script}: {deaths} deaths in collectives, the other rank ended within {slowest:.1f} s", end="")


# ------------------------------------------------------------------------------------------------- no pickle

class Bomb:
    """What it does when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("/tmp/learn-to-ask-was-unpickled"),)


@pytest.mark.parametrize("name", """model.safetensors tokenizer.json rank_00000.safetensors state.json
    reference.json metrics.jsonl turns/train.jsonl pairs.jsonl""".split())
def test_a_pickle_is_never_read(refused, train, tmp_path, tiny_checkpoint, name):
    """Where weights, moments or figures are read, one is refused, or made again; it is not executed."""
    mark = Path("/tmp/learn-to-ask-was-unpickled")
    pickle.loads(pickle.dumps(Bomb()))
    mark.unlink()  # it works
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    path = make_baseline(tmp_path, tmp_path / "base", "dpo", train__steps=1)
    train(train_dpo, path)
    step = tmp_path / "run" / "checkpoints" / "step_000001"
    folders = tmp_path / "base", step, tmp_path / "run"
    file, = (folder / name for folder in folders if (folder / name).is_file())
    file.write_bytes(pickle.dumps(Bomb()))
    if name == "rank_00000.safetensors":  # one whose hash is right
        state = read_json(step / "state.json")
        state = {**state, "hashes": {name: file_hash(file)}}
        state.pop("hash")
        write_json(step / "state.json", {**state, "hash": hash_of(state)})
    if name in ("reference.json", "metrics.jsonl"):
        assert train(train_dpo, path, "train.steps=2")[-1]["step"] == 2
    else:
        assert refused(train_dpo, path, "train.steps=2")
    assert not mark.exists()


def test_no_code_reads_pickles():
    for file in REPO.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "torch.load" not in text and "import pickle" not in text and "np.load" not in text, file
