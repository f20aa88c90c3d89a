"""The config: inheritance, checks, help, and that every key changes something."""
import dataclasses
import io
import json
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import config
import hindsight
import reward
import rollout
import train_dpo
import train_grpo
from data import InputError
from llm_server import Server
from test_train import LEXICON, REPO, make_world, marks_checkpoint  # noqa: F401 (a fixture)


def write(path, text):
    path.write_text(text)
    return str(path)


def load(tmp_path, text, *overrides):
    return config.load([write(tmp_path / "c.yaml", "run_dir: r\n" + text), *overrides])


def says(tmp_path, text, *overrides):
    with pytest.raises(InputError) as error:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------- loading

def test_defaults_are_the_dataclasses(tmp_path):
    cfg = load(tmp_path, "")
    own = {"train.aggregation": "token", "train.clip_low": 0.2, "train.clip_high": 0.2, "run_dir": "r"}
    for name, field in config.FIELDS.items():
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        assert config.flatten(cfg)[name] == own.get(name, default), name


def test_the_losses_own_clips_and_aggregation(tmp_path):
    t = load(tmp_path, "train: {loss: gspo}").train
    assert (t.aggregation, t.clip_low, t.clip_high) == ("sequence", 3e-4, 4e-4)
    t = load(tmp_path, "train: {loss: cispo}").train
    assert (t.aggregation, t.clip_low, t.clip_high, t.is_cap) == ("token", None, None, 1.28)
    t = load(tmp_path, "train: {loss: gspo, aggregation: token, clip_low: 0.1, clip_high: 0.3}").train
    assert (t.aggregation, t.clip_low, t.clip_high) == ("token", 0.1, 0.3)


def test_base_is_inherited_beside_the_file_and_overridden(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "root.yaml", "run_dir: root\nseed: 3\ntrain: {lr: 1e-3, loss: gspo}\nmodel: {path: m}")
    write(tmp_path / "sub" / "mid.yaml", "base: ../root.yaml\ntrain: {lr: 2e-3}")
    leaf = write(tmp_path / "leaf.yaml", "base: sub/mid.yaml\nrun_dir: leaf\ntrain: {epochs: 2}")
    cfg = config.load([leaf, "train.epochs=7"])
    assert (cfg.run_dir, cfg.seed, cfg.model.path) == ("leaf", 3, "m")
    assert (cfg.train.lr, cfg.train.loss, cfg.train.epochs) == (2e-3, "gspo", 7)


def test_base_may_be_a_list_of_which_the_later_wins(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "root.yaml", "run_dir: root\nseed: 3\nmodel: {path: m}\ntrain: {lr: 1e-3, epochs: 9, weight_decay: 0.5}")
    write(tmp_path / "sub" / "a.yaml", "base: ../root.yaml\nrun_dir: a\ntrain: {lr: 2e-3, epochs: 8}\nrollout: {max_rows: 70}")
    write(tmp_path / "sub" / "b.yaml", "train: {lr: 3e-3}")  # no run_dir: a part of a config, fit to be inherited
    leaf = write(tmp_path / "leaf.yaml", "base: [sub/a.yaml, sub/b.yaml]\nrun_dir: leaf\ntrain: {loss: gspo}")
    cfg = config.load([leaf])
    assert (cfg.run_dir, cfg.seed, cfg.model.path, cfg.rollout.max_rows) == ("leaf", 3, "m", 70)
    assert (cfg.train.lr, cfg.train.epochs, cfg.train.weight_decay, cfg.train.loss) == (3e-3, 8, 0.5, "gspo")
    cfg = config.load([write(tmp_path / "turned.yaml", "base: [sub/b.yaml, sub/a.yaml]")])
    assert (cfg.run_dir, cfg.train.lr) == ("a", 2e-3)
    for text in ("base: []", "base: null", "base: [leaf.yaml]", "base: [leaf.yaml, leaf.yaml]"):  # the same file twice is no cycle
        assert load(tmp_path, text).run_dir == "r"
    with pytest.raises(InputError, match="none.yaml"):
        config.load([write(tmp_path / "lost.yaml", "base: [root.yaml, sub/none.yaml]")])


def test_base_cycles_are_told(tmp_path):
    a = write(tmp_path / "a.yaml", "base: b.yaml\nrun_dir: r")
    write(tmp_path / "b.yaml", "base: a.yaml")
    with pytest.raises(InputError, match="base"):
        config.load([a])
    assert "base" in says(tmp_path, "base: c.yaml")
    write(tmp_path / "good.yaml", "seed: 1")
    write(tmp_path / "b.yaml", "base: [good.yaml, a.yaml]")
    with pytest.raises(InputError, match="base"):
        config.load([a])


@pytest.mark.parametrize("text, name, value", [
    ("train: {lr: 5e-7}", "train.lr", 5e-7), ("train: {lr: '1e-3'}", "train.lr", 1e-3), ("train: {lr: 1}", "train.lr", 1.0),
    ("train: {steps: null}", "train.steps", None), ("train: {dual_clip: 3}", "train.dual_clip", 3.0),
    ("train: {betas: [0.9, 0.95]}", "train.betas", [0.9, 0.95]), ("data: {goal: null}", "data.goal", ""),
    ("train: {loss: cispo, cispo_drop: true}", "train.cispo_drop", True), ("model: {path: '123'}", "model.path", "123")])
def test_values_are_read(tmp_path, text, name, value):
    got = config.flatten(load(tmp_path, text))[name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("override, name, value", [
    ("train.lr=5e-7", "train.lr", 5e-7), ("train.lr=1", "train.lr", 1.0), ("train.steps=null", "train.steps", None),
    ("train.steps=12", "train.steps", 12), ("train.betas=[0.8, 0.9]", "train.betas", [0.8, 0.9]), ("seed=4", "seed", 4),
    ("data.goal=why: a = b?", "data.goal", "why: a = b?"), ("model.path=7", "model.path", "7"),
    ("train.eval_every=null", "train.eval_every", None), ("data.lexicon=", "data.lexicon", "")])
def test_overrides(tmp_path, override, name, value):
    got = config.flatten(load(tmp_path, "train: {steps: 5}", override))[name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text, words", [
    ("train: {lr: fast}", ["train.lr must be float", "'fast'"]), ("train: {lr: .nan}", ["train.lr", "finite"]),
    ("train: {lr: .inf}", ["train.lr", "finite"]), ("train: {lr: 0}", ["train.lr must be above 0"]),
    ("train: {epochs: 1.5}", ["train.epochs must be int", "1.5"]), ("train: {epochs: true}", ["train.epochs must be int"]),
    ("train: {epochs: 0}", ["train.epochs must be at least 1"]), ("train: {epochs: null}", ["train.epochs must be int"]),
    ("eval: {top_p: 1.5}", ["eval.top_p must be at most 1"]), ("rollout: {temperature: 0}", ["rollout.temperature"]),
    ("train: {betas: [0.9]}", ["train.betas"]), ("train: {betas: [0.9, 1.0]}", ["train.betas"]), ("train: {betas: 3}", ["train.betas"]),
    ("train: {clip_low: 1.5}", ["train.clip_low"]),
    ("train: 3", ["'train' is a section"]), ("train: {cispo_drop: 1}", ["train.cispo_drop must be bool"]),
    ("train: {stepz: 1}", ["c.yaml", "unknown key 'train.stepz'", "did you mean 'train.steps'"]),
    ("lr: 1", ["unknown key 'lr'", "did you mean 'train.lr'"]), ("trian: {lr: 1}", ["unknown key 'trian'", "did you mean 'train'"]),
    ("xyzzy: 1", ["unknown key 'xyzzy'", "--help"]), ("hindsight: {generic: [1]}", ["hindsight.generic"]),
    ("train: {loss: cispo, is_floor: 2}", ["train.is_floor", "train.is_cap"]),
    ("rollout: {samples: 9, max_rows: 8}", ["rollout.max_rows=8", "rollout.samples=9"]),
    ("eval: {samples: 9}\nrollout: {max_rows: 8}", ["rollout.max_rows=8", "eval.samples=9"]),
    ("train: {steps: -1}", ["train.steps must be at least 0"]), ("train: {dpo_beta: 0}", ["train.dpo_beta must be above 0"]),
    ("base: [a, 3]", ["base", "3"]), ("base: 3", ["base"]), ("base: {a: b}", ["base"])])
def test_wrong_values_are_refused(tmp_path, text, words):
    line = says(tmp_path, text)
    assert all(w in line for w in words), line


@pytest.mark.parametrize("text", ["loss: cispo, dual_clip: 3", "loss: gspo, dual_clip: 3", "loss: cispo, clip_low: 0.1",
                                  "loss: cispo, clip_high: 0.1", "loss: grpo, is_cap: 2", "loss: gspo, is_floor: 0.5",
                                  "loss: grpo, cispo_drop: true", "loss: grpo, dpo_beta: 0.2", "loss: gspo, dpo_beta: 0.2",
                                  "loss: cispo, dpo_beta: 0.2", "loss: sft, dpo_beta: 0.2"])
def test_a_key_the_loss_never_reads_is_refused(tmp_path, text):
    assert "has no effect" in says(tmp_path, f"train: {{{text}}}")


# What only the policy losses read. test_sft.py and test_dpo.py hold each loss to a formula in which none of these occurs.
POLICY_ONLY = {"train.clip_low": 0.1, "train.clip_high": 0.1, "train.dual_clip": 3.0, "train.is_floor": 0.5, "train.is_cap": 2.0,
               "train.cispo_drop": True, "train.advantage": "mean", "train.aggregation": "token", "train.tis_cap": 2.0,
               "train.kl_coef": 0.1, "train.kl": "k3", "train.entropy_coef": 0.1, "train.steps_per_sync": 2, "reward.mode": "sum",
               "reward.beta": 3.0, "reward.omega_when_wrong": "score"}


@pytest.mark.parametrize("loss", ["sft", "dpo"])
@pytest.mark.parametrize("name", list(POLICY_ONLY))
def test_a_key_that_sft_and_dpo_never_read_is_refused(tmp_path, loss, name):
    default, other = (f"{name}={v if isinstance(v, str) else json.dumps(v)}"
                      for v in (config.flatten(config.Config())[name], POLICY_ONLY[name]))
    assert f"{name} has no effect with train.loss={loss}" in says(tmp_path, "", f"train.loss={loss}", other)
    load(tmp_path, "", f"train.loss={loss}", default)
    load(tmp_path, "", "train.loss=mine", other)  # a loss of your own may read anything


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_what_sft_and_dpo_do_read(tmp_path, loss):
    t = load(tmp_path, f"train: {{loss: {loss}, lr: 1e-3, schedule: cosine, warmup_steps: 3, grad_clip: 2, weight_decay: 0.5, "
                       "betas: [0.5, 0.9], prompts_per_step: 3, epochs: 2, tokens_per_microbatch: 100}").train
    assert (t.aggregation, t.clip_low, t.clip_high, t.dpo_beta) == ("auto", None, None, 0.1)
    assert load(tmp_path, "train: {loss: dpo, dpo_beta: 0.5}").train.dpo_beta == 0.5
    assert load(tmp_path, "train: {steps: 0}").train.steps == 0


@pytest.mark.parametrize("override, words", [
    ("train.lr", ["'train.lr'", "key=value"]), ("train.rl=1", ["command line", "did you mean 'train.lr'"]),
    ("train=1", ["unknown key 'train'"]), ("train.lr=[", ["train.lr", "YAML"]), ("train.steps=many", ["command line", "train.steps"]),
    ("train.lr=null", ["train.lr"])])
def test_wrong_overrides_are_refused(tmp_path, override, words):
    line = says(tmp_path, "", override)
    assert all(w in line for w in words), line


def test_run_dir_must_be_named(tmp_path):
    with pytest.raises(InputError, match="run_dir"):
        config.load([write(tmp_path / "c.yaml", "seed: 1")])
    with pytest.raises(InputError, match="first argument"):
        config.load(["seed=1"])
    with pytest.raises(InputError, match="first argument"):
        config.load([])


@pytest.mark.parametrize("loss", ["grpo", "cispo", "gspo", "sft", "dpo"])
def test_a_saved_config_reads_back_the_same(tmp_path, loss):
    cfg = load(tmp_path, f"train: {{loss: {loss}, lr: 5e-7, steps: 7}}\ndata: {{goal: 'é: [x] 是'}}\nhindsight: {{generic: []}}")
    config.save(cfg, tmp_path / "saved.yaml")
    assert config.load([str(tmp_path / "saved.yaml")]) == cfg


def test_help_lists_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        config.load(["--help"], "What it is.")
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith("What it is.")
    lines = text.splitlines()
    for name, field in config.FIELDS.items():
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        at = lines.index(f"  {name} = {'null' if default is None else default}")
        assert field.metadata["help"] in lines[at + 1] and len(field.metadata["help"]) > 5, name
        assert all(choice in lines[at + 1] for choice in field.metadata["choices"] or ())


FRAGMENTS = {"configs/table1/32b.yaml"}  # inherited beside another config, never run
CONFIGS = sorted({p.relative_to(REPO).as_posix() for p in (REPO / "configs").rglob("*.yaml")} - FRAGMENTS)


@pytest.mark.parametrize("path", CONFIGS)
def test_the_configs_load(path):
    cfg = config.load([str(REPO / path)])
    for prompt in (cfg.data.prompt, cfg.data.prompt_no_stop):
        assert "{goal}" in (REPO / prompt).read_text()
    assert cfg.model.path and cfg.data.logs and (cfg.data.lexicon or cfg.llm.grader.model)


def test_every_config_has_a_run_dir_of_its_own():
    assert len({config.load([str(REPO / p)]).run_dir for p in CONFIGS}) == len(CONFIGS)


# ---------------------------------------------------------------------------------------- every key changes something

# key -> (overrides under which it acts, another value): a short run with and without it must differ in what was sampled,
# graded, logged, exported or left in the run folder (`trained`), or in the turns (`built`).
TRAIN = {
    "run_dir": ([], "elsewhere"),
    "seed": ([], 1),
    "model.path": ([], "OTHER_MODEL"),
    "model.dtype": ([], "float64"),
    "data.prompt": ([], "OTHER_PROMPT"),
    "data.prompt_no_stop": (["reward.mode=no_rs"], "OTHER_PROMPT"),
    "data.valid_sessions": (["train.eval_every=2"], 1),
    "data.lexicon": ([], "OTHER_LEXICON"),
    "reward.mode": ([], "sum"),
    "reward.beta": (["reward.mode=no_ra"], 3.0),
    "reward.omega_when_wrong": ([], "score"),
    "reward.grader": (["llm.grader.model=toy", "llm.grader.base_url=SERVER", "llm.grader.prompt=OTHER_GRADER"], "llm"),
    "reward.omega": (["reward.grader=llm", "llm.grader.model=toy", "llm.grader.base_url=SERVER", "llm.grader.prompt=OTHER_GRADER"], "llm"),
    "llm.grader.prompt": (["reward.grader=llm", "reward.omega=llm", "llm.grader.model=toy", "llm.grader.base_url=SERVER"], "OTHER_GRADER"),
    "llm.cache": (["reward.grader=llm", "llm.grader.model=toy", "llm.grader.base_url=SERVER"], "HERE/cache.sqlite"),
    "rollout.samples": ([], 3),
    "rollout.temperature": ([], 0.6),
    "rollout.max_new_tokens": ([], 5),
    "train.loss": ([], "cispo"),
    "train.advantage": ([], "mean"),
    "train.aggregation": (["rollout.temperature=2"], "constant"),
    "train.clip_low": ([], 0.01),
    "train.clip_high": ([], 0.01),
    "train.dual_clip": (["train.clip_low=0.9", "train.clip_high=9"], 1.001),
    "train.is_floor": (["train.loss=cispo"], 0.99),
    "train.is_cap": (["train.loss=cispo"], 0.9),
    "train.cispo_drop": (["train.loss=cispo", "train.is_cap=1.001"], True),
    "train.tis_cap": ([], 0.5),
    "train.dpo_beta": (["train.loss=dpo", "train.steps_per_sync=1"], 0.5),
    "train.kl_coef": ([], 0.5),
    "train.kl": (["train.kl_coef=0.5"], "k3"),
    "train.entropy_coef": ([], 0.5),
    "train.lr": ([], 1e-4),
    "train.schedule": ([], "linear"),
    "train.warmup_steps": ([], 3),
    "train.betas": ([], [0.5, 0.9]),
    "train.weight_decay": ([], 0.5),
    "train.grad_clip": ([], 0.01),
    "train.prompts_per_step": ([], 2),
    "train.steps_per_sync": ([], 1),
    "train.epochs": (["train.steps=null", "train.prompts_per_step=15", "train.epochs=1"], 2),
    "train.steps": ([], 2),
    "train.checkpoint_every": ([], 4),
    "train.keep_checkpoints": ([], 1),
    "train.eval_every": ([], 2),
    "eval.samples": (["train.eval_every=2"], 2),
    "eval.temperature": (["train.eval_every=2"], 0.3),
    "eval.top_p": (["train.eval_every=2"], 0.3),
    "wandb.mode": ([], "offline"),
    "wandb.project": (["wandb.mode=offline"], "other"),
}
BUILD = {
    "data.logs": ([], "OTHER_LOGS"),
    "data.eval_logs": ([], "OTHER_LOGS"),
    "data.valid_sessions": ([], 1),
    "data.goal": ([], "another goal"),
    "data.lexicon": ([], "OTHER_LEXICON"),
    "hindsight.source": ([], "annotations"),
    "hindsight.self_check": (["hindsight.source=llm", "llm.extractor.model=toy", "llm.extractor.base_url=SERVER"], 2),
    "llm.extractor.prompt": (["hindsight.source=llm", "llm.extractor.model=toy", "llm.extractor.base_url=SERVER"], "OTHER_EXTRACTOR"),
    "hindsight.stop_rule": ([], "last_turn"),
    "hindsight.user_end": ([], "drop"),
    "hindsight.generic": ([], ["duration"]),
    "seed": (["data.valid_sessions=2"], 1),
}
ELSEWHERE = {  # what bounds memory or only decides whether to go on: no figure may depend on it
    "data.long_prompts": "test_train.py: test_long_prompts_can_be_dropped, test_bad_input[long prompts]",
    "rollout.max_prompt_tokens": "test_train.py: test_bad_input[long prompts]",
    "rollout.max_rows": "below: test_max_rows_bounds_the_rows_decoded_at_once",
    "train.tokens_per_microbatch": "test_train.py: test_micro_batches_do_not_change_the_gradient counts the micro-batches",
    "train.activation_checkpointing": "test_plan.py: test_options_that_only_memory_and_time_know_of",
    "train.compile": "test_plan.py: test_options_that_only_memory_and_time_know_of",
    "plan": "test_plan.py: test_the_plan_as_printed", "gpus": "test_plan.py: test_the_plan_as_printed",
    "gpu_gib": "test_plan.py: test_the_plan_as_printed",
    "reward.max_failed": "test_llm.py: test_a_few_failed_gradings_do_not_stop_training and the one before it",
    "llm.writer.prompt": "test_llm.py: test_every_key_of_a_role_acts",
} | {f"llm.{role}.{key}": "test_llm.py: test_every_key_of_a_role_acts, test_source_local_is_a_checkpoint" for role in ("extractor", "grader", "writer")
     for key in ("source", "model", "base_url", "api_key_env", "temperature", "max_tokens", "concurrency", "timeout_s", "retries")}


def test_every_key_is_shown_to_act():
    assert set(TRAIN) | set(BUILD) | set(ELSEWHERE) == set(config.FIELDS)
    assert not (set(TRAIN) | set(BUILD)) & set(ELSEWHERE)


@pytest.fixture(scope="module")
def world(tmp_path_factory, marks_checkpoint, tiny_checkpoint):  # noqa: F811
    """A world and the other values that are paths. -> (config path, {placeholder: path})."""
    folder = tmp_path_factory.mktemp("keys")
    path = make_world(folder, marks_checkpoint, train__lr=0.02)
    turns = folder / "run" / "turns"
    (turns / "valid.jsonl").write_text("".join(turns.joinpath("train.jsonl").read_text().splitlines(True)[:5]))
    pairs = [dict(json.loads(t), chosen="How?", rejected="Red?!") for t in turns.joinpath("train.jsonl").read_text().splitlines()]
    (turns.parent / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    other = dict(LEXICON, attributes=dict(color=dict(asks=["color"], values={"two": ["red"]})),
                 complaints=dict(cough=dict(cues=["cough"], attributes=["color"])), goal="h")
    logs = []
    for i in range(6):
        logs.append(dict(session_id=i, messages=[
            dict(role="user", content="cough"), dict(role="assistant", content="How long?"),
            dict(role="user", content="two days" if i % 2 else "red", learned={"sore": "yes"} if i % 3 else {}),
            dict(role="assistant", content="Anything else?"), dict(role="user", content="no")]))
    for name, rows in (("logs", logs), ("other", [dict(r, session_id=r["session_id"] + 10) for r in logs[:3]])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "grader.md").write_text('Be kind. {goal} {"score": 1}\nExample: candidate "What color?" -> 0.5')
    (folder / "extractor.md").write_text('List all. {goal} {generic} {"items": []}')
    with Server(folder / "lexicon.yaml") as server:
        yield path, {"SERVER": server.url, "OTHER_GRADER": str(folder / "grader.md"), "OTHER_EXTRACTOR": str(folder / "extractor.md"),
                     "OTHER_MODEL": str(tiny_checkpoint), "OTHER_PROMPT": write(folder / "other.md", "Other. {goal}"),
                     "OTHER_LEXICON": write(folder / "other.yaml", yaml.safe_dump(other)), "LOGS": str(folder / "logs.jsonl"),
                     "OTHER_LOGS": str(folder / "other.jsonl")}


@pytest.fixture(scope="module")
def outcomes():
    return {}  # overrides -> what came out, so that each context runs once


CANNED = ["How long?", "How long? Any color?", "What color?", "<stop />", "Bye <stop />", "cough"]  # a tiny model only babbles


def filled(overrides, world, tmp_path):
    """Placeholders as values -> what they stand for."""
    places = world[1] | {"HERE/cache.sqlite": str(tmp_path / "cache.sqlite")}
    return [f"{name}={places.get(value, value)}" for name, _, value in (o.partition("=") for o in overrides)]


def trained(world, tmp_path, monkeypatch, overrides):
    """A short training run -> everything it did that a user can see: answers, figures, weights, files, what W&B was told.

    Each distinct answer is then read as one of CANNED, so that every branch of the reward is met.
    """
    path, _ = world
    run = tmp_path / "r"
    said, told = [], []
    grade, text_of, overrides = reward.grade, rollout.text_of, filled(overrides, world, tmp_path)
    with monkeypatch.context() as m:
        def canned(*answer):
            said.append(text_of(*answer))
            return CANNED[sum(said[-1].encode()) % len(CANNED)]
        m.setattr(rollout, "text_of", canned)
        m.setattr(reward, "grade", lambda *a: said.append(grade(*a)) or said[-1])
        m.setitem(sys.modules, "wandb", SimpleNamespace(
            init=lambda **how: told.append([how["mode"], how["project"]]) or SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)))
        m.chdir(REPO)
        named = [o for o in overrides if o.startswith("run_dir=")]
        run = tmp_path / named[0].partition("=")[2] if named else run
        (run / "turns").mkdir(parents=True)
        for f in (path.parent / "run" / "turns").iterdir():
            (run / "turns" / f.name).write_text(f.read_text())
        script = train_dpo if "train.loss=dpo" in overrides else train_grpo
        if script is train_dpo:
            (run / "pairs.jsonl").write_text((path.parent / "run" / "pairs.jsonl").read_text())
        m.setattr(sys, "argv", ["train.py", str(path), *(o for o in overrides if o not in named), f"run_dir={run}"])
        script.main()
    lines = [{k: v for k, v in json.loads(x).items() if not k.endswith("_s")} for x in (run / "metrics.jsonl").read_text().splitlines()]
    weights = {n: t.double().sum().item() for n, t in load_file(run / "export" / "model.safetensors").items()}
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    return dict(said=said, lines=lines, weights=weights, files=[f.replace(run.name, "RUN", 1) for f in files] if not named else files,
                told=told)


def built(world, tmp_path, monkeypatch, overrides):
    """hindsight.py on a small log -> the turns it wrote."""
    path, places = world
    overrides = filled(overrides, world, tmp_path)
    with monkeypatch.context() as m, redirect_stdout(io.StringIO()):
        m.setattr(sys, "argv", ["hindsight.py", str(path), f"data.logs={places['LOGS']}", *overrides, f"run_dir={tmp_path}"])
        hindsight.main()
    return {p.name: p.read_text() for p in (tmp_path / "turns").glob("*.jsonl")}


@pytest.mark.parametrize("stage, name", [(s, n) for s, keys in (("train", TRAIN), ("build", BUILD)) for n in keys])
def test_every_key_changes_something(stage, name, world, outcomes, tmp_path, monkeypatch):
    act, (context, value) = (trained, TRAIN[name]) if stage == "train" else (built, BUILD[name])
    value = world[1].get(value, value) if isinstance(value, str) else value
    text = value if isinstance(value, str) else json.dumps(value)
    key = (stage, *context)
    if key not in outcomes:
        (tmp_path / "without").mkdir()
        outcomes[key] = act(world, tmp_path / "without", monkeypatch, context)
    (tmp_path / "with").mkdir()
    without, with_it = outcomes[key], act(world, tmp_path / "with", monkeypatch, [*context, f"{name}={text}"])
    assert with_it != without
    if stage == "train" and name not in ("run_dir", "train.keep_checkpoints", "train.checkpoint_every", "wandb.mode", "wandb.project",
                                         "train.eval_every", "llm.cache") and not name.startswith(("eval.", "data.valid")):
        assert with_it["weights"] != without["weights"]  # a key of training trains another model
    elif stage == "train":
        assert with_it["weights"] == without["weights"]  # a key of logging and looking does not


def test_the_short_run_is_the_same_twice(world, outcomes, tmp_path, monkeypatch):
    """Else the comparison above would show nothing."""
    for name in "ab":
        (tmp_path / name).mkdir()
    assert trained(world, tmp_path / "a", monkeypatch, []) == trained(world, tmp_path / "b", monkeypatch, [])


def test_max_rows_bounds_the_rows_decoded_at_once(world, monkeypatch, tmp_path):
    rows, init = [], rollout.Slots.__init__

    def recorded(self, model, B, G, *rest):
        rows.append(B * G)
        init(self, model, B, G, *rest)

    monkeypatch.setattr(rollout.Slots, "__init__", recorded)
    for limit in (4, 8):
        (tmp_path / str(limit)).mkdir()
        trained(world, tmp_path / str(limit), monkeypatch, [f"rollout.max_rows={limit}"])
    assert rows == [4, 4, 8, 8]
