"""``kompakt export`` and ``kompakt check``: the right file for each target, and what would go wrong with a file."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from torch import Tensor, nn

from kompakt.artifact.lint import Finding
from kompakt.artifact.onnx import open_onnx
from kompakt.artifact.targets import Target, runtime_of, target
from kompakt.artifact.targets.onnxruntime import snippet
from kompakt.build.refine import Refinement, Rounding
from kompakt.build.structure import apply_structure
from kompakt.cli.options import Bits, ModelOptions, OptionalDataOptions, RunOptions
from kompakt.cli.outcome import artifact_of, long_form
from kompakt.cli.voice import speaking
from kompakt.errors import InputError
from kompakt.files import atomic_write, writable_folder
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.islands import measured
from kompakt.measure.departure import Departure
from kompakt.measure.resources import total
from kompakt.measure.size import size_bytes
from kompakt.measure.tune import tune
from kompakt.methods.uniform import Knobs
from kompakt.models import load_model, parse_arguments
from kompakt.plan.plan import Plan
from kompakt.report.numbers import bytes_text
from kompakt.ship import AS_ROUNDED, PROOFS, Shipped, quantized, ship
from kompakt.weights import load_weights

To = Annotated[
    str,
    typer.Option("--to", help="onnxruntime, openvino, tensorrt, triton, executorch, litert, qonnx …"),
]


def export(
    to: To,
    out: Annotated[Path, typer.Option(help="folder for the artifact and export.json")],
    model: ModelOptions,
    data: OptionalDataOptions,
    run: RunOptions,
    plan: Annotated[Path | None, typer.Option(help="plan.json of a smaller model, whose --weights are given")] = None,
    calibration: Annotated[int, typer.Option(help="training examples to calibrate on", min=1)] = 512,
    proofs: Annotated[int, typer.Option(help="test examples on which the file is compared", min=1)] = PROOFS,
    tune_options: Annotated[bool, typer.Option("--tune", help="choose ONNX Runtime's options by measurement")] = False,
    weight_bits: Annotated[int | None, Bits] = None,
    activation_bits: Annotated[int | None, Bits] = None,
    power_of_two: Annotated[bool, typer.Option("--power-of-two", help="scales 2^n, zero points 0")] = False,
    rounding: Annotated[Rounding, typer.Option(help="how weights become integers")] = "nearest",
    bias_correction: Annotated[bool, typer.Option("--bias-correction", help="mend the mean of each layer")] = False,
) -> None:
    """Write MODEL (or a folder that another command wrote) for a runtime: float without --data, int8 with it."""
    chosen = target(to)
    if tune_options and chosen.name != "onnxruntime":
        raise InputError(f"--tune: chooses options of ONNX Runtime; {chosen.name} has none to choose")
    how = Refinement(rounding=rounding, bias_correction=bias_correction, seed=run.seed)
    mended = rounding != "nearest" or bias_correction
    if mended and (tune_options or data.data is None):
        raise InputError("--rounding and --bias-correction: work on --data, and not with --tune; leave one out")
    if Path(model.model).is_dir():
        given = {"--data": data.data, "--plan": plan, "--weights": model.weights}
        shipped = _converted(Path(model.model), chosen, out, [name for name, value in given.items() if value])
        _tell(_tuned(shipped, run) if tune_options else shipped, chosen, out, run)
        return
    network = _smaller(model, plan) if plan else model.load(run.seed)
    folder, islands = writable_folder(out), ""
    with speaking(run) as say:
        if data.data is None:
            shipped = ship(chosen.prepare(fold(trace(network, model.example()))), chosen, folder, say=say)
        else:
            examples = data.open(model, run)
            say("calibrating")
            part = examples.train.subset(min(calibration, len(examples.train)), seed=run.seed)
            asked = Knobs(weight_bits=weight_bits, activation_bits=activation_bits, power_of_two=power_of_two)
            if tune_options:
                made = measured(network, model.example(), chosen, part, seed=run.seed, knobs=asked)
                capture, left, islands = made.capture, made.left, made.why
            else:
                capture, left = quantized(network, model.example(), chosen, part, asked, how if mended else AS_ROUNDED)
            proof = next(iter(examples.test.batches(proofs, limit=proofs)))[0]
            shipped = ship(capture, chosen, folder, left=left, proof=proof, say=say)
    _tell(_tuned(shipped, run, islands) if tune_options else shipped, chosen, folder, run)


def _tuned(shipped: Shipped, run: RunOptions, islands: str = "") -> Shipped:
    """Choose how the file is opened, and write it into the snippet."""
    example = np.zeros(open_onnx(shipped.path).shape, dtype=np.float32)
    found = tune(shipped.path, example, threads=run.threads, seed=run.seed)
    text = snippet(found.options).format(file=shipped.path.name, shape=tuple(example.shape))
    said = {**asdict(found.options), "why": found.why, "p50_ms": found.p50_ms, "islands": islands}
    return replace(shipped, snippet=text, options=said)


def check(
    file: Annotated[Path, typer.Argument(help="an artifact")],
    run: RunOptions,
    target_name: Annotated[str, typer.Option("--target", help="runtime that it is for")] = "onnxruntime",
) -> None:
    """Say what would go wrong with FILE in a runtime, where, and how to mend it."""
    chosen = target(target_name)
    _fits(file, chosen)
    findings = chosen.check(file)
    if run.json:
        print(json.dumps([asdict(item) for item in findings], indent=1))
    elif not run.quiet:
        _list(findings, chosen)


def _fits(file: Path, chosen: Target) -> None:
    """Refuse an artifact of another target."""
    guess = runtime_of(file)
    if file.suffix not in (chosen.suffix, ".onnx" if chosen.convert and chosen.suffix else chosen.suffix):
        kind = chosen.suffix or "a model folder"
        raise InputError(f"{file}: {chosen.name} takes {kind}; this looks like one of {guess}")


def _smaller(model: ModelOptions, plan: Path) -> nn.Module:
    """Build the model, make it smaller as the plan says, and load what was trained afterwards."""
    if model.weights is None:
        raise InputError("--plan: give the weights of the smaller model with --weights, such as DIR/pruned.safetensors")
    whole = load_model(model.model, arguments=parse_arguments(model.model_arg or []))
    example: Tensor = model.example()
    made = apply_structure(whole, Plan.read(plan), example)
    load_weights(made, model.weights, name=model.model)
    return made.eval()


def _converted(folder: Path, chosen: Target, out: Path, given: list[str]) -> Shipped:
    """Write the model of a folder for a target that takes ONNX with the same rules; ``given`` needs its class."""
    source = artifact_of(folder)
    again = long_form(folder, source, chosen.name)
    if given:
        raise InputError(f"{folder}: {given[0]} is for a model, {source.name} is made: leave it out, or give {again}")
    if chosen.convert is None:
        raise InputError(f"{folder}: {chosen.name} is written from the model, not from {source.name}; give {again}")
    path = chosen.convert(source, writable_folder(out) / f"model{chosen.suffix}")
    return Shipped(
        path=path,
        size_bytes=size_bytes(path),
        parity=None,
        departure=Departure(),
        findings=chosen.check(path),
        left=(),
        snippet=_shown(chosen, path),
    )


def _shown(chosen: Target, path: Path) -> str:
    """Return how to run an artifact that was converted."""
    return chosen.snippet.format(file=path.name, shape=chosen.open(path, 1).shape)


def _tell(shipped: Shipped, chosen: Target, out: Path, run: RunOptions) -> None:
    """Write ``export.json`` and say what is in it."""
    found = {
        "target": chosen.name,
        "file": shipped.path.name,
        "size_bytes": shipped.size_bytes,
        "parity": shipped.parity.model_dump() if shipped.parity else None,
        "departs": shipped.departure.first,
        "layers": [asdict(item) for item in shipped.departure.layers],
        "findings": [asdict(item) for item in shipped.findings],
        "left_alone": [asdict(item) for item in shipped.left],
        "snippet": shipped.snippet,
        "options": shipped.options,
        "note": chosen.note,
        "resources": {"layers": [asdict(item) for item in shipped.resources], "all": asdict(total(shipped.resources))},
    }
    text = json.dumps(found, indent=1)
    atomic_write(out / "export.json", text.encode())
    if run.json:
        print(text)
    elif not run.quiet:
        typer.echo(f"wrote {shipped.path}: {bytes_text(shipped.size_bytes)}")
        if shipped.parity:
            seen = shipped.parity
            typer.echo(
                f"simulated against {chosen.name}: top-1 agrees on {seen.top1_agreement:.2%} of {seen.examples}, "
                f"SQNR {seen.sqnr_db:.1f} dB, max {seen.max_abs_error:.3g}"
            )
        if shipped.options:
            if shipped.options["islands"]:
                typer.echo(f"layers: {shipped.options['islands']}")
            typer.echo(f"options: {shipped.options['why']}; export.json shows how to open the file so")
        if shipped.departure.first:
            typer.echo(f"parity: {shipped.departure.first} is the first layer that departs from what was simulated")
        if chosen.extra == "fpga":
            need = total(shipped.resources)
            typer.echo(
                f"{need.multiplications:,} multiplications, {need.multipliers:,} weights of {need.memory_bits:,} bits: "
                f"{need.bram18} blocks of 18 kbit; sums of up to {need.accumulator_bits} bits"
            )
        if chosen.note:
            typer.echo(chosen.note)
        _list(shipped.findings, chosen)


def _list(findings: tuple[Finding, ...], chosen: Target) -> None:
    console = Console()
    if not findings:
        console.print(f"nothing found that would go wrong in {chosen.name}", highlight=False)
    for item in findings:
        console.print(f"{item.rule}: {item.where}: {item.what}; {item.mend}", highlight=False, soft_wrap=True)
