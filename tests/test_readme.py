"""What README.md tells a newcomer to type and to write works as it stands there."""
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import autoprompt
import config
import toy
import train_grpo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FUNCTION = re.search(r"```python\n(.*?)```", README, re.S)[1]
LLM, ROW = re.findall(r"```yaml\n(.*?)```", README, re.S)


def test_the_worked_loss_is_what_it_says(monkeypatch):
    space = dict(vars(train_grpo))
    exec(FUNCTION, space)
    monkeypatch.chdir(ROOT)
    t = config.load(["configs/toy/grpo.yaml", "train.loss=reinforce"]).train
    assert (t.loss, t.aggregation) == ("reinforce", "token")
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    old, adv, seq = torch.tensor([-1.5, -2.0, -0.1]), torch.tensor([1.0, 1.0, -2.0]), torch.tensor([0, 0, 1])
    loss, figures = space["reinforce_loss"](logp, old, adv, seq, t)
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, -(logp.detach() - old).exp() * adv)
    assert {"ratio", "clip_share"} == set(figures)


def test_a_tenth_row_takes_one_yaml_and_one_function(tmp_path):
    """The worked example in a copy of the code: the function beside the others, the YAML, the two commands."""
    for path in [*ROOT.glob("*.py"), ROOT / "prompts", ROOT / "configs"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    code = (tmp_path / "train_grpo.py").read_text()
    (tmp_path / "train_grpo.py").write_text(code.replace("def gspo_loss(", f"{FUNCTION}\n\ndef gspo_loss("))
    (tmp_path / "configs" / "toy" / "reinforce.yaml").write_text(ROW)
    toy.make(tmp_path / "runs" / "toy" / "world", sessions=(12, 6), base_steps=3)
    commands = [line.split() for line in re.findall(r"^    python (table1.py configs/toy/reinforce.*|eval.py --table .*reinforce)$", README, re.M)]
    assert len(commands) == 2
    commands[0] += ["train.steps=2", "train.prompts_per_step=2", "train.eval_every=2", "data.valid_sessions=2", "eval.samples=1"]
    commands[0][commands[0].index("--nproc") + 1] = "1"
    commands[1] = [w for w in commands[1] if w not in ("runs/toy/base", "runs/toy/grpo")]
    for command in commands:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode == 0 and "**reinforce**" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    run = tmp_path / "runs" / "toy" / "reinforce"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == [0, 1, 2] and (run / "report.html").is_file() and (run / "export").is_dir()


def test_the_config_with_a_language_model_loads(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(LLM.replace("base: ", f"base: {ROOT}/configs/"))
    cfg = config.load([str(path)])
    assert cfg.hindsight.source == "llm" and cfg.llm.grader.max_tokens == 64 and cfg.llm.extractor.concurrency == 256


def test_files_and_keys_named_here_exist():
    for path in re.findall(r"configs/[\w/]+\.yaml|docs/\w+\.svg|(?<![\w/])\w+\.py(?!\w)", README):
        assert (ROOT / path).is_file() or path == "configs/toy/reinforce.yaml", path
    for path in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
    keys = re.findall(r"\b((?:model|data|hindsight|llm|reward|rollout|train|eval|wandb)(?:\.[a-z_]+)+)\b", README)
    keys = [k for k in keys if not k.endswith((".py", ".jsonl", ".json", ".yaml", ".md"))]
    assert keys and all(k in config.FIELDS or k in config.SECTIONS for k in keys), [k for k in keys if k not in config.FIELDS]


@pytest.mark.parametrize("line", re.findall(r"^    (?:torchrun|python) .*$", README, re.M))
def test_overrides_in_commands_are_accepted(line, monkeypatch):
    words = line.split("#")[0].split()
    at = next((i for i, w in enumerate(words) if w.endswith(".yaml")), None)
    if at is None or "*" in words[at] or "reinforce" in words[at] or words[at] == "my.yaml" and not words[at + 1:]:
        return
    monkeypatch.chdir(ROOT)
    path = "configs/table1/7b/grpo.yaml" if words[at] == "my.yaml" else words[at]
    own = autoprompt.OWN if "autoprompt.py" in words else ()
    assert dataclasses.is_dataclass(config.load([path, *(w for w in words[at + 1:] if w.partition("=")[0] not in own)], may_plan=True))
