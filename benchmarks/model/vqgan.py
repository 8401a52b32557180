"""The frozen MaskGIT-VQGAN at full width: codes of images, and images of codes. Plain runs in channels-last memory."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.model.pair import Case, autocast, compare, random_images
from benchmarks.plain.vqgan import PlainVQGAN
from benchmarks.shapes import ModelShape

BATCH = 2
SIZE = 256  # pixels
DOWNSCALE = 16
WIDTHS = (128, 128, 256, 256, 512)  # of the levels, finest first
IN, Z, NUM_CODES = 3, 256, 1024
FP32_TOLERANCE = 3e-5  # of 128 x 128 pixels decoded, plain is 7.4e-6 from fp64 and stellar_fast 6.5e-6

Make = Callable[[nn.Module, torch.dtype], Callable[[], dict[str, Tensor]]]


def build_decode_case(
    shape: ModelShape, batch: int, dtype: torch.dtype, device: torch.device, providers: list[str]
) -> Case:
    """Images of random codes."""
    side = SIZE // DOWNSCALE
    codes = torch.randint(NUM_CODES, (batch, side, side), generator=torch.Generator().manual_seed(1)).to(device)

    def make(network: nn.Module, dtype: torch.dtype) -> Callable[[], dict[str, Tensor]]:
        def decode() -> dict[str, Tensor]:
            with torch.no_grad(), autocast(device, dtype):
                return {"image": network.decode(codes)}

        return decode

    return _case("decode", make, batch, dtype, device, providers, _decoder_flops())


def build_codes_case(
    shape: ModelShape, batch: int, dtype: torch.dtype, device: torch.device, providers: list[str]
) -> Case:
    """Codes of random images. Below fp32 codes flip, so what is compared there is what they are the nearest to."""
    images = random_images(batch, SIZE, device, seed=1)

    def make(network: nn.Module, compute: torch.dtype) -> Callable[[], dict[str, Tensor]]:
        of_images: list[Tensor] = []
        network.encoder.register_forward_hook(lambda module, inputs, z: of_images.append(z))

        def encode() -> dict[str, Tensor]:
            of_images.clear()
            with torch.no_grad(), autocast(device, compute):
                codes = network.encode(images.contiguous(memory_format=torch.channels_last))
            found = {"z": torch.cat(of_images)}
            return found | {"codes": codes.float()} if dtype == torch.float32 else found

        return encode

    return _case("codes", make, batch, dtype, device, providers, _encoder_flops())


def _case(
    suite: str, make: Make, batch: int, dtype: torch.dtype, device: torch.device, providers: list[str], flops: float
) -> Case:
    networks = _networks(providers, device)
    calls = {name: make(network, dtype) for name, network in networks.items()}
    exact = calls["plain"] if dtype == torch.float32 else make(networks["plain"], torch.float32)
    parameters = sum(p.numel() for p in networks["plain"].parameters())
    return Case(
        suite=suite,
        shape=f"B={batch} {SIZE}x{SIZE} width {WIDTHS[0]}",
        batch=batch,
        flops=batch * flops,
        bytes=4 * (parameters + batch * IN * SIZE**2),
        calls=dict(calls),
        checks=compare(calls, exact, dtype, FP32_TOLERANCE),
        preset="vqgan",
    )


def _networks(providers: list[str], device: torch.device) -> dict[str, nn.Module]:
    """The networks with the same random weights."""
    from stellar_fast import VQGAN

    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks: dict[str, nn.Module] = {"plain": PlainVQGAN()}
    if "plain_compiled" in providers:
        networks["plain_compiled"] = PlainVQGAN()
    if "stellar_fast" in providers:
        networks["stellar_fast"] = VQGAN()
    weights = networks["plain"].state_dict()
    for name, network in networks.items():
        network.load_state_dict(weights)
        network.eval().to(device)
        if name != "stellar_fast":
            network.to(memory_format=torch.channels_last)
    if "plain_compiled" in networks:
        networks["plain_compiled"].encoder.compile()
        networks["plain_compiled"].decoder.compile()
    return networks


def _conv(inputs: int, outputs: int, side: int, taps: int = 9) -> float:
    return 2.0 * taps * inputs * outputs * side**2


def _blocks(inputs: int, outputs: int, side: int) -> float:
    """Two residual blocks."""
    shortcut = _conv(outputs, outputs, side, taps=1) if inputs != outputs else 0.0
    return _conv(inputs, outputs, side) + 3 * _conv(outputs, outputs, side) + shortcut


def _encoder_flops() -> float:
    """Of one image."""
    last, side = WIDTHS[-1], SIZE // DOWNSCALE
    levels = sum(_blocks(i, o, SIZE >> level) for level, (i, o) in enumerate(pairwise((WIDTHS[0], *WIDTHS))))
    ends = _conv(IN, WIDTHS[0], SIZE) + _blocks(last, last, side) + _conv(last, Z, side, taps=1)
    return levels + ends + 2.0 * Z * NUM_CODES * side**2


def _decoder_flops() -> float:
    """Of one image, as plain computes it."""
    last, side = WIDTHS[-1], SIZE // DOWNSCALE
    total = _conv(Z, last, side) + _blocks(last, last, side) + _conv(WIDTHS[0], IN, SIZE)
    for level, (outputs, inputs) in enumerate(pairwise((*WIDTHS, last))):
        total += _blocks(inputs, outputs, SIZE >> level)
        if level:
            total += _conv(outputs, outputs, SIZE >> (level - 1))
    return total
