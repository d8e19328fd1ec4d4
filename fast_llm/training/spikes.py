"""Steps whose loss or gradient norm stands out from those before: which they are, and which data was passed over for them.

With m the median of the last `window` steps' values y, a step's value is a spike above

    m + threshold · max(1.4826 · median |y - m|, 0.01 · |m|)

where 1.4826 makes the median deviation of a normal distribution its standard deviation, and no deviation counts for less than
a hundredth of the median. Spikes enter the window like all finite values: a median does not heed a few, and a lasting change is
accepted after half a window. Nothing is judged before the window is full.

Every process judges the same sums, so all decide alike; a checkpoint holds the window, so that a run which goes on decides as the
one that was killed.
"""

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from fast_llm.config.train import SpikesConfig


class SpikeDetector:
    """The last steps' numbers, and the judgement of the next."""

    def __init__(self, config: SpikesConfig):
        self.config = config
        self.window = {
            name: deque[float](maxlen=config.window) for name in ("loss", "gradient norm")
        }

    def detect(self, loss: float, norm: float) -> str:
        """What stands out of a step's finite numbers, in words, or nothing; takes note of them."""
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
                        f"{name} {value:.4g} is above {middle:.4g} + {self.config.threshold:g} × {deviation:.2g}"
                    )
            values.append(value)
        return ", ".join(found)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: list(values) for name, values in self.window.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, values in self.window.items():
            values.clear()
            values.extend(state.get(name, ()))
