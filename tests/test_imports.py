"""`import stellar_fast` is light and changes nothing."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, os, signal, sys, threading
import torch

def state():
    return {
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "torch": [str(torch.get_default_dtype()), torch.get_num_threads(), torch.get_float32_matmul_precision()],
        "threads": threading.active_count(),
        "draws": torch.random.get_rng_state().tolist(),
    }

before = state()
import stellar_fast
print(json.dumps({
    "unchanged": state() == before,
    "modules": sorted(sys.modules),
    "gpu": torch.cuda.is_initialized(),
    "names": {name: hasattr(stellar_fast, name) for name in stellar_fast.__all__},
}))
"""


@pytest.fixture(scope="module")
def found() -> dict:
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return json.loads(run.stdout)


def test_import_has_no_side_effects(found: dict) -> None:
    assert found["unchanged"] and not found["gpu"]
    assert found["names"] and all(found["names"].values())


def test_import_leaves_optional_and_heavy_packages_alone(found: dict) -> None:
    modules = set(found["modules"])
    assert "stellar_fast" in modules
    unwanted = {"triton", "matplotlib", "skimage", "sklearn", "xformers", "flash_attn", "tensorboard", "typer", "rich"}
    assert not modules & unwanted
    assert not any(name.startswith("stellar_fast.train") for name in modules)
