"""Two processes with half of the batch each train as one process with all of it: DDP and FSDP2, with the teacher."""

import copy
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stellar_fast import StellarModel
from stellar_fast.nn.prototype_head import PrototypeHead
from tests.conftest import SMALL_DECODER, SMALL_ENCODER, SMALL_KWARGS
from tests.ranks import run_two_ranks

STEPS = 2


def build() -> StellarModel:
    torch.manual_seed(0)
    return StellarModel(
        SMALL_ENCODER,
        SMALL_DECODER,
        color_augmentation=False,
        teacher_momentum=0.9,
        momentum_teacher=True,
        **SMALL_KWARGS,
    )


def batches() -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        views = {
            "global_views": torch.rand(4, 2, 3, 32, 32, generator=generator),
            "local_views": torch.rand(4, 2, 3, 16, 16, generator=generator),
        }
        found.append((views, torch.rand(8, 16, generator=generator).argsort(dim=1)[:, :8]))
    return found


def train(model, module: StellarModel, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
    """Gradients of the last step and all weights, the teacher's included, under upstream's names."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for views, keep in batches():
        optimizer.zero_grad()
        module.update_teacher()
        mine = {name: x.chunk(world_size)[rank] for name, x in views.items()}
        predictions = model(mine, keep_indices=keep.chunk(world_size)[rank])["predictions"]
        module.loss(predictions).total.backward()
        gradients = {f"gradient {name}": g for name, g in module.upstream_gradients().items()}
        optimizer.step()
    return gradients | module.upstream_state_dict()


def one_rank(rank: int, folder: Path, kind: str) -> None:
    module = build()
    mesh = init_device_mesh("cpu", (2,))
    if kind == "ddp":
        model = DistributedDataParallel(module)
    elif kind == "fsdp2_of_layers":  # whose weights are gathered by nothing but their own call; from the meta device
        weights = module.upstream_state_dict()
        with torch.device("meta"):
            model = module = build()
        for vit in (module.encoder, module.teacher.encoder):
            fully_shard(vit.patch_embed, mesh=mesh)
            fully_shard(vit.transformer.blocks[-1].attn.qkv, mesh=mesh)
            fully_shard(vit.transformer.blocks[-1].mlp.fc2, mesh=mesh)
        for head in (m for m in module.modules() if isinstance(m, PrototypeHead)):
            fully_shard(head.prototypes, mesh=mesh)
        for part in (module.decoder.proj, module):
            fully_shard(part, mesh=mesh)
        module.to_empty(device="cpu")
        module.load_upstream_state_dict(weights)
    else:
        for part in (*module.encoder.transformer.blocks, *module.decoder.transformer.blocks):
            fully_shard(part, mesh=mesh)
        heads = [m for m in module.modules() if isinstance(m, PrototypeHead)]  # the student's and the teacher's
        assert len(heads) == 4
        for part in (*heads, module.encoder, module.decoder, module):
            fully_shard(part, mesh=mesh)
        model = module
    found = train(model, module, rank, 2)
    if rank == 0:
        torch.save(found, folder / "found.pt")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2_of_layers"])
def test_two_processes_are_one(tmp_path: Path, kind: str) -> None:
    run_two_ranks(one_rank, tmp_path, tmp_path, kind)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    module = build()
    before = copy.deepcopy(module.upstream_state_dict())
    expected = train(module, module)
    assert found.keys() == expected.keys()
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, expected[name])]
    assert any("teacher" in name for name in moved) and any(name.startswith("decoder") for name in moved)
    for name, want in expected.items():
        torch.testing.assert_close(
            found[name], want, atol=2e-5 * max(1.0, want.abs().max().item()), rtol=1e-3, msg=name
        )
