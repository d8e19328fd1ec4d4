"""config.json as transformers reads it, corrupt headers, and the Hub's cache offline."""

import json
import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_llm.checkpoint import huggingface
from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.errors import CheckpointError, UserError
from fast_llm.models import llama
from fast_llm.models.parameters import shapes
from tests.helpers import TINY
from tests.models.published import LLAMA_8B_JSON
from tests.models.test_llama import MINIMAL


def model_of(values: dict[str, Any]) -> BaseModelConfig:
    return validate(BaseModelConfig, Document(values, {}, "test"))


@pytest.mark.parametrize("config", [LLAMA_8B_JSON, MINIMAL], ids=["published", "minimal"])
def test_transformers_understands_the_same(config: dict[str, Any]) -> None:
    """transformers reads the published spelling; what it writes has the same meaning here."""
    from transformers import LlamaConfig

    # LlamaConfig changes the dictionaries that it is given.
    written = json.loads(LlamaConfig(**deepcopy(config)).to_json_string(use_diff=False))
    assert "rope_parameters" in written and not written.get("rope_scaling")
    assert llama.FAMILY.architecture(written, "transformers") == llama.FAMILY.architecture(
        config, "ours"
    )


@pytest.mark.parametrize("rotary", ["default", "llama3"])
@pytest.mark.parametrize(
    ("biases", "tied"),
    [("nowhere", True), ("everywhere", False), ("only_attention", False), ("only_mlp", True)],
)
def test_transformers_builds_the_model_of_an_export_from_scratch(
    tmp_path: Path, rotary: str, biases: bool, tied: bool
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    transformer = {
        **TINY["transformer"],
        "kv_channels": 8,
        "add_linear_biases": biases,
        "normalization": {"epsilon": 1e-4},
        "rotary": {
            "type": rotary,
            "theta": 5e5,
            "scale_factor": 4.0,
            "original_context_length": 512,
        },
    }
    model = model_of({**TINY, "tie_word_embeddings": tied, "transformer": transformer})
    exported = llama.FAMILY.export_config(None, model, "bf16", {"bos": 1, "eos": None})
    (tmp_path / "config.json").write_text(json.dumps(exported))
    back = model_of(llama.FAMILY.architecture(huggingface.read_json(tmp_path / "config.json"), ""))
    if rotary == "llama3":
        assert back == model
    else:  # llama3's fields are not written for other types
        excluded = {"transformer": {"rotary"}}
        assert back.model_dump(exclude=excluded) == model.model_dump(exclude=excluded)
        assert (back.transformer.rotary.type, back.transformer.rotary.theta) == ("default", 5e5)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id, config.dtype) == (1, None, torch.bfloat16)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    assert {name: tuple(p.shape) for name, p in theirs.named_parameters()} == shapes(model)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_value_anywhere_in_config(data: st.DataObject) -> None:
    """Any value gives either an architecture or a ConfigError that names the setting."""
    values = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 2**70),
        st.floats(),
        st.text(max_size=3),
        st.just([]),
        st.just({}),
        st.just({"rope_type": "llama3"}),
        st.just({"rope_type": ["yarn"]}),
        st.just(
            {
                "factor": None,
                "rope_type": "llama3",
                "low_freq_factor": "",
                "high_freq_factor": math.nan,
            }
        ),
    )
    keys = st.sampled_from([*LLAMA_8B_JSON, "head_dim", "rope_parameters", "partial_rotary_factor"])
    config = LLAMA_8B_JSON | data.draw(st.dictionaries(keys, values, min_size=1, max_size=3))
    try:
        model_of(llama.FAMILY.architecture(config, "config.json"))
    except UserError as error:
        assert str(error)


def safetensors() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(32)


GOOD = safetensors()


@contextmanager
def little_memory() -> Iterator[None]:
    """Reading takes some hundred KiB, although the file claims a much larger header."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**21


@given(
    changes=st.dictionaries(st.integers(0, len(GOOD) - 1), st.integers(0, 255), max_size=6),
    length=st.one_of(st.just(len(GOOD)), st.integers(0, len(GOOD))),
    more=st.binary(max_size=3),
)
@settings(max_examples=400, deadline=None)
def test_any_bytes_changed_in_a_header(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[int, int], length: int, more: bytes
) -> None:
    """A changed header gives a CheckpointError, or still fits the file. `check_weights` too."""
    blob = bytearray(GOOD)
    for at, value in changes.items():
        blob[at] = value
    folder = tmp_path_factory.getbasetemp()
    path = folder / "model.safetensors"
    path.write_bytes(blob[:length] + more)
    with little_memory():
        try:
            header = huggingface.read_header(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            with pytest.raises(CheckpointError):
                huggingface.check_weights(folder, MODEL)
            return
        spans = sorted(tensor["data_offsets"] for tensor in header.values())
        assert sum(end - begin for begin, end in spans) == length + len(more) - 8 - int.from_bytes(
            blob[:8], "little"
        )
        assert huggingface.check_weights(folder, MODEL), "two tensors are no Llama"


MODEL = model_of(TINY)


def test_the_good_header_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(GOOD)
    assert {
        name: tensor["shape"] for name, tensor in huggingface.read_header(tmp_path / "x").items()
    } == {
        "a": [2, 3],
        "b": [4],
    }


def test_a_long_header_costs_no_memory(tmp_path: Path) -> None:
    """A sparse file of 1 GiB claims to be one long header."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((2**30 - 8).to_bytes(8, "little"))
        file.truncate(2**30)
    with little_memory(), pytest.raises(CheckpointError, match="not a complete safetensors file"):
        huggingface.read_header(path)


def test_the_hub_without_a_network(tmp_path: Path) -> None:
    """The Hub's cache, filled as its client does, replaces the Hub.

    In a process of its own, since the client reads its environment once. No torch is loaded for any
    of this.
    """
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA_8B_JSON))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = """
import sys
from fast_llm.checkpoint import huggingface
from fast_llm.errors import CheckpointError
for name in ("some/model", "some/model@main", "some/model@" + sys.argv[1]):
    print(huggingface.fetch(name, weights=False))
for name in ("some/other", "some/model@nowhere"):
    try:
        print("fetched", huggingface.fetch(name, weights=True))
    except CheckpointError as error:
        print(error)
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, commit],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HOME": str(tmp_path),
        },
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [str(snapshot)] * 3
    assert len(lines) == 5, "one line for each mistake"
    for name, line in zip(("some/other", "some/model@nowhere"), lines[3:], strict=True):
        assert line.startswith(
            f"{name}: not a local folder, and downloading it from the Hugging Face Hub failed: "
        )
        assert "check the name and the network" in line
