"""docs/compress-figures.md and its plots from the cells of ``python -m benchmarks.compress`` alone."""

from html import escape
from typing import Any

from benchmarks.compress_cells import FLOAT, TOOLS
from benchmarks.prune_cells import unpacked
from benchmarks.prune_table import Cells
from kompakt.measure.accuracy import Score, paired_drop

ASKED = {"resnet20": (3.0, 20.0), "resnet18": (6.0, 100.0)}
"""Network → times faster than the faster fp32, times smaller for transfer, at 1 point or less."""
HEAD = """# One command beside other tools: figures

Written by `python -m benchmarks.compress` from `benchmarks/results/compress/`. CIFAR-10 as JPEG, weights of the
zoo. kompakt is one `kompakt compress … --max-drop 1.0 --effort MINUTES`, with 2,000 of the test images as `val/`;
all rows are scored on the other 8,000, the drop against fp32 with its paired 95 % interval. Time: one thread, batch
1, all files in one interleaved loop; above 1 is faster than the fp32 network in ONNX Runtime (ORT), and in
OpenVINO. *For transfer*: the `.kpk`; for files of other tools, the file under `xz -9`. *Lines*: code of the module
in `benchmarks/peers` that stands for the user's script, without blank lines, comments and docstrings; kompakt's is
the command. Minutes are of the wall clock and of the processor.
"""


def page(cells: Cells) -> str:
    """Write the page."""
    lines = [HEAD]
    for name in ASKED:
        found = cells.find(part="made", model=name)
        if found:
            lines += [f"## {name}", "", *_table(cells, name), *_search(found, name)]
        else:
            lines += [f"## {name}", "", "Not run yet.", ""]
    return "\n".join(lines)


def _table(cells: Cells, name: str) -> list[str]:
    races = cells.find(part="race", model=name)
    made = {cell["key"]["tool"]: cell for cell in cells.find(part="made", model=name)}
    if not races:
        return ["The artifacts are not scored yet.", ""]
    latest = races[-1]
    rows, whole = latest["rows"], latest["bytes"]["size_bytes"]
    lines = [
        "| tool | lines | minutes: wall, processor | bytes | for transfer, times smaller | accuracy, % | drop, points "
        "| × fp32 of ORT | × fp32 of OpenVINO |",
        "| --- " * 9 + "|",
    ]
    lines.append(_row(FLOAT, {"size_bytes": whole, "xz_bytes": latest["bytes"]["xz_bytes"]}, rows, latest))
    lines += [_row(tool, made[tool], rows, latest) for tool in TOOLS if tool in rows and tool in made]
    missing = [tool for tool in TOOLS if tool not in rows]
    busy = f"Load of the machine while timing: {latest['load']:.1f} on {latest['cores']} cores; {latest['machine']}."
    lines += ["", busy, *([f"Not run: {', '.join(missing)}."] if missing else []), ""]
    return lines + _verdict(name, made, rows, latest)


def _drop(rows: dict[str, Any], tool: str, images: int) -> Any:
    before, after = (Score(correct=unpacked(rows[name]["correct"], images)) for name in (FLOAT, tool))
    return paired_drop(before, after)


def _transfer(cell: dict[str, Any]) -> int:
    return int(cell.get("packed_bytes") or cell["xz_bytes"])


def _row(tool: str, cell: dict[str, Any], rows: dict[str, Any], latest: dict[str, Any]) -> str:
    drop = _drop(rows, tool, latest["images"])
    shown = "" if tool == FLOAT else f"{drop.points:.2f} ({drop.ci95[0]:.2f} to {drop.ci95[1]:.2f})"
    took = f"{cell['wall_s'] / 60:.1f}, {cell['cpu_s'] / 60:.1f}" if "wall_s" in cell else ""
    smaller = latest["bytes"]["size_bytes"] / _transfer(cell)
    return (
        f"| {tool} | {cell.get('lines', '')} | {took} | {cell['size_bytes']:,} | {_transfer(cell):,}, {smaller:.1f} | "
        f"{100 * rows[tool]['accuracy']:.2f} | {shown} | {_faster(rows, tool, FLOAT)} | "
        f"{_faster(rows, tool, 'fp32, OpenVINO')} |"
    )


def _faster(rows: dict[str, Any], tool: str, than: str) -> str:
    return f"{_times(rows, tool, than):.2f}" if than in rows else ""


def _times(rows: dict[str, Any], tool: str, than: str) -> float:
    """How many times faster; every ratio was taken against fp32 of ONNX Runtime in the same round."""
    return float(rows[than]["latency"]["ratio"] / rows[tool]["latency"]["ratio"])


def _verdict(name: str, made: dict[str, Any], rows: dict[str, Any], latest: dict[str, Any]) -> list[str]:
    """Say what was asked of kompakt, whether it was reached, and which peer is ahead in what."""
    if "kompakt" not in rows:
        return ["kompakt's search has not been run here.", ""]
    faster, smaller = ASKED[name]
    floats = [tool for tool in (FLOAT, "fp32, OpenVINO") if tool in rows]
    speed = min(_times(rows, "kompakt", tool) for tool in floats)
    size = latest["bytes"]["size_bytes"] / _transfer(made["kompakt"])
    drop = _drop(rows, "kompakt", latest["images"]).points
    kept = "within" if drop <= 1 else "beyond"
    lines = [
        f"Asked: {faster:g}× faster than the faster fp32 and {smaller:g}× smaller, at 1 point or less. kompakt: "
        f"{speed:.2f}× ({'reached' if speed >= faster and drop <= 1 else 'not reached'}) and {size:.1f}× "
        f"({'reached' if size >= smaller and drop <= 1 else 'not reached'}), {kept} 1 point ({drop:.2f}).",
        "",
    ]
    for tool in (tool for tool in rows if tool in made and tool != "kompakt" and tool not in floats):
        ahead = [what for what, is_so in (
            ("bytes for transfer", _transfer(made[tool]) < _transfer(made["kompakt"])),
            ("latency", _times(rows, tool, "kompakt") > 1),
        ) if is_so]  # fmt: skip
        lost = _drop(rows, tool, latest["images"]).points
        lines.append(f"- {tool} ({lost:.2f} points lost) is ahead of kompakt in {' and '.join(ahead) or 'neither'}.")
    return [*lines, ""]


def _search(made: list[dict[str, Any]], name: str) -> list[str]:
    """Tell of the search: the plot, every candidate, and what was decided."""
    lines: list[str] = []
    for cell in (cell for cell in made if cell["key"]["tool"] == "kompakt"):
        lines += [
            f"### The search, {cell['key']['effort']:g} minutes",
            "",
            f"![points lost against bytes and time](compress-{name}.svg)",
            "",
            "Points lost on the validation split, as counted and as fitted probabilities expect; ★ ships, ● is",
            "bettered by none.",
            "",
            "| candidate | what | counted | expected | bytes as `.kpk` | time, of fp32 | seconds |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *map(_candidate, cell["candidates"]),
            "",
            *(f"- {escape(text, quote=False)}" for text in cell["decisions"]),
            "",
        ]
    return lines


def _candidate(item: dict[str, Any]) -> str:
    mark = " ★" if item["chosen"] else " ●" if item["front"] else ""
    if item["state"] != "verified":
        note = escape(item["note"], quote=False)
        return f"| {item['number']} | {item['what']}: {note} | | | | | {item['seconds']:.0f} |"
    expected = item.get("expected_points")
    believed = "–" if expected is None else f"{expected:.2f}"
    return (
        f"| {item['number']}{mark} | {item['what']} | {item['drop_points']:.2f} | {believed} | "
        f"{item['packed_bytes']:,} | {item['latency_ratio']:.2f} | {item['seconds']:.0f} |"
    )


WIDE, HIGH, PAD = 380, 300, 52
BLUE, GREY, RED = "#0072b2", "#999999", "#d55e00"


def plot(candidates: list[dict[str, Any]], limit: float = 1.0) -> str:
    """Draw the verified candidates twice: points lost against kilobytes, and against the time's ratio."""
    shown = [item for item in candidates if item["state"] == "verified"]
    most = max((min(item["drop_points"], 8 * limit) for item in shown), default=limit) * 1.1 + limit / 4
    left = [(item["packed_bytes"] / 1000, item) for item in shown]
    right = [(item["latency_ratio"], item) for item in shown]
    parts = [
        _panel(0, left, most, limit, "bytes as .kpk, kB"),
        _panel(WIDE, right, most, limit, "time, of fp32 in ONNX Runtime"),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDE}" height="{HIGH}" font-family="sans-serif" '
    return (
        head + 'font-size="12">\n<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(shift: int, points: list[tuple[float, dict[str, Any]]], most: float, limit: float, title: str) -> str:
    low = min((item["drop_points"] for _, item in points), default=0.0)
    low, far = min(low, 0.0) - 0.2, max((value for value, _ in points), default=1.0) * 1.08

    def place(value: float, drop: float) -> tuple[float, float]:
        share = (min(drop, most) - low) / (most - low)
        return shift + PAD + (WIDE - 2 * PAD) * value / far, HIGH - PAD - (HIGH - 2 * PAD) * share

    (left, floor), (right, top) = place(0.0, low), place(far, most)
    lines = [f'<rect x="{left}" y="{top}" width="{right - left}" height="{floor - top}" fill="none" stroke="{GREY}"/>']
    edge = place(0.0, limit)[1]
    lines.append(
        f'<line x1="{left}" x2="{right}" y1="{edge:.1f}" y2="{edge:.1f}" stroke="{RED}" stroke-dasharray="4"/>'
    )
    lines.append(f'<text x="{left + 4}" y="{edge - 4:.1f}" fill="{RED}">budget: {limit:g}</text>')
    for value, item in sorted(points, key=lambda pair: pair[1]["chosen"]):
        x, y = place(value, item["drop_points"])
        color, size = (BLUE if item["front"] or item["chosen"] else GREY), (7 if item["chosen"] else 4)
        told = f"{item['number']}: {item['what']}, {item['drop_points']:.2f} points"
        lines.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{color}"><title>{escape(told)}</title></circle>'
        )
    lines.append(f'<text x="{left}" y="{HIGH - 18}">{title}</text>')
    lines.append(f'<text x="{right}" y="{floor + 15}" text-anchor="end">{far:.3g}</text>')
    lines.append(f'<text x="{left - 4}" y="{top + 10}" text-anchor="end">{most:.1f}</text>')
    lines.append(f'<text x="{left - 4}" y="{floor}" text-anchor="end">{low:.1f}</text>')
    lines.append(f'<text x="{left}" y="{top - 8}">points lost, validation; the large point ships</text>')
    return "\n".join(lines)
