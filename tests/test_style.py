"""The promises of the code's form: width, imports that point one way, files that can be copied out alone."""

import ast
import re
import subprocess
import sys

import pytest

import config as configs
from conftest import ROOT

# Which of the root's files each may import. Kernels, tasks and the standard library are not counted here.
MAY_IMPORT = {
    # pure: torch, numpy and the standard library
    "loss": set(),
    "data": set(),
    "blocks": set(),
    "optim": {"blocks"},
    "checkpoint": set(),
    "ranks": set(),
    "shape": set(),
    "cache": set(),
    "rundir": {"checkpoint"},
    "shard": {"cache", "lora", "optim", "ranks"},
    "fingerprint": set(),
    "progress": set(),
    "memory": {"cache"},
    "plan": {"checks", "config", "memory", "shape"},
    "usage": set(),
    "picture": set(),
    "report": {"picture"},  # reads what a run left: nothing of a run knows of it but train.py's last line
    # a model, and sampling from it
    "packing": set(),
    "nf4": {"blocks"},
    "model": {"nf4", "packing", "shape"},
    "lora": set(),
    "decode": {"cache"},
    "parking": {"cache", "decode"},
    "rollout": {"cache", "decode", "model", "parking", "progress"},
    # what a run needs
    "config": {"loss", "usage"},  # an objective's keywords are config keys
    "rewards": {"data"},
    "turns": {"data", "rewards"},
    "policy": {"checkpoint", "data", "lora", "model"},
    "head": {"loss"},
    "batch": {"loss", "model", "ranks", "rollout"},
    "evaluation": {"data", "rewards"},
    "checks": {"config", "data", "memory", "policy", "progress", "rewards", "shape", "turns", "usage"},
    "warmup": {"data", "model", "optim", "progress"},
    "screen": {"config", "data", "evaluation", "memory", "nf4", "policy", "ranks", "rewards"},
    "trackers": {"config", "screen"},
    "log": {"checkpoint", "config", "data", "ranks", "rewards", "screen", "trackers"},
}
MAY_IMPORT["run"] = {"checkpoint", "config", "data", "lora", "loss", "optim", "policy", "ranks", "rewards"}
MAY_IMPORT["run"] |= {"checks", "fingerprint", "memory", "nf4", "progress", "rollout", "rundir", "shard"}
MAY_IMPORT["run"] |= {"turns", "warmup"}
SCRIPTS = ("train", "eval", "sample", "sft")
FOLDERS = (ROOT, ROOT / "kernels", ROOT / "tasks", ROOT / "configs", ROOT / "bench")
FILES = sorted(path for folder in FOLDERS for path in folder.glob("*.py"))
ALONE = ["loss", "data", "blocks", "ranks", "shape", "kernels/switch", "kernels/attention"]
# With kernels/switch.py beside it, and nothing else of ours.
SANDBOX = "sandbox isolation launcher confine seccomp inside judging".split()
SANDBOX = [f"tasks/{name}.py" for name in SANDBOX]
WITH_SWITCH = ["flash_attention", "logprob", "lora_linear", "nf4", "rms_norm", "rope", "sample", "swiglu"]


def name_of(path):
    return f"{path.parent.name}/{path.name}"


def imported(path) -> set[str]:
    """The first words of what a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def siblings() -> set[str]:
    return {path.stem for path in ROOT.glob("*.py")}


def test_every_file_has_its_place_in_the_order_of_imports():
    assert siblings() == MAY_IMPORT.keys() | set(SCRIPTS)


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_imports_point_one_way(name):
    assert imported(ROOT / f"{name}.py") & siblings() <= MAY_IMPORT[name]


def test_the_order_of_imports_has_no_circle():
    left = dict(MAY_IMPORT)
    while left:
        leaves = [name for name, needs in left.items() if not needs & left.keys()]
        assert leaves, f"a circle among {sorted(left)}"
        for name in leaves:
            del left[name]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_script_is_no_library(path):
    if path.parent != ROOT / "bench":  # a bench measures train.py's own functions
        assert not imported(path) & set(SCRIPTS)


def test_kernels_and_tasks_need_nothing_of_the_run():
    for path in FILES:
        allowed = {"kernels": {"kernels"}, "tasks": {"data", "tasks"}}.get(path.parent.name)
        if allowed:
            assert imported(path) & (siblings() | {"kernels", "tasks"}) <= allowed, name_of(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_begins_by_saying_what_it_is(path):
    assert len(ast.get_docstring(ast.parse(path.read_text()))) > 60


def test_no_line_is_wider_than_110():
    for path in FILES + sorted((ROOT / "tests").glob("*.py")):
        wide = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
        assert not wide, f"{name_of(path)}: {wide}"


def test_no_bare_except_and_no_swallowed_error():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                swallows = all(isinstance(line, ast.Pass) for line in node.body)
                assert node.type is not None and not swallows, f"{path.name}:{node.lineno}"


def test_model_text_is_never_evaluated():
    for path in FILES:
        if path.name in ("inside.py", "judging.py", "launcher.py"):  # no process of ours imports these
            continue
        called = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(node.func.id)
        assert not {"eval", "exec", "compile", "__import__"} & called, path.name


# Imports each module from a folder of its own, which holds nothing else of ours. One process for all of them:
# torch and Triton take seconds to import.
IMPORT_EACH = """
import importlib, sys
for folder, module in zip(sys.argv[1::2], sys.argv[2::2]):
    sys.path.insert(0, folder)
    importlib.import_module(module)
    del sys.path[0]
    for name in [name for name in sys.modules if name.split(".")[0] == module.split(".")[0]]:
        del sys.modules[name]
"""


def import_each(tmp_path, wanted: dict[str, list[str]]):
    """wanted: module -> the files that it may need, as paths from the repository's root."""
    arguments = []
    for module, files in wanted.items():
        folder = tmp_path / module
        for file in files:
            target = folder / (file if module.startswith("kernels.") else file.split("/")[-1])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text((ROOT / file).read_text())
        arguments += [str(folder), module]
    elsewhere = dict(cwd=tmp_path, capture_output=True, text=True)
    out = subprocess.run([sys.executable, "-c", IMPORT_EACH, *arguments], **elsewhere)
    assert out.returncode == 0 and not out.stdout, out.stdout + out.stderr


@pytest.mark.slow
def test_files_can_be_copied_out_alone_and_kernels_with_their_switch(tmp_path):
    alone = {name.split("/")[-1]: [f"{name}.py"] for name in ALONE}
    pair = {f"kernels.{name}": ["kernels/switch.py", f"kernels/{name}.py"] for name in WITH_SWITCH}
    import_each(tmp_path, alone | pair)


def test_the_sandbox_can_be_copied_out(tmp_path):
    for file in SANDBOX:
        target = tmp_path / file
        target.parent.mkdir(exist_ok=True)
        target.write_text((ROOT / file).read_text())
    program = "from tasks import sandbox; print(sandbox.check('def f(): return 1', ['assert f() == 1']))"
    out = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout == "['passed']\n", out.stderr


def test_every_config_loads():
    for path in (ROOT / "configs").glob("*.py"):
        configs.load([str(path)])


def test_readme_names_files_commands_and_keys_that_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\(([\w/.]+)\)", text):
        assert (ROOT / name).exists(), name
    for script in re.findall(r"python (\w+\.py)", text):
        assert (ROOT / script).exists(), script
    of_the_project = re.sub(r"python bench/[^`\n]*", "", text)  # a bench has flags of its own
    for key in re.findall(r"--(\w+)=", of_the_project):
        assert key in configs.FIELDS or key in ("nproc_per_node", "gpu_gb"), key
    assert len(re.findall(r"python -m pytest$", text, re.M)) == 1  # .ci/run takes this line
