"""Python as a tool: an environment that runs the program of a message and replies with what it prints.

    env, env_role = "python_tool", "user"                           # in a config file: configs/python_tool.py

A message with a block between ```python and ``` is run in the sandbox (tasks/sandbox.py: no network, no
files, time and memory limited), and its output comes back as the next message. A message without one is the
answer, and ends the row. Each program starts anew: nothing is kept between two of them. The sandbox is
imported where it is needed and nowhere else.

Tests: python -m pytest tests/test_python_tool.py
"""

SECONDS, MEMORY_MB = 4.0, 512
LONGEST = 2000  # characters of output that come back
# What the program runs in: an error ends in its last line, as a person would read it, and not in a status.
HARNESS = """import sys
try:
    exec(compile({source!r}, "program.py", "exec"), {{"__name__": "__main__"}})
except Exception as error:
    line = error.__traceback__.tb_next and error.__traceback__.tb_next.tb_lineno
    where = f" (line {{line}})" if line else ""
    print(f"{{type(error).__name__}}: {{error}}{{where}}")
"""


def env(row: dict, said: str) -> str | None:
    """What the message's program prints, or None where it has none. SandboxError: it could not be run."""
    from tasks import sandbox
    from tasks.code import python_block

    program = python_block(said)
    if not program:
        return None
    output, why = sandbox.run(HARNESS.format(source=program), seconds=SECONDS, memory_mb=MEMORY_MB)
    return reply(output, why)


env.runs_code = True  # so the key `sandbox` counts, and a run says how well programs are shut in


def reply(output: str, why: str) -> str:
    """The output for the model: whole, or its beginning and end; and why the program did not end well."""
    text = output.replace("\0", "\ufffd").rstrip()
    if len(text) > LONGEST:
        left = len(text) - LONGEST
        text = f"{text[: LONGEST // 2]}\n[{left:,} characters left out]\n{text[-LONGEST // 2 :]}"
    if why:
        text += f"\n[{why}]"
    return text.strip() or "[no output: print what you want to see]"
