"""Branches: a run that begins with a checkpoint of another run, which stays as it was."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fast_llm import cli
from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import state
from fast_llm.config.document import read
from fast_llm.config.train import BranchConfig
from fast_llm.errors import CheckpointError, UserError
from fast_llm.planning import branch
from fast_llm.planning.preflight import preflight
from fast_llm.planning.report import describe_run
from fast_llm.training.audit import inspect_step
from tests.helpers import slow, spawn
from tests.training.runs import losses, records, run, settings, weights, write_tokens


def arguments(root: Path, name: str, steps: int, *further: str) -> list[str]:
    return settings(
        root,
        f"training.train_iters={steps}",
        "training.checkpoint.interval=2",
        "training.checkpoint.keep=null",
        "training.validation.interval=2",
        "training.validation.iterations=1",
        f"run.experiment_dir={root}/{name}",
        *further,
    )


FP16 = (
    "model.distributed.training_dtype=fp16",
    "optimizer.gradient_scaler.window=1",
    "optimizer.gradient_scaler.initial=16",
)


def branching(root: Path, name: str, step: int, steps: int, *further: str) -> list[str]:
    origin = f"run.branch_from={{run: {root}/trunk, step: {step}}}"
    return arguments(root, name, steps, origin, *further)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and `trunk`, a run of six steps in fp16, whose loss scale grows."""
    place = tmp_path_factory.mktemp("branches")
    write_tokens(place / "tokens", 400)
    write_tokens(place / "other", 300)
    (place / "trunk").mkdir()
    assert spawn(1, run, arguments(place, "trunk", 6, *FP16)) == [0]
    return place


@pytest.fixture
def root(made: Path, request: pytest.FixtureRequest) -> Path:
    """That folder, without the branches of earlier tests."""
    for folder in made.iterdir():
        if folder.is_dir() and folder.name != "trunk":
            shutil.rmtree(folder)
    return made


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """The digest and time of every file under a folder."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def info(checkpoint: Path) -> Mapping[str, Any]:
    return folders.read_manifest(checkpoint).info


def problems(arguments: list[str]) -> list[str]:
    """The problems without their places."""
    with pytest.raises(UserError) as caught:
        preflight(read(None, arguments), 1, weights=False)
    return [str(line).partition("}: ")[2] or str(line) for line in str(caught.value).splitlines()]


def test_a_branch_with_equal_settings_trains_the_same_bits(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(root / "trunk")
    assert run(branching(root, "same", 4, 6, *FP16)) == 0
    output = capsys.readouterr().out
    assert contents(root / "trunk") == before
    trunk, same = root / "trunk", root / "same"
    assert weights(same / "checkpoint" / "6") == weights(trunk / "checkpoint" / "6")
    assert f"Branching from {trunk}/checkpoint/4, after step 4: {trunk} to step 4, then" in output
    assert f"\nAncestors     {trunk} to step 4, then this run\n" in output
    found, expected = dict(info(same / "checkpoint/6")), dict(info(trunk / "checkpoint/6"))
    assert found.pop("ancestors") == [{"run": str(trunk.resolve()), "step": 4}]
    assert found.pop("settings")["run"]["branch_from"] == {"run": str(trunk), "step": 4}
    del expected["settings"]
    assert found == expected  # counters, loss scale, spikes, history
    assert found["loss_scale"]["value"] == 16 * 2**6
    assert sorted(folder.name for folder in (same / "checkpoint").iterdir()) == ["6"]
    steps = {step: loss for step, loss in losses(trunk).items() if step > 4}
    assert losses(same) == steps and list(steps) == [5, 6]
    # What was due at step 4 was done by the other run.
    assert list(losses(trunk, "validation")) == [0, 2, 4, 6]
    assert losses(same, "validation") == {6: losses(trunk, "validation")[6]}


OTHER = (
    *("batch.batch_size=4", "batch.sequence_length=12", "model.distributed.seed=7"),
    *("optimizer.learning_rate.decay_style=wsd", "optimizer.learning_rate.decay_iterations=8"),
    *("optimizer.learning_rate.cooldown=4", "optimizer.moments_dtype=bf16"),
)


def test_a_branch_changes_settings_without_consent_and_resumes_with_it(root: Path) -> None:
    mixture = f"data.path=[0.5, {root}/tokens, 0.5, {root}/other]"
    options = [*OTHER, mixture, *FP16]
    spec = preflight(read(None, branching(root, "other", 4, 8, *options)), 1, weights=False)
    assert "batch.batch_size: 8 → 4" in spec.changes
    plan = describe_run(spec)
    assert f"branches from {root}/trunk/checkpoint/4, after step 4" in plan
    assert f"Ancestors     {root}/trunk to step 4, then this run" in plan
    assert "Training      8 steps of 48 tokens = 384 tokens, " in plan
    assert " floating-point operations; 4 steps left, 192 tokens\n" in plan
    assert run(branching(root, "other", 4, 6, *options)) == 0
    # By overrides one by one, as on a command line; the branch resumes from its own checkpoint.
    own = [f"run.branch_from.run={root}/trunk", "run.branch_from.step=4"]
    assert run(arguments(root, "other", 8, *options, *own)) == 0
    kept = records(root / "other")
    rates = [record["learning_rate"] for record in kept.values()]
    assert list(kept) == [5, 6, 7, 8] and rates == pytest.approx([7.5e-3, 5e-3, 2.5e-3, 0])
    assert [kept[step]["consumed_samples"] for step in (5, 8)] == [36, 48]
    assert info(root / "other/checkpoint/8")["ancestors"] == [
        {"run": str((root / "trunk").resolve()), "step": 4}
    ]
    (problem,) = problems(branching(root, "other", 4, 10, *options, "batch.batch_size=2"))
    assert "run.accept_changes=[batch.batch_size]" in problem
    # Steps before the branch are answered from its history.
    trunk, other = str(root / "trunk"), str(root / "other")
    for step in (1, 4):
        assert inspect_step(other, step).sequences == inspect_step(trunk, step).sequences
    after = inspect_step(other, 5).sequences
    assert [one["index"] for one in after] == [32, 33, 34, 35]
    assert {one["source"] for one in after} == {f"{root}/tokens", f"{root}/other"}
    # A branch of a branch.
    origin = f"run.branch_from={{run: {other}, step: 6}}"
    assert run(arguments(root, "second", 8, *options, origin)) == 0
    assert [one["step"] for one in info(root / "second/checkpoint/8")["ancestors"]] == [4, 6]
    assert weights(root / "second/checkpoint/8") == weights(root / "other/checkpoint/8")


def test_the_pretrained_model_may_be_gone(root: Path, tmp_path: Path) -> None:
    """The other run has a copy of its small files, which exports of the branch get."""
    exported = ["training.export.interval=2", "training.train_iters=2"]
    assert run(arguments(root, "first", 2, *exported)) == 0
    model = Path(shutil.move(root / "first/export/llama/2", tmp_path / "model"))
    pretrained = f"pretrained.path={model}"
    assert run(arguments(root, "second", 2, pretrained)) == 0
    shutil.rmtree(model)
    origin = f"run.branch_from={{run: {root}/second, step: 2}}"
    assert run(arguments(root, "third", 4, pretrained, origin, "training.export.interval=4")) == 0
    assert folders.is_complete(root / "third/export/llama/4")
    config = (root / "second/pretrained/config.json").read_bytes()
    assert (root / "third/pretrained/config.json").read_bytes() == config


def test_a_branch_with_stages_of_data(root: Path) -> None:
    """Stages are counted from the start of the trunk, whose data continue."""
    stages = [
        "data.format=mixture",
        "data.path=[]",
        f"data.sources={{a: {root}/tokens, b: {root}/other}}",
        "data.stages=[{until: 5, weights: {a: 1}}, {weights: {b: 1}}]",
    ]
    assert run(branching(root, "staged", 4, 6, *FP16, *stages)) == 0
    trunk, staged = str(root / "trunk"), str(root / "staged")
    five, six = inspect_step(staged, 5).sequences, inspect_step(staged, 6).sequences
    assert [one["documents"] for one in five] == [
        one["documents"] for one in inspect_step(trunk, 5).sequences
    ]
    assert {part["file"] for one in six for part in one["documents"]} == {f"{root}/other"}
    assert losses(root / "staged")[5] == losses(root / "trunk")[5]


def test_a_rise_after_the_cooldown_is_warned_of(root: Path) -> None:
    low = ["optimizer.learning_rate.base=1e-6"]
    assert run(branching(root, "low", 4, 6, *FP16, *low)) == 0
    origin = f"run.branch_from={{run: {root}/low, step: 6}}"
    spec = preflight(read(None, arguments(root, "high", 8, *FP16, origin)), 1, weights=False)
    (warning,) = [one for one in spec.warnings if "rises" in one]
    assert "the rate rises from 1e-06 to 0.01 after update 6, because" in warning


def test_a_run_is_not_inspected(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, what in (
        (f"{root}/trunk", "the folder of a run"),
        (f"{root}/trunk/checkpoint/4", "a checkpoint"),
    ):
        assert cli.main(["inspect", path]) == 2
        assert capsys.readouterr().err == (
            f"fast-llm inspect: {path}: {what}, not data; `fast-llm report {root}/trunk` shows the"
            f" run, `fast-llm why {root}/trunk STEP` the documents of a step\n"
        )


def test_inspect_shows_no_steps_of_a_branch_that_has_not_begun(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "branch.yaml"
    path.write_text(
        f"data: {{path: {root}/tokens}}\ntraining: {{train_iters: 8}}\nbatch: {{batch_size: 8}}\n"
        f"run:\n  branch_from: {{run: {root}/trunk, step: 4}}\n"
    )
    assert cli.main(["inspect", str(path), "--step", "5"]) == 2
    assert capsys.readouterr().err == (
        f"fast-llm inspect: {path}:5: run.branch_from: --sequence and --step show runs that begin"
        " with step 1; use `fast-llm why RUN STEP` once the branch has begun, or give"
        " run.branch_from=null\n"
    )


def test_why_in_a_branch_without_a_checkpoint(root: Path) -> None:
    options = ["batch.batch_size=4", "training.checkpoint.interval=null", *FP16]
    assert run(branching(root, "early", 4, 6, *options)) == 0
    assert not (root / "early/checkpoint").exists()
    trunk, early = str(root / "trunk"), str(root / "early")
    assert inspect_step(early, 3).sequences == inspect_step(trunk, 3).sequences
    half = inspect_step(trunk, 5).sequences[:4]
    assert inspect_step(early, 5).sequences == half


@slow
def test_other_layouts_branch(root: Path) -> None:
    for world, how in ((2, "model.multi_stage.zero_stage=3"), (2, "batch.batch_size=8")):
        name = f"layout-{how[-1]}"
        more = [how] if "zero" in how else ["model.distributed.tensor_parallel=2"]
        assert spawn(world, run, branching(root, name, 4, 6, *FP16, *more)) == [0] * world
        expected, found = losses(root / "trunk"), losses(root / name)
        # Sums in another order, in fp16: its epsilon is 1e-3; the losses are means of 180 tokens.
        assert list(found) == [5, 6]
        assert all(abs(found[step] - expected[step]) < 1e-3 * expected[step] for step in found)


@pytest.mark.parametrize(
    ("step", "further", "problem"),
    [
        (
            5,
            [],
            "run.branch_from.step: given 5, but {root}/trunk has no checkpoint of this step; it"
            " has 2, 4, 6",
        ),
        (
            4,
            ["run.branch_from.run={root}/nothing"],
            "run.branch_from.run: given {root}/nothing: no such folder",
        ),
        (
            4,
            ["run.branch_from.run={root}"],
            "run.branch_from.run: given {root}, but {root}/checkpoint has no complete checkpoint;"
            " give the experiment folder of a run that has one",
        ),
        (
            6,
            ["training.train_iters=5"],
            "training.train_iters: given 5, but {root}/trunk/checkpoint/6 has 6 steps; raise it, or"
            " branch from an earlier step",
        ),
        (
            4,
            [
                "model.base_model.transformer.num_layers=3",
                "model.base_model.family=qwen2",
                "model.base_model.transformer.add_linear_biases=only_attn_qkv",
            ],
            "run.branch_from: {root}/trunk/checkpoint/4 has model.base_model.family llama, given"
            " qwen2; model.base_model.transformer.num_layers 2, given 3;"
            " model.base_model.transformer.add_linear_biases nowhere, given only_attn_qkv; a model"
            " cannot change its shape: set back what differs",
        ),
        (
            4,
            ["run.branch_from.run={root}/branch"],
            "run.branch_from.run: given {root}/branch, which is run.experiment_dir; choose another"
            " folder for the branch",
        ),
        (
            4,
            ["run.experiment_dir={root}/trunk"],  # which has checkpoints
            "run.branch_from.run: given {root}/trunk, which is run.experiment_dir; choose another"
            " folder for the branch",
        ),
        (
            4,
            ["run.branch_from.run={root}/trnk"],
            "run.branch_from.run: given {root}/trnk: no such folder; did you mean {root}/trunk?",
        ),
        (
            4,
            ["run.branch_from.run={root}/trunk/checkpoint/2"],
            "run.branch_from.run: given {root}/trunk/checkpoint/2, which is a checkpoint; give"
            " run.branch_from.run={root}/trunk and run.branch_from.step=2",
        ),
        (
            4,
            ["run.branch_from={root}/trunk"],
            "run.branch_from: given {root}/trunk, must be a section of settings or null; give"
            " run.branch_from.run and run.branch_from.step",
        ),
        (
            4,
            ["run.experiment_dir={root}/trunk", "run.branch_from.run={root}/elsewhere"],
            "run.branch_from: given step 4 of {root}/elsewhere, but the run of"
            " {root}/trunk/checkpoint/6 is not a branch; choose another run.experiment_dir, or"
            " leave run.branch_from out to continue that run",
        ),
    ],
)
def test_branches_that_cannot_be(root: Path, step: int, further: list[str], problem: str) -> None:
    options = [one.format(root=root) for one in further]
    (found,) = problems(branching(root, "branch", step, 8, *FP16, *options))
    assert found.replace('"', "").endswith(problem.format(root=root)), found


def test_a_folder_of_another_branch_is_refused(root: Path) -> None:
    assert run(branching(root, "branch", 4, 6, *FP16)) == 0
    (found,) = problems(branching(root, "branch", 2, 6, *FP16))
    assert found == (
        f"run.branch_from: given step 2 of {root}/trunk, but the run of {root}/branch/checkpoint/6"
        f" began at step 4 of {root}/trunk; choose another run.experiment_dir, or leave"
        " run.branch_from out to continue that run"
    )
    assert preflight(
        read(None, arguments(root, "branch", 8, *FP16)), 1, weights=False
    ).ancestors == [branch.Ancestor(run=str(root / "trunk"), step=4)]


def test_a_damaged_checkpoint_is_refused(root: Path, tmp_path: Path) -> None:
    trunk = Path(shutil.copytree(root / "trunk", tmp_path / "trunk"))
    path = next((trunk / "checkpoint/4").glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (found,) = problems(branching(root, "branch", 4, 8, *FP16, f"run.branch_from.run={trunk}"))
    assert found.endswith(
        f"run.branch_from: {path}: its content has changed since it was saved (sha256 differs);"
        " checkpoint 4 is damaged"
    )


def test_the_command_reports_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = branching(root, "branch", 4, 8, *FP16, "run.branch_from.step=3")
    assert cli.main(["train", *given]) == 2
    assert capsys.readouterr().err == (
        "fast-llm train: override run.branch_from.step=3: run.branch_from.step: given 3, but"
        f" {root}/trunk has no checkpoint of this step; it has 2, 4, 6\n"
    )


# The other run is running: it deletes and replaces checkpoints.


def running(root: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of the trunk, and the arguments of a branch of it."""
    trunk = Path(shutil.copytree(root / "trunk", tmp_path / "trunk"))
    return trunk, branching(
        root, "branch", 4, 6, *FP16, f"run.branch_from.run={trunk}", "training.num_workers=0"
    )


def test_a_checkpoint_that_is_deleted_before_it_is_verified(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, given = running(root, tmp_path)
    verify = folders.verify

    def late(folder: Path) -> folders.Manifest:
        if folder.exists():
            folders.delete(folder)
        return verify(folder)

    monkeypatch.setattr(folders, "verify", late)
    (found,) = problems(given)
    assert found.endswith(f"{trunk} has no checkpoint of this step; it has 2, 6")


def test_a_checkpoint_that_is_replaced_before_it_is_verified(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, given = running(root, tmp_path)
    verify, tried = folders.verify, list[Path]()

    def replaced(folder: Path) -> folders.Manifest:
        if not tried:  # `publish` moves the old folder away, then the new one into its place
            folder.rename(folder.with_name("4.replaced-00000000"))
        tried.append(folder)
        try:
            return verify(folder)
        finally:
            if len(tried) == 1:
                shutil.copytree(folder.with_name("4.replaced-00000000"), folder)

    monkeypatch.setattr(folders, "verify", replaced)
    spec = preflight(read(None, given), 1, weights=False)
    assert spec.checkpoint == trunk / "checkpoint/4"


def test_a_checkpoint_that_is_deleted_before_it_is_read(root: Path, tmp_path: Path) -> None:
    from fast_llm.training.job import train

    trunk, given = running(root, tmp_path)
    spec = preflight(read(None, given), 1, weights=False)
    folders.delete(trunk / "checkpoint/4")
    with pytest.raises(CheckpointError) as caught:
        train(spec)
    assert str(caught.value) == (
        f"{trunk}/checkpoint/4: the other run deleted it while it was read; start again, with a"
        " checkpoint that the other run keeps"
    )


def test_a_checkpoint_that_is_replaced_while_it_is_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, given = running(root, tmp_path)
    load = state.load

    def replacing(path: Path, *rest: Any) -> None:
        load(path, *rest)
        content = json.loads((path / folders.MANIFEST).read_text())
        partial = folders.begin(path)
        for name in content["files"]:
            shutil.copy(path / name, partial / name)
        changed = content["info"] | {"updates": content["info"]["updates"] + 1}
        folders.publish(partial, path, "checkpoint", 4, changed, content["files"])

    monkeypatch.setattr(state, "load", replacing)
    with pytest.raises(CheckpointError) as caught:
        run(given)
    assert str(caught.value) == (
        f"{trunk}/checkpoint/4: the other run replaced it while it was read; start again, with a"
        " checkpoint that the other run keeps"
    )


def test_many_steps_are_shortened(tmp_path: Path) -> None:
    for step in range(0, 100, 2):
        partial = folders.begin(tmp_path / "checkpoint" / str(step))
        folders.publish(partial, tmp_path / "checkpoint" / str(step), "checkpoint", step, {}, {})
    given = BranchConfig(run=str(tmp_path), step=51)
    with pytest.raises(UserError) as caught:
        branch.branch_point(given)
    near = ", ".join(map(str, range(32, 72, 2)))
    assert str(caught.value) == (
        f"run.branch_from.step: given 51, but {tmp_path} has no checkpoint of this step; the"
        f" nearest are {near}"
    )
