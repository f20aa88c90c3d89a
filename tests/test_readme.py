"""What README.md tells a newcomer to type and to write works as it stands there."""
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import config
import train_grpo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_worked_loss_works(monkeypatch):
    """The snippet is run in train_grpo.py's namespace, and config.py accepts the name as README says."""
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    space = dict(vars(train_grpo))
    exec(code, space)
    field = config.FIELDS["train.loss"]
    choices = tuple(space["LOSSES"])
    assert f"choices={choices}".replace("'", '"') in README
    monkeypatch.setitem(config.FIELDS, "train.loss", SimpleNamespace(type=field.type, metadata={**field.metadata, "choices": choices}))
    monkeypatch.chdir(ROOT)
    t = config.load(["configs/toy/grpo.yaml", "train.loss=reinforce"]).train
    assert (t.loss, t.aggregation) == ("reinforce", "token")
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    old, adv, seq = torch.tensor([-1.5, -2.0, -0.1]), torch.tensor([1.0, 1.0, -2.0]), torch.tensor([0, 0, 1])
    loss, figures = space["LOSSES"]["reinforce"](logp, old, adv, seq, t)
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, -(logp.detach() - old).exp() * adv)
    assert {"ratio", "clip_share"} == set(figures)


def test_files_and_keys_named_here_exist():
    for path in re.findall(r"configs/[\w/]+\.yaml|docs/\w+\.svg|(?<![\w/])\w+\.py(?!\w)", README):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
    keys = re.findall(r"\b((?:model|data|hindsight|reward|rollout|train|eval|wandb)\.[a-z_]+)\b", README)
    keys = [k for k in keys if not k.endswith((".py", ".jsonl", ".json", ".yaml", ".md"))]
    assert keys and all(k in config.FIELDS for k in keys), [k for k in keys if k not in config.FIELDS]


@pytest.mark.parametrize("line", re.findall(r"^    (?:torchrun|python) .*$", README, re.M))
def test_overrides_in_commands_are_accepted(line, monkeypatch):
    words = line.split("#")[0].split()
    at = next((i for i, w in enumerate(words) if w.endswith(".yaml")), None)
    if at is None or words[at] == "my.yaml" and not words[at + 1:]:
        return
    monkeypatch.chdir(ROOT)
    path = "configs/grpo_7b.yaml" if words[at] == "my.yaml" else words[at]
    assert dataclasses.is_dataclass(config.load([path, *words[at + 1:]]))
