"""The most checkpoints at a time, compared with really saving and deleting them."""

import shutil
from pathlib import Path

from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.config.saving import CheckpointConfig
from fast_llm.planning.disk import additional_folders

SAVED = st.builds(
    CheckpointConfig,
    interval=st.integers(1, 4),
    offset=st.integers(0, 5),
    keep_every=st.none() | st.integers(1, 3),
)


@hypothesis_settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)
@given(
    SAVED, st.none() | st.integers(1, 3), st.integers(0, 20), st.integers(0, 20), st.integers(1, 8)
)
def test_how_many_more_there_will_be(
    tmp_path: Path,
    saved: CheckpointConfig,
    keep: int | None,
    done: int,
    further: int,
    kept_before: int,
) -> None:
    """As many as saving and deleting have at the fullest moment."""
    saved = saved.model_copy(update={"keep": keep})
    root = tmp_path / "checkpoint"
    shutil.rmtree(root, ignore_errors=True)

    def save(step: int) -> None:
        checkpoints.publish(
            checkpoints.begin(root / str(step)), root / str(step), "checkpoint", step, {}, {}
        )

    last = done + further
    for step in range(1, done + 1):
        if saved.due(step) or step == done:
            save(step)
            checkpoints.prune(root, kept_before, saved.is_permanent)
    before = fullest = len(checkpoints.find(root))
    expected = additional_folders(saved, root, done, last)
    for step in range(done + 1, last + 1):
        if saved.due(step) or step == last:
            save(step)
            fullest = max(fullest, len(checkpoints.find(root)))
            checkpoints.prune(root, keep, saved.is_permanent)
    if further:
        # The newest may be permanent when the one before it is deleted: one fewer at once.
        assert expected - (saved.keep_every is not None) <= fullest - before <= expected
    else:
        assert expected == (0 if done else 1)
