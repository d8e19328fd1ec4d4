"""Settings of Fast-LLM 0.2: renamed, refused (with what to use instead), and different in meaning.

docs/settings.md lists all of it.
"""

_BASE, _TRANSFORMER = "model.base_model", "model.base_model.transformer"

# Older name → name.
RENAMED = {
    "pretrained.load_weights": "pretrained.model_weights",
    "pretrained.load_optimizer": "pretrained.optimizer_state",
    "training.export.load_weights": "training.export.model_weights",
    "training.export.load_optimizer": "training.export.optimizer_state",
    f"{_TRANSFORMER}.normalization.normalization_type": f"{_TRANSFORMER}.normalization.type",
    f"{_TRANSFORMER}.normalization.layer_norm_eps": f"{_TRANSFORMER}.normalization.epsilon",
    f"{_TRANSFORMER}.normalization.zero_centered_normalization": (
        f"{_TRANSFORMER}.normalization.zero_centered"
    ),
    "model.distributed.distributed_timeout": "model.distributed.timeout",
    f"{_BASE}.logit_z_loss": f"{_BASE}.z_loss_coefficient",
}


def _all(section: str, names: str, advice: str) -> dict[str, str]:
    return {f"{section}.{name}": advice for name in names.split()}


_DEBUGGING = "a debugging aid of Fast-LLM 0.2; use a debugger, or torch.profiler"

# Refused setting of `train` → what to do instead. The advice of a section also serves settings in
# it that have none.
REFUSED: dict[str, str] = {
    "batch.num_micro_sequences": "sequences are not split into parts; leave it out",
    "data.datasets": "describe the data with data.format and data.path (and data.validation_sets)",
    "data.sampling": "model.distributed.seed decides the order of the data; leave it out",
    "data.multiprocessing_context": "threads prepare batches (training.num_workers); leave it out",
    "data.tokenizer.format": "tokenizers are read from tokenizer.json; leave it out",
    "optimizer.learning_rate.schedule": "list its pieces under optimizer.learning_rate.stages, or"
    " use decay_style",
    "pretrained.timeout": "use training.timeout, which applies to reading of weights",
    f"{_BASE}.use_position_embeddings": "positions are rotary (transformer.rotary); leave it out",
    f"{_BASE}.use_absolute_position_embeddings": "positions are rotary (transformer.rotary); leave"
    " it out",
    f"{_BASE}.parallel_embeddings": "model.multi_stage.zero_stage and tensor_parallel shard"
    " embeddings; leave it out",
    f"{_BASE}.sequence_first": "the batch is the first dimension of activations; leave it out",
    f"{_BASE}.logits_scale_factor": "set logits_divisor to 1 / logits_scale_factor",
    f"{_BASE}.use_megatron_initialization": "init_method_std decides random weights; leave it out",
    **_all(
        _BASE,
        "prediction_heads prediction_loss_coefficient",
        "models predict one token; leave it out",
    ),
    **_all(
        _TRANSFORMER,
        "num_shared_experts moe_jitter_eps",
        "experts are routed without shared ones and without noise; leave it out",
    ),
    **_all(
        _TRANSFORMER,
        "expert_routing_type dropless_moe dropless_dynamic_shape",
        "each token has the experts with the largest probabilities, and none is dropped; leave it"
        " out",
    ),
    **_all(
        _TRANSFORMER,
        "router_lr_scale",
        'use optimizer.learning_rate_scales: [<scale>, "*.mlp.gate.weight"]',
    ),
    **_all(
        _TRANSFORMER,
        "mlp_lr_scale attention_lr_scale",
        'use optimizer.learning_rate_scales: [<scale>, "*.mlp.*", <scale>, "*.self_attn.*"]',
    ),
    f"{_TRANSFORMER}.attention_softmax_scale_power": "set softmax_scale to"
    " kv_channels^-attention_softmax_scale_power",
    f"{_TRANSFORMER}.max_window_layers": "name the attention of each layer with layer_types",
    **_all(
        _TRANSFORMER,
        "attention_dropout hidden_dropout",
        "models are trained without dropout; use optimizer.weight_decay",
    ),
    f"{_TRANSFORMER}.full_precision_residual": "the residual stream has"
    " model.distributed.training_dtype; fp32 is more precise",
    f"{_TRANSFORMER}.use_rotary_embeddings": "rotary positions are chosen by"
    " transformer.rotary.type; leave it out",
    f"{_TRANSFORMER}.rotary_embedding_scale": "set transformer.rotary.theta to"
    " exp(-rotary_embedding_scale)",
    f"{_TRANSFORMER}.triton_rotary": "rotary embedding runs in PyTorch; leave it out",
    **_all(_TRANSFORMER, "debug_transformer debug_transformer_memory random_bias_init", _DEBUGGING),
    **_all(
        f"{_TRANSFORMER}.normalization",
        "initialization_range layer_norm_init_range",
        "the weights of norms start at 1, or at 0 if zero_centered; leave it out",
    ),
    **_all(
        f"{_TRANSFORMER}.normalization",
        "implementation normalization_implementation",
        "the fastest available kernel is used; leave it out",
    ),
    f"{_TRANSFORMER}.rotary.triton": "the layout is Hugging Face's half-split one; leave it out",
    **_all(
        "model.multi_stage",
        "num_grad_buffers num_weight_buffers pipeline_delay",
        "FSDP2 manages its buffers; choose zero_stage",
    ),
    "model.multi_stage.stages_per_pipeline_stage": "layers_per_stage decides the number of stages;"
    " leave it out",
    "model.multi_stage.full_precision_gradients": "gradients are always reduced and summed in"
    " fp32; leave it out",
    **_all(
        "model.multi_stage",
        "debug_layer_outputs debug_layer_gradients debug_param_init debug_param_gradients"
        " debug_all_param_gradients debug_param_update debug_global_tensors"
        " debug_activation_memory debug_tensor_parallel",
        _DEBUGGING,
    ),
    **_all(
        "model.distributed",
        "world_size rank local_world_size",
        "torchrun sets them; start with `torchrun --nproc_per_node N --no-python fast-llm …`",
    ),
    "model.distributed.pipeline_first": "the order of ranks is fixed: tensor, context, data,"
    " pipeline; leave it out",
    **_all(
        "model.distributed",
        "dp_seed_shift pp_seed_shift pp_gen_init_seed_shift tp_seed_shift tp_gen_init_seed_shift"
        " sample_seed_shift train_seed_shift valid_seed_shift test_seed_shift pp_gen_seed_shift"
        " tp_gen_seed_shift",
        "model.distributed.seed decides everything random; leave it out",
    ),
    "run.structured_logs": "logs are always written to runs/<k>/logs and metrics to metrics.jsonl;"
    " leave it out",
    "run.enable_all_loggers": "the log holds only this project's messages; leave it out",
    "run.tensor_logs": "tensors are not logged; see metrics.jsonl, or use a debugger",
    "run.triton_linear_kernels": "PyTorch computes matrix multiplications; leave it out",
    "schedule": "PyTorch schedules the work of a step; leave the section out",
    "schedule.pipeline_overlap": "pipeline stages send while they compute; choose"
    " model.multi_stage.pipeline_schedule",
    "schedule.data_overlap": "PyTorch overlaps communication and computation; leave it out",
    "schedule.data_batch_warn_time_ms": "use data.data_sample_warn_time_ms",
    **_all(
        "schedule",
        "throttle_cpu throttle_cpu_rate throttle_cpu_delay",
        "the CPU always runs ahead of the device; leave it out",
    ),
    **_all("schedule", "debug_schedule debug_send_recv", _DEBUGGING),
    "schedule.profile_schedule": "set training.profiling.interval, and see the traces",
    "schedule.estimate_critical_batch": "Fast-LLM 0.2 does not implement it either; leave it out",
    "schedule.skip_step": "to measure the loss without updates, set training.train_iters: 0 and"
    " training.validation",
    "profiling": "use training.profiling, which profiles one step every"
    " training.profiling.interval steps",
    **_all(
        "profiling",
        "cpu cuda",
        "set training.profiling.interval: it profiles the CPU, and the GPU if there is one",
    ),
    "profiling.skip": "use training.profiling.offset, the first step that is profiled",
    **_all(
        "profiling",
        "wait warmup cycles",
        "use training.profiling.interval and offset, which say which steps are profiled",
    ),
    "profiling.ranks": "use training.profiling.ranks",
    **_all(
        "profiling",
        "averages trace table_width log export",
        "set training.profiling.interval: it writes a table and a trace to profile/ in"
        " run.experiment_dir",
    ),
}

# Refused values: value → what to do instead. A few more are at their settings.
_OTHER_MODELS = {
    "starcoder2": "it has LayerNorm and an MLP without gate",
}
EXPORT_FORMATS = {
    "distributed": "training.checkpoint writes checkpoints; exports are Hugging Face folders: auto",
    "fast_llm": "training.checkpoint writes checkpoints; exports are Hugging Face folders: auto",
    **_OTHER_MODELS,
}
PRETRAINED_FORMATS = {
    "fast_llm": "convert it to a Hugging Face folder with Fast-LLM 0.2, and use auto",
    **_OTHER_MODELS,
}
LOAD_CONFIGS = {
    "none": "the shape of the model always comes from its configuration",
    "model": "settings other than the shape of the model come from this file only",
    "fast_llm": "settings other than the shape of the model come from this file only",
}

# The same for `prepare`.
PREPARE_REFUSED: dict[str, str] = {
    "saving_workers": "token files are written while tokenizing; set tokenize_workers",
    "splits": "split when training, with data.split",
    "distributed.backend": "nodes share only the output folder; leave it out",
}

# The same for `convert`.
CONVERT_REFUSED: dict[str, str] = {
    "use_cpu": "conversion always runs on the CPU; leave it out",
    "layers_per_step": "all weights are converted at once, which takes 4 bytes of memory a"
    " parameter; leave it out",
    "input.model_weights": "weights are always converted; leave it out",
    "input.optimizer_state": "optimizer state is not converted; copy the checkpoint's folder to"
    " keep it",
    "input.load_config": "the shape of the model comes from its configuration; leave it out",
    "output.model_weights": "weights are always converted; leave it out",
    "output.optimizer_state": "optimizer state is not converted; copy the checkpoint's folder to"
    " keep it",
}

# Setting of `train` → what it does in Fast-LLM 0.2, and what it does here.
DIFFERENT: dict[str, tuple[str, str]] = {
    "training.num_workers": (
        "processes",
        "Threads: reading tokens does not hold Python's lock, and nothing has to be copied.",
    ),
    "training.timeout": (
        "60 seconds, model.distributed.timeout",
        "Saving or exporting a large model takes minutes, so waiting for it is not an error.",
    ),
    "training.validation.interval": (
        "different sequences at every validation, none at step 0",
        "The same sequences each time, so that losses can be compared; step 0 is the baseline.",
    ),
    "training.checkpoint.keep_every": (
        "with interval 1000 and keep_every 10: 9000, 19000, …",
        "Multiples of keep_every × interval: 10000, 20000, …",
    ),
    "training.export.keep_every": (
        "with interval 1000 and keep_every 10: 9000, 19000, …",
        "Multiples of keep_every × interval: 10000, 20000, …",
    ),
    "training.export.format": (
        "fast_llm",
        "Exports are for other programs; checkpoints hold the training state.",
    ),
    "training.export.data_type": (
        "null means fp32, which is 32 GB for 8 billion parameters",
        "The dtype of training, which the original model has too.",
    ),
    "training.wandb": (
        "off, without a message, while entity_name is null",
        "On as soon as one of its settings is given; null means your default entity.",
    ),
    "batch.breadth_first_micro_batches": (
        "any number",
        "1 without pipeline parallelism, where the order changes only memory.",
    ),
    "batch.cross_document_attention": (
        "yes",
        "Llama 3.1 was pretrained with separate documents; yes behaves like 0.2.",
    ),
    "data.use_loss_masking_spans": (
        "no",
        "Data that was prepared with masks is trained with them.",
    ),
    "data.split": ("exactly three numbers", "A share that is left out is 0."),
    "optimizer.beta_1": ("1 is allowed", "With 1 the model does not learn."),
    "optimizer.beta_2": ("1 is allowed", "With 1 the model does not learn."),
    "optimizer.gradient_norm_clipping": ("cannot be turned off", "null turns it off."),
    "optimizer.learning_rate.decay_style": (
        "any word; a wrong one fails after the model was created",
        "Checked first, like all settings.",
    ),
    "optimizer.gradient_scaler.constant": (
        "0 is allowed",
        "With a factor of 0 the model does not learn.",
    ),
    "pretrained.path": (
        "replaces the shape given in the file, without a message",
        "A contradiction is an error; leave the shape out.",
    ),
    "pretrained.format": ("fast_llm", "Models to start from are Hugging Face folders."),
    "model.base_model.cross_entropy_impl": (
        "triton, which fails for vocabularies above 65536",
        "auto always works; triton and fused support any vocabulary.",
    ),
    "model.base_model.transformer.gated": (
        "no",
        "All families but Apertus have a gate.",
    ),
    "model.base_model.transformer.activation_type": (
        "gelu; silu if gated",
        "All families but Gemma and Apertus use silu.",
    ),
    "model.base_model.transformer.add_linear_biases": ("yes", "Most families have no biases."),
    "model.base_model.transformer.normalization.type": ("layer_norm", "All families use rms_norm."),
    "model.base_model.transformer.rotary.type": ("none", "All families have rotary positions."),
    "model.base_model.transformer.use_flash_attention": (
        "has no effect in fp32",
        "PyTorch has such kernels for every dtype.",
    ),
    "model.distributed.seed": (
        "train_iters also changes the order of the data",
        "The order depends on the seed only, so that training longer continues the same order.",
    ),
    "model.distributed.reproducible_init": (
        "no: random weights depend on the number of GPUs",
        "They never depend on the number of processes.",
    ),
}
