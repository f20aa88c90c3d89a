"""The project's own bar: how large and how dense the code is, how wide its lines are, who may import whom."""
import ast
import io
import tokenize

import pytest

from world import REPO

# A file imports only from files that stand before it. So there is no circle, and none imports toy/ or bench/.
ORDER = """records config logs
    lexicon wording model prompts
    parallel checkpoint pack reward metrics rollout
    llm plan
    report hindsight grading
    eval pairs
    run table1 autoprompt
    train_grpo train_sft train_dpo""".split()
OPTIONAL = {"openai", "plotly", "wandb", "transformers", "tokenizers", "huggingface_hub", "trl", "datasets",
            "httpx2"}
WITH_TORCH = {"torch", "model", "parallel", "rollout"}  # late in llm.py: hindsight.py does without
CEILINGS = {".": 50_420, "tests": 125_000, "toy": 10_250, "bench": 7_300, "corpora": 2_500}  # code tokens
LAYOUT = {"NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def measure(text):
    """-> (code tokens, lines that hold them), without comments and docstrings; a string is one token."""
    tokens, lines, inside, before = 0, set(), 0, "NEWLINE"
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[t.type]
        if kind in ("NL", "COMMENT"):
            continue
        docstring = kind == "STRING" and before in LAYOUT
        before = kind
        if kind in LAYOUT or docstring:
            continue
        inside -= kind == "FSTRING_END"  # Python 3.12 and later: an f-string has parts
        tokens += inside == 0 and kind != "FSTRING_END"
        inside += kind == "FSTRING_START"
        lines.update(range(t.start[0], t.end[0] + 1))
    return tokens, len(lines)


def texts(folder):
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((REPO / folder).glob("*.py"))}


CORE = texts(".")


def test_core():
    assert sorted(ORDER) == sorted(CORE) and len(CORE) <= 26
    tokens, lines = map(sum, zip(*map(measure, CORE.values())))
    assert tokens / lines <= 10.5


@pytest.mark.parametrize("folder", CEILINGS)
def test_size(folder):
    tokens, most = sum(measure(text)[0] for text in texts(folder).values()), CEILINGS[folder]
    name = "the core" if folder == "." else f"{folder}/"
    assert tokens <= most, (f"{name} has {tokens:,} code tokens, at most {most:,}: take something out, or "
                            "raise CEILINGS in tests/test_house.py")


def test_readme():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180 and len(text.split()) <= 2000


@pytest.mark.parametrize("name", ORDER)
def test_file(name):
    assert max(map(len, CORE[name].splitlines())) <= 110
    nodes = list(ast.walk(ast.parse(CORE[name])))
    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
    for f in functions:
        arguments = {a.arg for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs} - {"self"}
        assert len(arguments) <= 7, f.lineno
    late = {node for f in functions for node in ast.walk(f)}
    for node in nodes:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for module in [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]:
            top = module.partition(".")[0]
            ours = top in CORE or texts(top)
            assert top in ORDER[:ORDER.index(name)] or not ours, f"{name}.py must not import {module}"
            may_be_late = top in OPTIONAL or name == "llm" and top in WITH_TORCH
            assert node not in late or may_be_late, f"{name}.py imports {module} in a function"
