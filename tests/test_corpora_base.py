"""corpora/base.py: a small base model from the training sessions' text: both libraries read it, it is the
same for a seed, never stale and never over what others made."""
import pytest
import torch

import config
import hindsight
import model as decoder
from corpora import base
from prompts import apply_template, load_prompt, load_tokenizer
from records import STOP, InputError
from toy import world as toy
from world import packed_logits, write_lines

SESSIONS = [toy.session(0, "train", i) for i in range(70)]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(sessions, *overrides) -> the folder; so short a training that it takes a second."""
    monkeypatch.setattr(base, "SHAPE", {**base.SHAPE, "num_hidden_layers": 2, "hidden_size": 48})
    monkeypatch.setattr(base, "COPIES", 2)

    def make(sessions=SESSIONS, *overrides, name="base"):
        path, held = tmp_path / "cfg.yaml", {"session_id": "held", "messages": [
            {"role": "user", "content": "Xylophone"}, {"role": "assistant", "content": "Xylophone?"}]}
        path.write_text("")
        logs = [write_lines(tmp_path / f"{split}.jsonl", rows)
                for split, rows in (("train", sessions), ("test", [held]))]
        base.make(config.load([str(path), f"run_dir={tmp_path}/run", f"data.logs={logs[0]}",
                               f"data.eval_logs={logs[1]}", f"model.path={tmp_path / name}", *overrides]),
                  steps=3)
        return tmp_path / name

    return make


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_transformers_and_model_py_read_it_alike_and_the_command_says_what_it_is(make, capsys):
    from transformers import AutoModelForCausalLM
    folder = make()
    out = capsys.readouterr().out
    assert "nothing about large models" in out
    tokenizer, model = load_tokenizer(folder), decoder.load(folder, "cpu", torch.float32)
    ids = apply_template(tokenizer, [{"role": "user", "content": "Hello, since when?"}])
    theirs = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(packed_logits(model, [ids])[0], theirs, rtol=1e-4, atol=1e-4)
    assert tokenizer.decode(tokenizer.encode("Grüße, 你好 🙂")) == "Grüße, 你好 🙂"  # any language
    prompt = load_prompt(config.default("data.prompt"))
    assert len(tokenizer.encode(prompt + STOP)) < len(prompt.split()) * 1.5  # the policy's prompt is short


def test_same_seed_same_bytes_a_rerun_returns_at_once_another_setting_is_refused(make, capsys):
    once, again = make(), make(name="again")
    assert files(once) == files(again)
    assert files(make()) == files(once) and "already made" in capsys.readouterr().out
    for sessions, *overrides in ((SESSIONS, "seed=1"), (SESSIONS[1:],)):
        with pytest.raises(InputError, match="another model than these logs and this seed make"):
            make(sessions, *overrides)
    assert files(make(SESSIONS, "seed=1", name="seed1"))["model.safetensors"] != files(
        once)["model.safetensors"]
    assert not list(once.parent.glob("*.tmp"))


def talk_of(row):
    return [(m.role, m.content) for m in hindsight.utterances(hindsight.check_session(row)[0].messages)]


def test_experts_words_are_learned_from_torn_out_exchanges_alone():
    talks = [talk_of(row) for row in SESSIONS]
    steps = {step for talk in talks for step in zip(talk, talk[1:])}
    docs = base.documents([hindsight.check_session(row)[0] for row in SESSIONS], 400, 0)
    assert {doc[0] for doc in docs} == {("system", base.NEUTRAL, 0)}
    whole, torn = docs[::2], docs[1::2]
    for _, *said in whole:
        assert [message[:2] for message in said] in talks
        assert not any(weight for role, _, weight in said if role == "assistant")
    taken = [step for _, *said in torn for step in zip(said, said[1:])]
    assert all(weight for _, *said in torn for _, _, weight in said)
    seen = {"user": [], "assistant": []}  # is this step one of the logs?, by who speaks second
    for before, after in taken:
        seen[after[0]].append((before[:2], after[:2]) in steps)
    assert all(seen["user"]) and sum(seen["assistant"]) < 0.1 * len(seen["assistant"])
    assert sum(map(len, whole)) == pytest.approx(sum(map(len, torn)), rel=0.2)


def test_long_texts_are_cut_and_special_tokens_broken_up():
    messages = [{"role": "user", "content": "<|im_end|>" + "a" * 999},
                {"role": "assistant", "content": "how long?"}] * 50
    session = hindsight.check_session({"session_id": 1, "messages": messages})[0]
    for doc in base.documents([session], 2, 0):
        assert len(doc) <= 43 and {len(text) for _, text, _ in doc[1:]} == {600, 9}
        assert not any("<|" in text for _, text, _ in doc)


def test_it_reads_no_held_out_session_and_leaves_nothing_half_made(make, monkeypatch, tmp_path):
    def stop(docs, *_):
        said = {text for doc in docs for _, text, _ in doc}
        assert len(said) > 100 and not any("Xylophone" in text for text in said)
        assert not any(STOP in text or "Ask one question" in text for text in said)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(base.world, "train_base", stop)
        with pytest.raises(KeyboardInterrupt):
            make()
    assert not (tmp_path / "base").exists()
    assert (make() / "model.safetensors").is_file()


def test_what_a_user_gets_wrong(make, tmp_path):
    with pytest.raises(InputError, match="model.path is not set"):
        make(SESSIONS, "model.path=")
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="mine is another model .* remove it"):
        make(name="mine")
    blank = [{"session_id": i, "messages": [{"role": "user", "content": " "}]} for i in range(80)]
    with pytest.raises(InputError, match="no training session has an expert's message"):
        make(blank)
    alone = [{"session_id": i, "messages": [{"role": "user", "content": "Hello"}]} for i in range(80)]
    with pytest.raises(InputError, match="an expert's message"):
        make(alone)
