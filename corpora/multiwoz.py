"""MultiWOZ 2.2 -> a log: python -m corpora.multiwoz FOLDER out.jsonl

FOLDER is data/MultiWOZ_2.2 of a clone of budzianowski/multiwoz, or its train/, dev/ or test/; schema.json
and dialog_acts.json lie beside these. A session_id is SPLIT-ID. The system's Request acts become `asks`.
What the user's state gains or changes becomes `learned` at that message. Free values (names, times) count
only where the corpus marks them in the message, as its words or as copied from another slot: all others
the system offered and the user accepted. A slot is named "hotel area". Booking acts do not tell their
service: it is the active one that has the slot. The corpus does not say which sessions failed. The goals
in data.json of MultiWOZ 2.1 are the user's and hold all values, so they are not for the expert.
"""
from corpora.common import convert, load
from corpora.sgd import session
from records import cli


def read(path, dialogues):
    """Yield the sessions of a file of dialogues."""
    schema, acts = (load(path.parent.with_name(name)) for name in ("schema.json", "dialog_acts.json"))
    closed = {slot["name"]: slot["is_categorical"] for service in schema for slot in service["slots"]}

    def found(turn, before):
        """What a user's turn says or a system's asks for, {slot: ways to say its value}."""
        if turn["speaker"] == "USER":
            marked = {span["slot"] for frame in turn["frames"] for span in frame["slots"]}
            return {slot.replace("-", " "): ways for frame in turn["frames"]
                    for slot, ways in frame["state"]["slot_values"].items()
                    if closed.get(slot) or "dontcare" in ways or slot in marked}
        active = [frame["service"] for frame in before["frames"] if frame["state"]["active_intent"] != "NONE"]
        told = acts.get(dialogue["dialogue_id"], {}).get(turn["turn_id"], {"dialog_act": {}})["dialog_act"]
        names = [f"{service}-{slot}".lower() for act, pairs in told.items() if "Request" in act
                 for slot, _ in pairs for service in (act.split("-")[0], *active)]
        return {name.replace("-", " "): () for name in names if name in closed}

    for dialogue in dialogues:
        yield session(path, dialogue, schema, found)


def main():
    convert("multiwoz", read)


if __name__ == "__main__":
    cli(main)
