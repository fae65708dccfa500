"""Capture a model once with ``torch.export``: the only file that touches tracing.

``trace`` returns a ``Capture``: the flat graph module that exporters and the simulator share, and the
``Graph`` of facts about it. The batch dimension stays symbolic where the model allows it.
"""

import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor as TorchTensor
from torch import fx, nn

from kompakt.errors import ModelError
from kompakt.graph.cost import op_macs
from kompakt.graph.graph import Graph, Op, Ref, Tensor, Value

_PURE = frozenset(
    {"add", "clamp", "div", "elu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mul"}
    | {"relu", "relu6", "sigmoid", "silu", "sub", "tanh"}
)
_VIEWS = frozenset({"slice", "select", "view", "chunk", "split", "getitem", "unbind", "narrow", "detach", "alias"})
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = Path(torch.__file__).parent


@dataclass(frozen=True, kw_only=True)
class Capture:
    """A captured model: ``module`` computes what the model computes, ``graph`` says how.

    ``module`` reads the tensors of the model that was traced (it does not copy them): callers that
    change tensors copy first, as ``kompakt.graph.fold`` does. ``example`` is the input that was traced.
    """

    module: fx.GraphModule
    graph: Graph
    example: tuple[TorchTensor, ...]


def trace(model: nn.Module, example: TorchTensor | tuple[TorchTensor, ...]) -> Capture:
    """Capture ``model`` in eval mode on ``example``, whose first dimension is the batch.

    Args:
        model: any module that ``torch.export`` takes; it is left as it was.
        example: the inputs, batch first. A batch of 2 or more keeps the batch symbolic.

    Raises:
        ModelError: the model cannot be captured; the message names the line of the code that stopped it.

    Example:
        >>> import torch
        >>> from kompakt.graph.trace import trace
        >>> capture = trace(torch.nn.Linear(4, 3), torch.zeros(2, 4))
        >>> capture.graph.macs, capture.graph.params
        (12, 15)
    """
    inputs = (example,) if isinstance(example, TorchTensor) else tuple(example)
    dynamic = tuple({0: torch.export.Dim.AUTO} if value.ndim and value.shape[0] > 1 else None for value in inputs)
    with _eval_mode(model), quiet_torch():
        try:
            program = torch.export.export(model, inputs, dynamic_shapes=dynamic, strict=False)
            module = program.module(check_guards=False)
        except Exception as error:
            raise ModelError(_explain(error, model)) from error
    _functionalize(module)
    return Capture(module=module, graph=read(module, inputs[0].shape[0] if inputs[0].ndim else 1), example=inputs)


def read(module: fx.GraphModule, batch: int) -> Graph:
    """Read the facts off a captured graph module whose nodes carry fake values (``meta["val"]``).

    Args:
        module: a graph module of ATen operators.
        batch: the batch that the example had; MACs are stated for one example.
    """
    tensors, aliases, names = _tensors(module)
    ops = tuple(_op(node, names, batch) for node in module.graph.nodes if _is_op(node))
    output = next(node for node in module.graph.nodes if node.op == "output")
    returned = tuple(node.name for node in output.all_input_nodes)
    return Graph(ops=ops, tensors=tensors, outputs=returned, aliases=aliases)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Hold back torch's warnings, log and prints: what goes wrong is raised, in one line."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and back as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _is_op(node: fx.Node) -> bool:
    """Whether a node computes a tensor (symbolic sizes and attribute reads do not)."""
    if node.op == "placeholder":
        return True
    if node.op != "call_function":
        return False
    return not isinstance(node.meta.get("val"), torch.SymInt | int | float | torch.SymFloat | torch.SymBool | bool)


def _tensors(module: fx.GraphModule) -> tuple[tuple[Tensor, ...], tuple[tuple[str, str], ...], dict[str, str]]:
    """Return the tensors that the graph reads, the aliases among them, and node name → tensor name."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    aliases: list[tuple[str, str]] = []
    names: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        value = attribute(module, name)
        kind = "parameter" if name in parameters else "buffer" if name in buffers else "constant"
        owner = first.setdefault(id(value), name)
        if owner != name and (name, owner) not in aliases:
            aliases.append((name, owner))
        names[node.name] = owner
        found[owner] = Tensor(name=owner, shape=tuple(value.shape), dtype=_dtype(value), kind=kind)
    return tuple(found.values()), tuple(aliases), names


def attribute(module: nn.Module, name: str) -> TorchTensor:
    """Return the tensor at a qualified name such as ``layer1.0.conv1.weight``."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _op(node: fx.Node, names: dict[str, str], batch: int) -> Op:
    """Read one node."""
    shapes = _shapes(node.meta.get("val"))
    kind = kind_of(node)
    arguments = {key: _value(value, names) for key, value in _arguments(node).items()}
    operands = [_shapes(item.meta.get("val"))[0] for item in node.all_input_nodes if _shapes(item.meta.get("val"))]
    module, module_type = _owner(node)
    return Op(
        name=node.name,
        kind=kind,
        arguments=arguments,
        shape=shapes[0] if shapes else (),
        shapes=shapes,
        dtype=_dtype(node.meta.get("val")),
        module=module,
        module_type=module_type,
        source=_source(node),
        macs=op_macs(kind, shapes[0] if shapes else (), operands) // max(batch, 1),
    )


def kind_of(node: fx.Node) -> str:
    """Return the ATen operator of a node without namespace and overload, e.g. ``conv2d``."""
    if node.op == "placeholder":
        return "input"
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.__name__.split(".")[0]
    return getattr(node.target, "__name__", str(node.target))


def _arguments(node: fx.Node) -> dict[str, object]:
    """Return a node's arguments by the names of the operator's schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {f"arg{index}": value for index, value in enumerate(node.args)} | dict(node.kwargs)
    found: dict[str, object] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            found[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def _value(value: object, names: Mapping[str, str]) -> Value:
    """Turn a node's argument into plain data."""
    if isinstance(value, fx.Node):
        known = value.meta.get("val")
        if isinstance(known, torch.SymInt | torch.SymFloat | torch.SymBool | int | float):
            return _plain(known)
        return Ref(names.get(value.name, value.name))
    if isinstance(value, list | tuple):
        return tuple(_value(item, names) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _plain(value)


def _plain(value: object) -> bool | int | float | str:
    """Turn symbolic numbers into the example's, and anything else into its name."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint
    if type(value) in (bool, int, float):
        return value
    return str(value)


def _shapes(value: object) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a fake value: one, or one for each tensor of a tuple."""
    if isinstance(value, TorchTensor):
        return (tuple(int(_plain(size)) for size in value.shape),)
    if isinstance(value, list | tuple):
        return tuple(shape for item in value for shape in _shapes(item))
    return ()


def _dtype(value: object) -> str:
    """Return the name of a tensor's type, e.g. ``float32``."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    return str(first.dtype).removeprefix("torch.") if isinstance(first, TorchTensor) else ""


def _owner(node: fx.Node) -> tuple[str, str]:
    """Return the qualified name and class of the innermost module that ran a node."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    name = kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
    return path.split("@")[0], name


def _source(node: fx.Node) -> str:
    """Return ``file:line`` of the user's code that made a node: the last frame outside of torch."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if _TORCH not in Path(frame[0]).parents]
    return ":".join(own[-1]) if own else ""


def _functionalize(module: fx.GraphModule) -> None:
    """Replace in-place operators by their pure forms where nothing else sees the mutated tensor."""
    for node in list(module.graph.nodes):
        kind = kind_of(node) if node.op == "call_function" else ""
        if not kind.endswith("_") or kind[:-1] not in _PURE:
            continue
        base = node.args[0]
        if not isinstance(base, fx.Node) or kind_of(base) in _VIEWS or base.op == "get_attr":
            continue
        packet = getattr(torch.ops.aten, kind[:-1])
        node.target = getattr(packet, node.target._overloadname)
        node._rename(kind[:-1])
        _redirect_later_users(module, base, node)
    module.graph.lint()
    module.recompile()


def _redirect_later_users(module: fx.GraphModule, base: fx.Node, node: fx.Node) -> None:
    """Let every user of ``base`` that comes after ``node`` read ``node`` instead."""
    order = {item: index for index, item in enumerate(module.graph.nodes)}

    def later(user: fx.Node) -> bool:
        return order[user] > order[node]

    base.replace_all_uses_with(node, delete_user_cb=later)


def _explain(error: Exception, model: nn.Module) -> str:
    """Say in one line which line of whose code stopped the capture."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _TORCH not in Path(f.filename).parents]
    frames = [frame for frame in frames if Path(frame.filename) != Path(__file__)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{type(model).__name__}: cannot be captured{where}: {type(error).__name__}: {first[:300]}"
