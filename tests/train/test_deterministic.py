"""The same run has the same numbers, interrupted or not, on several threads; tests elsewhere have one."""

import json
import os
import subprocess
import sys
from pathlib import Path

# Large enough that torch shares each sum among its threads (from 32,768 elements on).
RUN = """
import hashlib, json, os, signal, sys
from pathlib import Path
import torch
from stellar_fast.train import TrainConfig, train

class InterruptAt:
    def __init__(self, step):
        self.step = step
    def log(self, record):
        if record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)
    def close(self):
        pass

def numbers(out, result):
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    weights = hashlib.sha256()
    for name, tensor in sorted(result.model.state_dict().items()):
        weights.update(tensor.contiguous().numpy().tobytes())
    times = ("seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in times} for line in lines], weights.hexdigest()

config, found = json.loads(sys.argv[1]), []
assert torch.get_num_threads() == 2
for threads in (2, 3):
    torch.set_num_threads(threads)
    of_threads = {}
    for name in ("whole", "again"):
        out = f"{sys.argv[2]}/{name}{threads}"
        of_threads[name] = numbers(out, train(TrainConfig(out=out, **config)))
    out = f"{sys.argv[2]}/resumed{threads}"
    first = train(TrainConfig(out=out, **config), loggers=[InterruptAt(2)])
    assert first.step == 3  # the record of step 2 arrives while step 3 is under way
    of_threads["resumed"] = numbers(out, train(TrainConfig(out=out, **config), resume=True))
    found.append(of_threads)
print(json.dumps(found))
"""
SIZES = {
    "device": "cpu",
    "batch_size": 8,
    "steps": 6,
    "workers": 0,
    "log_every": 1,
    "save_every": 0,
    "lr": 1e-3,
    "encoder": {
        "hidden_size": 192,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 384,
        "image_size": 64,
        "patch_size": 8,
    },
    "decoder": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128},
    "model": {
        "num_sparse_tokens": 8,
        "num_clusters": 512,
        "predictor_hidden_dim": 256,
        "prototype_dim": 128,
        "num_masks": 2,
        "num_local_crops": 4,
        "masking_ratio": 0.5,
        "momentum_teacher": True,
        "teacher_momentum": 0.9,
    },
}


def test_a_resumed_run_is_the_same_bit_for_bit_on_several_threads(photos: Path, tmp_path: Path) -> None:
    config = json.dumps(SIZES | {"data": str(photos)})
    command = [sys.executable, "-W", "error::UserWarning", "-c", RUN, config, str(tmp_path)]
    # threads that wait for a core that others use do not spin
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    run = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for found in json.loads(run.stdout.splitlines()[-1]):
        records, _ = found["whole"]
        assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
        assert records[-1]["loss"] < records[0]["loss"]
        assert found["again"] == found["whole"]
        assert found["resumed"] == found["whole"]
