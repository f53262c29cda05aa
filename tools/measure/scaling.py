"""How the cost of a calibrated conversion grows, and what that says of a 70B on many machines.

`w4-ane` quantizes random models of Qwen2.5-0.5B's shape, with a vocabulary of 8192, with more and more layers
and calibration windows, each in a process of its own: seconds and peak memory, drawn in scaling.svg beside
the JSON file. The prediction takes its rates from the largest shape in docs/measured/pipeline.json
(`bench_pipeline.py`), which has to be there. With MODEL, TEXT and CALIBRATION, rounding with Hessians of the
float model, for which no layer waits for another, is compared with rounding in order.

    python tools/measure/scaling.py [MODEL TEXT CALIBRATION] [--json docs/measured/scaling.json]

Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_pipeline import LENGTH, WINDOWS, child, write_tokens
from measure_memory import SHAPES, config_of
from measured import RESULTS, machine, when_and_where, write_json

SHAPE, RECIPE, VOCABULARY = "qwen2.5-0.5b-layers", "w4-ane", 8192
LAYERS, COUNTS = (1, 2, 3), (6, 12, 24)
LARGE, NODES = "llama-3-70b", (1, 8, 64)
PANEL = 230
"""Width of each of the drawing's parts."""


def grow(work: Path) -> list[dict[str, Any]]:
    """Runs of LAYERS with WINDOWS windows, and of two layers with COUNTS windows."""
    runs = []
    for layers in LAYERS:
        model = work / f"{SHAPE}-{layers}"
        child("model", model, work)
        for windows in COUNTS if layers == 2 else (WINDOWS,):
            write_tokens(work, VOCABULARY, windows)
            step = child(RECIPE, model, work)
            runs.append(
                {"layers": layers, "windows": windows} | {key: step[key] for key in ("seconds", "peak")}
            )
    return runs


def order(model: Path, text: Path, calibration: Path, work: Path) -> dict[str, dict[str, float]]:
    """KL and extra NLL of rounding in order, and with every Hessian from the float model."""
    from anequant.calibration.walkers import Walkers
    from anequant.checkpoints.reader import open_checkpoint
    from anequant.checkpoints.source import resolve_source
    from anequant.evaluation.divergence import measure_quality_against, record_reference
    from anequant.evaluation.evaluate import read_windows
    from anequant.pipeline.quantize import quantize
    from anequant.recipe import Calibration
    from anequant.recipe_files import load_recipe
    from anequant.request import Request

    base = open_checkpoint(model)
    tokens = read_windows(base, text, 32, LENGTH)
    reference = record_reference(base, tokens)
    walk = Walkers.layer

    def walk_float(self: Any, layer: int, original: Any, quantized: Any, *, moments: bool) -> Any:
        return walk(self, layer, original, original, moments=moments)

    found = {}
    for name, walking in (("in order", walk), ("float Hessians", walk_float)):
        Walkers.layer = walking  # type: ignore[method-assign]
        output = work / name.replace(" ", "-")
        calibrated = Calibration((str(calibration),), WINDOWS, LENGTH)
        quantize(Request(resolve_source(str(model)), load_recipe(RECIPE), calibrated), output)
        quality = measure_quality_against(open_checkpoint(output), tokens, reference)
        assert quality.kl is not None and quality.extra_nll is not None
        found[name] = {"kl": quality.kl, "extra_nll": quality.extra_nll}
    Walkers.layer = walk  # type: ignore[method-assign]
    return found


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Least squares: growth, value at zero, and the largest distance from the line as a share of a value."""
    count = len(points)
    x_mean, y_mean = (sum(point[axis] for point in points) / count for axis in (0, 1))
    growth = sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)
    start = y_mean - growth * x_mean
    return growth, start, max(abs(start + growth * x - y) / y for x, y in points)


def predictions(pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """Hours of Llama-3-70B's shape on so many of this machine, at the rates of the largest measured shape."""
    from anequant.architectures import read_spec
    from anequant.pipeline.steps import rounding
    from anequant.recipe_files import load_recipe

    spec = read_spec(config_of(SHAPES[LARGE]), LARGE)
    windows, recipe = (WINDOWS, LENGTH), load_recipe(RECIPE)
    run = max(pipeline["runs"], key=lambda one: one["steps"][RECIPE]["needed"]["rounding"][0] / one["layers"])
    step = run["steps"][RECIPE]
    flops = {
        "forward": rounding.count_walking_work(spec, windows).flops,
        "Hessians": rounding.count_moment_work(spec, windows).flops,
        "rounding": rounding.count_gptq_work(spec, recipe).flops,
    }
    seconds = {
        stage: step["stages"][stage] * amount / step["needed"][stage][0] for stage, amount in flops.items()
    }
    weights = {
        linear.name: math.prod(spec.shape(linear)) * spec.width(linear.input)
        for linear in spec.architecture.linears
    }
    longest = sum(max(weights[linear.name] for linear in group) for group in spec.input_groups) / sum(
        weights.values()
    )
    layer = seconds["forward"] + seconds["Hessians"]
    hours = {}
    for nodes in NODES:
        shared = max(1 / nodes, longest)
        free = -(-spec.num_layers // nodes) * (seconds["Hessians"] + seconds["rounding"])
        hours[str(nodes)] = {
            "in order": spec.num_layers * (layer + shared * seconds["rounding"]) / 3600,
            "float Hessians": (spec.num_layers * seconds["forward"] / 2 + free) / 3600,
        }
    size = sum(math.prod(spec.shape(linear)) for linear in spec.architecture.linears)
    return {
        "from": run["shape"],
        "seconds_per_layer": seconds,
        "longest_share": longest,
        "hours": hours,
        "traffic_per_layer": 4 * size
        + sum(8 * spec.width(group[0].input) ** 2 for group in spec.input_groups),
        "hidden_states": 4 * math.prod(windows) * spec.hidden_size,
    }


def sentences(found: dict[str, Any]) -> str:
    """What docs/scaling.md says of the numbers."""
    layers, windows = lines(found["runs"])
    per_layer, fixed, off_layers = slope(layers)
    per_window, _, off_windows = slope(windows)
    peaks = [run["peak"] / 1e9 for run in found["runs"] if run["windows"] == WINDOWS]
    ahead = predictions(json.loads((RESULTS / "pipeline.json").read_text(encoding="utf-8")))
    seconds = ahead["seconds_per_layer"]
    said = [
        f"A layer of Qwen2.5-0.5B takes {per_layer:.1f} s beside {fixed:.1f} s for embedding, head and files "
        f"(the runs lie within {off_layers:.0%} of the line), and two layers {per_window:.2f} s more for "
        f"every window of {LENGTH} tokens (within {off_windows:.0%}); the peak of "
        f"{', '.join(map(str, LAYERS))} layers is {', '.join(f'{peak:.2f}' for peak in peaks)} GB. "
        f"Measured on {when_and_where(found['machine'])}.",
        "",
        f"A layer of 70B at the rates of {ahead['from']}: forward {seconds['forward'] / 60:.0f} min, "
        f"Hessians {seconds['Hessians'] / 60:.0f} min, rounding {seconds['rounding'] / 60:.0f} min. The "
        f"largest linear of every group bounds what rounding in order gains: {ahead['longest_share']:.0%} of "
        "it cannot be spread.",
        "",
        "| nodes | hours in order | hours, float Hessians |",
        "|---|---|---|",
        *(
            f"| {nodes} | {row['in order']:.0f} | {row['float Hessians']:.1f} |"
            for nodes, row in ahead["hours"].items()
        ),
        "",
        f"Traffic is at most {ahead['traffic_per_layer'] / 1e9:.1f} GB a layer (weights in float32 and "
        f"moments, once), and {ahead['hidden_states'] / 1e9:.1f} GB of hidden states from layer to layer.",
    ]
    if "order" in found:
        one, other = found["order"]["in order"], found["order"]["float Hessians"]
        said += [
            "",
            f"On qwen2-29m, {WINDOWS} windows: in order KL {one['kl']:.4f} and extra NLL "
            f"{one['extra_nll']:.4f}; with float Hessians {other['kl']:.4f} and {other['extra_nll']:.4f}.",
        ]
    return "\n".join(said)


def chart(found: Mapping[str, Any]) -> str:
    """scaling.svg: seconds over layers and over windows with their lines, and peaks over layers."""
    layers, windows = lines(found["runs"])
    peaks = [(run["layers"], run["peak"] / 1e9) for run in found["runs"] if run["windows"] == WINDOWS]
    panels = (
        ("seconds, layers", layers),
        ("seconds, windows (2 layers)", windows),
        ("peak GB, layers", peaks),
    )
    drawn = "".join(_panel(number, *panel) for number, panel in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PANEL * len(panels)} 220" role="img">'
        "<title>Cost over layers and calibration windows</title>"
        "<style>text{font:12px sans-serif;fill:#1f2328}</style>"
        f'<rect width="100%" height="100%" fill="#fff"/>{drawn}</svg>\n'
    )


def _panel(number: int, title: str, points: Sequence[tuple[float, float]]) -> str:
    left, bottom, width, height = PANEL * number + 40, 185, PANEL - 60, 140
    x_most, y_most = (max(point[axis] for point in points) * 1.1 for axis in (0, 1))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * x / x_most, bottom - height * y / y_most

    growth, start, _ = slope(points)
    (x1, y1), (x2, y2) = at(0, start), at(x_most, start + growth * x_most)
    parts = [
        f'<text x="{left}" y="24">{title}</text>',
        f'<path d="M{left} {bottom - height}V{bottom}H{left + width}" fill="none" stroke="#59636e"/>',
        f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#0969da" fill="none"/>',
    ]
    for x, y in points:
        cx, cy = at(x, y)
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="#0969da"/>')
        parts.append(f'<text x="{cx:.1f}" y="{cy - 9:.1f}" text-anchor="end">{y:.3g}</text>')
        parts.append(f'<text x="{cx:.1f}" y="{bottom + 18}" text-anchor="middle">{x:g}</text>')
    return "".join(parts)


def lines(runs: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Seconds over layers, and over windows."""
    return (
        [(run["layers"], run["seconds"]) for run in runs if run["windows"] == WINDOWS],
        [(run["windows"], run["seconds"]) for run in runs if run["layers"] == 2],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("texts", nargs="*", type=Path, metavar="MODEL TEXT CALIBRATION")
    parser.add_argument("--json", type=Path, default=RESULTS / "scaling.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found: dict[str, Any] = {"machine": machine(), "runs": grow(Path(work))}
        if options.texts:
            model, text, calibration = options.texts
            found["order"] = order(model, text, calibration, Path(work))
    write_json(options.json, found)
    options.json.with_suffix(".svg").write_text(chart(found), encoding="utf-8")
    print(sentences(found))


if __name__ == "__main__":
    main()
