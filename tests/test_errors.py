"""What a user may get wrong on the command line: each ends in one line with the place, fault and way out."""
import json
import runpy
import shutil
import subprocess
import sys
import time

import pytest
import yaml

import autoprompt
import eval as evaluation
import hindsight
import pairs
import records
import rollout
import table1
import train_dpo
import train_grpo
import train_sft
from world import REPO, make_baseline, make_world, read_lines, write_lines


@pytest.mark.slow
@pytest.mark.parametrize("command, said", [
    ("train_grpo.py none.yaml", "no such config: none.yaml"),
    ("rollout.py --model {model} --prompts gone.jsonl --out out", "no such file: gone.jsonl")])
def test_an_error_is_one_line_and_exit_code_2(tmp_path, tiny_checkpoint, command, said):
    script, *arguments = command.format(model=tiny_checkpoint).split()
    command = [sys.executable, REPO / script, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")


@pytest.mark.parametrize("script", [hindsight, pairs, evaluation, table1, train_grpo, train_sft, train_dpo],
                         ids=lambda script: script.__name__)
def test_a_config_that_is_not_there(refused, script):
    assert refused(script, "none.yaml") == "error: no such config: none.yaml"


@pytest.mark.parametrize("command, said", [
    ("world --out FILE", "Not a directory"), ("world --out=", "--out is empty: name a folder"),
    ("anchors --config none.yaml --world FILE --out FILE", "no such config: none.yaml"),
    ("llm_server --lexicon none.yaml", "lexicon none.yaml"),
    ("llm_server --lexicon LEXICON --port 99999", "--port 99999 is none"),
    ("llm_server --lexicon LEXICON --port TAKEN", "Address already in use")])
def test_the_toys_commands(capsys, monkeypatch, tmp_path, serve, lexicon_file, command, said):
    known = {"FILE": tmp_path / "file", "LEXICON": lexicon_file, "TAKEN": serve().server_port}
    (tmp_path / "file").touch()
    script, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [script, *(str(known.get(word, word)) for word in arguments)])
    monkeypatch.delitem(sys.modules, f"toy.{script}", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"toy.{script}", run_name="__main__")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and said in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------- what spoils a good run

def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def rows(name, change):
    """Change each row of a JSONL file in place; where change returns False the row is left out."""
    def spoil(folder):
        found = read_lines(folder / name)
        write_lines(folder / name, [row for row in found if change(row) is not False])
    return spoil


def row(name, n, **change):
    def spoil(folder):
        found = read_lines(folder / name)
        found[n - 1] |= change
        write_lines(folder / name, found)
    return spoil


def line(name, n, text):
    def spoil(folder):
        found = read_lines(folder / name)
        write_lines(folder / name, [*found[:n - 1], text, *found[n:]])
    return spoil


def lame(*missing, **settings):
    """The model folder without these files, or with these settings of its tokenizer."""
    def spoil(folder):
        tree = yaml.safe_load((folder / "run.yaml").read_text())
        shutil.copytree(tree["model"]["path"], folder / "lame")
        for name in missing:
            (folder / "lame" / name).unlink()
        file = folder / "lame" / "tokenizer_config.json"
        if settings:
            file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        tree["model"]["path"] = str(folder / "lame")
        (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return spoil


TURNS, PAIRS = "run/turns/train.jsonl", "run/pairs.jsonl"
other_turns = rows(TURNS, lambda r: r["context"][0].update(content="rash, cough"))


def unknown_turns(folder):
    """Of pairs made by hand."""
    remove("run/pairs_made.json")(folder)
    other_turns(folder)


SPOILS = {
    "broken yaml": write("run.yaml", "train: {lr: 1\n  x: ["),
    "yaml list": write("run.yaml", "- a\n"),
    "odd base": write("run.yaml", "base: [3]\n"),
    "lost base": write("run.yaml", "base: none.yaml\n"),
    "no turns": remove(TURNS),
    "no held-out turns": remove("run/turns/eval.jsonl"),
    "empty turns": write(TURNS, "\n"),
    "broken turn": line(TURNS, 3, '{"turn_id": 2_0}'),
    "odd decision": row(TURNS, 1, decision="go"),
    "no expert": row(TURNS, 3, expert=None),
    "stops only": rows(TURNS, lambda r: r["decision"] == "stop"),
    "other turns": other_turns,
    "unknown turns": unknown_turns,
    "no tokenizer": lame("tokenizer.json", "tokenizer_config.json"),
    "no weights": lame("model.safetensors"),
    "no end token": lame(eos_token=None),
    "no pairs": remove(PAIRS),
    "empty pairs": write(PAIRS, "\n"),
    "broken pair": line(PAIRS, 3, '{"turn_id": '),
    "no context": line(PAIRS, 2, '{"turn_id": "1_1"}'),
    "nothing rejected": row(PAIRS, 5, rejected=" "),
    "torn stamp": write("run/turns/made.json", '{"files": {"train'),
    "torn pairs stamp": write("run/pairs_made.json", '{"seed": 0, "data'),
    "another turn": row(PAIRS, 5, turn_id="44_1")}
TRAINERS = {"grpo": train_grpo, "sft": train_sft, "dpo": train_dpo}
CASES = """
grpo | broken yaml      | | run.yaml: not valid YAML
grpo | yaml list        | | run.yaml: a config is a mapping of keys, not list
grpo | odd base         | | run.yaml: base must be the path of another config
grpo | lost base        | | no such config: ... none.yaml
grpo | | train.learning=1 | command line: unknown key 'train.learning'
grpo | | train.step_per_sync=1 | did you mean 'train.steps_per_sync'
grpo | | train.lr=fast | command line: train.lr must be a number, not 'fast'
grpo | | train.loss=sft train.steps_per_sync=1 | train.loss=sft belongs to train_sft.py, not train_grpo.py
grpo | | train.loss=mine | train.loss=mine: LOSSES in train_grpo.py has grpo, cispo, gspo
sft  | | train.loss=grpo | train.loss=grpo belongs to train_grpo.py, not train_sft.py
sft  | | train.loss=dpo | train.loss=dpo belongs to train_dpo.py, not train_sft.py
sft  | | train.kl_coef=0.1 | train.kl_coef has no effect with train.loss=sft
dpo  | | train.loss=mine | train.loss=mine belongs to train_grpo.py, not train_dpo.py
dpo  | | train.loss=sft | train.loss=sft belongs to train_sft.py, not train_dpo.py
grpo | | train.steps=0 | train.steps=0 is a row that never trains (Base): evaluate it with eval.py
sft  | | train.steps=0 | train.steps=0 is a row that never trains (Base): evaluate it with eval.py
dpo  | | train.steps=0 | train.steps=0 is a row that never trains (Base): evaluate it with eval.py
grpo | no turns         | | train.jsonl does not exist: run hindsight.py with this config first
sft  | no turns         | | train.jsonl does not exist: run hindsight.py with this config first
dpo  | no turns         | | train.jsonl does not exist: run hindsight.py with this config first
sft  | no held-out turns | train.eval_every=1 | eval.jsonl does not exist: run hindsight.py
grpo | torn stamp       | | made.json holds no JSON object ... : it may be torn; bring it back, or remove it
grpo | empty turns      | | train.jsonl holds no turns
grpo | broken turn      | | train.jsonl:3: not valid UTF-8 JSON
grpo | odd decision     | | train.jsonl:1: decision must be 'continue' or 'stop', not 'go'
sft  | no expert        | | turn 2_1: a continue turn whose 'expert' is missing or empty
grpo | stops only       | reward.mode=no_rs | train.jsonl holds no continue turns, and reward.mode=no_rs
grpo | | train.steps=null train.epochs=1 train.prompts_per_step=11 | 10 examples x 1 epochs
sft  | | train.steps=null train.epochs=1 train.prompts_per_step=11 | 10 examples x 1 epochs
grpo | | data.lexicon=none.yaml | lexicon none.yaml
grpo | | data.lexicon= | data.lexicon is not set
grpo | | data.prompt=none.md | prompt none.md cannot be read
grpo | | model.path=/none/such | model.path ... /none/such
grpo | no tokenizer     | | model.path: ... tokenizer ... lame
grpo | no weights       | | model.path ... lame ... safetensors
sft  | no end token     | | lame names no eos_token: add it to tokenizer_config.json
grpo | | rollout.max_prompt_tokens=44 | 4 of 10 turns ... data.long_prompts=drop
grpo | | rollout.max_prompt_tokens=5 data.long_prompts=drop | 10 of 10 turns
dpo  | | rollout.max_prompt_tokens=40 | of 10 turns ... rollout.max_prompt_tokens=40
sft  | | rollout.max_new_tokens=9 | 3 of 10 turns ... rollout.max_new_tokens=9 ... data.long_prompts=drop
sft  | | rollout.max_new_tokens=2 data.long_prompts=drop | 10 of 10 turns
dpo  | | rollout.max_new_tokens=9 | of 10 turns ... rollout.max_new_tokens=9
dpo  | no pairs         | | pairs.jsonl does not exist: run pairs.py with this config first
dpo  | torn pairs stamp | | pairs_made.json holds no JSON object ... bring it back, or remove it
dpo  | empty pairs      | | pairs.jsonl holds no pairs
dpo  | broken pair      | | pairs.jsonl:3: not valid UTF-8 JSON
dpo  | no context       | | pairs.jsonl:2: context is missing
dpo  | nothing rejected | | pairs.jsonl:5: rejected must not be blank
dpo  | another turn     | | pairs.jsonl:5: turn '44_1' is not among this run's training turns ... pairs.py
dpo  | other turns      | | pairs.jsonl was made with other settings or from other turns ... pairs.py again
dpo  | unknown turns    | | pairs.jsonl:1: turn '0_1' is not among this run's training turns ... pairs.py
"""  # the trainer, what is done to a good run, overrides, what is said (" ... " leaves words out)


def check(told, said):
    """The words between " ... " stand in the line, in this order."""
    for words in said.split(" ... "):
        before, found, told = told.partition(words)
        assert found, (words, before)


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_a_training_that_cannot_be(refused, tmp_path, tiny_checkpoint, case):
    loss, spoil, overrides, said = map(str.strip, case.split("|"))
    path = make_baseline(tmp_path, tiny_checkpoint, loss)
    if spoil:
        SPOILS[spoil](tmp_path)
    check(refused(TRAINERS[loss], path, *overrides.split()), said)
    # Else the folder would hold its next user to this config, and a typo could not be mended in place.
    assert not {"checkpoints", "metrics.jsonl"} & {path.name for path in (tmp_path / "run").iterdir()}


# -------------------------------------------------------------------------------------- two in one run folder

@pytest.mark.slow
@pytest.mark.parametrize("lock, place, others", [
    (".lock", "train_grpo.running.checkpoint.open_run",
     [train_grpo, hindsight, pairs, evaluation, autoprompt]),
    ("../.run.lock", "table1.subprocess.run", [table1])])
def test_a_run_folder_has_one_process_at_a_time(refused, tmp_path, tiny_checkpoint, lock, place, others):
    """The first is held at some place on its way. The second is told who that is, until it ends."""
    path, run = make_world(tmp_path, tiny_checkpoint, data__logs="logs.jsonl"), tmp_path / "run"
    script = place.partition(".")[0]
    held = f"import time, {script}; {place} = lambda *_: time.sleep(30); {script}.main()"
    with subprocess.Popen([sys.executable, "-c", held, path], cwd=REPO) as process:
        while not ((run / lock).is_file() and (run / lock).read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        for other in others:
            line = refused(other, path, "train.lr=0.5", *["type=grader"] * (other == autoprompt))
            where = (run / lock).resolve().parent
            check(line, f"{where} is in use by process {process.pid} ( ... {path}): wait, end it")
        process.kill()
    assert not (run / "config.yaml").exists()
    records.lock(run, lock)


# ------------------------------------------------------------------------------------------------- rollout.py

PROMPTS = """
GOOD ; { | | prompts.jsonl:2: not valid UTF-8 JSON
GOOD ; [1] | | prompts.jsonl:2: expected a JSON object
GOOD ; {"text": "hi"} | | prompts.jsonl:2: expected {"messages": [...]}
{"prompt": 5} | | prompts.jsonl:1: expected {"messages": [...]}
GOOD ; {"prompt": ""} | | prompts.jsonl:2: the prompt is empty
GOOD ; {"messages": []} | | prompts.jsonl:2: ... messages is empty
{"messages": [{"role": "doctor", "content": "x"}]} | | prompts.jsonl:1: ... messages.0.role ... 'doctor'
{"messages": [{"role": "user"}]} | | prompts.jsonl:1: ... messages.0.content is missing
{"messages": [{"role": "system", "content": "only"}]} | | prompts.jsonl:1: ... must hold a user's message
{"messages": [{"role": "user", "content": ""}, {"role": "system", "content": ""}]} | | :1: ... only as the
| | prompts.jsonl holds no prompts
GOOD | --samples 0                 | --samples 0 is out of range
GOOD | --max-new-tokens 0          | --max-new-tokens 0 is out of range
GOOD | --temperature 0             | --temperature 0.0 is out of range
GOOD | --temperature 1e-40         | --temperature 1e-40 is out of range
GOOD | --max-new-tokens 1000000000000 | --max-new-tokens 1000000000000 is out of range
GOOD | --temperature nan           | --temperature nan is out of range
GOOD | --temperature inf           | --temperature inf is out of range
GOOD | --temperature -1            | --temperature -1.0 is out of range
GOOD | --top-p 0                   | --top-p 0.0 is out of range
GOOD | --top-p 1.1                 | --top-p 1.1 is out of range
GOOD | --seed -1                   | --seed -1 is out of range
GOOD | --max-rows 3 --samples 4    | --max-rows 3 is out of range
GOOD | --prompts nowhere.jsonl     | no such file: nowhere.jsonl
GOOD | --model /no/such/model      | /no/such/model
GOOD | --model nobody/no-such-model | nobody/no-such-model
"""  # lines of --prompts, further arguments, what is said


def test_where_rollout_writes_is_checked_before_it_samples(refused, monkeypatch, tmp_path, tiny_checkpoint):
    monkeypatch.setattr(rollout, "generate", lambda *_, **how: pytest.fail("sampled"))
    good = ["--model", tiny_checkpoint, "--prompts", write_lines(tmp_path / "p.jsonl", ['{"prompt": "hi"}'])]
    for out, said in (("", " is a folder: name a file"), ("p.jsonl/out", "p.jsonl'")):
        assert refused(rollout, *good, "--out", tmp_path / out).endswith(said)


@pytest.mark.parametrize("case", PROMPTS.strip("\n").splitlines())
def test_prompts_and_arguments_of_rollout(refused, tmp_path, tiny_checkpoint, case):
    lines, arguments, said = map(str.strip, case.split("|"))
    lines = lines.replace("GOOD", '{"prompt": "hi"}').split(" ; ")
    good = ["--model", tiny_checkpoint, "--prompts", write_lines(tmp_path / "prompts.jsonl", lines)]
    check(refused(rollout, *good, "--out", tmp_path / "out", *arguments.split()), said)
    assert not (tmp_path / "out").exists()
