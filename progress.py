"""What a person sees while something takes long, and how Ctrl-C ends it: always one sentence.

    progress.begin("train.py")                         # before the imports that take seconds
    with progress.doing("loading the model"):          # `loading the model, 5 s` where it lasts
        ..
    with progress.doing("sampling", rows) as bar:      # and `sampling [####      ] 12/64, 20 s left`
        bar.show(done, "3,200 tokens/s")

On a terminal the line moves. In a log file a line is added where nothing was said for five seconds. Only
rank 0 says anything. Standard library only: Ctrl-C must be one sentence while torch is being imported, too.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import threading
import time

QUIET = 4.5  # seconds without a word before a log file gets one
NEEDED = ("torch", "numpy", "safetensors", "transformers")  # what no script can do without
SCRIPT = "nanoGRPO"
PHASES = []  # what is being done, the innermost last
SAID = [time.perf_counter()]  # when the log file got its last line
TICKING = []  # the thread that draws, once there is one


def begin(script: str):
    """From here on Ctrl-C ends this process with one sentence, until a run takes the signal over.

    Exits with a sentence where a package is missing that no script can do without.
    """
    global SCRIPT
    SCRIPT = script
    # A shell that starts a command in the background ignores Ctrl-C for it, and that is to stay so.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{script}: {', '.join(missing)} cannot be imported: pip install -r requirements.txt")
    PHASES.append(Phase("importing packages"))
    watch()


def imported():
    """The imports are done: what `begin` announced is over."""
    PHASES.clear()
    erase()


def leave(number=None, frame=None):
    """Ends the process at once. Nothing is cleaned up, because an import or a C call may be under way, in
    which an exception would end as a page of traceback or be lost.
    """
    what = f"stopped while {PHASES[-1].what}" if PHASES else "stopped"
    if first_process():
        os.write(2, f"\n{SCRIPT}: {what}; nothing new is saved, the same command starts again\n".encode())
    os._exit(130)


def first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


class Phase:
    """One thing that takes long: what it is, how far it is, and since when."""

    def __init__(self, what: str, total: int = 0, drawn: bool = True):
        self.what, self.total, self.drawn = what, total, drawn
        self.done, self.note, self.start = 0, "", time.perf_counter()

    def show(self, done: int, note: str = ""):
        """done: of `total`. note: a rate, or a loss."""
        self.done, self.note = done, note

    def words(self) -> str:
        """How far it is, and how long it will take yet at the pace so far."""
        seconds = time.perf_counter() - self.start
        if not self.total:
            return f"{self.what}, {seconds:.0f} s"
        words = f"{self.done}/{self.total}"
        if self.note:
            words += f"  {self.note}"
        if 0 < self.done < self.total and seconds > 1:
            words += f"  {clock(seconds / self.done * (self.total - self.done))} left"
        return f"{self.what} {words}"

    def bar(self) -> str:
        """The same for a terminal, with a bar."""
        if not self.total:
            return self.words()
        bar = "#" * (20 * min(self.done, self.total) // self.total)
        return self.words().replace(self.what, f"{self.what} [{bar:20}]", 1)


def clock(seconds: float) -> str:
    """12 s, 3:05 min, 2:10 h."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"


@contextlib.contextmanager
def doing(what: str, total: int = 0, drawn: bool = True):
    """A phase, within others or alone. total: of what `show` counts; 0: nothing is counted.

    drawn=False: said in a log file where it lasts, but not drawn on a terminal, since text may be printed
    inside. what="": not said at all.
    """
    phase = Phase(what, total, drawn)
    if not what:
        yield phase
        return
    PHASES.append(phase)
    watch()
    try:
        yield phase
    finally:
        PHASES.remove(phase)
        if drawn:
            erase()


def line(say, text: str):
    """A line of results, which may come while something is being done: say(text), on a line of its own."""
    erase()
    say(text)
    SAID[0] = time.perf_counter()


def watch():
    """Starts the thread that looks every 0.2 seconds whether there is something to say."""
    if not TICKING and first_process():
        TICKING.append(threading.Thread(target=tick, daemon=True))
        TICKING[0].start()


def tick():
    while True:
        time.sleep(0.2)
        phases = list(PHASES)
        if phases:
            say(phases[-1], time.perf_counter())


def say(phase: Phase, now: float):
    """Draws the phase, or adds a line for a log file where it is time for one."""
    if moving():
        # A phase of a blink is not drawn.
        if phase.drawn and now - phase.start > 0.3:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + phase.bar()[:width].ljust(min(width, 78)), end="", file=sys.stderr, flush=True)
    elif now - SAID[0] > QUIET:
        SAID[0] = now
        print(f"  .. {phase.words()}", flush=True)


def erase():
    if moving() and first_process():
        width = shutil.get_terminal_size().columns - 1
        print("\r" + " " * min(width, 140) + "\r", end="", file=sys.stderr, flush=True)


def moving() -> bool:
    """Whether a line can be drawn over: a terminal, on the stream that results do not go to."""
    return sys.stderr is not None and sys.stderr.isatty()
