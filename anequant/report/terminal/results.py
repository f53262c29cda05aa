"""Results as rows of (label, text) for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anequant.calibration.rotation_choice import RotationChoice
from anequant.checkpoints.license import CARD
from anequant.checkpoints.places import BUNDLE_FOLDER, CHECKPOINT_FOLDER, PACKAGES_FOLDER, REPORT_PAGE
from anequant.inspection.device_profile import DeviceProfile
from anequant.outputs.push import Upload
from anequant.pipeline.asset_lowering import AssetResult
from anequant.pipeline.converting import ConvertResult
from anequant.pipeline.lowering import LowerResult
from anequant.pipeline.quantizing import QuantizeResult, RotateResult
from anequant.pipeline.rounder import TensorError
from anequant.report.page.write_report import Report
from anequant.report.terminal.quality_rows import describe_quality
from anequant.targets.shared.finding import Finding
from anequant.targets.shared.headroom import Headroom
from anequant.units import format_bytes
from anequant.verification.assets import AssetCheck
from anequant.verification.verify import Verification

Rows = list[tuple[str, str]]


def describe_quantization(folder: Path, result: QuantizeResult) -> Rows:
    errors = result.rounding.tensors
    return [
        ("checkpoint", str(folder)),
        (
            "equivalence",
            f"folding and rotation moved the logits by {result.rounding.equivalence:.1e} relative",
        ),
        (
            "size",
            f"{result.rounding.bits_per_weight:.2f} bits per weight, {len(errors)} tensors quantized",
        ),
        *_describe_worst(errors),
        *_describe_rotations(result.rotations),
        *([("rotations", "as the model was rotated before")] if result.rotated_before else []),
        *_describe_calibration(result),
    ]


def _describe_worst(errors: Sequence[TensorError]) -> Rows:
    """Return the tensor with the largest error; nothing where all weights stay in float16."""
    if not errors:
        return []
    worst = max(errors, key=lambda tensor: tensor.relative_error)
    return [("worst tensor", f"{worst.name}, off by {worst.relative_error:.2%}")]


def describe_rotation(folder: Path, result: RotateResult) -> Rows:
    return [
        ("checkpoint", str(folder)),
        ("equivalence", f"folding and rotation moved the logits by {result.equivalence:.1e} relative"),
        *_describe_rotations(result.rotations),
    ]


def _describe_rotations(choice: RotationChoice | None) -> Rows:
    """Return how rotations were found, where the seed alone does not tell."""
    if choice is None:
        return []
    rows = []
    if choice.restarts:
        kls = sorted(choice.restarts.values())
        middle = kls[len(kls) // 2]
        text = f"seed {choice.seed}, the best of {len(kls)}: KL {kls[0]:.4f}, median {middle:.4f}"
        rows.append(("rotations", text))
    if choice.learned is not None:
        learned = choice.learned
        change = f"{learned.held_out_before:.4f} to {learned.held_out_after:.4f}"
        text = f"learned: KL on held-out windows {change}, the best after {learned.steps} steps"
        rows.append(("rotations", text))
    return rows or [("rotations", "kept in rotations.safetensors")]


def _describe_calibration(result: QuantizeResult) -> Rows:
    """Return what calibration chose, and what it could not use."""
    seen = [tensor for tensor in result.rounding.tensors if tensor.dead_inputs is not None]
    rows = []
    if seen:
        nearest = [tensor.name for tensor in seen if tensor.damping is None]
        rows.append(("rounding", f"gptq for {len(seen) - len(nearest)} tensors"))
        if nearest:
            text = f"nearest for {len(nearest)}, better on held-out tokens: {_list_names(nearest)}"
            rows.append(("", text))
    dead = [tensor.name for tensor in seen if tensor.dead_inputs]
    if dead:
        rows.append(
            ("", f"{len(dead)} have inputs that no token used, rounded to nearest: {_list_names(dead)}")
        )
    if result.tuning is not None:
        tuning = result.tuning
        rows.append(
            (
                "tuning",
                f"KL on held-out samples {tuning.held_out_before:.4f} to {tuning.held_out_after:.4f}, "
                f"the best after {tuning.steps} of {tuning.taken} steps on {tuning.windows} windows, "
                f"{tuning.moved:.2%} of codes changed",
            )
        )
    return rows


def _list_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def describe_lowering(folder: Path, result: LowerResult | AssetResult) -> Rows:
    if isinstance(result, AssetResult):
        return describe_asset(folder, result) + describe_headroom(result.headroom)
    rows = [("packages", str(folder))]
    for size in result.packages:
        rows.append(
            (
                "",
                f"{size.name}.mlpackage  weights {format_bytes(size.weight_bytes)} for constants of "
                f"{format_bytes(size.constant_bytes)}, graph {format_bytes(size.graph_bytes)}",
            )
        )
    return rows + describe_headroom(result.headroom)


def describe_headroom(found: Headroom) -> Rows:
    """Return the loudest layers against what float16 (65504) and the accumulator (32768) hold."""
    loudest = max(found.ranges, key=lambda layer: layer.residual)
    scores = max(layer.scores for layer in found.ranges)
    sums = max(value for layer in found.ranges for value in layer.sums.values())
    rows = [
        (
            "headroom",
            f"residual stream up to {loudest.residual:.0f} (layer {loudest.layer}), q.k up to {scores:.0f} "
            f"of 65504; convolution sums up to {sums:.0f} of 32768",
        )
    ]
    if found.residual_scale != 1:
        rows.append(("", f"residual stream scaled by {found.residual_scale:g} to stay inside float16"))
    if found.sum_scales:
        rows.append(("", f"{len(found.sum_scales)} codebooks scaled down to stay inside the accumulator"))
    return rows


def describe_verification(found: Verification) -> Rows:
    checkpoint, packages = found.checkpoint, found.packages
    rows = []
    if checkpoint is not None:
        rows.append(("verified", f"{checkpoint.tensors} stored weights are what their codes say"))
    if packages is not None:
        rows += [
            ("verified", f"{packages.weights} palettized weights read back equal, bit for bit"),
            (
                "verified",
                f"arg-max agrees at {packages.agreement:.1%} of {packages.positions} positions "
                f"({packages.ties} ties within rounding) after "
                f"{packages.prefill_tokens} tokens of prefill, logits within {packages.relative_error:.2%}",
            ),
        ]
        if packages.rounding is not None:
            rows.append(
                (
                    "",
                    "that was without rounding activations; with it logits differ by "
                    f"{packages.rounding:.2f} times what rounding does",
                )
            )
    return rows if found.asset is None else rows + describe_asset_check(found.asset)


def describe_asset_check(found: AssetCheck) -> Rows:
    """Return what Apple's interpreter made of an asset, and on how much of the model."""
    part = "all layers" if found.layers == found.of else f"the first {found.layers} of {found.of} layers"
    rows = [
        ("verified", f"{found.constants} constants of the Core AI asset read back equal, bit for bit"),
        (
            "verified",
            f"Apple's interpreter on {part}: arg-max agrees at {found.agreement:.1%} of {found.positions} "
            f"positions ({found.ties} ties within rounding), logits within {found.relative_error:.2%}",
        ),
    ]
    if found.rounding is not None:
        rows.append(("", f"with rounded activations {found.rounding:.2f} times what rounding does"))
    if found.witness is not None:
        said = f"Apple's interpreter and ours on the Core ML packages agree within {found.witness:.2%}"
        rows.append(("verified", said))
    return rows


def describe_asset(folder: Path, result: AssetResult) -> Rows:
    size = result.size
    held = f"{size.functions} functions over constants of {format_bytes(size.constant_bytes)}"
    return [
        ("asset", str(folder / size.name)),
        ("", f"{held}, graphs {format_bytes(size.graph_bytes)}"),
    ]


def describe_profile(result: DeviceProfile) -> Rows:
    rows = []
    for package in result.packages:
        counts = ", ".join(f"{count} on {device}" for device, count in package.operations.items())
        rows.append(("operations", f"{package.name}: {counts}"))
        operators = sorted({item.operator for item in package.elsewhere})
        if operators:
            rows.append(("", f"not on the Neural Engine: {', '.join(operators)}"))
    seconds, agreement = result.seconds, result.agreement
    return [
        *rows,
        (
            "time",
            f"first logits after {seconds.load:.2f} s, a batch in {seconds.prefill * 1e3:.1f} ms, "
            f"a token in {seconds.token * 1e3:.1f} ms",
        ),
        (
            "agreement",
            f"same top token as the interpreter at {agreement.top_token:.1%} of {agreement.positions} "
            f"positions, logits within {agreement.relative_error:.2%}",
        ),
    ]


def describe_lint(findings: Sequence[Finding]) -> Rows:
    """Return a row for each rule that is broken, with its first place and the number of the others."""
    grouped: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        grouped.setdefault((finding.severity, finding.rule), []).append(finding)
    rows = []
    for (severity, rule), places in grouped.items():
        first = places[0]
        more = f", and {len(places) - 1} more" if len(places) > 1 else ""
        rows.append((severity, f"{rule} {first.package} {first.op}: {first.detail}{more}"))
        rows.append(("", f"{first.why}; {first.remedy}"))
    return rows or [("lint", "nothing found")]


def describe_conversion(folder: Path, result: ConvertResult) -> Rows:
    rows = describe_quantization(folder / CHECKPOINT_FOLDER, result.quantized)
    if result.lowered is not None:
        rows += describe_lowering(folder / PACKAGES_FOLDER, result.lowered)
    if result.lowered_asset is not None:
        rows += describe_asset(folder / BUNDLE_FOLDER, result.lowered_asset)
        rows += describe_headroom(result.lowered_asset.headroom) if result.lowered is None else []
    rows += describe_verification(Verification(result.checkpoint, result.packages, result.asset))
    rows += describe_lint(result.lint)
    if result.quality is None:
        return [*rows, ("quality", "not measured: the model comes without a tokenizer")]
    return rows + describe_quality(result.quality)


def describe_report(report: Report) -> Rows:
    """Return where a report is, which projection came out worst, and what is missing."""
    rows = [("report", str(report.folder / REPORT_PAGE))]
    if report.data["worst"]:
        worst = report.data["worst"][0]
        name = f"{worst['name']} of layer {worst['layer']}"
        rows.append(("worst output", f"{name}, off by {worst['output_error']:.2%}"))
    return rows + [("missing", f"{what}: {why}") for what, why in report.data["missing"].items()]


def describe_upload(upload: Upload) -> Rows:
    """Return what was sent and where to, or what would be."""
    sent = upload.url is not None
    seen = "private" if upload.private else "public"
    what = f"{len(upload.files)} files of a {upload.kind}, {upload.bytes:,} bytes, to {upload.repo} ({seen})"
    rows = [("uploaded" if sent else "would upload", what)]
    if not sent:
        rows += [("", f"{name}  {size:,}") for name, size in upload.files.items()]
    if CARD not in upload.files:
        rows.append(("card", f"none: this folder has no {CARD}"))
    rows.append(("address", upload.url) if upload.url else ("", "nothing was sent: add --yes"))
    return rows
