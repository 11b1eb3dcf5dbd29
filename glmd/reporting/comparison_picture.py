"""A comparison as a picture: a dot for each system, and how sure its distance from the reference is."""

from collections.abc import Callable
from pathlib import Path

from glmd.errors import ConfigError
from glmd.reporting.comparison import Comparison, Difference, Mean, Row, line
from glmd.reporting.comparison_tables import INTERVALS, intervals

MOST_PANELS = 4  # tasks that have one each
LONGEST_NAME = 48
COLORS = {"method": "tab:blue", "control": "tab:orange", "teacher": "tab:green", "constant": "tab:gray"}
MARKERS = {"method": "o", "control": "s", "teacher": "^", "constant": "x"}


def draw(c: Comparison, path: Path) -> None:
    """A picture of the averages, and of the tasks where they are few: a dot for each system, the best one on top.

    A bar is the interval of the difference, laid around the reference's score; where no system has one, the standard
    deviation over seeds. Systems without an average are left out.
    Raises ConfigError without matplotlib, with nothing to draw, or for a kind of file it does not write.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise ConfigError("a picture needs matplotlib; pip install 'glmd[plots]', or leave it out") from None
    rows = sorted((row for row in c.rows if row.average), key=lambda row: row.average.mean if row.average else 0.0)
    if not rows:
        raise ConfigError("a picture needs a system with a score on every task of the reference; there is none")
    panels: list[tuple[str, Callable[[Row], tuple[Mean | None, Difference | None]]]] = [
        ("average", lambda row: (row.average, row.difference))
    ]
    if 1 < len(c.tasks) <= MOST_PANELS:
        panels += [(task, _panel_of(task)) for task in c.tasks]
    size = (4.2 + 2.6 * len(panels), 1.6 + 0.26 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    kind = next(iter(intervals(c)), "")
    for axis, (title, of_row) in zip(axes, panels, strict=True):
        base = next((of_row(row)[0] for row in c.rows if row.system.name == c.reference), None)
        if base:
            axis.axvline(base.mean, color="black", linewidth=0.8, linestyle="--", zorder=1)
        for height, row in enumerate(rows):
            mean, difference = of_row(row)
            if mean is None:
                continue
            color, marker = COLORS[row.system.kind], MARKERS[row.system.kind]
            if bar := _bar(kind, mean, base, difference if row.system.name != c.reference else None):
                axis.plot(bar, [height, height], color=color, linewidth=1.5, alpha=0.6, zorder=2)
            axis.plot(mean.mean, height, marker, color=color, markersize=5, zorder=3)
        axis.set(title=_plain(title), xlabel="score", ylim=(-0.7, len(rows) - 0.3))
        axis.grid(axis="y", color="0.92")
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(rows)), [_plain(row.system.name) for row in rows], fontsize=8)
    there = dict.fromkeys(row.system.kind for row in reversed(rows))
    handles = [Line2D([], [], linestyle="", marker=MARKERS[each], color=COLORS[each], label=each) for each in there]
    handles.append(Line2D([], [], color="black", linewidth=0.8, linestyle="--", label=_plain(c.reference)))
    what = f"{100 * c.confidence:g}% interval of the difference, {INTERVALS[kind]}" if kind else "standard deviation"
    if kind or any(row.average and row.average.sd is not None for row in rows):
        handles.append(Line2D([], [], color=COLORS["method"], linewidth=1.5, alpha=0.6, label=what))
    figure.legend(handles=handles, loc="outside lower center", ncols=3 * len(panels), fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ConfigError(f"picture {path}: {str(error).splitlines()[0]}") from None


def _panel_of(task: str) -> Callable[[Row], tuple[Mean | None, Difference | None]]:
    return lambda row: (row.tasks.get(task), row.differences.get(task))


def _bar(kind: str, mean: Mean, base: Mean | None, difference: Difference | None) -> tuple[float, float] | None:
    """Ends of the bar of a dot: all are intervals of one kind, or, without a kind, standard deviations."""
    if not kind:
        return (mean.mean - mean.sd, mean.mean + mean.sd) if mean.sd is not None else None
    ends = getattr(difference, kind) if difference else None
    return (base.mean + ends[0], base.mean + ends[1]) if base and ends else None


def _plain(name: str) -> str:
    """As matplotlib shows it as it is: a $ begins a formula."""
    text = line(name)
    return (text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…").replace("$", "\\$")
