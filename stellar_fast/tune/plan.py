"""What is tuned: the shapes that operators meet in a training step of a preset, in the letters of their specs."""

from collections.abc import Sequence

import torch

from stellar_fast import backend
from stellar_fast.models.config import resolve_preset
from stellar_fast.models.stellar import UPSTREAM_SIZES
from stellar_fast.registry import load
from stellar_fast.tune.bench import tuned_backend
from stellar_fast.tune.lookup import source_hash, state
from stellar_fast.tune.tuner import Request

MASKING_RATIO = 0.8  # of the published models; with another the kernels are the same and the rows some more or fewer
WITHOUT_KNOBS = ("crop_resize",)  # runs on the calling thread

Shapes = dict[str, list[dict[str, int]]]


def preset_shapes(preset: str, batch: int) -> Shapes:
    """Shapes by operator; those of the VQGAN, which takes a few images at a time, are their specs' own.

    Raises:
        ValueError: an unknown preset, or a batch below 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1 but is {batch}")
    sizes = resolve_preset(preset)
    encoder, decoder, model = sizes.encoder, sizes.decoder, UPSTREAM_SIZES | sizes.model
    B, P, K = batch, encoder.grid_side**2, model["num_sparse_tokens"]
    D, E, S = encoder.hidden_size, decoder.hidden_size, encoder.patch_size
    masks, crops = model["num_masks"], model["num_local_crops"]
    hidden, C, width = (model[name] for name in ("predictor_hidden_dim", "num_clusters", "prototype_dim"))
    kept = int(P * (1 - MASKING_RATIO))
    local = (max(S, encoder.image_size * 96 // 224) // S) ** 2  # patches of a local view, 96 pixels wide of 224

    # sequences of clean, masked and local views; of the last block only what is read has queries
    sequences = [(B, 1 + K + P, 1 + K + P), (B * masks, 1 + K + kept, 1 + K), (B * crops, 1 + K + local, 1)]
    tokens = sum(count * length for count, length, _ in sequences)
    patches = B * P + B * masks * kept + B * crops * local
    learned, cls_learned = B * K * (1 + masks), B * (1 + masks + crops)

    def layer(rows: int, dim: int, mlp: int) -> list[dict[str, int]]:
        widths = [(dim, 3 * dim), (dim, dim), (dim, mlp)]
        return [{"R": rows, "I": i, "O": o} for i, o in widths] + [{"R": rows, "I": mlp, "O": dim, "gelu_input": 1}]

    heads, d = encoder.num_attention_heads, D // encoder.num_attention_heads
    attention = [{"N": n, "Lq": long, "Lk": long, "H": heads, "d": d} for n, long, _ in sequences]
    attention += [{"N": n, "Lq": read, "Lk": long, "H": heads, "d": d} for n, long, read in sequences[1:]]
    head = [{"R": learned, "I": D, "O": hidden}, {"R": learned, "I": hidden, "O": width, "gelu_input": 1}]
    pixels = [{"R": patches, "I": 3 * S * S, "O": D}, {"R": B * P, "I": 3 * S * S, "O": E}]
    found: Shapes = {
        "add_layer_norm": [{"R": tokens, "D": D, "autocast": 1}, {"R": B * P, "D": E, "autocast": 1}],
        "koleo": [{"N": B, "K": K, "D": D}, {"N": B * masks, "K": K, "D": D}],
        "linear": [*layer(tokens, D, encoder.intermediate_size), *layer(B * P, E, decoder.intermediate_size)],
        "lowrank_product": [{"B": B, "P": P, "K": K, "D": D, "E": E}],
        "nearest_code": [{"N": B * P, "E": 256, "S": 1024}],
        "packed_patch_embed": [
            {"N": B, "M": B * masks, "S": encoder.image_size, "p": S, "D": D, "K": K, "kept": kept},
        ],
        "patch_unembed": [
            {"B": B, "Y": encoder.grid_side, "X": encoder.grid_side, "H": E, "C": 3, "S": S},
        ],
        "prototype_cross_entropy": [
            {"R": learned, "T": B * K, "C": C, "E": width},
            {"R": cls_learned, "T": B, "C": C, "E": width},
        ],
        "sinkhorn": [{"R": B * K, "C": C}, {"R": B, "C": C}],
        "token_attention": attention,
        "token_match": [{"B": B, "V": masks, "K": K, "D": D}],
    }
    found["linear"] += head + pixels
    for op in ("conv3x3", "group_norm_silu", "upsample_conv2x"):
        shapes = (dict(shape) for name, shape in load(op).shapes.items() if name.startswith("vqgan"))
        # one of those that differ in what comes along, such as statistics
        found[op] = list({tuple(shape.get(letter) for letter in "BCHWO"): shape for shape in shapes}.values())
    return dict(sorted(found.items()))


def named_shapes(ops: Sequence[str], names: Sequence[str]) -> Shapes:
    """Those shapes of the operators' specs that have one of these names.

    Raises:
        ValueError: a name that no operator has.
    """
    specs = {op: load(op).shapes for op in ops}
    known = sorted({name for shapes in specs.values() for name in shapes})
    for name in names:
        if name not in known:
            raise ValueError(f"no shape is called {name!r}; {', '.join(ops)} have {', '.join(known)}")
    return {op: [dict(shapes[name]) for name in names if name in shapes] for op, shapes in specs.items()}


def tunable_ops(device: str) -> list[str]:
    """Operators with launch knobs on a type of device."""
    return [op for op in backend.OPS if op not in WITHOUT_KNOBS and tuned_backend(op, device)]


def check_ops(ops: Sequence[str], device: str) -> None:
    """Raise ValueError for a name that is no operator's, or of one without launch knobs."""
    known = tunable_ops(device)
    for op in ops:
        if op not in known:
            what = f"{op} has no launch knobs on {device}" if op in backend.OPS else f"unknown operator {op!r}"
            raise ValueError(f"{what}; these have: {', '.join(known)}")


def requests(shapes: Shapes, dtype: str, device: torch.device) -> list[Request]:
    """What a tuner is asked for."""
    return [
        Request(op, shape, dtype, str(device), state(device) | {"source": source_hash(op, device.type)})
        for op, found in shapes.items()
        for shape in found
    ]
