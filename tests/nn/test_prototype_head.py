import pytest
import torch

from stellar_fast.nn.prototype_head import PrototypeHead
from tests.conftest import mismatches


def test_golden_with_features_so_small_that_the_epsilon_shows(golden_ops):
    head = PrototypeHead(8, prototype_dim=8, num_clusters=12, num_layers=1)
    with torch.no_grad():
        head.layers[0].weight.copy_(torch.eye(8))
        head.layers[0].bias.zero_()
        head.prototypes.weight.copy_(golden_ops["head_eps.prototypes"])
    assert mismatches({"logits": head(golden_ops["head_eps.x"])}, {"logits": golden_ops["head_eps.logits"]}) == []


def test_logits_are_fp32_and_the_product_runs_in_the_autocast_dtype():
    head = PrototypeHead(8, 16, 4, 32)
    seen = []
    head.prototypes.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(torch.randn(2, 3, 8))
    assert seen == [torch.bfloat16]
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 3, 32)


def test_depth():
    assert len(PrototypeHead(8, num_layers=3, num_clusters=4).layers) == 3
    with pytest.raises(ValueError, match="predictor_layers must be at least 1 but is 0"):
        PrototypeHead(8, num_layers=0)
