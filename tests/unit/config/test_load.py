"""Loading: bases, overrides, every kind of mistake named by place and key, and the way back to a file."""

import re
from pathlib import Path

import pytest

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.load import load_config, save_config
from megatron_rl.config.schema import KLPlace, LRDecayStyle, Recipe

REQUIRED = ["name=a", "model.hf_path=m"]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def error_of(path: Path, overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [*REQUIRED, *overrides])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_arrive_with_the_types_of_the_schema(tmp_path: Path) -> None:
    text = "recipe: sft\noptimizer: {lr: 1e-6, clip_grad: 1, lr_decay_style: cosine}\ndata: {eval: null}"
    config = load_config(write(tmp_path, "a.yaml", text), [*REQUIRED, "algorithm.kl.place=reward"])
    assert config.recipe is Recipe.sft
    assert config.optimizer.lr == 1e-6  # plain YAML reads 1e-6 as a string
    assert type(config.optimizer.clip_grad) is float
    assert config.optimizer.lr_decay_style is LRDecayStyle.cosine
    assert config.algorithm.kl.place is KLPlace.reward
    assert config.data.eval is None
    assert config.optimizer.adam_beta2 == 0.95  # not given: the schema's default


def test_later_layers_win(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(
        tmp_path / "below", "root.yaml", "seed: 1\ntrain: {num_steps: 1}\nrewards: {functions: [{name: a}, {name: b}]}"
    )
    write(tmp_path, "left.yaml", "base: below/root.yaml\nseed: 2\ntrain: {num_steps: 2}")
    write(tmp_path, "right.yaml", "train: {num_steps: 3}\nmodel: {transformer_config: {a: 1}}")
    text = "base: [left.yaml, right.yaml]\noutput_dir: out\nmodel: {transformer_config: {b: 2}}"
    path = write(tmp_path, "top.yaml", text)
    config = load_config(path, [*REQUIRED, "rewards.functions.1.weight=0.5", "train.num_epochs_per_step=4"])
    assert (config.seed, config.output_dir) == (2, "out")
    assert (config.train.num_steps, config.train.num_epochs_per_step) == (3, 4)
    assert config.model.transformer_config == {"a": 1, "b": 2}
    assert [(f.name, f.weight) for f in config.rewards.functions] == [("a", 1.0), ("b", 0.5)]
    again = load_config(path, [*REQUIRED, "rewards.functions=[{name: c}]", "seed=5", "seed=6"])
    assert [f.name for f in again.rewards.functions] == ["c"]  # a list is replaced, not appended to
    assert again.seed == 6


def test_relative_paths_of_data_stay_as_they_are(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "a.yaml", "data: {train: data/x.jsonl}"), REQUIRED)
    assert config.data.train == "data/x.jsonl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lrr: 1}", "a.yaml: optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        ("optimzer: {lr: 1}", "a.yaml: optimzer: unknown key; did you mean optimizer?"),
        ("lr: 1", "a.yaml: lr: unknown key; did you mean optimizer.lr or algorithm.critic.optimizer.lr?"),
        (
            "rewards: {functions: [{name: a, wieght: 1}]}",
            "a.yaml: rewards.functions[0].wieght: unknown key; did you mean rewards.functions[0].weight?",
        ),
        (
            "sync: {zzz: 1}",
            "a.yaml: sync.zzz: unknown key; "
            "allowed: bucket_megabytes, transport, folder, delta, timeout_seconds, verify, verify_tolerance",
        ),
        ("optimizer: {lr: fast}", "a.yaml: optimizer.lr: given 'fast', allowed: a number"),
        ("optimizer: {lr: true}", "a.yaml: optimizer.lr: given True, allowed: a number"),
        ("train: {num_steps: 1.5}", "a.yaml: train.num_steps: given 1.5, allowed: an integer"),
        ("train: {num_steps: null}", "a.yaml: train.num_steps: given null, allowed: an integer"),
        ("sync: {verify: 1}", "a.yaml: sync.verify: given 1, allowed: off, sample, full"),
        ("logging: {progress: 1}", "a.yaml: logging.progress: given 1, allowed: true or false"),
        ("output_dir: 3", "a.yaml: output_dir: given 3, allowed: a string"),
        ("recipe: grpo", "a.yaml: recipe: given 'grpo', allowed: rl, sft, preference, reward_model"),
        ("optimizer: 3", "a.yaml: optimizer: given 3, allowed: a section of keys"),
        ("rewards: {functions: {name: a}}", "a.yaml: rewards.functions: given {'name': 'a'}, allowed: a list"),
        ("rollout: {sampling: {stop: a}}", "a.yaml: rollout.sampling.stop: given 'a', allowed: a list"),
        ("- 1", "a.yaml: given [1], allowed: keys and values"),
        ("seed: 1\nseed: 2", "a.yaml, line 2: malformed YAML: found duplicate key seed"),
        ("rewards: {functions: [{weight: 1}]}", "a.yaml: rewards.functions[0].name: missing, must be given"),
        ("data: {train: '${nope}'}", "a.yaml: data.train: Interpolation key 'nope' not found"),
        ("base: b.yaml", "a.yaml: base: given 'b.yaml', but b.yaml is no file"),
        ("base: 3", "a.yaml: base: given 3, allowed: a file or a list of files"),
        ("base: a.yaml", "a.yaml: base: the file builds on itself, by way of a.yaml"),
    ],
)
def test_a_mistake_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.yaml", text)
    assert error_of(Path("a.yaml"), []) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "override 'optimizer.lrr=1': optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        ("seed=abc", "override 'seed=abc': seed: given 'abc', allowed: an integer"),
        ("optimizer.lr.x=1", "override 'optimizer.lr.x=1': optimizer.lr: given {'x': 1}, allowed: a number"),
        ("seed", "override 'seed': given no dotted.key=value"),
        ("a..b=1", "override 'a..b=1': given no dotted.key=value"),
        ("seed=[1", "override 'seed=[1': seed: malformed value: while parsing a flow sequence"),
        (
            "rewards.functions.1.weight=1",
            "override 'rewards.functions.1.weight=1': given item '1', allowed: 0 to 0",
        ),
    ],
)
def test_a_mistake_in_an_override(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, "a.yaml", "rewards: {functions: [{name: a}]}")
    assert error_of(path, [override]) == message


def test_malformed_yaml_is_named_by_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "seed: 1\n  name: a")  # the rest of the message differs between YAML's two parsers
    assert error_of(path, []).startswith(f"{path}, line 2: malformed YAML: mapping values are not allowed")


def test_a_mistake_is_put_down_to_the_file_that_makes_it(tmp_path: Path) -> None:
    write(tmp_path, "b.yaml", "seed: x")
    path = write(tmp_path, "a.yaml", "base: b.yaml\nseed: 1")
    assert error_of(path, []).startswith(f"{tmp_path / 'b.yaml'}: seed: given 'x'")


def test_a_cycle_over_two_files(tmp_path: Path) -> None:
    write(tmp_path, "b.yaml", "base: a.yaml")
    path = write(tmp_path, "a.yaml", "base: b.yaml")
    assert error_of(path, []) == f"{path}: base: the file builds on itself, by way of b.yaml"


def test_all_missing_keys_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: model.hf_path, name: missing, must be given")):
        load_config(path)


def test_interpolation_and_free_form_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", "elsewhere")
    text = "model: {hf_path: '${oc.env:MODELS}/m'}\nrollout: {engine_args: {any: {depth: [1, {x: null}]}}}"
    config = load_config(write(tmp_path, "a.yaml", text), ["name=a", "rollout.engine_args.more.keys=2"])
    assert config.model.hf_path == "elsewhere/m"
    assert config.rollout.engine_args == {"any": {"depth": [1, {"x": None}]}, "more": {"keys": 2}}


def test_a_saved_configuration_is_read_back_equal(tmp_path: Path) -> None:
    text = "rewards: {functions: [{name: a, args: {x: [1, null]}}]}\ndata: {system_prompt: 'π \\${x}\n\n  y: #'}"
    config = load_config(write(tmp_path, "a.yaml", text), [*REQUIRED, "recipe=sft", "optimizer.lr=3e-7"])
    assert config.data.system_prompt == "π ${x}\ny: #"  # YAML folds the line break of a quoted string
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("text", ["off", "'off'", "sample"])
def test_a_bare_off_is_a_word_where_the_schema_has_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(f"name: x\nmodel: {{hf_path: x}}\nsync: {{verify: {text}}}\n")
    assert load_config(tmp_path / "a.yaml").sync.verify.name == text.strip("'")
    assert load_config(tmp_path / "a.yaml", ["sync.verify=off"]).sync.verify.name == "off"
