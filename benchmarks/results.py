"""The result files: one row is one measurement of one provider. CSV to commit, JSON of the same rows beside it."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# stellar_fast.files is imported where it is used: an earlier package (against.py) may lack a name of it.

FOLDER = Path(__file__).parent / "results"
NOTHING = float("nan")  # in a row: not measured; an empty field in CSV, null in JSON


@dataclass(frozen=True, kw_only=True)
class Row:
    """The columns, in the order of the file; COLUMNS says what they hold."""

    date: str
    suite: str
    op: str
    direction: str
    provider: str
    preset: str
    shape: str
    batch: int
    dtype: str
    device: str
    device_name: str
    threads: int
    allocator: str
    config: str
    rounds: int
    median_ms: float = NOTHING
    p20_ms: float = NOTHING
    p80_ms: float = NOTHING
    ratio: float = NOTHING
    ratio_p20: float = NOTHING
    ratio_p80: float = NOTHING
    images_per_s: float = NOTHING
    flops: float = 0.0
    bytes: int = 0
    gflop_per_s: float = NOTHING
    gemm_gflop_per_s: float = NOTHING
    gemm_share: float = NOTHING
    best_gemm_gflop_per_s: float = NOTHING
    mfu: float = NOTHING
    gb_per_s: float = NOTHING
    copy_gb_per_s: float
    floor_share: float = NOTHING
    peak_extra_mib: float = NOTHING
    worst_check: float = NOTHING
    torch: str
    triton: str
    python: str
    commit: str


COLUMNS = {
    "date": "start of the run, UTC; the rows of one run share it",
    "suite": "of benchmarks/run.py",
    "op": "the operator of the suite ops, or another public function of its room",
    "direction": "forward or forward+backward; of the suite scaling the series",
    "provider": "stellar_fast or stellar_fast.<backend>; plain, the upstream formulation; plain_compiled; a library",
    "preset": "of the model, or the named shape of the operator",
    "shape": "sizes in letters",
    "batch": "images; of an operator without images 1",
    "dtype": "bf16: autocast over fp32 weights; an operator's inputs are bf16 themselves",
    "device": "cpu or cuda",
    "device_name": "of the processor with its usable cores, or of the GPU",
    "threads": "of torch on the CPU",
    "allocator": "default, or raised: glibc keeps blocks over 32 MiB instead of mapping them afresh",
    "config": "STELLAR_FAST_* variables that were set, NAME=value",
    "rounds": "timed calls",
    "median_ms": "wall time of one call",
    "p20_ms": "20th percentile",
    "p80_ms": "80th percentile",
    "ratio": "plain's median over this provider's: above 1 is faster",
    "ratio_p20": "20th percentile of single rounds' ratios",
    "ratio_p80": "80th percentile of single rounds' ratios",
    "images_per_s": "batch over median; not of operators",
    "flops": "that the mathematics needs, the same for every provider (benchmarks/shapes.py, the operators' specs)",
    "bytes": "that must move at least, the same for every provider",
    "gflop_per_s": "flops over median",
    "gemm_gflop_per_s": "large products by torch's default path, in the same run, fastest round",
    "gemm_share": "gflop_per_s over gemm_gflop_per_s: above 1 where another library is faster",
    "best_gemm_gflop_per_s": "the same products by the fastest library here",
    "mfu": "gflop_per_s over best_gemm_gflop_per_s: model FLOPs utilisation",
    "gb_per_s": "bytes over median",
    "copy_gb_per_s": "a large copy, bytes read and written, in the same run",
    "floor_share": "the larger of flops at the best GEMM rate and bytes at the copy's, over median",
    "peak_extra_mib": "memory of one call beyond what was held before it",
    "worst_check": "largest error over its tolerance; a verified row exists only below 1",
    "torch": "version",
    "triton": "version, or absent",
    "python": "version",
    "commit": "of this repository, ending in -dirty with uncommitted changes",
}


def result_path(folder: Path, facts: Mapping[str, str | int]) -> Path:
    """<folder>/<device>-torch<version>-<date>.csv"""
    from stellar_fast.files import plain_name

    device = plain_name(str(facts["device_name"]))
    version = str(facts["torch"]).split("+")[0]
    return folder / f"{device}-torch{version}-{str(facts['date'])[:10]}.csv"


def read_rows(paths: Path | Iterable[Path]) -> list[Row]:
    """Rows of CSV or JSON files; what an earlier version did not write is empty, 0 or NaN.

    Raises:
        ValueError: a file has columns that are not known.
    """
    rows = []
    for path in [paths] if isinstance(paths, Path) else paths:
        lines = json.loads(path.read_text("utf-8"))["rows"] if path.suffix == ".json" else _csv_lines(path)
        _check_columns(path, lines)
        rows += [_parse(line) for line in lines]
    return rows


def append_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Add rows to a CSV file, and write all of its rows as JSON beside it, whose path is returned.

    A file of an earlier version gets the columns that it lacks, empty.

    Raises:
        ValueError: the file has columns that are not known.
    """
    from stellar_fast.files import null_if_not_finite, write_atomically

    old = _csv_lines(path) if path.exists() else []
    _check_columns(path, old)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(old)
    writer.writerows({name: _printed(value) for name, value in asdict(row).items()} for row in rows)
    write_atomically(path, text.getvalue().encode())
    beside = path.with_suffix(".json")
    content = {"columns": COLUMNS, "rows": [null_if_not_finite(asdict(row)) for row in read_rows(path)]}
    write_atomically(beside, (json.dumps(content, indent=1) + "\n").encode())
    return beside


def _csv_lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _check_columns(path: Path, lines: Sequence[Mapping]) -> None:
    if lines and not set(lines[0]) <= set(COLUMNS):
        raise ValueError(f"{path} has columns {','.join(lines[0])} but known are {','.join(COLUMNS)}")


def _parse(line: Mapping) -> Row:
    empty = {str: "", int: 0, float: NOTHING}
    values = {}
    for field in fields(Row):
        value = line.get(field.name)
        values[field.name] = empty[field.type] if value in (None, "") else field.type(value)  # type: ignore[index,operator]
    return Row(**values)


def _printed(value: object) -> object:
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return value
