"""bench/terminal.py: what is drawn is what a terminal would show."""

import sys
import xml.dom.minidom

from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import terminal  # noqa: E402


def text_of(lines) -> list[str]:
    return ["".join(character for character, _ in line) for line in lines]


def test_a_line_that_moves_is_drawn_over_and_a_long_one_goes_on():
    screen = terminal.Terminal()
    screen.write("10 %\r20 %\n" + "x" * (terminal.COLUMNS + 3) + "\nlast")
    assert text_of(screen.screen()) == ["20 %", "x" * terminal.COLUMNS, "xxx", "last"]
    screen.write("\n" * 2 * terminal.LINES + "end")
    assert len(screen.screen()) == terminal.LINES and text_of(screen.screen())[-1] == "end"


def test_styles_are_drawn_and_text_is_text():
    screen = terminal.Terminal()
    screen.write("a\033[32mgreen\033[0m <b>&")
    drawn = terminal.drawn(["python", "x.py"], [("at the end", screen.screen())])
    assert '<tspan style="fill:#7ee787">green</tspan>' in drawn and "&lt;b&gt;&amp;" in drawn
    xml.dom.minidom.parseString(drawn)


def test_a_command_is_recorded_with_its_colours_from_its_own_terminal():
    program = "import sys; print(sys.stdout.isatty(), '\\033[1mbold\\033[0m')"
    frames = terminal.recorded([sys.executable, "-c", program])
    assert len(frames) == 1 and frames[0][0].startswith("at the end")
    assert text_of(frames[0][1])[0] == "True bold" and ("b", "1") in frames[0][1][0]
