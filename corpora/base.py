"""A small base model that speaks the language of your logs: to try the whole way on two CPU cores.

    python -m corpora.base cfg.yaml [key=value ...]     # writes the folder that model.path names

It is a Qwen2 of about 2.4 million parameters with a tokenizer of its own, in Hugging Face format, trained
from scratch on the text of the training sessions alone. It plays the pretrained model: it knows how people
talk there, and nothing of the task. It continues conversations under neutral system prompts and as either
side: in half of what it reads the roles are exchanged, so nothing tells it that it is the expert. It never
sees an annotation or a held-out session, and neither the policy's prompt nor the stop marker in training
(the tokenizer sees both, so that they are short). So SFT and GRPO have the task left to teach.

It trains for a number of tokens, and for a number of passes at most: many sessions are read once, or not all
of them. A rerun with the same logs and seed returns at once. A folder that was made otherwise, or by others,
is never overwritten.
"""
import hashlib
import random
import sys
import tempfile
from pathlib import Path

import torch

import config
import hindsight
from prompts import fill_goal, load_prompt
from records import STOP, InputError, cli, lock, read_json, write_json
from rollout import Sampling, generate
from toy import world

NEUTRAL = ["A conversation.", "A conversation about this: {goal}"]
FEWEST = 50  # training sessions
STEPS = 1600  # of 800 tokens; fewer where so many documents do not fill them:
PASSES, DOCUMENTS = 20, 20_000  # of each session on the mean; in all
SHAPE = {**world.SHAPE, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
         "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 8192}


def documents(sessions, n, seed):
    """n documents [(role, text, weight)] of sessions drawn at random: a neutral prompt, the conversation.

    In every other one the roles are exchanged. Of a long session the first 40 messages are read, and of a
    long message 600 characters.
    """
    rng, docs = random.Random(seed), []
    for session in rng.choices(sessions, k=n):
        prompt, roles = rng.choice(NEUTRAL), rng.sample(["user", "assistant"], 2)
        said = [(roles[m.role == "user"], m.content.replace("<|", "< |")[:600], 1)  # <|im_end|> is but a text
                for m in hindsight.utterances(session.messages)[:40]]
        docs.append([("system", fill_goal(prompt, session.goal), 0), *said])
    return docs


def show(model, tokenizer, *parts):
    """Print the loss on training sessions and on held-out ones, and a reply in one of these."""
    samples = [documents(sessions, 50, 0) for sessions in parts]
    with torch.no_grad():
        seen, unseen = (world.next_token_loss(model, [world.encode(doc, tokenizer.encode) for doc in docs])
                        for docs in samples)
    *before, (role, *_) = samples[1][0][:3]
    prompt = world.encode([*before, (role, "", 0)], tokenizer.encode)[0][:-2]  # up to its text
    how = Sampling(max_new_tokens=40, temperature=0)
    [[reply]] = generate(model, [prompt], {tokenizer.eos_token_id}, how)
    print(f"""loss of a token: {seen:.2f} nats in training sessions, {unseen:.2f} in held-out ones
after {before[-1][1]!r} it says {tokenizer.decode(reply.tokens)!r}
This shows whether the way from these logs to a policy works. It says nothing about large models.""")


def make(cfg, steps=STEPS):
    """Write the folder that model.path names. steps: how long it trains at most (fewer in tests)."""
    config.need(cfg, "model.path", "data.logs")
    out, prompt = Path(cfg.model.path), load_prompt(cfg.data.prompt)
    sessions, held_out = hindsight.sessions(cfg)
    text = f"{Path(__file__).read_text()}{prompt}{cfg.seed}{steps}{sessions}"
    stamp, made = {"made from": hashlib.sha256(text.encode()).hexdigest()}, out / ".made.json"
    if made.is_file() and read_json(made) == stamp:
        return print(f"{out}: already made")
    if out.exists():
        raise InputError(f"model.path={out} is another model than these logs and this seed make here: remove "
                         "it, or name another folder")
    if len(sessions) < FEWEST or not held_out:
        raise InputError(f"{cfg.data.logs}: {len(sessions)} training and {len(held_out)} held-out sessions "
                         f"with text; {FEWEST} and 1 are needed (data.split, data.eval_logs)")
    docs = documents(sessions, min(PASSES * len(sessions), DOCUMENTS), cfg.seed)
    tokenizer = world.make_tokenizer(docs[:5000] + [[("system", prompt + STOP, 0)]] * 500, 4096)
    lock(out.parent, f".{out.name}.lock")
    with tempfile.TemporaryDirectory(dir=out.parent) as aside:
        folder = Path(aside, "base")
        tokenizer.save_pretrained(folder)
        model = world.train_base(docs, tokenizer, folder, cfg.seed, steps, SHAPE)
        write_json(folder / made.name, stamp)  # a hidden file: model.export does not carry it along
        folder.rename(out)
    show(model, tokenizer, sessions, held_out)


def main():
    torch.set_num_threads(1)  # matrices this small lose more to a second thread than they gain
    make(config.load(sys.argv[1:], __doc__))


if __name__ == "__main__":
    cli(main)
