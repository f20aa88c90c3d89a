"""A run's folder: which config may go on in it, and checkpoints that any number of ranks can read."""
import os
import shutil
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


@pytest.mark.parametrize("left", ["checkpoints/step_000002", "export", "metrics.jsonl"])
def test_a_run_whose_config_is_lost_is_refused(tmp_path, left):
    (tmp_path / left).mkdir(parents=True)
    with pytest.raises(InputError, match=f"{tmp_path / 'config.yaml'} is lost: bring it back, or"):
        checkpoint.open_run(make_config(run_dir=str(tmp_path)), 0)


def test_checkpoints_are_numbered(tmp_path):
    """A copy by another name is nobody's newest; what a killed save had set aside is."""
    names = "step_000002 step_000004 step_000004.old step_999999 step_1000000".split()
    for name in *names, "step_best", "step_000003.bak", "step_":
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoint.all_checkpoints(tmp_path)] == names


def test_old_checkpoints_are_removed_by_number(one_rank, folders64, tmp_path):
    model, optimizer = train_state(folders64[0])
    for step in (999_998, 999_999, 1_000_000):
        checkpoint.save(tmp_path, step, model, optimizer, "x", keep=2)
    assert [path.name for path in checkpoint.all_checkpoints(tmp_path)] == ["step_999999", "step_1000000"]
    assert checkpoint.load(tmp_path, model, optimizer)[1]["step"] == 1_000_000


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


def read_and_save(folder, run, out):
    """Read a run's newest checkpoint, and write it twice: then a file of the second one is torn."""
    model, optimizer = train_state(folder)
    path, state = checkpoint.load(run, model, optimizer)
    for step in (4, 6):
        checkpoint.save(out, step, model, optimizer, state["inputs"], keep=2)
    (out / "checkpoints" / "step_000006" / "rank_00001.safetensors").write_bytes(b"")
    again, _ = checkpoint.load(out, model, optimizer)
    return path.name, state, again.name


@pytest.mark.slow
def test_any_number_of_ranks_reads_a_checkpoint(one_rank, run_ranks, folders64, tmp_path):
    """Written by one rank, read and written by two, read by one: the same to the bit."""
    model, optimizer = train_state(folders64[0])
    written = everything(model, optimizer)
    checkpoint.save(tmp_path / "one", 3, model, optimizer, "x", keep=2)
    for name, state, again in run_ranks(read_and_save, 2, folders64[1], tmp_path / "one", tmp_path / "two"):
        assert name == "step_000003" and state.items() >= {"inputs": "x", "step": 3, "updates": 1}.items()
        assert again == "step_000004"  # though the second rank alone reads the torn file
    model, optimizer = train_state(folders64[1])
    path, state = checkpoint.load(tmp_path / "two", model, optimizer)
    assert state["step"] == 4
    read = everything(model, optimizer)
    ranks = [load_file(path / f"rank_{r:05d}.safetensors") for r in (0, 1)]
    for name, tensor in written.items():
        assert torch.equal(tensor, read[name]), name
        assert name.endswith(":step") or all(len(rows[name]) < len(tensor) for rows in ranks)  # shared out


RANK = "rank_00000.safetensors"


SPOILS = {
    "a bit": (RANK, lambda data: data[:-1] + bytes([data[-1] ^ 1])), "a lost file": (RANK, None),
    "half a file": (RANK, lambda data: data[:len(data) // 2]), "zeros": (RANK, lambda data: bytes(len(data))),
    "a number": ("state.json", lambda data: data.replace(b'"step": 4', b'"step": 3')),
    "half a state": ("state.json", lambda data: data[:99]), "no state": ("state.json", None),
    "a list": ("state.json", lambda data: b"[]"), "bytes": ("state.json", lambda data: b"\x80\x04.")}


def spoil(folder, name, change):
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if change:
        (folder / name).write_bytes(change(data))


@pytest.mark.parametrize("how", SPOILS)
def test_a_checkpoint_that_has_changed_is_left_out(one_rank, folders64, tmp_path, capsys, how):
    """The one before is read, and that is said; it is not what the next save removes. Where no other is left
    the run does not begin anew."""
    (model, optimizer), steps = train_state(folders64[0]), tmp_path / "checkpoints"
    for step in (2, 4):
        checkpoint.save(tmp_path, step, model, optimizer, "x", keep=2)
    spoil(steps / "step_000004", *SPOILS[how])
    path, state = checkpoint.load(tmp_path, model, optimizer)
    assert path == steps / "step_000002" and state["step"] == 2
    said = f"{steps / 'step_000004' / SPOILS[how][0]} is not as this version saved it"
    assert capsys.readouterr().out == f"warning: {said}: that checkpoint is left out\n"
    checkpoint.save(tmp_path, 3, model, optimizer, "x", keep=1)
    assert checkpoint.load(tmp_path, model, optimizer)[1]["step"] == 3
    spoil(steps / "step_000003", RANK, None)
    with pytest.raises(InputError, match=f"^{steps} holds no whole checkpoint: .* to begin anew$"):
        checkpoint.load(tmp_path, model, optimizer)
    checkpoint.save(tmp_path, 4, model, optimizer, "x", keep=1)
    assert [path.name for path in steps.iterdir()] == ["step_000004"]


def test_a_second_save_of_a_step_loses_nothing(one_rank, folders64, tmp_path, monkeypatch):
    """Wherever it ends: before anything is renamed, removed or synced there is a whole checkpoint."""
    model, optimizer = train_state(folders64[0])
    checkpoint.save(tmp_path, 2, model, optimizer, "x", keep=1)
    for last in range(1, 16):
        calls = []
        with monkeypatch.context() as m:
            for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")):
                def ends(*args, real=getattr(module, name), **how):
                    calls.append(real.__name__)
                    if len(calls) >= last:
                        raise KeyboardInterrupt
                    return real(*args, **how)
                m.setattr(module, name, ends)
            try:
                checkpoint.save(tmp_path, 2, model, optimizer, "x", keep=1)
            except KeyboardInterrupt:
                pass
        assert checkpoint.load(tmp_path, model, optimizer)[1]["step"] == 2, calls
    assert "rename" in calls and len(calls) < last  # the last one was whole
    first, second = [i for i, name in enumerate(calls) if name == "replace"]  # of state.json, of the folder
    assert calls[:first].count("fsync") == 2 and calls[first:second].count("fsync") == 3
    assert calls[second + 1] == "fsync"  # the parent
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]
