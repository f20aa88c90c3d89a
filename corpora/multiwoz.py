"""MultiWOZ 2.2 -> a log: python -m corpora.multiwoz FOLDER out.jsonl

FOLDER is data/MultiWOZ_2.2 of a clone of budzianowski/multiwoz, or its train/, dev/ or test/;
dialog_acts.json lies beside these. A session_id is SPLIT-ID. The system's Request acts become `asks`. The
user's Inform acts become `learned`: what the user says, and not what the state takes over when the user
accepts an offer. A slot is named "Hotel area". Booking acts do not tell their service: it is the one that
was spoken of last. The goal names the services. The corpus does not say which sessions failed. The goals in
data.json of MultiWOZ 2.1 are the user's and hold all values, so they are not for the expert.
"""
from corpora import sgd
from corpora.common import convert
from records import cli, read_json


def read(path, dialogues):
    """Yield the sessions of a file of dialogues. The acts are put where those of sgd.py stand."""
    told = read_json(path.parent.with_name("dialog_acts.json"))
    for dialogue in dialogues:
        service = ""
        for turn in dialogue["turns"]:
            frames = turn["frames"] = []
            for name, pairs in told[dialogue["dialogue_id"]][turn["turn_id"]]["dialog_act"].items():
                domain, act = name.split("-")
                if domain not in ("Booking", "general"):
                    service = domain
                frames.append({"service": service, "actions": [
                    {"act": act.upper(), "slot": slot, "values": value}
                    for slot, value in pairs if slot != "none"]})
    return sgd.read(path, dialogues)


def main():
    convert("multiwoz", read)


if __name__ == "__main__":
    cli(main)
