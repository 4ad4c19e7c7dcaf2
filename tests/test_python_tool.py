"""tasks/python_tool.py: a message's program is run in the sandbox, and a short text comes back always."""

import time

import pytest

import config as configs
import rewards
import train
import turns
from conftest import settings
from tasks import sandbox
from tasks.python_tool import LONGEST, env, reply


def block(program):
    return f"Let me see.\n```python\n{program}\n```"


pytestmark = pytest.mark.skipif(not sandbox.isolation(), reason="no program can be run here")


@pytest.mark.parametrize(
    "program, text",
    [
        ("print(6 * 7)", "42"),
        ("x = 48 / 2\nprint(x)\nprint('done')", "24.0\ndone"),
        ("1 + 1", "[no output: print what you want to see]"),
        ("print(1)\n1 / 0", "1\nZeroDivisionError: division by zero (line 2)"),
        ("print('a'", "SyntaxError: '(' was never closed (program.py, line 1)"),
        ("import sys\nprint(7)\nsys.exit(3)", "7\n[ended with status 3]"),
        ("print('a\\0b')", "a\ufffdb"),
        ("if __name__ == '__main__':\n    print('main')", "main"),
    ],
)
def test_what_a_program_prints_comes_back(program, text):
    assert env({}, block(program)) == text


def test_a_message_without_a_program_is_the_answer():
    assert env({}, "The answer is \\boxed{42}.") is None
    assert env({}, "```\n# only a comment\n```") is None


def test_a_long_output_is_cut_in_the_middle():
    text = env({}, block("print('a' * 5000 + 'end')"))
    assert text.startswith("aaa") and text.endswith("end") and "characters left out" in text
    assert len(text) < LONGEST + 60
    assert reply("", "too slow") == "[too slow]"


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "print('x' * 50_000_000)",
        "open('/etc/passwd').read()\nprint('read')\nimport socket\nsocket.create_connection(('1.1.1.1', 80))",
        "import os\nos.kill(os.getppid(), 9)",
        "x = [0] * 10**10",
        "import os\nwhile True: os.fork()",
        "import os\nos._exit(0)",
        "import os\nos.close(1)\nos.close(2)\nprint('x')",
        "import os\nos.write(1, b'\\xff\\xfe\\x00' * 100)",
        "input()",
        "def f(): f()\nf()",
        "import builtins\nbuiltins.print = builtins.BaseException = builtins.Exception = None\n1 / 0",
        "raise KeyboardInterrupt",
        "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: pass",
    ],
)
def test_a_hostile_program_gets_a_short_reply_in_time(program):
    start = time.monotonic()
    text = env({}, block(program))
    assert 0 < len(text) < LONGEST + 100 and time.monotonic() - start < 60


def test_an_environment_that_runs_code_asks_for_the_sandbox(tmp_path, capsys):
    """Its isolation is said in the run's first lines, as for the reward `code`."""
    assert rewards.runs_code([], turns.resolve("python_tool"))
    cfg = settings(tmp_path, env="python_tool", max_turns=2, steps=1, sandbox="auto")
    assert train.main(cfg) == 0
    told = capsys.readouterr().out
    assert "environment: python_tool" in told and "sandbox" in told
    assert configs.load(["configs/python_tool.py"]).sandbox == "strict"
