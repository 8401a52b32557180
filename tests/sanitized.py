"""`pytest -p tests.sanitized`: the native module that `make sanitize` built takes the place of the installed one."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  first, so that both share the OpenMP runtime that torch brings

NAME, FLAG = "stellar_fast._C", "-fsanitize=address,undefined"
(path,) = (Path(__file__).parents[1] / "build" / "sanitized" / "stellar_fast").glob("_C.*.so")
spec = importlib.util.spec_from_file_location(NAME, path)
assert spec is not None and spec.loader is not None
sys.modules[NAME] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[NAME])


def pytest_sessionstart(session: pytest.Session) -> None:
    from stellar_fast import native

    assert native.module().__file__ == str(path)
    assert FLAG in str(native.build_info()["flags"]), native.build_info()


def pytest_report_header(config: pytest.Config) -> str:
    return f"sanitized native module: {path}"
