"""The momentum teacher."""

import copy

import torch
from torch import Tensor, nn

from stellar_fast.models.encoder import SparseViT, StellarEncoder
from stellar_fast.models.weights import unwrapped
from stellar_fast.nn.prototype_head import PrototypeHead


class Teacher(nn.Module):
    """Moving average of the trunk, the sparse tokens and the heads; starts as a copy and has no gradient."""

    def __init__(self, encoder: StellarEncoder, clustering_head: PrototypeHead, cls_head: PrototypeHead | None) -> None:
        super().__init__()
        self.encoder = SparseViT(encoder.config, encoder.num_sparse_tokens)
        for part in (self.encoder._modules, self.encoder._parameters, self.encoder._buffers):
            for name in part:
                setattr(self.encoder, name, copy.deepcopy(getattr(encoder, name)))
        self.clustering_head = copy.deepcopy(clustering_head)
        self.cls_cluster_head = copy.deepcopy(cls_head)
        self.requires_grad_(False)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """``m teacher + (1 - m) student`` over all tensors, those that never touch the output included.

        Shards of FSDP2 move where they are; teacher and student have to be sharded alike.
        """
        theirs = {unwrapped(name): tensor for name, tensor in student.state_dict(keep_vars=True).items()}
        ours, targets = [], []
        for name, tensor in self.state_dict(keep_vars=True).items():
            name = unwrapped(name)
            if name not in theirs:
                raise ValueError(f"the student has no {name}, which the teacher follows: wrap or replace parts of both")
            if not tensor.is_floating_point():  # a count of something that somebody put in
                tensor.copy_(theirs[name])
                continue
            ours.append(_shard(tensor.detach()))
            targets.append(_shard(theirs[name].detach()))
            if ours[-1].shape != targets[-1].shape:
                raise ValueError(
                    f"the teacher's shard of {name} is {tuple(ours[-1].shape)} but the student's is "
                    f"{tuple(targets[-1].shape)}: shard both alike"
                )
        torch._foreach_lerp_(ours, targets, 1 - momentum)


def _shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
