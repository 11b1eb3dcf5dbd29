"""What choosing a vocabulary reads of a teacher: its one matrix of embeddings, or the whole model in float32 for it.

    python benchmarks/embeddings.py MODEL        # a folder; each way in a process of its own, twice, alternating

Prints seconds and the largest memory beyond that of the imports, and that both found the same.
"""

import resource
import subprocess
import sys
import time

from glmd.config import TeacherConfig
from glmd.models.loading import compared_embeddings, language_model_class, load_language_model, load_model_config
from glmd.models.weight_headers import stored_embeddings


def main() -> None:
    (model,) = sys.argv[1:]
    for way in ("whole model", "its embeddings") * 2:
        done = subprocess.run([sys.executable, __file__, model, way], capture_output=True, text=True, check=True)
        print(f"{way}: {done.stdout.strip()}")


def read(model: str, way: str) -> None:
    teacher = TeacherConfig(model, dtype="float32")
    language_model_class(load_model_config(model))  # imports
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if way == "whole model":
        found = compared_embeddings(load_language_model(teacher), "input").detach()
    else:
        found, _ = stored_embeddings(teacher, "input")
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{seconds:.1f} s, {peak / 1024:.0f} MiB; sum {found.double().sum():.6f}")


if __name__ == "__main__":
    main() if len(sys.argv) == 2 else read(*sys.argv[1:])
