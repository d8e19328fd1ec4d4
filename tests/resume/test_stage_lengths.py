"""Stages with other sequence lengths and rotary positions: what each step reads and computes, over
resumes, rewinds, branches, kills and numbers of processes.

`short` has sequences of 24 tokens, 8 a step; `long` has 96, 2 a step, and another theta; `middle`
has 48, 4 a step. All steps have 192 tokens.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from fast_llm.checkpoint import folder as folders
from fast_llm.config.document import read
from fast_llm.config.prepare import ConvertConfig
from fast_llm.data.dataset import Dataset
from fast_llm.data.loader import Loader
from fast_llm.data.source import Source
from fast_llm.errors import ConfigError, TrainingStopped
from fast_llm.planning.preflight import preflight
from fast_llm.planning.report import describe_run
from fast_llm.training.audit import inspect_step
from fast_llm.training.convert import convert
from fast_llm.training.step import TrainStep
from fast_llm.training.trainer import Trainer
from tests.helpers import slow, some_fast, spawn
from tests.training.runs import losses, records, run, settings, weights, write_tokens

TOKENS, STEPS = 192, 9
STAGES = (
    "[{until: 3, weights: {a: 0.75, b: 0.25}},"
    " {until: 6, weights: {a: 0.5, b: 0.5}, sequence_length: 96, rotary: {theta: 500000}},"
    " {weights: {b: 1}, sequence_length: 48}]"
)
LENGTHS = {1: 24, 2: 24, 3: 24, 4: 96, 5: 96, 6: 96, 7: 48, 8: 48, 9: 48}


def arguments(root: Path, name: str, *further: str) -> list[str]:
    plain = [one for one in settings(root) if not one.startswith(("data.path", "run."))]
    return [
        *plain,
        "data.format=mixture",
        f"data.sources={{a: {root}/a, b: {root}/b}}",
        f"data.stages={STAGES}",
        f"training.train_iters={STEPS}",
        "training.checkpoint.interval=3",
        "training.checkpoint.keep=null",
        "training.validation.interval=3",
        "training.validation.iterations=1",
        "training.num_workers=0",
        f"run.experiment_dir={root}/{name}",
        *further,
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sources, and `whole`, a run that nothing interrupted."""
    place = tmp_path_factory.mktemp("lengths")
    write_tokens(place / "a", 120)
    write_tokens(place / "b", 90)
    assert run(arguments(place, "whole")) == 0
    return place


Read = tuple[int, int, str]  # index, length, and the tokens themselves


def reading(arguments_: list[str]) -> list[Read]:
    """Train; what this process read of the training data."""
    read, found = Dataset.read, list[Read]()

    def reported(self: Dataset, split: str, index: int) -> Any:
        packed = read(self, split, index)
        if split == "training":
            found.append((index, len(packed.tokens) - 1, packed.tokens.tobytes().hex()))
        return packed

    Dataset.read = reported  # type: ignore[method-assign]
    try:
        assert run(arguments_) == 0
    finally:
        Dataset.read = read  # type: ignore[method-assign]
    return found


def spans(name: str, root: Path, steps: int = STEPS) -> list[list[tuple[Any, ...]]]:
    """For each step, the documents of each sequence, as `fast-llm why` says."""
    found = []
    for step in range(1, steps + 1):
        data = inspect_step(f"{root}/{name}", step)
        found.append([(data.length, data.as_json())])
    return found


def inputs_of(dataset: Dataset, sequences: range) -> Counter[tuple[str, int]]:
    """How often each input of each source is in these sequences, by its place in the source."""
    split, found = dataset.splits["training"], Counter[tuple[str, int]]()
    for index in sequences:
        source, number, _ = split.find(index)
        assert isinstance(source, Source)
        for begin, end in source.input_ranges(number):
            found.update((source.name, place) for place in range(begin, end))
    return found


def test_each_step_has_the_length_of_its_stage(root: Path) -> None:
    found = records(root / "whole")
    for step, length in LENGTHS.items():
        assert found[step]["sequence_length"] == length
        assert found[step]["batch_size"] == TOKENS // length
        assert found[step]["consumed_tokens"] == step * TOKENS
        tokens = [source["consumed_tokens"] for source in found[step]["sources"].values()]
        assert sum(tokens) == step * TOKENS
        data = inspect_step(f"{root}/whole", step)
        assert (data.length, len(data.sequences)) == (length, TOKENS // length)
        last = data.sequences[-1]["index"]
        assert last == found[step]["consumed_samples"] - 1
    flops = [found[step]["model_tflops"] * found[step]["step_time_ms"] for step in (3, 6, 9)]
    assert flops[0] < flops[2] < flops[1]  # attention over longer sequences


def test_why_reads_what_the_run_read(root: Path) -> None:
    held = {name: write_tokens(root / "again", n) for name, n in (("a", 120), ("b", 90))}
    found = sorted(reading(arguments(root, "read")))
    assert [index for index, _, _ in found] == list(range(3 * 8 + 3 * 2 + 3 * 4))
    texts = {index: (length, text) for index, length, text in found}
    for step, length in LENGTHS.items():
        for sequence in inspect_step(f"{root}/read", step).sequences:
            tokens = [
                held[Path(part["file"]).name][part["document"]][
                    part["first_token"] : part["first_token"] + part["tokens"]
                ]
                for part in sequence["documents"]
            ]
            assert texts[sequence["index"]] == (
                length,
                np.concatenate(tokens).astype(np.int64).tobytes().hex(),
            )


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_each_input_once_an_epoch(root: Path, packing: str) -> None:
    """Over stages of 24, 96 and 48 tokens, far into the second epoch of `b`."""
    stages = (
        "[{until: 4, weights: {a: 1, b: 1}},"
        " {until: 8, weights: {a: 1, b: 1}, sequence_length: 96},"
        " {until: 16, weights: {b: 1}, sequence_length: 48}, {weights: {b: 1}}]"
    )
    given = [f"data.stages={stages}", "training.train_iters=24", f"data.packing={packing}"]
    spec = preflight(read(None, arguments(root, f"once-{packing}", *given)), 1, weights=False)
    dataset, history = spec.dataset, spec.history
    assert history is not None
    assert [entry.batch_size for entry in history.batches] == [8, 2, 4, 8]
    assert [order.sequence_length for order in history.orders] == [24, 96, 48, 24]
    total = history.first_sequence(25, ())
    split = dataset.splits["training"]
    if packing == "best_fit":
        places = Counter[tuple[str, int, int, int]]()
        for index in range(total):
            *_, epoch = split.find(index)
            for span in dataset.locate("training", index):
                # The first token of a part is no target, the last one no input.
                inside = range(span.begin, span.begin + span.tokens - 1)
                places.update((span.prefix, span.document, place, epoch) for place in inside)
        assert max(places.values()) == 1
        return
    size = {source.name: source.inputs for source in split.sources}
    epochs = Counter[int]()
    found = [Counter[tuple[str, int]](), Counter[tuple[str, int]]()]
    for index in range(total):
        *_, epoch = split.find(index)
        found[epoch].update(inputs_of(dataset, range(index, index + 1)))
        epochs[epoch] += 1
    assert all(max(counts.values()) == 1 for counts in found)  # nothing is repeated
    used = sum(1 for source, _ in found[0] if source.endswith("b"))
    assert 0 <= size[next(n for n in size if n.endswith("b"))] - used < 48  # nor skipped
    assert epochs[1] > 10


@pytest.mark.parametrize("step", some_fast((2, 3, 4, 6, 7), lambda step: step == 3))
def test_a_resumed_run_is_the_same(root: Path, step: int) -> None:
    """Bit for bit, at borders and inside of stages."""
    whole, name = weights(root / "whole" / "checkpoint" / str(STEPS)), f"resumed{step}"
    assert run(arguments(root, name, f"training.train_iters={step}")) == 0
    assert run(arguments(root, name)) == 0
    assert losses(root / name) == losses(root / "whole")
    assert losses(root / name, "validation").items() >= losses(root / "whole", "validation").items()
    assert spans(name, root) == spans("whole", root)
    assert weights(root / name / "checkpoint" / str(STEPS)) == whole


def test_a_rewind_to_a_border(root: Path) -> None:
    """A spike at step 5, of the second stage: back to step 3, where it began; killed after step 7,
    and complete.
    """
    given = arguments(
        root,
        "rewound",
        "training.spikes.policy=rewind",
        "training.spikes.window=4",
        "training.spikes.threshold=50",
        "optimizer.learning_rate.base=1e-3",
    )
    assert spiking(given, 26, kill=9) == ""
    before = [inspect_step(f"{root}/rewound", step) for step in range(1, STEPS + 1)]
    assert spiking(given, 26) == 0
    info = folders.read_manifest(root / "rewound" / "checkpoint" / str(STEPS)).info
    assert info["samples"] == 3 * 8 + 2 * 2 + 3 * 2 + 3 * 4
    assert [inspect_step(f"{root}/rewound", step) for step in range(1, STEPS + 1)] == before
    assert [data.length for data in before] == list(LENGTHS.values())
    indices = [sequence["index"] for data in before for sequence in data.sequences]
    assert indices == [*range(24), *range(28, 28 + 6 + 12)]  # two steps of two were skipped


def spiking(given: list[str], first: int, kill: int = 0) -> int | str:
    """Train; loss and gradients of the step whose first sequence is `first` are huge. `kill`: end
    after so many steps, and what is being saved then.
    """
    step, check, made = Loader.step, Trainer.check_finite, list[int]()
    forward_backward, worse = TrainStep.forward_backward, list[Any]()

    def reported(self: Loader, number: int) -> Any:
        batches = step(self, number)
        at = self.first_sample + number * self.sizes.batch_size
        if self.split == "training" and at == first:
            worse.append(batches)
        return batches

    def disturbed(self: TrainStep, batches: Any, seed: float) -> Any:
        factor = 1000.0 if any(one is batches for one in worse) else 1.0
        return forward_backward(self, batches, factor * seed) * factor

    def counted(self: Trainer, number: int) -> None:
        check(self, number)
        made.append(number)
        if len(made) == kill:
            self.checkpoints.saver.drain()
            raise TrainingStopped("")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "step", reported)
        patch.setattr(Trainer, "check_finite", counted)
        patch.setattr(TrainStep, "forward_backward", disturbed)
        try:
            return run(given)
        except TrainingStopped:
            return ""


def test_exports_and_checkpoints_say_what_was_in_force(root: Path) -> None:
    """transformers measures the run's validation loss with each export, whose config.json has the
    positions of its stage; a converted checkpoint is the same.
    """
    given = arguments(
        root,
        "exports",
        "training.export.interval=3",
        "batch.cross_document_attention=yes",
        "model.base_model.max_position_embeddings=32",
    )
    assert run(given) == 0
    dataset = preflight(read(None, given), 1, weights=False).dataset
    tokens = torch.tensor(np.stack([dataset.read("validation", i).tokens for i in range(8)]))
    thetas = {3: 10000.0, 6: 500000.0, 9: 10000.0}
    for step, length in ((3, 32), (6, 96), (9, 48)):
        folder = root / "exports" / "export" / "llama" / str(step)
        config = json.loads((folder / "config.json").read_text())
        assert (config["rope_theta"], config["max_position_embeddings"]) == (thetas[step], length)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        ours = losses(root / "exports", "validation")[step]
        assert loss.item() == pytest.approx(ours, rel=1e-5)
        checkpoint, output = root / "exports" / "checkpoint" / str(step), root / f"as{step}"
        values = {"input": {"path": str(checkpoint)}, "output": {"path": str(output)}}
        convert(ConvertConfig.model_validate(values))
        assert json.loads((output / "config.json").read_text()) == config
        further = arguments(root, f"from{step}", f"pretrained.path={checkpoint}", "data.stages=[]")
        further = [one for one in further if not one.startswith("model.")]
        started = preflight(read(None, further), 1, weights=False).config
        assert started.model.base_model.transformer.rotary.theta == thetas[step]


def test_a_branch_at_a_border(root: Path) -> None:
    """It continues with the data of the other run; its own stages decide lengths and positions."""
    given = arguments(root, "branch", f"run.branch_from={{run: {root}/whole, step: 6}}")
    assert run(given) == 0
    whole = losses(root / "whole")
    assert losses(root / "branch") == {step: whole[step] for step in (7, 8, 9)}
    stages = STAGES.replace("sequence_length: 48", "sequence_length: 192, rotary: {theta: 1e6}")
    given = arguments(root, "longer", f"run.branch_from={{run: {root}/whole, step: 6}}")
    assert run([*given, f"data.stages={stages}"]) == 0
    found = [inspect_step(f"{root}/longer", step) for step in range(1, STEPS + 1)]
    assert [data.length for data in found] == [24] * 3 + [96] * 3 + [192] * 3
    assert [sequence["index"] for sequence in found[6].sequences] == [30]


def problems(given: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        preflight(read(None, given), 1, weights=False)
    return caught.value.problems


def test_mistakes_are_found_before_training(root: Path) -> None:
    write_tokens(root / "tiny", 5)
    given = arguments(root, "mistaken", f"data.sources={{a: {root}/a, tiny: {root}/tiny}}")
    stages = "data.stages=[{until: 3}, {weights: {a: 1, tiny: SHARE}, sequence_length: 192}]"
    (problem,) = problems([*given, stages.replace("SHARE", "1")])
    assert "data.stages.1.sequence_length: given 192, but data.sources.tiny has " in problem
    assert problem.endswith(
        " tokens for training, fewer than one sequence of 192 + 1; give it no weight in this stage,"
        " prepare more of it, or lower sequence_length"
    )
    unused = preflight(read(None, [*given, stages.replace("SHARE", "0")]), 1, weights=False)
    assert "stage 2: sequences of 192 tokens, 1 a step" in describe_run(unused)
    (problem,) = problems([*given, "data.stages=[{until: 3}, {rotary: {type: none}}]"])
    assert problem.endswith(
        "data.stages.1.rotary.type: given [none, none], but Llama has [default, default]; leave it"
        " out"
    )
    long = "data.stages=[{until: 3}, {sequence_length: 192}]"
    limit = "model.base_model.max_position_embeddings=96"
    (warning,) = (
        one
        for one in preflight(read(None, [*arguments(root, "long"), long, limit]), 1, False).warnings
        if "positions" in one
    )
    assert "data.stages.1.sequence_length: given 192, above model.base_model.max_pos" in warning


@slow
@pytest.mark.parametrize(
    "further",
    [
        ("model.multi_stage.zero_stage=3",),
        ("model.distributed.tensor_parallel=2", "model.distributed.sequence_tensor_parallel=yes"),
        ("model.distributed.sequence_data_parallel=2",),
        ("model.distributed.pipeline_parallel=2",),
        (
            "model.distributed.pipeline_parallel=2",
            "model.multi_stage.pipeline_schedule=interleaved_zero_bubble",
            "model.multi_stage.layers_per_stage=1",
            "model.base_model.transformer.num_layers=4",
        ),
    ],
    ids=["zero", "tensor", "context", "pipeline", "zero-bubble"],
)
def test_layouts_compute_the_same(root: Path, further: tuple[str, ...]) -> None:
    """Two processes, as one: losses of every stage, and of validation in between."""
    plain = [one for one in further if "num_layers" in one or "epsilon" in one]
    given = ["optimizer.epsilon=1e-4", "optimizer.learning_rate.base=1e-3", *plain]
    name = "-".join(one.rpartition(".")[2] for one in further)
    assert run(arguments(root, f"alone-{name}", *given)) == 0
    assert spawn(2, run, arguments(root, name, *given, *further)) == [0, 0]
    for phase in ("training", "validation"):
        alone, together = losses(root / f"alone-{name}", phase), losses(root / name, phase)
        assert together.keys() == alone.keys()
        for step, loss in alone.items():
            assert together[step] == pytest.approx(loss, rel=1e-5)


@slow
def test_each_sequence_once_over_numbers_of_processes(root: Path) -> None:
    """One, two, then one process, with changes at and between borders."""
    found = []
    for world, last in ((1, 3), (2, 5), (1, 7), (2, STEPS)):
        given = arguments(root, "changing", f"training.train_iters={last}")
        given += ["training.checkpoint.interval=1"]
        for texts in spawn(world, reading, given):
            found += texts
    alone = reading(arguments(root, "steady"))
    assert sorted(found) == sorted(alone)
    assert spans("changing", root) == spans("steady", root)
