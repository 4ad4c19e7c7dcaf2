"""Where else the numbers go: the same ones, under the same names, and a run that is resumed goes on there."""

import sys
import types
from pathlib import Path

import pytest

import checkpoint
import checks
import config as configs
import train
from conftest import even, rows, settings
from test_train import again


class FakeWandb(types.ModuleType):
    """The few calls that we make of wandb, kept in a list."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))
        self.id = options["id"]
        return self

    def log(self, metrics, step):
        self.calls.append(("log", step, dict(metrics)))

    def log_artifact(self, artifact):
        self.calls.append(("artifact", artifact))

    def finish(self):
        self.calls.append(("finish",))

    class Table:
        def __init__(self, columns):
            self.columns, self.data = columns, []

        def add_data(self, *cells):
            assert len(cells) == len(self.columns)
            self.data.append(cells)

    class Artifact:
        def __init__(self, name, type):
            self.name, self.files = name, []

        def add_file(self, path):
            self.files.append(Path(path).read_text())

    def of(self, kind):
        return [call for call in self.calls if call[0] == kind]


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_every_number_a_table_of_samples_and_the_report(tmp_path, wandb):
    cfg = settings(tmp_path, steps=4, eval_every=2, eval_problems=3, wandb="offline")
    assert train.main(cfg) == 0
    written = rows(Path(cfg.out_dir) / "metrics.jsonl")
    logged = {step: metrics for _, step, metrics in wandb.of("log") if "eval/samples" not in metrics}
    for row in written:
        row.pop("run", None)
        told = logged[row["step"]]
        assert told.keys() == row.keys()
        assert all(row[key] is None or told[key] == row[key] for key in row)
    shown = [(step, metrics) for _, step, metrics in wandb.of("log") if "eval/samples" in metrics]
    tables = {step: metrics["eval/samples"] for step, metrics in shown}
    assert sorted(tables) == [0, 2, 4]
    answers = rows(Path(cfg.out_dir) / "rollouts" / "eval_000004.jsonl")
    assert [row[3] for row in tables[4].data] == [answer["completion"] for answer in answers]
    (_, artifact), *more = wandb.of("artifact")
    assert not more and artifact.files[0] == (Path(cfg.out_dir) / "report.html").read_text()
    assert wandb.calls[-1] == ("finish",)


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tmp_path, wandb):
    """Each resume began another run there."""
    cfg = settings(tmp_path, steps=2, save_every=1, wandb="online")
    train.main(cfg)
    train.main(again(cfg, steps=3, resume=True))
    first, second = [options for _, options in wandb.of("init")]
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert [step for _, step, _ in wandb.of("log")] == [1, 2, 3]


@pytest.mark.slow
def test_tensorboard_has_the_same_numbers_also_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = settings(tmp_path, steps=2, save_every=1, tensorboard=True)
    train.main(cfg)
    train.main(again(cfg, steps=4, resume=True))
    events = EventAccumulator(str(Path(cfg.out_dir) / "tensorboard"))
    events.Reload()
    written = rows(Path(cfg.out_dir) / "metrics.jsonl")
    for name in ("reward", "grad_norm", "completions/mean_length"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in written]


# ---------------------------------------------------------------------------------------------- the hub
class FakeHub:
    """The hub's side of an upload."""

    def __init__(self, error=None):
        self.error, self.files = error, {}

    def create_repo(self, name, exist_ok):
        if self.error:
            raise self.error
        self.name = name

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
        assert repo_id == self.name
        self.files[path_in_repo] = path_or_fileobj.decode()

    def upload_folder(self, folder_path, repo_id, ignore_patterns):
        assert repo_id == self.name
        for path in Path(folder_path).iterdir():
            if path.name not in ignore_patterns:
                self.files[path.name] = path


def test_the_model_goes_to_the_hub_with_a_card_and_without_the_optimiser(tmp_path, monkeypatch, capsys):
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    cfg = settings(tmp_path, eval_every=4, eval_problems=8, push_to_hub="me/adder", lora_rank=2)
    assert train.main(cfg) == 0
    assert "pushed to https://huggingface.co/me/adder" in capsys.readouterr().out
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= hub.files.keys()
    assert not {"optimizer.safetensors", "state.json"} & hub.files.keys()
    card, last = hub.files["README.md"], rows(Path(cfg.out_dir) / "metrics.jsonl")[-1]
    assert "# adder" in card and "lora_rank = 2" in card and "before" in card
    assert f"| after | {last['eval/strict']:.1%} |" in card


def test_what_the_checkpoint_holds_for_us_alone_is_what_stays_here(tmp_path):
    """trackers.push leaves out the optimiser and our state by name: here are all names there are."""
    cfg = settings(tmp_path, steps=1)
    train.main(cfg)
    found = checkpoint.newest(cfg.out_dir)
    ours = {path.name for path in found.iterdir()} & {"optimizer.safetensors", "state.json"}
    assert len(ours) == 2


def test_a_push_that_fails_loses_nothing_and_is_no_success(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: FakeHub(OSError("no route to host")))
    cfg = settings(tmp_path, steps=1, push_to_hub="me/adder")
    assert train.main(cfg) == 1
    said = capsys.readouterr().out
    assert "not pushed to me/adder: no route to host; the checkpoint is safe: hf upload me/adder" in said
    assert checkpoint.newest(cfg.out_dir) is not None


@pytest.mark.parametrize(
    "name, sentence", [("adder", "write it as user/name"), ("me/adder", "needs a token")]
)
def test_a_push_that_cannot_work_is_refused_before_anything_runs(monkeypatch, name, sentence):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=sentence):
        checks.config_of("train.py", ["configs/arithmetic.py", f"--push_to_hub={name}"])


# ------------------------------------------------------------------------------------------- stop early
def test_a_run_ends_where_its_goal_is_reached_evaluated_and_saved(tmp_path, capsys):
    cfg = settings(tmp_path, steps=50, save_every=0, eval_every=50, eval_problems=4, stop_at="reward>=0.3")
    assert train.main(cfg) == 0
    written = rows(Path(cfg.out_dir) / "metrics.jsonl")
    assert 1 <= written[-1]["step"] < 50 and written[-1]["reward"] >= 0.3
    assert all(row["reward"] < 0.3 for row in written[1:-1])
    assert "eval/strict" in written[-1]
    assert checkpoint.newest(cfg.out_dir).name == f"step_{written[-1]['step']:06d}"
    capsys.readouterr()
    assert train.main(again(cfg, resume=True)) == 0
    said = capsys.readouterr().out
    assert "stop_at='reward>=0.3' is reached" in said
    assert rows(Path(cfg.out_dir) / "metrics.jsonl") == written


@pytest.mark.slow
def test_a_goal_of_an_evaluation_is_looked_at_after_one(tmp_path):
    cfg = settings(
        tmp_path, rewards=[(even, 1.0)], steps=6, eval_every=2, eval_problems=4, stop_at="eval/mean_length>0"
    )
    train.main(cfg)
    assert [row["step"] for row in rows(Path(cfg.out_dir) / "metrics.jsonl")] == [0]  # it was there before
    cfg = again(cfg, out_dir=str(tmp_path / "other"), stop_at="eval/problems>=5")
    assert train.main(cfg) == 0 and rows(tmp_path / "other" / "metrics.jsonl")[-1]["step"] == 6


@pytest.mark.parametrize(
    "goal, sentence",
    [
        ("eval/strict", "is no goal"),
        ("eval/strict>=", "is no goal"),
        ("eval/strict==1", "is no goal"),
        ("reward>=1.2.3", "is no goal"),
        ("rewerd>=1", "no metric 'rewerd', but reward"),
        ("eval/strickt>=1", "no metric 'eval/strickt', but eval/strict"),
    ],
)
def test_a_goal_that_nothing_can_reach_is_said(tmp_path, goal, sentence, capsys):
    cfg = settings(tmp_path, steps=2, eval_every=2, eval_problems=2)
    try:
        configs.check_values(again(cfg, stop_at=goal))
        train.main(again(cfg, stop_at=goal))
        said = capsys.readouterr().out
    except ValueError as error:
        said = str(error)
    assert sentence in said
    with pytest.raises(ValueError, match="eval_every = 0 makes none"):
        configs.check_values(again(cfg, stop_at="eval/strict>=1", eval_every=0))


GOALS = {"reward>=0.5": True, "reward>0.5": False, "reward<=.5": True, "reward < 5e-1": False, "kl<1": False}


def test_goals_compare_as_they_are_written():
    metrics = {"completions/mean_length": 3.0, "reward": 0.5, "kl": None}
    for goal, reached in GOALS.items():
        assert configs.goal_reached(goal, metrics) == reached, goal
