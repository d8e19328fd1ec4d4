"""The model in memory behind lm-eval's interface: texts to tokens, exactly as lm-eval's `hf` model.

Imported only where lm-eval is installed.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fast_llm.evaluation.tasks import GENERATES
from fast_llm.training.scoring import Request


class TaskModel(TemplateLM):  # type: ignore[misc]
    """Computes log-likelihoods through `score`."""

    def __init__(
        self,
        tokenizer: Any,
        length: int,
        score: Callable[[Sequence[Request]], list[tuple[float, bool]]],
    ):
        """`tokenizer`: of transformers. `length`: the most tokens that the model reads."""
        super().__init__()
        self.tokenizer, self.max_length, self.score = tokenizer, length, score
        self.cut = 0  # texts that were cut from the left

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text. A text that begins with BOS gets no second one."""
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **given)
        return ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        made = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, and a sequence of training"
                    f" {self.max_length} (batch.sequence_length)"
                )
            tokens = [*context, *continuation]
            self.cut += len(tokens) > self.max_length + 1
            made.append(Request(tokens[-(self.max_length + 1) :], len(continuation)))
        return self.score(made)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text: of windows that predict each token once."""
        windows, counts = [], []
        for (text,) in [request.args for request in requests]:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += own
            counts.append(len(own))
        found = iter(self._loglikelihood_tokens(windows))
        return [sum(next(found)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Not possible on the weights in memory."""
        raise ValueError(
            f"tasks with output_type {GENERATES} generate text; `fast-llm evaluate` runs them"
        )
