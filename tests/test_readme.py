"""What README.md and docs/ tell a newcomer to type, to write and to read holds."""
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import autoprompt
import config
import grading
import lexicon
import reward
import train_grpo
from records import Turn
from toy import world

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], key=lambda page: page.name != "README.md")
TEXTS = {page.name: page.read_text() for page in PAGES}
README, ALL = TEXTS["README.md"], "\n".join(TEXTS.values())
FUNCTION = re.search(r"```python\n(.*?)```", README, re.S)[1]
YAML = re.findall(r"```yaml\n(.*?)```", ALL, re.S)
CONFIGS = [text for text in YAML if "run_dir:" in text or "base:" in text]
COMMANDS = re.findall(r"^ {4}([^ {].*)", re.sub(r"```.*?```", "", ALL, flags=re.S), re.M)
OURS = [line for line in COMMANDS if re.match("(python|torchrun|make) (?!-c)", line)]
MADE_LATER = {"configs/toy/reinforce.yaml", "prompts/calibrated/TYPE.md", "prompts/calibrated/grader.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_files_named_exist():
    folder = r"(?:configs|docs|tests|bench|toy|prompts)/[\w/.-]+\.\w+"
    named = set(re.findall(rf"(?<![\w/.~])(?:{folder}|\w+\.py)\b", ALL)) - MADE_LATER
    assert len(named) > 40 and [path for path in named if not (ROOT / path).is_file()] == []


def test_keys_and_functions_named_exist():
    """section.key of the config, module.function of the code."""
    for name in set(re.findall(r"(?<![\w/.-])[a-z]\w*\.[a-z_]\w*(?:\.[a-z_]+)*", ALL)):
        first, _, rest = name.partition(".")
        own = (ROOT / f"{first}.py").is_file()
        if rest not in ("py", "json", "jsonl", "yaml", "html", "md") and (own or first in config.SECTIONS):
            known = {*config.FIELDS, *config.SECTIONS}
            assert name in known or own and hasattr(importlib.import_module(first), rest), name


def test_commands_are_shell():
    done = subprocess.run(["bash", "-n"], input="\n".join(COMMANDS), capture_output=True, text=True)
    assert len(COMMANDS) > 60 and (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("line", OURS)
def test_what_a_command_names_exists(line, monkeypatch):
    """The make target, or the script, its options, its config and the overrides."""
    monkeypatch.chdir(ROOT)
    line = line.replace(" my.yaml", " configs/table1/7b/grpo.yaml")
    if line.startswith("make"):
        assert re.search(rf"^{line.split()[1]}:", Path("Makefile").read_text(), re.M)
        return
    script, rest = re.search(r"(-m [\w.]+|\w\S*\.py)(.*)", line).groups()
    path = Path(script.removeprefix("-m ").replace(".", "/") + ".py" if script[0] == "-" else script)
    source = path.read_text() + Path("bench/common.py").read_text()
    words = shlex.split(rest, comments=True)
    own = {field.alias or name for name, field in autoprompt.Own.model_fields.items()}
    assert all(word[2:].replace("-", "_") in source for word in words if word.startswith("--"))
    overrides = [word for word in words if "=" in word and word.partition("=")[0] not in own]
    for word in words:
        if word.startswith("configs/") and word not in MADE_LATER:
            found = list(ROOT.glob(word))
            assert found and all(config.load([str(path), *overrides], may_plan=True) for path in found)


@pytest.mark.parametrize("text", CONFIGS)
def test_configs_load(text, tmp_path):
    text = text.replace("base: grpo", "base: configs/toy/grpo").replace("base: ", f"base: {ROOT}/")
    (tmp_path / "my.yaml").write_text(text)
    assert config.load([str(tmp_path / "my.yaml")]).run_dir in text


def test_the_lexicon_of_the_docs_loads(tmp_path):
    text, = set(YAML) - set(CONFIGS)
    (tmp_path / "lexicon.yaml").write_text(text)
    lex = lexicon.load(tmp_path / "lexicon.yaml")
    assert lexicon.asked("Please tell me, where to?", lex.at("book a flight")) == ["arrival"]


def test_the_worked_turn(tmp_path):
    """The rules grader of the toy says what the table says."""
    text = " ".join(README.split()).replace("`", "")
    context = re.search(r'one message: "(.*?)"', text)[1]
    target = re.search(r"reveals I\\\*: (.*?)\. So", text)[1].split(", ")
    cells = r"^\| (\w.+?) \| ([\d.]+) \| (\d) \| ([\d.]+) \| ([\d.]+) \| (.\d\.\d\d) "
    rows = re.findall(cells, README, re.M)
    (tmp_path / "lexicon.yaml").write_text(yaml.safe_dump(world.lexicon()))
    judge = grading.Judge(lexicon.load(tmp_path / "lexicon.yaml"), None, config.RewardConfig())
    turn = Turn(turn_id="192_1", session_id="192", context=[{"role": "user", "content": context}],
                known=[], target=target, decision="continue")
    graded = grading.grade(turn, [row[0] for row in rows], judge)
    found = [(g.response, *(f"{x:g}" for x in (g.r_a, g.r_s, g.omega, g.reward))) for g in graded]
    assert len(rows) == 5 and found == [row[:5] for row in rows]
    assert [f"{a:+.2f}" for a in reward.advantages([g.reward for g in graded])] == [row[5] for row in rows]


def test_the_worked_loss_is_what_it_says(monkeypatch):
    space = {**vars(train_grpo), "LOSSES": {}}
    exec(FUNCTION, space)
    monkeypatch.chdir(ROOT)
    t = config.load(["configs/toy/grpo.yaml", "train.loss=reinforce"]).train
    assert (t.loss, t.aggregation) == ("reinforce", "token")
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    old, adv, seq = torch.tensor([-1.5, -2.0, -0.1]), torch.tensor([1.0, 1.0, -2.0]), torch.tensor([0, 0, 1])
    loss, figures = space["LOSSES"]["reinforce"](logp, old, adv, seq, t)
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, -(logp.detach() - old).exp() * adv)
    assert {"ratio", "clip_share"} == set(figures)


@pytest.mark.slow
def test_a_row_with_a_loss_of_its_own(tmp_path):
    """The worked example in a copy of the code: the function below LOSSES, the YAML, the two commands."""
    for path in [*ROOT.glob("*.py"), ROOT / "prompts", ROOT / "configs"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    code = (tmp_path / "train_grpo.py").read_text()
    losses = re.search(r"^LOSSES = \{.*?\}.*?\n", code, re.S | re.M)[0]
    (tmp_path / "train_grpo.py").write_text(code.replace(losses, f"{losses}\n\n{FUNCTION}"))
    (tmp_path / "configs" / "toy" / "reinforce.yaml").write_text(CONFIGS[0])
    world.make(tmp_path / "runs" / "toy" / "world", sessions=(12, 6), base_steps=3)
    train, show = [line for line in OURS if "reinforce" in line]
    small = "train.steps=2 train.prompts_per_step=2 train.eval_every=2 data.valid_sessions=2 eval.samples=1"
    alone = re.sub(r"runs/toy/(base|grpo)", "", show)
    for command in train.replace("--nproc 2", f"--nproc 1 {small}"), alone:
        done = subprocess.run([sys.executable, *command.split()[1:]], cwd=tmp_path, text=True,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0 and "**reinforce**" in done.stdout, done.stdout + done.stderr
    run = tmp_path / "runs" / "toy" / "reinforce"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2] and (run / "report.html").is_file() and (run / "export").is_dir()
