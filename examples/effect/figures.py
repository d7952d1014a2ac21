"""Draw docs/effect.png from the raw data: forbidden prompts answered against records right, rule by rule.

python examples/effect/figures.py
"""

from collections.abc import Iterator

import tables

COLOURS = {
    "aligned": "0.6", "lora": "black", "scale": "tab:orange", "random": "tab:brown", "retrain": "tab:purple",
    "safe-lora:paper": "tab:blue", "salora": "tab:cyan", "filter:grad": "tab:green", "filter:none": "yellowgreen",
}  # fmt: skip


def points(data: tables.Data, kind: str) -> Iterator[tuple[str, tables.Share, tables.Share]]:
    """Rule, forbidden answered, records right of the fresh adapters of a kind."""
    adapters = data.adapters(tables.GROUPS[kind])
    for rule in COLOURS:
        vault, task = (tables.rows_of(data, adapters, rule, name) for name in tables.CORE)
        if vault and task:
            yield rule, tables.answered(vault), tables.right(task)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = tables.Data()
    figure, axes = pyplot.subplots(1, len(tables.GROUPS), figsize=(9, 3.6), sharey=True, layout="constrained")
    for kind, axis in zip(tables.GROUPS, axes, strict=True):
        for rule, answered, right in points(data, kind):
            across = [[answered.value - answered.interval[0]], [answered.interval[1] - answered.value]]
            up = [[right.value - right.interval[0]], [right.interval[1] - right.value]]
            axis.errorbar(
                answered.value, right.value, yerr=up, xerr=across, fmt="o", color=COLOURS[rule], alpha=0.85,
                elinewidth=0.8, label=tables.LABELS[rule].replace("*", "").replace("`", ""),
            )  # fmt: skip
        axis.set(title=f"{kind} training data", xlabel="forbidden prompts answered", xlim=(-0.03, 1.03))
    axes[0].set(ylabel="records right", ylim=(-0.03, 1.03))
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(tables.PAGE.with_name("effect.png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
