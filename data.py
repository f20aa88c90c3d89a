"""Records on disk and the prompt: JSONL in and out, the turns file, turn -> token ids.

Every stage reads and writes UTF-8 JSON lines. Output files are written whole (aside, then renamed), so that a
reader never sees half a file and a rerun replaces it. `InputError` is the one exception for what a user can mend:
scripts print it as a single line (`cli`), without a traceback.
"""
import hashlib
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

ROLES = ("user", "assistant")
DECISIONS = ("continue", "stop")
STOP = "<stop />"  # what the policy writes to end the conversation; also its target at a stop turn


class InputError(Exception):
    """Something the user can mend. The message names the file, line, key or value and the way out."""


def cli(main):
    """Run main(); an InputError ends the process with one line (once a node under torchrun) and exit code 2."""
    try:
        main()
    except InputError as error:
        for bar in list(getattr(tqdm, "_instances", ())):  # else the line would stand amid the bars
            bar.close()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted (a training run goes on from its last checkpoint when started again)")


def read_jsonl(path, on_bad=None):
    """Yield (line number from 1, object) for each non-blank line.

    A line that is not a JSON object raises InputError, or, where `on_bad(line_number, reason)` is given, is
    reported to it and left out.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    with open(path, "rb") as f:
        for n, raw in enumerate(f, 1):
            if not raw.strip():
                continue
            try:
                obj = json.loads(raw.decode("utf-8-sig" if n == 1 else "utf-8"))
                reason = None if isinstance(obj, dict) else f"expected a JSON object, got {type(obj).__name__}"
            except (ValueError, RecursionError) as error:
                reason = f"not valid UTF-8 JSON ({error})"
            if reason is None:
                yield n, obj
            elif on_bad is None:
                raise InputError(f"{path}:{n}: {reason}")
            else:
                on_bad(n, reason)


@contextmanager
def whole_file(path):
    """Write a whole file or nothing: the file opened here lies aside in the same folder, and is renamed at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as f:
            yield f
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path, text):
    with whole_file(path) as f:
        f.write(text)


def write_jsonl(path, rows):
    with whole_file(path) as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_json(path, obj):
    write_text(path, json.dumps(obj, ensure_ascii=False, indent=2) + "\n")


def identity(path):
    """What tells a file or a folder's files from others: content, or size and date where a file is large."""
    files = sorted(p for p in Path(path).rglob("*") if p.is_file()) if Path(path).is_dir() else [Path(path)]
    large = 64 * 2 ** 20
    marks = [f.read_bytes() if f.stat().st_size < large else f"{f.stat().st_size} {f.stat().st_mtime}".encode() for f in files]
    return hashlib.sha256(b"".join(hashlib.sha256(m).digest() for m in marks)).hexdigest()


def check_messages(messages):
    """-> None, or why this is not a list of {"role": "user" | "assistant", "content": str}."""
    if not isinstance(messages, list) or not messages:
        return "'messages' is missing, empty or not a list"
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or m.get("role") not in ROLES:
            role = m.get("role") if isinstance(m, dict) else m
            return f"message {i}: role {role!r} is neither 'user' nor 'assistant'"
        if not isinstance(m.get("content"), str):
            return f"message {i}: 'content' is missing or not a string"
    return None


def load_turns(path):
    """Read a turns file (design: one decision point a line) -> list of dicts, checked.

    Raises InputError naming file and line for a missing key or a wrong value, and for a file without turns.
    """
    turns, seen = [], {}
    for n, turn in read_jsonl(path):
        bad = check_messages(turn.get("context"))
        if bad is None and not (isinstance(turn.get("turn_id"), str) and isinstance(turn.get("session_id"), str)):
            bad = "'turn_id' or 'session_id' is missing or not a string"
        if bad is None and turn.get("decision") not in DECISIONS:
            bad = f"decision {turn.get('decision')!r} is neither 'continue' nor 'stop'"
        if bad is None and not isinstance(turn.get("target"), list):
            bad = "'target' is missing or not a list"
        if bad is None and turn["turn_id"] in seen:
            bad = f"turn_id {turn['turn_id']!r} already stands in line {seen[turn['turn_id']]}"
        if bad:
            raise InputError(f"{path}:{n}: {bad}; make the file again with hindsight.py")
        seen[turn["turn_id"]] = n
        turns.append(turn)
    if not turns:
        raise InputError(f"{path} holds no turns; look at what hindsight.py set aside and why")
    return turns


def load_tokenizer(path):
    """A Hugging Face tokenizer from a local folder."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises many kinds here; all mean: no usable tokenizer at this path
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model.path: no tokenizer could be loaded from {str(path)!r} ({reason})") from None
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one without complaint
        raise InputError(f"model.path: the tokenizer at {path} is empty: its tokenizer.json is missing")
    return tokenizer


def plain(tokenizer, text):
    """Dialogue text is data: a special token written out in it is broken up, so that nobody can end a turn by typing
    <|im_end|>."""
    for token in tokenizer.get_added_vocab():
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def apply_template(tokenizer, messages):
    """Messages -> token ids of the chat up to and including the header of the assistant's next turn. Thinking is off
    where a template knows it (Qwen3)."""
    messages = [{"role": m["role"], "content": plain(tokenizer, m["content"])} for m in messages]
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer at {tokenizer.name_or_path} has no chat template: add chat_template.jinja to it")
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False,
                                                  enable_thinking=False))
    except Exception as error:  # a template may refuse what it was not written for, with any exception jinja has
        start = messages[-1]["content"][:60]
        raise InputError(f"the chat template of {tokenizer.name_or_path} refuses the conversation that ends with {start!r} "
                         f"({error}); take a template that allows it, or leave the session out") from None


def load_prompt(path, placeholders=("goal",)):
    """Read a prompt; {each placeholder} must occur in it and is filled in later."""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt {path} cannot be read ({error})") from None
    for name in placeholders:
        if f"{{{name}}}" not in text:
            raise InputError(f"prompt {path} lacks the placeholder {{{name}}}")
    return text


def encode_prompt(tokenizer, system, turn):
    """System prompt (with the turn's goal) + context + generation header -> list of token ids."""
    messages = [{"role": "system", "content": system.replace("{goal}", turn.get("goal") or "")}]
    messages += [{"role": m["role"], "content": m["content"]} for m in turn["context"]]
    return apply_template(tokenizer, messages)


def encode_prompts(tokenizer, system, turns, max_tokens, long_prompts="error"):
    """Encode every turn; -> (turns kept, their token ids). Prompts over max_tokens: InputError, or left out and reported."""
    kept, prompts, too_long = [], [], []
    for turn in turns:
        ids = encode_prompt(tokenizer, system, turn)
        if len(ids) > max_tokens:
            too_long.append((len(ids), turn["turn_id"]))
        else:
            kept.append(turn)
            prompts.append(ids)
    if too_long and (long_prompts == "error" or not kept):
        longest, turn_id = max(too_long)
        raise InputError(f"{len(too_long)} of {len(turns)} prompts are longer than rollout.max_prompt_tokens="
                         f"{max_tokens} (turn {turn_id}: {longest} tokens); raise it to {longest}, or set "
                         f"data.long_prompts=drop to leave them out")
    if too_long and os.environ.get("RANK", "0") == "0":
        print(f"left out {len(too_long)} of {len(turns)} turns: prompts longer than rollout.max_prompt_tokens={max_tokens}")
    return kept, prompts


def expert_answer(turn):
    """What the expert did at a turn, in the policy's words: the next utterance, or <stop />."""
    if turn["decision"] == "stop":
        return STOP
    text = turn.get("expert")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"turn {turn['turn_id']}: a continue turn whose 'expert' is missing or empty cannot be imitated")
    return text.strip()


def encode_answer(tokenizer, text):
    """An answer to learn from -> token ids, the end token included (without it a model would never learn to end)."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer at {tokenizer.name_or_path} names no eos_token: add it to tokenizer_config.json")
    text = text if text == STOP else plain(tokenizer, text)  # a tokenizer may have the marker as a token of its own
    return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
