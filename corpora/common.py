"""What the readers of public corpora share: finding and checking the files, writing the log, the counts."""
import json
import re
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from records import InputError, write_jsonl

# A text that only the dialogues of a corpus hold, and those of the corpora above it
MARKS = {"star": '"Events"', "multiwoz": '"turn_id"', "sgd": '"dialogue_id"'}


def load(path, corpus=None):
    """A JSON file -> its content. InputError: it is missing or broken, or holds another corpus."""
    try:
        text = path.read_text("utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no JSON ({error}): get it again as published; if it begins with "
                         "'version https://git-lfs' it is a git LFS pointer: run git lfs pull")
    looks = next((name for name, mark in MARKS.items() if mark in text), corpus)
    if looks != corpus:
        raise InputError(f"{path}: these files look like {looks}: python -m corpora.{looks}")
    return content


def message(text, **notes):
    """A message of a log: the user's, where `learned` is given, else the assistant's."""
    return {"role": "user" if "learned" in notes else "assistant", "content": text, **notes}


def end(messages):
    """How many messages there are up to what the assistant says once all is asked and revealed.

    >>> said = [message("Hi", learned={}), message("When?", asks=["day"]), message("5", learned={"day": 5})]
    >>> end([*said, message("Booked."), message("Thanks", learned={}), message("Bye.")]), end(said[:1])
    (4, 0)
    """
    marks = (m["role"][0].upper() if m.get("asks") or m.get("learned") else m["role"][0] for m in messages)
    return re.match(".*(U|Aa*)u*a*|", "".join(marks)).end()


def rows(paths, corpus, read, n):
    """Yield the sessions of the files. n: a Counter, filled with what they hold."""
    for path in tqdm(paths, unit=" files", disable=None):
        try:
            for row in read(path, load(path, corpus)):
                del row["messages"][end(row["messages"]):]
                n.update(key for said in row["messages"] for key in said if said[key])
                n["sessions" if row["messages"] else "empty"] += 1
                if row["messages"]:
                    n["failed"] += row.get("success") is False
                    yield row
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not as {corpus} was published ({error!r}): get it again")


def convert(corpus, read):
    """The command line of a reader. read(path, content of the file) yields sessions."""
    if len(sys.argv) != 3:
        raise InputError(f"usage: python -m corpora.{corpus} FOLDER out.jsonl")
    folder, out = map(Path, sys.argv[1:])
    paths = sorted(folder.resolve().rglob("*[0-9].json"))
    if not paths:
        raise InputError(f"{folder}: no such folder, or no dialogues in it (dialogues_001.json, 1.json): "
                         "name the folder of the corpus as published, or its folder of dialogues")
    if out.is_dir():
        raise InputError(f"{out} is a folder: name a file, such as {out / corpus}.jsonl")
    n = Counter()
    write_jsonl(out, rows(paths, corpus, read, n))
    print(f"{out}: {n['sessions']} sessions ({n['failed']} with success: false), {n['role']} messages, "
          f"{n['learned']} user messages with learned, {n['asks']} assistant messages with asks; "
          f"set aside: {n['empty']} sessions in which nothing is asked or revealed")
