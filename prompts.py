"""From a turns file to token ids: prompt files, chat templates, the expert's responses to learn from.

Dialogue text is data. What could open a tag or a special token of any model is written as an escape
(`escape`), also in a goal. For the policy's tokenizer its own special tokens are broken up too (`plain`); for
a language model a text is a JSON string that cannot close its own quotes (`dump`).
"""
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import config
from records import STOP, InputError, Turn, file_hash, read_json, read_records

PROMPTS = {"extractor": "prompts/extractor.md", "grader": "prompts/grader.md",
           "auditor": "prompts/grader.md", "writer": "prompts/rejected.md"}
FILES = "data.lexicon data.prompt data.prompt_no_stop".split()
LOGS = "data.logs", "data.eval_logs"


# <|im_end|>, </s>, <start_of_turn>, <0x0A>, [INST] and its like, and line ends that JSON does not escape.
MARKUP = re.compile(r"<(?=[^\W\d]|[/|!?｜]|\d\w*>)|[\x85\u2028\u2029]"
                    r"|\[(?=/?(?:INST|SYS|AVAILABLE_|TOOL_|MODEL_|THINK|ARGS|CALL_ID|IMG|g?MASK))")


# --------------------------------------------------------------------------------------------- turns of a run

def files_of(made):
    """{config key: value} -> [(config key, file)] of the files that these keys name.

    A data set of the hub is known by its name alone.
    """
    files = [(name, made[name]) for name in FILES if made.get(name)]
    files += [(name, file) for name in LOGS for file in made.get(name, ()) if not file.startswith("hf:")]
    return files + [(f"llm.{role}.prompt", made[f"llm.{role}.prompt"] or shipped)
                    for role, shipped in PROMPTS.items() if made.get(f"llm.{role}.model")]


def turns_stamp(cfg):
    """What turns are made with: the settings, and the content of the files that are on this machine."""
    made = config.made_with(cfg, "turns")
    return made | {f"sha256 of {file}": file_hash(file) for _, file in files_of(made) if Path(file).is_file()}


def turns_file(cfg, name):
    """The path of NAME.jsonl in data.turns, or run_dir/turns.

    Raises InputError where it is missing, was made with other settings or from other files (those that are on
    this machine are compared), or is not as hindsight.py left it.
    """
    path = cfg.turns_path / f"{name}.jsonl"
    if not path.is_file():
        hint = " (data.eval_logs or data.split must be set)" if name == "eval" else ""
        raise InputError(f"{path} does not exist: run hindsight.py with this config first{hint}")
    stamp = path.with_name("made.json")
    made = read_json(stamp, {})  # turns made by hand carry no stamp
    now = turns_stamp(cfg)
    for key in config.changed(now, made):
        raise InputError(f"{path.parent} was made with {key}={made[key]!r}, this config has {now[key]!r}: "
                         "run hindsight.py with this config again")
    if made and made.get("files", {}).get(path.name) != file_hash(path):
        raise InputError(f"{path} is not as hindsight.py left it (edited or interrupted): run it with "
                         f"this config again, or remove {stamp} to use the file as it is")
    return path


def read_turns(path):
    """A turns file -> list of Turn.

    Raises InputError for a bad line, for a turn_id twice, for a file without turns.
    """
    lines, turns = {}, []
    for n, turn in read_records(path, Turn, "; make the file again with hindsight.py"):
        first = lines.setdefault(turn.turn_id, n)
        if first != n:
            raise InputError(f"{path}:{n}: turn_id {turn.turn_id!r} already stands in line {first}; make the "
                             "file again with hindsight.py")
        turns.append(turn)
    if not turns:
        raise InputError(f"{path} holds no turns; look at what hindsight.py set aside and why")
    return turns


def load_turns(cfg, name):
    """The turns of a run, NAME one of train, valid, eval -> list of Turn."""
    return read_turns(turns_file(cfg, name))


# -------------------------------------------------------------------------------------------------- tokenizer

def load_tokenizer(path):
    """A Hugging Face tokenizer from a local folder."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises many kinds; all mean: no usable tokenizer
        raise InputError(f"model.path: no tokenizer could be loaded from {str(path)!r} "
                         f"({str(error).strip().splitlines()[0]})")
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):  # made without complaint
        raise InputError(f"model.path: the tokenizer at {path} is empty: its tokenizer.json is missing")
    rows = read_json(Path(path) / "config.json", {}).get("vocab_size")
    if rows and max(tokenizer.get_vocab().values()) >= rows:
        raise InputError(f"model.path: the tokenizer at {path} has token ids beyond the {rows} rows of the "
                         "embedding: tokenizer and weights are not of one model")
    return tokenizer


def end_ids(folder, tokenizer):
    """The set of token ids that end a response: the tokenizer's, and those that the model's files name."""
    ids = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        eos = read_json(Path(folder) / name, {}).get("eos_token_id")
        ids.update(eos if isinstance(eos, list) else [eos])
    ids.discard(None)
    if not ids:
        raise InputError(f"{folder}: neither the tokenizer nor generation_config.json names an end token")
    return ids


def escape(text):
    """Write what could open a tag or special token, and line separators, as JSON does.

    >>> print(escape("a < b, x<5: <b></s>[INST] [1]"))
    a < b, x<5: \\u003cb>\\u003c/s>\\u005bINST] [1]
    """
    return MARKUP.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def plain(tokenizer, text):
    """Break up special tokens written out in a text, so that nobody can end a turn by typing <|im_end|>."""
    for token in tokenizer.get_added_vocab():
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def apply_template(tokenizer, messages):
    """Messages {"role", "content"} -> token ids of the chat up to and including the header of the
    assistant's next turn. Thinking is off where a template has it (Qwen3)."""
    messages = [{"role": m["role"], "content": plain(tokenizer, m["content"])} for m in messages]
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer at {tokenizer.name_or_path} has no chat template: add "
                         "chat_template.jinja to it")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False,
                                             enable_thinking=False)
    except Exception as error:  # a template may refuse a conversation, with any exception of jinja
        raise InputError(f"the chat template of {tokenizer.name_or_path} refuses the conversation that ends "
                         f"with {messages[-1]['content'][:60]!r} ({error}); use a template that allows it, "
                         "or leave the session out")


# -------------------------------------------------------------------------------------- prompts and responses

@dataclass
class Prompt:
    """A turn and what the policy reads at it."""
    turn: Turn
    tokens: list  # ids: system prompt, context, header of the response


def load_prompt(path, placeholders=("goal",)):
    """Read a prompt file. {each placeholder} must occur in it; it is filled in later."""
    try:
        text = Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt {path} cannot be read ({error})")
    for name in placeholders:
        if f"{{{name}}}" not in text:
            raise InputError(f"prompt {path} lacks the placeholder {{{name}}}")
    return text


def fill_goal(prompt, goal):
    return prompt.replace("{goal}", escape(goal or ""))


def encode_prompt(tokenizer, system, turn):
    """System prompt with the turn's goal, context, header of the response -> token ids."""
    first = {"role": "system", "content": fill_goal(system, turn.goal)}
    return apply_template(tokenizer, [first, *(message.dump() for message in turn.context)])


def encode_prompts(tokenizer, turns, cfg, file=None):
    """Turns -> list of Prompt, none over rollout.max_prompt_tokens. file: not data.prompt, but this one."""
    system = load_prompt(file or cfg.data.prompt)
    prompts = [Prompt(turn, encode_prompt(tokenizer, system, turn)) for turn in turns]
    return within_limit(prompts, [(len(prompt.tokens), prompt.turn.turn_id) for prompt in prompts],
                        "max_prompt_tokens", cfg)


def within_limit(examples, sizes, limit, cfg):
    """The examples that keep a limit of cfg.rollout. The others are refused, or left out and counted aloud.

    sizes: (tokens, turn_id) of each.
    """
    most = getattr(cfg.rollout, limit)
    kept = [example for example, (tokens, _) in zip(examples, sizes) if tokens <= most]
    if len(kept) < len(examples):
        longest, turn_id = max(sizes)
        told = (f"{len(examples) - len(kept)} of {len(examples)} turns have a "
                f"{'prompt' if 'prompt' in limit else 'response'} longer than rollout.{limit}={most} "
                f"(turn {turn_id}: {longest} tokens)")
        if cfg.data.long_prompts == "error" or not kept:
            raise InputError(f"{told}; raise it to {longest}, or set data.long_prompts=drop to leave them "
                             "out")
        if os.environ.get("RANK", "0") == "0":
            print(f"left out: {told}")
    return kept


def expert_response(turn):
    """What the expert did at a turn, in the policy's words: the next utterance, or <stop />."""
    if turn.decision == "stop":
        return STOP
    if not (turn.expert or "").strip() or STOP in turn.expert:
        raise InputError(f"turn {turn.turn_id}: a continue turn whose 'expert' is missing or empty, or holds "
                         f"{STOP}, cannot be imitated")
    return turn.expert.strip()


def encode_response(tokenizer, text):
    """A response to learn from -> token ids. Without the end token a model would never learn to end."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer at {tokenizer.name_or_path} names no eos_token: add it to "
                         "tokenizer_config.json")
    if text != STOP:  # a tokenizer may have the marker as a token of its own
        text = plain(tokenizer, text)
    return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


# --------------------------------------------------------------------------------- texts for a language model

def dump(obj):
    """Texts for a language model, as JSON: none can close its own quotes or hold a token like <|im_end|>."""
    return escape(json.dumps(obj, ensure_ascii=False))


def spoken(messages):
    """Messages as a language model is shown them."""
    return [{"by": "client" if m.role == "user" else "expert", "text": m.content} for m in messages]


def chat(system, user):
    """What a language model is asked, as messages."""
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
