"""Features that one setting turns off, so that the settings of the feature need not be removed from
the file.
"""

from typing import Any

# A feature is turned off by one setting, whatever else the file says about it. (setting, value that
# turns the feature off, settings that are then ignored). The value must be given: the default turns
# nothing off, so that a missing setting that others require is a mistake.
DISABLED_BY: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("training.validation.interval", None, ("training.validation.iterations",)),
    ("training.checkpoint.interval", None, ("training.checkpoint.keep_every", "training.shutdown")),
    ("training.export.interval", None, ("training.export.keep_every",)),
    ("training.logs.interval", None, ("training.wandb.alert.interval",)),
    (
        "run.experiment_dir",
        None,
        (
            *("training.checkpoint.interval", "training.checkpoint.keep_every"),
            *("training.export.interval", "training.export.keep_every"),
            *("training.shutdown", "training.profiling", "training.tensorboard"),
        ),
    ),
    (
        "model.distributed.pipeline_parallel",
        1,
        (
            "model.multi_stage.pipeline_schedule",
            "model.multi_stage.layers_per_stage",
            "batch.breadth_first_micro_batches",
        ),
    ),
    ("model.base_model.cross_entropy_impl", "torch", ("model.base_model.cross_entropy_splits",)),
    ("pretrained.path", None, ("pretrained.format", "pretrained.optimizer_state")),
    ("pretrained.model_weights", False, ("pretrained.optimizer_state",)),
    ("run.torch_dynamo_enable", False, ("model.multi_stage.compile_all",)),
)


def without_disabled(values: Any) -> Any:
    """The values of a file without the settings that DISABLED_BY says to ignore. Does not change
    `values`.
    """

    def at(path: str) -> Any:
        here = values
        for key in path.split("."):
            if not isinstance(here, dict) or key not in here:
                return ...
            here = here[key]
        return here

    def changed(here: Any, keys: list[str], value: Any = ...) -> Any:
        """`here` with another value at a path; without it if there is no value."""
        if not isinstance(here, dict) or keys[0] not in here:
            return here
        if len(keys) > 1:
            return here | {keys[0]: changed(here[keys[0]], keys[1:], value)}
        rest = {key: old for key, old in here.items() if key != keys[0]}
        return rest if value is ... else rest | {keys[0]: value}

    off = [
        path
        for path, value, _ in DISABLED_BY
        if type(at(path)) is type(value) and at(path) == value
    ]
    for path, _, others in DISABLED_BY:
        for other in others if path in off else ():
            values = changed(values, other.split("."))
    no_checkpoints = {"training.checkpoint.interval", "run.experiment_dir"} & set(off)
    if no_checkpoints and at("training.spikes.policy") == "rewind":
        values = changed(values, ["training", "spikes", "policy"], "skip")
    no_triton = at("run.enable_triton_kernels") is False
    if no_triton and at("model.base_model.cross_entropy_impl") == "triton":
        values = changed(values, ["model", "base_model", "cross_entropy_impl"], "fused")
    return values
