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
import hashlib
import random
import sys
import tempfile
from pathlib import Path

import torch

import config
import hindsight
import model as decoder
from prompts import load_prompt
from records import STOP, InputError, cli, read_json, write_json
from rollout import Sampling, generate
from toy import world

NEUTRAL = "A conversation."  # its system prompt
FEWEST = 50  # training sessions
STEPS = 1000  # of 800 tokens; fewer where so many documents do not fill them:
COPIES, DOCUMENTS = 12, 20_000  # for each session; in all
SHAPE = {**world.SHAPE, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
         "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 8192}


def documents(sessions, n, seed):
    """n documents [(role, text, weight)]: conversations drawn at random, and in every other one's place as
    many exchanges of any sessions. In the conversations the experts' words have weight 0."""
    talks = [[(m.role, m.content.replace("<|", "< |")[:600])  # <|im_end|> in a text is but a text
              for m in hindsight.utterances(session.messages)[:40]] for session in sessions]
    exchanges = [talk[i:i + 2] for talk in talks for i, (role, _) in enumerate(talk) if role == "assistant"]
    if not exchanges:
        raise InputError("no training session, or no held-out one, has an expert's message (data.split, "
                         "data.eval_logs)")
    rng, docs = random.Random(seed), []
    for i, said in enumerate(rng.choices(talks, k=n)):
        if i % 2:
            said = sum(rng.choices(exchanges, k=1 + len(said) // 2), [])
        docs.append([("system", NEUTRAL, 0), *((role, text, i % 2) for role, text in said)])
    return docs


@torch.no_grad()
def show(model, tokenizer, sessions, held_out):
    """Print the loss on documents of training sessions and of held-out ones, and a reply in one of these."""
    for kind, docs in ("training", sessions), ("held-out", held_out):
        coded = [world.encode(doc, tokenizer.encode) for doc in docs]
        print(f"{kind} sessions: loss of a token {world.next_token_loss(model, coded):.2f} nats")
    opening = held_out[0][:2]
    prompt, _ = world.encode(opening, tokenizer.encode)
    prompt += tokenizer.encode("<|im_start|>assistant\n")
    how = Sampling(max_new_tokens=40, temperature=0)
    [[reply]] = generate(model, [prompt], {tokenizer.eos_token_id}, how)
    print(f"""to {opening[1][1]!r} it replies {tokenizer.decode(reply.tokens)!r}
This shows whether the way from these logs to a policy works. It says nothing about large models.""")


def make(cfg, steps=STEPS):
    """Write the folder that model.path names. steps: how long it trains at most (fewer in tests)."""
    config.need(cfg, "model.path", "data.logs")
    parts = hindsight.sessions(cfg)
    n = len(parts[0])
    if n < FEWEST:
        raise InputError(f"{cfg.data.logs}: {n} training sessions with text; {FEWEST} are needed")
    docs = documents(parts[0], min(COPIES * n, DOCUMENTS), cfg.seed)
    shown = [documents(part, 60, 0) for part in parts]
    prompt, out = load_prompt(cfg.data.prompt), Path(cfg.model.path)
    made = out / ".made.json"  # a hidden file: an export does not carry it along
    text = f"{docs}{prompt}{cfg.seed}{steps}{SHAPE}"
    stamp = {"made from": hashlib.sha256(text.encode()).hexdigest()}
    if made.is_file() and read_json(made) == stamp:
        return print(f"{out}: already made")
    if out.exists():
        raise InputError(f"model.path={out} is another model than these logs and this seed make here: remove "
                         "it, or name another folder")
    tokenizer = world.make_tokenizer(docs[:5000] + [[("system", prompt + STOP, 0)]] * 500, 4096)
    with tempfile.TemporaryDirectory() as aside:
        tokenizer.save_pretrained(aside)
        model = world.train_base(docs, tokenizer, Path(aside), cfg.seed, steps, SHAPE)
        decoder.export(model, aside, out)
    write_json(made, stamp)
    show(model, tokenizer, *shown)


def main():
    torch.set_num_threads(1)  # matrices this small lose more to a second thread than they gain
    make(config.load(sys.argv[1:], __doc__))


if __name__ == "__main__":
    cli(main)
