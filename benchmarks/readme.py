"""README's numbers, of the newest committed rows: `make readme-numbers` rewrites what stands between its markers."""

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script: the root holds `benchmarks`

from benchmarks.results import FOLDER, Row, read_rows
from stellar_fast.files import write_atomically

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- numbers: make readme-numbers -->\n", "<!-- end of numbers -->"
MODELS = {  # suite -> what it is, images
    "encode": ("encode", 8),
    "step": ("training step", 2),
    "objective": ("clustering objective", 8),
    "codes": ("VQGAN, codes of images", 2),
    "decode": ("VQGAN, images of codes", 2),
    "data": ("training views of photos, one core", 8),
    "memory": ("prototype loss", 128),
}
PRESETS = ("b16", "vqgan")
DTYPES = ("fp32", "bf16")


def committed() -> list[Path]:
    """The result files under version control: what a user measures beside them changes no README."""
    command = ["git", "-C", str(FOLDER), "ls-files", "*.csv"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [FOLDER / name for name in sorted(listed)]


def numbers(rows: Sequence[Row]) -> str:
    """Markdown: a table of the models and one of the operators for each device, glibc's thresholds at their default."""
    text = ""
    for device in dict.fromkeys(row.device_name for row in rows):
        of_device = [row for row in rows if row.device_name == device and row.allocator == "default"]
        models, operators = _models(of_device), _operators(of_device)
        if models or operators:
            text += f"\n{device}, torch {of_device[-1].torch.split('+')[0]}:\n"
        text += _table(("", "plain", "stellar_fast", "ratio", "of the GEMM rate", "memory, plain and ours"), models)
        columns = [f"{dtype}{more}" for dtype in DTYPES for more in ("", " + backward")]
        text += _table(("times plain's speed", "shape", *columns), operators)
    return text + "\n"


def rewritten(readme: str, rows: Sequence[Row]) -> str:
    """The README with these rows' numbers. Raises ValueError where it has no markers."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must have the lines {BEGIN.strip()!r} and {END!r}")
    return head + begin + numbers(rows) + end + tail


def _newest(rows: Iterable[Row]) -> list[Row]:
    """Of the newest run that has both plain and ours."""
    by_date: dict[str, list[Row]] = {}
    for row in rows:
        by_date.setdefault(row.date, []).append(row)
    for date in sorted(by_date, reverse=True):
        providers = {row.provider.split(".")[0] for row in by_date[date]}
        if {"plain", "stellar_fast"} <= providers:
            return by_date[date]
    return []


def _models(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    lines = []
    for suite, (what, batch) in MODELS.items():
        for dtype in ("fp32", "bf16", "uint8"):
            chosen = [r for r in rows if (r.suite, r.batch, r.dtype) == (suite, batch, dtype) and r.preset in PRESETS]
            found = {row.provider: row for row in _newest(chosen)}
            if not found:
                continue
            plain, ours = found["plain"], found["stellar_fast"]
            timed = ours.median_ms == ours.median_ms
            used = f"{ours.mfu:.0%} of {ours.best_gemm_gflop_per_s:.0f} GFLOP/s" if ours.mfu == ours.mfu else ""
            memory = f"{plain.peak_extra_mib:,.0f}, {ours.peak_extra_mib:,.0f} MiB"
            lines.append(
                (
                    f"{what} B={batch}, {dtype}",
                    f"{_ms(plain.median_ms)} ms" if timed else "",
                    f"{_ms(ours.median_ms)} ms" if timed else "",
                    f"**{ours.ratio:.2f}x** ({ours.ratio_p20:.2f} to {ours.ratio_p80:.2f})" if timed else "",
                    used,
                    memory if suite != "data" else "",
                )
            )
    return lines


def _operators(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Ours is the backend that is taken when none is asked for."""
    lines = []
    of_ops = [row for row in rows if row.suite == "ops"]
    for op in sorted({row.op for row in of_ops}):
        of_op = [row for row in of_ops if row.op == op]
        shape, cells = of_op[0].preset, []
        for dtype in DTYPES:
            dtypes = (dtype, "uint8") if dtype == "fp32" else (dtype,)
            for direction in ("forward", "forward+backward"):
                chosen = [r for r in of_op if r.preset == shape and r.direction == direction and r.dtype in dtypes]
                ours = [row for row in _newest(chosen) if row.provider.startswith("stellar_fast")]
                cells.append(f"{ours[0].ratio:.1f}" if ours else "")
        lines.append((f"`{op}`", f"{shape}: {of_op[0].shape}", *cells))
    return lines


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""
    cells = [columns, ["---"] * len(columns), *lines]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in cells)


def main() -> None:
    """Rewrite README.md."""
    write_atomically(README, rewritten(README.read_text("utf-8"), read_rows(committed())).encode())


if __name__ == "__main__":
    main()
