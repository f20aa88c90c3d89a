"""The config: inheritance, checks, help, what each key affects, and that every key changes something."""
import ast
import io
import json
import re
import shutil
import sys
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import pytest
import yaml
from safetensors.torch import load_file

import config
import grading
import hindsight
import prompts
import rollout
import train_dpo
import train_grpo
import wording
from records import InputError
from toy.llm_server import Server
from world import REPO, make_lexicon, make_world, read_lines, timeless, write_lines


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


def default_of(name):
    return config.FIELDS[name].get_default(call_default_factory=True)


# ---------------------------------------------------------------------------------------------------- loading

def test_defaults_are_those_of_the_classes(tmp_path):
    cfg = load(tmp_path, "")
    own = {"train.aggregation": "token", "train.clip_low": 0.2, "train.clip_high": 0.2, "run_dir": "r"}
    assert config.flatten(cfg) == {name: own.get(name, default_of(name)) for name in config.FIELDS}


@pytest.mark.parametrize("text, wanted", [
    ("loss: gspo", ("sequence", 3e-4, 4e-4)), ("loss: cispo", ("token", None, None)),
    ("loss: mine", ("token", 0.2, 0.2)), ("loss: mine, clip_high: 0.3", ("token", 0.2, 0.3)),
    ("loss: gspo, aggregation: token, clip_low: 0.1, clip_high: 0.3", ("token", 0.1, 0.3)),
    ("loss: sft", ("auto", None, None)), ("loss: dpo", ("auto", None, None))])
def test_the_losses_own_clips_and_aggregation(tmp_path, text, wanted):
    t = load(tmp_path, f"train: {{{text}}}").train
    assert (t.aggregation, t.clip_low, t.clip_high) == wanted


def test_base_is_inherited_and_of_several_the_later_wins(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "root.yaml",
          "run_dir: root\nseed: 3\nmodel: {path: m}\ntrain: {lr: 1e-3, epochs: 9, weight_decay: 0.5}")
    write(tmp_path / "sub" / "a.yaml",
          "base: ../root.yaml\nrun_dir: a\ntrain: {lr: 2e-3, epochs: 8}\nrollout: {max_rows: 70}")
    write(tmp_path / "sub" / "b.yaml", "train: {lr: 3e-3}")  # no run_dir: a part of a config, to be inherited
    one = write(tmp_path / "one.yaml", "base: sub/a.yaml\ntrain: {epochs: 2}")
    cfg = config.load([one, "train.epochs=7"])
    assert (cfg.run_dir, cfg.seed, cfg.model.path, cfg.train.lr, cfg.train.epochs) == ("a", 3, "m", 2e-3, 7)
    leaf = write(tmp_path / "leaf.yaml", "base: [sub/a.yaml, sub/b.yaml]\nrun_dir: leaf\ntrain: {loss: gspo}")
    cfg = config.load([leaf])
    assert (cfg.run_dir, cfg.seed, cfg.model.path, cfg.rollout.max_rows) == ("leaf", 3, "m", 70)
    t = cfg.train
    assert (t.lr, t.epochs, t.weight_decay, t.loss) == (3e-3, 8, 0.5, "gspo")
    cfg = config.load([write(tmp_path / "turned.yaml", "base: [sub/b.yaml, sub/a.yaml]")])
    assert (cfg.run_dir, cfg.train.lr) == ("a", 2e-3)
    for base in ("[]", "null", "[leaf.yaml]", "[leaf.yaml, leaf.yaml]"):  # the same file twice is no cycle
        assert load(tmp_path, f"base: {base}").run_dir == "r"


def test_base_cycles_are_told(tmp_path):
    a = write(tmp_path / "a.yaml", "base: b.yaml\nrun_dir: r")
    write(tmp_path / "good.yaml", "seed: 1")
    for b in ("a.yaml", "[good.yaml, a.yaml]"):
        write(tmp_path / "b.yaml", f"base: {b}")
        with pytest.raises(InputError, match="'base:' leads back to itself"):
            config.load([a])
    assert "base" in says(tmp_path, "base: c.yaml")


READ = """
train: {lr: 5e-7}                | train.lr=5e-7             | 5e-7
train: {lr: 1}                   | train.lr=1                | 1.0
train: {steps: null}             | train.steps=null          | None
train: {steps: 0}                | train.steps=0             | 0
train: {eval_every: null}        | train.eval_every=null     | None
train: {dual_clip: 3}            | train.dual_clip=3         | 3.0
train: {betas: [0.9, 0.95]}      | train.betas=[0.9, 0.95]   | [0.9, 0.95]
data: {goal: null}               | data.goal=                | ""
data: {goal: 'why: a = b?'}      | data.goal=why: a = b?     | "why: a = b?"
model: {path: '123'}             | model.path=123            | "123"
seed: 4                          | seed=4                    | 4
seed: 0x1F                       | seed=3_1                  | 31
"""


@pytest.mark.parametrize("case", READ.strip().splitlines())
def test_values_are_read(tmp_path, case):
    text, override, value = map(str.strip, case.split("|"))
    for cfg in (load(tmp_path, text), load(tmp_path, "train: {steps: 5}", override)):
        assert repr(config.flatten(cfg)[override.partition("=")[0]]) == repr(ast.literal_eval(value))


WRONG = """
train: {lr: fast}             | c.yaml: train.lr must be a number, not 'fast'
train: {lr: '1e-3'}           | train.lr must be a number, not '1e-3'
train: {lr: .nan}             | train.lr must be finite
train: {lr: .inf}             | train.lr must be finite
train: {lr: 0}                | train.lr must be above 0, not 0
train: {clip_low: 1.5}        | train.clip_low must be at most 1
train: {epochs: 1.5}          | train.epochs must be a whole number, not 1.5
train: {epochs: true}         | train.epochs must be a whole number, not True
train: {epochs: null}         | train.epochs must be a whole number, not None
train: {epochs: 0}            | train.epochs must be above 0
train: {steps: -1}            | train.steps must be at least 0
train: {betas: [0.9]}         | train.betas must be two numbers in [0, 1)
train: {betas: [0.9, 1.0]}    | train.betas must be two numbers in [0, 1)
train: {betas: 3}             | train.betas must be a list
train: {cispo_drop: 1}        | train.cispo_drop must be true or false
train: 3                      | 'train' is a section
train: {stepz: 1}             | c.yaml: unknown key 'train.stepz'; did you mean 'train.steps'
lr: 1                         | unknown key 'lr'; did you mean 'train.lr'
trian: {lr: 1}                | unknown key 'trian'; did you mean 'train'
xyzzy: 1                      | unknown key 'xyzzy'; --help
model: {dtype: f32}           | 'bfloat16' or 'float64', not 'f32'; did you mean 'float32'?
eval: {top_p: 1.5}            | eval.top_p must be at most 1,
rollout: {temperature: 0}     | rollout.temperature must be at least 0.01, not 0
rollout: {temperature: 1e-40} | rollout.temperature must be at least 0.01, not 1e-40
eval: {temperature: 1e-40}    | eval.temperature must be at least 0.01, not 1e-40
rollout: {samples: 9, max_rows: 8} | rollout.max_rows=8 cannot hold one group of rollout.samples=9
rollout: {samples: 1}         | rollout.samples=1 teaches grpo nothing ... set 2 or more
seed: 1; seed: 2              | c.yaml ... 'seed' stands twice below line 1
train: {lr: 1, epochs: 2, lr: 1} | c.yaml ... 'lr' stands twice below line 2
eval: {samples: 9}; rollout: {max_rows: 8} | rollout.max_rows=8 cannot hold one group of eval.samples=9
hindsight: {generic: [1]}     | hindsight.generic
hindsight: {many_valued: [""]} | hindsight.many_valued.0 must not be blank
hindsight.generic=[a, _]      | command line: hindsight.generic.1 must not be blank
train: {loss: cispo, is_floor: 2} | train.is_floor=2.0 is above train.is_cap
train: {loss: dpo, dpo_beta: 0}   | train.dpo_beta must be above 0
base: 3                       | base must be the path of another config
base: {a: b}                  | base must be the path of another config
base: [a, 3]                  | base must be the path of another config, or a list of them
base: [none.yaml]             | no such config: ... none.yaml
train.lr                      | argument 'train.lr' is not of the form key=value
train=1                       | command line: 'train' is a section
train.rl=1                    | command line: unknown key 'train.rl'; did you mean 'train.lr'
train.lr=[                    | the value of train.lr: not valid YAML
train.steps=many              | command line: train.steps must be a whole number, not 'many'
train.lr=null                 | train.lr must be a number
seed: 2026-02-30              | c.yaml: not valid YAML: line 2: '2026-02-30' (day is out of range for month)
seed: 010                     | c.yaml: not valid YAML: line 2: '010' (
seed=-010                     | command line: the value of seed: not valid YAML: line 1: '-010'
train: {steps: 1:30}          | c.yaml: not valid YAML: line 2: '1:30' (
train: {lr: 190:20:30}         | c.yaml: not valid YAML: line 2: '190:20:30' (
seed: 0x_                     | c.yaml: not valid YAML: line 2: '0x_'
seed: !!bool x                | c.yaml: not valid YAML: line 2: 'x'
seed: !!timestamp x           | c.yaml: not valid YAML: line 2: 'x'
seed: !!map 3                 | c.yaml: not valid YAML
seed=2026-02-30               | command line: the value of seed: not valid YAML: line 1: '2026-02-30'
seed=NINES                    | command line: the value of seed: not ... '999 ... the limit (4300 digits)
seed: NINES                   | c.yaml: not valid YAML: line 2: '999 ... Exceeds the limit (4300 digits)
seed: BOMB                    | c.yaml: seed must be a whole number, not
train: BOMB                   | c.yaml: 'train' is a section: its value is a mapping, not [
base: BOMB                    | base must be the path of another config, or a list of them
train: {kl: BOMB}             | c.yaml: train.kl must be 'k2' or 'k3', not [
MERGES: 1                     | c.yaml: not valid YAML: '<<' merges too many keys
train: {<<: {lr: 1}, <<: {steps: 2}} | c.yaml: not valid YAML: '<<' stands twice below line 2
data: {logs: DEEP}            | c.yaml: not valid YAML: maximum recursion depth exceeded
data.logs=DEEP                | command line: the value of data.logs: not valid YAML
model: {path: "a\\0b"}         | c.yaml: model.path holds a NUL or half a surrogate pair
data: {logs: ["a\\0b"]}        | c.yaml: data.logs holds a NUL or half a surrogate pair
data: {goal: "\\ud83d"}        | c.yaml: data.goal holds a NUL or half a surrogate pair
base: "a\\0b.yaml"             | a\\x00b.yaml' cannot be read (embedded null byte)
"""
# Aliases of aliases: a few lines that would fill the memory if they were written out.
HUGE = {"NINES": "9" * 5000, "DEEP": "[" * 1500 + "]" * 1500,
        "BOMB": "[&a [x]" + "".join(f", &{b} [{f'*{a}, ' * 9}]" for a, b in pairwise("abcdefghijk")) + "]",
        "MERGES: 1": "a: &a {lr: 1, steps: 2}" + "".join(
            f"\n{b}: &{b} {{<<: [{f'*{a}, ' * 9}]}}" for a, b in pairwise("abcdefghijk"))}


@pytest.mark.parametrize("text, words", [re.split(" +\\| ", line) for line in WRONG.strip().splitlines()])
def test_wrong_values_are_refused(tmp_path, text, words):
    """Lines of a YAML (they have a colon), or an override."""
    for short, long in HUGE.items():
        text = text.replace(short, long)
    line = says(tmp_path, text.replace("; ", "\n")) if ":" in text else says(tmp_path, "", text)
    assert all(part in line for part in words.split(" ... "))


@pytest.mark.parametrize("other", ["train.loss=sft", "train.loss=dpo", "train.steps=0"])
def test_one_sample_is_enough_where_no_groups_are_compared(tmp_path, other):
    assert load(tmp_path, "", "rollout.samples=1", other).rollout.samples == 1


# What only the policy losses read. test_sft.py and test_dpo.py hold each loss to a formula without these.
POLICY_ONLY = """train.clip_low=0.1 train.clip_high=0.1 train.dual_clip=3 train.is_floor=0.5 train.is_cap=2
    train.cispo_drop=true train.advantage=mean train.aggregation=token train.tis_cap=2 train.kl_coef=0.1
    train.kl=k3 train.entropy_coef=0.1 train.steps_per_sync=2 reward.mode=sum reward.beta=3
    reward.omega_when_wrong=score reward.max_failed=0.5"""
CISPO_ONLY = "train.is_cap=2 train.is_floor=0.5 train.cispo_drop=true"
UNREAD = {"dpo": POLICY_ONLY, "sft": f"{POLICY_ONLY} train.dpo_beta=0.2",
          "grpo": f"{CISPO_ONLY} train.dpo_beta=0.2",
          "gspo": f"{CISPO_ONLY} train.dpo_beta=0.2 train.dual_clip=3",
          "cispo": "train.dual_clip=3 train.clip_low=0.1 train.clip_high=0.1 train.dpo_beta=0.2"}


@pytest.mark.parametrize("loss, override", [(loss, o) for loss, many in UNREAD.items() for o in many.split()])
def test_a_key_the_loss_never_reads_is_refused(tmp_path, loss, override):
    name, default = override.partition("=")[0], json.dumps(default_of(override.partition("=")[0]))
    told = says(tmp_path, "", f"train.loss={loss}", override)
    assert f"{name} has no effect with train.loss={loss}; remove it" in told
    load(tmp_path, "", f"train.loss={loss}", name + "=" + default.strip('"'))
    load(tmp_path, "", "train.loss=mine", override)  # a loss of your own may read anything


def test_run_dir_must_be_named(tmp_path):
    for argv, words in (([write(tmp_path / "c.yaml", "seed: 1")], "run_dir"), (["seed=1"], "first argument"),
                        ([], "first argument")):
        with pytest.raises(InputError, match=words):
            config.load(argv)


@pytest.mark.parametrize("loss", list(UNREAD))
def test_a_saved_config_reads_back_the_same(tmp_path, loss):
    cfg = load(tmp_path, f"train: {{loss: {loss}, lr: 5e-7, steps: 7}}\nhindsight: {{generic: []}}\n"
                         "data: {goal: 'é: [x] 是', prompt: '4e8'}")
    config.save(cfg, tmp_path / "saved.yaml")
    assert config.load([str(tmp_path / "saved.yaml")]) == cfg


def choices(name):
    annotation = config.FIELDS[name].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def test_help_lists_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        config.load(["--help"], "What it is.")
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith("What it is.")
    lines = text.splitlines()
    for name, field in config.FIELDS.items():
        default = default_of(name)
        at = lines.index(f"  {name} = {'null' if default is None else default}")
        assert field.description in lines[at + 1] and len(field.description) > 5, name
        assert all(choice in lines[at + 1] for choice in choices(name))


FRAGMENTS = {"configs/table1/32b.yaml"}  # inherited beside another config, never run
CONFIGS = sorted({p.relative_to(REPO).as_posix() for p in (REPO / "configs").rglob("*.yaml")} - FRAGMENTS)


@pytest.mark.parametrize("path", CONFIGS)
def test_the_configs_load(path):
    cfg = config.load([str(REPO / path)])
    for prompt in (cfg.data.prompt, cfg.data.prompt_no_stop):
        assert "{goal}" in (REPO / prompt).read_text()
    own = path.startswith(("configs/own", "configs/small"))  # the logs are the user's
    assert cfg.model.path and bool(cfg.data.logs) != own and (cfg.data.lexicon or cfg.llm.grader.model)


def test_every_config_has_a_run_dir_of_its_own():
    assert len({config.load([str(REPO / p)]).run_dir for p in CONFIGS}) == len(CONFIGS)


# ------------------------------------------------------------------------- was this made with these settings?

ROLE = "source model prompt temperature max_tokens"  # which model a role is; not where it runs


def role(name):
    return {f"llm.{name}.{leaf}" for leaf in ROLE.split()}


LOGS = "data.logs data.fields data.roles "
TURNS = set((LOGS + "data.eval_logs data.split data.valid_sessions data.goal data.lexicon hindsight.source "
            "hindsight.stop_rule hindsight.user_end hindsight.generic hindsight.many_valued "
            "hindsight.end_markers").split())
PAIRS = set((LOGS + "seed data.lexicon hindsight.source hindsight.stop_rule hindsight.user_end "
            "hindsight.generic hindsight.many_valued hindsight.end_markers").split())
REFERENCE = {"model.dtype", "rollout.max_prompt_tokens", "rollout.max_new_tokens"}
SCORES = set("seed model.path model.dtype data.goal data.lexicon data.long_prompts hindsight.generic "
             "hindsight.many_valued hindsight.end_markers "
             "reward.mode reward.beta reward.grader reward.omega reward.omega_when_wrong reward.wording "
             "rollout.samples rollout.temperature eval.samples eval.temperature eval.top_p".split())
SCORES |= REFERENCE | role("extractor") | role("grader") | {
    "llm.extractor.base_url", "llm.grader.base_url"}  # another server may have another model of that name
# How often to look, where to log, what fits in memory: with others of these a run may go on.
FREE = set("run_dir data.turns hindsight.sample plan gpus gpu_gib hindsight.self_check hindsight.max_failed "
           "llm.cache reward.audit reward.max_failed rollout.max_rows train.tokens_per_microbatch "
           "train.activation_checkpointing train.moments_on_host train.compile train.eval_every "
           "train.checkpoint_every train.keep_checkpoints eval.samples eval.temperature eval.top_p "
           "wandb.mode wandb.project".split())
TRAINING = {name for name in config.FIELDS if not name.startswith("llm.")} - FREE
LENGTH = {"train.steps", "train.epochs"}  # with a constant learning rate a run may go on beyond its end
ASKED = "hindsight.source=llm reward.grader=llm".split()
MADE = [  # the product, overrides, the keys that affect it
    ("turns", [], TURNS), ("turns", ASKED, TURNS | role("extractor")), ("reference", ASKED, REFERENCE),
    ("turns", ["data.valid_sessions=1"], TURNS | {"seed"}),
    ("turns", ["hindsight.source=annotations"], TURNS - {"data.lexicon"}),
    ("turns", ["data.eval_logs=[x, y]"], TURNS - {"data.split"}),
    ("pairs", [], PAIRS), ("pairs", ["llm.writer.model=w"], PAIRS | role("writer")),
    ("scores", [], SCORES), ("scores", [*ASKED, "llm.writer.model=w", "train.schedule=cosine"], SCORES),
    ("training", [], TRAINING - LENGTH), ("training", ["train.schedule=linear"], TRAINING),
    ("training", ["llm.writer.model=w"], TRAINING - LENGTH),
    ("training", ASKED, TRAINING - LENGTH | role("extractor") | role("grader")),
    ("training", ["train.loss=dpo"], TRAINING - LENGTH | role("writer"))]


def another(name, old):
    """A value of a key that differs from the old one."""
    if choices(name):
        return next(choice for choice in choices(name) if choice != old)
    if isinstance(old, list):
        return old[1:] or ["x"]
    if isinstance(old, dict):
        return {"user": ["x"]}
    return {bool: lambda: not old, str: lambda: old + "x"}.get(type(old), lambda: (old or 1) + 1)()


@pytest.mark.parametrize("product, overrides, keys", MADE)
def test_what_each_product_is_made_with(tmp_path, product, overrides, keys):
    """A change of a key is a change of exactly the products that it affects, and its name is told."""
    cfg = load(tmp_path, "", *overrides)
    made, flat = config.made_with(cfg, product), config.flatten(cfg)
    assert made == {name: flat[name] for name in made} and set(made) == keys
    assert config.changed(made, made) == [] == config.changed(made, {})  # {}: made by hand
    for name, value in flat.items():
        assert config.changed(made, flat | {name: another(name, value)}) == [name] * (name in keys)


def test_every_key_declares_what_it_affects():
    products = {product for product, *_ in MADE}
    for name, field in config.FIELDS.items():
        assert "affects" in field.json_schema_extra and set(config.AFFECTS[name]) <= products, name


# -------------------------------------------------------------------------------- every key changes something

# key | overrides under which it acts | another value. A short run with and without it must differ in what was
# sampled, graded, logged, exported or left in the run folder (TRAIN), or in the turns (BUILD).
TRAIN = """
run_dir                |                                             | HERE/elsewhere
seed                   |                                             | 1
model.path             |                                             | OTHER_MODEL
model.dtype            |                                             | float64
data.prompt            |                                             | OTHER_PROMPT
data.prompt_no_stop    | reward.mode=no_rs                           | OTHER_PROMPT
data.valid_sessions    | train.eval_every=2                          | 1
data.turns             |                                             | OTHER_TURNS
data.lexicon           |                                             | OTHER_LEXICON
reward.mode            |                                             | sum
reward.beta            | reward.mode=no_ra                           | 3
reward.omega_when_wrong|                                             | score
reward.wording         |                                             | false
reward.grader          | SERVED llm.grader.prompt=OTHER_GRADER       | llm
reward.omega           | SERVED llm.grader.prompt=OTHER_GRADER reward.grader=llm | llm
llm.grader.prompt      | SERVED reward.grader=llm reward.omega=llm   | OTHER_GRADER
llm.cache              | SERVED reward.grader=llm                    | HERE/cache.sqlite
rollout.samples        |                                             | 3
rollout.temperature    |                                             | 0.6
rollout.max_new_tokens |                                             | 5
train.loss             |                                             | cispo
train.advantage        |                                             | mean
train.aggregation      | rollout.temperature=2                       | constant
train.clip_low         |                                             | 0.01
train.clip_high        |                                             | 0.01
train.dual_clip        | train.clip_low=0.9 train.clip_high=9        | 1.001
train.is_floor         | train.loss=cispo                            | 0.99
train.is_cap           | train.loss=cispo                            | 0.9
train.cispo_drop       | train.loss=cispo train.is_cap=1.001         | true
train.tis_cap          |                                             | 0.5
train.dpo_beta         | train.loss=dpo train.steps_per_sync=1       | 0.5
train.kl_coef          |                                             | 0.5
train.kl               | train.kl_coef=0.5                           | k3
train.entropy_coef     |                                             | 0.5
train.lr               |                                             | 1e-4
train.schedule         |                                             | linear
train.warmup_steps     |                                             | 3
train.betas            |                                             | [0.5, 0.9]
train.weight_decay     |                                             | 0.5
train.grad_clip        |                                             | 0.01
train.prompts_per_step |                                             | 2
train.steps_per_sync   |                                             | 1
train.epochs           | train.steps=null train.prompts_per_step=15 train.epochs=1 | 2
train.steps            |                                             | 2
train.checkpoint_every |                                             | 4
train.keep_checkpoints |                                             | 1
train.eval_every       |                                             | 2
eval.samples           | train.eval_every=2                          | 2
eval.temperature       | train.eval_every=2                          | 0.3
eval.top_p             | train.eval_every=2                          | 0.3
wandb.mode             |                                             | offline
wandb.project          | wandb.mode=offline                          | other
"""
BUILD = """
seed                   | data.valid_sessions=2                       | 1
data.logs              |                                             | OTHER_LOGS
data.eval_logs         |                                             | OTHER_LOGS
data.split             | data.eval_logs=                             | 0.5
data.turns             |                                             | HERE/elsewhere
hindsight.sample       |                                             | 2
data.valid_sessions    |                                             | 1
data.goal              |                                             | another goal
data.lexicon           |                                             | OTHER_LEXICON
hindsight.source       |                                             | annotations
hindsight.self_check   | EXTRACTED                                   | 2
llm.extractor.prompt   | EXTRACTED                                   | OTHER_EXTRACTOR
hindsight.stop_rule    |                                             | last_turn
hindsight.user_end     |                                             | drop
hindsight.generic      |                                             | [duration]
hindsight.many_valued  | hindsight.source=annotations                | [sore]
hindsight.end_markers  |                                             | ["Anything else?"]
hindsight.max_failed   | EXTRACTED llm.extractor.prompt=OTHER_GRADER | 1
"""
SHORT = {"SERVED": "llm.grader.model=toy llm.grader.base_url=SERVER",
         "EXTRACTED": "hindsight.source=llm llm.extractor.model=toy llm.extractor.base_url=SERVER"}


def keys_of(table):
    """-> {key: (overrides under which it acts, the override that changes it)}"""
    found = {}
    for line in table.strip().splitlines():
        name, context, value = map(str.strip, line.split("|"))
        for short, words in SHORT.items():
            context = context.replace(short, words)
        found[name] = context.split(), f"{name}={value}"
    return found


# What only logs and looks: the trained weights stay the same.
LOOKS = FREE - {"data.turns"} | {"data.valid_sessions"}
PLANS = "test_plan.py::test_the_plan_as_printed"
OPTIONS = "test_plan.py::test_options_that_only_memory_and_time_know_of"
LONG = "test_prompts.py::test_long_prompts_are_refused_or_left_out"
LOGGED = "test_logs.py::test_fields_and_roles_of_other_names"
ROLES = "test_llm.py::test_every_key_of_a_role_acts"
LOCAL = "test_llm.py::test_source_local_is_a_checkpoint"
AUDIT = "test_grading.py::test_an_audit_is_logged_and_rewards_nothing"
ELSEWHERE = {  # what bounds memory or only decides whether to go on: no figure may depend on it
    "data.long_prompts": LONG, "rollout.max_prompt_tokens": LONG,
    "rollout.max_rows": "test_config.py::test_max_rows_bounds_the_rows_decoded_at_once",
    "train.tokens_per_microbatch": "test_grpo.py::test_micro_batches_do_not_change_the_gradient",
    "train.activation_checkpointing": OPTIONS, "train.compile": OPTIONS,
    "train.moments_on_host": "test_run.py::test_adamw_moves_one_parameters_moments_at_a_time",
    "plan": PLANS, "gpus": PLANS, "gpu_gib": PLANS,
    "reward.max_failed": "test_grading.py::test_a_few_failed_gradings_do_not_stop_training",
    "reward.audit": AUDIT, "llm.auditor.prompt": ROLES, "llm.writer.prompt": ROLES,
    "data.fields": LOGGED, "data.roles": LOGGED, "train.from": "test_run.py::test_a_run_starts_from_another",
} | {f"llm.{role}.{leaf}": LOCAL if leaf == "source" else ROLES for role in prompts.PROMPTS
     for leaf in config.RoleConfig.model_fields if leaf != "prompt"}


def test_every_key_is_shown_to_act():
    shown = set(keys_of(TRAIN)) | set(keys_of(BUILD))
    assert shown | set(ELSEWHERE) == set(config.FIELDS) and not shown & set(ELSEWHERE)
    for file, _, name in (place.partition("::") for place in ELSEWHERE.values()):
        assert re.search(rf"^def {name}\(", (REPO / "tests" / file).read_text(), re.M), (file, name)


@pytest.fixture(scope="module")
def places(tmp_path_factory, marks_checkpoint, tiny_checkpoint):
    """A world, and other values of its keys that are paths. -> {placeholder: what it stands for}."""
    folder = tmp_path_factory.mktemp("keys")
    path = make_world(folder, marks_checkpoint, train__lr=0.02)
    run = folder / "run"
    turns = [dict(turn, expert="How long? " * wording.FEWEST)  # so that the wording is learnt
             for turn in read_lines(run / "turns" / "train.jsonl")]
    write_lines(run / "turns" / "train.jsonl", turns)
    write_lines(run / "turns" / "valid.jsonl", turns[:5])
    elsewhere = folder / "other_turns"
    elsewhere.mkdir()
    for name in ("train", "valid", "eval"):
        write_lines(elsewhere / f"{name}.jsonl", turns[5:])
    write_lines(run / "pairs.jsonl", [dict(turn, chosen="How?", rejected="Red?!") for turn in turns])
    age = dict(asks=["how old"], values={"three": ["three"]})
    usual = dict(asks=["how long"], values={"two": ["two"]})
    (folder / "lexicon.yaml").write_text(yaml.safe_dump(make_lexicon(
        {"duration": usual, "age": age}, {"cough": ("cough", ["duration"])})))
    other = dict(asks=["color"], values={"two": ["red"]})
    lexicon = make_lexicon({"duration": other, "age": age}, {"cough": ("cough", ["age"])}) | {"goal": "h"}
    logs = [dict(session_id=i, messages=[
        dict(role="user", content="cough", learned={"sore": "no"}),
        dict(role="assistant", content="How long?"),
        dict(role="user", content="two days, three" if i % 2 else "red, three",
             learned={"sore": "yes", "age": "3"} if i % 3 else {}),
        dict(role="assistant", content="Anything else?"), dict(role="user", content="no")]) for i in range(6)]
    write_lines(folder / "logs.jsonl", logs)
    write_lines(folder / "other.jsonl", [dict(r, session_id=r["session_id"] + 10) for r in logs[:3]])
    texts = {"OTHER_GRADER": 'Be kind. {goal} {"score": 1}\nExample: candidate "What color?" -> 0.5',
             "OTHER_EXTRACTOR": 'List all. {goal} {generic} {"items": []}', "OTHER_PROMPT": "Other. {goal}",
             "OTHER_LEXICON": yaml.safe_dump(lexicon)}
    with Server(folder / "lexicon.yaml") as server:
        yield {"CONFIG": str(path), "SERVER": server.url, "OTHER_MODEL": str(tiny_checkpoint),
               "OTHER_TURNS": str(elsewhere),
               "LOGS": str(folder / "logs.jsonl"), "OTHER_LOGS": str(folder / "other.jsonl"),
               **{name: write(folder / name, text) for name, text in texts.items()}}


@pytest.fixture(scope="module")
def outcomes():
    return {}  # overrides -> what came out, so that each context runs once


CANNED = ["How long?", "How long shouldix?", "How long? Any color?", "What color?", "<stop />",
          "Bye <stop />", "cough"]


def arguments(places, folder, overrides):
    """A command line with the placeholders as what they stand for; HERE: the folder of this run."""
    pairs = (override.partition("=") for override in [f"run_dir={folder / 'r'}", *overrides])
    filled = [f"{name}={places.get(value, value).replace('HERE', str(folder))}" for name, _, value in pairs]
    return [places["CONFIG"], *filled]


def trained(places, folder, overrides):
    """A short training run -> everything it did that a user can see: responses, figures, weights, files, and
    what W&B was told.

    A tiny model only babbles: each response is read as one of CANNED, so that every branch of the reward is
    met.
    """
    said, told = [], []
    argv = arguments(places, folder, overrides)
    cfg = config.load(argv)
    run = Path(cfg.run_dir)
    shutil.copytree(Path(places["CONFIG"]).parent / "run", run)
    text, sample_graded = rollout.Policy.text, grading.sample_graded

    def canned(*response):
        said.append(text(*response))
        return CANNED[sum(said[-1].encode()) % len(CANNED)]

    def watched(*args, **how):
        groups, figures = sample_graded(*args, **how)
        said.append([rollout.dump() for group in groups for rollout in group.graded])
        return groups, figures

    def init(**how):
        told.append([how["mode"], how["project"]])
        return SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(rollout.Policy, "text", canned)
        m.setattr(grading, "sample_graded", watched)
        m.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
        m.setattr(sys, "argv", ["train.py", *argv])
        m.chdir(REPO)
        (train_dpo if cfg.train.loss == "dpo" else train_grpo).main()
    weights = load_file(run / "export" / "model.safetensors")
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    return dict(said=said, lines=timeless(read_lines(run / "metrics.jsonl")), files=files, told=told,
                weights={n: t.double().sum().item() for n, t in weights.items()})


def built(places, folder, overrides):
    """hindsight.py on a small log -> the turns it wrote, or why it wrote none."""
    argv = arguments(places, folder, ["data.logs=LOGS", *overrides])
    with pytest.MonkeyPatch.context() as m, redirect_stdout(io.StringIO()):
        m.setattr(sys, "argv", ["hindsight.py", *argv])
        try:
            hindsight.main()
        except InputError as error:
            return str(error)
    return {p.name: p.read_text() for p in (folder / "r" / "turns").glob("*.jsonl")}


@pytest.mark.slow
@pytest.mark.parametrize("act, name", [(trained, name) for name in keys_of(TRAIN)]
                         + [(built, name) for name in keys_of(BUILD)])
def test_every_key_changes_something(act, name, places, outcomes, tmp_path):
    context, change = keys_of(TRAIN if act is trained else BUILD)[name]
    key = (act, *context)
    if key not in outcomes:
        outcomes[key] = act(places, tmp_path / "without", context)
    without, with_it = outcomes[key], act(places, tmp_path / "with", [*context, change])
    assert with_it != without and isinstance(with_it, str) == (name == "hindsight.max_failed")
    if act is trained:  # a key of training trains another model, a key of logging and looking does not
        assert (with_it["weights"] == without["weights"]) == (name in LOOKS)


@pytest.mark.slow
def test_the_short_run_is_the_same_twice(places, tmp_path):
    """Else the comparison above would show nothing."""
    assert trained(places, tmp_path / "a", []) == trained(places, tmp_path / "b", [])


@pytest.mark.slow
def test_max_rows_bounds_the_rows_decoded_at_once(places, monkeypatch, tmp_path):
    rows, generate = [], grading.generate

    def watched(model, *args):
        forward = model.forward

        def counted(tokens, positions, attend, select=None):
            rows.append(len(tokens) if select is None else 0)  # select: a pass over prompts
            return forward(tokens, positions, attend, select)

        with monkeypatch.context() as m:
            m.setattr(model, "forward", counted)
            return generate(model, *args)

    monkeypatch.setattr(grading, "generate", watched)
    for limit in (4, 8):
        rows.clear()
        trained(places, tmp_path / str(limit), [f"rollout.max_rows={limit}"])
        assert max(rows) == limit
