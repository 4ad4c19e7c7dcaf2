"""Tasks that grade in a way of their own: the rows and the reward of a task in one file.

A file has a function `task(*, data_dir, eval_problems, **options) -> (train, eval_rows)`,
which data.load_task calls, and a reward `f(completions, prompts, **columns) -> list[float |
None]`, which rewards.py puts into REWARDS. It imports data.py and nothing else of ours, so the
two can be copied out together.
"""
