"""Spikes of loss or gradient norm: detect them, and apply `training.spikes.policy`.

With m the median of the last `window` steps' values y, a step's value is a spike above

    m + threshold · max(1.4826 · median |y - m|, 0.01 · |m|)

The factor 1.4826 makes the median absolute deviation of a normal distribution its standard
deviation. A deviation below a hundredth of the median counts as that. Spikes enter the window like
all finite values: medians ignore outliers, and a lasting change is accepted after half a window. No
step is a spike before the window is full.

The update of a spike is skipped. The policy then continues (`skip`), returns to a checkpoint and
skips the data since (`rewind`), or ends the run (`stop`). All processes see the same sums, so all
decide alike. A checkpoint holds the window, so a resumed run makes the same decisions as an
uninterrupted one.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from fast_llm.config.train import SpikesConfig
from fast_llm.errors import TrainingStopped

logger = logging.getLogger("fast_llm")


class SpikeDetector:
    """Compares each step's loss and gradient norm with those of the steps before."""

    def __init__(self, config: SpikesConfig):
        self.config = config
        self.window = {
            name: deque[float](maxlen=config.window) for name in ("loss", "gradient norm")
        }

    def detect(self, loss: float, norm: float) -> str:
        """Describe the spike of a step, or return "". Adds the two finite numbers to the window."""
        if self.config.policy == "none":
            return ""
        found = []
        for (name, values), value in zip(self.window.items(), (loss, norm), strict=True):
            if len(values) == self.config.window:
                middle = median(values)
                deviation = max(
                    1.4826 * median(abs(y - middle) for y in values), 0.01 * abs(middle)
                )
                if value > middle + self.config.threshold * deviation:
                    found.append(
                        f"{name} {value:.4g} is above {middle:.4g}"
                        f" + {self.config.threshold:g} × {deviation:.2g}"
                    )
            values.append(value)
        return ", ".join(found)

    def state_dict(self) -> dict[str, Any]:
        """The window, for a checkpoint."""
        return {name: list(values) for name, values in self.window.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the window from a checkpoint."""
        for name, values in self.window.items():
            values.clear()
            values.extend(state.get(name, ()))


def handle_spike(
    config: SpikesConfig, step: int, spike: str, rewinds: int, newest: Callable[[], Path | None]
) -> Path | None:
    """Apply the policy to a step whose update was skipped.

    Returns the checkpoint to rewind to, or None with `skip` and if there is no checkpoint. Two
    spikes may return to the same checkpoint; the data up to the later spike is then skipped.

    `spike`: as detected; `rewinds`: of this run so far; `newest`: finds the newest checkpoint.
    Raises TrainingStopped if the policy is `stop`, or after `max_rewinds`.
    """
    text = f"Step {step} is a spike: {spike} (median and deviations of {config.window} steps)"
    if config.policy == "stop":
        raise TrainingStopped(
            f"{text}. Its update was not applied. Look at the step's data with `fast-llm why`,"
            " lower optimizer.learning_rate.base, or choose another training.spikes.policy.",
            resumable=True,
        )
    if config.policy == "rewind":
        path = newest()
        if path is not None and rewinds >= config.max_rewinds:
            raise TrainingStopped(
                f"{text}. The run was rewound {rewinds} times already"
                " (training.spikes.max_rewinds). Look at the data of these steps with `fast-llm"
                " why`, or lower optimizer.learning_rate.base.",
                resumable=True,
            )
        if path is not None:
            logger.warning(
                f"{text}: rewinding to checkpoint {path.name}; training continues with the data"
                " after the spike."
            )
            return path
        text += "; there is no checkpoint to rewind to"
    logger.warning(f"{text}: its update was skipped.")
    return None
