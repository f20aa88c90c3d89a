"""What the readers of public corpora share: finding, checking and reading the files, writing the log."""
import json
import sys
from pathlib import Path

from tqdm import tqdm

from records import InputError, write_jsonl


def load(path):
    """A JSON file -> its content. InputError: it is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no JSON ({error}): get it again; a git LFS pointer needs git lfs pull")


def cut(session):
    """Take out what follows the message after the last that asks or reveals something -> the session.

    >>> cut({"messages": [{"content": "Hi"}, {"learned": {"day": 5}}, {"asks": []}, {"learned": {}}]})
    {'messages': [{'content': 'Hi'}, {'learned': {'day': 5}}, {'asks': []}]}
    """
    messages = session["messages"]
    while messages and not any(said.get("asks") or said.get("learned") for said in messages[-2:]):
        messages.pop()
    return session


def convert(corpus, read):
    """The command line of a reader. read(path, content of the file) yields sessions."""
    if len(sys.argv) != 3:
        raise InputError(f"usage: python -m corpora.{corpus} FOLDER out.jsonl")
    folder, out = map(Path, sys.argv[1:])
    paths = sorted(folder.resolve().rglob("*[0-9].json"))
    if not paths:
        raise InputError(f"{folder} is no folder with dialogues (such as 1.json): name that of the corpus")
    rows = []
    for path in tqdm(paths, unit=" files", disable=None):
        try:
            rows += map(cut, read(path, load(path)))
        except InputError:
            raise
        except Exception as error:  # a key that is missing, a list where an object should be, ...
            raise InputError(f"{path} is not as {corpus} was published ({error!r}): get it again, "
                             "or use the reader of its corpus")
    used = [row for row in rows if row["messages"]]
    if not used:
        raise InputError(f"{folder}: none of {len(rows)} sessions asks or reveals anything: is it {corpus}?")
    write_jsonl(out, used)
    print(f"{out}: {len(used)} sessions; left out: {len(rows) - len(used)} that ask and reveal nothing")
