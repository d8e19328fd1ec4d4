"""Mistakes in `data.sources` and `data.stages`, as test_checks.py has the others."""

MIXTURE = [
    "training.train_iters=10",
    "data.format=mixture",
    "data.sources={code: c.json, prose: {path: p.json}}",
]
SIZES = ["batch.batch_size=8", "batch.sequence_length=128"]
FIRST = "{until: 4, weights: {code: 1}}"
BROKEN: list[tuple[list[str], str]] = [
    (
        [*MIXTURE, "data.path=x"],
        "data.path: format: mixture reads data.sources instead; leave it out",
    ),
    (
        ["training.train_iters=10", "data.path=x", "data.sources={code: c.json}"],
        "data.sources: format: list does not read it; set format: mixture, or leave it out",
    ),
    (
        ["training.train_iters=10", "data.format=random", "data.stages=[{until: 10}]"],
        "data.stages: format: random does not read it; set format: mixture, or leave it out",
    ),
    (
        ["training.train_iters=10", "data.format=mixture"],
        "data.sources: missing: format: mixture needs it; give each dataset a name, e.g. {code:"
        " code/dataset.json, prose: prose/dataset.json}",
    ),
    (
        [*MIXTURE, "data.sources={code: c.json, prose: c.json}"],
        "data.sources.prose: given c.json, which is data.sources.code already; name it once",
    ),
    (
        [*MIXTURE, "data.sources={code: c.json, prose: {path: p.json, weight: 2}, web: w.json}"],
        "data.sources.code.weight: missing: other sources have a weight; give one to code, web, or"
        " to none",
    ),
    (
        [*MIXTURE, "data.stages=[{weights: {cod: 1}}]"],
        "data.stages.0.weights.cod: no source of this name; did you mean code? (data.sources has"
        " code, prose)",
    ),
    (
        [*MIXTURE, "data.stages=[{weights: {code: 0, prose: 0}}]"],
        "data.stages.0.weights: each is 0; give at least one source a share",
    ),
    (
        [*MIXTURE, "data.stages=[{until: 10, until_tokens: 100}]"],
        "data.stages.0.until_tokens: given 100, but until 10 is given too; keep one",
    ),
    (
        [*MIXTURE, f"data.stages=[{FIRST}, {{until_tokens: 100}}, {{}}]"],
        "data.stages.1.until_tokens: other stages end at a step (until); give the end of all stages"
        " in steps, or of all in tokens",
    ),
    (
        [*MIXTURE, "data.stages=[{weights: {code: 1}}, {until: 10}]"],
        "data.stages.0.until: missing: only the last stage may leave it out; give the last step of"
        " this stage",
    ),
    (
        [*MIXTURE, "data.stages=[{until_tokens: 7}, {until_tokens: 7}]"],
        "data.stages.1.until_tokens: given 7, must be above 7, the end of the stage before",
    ),
    (
        [*MIXTURE, f"data.stages=[{FIRST}, {{until: 9}}]"],
        "data.stages.1.until: given 9, but training.train_iters is 10; leave it out, so that the"
        " last stage lasts until the end, or add a stage",
    ),
    (
        [*MIXTURE, "data.stages=[{sequence_length: 24}]"],
        "batch.batch_size: missing: data.stages.0.sequence_length keeps the tokens of a step, so it"
        " needs their number",
    ),
    (
        [*MIXTURE, *SIZES, f"data.stages=[{FIRST}, {{sequence_length: 300}}]"],
        "data.stages.1.sequence_length: given 300, must divide the 1,024 tokens of a step"
        " (batch_size 8 × sequence_length 128), which stay the same, e.g. 256 or 512",
    ),
    (
        [*MIXTURE, *SIZES, "data.stages=[{rotary: {type: yarn, beta_fast: 1}}]"],
        "data.stages.0.rotary.beta_fast: given 1.0, must be above beta_slow 1.0",
    ),
    (
        [*MIXTURE, *SIZES, "data.stages=[{rotary: {partial_rotary_factor: 0.001}}]"],
        "data.stages.0.rotary.partial_rotary_factor: given 0.001, which rotates 0 dimensions of a"
        " head of 128; they must be even and above 0",
    ),
]
MET = [
    [*MIXTURE, *SIZES, f"data.stages=[{FIRST}, {{sequence_length: 512, rotary: {{theta: 1e6}}}}]"],
    [*MIXTURE, *SIZES, "data.stages=[{sequence_length: 64}]"],
    MIXTURE,
    [*MIXTURE, f"data.stages=[{FIRST}, {{until: 10}}]"],
    [*MIXTURE, f"data.stages=[{FIRST}, {{until: 99, weights: {{prose: 1}}}}]"],
    [*MIXTURE, f"data.stages=[{FIRST}, {{}}]"],
    [*MIXTURE, "data.stages=[{until_tokens: 7}, {until_tokens: 8}]"],
    [*MIXTURE, "data.sources={code: {path: c.json, weight: 2}, prose: {path: p, weight: 0.5}}"],
]
# Processes, and the problem: what stages make of the batch must fit the layout, too.
LAYOUTS: list[tuple[list[str], int, str]] = [
    (
        [*MIXTURE, *SIZES, f"data.stages=[{FIRST}, {{sequence_length: 1024}}]"],
        2,
        "data.stages.1.sequence_length: given 1024, which makes batch_size 1, but batch.batch_size:"
        " batch_size 1 / micro_batch_size 1 = 1 micro-batch for 2 processes: 1 would have nothing"
        " to do; raise it, lower micro_batch_size or start fewer",
    ),
    (
        [
            *MIXTURE,
            *SIZES,
            f"data.stages=[{FIRST}, {{sequence_length: 2}}]",
            "model.distributed.sequence_data_parallel=2",
        ],
        2,
        "data.stages.1.sequence_length: given 2, must be a multiple of 2 × sequence_data_parallel 2"
        " = 4: each process holds a chunk from the front and one from the back",
    ),
]
