"""Settings that the planner's tests share."""

from fast_llm.config.compat import REFUSED, RENAMED
from fast_llm.config.document import read
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate

LEVEL = "model.base_model.transformer.mlp_recompute_level"

LLAMA = [
    "model.base_model.vocab_size=128256",
    "model.base_model.tie_word_embeddings=no",
    "model.base_model.transformer.num_layers=32",
    "model.base_model.transformer.hidden_size=4096",
    "model.base_model.transformer.num_attention_heads=32",
    "model.base_model.transformer.head_groups=8",
    "model.base_model.transformer.ffn_hidden_size=14336",
    "batch.sequence_length=4096",
    "batch.micro_batch_size=2",
    "batch.batch_size=256",
    "data.format=random",
    "training.train_iters=10",
    "model.distributed.training_dtype=bf16",
    "model.multi_stage.zero_stage=2",
]


def config(settings: list[str]) -> TrainConfig:
    return validate(TrainConfig, read(None, settings), REFUSED, RENAMED)
