"""A run's folder: which config may go on in it, and checkpoints that any number of ranks can read."""
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
from records import InputError
from world import load64, make_config, weights, whole


@pytest.mark.parametrize("begun", ["checkpoints/step_000002/state.json", "metrics.jsonl"])
@pytest.mark.parametrize("name, old, new, free", [
    ("train.lr", 5e-7, 1e-3, False), ("rollout.samples", 5, 6, False), ("data.lexicon", "", "a.yaml", False),
    ("eval.samples", 3, 4, True), ("train.steps", None, 9, True)])
def test_run_dir_of_another_config(tmp_path, begun, name, old, new, free):
    """Only what cannot change the run may differ; the line names the key, both values and the way out.
    (test_config.py: which keys affect a training; test_run.py: a run that never began.)"""
    checkpoint.open_run(make_config(run_dir=str(tmp_path)), 0)
    (tmp_path / begun).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / begun).write_text("{}")
    checkpoint.open_run(make_config(run_dir=str(tmp_path)), 0)  # the same once more
    other = make_config(run_dir=str(tmp_path), **{name.replace(".", "__"): new})
    with nullcontext() if free else pytest.raises(InputError) as error:
        checkpoint.open_run(other, 0)
    said = f"{tmp_path} holds a run with {name}={old!r}, this one has {new!r}: choose another run_dir"
    assert free or said in str(error.value)


def train_state(folder):
    """A model and its optimizer after one step."""
    model = load64(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for p in model.parameters():
        p.grad = p.detach().clone()
    optimizer.step()
    return model, optimizer


def everything(model, optimizer):
    moments = {f"{name}:{key}": whole(optimizer.state[p][key])
               for name, p in model.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")}
    return weights(model) | moments


def read_and_save(folder, path, out):
    model, optimizer = train_state(folder)
    state = checkpoint.load(path, model, optimizer)
    checkpoint.save(out, 4, model, optimizer, state["inputs"], keep=2)
    return state


@pytest.mark.slow
def test_any_number_of_ranks_reads_a_checkpoint(one_rank, run_ranks, folders64, tmp_path):
    """Written by one rank, read and written by two, read by one: the same to the bit."""
    model, optimizer = train_state(folders64[0])
    written = everything(model, optimizer)
    checkpoint.save(tmp_path / "one", 3, model, optimizer, "x", keep=2)
    path = tmp_path / "one" / "checkpoints" / "step_000003"
    states = run_ranks(read_and_save, 2, folders64[1], path, tmp_path / "two")
    written_as = {"inputs": "x", "step": 3, "updates": 1}
    assert all(state.items() >= written_as.items() for state in states)
    path = tmp_path / "two" / "checkpoints" / "step_000004"
    model, optimizer = train_state(folders64[1])
    assert checkpoint.load(path, model, optimizer)["step"] == 4
    read = everything(model, optimizer)
    ranks = [load_file(path / f"rank_{r:05d}.safetensors") for r in (0, 1)]
    for name, tensor in written.items():
        assert torch.equal(tensor, read[name]), name
        assert name.endswith(":step") or all(len(rows[name]) < len(tensor) for rows in ranks)  # shared out


RANK = "rank_00000.safetensors"


@pytest.mark.parametrize("name, spoil", [
    (RANK, lambda data: data[:-1] + bytes([data[-1] ^ 1])), (RANK, None),
    ("state.json", lambda data: data.replace(b'"step": 3', b'"step": 2'))])
def test_a_checkpoint_that_has_changed_is_refused(one_rank, folders64, tmp_path, name, spoil):
    """One bit flipped, a file lost, a number edited: what is trained on from there would not be this run."""
    state, file = train_state(folders64[0]), tmp_path / "checkpoints" / "step_000003" / name
    checkpoint.save(tmp_path, 3, *state, "x", keep=2)
    data = file.read_bytes()
    file.unlink()
    if spoil:
        file.write_bytes(spoil(data))
    said = f"{file} is not as this version saved it: remove {file.parent} to go on from the checkpoint before"
    with pytest.raises(InputError, match=f"^{said}$"):
        checkpoint.load(file.parent, *state)
