"""Where conversations come from: JSON, Parquet, or a hub data set, with fields and roles of any name.

    data:
      logs: [march.jsonl, april.parquet, "hf:OWNER/NAME:train"]
      fields: {session_id: meta.id, messages: conversations, role: from, content: value}
      roles: {user: human, assistant: [gpt, agent], ignore: system}

`rows` yields each conversation in this project's own format (records.Session says which) and where it stands.
Names in `fields` that stand in no line are refused here; the conversations are checked by hindsight.py.
Parquet and the hub need the `datasets` library.
"""
import hashlib
import json
from pathlib import Path

from records import InputError, read_jsonl


def data_set(source):
    """A Parquet file, or hf:OWNER/NAME:SPLIT, or hf:OWNER/NAME:SUBSET:SPLIT -> its rows."""
    try:
        import datasets
        if source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=source, split="train")
        name, *subset, split = source.removeprefix("hf:").split(":")
        return datasets.load_dataset(name, *subset, split=split)
    except ImportError:
        raise InputError(f"{source} needs the datasets library: pip install datasets")
    except Exception as error:  # of many kinds: no such data set or split, no network, no Parquet
        raise InputError(f"{source} cannot be read (the forms are FILE.parquet and hf:OWNER/NAME:SPLIT): "
                         f"{' '.join(str(error).split())[:300]}")


def raw_rows(source, on_bad):
    """Yield (number from 1, row as it stands there). on_bad(number, why): a line that is no JSON object."""
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source} is a folder: name its files (corpora/ has readers of public corpora)")
    if source.startswith("hf:") or path.is_file() and source.endswith(".parquet"):
        return enumerate(data_set(source), 1)
    if path.is_file() and open(path, "rb").read(1) == b"[":
        try:
            return enumerate(json.loads(path.read_bytes()), 1)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source} begins like one JSON array, but is none ({error})")
    return read_jsonl(path, on_bad)


def value_at(row, path):
    """What stands under a key, or under nested keys ("meta.id"); None where nothing does."""
    for name in path.split("."):
        row = (row or {}).get(name)
    return row


def renamed(row, fields):
    """A row, or a message, with our names for its fields. fields: {our name: its path}"""
    read = {*fields, *(path.split(".")[0] for path in fields.values())}
    rest = {name: value for name, value in row.items() if name not in read}
    return rest | {ours: value for ours, path in fields.items() if (value := value_at(row, path)) is not None}


def in_our_terms(row, data):
    """A row with our names of fields and roles, without messages of roles to be ignored. data: cfg.data"""
    row, messages = renamed(row, data.fields), []
    role_of = {theirs: ours for ours, names in data.roles.items() for theirs in names}
    for message in row["messages"]:
        message = renamed(message, data.fields)
        ours = role_of.get(message["role"])
        if ours != "ignore":
            messages.append(message | {"role": ours or message["role"]})
    return row | {"messages": messages}


def rows(cfg, name="logs", on_bad=lambda place, why: None):
    """Yield (place, row in our format) for each conversation of data.NAME: logs or eval_logs.

    InputError: a file or data set cannot be read at all, or a name in data.fields stands nowhere.
    on_bad(place, why): a single line is bad.
    """
    data, missing = cfg.data, set(cfg.data.fields)
    for source in getattr(data, name):
        try:
            for n, row in raw_rows(source, lambda n, why: on_bad(f"{source}:{n}", why)):
                place = f"{source}:{n}"
                try:
                    if data.fields or data.roles or not isinstance(row, dict):
                        row = in_our_terms(row, data)
                        missing.difference_update(row, *row["messages"])
                except (AttributeError, KeyError, TypeError) as error:
                    on_bad(place, f"no object, or not as data.fields says ({error!r})")
                    continue
                yield place, row
        except InputError as error:
            raise InputError(f"data.{name}: {error}")
    for ours in missing if getattr(data, name) else ():
        raise InputError(f"data.{name}: nothing stands under data.fields.{ours}={data.fields[ours]}")


def is_held_out(session_id, data):
    """Does data.split hold a session out? A hash of its id tells: further logs move none. data: cfg.data"""
    share = int(hashlib.sha256(session_id.encode()).hexdigest()[:8], 16) / 16 ** 8
    return not data.eval_logs and share < data.split
