"""Python reads this first where the campaign puts its folder on PYTHONPATH. A process that is about to write below
W2R2_KILL, or a little later is within that write, stops if the file `armed` is there, tells where in `caught`, and
waits to be killed."""

import os
import random
import signal
import sys
import threading
import time

FOLDER = os.environ.get("W2R2_KILL", "")
EVENTS = {"open", "os.rename", "os.remove", "shutil.rmtree", "os.truncate"}


def stop(event, path):
    try:
        os.rename(os.path.join(FOLDER, "armed"), os.path.join(FOLDER, "taken"))  # one process takes it
    except OSError:
        return
    with open(os.path.join(FOLDER, "caught"), "w") as file:
        file.write(f"{event}\t{os.path.relpath(path, FOLDER)}\n")
    os.kill(os.getpid(), signal.SIGSTOP)


def later(path):
    time.sleep(random.uniform(0, 0.02))
    stop("within", path)


def hook(event, arguments):
    if event not in EVENTS or not arguments or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    path = os.path.abspath(os.fsdecode(arguments[0]))
    if not path.startswith(FOLDER + os.sep) or os.path.basename(path) in ("armed", "taken", "caught", "repro.log"):
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    if not os.path.exists(os.path.join(FOLDER, "armed")):
        return
    if event == "open" and random.random() < 0.7:
        threading.Thread(target=later, args=(path,), daemon=True).start()
    else:
        stop(f"before {event.split('.')[-1]}", path)


if FOLDER:
    sys.addaudithook(hook)
