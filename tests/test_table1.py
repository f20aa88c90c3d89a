"""The runner of Table 1's rows: which stages it runs, what it does not run again, what it moves aside."""
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest

import config
import prompts
import table1
from records import InputError
from world import REPO, make_world

ALL = ["hindsight.py", "train_grpo.py", "eval.py"]
ASK = ["hindsight.source=llm", "llm.extractor.model=m"]


PRESETS = sorted(path for folder in ("toy", "table1/7b", "table1/32b")
                 for path in (REPO / "configs" / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_presets_never_look_at_test_sessions_and_name_their_generic_slots(path):
    """During training they are evaluated on sessions of their own. DAPO and Dr.GRPO have no entropy bonus."""
    cfg = config.load([str(path)])
    assert cfg.train.eval_every and cfg.data.valid_sessions > 0
    assert {"pregnancy", "allergies"} <= set(cfg.hindsight.generic)
    assert path.stem not in ("dapo", "dr_grpo") or cfg.train.entropy_coef == 0


@pytest.fixture
def row(tmp_path, tiny_checkpoint, monkeypatch):
    """A config whose stages are recorded instead of run. row(*overrides) -> the scripts that the runner
    starts; row.moved() -> how many folders it has moved aside."""
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("logs", "eval_logs")}
    path = make_world(tmp_path, tmp_path / "base", **{f"data__{name}": file for name, file in files.items()})
    for file in files.values():
        (tmp_path / file).write_text("{}\n")

    def stage(command):
        script = next(c for c in command if c.endswith(".py")).rpartition("/")[2]
        row.ran.append(script)
        cfg = config.load(command[command.index(str(path)):])
        if script.startswith("train_"):
            config.save(cfg, row.run / "config.yaml")
            (row.run / "metrics.jsonl").touch()
        return SimpleNamespace(returncode=3 if script == row.broken else 0)

    def row(*overrides):
        row.ran = []
        table1.run_row(str(path), list(overrides), 2)
        return row.ran

    row.run, row.broken = tmp_path / "run", None
    row.moved = lambda: len(list(tmp_path.glob("run.old*")))
    monkeypatch.setattr(subprocess, "run", stage)
    monkeypatch.chdir(REPO)
    return row


@pytest.mark.parametrize("overrides, stages", [
    ([], ALL), (["train.loss=mine"], ALL), (["train.steps=0"], ["hindsight.py", "eval.py"]),
    (["train.loss=sft"], ["hindsight.py", "train_sft.py", "eval.py"]),
    (["train.loss=dpo"], ["hindsight.py", "pairs.py", "train_dpo.py", "eval.py"])])
def test_the_stages_of_each_row(row, overrides, stages):
    assert row(*overrides, "train.steps_per_sync=1") == stages


def test_a_row_that_never_trains_stays_one(row, tmp_path):
    """Steps for all rows are not for the Base row: a trained model must not stand under its name."""
    text = (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(re.sub(r"steps: \d+", "steps: 0", text))
    assert row("train.steps=5", "train.lr=1") == ["hindsight.py", "eval.py"]
    assert config.load([str(tmp_path / "run.yaml")]).train.steps == 0


def test_pairs_that_were_looked_at_are_not_built_again(row):
    (row.run / "pairs.jsonl").touch()
    assert row("train.loss=dpo", "train.steps_per_sync=1") == ["hindsight.py", "train_dpo.py", "eval.py"]


def test_pairs_of_turns_that_hindsight_made_anew_are_built_again(row, monkeypatch):
    """A row that failed in training, and its logs corrected: whether the pairs will do is asked after
    hindsight.py."""
    (row.run / "pairs.jsonl").touch()
    monkeypatch.setattr(table1, "same_made", lambda cfg: row.ran != ["hindsight.py"])
    assert row("train.loss=dpo", "train.steps_per_sync=1") == [
        "hindsight.py", "pairs.py", "train_dpo.py", "eval.py"]


def test_an_interrupted_row_goes_on_and_a_finished_one_is_not_run_again(row, capsys):
    row.broken = "train_grpo.py"
    with pytest.raises(InputError, match="train_grpo.py ended with exit code 3.*goes on from here"):
        row()
    row.broken = None
    assert row() == ALL and row.moved() == 0
    assert row() == [] and "finished before, not run again" in capsys.readouterr().out


@pytest.mark.parametrize("name, file", [
    ("train.lr", None), ("data.logs", "logs.jsonl"), ("data.lexicon", "lexicon.yaml"),
    ("data.prompt", "prompt.md"), ("model.path", "base/config.json")])
def test_a_changed_row_is_run_again_and_nothing_is_lost(row, capsys, name, file):
    row()
    (row.run / "mine.txt").write_text("kept")
    overrides = ["train.lr=0.5"]
    if file:
        overrides = []
        with open(row.run.parent / file, "a") as f:
            f.write("\n")
    assert row(*overrides) == ALL and row.moved() == 1
    assert f"{name} changed" in capsys.readouterr().out.replace(", data.prompt_no_stop", "")
    assert row.run.with_name("run.old1").joinpath("mine.txt").read_text() == "kept"
    assert not (row.run / "mine.txt").exists() and row(*overrides) == []


def test_another_model_is_another_run(row, tmp_path):
    row()
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    assert row(f"model.path={tmp_path / 'other'}") == ALL and row.moved() == 1


def test_a_row_that_asks_models_notices_their_prompts_and_names(row, monkeypatch, tmp_path):
    """Also the shipped prompts. Another extractor is another run; how fast it is asked is not."""
    prompt = tmp_path / "mine.md"
    prompt.write_text("{goal} {generic}")
    monkeypatch.setitem(prompts.PROMPTS, "extractor", str(prompt))
    assert row(*ASK) == ALL and row(*ASK) == []
    prompt.write_text("{goal} {generic} better")
    assert row(*ASK) == ALL and row.moved() == 1
    other = [ASK[0], "llm.extractor.model=n"]
    assert row(*other) == ALL and row.moved() == 2
    assert row(*other, "llm.extractor.concurrency=3") == ALL and row.moved() == 2


def test_a_finished_row_that_was_moved_is_not_run_again(row):
    row()
    row.run.rename(row.run.with_name("moved=1"))
    assert row(f"run_dir={row.run.with_name('moved=1')}//") == []


def test_two_rows_of_one_run_folder_are_refused_before_any_runs(row, refused, tmp_path):
    for folder, root in (("b", ()), ("c", ("--root", tmp_path / "runs"))):  # with --root the name decides
        other = tmp_path / folder / "run.yaml"
        other.parent.mkdir()
        shutil.copy(tmp_path / "run.yaml", other)
        line = refused(table1, tmp_path / "run.yaml", other, *root)
        assert f"{tmp_path / 'run.yaml'} and {other} have one run_dir: give each row its own" in line
    assert not list(tmp_path.rglob("row.json"))


def test_a_torn_stamp_is_named(row):
    row()
    (row.run / "row.json").write_text('{"config": {"run')
    with pytest.raises(InputError, match="row.json holds no JSON object .* or remove it"):
        row()


def test_a_change_of_the_evaluation_trains_nothing_anew(row):
    """The trainer finds its last checkpoint; only the evaluation is other."""
    row()
    assert row("eval.samples=2") == ALL and row.moved() == 0


def test_a_run_made_by_hand_is_taken_over(row):
    """Its trainer compares the config (checkpoint.open_run); nothing is moved."""
    row()
    (row.run / "row.json").unlink()
    assert row() == ALL and row.moved() == 0


def test_missing_inputs_are_named(row):
    (row.run.parent / "eval_logs.jsonl").unlink()
    with pytest.raises(InputError, match="data.eval_logs=.*eval_logs.jsonl does not exist"):
        row()
