"""`training.averages`: the formulas in float64, resume to the bit, layouts, and the plan."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fast_llm.checkpoint.folder import read_manifest
from fast_llm.config.document import read
from fast_llm.config.saving import AverageConfig
from fast_llm.errors import ConfigError
from fast_llm.planning.preflight import preflight
from fast_llm.training.averages import Average
from tests.helpers import some_fast, spawn
from tests.training import test_spikes as spikes
from tests.training.runs import run, run_all, settings, weights, write_tokens

AVERAGES = {
    "ema": "{decay: 0.9, interval: 1, start: 1}",
    "tail": "{start: 3, interval: 2}",
    "stretch": "{length: 4, interval: 2}",
}


def arguments(root: Path, name: str, steps: int, *further: str) -> list[str]:
    return settings(
        root,
        f"training.train_iters={steps}",
        "training.checkpoint.interval=1",
        "training.checkpoint.keep=null",
        "training.export.interval=4",
        "training.export.data_type=fp32",
        *(f"training.averages.{average}={values}" for average, values in AVERAGES.items()),
        f"run.experiment_dir={root}/{name}",
        *further,
    )


def export(root: Path, step: int, average: str = "") -> dict[str, torch.Tensor]:
    """The weights of an export."""
    family = f"llama-{average}" if average else "llama"
    found: dict[str, torch.Tensor] = load_file(
        root / "export" / family / str(step) / "model.safetensors"
    )
    return found


def expected(history: list[dict[str, torch.Tensor]], step: int) -> dict[str, Any]:
    """Each average after a step, in float64; `history[s]`: the weights after step s."""

    def mean(steps: list[int]) -> Any:
        return {name: torch.stack([history[s][name] for s in steps]).mean(0) for name in history[0]}

    ema = history[2]
    for at in range(3, step + 1):
        ema = {name: 0.9 * ema[name] + 0.1 * history[at][name] for name in ema}
    first = (step // 2 * 2 - 1) // 4 * 4  # before the stretch of the last update
    return {
        "ema": ema,
        "tail": mean([s for s in range(5, step + 1) if (s - 3) % 2 == 0]),
        "stretch": mean([s for s in range(first + 2, step + 1) if s % 2 == 0]),
    }


def test_the_formulas(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    assert run(arguments(tmp_path, "run", 8, "training.export.interval=1")) == 0
    nothing: dict[str, torch.Tensor] = {}
    weights_after = [nothing] + [export(tmp_path / "run", step) for step in range(1, 9)]
    history = [{n: w.double() for n, w in one.items()} for one in weights_after]
    history[0] = history[1]  # only for the names
    for step in range(5, 9):
        for average, values in expected(history, step).items():
            found = export(tmp_path / "run", step, average)
            assert found.keys() == values.keys()
            for name, weight in found.items():
                # Some updates of fp32, each of which rounds by 2⁻²⁴ of weights below 1.
                assert float((weight.double() - values[name]).abs().max()) < 1e-6
    assert not (tmp_path / "run/export/llama-ema/1").exists()  # not begun
    assert not (tmp_path / "run/export/llama-tail/4").exists()
    assert (tmp_path / "run/export/llama-stretch/2").exists()
    info = read_manifest(tmp_path / "run/checkpoint/7").info
    assert info["averages"] == {"ema": 6, "tail": 2, "stretch": 1}


@pytest.mark.parametrize(
    ("world", "further"),
    some_fast(
        [
            (1, ["model.distributed.training_dtype=bf16"]),
            (2, ["model.multi_stage.zero_stage=1"]),
            (2, ["model.multi_stage.zero_stage=3", "model.distributed.training_dtype=bf16"]),
            (2, ["model.distributed.tensor_parallel=2"]),
            (2, ["model.distributed.pipeline_parallel=2"]),
        ],
        lambda one: one[0] == 1,
    ),
)
def test_resume(tmp_path: Path, world: int, further: list[str]) -> None:
    """Interrupted at a step with averages under way, the run ends with the same bits."""
    write_tokens(tmp_path / "tokens")
    every = [
        arguments(tmp_path, "straight", 8, *further),
        arguments(tmp_path, "broken", 7, *further),
        arguments(tmp_path, "broken", 8, *further),
    ]
    codes = run_all(every) if world == 1 else spawn(world, run_all, every)[0]
    assert codes == [0, 0, 0]
    one, other = (
        weights(tmp_path / "straight/checkpoint/8"),
        weights(tmp_path / "broken/checkpoint/8"),
    )
    assert one == other and any("average.ema/" in name for name in one)
    for average in AVERAGES:
        ours, theirs = (
            export(tmp_path / "straight", 8, average),
            export(tmp_path / "broken", 8, average),
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_another_layout_continues_the_averages(tmp_path: Path) -> None:
    """A run of two processes continues with one, and each average is that of a run on one."""
    write_tokens(tmp_path / "tokens")
    sharded = ["model.multi_stage.zero_stage=3", "optimizer.epsilon=1e-4"]
    assert spawn(2, run, arguments(tmp_path, "moved", 6, *sharded)) == [0, 0]
    assert run(arguments(tmp_path, "moved", 8, *sharded)) == 0
    assert run(arguments(tmp_path, "one", 8, *sharded)) == 0
    for average in AVERAGES:
        ours, theirs = export(tmp_path / "moved", 8, average), export(tmp_path / "one", 8, average)
        for name in ours:  # gradients are summed in another order
            assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_averages_come_and_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run may resume with other averages. A new one begins where it resumes."""
    write_tokens(tmp_path / "tokens")
    assert run(arguments(tmp_path, "run", 4, "training.averages={ema: {decay: 0.9}}")) == 0
    capsys.readouterr()
    assert run(arguments(tmp_path, "run", 8, "training.averages={new: {interval: 2}}")) == 0
    shown = capsys.readouterr()
    assert "training.averages.new begins here: " in shown.out + shown.err
    ours = {name: weight.double() for name, weight in export(tmp_path / "run", 8, "new").items()}
    assert read_manifest(tmp_path / "run/checkpoint/8").info["averages"] == {"new": 2}
    from fast_llm import cli

    for step in (6, 8):
        path, output = tmp_path / f"run/checkpoint/{step}", tmp_path / f"out{step}"
        words = ["convert", f"input.path={path}", f"output.path={output}", "output.data_type=fp32"]
        assert cli.main(words) == 0
    six, eight = (load_file(tmp_path / f"out{step}/model.safetensors") for step in (6, 8))
    for name, weight in ours.items():
        assert float((weight - (six[name].double() + eight[name].double()) / 2).abs().max()) < 1e-6


def test_a_tensor_that_is_being_written_stays() -> None:
    """While a checkpoint reads the average, an update makes another tensor."""
    average = Average(AverageConfig(decay=0.5, interval=1))
    average.updates = 1
    before = average.tensors["w"] = torch.ones(3)
    average.add("w", torch.zeros(3), in_place=False)
    assert before.tolist() == [1, 1, 1] and average.tensors["w"].tolist() == [0.5, 0.5, 0.5]
    before = average.tensors["w"]
    average.add("w", torch.zeros(3), in_place=True)
    assert average.tensors["w"] is before and before.tolist() == [0.25, 0.25, 0.25]


def test_an_average_with_a_later_start_begins_anew() -> None:
    """As in a branch that averages its cooldown under the name of its parent's average."""
    assert [s for s in range(91, 121) if AverageConfig(start=90, interval=10).begins_anew(s)] == [
        100
    ]
    stretches = AverageConfig(start=90, interval=10, length=20)
    due = [step for step in range(91, 151) if stretches.due(step)]
    assert [step for step in due if stretches.begins_anew(step)] == [100, 120, 140]


def test_a_stretch_waits_for_the_update_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averages in a thread, as on a GPU, with a copy that takes longer than a step."""
    from fast_llm.checkpoint.staging import HostCopy
    from fast_llm.training import averages

    write_tokens(tmp_path / "tokens")
    words = ["training.averages={all: {interval: 1, length: 2}}", "training.export.interval=1"]
    assert run(arguments(tmp_path, "plain", 5, *words)) == 0

    begin = averages.WeightAverages.begin

    def threaded(self: averages.WeightAverages) -> None:
        begin(self)
        self.device = 0

    monkeypatch.setattr(averages.WeightAverages, "begin", threaded)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(HostCopy, "wait", lambda self: time.sleep(0.2))
    assert run(arguments(tmp_path, "threaded", 5, *words)) == 0
    for step in range(1, 6):
        one, other = (export(tmp_path / name, step, "all") for name in ("plain", "threaded"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_rewind_restores_the_averages(tmp_path: Path) -> None:
    """After a rewind, averages hold the steps up to the checkpoint and those after the spike."""
    write_tokens(tmp_path / "tokens", 400)
    words = spikes.arguments(tmp_path, "run", "rewind", "training.averages={all: {interval: 1}}")
    ((code, _),) = spawn(1, spikes.spiking, words, spikes.BAD)
    info = read_manifest(tmp_path / f"run/checkpoint/{spikes.STEPS}").info
    assert code == 0 and info["passed_over"]
    assert info["averages"] == {"all": spikes.STEPS}


def test_the_plan(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    from fast_llm.planning.disk import checkpoint_bytes, disk_use, format_bytes
    from fast_llm.planning.report import describe_run

    words = arguments(tmp_path, "run", 8)
    spec = preflight(read(None, words), 1, weights=True)
    text = " ".join(describe_run(spec, 100).split())
    assert "Averages ema: EMA with decay 0.9 of the weights every step after step 1; " in text
    assert "stretch: uniform mean of the weights every 2 steps, anew every 4 steps; " in text
    # 36 kB of weights in fp32; 3 averages, which are not copied for a checkpoint.
    parameters = spec.cost.parameters
    assert f"{format_bytes(4 * parameters)} of host memory" in text
    assert f"{format_bytes(4 * 3 * parameters)} while a checkpoint or export is written" in text
    assert f"in the background, from {format_bytes(12 * parameters)} of host memory" in text
    sharded = preflight(read(None, [*words, "model.multi_stage.shard_size=2"]), 4, weights=True)
    assert f"{format_bytes(8 * parameters)} of host memory" in describe_run(sharded)
    parameters = 1000
    assert checkpoint_bytes(spec.config, parameters) == parameters * 4 * (3 + 3)
    assert disk_use(spec.config, tmp_path / "run", parameters, 0)["exports"][0] == 2 * 4


def test_convert_takes_an_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files of a converted average are those of its export; others are refused."""
    from fast_llm import cli

    write_tokens(tmp_path / "tokens")
    further = ["training.averages.late={start: 7, interval: 2}"]
    assert run(arguments(tmp_path, "run", 8, *further)) == 0
    checkpoint = tmp_path / "run/checkpoint/8"

    def convert(name: str, source: Path = checkpoint, *words: str) -> int:
        output = tmp_path / f"of {name}"
        words = (f"input.path={source}", f"output.path={output}", *words)
        return cli.main(["convert", *words, f"input.average={name}", "output.data_type=fp32"])

    for average in AVERAGES:
        assert convert(average) == 0
        ours, exported = tmp_path / f"of {average}", tmp_path / f"run/export/llama-{average}/8"
        for name in ("model.safetensors", "config.json"):
            assert (ours / name).read_bytes() == (exported / name).read_bytes()
    capsys.readouterr()
    assert convert("emma") == 2
    held = "it holds ema, tail, stretch"
    assert f"input.average: given emma, which {checkpoint} does not hold; {held}" in (
        capsys.readouterr().err
    )
    assert convert("late") == 2
    assert f"given late, which {checkpoint} holds without any update; {held}" in (
        capsys.readouterr().err
    )
    assert convert("any", tmp_path / "of ema", "input.format=auto") == 2
    assert "is no checkpoint, and only checkpoints hold averages" in capsys.readouterr().err


def test_a_host_with_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fast_llm.training import averages

    write_tokens(tmp_path / "tokens")
    monkeypatch.setattr(averages, "available_memory", lambda: 300_000)
    words = arguments(tmp_path, "run", 1)
    parameters = preflight(read(None, words), 1, weights=True).cost.parameters
    assert parameters * 4 * 2 < 300_000 < parameters * 4 * 3
    with pytest.raises(ConfigError, match=r"training.averages: 3 averages need .* a host has"):
        run(words)
    assert run([word for word in words if not word.startswith("training.averages.ema")]) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{a: {decay: 0.9, length: 10}}", "length belongs to a uniform mean"),
        ("{a: {interval: 4, length: 10}}", "given length 10, must be a multiple of interval, 4"),
        ("{a-b: {decay: 0.9}}", "a-b cannot be the name of an average"),
    ],
)
def test_mistakes(tmp_path: Path, values: str, message: str) -> None:
    write_tokens(tmp_path / "tokens")
    with pytest.raises(ConfigError, match=message):
        preflight(read(None, settings(tmp_path, f"training.averages={values}")), 1, weights=True)
