"""Warnings about settings that are allowed and probably not intended."""

from pathlib import Path

from fast_llm.checkpoint.folder import Manifest, read_manifest
from fast_llm.config.document import Document
from fast_llm.config.learning_rate import LearningRateConfig
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import with_location
from fast_llm.models import family_of_json
from fast_llm.optim import schedule as schedules
from fast_llm.planning.disk import disk_warning
from fast_llm.planning.pretrained import PretrainedModel, experiment_folder
from fast_llm.planning.resume import BIAS_RATE, has_router_biases


def likely_mistakes(
    document: Document,
    config: TrainConfig,
    pretrained: PretrainedModel,
    parameters: int,
    manifest: Manifest | None,
) -> list[str]:
    """The warnings, one line each. `parameters`: of the model; `manifest`: of the checkpoint from
    which the run continues.
    """
    folder = experiment_folder(document)
    model, notes = pretrained.config, []
    if model is not None:
        notes = [f"pretrained.path: {note}" for note in family_of_json(model, "").notes(model)]
    about_settings = (
        *notes,
        *schedules.likely_mistakes(config.optimizer.learning_rate, config.training.train_iters),
        _rise(config, manifest),
        *_averages(config),
        _router_biases(config),
        _dropped_biases(config, pretrained.folder),
        _push(config),
        *_long_sequences(config, pretrained.folder),
        disk_warning(folder, config, parameters, 0 if manifest is None else manifest.step),
    )
    placed = [
        with_location(warning, document, TrainConfig) for warning in about_settings if warning
    ]
    return [*filter(None, [_nothing_saved(config)]), *placed]


def _rise(config: TrainConfig, manifest: Manifest | None) -> str:
    """A learning rate that rises at once, because the schedule changed."""
    if manifest is None:
        return ""
    try:
        before = manifest.info["settings"]["optimizer"]["learning_rate"]
        given = LearningRateConfig.model_validate(before)
    except (KeyError, ValueError):  # a checkpoint of another version
        return ""
    return schedules.rise(given, config.optimizer.learning_rate, manifest.info["updates"])


def _nothing_saved(config: TrainConfig) -> str:
    training = config.training
    if not training.train_iters:
        return ""
    model = "training.export.interval (a Hugging Face model, also after the last step)"
    state = "training.checkpoint.interval (training state, also after the last step)"
    if config.run.experiment_dir is None:
        return f"Nothing will be saved: set run.experiment_dir, and {state} or {model}"
    if training.checkpoint.interval is None and training.export.interval is None:
        return f"Nothing that is trained will be saved: set {state} or {model}"
    if training.checkpoint.interval is None:
        return (
            "No checkpoints: a run that crashes starts over. Set training.checkpoint.interval to"
            " save its state"
        )
    return ""


def _averages(config: TrainConfig) -> list[str]:
    """Averages that never begin, and averages that no export holds."""
    training = config.training
    if not training.train_iters or not training.averages:
        return []
    found = [
        f"training.averages.{name}.start: given {average.start}: the first update would be after"
        f" step {average.start + average.interval} (start + interval), but training.train_iters is"
        f" {training.train_iters}, so this average stays empty"
        for name, average in training.averages.items()
        if average.start + average.interval > training.train_iters
    ]
    if training.checkpoint.interval is not None and training.export.interval is None:
        found.append(
            "training.averages: only checkpoints will hold the averages, because"
            " training.export.interval is null; set it to get models of them"
        )
    return found


def _router_biases(config: TrainConfig) -> str:
    """Biases of routers, which exports cannot hold."""
    base, training = config.model.base_model, config.training
    rate = base.transformer.expert_bias_update_rate
    if rate is None or training.export.interval is None:
        return ""
    return (
        f"{BIAS_RATE}: given {rate}, but exports leave the biases of routers out, because"
        f" {base.family} models have none: an exported model chooses other experts for some tokens."
        " Checkpoints hold them"
    )


def _dropped_biases(config: TrainConfig, folder: Path | None) -> str:
    """Biases of the routers of a pretrained checkpoint that this run would not use."""
    rate = config.model.base_model.transformer.expert_bias_update_rate
    if config.pretrained.format != "distributed" or rate is not None or folder is None:
        return ""
    if not has_router_biases(read_manifest(folder).info):
        return ""
    return f"pretrained.path: the biases of its routers are not used; to use them set {BIAS_RATE}"


def _push(config: TrainConfig) -> str:
    """Why exports could not be pushed from here."""
    repo = config.training.export.push_to_hub.repo
    if repo is None:
        return ""
    from huggingface_hub import constants, get_token

    where = f"training.export.push_to_hub.repo: given {repo}, but"
    if constants.HF_HUB_OFFLINE:
        return f"{where} HF_HUB_OFFLINE is set: no export will be pushed. Unset it"
    if get_token() is None:
        return (
            f"{where} there is no token here: no export will be pushed. Set HF_TOKEN where"
            " training is started, or run `hf auth login`"
        )
    return ""


def _long_sequences(config: TrainConfig, pretrained_folder: Path | None) -> list[str]:
    """Sequences that are longer than the model's context, of the run and of each stage that leaves
    the model's positions as they are.
    """
    most = config.model.base_model.max_position_embeddings
    lengths = {"batch.sequence_length": config.batch.sequence_length} | {
        f"data.stages.{number}.sequence_length": stage.sequence_length
        for number, stage in enumerate(config.data.stages)
        if stage.sequence_length is not None and stage.rotary is None
    }
    where = "model.base_model.max_position_embeddings"
    if pretrained_folder is not None:
        where = f"max_position_embeddings of {pretrained_folder}/config.json"
    return [
        f"{setting}: given {length}, above {where}, {most}: positions from {most} on"
        " are new to the model, and other programs may refuse them. Lower it, or raise the other"
        for setting, length in lengths.items()
        if length > most
    ]
