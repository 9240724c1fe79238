"""The page of `bench/trainer.py`."""

import argparse
import datetime
import os
import platform
from pathlib import Path

import torch


def page(beside: list[str], live: list[str], arguments: argparse.Namespace, seconds: float) -> str:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())  # fmt: skip
    first, second = "\n".join(beside), "\n".join(live)
    smoke = " --smoke, whose tiny networks say nothing" if arguments.smoke else ""
    return f"""# Benchmarks of the trainer

`python bench/trainer.py`{smoke}, {datetime.date.today().isoformat()}, {os.cpu_count()} cores of {model}, \
{torch.get_num_threads()} threads, torch {torch.__version__.split("+")[0]}, {seconds:.0f} s.

## Beside the bare step

Recipe `darht` with four teachers in the cache, CE and the weighted distances all the time, half of the batches clean as
released; 32x32 pixels. A bare step is forward, loss, backward and optimizer of an identical student on tensors that lie
ready; one is made after every step of the loop, and "loop / bare" is the median of the quotients, "on adversarial" that
of the adversarial steps. To reach: 1.05 for `cached`. The columns behind say where a step of the loop spends its
milliseconds; `draw` fetches images and logits, and holds the student's own steps for `warm` and `pgd:10`. What ends an
epoch (scoring held-out rows, checkpoints) is no part of a step.

{first}

## Beside live teachers

ResNet-18 as released. Live: whole steps of {arguments.batch} images, half of the steps clean, PGD-10 on the student in
the others, and every teacher asked once about each image; the teachers have random weights, the ViTs see images scaled
to 224 pixels. A whole epoch is out of reach here: what is compared is the mean time per training image, which is what
an epoch costs but for its number of images. From the cache: the loop's own steps above. Its cache was built with four
tiny teachers: what training reads of a cache depends on their number alone. RSLAD attacks every batch and asks one
teacher about the clean images; its `pgd:10` is the live step without the teacher, its `warm` has one step on the
student.

{second}
"""
