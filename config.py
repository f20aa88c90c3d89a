"""One YAML per experiment: dataclasses with a line of help per key, `base:` inheritance, key=value overrides.

    cfg = config.load(["configs/toy/grpo.yaml", "train.lr=1e-3", "seed=1"])

Unknown keys are refused with the nearest right one, values are checked on load, nothing is ignored. Paths in a
YAML are relative to the folder one starts the script in. `--help` lists every key.
"""
import dataclasses
import difflib
import functools
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from data import InputError, write_text


def key(default, help, choices=None, at_least=None, above=None, at_most=None):
    """One config key: its default, its line of help and what it may be."""
    make = {"default_factory": default} if callable(default) else {"default": default}
    return field(**make, metadata=dict(help=help, choices=choices, at_least=at_least, above=above, at_most=at_most))


@dataclass
class Model:
    path: str = key("", "Hugging Face folder or hub id of the base model; the KL reference is the same checkpoint")
    dtype: str = key("auto", "compute type (master weights are at least float32); auto: bfloat16 on CUDA, float32 on CPU",
                     choices=("auto", "float32", "bfloat16", "float64"))


@dataclass
class Data:
    logs: str = key("", "training conversations, JSONL")
    eval_logs: str = key("", "held-out conversations, JSONL")
    valid_sessions: int = key(0, "sessions set aside from the training logs for evaluation during training "
                                 "(0: evaluation during training reads the held-out turns)", at_least=0)
    goal: str = key("", "what the expert is after; a session's own 'goal' wins")
    lexicon: str = key("", "lexicon YAML of the rules extractor and the rules grader")
    prompt: str = key("prompts/policy.md", "system prompt of the policy; {goal} is filled in")
    prompt_no_stop: str = key("prompts/policy_no_stop.md", "training prompt of reward.mode no_rs: never mentions stopping")
    long_prompts: str = key("error", "prompts over rollout.max_prompt_tokens: refuse to start, or leave the turns out",
                            choices=("error", "drop"))


@dataclass
class Hindsight:
    source: str = key("rules", "where I* comes from: a language model (llm.extractor), the lexicon, or the logs' own "
                               "'learned' fields", choices=("llm", "rules", "annotations"))
    stop_rule: str = key("paper", "paper: stop where I* is empty or at the last point; last_turn: stop only at the last "
                                  "point, continue with an empty I* is dropped", choices=("paper", "last_turn"))
    user_end: str = key("stop", "a session that ends on a user utterance: its last point is a stop, or is dropped",
                        choices=("stop", "drop"))
    generic: list = key(lambda: ["pregnancy", "allergies"], "slots left out of I* because any context admits them")
    self_check: int = key(1, "llm: extract so often, with other seeds, and report how far the results agree", at_least=1)


@dataclass
class Role:
    """A language model behind one of the roles extractor, grader, writer."""
    source: str = key("endpoint", "an OpenAI-compatible server, or a checkpoint of one's own", choices=("endpoint", "local"))
    model: str = key("", "the name the server knows the model by; local: a Hugging Face folder or hub id")
    base_url: str = key("http://localhost:8000/v1", "endpoint: where the server is")
    api_key_env: str = key("OPENAI_API_KEY", "endpoint: the environment variable that holds the key")
    prompt: str = key("", "its instructions; empty: prompts/ROLE.md (writer: prompts/rejected.md)")
    temperature: float = key(0.0, "sampling temperature", at_least=0)
    max_tokens: int = key(512, "longest reply", at_least=1)
    concurrency: int = key(64, "endpoint: asks in flight at once", at_least=1)
    timeout_s: float = key(60.0, "endpoint: seconds to wait for a reply", above=0)
    retries: int = key(6, "endpoint: further attempts after a time-out, a refusal (429) or a server error", at_least=0)


@dataclass
class LLM:
    cache: str = key("", "file of the replies so far, which runs may share; empty: run_dir/llm_cache.sqlite")
    extractor: Role = field(default_factory=Role)
    grader: Role = field(default_factory=Role)
    writer: Role = field(default_factory=Role)


@dataclass
class Reward:
    mode: str = key("product", "R_s(1 + beta R_a) + Omega | R_a + R_s + Omega | R_s(1 + beta) + Omega | beta R_a + Omega",
                    choices=("product", "sum", "no_ra", "no_rs"))
    beta: float = key(2.0, "weight of R_a", at_least=0)
    grader: str = key("rules", "what gives R_a: the lexicon's rules, or a language model (llm.grader)", choices=("rules", "llm"))
    omega: str = key("rule", "what counts questions for Omega: question marks and the lexicon, or the language model's count",
                     choices=("rule", "llm"))
    max_failed: float = key(0.2, "llm: share of failed gradings in a rollout phase above which training stops",
                            at_least=0, at_most=1)
    omega_when_wrong: str = key("zero", "Omega on a wrong decision: 0, or scored like any other",
                                choices=("zero", "score"))


@dataclass
class Rollout:
    samples: int = key(5, "answers per prompt (the group size G)", at_least=1)
    temperature: float = key(1.0, "sampling temperature in training; the loss scores the same distribution", above=0)
    max_prompt_tokens: int = key(2048, "longest prompt", at_least=1)
    max_new_tokens: int = key(1024, "longest answer; one that reaches it is cut off and trained as it stands", at_least=1)
    max_rows: int = key(320, "answers decoded at once per rank (bounds the KV cache)", at_least=1)


@dataclass
class Train:
    loss: str = key("grpo", "grpo, cispo, gspo, or x for a function x_loss of your own in train_grpo.py; sft and dpo are "
                            "train_sft.py's and train_dpo.py's")
    advantage: str = key("std", "std: (R - mean) / (std + 1e-6) in the group; mean: centred only (Dr.GRPO)",
                         choices=("std", "mean"))
    aggregation: str = key("auto", "token mean, mean of sequence means, or a constant length (rollout.max_new_tokens); "
                                   "auto: the loss's own (token; sequence for gspo)",
                           choices=("auto", "token", "sequence", "constant"))
    clip_low: typing.Optional[float] = key(None, "lower clip distance of the ratio; null: the loss's own "
                                                 "(grpo 0.2, gspo 3e-4)", at_least=0, at_most=1)
    clip_high: typing.Optional[float] = key(None, "upper clip distance; null: the loss's own (grpo 0.2, gspo 4e-4)",
                                            at_least=0)
    dual_clip: typing.Optional[float] = key(None, "grpo: bound of the ratio where A < 0; null: off", above=1)
    is_floor: float = key(0.0, "cispo: smallest weight", at_least=0)
    is_cap: float = key(1.28, "cispo: largest weight, absolute", above=0)
    cispo_drop: bool = key(False, "cispo: also drop tokens with A > 0 and ratio > is_cap (the reference release does)")
    tis_cap: typing.Optional[float] = key(None, "cap of the sampler/trainer importance weight; null: off", above=0)
    dpo_beta: float = key(0.1, "dpo: how strongly the policy is held to the base model", above=0)
    kl_coef: float = key(0.0, "weight of the KL to the base model; 0 loads no reference", at_least=0)
    kl: str = key("k2", "KL estimator used as a loss where kl_coef > 0", choices=("k2", "k3"))
    entropy_coef: float = key(0.0, "weight of the entropy bonus", at_least=0)
    lr: float = key(5e-7, "learning rate", above=0)
    schedule: str = key("constant", "after warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = key(0, "steps of linear warm-up", at_least=0)
    betas: list = key(lambda: [0.9, 0.999], "AdamW betas")
    weight_decay: float = key(0.01, "AdamW weight decay", at_least=0)
    grad_clip: float = key(1.0, "largest global gradient norm", above=0)
    prompts_per_step: int = key(64, "groups per optimizer step", at_least=1)
    steps_per_sync: int = key(1, "optimizer steps taken on rollouts from the same weights", at_least=1)
    epochs: int = key(4, "passes over the training turns", at_least=1)
    steps: typing.Optional[int] = key(None, "train for exactly so many optimizer steps; null: epochs decide; 0: a row that is "
                                            "only evaluated", at_least=0)
    tokens_per_microbatch: int = key(16384, "token budget of one forward pass per rank (one prompt with one answer, in DPO "
                                            "one pair, may exceed it)", at_least=1)
    activation_checkpointing: bool = key(False, "keep only each layer's input for the backward pass and compute the rest again")
    compile: bool = key(False, "torch.compile the layers but for attention (a minute or so at the start)")
    checkpoint_every: int = key(50, "steps between checkpoints (taken at the next sync boundary)", at_least=1)
    keep_checkpoints: int = key(2, "newest checkpoints kept", at_least=1)
    eval_every: typing.Optional[int] = key(50, "steps between evaluations (at the next sync boundary); null: none",
                                           at_least=1)


@dataclass
class Eval:
    samples: int = key(3, "answers per prompt", at_least=1)
    temperature: float = key(1.0, "sampling temperature; greedy figures are always printed beside", above=0)
    top_p: float = key(1.0, "nucleus of the evaluation's sampling", above=0, at_most=1)


@dataclass
class Wandb:
    mode: str = key("disabled", "Weights & Biases logging", choices=("disabled", "offline", "online"))
    project: str = key("learn-to-ask", "project name")


@dataclass
class Config:
    run_dir: str = key("", "everything this experiment writes goes here")
    plan: bool = key(False, "print how much memory training and sampling take on each GPU, whether it fits, and stop")
    gpus: typing.Optional[int] = key(None, "plan: number of GPUs; null: the processes there are, on the device there is", at_least=1)
    gpu_gib: float = key(80.0, "plan: memory of a GPU in GiB, where gpus is given", above=0)
    seed: int = key(0, "data order, sampling noise, and which sessions are set aside for validation", at_least=0)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    hindsight: Hindsight = field(default_factory=Hindsight)
    llm: LLM = field(default_factory=LLM)
    reward: Reward = field(default_factory=Reward)
    rollout: Rollout = field(default_factory=Rollout)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    wandb: Wandb = field(default_factory=Wandb)


# ------------------------------------------------------------------------------------------------- load and check

def flat_fields(section=Config, prefix=""):
    """Yield (dotted key, dataclass field) for every leaf of the config."""
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(f.type):
            yield from flat_fields(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f


FIELDS = dict(flat_fields())


def help_text(doc):
    lines = [(doc or "").strip(), "",
             "Arguments: a YAML file, then key=value overrides. Every key, its default and what it does:", ""]
    for name, f in FIELDS.items():
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        choices = f.metadata["choices"]
        lines.append(f"  {name} = {'null' if default is None else default}")
        lines.append(f"      {f.metadata['help']}{' (' + ' | '.join(choices) + ')' if choices else ''}")
    return "\n".join(lines)


SECTIONS = {name[:i] for name in FIELDS for i, c in enumerate(name) if c == "."}


def _flatten(tree, where, prefix=""):
    out = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if dotted in SECTIONS:
            if not isinstance(value, dict):
                raise InputError(f"{where}: '{dotted}' is a section, so its value must be a mapping, not {value!r}")
            out.update(_flatten(value, where, dotted + "."))
        elif dotted in FIELDS:
            out[dotted] = _coerce(dotted, value, where)
        else:
            _unknown(dotted, where)
    return out


def _unknown(name, where):
    names = [*FIELDS, *sorted(SECTIONS)]
    leaf = {n.split(".")[-1]: n for n in FIELDS}
    near = difflib.get_close_matches(name, names, 1, 0.6)
    if not near:
        near = [leaf[m] for m in difflib.get_close_matches(name.split(".")[-1], list(leaf), 1, 0.6)]
    hint = f"; did you mean '{near[0]}'?" if near else "; --help lists every key"
    raise InputError(f"{where}: unknown key '{name}'{hint}")


def _coerce(name, value, where):
    """Check one value against its field's type and bounds; -> the value in that type."""
    f, kind = FIELDS[name], FIELDS[name].type
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None
        kind = next(t for t in typing.get_args(kind) if t is not type(None))
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 5e-7 as a string
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and value is None:
        value = ""
    if type(value) is not kind:
        raise InputError(f"{where}: {name} must be {kind.__name__}, not {value!r}")
    m = f.metadata
    if kind is float and value != value or value in (float("inf"), float("-inf")):
        raise InputError(f"{where}: {name} must be finite, not {value!r}")
    if m["choices"] and value not in m["choices"]:
        near = difflib.get_close_matches(str(value), m["choices"], 1, 0.6)
        raise InputError(f"{where}: {name} must be one of {', '.join(m['choices'])}, not {value!r}"
                         + (f"; did you mean '{near[0]}'?" if near else ""))
    for bound, bad, text in (("at_least", lambda v, b: v < b, "at least"), ("above", lambda v, b: v <= b, "above"),
                             ("at_most", lambda v, b: v > b, "at most")):
        if m[bound] is not None and bad(value, m[bound]):
            raise InputError(f"{where}: {name} must be {text} {m[bound]}, not {value!r}")
    return value


def _read_yaml(path, seen=()):
    """One YAML file and all it inherits by `base:` (paths beside the file; later ones win) -> flat {dotted key: value}."""
    path = Path(path)
    if path.resolve() in seen:
        raise InputError(f"{path}: 'base:' leads back to itself")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no such config: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a config is a mapping of keys, not {type(tree).__name__}")
    bases = tree.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise InputError(f"{path}: base must be the path of another config, or a list of them, not {bases!r}")
    flat = {}
    for base in bases:
        flat |= _read_yaml(path.parent / base, seen + (path.resolve(),))
    return {**flat, **_flatten(tree, path)}


OWN_CLIP = {"grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}  # train.clip_low, train.clip_high where they are null
_CISPO = ["train.is_floor", "train.is_cap", "train.cispo_drop"]
_RL = ["train.clip_low", "train.clip_high", "train.dual_clip", *_CISPO, "train.advantage", "train.aggregation", "train.tis_cap",
       "train.kl_coef", "train.kl", "train.entropy_coef", "train.steps_per_sync", "reward.mode", "reward.beta",
       "reward.omega_when_wrong", "reward.max_failed"]
UNREAD = {"grpo": [*_CISPO, "train.dpo_beta"], "gspo": [*_CISPO, "train.dpo_beta", "train.dual_clip"],
          "cispo": ["train.clip_low", "train.clip_high", "train.dual_clip", "train.dpo_beta"],
          "sft": [*_RL, "train.dpo_beta"], "dpo": _RL}


def build(flat):
    """Flat {dotted key: value} -> Config, with defaults filled in and the keys checked against each other."""
    cfg = Config()
    for name, value in flat.items():
        *sections, leaf = name.split(".")
        setattr(functools.reduce(getattr, sections, cfg), leaf, value)
    t = cfg.train
    if t.loss in UNREAD:  # a key that this loss never reads must not be set in vain; a loss of your own may read any
        default = flatten(Config())
        for name, value in flatten(cfg).items():
            if name in UNREAD[t.loss] and value != default[name]:
                raise InputError(f"{name} has no effect with train.loss={t.loss}; remove it")
    if t.aggregation == "auto" and t.loss not in ("sft", "dpo"):
        t.aggregation = "sequence" if t.loss == "gspo" else "token"
    if t.loss in OWN_CLIP:
        low, high = OWN_CLIP[t.loss]
        t.clip_low = low if t.clip_low is None else t.clip_low
        t.clip_high = high if t.clip_high is None else t.clip_high
    if cfg.reward.omega == "llm" and cfg.reward.grader != "llm":
        raise InputError("reward.omega=llm needs reward.grader=llm: the grader counts the questions in the same call")
    if cfg.hindsight.self_check > 1 and cfg.hindsight.source != "llm":
        raise InputError(f"hindsight.self_check has no effect with hindsight.source={cfg.hindsight.source}; remove it")
    if cfg.reward.mode == "sum" and cfg.reward.beta != Reward().beta:
        raise InputError("reward.beta has no effect with reward.mode=sum, which is the product with beta 1; remove it")
    if t.is_floor > t.is_cap:
        raise InputError(f"train.is_floor={t.is_floor} is above train.is_cap={t.is_cap}")
    if len(t.betas) != 2 or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in t.betas):
        raise InputError(f"train.betas must be two numbers in [0, 1), not {t.betas!r}")
    if not all(isinstance(g, str) for g in cfg.hindsight.generic):
        raise InputError(f"hindsight.generic must be a list of names, not {cfg.hindsight.generic!r}")
    for name, samples in (("rollout.samples", cfg.rollout.samples), ("eval.samples", cfg.eval.samples)):
        if samples > cfg.rollout.max_rows:
            raise InputError(f"rollout.max_rows={cfg.rollout.max_rows} cannot hold one group of {name}={samples}")
    if cfg.gpus is not None and not cfg.plan or cfg.gpu_gib != Config().gpu_gib and cfg.gpus is None:
        raise InputError("gpus has no effect without plan=true, and gpu_gib none without gpus: torchrun says how many processes train")
    if not cfg.run_dir:
        raise InputError("run_dir is not set: name the folder this experiment writes to")
    return cfg


def load(argv, doc=None, may_plan=False):
    """Command line (YAML file, then key=value ...) -> Config. `--help` prints every key and ends the process. doc: the script's
    docstring, for --help; may_plan: whether the caller knows what plan=true means."""
    if any(a in ("-h", "--help") for a in argv):
        print(help_text(doc))
        raise SystemExit(0)
    if not argv or "=" in argv[0]:
        raise InputError("the first argument is a config file, e.g. configs/toy/grpo.yaml (--help lists every key)")
    flat = _read_yaml(argv[0])
    for arg in argv[1:]:
        name, eq, text = arg.partition("=")
        if not eq:
            raise InputError(f"argument {arg!r} is not of the form key=value")
        if name not in FIELDS:
            _unknown(name, "command line")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"command line: the value of {name} is not valid YAML: {text!r}") from None
        kind = FIELDS[name].type
        flat[name] = _coerce(name, text if kind is str else value, "command line")
    if flat.get("plan") and not may_plan:
        raise InputError("plan=true is for train_grpo.py, train_sft.py and train_dpo.py")
    return build(flat)


def flatten(cfg):
    """Config -> flat {dotted key: value}, the resolved values."""
    return {name: functools.reduce(getattr, name.split("."), cfg) for name in FIELDS}


def save(cfg, path):
    """Write the resolved config as a YAML that load() reads back to the same Config."""
    write_text(path, yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False, allow_unicode=True))


def need(cfg, *names):
    """Refuse, by name, keys that this stage needs and that are not set."""
    flat = flatten(cfg)
    for name in names:
        if not flat[name]:
            raise InputError(f"{name} is not set: {FIELDS[name].metadata['help']}")
