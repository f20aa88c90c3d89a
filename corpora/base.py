"""A small base model that speaks the language of your logs: to try the whole way on two CPU cores.

    python -m corpora.base cfg.yaml [key=value ...]     # writes the folder that model.path names

It is a Qwen2 of about 2.4 million parameters with a tokenizer of its own, in Hugging Face format, trained
from scratch on the text of the training sessions alone. It plays the pretrained model: it knows how both
sides talk there, and nothing of the task. It learns what users say from whole conversations, so it can read
them. What experts say it learns from exchanges (an expert's message and the reply) that are torn out of any
sessions, in any order: what is asked there, but not what an expert asks next, nor when to stop. It never
sees an annotation, a held-out session, the policy's prompt or the stop marker (the tokenizer sees these two,
so that they are short). So SFT and GRPO have the task left to teach. (Learning experts' words from whole
conversations would be SFT in disguise: NOTES.md.)

It trains for a number of tokens, and for a number of passes at most: of many sessions only some are read. A
rerun with the same logs and seed returns at once. A folder that was made otherwise, or by others, is never
overwritten.
"""
import random
import sys
from pathlib import Path

import config
import hindsight
from prompts import load_prompt
from records import STOP, InputError, cli, hash_of, put_in_place, read_json, write_json
from toy import world

NEUTRAL = "A conversation."  # its system prompt
COPIES = 12  # documents for each session
MADE = ".made.json"  # a hidden file: an export does not carry it along
SHAPE = {**world.SHAPE, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
         "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 8192}


def documents(sessions, n, seed):
    """n documents [(role, text, weight)]: conversations drawn at random, and in every other one's place as
    many exchanges of any sessions. In the conversations the experts' words have weight 0."""
    talks = [[(m.role, m.content.replace("<|", "< |")[:600])  # <|im_end|> in a text is but a text
              for m in hindsight.utterances(session.messages)[:40]] for session in sessions]
    exchanges = [talk[i:i + 2] for talk in talks for i, (role, _) in enumerate(talk) if role == "assistant"]
    if not exchanges:
        raise InputError("data.logs: no training session has an expert's message (see data.roles)")
    rng = random.Random(seed)
    docs = []
    for i, said in enumerate(rng.choices(talks, k=n)):
        if i % 2:
            said = sum(rng.choices(exchanges, k=1 + len(said) // 2), [])
        docs.append([("system", NEUTRAL, 0), *((role, text, i % 2) for role, text in said)])
    return docs


def make(cfg, steps=1000):
    """Write the folder that model.path names. steps, of 800 tokens: how long it trains at most."""
    config.need(cfg, "model.path", "data.logs")
    sessions, _ = hindsight.sessions(cfg)
    docs = documents(sessions, min(COPIES * len(sessions), 20_000), cfg.seed)
    prompt = load_prompt(cfg.data.prompt)
    out = Path(cfg.model.path)
    stamp = {"made from": hash_of([docs, prompt, cfg.seed, steps, SHAPE])}
    if out.exists():
        if read_json(out / MADE, {}) != stamp:
            raise InputError(f"model.path={out} is another model than these logs and this seed make here: "
                             "remove it, or name another folder")
        return print(f"{out}: already made")
    tokenizer = world.make_tokenizer(docs[:5000] + [[("system", prompt + STOP, 0)]] * 500, 4096)
    aside = Path(f"{out}.tmp")  # while it trains; a rerun writes over what a kill left there
    world.train_base(docs, tokenizer, aside, cfg.seed, steps, SHAPE)
    write_json(aside / MADE, stamp)
    put_in_place(aside, out)
    print(f"{out}: it shows whether the way from these logs to a policy works, nothing about large models")


def main():
    make(config.load(sys.argv[1:], __doc__))


if __name__ == "__main__":
    cli(main)
