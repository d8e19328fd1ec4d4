"""`fast-llm prepare` on a Ray cluster of three nodes: workers, nodes and the command are killed.

Several are killed during one preparation. Started again until it is complete, it has the bytes of
one process, file by file, and no other files. A death of workers or nodes does not end the command,
and nothing of a killed command is left running on the cluster.
"""

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.data import synthetic
from tests.data.ray_cluster import MEMORY, cluster, remove_a_node, workers
from tests.faults.damage import everything
from tests.faults.jobs import command, send
from tests.faults.preparation import STUCK, Preparation

VICTIMS = ("worker", "node", "command")
_UNITS = """
from fast_llm.data import units
units._SMALLEST = 100_000
units._UNITS = 10**9
"""


def campaign(folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """`budget`: kills, of each victim in turn."""
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    draw = random.Random(0)
    texts = [synthetic.text(number, draw.randrange(1, 1600)) for number in range(900)]
    rows: list[str | None] = [text if number % 89 else None for number, text in enumerate(texts)]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    model = synthetic.llama(folder / "model")
    settings = [f"dataset.path={source}", f"tokenizer.path={model}", "tokens_per_shard=100000"]
    one = Preparation(folder, [f"output_path={folder}/one/data", *settings])
    assert one.wait() == 0, one.said()
    whole = everything(folder / "one")
    with cluster(3) as nodes:
        while figures["kills"] < budget:
            figures["preparations"] += 1
            where = folder / f"killed {figures['preparations']}"
            story = [f"seed {seed}, preparation {figures['preparations']}"]
            arguments = [f"output_path={where}/data", *settings, "distributed.engine=ray"]
            while code := _started(folder, arguments, where, nodes, budget, chance, figures, story):
                assert code == 128 + signal.SIGKILL, story
            found = everything(where)
            assert found.keys() == whole.keys(), f"{story}: {found.keys() ^ whole.keys()}"
            for file, expected in whole.items():
                assert found[file] == expected, f"{story}: {file} has other bytes"
    figures["token files"] = sum(file.endswith(".bin") for file in whole)
    return {**dict(sorted(figures.items())), "left running": 0, "different": 0}


def _started(
    folder: Path,
    arguments: list[str],
    where: Path,
    nodes: Any,
    budget: int,
    chance: random.Random,
    figures: "Counter[str]",
    story: list[str],
) -> int:
    """Start the command, with kills until it ends. Returns its exit code."""
    start = Preparation(folder, arguments, _UNITS)
    try:
        while figures["kills"] < budget:
            victim = VICTIMS[figures["kills"] % len(VICTIMS)]
            at = chance.choice((1, 4, 9, 14))  # units that are done, or token files
            pattern = chance.choice(("units/*.npz", "units/*.npz", "shard_*.bin"))
            while start.process.poll() is None and (
                len(list((where / "data").glob(pattern))) < at or not workers()
            ):
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.1))
            if start.process.poll() is not None:
                break
            story.append(f"{victim} at {at} {pattern}")
            if _kill(victim, start, nodes):
                figures.update(("kills", f"SIGKILL to a {victim}"))
        code = start.wait()
        said = start.said()
        assert code in (0, 128 + signal.SIGKILL), f"{story}\n{said}"
        assert "Traceback" not in said, f"{story}\n{said}"
        figures["deaths that the command reported"] += said.count("a worker or its node died")
    finally:
        start.kill()
    deadline = time.monotonic() + STUCK
    while left := workers():
        assert time.monotonic() < deadline, f"{story}\nleft running: {left}"
        time.sleep(0.01)
    return code


def _kill(victim: str, start: Preparation, nodes: Any) -> bool:
    """Whether there was one."""
    if victim == "command":
        send(start.process.pid, signal.SIGKILL)
        start.process.wait()
    elif victim == "node":
        remove_a_node(nodes)
        nodes.add_node(num_cpus=1, **MEMORY)
    elif found := workers():
        send(found[0].pid, signal.SIGKILL)
    else:
        return False
    return True


if __name__ == "__main__":
    command(campaign, 30)
