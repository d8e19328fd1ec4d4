"""`fast-llm merge`: sums of weights against transformers and float64, files, refusals."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from fast_llm import cli
from fast_llm.checkpoint import folder as folders
from fast_llm.errors import CheckpointError, DataError, UserError
from fast_llm.models import FAMILIES
from fast_llm.training.merge import merge
from tests.data import synthetic
from tests.families.architectures import architecture
from tests.families.reference import make as make_random
from tests.helpers import some_fast
from tests.training.runs import run, settings, write_tokens

VOCABULARY = 320


def make(
    folder: Path, seed: int, dtype: str = "float32", size: int = VOCABULARY, **other: Any
) -> Path:
    """A small Llama of transformers with a tokenizer of 320 tokens."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": size,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**values | other))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return synthetic.llama(folder)


def state(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that transformers reads, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: weight.double() for name, weight in model.state_dict().items()}


def check_logits(output: Path, expected: dict[str, torch.Tensor]) -> None:
    """The logits of a merged model equal those of transformers with the expected weights."""
    found = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float64)
    other.load_state_dict(expected)
    tokens = torch.randint(VOCABULARY, (2, 17))
    with torch.no_grad():
        # Sums and logits are fp32, the expected ones float64.
        assert found(tokens).logits.double() == pytest.approx(other(tokens).logits, abs=1e-5)


@pytest.mark.parametrize(
    ("weights", "shares"), [(None, (1 / 3, 1 / 3, 1 / 3)), ([2, 1, -0.5], (0.8, 0.4, -0.2))]
)
def test_an_average(
    tmp_path: Path,
    weights: list[float] | None,
    shares: tuple[float, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = [make(tmp_path / str(seed), seed) for seed in range(3)]
    with caplog.at_level(logging.INFO, "fast_llm"):
        merge(str(tmp_path / "out"), [str(path) for path in models], weights)
    assert f"{shares[0]:.4g} × {models[0]} + {shares[1]:.4g} × {models[1]}" in caplog.text
    states = [state(path) for path in models]
    expected = {
        name: torch.stack(
            [share * one[name] for share, one in zip(shares, states, strict=True)]
        ).sum(0)
        for name in states[0]
    }
    for name, weight in state(tmp_path / "out").items():
        # Each product and sum of fp32 rounds by at most 2⁻²⁴ of weights below 0.2.
        assert float((weight - expected[name]).abs().max()) < 1e-7
    check_logits(tmp_path / "out", expected)
    for path in models[0].iterdir():  # all else is the first model's
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    folders.verify(tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_interpolation_with_the_base(tmp_path: Path, tied: bool) -> None:
    base, new = (make(tmp_path / str(seed), seed, tie_word_embeddings=tied) for seed in range(2))
    merge(str(tmp_path / "out"), [str(new)], [0.3], str(base))
    ours, theirs = state(base), state(new)
    check_logits(tmp_path / "out", {n: ours[n] + 0.3 * (theirs[n] - ours[n]) for n in ours})


def test_the_difference_of_an_instruct_model_is_added(tmp_path: Path) -> None:
    base, new, instruct = (make(tmp_path / str(seed), seed) for seed in range(3))
    merge(str(tmp_path / "out"), [str(new), str(instruct)], None, str(base))
    one, two, three = state(base), state(new), state(instruct)
    check_logits(tmp_path / "out", {n: two[n] + three[n] - one[n] for n in one})
    assert json.loads((tmp_path / "out/merge.json").read_text()) == {
        "base": str(base),
        "models": [{"path": str(new), "weight": 1.0}, {"path": str(instruct), "weight": 1.0}],
    }


def test_rows_that_only_the_first_model_has_stay(tmp_path: Path) -> None:
    base, instruct = make(tmp_path / "base", 0), make(tmp_path / "instruct", 1)
    new = make(tmp_path / "new", 2, size=VOCABULARY + 7)
    merge(str(tmp_path / "out"), [str(new), str(instruct)], None, str(base))
    one, two, three, found = state(base), state(new), state(instruct), state(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name][VOCABULARY:], two[name][VOCABULARY:])
        expected = two[name][:VOCABULARY] + three[name] - one[name]
        assert float((found[name][:VOCABULARY] - expected).abs().max()) < 1e-7
    assert len(found["lm_head.weight"]) == VOCABULARY + 7


@pytest.mark.parametrize("dtype", [None, "fp16", "fp32"])
def test_the_dtype_is_that_of_the_first_model(tmp_path: Path, dtype: str | None) -> None:
    one, two = make(tmp_path / "one", 0, "bfloat16"), make(tmp_path / "two", 1, "float16")
    merge(str(tmp_path / "out"), [str(one), str(two)], dtype=dtype)
    wanted = {None: torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == wanted
    ours, theirs = state(one), state(two)
    for name, weight in found.state_dict().items():
        expected = ((ours[name].float() + theirs[name].float()) / 2).to(wanted)
        assert torch.equal(weight, expected)


@pytest.mark.parametrize(
    "family", some_fast(sorted(FAMILIES), lambda one: one in ("phi3", "gpt_oss"))
)
def test_every_family(tmp_path: Path, family: str) -> None:
    """Files that join matrices, experts and optional tensors are read parameter by parameter."""
    model = make_random(family, architecture(family), tmp_path / "one")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    model.save_pretrained(tmp_path / "two")
    merge(str(tmp_path / "out"), [str(tmp_path / "one"), str(tmp_path / "two")])
    one, two, found = state(tmp_path / "one"), state(tmp_path / "two"), state(tmp_path / "out")
    assert found.keys() == one.keys()
    for name, weight in found.items():
        mean = (one[name] + two[name]) / 2
        assert float((weight - mean).abs().max()) <= 1e-6 * float(mean.abs().max()), name


def test_checkpoints_of_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkpoints give the mean of their fp32 weights."""
    write_tokens(tmp_path / "tokens")
    further = [
        "training.train_iters=4",
        "training.checkpoint.interval=2",
        "training.export.interval=2",
        "training.export.format=llama",
        # How the model is trained: config.json of an export does not say it.
        "model.base_model.z_loss_coefficient=1e-4",
        "model.base_model.cross_entropy_impl=torch",
    ]
    assert run(settings(tmp_path, *further)) == 0
    checkpoints = [tmp_path / f"run/checkpoint/{step}" for step in (2, 4)]
    merge(str(tmp_path / "out"), [str(path) for path in checkpoints], dtype="fp32")
    exports = []
    for path in checkpoints:
        assert (
            cli.main(
                [
                    "convert",
                    f"input.path={path}",
                    f"output.path={tmp_path}/{path.name}",
                    "output.data_type=fp32",
                ]
            )
            == 0
        )
        exports.append(state(tmp_path / path.name))
    found = state(tmp_path / "out")
    for name, weight in found.items():
        assert float((weight - (exports[0][name] + exports[1][name]) / 2).abs().max()) < 1e-7
    # An export stands for its step, too.
    monkeypatch.setattr(logging.getLogger("fast_llm"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("fast_llm"), "disabled", False)
    merge(str(tmp_path / "mixed"), [str(checkpoints[0]), str(tmp_path / "run/export/llama/4")])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "mixed") is not None
    (said,) = [one.getMessage() for one in caplog.records if "mixed" in one.getMessage()]
    assert said.startswith(f"Wrote {tmp_path}/mixed: 0.5 × ")
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
    root, one = tmp_path / "run", str(checkpoints[0])
    assert refusal(tmp_path, [str(root), one], out="no") == (
        f"{root}: a folder of checkpoints, not a model; give {root}/checkpoint/STEP, with STEP 2, 4"
    )
    assert refusal(tmp_path, [one, str(root / "checkpoint/3")], out="no") == (
        f"{root}/checkpoint/3: no such folder; there are {root}/checkpoint/STEP, with STEP 2, 4"
    )
    assert refusal(tmp_path, [one, str(root / "export/llam/4")], out="no").endswith(
        f"/export/llam/4: no such folder; did you mean {root}/export/llama?"
    )


def refusal(tmp_path: Path, *arguments: Any, out: str = "out") -> str:
    with pytest.raises(UserError) as caught:
        merge(str(tmp_path / out), *arguments)
    assert not (tmp_path / out).exists() and not list(tmp_path.glob(f".{out}*"))
    return str(caught.value)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    assert refusal(tmp_path, ["a", "b"], [1.0]) == (
        "--weights: given 1, must be one for each model: 2"
    )
    assert refusal(tmp_path, ["a", "b"], [1.0, -1.0]) == (
        "--weights: their sum is 0, must not be 0 without --base"
    )
    assert refusal(tmp_path, ["a"]) == "one model alone: give another one, or --base"
    assert refusal(tmp_path, ["a", "a"]) == "a: is listed twice; give it a larger weight instead"
    assert refusal(tmp_path, ["a"], None, "a") == (
        "a: is the base and a model; its difference to itself is 0"
    )


def test_models_that_do_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = make(tmp_path / "one", 0)
    wide = make(tmp_path / "wide", 1, intermediate_size=40)
    assert refusal(tmp_path, [str(one), str(wide)]) == (
        f"{wide}: model.layers.0.mlp.gate_proj.weight is [40, 24], that of {one} is [32, 24];"
        " models of one architecture can be merged"
    )
    deep = make(tmp_path / "deep", 1, num_hidden_layers=3)
    assert refusal(tmp_path, [str(one), str(deep)]) == (
        f"{deep}: has model.layers.2.input_layernorm.weight, which {one} does not have; models of"
        " one architecture can be merged"
    )
    assert refusal(tmp_path, [str(deep), str(one)]).startswith(
        f"{one}: model.layers.2.self_attn.q_proj.weight is missing, that of {deep} is [24, 24];"
    )
    other = make(tmp_path / "other", 1)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    assert refusal(tmp_path, [str(one), str(other)]) == (
        f"{other}: its family is mistral, that of {one} is llama; models of one family can be"
        " merged"
    )
    longer = make(tmp_path / "longer", 1, rope_theta=5e5)
    merge(str(tmp_path / "made"), [str(one), str(longer)])
    assert f"theta is 500000.0, that of {one} is 10000.0. The merged" in caplog.text
    with pytest.raises(CheckpointError, match="exists already; choose another folder"):
        merge(str(tmp_path / "made"), [str(one), str(longer)])


def test_another_tokenizer(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", 0), make(tmp_path / "two", 1)
    text = (two / "tokenizer.json").read_text()
    (two / "tokenizer.json").write_text(text.replace("<|end_of_text|>", "<|end|>"))
    with pytest.raises(DataError, match="its token 1 is") as caught:
        merge(str(tmp_path / "out"), [str(one), str(two)])
    assert "models with one tokenizer can be merged" in str(caught.value)
    (two / "tokenizer.json").unlink()
    merge(str(tmp_path / "out"), [str(one), str(two)])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make(tmp_path / "one", 0), make(tmp_path / "two", 1)
    out = str(tmp_path / "out")
    assert cli.main(["merge", out, str(one), "--base", str(two), "--weights", "0.5"]) == 0
    assert cli.main(["merge", out, str(one), str(two)]) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["merge", out, str(one), str(two), "--weights", "nan", "1"])
    assert "--weights: given nan, must be a number" in capsys.readouterr().err
