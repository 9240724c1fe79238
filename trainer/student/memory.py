"""What single-step training carries between steps beside the student: where rows start."""

from darht.trainer.student.single_step import LabelPatterns
from darht.trainer.student.warm import WarmMemory

Memory = WarmMemory | LabelPatterns
