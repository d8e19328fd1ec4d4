"""Settings of Fast-LLM 0.2: each is known, renamed, or refused with what to use instead."""

import re
from typing import Any

import pytest

from fast_llm.config.compat import REFUSED, RENAMED
from fast_llm.config.mistakes import refused_values
from tests.config.common import FIELDS, leaves, load, wrong

_SAVED = "interval offset keep keep_every callback.script callback.environment"
_EXPORT = (
    f"{_SAVED} format model_weights optimizer_state parameters_per_file data_type load_weights"
    " load_optimizer"
)
_INIT = " ".join(
    f"init_method_{kind}{part}"
    for kind in ("std", "min", "max")
    for part in ("", "_qkv", "_attn_proj", "_mlp_1", "_mlp_2")
)
_DEBUG = (
    "layer_outputs layer_gradients param_init param_gradients all_param_gradients param_update"
    " global_tensors"
)
_SHIFTS = (
    "dp_seed_shift pp_seed_shift pp_gen_init_seed_shift tp_seed_shift tp_gen_init_seed_shift"
    " sample_seed_shift"
    " train_seed_shift valid_seed_shift test_seed_shift pp_gen_seed_shift tp_gen_seed_shift"
)
OLD: dict[str, str] = {
    "training": "train_iters test_iters num_workers prefetch_factor timeout",
    "training.logs": "interval offset",
    "training.validation": "interval offset iterations",
    "training.checkpoint": _SAVED,
    "training.export": _EXPORT,
    "training.shutdown": "interval offset",
    "training.wandb": "entity_name project_name group_name alert.interval alert.offset"
    " alert.status_updates",
    "batch": "micro_batch_size batch_size depth_first_micro_batches breadth_first_micro_batches"
    " sequential_micro_batches sequence_length micro_sequence_length num_micro_sequences",
    "data": "format path split tokenizer.path tokenizer.format data_sample_warn_time_ms"
    " multiprocessing_context"
    " datasets sampling use_loss_masking_spans",
    "data.sampling": "seed gpu shuffle use_loss_masking_spans",
    "data.fim": "rate max_middle_len split_sample fragment_rate ignore_prefix spm_rate"
    " truncate_or_pad"
    " prefix_token middle_token pad_token suffix_token",
    "optimizer": "weight_decay beta_1 beta_2 epsilon gradient_norm_clipping"
    " default_learning_rate_scale",
    "optimizer.learning_rate": "base minimum decay_style decay_iterations decay_power"
    " warmup_iterations schedule",
    "optimizer.gradient_scaler": "constant initial minimum window hysteresis",
    "pretrained": "path format model_weights optimizer_state load_config timeout load_weights"
    " load_optimizer",
    "model.base_model": "vocab_size max_position_embeddings use_position_embeddings"
    " tie_word_embeddings"
    " cross_entropy_impl cross_entropy_splits parallel_embeddings sequence_first logit_z_loss"
    " logits_scale_factor"
    " init_method_std_embed init_method_max_embed init_method_min_embed"
    " use_megatron_initialization",
    "model.base_model.transformer": "num_layers hidden_size num_attention_heads head_groups"
    " kv_channels"
    " ffn_hidden_size gated activation_type add_linear_biases num_experts num_shared_experts"
    " num_experts_per_token"
    " expert_routing_type expert_auxiliary_loss_coefficient expert_z_loss_coefficient"
    " moe_jitter_eps mlp_lr_scale"
    " router_lr_scale attention_lr_scale attention_softmax_scale_power dropless_moe"
    " dropless_dynamic_shape"
    " use_flash_attention window_size max_window_layers mlp_recompute_level"
    " full_precision_residual attention_dropout"
    " hidden_dropout debug_transformer debug_transformer_memory random_bias_init"
    " use_rotary_embeddings"
    f" rotary_embedding_scale triton_rotary {_INIT}",
    "model.base_model.transformer.normalization": "type epsilon zero_centered implementation"
    " initialization_range"
    " normalization_type layer_norm_eps zero_centered_normalization normalization_implementation",
    "model.base_model.transformer.rotary": "type theta scale_factor low_frequency_factor"
    " high_frequency_factor"
    " original_context_length attention_factor beta_fast beta_slow triton",
    "model.distributed": "training_dtype optimization_dtype tensor_parallel pipeline_parallel"
    " sequence_data_parallel"
    " sequence_tensor_parallel world_size rank local_world_size pipeline_first distributed_timeout"
    " timeout seed"
    f" {_SHIFTS} reproducible_init",
    "model.multi_stage": "zero_stage num_grad_buffers num_weight_buffers layers_per_stage"
    " stages_per_pipeline_stage"
    " full_precision_gradients pipeline_delay compile_all debug_activation_memory"
    " debug_tensor_parallel " + " ".join(f"debug_{name}" for name in _DEBUG.split()),
    "run": "experiment_dir experiment_name structured_logs log_timestamps enable_all_loggers"
    " tensor_logs.save"
    " tensor_logs.show tensor_logs.max_elements torch_dynamo_enable enable_triton_kernels"
    " triton_linear_kernels",
    "schedule": "pipeline_overlap data_overlap data_batch_warn_time_ms throttle_cpu"
    " throttle_cpu_rate"
    " throttle_cpu_delay debug_schedule debug_send_recv profile_schedule estimate_critical_batch"
    " skip_step",
    "profiling": "cpu cuda skip wait warmup cycles averages trace table_width ranks log export",
}
NAMES = [f"{section}.{name}" for section, names in OLD.items() for name in names.split()]


def sentence(path: str) -> str | None:
    """The message about a refused setting, or about its section."""
    while path:
        if path in REFUSED:
            return REFUSED[path]
        path = path.rpartition(".")[0]
    return None


def test_no_name_stands_twice() -> None:
    assert len(NAMES) == len(set(NAMES)) > 200


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_fast_llm_is_known(name: str) -> None:
    if name in FIELDS:
        assert name not in REFUSED and name not in RENAMED
    elif name in RENAMED:
        assert RENAMED[name] in FIELDS
    else:
        said = sentence(name)
        assert said is not None, f"{name} would be reported as a typing error"
        assert wrong(f"{name}=1") == [f"{name}: not supported: {said}"]


def test_refusals_are_sentences_and_not_settings() -> None:
    for name, said in REFUSED.items():
        assert name not in FIELDS and name not in RENAMED
        assert len(said.split()) >= 2 and not said.endswith("."), name
    assert {old.rpartition(".")[0] for old in RENAMED} <= FIELDS
    assert set(RENAMED.values()) <= FIELDS


def test_settings_that_refusals_point_to_exist() -> None:
    every = [REFUSED[name] for name in REFUSED] + [
        said for _, field in leaves() for said in refused_values(field).values()
    ]
    for said in every:
        for path in re.findall(
            r"\b(?:training|batch|data|optimizer|pretrained|model|run)\.[a-z_0-9.]+[a-z_0-9]", said
        ):
            assert path in FIELDS, f"{path} in: {said}"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_older_names_do_what_the_new_ones_do(old: str, new: str) -> None:
    values = {"type": "rms_norm", "epsilon": "1e-6", "timeout": "7", "z_loss_coefficient": "1e-4"}
    value = values.get(new.rpartition(".")[2])
    value = value or ("yes" if "weights" in new else "no")
    assert load(f"{old}={value}") == load(f"{new}={value}")
    (problem,) = wrong(f"{old}={value}", f"{new}={value}")
    assert (
        problem
        == f"{old}: an older name of {new}, which is given too (override {new}={value}); keep that"
        " one"
    )


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, field in leaves() if refused_values(field)]
)
def test_single_values_that_are_refused_say_why(path: str, field: Any) -> None:
    for value, said in refused_values(field).items():
        shown = value if value in ("true", "false") else f'"{value}"'
        assert wrong(f"{path}={value}") == [
            f"{path}: given {shown}, which is not supported: {said}"
        ]
