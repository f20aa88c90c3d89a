"""One YAML per experiment: sections with a line of help per key, `base:` inheritance, key=value overrides.

    cfg = config.load(["configs/toy/grpo.yaml", "train.lr=1e-3", "seed=1"])

Unknown keys are refused with the nearest right one, values are checked on load, nothing is ignored. Paths
in a YAML are relative to the folder in which the script starts. `--help` lists every key.

Each key also declares what it affects, so there is one answer to "was this made with these settings?":
`made_with(cfg, product)` is the stamp of a product, `changed(now, made)` compares two stamps. The products:

    turns      the turns that hindsight.py writes         pairs   the preference pairs of pairs.py
    training   the weights of a run and its checkpoints   scores  the scores that Auto-Prompt keeps
    reference  the base model's log-probs that DPO keeps
"""
import json
import os
import re
from enum import IntEnum
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)

from records import STOP, Exact, InputError, Share, Slot, explain, flaw, nearest, shorten, write_text


class Stream(IntEnum):
    """Who draws random numbers: numpy's default_rng([seed, stream, ...]), so that no two users share noise.

    Some choices hash instead of drawing: hindsight.by_hash takes sha256 of "seed:name" (for autoprompt.split
    too), logs.is_held_out that of the session's id alone, and grading.sample_graded draws the responses to
    be audited by turn and response.
    """
    ROLLOUT = 0  # [seed, 0, position in the stream of turns, sample]: training rollouts
    EVALUATION = 1  # [seed, 1, turn, sample]
    ORDER = 2  # [seed, 2, epoch]: the order of the training turns
    GROUPS = 3  # [seed, 3, turn, sample]: the groups that report.html shows
    PAIRS = 4  # [seed, 4, turn]: where DPO's rejected responses come from
    LOCAL_LLM = 5  # [0, 5, seed of the ask, number in the batch]: a local language model's replies


RL = "grpo cispo gspo"


def tidy(path):
    """A path as it is compared and kept: "./runs//a/" and "runs/a" are one.

    What is not there stays as it is: "./a/b" must not become the name of a model of the hub.
    """
    return str(Path(path)) if os.path.exists(path) else path


File = Annotated[str, AfterValidator(tidy)]
Texts = Annotated[list[File], BeforeValidator(lambda x: [x] * bool(x) if isinstance(x, str) else x or [])]


def key(default, help, affects="training", read_by="", **bounds):
    """One config key: its default (copied for each config), its line of help, the products it affects, the
    losses that read it (default: all), and its bounds (ge, gt, le)."""
    return Field(default, description=help, **bounds,
                 json_schema_extra={"affects": affects, "read_by": read_by})


class ModelConfig(Exact):
    path: File = key(
        "", "Hugging Face folder or hub id of the base model; the KL reference is the same checkpoint",
        "training scores")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = key(
        "auto", "type of the computation (weights: at least float32); auto: bfloat16 on CUDA, else float32",
        "training scores reference")


class DataConfig(Exact):
    logs: Texts = key(
        [], "training conversations: a list of files (JSON, Parquet) or hub data sets (hf:OWNER/NAME:SPLIT)",
        "turns pairs training")
    eval_logs: Texts = key([], "held-out conversations, likewise", "turns training")
    split: Share = key(
        0.0, "where data.eval_logs is empty: share of the sessions to hold out, by a hash of the session id",
        "turns training")
    fields: dict[Literal["session_id", "messages", "goal", "success", "role", "content", "learned", "asks"],
                 str] = key(
        {}, "what the logs call our fields: {session_id: id}; nested: {session_id: meta.id}",
        "turns pairs training")
    roles: dict[Literal["user", "assistant", "ignore"], Texts] = key(
        {}, "what they call the roles: {user: human, assistant: [agent, bot], ignore: system}",
        "turns pairs training")
    turns: File = key("", "folder of the turns, which runs may share; empty: run_dir/turns", "")
    valid_sessions: NonNegativeInt = key(
        0, "training sessions set aside for evaluation during training (0: that reads the held-out turns)",
        "turns training")
    goal: str = key("", "what the expert is after; a session's own 'goal' wins", "turns training scores")
    lexicon: File = key("", "lexicon YAML of the rules extractor and the rules grader",
                       "turns pairs training scores")
    prompt: File = key("prompts/policy.md", "system prompt of the policy; {goal} is filled in")
    prompt_no_stop: File = key(
        "prompts/policy_no_stop.md", "training prompt of reward.mode no_rs: never mentions stopping")
    long_prompts: Literal["error", "drop"] = key(
        "error", "prompts over rollout.max_prompt_tokens: refuse to start, or leave the turns out",
        "training scores")


class HindsightConfig(Exact):
    source: Literal["llm", "rules", "annotations"] = key(
        "rules", "where I* comes from: llm.extractor, data.lexicon, or the logs' own 'learned' fields",
        "turns pairs training")
    stop_rule: Literal["paper", "last_turn"] = key(
        "paper", "paper: stop at an empty I* or the last point; last_turn: an earlier empty I* is dropped",
        "turns pairs training")
    user_end: Literal["stop", "drop"] = key(
        "stop", "a session that ends on a user utterance: its last point is a stop, or is dropped",
        "turns pairs training")
    generic: list[Slot] = key(
        [], "slots left out of I* because any context admits them (\"allergies\" means drug allergies too)",
        "turns pairs training scores")
    many_valued: list[Slot] = key(
        [], "slots of which a further value is news ([symptom]); of all others it corrects, and is no target",
        "turns pairs training scores")
    end_markers: list[str] = key(
        ["<med_search>", STOP], "an expert's message that is nothing but one of these ends the session",
        "turns pairs training scores")
    max_failed: Share = key(
        0.2, "llm: share of sessions without a usable extraction above which nothing is written", "")
    sample: NonNegativeInt = key(0, "write so many turns for a person to mark (turns/marks.jsonl)", "")
    self_check: PositiveInt = key(
        1, "llm: extract so often, with other seeds, and report how far the results agree", "")


ROLE = "what the role affects"


class RoleConfig(Exact):
    """A language model in one of the roles extractor, grader, auditor, writer."""
    source: Literal["endpoint", "local"] = key(
        "endpoint", "an OpenAI-compatible server, or a checkpoint of your own", ROLE)
    model: str = key(
        "", "the name by which the server knows the model; local: a Hugging Face folder or hub id", ROLE)
    base_url: str = key("http://localhost:8000/v1", "endpoint: where the server is", "scores")
    api_key_env: str = key("OPENAI_API_KEY", "endpoint: the environment variable that holds the key", "")
    prompt: File = key(
        "", "its instructions; empty: prompts/ROLE.md (auditor: grader.md, writer: rejected.md)", ROLE)
    temperature: NonNegativeFloat = key(0.0, "sampling temperature", ROLE)
    max_tokens: PositiveInt = key(512, "longest reply", ROLE)
    concurrency: PositiveInt = key(64, "endpoint: asks in flight at once", "")
    timeout_s: PositiveFloat = key(60.0, "endpoint: seconds to wait for a reply", "")
    retries: NonNegativeInt = key(
        6, "endpoint: further attempts after a time-out, a refusal (429) or a server error", "")


class LLMConfig(Exact):
    cache: File = key("", "file of the replies so far, which runs may share; empty: run_dir/llm_cache.sqlite",
                     "")
    extractor: RoleConfig = key(RoleConfig(), "finds I* where hindsight.source=llm",
                                "turns pairs training scores")
    grader: RoleConfig = key(RoleConfig(), "gives R_a where reward.grader=llm", "training scores")
    auditor: RoleConfig = key(RoleConfig(), "grades a share of the responses once more (reward.audit)", "")
    writer: RoleConfig = key(RoleConfig(), "writes DPO's rejected responses and Auto-Prompt's variants",
                             "pairs training")


class RewardConfig(Exact):
    mode: Literal["product", "sum", "no_ra", "no_rs"] = key(
        "product", "R_s(1 + beta R_a) + Omega | R_a + R_s + Omega | R_s(1 + beta) + Omega | beta R_a + Omega",
        "training scores", RL)
    beta: NonNegativeFloat = key(2.0, "weight of R_a", "training scores", RL)
    grader: Literal["rules", "llm"] = key(
        "rules", "what gives R_a: the lexicon's rules, or a language model (llm.grader)", "training scores")
    omega: Literal["rule", "llm"] = key(
        "rule", "what counts questions for Omega: question marks and the lexicon, or the language model",
        "training scores")
    wording: bool = key(
        True, "rules: a question that no expert would word so has R_a = 0 (wording.py)", "training scores")
    audit: Share = key(
        0.0, "share of the right decisions to continue that llm.auditor grades too; only logged", "")
    max_failed: Share = key(
        0.2, "llm: share of failed gradings in a rollout phase above which training stops", "", RL)
    omega_when_wrong: Literal["zero", "score"] = key(
        "zero", "Omega on a wrong decision: 0, or scored like any other", "training scores", RL)


class RolloutConfig(Exact):
    samples: PositiveInt = key(5, "responses per prompt (the group size G)", "training scores")
    temperature: float = key(
        1.0, "sampling temperature in training; the loss scores the same distribution", "training scores",
        ge=0.01)
    max_prompt_tokens: PositiveInt = key(2048, "longest prompt", "training scores reference")
    max_new_tokens: PositiveInt = key(
        1024, "longest response; one that reaches it is cut off and trained on as it stands",
        "training scores reference")
    max_rows: PositiveInt = key(320, "responses decoded at once per rank (bounds the KV cache)", "")


class TrainKeys(Exact):
    loss: str = key(
        "grpo", "grpo, cispo, gspo or your own (train_grpo.py), sft (train_sft.py) or dpo (train_dpo.py)")
    advantage: Literal["std", "mean"] = key(
        "std", "std: (R - mean) / (std + 1e-6) in the group; mean: centred only (Dr.GRPO)", read_by=RL)
    aggregation: Literal["auto", "token", "sequence", "constant"] = key(
        "auto", "token mean, mean of sequence means, or a constant length (rollout.max_new_tokens); auto: "
                "the loss's own (sequence for gspo, else token)", read_by=RL)
    clip_low: Share | None = key(
        None, "lower clip distance of the ratio; null: the loss's own (gspo 3e-4, else 0.2)",
        read_by="grpo gspo")
    clip_high: NonNegativeFloat | None = key(
        None, "upper clip distance; null: the loss's own (gspo 4e-4, else 0.2)", read_by="grpo gspo")
    dual_clip: float | None = key(None, "bound of the ratio where A < 0; null: off", read_by="grpo", gt=1)
    is_floor: NonNegativeFloat = key(0.0, "smallest weight", read_by="cispo")
    is_cap: PositiveFloat = key(1.28, "largest weight, absolute", read_by="cispo")
    cispo_drop: bool = key(
        False, "also drop tokens with A > 0 and ratio > is_cap (the reference release does)", read_by="cispo")
    tis_cap: PositiveFloat | None = key(None, "cap of the sampler/trainer importance weight; null: off",
                                   read_by=RL)
    dpo_beta: PositiveFloat = key(0.1, "how strongly the policy is held to the base model", read_by="dpo")
    kl_coef: NonNegativeFloat = key(0.0, "weight of the KL to the base model; 0 loads none", read_by=RL)
    kl: Literal["k2", "k3"] = key("k2", "KL estimator used as a loss where kl_coef > 0", read_by=RL)
    entropy_coef: NonNegativeFloat = key(0.0, "weight of the entropy bonus", read_by=RL)
    lr: PositiveFloat = key(5e-7, "learning rate")
    schedule: Literal["constant", "linear", "cosine"] = key("constant", "learning rate after the warm-up")
    warmup_steps: NonNegativeInt = key(0, "steps of linear warm-up")
    betas: list[float] = key([0.9, 0.999], "AdamW betas")
    weight_decay: NonNegativeFloat = key(0.01, "AdamW weight decay")
    grad_clip: PositiveFloat = key(1.0, "largest global gradient norm")
    prompts_per_step: PositiveInt = key(64, "groups per optimizer step")
    steps_per_sync: PositiveInt = key(1, "optimizer steps on rollouts from the same weights", read_by=RL)
    epochs: PositiveInt = key(4, "passes over the training turns")
    steps: NonNegativeInt | None = key(
        None, "train for exactly so many optimizer steps; null: epochs decide; 0: the run is only evaluated")
    tokens_per_microbatch: PositiveInt = key(
        16384, "tokens of a forward pass per rank; a prompt with one response (DPO: a pair) may exceed it",
        "")
    activation_checkpointing: bool = key(
        False, "keep only each layer's input for the backward pass and compute the rest again", "")
    moments_on_host: bool = key(
        False, "keep AdamW's moments in the host's memory: half of what they, the weights and the gradients "
        "take; a step copies them to the device and back", "")
    compile: bool = key(False, "torch.compile the layers except attention (a minute or so at the start)", "")
    checkpoint_every: PositiveInt = key(50, "steps between checkpoints (taken at the next sync boundary)", "")
    keep_checkpoints: PositiveInt = key(2, "newest checkpoints kept", "")
    eval_every: PositiveInt | None = key(
        50, "steps between evaluations (at the next sync boundary); null: none", "")


FROM = key("", "a run folder: start from the weights and moments of its newest checkpoint, at step 0")
TrainConfig = create_model("TrainConfig", __base__=TrainKeys, **{"from": (File, FROM)})  # a word of Python


class EvalConfig(Exact):
    samples: PositiveInt = key(3, "responses per prompt", "scores")
    temperature: float = key(
        1.0, "sampling temperature; greedy figures are always printed beside", "scores", ge=0.01)
    top_p: float = key(1.0, "nucleus of the evaluation's sampling", "scores", gt=0, le=1)


class WandbConfig(Exact):
    mode: Literal["disabled", "offline", "online"] = key("disabled", "Weights & Biases logging", "")
    project: str = key("learn-to-ask", "project name", "")


class Config(Exact):
    run_dir: File = key("", "everything this experiment writes goes here", "")
    plan: bool = key(
        False, "print how much memory training and sampling need on each GPU, whether it fits, and stop", "")
    gpus: PositiveInt | None = key(
        None, "plan: number of GPUs; null: this machine's device and the processes that torchrun starts", "")
    gpu_gib: PositiveFloat = key(80.0, "plan: memory of a GPU in GiB, where gpus is given", "")
    seed: NonNegativeInt = key(
        0, "data order, sampling noise, and which sessions are set aside for validation",
        "turns pairs training scores")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    hindsight: HindsightConfig = HindsightConfig()
    llm: LLMConfig = LLMConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    wandb: WandbConfig = WandbConfig()

    @property
    def run_path(self):
        """run_dir as a Path."""
        return Path(self.run_dir)

    @property
    def turns_path(self):
        """The folder of the turns."""
        return Path(self.data.turns or self.run_path / "turns")

    @model_validator(mode="after")
    def consistent(self):
        """Check the keys against each other, and fill in the loss's own clip and aggregation."""
        for wrong, told in contradictions(self):
            if wrong:
                raise ValueError(told)
        t = self.train
        if t.aggregation == "auto" and t.loss not in ("sft", "dpo"):
            t.aggregation = "sequence" if t.loss == "gspo" else "token"
        if t.loss in OWN_CLIP or t.loss not in KNOWN_LOSSES:
            low, high = OWN_CLIP.get(t.loss, OWN_CLIP["grpo"])
            t.clip_low = low if t.clip_low is None else t.clip_low
            t.clip_high = high if t.clip_high is None else t.clip_high
        return self


# -------------------------------------------------------------------------------------- keys and their checks

OWN_CLIP = {"grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}  # train.clip_low, train.clip_high where they are null
KNOWN_LOSSES = (*RL.split(), "sft", "dpo")


def leaves(section=Config, prefix="", role=""):
    """Yield (dotted key, pydantic field, the products it affects) for every key of the config."""
    for name, field in section.model_fields.items():
        affects = (field.json_schema_extra or {}).get("affects", "")
        if hasattr(field.annotation, "model_fields"):  # a section
            yield from leaves(field.annotation, f"{prefix}{name}.", affects)
        else:
            yield prefix + name, field, (role if affects == ROLE else affects).split()


FIELDS = {name: field for name, field, _ in leaves()}
AFFECTS = {name: affects for name, _, affects in leaves()}
SECTIONS = {name.rpartition(".")[0] for name in FIELDS} - {""}


def default(name):
    return FIELDS[name].get_default()


def contradictions(cfg):
    """Yield (whether the config has this fault, what to say of it)."""
    t, r = cfg.train, cfg.reward
    for name, value in flatten(cfg).items():  # a loss of your own may read any key
        read_by = FIELDS[name].json_schema_extra["read_by"].split()
        unread = read_by and t.loss in KNOWN_LOSSES and t.loss not in read_by
        yield unread and value != default(name), (
            f"{name} has no effect with train.loss={t.loss}; remove it")
        yield "\\u0000" in json.dumps(value) or flaw(value), f"{name} holds a NUL or half a surrogate pair"
    yield r.omega == "llm" and r.grader != "llm", (
        "reward.omega=llm needs reward.grader=llm: the grader counts the questions in the same call")
    yield cfg.hindsight.self_check > 1 and cfg.hindsight.source != "llm", (
        f"hindsight.self_check has no effect with hindsight.source={cfg.hindsight.source}; remove it")
    yield r.mode == "sum" and r.beta != default("reward.beta"), (
        "reward.beta has no effect with reward.mode=sum, which is the product with beta 1; remove it")
    named = [name for names in cfg.data.roles.values() for name in names]
    yield len(named) > len(set(named)), f"data.roles names one role twice: {cfg.data.roles}"
    yield t.is_floor > t.is_cap, f"train.is_floor={t.is_floor} is above train.is_cap={t.is_cap}"
    yield len(t.betas) != 2 or not all(0 <= b < 1 for b in t.betas), (
        f"train.betas must be two numbers in [0, 1), not {t.betas!r}")
    yield cfg.rollout.samples == 1 and t.steps != 0 and t.loss not in ("sft", "dpo"), (
        f"rollout.samples=1 teaches {t.loss} nothing: it compares the responses of a group; set 2 or more")
    for name in ("rollout.samples", "eval.samples"):
        samples = attrgetter(name)(cfg)
        yield samples > cfg.rollout.max_rows, (
            f"rollout.max_rows={cfg.rollout.max_rows} cannot hold one group of {name}={samples}")
    yield cfg.gpus is not None and not cfg.plan, (
        "gpus has no effect without plan=true: torchrun says how many processes train")
    yield cfg.gpu_gib != default("gpu_gib") and cfg.gpus is None, "gpu_gib has no effect without gpus"


# ---------------------------------------------------------------------------------------------------- loading

class EachKeyOnce(yaml.constructor.BaseConstructor):
    """For a loader of YAML: a key that stands twice is an error (in YAML the last one wins, silently)."""

    def construct_mapping(self, node, deep=False):
        names = [name.value for name, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{shorten(name)} stands twice below line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


class Loader(EachKeyOnce, yaml.SafeLoader):
    """Reads YAML in which 5e-7 is a number (in YAML 1.1 it is a text). A bad value names its line."""

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except Exception as error:  # "2026-02-30", "0x_", "!!bool x"
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {shorten(node.value)} ({error})")

    def flatten_mapping(self, node):
        super().flatten_mapping(node)
        if len(node.value) > 1000:  # merges of merges
            raise yaml.YAMLError("'<<' merges too many keys")


class Dumper(yaml.SafeDumper):
    """Writes it: the text "5e-7" gets quotes."""


# In YAML 1.1 010 is 8 and 1:30 is 90. Nobody means that: they are refused.
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 0))
for kind in (Loader, Dumper):
    kind.add_implicit_resolver("tag:yaml.org,2002:float",
                               re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), None)


def parse_yaml(text, loader, where):
    """What a YAML says. InputError names where it stands: PyYAML may raise anything at a bad one."""
    try:
        return yaml.load(text, loader)
    except Exception as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}")


def read_yaml(path, seen=()):
    """One YAML file and all it inherits by `base:` (paths beside the file; later ones win)
    -> {dotted key: (value, the file it comes from)}."""
    path = Path(path)
    try:
        text, here = path.read_text("utf-8"), path.resolve()
    except FileNotFoundError:
        raise InputError(f"no such config: {path}")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path with a NUL
        raise InputError(f"config {str(path)!r} cannot be read ({error})")
    if here in seen:
        raise InputError(f"{path}: 'base:' leads back to itself")
    tree = parse_yaml(text, Loader, path)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a config is a mapping of keys, not {type(tree).__name__}")
    try:
        bases = TypeAdapter(Texts).validate_python(tree.pop("base", None) or [])
    except ValidationError:
        raise InputError(f"{path}: base must be the path of another config, or a list of them")
    found = {}
    for base in bases:
        found |= read_yaml(path.parent / base, (*seen, here))
    return found | flat_tree(tree, path)


def flat_tree(tree, where, prefix=""):
    """Nested mappings -> {dotted key: (value, where)}; unknown keys are refused."""
    found = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if dotted in SECTIONS:
            if not isinstance(value, dict):
                raise InputError(f"{where}: '{dotted}' is a section: its value is a mapping, not "
                                 f"{shorten(value)}")
            found |= flat_tree(value, where, dotted + ".")
        elif dotted in FIELDS:
            found[dotted] = value, where
        else:
            raise unknown(dotted, where)
    return found


def unknown(name, where):
    if name in SECTIONS:
        return InputError(f"{where}: {name!r} is a section; set one of its keys, as in {name}.KEY=value")
    by_leaf = {n.split(".")[-1]: n for n in FIELDS}  # perhaps the right key in the wrong section
    hint = (nearest(name, [*FIELDS, *SECTIONS]) or nearest(name.split(".")[-1], by_leaf, by_leaf.get)
            or "; --help lists every key")
    return InputError(f"{where}: unknown key {shorten(name)}{hint}")


def is_text(name):
    """Is a key's value a text (free, or one of several choices)?"""
    annotation = FIELDS[name].annotation
    return annotation is str or get_origin(annotation) is Literal


def override(arg):
    """A command-line argument key=value -> (key, value)."""
    name, equals, text = arg.partition("=")
    if not equals:
        raise InputError(f"argument {arg!r} is not of the form key=value")
    if name not in FIELDS:
        raise unknown(name, "command line")
    return name, text if is_text(name) else parse_yaml(text, Loader, f"command line: the value of {name}")


def build(found):
    """{dotted key: (value, where it was read)} -> Config, checked."""
    tree = {}
    for name, (value, _) in found.items():
        *sections, leaf = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = "" if value is None and is_text(name) else value
    try:
        cfg = Config.model_validate(tree)
    except ValidationError as error:
        fault = explain(error)  # begins with a key, which a number follows where its value is a list
        for name, (_, where) in found.items():
            if fault.startswith((name + " ", name + ".")):
                fault = f"{where}: {fault}"
        raise InputError(fault)
    if not cfg.run_dir:
        raise InputError("run_dir is not set: name the folder this experiment writes to")
    return cfg


def load(argv, doc=None, may_plan=False):
    """Command line (YAML file, then key=value ...) -> Config. `--help` prints every key and ends the process.

    doc: the script's docstring, for --help. may_plan: whether the caller knows what plan=true means.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(doc), flush=True)
        raise SystemExit(0)
    if not argv or "=" in argv[0]:
        raise InputError("the first argument is a config, as configs/toy/grpo.yaml (--help lists all keys)")
    found = read_yaml(argv[0])
    for arg in argv[1:]:
        name, value = override(arg)
        found[name] = value, "command line"
    cfg = build(found)
    if cfg.plan and not may_plan:
        raise InputError("plan=true is for train_grpo.py, train_sft.py and train_dpo.py")
    return cfg


def help_text(doc):
    lines = [f"{(doc or '').strip()}\n\nArguments: a YAML file, then key=value ... The keys and defaults:\n"]
    for name, field in FIELDS.items():
        value = default(name)
        of = field.json_schema_extra["read_by"]
        losses = f"{', '.join(of.split())}: " if of and of != RL else ""
        is_choice = get_origin(field.annotation) is Literal
        choices = f" ({' | '.join(get_args(field.annotation))})" if is_choice else ""
        lines += [f"  {name} = {'null' if value is None else value}",
                  f"      {losses}{field.description}{choices}"]
    return "\n".join(lines)


def flatten(cfg):
    """Config -> flat {dotted key: value}, the resolved values."""
    return {name: attrgetter(name)(cfg) for name in FIELDS}


def save(cfg, path):
    """Write the resolved config as a YAML that load() reads back to the same Config."""
    write_text(path, yaml.dump(cfg.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True))


def saved(run):
    """The config that a run folder holds."""
    return build(read_yaml(Path(run) / "config.yaml"))


def need(cfg, *names):
    """Refuse, by name, keys that this stage needs and that are not set."""
    for name in names:
        if not attrgetter(name)(cfg):
            raise InputError(f"{name} is not set: {FIELDS[name].description}")


# ------------------------------------------------------------------------- was this made with these settings?

def made_with(cfg, product):
    """-> {dotted key: value} of the keys that affect a product under this config: its stamp on disk."""
    t, role = cfg.train, product != "scores"  # Auto-Prompt asks a model whatever the run's own source is
    idle = {"llm.extractor.": role and cfg.hindsight.source != "llm",
            "llm.grader.": role and cfg.reward.grader != "llm",
            "llm.writer.": not (cfg.llm.writer.model if product == "pairs" else t.loss == "dpo"),
            "llm.auditor.": True,  # it rewards nothing
            "data.split.": cfg.data.eval_logs,
            "data.lexicon.": product == "turns" and cfg.hindsight.source == "annotations",
            "seed.": product == "turns" and not cfg.data.valid_sessions,
            "train.steps.": t.schedule == "constant",  # else the learning rate depends on where the end is
            "train.epochs.": t.schedule == "constant"}
    without = tuple(name for name, has_no_effect in idle.items() if has_no_effect)
    return {name: value for name, value in flatten(cfg).items()
            if product in AFFECTS[name] and not f"{name}.".startswith(without)}


def changed(now, made):
    """Names of the keys of a stamp whose value differs from that in an older one, where that has the key."""
    return [name for name, value in now.items() if made.get(name, value) != value]
