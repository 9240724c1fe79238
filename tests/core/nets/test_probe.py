"""Asking a network about one image: refusals are messages, and nothing in the network changes."""

import pytest
import torch

from darht.core.errors import ModelError
from darht.core.nets import check_pixels


def test_asking_a_network_for_one_image_changes_nothing_in_it():
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(48, 2)).train()
    check_pixels(net, torch.zeros(5, 3, 4, 4, dtype=torch.uint8), "net")
    assert net.training
    assert net[0].num_batches_tracked == 0
    with pytest.raises(ModelError, match="net does not take images of 6x5 pixels"):
        check_pixels(net, torch.zeros(5, 3, 5, 6, dtype=torch.uint8), "net")
    assert net.training


def test_another_shape_of_answer_is_refused_where_the_classes_are_known():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    images = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    check_pixels(net, images, "net", num_classes=2)
    with pytest.raises(ModelError, match=r"net must give logits of shape \(1, 3\), as its card says; got \(1, 2\)"):
        check_pixels(net, images, "net", num_classes=3)
