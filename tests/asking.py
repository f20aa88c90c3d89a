"""What tests share that ask a language model (toy/llm_server.py or a checkpoint): a source and a question to
it, and logs for the extractor."""
import config
import grading
import llm
from records import Message, Turn
from toy.world import session
from world import make_config, write_lines

TURN = Turn(turn_id="s_1", session_id="s", goal="g", target=["duration: two days"], decision="continue",
            context=[Message(role="user", content="I have a cough")], known=[])
QUESTION = "How long have you had it?"  # the grader gives it a 1, and counts one question


def open_source(folder, server, role="grader", **keys):
    """A source whose cache is in folder/run. server: a Server or a URL; keys: of the role, or of the config
    with __ for the dot."""
    keys = {"model": "toy", "base_url": getattr(server, "url", server), "timeout_s": 5.0} | keys
    flat = {key if "__" in key else f"llm__{role}__{key}": value for key, value in keys.items()}
    return llm.open_source(role, make_config(run_dir=str(folder / "run"), **flat))


def ask(source, candidate=QUESTION, seed=0, turn=TURN):
    """-> future of a Grade"""
    return source.submit(*grading.grader_question(source.prompt, turn, candidate), seed)


def values(*futures):
    """-> (R_a, questions) of each grade, None for a failure"""
    grades = [future.result(30) for future in futures]
    return [grade and (grade.score, grade.questions) for grade in grades]


def graded(source, *args, **how):
    return values(ask(source, *args, **how))[0]


def counts(source):
    n = source.tally.n
    assert n["asks"] == n["answered"] + n["invalid"] + n["failed"]
    return {kind: n[kind] for kind in llm.KINDS[:7]}


# ----------------------------------------------------------------------------------------------- hindsight.py

def write_logs(folder, n, split="train"):
    return write_lines(folder / f"{split}{n}.jsonl", [session(1, split, i) for i in range(n)])


def write_config(folder, lexicon, url, logs, name="run", **more):
    """A config of hindsight.py whose extractor is at the url. more: keys, with __ for the dot."""
    flat = dict(run_dir=str(folder / name), data__logs=str(logs), data__lexicon=str(lexicon),
                hindsight__source="llm", llm__extractor__model="toy", llm__extractor__base_url=url,
                llm__extractor__timeout_s=5.0)
    config.save(make_config(**flat | more), folder / f"{name}.yaml")
    return folder / f"{name}.yaml"


def turns_of(config_path):
    """{file: text} of the turns that hindsight.py wrote."""
    folder = config_path.parent / config_path.stem / "turns"
    return {path.name: path.read_text() for path in folder.glob("*.jsonl")}
