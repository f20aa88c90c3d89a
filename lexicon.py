"""The rules that hindsight (what did the user reveal?) and the rules grader (what is asked for?) share.

A lexicon is a YAML file. It holds bare yes / no answers, words that open a question, words that open a
request (which asks without a question mark: "please tell me") and generic questions. For each attribute it
says how a question asks for it and which words of a user give its value; where it belongs to some goals
alone, also to which. For each complaint it names the attributes that matter.

    lex = lexicon.load("lexicon.yaml")
    lexicon.asked("How long have you had it?", lex)            # ["duration"]
    lexicon.revealed("Any fever?", "No, but two days now", lex)  # {"duration": "two days", "fever": "no"}

Every entry is a case-insensitive regex. An entry that starts or ends with an ASCII letter or digit does not
match inside a longer ASCII word ("no" is not in "not"); other scripts need no spaces around a match. Where
matches overlap the longest wins ("no fever" beats "fever").
"""
import re
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ValidationError, model_validator

from config import EachKeyOnce, parse_yaml
from records import InputError, Slot, explain, shorten

QUESTION_MARKS = "?？﹖؟⸮\u037e՞፧⁇⁈⁉‽❓❔"
LONGEST_RESPONSE = 600  # characters; a longer one is no question to a user, whatever it holds
LONGEST_SENTENCE = 30  # words
MOST_ATTRIBUTES = 3  # in one sentence

_URL = re.compile(r"(?:https?://|www\.|(?<![\w.-])[\w-]+(?:\.[\w-]+)+/)[!-~]*[0-9A-Za-z/=&#-]")
_END = re.compile(
    rf"([{QUESTION_MARKS}]|(?<=[\u0370-\u03ff\u1f00-\u1fff]);|(?<!\be\.g)(?<!\bi\.e)(?<!\bdr)"
    rf"(?<!\bmr)(?<!\bmrs)[.!…](?=[\s.!…\"”’)]|$)|[。！｡\n])", re.I)
_GREEK = re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]{3}")  # such a text asks with a semicolon
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_NO_WORD = rf"\s{_SPACELESS}!-&(-/:-@\[-`{{-~。，、！；：…“”‘（）《》—–{QUESTION_MARKS}"
WORD = re.compile(rf"[{_SPACELESS}]|[^{_NO_WORD}]+")
_CLAUSE = re.compile(rf"[,.;:!…\n，。；：！、—–{QUESTION_MARKS}]|\s-\s")
_LEAD_IN = re.compile(
    r"(?:and|but|so|also|then|now|well|ok|okay|please)(?![A-Za-z])[\s,，:]*"
    r"|[^\s,，:：—]+(?:\s+[^\s,，:：—]+){0,5}\s*[,，:：—]\s*", re.I)
_INNER = re.compile(r"\w(?:.*\w)?", re.S)  # without the marks around it


# ------------------------------------------------------------------------------------------------------- load

def _compiled(text):
    """An entry -> its pattern."""
    if not text:
        raise ValueError("must not be empty")
    text = _straight(text)
    before = r"(?<![0-9A-Za-z_])" if re.match(r"[0-9A-Za-z]", text) else ""
    after = r"(?![0-9A-Za-z_])" if re.search(r"(?<!\\)[0-9A-Za-z]$", text) else ""
    try:
        re.compile(text)  # alone first: an unbalanced ")" must not close the group below
        return re.compile(f"{before}(?:{text}){after}", re.I)
    except Exception as error:  # re raises several kinds
        raise ValueError(f"bad regex {shorten(text)} ({error})")


Patterns = list[Annotated[str, AfterValidator(_compiled)]]


class Entry(BaseModel, extra="allow"):
    """A mapping of the file, with exactly these keys."""

    @model_validator(mode="after")
    def no_other_keys(self):
        for name in self.model_extra:
            raise ValueError(f"unknown key {shorten(name)}; it may hold {', '.join(type(self).model_fields)}")
        return self


class Attribute(Entry):
    """Something that may be asked for, such as "duration"."""
    asks: Patterns  # in a question
    values: dict[str, Patterns] = {}  # in a user's words, by value
    yes_no: Literal["true", "false"] = "false"  # does a bare yes or no answer it?
    goals: Patterns = []  # in the goal of a conversation in which it may be asked for; empty: in any

    @model_validator(mode="after")
    def has_values(self):
        if self.yes_no == "false" and "values" not in self.model_fields_set:
            raise ValueError("values is missing")
        return self


class Complaint(Entry):
    """What a conversation may be about, such as "sore throat"."""
    cues: Patterns  # in a user's words
    attributes: list[str]  # what matters to it


class Lexicon(Entry):
    """The file. Its regexes are compiled once, when it is loaded."""
    goal: Annotated[str, AfterValidator(str.strip)]  # what the expert is after
    yes: Patterns
    no: Patterns
    openers: Patterns  # empty: a question may begin with anything
    generic_questions: Patterns
    requests: Patterns = []  # a sentence that begins with one asks, also without a question mark
    attributes: dict[Slot, Attribute]
    complaints: dict[str, Complaint]

    @model_validator(mode="after")
    def consistent(self):
        for name in self.attributes:
            if ":" in name:
                raise ValueError(f"attributes.{name}: an attribute's name cannot hold a colon")
        for name, complaint in self.complaints.items():
            for attribute in complaint.attributes:
                if attribute not in self.attributes:
                    raise ValueError(
                        f"complaints.{name}.attributes: no attribute is called {shorten(attribute)}")
        return self

    __hash__ = object.__hash__

    @lru_cache
    def at(self, goal):
        """The lexicon at a goal (a text or None): without the attributes of other goals."""
        here = {name: entry for name, entry in self.attributes.items()
                if not entry.goals or find(goal or "", enumerate(entry.goals))}
        return Lexicon.model_construct(**vars(self) | {"attributes": here})

    @cached_property
    def asks(self):
        """[(attribute, pattern)]"""
        return [(name, p) for name, entry in self.attributes.items() for p in entry.asks]

    @cached_property
    def values(self):
        """[((attribute, value), pattern)]"""
        return [((name, value), p) for name, entry in self.attributes.items()
                for value, patterns in entry.values.items() for p in patterns]


class TextLoader(EachKeyOnce, yaml.BaseLoader):
    """Reads every scalar as a text: YAML 1.1 would read the keys `yes` and `on` as True."""


def load(path):
    """Read a lexicon YAML -> Lexicon. InputError names the file and the key."""
    try:
        return Lexicon.model_validate(
            parse_yaml(Path(path).read_text("utf-8"), TextLoader, f"lexicon {path}"))
    except ValidationError as error:
        raise InputError(f"lexicon {path}: {explain(error).strip()}")
    except (OSError, ValueError) as error:
        raise InputError(f"lexicon {path} cannot be read ({error})")


# ----------------------------------------------------------------------------------------------- text helpers

def _straight(text):
    """With straight apostrophes."""
    return text.replace("’", "'")


def find(text, patterns):
    """Matches of (label, pattern) pairs -> [(start, end, label)] in text order.

    Of overlapping matches the longest stays. Of equally long ones it is the first in the text, then the first
    in `patterns`.
    """
    text = _straight(text)
    hits = []
    for label, pattern in patterns:
        hits += [(*match.span(), label) for match in pattern.finditer(text) if match.group()]
    taken = bytearray(len(text))
    kept = []
    for start, end, label in sorted(hits, key=lambda hit: (hit[0] - hit[1], hit[0])):
        if not any(taken[start:end]):
            taken[start:end] = b"\1" * (end - start)
            kept.append((start, end, label))
    return sorted(kept)


def words(text):
    """Lower-case words; a character of a script written without spaces counts as one.

    >>> words("I've a fever, 发烧!")
    ["i've", 'a', 'fever', '发', '烧']
    """
    return WORD.findall(_straight(text.lower()))


def sentences(text, lex=None):
    """Cut at sentence ends and line breaks -> [(sentence, does it end in a question mark of any script?)].

    A run of marks ends one sentence; pieces without a letter or digit are none. With a lexicon, a sentence
    that begins with one of its requests counts as if it ended in a question mark.

    >>> sentences("I see. How long?! 多久了？？ Over 38.5, e.g. at night")
    [('I see', False), ('How long', True), ('多久了', True), ('Over 38.5, e.g. at night', False)]
    >>> sentences("Πόσο καιρό; Look: https://a.org/?q=1.")  # Greek asks with a semicolon, a link asks nothing
    [('Πόσο καιρό', True), ('Look:', False)]
    """
    text = _URL.sub("", text)
    if _GREEK.search(text):
        text = text.replace(";", "\u037e")
    pieces = [*_END.split(text), "."]
    requests = lex and lex.requests
    return [(piece.strip(), end in QUESTION_MARKS + ";" or bool(requests) and _opens(piece, requests, lex))
            for piece, end in zip(pieces[::2], pieces[1::2]) if any(map(str.isalnum, piece))]


def questions(text, lex=None):
    """How many questions a text holds, by question marks ("??" and "?!" are one) and a lexicon's requests.

    >>> [questions(t) for t in ("How long?? Fever?!", "Tell me.", "؟", "多久了？")]
    [2, 0, 0, 1]
    """
    return sum(is_question for _, is_question in sentences(text, lex))


_COURTESY = re.compile(  # a whole sentence
    r"(?:[\w']+,? )?(?:(?:is there|do you (?:have|need)|would you like|can i (?:do|get)) )?(?:any|some)thing "
    r"(?:(?:else|more)(?: (?:that )?(?:i|we|you)\b[^,]*)?|(?:that )?(?:i|we) can\b[^,]*)"
    r"|(?:do you have )?any (?:other|more|further) questions?\b[^,]*|(?:can|may) i help you\b[^,]*"
    r"|(?:is that |that's )?(?:ok|okay|all ?right|clear)|这?样?(?:好|可以|明白|清楚)了?[吗么]"
    r"|(?:请问)?[您你]?还有(?:什么|其[他它]|别的)?(?:的|问题|疑问|需要)*[吗么]?", re.I)


def expects_answer(text):
    """Does a text ask for something, courtesies apart?

    >>> [expects_answer(t) for t in ("Anything else? Take care!", "How long? OK? Please reply.")]
    [False, True]
    """
    return any(is_question and not _COURTESY.fullmatch(sentence) for sentence, is_question in sentences(text))


# ----------------------------------------------------------------------------------- what a question asks for

def asked(text, lex, strict=True):
    """Attributes a text asks for, in order, each once.

    strict (for responses to be graded): [] unless every sentence that holds a cue is a well-formed question.
    Not strict (for what an expert wrote): every cue in a sentence that asks (see sentences) counts.
    """
    if strict and not _tidy(text):
        return []
    found = []
    for sentence, is_question in sentences(text, lex):
        cues = find(sentence, lex.asks) if strict or is_question else []
        if strict and cues and not (is_question and _well_formed(sentence, lex)):
            return []
        found += [attribute for _, _, attribute in cues]
    return list(dict.fromkeys(found))


def asks_generic(text, lex):
    """Is this a well-formed question for nothing in particular ("Anything else?"), without a cue anywhere?"""
    pieces = sentences(text, lex)
    without_cue = not any(find(sentence, lex.asks) for sentence, _ in pieces)
    return without_cue and _tidy(text) and any(
        is_question and find(s, enumerate(lex.generic_questions)) and _well_formed(s, lex)
        for s, is_question in pieces)


def _tidy(text):
    """Is a text short enough to be a response, and is no sentence said twice?"""
    return len(text) <= LONGEST_RESPONSE and not _repeats([tuple(words(s)) for s, _ in sentences(text)])


def _well_formed(sentence, lex):
    """Does a sentence (known to ask) read like a question rather than like keywords?

    It has 2 to 30 words, an opener or a request first, no stammering and at most three attributes. Where it
    holds several cues it has at least as many other words ("Do you have a fever or a cough", not "how long,
    fever").
    """
    tokens = words(sentence)
    cues = find(sentence, lex.asks)
    if not 2 <= len(tokens) <= LONGEST_SENTENCE or len({name for _, _, name in cues}) > MOST_ATTRIBUTES:
        return False
    others = len(tokens) - sum(len(words(sentence[start:end])) for start, end, _ in cues)
    if len(cues) > 1 and others < len(cues):
        return False
    first = lex.openers and lex.openers + lex.generic_questions + lex.requests
    return not _stammers(tokens) and _opens(sentence, first, lex)


def _stammers(tokens):
    """Is a word or two said twice in a row, or are three words repeated (without spaces: six characters)?"""
    for n in (1, 2):
        if any(run[:n] == run[n:] and _spaced(run[0]) for run in _runs(tokens, 2 * n)):
            return True
    three = [run for run in _runs(tokens, 3) if all(map(_spaced, run))]
    return _repeats(three) or _repeats(_runs(tokens, 6))


def _spaced(token):
    """Is it a word of a script written with spaces?"""
    return not re.match(f"[{_SPACELESS}]", token)


def _runs(tokens, n):
    """All n tokens in a row."""
    return [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]


def _repeats(items):
    return len(set(items)) < len(items)


def _opens(sentence, patterns, lex):
    """Does it begin with one of the patterns (if any), after at most two short lead-ins free of cues?"""
    text = _straight(sentence.lstrip(" \t\"'“‘(¿-*"))
    for _ in range(3):
        if not patterns or any(p.match(text) for p in patterns):
            return True
        lead = _LEAD_IN.match(text)
        if not lead or find(lead.group(), lex.asks):
            return False
        text = text[lead.end():]
    return False


# ---------------------------------------------------------------------------------------- what a user reveals

def complaint_of(text, lex):
    """The complaint first named in a text, or None."""
    hits = find(text, [(name, p) for name, entry in lex.complaints.items() for p in entry.cues])
    return hits[0][2] if hits else None


def complaint_in(turn, lex):
    """The complaint a conversation is about: the first that its user names, or None."""
    return next(filter(None, (complaint_of(m.content, lex) for m in turn.context if m.role == "user")), None)


def revealed(question, answer, lex):
    """{attribute: value} that a user's answer reveals, given the assistant's utterance before it (or None).

    Values are found anywhere in the answer; a correction wins over what it corrects. A clause that is nothing
    but a yes or no answers the yes_no attributes just asked for and not answered otherwise. If there are as
    many such clauses as attributes, each answers one. Else they answer all alike, or none if they disagree.
    """
    before = asked(question or "", lex, strict=False)
    just_asked_first = sorted(lex.values, key=lambda entry: entry[0][0] not in before)
    found = dict(label for _, _, label in find(answer, just_asked_first))
    unanswered = [a for a in before if lex.attributes[a].yes_no == "true" and a not in found]
    bare = [value for clause in _CLAUSE.split(_straight(answer)) if (value := _yes_or_no(clause, lex))]
    if len(bare) == len(unanswered):
        found.update(zip(unanswered, bare))
    elif len(set(bare)) == 1:
        found.update(dict.fromkeys(unanswered, bare[0]))
    return found


def _yes_or_no(clause, lex):
    forms = clause.strip(), *_INNER.findall(clause)
    for value, patterns in (("yes", lex.yes), ("no", lex.no)):
        if any(p.fullmatch(form) for p in patterns for form in forms):
            return value
    return None


def facts(messages, lex):
    """Messages of an alternating conversation -> yield for each the {attribute: value} that it reveals."""
    question = None
    for m in messages:
        yield revealed(question, m.content, lex) if m.role == "user" else {}
        question = m.content if m.role == "assistant" else None
