"""Do the fused operators train like the reference? The same steps on real photos, twice, and how far the losses part.

`python -m benchmarks.model.trajectory [--steps 200] [--out docs/trajectory.png]` trains the tiny preset from the same
weights, views and masks with this machine's fastest operators and with all of them on the reference. Training is
chaotic, so that runs part whatever the machine, in the end as far as runs can. How fast is shown by reference runs
whose weights differ by 1e-7 at the start, which is about a rounding each.

The exit code is 1 where at some step the fused operators are more than ten times as far from the reference as the
furthest of those runs has been by then. They themselves differ by up to five times; an operator that is off by 1e-3 is
off by ten thousand roundings, which the first steps show.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stellar_fast import StellarModel, backend
from stellar_fast.data import MultiViewTransform
from stellar_fast.demo import bundled_photos
from stellar_fast.files import write_atomically

BATCH = 4
NUDGE = 1e-7
NUDGED_RUNS = 3
MARGIN = 10.0  # nudged runs are up to 5 times as far from the reference as each other


def batches(model: StellarModel, steps: int) -> list[dict[str, Tensor]]:
    """Views of the demo's photos, in turn."""
    transform = MultiViewTransform(
        model.encoder.config.image_size, model.local_size, model.num_masks, model.num_local_crops
    )
    photos = list(bundled_photos()[0].values())
    made = []
    for step in range(steps):
        views = [transform(photos[(BATCH * step + i) % len(photos)], BATCH * step + i) for i in range(BATCH)]
        made.append({name: torch.stack([view[name] for view in views]) for name in views[0]})
    return made


def losses(steps: int, requests: dict[str, str], nudge_seed: int | None = None) -> list[float]:
    """Total loss of each step, with the operators' backends as requested; `nudge_seed` moves the weights by NUDGE."""
    torch.manual_seed(0)
    model = StellarModel("tiny").train()
    if nudge_seed is not None:
        generator = torch.Generator().manual_seed(nudge_seed)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + NUDGE * torch.randn(p.shape, generator=generator))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    generator, totals = torch.Generator().manual_seed(1), []
    with backend.use_backend(**requests):
        for batch in batches(model, steps):
            total, _ = model.loss(model(batch, generator=generator)["predictions"])
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(parameters, 3.0)
            optimizer.step()
            totals.append(total.item())
    return totals


def reference_of_all() -> dict[str, str]:
    """A request for the reference of every operator of a step."""
    return dict.fromkeys(backend.OPS.keys() - {"crop_resize"}, "reference")


def compare(steps: int) -> dict[str, np.ndarray]:
    """The reference's "loss", and differences from it over it: "fused" (steps,) and "nudged" (runs, steps)."""
    truth = np.array(losses(steps, reference_of_all()))
    fused = np.array(losses(steps, {}))
    nudged = np.array([losses(steps, reference_of_all(), seed) for seed in range(NUDGED_RUNS)])
    return {"fused": np.abs(fused / truth - 1), "nudged": np.abs(nudged / truth - 1), "loss": truth}


def problems(found: dict[str, np.ndarray]) -> list[str]:
    """What of `compare` says that the fused operators do not train like the reference; empty where they do."""
    fused, furthest = found["fused"], np.maximum.accumulate(found["nudged"].max(axis=0))
    beyond = ~(fused <= MARGIN * furthest)  # NaN is beyond
    if not beyond.any():
        return []
    at = int(np.argmax(beyond))
    allowed = f"over {MARGIN:g} times the nudged runs' {furthest[at]:.2e}"
    return [f"step {at + 1} is {fused[at]:.2e} from the reference, {allowed}"]


def draw(found: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    steps = np.arange(1, len(found["fused"]) + 1)
    for i, run in enumerate(found["nudged"]):
        label = f"reference, weights moved by {NUDGE:g}" if i == 0 else None
        axis.plot(steps, np.maximum(run, 1e-9), color="#b9c4d8", linewidth=1.2, label=label)
    axis.plot(steps, np.maximum(found["fused"], 1e-9), color="#2456a6", linewidth=1.6, label="fused operators")
    axis.set_yscale("log")
    axis.set_xlabel("training step, tiny preset on the demo's photos")
    axis.set_ylabel("relative difference of the loss\nfrom the reference's")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("docs/trajectory.png"))
    options = parser.parse_args()
    found = compare(options.steps)
    fused, nudged = found["fused"], found["nudged"]
    print(f"loss {found['loss'][0]:.2f} -> {found['loss'][-1]:.2f} in {options.steps} steps")
    for last in sorted({min(20, options.steps), options.steps // 2, options.steps}):
        print(
            f"up to step {last:4}: fused operators at most {fused[:last].max():.2e} from the reference, "
            f"weights moved by {NUDGE:g} {nudged[:, :last].max(axis=1).min():.2e} to {nudged[:, :last].max():.2e}"
        )
    draw(found, options.out)
    print(f"plot in {options.out}")
    wrong = problems(found)
    for text in wrong:
        print(f"WRONG: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
