"""Schema-Guided Dialogue -> a log: python -m corpora.sgd FOLDER out.jsonl

FOLDER is a clone of google-research-datasets/dstc8-schema-guided-dialogue, or its train/, dev/ or test/.
Dialogue ids recur across splits, so a session_id is SPLIT-ID. The system's REQUEST acts become `asks`.
The user's INFORM acts become `learned`: what the user says, and not what the state takes over when the
user accepts an offer or moves on to another service. A slot is named "Restaurants city": its service's
domain, its name. The goal names the services. The corpus does not say which sessions failed:
NOTIFY_FAILURE tells of one request.
"""
from corpora.common import convert
from records import cli


def read(path, dialogues):
    """Yield the sessions of a file of dialogues."""
    for dialogue in dialogues:
        messages = []
        for turn in dialogue["turns"]:
            user = turn["speaker"] == "USER"
            slots = {f"{frame['service'].split('_')[0]} {action['slot']}": action["values"]
                     for frame in turn["frames"] for action in frame["actions"]
                     if action["act"] == ("INFORM" if user else "REQUEST")}
            notes = {"role": "user", "learned": slots} if user else {"role": "assistant", "asks": [*slots]}
            messages.append(notes | {"content": turn["utterance"]})
        yield {"session_id": f"{path.parent.name}-{dialogue['dialogue_id']}", "messages": messages,
               "goal": f"Find out what is needed for: {', '.join(dialogue['services'])}"}


def main():
    convert("sgd", read)


if __name__ == "__main__":
    cli(main)
