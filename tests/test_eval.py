"""A model's figures on its held-out turns, and runs beside Table 1: the paper's numbers and orderings."""
import json
import shutil

import pytest
import torch
import yaml

import config
import eval as evaluation
import grading
from metrics import by_session, intervals, load_graded, metrics, summarise
from prompts import encode_prompts, load_turns
from records import InputError, Rollout, file_hash, write_json, write_jsonl
from world import LEXICON, make_config, write_lines

COLUMNS = "wa wa_gh wc ws aa fc tr".split()


def rollouts(scores):
    """{session: [R_a of its turns, all right questions]} -> list of Rollout."""
    same = dict(sample=0, truth="continue", decision="continue", r_s=1.0, omega=1.0, reward=0.0)
    return [Rollout(turn_id=f"{session}_{i}", response=f"q{r_a}", r_a=r_a, **same)
            for session, values in scores.items() for i, r_a in enumerate(values)]


@pytest.fixture
def show(call, capsys):
    """show(*arguments): what eval.py prints."""
    def show(*arguments):
        capsys.readouterr()
        call(evaluation, *arguments)
        return capsys.readouterr().out

    return show


# ---------------------------------------------------------------------------------------- a file of rollouts

def test_graded_file_gives_the_table_and_one_json_line(tmp_path, show):
    graded = rollouts({"s": [1.0, 0.5], "t": [0.0]})
    write_jsonl(tmp_path / "graded.jsonl", graded)
    *shown, last = show("--graded", tmp_path / "graded.jsonl").splitlines()
    assert shown[0].split()[2:10] == "WA | WA-GH | WC | WS |".split() and "0.500" in shown[2]
    assert json.loads(last) == {**metrics(graded), "intervals": intervals(graded)}


def test_errors_are_one_line(tmp_path, refused):
    write_lines(tmp_path / "empty.jsonl", [])
    write_lines(tmp_path / "bad.jsonl", ["{}", "{"])
    for name, says in (("none", "no such file"), ("empty.jsonl", "no graded"),
                       ("bad.jsonl", "bad.jsonl:1: turn_id is missing")):
        assert says in refused(evaluation, "--graded", tmp_path / name)


# ------------------------------------------------------------------------------------------ a model's figures

@pytest.fixture
def run(tmp_path, tiny_checkpoint):
    """A run folder with three turns of two sessions and no training yet, and its config's arguments."""
    folder = tmp_path / "run"
    (tmp_path / "lexicon.yaml").write_text(yaml.safe_dump(LEXICON))
    opening = {"role": "user", "content": "a cough"}
    told = [opening, {"role": "assistant", "content": "How long?"}, {"role": "user", "content": "two days"}]
    turns = [{"turn_id": f"{s}_{i}", "session_id": s, "context": context, "target": target,
              "known": [], "decision": "continue" if target else "stop"}
             for s, i, context, target in (("a", 1, [opening], ["duration: two"]), ("a", 2, told, []),
                                           ("b", 1, [opening], ["duration: two"]))]
    for name in ("eval", "train"):
        write_jsonl(folder / "turns" / f"{name}.jsonl", turns)
    path = tmp_path / "cfg.yaml"
    path.write_text("rollout: {max_new_tokens: 4, max_rows: 8}\n"
                    "eval: {samples: 3, temperature: 0.7, top_p: 0.9}\n")
    return folder, [path, f"run_dir={folder}", f"model.path={tiny_checkpoint}",
                    f"data.lexicon={tmp_path / 'lexicon.yaml'}"]


def test_a_run_that_never_trained_is_its_base_model(run, show, tiny_checkpoint):
    folder, args = run
    shown = show(*args)
    assert "temperature 0.7, top-p 0.9" in shown and "greedy" in shown and "95% from" in shown
    result = json.loads((folder / "eval.json").read_text())
    graded = load_graded(folder / "graded.jsonl")
    assert result["model"] == str(tiny_checkpoint) and result["n"] == len(graded) == 9
    assert result["steps"] == 0 and result["samples"] == 3
    assert result["config"] == config.flatten(config.load(list(map(str, args))))
    greedy = load_graded(folder / "graded_greedy.jsonl")
    assert result["greedy"]["n"] == len(greedy) == 3 and [g.session_id for g in greedy] == ["a", "a", "b"]
    assert len(result["turns"]) == 8
    assert [f"{g.turn_id} {g.sample}" for g in graded] == [
        f"{turn} {i}" for turn in ("a_1", "a_2", "b_1") for i in range(3)]
    assert result.items() >= metrics(graded).items()
    a, b = ([g.response for g in graded if g.turn_id == turn] for turn in ("a_1", "b_1"))
    assert len(set(a)) == 3  # samples differ from each other ...
    assert a != b  # ... and from those of another turn with the same prompt
    before = (folder / "graded.jsonl").read_bytes()
    show(*args, "reward.mode=no_rs", "reward.beta=7", "reward.omega_when_wrong=score")
    assert (folder / "graded.jsonl").read_bytes() == before  # the same noise, whatever the training reward


def test_greedy_is_the_likeliest_token_at_each_place(run, show, tiny_checkpoint, tiny_tokenizer):
    """One response a turn, that of transformers."""
    from transformers import AutoModelForCausalLM
    folder, args = run
    show(*args)
    cfg, model = config.load(list(map(str, args))), AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    prompts = encode_prompts(tiny_tokenizer, load_turns(cfg, "eval"), cfg)
    for prompt, g in zip(prompts, load_graded(folder / "graded_greedy.jsonl"), strict=True):
        ids = torch.tensor([prompt.tokens])
        out = model.generate(ids, do_sample=False, max_new_tokens=4)[0, ids.shape[1]:]
        text = tiny_tokenizer.decode(out, skip_special_tokens=True)
        assert (g.turn_id, g.response) == (prompt.turn.turn_id, text)


def test_the_export_is_evaluated_where_there_is_one(run, show, make_checkpoint):
    folder, args = run
    step = folder / "checkpoints" / "step_000002"

    def refuses():
        with pytest.raises(InputError, match="has not come to its end"):
            show(*args)

    (folder / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="config.yaml is lost"):
        show(*args)
    config.save(config.load(list(map(str, args))), folder / "config.yaml")
    refuses()
    (folder / "metrics.jsonl").unlink()
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    refuses()
    shutil.copytree(make_checkpoint("qwen2", seed=5), folder / "export")
    refuses()  # nobody knows of what
    write_json(folder / "export" / ".trained.json", {"steps": 2})
    write_lines(folder / "metrics.jsonl", [{"step": step} for step in range(3)])
    show(*args)
    result = json.loads((folder / "eval.json").read_text())
    assert (result["model"], result["steps"]) == (str(folder / "export"), 2)
    for name in ("step_000003.old", "step_000003"):  # training went on after that export, and was killed
        step = step.rename(step.with_name(name))  # .old: while a checkpoint took the place of another
        refuses()
    shutil.rmtree(step.parent)
    write_lines(folder / "metrics.jsonl", [{"step": step} for step in range(4)])
    refuses()


@pytest.mark.parametrize("file, line", [("metrics.jsonl", {"step": 7}), ("graded_greedy.jsonl", {})])
def test_an_old_evaluation_stands_in_no_table(run, show, file, line):
    """The run was trained on, or rollouts of another evaluation lie there (one that was killed)."""
    folder, args = run
    show(*args)
    show("--table", folder)
    with open(folder / file, "a") as f:
        f.write(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="is not of the rollouts or of the training beside it: run eval.py"):
        show("--table", folder)


def test_an_evaluation_whose_grader_fails_ends_in_an_error(run, serve, monkeypatch, refused):
    """Failed gradings are those of right decisions: without them the means would be of the others."""
    folder, args = run
    monkeypatch.setattr(grading, "needs_grader", lambda *_: True)
    url = serve(faults=1.0, kinds=("500",)).url
    told = refused(evaluation, *args, "reward.grader=llm", "llm.grader.model=toy",
                   f"llm.grader.base_url={url}", "llm.grader.retries=0", "reward.omega=rule")
    assert "gradings failed in this evaluation, more than reward.max_failed" in told
    assert not (folder / "eval.json").exists()


def test_turns_must_be_there_and_made_with_this_config(run, show):
    folder, args = run
    other = config.load([*map(str, args), "hindsight.stop_rule=last_turn"])
    files = {path.name: file_hash(path) for path in (folder / "turns").glob("*.jsonl")}
    write_json(folder / "turns" / "made.json", {**config.made_with(other, "turns"), "files": files})
    with pytest.raises(InputError, match="hindsight.stop_rule='last_turn', this config has 'paper'"):
        show(*args)
    show(*args, "hindsight.stop_rule=last_turn")
    shutil.rmtree(folder / "turns")
    with pytest.raises(InputError, match="run hindsight.py with this config first"):
        show(*args)


def test_a_prompt_that_is_too_long_is_found_before_the_model_is_loaded(run, show, monkeypatch):
    monkeypatch.delattr(evaluation, "load_policy")
    with pytest.raises(InputError, match="longer than rollout.max_prompt_tokens=8"):
        show(*run[1], "rollout.max_prompt_tokens=8")


def test_runs_side_by_side_with_conversations(run, show):
    folder, args = run
    show(*args)
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    show("--table", folder, other)
    file = (folder.parent / "table.json").rename(folder.parent / "renamed.json")  # a glob names it: no run
    shown = show("--table", folder, other, file, "--sessions", 1)
    rows = [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| **")]
    assert rows == ["**run**", "**other**"] * 2 and "Sampled (temperature 0.7, top-p 0.9)" in shown
    assert shown.count("session a") == 1 and "session b" not in shown
    said = [shown.index(line) for line in ("user   | a cough", "expert | How long?", "user   | two days")]
    assert said == sorted(said)
    assert shown.count("           run: ") == shown.count("           other: ") == 2


# --------------------------------------------------------------------------------------------- beside Table 1

# Typed apart from eval.TABLE_1 (7B | 32B: WA WA-GH WC WS AA FC TR).
TYPED = """
base  | .50 .13 .98 .16 .75 .63 2.17 | .50 .13 .92 .52 .81 .67 2.43
sft   | .40 .08 .94 .74 .89 .57 2.41 | .43 .11 .94 .87 .93 .69 2.70
dpo   | .42 .05 .94 .36 .78 .19 1.78 | .23 .04 .52 .87 .62 .18 1.61
grpo  | .67 .41 .94 .93 .94 .92 3.27 | .64 .37 .93 .88 .92 .88 3.15
no_ra | .63 .34 1.00 .02 .73 .70 2.35 | .57 .26 .97 .33 .79 .74 2.52
no_rs | .52 .19 .96 .87 .93 .92 3.06 | .54 .19 .95 .91 .94 .92 3.12
sum   | .64 .38 .92 .95 .93 .91 3.20 | .65 .37 .94 .88 .92 .90 3.19
gspo  | .61 .31 .93 .94 .93 .91 3.16 | .62 .32 .95 .86 .93 .89 3.12
cispo | .71 .47 .95 .94 .95 .93 3.36 | .70 .49 .94 .89 .93 .92 3.29
"""


@pytest.mark.parametrize("line", TYPED.strip().splitlines())
def test_the_papers_numbers_and_its_formulas(line):
    """With 72.7% continue turns AA and TR follow from the other columns (but TR not in the DPO row)."""
    name, *sizes = line.split("|")
    p, found = 0.727, evaluation.PAPER[name.strip()]
    assert list(found) == ["7b", "32b"] and len(evaluation.PAPER) == 9
    for typed, figures in zip(sizes, found.values(), strict=True):
        wa, _, wc, ws, aa, fc, tr = numbers = list(map(float, typed.split()))
        assert figures == dict(zip(COLUMNS, numbers, strict=True))
        assert p * wc + (1 - p) * ws == pytest.approx(aa, abs=0.03)
        if name.strip() != "dpo":
            assert p * wc * (1 + 2 * wa) + 3 * (1 - p) * ws + fc == pytest.approx(tr, abs=0.031)


def write_run(folder, scores, greedy=None, how=(), **flat):
    """A run that was evaluated. how: with what conditions; flat: keys of its config, __ for the dot."""
    folder.mkdir(parents=True)
    graded = rollouts(scores)
    write_jsonl(folder / "graded.jsonl", graded)
    write_jsonl(folder / "graded_greedy.jsonl", rollouts(greedy or scores))
    made = config.flatten(make_config(run_dir=str(folder), **flat))
    how = {"decoding": "temperature 1", "samples": 1, "steps": 9, "turns": "w", "judge": "j", **dict(how)}
    write_json(folder / "eval.json", {**summarise(graded), "files": evaluation.hashes(folder), **how,
                                      "config": made, "greedy": {}})
    return folder


def lines_of(view):
    lines = [line.strip("|").split("|") for line in view.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in line] for line in lines]


def test_the_view(tmp_path, show):
    good, fair, poor = ({f"{i}": [v] * 2 for i in range(30)} for v in (1.0, 0.5, 0.0))
    runs = [write_run(tmp_path / "base", poor), write_run(tmp_path / "sft", fair, good),
            write_run(tmp_path / "grpo", good), write_run(tmp_path / "sum", {**good, "0": [0.5, 1.0]}),
            write_run(tmp_path / "mine", fair)]
    out = show("--table", *runs)
    lines = lines_of(out)
    names = [row[0] for row in lines]
    assert [n for n in names if n[:2] == "**"] == "**Base** **SFT** **GRPO** **Sum** **mine**".split() * 2
    at = names.index("**GRPO**")
    assert [lines[at][i] for i in (1, 4, 7)] == ["1.00 [1.00, 1.00]", "-", "4.00 [4.00, 4.00]"]
    assert [lines[at + 1][i] for i in (0, 1, 2, 7)] == ["paper", "0.67 / 0.64", "0.41 / 0.37", "3.27 / 3.15"]
    assert names[names.index("**mine**") + 1] != "paper"
    held = {row[0]: row[1:] for row in lines if " > " in row[0]}
    assert list(held) == ["GRPO > SFT in TR", "SFT > Base in TR", "GRPO > Base in TR", "GRPO > Sum in TR"]
    assert held["GRPO > SFT in TR"] == ["+0.86 / +0.45", "+1.000 [+1.000, +1.000]", "holds",
                                        "+0.000 [+0.000, +0.000]", "undecided"]
    assert held["GRPO > Sum in TR"][::2][:2] == ["+0.07 / -0.04", "undecided"]
    assert "Sampled (temperature 1)" in out and (tmp_path / "table.md").read_text() in out
    assert "Not alike" not in out
    found = json.loads((tmp_path / "table.json").read_text())
    row = found["rows"]["grpo"]
    assert row["sampled"]["tr"] == 4 and row["paper"]["7b"]["tr"] == 3.27
    assert set(found["rows"]["mine"]) == {"runs", "how", "made", "sampled", "greedy", "tr_by_run"}
    first = found["orderings"][0]
    assert first["sampled"] == {"difference": 1.0, "interval": [1.0, 1.0], "verdict": "holds"}
    assert first["paper"] == {"7b": 0.86, "32b": 0.45}


@pytest.mark.parametrize("grpo, sft, shown", [
    ({"s": [0.0], "t": [0.5]}, {"s": [1.0], "t": [1.0]}, ["-1.500 [-2.000, -1.000]", "the reverse"]),
    ({"s": [1.0]}, {"other": [1.0]}, ["-", "other turns"])])
def test_an_ordering_that_does_not_hold_or_cannot_be_compared(tmp_path, show, grpo, sft, shown):
    runs = [write_run(tmp_path / "grpo", grpo), write_run(tmp_path / "sft", sft)]
    assert lines_of(show("--table", *runs))[-1] == ["GRPO > SFT in TR", "+0.86 / +0.45", *shown, *shown]


def test_runs_of_one_name_are_seeds_of_a_row(tmp_path, show):
    """Pooled; session 0 of one world is not session 0 of the other. Worlds lie beside their runs."""
    runs = []
    for i, world in enumerate(({"0": [1.0], "1": [0.5]}, {"0": [0.0, 0.0]})):
        how = {"turns": f"w{i}"}
        runs.append(write_run(tmp_path / f"toy{i}" / "grpo", world, how=how, seed=i, train__eval_every=i + 1,
                              data__logs=str(tmp_path / f"toy{i}" / "world" / "train.jsonl")))
        zeros = {s: [0.0] * len(v) for s, v in world.items()}
        runs.append(write_run(tmp_path / f"toy{i}" / "sft", zeros, how=how, seed=i))
    assert "**TR of each seed**" in show("--table", *runs)
    summary = json.loads((tmp_path / "table.json").read_text())
    row = summary["rows"]["grpo"]
    assert row["sampled"]["n"] == 4 and row["sampled"]["wa"] == pytest.approx(1.5 / 4)
    assert row["tr_by_run"] == [pytest.approx(3.5), pytest.approx(2.0)] and len(row["runs"]) == 2
    assert summary["orderings"][0]["sampled"]["difference"] == pytest.approx(0.75)
    assert len(by_session(evaluation.read_rows(runs)["grpo"]["sampled"])[0]) == 3


@pytest.mark.parametrize("name, values", [
    ("train.lr", (0.5, 0.25)), ("data.logs", (["a/train.jsonl"], ["b/train.jsonl"])),
    ("eval.samples", (1, 2))])
def test_runs_of_one_name_that_are_no_seeds_are_not_pooled(tmp_path, refused, name, values):
    runs = [write_run(tmp_path / str(i) / "grpo", {"s": [1.0]}, seed=i, **{name.replace(".", "__"): value})
            for i, value in enumerate(values)]
    says = f"{runs[0]} and {runs[1]} have one name but differ in {name} ({values[0]}, {values[1]})"
    assert says in refused(evaluation, "--table", *runs)


def test_a_seed_is_pooled_once(tmp_path, refused):
    """Named twice, by a link, as a copy."""
    run = write_run(tmp_path / "a" / "grpo", {"s": [1.0]})
    (tmp_path / "link").symlink_to(run)
    shutil.copytree(run, tmp_path / "b" / "grpo")
    for other in (run, f"{run}/", tmp_path / "link", tmp_path / "b" / "grpo"):
        line = refused(evaluation, "--table", run, other)
        assert f"{run} and {str(other).rstrip('/')} are one seed of one row" in line


@pytest.mark.parametrize("name, values", [
    ("decoding", ("greedy", "top-p 1")), ("samples", (1, 3)), ("steps", (0, 200)), ("turns", ("ab", "cd")),
    ("judge", ("ef", "gh"))])
def test_a_table_says_which_conditions_differ(tmp_path, show, name, values):
    runs = [write_run(tmp_path / row, {"s": [1.0]}, how={name: value})
            for row, value in zip(("grpo", "mine"), values)]
    out = show("--table", *runs)
    assert f"\n- {name} differ: GRPO {values[0]}; mine {values[1]}\n" in out and out.count("differ:") == 1


def test_a_run_without_evaluation_or_of_an_older_one(tmp_path, show):
    run = write_run(tmp_path / "old", {"s": [1.0]})
    write_json(run / "eval.json", {"decoding": "temperature 1"})
    torn = shutil.copytree(run, tmp_path / "torn")
    (torn / "eval.json").write_text('{"decoding": "temp')
    for run, says in ((tmp_path / "nowhere", "nowhere/eval.json does not exist: run eval.py"),
                      (run, "old/eval.json does not tell its config: run eval.py with it again"),
                      (torn, "torn/eval.json holds no JSON object .* or remove it and run")):
        with pytest.raises(InputError, match=says):
            show("--table", run)
