"""Breakdowns of traces, and runs with profiled steps, which equal other runs."""

import errno
import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_llm.training import profile
from fast_llm.training.profile import CATEGORIES, break_down, category, exclusive_intervals, table
from fast_llm.training.step import TrainStep
from tests.helpers import some_fast, spawn
from tests.training.runs import losses, records, run, run_all, settings, weights, write_tokens

NAMES = {
    "matmuls": [
        "aten::mm",
        "aten::addmm_",
        "aten::_scaled_mm",
        "fast_llm::matmul",
        "fast_llm::add_matmul",
        "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNN",
        "void"
        " cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_64x2_tn_align8>"
        "(Params)",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "triton_tem_fused_mm_3",
    ],
    "attention": [
        "fast_llm::attention_backward",
        "aten::scaled_dot_product_attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0",
        "void"
        " pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128,"
        " cutlass::bfloat16_t>>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
    ],
    "norms and elementwise": [
        "fast_llm::rms_norm",
        "fast_llm::swiglu_backward",
        "aten::add",
        "triton_per_fused__fused_rms_norm_backward__to_copy_add_5",
        "triton_poi_fused_mul_silu_2",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16,"
        " float, true>",
        "void at::native::vectorized_elementwise_kernel<4,"
        " at::native::silu_kernel(TensorIteratorBase&)>",
        "## Call CompiledFxGraph fsrpjdaka2kxuqnryvybgszzwejxpe4ppolomysp2cejhdaesgj6 ##",
    ],
    "cross entropy": [
        "_softmax_cross_entropy",
        "fast_llm::cross_entropy",
        "aten::_log_softmax",
        "aten::nll_loss_forward",
    ],
    "optimizer": [
        "_adamw",
        "aten::_fused_adamw_",
        "aten::_foreach_norm",
        "void at::native::(anonymous"
        " namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
        "void at::native::lpnorm_cleanup<float, (at::native::NormType)1, float, float, 1024>",
    ],
    "copies to the device": ["Memcpy HtoD (Pinned -> Device)"],
    "communication": [
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "gloo:all_reduce",
        "c10d::_allgather_base_",
    ],
    "everything else": [
        "Memcpy DtoH (Device -> Pageable)",
        "aten::copy_",
        "aten::view",
        "void"
        " at::native::unrolled_elementwise_kernel"
        "<at::native::direct_copy_kernel_cuda(TensorIteratorBase&)>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
    ],
}


@pytest.mark.parametrize(
    ("title", "name"), [(title, name) for title, names in NAMES.items() for name in names]
)
def test_names_and_parts(title: str, name: str) -> None:
    assert category(name) == title


def test_every_part_has_a_name_above() -> None:
    assert NAMES.keys() == CATEGORIES.keys()


def event(name: str, ts: float, dur: float, tid: int = 1, cat: str = "cpu_op") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": tid}


def test_a_moment_is_that_of_the_event_that_began_last() -> None:
    inside = [
        event("a", 0, 10),
        event("b", 2, 3),
        event("c", 2, 1),
        event("d", 7, 3),
        event("e", 12, 1),
    ]
    # The other event overlaps without being inside, as an operation that another thread ends.
    across = [event("f", 20, 5), event("g", 22, 6), event("h", 26, 1)]
    assert [
        (begin, end, one["name"]) for begin, end, one in exclusive_intervals([*across, *inside])
    ] == [
        *((0, 2, "a"), (2, 3, "c"), (3, 5, "b"), (5, 7, "a"), (7, 10, "d"), (12, 13, "e")),
        *((20, 22, "f"), (22, 26, "g"), (26, 27, "h"), (27, 28, "g")),
    ]


def test_what_runs_at_the_same_time_counts_once() -> None:
    """Two streams of a GPU: communication during matmuls costs nothing."""
    nccl, gemm, copy = "ncclDevKernel_AllGather", "nvjet_tst", "Memcpy HtoD (Pinned -> Device)"
    trace = {
        "traceEvents": [
            event("training step 7", 0, 100, cat="user_annotation"),
            event("aten::mm", 0, 90),  # starts kernels; not counted on a GPU
            event(gemm, 10, 30, tid=7, cat="kernel"),
            event(nccl, 30, 30, tid=9, cat="kernel"),
            event(copy, 55, 10, tid=11, cat="gpu_memcpy"),
            event("_adamw", 70, 20, tid=7, cat="kernel"),
            {"ph": "M", "name": "process_name"},
        ]
    }
    found = break_down(trace)
    assert {
        title: (spent.calls, spent.own, spent.once) for title, spent in found.categories.items()
    } == {
        "matmuls": (1, 30, 30),
        "idle": (0, 25, 25),
        "optimizer": (1, 20, 20),
        "communication": (1, 30, 15),
        "copies to the device": (1, 10, 10),
    }
    assert found.total == 100 and list(found.operations) == [gemm, nccl, "_adamw", copy]


def test_a_trace_of_nothing() -> None:
    with pytest.raises(ValueError, match="the trace holds no operation"):
        break_down(
            {
                "traceEvents": [
                    event("MmBackward0", 0, 1),
                    event("autograd::engine::evaluate_function: X", 0, 1),
                ]
            }
        )


def test_long_names_are_cut() -> None:
    trace = {"traceEvents": [event("aten::" + "x" * 500, 0, 1)]}
    assert max(map(len, table(break_down(trace), "a title").splitlines())) < 165


def arguments(root: Path, name: str, *further: str) -> list[str]:
    return settings(root, "training.train_iters=4", f"run.experiment_dir={root}/{name}", *further)


def shares(path: Path) -> dict[str, float]:
    """The table's share of each part, in percent."""
    return {
        name.strip(): float(share)
        for name, share in re.findall(r"^([a-z ]+?)  .* ([\d.]+) %$", path.read_text(), re.M)
    }


def logged(folder: Path, rank: int = 0) -> str:
    return (folder / "runs" / "0" / "logs" / f"logs_rank_{rank}.txt").read_text()


@pytest.mark.parametrize("dtype", some_fast(["fp32", "bf16"], "bf16".__eq__))
def test_a_profile_changes_nothing_and_says_where_time_goes(tmp_path: Path, dtype: str) -> None:
    write_tokens(tmp_path / "tokens")
    how = ("training.checkpoint.interval=4", f"model.distributed.training_dtype={dtype}")
    profiling = ("training.profiling.interval=2", "training.profiling.offset=1")
    every = [arguments(tmp_path, "plain", *how), arguments(tmp_path, "profiled", *how, *profiling)]
    assert spawn(1, run_all, every) == [[0, 0]]
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    assert losses(profiled) == losses(plain) and len(losses(plain)) == 4
    assert weights(profiled / "checkpoint" / "4") == weights(plain / "checkpoint" / "4")
    assert not (plain / "profile").exists()
    folder = profiled / "profile"
    names = [f"step_{step}_rank_0.{kind}" for step in (1, 3) for kind in ("json.gz", "txt")]
    assert sorted(path.name for path in folder.iterdir()) == names
    said = shares(folder / "step_3_rank_0.txt")
    assert said.pop("the step") == 100
    assert sum(said.values()) == pytest.approx(100, abs=0.05 * len(said))
    assert {
        "matmuls",
        "attention",
        "norms and elementwise",
        "cross entropy",
        "optimizer",
        "idle",
    } <= said.keys()
    assert min(said.values()) >= 0 and said["matmuls"] > 0 and said["attention"] > 0
    trace = json.loads(gzip.decompress((folder / "step_3_rank_0.json.gz").read_bytes()))
    assert {"training step 3", "aten::mm"} <= {one["name"] for one in trace["traceEvents"]}
    first, second, third = list(said)[:3]
    line = (
        rf"Profile of step 3: {first} [\d.]+ %, {second} [\d.]+ %, {third} [\d.]+ %;"
        rf" see {folder}/step_3_rank_0\.txt\n"
    )
    assert re.search(line, logged(profiled))
    assert logged(profiled).count("Profile of step") == 2


def test_one_of_two_processes(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    how = (
        "training.checkpoint.interval=4",
        "training.double_check.interval=4",
        "model.multi_stage.zero_stage=3",
    )
    profiling = ("training.profiling.interval=4", "training.profiling.ranks=[1]")
    every = [arguments(tmp_path, "plain", *how), arguments(tmp_path, "profiled", *how, *profiling)]
    assert spawn(2, run_all, every) == [[0, 0]] * 2
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    assert losses(profiled) == losses(plain)
    assert weights(profiled / "checkpoint" / "4") == weights(plain / "checkpoint" / "4")
    path = profiled / "profile" / "step_4_rank_1.txt"
    assert sorted(one.name for one in path.parent.iterdir()) == ["step_4_rank_1.json.gz", path.name]
    assert path.read_text().startswith("Step 4, rank 1 of 2, CPU: ")
    assert shares(path)["communication"] > 0
    assert (
        "Profile of step 4" not in logged(profiled)
        and logged(profiled, 1).count("Profile of step 4") == 1
    )


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cut_off(self: Any, path: str) -> None:
    """Write what the profiler leaves on a full disk, without an error."""
    Path(path).write_text('{"traceEvents": [{"ph": "X", "na')


def busy(self: Any) -> None:
    raise RuntimeError("the profiler is in use")


FAULTS: list[tuple[Any, str, Callable[..., None], str]] = [
    (Path, "write_bytes", no_room, "OSError(28, 'No space left on device')"),
    (
        torch.profiler.profile,
        "export_chrome_trace",
        cut_off,
        "could not be written completely; free space on the disk",
    ),
    (torch.profiler.profile, "start", busy, "RuntimeError('the profiler is in use')"),
    (torch.profiler.profile, "stop", busy, "RuntimeError('the profiler is in use')"),
]


@pytest.mark.parametrize(
    ("where", "name", "fault", "why"),
    FAULTS,
    ids=[fault[2].__name__ + fault[1] for fault in FAULTS],
)
def test_no_run_ends_for_a_profile(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    fault: Callable[..., None],
    why: str,
) -> None:
    write_tokens(tmp_path / "tokens")
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fault)
        assert run(arguments(tmp_path, "run", "training.profiling.interval=3")) == 0
    said = logged(tmp_path / "run")
    assert said.count("could not be profiled") == 1
    assert re.search(rf"Step 3 could not be profiled; training continues: .*{re.escape(why)}", said)
    assert len(losses(tmp_path / "run")) == 4
    assert not list((tmp_path / "run").glob("profile/*")) and not list(
        (tmp_path / "run").glob("profile/.*")
    )


def test_a_failed_step_is_reported_and_not_its_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokens(tmp_path / "tokens")

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(TrainStep, "forward_backward", fail)
    with pytest.raises(ZeroDivisionError):
        run(arguments(tmp_path, "run", "training.profiling.interval=1"))
    assert (
        "profiled" not in logged(tmp_path / "run") and not (tmp_path / "run" / "profile").exists()
    )
    with torch.profiler.profile() as after:  # the profile was ended
        torch.ones(3).sum()
    assert any(one.key == "aten::sum" for one in after.key_averages())


class Clock:
    """A clock that advances only when a test advances it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_profiled_step_counts_as_a_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps take 1 s each and a profiled one 50 s, of which nothing is seen in speed."""
    write_tokens(tmp_path / "tokens")
    clock = Clock()
    step = TrainStep.__call__

    def timed(self: TrainStep, *args: Any, **kwargs: Any) -> Any:
        clock.now += 1
        return step(self, *args, **kwargs)

    class Slow:
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> None:
            clock.now += 9

        def __exit__(self, *_: Any) -> None:
            clock.now += 40

    monkeypatch.setattr("fast_llm.training.metrics.time.perf_counter", clock)
    monkeypatch.setattr(TrainStep, "__call__", timed)
    monkeypatch.setattr(profile, "Profile", Slow)
    for every in (1, 3):
        how = (
            "training.profiling.interval=3",
            f"training.logs.interval={every}",
            "training.train_iters=7",
        )
        assert run(arguments(tmp_path, str(every), *how)) == 0
        found = records(tmp_path / str(every))
        assert len(found) == {1: 7, 3: 3}[every]
        for record in found.values():
            assert record["step_time_ms"] == record["step_time_average_ms"] == 1000
    # No average is known before the first step.
    assert (
        run(
            arguments(
                tmp_path, "first", "training.profiling.interval=1", "training.profiling.offset=1"
            )
        )
        == 0
    )
    assert [record["step_time_ms"] for record in records(tmp_path / "first").values()] == [
        50_000
    ] * 4
