"""What attacks maximise."""

import pytest
import torch

from darht.attacks.objectives import OBJECTIVES, objective_of


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_targeted_objectives_rise_with_the_targets_logit(name):
    torch.manual_seed(0)
    logits, y, target = torch.randn(8, 5), torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)
    logits[:, 0] = 4.0  # the label leads, as it does where an attack begins
    more = logits.clone()
    more[:, 1] += 0.5
    assert bool((objective_of(name, more, y, target) > objective_of(name, logits, y, target)).all())
    assert torch.equal(objective_of(name, logits, y, None), OBJECTIVES[name](logits, y))
