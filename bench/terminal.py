"""What a person sees of a command on a terminal, as an SVG: the last lines after 5 s, 30 s, and at the end.

    python bench/terminal.py docs/terminal.svg -- python train.py configs/arithmetic.py

The command runs in a terminal of its own (a pty) of 110 columns. Colours, bold and lines that move are drawn
as a terminal would; nothing else that a terminal can do is needed. Linux and macOS.
"""

import fcntl
import html
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

COLUMNS, LINES = 110, 26
AT = (5.0, 30.0)  # seconds; and at the end
COLOURS = {"1": "#ffffff", "2": "#8b949e", "32": "#7ee787"}  # of the styles that screen.py has
CHARACTER, LINE, MARGIN = 7.2, 16, 14  # pixels


class Terminal:
    """Lines of (character, style) cells, as far as \\r, \\n and colours go."""

    def __init__(self):
        self.lines, self.column, self.style = [[]], 0, ""

    def write(self, text: str):
        for piece in re.split(r"(\033\[\d*m|\r|\n)", text):
            if piece.startswith("\033"):
                self.style = piece[2:-1].replace("0", "")
            elif piece == "\r":
                self.column = 0
            elif piece == "\n":
                self.lines.append([])
                self.column = 0
            else:
                self.put(piece)

    def put(self, text: str):
        line = self.lines[-1]
        for character in text:
            if self.column == COLUMNS:  # it goes on in the next line
                self.lines.append([])
                line, self.column = self.lines[-1], 0
            line += [(" ", "")] * (self.column + 1 - len(line))
            line[self.column] = (character, self.style)
            self.column += 1

    def screen(self) -> list[list]:
        """The last lines, copied."""
        return [list(line) for line in self.lines[-LINES:]]


def recorded(command: list[str]) -> list[tuple[str, list]]:
    """(when, the screen then) of a command's run. The run must end with status 0."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = dict(os.environ, TERM="xterm-256color", COLUMNS=str(COLUMNS), LINES=str(LINES))
    environment.pop("NO_COLOR", None)
    start, terminal, frames, waiting = time.monotonic(), Terminal(), [], list(AT)
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    while True:
        try:
            said = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not said:
            break
        while waiting and time.monotonic() - start > waiting[0]:
            frames.append((f"after {waiting.pop(0):.0f} s", terminal.screen()))
        terminal.write(said.decode(errors="replace"))
    if process.wait():
        raise SystemExit(f"the command ended with status {process.returncode}")
    frames.append((f"at the end, after {time.monotonic() - start:.0f} s", terminal.screen()))
    return frames


def drawn(command: list[str], frames: list) -> str:
    """The frames below each other, as SVG."""
    width, y, parts = COLUMNS * CHARACTER + 2 * MARGIN, MARGIN, []
    for when, lines in frames:
        title = f"$ {' '.join(command)}    ({when})"
        y += LINE
        parts.append(f'<text x="{MARGIN}" y="{y}" fill="#79c0ff">{html.escape(title)}</text>')
        for line in lines:
            y += LINE
            parts.append(f'<text x="{MARGIN}" y="{y}">{spans(line)}</text>')
        y += 2 * LINE
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {y:.0f}" width="{width:.0f}">'
    style = "text{white-space:pre;font:12px ui-monospace,Menlo,Consolas,monospace;fill:#c9d1d9}"
    box = f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/><style>{style}</style>'
    return "\n".join([head, box, *parts, "</svg>\n"])


def spans(line: list) -> str:
    """A line's cells, those of one style together."""
    found = []
    for character, style in line:
        if found and found[-1][1] == style:
            found[-1][0] += character
        else:
            found.append([character, style])
    words = []
    for text, style in found:
        colour = f' style="fill:{COLOURS[style]}"' if style in COLOURS else ""
        words.append(f"<tspan{colour}>{html.escape(text)}</tspan>")
    return "".join(words)


def main(argv: list[str]):
    if "--" not in argv[1:]:
        raise SystemExit(__doc__)
    split = argv.index("--")
    frames = recorded(argv[split + 1 :])
    Path(argv[0]).write_text(drawn(argv[split + 1 :], frames))
    print(f"{argv[0]}: {', '.join(when for when, _ in frames)}")


if __name__ == "__main__":
    main(sys.argv[1:])
