"""pairs.py: which utterance is irrelevant enough to be rejected."""
import functools

import pytest
import yaml

import config
import hindsight
import lexicon
import pairs
import reward
import toy.world as pharmacy
import train_dpo
from prompts import expert_response, read_turns
from records import Turn
from world import coughs_and_rashes, make_baseline, make_lexicon, read_lines, write_lines

SMALL = make_lexicon(
    {name: dict(asks=[asks], values=dict(told=[told])) for name, asks, told in (
        ("phlegm", "phlegm", "some phlegm"), ("fever", "fever", "no fever"), ("itching", "itch", "it itches"),
        ("colour", "colour", "red"), ("coffee", "coffee", "a cup"), ("size", "size", "huge"),
        ("Known_allergies", "allergies", "pollen"))},
    dict(cough=("cough", ["phlegm", "fever"]), rash=("rash", ["itching", "colour"]),
         insomnia=("sleep", ["coffee", "fever"])))


def load(folder, tree):
    (folder / "lexicon.yaml").write_text(yaml.safe_dump(tree))
    return lexicon.load(folder / "lexicon.yaml")


@pytest.fixture
def small(tmp_path):
    return load(tmp_path, SMALL)


def turn(name, said, expert, decision="continue", target=(), known=()):
    """name: session_turn; said: a conversation from the user's first words on; target: said later."""
    said = enumerate(said.split(" | "))
    context = [dict(role=("user", "assistant")[i % 2], content=text) for i, text in said]
    return Turn(turn_id=name, session_id=name[0], goal="g", context=context, expert=expert,
                known=list(known), target=list(target), decision=decision)


def rejected(made, name="A_2"):
    return [(p.rejected, p.rejected_from) for p in made if p.turn_id == name]


COUGH = turn("A_2", "hello | Hi | a cough | Any fever? | no fever, but it itches", " Any phlegm?\n",
             known=["Size: as a pea"], target=["Coffee : yes"])
COLOUR = "What colour is it?"
RED = turn("E_1", "my rash", f" {COLOUR} ")
OTHERS = {  # what may stand in the logs, and must not be held against COUGH
    "matters to this complaint": turn("B_1", "cannot sleep", "Do you have a fever?"),
    "one of two matters": turn("B_1", "my rash", f"{COLOUR} Any phlegm?"),
    "mentioned here": turn("B_1", "my rash", "Does it itch?"),
    "mentioned later": turn("B_1", "my rash", "Do you drink coffee?"),
    "known, though not by the lexicon": turn("B_1", "my rash", "What size is it?"),
    "generic": turn("B_1", "my rash", "Any allergies?"),
    "the same session": turn("A_1", "my rash", COLOUR),
    "the same complaint": turn("B_1", "a bad cough", COLOUR),
    "the complaint first named is the same": turn("B_1", "a cough | Yes? | my rash", COLOUR),
    "a complaint that only the expert named": turn("B_1", "hello | Is it your rash? | yes", COLOUR),
    "no complaint": turn("B_1", "hello", COLOUR),
    "asks for nothing": turn("B_1", "my rash", "Anything else?"),
    "no question": turn("B_1", "my rash", "I like the colour."),
    "keywords": turn("B_1", "my rash", "colour?"),
    "what was said at a stop": turn("B_1", "my rash", COLOUR, "stop"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_never_rejected(small, name):
    made, left_out = pairs.build_pairs([COUGH, OTHERS[name]], small, ["allergies"])
    assert not rejected(made) and left_out["no irrelevant utterance in the logs"] >= 1
    for seed in range(3):  # with a good one beside it, that is taken
        made, _ = pairs.build_pairs([COUGH, OTHERS[name], RED], small, ["allergies"], seed)
        assert rejected(made) == [(COLOUR, "E_1")]


def test_a_pair(small):
    stop = turn("F_1", "cannot sleep", "Take this.", "stop")
    (cough, red, end), left_out = pairs.build_pairs([COUGH, RED, stop], small, ["allergies"])
    row = COUGH.dump() | {"chosen": "Any phlegm?", "rejected": COLOUR, "rejected_from": "E_1"}
    del row["expert"], row["known"], row["target"]
    assert cough.dump() == row and list(cough.dump()) == list(row)
    assert (red.turn_id, red.chosen, red.rejected) == ("E_1", COLOUR, "Any phlegm?")
    assert (end.chosen, end.decision) == ("<stop />", "stop") and not left_out


def test_the_turns_left_out_are_counted(small):
    turns = [turn("B_1", "hello", "What?"), turn("C_1", "hi", None, "stop"), COUGH,
             turn("D_1", "cough", "Any fever?")]
    left_out = {"no complaint recognised": 2, "no irrelevant utterance in the logs": 2}
    assert pairs.build_pairs(turns, small, []) == ([], left_out)


@pytest.mark.parametrize("generic, n", [("Allergies", 0), ("pregnancy", 1)])
def test_generic_slots_are_named_as_hindsight_reads_them(small, generic, n):
    """hindsight.generic is compared by words there, without regard to case, so it must be here."""
    assert len(rejected(pairs.build_pairs([COUGH, OTHERS["generic"]], small, [generic])[0])) == n


def test_a_rare_irrelevant_utterance_is_found(small):
    """200 draws at random mostly miss the single one of 600."""
    turns = [turn(f"{i}_1", "a cough", "Any fever?") for i in range(600)]
    turns[500] = RED
    made, _ = pairs.build_pairs(turns, small, [])
    assert len(made) == 600 and {p.rejected for p in made if p.turn_id != "E_1"} == {COLOUR}


@pytest.fixture(scope="module")
def toy_turns(tmp_path_factory):
    lex = load(tmp_path_factory.mktemp("toy"), pharmacy.lexicon())
    extract = functools.partial(hindsight.extract_rules, lex=lex)
    how = config.HindsightConfig(generic=list(pharmacy.GENERIC))
    turns = []
    for i in range(250):
        session, why = hindsight.check_session(pharmacy.session(0, "train", i))
        if not why:
            turns += hindsight.build_turns(session, extract, how)[0]
    return turns, lex


@pytest.mark.slow
def test_the_toys_pairs_are_irrelevant_by_the_grader(toy_turns):
    turns, lex = toy_turns
    made, left_out = pairs.build_pairs(turns, lex, pharmacy.GENERIC)
    by_id = {t.turn_id: t for t in turns}
    assert len(made) > 0.95 * len(turns) and len(made) + left_out.total() == len(turns)
    assert len({p.rejected for p in made}) > 50 and [p.decision for p in made].count("continue") > 500
    for p in made:
        other, here = by_id[p.rejected_from], by_id[p.turn_id]
        assert other.session_id != here.session_id and other.decision == "continue"
        assert p.rejected == other.expert.strip() and reward.decision(p.rejected) == "continue"
        assert not set(lexicon.asked(p.rejected, lex)) & set(pharmacy.GENERIC)
        assert p.chosen == expert_response(here)
        assert p.decision == "stop" or reward.r_a_rules(here, p.rejected, lex) == 0, p


def test_the_seed_decides(toy_turns):
    turns, lex = toy_turns
    made = [pairs.build_pairs(turns[:150], lex, pharmacy.GENERIC, seed)[0] for seed in (0, 0, 1)]
    first, again, other = ({p.turn_id: p.rejected for p in some} for some in made)
    assert first == again != other and list(first) == list(other)
    assert len(set(first.values())) > 20  # drawn, not always the first that fits


def test_the_script(call, refused, capsys, tmp_path, tiny_checkpoint):
    path = make_baseline(tmp_path, tiny_checkpoint, "dpo")
    run = tmp_path / "run"
    out, turns = run / "pairs.jsonl", run / "turns" / "train.jsonl"
    good = out.read_bytes()
    write_lines(turns, coughs_and_rashes() + [turn("99_1", "hello", "Well?")])
    capsys.readouterr()
    call(pairs, path)  # a rerun replaces what was there
    said = capsys.readouterr().out
    assert out.read_bytes() == good
    assert "1 no complaint recognised" in said and "10 pairs of 11 turns" in said and "rather than" in said
    assert sorted(p.name for p in run.iterdir()) == [".lock", "pairs.jsonl", "pairs_made.json", "turns"]
    assert "data.lexicon is not set" in refused(pairs, path, "seed=1", "data.lexicon=")
    write_lines(turns, coughs_and_rashes()[::2])  # nothing but coughs
    line = refused(pairs, path)
    assert "no pair for any of 5 turns" in line and "lexicon.yaml" in line and out.read_bytes() == good


def test_pairs_belong_to_the_settings_they_were_made_with(refused, tmp_path, tiny_checkpoint):
    path = make_baseline(tmp_path, tiny_checkpoint, "dpo")
    assert "made with other settings or from" in refused(train_dpo, path, "seed=5")

    def same_made(*changed):
        return pairs.same_made(config.load([str(path), *changed]))

    assert same_made() and same_made("train.lr=1")
    for changed in ("seed=5", "hindsight.generic=[x]", "data.lexicon=x", "llm.writer.model=m"):
        assert not same_made(changed)
    (tmp_path / "run" / "pairs_made.json").unlink()  # made by hand
    assert same_made("seed=5")


def test_pairs_of_labels_that_were_corrected_are_refused(call, refused, tmp_path, tiny_checkpoint):
    """The contexts are the same: what the pairs choose is no longer what the turns say."""
    path, turns = make_baseline(tmp_path, tiny_checkpoint, "dpo"), coughs_and_rashes()
    turns[1] |= {"decision": "stop", "target": []}
    write_lines(tmp_path / "run" / "turns" / "train.jsonl", turns)
    assert "pairs.jsonl was made with other settings or from other turns" in refused(train_dpo, path)
    call(pairs, path)
    assert pairs.same_made(config.load([str(path)]))


def test_the_scripts_seed_and_generic_slots_are_the_configs(tmp_path, tiny_checkpoint):
    make_baseline(tmp_path, tiny_checkpoint, "dpo", seed=5, hindsight__generic=["itching"])
    run, lex = tmp_path / "run", lexicon.load(tmp_path / "lexicon.yaml")
    rows = read_lines(run / "pairs.jsonl")  # an itch is generic now: coughs get no pair
    assert len(rows) == 5 and {row["rejected"].rstrip("!") for row in rows} == {"A fever?"}
    made, _ = pairs.build_pairs(read_turns(run / "turns" / "train.jsonl"), lex, ["itching"], 5)
    assert rows == [pair.dump() for pair in made]


def test_a_continue_turn_without_an_expert_is_one_line(refused, tmp_path, tiny_checkpoint):
    path, turns = make_baseline(tmp_path, tiny_checkpoint, "dpo"), coughs_and_rashes()
    for expert in (None, " "):
        turns[2]["expert"] = expert
        write_lines(tmp_path / "run" / "turns" / "train.jsonl", turns)
        assert "turn 2_1: a continue turn whose 'expert' is missing" in refused(pairs, path)
