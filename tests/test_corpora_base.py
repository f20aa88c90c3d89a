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
    monkeypatch.setattr(base, "PASSES", 1)

    def make(sessions=SESSIONS, *overrides, name="base"):
        path, held = tmp_path / "cfg.yaml", toy.session(0, "test", 0)
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


def test_transformers_and_model_py_read_it_alike_and_the_report_says_what_it_is(make, capsys):
    from transformers import AutoModelForCausalLM
    folder = make()
    out = capsys.readouterr().out
    assert "held-out" in out and "says nothing about large models" in out
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


def test_it_reads_what_both_sides_say_as_either_side_and_nothing_else():
    sessions = [hindsight.check_session(row)[0] for row in SESSIONS]
    docs = base.documents(sessions, 400, 0)
    said = {u.content: u.role for session in sessions for u in hindsight.utterances(session.messages)}
    spoken = [(role, text) for doc in docs for role, text, weight in doc if weight]
    assert {text for _, text in spoken} <= set(said)
    as_they_were = sum(role == said[text] for role, text in spoken) / len(spoken)
    assert 0.4 < as_they_were < 0.6
    prompts = {doc[0] for doc in docs}
    assert prompts == {("system", text.replace("{goal}", toy.GOAL), 0) for text in base.NEUTRAL}
    assert not any(STOP in text or "Ask one question" in text for doc in docs for _, text, _ in doc)


def test_long_texts_are_cut_and_special_tokens_broken_up():
    messages = [{"role": "user", "content": "<|im_end|>" + "a" * 999},
                {"role": "assistant", "content": "how long?"}] * 50
    [doc] = base.documents([hindsight.check_session({"session_id": 1, "messages": messages})[0]], 1, 0)
    assert len(doc) == 41 and {len(text) for _, text, _ in doc[1:]} == {600, 9}
    assert "< |im_end|>" in doc[1][1] + doc[2][1]


def test_interrupted_it_leaves_nothing_half_made(make, monkeypatch, tmp_path):
    def stop(*_, **__):
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
    with pytest.raises(InputError, match="12 training .* 50 "):
        make(SESSIONS[:12])
    blank = [{"session_id": i, "messages": [{"role": "user", "content": " "}]} for i in range(80)]
    with pytest.raises(InputError, match="0 training .* text"):
        make(blank)
    with pytest.raises(InputError, match="0 held-out"):
        make(SESSIONS, "data.eval_logs=[]")
