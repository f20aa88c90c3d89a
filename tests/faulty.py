"""Faults at chosen places: the n-th call of a function kills its process, raises, or finds the disk full.

    torchrun ... tests/faulty.py RANK:PLACE:N:BLOW SCRIPT ARGUMENT ...     # PLACE: module.function

The function is replaced in one rank of the process that the test started; the code itself has no hook.
"""
import errno
import importlib
import os
import pkgutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import records


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def mine():
    raise records.InputError("mine alone")


def bug():
    raise ValueError("a bug of mine")


def strike(place, n, blow):
    """From now on the n-th call of this function is the blow. -> list that grows by one with each call"""
    owner, _, name = place.rpartition(".")
    owner, calls = pkgutil.resolve_name(owner), []
    real = getattr(owner, name)

    def struck(*args, **how):
        calls.append(place)
        if len(calls) == n:
            blow()
        return real(*args, **how)

    setattr(owner, name, struck)
    return calls


if __name__ == "__main__":
    fault, script, *arguments = sys.argv[1:]
    rank, place, n, blow = fault.split(":")
    sys.argv = [script, *arguments]
    main = importlib.import_module(Path(script).stem).main
    if os.environ.get("RANK", "0") == rank:
        strike(place, int(n), globals()[blow])
    records.cli(main)
