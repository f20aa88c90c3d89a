"""MultiWOZ 2.2 -> a log: python -m corpora.multiwoz FOLDER out.jsonl"""
from corpora.common import convert, load
from corpora.sgd import session
from records import cli


def read(path, dialogues):
    """Yield the sessions of a file of dialogues."""
    schema, acts = (load(path.parent.with_name(name)) for name in ("schema.json", "dialog_acts.json"))
    closed = {slot["name"]: slot["is_categorical"] for service in schema for slot in service["slots"]}

    def found(turn, before):
        if turn["speaker"] == "USER":
            return {slot.replace("-", " "): ways for frame in turn["frames"]
                    for slot, ways in frame["state"]["slot_values"].items()
                    if closed[slot] or "dontcare" in ways or any(span["slot"] == slot for span in frame["slots"])}
        active = [frame["service"] for frame in before["frames"] if frame["state"]["active_intent"] != "NONE"]
        told = acts[dialogue["dialogue_id"]].get(turn["turn_id"], {"dialog_act": {}})["dialog_act"]
        names = [f"{service}-{slot}".lower() for act, pairs in told.items() if "Request" in act
                 for slot, _ in pairs for service in (act.split("-")[0], *active)]
        return {name.replace("-", " "): () for name in names if name in closed}

    for dialogue in dialogues:
        yield session(path, dialogue, schema, found)


def main():
    convert("multiwoz", read)


if __name__ == "__main__":
    cli(main)
