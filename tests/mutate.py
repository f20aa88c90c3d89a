"""Do the tests notice a wrong formula? Put small faults into the code, one at a time, and run the tests.

    python tests/mutate.py [--out FILE.json] [--only FUNCTION] [--compare OLD.json]

A mutant is a copy of the repository with one fault in one function: + for -, a dropped term, < for <=, two
arguments swapped. It is killed if a test fails or runs out of time. Otherwise it survives: no test looks at
that place, or the fault changes nothing that can be observed.

The choice of mutants is fixed: the faults of a function are ranked by a hash of (function, kind, n-th of its
kind), and the kinds take turns. Code that reads the same gets the same mutants. With --compare the exit code
is 1 if a function has more survivors than in OLD.json, in number and in share.
"""
import argparse
import ast
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from statistics import mean

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs", "results")  # of a copy
JOBS = 2  # mutants at a time

# Functions (name or name/old name) and how many mutants of each; the files where they may stand; the tests
# that judge them.
GROUPS = [
    ("ratio:3 clipped_surrogate:5 grpo_loss:6 cispo_loss:6 gspo_loss:4 kl_estimate:6 sequence_mean:3 "
     "aggregate:5", "train_grpo.py", "test_losses.py"),
    ("prepare:7 figures_of:6 batch_loss:4 train_step:11", "train_grpo.py", "test_grpo.py"),
    ("advantages:6", "reward.py train_grpo.py", "test_reward.py test_losses.py"),
    ("dpo_loss:3", "train_dpo.py", "test_dpo.py"),
    ("size:2 chunks:2 pack:7 forward:6 backward:5 split_tree:4 balance:4", "pack.py", "test_pack.py"),
    ("decision:1 r_s:1 omega_rule:4 fuse:7 r_a_rules/grade_rules:9", "reward.py", "test_reward.py"),
    ("grade_one:7 needs_grader:2", "grading.py", "test_grading.py test_reward.py"),
    ("utterances:7 annotated:2 value_text:2 by_utterance:2 build_turns:13 add:3",
     "hindsight.py", "test_hindsight.py"),
    ("check:5", "hindsight.py", "test_hindsight.py test_extraction.py"),
    ("agreement:3", "hindsight.py", "test_extraction.py::test_agreement"),
    ("same:1 is_named:3 normal:2 f1:3", "records.py hindsight.py",
     "test_records.py test_hindsight.py test_extraction.py::test_agreement"),
    ("sentences:4 expects_answer:3 asked:5 _well_formed:9 find:7 revealed:7", "lexicon.py",
     "test_lexicon.py test_reward.py"),
    ("trigrams:8 learn:8", "wording.py", "test_wording.py"),
    ("scores_of/score_matrix:4 metrics:5 session_of:2 by_session:2 bootstrap:4 interval/intervals:3 paired:5 "
     "verdict:2", "metrics.py eval.py table1.py", "test_metrics.py"),
    ("same_but_seed:4 unequal:3", "eval.py", "test_eval.py"),
    ("within_limit:4", "prompts.py", "test_prompts.py"),
    ("lr_at:7 due:3 optimizer_step:6", "run.py", "test_run.py"),
    ("read_state:6", "checkpoint.py", "test_checkpoint.py"),
    ("pick:7 invert:6 visible:4 attend_merged:6 next_chunk:4", "rollout.py", "test_rollout.py"),
]
QUICK = ["-m", "not slow and not gpu"]

OPPOSITE = dict(pair.split(":") for pair in (
    "Add:Sub Sub:Add Mult:Div Div:Mult Lt:LtE LtE:Lt Gt:GtE GtE:Gt Eq:NotEq NotEq:Eq In:NotIn NotIn:In "
    "Is:IsNot IsNot:Is And:Or Or:And BitAnd:BitOr BitOr:BitAnd any:all all:any "
    "min:max max:min minimum:maximum maximum:minimum amin:amax amax:amin").split())

Mutant = namedtuple("Mutant", "function file tests source fault")  # source: the whole file, bytes


def changed(node, **fields):
    node = copy.copy(node)
    vars(node).update(fields)
    return node


def opposite(operator):
    return getattr(ast, OPPOSITE[type(operator).__name__])()


def faults(node):
    """Faults of one node of the syntax tree -> (kind, node that replaces it)."""
    match node:
        case ast.BinOp(left, op, right) if type(op).__name__ in OPPOSITE:
            yield "operator", changed(node, op=opposite(op))
            yield "dropped term", left
            yield "dropped term", right
        case ast.AugAssign(op=op) | ast.BoolOp(op):
            yield "operator", changed(node, op=opposite(op))
        case ast.Compare(_, [op, *others]):
            yield "comparison", changed(node, ops=[opposite(op), *others])
        case ast.UnaryOp(_, operand):
            yield "removed sign", operand  # not, ~ or -
        case ast.Constant(int(value) | float(value)):
            yield "constant", changed(node, value=value + 1 if value is not True else False)
        case ast.Name(name) | ast.Attribute(_, name) if name in OPPOSITE:
            yield "min or max", changed(node, id=OPPOSITE[name], attr=OPPOSITE[name])
        case ast.Call(ast.Attribute(_, "where" | "clamp"), [*first, a, b]):
            yield "swapped arguments", changed(node, args=[*first, b, a])
        case ast.Call(ast.Attribute(value)) if not isinstance(value, ast.Name):
            yield "dropped call", value


def inside(node):
    """The nodes under this one in the order of the text, without default values and error messages."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.arguments | ast.JoinedStr | ast.Raise):
            yield child
            yield from inside(child)


def replaced(source, node, new):
    """The file's text with one node replaced. Columns of the syntax tree count bytes."""
    starts = [0, *accumulate(map(len, source.splitlines(keepends=True)))]
    start = starts[node.lineno - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    text = f"({ast.unparse(new)})" if isinstance(new, ast.expr) else ast.unparse(new)
    return source[:start] + text.encode() + source[end:]


def locate(name, files):
    """-> (file that defines the function, its text, the function's node)."""
    for file in filter(Path.exists, (ROOT / file for file in files.split())):
        source = file.read_bytes()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name in name.split("/"):
                return file.name, source, node
    sys.exit(f"mutate.py: no function {name} in {files}; name its file in GROUPS")


def choose(entry, files, tests):
    """Yield the mutants of one function."""
    name, number = entry.split(":")
    file, source, function = locate(name, files)
    kinds, turns = defaultdict(list), []
    for node in inside(function):
        for kind, new in faults(node):
            rank = zlib.crc32(f"{name} {kind} {len(kinds[kind])}".encode())
            kinds[kind].append((rank, node, new))
    for ranked in kinds.values():
        turns += enumerate(sorted(ranked))
    for _, (_, node, new) in sorted(turns)[:int(number)]:
        fault = f"{file}:{node.lineno}:{node.col_offset}: {ast.unparse(node)}  ->  {ast.unparse(new)}"
        yield Mutant(name, file, tests, replaced(source, node, new), fault)


def all_mutants():
    for functions, files, tests in GROUPS:
        for entry in functions.split():
            yield from choose(entry, files, [f"tests/{test}" for test in tests.split()])


def survives(mutant):
    """Do all tests pass on a copy of the repository with this mutant in it?"""
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT, dirs_exist_ok=True)
        Path(folder, mutant.file).write_bytes(mutant.source)
        pytest = f"-m pytest -x -q -p no:cacheprovider --doctest-modules --basetemp={folder}/tmp"
        command = [sys.executable, *pytest.split(), *QUICK, *mutant.tests, mutant.file]
        try:
            return subprocess.run(command, cwd=folder, timeout=120, capture_output=True).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def run(mutants):
    """-> for each mutant, does it survive?"""
    with ThreadPoolExecutor(JOBS) as pool:
        return list(tqdm(pool.map(survives, mutants), total=len(mutants), unit="mutant"))


def worse(now, before):
    """More survivors in number and in share? now, before: {fault: does it survive?}."""
    return all(measure(now.values()) > measure(before.values()) for measure in (sum, mean))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for option in ("--out", "--only", "--compare"):
        parser.add_argument(option)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    mutants = [mutant for mutant in all_mutants() if args.only in (None, *mutant.function.split("/"))]
    unchanged = {(m.file, *m.tests): m for m in mutants}.values()
    unchanged = [m._replace(source=(ROOT / m.file).read_bytes()) for m in unchanged]
    for mutant, passed in zip(unchanged, run(unchanged)):
        if not passed:
            sys.exit(f"mutate.py: a test fails without any fault: {' '.join(mutant.tests)}")
    result = defaultdict(dict)
    for mutant, survived in zip(mutants, run(mutants)):
        result[mutant.function][mutant.fault] = survived
    print("function              mutants  killed  survivors")
    for name, row in result.items():
        left = [fault for fault in row if row[fault]]
        print(f"{name:22}{len(row):7}{len(row) - len(left):8}{len(left):11}", *left, sep="\n    ")
    if args.out:
        Path(args.out).write_text(json.dumps(result))
    if args.compare:
        before = json.loads(Path(args.compare).read_text())
        more = [name for name in result if worse(result[name], before[name])]
        if more:
            sys.exit(f"mutate.py: more survivors than in {args.compare}: {', '.join(more)}")


if __name__ == "__main__":
    main()
