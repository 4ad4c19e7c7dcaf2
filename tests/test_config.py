"""Config files and flags: what is taken, and the sentence for what is not."""

import dataclasses

import pytest

import config as configs


def write(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


def test_file_sets_keys_and_flags_win(tmp_path):
    path = write(tmp_path, "lr, steps = 1, 7\nlora_targets = ['q_proj']\n")
    c = configs.load([path, "--steps=9", "--slots=3", "--system_prompt=12", "--resume=True"])
    assert (c.lr, c.steps, c.slots, c.lora_targets, c.resume) == (1.0, 9, 3, ("q_proj",), True)
    assert type(c.lr) is float and c.system_prompt == "12"  # an int promotes to float; strings are verbatim
    assert c.out_dir.endswith("mine")


def test_file_may_define_rewards_and_helpers_of_its_own(tmp_path):
    path = write(
        tmp_path,
        "import math\n_half = 0.5\n"
        "def mine(completions, **_):\n    return [_half] * len(completions)\n"
        "rewards = [(mine, 1.0)]\n",
    )
    function, weight = configs.load([path]).rewards[0]
    assert function(completions=["a", "b"]) == [0.5, 0.5] and weight == 1.0


def test_file_is_run_in_a_namespace_of_its_own(tmp_path):
    configs.load([write(tmp_path, "lr = 1e-5\ndef read(*_):\n    return {}\n_FIELDS = None\n")])
    assert configs.read is not None and configs.FIELDS and not hasattr(configs, "_FIELDS")


@pytest.mark.parametrize(
    "text, flags, words",
    [
        ("learning_rat = 1\n", [], "unknown key 'learning_rat'"),
        ("group_sise = 4\n", [], "did you mean 'group_size'"),
        ("lr = 1e-5\n", ["--prompts_per_stepp=2"], "did you mean 'prompts_per_step'"),
        ("steps = 1.5\n", [], "int is wanted"),
        ("steps = '3'\n", [], "int is wanted"),
        ("lr = True\n", [], "float is wanted"),
        ("lr = 1e-5\n", ["--steps=many"], "int is wanted"),
        ("lr = 1e-5\n", ["--steps"], "write --steps=VALUE"),
        ("lr = 1e-5\n", ["more.py"], "one config file too many"),
        ("objective = 'ppo'\n", [], "'clip'"),
        ("group_size = 1\n", [], "an advantage of your own"),
        # The sentence used to send people here, where every advantage is 0, too.
        ("group_size, advantage = 1, 'none'\n", [], "an advantage of your own"),
        ("group_size = 0\n", [], "too small"),
        ("temperature = 0\n", [], "nothing could be learnt"),
        ("preset = 'ppo'\n", [], "'dr_grpo'"),
        ("top_entropy = 0.0\n", [], "above 0"),
        ("mismatch_clip = 0\n", [], "2 is usual"),
        ("ref_sync_every, beta = 5, 0.1\n", [], "lora_rank = 0"),
        ("ref_sync_every, lora_rank, beta = 5, 0, 0\n", [], "beta > 0"),
        ("prompts_per_step, minibatches = 8, 3\n", [], "3 minibatches"),
        ("combine, advantage = 'normalize_then_sum', 'rloo'\n", [], "leave that at 'group'"),
        ("reward_weights = [1.0]\n", [], "function"),
    ],
)
def test_mistakes_stop_with_what_to_type_instead(tmp_path, text, flags, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        configs.load([write(tmp_path, text), *flags])


@pytest.mark.parametrize("advantage", ["group", "none", "batch", "rloo"])
def test_a_group_of_one_is_refused_by_what_can_learn(tmp_path, advantage):
    """The sentence advised advantage=none, with which a lone completion is its own mean too."""
    with pytest.raises(ValueError, match="an advantage of your own with another baseline"):
        configs.load([write(tmp_path, f"group_size, advantage = 1, {advantage!r}\n")])


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match="no config file nowhere.py"):
        configs.load(["nowhere.py"])


def test_a_model_given_by_hand_replaces_random_weights(tmp_path):
    path = write(tmp_path, "scratch = dict(hidden_size=8)\n")
    assert configs.load([path]).scratch and configs.load([path, "--model=somewhere"]).scratch is None


def test_every_key_has_a_comment_or_speaks_for_itself():
    import inspect

    lines = [
        x
        for x in inspect.getsource(configs.Config).splitlines()
        if x.startswith("    ") and ":" in x and "=" in x and not x.strip().startswith("#")
    ]
    assert len(lines) >= len(configs.FIELDS)
    assert sum("#" in x for x in lines) >= 0.7 * len(configs.FIELDS)


def test_differences_are_what_was_set(tmp_path):
    c = configs.load([write(tmp_path, "lr = 2e-5\n")])
    assert configs.differences(c).keys() == {"lr", "out_dir"}


@pytest.mark.parametrize("name", configs.PRESETS)
def test_a_preset_sets_keys_that_exist_to_values_that_are_taken(tmp_path, name):
    c = configs.load([write(tmp_path, f"preset = {name!r}\n")])
    assert {key: getattr(c, key) for key in configs.PRESETS[name]} == configs.PRESETS[name]


def test_keys_beside_a_preset_win_and_the_command_line_wins_over_the_file(tmp_path):
    path = write(tmp_path, "preset, beta, clip_high = 'grpo', 0.01, 0.5\n")
    c = configs.load([path])
    assert (c.aggregate, c.beta, c.clip_high) == ("sequence", 0.01, 0.5)
    c = configs.load([path, "--preset=dapo"])  # of the command line: above the file's keys
    assert (c.aggregate, c.beta, c.clip_high, c.resample_zero_groups) == ("token", 0.0, 0.28, True)
    c = configs.load([path, "--preset=dapo", "--beta=0.2", "--clip_high=0.4"])
    assert (c.aggregate, c.beta, c.clip_high) == ("token", 0.2, 0.4)


def test_weights_over_time_are_a_function_of_the_file(tmp_path):
    assert configs.load(
        [write(tmp_path, "def reward_weights(step):\n    return [1.0 / step]\n")]
    ).reward_weights(4) == [0.25]


@pytest.mark.parametrize("keys", [dict(shard_optimizer=True), dict(lora_merge="on", lora_rank=2)])
def test_what_cannot_be_sharded_is_refused(keys):
    with pytest.raises(ValueError, match="shard = True"):
        configs.check_values(dataclasses.replace(configs.Config(), shard=True, **keys))
