"""Time, memory and gradient error of the linear distillation loss against what else is in use, in one process.

    python benchmarks/linear_loss.py --shape 1024,768,768,30522 --plot docs/images/linear_loss.png
    pip install --no-deps --target /tmp/liger liger-kernel==0.8.5     # then also: --liger /tmp/liger
    pip install --no-deps --target /tmp/orda orda-kernel==0.1.0       # then also: --losses --orda /tmp/orda
    python benchmarks/linear_loss.py --losses --shape 4096,256,256,128256 --pad 0

The variants alternate, one call each per round, so that a busy machine slows all alike; read the ratios. A call is
forward and backward. The floor is the four matrix products alone, in chunks, into buffers made beforehand. Errors are
relative to float64 on the same inputs. With `--losses` each loss on logits stands beside the KL, and beside the same
one of others, with the distance of their values. The plot needs the extra `plots`; `--device cuda` was never run.
"""

import argparse
import ctypes
import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear
from torch.utils.checkpoint import checkpoint

from glmd.losses.head import Head
from glmd.losses.linear import chunk_tokens, linear_distillation_loss
from glmd.losses.logits import LOGIT_LOSSES
from glmd.losses.rows import BLOCK_ROWS, EagerRows, LossSpec

TEMPERATURE = 15.0
NAIVE = "usual code: full logits, mask at the end"


@dataclass(frozen=True)
class Inputs:
    """One batch; the logits of the two models have standard deviation 3 and differ by 1."""

    student_hidden: Tensor  # (N, H)
    student_weight: Tensor  # (K, H)
    teacher_hidden: Tensor  # (N, H of the teacher)
    teacher_weight: Tensor  # (K, H of the teacher)
    mask: Tensor  # (N,) 1.0 for a token, 0.0 for padding

    def to(self, dtype: torch.dtype, teacher: torch.dtype | None = None) -> "Inputs":
        """Fresh leaves; the student's require a gradient."""
        dtypes = (dtype, dtype, teacher or dtype, teacher or dtype, dtype)
        tensors = [x.detach().to(each, copy=True) for x, each in zip(vars(self).values(), dtypes, strict=True)]
        return Inputs(tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:])

    def without_pads(self) -> tuple[Tensor, Tensor]:
        """Hidden states of student and teacher at the tokens."""
        kept = self.mask.bool()
        return self.student_hidden[kept], self.teacher_hidden[kept]

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.student_hidden.grad is not None
        assert self.student_weight.grad is not None
        return self.student_hidden.grad, self.student_weight.grad


def make_inputs(n: int, student_size: int, teacher_size: int, k: int, pad: float, device: str) -> Inputs:
    """Hidden states share a common part, so that the student resembles its teacher as one in training does."""
    source = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    shared = min(student_size, teacher_size)
    common_hidden, common_weight = randn(n, shared), randn(k, shared)

    def model(size: int) -> tuple[Tensor, Tensor]:
        hidden = torch.cat([common_hidden, randn(n, size - shared)], dim=1) + 0.2 * randn(n, size)
        weight = torch.cat([common_weight, randn(k, size - shared)], dim=1) + 0.2 * randn(k, size)
        return hidden, weight * 3 / size**0.5

    mask = (torch.arange(n) % 100 >= 100 * pad).float()
    return Inputs(*(x.to(device) for x in (*model(student_size), *model(teacher_size), mask)))


def usual_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """(N,) as it is usually written: softmax and KL in the dtype of the logits."""
    log_q, log_p = (student / TEMPERATURE).log_softmax(-1), (teacher / TEMPERATURE).log_softmax(-1)
    return TEMPERATURE**2 * kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def naive(inputs: Inputs) -> None:
    student = linear(inputs.student_hidden, inputs.student_weight)
    with torch.no_grad():
        teacher = linear(inputs.teacher_hidden, inputs.teacher_weight)
    (usual_kl(student, teacher) * inputs.mask).sum().backward()


def naive_without_pads(inputs: Inputs) -> None:
    student_hidden, teacher_hidden = inputs.without_pads()
    student = linear(student_hidden, inputs.student_weight)
    with torch.no_grad():
        teacher = linear(teacher_hidden, inputs.teacher_weight)
    usual_kl(student, teacher).sum().backward()


def checkpointed(inputs: Inputs) -> None:
    """TRL's pattern: chunks of 256 whose logits are made again in the backward."""

    def chunk_loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return usual_kl(linear(hidden, weight), linear(teacher, teacher_weight)).sum()

    weights = inputs.student_weight, inputs.teacher_weight
    total = inputs.student_weight.new_zeros(())
    for hidden, teacher in zip(*(x.split(256) for x in inputs.without_pads()), strict=True):
        total = total + checkpoint(chunk_loss, hidden, weights[0], teacher, weights[1], use_reentrant=False)
    total.backward()


def liger(inputs: Inputs) -> None:
    """Liger's chunked Jensen-Shannon loss with beta 0, which is the forward KL; not compiled, as TRL calls it."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    student, teacher = inputs.without_pads()
    loss: Any = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=TEMPERATURE, compiled=False, chunk_size=512
    )
    labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    value = loss(student, inputs.student_weight, teacher, inputs.teacher_weight, labels)
    (value * len(student) * TEMPERATURE**2).backward()


def ours(inputs: Inputs) -> None:
    linear_distillation_loss(
        inputs.student_hidden,
        Head(inputs.student_weight),
        inputs.teacher_hidden,
        Head(inputs.teacher_weight),
        token_weights=inputs.mask,
        temperature=TEMPERATURE,
    ).backward()


def autocast(function: Callable[[Inputs], None]) -> Callable[[Inputs], None]:
    def run(inputs: Inputs) -> None:
        with torch.autocast(inputs.mask.device.type, torch.bfloat16):
            function(inputs)

    return run


def products(inputs: Inputs, dtype: torch.dtype) -> Callable[[Inputs], None]:
    """The floor: a function of the four chunked matrix products on the tokens, everything prepared."""
    student, teacher = (x.detach().to(dtype) for x in inputs.without_pads())
    student_weight, teacher_weight = inputs.student_weight.detach().to(dtype), inputs.teacher_weight.to(dtype)
    size = chunk_tokens(len(student), len(student_weight), student.device.type)
    first, second = student.new_empty(2, size, len(student_weight))
    grad_hidden, grad_weight = torch.empty_like(student), torch.empty_like(student_weight)

    def run(_: Inputs) -> None:
        for start in range(0, len(student), size):
            hidden = student[start : start + size]
            n = len(hidden)
            torch.mm(teacher[start : start + n], teacher_weight.t(), out=second[:n])
            torch.mm(hidden, student_weight.t(), out=first[:n])
            torch.mm(first[:n], student_weight, out=grad_hidden[start : start + n])
            torch.mm(first[:n].t(), hidden, out=grad_weight)

    return run


def variants_of(inputs: Inputs) -> dict[str, tuple[Callable[[Inputs], None], str]]:
    """Name -> function, and the dtype of its products."""
    return {
        NAIVE: (naive, "fp32"),
        "the same, padding dropped": (naive_without_pads, "fp32"),
        "checkpointed chunks (TRL's pattern)": (checkpointed, "fp32"),
        "Liger chunked JSD": (liger, "fp32"),
        "glmd": (ours, "fp32"),
        "four products alone, fp32": (products(inputs, torch.float32), "fp32"),
        "usual code under autocast, padding dropped": (autocast(naive_without_pads), "bf16"),
        "Liger chunked JSD under autocast": (autocast(liger), "bf16"),
        "glmd under autocast": (autocast(ours), "bf16"),
        "four products alone, bf16": (products(inputs, torch.bfloat16), "bf16"),
    }


# A frozen teacher is converted once, before the training.
TEACHERS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# On models in bfloat16 only the errors are of interest.
NARROW = {"usual code, padding dropped": naive_without_pads, "Liger chunked JSD": liger, "glmd": ours}


def timed(function: Callable[[Inputs], None], inputs: Inputs, clock: Callable[[], float]) -> float:
    """Milliseconds of one call."""
    start = clock()
    function(inputs)
    if inputs.mask.device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (clock() - start)


def peak_extra_mib(function: Callable[[Inputs], None], inputs: Inputs) -> float | None:
    """Memory a call adds at its peak, gradients included; None where Linux's counters are missing."""
    if inputs.mask.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        began = torch.cuda.memory_allocated()
        function(inputs)
        return (torch.cuda.max_memory_allocated() - began) / 2**20
    return resident_extra_mib(lambda: function(inputs))


def resident_extra_mib(function: Callable[[], None]) -> float | None:
    """Resident memory a call adds at its peak; None where Linux's counters are missing."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def read(name: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])

    ctypes.CDLL(None).malloc_trim(0)  # else what earlier calls freed is used again and not counted
    reset.write_text("5")
    before = read("VmRSS")
    function()
    return (read("VmHWM") - before) / 1024


def exact_gradients(inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """In float64, where the library equals full logits to 1e-9, as its tests hold, for inputs rounded to `dtype`."""
    exact = inputs.to(dtype).to(torch.float64)
    ours(exact)
    return list(exact.gradients)


def relative_errors(inputs: Inputs, exact: list[Tensor]) -> list[float]:
    pairs = zip(inputs.gradients, exact, strict=True)
    return [((ours.double() - twin).norm() / twin.norm()).item() for ours, twin in pairs]


def compare_rows(k: int, rounds: int, clock: Callable[[], float]) -> None:
    """What stands between the products: blocks of rows, the chunk at once, and the same compiled, in bf16."""
    source = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(512, k, generator=source).bfloat16() for _ in range(2))
    task = LossSpec("kl_divergence", TEMPERATURE)

    @torch.compile(dynamic=False)
    def formula(student: Tensor, teacher: Tensor, gradient: Tensor) -> Tensor:
        s, t = student.float() / TEMPERATURE, teacher.float() / TEMPERATURE
        s_sum, t_sum = s.logsumexp(-1, keepdim=True), t.logsumexp(-1, keepdim=True)
        p = (t - t_sum).exp()
        difference = (s - s_sum).exp() - p
        gradient.copy_(TEMPERATURE * difference)
        return TEMPERATURE**2 * (p * (t - s + s_sum - t_sum) + difference).sum(-1)

    def compiled() -> None:
        gradient = torch.empty_like(student)
        for rows in torch.arange(512).split(64):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            formula(student[part], teacher[part], gradient[part])

    def eager(block: int) -> None:
        BLOCK_ROWS["cpu"] = block
        EagerRows(task, student, teacher)(student.clone(), teacher, None)

    start = time.perf_counter()
    compiled()
    seconds = time.perf_counter() - start
    forms = {"blocks of 64 rows": lambda: eager(64), "the chunk of 512 at once": lambda: eager(512)}
    forms["blocks of 64 rows, compiled"] = compiled
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, form in forms.items():
            start = clock()
            form()
            times[name].append((clock() - start) * 1e9 / student.numel())
    print(f"nanoseconds a logit; {seconds:.0f} s to compile")
    for name, values in times.items():
        print(f"| {name} | {median(values[1:]):.2f} |")


LIGER = {"kl_divergence": 0.0, "reverse_kl": 1.0, "js_divergence": 0.5, "generalized_js": 0.3}  # beta
ORDA: dict[str, dict[str, Any]] = {
    "kl_divergence": {"kl_divergence": "forward"},
    "reverse_kl": {"kl_divergence": "reverse"},
    "skew_kl": {"kl_divergence": "skew_forward", "kl_beta": 0.9},
    "skew_reverse_kl": {"kl_divergence": "skew_reverse", "kl_beta": 0.1},
    "alpha_beta": {"kl_divergence": "abkd", "kl_alpha": 0.2, "kl_beta": 0.7},
    "decoupled_kd": {"kl_divergence": "dkd", "kl_alpha": 1.0, "kl_beta": 8.0},
}
OPTIONS: dict[str, dict[str, Any]] = {"generalized_js": {"beta": 0.3}, "taid": {"progress": 0.5}}


def losses_of(inputs: Inputs, has_liger: bool, has_orda: bool) -> dict[str, Callable[[Inputs], Tensor]]:
    """Name -> function of the sum of a loss over tokens, all of which count."""
    found: dict[str, Callable[[Inputs], Tensor]] = {}
    for name, plain in LOGIT_LOSSES.items():
        options = OPTIONS.get(name, {})
        temperature = TEMPERATURE if "temperature" in inspect.signature(plain).parameters else 1.0
        found[name] = partial(our_loss, loss=name, temperature=temperature, options=options)
        if has_liger and name in LIGER:
            found[f"{name}, Liger"] = partial(liger_loss, beta=LIGER[name])
        if has_orda and name in ORDA:
            labels = torch.cat([(h @ inputs.teacher_weight.t()).argmax(-1) for h in inputs.teacher_hidden.split(256)])
            found[f"{name}, orda"] = partial(orda_loss, labels=labels, options=ORDA[name])
    return found


def our_loss(inputs: Inputs, **given: Any) -> Tensor:
    student, teacher = Head(inputs.student_weight), Head(inputs.teacher_weight)
    return linear_distillation_loss(inputs.student_hidden, student, inputs.teacher_hidden, teacher, **given)


def liger_loss(inputs: Inputs, *, beta: float) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    given = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "compiled": False, "chunk_size": 512}
    loss: Any = LigerFusedLinearJSDLoss(beta=beta, temperature=TEMPERATURE, **given)
    hidden, labels = inputs.student_hidden, torch.zeros(len(inputs.mask), dtype=torch.int64, device=inputs.mask.device)
    value = loss(hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight, labels)
    return value * len(labels) * TEMPERATURE**2


def orda_loss(inputs: Inputs, *, labels: Tensor, options: dict[str, Any]) -> Tensor:
    """On a CPU it holds whole logits; its kernels are for CUDA, where it was never measured."""
    from orda_kernel import SeparateTeacher, distillation_loss

    weights = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0, "kl_temperature": TEMPERATURE}
    teacher = SeparateTeacher(inputs.teacher_hidden, inputs.teacher_weight)
    found = distillation_loss(
        inputs.student_hidden, inputs.student_weight, labels, teacher, reduction="sum", **weights, **options
    )
    return found.loss


def compare_losses(inputs: Inputs, variants: dict[str, Callable[[Inputs], Tensor]], rounds: int, clock: Any) -> None:
    """Each loss's time and memory beside those of the KL, and of the same loss of others how far its value is away."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    values, peaks = {}, {}
    for i in range(rounds + 1):  # the first round warms up and is not counted
        for name, loss in variants.items():

            def call(given: Inputs, name: str = name, loss: Callable[[Inputs], Tensor] = loss) -> None:
                value = loss(given)
                value.backward()
                values[name] = value.item()

            if i == 0:
                peaks[name] = peak_extra_mib(call, inputs.to(torch.float32))
            else:
                times[name].append(timed(call, inputs.to(torch.float32), clock))
        print(f"round {i}", file=sys.stderr)
    kl = median(times["kl_divergence"])
    print("| loss | ms | time / KL | peak MiB | relative distance of the value |\n|---|---|---|---|---|")
    for name in variants:
        ours, peak = values[name.partition(",")[0]], peaks[name]
        apart = f"{abs(values[name] / ours - 1):.0e}" if "," in name else ""
        row = [name, f"{median(times[name]):.0f}", f"{median(times[name]) / kl:.2f}", f"{peak or 0:.0f}", apart]
        print("| " + " | ".join(row) + " |")


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Speed over the usual code, with the gradient's error beside each bar."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["errors"]][::-1]
    figure = Figure(figsize=(8, 0.36 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    colors = ["#1b6ca8" if row["name"].startswith("glmd") else "#b8b8b8" for row in shown]
    axes.barh([row["name"] for row in shown], [row["speed"] for row in shown], color=colors)
    for i, row in enumerate(shown):
        worst = max(row["errors"])
        color = "#c0392b" if worst > 0.02 else "#333333"
        axes.text(row["speed"] + 0.05, i, f"{row['speed']:.1f}x, gradient error {worst:.0e}", va="center", color=color)
    axes.set_xlim(0, 1.6 * max(row["speed"] for row in shown))
    axes.set_xlabel("speed over the usual code")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=72)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1024,384,384,15261", help="tokens,student size,teacher size,words")
    parser.add_argument("--pad", type=float, default=0.3, help="share of padding")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="the process's own time, where others use the machine")
    parser.add_argument("--liger", type=Path, help="folder with liger-kernel, if it is to be measured")
    parser.add_argument("--orda", type=Path, help="folder with orda-kernel, if it is to be measured among the losses")
    parser.add_argument(
        "--losses", action="store_true", help="only compare losses with the KL, and with those of others"
    )
    parser.add_argument("--plot", type=Path, help="file for the picture, .png or .svg")
    parser.add_argument("--rows", action="store_true", help="only compare forms of what stands between the products")
    arguments = parser.parse_args()
    sys.path += [str(each) for each in (arguments.liger, arguments.orda) if each is not None]
    n, student_size, teacher_size, k = (int(x) for x in arguments.shape.split(","))
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.rows:
        compare_rows(k, arguments.rounds, clock)
        return
    inputs = make_inputs(n, student_size, teacher_size, k, arguments.pad, arguments.device)
    if arguments.losses:
        losses = losses_of(inputs, arguments.liger is not None, arguments.orda is not None)
        compare_losses(inputs, losses, arguments.rounds, clock)
        return
    variants = variants_of(inputs)
    if arguments.liger is None:
        variants = {name: each for name, each in variants.items() if "Liger" not in name}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(arguments.rounds + 1):  # the first round warms up and is not counted
        for name, (function, dtype) in variants.items():
            times[name].append(timed(function, inputs.to(torch.float32, TEACHERS[dtype]), clock))
        print(f"round {i}: { ({name: round(each[-1]) for name, each in times.items()}) }", file=sys.stderr)
    ms = {name: median(values[1:]) for name, values in times.items()}
    exact, rows = exact_gradients(inputs, torch.float32), []
    for name, (function, dtype) in variants.items():
        fresh = inputs.to(torch.float32, TEACHERS[dtype])
        peak = peak_extra_mib(function, fresh)
        errors = [] if "alone" in name else relative_errors(fresh, exact)
        row = {"name": name, "ms": ms[name], "speed": ms[NAIVE] / ms[name], "peak": peak, "errors": errors}
        rows.append(row | {"floor": ms[name] / ms[f"four products alone, {dtype}"]})
    shape = f"N, H, H of the teacher, K = {arguments.shape}"
    print(f"{shape}; {int(inputs.mask.sum())} tokens; T = {TEMPERATURE:g};")
    threads = f"{torch.get_num_threads()} threads"
    print(f"median of {arguments.rounds} rounds of {clock.__name__}; torch {torch.__version__}, {threads}\n")
    print("| variant | ms | speed over the first | time / its four products | peak MiB | error: hidden | weight |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["name"], f"{row['ms']:.0f}", f"{row['speed']:.2f}", f"{row['floor']:.2f}"]
        cells += ["" if row["peak"] is None or not row["errors"] else f"{row['peak']:.0f}"]
        cells += [f"{x:.0e}" for x in row["errors"]] or ["", ""]
        print("| " + " | ".join(cells) + " |")
    print("\n| on models in bf16 | error: hidden | weight |\n|---|---|---|")
    exact = exact_gradients(inputs, torch.bfloat16)
    for name, function in NARROW.items():
        if arguments.liger is not None or "Liger" not in name:
            fresh = inputs.to(torch.bfloat16)
            function(fresh)
            print("| " + " | ".join([name, *(f"{x:.0e}" for x in relative_errors(fresh, exact))]) + " |")
    if arguments.plot is not None:
        plot(rows, f"N, H, H, K = {arguments.shape}, {arguments.pad:.0%} padding", arguments.plot)


if __name__ == "__main__":
    main()
