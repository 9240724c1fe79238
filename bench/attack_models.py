"""The networks and images that attacks are measured on, and the one judge of what an attack achieved."""

import importlib.util
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

MODELS = {
    "resnet4b_adv": "ResNet, adversarially trained",
    "resnet20": "ResNet, undefended",
    "vit": "small timm ViT, undefended",
}


def load_images(data: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a file of CIFAR-10 in [0, 1], and their labels."""
    found = [*data.glob(f"cifar-10-batches-py/{split}"), *data.glob(f"*/cifar-10-batches-py/{split}")]
    if not found:
        raise SystemExit(f"no cifar-10-batches-py/{split} below {data}: unpack CIFAR-10 there, or name another --data")
    with found[0].open("rb") as file:
        held = pickle.load(file, encoding="bytes")
    images = torch.tensor(held[b"data"][:count]).view(-1, 3, 32, 32)
    return images.float() / 255, torch.tensor(held[b"labels"][:count])


def load_model(name: str, zoo: Path, data: Path, work: Path) -> nn.Module:
    """One of `MODELS`, frozen and in eval mode."""
    if name == "vit":
        return load_vit(data, work)
    if not (zoo / "zoo.py").is_file():
        raise SystemExit(f"no zoo.py in {zoo}: name the folder of the networks with --zoo")
    spec = importlib.util.spec_from_file_location("zoo", zoo / "zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(name).requires_grad_(False)


def load_vit(data: Path, work: Path) -> nn.Module:
    """A timm ViT of 0.5 million parameters, trained on first use for four epochs (about 45 % clean accuracy)."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=10
    )
    path = work / "vit.pt"
    if not path.is_file():
        x, y = load_images(data, "data_batch_1", 10_000)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
        for _ in range(4):
            for rows in torch.randperm(len(x)).split(128):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
        work.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval().requires_grad_(False)


def robust_rows(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, eps: int) -> Tensor:
    """The one judge: right when clean and right on what came back, which must lie in the ball; bool `[N]`."""
    far = float((x_adv - x).abs().max()) * 255
    if far > eps + 3e-3 or float(x_adv.min()) < 0 or float(x_adv.max()) > 1:
        raise SystemExit(f"left the ball or the pixel range: {far:.4f} levels, epsilon {eps}")
    with torch.no_grad():
        clean = torch.cat([model(rows).argmax(1) for rows in x.split(128)]) == y
        attacked = torch.cat([model(rows).argmax(1) for rows in x_adv.split(128)]) == y
    return clean & attacked
