"""Train a student with a loss of one's own, on digits: `python examples/own_loop.py [FOLDER]`, seconds on a CPU."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import darht

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/own_loop")
network = {"arch": "resnet18", "kwargs": {"width": 8, "blocks": [1, 1, 1, 1]}}
optim, views = {"epochs": 4, "batch_size": 32}, {"padding": 1, "flip": False}
teaching = {"algorithm": "standard", "optim": optim, "views": views}
darht.train_teacher(teaching, {"source": "digits"}, network, folder / "teacher")
(folder / "cache.yaml").write_text("""
data: {source: digits, holdout: 0.1}
views: {padding: 1, flip: false, count: 4}
teachers: {resnet: {path: teacher}}
attacks: {pgd: {kind: pgd, teacher: resnet, eps: 32, step: 16, steps: 3}}
""")
cache = darht.build_cache(folder / "cache.yaml", folder / "cache")

student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
dataset = darht.CacheDataset(cache, batch_size=64, pixels="float", adversarial="all")
for epoch in range(10):
    dataset.set_epoch(epoch)
    for batch in dataset:
        said = batch.teacher_logits.mean(1).softmax(1)  # of every teacher, raw logits [B, T, C]
        loss = F.cross_entropy(student(batch.x), said) + F.cross_entropy(student(batch.x_adv), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
held = next(iter(darht.CacheDataset(cache, rows="holdout", views=False, pixels="float", drop_last=False)))
print(f"held-out rows: {(student(held.x).argmax(1) == held.y).float().mean():.1%} right")
