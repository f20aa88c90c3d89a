"""Schema-Guided Dialogue -> a log: python -m corpora.sgd FOLDER out.jsonl

FOLDER is a clone of google-research-datasets/dstc8-schema-guided-dialogue, or its train/, dev/ or test/.
Dialogue ids recur across splits, so a session_id is SPLIT-ID. The system's REQUEST acts become `asks`.
The user's INFORM acts become `learned`: what the user says, and not what the state takes over when the
user accepts an offer or moves on to another service. A slot is named "restaurants city": its service's
domain, its name. The corpus does not say which sessions failed: NOTIFY_FAILURE tells of one request.
"""
from corpora.common import convert, load, message
from records import cli


def session(path, dialogue, schema, found):
    """A dialogue in frames, as SGD and MultiWOZ have it -> a session of a log.

    found(turn, the turn before) -> {slot: ways to say its value}: what the user says, or the system asks for.
    """
    known, messages, before = {}, [], None
    for turn in dialogue["turns"]:
        text, slots = turn["utterance"], found(turn, before)
        if turn["speaker"] == "SYSTEM":
            messages.append(message(text, asks=[*slots]))
        else:
            messages.append(message(text, learned={
                slot: max(ways, key=text.lower().count) for slot, ways in slots.items()
                if not {*ways} & {*known.get(slot, ())}}))
            known.update(slots)
        before = turn
    about = [service["description"] for service in schema if service["service_name"] in dialogue["services"]]
    return {"session_id": f"{path.parent.name}-{dialogue['dialogue_id']}",
            "goal": f"Find out what is needed for: {'; '.join(about)}",
            "task": ", ".join(dialogue["services"]), "messages": messages}


def found(turn, _):
    """What a turn's acts say or ask for, {slot: ways to say its value}."""
    wanted = {"USER": "INFORM", "SYSTEM": "REQUEST"}[turn["speaker"]]
    return {f"{frame['service'].split('_')[0]} {act['slot']}".lower(): act["values"]
            for frame in turn["frames"] for act in frame["actions"] if act["act"] == wanted}


def read(path, dialogues):
    """Yield the sessions of a file of dialogues."""
    schema = load(path.with_name("schema.json"))
    for dialogue in dialogues:
        yield session(path, dialogue, schema, found)


def main():
    convert("sgd", read)


if __name__ == "__main__":
    cli(main)
