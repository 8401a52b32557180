"""Two processes of one run: what differs between them, or fails on one, ends both with one message."""

import dataclasses
import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

from stellar_fast.data import TooManyUnreadable
from stellar_fast.files import lock_folder
from stellar_fast.train import RunEndedError, TrainConfig, train
from stellar_fast.train.errors import RankError
from tests.ranks import run_two_ranks
from tests.train.test_loop import Fails, SignalAt


def attempt(config: TrainConfig, **arguments: Any) -> list[str]:
    """The kind of error and its message, or how far the run came."""
    try:
        result = train(config, **arguments)
    except (RankError, RunEndedError) as error:
        return [type(error).__name__, str(error)]
    return ["step", f"{result.step}, signal {result.signal}, {result.checkpoint.name}"]


def one_rank(rank: int, config: TrainConfig, other_names: str, folder: Path) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    warnings.simplefilter("error", FutureWarning)  # what torch says of arguments that it gives up
    out = Path(config.out)

    def mine(**values: Any) -> TrainConfig:
        """The configuration, changed on the second process alone."""
        return dataclasses.replace(config, **values) if rank else config

    found = {
        "names": attempt(mine(data=other_names)),
        "nowhere": attempt(mine(data="/no/where")),
        "seed": attempt(mine(seed=1)),
        "steps": attempt(mine(steps=9)),
        "save_every": attempt(mine(save_every=5)),
        "device": attempt(mine(device="cuda:99")),
        "resume": attempt(config, resume=bool(rank)),
        "place": attempt(dataclasses.replace(config, out="/dev/null")),
        "untouched": [str(out.exists())],
        "run": attempt(config, loggers=[SignalAt(2, signal.SIGUSR1)]),  # the first process reports
        "again": attempt(config),
        "other steps": attempt(dataclasses.replace(config, steps=9), resume=True),
        "data": attempt(config, resume=True, dataset=Fails(config, 2, TooManyUnreadable("gone")) if rank else None),
        "end": attempt(config, resume=True),
    }
    if rank == 0:
        held = lock_folder(out)
    found["held"] = attempt(config, resume=True)
    if rank == 0:
        held.close()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_two_processes_stop_together(config: TrainConfig, photos: Path, tmp_path: Path) -> None:
    others = shutil.copytree(photos, tmp_path / "others")
    (others / "0.png").rename(others / "zero.png")
    config = dataclasses.replace(config, batch_size=2, save_every=4)
    run_two_ranks(one_rank, tmp_path, config, str(others), tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    same = "all processes of a run need the same"
    checkpoints = Path(config.out) / "checkpoints"
    expected = {
        "nowhere": "process 1 of 2: /no/where is not a folder",
        "seed": f"process 1 of 2 has seed 1, process 0 has 0: {same}",
        "steps": f"process 1 of 2 has steps 9, process 0 has 7: {same}",
        "save_every": f"process 1 of 2 has save_every 5, process 0 has 4: {same}",
        "resume": f"process 1 of 2 has resume True, process 0 has False: {same}",
        "place": "/dev/null cannot be a folder: /dev/null is a device",
        "again": f"{config.out} already holds a run: continue it with --resume or name another --out",
        "other steps": f"{checkpoints}/step_00000003 was made with steps 7, this run has 9: "
        f"give the same, or start a new run with --weights {checkpoints}/step_00000003",
        "held": f"{config.out} is in use by another process",
    }
    for name, message in expected.items():
        assert first[name] == ["RankError", message]
    kind, message = first["names"]
    assert kind == "RankError" and message.startswith("process 1 of 2 has image_names '") and message.endswith(same)
    assert first["device"][1].startswith("process 1 of 2: device cuda:99 is not there")
    assert first["untouched"] == ["False"]
    assert first["run"] == ["step", f"3, signal {signal.SIGUSR1}, step_00000003"]
    assert first["data"] == ["RunEndedError", f"process 1 of 2: gone; checkpoint {checkpoints}/step_00000005"]
    assert first["end"] == ["step", "7, signal None, step_00000007"]
