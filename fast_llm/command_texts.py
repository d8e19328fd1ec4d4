"""The help of the command line: groups of commands, descriptions and examples."""

GROUPS = {
    "train": {
        "train": "train a model; the same command resumes a run",
        "plan": "predict memory, speed and the fastest layout",
        "convert": "checkpoint to Hugging Face model, or back",
        "merge": "average models, or add their differences to a base",
        "upcycle": "make a mixture of experts of a dense model",
    },
    "data": {
        "prepare": "tokenize documents into token files",
        "extend-vocabulary": "add tokens to a model and its tokenizer",
    },
    "inspect": {
        "evaluate": "score models on tasks of lm-eval, beside each other",
        "report": "write a page about a run, or several side by side",
        "inspect": "show what data holds, down to the sequences of a step",
        "verify": "compare files with their digests",
        "why": "show the documents of a training step",
    },
    "learn": {
        "demo": "see everything once, on this machine",
        "models": "list model families, and what each supports",
        "settings": "explain a setting: default, allowed values, meaning",
        "completion": "print the completion script of a shell",
    },
}

_SETTINGS = """\
Settings come from the YAML file or the command line, as section.setting=value.
The command line wins; of a setting given twice the last one wins. Values are
YAML: training.train_iters=1_000 data.split=[9,1,0] run.experiment_dir=null
`fast-llm settings` lists all settings, and docs/settings.md explains them."""

MAIN_EXAMPLES = """\
examples:
  fast-llm demo
  fast-llm prepare gpt_memmap --config prepare.yaml
  fast-llm train gpt --config train.yaml --validate
  fast-llm train gpt --config train.yaml training.train_iters=50
  torchrun --nproc_per_node 8 --no-python fast-llm train gpt --config train.yaml
  fast-llm settings training.checkpoint

The words gpt and gpt_memmap may be left out.
`fast-llm COMMAND --help` explains a command."""

# Command → its description, and what follows the options.
TEXTS = {
    "train": (
        f"""\
Train a model. If run.experiment_dir has a checkpoint, training resumes from the
newest one; if training is complete, nothing is done.

{_SETTINGS}""",
        """\
examples:
  # check everything, print the plan, stop
  fast-llm train gpt --config train.yaml --validate
  # train on this machine's GPU, or its CPU
  fast-llm train gpt --config train.yaml
  fast-llm train gpt --config train.yaml optimizer.learning_rate.base=3e-5
  # on 8 GPUs of this machine
  torchrun --nproc_per_node 8 --no-python fast-llm train gpt --config train.yaml

exit codes:
  0        complete, or stopped by SIGUSR1
  1        training cannot continue
  2        a mistake in the settings, the data or a file
  128 + n  stopped by signal n""",
    ),
    "plan": (
        f"""\
Predict, without a cluster, whether a layout fits, how long a step takes, what
limits it, and which layouts are the fastest (docs/planning.md). Needs the YAML
file and the pretrained model's config.json; no data, weights or GPU.

{_SETTINGS}""",
        """\
examples:
  fast-llm plan --config train.yaml --gpus 8
  fast-llm plan --config train.yaml --gpus 64 --device h200
  fast-llm plan --config train.yaml --gpus 16 batch.sequence_length=131072""",
    ),
    "prepare": (
        f"""\
Tokenize documents into token files. `output_path: data/code` writes data/code/
and data/code.json, which data.path of `train` names. An interrupted run resumes
where it stopped.

{_SETTINGS}""",
        """\
examples:
  fast-llm prepare gpt_memmap --config prepare.yaml
  fast-llm prepare --config prepare.yaml tokenize_workers=32
  fast-llm prepare output_path=data/code dataset.path=code/*.jsonl.gz \\
      dataset.field=content tokenizer.path=Llama-3.1-8B

exit codes:
  0        complete
  1        the disk failed
  2        a mistake in the settings, the data or a file
  128 + n  stopped by signal n""",
    ),
    "convert": (
        f"""\
Convert a training checkpoint to a Hugging Face folder, or a Hugging Face folder
to a checkpoint.

{_SETTINGS}""",
        """\
examples:
  fast-llm convert gpt input.path=RUN/checkpoint/1000 output.path=MODEL
  fast-llm convert gpt input.path=RUN/checkpoint/1000 output.path=MODEL \\
      output.data_type=fp32
  fast-llm convert gpt input.format=llama input.path=MODEL \\
      output.format=distributed output.path=START/checkpoint/0""",
    ),
    "merge": (
        """\
Write a model whose weights are a weighted sum of those of several models.

  without --base   the average: the sum of weight × model / the sum of weights
  with --base      base + the sum of weight × (model - base)

A model is a checkpoint, a Hugging Face folder or a model on the Hub. Settings,
tokenizer and other files are those of the first MODEL.""",
        """\
examples:
  # the average of three branches
  fast-llm merge OUT A/checkpoint/1000 B/checkpoint/1000 C/checkpoint/1000
  # halfway between the base and what was trained
  fast-llm merge OUT RUN/checkpoint/1000 --base Llama-3.1-8B --weights 0.5
  # add what an instruct model of the same base has learned
  fast-llm merge OUT RUN/checkpoint/1000 Llama-3.1-8B-Instruct \\
      --base Llama-3.1-8B""",
    ),
    "upcycle": (
        """\
Write a mixture of experts that computes what a dense model does: its experts
are copies of the MLP, and its routers are random. Train OUT to make the experts
different. Llama and Mistral become Mixtral, Qwen3 becomes Qwen3-MoE.

MODEL is a checkpoint, a Hugging Face folder or a model on the Hub.""",
        """\
examples:
  fast-llm upcycle Mistral-7B-v0.3 OUT --experts 8 --experts-per-token 2""",
    ),
    "inspect": (
        """\
Show what data holds: documents, tokens, lengths, duplicates, epochs, decoded
documents, and packed sequences exactly as a training step reads them. PATH is

  a dataset.json, or the prefix of a token file
  files, a folder or a Hub dataset, as dataset.path of `prepare` names them
  a tokenizer, or a model's folder
  a YAML file of `train` or `prepare`, whose data is shown

Settings win over the file, as for `train`.""",
        """\
examples:
  fast-llm inspect data/code.json
  fast-llm inspect data/code.json --sample 5
  fast-llm inspect train.yaml
  fast-llm inspect train.yaml --step 100
  fast-llm inspect train.yaml --sequence 7 --split validation
  fast-llm inspect texts/ dataset.field=content
  fast-llm inspect Llama-3.1-8B --text 'Hello, world'
  fast-llm inspect data/code.json --json | jq .lengths""",
    ),
    "extend-vocabulary": (
        """\
Add tokens to a Hugging Face model: to its tokenizer, embedding and head. OUT is
a complete folder to prepare data and train with. Rows of old tokens keep their
bytes. Without files, tokens that only the tokenizer has get rows.

A new row is the mean of the rows of the pieces that the token was before
(pieces), the mean of all rows (mean), or 0 (zero).""",
        """\
examples:
  fast-llm extend-vocabulary MODEL OUT --tokens words.txt
  fast-llm extend-vocabulary MODEL OUT --tokens words.txt \\
      --special-tokens special.txt --multiple-of 64
  # rows for a token that was added to the tokenizer alone
  fast-llm extend-vocabulary MODEL OUT --initialisation mean""",
    ),
    "evaluate": (
        """\
Score models on tasks of lm-eval, and print one table with standard errors. A
MODEL is a Hugging Face folder, an export, a checkpoint or a model on the Hub;
give the base first, and differences to it are shown. With --data, the tasks'
texts are looked for in the training data, since a score on examples that were
trained on says little. Needs the packages lm_eval, accelerate and transformers
(the extra `evaluate`).""",
        """\
examples:
  fast-llm evaluate Llama-3.1-8B RUN/export/llama/1000 \\
      --tasks arc_easy hellaswag
  fast-llm evaluate MODEL --tasks my_task --include-path tasks/ --limit 200
  fast-llm evaluate RUN/checkpoint/1000 --tasks mmlu --num-fewshot 5 \\
      --data data/code.json --output scores.json""",
    ),
    "report": (
        """\
Write one HTML page about a run, or about several beside each other: what was
learned and forgotten, curves, speed, where the time went, the plan, and the
settings. It needs no network and no other file. Training writes the same page
to RUN/report.html at each validation.""",
        """\
examples:
  fast-llm report RUN
  fast-llm report RUN OTHER-RUN --output both.html""",
    ),
    "verify": (
        """\
Read checkpoints, exports and datasets completely, and compare them with the
digests that were written with them. An experiment folder stands for everything
in it.""",
        """\
examples:
  fast-llm verify RUN
  fast-llm verify RUN/checkpoint/1000 data/code.json""",
    ),
    "why": (
        """\
Print the documents of each sequence of a training step, and how they begin; for
a loss that looks odd.""",
        """\
examples:
  fast-llm why RUN 1000
  fast-llm why RUN 1000 --json | jq .""",
    ),
    "demo": (
        """\
Make a tokenizer, a corpus of prose and one of code from Python's own files,
pretrain a small Llama on prose and continue on code with the recipe's YAML;
then compare, kill and resume. Takes minutes on two cores, and no network.

With --real, continue SmolLM2-135M on German manual pages, with and without a
replay of English, and show what it learned and forgot. `make demo-real` also
installs the packages for it.""",
        """\
examples:
  fast-llm demo
  fast-llm demo /tmp/demo
  fast-llm demo --real""",
    ),
    "models": (
        """\
List the model families that can be trained: model_type of config.json, layouts,
fp8, export, and the class of transformers that each is compared with
(docs/families.md). TP, SP, CP, PP and EP are tensor, sequence, context,
pipeline and expert parallelism.""",
        """\
examples:
  fast-llm models
  fast-llm models | grep qwen
  fast-llm models --json | jq '.[] | select(.ep).model_type'""",
    ),
    "settings": (
        """\
Print the reference of a section or a setting (docs/settings.md), or a list of
all settings.""",
        """\
examples:
  fast-llm settings
  fast-llm settings training.checkpoint
  fast-llm settings optimizer.learning_rate.base
  fast-llm settings | grep warmup
  # for editors; then the first line of train.yaml is
  # yaml-language-server: $schema=train.schema.json
  fast-llm settings train --schema > train.schema.json""",
    ),
    "completion": (
        """\
Print a script that completes commands, options and settings in a shell. It
knows the settings of this version: print it again after an update.""",
        """\
examples:
  # this session of bash or zsh
  eval "$(fast-llm completion bash)"
  # for good: bash with the package bash-completion; zsh in a folder of $fpath
  fast-llm completion bash > ~/.local/share/bash-completion/completions/fast-llm
  fast-llm completion zsh > ~/.zfunc/_fast-llm
  fast-llm completion fish > ~/.config/fish/completions/fast-llm.fish""",
    ),
}
