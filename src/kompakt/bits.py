"""From a recipe's ``[quantize]`` section to a plan: uniform integers, codebooks, or bits chosen layer by layer."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from kompakt.build.aware import without_tensors
from kompakt.errors import InputError
from kompakt.graph.calibrate import Stats
from kompakt.graph.graph import Left
from kompakt.graph.trace import Capture
from kompakt.job import Job
from kompakt.measure.sensitivity import bit_errors, trace_errors
from kompakt.methods import codebook, mixed
from kompakt.methods.uniform import Knobs, uniform
from kompakt.pace import Track, kept_pace
from kompakt.plan.plan import Plan, Quantize, Share
from kompakt.plan.recipe import QuantizeSection
from kompakt.plan.rules import Rules, integer_layers, placed, range_owner

Planned = tuple[Plan, tuple[Left, ...], tuple[str, ...]]
MEASURED_ON = 128
"""Training examples on which the errors of single tensors are measured."""
TRACED_ON = 32
NIBBLE = 4
LEARNED = ("adaround", "brecq", "qdrop")
"""Rounding that learns to go up or down, as only integers can."""


def planned(job: Job, section: QuantizeSection, capture: Capture, stats: Stats, keep: frozenset[str]) -> Planned:
    """Plan what a section asks for, or take the entries of the job's own plan.

    Args:
        job: the job.
        section: what is asked.
        capture: the folded float capture.
        stats: ranges of its activations.
        keep: layers that stay float, beside the section's.

    Returns:
        The plan, what stays float and why, and what was decided.

    Raises:
        InputError, BudgetError: keys that exclude each other, or a budget that no assignment keeps.
    """
    _agree(section)
    if job.plan is not None:
        given = Plan(entries=(*job.plan.of(Quantize), *job.plan.of(Share)))
        plan = without_tensors(given, unquantized(capture, job.target.rules, keep))
        return plan, (), ("the plan given is carried out as it stands",)
    asked = knobs(section, keep)
    if job.recipe.finetune.rate is not None:
        asked = replace(asked, weight_range="lattice")  # the steps that training has chosen
    if section.codebook is not None:
        return _shared(job, section, capture, asked)
    rules = job.target.rules
    notes: tuple[str, ...] = ()
    if section.mixed:
        chosen, notes = _chosen(job, section, capture, stats, asked)
        floats = {op.name for op in capture.graph.layers if chosen.get(str(op.ref("weight"))) == mixed.FLOAT}
        bits = {name: width for name, width in chosen.items() if width != mixed.FLOAT}
        asked = replace(asked, bits=bits, keep=asked.keep | floats)
    elif section.keep_ends:
        asked = replace(asked, bits=mixed.ends(capture.graph, rules, asked.keep))
    plan, left = uniform(capture.graph, rules, asked)
    return (_packed(plan) if section.packed else plan), left, notes


def unquantized(capture: Capture, rules: Rules, keep: frozenset[str]) -> frozenset[str]:
    """Return the weights of the layers called ``keep``, and the ops whose integers only these wanted."""
    graph = capture.graph
    weights = {str(graph.by_name[name].ref("weight")) for name in keep}
    return frozenset(weights | (placed(graph, rules).keys() - placed(graph, rules, keep).keys()))


def knobs(section: QuantizeSection, keep: frozenset[str] = frozenset()) -> Knobs:
    """Translate a recipe's section into the method's knobs."""
    return Knobs(
        weight_bits=section.weight_bits,
        activation_bits=section.activation_bits,
        group_size=section.group_size,
        weight_range=section.weight_range,
        activation_range=section.activation_range,
        power_of_two=section.power_of_two,
        dynamic=section.dynamic,
        float_sums=section.float_sums,
        keep=frozenset(section.keep) | keep,
    )


def _agree(section: QuantizeSection) -> None:
    """Refuse keys that exclude each other."""
    if section.codebook is not None:
        also: dict[str, object] = {"mixed": section.mixed, "weight_bits": section.weight_bits}
        also |= {"group_size": section.group_size, "dynamic": section.dynamic, "packed": section.packed}
        fixed = section.codebook_grid != "free"
        also["rounding"] = section.rounding if fixed or section.rounding in LEARNED else None
        wrong = next((name for name, value in also.items() if value), None)
        if wrong is not None:
            raise InputError(f"codebook and {wrong}: a codebook holds no uniform integers; leave one of the two out")
    if section.rate is not None:
        others = ("codebook", "mixed", "weight_bits", "group_size", "rounding", "dynamic", "packed", "power_of_two")
        wrong = next((name for name in others if getattr(section, name)), None)
        if wrong is not None:
            raise InputError(f"rate and {wrong}: rate chooses the steps of 8-bit integers; leave one of the two out")
    if section.codebook_grid != "free" and section.codebook is None:
        raise InputError(f"codebook_grid {section.codebook_grid}: say how many bits, as in codebook = 4")
    if section.mixed and section.weight_bits is not None:
        raise InputError("weight_bits and a budget of bits: say either one width for all or what they may cost")
    if section.mixed and (section.dynamic or section.group_size is not None):
        raise InputError("bits chosen by layer need static ranges and scales by channel; leave out dynamic, group_size")
    if section.sensitivity == "hessian" and (section.average_activation_bits or section.fewer_bops):
        raise InputError("sensitivity hessian: is of weights only; use output where activations get bits too")


def _shared(job: Job, section: QuantizeSection, capture: Capture, asked: Knobs) -> Planned:
    assert section.codebook is not None
    what = codebook.Knobs(
        bits=section.codebook,
        granularity=section.codebook_granularity,
        start=section.codebook_start,
        grid=section.codebook_grid,
        ends=mixed.ENDS if section.keep_ends else None,
        keep=asked.keep,
    )
    plan, left = codebook.codebook(capture.graph, what)
    if section.activation_bits is not None:
        integers, _ = uniform(capture.graph, job.target.rules, asked)
        plan = plan.then(*(entry for entry in integers.of(Quantize) if entry.role == "activation"))
    said = f"{2**section.codebook} shared values for each {section.codebook_granularity}"
    names = {"apot": "additive powers of two", "power_of_two": "powers of two", "ternary": "two values and 0"}
    return plan, left, (f"{said}: {names[section.codebook_grid]}" if section.codebook_grid in names else said,)


def _chosen(
    job: Job, section: QuantizeSection, capture: Capture, stats: Stats, asked: Knobs
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Measure every tensor at every width, and assign."""
    rules, graph = job.target.rules, capture.graph
    layers = integer_layers(graph, rules, asked.keep)
    weights = dict.fromkeys(str(op.ref("weight")) for op in layers)
    sites = placed(graph, rules, asked.keep)
    joint = section.average_activation_bits is not None or section.fewer_bops is not None
    inputs = dict.fromkeys(range_owner(sites, str(op.ref("input"))) for op in layers) if joint else {}
    fixed = mixed.ends(graph, rules, asked.keep) if section.keep_ends else {}
    widths = {name: (fixed[name],) if name in fixed else section.widths for name in (*weights, *inputs)}
    floats = {name: {mixed.FLOAT: 0.0} for name in weights} if section.times_faster is not None else {}

    def assign(errors: mixed.Errors, **timed: Any) -> dict[str, int]:
        return mixed.mixed(graph, rules, errors, _budgets(section), section.activation_bits or 8, asked.keep, **timed)

    assign({name: dict.fromkeys(tried, 0.0) | floats.get(name, {}) for name, tried in widths.items()})  # can it be met?
    job.say(f"measuring {len(weights)} weights and {len(inputs)} activations at {len(section.widths)} widths")
    errors = _errors(job, section, capture, stats, asked, widths)
    errors = {name: found | floats.get(name, {}) for name, found in errors.items()}
    times: list[str] = []
    if section.times_faster is None:
        bits = assign(errors)
    else:
        job.say(f"timing files in which one of {len(layers)} layers stays float")
        track = Track(job=job, capture=capture, stats=stats, asked=asked)
        pace = track.pace()
        bits, speed = kept_pace(lambda ms: assign(errors, pace=pace, max_ms=ms), track, pace, section.times_faster)
        left = sum(width == mixed.FLOAT for width in bits.values())
        times = [f"{left} of {len(layers)} layers stay float; measured {speed:.2f}× as fast as all of them"]
    numbers = {name: graph.tensor[name].numel for name in weights if bits[name] != mixed.FLOAT}
    average = sum(bits[name] * n for name, n in numbers.items()) / max(sum(numbers.values()), 1)
    held = _counted(bits[name] for name in numbers)
    said = [f"bits of weights by measured error: {held}; {average:.2f} on average", *times]
    if inputs:
        said.append(f"bits of layers' inputs: {_counted(bits[n] for n in inputs)}")
    return {**fixed, **bits}, tuple(said)


def _budgets(section: QuantizeSection) -> mixed.Budgets:
    return mixed.Budgets(
        average_bits=section.average_bits,
        average_activation_bits=section.average_activation_bits,
        max_bytes=section.max_bytes,
        fewer_bops=section.fewer_bops,
    )


def _errors(
    job: Job,
    section: QuantizeSection,
    capture: Capture,
    stats: Stats,
    asked: Knobs,
    widths: Mapping[str, tuple[int, ...]],
) -> dict[str, dict[int, float]]:
    """Measure the error of every tensor alone at its widths."""
    base, _ = uniform(capture.graph, job.target.rules, replace(asked, weight_range="mse"))
    count = TRACED_ON if section.sensitivity == "hessian" else MEASURED_ON
    batch = next(iter(job.data.train.subset(min(count, len(job.data.train)), seed=job.seed).batches(count)))
    if section.sensitivity == "hessian":
        return trace_errors(capture, base, batch, widths, job.seed)
    return bit_errors(capture, base, stats, batch[0], widths)


def _counted(bits: Iterable[int]) -> str:
    found = Counter(bits)
    return ", ".join(f"{width} in {found[width]}" for width in sorted(found))


def _packed(plan: Plan) -> Plan:
    """Ask for two weights to a byte where they have 4 bits or fewer."""
    entries = []
    for entry in plan.entries:
        if isinstance(entry, Quantize) and entry.role == "weight" and entry.spec.bits <= NIBBLE:
            entry = replace(entry, spec=replace(entry.spec, packed=True))
        entries.append(entry)
    return Plan(entries=tuple(entries))
