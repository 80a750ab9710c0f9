"""The best layouts as a picture: memory and time of each, by parts. Does not know: how they were found."""

from collections.abc import Sequence
from pathlib import Path

from megatron_instruct.errors import MissingPackageError
from megatron_instruct.planning.estimate import Estimate
from megatron_instruct.planning.report import GIB, MEMORY, TIMES

_COLOURS = ("#3b6ea8", "#7fb2d9", "#b8c9d9", "#e0a85c", "#c96f4a", "#8f5a99", "#5b8f62", "#a0a0a0", "#d9c25b")


def write_chart(path: Path, shown: Sequence[Estimate], *, title: str) -> None:
    """Write a PNG with one row a layout, in the order given: GiB by part beside seconds by part."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackageError("matplotlib", extra="plan", purpose="the chart of a plan") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 1.9 + 0.42 * len(shown)), sharey=True, layout="constrained")
    names = [f"{number}   {_short(estimate)}" for number, estimate in enumerate(shown, start=1)]
    _bars(left, [[getattr(estimate.memory, part) / GIB for estimate in shown] for part in MEMORY], MEMORY)
    left.axvline(shown[0].constants.usable_bytes(shown[0].gpu) / GIB, color="#a02020", linestyle="--", linewidth=1.2)
    left.annotate("usable", (shown[0].constants.usable_bytes(shown[0].gpu) / GIB, 1.0), xycoords=("data", "axes fraction"),
                  ha="center", va="bottom", color="#a02020", fontsize=9)  # fmt: skip
    left.set_xlabel("memory of the fullest GPU, GiB")
    left.set_xlim(0, shown[0].gpu.memory_bytes / GIB)
    left.set_yticks(range(len(shown)), names, fontsize=9)
    left.invert_yaxis()
    _bars(right, [[getattr(estimate.time, part) for estimate in shown] for part in TIMES], TIMES)
    longest = max(estimate.time.total for estimate in shown)
    for row, estimate in enumerate(shown):
        right.text(estimate.time.total + 0.01 * longest, row, f"MFU {estimate.mfu:.0%}", va="center", fontsize=9)
    right.set_xlim(0, 1.14 * longest)
    right.set_xlabel("time of one step, seconds")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.55 / (0.42 * len(shown) + 0.6)), ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)


def _bars(axes: object, values: Sequence[Sequence[float]], parts: Sequence[str]) -> None:
    """Draw stacked bars; parts that are nothing everywhere are left out of the legend."""
    starts = [0.0] * len(values[0])
    for part, colour, widths in zip(parts, _COLOURS, values, strict=False):
        if any(widths):
            axes.barh(range(len(widths)), widths, left=starts, color=colour, label=part.replace("_", " "), height=0.72)  # type: ignore[attr-defined]
        starts = [start + width for start, width in zip(starts, widths, strict=True)]


def _short(estimate: Estimate) -> str:
    execution, layout = estimate.execution, estimate.execution.layout
    sizes = f"TP {layout.tensor}  CP {layout.context}  PP {layout.pipeline}"
    sizes += f" x {execution.chunks}" if execution.chunks > 1 else ""
    sizes += f"  EP {execution.expert}" if execution.expert > 1 else ""
    return f"{sizes}  DP {layout.data}  mb {execution.micro_batch_size}"
