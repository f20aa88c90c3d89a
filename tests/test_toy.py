"""toy.py: the world is what its docstring says, the same for the same seed, and its base is a usable checkpoint."""
import functools
import shutil

import pytest
import torch

import hindsight
import lexicon
import toy
from data import STOP, encode_prompt, load_prompt, load_tokenizer, read_jsonl

GENERIC = ("pregnancy", "allergies")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny world: 40 + 10 sessions, a base trained for three steps."""
    out = tmp_path_factory.mktemp("toy") / "world"
    toy.make(out, seed=3, sessions=(40, 10), base_steps=3)
    return out


@pytest.fixture(scope="module")
def lex(world):
    return lexicon.load(world / "lexicon.yaml")


@pytest.fixture(scope="module")
def sessions():
    return [toy.session(0, "train", i) for i in range(1600)]


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes(world, tmp_path):
    toy.make(tmp_path / "again", seed=3, sessions=(40, 10), base_steps=3)
    assert files(tmp_path / "again") == files(world)


def test_other_seed_other_logs(world):
    assert toy.session(4, "train", 0) != toy.session(3, "train", 0)
    assert toy.session(3, "train", 0)["messages"] != toy.session(3, "test", 0)["messages"]


def test_rerun_returns_at_once(world, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(world, out)
    stamp = (out / "base" / "model.safetensors").stat().st_mtime_ns
    toy.make(out, seed=3, sessions=(40, 10), base_steps=3)
    assert "already made" in capsys.readouterr().out
    assert (out / "base" / "model.safetensors").stat().st_mtime_ns == stamp
    (out / "test.jsonl").unlink()  # something is missing: made again, the same
    toy.make(out, seed=3, sessions=(40, 10), base_steps=3)
    assert files(out) == files(world)


def test_logs_have_the_format_and_the_counts(world):
    train, test = ([row for _, row in read_jsonl(world / f"{name}.jsonl")] for name in ("train", "test"))
    assert (len(train), len(test)) == (40, 10)
    assert len({row["session_id"] for row in train + test}) == 50
    for row in train + test:
        bad = hindsight.check_session(row)
        assert bad is None or bad[0] == "success is false"
        assert row["goal"] == toy.GOAL and row["diagn"] in toy.COMPLAINTS
        for m in row["messages"]:
            assert ("learned" in m) == (m["role"] == "user") and ("asks" in m) == (m["role"] == "assistant")


def test_tables_are_rich_and_consistent():
    assert len(toy.COMPLAINTS) >= 12 and len(toy.ATTRIBUTES) >= 14
    for asks, _ in toy.QUESTIONS.values():
        assert len(set(asks)) >= 5 and all(q.endswith("?") and q.count("?") == 1 for q in asks)
    for values in toy.PHRASES.values():
        assert 2 <= len(values) <= 5 and all(len(set(said)) >= 5 for said, _ in values.values())
    for name, items in toy.CHECKLISTS.items():
        slots = [slot for slot, _, _ in items]
        assert len(set(slots)) == len(slots) and not set(slots) & set(toy.GENERIC)
        for i, (slot, on, answers) in enumerate(items):
            assert slot in toy.ATTRIBUTES
            assert on is None or on in slots[:i] and set(answers) <= set(toy.PHRASES[on]), (name, slot)


def test_every_feature_of_real_logs_occurs(sessions):
    messages = [m for s in sessions for m in s["messages"]]
    users = [m for m in messages if m["role"] == "user"]
    expert = [m for m in messages if m["role"] == "assistant"]
    first = [next(m for m in s["messages"] if m["role"] == "user") for s in sessions]
    volunteered = []
    for s in sessions:
        roles = [m["role"] for m in s["messages"]] + ["assistant"]
        volunteered.append(sum(len(m.get("learned", ())) for m in s["messages"][:roles.index("assistant", 1)]))
    assert set(volunteered) == {0, 1, 2}
    assert sum(len(m["learned"]) >= 2 for m in users if m not in first) > 50               # two things at once
    assert sum(len(m["asks"]) == 2 for m in expert) > 50                                   # two questions at once
    pairs = [(a["role"], b["role"]) for s in sessions for a, b in zip(s["messages"], s["messages"][1:])]
    assert pairs.count(("user", "user")) > 100 and pairs.count(("assistant", "assistant")) > 100  # several in a row
    assert sum(m["content"].lower().rstrip(".") in [w.lower() for w in toy.YES + toy.NO] for m in users) > 500  # bare
    digressions = {toy.styled({"lower": lower}, d) for d in toy.DIGRESSIONS for lower in (True, False)}
    assert sum(m["content"] in digressions and not m["learned"] for m in users) > 200
    assert sum(s["messages"][0]["role"] == "assistant" for s in sessions) > 50             # opened by the expert
    done = [s for s in sessions if s.get("success") is not False]
    assert 0.02 < 1 - len(done) / len(sessions) < 0.1
    ends = [s["messages"][-1] for s in done]
    assert sum(m["role"] == "user" for m in ends) / len(done) > 0.1
    assert sum(m["role"] == "assistant" and not m["asks"] for m in ends) / len(done) > 0.6
    assert 0 < sum(m["role"] == "assistant" and bool(m["asks"]) for m in ends) / len(done) < 0.05  # never answered
    allergies = sum(any(set(m.get("asks", ())) & set(toy.GENERIC) for m in s["messages"]) for s in done) / len(done)
    assert 0.1 < allergies < 0.2
    asked = [sum(bool(m.get("asks")) for m in s["messages"]) for s in done]
    assert sum(3 <= n <= 5 for n in asked) / len(done) > 0.6 and 3 <= sum(asked) / len(done) <= 4


def test_the_content_decides_when_to_stop(sessions):
    """s* is stop exactly where nothing on the complaint's checklist is open any more."""
    turns, right = 0, 0
    for s in sessions:
        if hindsight.check_session(s):
            continue
        utts = hindsight.utterances(s["messages"])
        facts = hindsight.extract_annotations(utts)
        unanswered = toy.open_items(s["diagn"], dict(item.split(": ") for items in facts for item in items))
        for turn in hindsight.build_turns(s, hindsight.extract_annotations, generic=GENERIC)[0]:
            known = dict(item.split(": ") for items in facts[:len(turn["context"])] for item in items)
            missing = toy.open_items(s["diagn"], known)
            turns += 1
            right += (turn["decision"] == "stop") == (not missing)
            assert unanswered or turn["decision"] == "stop" or {item.split(": ")[0] for item in turn["target"]} & set(missing)
    assert turns > 5000 and right / turns > 0.995, right / turns  # the rest: the last question was never answered


def test_rules_agree_with_the_truth(sessions, lex):
    """I* by the lexicon against I* by the annotations; prints F1 and the accuracy of s*."""
    both = wrong = decisions = right = stops = 0
    for s in sessions:
        if hindsight.check_session(s):
            continue
        truth = hindsight.build_turns(s, hindsight.extract_annotations, generic=GENERIC)[0]
        rules = hindsight.build_turns(s, functools.partial(hindsight.extract_rules, lex=lex), generic=GENERIC)[0]
        for a, b in zip(truth, rules, strict=True):
            both += len(set(a["target"]) & set(b["target"]))
            wrong += len(set(a["target"]) ^ set(b["target"]))
            right += a["decision"] == b["decision"]
            stops += a["decision"] == "stop"
            decisions += 1
    f1 = 2 * both / (2 * both + wrong)
    print(f"rules against annotations: F1 of I* {f1:.4f}, s* accuracy {right / decisions:.4f}, {decisions} turns, "
          f"{1 - stops / decisions:.3f} continue")
    assert f1 >= 0.95 and right / decisions >= 0.98
    assert 0.65 < 1 - stops / decisions < 0.8  # the paper: .727


def test_every_question_is_recognised(lex):
    for slot, (asks, _) in toy.QUESTIONS.items():
        for text in asks:
            for said in (text, f"Okay.\n{text}", *(lead + toy.decapitalised(text) for lead in toy.LEADS)):
                assert lexicon.asked(said, lex) == [slot], said
    for text in toy.GENERIC_QUESTIONS:
        assert lexicon.asks_generic(text, lex) and not lexicon.asked(text, lex), text
    for text in toy.CHATTER:
        assert not lexicon.asked(text, lex) and lexicon.questions(text) == 0, text


def test_nearly_every_answer_is_recognised(lex):
    said = [(text, {slot: value}) for slot, values in toy.PHRASES.items() for value, (texts, _) in values.items()
            for text in texts]
    missed = [text for text, fact in said if lexicon.revealed(None, text, lex) != fact]
    assert len(missed) <= 0.02 * len(said), missed
    for name, (texts, _) in toy.OPENINGS.items():
        for text in texts:
            assert lexicon.complaint_of(text, lex) == name and not lexicon.revealed(None, text, lex), text


def test_base_is_a_checkpoint_that_transformers_loads(world, sessions):
    from transformers import AutoModelForCausalLM
    tokenizer = load_tokenizer(world / "base")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.decode(tokenizer("Some 🙂 text, any ünïcode").input_ids) == "Some 🙂 text, any ünïcode"
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    assert model.config.model_type == "qwen2" and model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer) and 0.3e6 < model.num_parameters() < 1.6e6
    turn = hindsight.build_turns(sessions[0], hindsight.extract_annotations)[0][-1]
    ids = encode_prompt(tokenizer, load_prompt("prompts/policy_toy.md"), turn)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([ids])).logits).all()
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def load_saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    shutil.copyfile(folder.parent / "world" / "base" / "config.json", folder / "config.json")
    return load_tokenizer(folder)


def test_corpus_speaks_the_chat_format(world):
    """The token ids the base is trained on are those its chat template gives, also after loading."""
    tokenizer, docs = load_tokenizer(world / "base"), toy.corpus(0, 60)
    made = toy.make_tokenizer(docs)
    text = "".join(f"{text}\n" for doc in docs for _, text, _ in doc)
    assert load_saved(made, world.parent / "tokenizer").encode(text) == made.encode(text)
    for doc in docs:
        ids, weights = toy.encode(doc, tokenizer.encode)
        messages = [{"role": role, "content": text} for role, text, _ in doc]
        assert ids == list(tokenizer.apply_chat_template(messages, return_dict=False)) and len(weights) == len(ids)
        assert all(a != b for (a, *_), (b, *_) in zip(doc, doc[1:]))  # one role's messages merged, as hindsight does


def test_manners_of_the_base_corpus():
    """Under the policy's prompt most turns have no strategy; attentive ones ask in an order of their own."""
    import random
    texts = []
    for i in range(4000):
        rng = random.Random(i)
        who = toy.patient(rng)
        texts.append(toy.mannered(rng, who, {}))
    assert abs(sum(len(slots) == 2 for _, slots in texts) / 4000 - toy.MANNERS["double"]) < 0.02
    assert abs(sum(text == STOP for text, _ in texts) / 4000 - toy.MANNERS["stop"]) < 0.01
    nothing = sum(toy.MANNERS[m] for m in ("generic", "chatter", "stop"))
    assert abs(sum(not slots for _, slots in texts) / 4000 - nothing) < 0.03
    who = {"complaint": "cough"}
    first = {name: toy.attentive(random.Random(0), {"complaint": name}, {})[1][0] for name in toy.COMPLAINTS}
    assert all(first[name] in toy.open_items(name, {}) for name in first)
    assert sum(first[name] == items[0][0] for name, items in toy.CHECKLISTS.items()) < len(first) / 2
    known = {"duration": "today", "phlegm": "no", "night": "yes", "smoking": "no"}
    assert toy.attentive(random.Random(0), who, known) == (STOP, [])
