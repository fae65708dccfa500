"""The tables of ``docs/targets.md``, made from the lines of ``benchmarks/results/targets``."""

from pathlib import Path
from typing import Any

from benchmarks.targets_subjects import KNOWN
from kompakt.artifact.targets import TARGETS
from kompakt.report.numbers import bytes_text, ms_text, share_text

BEGIN, END = "<!-- begin: python -m benchmarks.targets -->", "<!-- end -->"
LABELLED = ("resnet20", "trained18")
"""Networks with labels; the others' decisions are compared with the float model's."""
Line = dict[str, Any]


def write_page(page: Path, lines: dict[str, list[Line]]) -> None:
    """Put the tables between the marks of the page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    made = "\n".join(_network(name, found) for name, found in lines.items() if found)
    page.write_text(f"{before}{BEGIN}\n\n{made}\n{END}{after}")


def _network(name: str, lines: list[Line]) -> str:
    parts = [f"### {KNOWN[name].title}\n"]
    for pruned in (False, True):
        rows = _rows(name, [line for line in lines if line["key"]["pruned"] == pruned])
        if rows:
            what = "accuracy" if name in LABELLED else "same decisions"
            parts.append(f"{'Half of the channels cut' if pruned else 'Whole network'}:\n")
            parts.append(f"| runtime | bits | ÷ fp32 of ONNX Runtime | p50 | bytes | memory | {what} | as simulated |")
            parts.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
            parts += [*rows, ""]
    machines = {line["machine"]["cpu"]: line for line in lines if "machine" in line}
    parts += [f"{cpu}, {line['machine']['isa']}, load {line['loaded']:.1f}.\n" for cpu, line in machines.items()]
    return "\n".join(parts)


def _rows(name: str, lines: list[Line]) -> list[str]:
    measured: dict[tuple[str, str], Line] = {}
    for line in lines:
        for row in line.get("result", []) if line["key"]["step"] == "bench" else []:
            measured[row["runtime"], Path(row["file"]).parent.name.split("-")[1]] = row
    found = []
    order = list(TARGETS)
    for line in sorted(lines, key=lambda line: order.index(line["key"]["runtime"]) if "runtime" in line["key"] else -1):
        if line["key"]["step"] != "export":
            continue
        key = (line["key"]["runtime"], line["key"]["bits"])
        if "error" in line:
            found.append(f"| {key[0]} | {key[1]} | not made: {line['error']} |  |  |  |  |  |")
            continue
        row, parity = measured.get(key), line["result"]["parity"]
        same = "–" if parity is None else f"{share_text(parity['top1_agreement'])}, {parity['sqnr_db']:.0f} dB"
        found.append(f"| {key[0]} | {key[1]} | {_figures(row)} | {same} |")
    return found


def _figures(row: Line | None) -> str:
    if row is None:
        return "– | – | – | – | –"
    low, high = row["ratio_ci95"]
    return " | ".join(
        (
            f"{row['ratio']:.3f} ({low:.3f}–{high:.3f})",
            ms_text(row["latency_ms"]["p50"]),
            bytes_text(row["size_bytes"]),
            bytes_text(row["peak_memory_bytes"]),
            share_text(row["accuracy"]),
        )
    )
