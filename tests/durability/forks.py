"""Starts processes that run `openline`: forks of this one, which has imported it. An order is a line of JSON on stdin."""

import json
import os
import signal
import sys


def serve(order):
    """In a fork: what `openline` does with these arguments."""
    from openline.cli import main

    said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["openline", *order["arguments"]]
    main()


def take_orders():
    """Until stdin ends."""
    import openline.cli  # noqa: F401 - what takes its time

    running = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            running.remove(order["wait"])
            answer = os.waitstatus_to_exitcode(status)
        elif answer := os.fork():
            running.add(answer)
        else:
            serve(order)
            os._exit(0)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    take_orders()
