"""A small base model that speaks the language of your logs: to try the whole way on two CPU cores.

    python -m corpora.base cfg.yaml [key=value ...]     # writes the folder that model.path names

It is a Qwen2 of about 2.4 million parameters with a tokenizer of its own, in Hugging Face format, trained
from scratch on the text of the training sessions alone. It plays the pretrained model: it knows how both
sides talk there, and nothing of the task. It learns what users say from whole conversations, so it can read
them. What experts say it learns from exchanges (an expert's message and the reply) that are torn out of any
sessions, in any order: what is asked there, but not what an expert asks next, nor when to stop. It never
sees an annotation, a held-out session, the policy's prompt or the stop marker (the tokenizer sees these two,
so that they are short). All that is left for SFT and GRPO to teach.

(A first version learned experts' words from whole conversations too. That was SFT in disguise: it knew the
training sessions by heart, and GRPO found hardly a group whose responses differed.)

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
from prompts import apply_template, load_prompt
from records import STOP, InputError, cli, read_json, write_json
from rollout import Sampling, generate
from toy import world

NEUTRAL = "A conversation."  # its system prompt
FEWEST = 50  # training sessions
STEPS = 1000  # of 800 tokens; fewer where so many documents do not fill them:
PASSES, DOCUMENTS = 6, 20_000  # conversations and as many exchanges for each session; in all
SHAPE = {**world.SHAPE, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
         "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 8192}


def documents(sessions, n, seed):
    """n documents [(role, text, weight)]: conversations drawn at random, and in every other one's place as
    many exchanges of any sessions. In the conversations the experts' words have weight 0."""
    talks = [[(m.role, m.content.replace("<|", "< |")[:600])  # <|im_end|> in a text is but a text
              for m in hindsight.utterances(session.messages)[:40]] for session in sessions]
    exchanges = [talk[i:i + 2] for talk in talks for i, (role, _) in enumerate(talk) if role == "assistant"]
    if not exchanges:
        raise InputError("no assistant says anything in these sessions: there is nothing to learn")
    rng, docs = random.Random(seed), []
    for i, talk in enumerate(rng.choices(talks, k=n)):
        said = sum(rng.choices(exchanges, k=1 + len(talk) // 2), []) if i % 2 else talk
        docs.append([("system", NEUTRAL, 0), *((role, text, i % 2) for role, text in said)])
    return docs


def show(model, tokenizer, *parts):
    """Print the loss on training sessions and on held-out ones, and a reply in one of these."""
    coded = [[world.encode(doc, tokenizer.encode) for doc in documents(sessions, 60, 0)]
             for sessions in parts]
    with torch.no_grad():
        seen, unseen = (world.next_token_loss(model, docs) for docs in coded)
    first = hindsight.utterances(parts[1][0].messages)[0].content
    prompt = apply_template(tokenizer, [{"role": "system", "content": NEUTRAL},
                                        {"role": "user", "content": first}])
    how = Sampling(max_new_tokens=40, temperature=0)
    [[reply]] = generate(model, [prompt], {tokenizer.eos_token_id}, how)
    print(f"""loss of a token: {seen:.2f} nats in training sessions, {unseen:.2f} in held-out ones
to {first!r} it replies {tokenizer.decode(reply.tokens)!r}
This shows whether the way from these logs to a policy works. It says nothing about large models.""")


def make(cfg, steps=STEPS):
    """Write the folder that model.path names. steps: how long it trains at most (fewer in tests)."""
    config.need(cfg, "model.path", "data.logs")
    out, prompt = Path(cfg.model.path), load_prompt(cfg.data.prompt)
    sessions, held_out = hindsight.sessions(cfg)
    if len(sessions) < FEWEST or not held_out:
        raise InputError(f"{cfg.data.logs}: {len(sessions)} training and {len(held_out)} held-out sessions "
                         f"with text; {FEWEST} and 1 are needed (data.split, data.eval_logs)")
    docs = documents(sessions, min(2 * PASSES * len(sessions), DOCUMENTS), cfg.seed)
    text = f"{docs}{prompt}{cfg.seed}{steps}{SHAPE}"
    stamp, made = {"made from": hashlib.sha256(text.encode()).hexdigest()}, out / ".made.json"
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
    write_json(made, stamp)  # a hidden file: an export does not carry it along
    show(model, tokenizer, sessions, held_out)


def main():
    torch.set_num_threads(1)  # matrices this small lose more to a second thread than they gain
    make(config.load(sys.argv[1:], __doc__))


if __name__ == "__main__":
    cli(main)
