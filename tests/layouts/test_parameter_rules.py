"""Parameters with rules of their own, frozen ones among them, train alike in every layout.

One process equals a plain loop of transformers and torch.optim.AdamW; every layout equals one
process. The first pipeline stage is frozen as a whole, another block in part.
"""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from fast_llm.checkpoint import state
from fast_llm.config.document import read
from fast_llm.config.parameter_rules import frozen_names
from fast_llm.config.train import DataConfig, TrainConfig
from fast_llm.config.validate import validate
from fast_llm.data.dataset import open_dataset
from fast_llm.errors import ConfigError
from fast_llm.kernels.rounding import quantize_
from fast_llm.models import family_of
from fast_llm.optim import optimizer
from fast_llm.planning.preflight import preflight
from tests.helpers import slow, some_fast, spawn
from tests.layouts.test_experts import EXPERTS, TRANSFORMER
from tests.layouts.test_layouts import MODEL, lines
from tests.training.runs import losses, records, run_all, settings, write_tokens

STEPS = 5
SCALES: list[tuple[float, str]] = [
    (0.3, "*.mlp.*"),
    (0, "model.embed_tokens.weight"),
    (0, "model.layers.[01].*"),
    (0, "*.layers.2.self_attn.[qk]_proj.weight"),
]
NO_DECAY = ["*.v_proj.*", "lm_head.*"]
TIED = "tied=yes"

# Processes and lines, as in test_layouts.py.
LAYOUTS = [
    "1",
    "1 tied=yes",
    "1 moments=int8",
    "2 zero=1",
    "2 zero=3 recompute=full",
    "2 tp=2 sp=yes micro=4",
    "2 cp=2 zero=2",
    "2 pp=2 tied=yes",
    "2 pp=2 schedule=zbv_zero_bubble layers=1",
    "2 pp=2 schedule=interleaved_zero_bubble layers=1",
    "3 zero=3 moments=int8",
    "4 zero=2 shard=2",
    "8 pp=2 cp=2 tp=2 sp=yes",
    "1 experts=yes",
    "4 ep=2 zero=3 experts=yes",
    "4 ep=2 tp=2 sp=yes micro=4 experts=yes",
]
FAST = {"2 zero=3 recompute=full", "2 pp=2 schedule=zbv_zero_bubble layers=1"}


def arguments(root: Path, name: str, layout: str, steps: int = STEPS) -> list[str]:
    """A run of a layout in `root/name`."""
    words = layout.split()[1:]
    given = ["1", *(word for word in words if not word.startswith(("ep=", "experts=")))]
    scales = json.dumps([one for pair in SCALES for one in pair])
    return [
        *settings(root),
        *(f"model.base_model.{key}={value}" for key, value in MODEL.items()),
        "model.base_model.tie_word_embeddings=no",
        # Load balancing would depend on how the step is divided into micro-batches.
        *(
            [*EXPERTS, f"{TRANSFORMER}.expert_auxiliary_loss_coefficient=0"]
            * ("experts=yes" in words)
        ),
        f"training.train_iters={steps}",
        f"training.checkpoint.interval={steps or 1}",
        "training.double_check.interval=2",
        "optimizer.weight_decay=0.1",
        "optimizer.epsilon=1e-4",
        "optimizer.gradient_norm_clipping=0.5",
        # A tied model has no head of its own.
        f"optimizer.no_weight_decay={json.dumps(NO_DECAY[:1] if TIED in words else NO_DECAY)}",
        f"optimizer.learning_rate_scales={scales}",
        f"run.experiment_dir={root}/{name}",
        *lines(" ".join(given)),
        *("model.distributed.expert_parallel=2" for word in words if word == "ep=2"),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens, and the runs of one process."""
    root = tmp_path_factory.mktemp("rules")
    write_tokens(root / "tokens", 400)
    return root


def trained(root: Path, layout: str) -> Path:
    """The folder of a run of this layout."""
    if not (root / layout).exists():
        world, how = int(layout.split()[0]), to_nearest if "int8" in layout else run_all
        assert spawn(world, how, [arguments(root, layout, layout)], timeout=120)
    return root / layout


def to_nearest(every: list[list[str]]) -> list[int]:
    """Train with 8-bit moments that are rounded to the nearest."""

    def rounded(number: Tensor, into: Tensor, absmax: Tensor, seed: int | None = None) -> None:
        quantize_(number, into, absmax)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "quantize_", rounded)
        return run_all(every)


def checkpoint(path: Path, layout: str) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors of a checkpoint, and the names of frozen parameters."""
    config = validate(TrainConfig, read(None, arguments(path, "", layout)))
    shapes = family_of(config.model.base_model).shapes(config.model.base_model)
    frozen = set(frozen_names(config.optimizer, shapes))
    tensors = {
        f"{part}/{name}": torch.full(shape, torch.nan)
        for part in ("weight", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
        if part == "weight" or name not in frozen
    }
    state.load(path, tensors)  # fails for a tensor that is missing, and for one more
    return tensors, frozen


@pytest.mark.parametrize(
    "layout", some_fast([one for one in LAYOUTS if one != "1"], FAST.__contains__)
)
def test_every_layout_equals_one_process(root: Path, layout: str) -> None:
    words = [word for word in layout.split() if word.startswith(("tied", "moments", "experts"))]
    one, other = trained(root, " ".join(["1", *words])), trained(root, layout)
    # As in test_layouts.py: sums in another order. 8-bit moments are rounded to the nearest here:
    # a number between two levels may then fall to either, 12 % apart: measured 3e-6, and 3e-4
    # without scales. The chances of training go by the place in a shard. With them, 3 processes
    # differ from one by 1.2e-2 at this rate, with and without scales; one process with other
    # chances by 1.5e-2; and 3 whose chances go by the place in the whole weight by 5e-5. From a
    # loop in float64, one and 3 are as far: 1.06e-2 and 1.08e-2; with moments in fp32 4e-7.
    loss_bound, norm_bound, weight_bound = (
        (1e-5, 1e-4, 1e-3) if "int8" in layout else (1e-5, 1e-5, 1e-5)
    )
    expected, found = records(one), records(other)
    assert expected.keys() == found.keys() == set(range(1, STEPS + 1))
    for step, record in expected.items():
        assert found[step]["language_model_loss"] == pytest.approx(
            record["language_model_loss"], rel=loss_bound
        )
        assert found[step]["grad_norm"] == pytest.approx(record["grad_norm"], rel=norm_bound)
    wanted, frozen = checkpoint(one / "checkpoint" / str(STEPS), layout)
    tensors, _ = checkpoint(other / "checkpoint" / str(STEPS), layout)
    assert len(frozen) > 10
    for name, tensor in wanted.items():
        if name.startswith("weight/"):
            distance = (tensors[name] - tensor).norm() / tensor.norm().clamp_min(1e-3)
            assert distance < weight_bound, (name, distance)


def plain_loop(start: Path, root: Path) -> tuple[LlamaForCausalLM, list[float], list[float]]:
    """transformers' model, PyTorch's AdamW with a group for each parameter: losses and norms."""
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    groups: list[dict[str, Any]] = []
    for name, parameter in model.named_parameters():
        scales = [1.0, *(scale for scale, pattern in SCALES if fnmatchcase(name, pattern))]
        decays = parameter.dim() > 1 and not any(fnmatchcase(name, one) for one in NO_DECAY)
        parameter.requires_grad_(scales[-1] > 0)
        if scales[-1]:
            groups.append(
                {
                    "params": [parameter],
                    "lr": 1e-2 * scales[-1],
                    "weight_decay": 0.1 if decays else 0.0,
                }
            )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-4)
    dataset = open_dataset(
        DataConfig(format="list", path=[f"{root}/tokens"], split=[8, 1, 1]), 24, 1234, 128
    )
    found, norms = [], []
    for step in range(STEPS):
        rows = [dataset.read("training", step * 8 + i).tokens for i in range(8)]
        sequences = torch.stack([torch.from_numpy(row) for row in rows])
        loss = cross_entropy(
            model(sequences[:, :-1]).logits.flatten(0, 1), sequences[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        found.append(loss.item())
    return model, found, norms


@pytest.mark.parametrize("layout", some_fast(["1", "1 tied=yes"], lambda layout: layout == "1"))
def test_one_process_equals_a_plain_loop(root: Path, layout: str) -> None:
    start = f"start {layout}"
    made = [*arguments(root, start, layout, 0), "training.export.interval=1"]
    export = root / start / "export" / "llama" / "0"
    given = [
        *arguments(root, f"plain {layout}", layout),
        f"pretrained.path={export}",
        f"training.export.interval={STEPS}",
        "batch.cross_document_attention=yes",  # a condition of the plain loop
    ]
    assert spawn(1, run_all, [made, given]) == [[0, 0]]
    model, expected, norms = plain_loop(export, root)
    folder = root / f"plain {layout}"
    for step, record in records(folder).items():
        assert record["language_model_loss"] == pytest.approx(expected[step - 1], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norms[step - 1], rel=1e-5)
    frozen = 0
    with (
        safe_open(folder / "export/llama" / str(STEPS) / "model.safetensors", "pt") as after,
        safe_open(export / "model.safetensors", "pt") as before,
    ):
        for name, weight in model.named_parameters():
            found = after.get_tensor(name)
            assert torch.equal(found, before.get_tensor(name)) == (not weight.requires_grad), name
            # Rounding of 1e-7 a step, magnified by Adam's division.
            assert (found - weight).norm() <= 1e-5 * weight.norm(), name
            frozen += not weight.requires_grad
    assert frozen == 21  # the embedding, both blocks, and q and k of another


@slow
def test_resume_in_another_layout(root: Path) -> None:
    before, after = "2 zero=3 recompute=full", "2 tp=2 sp=yes micro=4"
    assert spawn(2, run_all, [arguments(root, "first", before, 3)]) == [[0], [0]]
    copytree(root / "first" / "checkpoint", root / "then" / "checkpoint")
    assert spawn(2, run_all, [arguments(root, "then", after)]) == [[0], [0]]
    expected, found = losses(trained(root, "1")), losses(root / "then")
    assert found.keys() == {4, 5}
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5)


def test_a_resumed_run_freezes_the_same(root: Path) -> None:
    given = arguments(root, "1", "1", STEPS + 1)
    trained(root, "1")
    saved = root / "1" / "checkpoint" / str(STEPS)
    advice = (
        f", unlike {saved}; set it back, or start a new run, in another run.experiment_dir, from"
        " an export (pretrained.path)"
    )
    for scales, what in (
        ("[]", "trains model.embed_tokens.weight and 20 more"),
        ('[0, "model.layers.[01].*", 0, "*.embed_*", 0, "*.layers.2.self_attn.[qkv]_proj.weight"]',
         "freezes model.layers.2.self_attn.v_proj.weight"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            preflight(read(None, [*given, f"optimizer.learning_rate_scales={scales}"]), 1, True)
        assert any(
            f"optimizer.learning_rate_scales: {what}{advice}" in one for one in error.value.problems
        ), error.value.problems


def test_optimizer_state_of_other_parameters(root: Path) -> None:
    trained(root, "1")
    saved = root / "1" / "checkpoint" / str(STEPS)
    given = [
        *arguments(root, "other", "1"),
        f"pretrained.path={saved}",
        "pretrained.format=distributed",
        "pretrained.optimizer_state=yes",
    ]
    assert preflight(read(None, given), 1, True).pretrained_folder == saved
    with pytest.raises(ConfigError) as error:
        preflight(read(None, [*given, "optimizer.learning_rate_scales=[]"]), 1, True)
    assert error.value.problems == [
        "override pretrained.optimizer_state=yes: pretrained.optimizer_state: given yes, but"
        f" optimizer.learning_rate_scales freezes other parameters than {saved}"
        " (model.embed_tokens.weight and 20 more), and moments exist of trained ones alone; freeze"
        " the same, or leave it out"
    ]


def test_other_scales_and_decay_may_change(root: Path) -> None:
    trained(root, "1")
    given = arguments(root, "1", "1", STEPS + 1)
    more = '[0.5, "*.mlp.*", 0, "*.embed_*", 0, "*.layers.[01].*", 0, "*.2.self_attn.[qk]_*"]'
    spec = preflight(
        read(
            None, [*given, f"optimizer.learning_rate_scales={more}", "optimizer.no_weight_decay=[]"]
        ),
        1,
        True,
    )
    assert [change.partition(":")[0] for change in spec.changes] == [
        "optimizer.learning_rate_scales",
        "optimizer.no_weight_decay",
        "training.checkpoint.interval",
        "training.train_iters",
    ]


@slow
def test_compiled_blocks(root: Path) -> None:
    name = "compiled"
    given = [*arguments(root, name, "2 zero=3"), "model.multi_stage.compile_all=yes"]
    assert spawn(2, run_all, [given], timeout=240) == [[0], [0]]
    expected, found = records(trained(root, "1")), records(root / name)
    for step, record in expected.items():
        for number in ("language_model_loss", "grad_norm"):
            assert found[step][number] == pytest.approx(record[number], rel=1e-5)
