"""Prune half of the channels of many model families, beside torch-pruning: ``python -m benchmarks.coverage``.

Every model runs in a process of its own with a time limit, on one thread, with random weights. Our
figure: trace, coupling, the check that the code follows, plan and a run of the pruned model. Theirs:
``MagnitudePruner`` with its defaults, the classifier's output layer ignored (as its README says), and a
run. torch-pruning is looked for in this interpreter, or in the one that ``--other`` names.

Writes ``docs/coverage.md`` and ``benchmarks/results/coverage-*.json``, one file for each side.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCHVISION = [
    "alexnet",
    "vgg11_bn",
    "squeezenet1_0",
    "densenet121",
    "googlenet",
    "inception_v3",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
]
TIMM = [
    "resnet18",
    "resnetv2_50x1_bit",
    "efficientnet_b0",
    "convnext_nano",
    "convnextv2_nano",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "regnety_002",
    "ghostnet_100",
    "hrnet_w18_small",
    "dla34",
    "repvgg_a0",
    "fastvit_t8",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "swin_tiny_patch4_window7_224",
    "poolformer_s12",
    "mixer_s16_224",
    "levit_128s",
    "xcit_nano_12_p16_224",
    "edgenext_xx_small",
]
SEGMENTATION = ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]
NAMES = (
    *(f"torchvision/{name}" for name in TORCHVISION),
    *(f"timm/{name}" for name in TIMM),
    *(f"segmentation/{name}" for name in SEGMENTATION),
)
AUXILIARY = ("googlenet", "inception_v3")  # built without auxiliary heads, which inference never runs


def build(reference: str):
    """Build a model with random weights and return it with an input."""
    import torch
    import torchvision

    torch.manual_seed(0)
    source, _, name = reference.partition("/")
    size = 224
    if source == "timm":
        import timm

        model = timm.create_model(name, pretrained=False)
        size = model.default_cfg["input_size"][-1]
    elif source == "segmentation":
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    else:
        more = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
        model = torchvision.models.get_model(name, weights=None, **more)
        size = 299 if name == "inception_v3" else 224
    return model.eval(), torch.randn(1, 3, size, size)


def ours(reference: str) -> dict:
    """Prune half of every group with kompakt."""
    import torch

    from kompakt.build.follow import follow
    from kompakt.build.prune import apply_prune
    from kompakt.graph.coupling import couple
    from kompakt.graph.trace import trace
    from kompakt.methods.channels import Knobs, channels
    from kompakt.methods.scores import unit_scores

    model, example = build(reference)
    marks = [time.perf_counter()]
    graph = trace(model, example).graph
    marks.append(time.perf_counter())
    busy = time.process_time()
    found = couple(graph)
    busy = time.process_time() - busy
    marks.append(time.perf_counter())
    coupling = follow(model, found, example)
    plan = channels(coupling, unit_scores(coupling, model.state_dict()), Knobs(ratio=0.5))
    pruned = apply_prune(model, plan, example)
    marks.append(time.perf_counter())
    with torch.no_grad():
        finite = all(bool(torch.isfinite(value).all()) for value in _tensors(pruned(example)))
    if not finite:
        raise ValueError("the pruned model's outputs are not finite")
    before, after = _params(model), _params(pruned)
    return {
        "params": before / after,
        "groups": len(coupling.groups),
        "left": [f"{item.name}: {item.reason}" for item in coupling.left],
        "ties": len(coupling.ties),
        "trace_s": marks[1] - marks[0],
        "coupling_s": busy,
        "seconds": marks[-1] - marks[0],
    }


def theirs(reference: str) -> dict:
    """Prune half of the channels with torch-pruning's defaults."""
    import torch
    import torch_pruning

    model, example = build(reference)
    with torch.no_grad():
        outputs = {tuple(value.shape)[1] for value in _tensors(model(example))}
    ends = [
        module
        for module in model.modules()
        if (isinstance(module, torch.nn.Linear) and module.out_features in outputs)
        or (isinstance(module, torch.nn.Conv2d) and module.out_channels in outputs and module.kernel_size == (1, 1))
    ][-2:]
    before = _params(model)
    start = time.perf_counter()
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=ends,
    )
    pruner.step()
    with torch.no_grad():
        shapes = [tuple(value.shape)[1] for value in _tensors(model(example))]
    if not set(shapes) <= outputs:
        raise ValueError(f"the outputs themselves were pruned to {shapes}")
    return {"params": before / _params(model), "seconds": time.perf_counter() - start}


def _tensors(value):
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def _params(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def attempt(side: str, reference: str, interpreter: str, limit_s: float) -> dict:
    """Run one model in a process of its own."""
    command = [interpreter, "-m", "benchmarks.coverage", "--one", side, reference]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, cwd=ROOT, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {limit_s:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"error": last[:160]}


def table(rows: dict[str, dict[str, dict]], limit_s: float) -> str:
    """Write the table as Markdown."""
    import torch

    won = [name for name, row in rows.items() if "params" in row["kompakt"]]
    other = [name for name, row in rows.items() if "params" in row["torch-pruning"]]
    missing = [name for name in other if name not in won]
    slowest = max((row["kompakt"].get("coupling_s", 0.0), name) for name, row in rows.items())
    lines = [
        "# Coverage of structured pruning",
        "",
        "Half of the channels of every group, random weights, one thread, each model in a process of its own with a "
        f"limit of {limit_s:.0f} s. Made by `python -m benchmarks.coverage` (torch {torch.__version__}, torch-pruning "
        "1.6.1 with its defaults and the output layers ignored). *Parameters* is how many times fewer there are. The "
        "outputs of a model are never pruned, so a large classifier bounds the ratio (1000 classes behind a small "
        "network). *s* is everything from the model to a pruned model that ran, by the clock: on a machine that did "
        "other work too, so a hint and no comparison. *coupling* is the processor time of the part that finds what "
        "falls together.",
        "",
        f"kompakt: {len(won)} of {len(rows)}; torch-pruning: {len(other)} of {len(rows)}. "
        f"Pruned by torch-pruning and not by kompakt: {', '.join(missing) or 'none'}. "
        f"Slowest coupling: {slowest[1]}, {slowest[0]:.1f} s.",
        "",
        "| model | parameters | s | coupling, s | layers left whole | torch-pruning: parameters | s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        mine, his = row["kompakt"], row["torch-pruning"]
        ok = "params" in mine
        lines.append(
            f"| {name} | {_times(mine)} | {_seconds(mine, 'seconds')} | {_seconds(mine, 'coupling_s')} | "
            f"{len(mine['left']) if ok else ''} | {_times(his)} | {_seconds(his, 'seconds')} |"
        )
    return "\n".join(lines) + "\n"


def _times(side: dict) -> str:
    return f"{side['params']:.2f}×" if "params" in side else f"fails: {side['error']}".replace("|", "/")


def _seconds(side: dict, key: str) -> str:
    return f"{side[key]:.1f}" if key in side else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", default=sys.executable, help="the Python that has torch-pruning")
    parser.add_argument("--only", default="", help="models whose reference contains this")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for each model and side")
    parser.add_argument("--side", choices=["kompakt", "torch-pruning", "both"], default="both")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        import torch

        torch.set_num_threads(1)
        print(json.dumps({"kompakt": ours, "torch-pruning": theirs}[given.one[0]](given.one[1])))
        return
    interpreters = {"kompakt": sys.executable, "torch-pruning": given.other}
    for name in NAMES:
        for side, interpreter in interpreters.items():
            wanted = given.only in name and given.side in (side, "both")
            if wanted and not (given.resume and name in _read(side)):
                found = attempt(side, name, interpreter, given.limit)
                print(name, side, _times(found), _seconds(found, "seconds"), flush=True)
                _results(side).parent.mkdir(parents=True, exist_ok=True)
                _results(side).write_text(json.dumps({**_read(side), name: found}, indent=1))
    sides = {side: _read(side) for side in interpreters}
    if all(name in read for name in NAMES for read in sides.values()):
        text = table({name: {side: read[name] for side, read in sides.items()} for name in NAMES}, given.limit)
        (ROOT / "docs" / "coverage.md").write_text(text)
        print(text)


def _results(side: str) -> Path:
    return ROOT / "benchmarks" / "results" / f"coverage-{side}.json"


def _read(side: str) -> dict[str, dict]:
    return json.loads(_results(side).read_text()) if _results(side).exists() else {}


if __name__ == "__main__":
    main()
