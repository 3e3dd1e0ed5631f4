"""A lock that its holder's death sets free."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest

from openline.client.process_lock import Locked, process_lock

HOLD = """
import sys
from pathlib import Path
from openline.client.process_lock import process_lock
with process_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.lock"


@pytest.fixture
def holder(path):
    """Another process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_it_is_held_by_one_and_leaves_nothing(path):
    """In one process too; after the block the file is gone and the lock is free, also after an exception."""
    with process_lock(path):
        with pytest.raises(Locked) as refused, process_lock(path):
            pass
        assert refused.value.pid == os.getpid()
    with pytest.raises(ZeroDivisionError), process_lock(path):
        _ = 1 / 0
    assert list(path.parent.iterdir()) == []


def test_another_process_holds_it_by_its_pid(path, holder):
    """Whoever is refused can say by whom."""
    with pytest.raises(Locked) as refused, process_lock(path):
        pass
    assert refused.value.pid == holder.pid


def test_the_death_of_its_holder_frees_it(path, holder):
    """By `kill -9`: the file that it leaves behind keeps nobody out."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert path.exists()
    with process_lock(path):
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()


def test_many_that_come_and_go_never_hold_it_together(path):
    """The file is removed and made again all the time: nobody may hold one that is not at its place any more."""
    inside, most, taken = 0, 0, 0
    guard = threading.Lock()

    def come_and_go():
        nonlocal inside, most, taken
        for _ in range(300):
            try:
                with process_lock(path):
                    with guard:
                        inside, taken = inside + 1, taken + 1
                        most = max(most, inside)
                    with guard:
                        inside -= 1
            except Locked:
                pass

    threads = [threading.Thread(target=come_and_go) for _ in range(8)]
    with ExitStack() as ended:
        for thread in threads:
            thread.start()
            ended.callback(thread.join)
    assert (most, inside) == (1, 0)
    assert taken >= 8
