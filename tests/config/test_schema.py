"""The JSON schema for editors: it accepts our files as YAML 1.1 and 1.2, and refuses mistakes."""

import json
import re
from typing import Any

import jsonschema
import pytest
import yaml

from fast_llm import cli
from fast_llm.config.prepare import ConvertConfig, PrepareConfig
from fast_llm.config.reference import meaning, plain
from fast_llm.config.schema import schema
from fast_llm.config.section import dump
from fast_llm.config.train import TrainConfig
from tests.config.common import ROOT

RECIPE = ROOT / "fast_llm/demo/train-config.yaml"


class Yaml12(yaml.SafeLoader):
    """Reads text where YAML 1.2 has no number and no boolean, as editors do."""


Yaml12.yaml_implicit_resolvers = {
    first: [
        (tag, rule)
        for tag, rule in rules
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:int")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Yaml12.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))
Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile("^[-+]?[0-9]+$"), list("-+0123456789")
)


def problems(kind: Any, values: Any) -> list[str]:
    """Where the schema refuses values."""
    checker = jsonschema.Draft202012Validator(json.loads(schema(kind)))
    return [".".join(map(str, error.absolute_path)) for error in checker.iter_errors(values)]


@pytest.mark.parametrize(
    "path",
    [RECIPE, *sorted((ROOT / "examples/train").glob("*.yaml"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_our_files_are_accepted(path: Any) -> None:
    for loader in (yaml.SafeLoader, Yaml12):
        assert not problems(TrainConfig, yaml.load(path.read_text(), loader))


def test_sources_and_stages() -> None:
    text = (
        "{data: {sources: {a: a.json, b: {path: b.json}}, stages: [{until: 1_0, weights: {a: 1}}]}}"
    )
    assert not problems(TrainConfig, yaml.load(text, Yaml12))
    assert problems(TrainConfig, yaml.safe_load("{data: {sources: {a: [1]}}}")) == [
        "data.sources.a"
    ]


def test_second_names() -> None:
    stages = "[{until: 9, shape: linear, from: 0, to: 1.0e-4}, {until: 10, shape: constant}]"
    text = f"{{optimizer: {{learning_rate: {{stages: {stages}}}}}}}"
    assert not problems(TrainConfig, yaml.safe_load(text))


def test_config_yaml_of_a_run_is_accepted() -> None:
    assert not problems(TrainConfig, yaml.safe_load(dump(TrainConfig())))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("training: {train_iters: 1.5}", "training.train_iters"),
        ("training: {train_iters: many}", "training.train_iters"),
        ("training: {train_iter: 3}", "training"),
        ("model: {distributed: {training_dtype: fp64}}", "model.distributed.training_dtype"),
        ("training: {tensorboard: perhaps}", "training.tensorboard"),
        ("optimizer: {beta_1: 1.0}", "optimizer.beta_1"),
        ("data: {split: [1, 2, 3, 4]}", "data.split"),
    ],
)
def test_mistakes_are_refused(text: str, place: str) -> None:
    assert problems(TrainConfig, yaml.safe_load(text)) == [place]


def test_every_setting_is_explained() -> None:
    content = json.loads(schema(TrainConfig))
    batch = content["$defs"]["BatchConfig"]["properties"]
    for name, found in batch.items():
        assert found["description"].startswith(
            plain(" ".join(meaning(TrainConfig().batch.__class__, name).split()))
        )
    assert all(part["description"] for part in content["$defs"].values())


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in (
        ("train", TrainConfig),
        ("prepare", PrepareConfig),
        ("convert", ConvertConfig),
    ):
        assert cli.main(["settings", name, "--schema"]) == 0
        assert capsys.readouterr().out == schema(kind) + "\n"
    assert cli.main(["settings", "training", "--schema"]) == 2
    assert "--schema: given training, must be one of train, prepare, convert" in (
        capsys.readouterr().err
    )
