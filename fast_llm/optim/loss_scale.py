"""The factor that lifts fp16 gradients out of the range where they would round to zero.

bf16 and fp32 need none (a factor of 1). fp16's halves when gradients overflow and doubles after
`window` clean updates (Micikevicius et al. 2018, "Mixed precision training"). It is host arithmetic on a
number that all processes know already, so they agree without talking.
"""

from typing import Any

from fast_llm.config.train import GradientScalerConfig


class LossScale:
    """The present factor, and how it moves."""

    def __init__(self, config: GradientScalerConfig, dtype: str):
        self.config = config
        self.dynamic = config.constant is None and dtype == "fp16"
        self.value = config.constant or (config.initial if self.dynamic else 1.0)
        self.clean_updates = 0
        self.failures_left = config.hysteresis

    @property
    def exhausted(self) -> bool:
        """A non-finite gradient can not be cured by a smaller factor."""
        return not self.dynamic or self.value <= self.config.minimum

    def update(self, finite: bool) -> None:
        """Take note of one step's gradients."""
        if not self.dynamic:
            return
        if not finite:
            self.clean_updates = 0
            self.failures_left -= 1
            if self.failures_left <= 0:
                self.value = max(self.value * 0.5, self.config.minimum)
            return
        self.clean_updates += 1
        if self.clean_updates == self.config.window:
            self.clean_updates = 0
            self.failures_left = self.config.hysteresis
            self.value *= 2

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "value": self.value,
            "clean_updates": self.clean_updates,
            "failures_left": self.failures_left,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; a constant factor stays what the configuration says."""
        if self.dynamic:
            self.value = state["value"]
            self.clean_updates = state["clean_updates"]
            self.failures_left = state["failures_left"]
