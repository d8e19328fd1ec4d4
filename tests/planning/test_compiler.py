"""`multi_stage.compile_all: auto`: where it means yes, and that a run that resumes keeps it."""

from dataclasses import replace
from pathlib import Path

import pytest

from fast_llm.config.document import read
from fast_llm.models import FAMILIES
from fast_llm.planning.compiler import (
    COMPILE,
    PROVEN_FAMILIES,
    describe_compiler,
    resolve_compiler,
    why_not_compiled,
)
from fast_llm.planning.devices import DEVICES
from fast_llm.planning.preflight import preflight
from fast_llm.planning.run_spec import RunSpec
from fast_llm.planning.search import fastest_layouts, forecast_config, resolve_auto, resolve_run
from tests.planning.configs import LLAMA, config
from tests.training.runs import run, settings, write_tokens

AXES, PIPELINE = "model.distributed", "model.distributed.pipeline_parallel=2"
STAGES = "model.multi_stage.layers_per_stage=8"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], ""),
        (["model.multi_stage.zero_stage=3", "model.distributed.fp8=yes"], ""),
        ([f"{AXES}.tensor_parallel=2", f"{AXES}.sequence_tensor_parallel=yes"], ""),
        ([f"{AXES}.sequence_data_parallel=2"], ""),
        ([PIPELINE], ""),
        ([PIPELINE, "model.multi_stage.pipeline_schedule=gpipe"], ""),
        (
            [PIPELINE, STAGES],
            "compiled blocks are not tested with several stages in a process yet",
        ),
        (
            [PIPELINE, STAGES, "model.multi_stage.pipeline_schedule=zbv_zero_bubble"],
            "compiled blocks are not tested with several stages in a process yet",
        ),
        (
            [PIPELINE, f"{AXES}.tensor_parallel=2"],
            "compiled blocks are not tested with tensor_parallel and pipeline_parallel together"
            " yet",
        ),
        (["run.torch_dynamo_enable=no"], "run.torch_dynamo_enable is no"),
        (["run.enable_triton_kernels=no"], "run.enable_triton_kernels is no"),
    ],
)
def test_where_auto_means_yes(given: list[str], reason: str) -> None:
    found = config([*LLAMA, *given])
    assert why_not_compiled(found, "cuda") == reason
    assert resolve_compiler(found, "cuda") is (not reason)
    expected = "not used: " + reason if reason else "on GPUs each block"
    assert describe_compiler(found, None).startswith(expected)
    assert resolve_compiler(found, "cpu") is False
    assert resolve_compiler(found, "cuda", triton=False) is False


def test_what_is_given_stays() -> None:
    for given, is_on in (("yes", True), ("no", False)):
        found = config([*LLAMA, f"{COMPILE}={given}"])
        for kind in ("cpu", "cuda"):
            assert resolve_compiler(found, kind, before={}) is is_on


def test_other_families_and_experts_are_not_compiled() -> None:
    """The GPU suite has to run them first."""
    assert set(PROVEN_FAMILIES) < FAMILIES.keys()
    other = config(LLAMA)
    base = other.model.base_model.model_copy(update={"family": "exaone4"})
    model = other.model.model_copy(update={"base_model": base})
    assert (
        why_not_compiled(other.model_copy(update={"model": model}), "cuda")
        == "compiled blocks of exaone4 are not tested on GPUs yet"
    )
    distributed = other.model.distributed.model_copy(update={"expert_parallel": 2})
    model = other.model.model_copy(update={"distributed": distributed})
    assert (
        why_not_compiled(other.model_copy(update={"model": model}), "cuda")
        == "compiled blocks are not tested with expert_parallel yet"
    )


def test_forecasts_follow() -> None:
    """Also before `auto` is resolved; the trainer and the planner see yes or no."""
    plain = config([*LLAMA, f"{COMPILE}=no"])
    compiled = config([*LLAMA, f"{COMPILE}=yes"])
    h100 = forecast_config(config(LLAMA), 8, DEVICES["h100"]).gpu_tokens_per_second
    assert h100 == forecast_config(compiled, 8, DEVICES["h100"]).gpu_tokens_per_second
    assert h100 > forecast_config(plain, 8, DEVICES["h100"]).gpu_tokens_per_second
    for kind, expected in (("cuda", True), ("cpu", False)):
        resolved = resolve_auto(config(LLAMA), 8, 80e9, kind)
        assert resolved.model.multi_stage.compile_all is expected
    # Each layout of a search anew: two axes together are not compiled.
    for layout, one in fastest_layouts(config(LLAMA), 64, DEVICES["h100"], count=30):
        names = ("tensor_parallel", "sequence_data_parallel", "pipeline_parallel")
        axes = sum(layout[f"{AXES}.{name}"] > 1 for name in names)
        assert one.layout.compiled is (axes < 2)


def test_a_run_that_resumes_keeps_what_it_began_with(tmp_path: Path) -> None:
    """A run on the CPU compiles nothing, and then not on a GPU; one that compiled still does."""
    write_tokens(tmp_path / "tokens")
    arguments = settings(tmp_path, "training.train_iters=1", "training.checkpoint.interval=1")
    assert run(arguments) == 0
    assert "compile_all: false" in (tmp_path / "run" / "config.yaml").read_text()

    spec = preflight(read(None, [*arguments, "training.train_iters=2"]), 1, weights=False)
    assert spec.changes == ["training.train_iters: 1 → 2"]
    assert _resolved(spec) is False
    assert describe_compiler(spec.config, spec.settings_before) == (
        "on GPUs not used, as before the checkpoint; not on the CPU"
    )
    assert spec.manifest is not None and spec.settings_before is not None
    spec.settings_before["model"]["multi_stage"]["compile_all"] = True
    assert _resolved(spec) is True and _resolved(spec, "cpu") is False
    assert describe_compiler(spec.config, spec.settings_before) == (
        "on GPUs each block, as before the checkpoint; not on the CPU"
    )
    assert _resolved(replace(spec, manifest=None)) is True  # a new run

    again = preflight(read(None, [*arguments, f"{COMPILE}=yes"]), 1, weights=False)
    assert again.changes == [f"{COMPILE}: false → true"]


def _resolved(spec: RunSpec, kind: str = "cuda") -> bool | str:
    return resolve_run(spec, 80e9, kind).config.model.multi_stage.compile_all
