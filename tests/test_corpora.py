"""corpora/: a session of each corpus in its published form, worked out by hand, and every refusal."""
import json
from itertools import permutations

import pytest

from corpora import multiwoz, sgd, star
from corpora.common import cut
from hindsight import check_session
from records import read_jsonl


def user(text, learned=()):
    return {"role": "user", "content": text, "learned": dict(learned)}


def expert(text, *asks):
    return {"role": "assistant", "content": text, "asks": list(asks)}


@pytest.fixture
def put(tmp_path):
    """put(path, content): a JSON file in the corpus's folder."""
    def put(path, content):
        path = tmp_path / "corpus" / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    return put


@pytest.fixture
def convert(call, tmp_path):
    """convert(reader, folder) -> the sessions it writes, by id. Each is valid and of use to hindsight.py."""
    def convert(reader, folder="corpus"):
        call(reader, tmp_path / folder, tmp_path / "out.jsonl")
        rows = [row for _, row in read_jsonl(tmp_path / "out.jsonl")]
        for row in rows:
            session, why = check_session(row)
            assert session and why in (None, ("success is false", None))
        return {row["session_id"]: row for row in rows}

    return convert


# ------------------------------------------------------------------------------------- Schema-Guided Dialogue

def sgd_turn(speaker, text, *acts):
    actions = [{"act": act, "slot": slot, "values": values, "canonical_values": values}
               for act, slot, *values in acts]
    return {"speaker": speaker, "utterance": text, "frames": [{"service": "Cafes_1", "actions": actions}]}


SGD = {"dialogue_id": "1_00000", "services": ["Cafes_1"], "turns": [
    sgd_turn("USER", "A table in Oslo, please.", ("INFORM_INTENT", "", "Book"), ("INFORM", "city", "Oslo")),
    sgd_turn("SYSTEM", "What time? And is it for tea?", ("REQUEST", "time"), ("REQUEST", "drink", "tea")),
    sgd_turn("USER", "At 8. Is there music?", ("INFORM", "time", "8"), ("REQUEST", "music")),
    sgd_turn("SYSTEM", "Fika has music. Fine?", ("OFFER", "name", "Fika"), ("INFORM", "music", "True")),
    sgd_turn("USER", "Fine, but make it 9.", ("SELECT", "name", "Fika"), ("INFORM", "time", "9")),
    sgd_turn("SYSTEM", "Please confirm: Fika at 9.", ("CONFIRM", "time", "9")),
    sgd_turn("USER", "Yes.", ("AFFIRM", "")),
    sgd_turn("SYSTEM", "Booked.", ("NOTIFY_SUCCESS", ""))]}
BLANK = {"dialogue_id": "1_00001", "services": ["Banks_1"], "turns": [sgd_turn("USER", "Hi"),
                                                                  sgd_turn("SYSTEM", "Hello")]}


@pytest.fixture
def sgd_folder(put):
    for split in ("train", "dev"):
        put(f"{split}/dialogues_001.json", [SGD, BLANK])
        put(f"{split}/schema.json", [])


def test_sgd(sgd_folder, convert, capsys, tmp_path):
    rows = convert(sgd)
    assert rows["train-1_00000"] == {
        "session_id": "train-1_00000", "goal": "Find out what is needed for: Cafes_1", "messages": [
            user("A table in Oslo, please.", {"Cafes city": ["Oslo"]}),
            expert("What time? And is it for tea?", "Cafes time", "Cafes drink"),
            user("At 8. Is there music?", {"Cafes time": ["8"]}),
            expert("Fika has music. Fine?"),
            user("Fine, but make it 9.", {"Cafes time": ["9"]}),  # Fika is accepted, not said
            expert("Please confirm: Fika at 9.")]}
    assert capsys.readouterr().out == (
        f"{tmp_path}/out.jsonl: 2 sessions; left out: 2 that ask and reveal nothing\n")
    assert list(rows) == ["dev-1_00000", "train-1_00000"]
    assert convert(sgd, "corpus/train/x/..") == {"train-1_00000": rows["train-1_00000"]}


# ----------------------------------------------------------------------------------------------- MultiWOZ 2.2

# Who speaks, what is said, the acts in dialog_acts.json
TURNS = [
    ("USER", "A room in the north?", {"Hotel-Inform": [["area", "north"]]}),
    ("SYSTEM", "Do you need parking? There is the Elm.", {
        "Hotel-Request": [["parking", "?"], ["none", "none"]], "Hotel-Inform": [["name", "Elm"]]}),
    ("USER", "The Elm is fine. Has it a phone?", {"Hotel-Request": [["phone", "?"]]}),
    ("SYSTEM", "Yes. How long will you stay?", {
        "general-reqmore": [["none", "none"]], "Booking-Request": [["bookstay", "?"]]}),
    ("USER", "Two nights, and a taxi.", {
        "Hotel-Inform": [["bookstay", "2"]], "Taxi-Inform": [["none", "none"]]}),
    ("SYSTEM", "Booked. Where to?", {"Taxi-Request": [["destination", "?"]]}),
    ("USER", "To the college.", {"Taxi-Inform": [["destination", "college"]]}),
    ("SYSTEM", "Done.", {}),
    ("USER", "Bye", {"general-bye": [["none", "none"]]})]
WOZ = {"dialogue_id": "MUL1.json", "services": ["hotel", "taxi"], "turns": [
    {"turn_id": str(i), "speaker": speaker, "utterance": text, "frames": []}
    for i, (speaker, text, _) in enumerate(TURNS)]}


@pytest.fixture
def woz_folder(put):
    put("test/dialogues_001.json", [WOZ])
    put("dialog_acts.json", {"MUL1.json": {
        str(i): {"dialog_act": acts, "span_info": []} for i, (*_, acts) in enumerate(TURNS)}})


def test_multiwoz(woz_folder, convert):
    rows = convert(multiwoz)
    assert rows == convert(multiwoz, "corpus/test") == {"test-MUL1.json": {
        "session_id": "test-MUL1.json", "goal": "Find out what is needed for: hotel, taxi", "messages": [
            user("A room in the north?", {"Hotel area": "north"}),
            expert("Do you need parking? There is the Elm.", "Hotel parking"),
            user("The Elm is fine. Has it a phone?"),
            expert("Yes. How long will you stay?", "Hotel bookstay"),
            user("Two nights, and a taxi.", {"Hotel bookstay": "2"}),
            expert("Booked. Where to?", "Taxi destination"),
            user("To the college.", {"Taxi destination": "college"}),
            expert("Done.")]}}


# ------------------------------------------------------------------------------------------------------- STAR

def said(text, **more):
    return {"Agent": "User", "Action": "utter", "Text": text, **more}


def picked(label, text):
    return {"Agent": "Wizard", "Action": "pick_suggestion", "ActionLabel": label, "Text": text}


def query(api, **constraints):
    return {"Agent": "Wizard", "Action": "query", "APIName": api,
            "Constraints": [{name: value} for name, value in constraints.items()]}


WANTS = {"Name": '"North Hill Apartments"', "RenterName": 'api.is_equal_to("Ben")', "StartTimeHour": '"9 am"',
         "ApplicationFeePaid": '"No"', "RequestType": '"hurry"', "Message": '"no hurry"',
         "Day": 'api.is_one_of(["Monday","Friday"])'}
STAR = {
    "DialogueID": 7, "CompletionLevel": "Complete",
    "Scenario": {"WizardCapabilities": [{"Task": "apartment_schedule"}]},
    "Events": [
        {"Agent": "UserGuide", "Action": "instruct", "Text": "Say hello."},
        said("Hello, no hurry, Reuben Benjamin. North Hill at 9AM?"),
        {"Agent": "Wizard", "Action": "request_suggestions", "Text": "name"},
        picked("ask_name", "Your name?"),
        said("Ben"),
        picked("apartment_ask_apartment_name", "Which apartment?"),
        said("North Hill."),
        picked("apartment_ask_application_fee_paid", "Have you paid the fee?"),
        said("I suppose not."),
        query("apartment_schedule", **WANTS),
        {"Agent": "KnowledgeBase", "Action": "return_item", "Item": {}},
        {"Agent": "Wizard", "Action": "utter", "Text": "Shall I book?"},
        said("Make it 10 am."),
        query("apartment_schedule", **WANTS | {
            "StartTimeHour": '"10 am"', "Name": '"Hill Apts"', "Day": '"Friday"'}),
        picked("apartment_inform_booking_successful", "Done."),
        said("Bye"),
        {"Agent": "User", "Action": "complete"}]}


def test_star(put, convert, capsys):
    broken_off = STAR | {"DialogueID": 8, "CompletionLevel": "DisconnectDuringDialogue"}
    put("dialogues/7.json", STAR)
    put("dialogues/8.json", broken_off)
    put("dialogues/9.json", STAR | {"DialogueID": 9, "Events": STAR["Events"][:1]})
    put("tasks/trivia/trivia.json", {})
    rows = convert(star)
    assert list(rows) == ["star-7", "star-8"] and rows["star-8"]["success"] is False
    assert rows["star-7"] == {
        "session_id": "star-7", "goal": "Find out what is needed for: apartment schedule",
        "success": None, "messages": [
            user("Hello, no hurry, Reuben Benjamin. North Hill at 9AM?", {
                "apartment_start_time": "9 am", "apartment_custom_message": "no hurry"}),
            expert("Your name?", "name"),
            user("Ben", {"name": "Ben"}),
            expert("Which apartment?", "apartment_apartment_name"),
            user("North Hill.", {"apartment_apartment_name": "North Hill Apartments"}),
            expert("Have you paid the fee?", "apartment_application_fee_paid"),
            user("I suppose not.", {"apartment_application_fee_paid": "No"}),
            expert("Shall I book?") | {"asks": None},
            user("Make it 10 am.", {"apartment_start_time": "10 am"}),
            expert("Done.")]}
    assert "2 sessions; left out: 1 " in capsys.readouterr().out


@pytest.mark.parametrize("value, wanted", [
    ('"9 am"', "9 am"), ("3", "3"), (" 84318 ", "84318"), ('api.is_equal_to("Dr. Johnson")', "Dr. Johnson"),
    ('api.is_equal_to(["9th"])', "9th"), ("api.is_at_most(16)", "16"), ('"$500 are gone."', "$500 are gone."),
    ("api.is_not(3)", None), ('api.contains_not("x")', None), ('api.is_one_of(["Uber","Lyft"])', None),
    ("", None)])
def test_star_value(put, convert, value, wanted):
    events = [picked("ride_ask_booking_number", "The number?"), said("That."), query("ride_status", id=value)]
    put("1.json", STAR | {"Events": events})
    learned = convert(star)["star-7"]["messages"][1]["learned"]
    assert learned == ({"ride_booking_number": wanted} if wanted else {})


@pytest.mark.parametrize("n, messages", [
    (0, []), (0, [user("Hi"), expert("Hello")]), (1, [expert("When?", "day")]),
    (2, [expert("When?", "day"), user("Hm"), expert("Well.")]),
    (3, [expert("Hi"), user("Friday", {"day": 5}), expert("Well."), user("Hm"), expert("Bye.")])])
def test_cut(n, messages):
    """It ends with the message after the last question or answer."""
    assert cut({"messages": messages[:]})["messages"] == messages[:n]


# ------------------------------------------------------------------------------------------------ refusals

@pytest.mark.parametrize("reader, other", [*permutations([(sgd, [SGD]), (multiwoz, [WOZ]), (star, STAR)], 2)])
def test_another_corpus(refused, put, tmp_path, reader, other):
    put("dialogues/1.json", other[1])
    error = refused(reader[0], tmp_path / "corpus", tmp_path / "out.jsonl")
    assert any(hint in error for hint in ("use its own reader", "is it sgd?"))
    assert list(tmp_path.iterdir()) == [tmp_path / "corpus"]


@pytest.mark.parametrize("text, says", [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:1", "a git LFS pointer needs git lfs pull"),
    ('[{"dialogue_id": ', "Expecting value: line 1"), ("[{}]", "not as sgd was published (KeyError"),
    ('[{"dialogue_id": "1", "turns": 3}]', "not as sgd was published (TypeError"), ('"1"', "not as sgd was")])
def test_broken_file(refused, sgd_folder, put, tmp_path, text, says):
    put("train/dialogues_002.json", text)
    error = refused(sgd, tmp_path / "corpus", tmp_path / "out.jsonl")
    assert "train/dialogues_002.json" in error and says in error
    assert list(tmp_path.iterdir()) == [tmp_path / "corpus"]


def test_missing(refused, put, tmp_path):
    out = tmp_path / "out.jsonl"
    for folder in ("nowhere", "."):
        assert "is it sgd? Name its folder of dialogues" in refused(sgd, tmp_path / folder, out)
    put("train/dialogues_001.json", [SGD])
    assert "is a folder: name a file" in refused(sgd, tmp_path / "corpus", tmp_path)
    assert "usage: python -m corpora.sgd FOLDER out.jsonl" in refused(sgd, tmp_path / "corpus")
    assert not out.exists()


def test_nothing_to_learn(refused, put, tmp_path):
    put("train/dialogues_001.json", [])
    put("train/schema.json", [])
    assert "none of 0 sessions asks or reveals anything: is it sgd?" in refused(
        sgd, tmp_path / "corpus", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_missing_acts(refused, woz_folder, tmp_path):
    acts = tmp_path / "corpus/dialog_acts.json"
    acts.write_text("version https://git-lfs.github.com/spec/v1")
    assert f"{acts} holds no JSON object" in refused(multiwoz, tmp_path / "corpus", tmp_path / "out.jsonl")
    acts.unlink()
    error = refused(multiwoz, tmp_path / "corpus", tmp_path / "out.jsonl")
    assert "dialogues_001.json is not as multiwoz was published" in error
    assert "No such file" in error and "corpus/dialog_acts.json" in error


def test_a_folder_that_leads_to_itself(refused, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert "loop: none of 0 sessions asks or reveals anything" in refused(
        star, tmp_path / "loop", tmp_path / "out.jsonl")
