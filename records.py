"""Records on disk, each a pydantic model, and the way they are read, written and refused.

Every stage reads and writes UTF-8 JSON lines (JSONL). A class below says what a line may hold: its
fields, their types and bounds. Output files are written aside and renamed: a reader never sees half a
file, and a rerun replaces it. `InputError` is the one exception for what a user can mend; scripts print
it as a single line (`cli`).
"""
import difflib
import fcntl
import hashlib
import json
import os
import re
import reprlib
import shutil
import sys
import time
import unicodedata
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from safetensors import SafetensorError
from tqdm import tqdm

STOP = "<stop />"  # what the policy writes to end the conversation; also its target at a stop turn
SCORES = (0, 0.5, 1)  # what R_a may be


class InputError(Exception):
    """Something the user can mend. The message names the file, line, key or value and the way out."""


def cli(main):
    """Run main(). An InputError, or a file that cannot be used, ends the process in one line, exit code 2.

    Of the ranks of a node that fail alike only the first prints: the others wait a little, until torchrun has
    ended them. A rank that lost another one in a collective waits longest: the other has the reason.
    A closed stdout is as good as /dev/null. One that is not UTF-8 shows the characters it lacks as escapes.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            main()
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output, say `head`, wants no more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except (InputError, OSError, SafetensorError, RuntimeError) as error:
            lost = isinstance(error, RuntimeError)
            if lost and "by peer" not in str(error):  # gloo: Connection closed by peer
                raise
            for bar in list(getattr(tqdm, "_instances", ())):  # else the line would stand amid the bars
                bar.close()
            time.sleep(2 * int(os.environ.get("LOCAL_RANK", 0)) + 5 * lost)
            told = "another process of this run has ended, for the reason that it tells" if lost else error
            print(re.sub(r"[\0-\b\v-\x1f\x7f-\x9f]", "\ufffd", f"error: {told}"), file=sys.stderr)
            sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: started again, a training run goes on from its last checkpoint", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------------------------- one line a fault

WANTED = {"string_type": "a text", "int_type": "a whole number", "int_from_float": "a whole number",
          "float_type": "a number", "bool_type": "true or false", "list_type": "a list",
          "dict_type": "an object", "model_type": "an object", "finite_number": "finite",
          "greater_than_equal": "at least {ge:g}", "greater_than": "above {gt:g}",
          "less_than_equal": "at most {le:g}", "literal_error": "{expected}",
          "string_pattern_mismatch": 'of the form "slot: value"'}


def nearest(name, names, shown=str):
    """-> "; did you mean 'x'?" for the nearest of the names, or nothing. shown(name): as it is shown."""
    near = isinstance(name, str) and difflib.get_close_matches(name, names, 1)
    return f"; did you mean '{shown(near[0])}'?" if near else ""


def explain(error):
    """A pydantic ValidationError -> one line about its first fault: place, fault, nearest right value.

    >>> try:
    ...     Message.model_validate({"role": "users", "content": "Hi"})
    ... except ValidationError as error:
    ...     print(explain(error))
    role must be 'user' or 'assistant', not 'users'; did you mean 'user'?
    """
    fault = error.errors(include_url=False)[0]
    kind, given, context = fault["type"], fault["input"], fault.get("ctx", {})
    # A slot's name may hold line ends, or what a terminal obeys.
    where = re.sub(r"[\s\0-\x1f\x7f-\x9f]+", " ", ".".join(map(str, fault["loc"])))
    if kind == "missing":
        return f"{where} is missing"
    if kind == "extra_forbidden":
        return f"unknown key {where}"
    if kind == "too_short":
        return f"{where} is empty"
    if kind == "value_error":
        told = str(context["error"])
        return f"{where}{' ' if told.startswith('must') else ': '}{told}" if where else told
    if kind not in WANTED:
        return f"{where}: {fault['msg']}"
    hint = nearest(given, re.findall(r"'([^']*)'", context.get("expected", "")))  # the choices of a Literal
    return f"{where} must be {WANTED[kind].format(**context)}, not {shorten(given)}{hint}".strip()


def shorten(value):
    """A value as an error message shows it: short, whatever stands in one another."""
    text = repr(value) if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def flaw(obj):
    """Why a file of ours could not hold what was read: -> text, or None."""
    try:
        json.dumps(obj, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return "a text holds half a surrogate pair (a cut emoji), which is not UTF-8"
    except RecursionError:
        return "lists or objects are nested too deep"


# ------------------------------------------------------------------------------------------------ the records

class Exact(BaseModel):
    """What has exactly these fields, and values of exactly their types."""
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Record(Exact):
    """A line of a JSONL file. Unknown keys are ignored."""
    model_config = ConfigDict(extra="ignore")

    def dump(self):
        """The record as a dict for JSON: the keys that were given, in the order of the fields."""
        return self.model_dump(exclude_unset=True)


class Reply(Exact):
    """What a language model replies. The class checks it and gives its JSON schema."""
    # Without the docstring: a reworded one must not make a rerun ask again.
    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("description", None))


def not_blank(text):
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def check_score(score):
    if score not in SCORES:
        raise ValueError(f"must be 0, 0.5 or 1, not {shorten(score)}")
    return score


Decision = Literal["continue", "stop"]
Text = Annotated[str, AfterValidator(not_blank)]
Slot = Annotated[str, AfterValidator(lambda slot: not_blank(slot_key(slot)) and slot)]
Score = Annotated[float, AfterValidator(check_score), Field(json_schema_extra={"enum": list(SCORES)})]
Share = Annotated[float, Field(ge=0, le=1)]


class Message(Record):
    """One message of a conversation."""
    role: Literal["user", "assistant"]
    content: str


class LogMessage(Message):
    """A message of a log, with the annotations that a log may have."""
    model_config = ConfigDict(extra="allow")
    learned: dict[Slot, Any] | None = None  # user: what the message reveals, {slot: value}
    asks: list[Slot] | None = None  # assistant: the slots it asks for

    @field_validator("learned")
    @classmethod
    def flat(cls, learned):
        for value in (learned or {}).values():
            if isinstance(value, dict) or str(value).count("[") > 100:  # a text may hold a list
                raise ValueError("must hold texts, numbers or lists, no objects and no 100 brackets")
        return learned


class Session(Record):
    """One conversation of a log."""
    model_config = ConfigDict(extra="allow")
    session_id: Annotated[Text, BeforeValidator(lambda given: str(given) if type(given) is int else given)]
    messages: list[LogMessage] = Field(min_length=1)
    goal: str | None = None  # what the expert is after; wins over data.goal
    diagn: Any = None  # the diagnosis, in RealMedConv; not used
    success: bool | None = None  # false: the session teaches nothing and is set aside


class Turn(Record):
    """One decision point of a session (hindsight.py): what was known, and what hindsight tells."""
    turn_id: Text
    session_id: str
    goal: str | None = ""
    context: list[Message] = Field(min_length=1)  # C_{t-1}: everything up to the end of a user utterance
    expert: str | None = None  # what the expert said next
    known: list[str]  # "slot: value" items that the context has revealed
    target: list[str]  # I*: "slot: value" items that the user reveals only later
    decision: Decision  # s*


class Rollout(Record):
    """One response to a turn, graded. r_a, omega and reward are null where the grading failed.

    rationale and audit are in a file only where they were given.
    """
    turn_id: str
    session_id: str | None = None
    sample: int = 0
    response: str
    truth: Decision  # s*
    decision: Decision  # what the response decides
    r_a: Share | None
    r_s: Share
    omega: Share | None
    reward: float | None = None
    rationale: str | None = None  # the grader's reason, cut at 300 characters
    audit: Share | None = None  # R_a by llm.auditor, where it was asked; null where it failed

    @model_validator(mode="after")
    def consistent(self):
        if self.r_s != (self.truth == self.decision):
            raise ValueError(f"r_s is {self.r_s}, but truth {self.truth!r} and decision {self.decision!r}")
        if not self.truth == self.decision == "continue":
            for name in ("r_a", "omega"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is null, but truth and decision are not both continue")
        return self


class Pair(Record):
    """A preference pair for DPO (pairs.py)."""
    turn_id: Text
    session_id: str = ""
    goal: str | None = ""
    context: list[Message] = Field(min_length=1)
    decision: Decision | None = None
    chosen: Text
    rejected: Text
    rejected_from: str | None = None  # the turn, or the language model, that the rejected response comes from


class GraderAnchor(Record):
    """A person's score of a response, for Auto-Prompt."""
    turn: Turn
    response: str
    score: Score


class ExtractorAnchor(Record):
    """The items that a person finds in a session, for Auto-Prompt."""
    session: Session
    items: list[Annotated[str, Field(pattern=r"^\s*[^\s:].*:")]]  # "slot: value"


# --------------------------------------------------------------------------------------------- items compared

def normal(text):
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def slot_key(slot):
    """A slot's name as it is compared and shown: "Code_Type ", "code:type" and "code type" are one.

    Control characters count as blanks: a terminal would obey them.
    """
    return normal(re.sub(r"[_:\0-\x1f\x7f-\x9f]", " ", str(slot)))


def is_named(slot, names):
    """Is a slot one of these names, or a kind of it: are all words of a name among its own?

    >>> is_named("drug allergies", ["Allergies"]), is_named("drug", ["drug allergies"])
    (True, False)
    """
    words = set(slot_key(slot).split())
    return any(words.issuperset(slot_key(name).split()) for name in names)


def same(item):
    """A "slot: value" item as it is compared -> (slot, value).

    >>> same("start_time: 8  PM.") == same("Start time:８ pm")
    True
    """
    slot, _, value = item.partition(":")
    return slot_key(slot), normal(value).strip(" .,!")


def f1(found, wanted):
    """F1 of two lists of items, matched exactly after normalisation; 1 where both are empty.

    >>> f1(["Fever: no", "age: 3"], ["fever: No."])
    0.6666666666666666
    """
    found, wanted = {same(i) for i in found}, {same(i) for i in wanted}
    return 2 * len(found & wanted) / (len(found) + len(wanted)) if found or wanted else 1.0


# ------------------------------------------------------------------------------------------------------ files

def read_jsonl(path, on_bad=None):
    """Yield (line number from 1, object) for each non-blank line.

    A line that is no JSON object raises InputError. Where on_bad(line number, reason) is given, it is called
    instead and the line is left out.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    with open(path, "rb") as f:
        for n, raw in enumerate(f, 1):
            if n == 1 and b"\0" in raw[:4]:
                raise InputError(f"{path} is UTF-16, not UTF-8: convert it (iconv -f UTF-16 -t UTF-8)")
            if not raw.strip():
                continue
            try:
                obj = json.loads(raw.decode("utf-8-sig" if n == 1 else "utf-8"))
                reason = (flaw(obj) if type(obj) is dict
                          else f"expected a JSON object, got {type(obj).__name__}")
            except (ValueError, RecursionError) as error:
                reason = f"not valid UTF-8 JSON ({error})"
            if not reason:
                yield n, obj
            elif on_bad is None:
                raise InputError(f"{path}:{n}: {reason}: mend this line, or remove it")
            else:
                on_bad(n, reason)


def read_log(run):
    """The lines of a run's metrics.jsonl, if there is one. A killed run may have left half a line."""
    path = run / "metrics.jsonl"
    return [line for _, line in read_jsonl(path, lambda n, why: None)] if path.is_file() else []


def last_step(run):
    """The last step that a run's metrics.jsonl tells of, 0 without one."""
    return max((line.get("step", 0) for line in read_log(run)), default=0)


def read_records(path, kind, way_out=""):
    """Yield (line number, record) for each line. A bad line raises InputError; way_out ends its message."""
    for n, obj in read_jsonl(path):
        try:
            yield n, kind.model_validate(obj)
        except ValidationError as error:
            raise InputError(f"{path}:{n}: {explain(error)}{way_out}")


@contextmanager
def whole_file(path):
    """Write a whole file or nothing: what is opened here lies aside, and is renamed at the end."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as f:
            yield f
        sync(aside)
        os.replace(aside, path)
    except OSError as error:  # that of a full disk names no file
        error.filename = error.filename or str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


def sync(path):
    """Have a file's content, or a folder's names, reach the disk: a power cut leaves them whole."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(aside, out):
    """Give a finished folder its name. What stood there (then OUT.old) goes last: one of the two is left."""
    for path in *aside.iterdir(), aside:
        sync(path)
    old = out.with_name(f"{out.name}.old")
    if out.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    os.replace(aside, out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path, text):
    with whole_file(path) as f:
        f.write(text)


def as_line(row):
    """A record, or a dict that may hold records -> a line of JSONL."""
    return json.dumps(row, ensure_ascii=False, default=Record.dump) + "\n"


def write_jsonl(path, rows):
    with whole_file(path) as f:
        f.writelines(map(as_line, rows))


def write_json(path, obj):
    write_text(path, json.dumps(obj, ensure_ascii=False, indent=2) + "\n")


def read_json(path, missing=None):
    """The JSON object that a file holds. missing: what stands for a file that is not there; None: it must be.

    InputError: the file is torn, or holds something else.
    """
    if missing is not None and not Path(path).is_file():
        return missing
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        found = error
    if type(found) is not dict:
        raise InputError(f"{path} holds no JSON object ({shorten(found)}): it may be torn; bring it back, or "
                         "remove it and run the command that writes it again")
    return found


def hash_of(obj):
    """A hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


LOCKS = {}  # path of a lock file: the open file, held until the process ends


def lock(folder, name=".lock"):
    """Keep other processes out of a folder until this one ends. InputError: another one is in it."""
    path = Path(folder) / name
    if path in LOCKS:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    f = open(path, "a+")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder} is in use by {path.read_text()}: wait, end it, or choose another run_dir")
    except OSError as error:  # some file systems have no locks
        print(f"warning: {path} cannot be locked ({error}): see that no other process uses this folder")
    path.write_text(f"process {os.getpid()} ({' '.join(sys.argv)})")
    LOCKS[path] = f


def identity(path):
    """A hash of a file or of a folder's files: of the content, or of size and date where a file is large."""
    path, large, whole = Path(path), 64 * 2 ** 20, hashlib.sha256()
    for file in sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else [path]:
        stat = file.stat()
        mark = file.read_bytes() if stat.st_size < large else f"{stat.st_size} {stat.st_mtime}".encode()
        whole.update(hashlib.sha256(mark).digest())
    return whole.hexdigest()
