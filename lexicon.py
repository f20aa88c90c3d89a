"""The rules both hindsight (what did the user reveal?) and the rules grader (what does this question ask for?) read.

A lexicon is a YAML file: bare yes / no answers, words that open a question, generic questions, and for each attribute
how a question asks for it and how a user's words give its value; complaints name the attributes that matter to them.

    lex = lexicon.load("lexicon.yaml")
    lexicon.asked("How long have you had it?", lex)            # ["duration"]
    lexicon.revealed("Any fever?", "No, but two days now", lex)  # {"duration": "two days", "fever": "no"}

Every entry is a case-insensitive regex. An entry that starts or ends with an ASCII letter or digit does not match
inside a longer ASCII word ("no" is not in "not"); other scripts need no spaces around a match. Where matches overlap
the longest wins ("no fever" beats "fever").
"""
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from data import InputError

QUESTION_MARKS = "?？﹖؟⸮\u037e՞፧⁇⁈⁉‽❓❔"
KEYS = ("goal", "yes", "no", "openers", "generic_questions", "attributes", "complaints")
LONGEST_ANSWER = 600  # characters; a longer one is no question to a user, whatever it holds
LONGEST_SENTENCE, MOST_ATTRIBUTES = 30, 3

_END = re.compile(rf"([{QUESTION_MARKS}]|(?<!\be\.g)(?<!\bi\.e)(?<!\bdr)(?<!\bmr)(?<!\bmrs)"
                  rf"[.!…](?=[\s.!…\"”’)]|$)|[。！｡\n])", re.I)
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_NO_WORD = rf"\s{_SPACELESS}!-&(-/:-@\[-`{{-~。，、！；：…“”‘（）《》—–{QUESTION_MARKS}"
_WORD = re.compile(rf"[{_SPACELESS}]|[^{_NO_WORD}]+")
_CLAUSE = re.compile(rf"[,.;:!…\n，。；：！、—–{QUESTION_MARKS}]|\s-\s")
_LEAD_IN = re.compile(r"(?:and|but|so|also|then|now|well|ok|okay|please)(?![A-Za-z])[\s,，:]*"
                      r"|[^\s,，:：—]+(?:\s+[^\s,，:：—]+){0,5}\s*[,，:：—]\s*", re.I)
_EDGE = re.compile(r"^[^\w]+|[^\w]+$")


@dataclass(frozen=True)
class Lexicon:
    goal: str
    yes: tuple         # of compiled patterns
    no: tuple
    openers: tuple     # empty: a question may begin with anything
    generic: tuple
    asks: tuple        # of (attribute, pattern)
    values: tuple      # of ((attribute, value), pattern)
    yes_no: frozenset  # attributes that a bare yes or no answers
    complaints: dict   # name -> attributes that matter to it
    cues: tuple        # of (complaint, pattern)


# ------------------------------------------------------------------------------------------------------------ load

def load(path):
    """Read and check a lexicon YAML; every regex is compiled here, once."""
    try:  # BaseLoader keeps every scalar a string: YAML 1.1 would read the key `yes` as True and `on` likewise
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"lexicon {path} cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"lexicon {path}: not valid YAML: {' '.join(str(error).split())}") from None
    tree = _mapping(path, "the file", tree, required=KEYS, allowed=KEYS)
    if not isinstance(tree["goal"], str):
        raise InputError(f"lexicon {path}: goal must be a text")
    attributes = _mapping(path, "attributes", tree["attributes"])
    asks, values, yes_no = [], [], set()
    for name, entry in attributes.items():
        key = f"attributes.{name}"
        if ":" in name:
            raise InputError(f"lexicon {path}: {key}: an attribute's name cannot hold a colon")
        entry = _mapping(path, key, entry, required=("asks",), allowed=("asks", "values", "yes_no"))
        flag = entry.get("yes_no", "false")
        if flag not in ("true", "false"):
            raise InputError(f"lexicon {path}: {key}.yes_no must be true or false, not {flag!r}")
        if flag == "true":
            yes_no.add(name)
        elif "values" not in entry:
            raise InputError(f"lexicon {path}: {key}: missing key 'values'")
        asks += [(name, p) for p in _patterns(path, f"{key}.asks", entry["asks"])]
        for value, given in _mapping(path, f"{key}.values", entry.get("values", {})).items():
            values += [((name, value), p) for p in _patterns(path, f"{key}.values.{value}", given)]
    complaints, cues = {}, []
    for name, entry in _mapping(path, "complaints", tree["complaints"]).items():
        key = f"complaints.{name}"
        entry = _mapping(path, key, entry, required=("cues", "attributes"), allowed=("cues", "attributes"))
        cues += [(name, p) for p in _patterns(path, f"{key}.cues", entry["cues"])]
        _strings(path, f"{key}.attributes", entry["attributes"])
        for attribute in entry["attributes"]:
            if attribute not in attributes:
                raise InputError(f"lexicon {path}: {key}.attributes: no attribute is called {attribute!r}")
        complaints[name] = tuple(entry["attributes"])
    yes, no, openers, generic = (_patterns(path, k, tree[k]) for k in ("yes", "no", "openers", "generic_questions"))
    return Lexicon(tree["goal"].strip(), yes, no, openers, generic, tuple(asks), tuple(values), frozenset(yes_no),
                   complaints, tuple(cues))


def _mapping(path, key, value, required=(), allowed=None):
    if not isinstance(value, dict):
        raise InputError(f"lexicon {path}: {key} must be a mapping")
    for name in required:
        if name not in value:
            raise InputError(f"lexicon {path}: {key}: missing key {name!r}")
    for name in value:
        if not isinstance(name, str) or (allowed is not None and name not in allowed):
            raise InputError(f"lexicon {path}: {key}: unknown key {name!r}"
                             + (f"; it may hold {', '.join(allowed)}" if allowed else ""))
    return value


def _strings(path, key, value):
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise InputError(f"lexicon {path}: {key} must be a list of non-empty texts")


def _patterns(path, key, texts):
    _strings(path, key, texts)
    out = []
    for text in texts:
        text = text.replace("’", "'")
        before = r"(?<![0-9A-Za-z_])" if re.match(r"[0-9A-Za-z]", text) else ""
        after = r"(?![0-9A-Za-z_])" if re.search(r"(?<!\\)[0-9A-Za-z]$", text) else ""
        try:
            re.compile(text)  # alone first: an unbalanced ")" must not close the group below
            out.append(re.compile(f"{before}(?:{text}){after}", re.I))
        except re.error as error:
            raise InputError(f"lexicon {path}: {key}: bad regex {text!r} ({error})") from None
    return tuple(out)


# ----------------------------------------------------------------------------------------------------- text helpers

def find(text, patterns):
    """Matches of (label, pattern) pairs -> [(label, start, end)] in text order; of overlapping ones the longest
    (of equally long ones the first in the text, then the first in `patterns`) stays."""
    text = text.replace("’", "'")
    hits = [(label, *m.span()) for label, p in patterns for m in p.finditer(text) if m.group()]
    taken, kept = bytearray(len(text)), []
    for label, start, end in sorted(hits, key=lambda h: (h[1] - h[2], h[1])):
        if not any(taken[start:end]):
            taken[start:end] = b"\1" * (end - start)
            kept.append((label, start, end))
    return sorted(kept, key=lambda h: h[1])


def words(text):
    """Lower-case words; a character of a script written without spaces counts as one.

    >>> words("I've a fever, 发烧!")
    ["i've", 'a', 'fever', '发', '烧']
    """
    return _WORD.findall(text.lower().replace("’", "'"))


def sentences(text):
    """Cut at sentence ends and line breaks -> [(sentence, does it end in a question mark of any script?)].

    A run of marks ends one sentence; pieces without a letter or digit are none.

    >>> sentences("I see. How long?! 多久了？？ Over 38.5, e.g. at night")
    [('I see', False), ('How long', True), ('多久了', True), ('Over 38.5, e.g. at night', False)]
    """
    pieces = _END.split(text) + [""]
    return [(piece.strip(), bool(end) and end in QUESTION_MARKS) for piece, end in zip(pieces[::2], pieces[1::2])
            if any(c.isalnum() for c in piece)]


def questions(text):
    """How many questions a text holds, by question marks ("??" and "?!" are one).

    >>> [questions(t) for t in ("How long?? Fever?!", "Tell me.", "؟", "多久了？")]
    [2, 0, 0, 1]
    """
    return sum(is_question for _, is_question in sentences(text))


# ------------------------------------------------------------------------------------- what a question asks for

def asked(text, lex, strict=True):
    """Attributes a text asks for, in order, each once.

    strict (for candidates to be graded): [] unless every sentence that holds a cue is a well-formed question.
    Not strict (for what an expert wrote in a log): every cue in a sentence that ends in a question mark counts.
    """
    if strict and not _tidy(text):
        return []
    found = []
    for sentence, is_question in sentences(text):
        cues = find(sentence, lex.asks) if strict or is_question else []
        if strict and cues and not (is_question and _well_formed(sentence, lex)):
            return []
        found += [attribute for attribute, _, _ in cues if is_question]
    return list(dict.fromkeys(found))


def asks_generic(text, lex):
    """Is this a well-formed question for nothing in particular ("Anything else?"), without a cue anywhere?"""
    generic = [(None, p) for p in lex.generic]
    return _tidy(text) and not any(find(s, lex.asks) for s, _ in sentences(text)) and any(
        is_question and find(s, generic) and _well_formed(s, lex) for s, is_question in sentences(text))


def _tidy(text):
    """Short enough to be an answer, and no sentence said twice."""
    said = [tuple(words(s)) for s, _ in sentences(text)] if len(text) <= LONGEST_ANSWER else [0, 0]
    return len(set(said)) == len(said)


def _well_formed(sentence, lex):
    """Does a sentence (known to end in a question mark) read like a question rather than like keywords?

    2 to 30 words, an opener first, no stammering, at most three attributes, and where it holds several cues at least
    as many other words ("Do you have a fever or a cough", not "how long, fever").
    """
    tokens, cues = words(sentence), find(sentence, lex.asks)
    if not 2 <= len(tokens) <= LONGEST_SENTENCE or len({a for a, _, _ in cues}) > MOST_ATTRIBUTES:
        return False
    cut = list(sentence)
    for _, start, end in cues:
        cut[start:end] = " " * (end - start)
    bare = len(cues) > 1 and len(words("".join(cut))) < len(cues)
    return not bare and not _stammers(tokens) and _opens(sentence, lex)


def _stammers(tokens):
    """A word or two said twice in a row, or three words (six characters where there are no spaces) repeated."""
    spaced = [not re.match(f"[{_SPACELESS}]", t) for t in tokens]
    if any(tokens[i:i + n] == tokens[i + n:i + 2 * n] and spaced[i] for n in (1, 2) for i in range(len(tokens) - n)):
        return True
    three = [tuple(tokens[i:i + 3]) for i in range(len(tokens) - 2) if all(spaced[i:i + 3])]
    six = [tuple(tokens[i:i + 6]) for i in range(len(tokens) - 5)]
    return len(set(three)) < len(three) or len(set(six)) < len(six)


def _opens(sentence, lex):
    """Does it begin with an opener or a generic question, after at most two short lead-ins free of cues?"""
    text = sentence.lstrip(" \t\"'“‘(¿-*").replace("’", "'")
    for _ in range(3):
        if not lex.openers or any(p.match(text) for p in lex.openers + lex.generic):
            return True
        lead = _LEAD_IN.match(text)
        if not lead or find(lead.group(), lex.asks):
            return False
        text = text[lead.end():]
    return False


# -------------------------------------------------------------------------------------------- what a user reveals

def complaint_of(text, lex):
    """The complaint first named in a text, or None."""
    hits = find(text, lex.cues)
    return hits[0][0] if hits else None


def revealed(question, answer, lex):
    """{attribute: value} that a user's answer reveals, given the assistant's utterance before it (or None).

    Values are found anywhere in the answer; a correction wins over what it corrects. A clause that is nothing but a
    yes or no answers the yes_no attributes just asked for and not answered otherwise: one each if there are as many
    answers as attributes, else all of them alike; answers that disagree bind to none.
    """
    before = asked(question, lex, strict=False) if question else []
    found = {}
    for (attribute, value), _, _ in find(answer, sorted(lex.values, key=lambda v: v[0][0] not in before)):
        found[attribute] = value
    unanswered = [a for a in before if a in lex.yes_no and a not in found]
    bare = [b for b in (_yes_or_no(clause, lex) for clause in _CLAUSE.split(answer)) if b]
    if len(bare) == len(unanswered):
        found.update(zip(unanswered, bare))
    elif len(set(bare)) == 1:
        found.update(dict.fromkeys(unanswered, bare[0]))
    return found


def _yes_or_no(clause, lex):
    forms = {clause.strip().replace("’", "'"), _EDGE.sub("", clause).replace("’", "'")}
    for value, patterns in (("yes", lex.yes), ("no", lex.no)):
        if any(p.fullmatch(form) for p in patterns for form in forms):
            return value
    return None


def facts(messages, lex):
    """For each message of an alternating conversation: {attribute: value} it reveals ({} for the assistant's)."""
    before = [None] + [m["content"] if m["role"] == "assistant" else None for m in messages]
    return [revealed(b, m["content"], lex) if m["role"] == "user" else {} for b, m in zip(before, messages)]
