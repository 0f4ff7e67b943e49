"""Turns on the cores, without Ray."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from aptp_ray.serve.turns import Turns, turns_on_this_machine


def test_no_more_have_a_turn_than_there_are_seats_and_everybody_gets_some(tmp_path: Path) -> None:
    lock, inside, most, had = threading.Lock(), 0, 0, [0] * 5
    end = time.monotonic() + 1.0

    def work(number: int) -> None:
        nonlocal inside, most
        turns = Turns(tmp_path, 2)  # one each, as processes have
        while time.monotonic() < end:
            with turns:
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.005)
                with lock:
                    inside -= 1
                had[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2
    assert min(had) > 0.5 * max(had)  # who has just had one queues again


def test_a_process_that_is_killed_leaves_its_seat(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\nfrom aptp_ray.serve.turns import Turns\n"
        "with Turns(pathlib.Path(sys.argv[1]), 1):\n    print('in', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "in\n"
        entered = threading.Event()

        def wait() -> None:
            with Turns(tmp_path, 1, patience_s=60.0):
                entered.set()

        waiter = threading.Thread(target=wait)
        waiter.start()
        assert not entered.wait(0.2)
    finally:
        holder.kill()
        holder.wait()
    assert entered.wait(10)
    waiter.join()


def test_nobody_waits_forever(tmp_path: Path) -> None:
    with Turns(tmp_path, 1):
        began = time.monotonic()
        with Turns(tmp_path, 1, patience_s=0.1), Turns(tmp_path, 1, patience_s=0.1):
            assert 0.2 <= time.monotonic() - began < 5


def test_a_turn_ends_with_an_error_too(tmp_path: Path) -> None:
    turns = Turns(tmp_path, 1)
    with pytest.raises(ValueError), turns:
        raise ValueError
    with Turns(tmp_path, 1):
        pass


def test_without_a_place_for_locks_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file"))
    assert turns_on_this_machine(1) is None
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    turns = turns_on_this_machine(1)
    assert turns is not None
    with turns:
        (folder,) = tmp_path.glob("aptp_ray-turns-*")
        assert len(list(folder.iterdir())) >= 2
