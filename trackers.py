"""Where else the numbers of a run go: Weights & Biases, TensorBoard, and the hub that gets the trained model.

metrics.jsonl stays the record: what is here is a copy under the same names, and nothing is learnt from it.
"""

import json
from pathlib import Path

import config as configs
from screen import what_is_trained

MOST_SAMPLES = 64  # rows of a table of samples
MOST_LETTERS = 4000  # of one text in it

CARD = """---
{base}tags: [grpo, nanogrpo]
---

# {name}

{what}, trained with nanoGRPO for {step} steps of GRPO on `{task}`.

| | accuracy | 95 % interval | mean length |
|---|---|---|---|
{results}

Settings that are not the defaults:

```python
{settings}
```
"""


class Trackers:
    """wandb and TensorBoard, where the config switches them on. For the rank that writes the files."""

    def __init__(self, run):
        cfg = run.cfg
        self.wandb = self.tensorboard = None
        if cfg.wandb:
            import wandb

            # The run's own identity, so that a run which is resumed goes on in the same place there.
            again = dict(resume="allow") if cfg.wandb == "online" else {}
            where = dict(project=cfg.wandb_project, name=run.out.name, dir=str(run.out), id=run.id)
            self.wandb = wandb.init(mode=cfg.wandb, config=run.keys, **where, **again)
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Steps that a killed run wrote and that are made again replace what it wrote.
            self.tensorboard = SummaryWriter(str(run.out / "tensorboard"), purge_step=run.state["step"] + 1)

    def log(self, metrics: dict):
        """The numbers of one step."""
        if self.wandb:
            self.wandb.log(metrics, step=metrics["step"])
        if self.tensorboard:
            for name, value in metrics.items():
                if isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(name, value, metrics["step"])
            self.tensorboard.flush()

    def samples(self, step: int, rows, texts, right):
        """A table of held-out problems and their answers after a step."""
        if not self.wandb:
            return
        import wandb

        table = wandb.Table(columns=["step", "problem", "prompt", "answer", "right"])
        for n, (row, text, is_right) in enumerate(zip(rows, texts, right)):
            if n == MOST_SAMPLES:
                break
            prompt = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"])
            table.add_data(step, n, prompt[:MOST_LETTERS], text[:MOST_LETTERS], is_right)
        self.wandb.log({"eval/samples": table}, step=step)

    def close(self, report: Path):
        """The end of a run. report: the page of the run, which wandb keeps as an artifact."""
        if self.wandb:
            import wandb

            if report.is_file():
                artifact = wandb.Artifact(f"report-{self.wandb.id}", type="report")
                artifact.add_file(str(report))
                self.wandb.log_artifact(artifact)
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


# --------------------------------------------------------------------------------------------- the hub
def push(run, before: dict, after: dict) -> tuple[bool, str]:
    """Uploads the last checkpoint, with a card, to cfg.push_to_hub. Returns whether it went, and a sentence.

    before, after: metrics of evaluations, empty where there was none. The optimiser's state stays here.
    """
    import huggingface_hub

    folder = run.out / "ckpt" / f"step_{run.state['step']:06d}"
    name = run.cfg.push_to_hub
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(name, exist_ok=True)
        card = model_card(run, before, after).encode()
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=name)
        ours = ["optimizer.safetensors", "state.json"]
        api.upload_folder(folder_path=str(folder), repo_id=name, ignore_patterns=ours)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        return False, f"not pushed to {name}: {reason}; the checkpoint is safe: hf upload {name} {folder}"
    return True, f"pushed to https://huggingface.co/{name}"


def model_card(run, before: dict, after: dict) -> str:
    """README.md of the repository: what it is, how good it was before and after, and how it was made."""
    cfg = run.cfg
    rows = []
    for when, metrics in (("before", before), ("after", after)):
        if metrics:
            interval = f"{metrics['eval/strict_low']:.1%} to {metrics['eval/strict_high']:.1%}"
            length = f"{metrics['eval/mean_length']:.0f} tokens"
            rows.append(f"| {when} | {metrics['eval/strict']:.1%} | {interval} | {length} |")
    settings = []
    for key, value in configs.differences(cfg).items():
        settings.append(f"{key} = {configs.shown(value)}")
    return CARD.format(
        base="" if cfg.scratch else f"base_model: {cfg.model}\n",
        name=cfg.push_to_hub.rpartition("/")[2],
        what=what_is_trained(run),
        step=run.state["step"],
        task=configs.task_name(cfg),
        results="\n".join(rows) or "| not evaluated | | | |",
        settings="\n".join(settings),
    )
