"""What the readers of public corpora share: finding and reading the files, refusing them, writing the log."""
import json
import os
import sys
from pathlib import Path

from records import InputError, write_jsonl


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
    folder, out = sys.argv[1:]
    rows = []
    for path in sorted(Path(os.path.realpath(folder)).rglob("*[0-9].json")):
        try:
            rows += map(cut, read(path, json.loads(path.read_bytes())))
        except Exception as error:  # no JSON, a key that is missing, a list where an object should be, ...
            raise InputError(f"{path} is not as {corpus} was published ({type(error).__name__}: {error}): "
                             "get it again (a git LFS pointer needs git lfs pull), or use its own reader")
    used = [row for row in rows if row["messages"]]
    if not used:
        raise InputError(f"{folder}: none of {len(rows)} sessions asks or reveals anything: is it {corpus}? "
                         "Name its folder of dialogues (such as 1.json)")
    write_jsonl(out, used)
    print(f"{out}: {len(used)} sessions; left out: {len(rows) - len(used)} that ask and reveal nothing")
