"""corpora/: a session of each corpus in its published form, worked out by hand, and every refusal."""
import json

import pytest

from corpora import multiwoz, sgd, star
from corpora.common import end, message
from hindsight import check_session
from records import Session, read_jsonl


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
            assert isinstance(session, Session) and why in (None, ("success is false", None))
        found = {row["session_id"]: row for row in rows}
        assert len(found) == len(rows)
        return found

    return convert


# ------------------------------------------------------------------------------------- Schema-Guided Dialogue

def sgd_turn(speaker, text, *acts, service="Cafes_1", **state):
    frame = {"service": service, "slots": [], "actions": [
        {"act": act, "slot": slot, "values": values} for act, slot, *values in acts]}
    if speaker == "USER":
        frame["state"] = {"active_intent": "Book", "requested_slots": [], "slot_values": state}
    return {"speaker": speaker, "utterance": text, "frames": [frame]}


SGD = {"dialogue_id": "1_00000", "services": ["Cafes_1"], "turns": [
    sgd_turn("USER", "A table in Oslo, please.", ("INFORM_INTENT", "intent", "Book"),
             ("INFORM", "city", "Oslo"), city=["Oslo"]),
    sgd_turn("SYSTEM", "What time? And is it for tea?", ("REQUEST", "time"), ("REQUEST", "drink", "tea")),
    sgd_turn("USER", "At 8, in Oslo.", ("INFORM", "time", "8"), ("INFORM", "city", "Oslo"),
             city=["Oslo"], time=["8", "20:00"]),
    sgd_turn("SYSTEM", "How about Fika?", ("OFFER", "name", "Fika")),
    sgd_turn("USER", "Fine, but make it 9.", ("SELECT", "name", "Fika"), ("INFORM", "time", "9"),
             city=["Oslo"], time=["9"], name=["Fika"]),  # Fika is accepted, not said
    sgd_turn("SYSTEM", "Please confirm: Fika at 9.", ("CONFIRM", "time", "9")),
    sgd_turn("USER", "Yes.", ("AFFIRM", ""), city=["Oslo"], time=["9"], name=["Fika"], people=["2"]),
    sgd_turn("SYSTEM", "Booked.", ("NOTIFY_SUCCESS", ""))]}
SGD_SCHEMA = [{"service_name": "Cafes_1", "description": "Find and book cafes", "slots": [], "intents": []},
              {"service_name": "Banks_1", "description": "Manage money", "slots": [], "intents": []}]
BLANK = {"dialogue_id": "1_00001", "services": ["Banks_1"], "turns": [sgd_turn("USER", "Hi"),
                                                                  sgd_turn("SYSTEM", "Hello")]}


@pytest.fixture
def sgd_folder(put):
    for split in ("train", "dev"):
        put(f"{split}/dialogues_001.json", [SGD, BLANK])
        put(f"{split}/schema.json", SGD_SCHEMA)


def test_sgd(sgd_folder, convert, capsys, tmp_path):
    rows = convert(sgd)
    assert rows["train-1_00000"] == {
        "session_id": "train-1_00000", "task": "Cafes_1",
        "goal": "Find out what is needed for: Find and book cafes",
        "messages": [
            user("A table in Oslo, please.", {"cafes city": "Oslo"}),
            expert("What time? And is it for tea?", "cafes time", "cafes drink"),
            user("At 8, in Oslo.", {"cafes time": "8"}),
            expert("How about Fika?"),
            user("Fine, but make it 9.", {"cafes time": "9"}),
            expert("Please confirm: Fika at 9.")]}  # the end: what the assistant says when all is revealed
    assert capsys.readouterr().out == (
        f"{tmp_path}/out.jsonl: 2 sessions (0 with success: false), 12 messages, 6 user messages "
        "with learned, 2 assistant messages with asks; set aside: 2 sessions in which nothing is asked or "
        "revealed\n")
    assert list(rows) == ["dev-1_00000", "train-1_00000"]
    assert convert(sgd, "corpus/train") == {"train-1_00000": rows["train-1_00000"]}


# ----------------------------------------------------------------------------------------------- MultiWOZ 2.2

def woz_user(i, text, marked=(), **states):
    frames = [{"service": service, "actions": [],
               "slots": [{"slot": slot} for slot in marked if service in slot],
               "state": {"active_intent": intent, "requested_slots": [], "slot_values": slots}}
              for service, (intent, slots) in states.items()]
    return {"turn_id": str(i), "speaker": "USER", "utterance": text, "frames": frames}


def woz_system(i, text):
    return {"turn_id": str(i), "speaker": "SYSTEM", "utterance": text, "frames": []}


AREA = {"hotel-area": ["north"]}
STAY = {**AREA, "hotel-name": ["the elm", "elm"]}
BOOKED = {**STAY, "hotel-bookstay": ["2"], "hotel-parking": ["dontcare"]}
TAXI = {"taxi-departure": ["elm"], "taxi-leaveat": ["17:45", "after 5"]}
WOZ = {"dialogue_id": "MUL1.json", "services": ["hotel", "taxi"], "turns": [
    woz_user(0, "A room in the north?", hotel=("find_hotel", AREA), taxi=("NONE", {})),
    woz_system(1, "Do you need parking? There is the Elm."),
    woz_user(2, "The Elm is fine.", camp=("NONE", {}), hotel=("find_hotel", AREA), taxi=("NONE", {})),
    woz_system(3, "How long will you stay?"),
    woz_user(4, "Two nights. Parking as you like.", hotel=("book_hotel", BOOKED), taxi=("NONE", {})),
    woz_system(5, "Booked at the Elm. Anything else?"),
    woz_user(6, "A taxi from there, after 5.", ["taxi-departure", "taxi-leaveat"], hotel=("NONE", BOOKED),
             taxi=("find_taxi", TAXI)),
    woz_system(7, "Where to?"),
    woz_user(8, "To Jesus College.", ["taxi-destination"], hotel=("NONE", BOOKED),
             taxi=("NONE", {"taxi-destination": ["jesus college"], "taxi-leaveat": ["after 5", "17:45"]})),
    woz_system(9, "Your taxi is booked."),
    woz_user(10, "Thanks", hotel=("NONE", BOOKED), taxi=("NONE", TAXI)),
    woz_system(11, "Bye")]}
ACTS = {"MUL1.json": {
    "0": {"dialog_act": {"Hotel-Inform": [["area", "north"]]}},
    "1": {"dialog_act": {"Hotel-Request": [["parking", "?"], ["none", "none"]],
                         "Hotel-Inform": [["name", "Elm"]]}},
    "3": {"dialog_act": {"Booking-Request": [["bookstay", "?"]]}},
    "7": {"dialog_act": {"Taxi-Request": [["destination", "?"]], "general-reqmore": [["none", "none"]]}}}}
WOZ_SCHEMA = [
    {"service_name": "camp", "description": "a tent", "intents": [], "slots": [
        {"name": "camp-bookstay", "is_categorical": True}]},
    {"service_name": "hotel", "description": "a place to stay", "intents": [], "slots": [
        {"name": f"hotel-{name}", "is_categorical": name in ("area", "bookstay")}
        for name in ("area", "name", "bookstay", "parking")]},
    {"service_name": "taxi", "description": "get around", "intents": [], "slots": [
        {"name": f"taxi-{name}", "is_categorical": False}
        for name in ("departure", "destination", "leaveat")]}]


@pytest.fixture
def woz_folder(put):
    put("test/dialogues_001.json", [WOZ])
    put("schema.json", WOZ_SCHEMA)
    put("dialog_acts.json", ACTS)


def test_multiwoz(woz_folder, convert):
    rows = convert(multiwoz)
    assert rows == convert(multiwoz, "corpus/test") == {"test-MUL1.json": {
        "session_id": "test-MUL1.json", "task": "hotel, taxi",
        "goal": "Find out what is needed for: a place to stay; get around",
        "messages": [
            user("A room in the north?", {"hotel area": "north"}),
            expert("Do you need parking? There is the Elm.", "hotel parking"),
            user("The Elm is fine."),
            expert("How long will you stay?", "hotel bookstay"),
            user("Two nights. Parking as you like.", {"hotel bookstay": "2", "hotel parking": "dontcare"}),
            expert("Booked at the Elm. Anything else?"),
            user("A taxi from there, after 5.", {"taxi departure": "elm", "taxi leaveat": "after 5"}),
            expert("Where to?", "taxi destination"),
            user("To Jesus College.", {"taxi destination": "jesus college"}),
            expert("Your taxi is booked.")]}}


# ------------------------------------------------------------------------------------------------------- STAR

def said(text, **more):
    return {"Agent": "User", "Action": "utter", "Text": text, **more}


def picked(label, text):
    return {"Agent": "Wizard", "Action": "pick_suggestion", "ActionLabel": label, "Text": text}


def query(api, **constraints):
    return {"Agent": "Wizard", "Action": "query", "APIName": api,
            "Constraints": [{name: value} for name, value in constraints.items()]}


WANTS = {"Name": '"North Hill Apartments"', "RenterName": 'api.is_equal_to("Ben")', "StartTimeHour": '"9 am"',
         "ApplicationFeePaid": '"No"', "RequestType": '"Check"', "Day": 'api.is_one_of(["Monday","Friday"])'}
STAR = {
    "DialogueID": 7, "CompletionLevel": "Complete", "FORMAT-VERSION": 7,
    "Scenario": {"Domains": ["apartment"], "MultiTask": False, "Happy": True, "UserTask": "Your name is Ben.",
                 "WizardTask": "Help.", "WizardCapabilities": [{"Task": "apartment_schedule"}]},
    "Events": [
        {"Agent": "UserGuide", "Action": "instruct", "Text": "Say hello."},
        said("Hello, no hurry, Benjamin. North Hill at 9am?"),
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
        query("apartment_schedule", **WANTS | {"StartTimeHour": '"10 am"', "Name": '"Hill Apts"'}),
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
        "task": "apartment_schedule", "success": None, "messages": [
            user("Hello, no hurry, Benjamin. North Hill at 9am?", {"apartment_start_time": "9 am"}),
            expert("Your name?", "name"),
            user("Ben", {"name": "Ben"}),
            expert("Which apartment?", "apartment_apartment_name"),
            user("North Hill.", {"apartment_apartment_name": "North Hill Apartments"}),
            expert("Have you paid the fee?", "apartment_application_fee_paid"),
            user("I suppose not.", {"apartment_application_fee_paid": "No"}),
            {"role": "assistant", "content": "Shall I book?"},
            user("Make it 10 am.", {"apartment_start_time": "10 am"}),
            expert("Done.")]}
    assert "2 sessions (1 with success: false)" in capsys.readouterr().out


@pytest.mark.parametrize("value, wanted", [
    ('"9 am"', "9 am"), (3, "3"), (" 84318 ", "84318"), ('api.is_equal_to("Dr. Johnson")', "Dr. Johnson"),
    ('api.is_equal_to(["9th"])', "9th"), ("api.is_at_most(16)", "16"), ('"$500 are gone."', "$500 are gone."),
    ("api.is_not(3)", None), ('api.contains_not("x")', None), ('api.is_one_of(["Uber","Lyft"])', None),
    ("", None)])
def test_star_value(put, convert, value, wanted):
    events = [picked("ride_ask_booking_number", "The number?"), said("That."), query("ride_status", id=value)]
    put("1.json", STAR | {"Events": events})
    learned = convert(star)["star-7"]["messages"][1]["learned"]
    assert learned == ({"ride_booking_number": wanted} if wanted else {})


def test_end():
    """A question, more of the assistant's, its reply, two messages of the assistant; then nothing of use."""
    ask, say, hear = message("When?", asks=["day"]), message("Well."), message("Hm", learned={})
    assert end([hear, ask, say, hear, hear, say, say, hear, say]) == 7
    assert end([hear, say, hear]) == end([]) == 0
    assert end([ask]) == 1 and end([say, message("Friday", learned={"day": "Friday"})]) == 2


# ------------------------------------------------------------------------------------------------ refusals

FILES = {"sgd": ("train/dialogues_001.json", [SGD]), "multiwoz": ("train/dialogues_001.json", [WOZ]),
         "star": ("dialogues/1.json", STAR)}
READERS = {"sgd": sgd, "multiwoz": multiwoz, "star": star}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("looks", READERS)
def test_another_corpus(refused, put, tmp_path, reader, looks):
    if reader != looks:
        put(*FILES[looks])
        error = refused(READERS[reader], tmp_path / "corpus", tmp_path / "out.jsonl")
        assert f"these files look like {looks}: python -m corpora.{looks}" in error
        assert list(tmp_path.iterdir()) == [tmp_path / "corpus"]


@pytest.mark.parametrize("text, says", [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
    ('[{"dialogue_id": ', "Expecting value: line 1"), ("[{}]", "not as sgd was published (KeyError"),
    ('[{"dialogue_id": "1", "turns": 3}]', "not as sgd was published (TypeError"), ('"1"', "not as sgd was")])
def test_broken_file(refused, sgd_folder, put, tmp_path, text, says):
    put("train/dialogues_002.json", text)
    error = refused(sgd, tmp_path / "corpus", tmp_path / "out.jsonl")
    assert "train/dialogues_002.json" in error and says in error
    assert list(tmp_path.iterdir()) == [tmp_path / "corpus"]


def test_broken_constraint(refused, put, tmp_path):
    put("1.json", STAR | {"Events": [query("ride_status") | {"Constraints": [{}]}]})
    assert "1.json is not as star was" in refused(star, tmp_path / "corpus", tmp_path / "out.jsonl")


def test_missing(refused, put, tmp_path):
    out = tmp_path / "out.jsonl"
    assert "nowhere: no such folder" in refused(sgd, tmp_path / "nowhere", out)
    put("schema.json", SGD_SCHEMA)
    assert "no dialogues in it" in refused(star, tmp_path / "corpus", out)
    put(*FILES["sgd"])
    assert "train/schema.json" in refused(sgd, tmp_path / "corpus", out)
    assert f"{tmp_path} is a folder: name a file" in refused(sgd, tmp_path / "corpus", tmp_path)
    assert "usage: python -m corpora.sgd FOLDER out.jsonl" in refused(sgd, tmp_path / "corpus")
    assert not out.exists()


def test_missing_acts(refused, woz_folder, tmp_path):
    (tmp_path / "corpus/dialog_acts.json").unlink()
    assert "dialog_acts.json" in refused(multiwoz, tmp_path / "corpus", tmp_path / "out.jsonl")
