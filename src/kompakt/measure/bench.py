"""Time of each node inside a runtime, from the runtime's own profile."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from kompakt.errors import FormatError

_SUFFIX = "_kernel_time"


def op_times(profile: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Sum ONNX Runtime's profile to milliseconds a node and inference.

    Args:
        profile: the loaded JSON that ``InferenceSession.end_profiling`` wrote: a list of trace
            events, of which those of category ``Node`` that end in ``_kernel_time`` are kernels
            and those named ``model_run`` are whole inferences; ``dur`` is in microseconds.

    Returns:
        Node name → mean milliseconds for one inference, in order of first execution. Nodes are
        those of the optimised graph: a fused node bears the name that the runtime gave it.

    Raises:
        FormatError: the profile holds no inference.
    """
    total_us: dict[str, float] = defaultdict(float)
    inferences = 0
    for event in profile:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_SUFFIX):
            total_us[name.removesuffix(_SUFFIX)] += float(event["dur"])
        inferences += name == "model_run"
    if not inferences:
        raise FormatError("the profile holds no model_run event: run the session before end_profiling")
    return {name: us / 1000 / inferences for name, us in total_us.items()}
