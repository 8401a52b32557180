"""Environments of other commits: this package as it was, everything else as it is.

`build/against/<commit>-.../` is a virtual environment with the commit's package, C++ included. Torch and all the rest
are the present environment's, through one .pth file: nothing else differs, and nothing is installed twice. The present
environment's editable package stays out, since the .pth files of a folder that a .pth file names are not read.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import torch

from stellar_fast.files import lock_folder, write_atomically

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "against"


def resolve(commit: str, repository: Path = ROOT) -> str:
    """The full hash of a commit. Raises ValueError for what is none."""
    try:
        return _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(f"{commit!r} is neither a file nor a commit of {repository}") from None


def environment(sha: str, device: str, repository: Path = ROOT, cache: Path = CACHE) -> Path:
    """The Python of an environment that holds the package of a commit; built where it is not there yet.

    Raises:
        ValueError: the commit does not build, or another process is building it.
    """
    folder = cache / f"{sha[:12]}-{device}-python{sysconfig.get_python_version()}-torch{torch.__version__}"
    python = folder / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(folder)}))
    present = packages / "present.pth"  # written last: with it the environment is complete
    if present.exists():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        venv.create(folder, with_pip=False, symlinks=True)
        _install(sha, device, repository, folder, packages)
        shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        write_atomically(present, "".join(f"{path}\n" for path in shared).encode())
    return python


def _install(sha: str, device: str, repository: Path, folder: Path, packages: Path) -> None:
    source, log = folder / "source", folder / "build.log"
    # there from a build that was cut off
    subprocess.run(["git", "-C", repository, "worktree", "remove", "--force", source], capture_output=True, check=False)
    _git(repository, "worktree", "add", "--detach", "--force", str(source), sha)
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--upgrade", "--target", str(packages)]
    try:
        import pybind11  # noqa: F401
        import scikit_build_core  # noqa: F401
    except ImportError:
        pass  # pip fetches them into an environment for this build
    else:
        command.append("--no-build-isolation")
    cuda = [f"CMAKE_CUDA_ARCHITECTURES={_architecture()}"] if device == "cuda" else ["STELLAR_FAST_CUDA=OFF"]
    command += [argument for define in cuda for argument in ("-C", f"cmake.define.{define}")]
    try:
        with log.open("w") as file:
            built = subprocess.run([*command, str(source)], stdout=file, stderr=subprocess.STDOUT, check=False)
    finally:
        _git(repository, "worktree", "remove", "--force", str(source))
    if built.returncode:
        raise ValueError(f"commit {sha[:12]} does not build:\n{tail(log)}\nall of it: {log}")


def _architecture() -> str:
    """Of the present GPU, as CMake has it: kernels of compute capability 9.0 use instructions of that alone."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real"


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
