"""The process that sends records to Weights & Biases. It reads and writes lines of JSON.

It is separate so that nothing in Weights & Biases ends or delays training: a prompt for a login,
retries without a network, a crash of its service, output on the terminal, hooks at exit.

Input: the arguments of `wandb.init`, then {"log": {…}}, {"alert": {…}}, {"text": "a line of the
log"} and {"finish": exit code}. Output: {"level": "info" or "warning", "text": …} and {"folder":
where the run is recorded}.
"""

import json
import sys
from typing import Any

PHASES = ("Training", "Validation", "Test")


def say(**message: Any) -> None:
    """Send a message to the training process."""
    print(json.dumps(message), file=sys.__stdout__, flush=True)


def begin(arguments: dict[str, Any]) -> Any:
    """Start the run, online if possible, else offline."""
    import wandb

    parent = arguments.pop("process")

    def init(**more: Any) -> Any:
        # Charts of memory and processor time are those of the training process.
        settings = wandb.Settings(silent=True, console="off", x_stats_pid=parent, **more)
        return wandb.init(**arguments, settings=settings)

    try:
        run, problem = init(), ""
    except Exception as error:
        problem = first_line(error)
        if "api_key" in problem or "API key" in problem:
            problem = (
                "there is no login on this machine (`wandb login`, or WANDB_API_KEY in the"
                " environment)"
            )
        wandb.teardown()  # otherwise its service keeps the failed run
        run = init(mode="offline")
    # Steps repeat when a run rewinds, which W&B's own step counter does not allow.
    run.define_metric("iteration")
    for phase in PHASES:
        run.define_metric(f"{phase}.*", step_metric="iteration")
    folder = str(run.settings.sync_dir)
    say(folder=folder)
    if problem:
        say(
            level="warning",
            text=f"Weights & Biases: {problem}. The run is recorded offline; upload it with"
            f" `wandb sync {folder}`.",
        )
    elif run.disabled:
        say(level="info", text="Weights & Biases is switched off by WANDB_MODE.")
    elif run.offline:
        say(
            level="info",
            text=f"Weights & Biases records offline; upload the run with `wandb sync {folder}`.",
        )
    else:
        say(level="info", text=f"Weights & Biases: {run.url}")
    return run


def main() -> None:
    """Run until the training process sends `finish`, or ends."""
    lines = iter(sys.stdin.readline, "")
    run = begin(json.loads(next(lines)))
    for line in lines:
        message = json.loads(line)
        if "log" in message:
            run.log(message["log"])
        elif "alert" in message:
            run.alert(**message["alert"], level="INFO")
        elif "text" in message:
            run.write_logs(message["text"])
        else:
            run.finish(exit_code=message["finish"])
            return
    run.finish(exit_code=1)  # the training process was killed


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        say(
            level="warning",
            text=f"Weights & Biases records nothing from here on: {first_line(error)}. Training"
            " continues; metrics.jsonl has everything.",
        )
        raise
