"""Attack a model of one's own with PGD and Square, on digits: `python examples/attack_a_model.py`, seconds on a CPU."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from darht.attacks import PGD, Engine, RowRng, Square

images, labels = load_digits(return_X_y=True)
levels = (images.reshape(-1, 1, 8, 8) * 255 / 16).round()  # whole pixel levels, as an 8-bit picture has
x = torch.tensor(levels / 255, dtype=torch.float32).repeat(1, 3, 1, 1)
y = torch.tensor(labels)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(100):
    optimizer.zero_grad()
    F.cross_entropy(model(x[:1500]), y[:1500]).backward()
    optimizer.step()
model.eval()

test = slice(1500, 1700)
rows = torch.arange(1797)[test]
for name, attack in {"PGD": PGD(eps=32, step=8, steps=20), "Square": Square(eps=32, queries=200)}.items():
    generator = RowRng.create(0, name, rows=rows)  # keyed by row: no batch changes what a row draws
    outcome = Engine().run(attack, model, x[test], y[test], generator=generator)
    clean = outcome.clean_correct.float().mean()
    print(f"{name} at 32/255: {clean:.1%} right when clean, {outcome.robust_accuracy:.1%} withstand")
