"""The toy's server of language models: its protocol, and that a better prompt scores better."""
import random

import pytest

import lexicon
from hindsight import Extraction, extract_rules, extractor_messages, utterances
from prompts import PROMPTS
from records import Session, f1
from toy import world
from toy.llm_server import RULES, extract, said, without
from world import REPO


@pytest.mark.slow
def test_a_better_prompt_scores_better(lexicon_file):
    """Each rule that the shipped prompts state is worth something."""
    lex = lexicon.load(lexicon_file)
    prompts = {role: (REPO / file).read_text() for role, file in PROMPTS.items()}
    for role in ("extractor", "grader"):
        assert said(prompts[role], role) == set(RULES[role])
    assert said((REPO / "prompts" / "grader_rationale.md").read_text(), "grader") == set(RULES["grader"])
    sessions = [Session.model_validate(world.session(3, "train", i)) for i in range(40)]
    utts = [utterances(session.messages) for session in sessions]

    def score(prompt):
        total = 0.0
        for u in utts:
            sent = [m["content"] for m in extractor_messages(prompt, u, "g", world.GENERIC)]
            reply = extract(*sent, lex, random.Random(0), noise=0, seed=0)
            found = sum(Extraction.model_validate(reply, context=u).by_utterance(u), [])
            wanted = [i for i in sum(extract_rules(u, lex), []) if i.split(":")[0] not in world.GENERIC]
            total += f1(found, wanted)
        return total / len(utts)

    assert score(prompts["extractor"]) == 1.0
    for name in ("client", "short", "absent", "generic"):
        assert score(without(prompts["extractor"], "extractor", name)) < 0.99, name


def test_the_server_keeps_to_the_protocol(serve):
    import openai
    server = serve()
    client = openai.OpenAI(base_url=server.url, api_key="x", max_retries=0)
    assert [m.id for m in client.models.list()] == ["toy"]
    hi = {"model": "toy", "messages": [{"role": "user", "content": "hi"}]}
    done = client.chat.completions.create(**hi)
    assert done.object == "chat.completion" and done.choices[0].finish_reason == "stop"
    assert done.usage.total_tokens >= 0
    for bad in ({"temperature": -1}, {"max_tokens": 0}, {"messages": []}, {"extra_body": {"foo": 1}}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**hi | bad)
