"""Evaluate a network that darht did not train, on digits: `python examples/evaluate_any_model.py [FOLDER]`."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import darht

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/evaluate_any_model")
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8).repeat(1, 3, 1, 1)
y = torch.tensor(labels)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
training = torch.arange(len(x)) % 5 != 4  # the others are darht's test images
for _ in range(100):
    optimizer.zero_grad()
    F.cross_entropy(model(x[training]), y[training]).backward()
    optimizer.step()

report = darht.evaluate(model.eval(), "digits", out=folder, tier="quick", limit=64, eps=32)
for score in report.scores:
    low, high = score.interval
    print(f"{score.name:24} {score.accuracy:5.1f} %  ({low:.0f} - {high:.0f}, {score.count} images)")
print("gradients mislead the attacks" if not report.masking.passed else "no sign of gradient masking")
print(f"written to {report.page}")
