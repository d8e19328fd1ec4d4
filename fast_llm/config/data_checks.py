"""The constraints on the section `data`, as checks.py has them."""

import math
from itertools import islice, pairwise

from fast_llm.config.model_checks import Violations
from fast_llm.config.train import TrainConfig
from fast_llm.terminal import nearest


def data_path(config: TrainConfig) -> Violations:
    """What `path` must be for each `format`."""
    style, given = config.data.format, config.data.path
    concerned = ("data.path", "data.format")
    if style == "random":
        if given:
            yield concerned, "format: random reads no path; leave it out, or set format: file"
    elif style == "mixture":
        if given:
            yield concerned, "format: mixture reads data.sources instead; leave it out"
    elif not given:
        yield (
            concerned,
            f"missing: format: {style} needs it; give the dataset.json of `fast-llm prepare` with"
            " format: file, or try things with format: random",
        )
    elif style == "file":
        if len(given) != 1 or not isinstance(given[0], str) or not given[0]:
            yield (
                concerned,
                "format: file needs one path, the dataset.json of `fast-llm prepare`; format: list"
                " takes several",
            )
    elif len(given) > 1 or not isinstance(given[0], str) or not given[0]:
        weights, paths = given[::2], given[1::2]
        if (
            len(given) % 2
            or not all(isinstance(path, str) and path for path in paths)
            or not all(type(weight) in (int, float) and 0 < weight < math.inf for weight in weights)
        ):
            yield (
                concerned,
                "format: list needs one path, or weights above 0 and paths in turn: [0.9,"
                " code/dataset.json, 0.1, prose/dataset.json]",
            )
        elif twice := next((path for path in paths if paths.count(path) > 1), None):
            yield concerned, f"names {twice} twice; name it once, with the sum of its weights"


def split(config: TrainConfig) -> Violations:
    """Splits that are used have a share of the documents."""
    if config.data.format == "random":
        return
    training, shares = config.training, config.data.split
    shown = [int(share) if share == int(share) else share for share in shares]
    for share, wanted, setting, example in (
        (shares[0], training.train_iters > 0, "training.train_iters", "[99, 1, 0]"),
        (
            shares[1],
            training.validation.interval is not None,
            "training.validation.interval",
            "[99, 1, 0]",
        ),
        (shares[2], training.test_iters > 0, "training.test_iters", "[98, 1, 1]"),
    ):
        if wanted and not share:
            yield (
                ("data.split", "data.format", setting),
                f"given {shown}, which leaves no documents for {setting}; give them a share, e.g."
                f" {example}",
            )


def packing(config: TrainConfig) -> Violations:
    """Best-fit packing needs documents of a known length."""
    fim = config.data.fim
    if config.data.packing == "best_fit" and fim.rate and not fim.truncate_or_pad:
        yield (
            ("data.packing", "data.fim.truncate_or_pad"),
            "given best_fit, which never cuts a document that fits; fill-in-the-middle (data.fim)"
            " makes documents longer unless data.fim.truncate_or_pad=yes: set that, or"
            " packing=concatenate",
        )


def sources(config: TrainConfig) -> Violations:
    """`sources` and `stages` go with `format: mixture`, and each source is named once."""
    data, setting = config.data, "data.sources"
    for name, given in ((setting, data.sources), ("data.stages", data.stages)):
        if given and data.format != "mixture":
            yield (
                (name, "data.format"),
                f"format: {data.format} does not read it; set format: mixture, or leave it out",
            )
    if data.format != "mixture":
        return
    if not data.sources:
        yield (
            (setting, "data.format"),
            "missing: format: mixture needs it; give each dataset a name, e.g. {code:"
            " code/dataset.json, prose: prose/dataset.json}",
        )
    paths: dict[str, str] = {}
    for name, source in data.sources.items():
        if source.path in paths:
            yield (
                (f"{setting}.{name}", f"{setting}.{paths[source.path]}"),
                f"given {source.path}, which is {setting}.{paths[source.path]} already; name it"
                " once",
            )
        paths.setdefault(source.path, name)
    without = [name for name, source in data.sources.items() if source.weight is None]
    if 0 < len(without) < len(data.sources):
        yield (
            (f"{setting}.{without[0]}.weight", setting),
            f"missing: other sources have a weight; give one to {', '.join(without)}, or to none",
        )


def stages(config: TrainConfig) -> Violations:
    """Stages have shares of known sources, and ends that ascend."""
    data, above = config.data, "data.stages"
    if not data.sources:
        return  # reported by `sources`
    for number, stage in enumerate(data.stages):
        here = f"{above}.{number}"
        for name in stage.weights:
            if name not in data.sources:
                yield (
                    (f"{here}.weights.{name}", "data.sources", above),
                    f"no source of this name{nearest(name, data.sources)} (data.sources has"
                    f" {', '.join(data.sources)})",
                )
        if stage.weights and not any(stage.weights.values()):
            yield (f"{here}.weights", above), "each is 0; give at least one source a share"
        if stage.until is not None and stage.until_tokens is not None:
            yield (
                (f"{here}.until_tokens", above),
                f"given {stage.until_tokens}, but until {stage.until} is given too; keep one",
            )
        yield from stage_length(config, number)
    yield from _stage_ends(config)


def stage_length(config: TrainConfig, number: int) -> Violations:
    """The tokens of a step are a number of sequences of the stage."""
    size, length = config.batch.batch_size, config.batch.sequence_length
    wanted, here = config.data.stages[number].sequence_length, f"data.stages.{number}"
    concerned = (f"{here}.sequence_length", "batch.batch_size", "batch.sequence_length")
    if wanted is None:
        return
    if size is None:
        yield (
            ("batch.batch_size", *concerned),
            f"missing: {here}.sequence_length keeps the tokens of a step, so it needs their number",
        )
    elif size * length % wanted:
        tokens = size * length
        low = [one for one in range(1, math.isqrt(tokens) + 1) if not tokens % one]
        divisors = {*low, *(tokens // one for one in low)}
        near = sorted(divisors, key=lambda one: abs(math.log(one / wanted)))[:2]
        yield (
            concerned,
            f"given {wanted}, must divide the {tokens:,} tokens of a step (batch_size {size} ×"
            f" sequence_length {length}), which stay the same, e.g."
            f" {' or '.join(map(str, sorted(near)))}",
        )


def _stage_ends(config: TrainConfig) -> Violations:
    """The ends of stages: all in steps or all in tokens, ascending, and up to the end."""
    given, above = config.data.stages, "data.stages"
    kinds = ("until", "until_tokens")
    used = [kind for kind in kinds if any(getattr(stage, kind) is not None for stage in given)]
    kind = used[0] if used else "until"
    ends = [getattr(stage, kind) for stage in given]
    if len(used) > 1:
        alone = (n for n, one in enumerate(given) if one.until is None and one.until_tokens)
        for other in islice(alone, 1):  # else each of them has both, which `stages` reports
            yield (
                (f"{above}.{other}.until_tokens", above),
                "other stages end at a step (until); give the end of all stages in steps, or of all"
                " in tokens",
            )
        return
    for number, end in enumerate(ends[:-1]):
        if end is None:
            yield (
                (f"{above}.{number}.{kind}", above),
                "missing: only the last stage may leave it out; give the last step of this stage",
            )
            return
    for number, (end, later) in enumerate(pairwise(ends), 1):
        if later is not None and later <= end:
            yield (
                (f"{above}.{number}.{kind}", above),
                f"given {later}, must be above {end}, the end of the stage before",
            )
    steps = config.training.train_iters
    if given and given[-1].until is not None and given[-1].until < steps:
        yield (
            (f"{above}.{len(given) - 1}.until", above, "training.train_iters"),
            f"given {given[-1].until}, but training.train_iters is {steps}; leave it out, so that"
            " the last stage lasts until the end, or add a stage",
        )
