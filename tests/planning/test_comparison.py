"""`fast-llm plan`: it needs no weights, and explains mistakes."""

import re
from pathlib import Path

import pytest

from fast_llm import cli
from fast_llm.config.document import read
from fast_llm.demo import RECIPE
from fast_llm.planning.comparison import forecast_rows
from fast_llm.planning.devices import DEVICES
from fast_llm.planning.preflight import read_config
from fast_llm.planning.search import forecast_config
from tests.planning.configs import LLAMA


def test_plan_needs_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "fast-llm-tutorial" / "pretrained-model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(
        """{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        "tie_word_embeddings": false, "hidden_act": "silu", "max_position_embeddings": 131072}"""
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "--config", str(RECIPE), "--gpus", "16", "--device", "h200"]) == 0
    said = capsys.readouterr().out
    assert (
        "16 × H200" in said
        and ": fits" in said
        and "tokens/s a GPU" in said
        and "fp32 moments" in said
    )
    assert re.search(
        r"^GPUs .* TP .* DP  rows  recompute .* tok/s/GPU .* MFU   memory", said, flags=re.M
    )
    assert re.search(r"^1024 ", said, flags=re.M)
    int8 = read_config(read(RECIPE, ["optimizer.moments_dtype=int8"]), 1)
    rows = forecast_rows(forecast_config(int8, 1, DEVICES["h100"]))
    assert "recompute none, 8-bit moments" in dict(rows)["Layout"]
    assert cli.main(["plan", "--config", str(RECIPE), "--gpus", "1"]) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "None: " in said


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *LLAMA, "--gpus", "6", "model.distributed.tensor_parallel=4"]) == 2
    assert "tensor_parallel" in capsys.readouterr().err
    assert cli.main(["plan", *LLAMA, "batch.batch_size=null"]) == 2
    assert "batch.batch_size: missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", *LLAMA, "--gpus", "0"])
    assert "given 0, must be an integer above 0" in capsys.readouterr().err
