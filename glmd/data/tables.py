"""The rows of a task's split, wherever they lie: official files, the hub's Parquet in a folder, the hub itself.

    found = open_split("superglue/", "val", Place("RTE", folder="RTE", hub_name="rte"))
    for where, row in found.rows:
        ...

A folder may be the official zip's (RTE/train.jsonl, AX-b/AX-b.jsonl), a copy of the hub's data set
(rte/validation-00000-of-00001.parquet), the folder of one task, or a folder around one of these.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from glmd.data.delimited import Delimited, open_delimited
from glmd.data.jsonl import read_jsonl
from glmd.errors import DataError

Split = Literal["train", "val", "test"]
Located = tuple[str, dict[str, Any]]  # where a row stands, to name in a refusal, and the row
HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}
# As the official zip, the hub and `datasets` name them.
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}
TEXT_SUFFIXES = (".csv", ".tsv")
ROW_SUFFIXES = (".jsonl", *TEXT_SUFFIXES, ".parquet")
READ_FROM = f"rows are read from {', '.join(ROW_SUFFIXES[:-1])} and {ROW_SUFFIXES[-1]} files"
LISTED = 12  # names in a message


@dataclass(frozen=True)
class Place:
    """Under which names a task lies in a folder and on the hub."""

    task: str
    folder: str | None = None  # None: the task's name
    hub_name: str | None = None
    val_name: str | None = None  # of its validation split, where that has a name of its own

    def split_names(self, split: Split) -> tuple[str, ...]:
        """What the files of a split may be called."""
        return (self.val_name,) if split == "val" and self.val_name else SPLIT_NAMES[split]

    @property
    def folder_name(self) -> str:
        return self.folder or self.task

    @property
    def names(self) -> tuple[str, ...]:
        """What its folder may be called, the likeliest first."""
        return tuple(dict.fromkeys([self.folder_name, self.hub_name or self.task, self.task]))


@dataclass(frozen=True)
class Found:
    """Rows, one at a time.

    is_table: whether they have columns of one type each, where labels are class numbers.
    class_names: for a column of class numbers, the names that the file gives them.
    texts: the file, where all that stands in its rows is text, labels and numbers too.
    """

    rows: Iterator[Located]
    is_table: bool = False
    class_names: dict[str, list[str]] = field(default_factory=dict)
    texts: Delimited | None = None


def open_split(source: str, split: Split, place: Place) -> Found:
    """The rows of a split of a task.

    source: a folder, one .jsonl, .csv, .tsv or .parquet file whatever its name, or a data set of the hub, `owner/name`
        or `owner/name:config`, of the place's hub_name unless a config is given.
    Raises DataError naming the source and what would work.
    """
    path = Path(os.path.expanduser(source))
    if source.strip() and path.is_dir():
        return _read_files(split_files(path, split, place))
    if path.suffix.lower() in ROW_SUFFIXES:
        return _read_files([path])
    instead = f"give a folder that holds {place.folder_name}/{split}.jsonl"
    instead += ", or a data set of the hub: aps/super_glue, nyu-mll/glue" if place.hub_name else ""
    if source.strip() and path.is_file():
        raise DataError(
            f"{source}: {READ_FROM}, not from {path.suffix or 'others'}; unpack or convert it, or {instead}"
        )
    # `data/superglue` beside an existing `data` is a mistyped path and no owner on the hub.
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", source) or path.parent.exists():
        shown = source if source.strip() else repr(source)
        raise DataError(f"{shown}: no such folder, nor a file of rows; {instead}")
    return _read_hub(source, split, place)


def split_files(folder: Path, split: Split, place: Place) -> list[Path]:
    """The files of a split in a folder. Raises DataError where there is none, and where several places hold one."""
    for inside in (*_named(folder, place), folder):
        if files := _files_of(inside, split, place):
            return files
    around = [child for child in _folders(folder) if _named(child, place)]
    if len(around) > 1:  # also where only one has this split: another split would come from another collection
        places = ", ".join(map(str, around[:LISTED]))
        raise DataError(f"{folder}: {place.task} lies in several places ({places}); give one of them")
    if around and not _named(folder, place):
        return split_files(around[0], split, place)
    inside = next(iter(_named(folder, place)), folder)
    names = sorted(each.name for each in inside.iterdir())
    hint = "" if place.folder else "; the key folder in the task's YAML names its subfolder, where that is not its name"
    raise DataError(
        f"{folder / place.folder_name / f'{split}.jsonl'}: no such file; "
        f"{inside} holds {', '.join(names[:LISTED]) or 'nothing'}{hint}"
    )


def _folders(folder: Path) -> list[Path]:
    """Subfolders by name; __MACOSX and hidden ones hold nobody's rows."""
    try:
        return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith((".", "__")))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None


def _named(folder: Path, place: Place) -> list[Path]:
    """Subfolders with one of the task's names; those that are spelled in another case come last."""
    by_name = {each.name: each for each in _folders(folder)}
    exact = [by_name[name] for name in place.names if name in by_name]
    folded = {name.casefold() for name in place.names}
    return exact + [each for name, each in by_name.items() if name.casefold() in folded and each not in exact]


def _files_of(folder: Path, split: Split, place: Place) -> list[Path]:
    for name in place.split_names(split):
        for suffix in (".jsonl", *TEXT_SUFFIXES):
            if (folder / f"{name}{suffix}").is_file():
                return [folder / f"{name}{suffix}"]
    if split == "test":  # the diagnostics' only file bears the task's name: AX-b/AX-b.jsonl
        folded = {name.casefold() for name in place.names}
        alone = [each for each in sorted(folder.glob("*.jsonl")) if each.stem.casefold() in folded]
        if alone:
            return alone[:1]
    names = place.split_names(split)
    return _parquet_files(folder, split, names) or _parquet_files(folder / "data", split, names)


def _parquet_files(folder: Path, split: Split, names: tuple[str, ...]) -> list[Path]:
    """train-00000-of-00001.parquet, super_glue-train.parquet, train/0000.parquet: all parts, in order."""
    named = re.compile(rf"(.*[-_.])?({'|'.join(map(re.escape, names))})([-_.].*)?")
    files = sorted(each for each in folder.glob("*.parquet") if named.fullmatch(each.stem))
    for name in names:
        files = files or sorted((folder / name).glob("*.parquet"))
    parts = [re.search(r"-\d{5}-of-(\d{5})", each.stem) for each in files]
    for part in parts:
        if part is not None and int(part[1]) != len(files):
            raise DataError(f"{files[0].parent}: {len(files)} of {int(part[1])} Parquet files of {split} are there")
    return files


def _read_files(files: list[Path]) -> Found:
    if files[0].suffix.lower() in TEXT_SUFFIXES:
        table = open_delimited(files[0])  # of a split there is one
        return Found(((f"{table.path}:{line}", row) for line, row in table.rows()), texts=table)
    if files[0].suffix.lower() == ".jsonl":
        return Found((f"{path}:{line}", row) for path in files for line, row in read_jsonl(path))
    return Found(parquet_rows(files), is_table=True, class_names=_class_names(files[0]))


def parquet_rows(files: Iterable[Path]) -> Iterator[Located]:
    """The rows of Parquet files, in order. Raises DataError for what cannot be read as such."""
    for path in files:
        number = 0
        try:
            for batch in _open_parquet(path).iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
        except (OSError, ValueError) as error:  # Arrow's errors are of these kinds
            raise _not_parquet(path, error) from None


def _class_names(path: Path) -> dict[str, list[str]]:
    """Column -> names of its class numbers, as `datasets` writes them into a Parquet file."""
    try:
        written = (_open_parquet(path).schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        features = json.loads(written).get("info", {}).get("features", {})
    except (OSError, ValueError) as error:
        raise _not_parquet(path, error) from None
    # Of a list of class numbers the names are those of what it lists.
    inner = {
        column: each.get("feature", each) if isinstance(each, dict) else each[0] if isinstance(each, list) else each
        for column, each in features.items()
        if each
    }
    return {column: each["names"] for column, each in inner.items() if isinstance(each, dict) and "names" in each}


def _open_parquet(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile  # comes with datasets

    return ParquetFile(path)


def _not_parquet(path: Path, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [""])[0][:120]
    return DataError(f"{path}: cannot be read as Parquet ({reason}); fetch the file again")


def _read_hub(source: str, split: Split, place: Place) -> Found:
    name, _, config = source.partition(":")
    hub_split = place.val_name if split == "val" and place.val_name else HUB_SPLITS[split]
    wanted = config or place.hub_name
    shown = " ".join(filter(None, (wanted, hub_split)))
    try:
        from datasets import load_dataset

        rows = load_dataset(name, wanted, split=hub_split)
    except Exception as error:  # whatever the hub's client raises, the remedy is the same
        reason = (str(error).splitlines() or [""])[0][:200]
        of_several = "" if wanted else f"; {name}:CONFIG names one of several configs"
        raise DataError(
            f"{name}: no such folder, and the hub gave no {shown} ({type(error).__name__}: {reason}){of_several}; "
            f"give a folder that holds {place.folder_name}/{{train,val,test}}.jsonl"
        ) from error
    inner = {column: getattr(each, "feature", each) for column, each in rows.features.items()}
    names = {column: each.names for column, each in inner.items() if getattr(each, "names", None)}
    located = ((f"{name} {shown} row {number}", row) for number, row in enumerate(rows, start=1))
    return Found(located, is_table=True, class_names=names)
