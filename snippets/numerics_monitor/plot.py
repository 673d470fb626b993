"""The records of a run as a picture."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(records: list[dict[str, Any]]) -> "Figure":
    """Draw scale and skips, gradients, updates and amax, one below the other.

    Raises:
        ModuleNotFoundError: There is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - only this needs it
    except ModuleNotFoundError as error:
        text = "plot() needs matplotlib, which is not installed"
        raise ModuleNotFoundError(text, name="matplotlib") from error
    figure = Figure(figsize=(8, 9), layout="constrained")
    scale, grads, updates, amax = figure.subplots(4, sharex=True)
    steps, scales = _column(records, "scale")
    scale.step(steps, scales, where="post", label="loss scale")
    bad = [r for r in records if r["nonfinite"]]
    marks = [r["step"] for r in bad], [r["scale"] for r in bad]
    scale.plot(*marks, "x", color="tab:red", label="NaN or Inf")
    scale.set_yscale("log", base=2)
    for name in ("underflow", "zero"):
        grads.plot(*_column(records, name), ".-", label=f"gradients: {name}")
    grads.plot(*_column(records, "lost"), ".-", label="updates: lost")
    grads.set_ylim(-0.05, 1.05)
    updates.plot(*_column(records, "update_ratio"), ".-", label="update / weight")
    updates.plot(*_column(records, "half_ulp"), "--", label="half an ulp")
    updates.set_yscale("symlog", linthresh=1e-8)
    for name in sorted({n for r in records for n in r.get("amax", {})}):
        rows = [r for r in records if r.get("amax", {}).get(name) is not None]
        values = [r["amax"][name] for r in rows]
        amax.plot([r["step"] for r in rows], values, ".-", label=name)
    amax.set_yscale("log", base=2)
    titles = ("Loss scale", "Shares", "Size of an update", "amax of FP8 tensors")
    for axes, title in zip((scale, grads, updates, amax), titles, strict=True):
        axes.set_title(title, loc="left", fontsize="medium")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small", ncols=2)
    amax.set_xlabel("optimizer step")
    return figure


def _column(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    rows = [r for r in records if r.get(name) is not None]
    return [r["step"] for r in rows], [r[name] for r in rows]
