"""What the command line takes: each command's options, with the checks of single values."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from glmd.version import __version__

Command = Callable[[argparse.Namespace], None]


def build_parser(functions: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of `glmd`. functions: name of a command -> what runs it, which its options have as `command`."""
    parser = argparse.ArgumentParser(
        prog="glmd",
        description="Distill a large Hugging Face language model into a small one, weights and vocabulary.",
    )
    parser.add_argument("--version", action="version", version=f"glmd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=functions[name])
        return command

    for name, text in (
        ("run", "Run a whole distillation; continue it where it was interrupted."),
        ("compare", "Run several methods under matched conditions, and their controls, into one table."),
        ("check", "Refuse what can be refused and print the plan; train nothing."),
        ("plan", "Say what a run will take: memory of a device, disk, FLOPs, tokens, time; read no weights."),
        ("cache", "Make a run's teacher.cache ahead of it, for this and other students."),
    ):
        command = add(name, text)
        command.add_argument(
            "config", nargs="?", help="a YAML file or the name of one in configs/runs (default: quickstart)"
        )
        command.add_argument("overrides", nargs="*", metavar="key=value", help="for example pretraining.max_steps=1000")
        if name in ("run", "check", "plan"):
            _add_flags(command.add_argument_group("in place of a YAML, for a task of one's own"))
        if name == "plan":
            command.add_argument("--devices", type=_positive, default=1, help="that train together (default: 1)")
            command.add_argument(
                "--device-memory", type=_gigabytes, metavar="GB", help="of a GPU (default: what this machine has)"
            )
            command.add_argument(
                "--sharding",
                default="none",
                choices=("none", "fsdp"),
                help="fsdp: split student and teacher over the devices",
            )
            command.add_argument("--measure", action="store_true", help="time the steps on this machine")
            command.add_argument("--json", action="store_true", help="for programs: bytes and seconds")

    command = add("init-task", "Look at a file of texts and labels, and write the YAML of its task beside it.")
    command.add_argument("file", type=Path, help="csv, tsv, jsonl or Parquet")
    command.add_argument("--text", metavar="COLUMN", help="that is read (default: a guess)")
    command.add_argument("--text-pair", metavar="COLUMN", help="of a second text (default: none)")
    command.add_argument("--label", action="append", metavar="COLUMN", help="of the answers (default: a guess)")
    command.add_argument("--problem-type", help="regression, ... (default: one label, or as lists show)")

    command = add("compress", "Give a model a smaller vocabulary, without training.")
    command.add_argument("model", help="local folder or hub id, with any head")
    command.add_argument("output", type=Path, help="folder to write")
    command.add_argument("--corpus", nargs="+", required=True, help="text or jsonl files, folders, or a data set's id")
    command.add_argument("--keep-ratio", type=float, help="share of the tokens to keep, in (0, 1]")
    command.add_argument("--size", type=_positive, help="or their number")
    command.add_argument(
        "--multiple-of", type=_positive, help="round the number up to a multiple; that of a ratio to 64 by itself"
    )
    command.add_argument("--selection", default="closed", choices=("closed", "free"), help="of merged tokens (BPE)")
    command.add_argument("--mapping", default="inner_product", choices=("inner_product", "cosine", "euclidean", "unk"))
    command.add_argument("--within-class", action="store_true", help="map beginnings of words onto such only")
    command.add_argument("--similarity", default="input", choices=("input", "output"), help="embeddings to map by")
    command.add_argument("--keep-words", nargs="*", default=[], metavar="WORD", help="words that must stay")
    command.add_argument("--keep-words-file", metavar="FILE", help="more of them, one on each line")
    command.add_argument("--corpus-weights", type=float, nargs="*", default=[], metavar="SHARE", help="of each corpus")
    command.add_argument("--text-field", default="text", help="field of jsonl rows")
    command.add_argument("--messages-field", metavar="FIELD", help="in its place, of rows that hold conversations")

    command = add("convert-glm", "Make a model folder of a published GLM checkpoint.")
    command.add_argument("checkpoint", type=Path, help="mp_rank_00_model_states.pt, its folder, or one of the hub's")
    command.add_argument("output", type=Path, help="folder to write")
    command.add_argument(
        "--tokenizer", required=True, help="folder or hub id of what it was trained with: bert-base-uncased, gpt2, ..."
    )
    command.add_argument("--size", help="refuse the checkpoint unless it is of this size: 110M, 340M, 2B or 10B")
    command.add_argument("--num-attention-heads", type=_positive, help="default: heads of 64, as all published have")

    task_help = "a task of SuperGLUE or GLUE, or a YAML of your own (default: what the model's card tells)"
    command = add("evaluate", "Score a model, stock or distilled, on a task, on text, or by what it says to prompts.")
    command.add_argument("model", help="folder or hub id of a task model, a masked or a causal LM")
    command.add_argument("--task", help=task_help)
    command.add_argument(
        "--data", help="for --task: a SuperGLUE folder, a jsonl, csv, tsv or Parquet file, or a data set's id"
    )
    command.add_argument("--split", choices=("train", "val", "test"), help="of --data (default: val)")
    command.add_argument("--batch-size", type=_positive, help="for --task (default: 64) and --references (16)")
    command.add_argument("--text", nargs="+", help="in place of a task: files to measure bits per byte on")
    command.add_argument(
        "--references", metavar="FILE", help="or prompts and what a language model should say to them: jsonl or Parquet"
    )
    command.add_argument(
        "--messages-field", metavar="FIELD", help="for --text and --references: of rows that hold conversations"
    )
    command.add_argument("--max-new-tokens", type=_positive, help="for --references: of a text at most (default: 128)")
    command.add_argument("--rouge", action="store_true", default=None, help="for --references: beside exact match")
    command.add_argument("--output", type=Path, help="for --references: a jsonl to write the texts into")
    command.add_argument("--max-length", type=_length, help="tokens, at least 8 (default: the task's; for text 1024)")

    command.add_argument(
        "--tokenizer", choices=("mapped", "stock"), help="for --task (default: mapped); stock: text as without glmd"
    )

    command = add("predict", "Write a task model's answers beside the rows of a file, or in the leaderboard's form.")
    command.add_argument(
        "model", help="folder or hub id of a classifier, a multiple-choice model, a masked or a causal LM"
    )
    command.add_argument("--task", help=task_help)
    command.add_argument("--text", metavar="COLUMN", help="in place of a task: what a classifier reads")
    command.add_argument("--text-pair", metavar="COLUMN", help="and the column of a second text")
    command.add_argument("--max-length", type=_length, help="tokens, at least 8 (default: the task's)")
    command.add_argument("--batch-size", type=_positive, default=64)
    command.add_argument(
        "--file",
        required=True,
        help="jsonl in the official form, csv, tsv, or the hub's Parquet; labels are not needed",
    )
    command.add_argument(
        "--output",
        type=Path,
        help="file to write: jsonl, or of a csv or tsv its rows with the answers (default: FILE.predicted.csv)",
    )

    command = add("vocab", "Show what each keep ratio covers and saves, to choose one by.")
    command.add_argument("corpus", nargs="+", help="text or jsonl files, folders, or a data set's id")
    command.add_argument("--teacher", required=True, help="local folder or hub id, with any head")
    command.add_argument("--keep-ratios", type=float, nargs="+", help="default: 0.05 to 1")
    command.add_argument("--selection", default="closed", choices=("closed", "free"), help="of merged tokens (BPE)")
    command.add_argument("--mapping", default="inner_product", choices=("inner_product", "cosine", "euclidean", "unk"))
    command.add_argument("--examples", type=_positive, help="show where so many dropped tokens go, at the knee")
    command.add_argument("--text-field", default="text", help="field of jsonl rows")
    command.add_argument("--json", type=Path, help="write the curve to this file too")
    command.add_argument("--picture", type=Path, help="draw it into this .png, .svg or .pdf (needs matplotlib)")

    command = add("verify", "Check a model folder from weights to tokenizer files; exit code 1 if it fails.")
    command.add_argument("folder", type=Path, help="an exported student, or any folder of a model and its tokenizer")

    command = add("export", "Write a stage's newest checkpoint, or a student in another form, as a model folder.")
    command.add_argument("source", type=Path, help="a stage of a run (runs/NAME/pretraining), or a student's folder")
    command.add_argument("output", type=Path, help="folder to write")
    command.add_argument(
        "--kind",
        default="mapped",
        choices=("mapped", "stock", "expanded"),
        help="stock: the stock tokenizer alone; expanded: the source's tokenizer and rows, for models that predict "
        "no words",
    )

    command = add("report", "Print the results of a finished run, or of several as one table.")
    command.add_argument("runs", nargs="+", type=Path, metavar="run", help="run folder, or that of a comparison")
    command.add_argument("--reference", metavar="NAME", help="of several: whose difference to each is shown")
    command.add_argument(
        "--format", choices=("markdown", "latex", "csv", "json"), help="of several, or a comparison (default: markdown)"
    )
    command.add_argument("--picture", type=Path, help="of several: draw it into this .png, .svg or .pdf")
    return parser


def _add_flags(group: argparse._ArgumentGroup) -> None:
    """The options of `glmd.commands.own_data.Flags`."""
    group.add_argument(
        "--teacher", metavar="MODEL", help="fine-tuned on the task (default: --base is, here), or a sentence encoder"
    )
    group.add_argument("--base", metavar="MODEL", help="the language model that it was made from")
    group.add_argument(
        "--data", metavar="FILE", help="rows to learn from: csv, tsv, jsonl, Parquet, txt of sentences, a data set's id"
    )
    group.add_argument("--text", metavar="COLUMN", help="that the model reads")
    group.add_argument("--text-pair", metavar="COLUMN", help="of a second text")
    # Not several words behind one option, which would take the keys that follow too.
    group.add_argument("--label", action="append", metavar="COLUMN", help="of the answers; or of 0 and 1, one by one")
    group.add_argument("--problem-type", help="regression, ... (default: as --teacher says, else as the rows show)")
    group.add_argument("--val", metavar="FILE", help="rows to score by (default: a tenth of --data is held out)")
    group.add_argument("--corpus", action="append", metavar="FILE", help="text to learn words from, with --base")
    group.add_argument("--layers", type=_positive, help="of the student (default: half of the teacher's)")
    group.add_argument("--keep-ratio", type=float, help="share of the teacher's tokens (default: 0.5)")
    group.add_argument("--output", metavar="FOLDER", help="of the run (default: runs/ and the name of --data)")


def _positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _gigabytes(text: str) -> float:
    """An argument in GB, as bytes."""
    try:
        size = float(text)
    except ValueError:
        size = 0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GB above 0")
    return size * 1e9


def _length(text: str) -> int:
    """An argument that is a length in tokens."""
    if _positive(text) < 8:
        raise argparse.ArgumentTypeError(f"{text} tokens leave no room for text; give at least 8")
    return int(text)
