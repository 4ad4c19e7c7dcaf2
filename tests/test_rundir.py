"""rundir.py: a folder holds one run. Each test tells what once went wrong."""

import json
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

import checkpoint
import lora
import rundir
import train
from conftest import even, rows, same, settings, untimed, weights
from policy import load_policy


def again(cfg, **keys):
    return type(cfg)(**{**cfg.__dict__, **keys})


def steps_of(folder):
    return sorted(path.name for path in (Path(folder) / "ckpt").iterdir())


def test_a_new_run_in_a_used_folder_moves_the_old_one_aside_whole(tmp_path, capsys):
    """It emptied metrics.jsonl and kept the old checkpoints, and a resume took the older run's newest."""
    first = settings(tmp_path, steps=4)
    train.main(first)
    kept = weights(tmp_path / "run" / "ckpt" / "step_000004")
    train.main(again(first, seed=1, steps=2))
    assert f"held an earlier run, which is now {tmp_path / 'run.1'}" in capsys.readouterr().out
    assert steps_of(tmp_path / "run") == ["step_000002"]
    assert same(kept, weights(tmp_path / "run.1" / "ckpt" / "step_000004"))
    assert len(rows(tmp_path / "run.1" / "metrics.jsonl")) == 4
    train.main(again(first, seed=2, steps=2))
    assert (tmp_path / "run.2").is_dir()
    # And each can be gone on with, where it is now.
    train.main(again(first, steps=5, resume=True, out_dir=str(tmp_path / "run.1")))
    assert rows(tmp_path / "run.1" / "metrics.jsonl")[-1]["step"] == 5


def test_an_identity_stands_in_config_metrics_and_checkpoints_and_stays_on_resume(tmp_path):
    cfg = settings(tmp_path, steps=2)
    train.main(cfg)
    train.main(again(cfg, steps=4, resume=True))
    run = rundir.read(cfg.out_dir)["run"]
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert metrics[0]["run"] == run and not any("run" in row for row in metrics[1:])
    for name in steps_of(cfg.out_dir):
        assert checkpoint.load_state(Path(cfg.out_dir) / "ckpt" / name)[1]["run"] == run


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path, capsys):
    cfg = settings(tmp_path, steps=2)
    other = again(cfg, seed=1, steps=4, out_dir=str(tmp_path / "other"))
    train.main(cfg)
    train.main(other)
    (tmp_path / "other/ckpt/step_000004").rename(tmp_path / "run/ckpt/step_000004")
    capsys.readouterr()
    train.main(again(cfg, steps=3, resume=True))
    told = capsys.readouterr().out
    assert "is of another run and is passed over" in told and "resumed from step 2" in told


@pytest.mark.slow
def test_an_adapter_moved_aside_still_sits_on_its_own_start(tmp_path):
    """The path of its base became the start of the run that came after it."""
    keys = dict(steps=2, lora_rank=2, lora_alpha=4.0, sft_steps=2, sft_batch=4)
    train.main(settings(tmp_path, **keys))
    train.main(settings(tmp_path, **keys, seed=1))
    saved = tmp_path / "run.1" / "ckpt" / "step_000002"
    assert lora.read_config(str(saved))["base_model_name_or_path"] == str(tmp_path / "run.1" / "start")
    assert load_policy(str(saved))[3] == str(tmp_path / "run.1" / "start")
    assert checkpoint.newest(tmp_path / "run.1") == saved  # its manifest is that of the files as they are


@pytest.mark.parametrize(
    "key, value", [("sft_lr", 1e-4), ("prompts_per_step", 2), ("task_options", {"digits": 3})]
)
def test_what_data_and_draws_depend_on_cannot_change_on_resume(tmp_path, key, value):
    cfg = settings(tmp_path, steps=2)
    train.main(cfg)
    with pytest.raises(ValueError, match=f"{key}.*go on with the same values"):
        train.main(again(cfg, resume=True, **{key: value}))


def test_what_may_change_is_said(tmp_path, capsys):
    cfg = settings(tmp_path, steps=2)
    train.main(cfg)
    train.main(again(cfg, steps=3, lr=5e-3, resume=True))
    assert "changed since the run was started: steps 2 -> 3, lr 0.01 -> 0.005" in capsys.readouterr().out
    train.main(again(cfg, steps=3, lr=5e-3, resume=True))
    assert "already done: step 3 of steps=3" in capsys.readouterr().out


def test_with_every_checkpoint_damaged_a_resume_touches_nothing(tmp_path):
    cfg = settings(tmp_path, steps=2)
    train.main(cfg)
    before = (tmp_path / "run/metrics.jsonl").read_text()
    (tmp_path / "run/ckpt/step_000002/model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        train.main(again(cfg, resume=True))
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_a_checkpoint_that_is_the_whole_model_resumes_without_the_one_it_came_from(tmp_path):
    """A look for the base, meant for runs that start, refused it."""
    train.main(settings(tmp_path, steps=1, out_dir=str(tmp_path / "base")))
    base = tmp_path / "base" / "ckpt" / "step_000001"
    cfg = settings(tmp_path, steps=2, scratch=None, model=str(base))
    train.main(cfg)
    base.rename(tmp_path / "gone")
    train.main(again(cfg, steps=3, resume=True))
    assert "step_000003" in steps_of(cfg.out_dir)


def test_a_folder_that_we_stand_in_is_not_moved(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(dict(config={})))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="we stand in it"):
        rundir.claim(tmp_path)


def test_an_evaluation_that_an_interrupt_ended_is_made_up_on_resume(tmp_path, monkeypatch):
    cfg = settings(tmp_path, steps=2, eval_every=2, eval_problems=3)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_, **__: ({}, []))  # as one that was asked to stop
        train.main(cfg)
    assert "eval/strict" not in rows(tmp_path / "run/metrics.jsonl")[-1]
    train.main(again(cfg, resume=True))
    last = rows(tmp_path / "run/metrics.jsonl")[-1]
    assert last["step"] == 2 and "eval/strict" in last and "reward" in last


def test_stray_files_and_links_under_ckpt_break_no_save(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("x")
    ckpt = tmp_path / "run" / "ckpt"
    cfg = settings(tmp_path, steps=2)
    train.main(cfg)
    (ckpt / ".tmp-x").write_text("stray")
    (ckpt / ".tmp-link").symlink_to(elsewhere)
    train.main(again(cfg, steps=4, resume=True))
    assert "step_000004" in steps_of(cfg.out_dir)
    assert (elsewhere / "mine").read_text() == "x"


@pytest.mark.parametrize("failure, ends", [("warn", 0), ("stop", 1)])
def test_a_disk_that_is_full_is_said_and_leaves_no_half_save(tmp_path, monkeypatch, capsys, failure, ends):
    cfg, full = settings(tmp_path, steps=4, save_failure=failure), []
    save_file = checkpoint.save_file

    def out_of_space(*arguments):
        if not full:
            full.append(1)
            raise OSError(28, "No space left on device")
        return save_file(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", out_of_space)
    assert train.main(cfg) == ends
    told = capsys.readouterr().out
    assert "step 2 could not be saved" in told and "No space left on device" in told
    assert not list((tmp_path / "run/ckpt").glob(".tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys, count",
    [
        (dict(keep=1), 2),
        (dict(keep=0), 4),
        (dict(save_every=0), 1),
        (dict(save_every=3, keep=0), 2),
    ],
)
def test_a_disk_too_small_for_what_will_be_saved_is_said_before_the_first_step(
    tmp_path, monkeypatch, capsys, keys, count
):
    cfg = settings(tmp_path, **dict(save_every=1) | keys)
    one = train.Run(cfg).checkpoint_bytes()
    train.main(cfg)
    saved = sum(f.stat().st_size for f in (tmp_path / "run" / "ckpt" / "step_000004").iterdir())
    assert 0.8 * saved < one < saved  # what it counts with is what is written
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=count * one - 1))
    capsys.readouterr()
    assert train.main(cfg) == 0
    said = capsys.readouterr().out
    assert f"warning: {count} more checkpoints of" in said
    assert said.index("warning") < said.index("step   reward")
    with pytest.raises(ValueError, match="make room"):
        train.main(again(cfg, save_failure="stop"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=count * one))
    assert train.main(cfg) == 0 and "warning" not in capsys.readouterr().out


@contextmanager
def largest_file(size):
    """The system refuses to write a file beyond this many bytes: errors of real writes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_safetensors_meets_on_a_full_disk_is_an_oserror(tmp_path):
    """It has an error type of its own: a full disk ended the run in a traceback, with nothing said."""
    cfg = settings(tmp_path, steps=1, save_every=0)
    train.main(cfg)
    run = train.Run(again(cfg, out_dir=str(tmp_path / "second")))
    with largest_file(40_000), pytest.raises(OSError, match="File too large"):
        run.save(run.moments())
    assert not list((tmp_path / "second" / "ckpt").iterdir())


def test_a_start_that_does_not_fit_is_one_sentence(tmp_path):
    with (
        largest_file(40_000),
        pytest.raises(ValueError, match="the model that training starts from could not"),
    ):
        train.main(settings(tmp_path, scratch=settings(tmp_path).scratch))


@pytest.mark.slow
def test_metrics_that_a_full_disk_did_not_take_are_written_later_and_none_is_torn(tmp_path, capsys):
    """A row that failed was lost, half of it stayed in the file, and the save that followed hid it."""
    cfg = settings(tmp_path, steps=4, save_every=1, rollouts_every=1)
    train.main(again(cfg, out_dir=str(tmp_path / "whole")))
    metrics = tmp_path / "run" / "metrics.jsonl"
    calls, limits = [], []

    def fills_up(completions, **_):
        """From the second step's reward on a file may be 10 bytes longer than metrics.jsonl is; at the
        fourth's there is room again.
        """
        calls.append(1)
        if len(calls) == 2:
            limits.append(resource.getrlimit(resource.RLIMIT_FSIZE))
            resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size + 10, limits[0][1]))
        if len(calls) == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits[0])
        return even(completions)

    fills_up.__name__ = "even"
    capsys.readouterr()
    try:
        assert train.main(again(cfg, rewards=[(fills_up, 1.0)])) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits[0])
    told = capsys.readouterr().out
    assert "metrics.jsonl could not be written (File too large); its rows are kept and written later" in told
    assert "rollouts/step_000002.jsonl could not be written" in told and "going on without it" in told
    assert "step 2 could not be saved" in told and "step_000001 is safe; going on to the next save" in told
    assert steps_of(cfg.out_dir) == ["step_000001", "step_000004"]
    wanted = rows(tmp_path / "whole" / "metrics.jsonl")
    assert list(map(untimed, rows(metrics))) == list(map(untimed, wanted))


def test_a_last_save_that_fails_is_no_success(tmp_path, monkeypatch, capsys):
    """The run ended with status 0 and named a checkpoint that was not there."""
    cfg = settings(tmp_path, steps=2)

    def out_of_space(*arguments):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(checkpoint, "save_file", out_of_space)
    assert train.main(cfg) == 1
    told = capsys.readouterr().out
    assert "step 2 could not be saved" in told and "Disk quota exceeded" in told and "--resume=True" in told
    monkeypatch.undo()
    assert train.main(again(cfg, resume=True)) == 0


@pytest.mark.slow
def test_a_step_whose_evaluation_fails_keeps_its_row(tmp_path):
    """The step was saved and its row not yet written, so a resumed run went on after it without one."""
    cfg = settings(tmp_path, steps=4, save_every=0, eval_every=2, eval_problems=3)
    train.main(again(cfg, out_dir=str(tmp_path / "whole")))
    calls = []

    def fails_once(completions, **_):
        calls.append(len(completions))
        if len(calls) == 4:  # the evaluation before training, two steps, and the evaluation after the second
            assert calls[-1] == 3
            raise OSError("no such service")
        return even(completions)

    fails_once.__name__ = "even"
    assert train.main(again(cfg, rewards=[(fails_once, 1.0)])) == 1
    assert steps_of(cfg.out_dir) == ["step_000002"]
    assert train.main(again(cfg, resume=True)) == 0
    found = [rows(tmp_path / name / "metrics.jsonl") for name in ("run", "whole")]
    assert [untimed(row) for row in found[0]] == [untimed(row) for row in found[1]]


def test_what_a_kill_in_the_last_save_left_goes_when_the_run_is_resumed(tmp_path):
    """A run that is done saves no more, and only saves swept: an old checkpoint's bytes stayed for good."""
    cfg = settings(tmp_path, steps=2)
    train.main(cfg)
    (tmp_path / "run/ckpt/.tmp-step_000001").mkdir()
    (tmp_path / "run/ckpt/step_000002").rename(tmp_path / "run/ckpt/.old-step_000002")
    assert train.main(again(cfg, resume=True)) == 0
    assert steps_of(cfg.out_dir) == ["step_000002"]


def test_a_run_of_an_older_version_had_the_defaults_of_keys_that_came_later(tmp_path):
    """It could be resumed with another value of such a key, --base=nf4 for one, and nothing was said."""
    cfg = settings(tmp_path, steps=1, save_every=1, lora_rank=2)
    train.main(cfg)
    path = Path(cfg.out_dir) / "config.json"
    about = json.loads(path.read_text())
    del about["config"]["base"]
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="base 'dense'; this run has base 'nf4'"):
        train.main(again(cfg, steps=2, resume=True, base="nf4"))
    assert train.main(again(cfg, steps=2, resume=True)) == 0
