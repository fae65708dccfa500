"""``docs/ptq.md`` from the figures of ``python -m benchmarks.ptq``: tables, goals met and missed."""

from collections.abc import Sequence
from typing import Any

from benchmarks.ptq_subjects import ROOT

NAMES = {
    "float": "fp32 ONNX, ONNX Runtime",
    "kompakt": "**kompakt**",
    "kompakt-mse": '**kompakt**, `weight_range = "mse"`',
    "kompakt-8bit": "**kompakt**, the same, 8-bit weights that need VNNI",
    "ort-default": "`quantize_static`, its defaults",
    "ort-u8s8": "`quantize_static`, u8·s8, per channel",
    "ort-u8s8-7bit": "`quantize_static`, u8·s8, per channel, `reduce_range`",
    "ort-s8s8": "`quantize_static`, s8·s8, per channel",
    "nncf-openvino": "NNCF, in OpenVINO",
    "nncf-openvino-fix": "NNCF, `OverflowFix.ENABLE`, in OpenVINO",
    "nncf-onnx": "NNCF (ONNX), in ONNX Runtime",
    "nncf-onnx-fix": "NNCF (ONNX), `OverflowFix.ENABLE`, in ONNX Runtime",
}
PORTABLE = ("ort-u8s8-7bit", "nncf-openvino-fix", "nncf-onnx-fix")
"""Peers whose files keep free of int16 saturation on x86 without VNNI, as kompakt's do."""
COLUMNS = ("", "accuracy", "drop, points", "same top-1", "output SQNR", "seconds", "CPU s", "bytes", "latency")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Write one subject's table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join(lines + [_line(name, row) for name, row in rows.items()])


def _line(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {NAMES[name]} | fails: {row['error'].replace('|', '/')} |" + " |" * (len(COLUMNS) - 2)
    accuracy = f"{100 * row['accuracy']:.2f} %" if "accuracy" in row else ""
    drop = f"{row['drop_points']:+.2f} ({_span(row['drop_ci95'])})" if "accuracy" in row and name != "float" else ""
    own = name == "float"
    cells = (
        NAMES[name],
        accuracy,
        drop,
        "" if own else f"{100 * row['agreement']:.2f} %",
        "" if own else f"{row['sqnr_db']:.1f} dB",
        f"{row['wall_s']:.1f}" if "wall_s" in row else "",
        f"{row['cpu_s']:.1f}" if "cpu_s" in row else "",
        f"{row['size_bytes']:,}",
        f"{row['latency']['p50_ms']:.2f} ms" if own else _ratio(row["latency"]),
    )
    return "| " + " | ".join(cells) + " |"


def _span(limits: Sequence[float]) -> str:
    return f"{limits[0]:+.2f} to {limits[1]:+.2f}"


def _ratio(times: dict[str, Any]) -> str:
    low, high = times["ratio_ci95"]
    return f"{times['ratio']:.3f} ({low:.3f}–{high:.3f})"


def goals(rows: dict[str, dict[str, Any]]) -> list[str]:
    """State each goal of a subject with its figures: reached or missed."""
    ran = {name: row for name, row in rows.items() if "latency" in row}
    peers = {name: row for name, row in ran.items() if name != "float" and not name.startswith("kompakt")}
    safe = {name: row for name, row in peers.items() if name in PORTABLE}
    on_ort = {name: row for name, row in peers.items() if "openvino" not in name}
    pairs = [("kompakt", safe), ("kompakt-mse", safe), ("kompakt", peers), ("kompakt-8bit", peers)]
    found = [_accuracy(name, ran[name], against) for name, against in pairs if name in ran and against]
    if "kompakt" in ran and peers:
        found.append(_time(ran["kompakt"], peers))
    if "kompakt" in ran and on_ort:
        found.append(_latency(ran["kompakt"], on_ort))
    return found


def _accuracy(name: str, ours: dict, peers: dict[str, dict]) -> str:
    scored = "accuracy" in ours
    best = max(peers, key=lambda peer: peers[peer]["accuracy" if scored else "sqnr_db"])
    what = "peer that is right without VNNI too" if set(peers) <= set(PORTABLE) else "peer"
    start = f"{NAMES[name]} against the best {what} ({NAMES[best]}): "
    if not scored:
        met = "reached" if ours["sqnr_db"] >= peers[best]["sqnr_db"] else "missed"
        return start + f"output SQNR {ours['sqnr_db']:.1f} and {peers[best]['sqnr_db']:.1f} dB, **{met}**"
    gain, *limits = peers[best]["kompakt_better"][name]
    met = "reached" if gain >= 0 else "missed within the noise" if limits[1] > 0 else "missed"
    return start + f"accuracy {gain:+.2f} points ({_span(limits)}), **{met}**"


def _time(ours: dict, peers: dict[str, dict]) -> str:
    fastest = min(peers, key=lambda name: peers[name]["wall_s"])
    export, peer = ours["float_export_s"], peers[fastest]["wall_s"]
    met = "reached" if ours["wall_s"] <= peer else "reached" if ours["wall_s"] <= peer + export else "missed"
    how = " from the PyTorch model, not from the ONNX file" if peer < ours["wall_s"] <= peer + export else ""
    return (
        f"time against the fastest peer ({NAMES[fastest]}): kompakt {ours['wall_s']:.1f} s from the PyTorch model; the "
        f"peer {peer:.1f} s from the ONNX file, {peer + export:.1f} s with the {export:.1f} s that exporting it takes: "
        f"**{met}**{how}"
    )


def _latency(ours: dict, peers: dict[str, dict]) -> str:
    fastest = min(peers, key=lambda name: peers[name]["latency"]["ratio"])
    own, other = ours["latency"]["ratio"], peers[fastest]["latency"]["ratio"]
    met = "reached" if own <= other else "within 2 %" if own <= 1.02 * other else "missed"
    return f"latency in ONNX Runtime against {NAMES[fastest]}: {own:.3f} of fp32, {other:.3f}: **{met}**"


def page(result: dict[str, Any]) -> str:
    """Write docs/ptq.md."""
    where, packages = result["machine"], dict(result["versions"])
    for part in result["subjects"].values():
        for row in part["rows"].values():
            packages |= row.get("versions", {})
    shown = ("kompakt", "torch", "onnx", "onnxruntime", "nncf", "openvino")
    parts = "\n\n".join(_section(part) for part in result["subjects"].values())
    remarks = ROOT / "benchmarks" / "ptq_remarks.md"
    return f"""# Int8 after training, beside ONNX Runtime's quantizer and NNCF

`{result["command"]}`, {result["date"]}, on {where["cpu"]} ({where["cores"]} cores, {where["isa"]}; load
{result["load"]:.1f}); {", ".join(f"{name} {packages[name]}" for name in shown if name in packages)}.

Every tool got the same fp32 network and the same calibration images, in a fresh process, with as many threads as
the machine has cores. *Seconds* (median of three processes, imports not counted) is what it takes to the file on disk:
for kompakt from the PyTorch model in memory, for the peers from the fp32 ONNX file (exported by kompakt, batch norms
folded); for ONNX Runtime it includes `quant_pre_process`. *Latency* is the ratio to the fp32 ONNX file in ONNX
Runtime: one thread, batch 1, all files in one interleaved loop, with its 95 % interval. OpenVINO is scored with f32
where it is not integer and timed with its own default (bf16 where the CPU has it). *Drop* is paired, with its 95 %
interval; *same top-1* and *output SQNR* compare with the fp32 file. NNCF used all images too (its default would take
300). Photographs: {result["images"]}.

{parts}
{remarks.read_text() if remarks.exists() else ""}"""


def _section(part: dict[str, Any]) -> str:
    sentence = f"{part['calibration']} calibration images, {part['evaluation']} scored."
    listed = "\n".join(f"- {line}" for line in goals(part["rows"]))
    return f"## {part['title']}\n\n{sentence}\n\n{table(part['rows'])}\n\n{listed}"
