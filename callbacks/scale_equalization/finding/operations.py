"""Names of tensor operations: which ones join maps and which are linear layers.

What an operation does to a branch is found by running it (`probing`). Names are used to know where
to look, and to say in a report what was met; a name never makes a layer foldable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

CONCATENATIONS = frozenset(
    {"cat", "concat", "concatenate", "hstack", "vstack", "dstack", "column_stack", "row_stack"}
)
STACKS = frozenset({"stack"})
# They write one map into a part of another; the argument that is written, by position and name.
WRITES = {
    "setitem": (2, "value"),
    "copy": (1, "src"),
    "index_copy": (3, "source"),
    "index_put": (2, "values"),
    "slice_scatter": (1, "src"),
    "select_scatter": (1, "src"),
    "scatter": (3, "src"),
    "masked_scatter": (2, "source"),
}
RESIZES = frozenset({"interpolate", "upsample", "grid_sample"})
TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
# Linear layers, and how many of their input's last dimensions come after the channels.
CONSUMERS = {"linear": 0} | {
    f"{kind}{n}d": n for kind in ("conv", "conv_transpose") for n in (1, 2, 3)
}
DROPOUTS = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
    | {"feature_dropout", "native_dropout"}
)
NORMALIZATIONS = frozenset(
    {"batch_norm", "layer_norm", "group_norm", "instance_norm", "normalize", "rms_norm"}
    | {"native_batch_norm", "native_layer_norm", "native_group_norm", "local_response_norm"}
    | {"batch_norm_elemt"}  # SyncBatchNorm's
)
CHANNEL_NORMS = frozenset({"batch_norm", "instance_norm", "native_batch_norm", "batch_norm_elemt"})
# Their results are maps of their own; behind them nothing of a factor on what they took is left.
SOURCES = frozenset(
    {"batch_norm", "layer_norm", "group_norm", "instance_norm", "normalize", "rms_norm"}
    | {"gelu", "silu", "sigmoid", "tanh", "softplus", "elu", "selu", "celu", "mish", "hardswish"}
    | {"hardsigmoid", "hardtanh", "relu6", "softmax"}
)
SUMS = frozenset({"add", "sub"})
REDUCTIONS = frozenset({"sum", "mean"})
_PRODUCTS = frozenset(
    {"mul", "div", "matmul", "bmm", "einsum", "scaled_dot_product_attention", "softmax", "sigmoid"}
    | {"tanh", "multi_head_attention_forward", "baddbmm", "addcmul", "addcdiv", "pow", "square"}
)
# Layers with weights that are not followed, even where the result has the shape of the input.
OPAQUE = frozenset(
    {"matmul", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "tensordot"}
    | {"inner", "bilinear", "convolution", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell"}
    | {"gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "multi_head_attention_forward"}
)
# They say what their result is like, but take no value from their input.
FACTORIES = frozenset(
    name.format(what)
    for name in ("new_{}", "{}_like")
    for what in ("zeros", "ones", "full", "empty")
)
# Without an input, they are no constants all the same.
RANDOM = frozenset({"rand", "randn", "randint", "normal", "bernoulli", "randperm"})
POOLS = frozenset(
    f"{kind}_pool{n}d" for kind in ("avg", "max", "lp") for n in (1, 2, 3)
) | frozenset(f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3))
NONLINEAR = frozenset({"relu", "leaky_relu", "prelu", "abs", "clamp", "clamp_min"})
# For the report: behind these, a map is still the one that some module made.
KEEPERS = (
    NONLINEAR
    | frozenset({"clone", "contiguous", "detach", "alias", "requires_grad", "neg", "positive"})
    | {"to", "type", "type_as", "float", "half", "double", "bfloat16", "mul", "div", "pad"}
    | {"permute", "transpose", "swapaxes", "movedim", "moveaxis", "reshape", "view", "flatten"}
    | {"unflatten", "squeeze", "unsqueeze", "getitem", "narrow", "chunk", "split", "unbind"}
    | {"tensor_split", "select", "index_select", "expand", "expand_as", "flip", "roll", "t", "T"}
    | {"mT", "repeat", "slice", "split_with_sizes", "view_as", "reshape_as", "constant_pad_nd"}
)
# Asked often, and no tensor comes out.
QUERIES = frozenset({"size", "dim", "numel", "stride", "is_contiguous", "is_floating_point"})

_SYNONYMS = {
    **dict.fromkeys(("iadd", "radd"), "add"),
    **dict.fromkeys(("isub", "subtract", "rsub"), "sub"),
    **dict.fromkeys(("imul", "rmul", "multiply"), "mul"),
    **dict.fromkeys(("itruediv", "truediv", "idiv", "divide", "true_divide"), "div"),
    **dict.fromkeys(("imatmul", "rmatmul"), "matmul"),
    "ipow": "pow",
    "negative": "neg",
    "absolute": "abs",
    "convert_element_type": "to",
    "unsafe_view": "view",
    "to_copy": "to",
}
_JOIN_DIMS = {"hstack": 1, "vstack": 0, "row_stack": 0, "dstack": 2, "column_stack": 1}


def name_of(func: Any) -> str:
    """The one name of an operation: `torch.relu`, `relu_` and `aten.relu.default` are "relu"."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(func.__self__, "__name__", "get"))
    name = name.split(".", 1)[0].strip("_")
    if name.startswith("upsample_"):
        return "upsample"
    return _SYNONYMS.get(name, name)


def argument(
    args: Sequence[Any], kwargs: dict[str, Any], index: int, name: str, default: Any = None
) -> Any:
    """An argument given by position or by name."""
    return args[index] if index < len(args) else kwargs.get(name, default)


def replaced(
    args: Sequence[Any], kwargs: dict[str, Any], index: int, name: str, value: Any
) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments with one of them replaced."""
    if index < len(args):
        return (*args[:index], value, *args[index + 1 :]), kwargs
    return args, {**kwargs, name: value}


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors among arguments or results; lists, tuples and mappings are searched."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    if isinstance(tree, (list, tuple, dict)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            found += tensors_in(item)
    return found


def join_dim(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """The dimension along which a concatenation or a stack joins."""
    if name in _JOIN_DIMS:
        return _JOIN_DIMS[name]
    return int(argument(args, kwargs, 1, "dim", kwargs.get("axis", 0)))


def resize_mode(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """The interpolation of a resizing operation: "bilinear", "nearest", ..."""
    if name == "grid_sample":
        mode = argument(args, kwargs, 2, "mode", "bilinear")
        return str(mode if isinstance(mode, str) else "bilinear")
    own = str(getattr(func, "__name__", "")).split(".", 1)[0].strip("_")
    if own.startswith("upsample_"):  # aten's: upsample_bilinear2d_aa
        return own.removeprefix("upsample_").removesuffix("_aa").rstrip("123d")
    return str(argument(args, kwargs, 3, "mode", "nearest"))


def is_foreign(func: Any) -> bool:
    """Whether an operation is not PyTorch's own."""
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        return not str(func).startswith(("aten.", "prims."))
    return False


def obstacle(name: str) -> str:
    """Why an operation that changes a branch's scale prevents folding."""
    if name in NORMALIZATIONS:
        return f"a normalization ({name}) lies between; it already removes the branch scale"
    if name in _PRODUCTS:
        return f"a product or attention ({name}) lies between; its scale is not linear in a branch"
    if name in SUMS:
        return f"a sum ({name}) lies between; the other summand has no slice of its own"
    return f"the operation {name} lies between; it does not pass a branch's scale on unchanged"


def adds_two_maps(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of an addition are two maps of one shape."""
    maps = [arg for arg in args[:2] if isinstance(arg, Tensor) and arg.dim() > 2]
    return len(maps) == 2 and maps[0].shape == maps[1].shape and "alpha" not in kwargs


def as_numbers(tensors: Sequence[Tensor], chosen: Sequence[int]) -> list[tuple[int, Tensor]]:
    """The chosen tensors; counts and masks become numbers beside maps of numbers."""
    real = next((t.dtype for t in tensors if t.is_floating_point()), None)
    if real is None:
        return [(i, tensors[i]) for i in chosen]
    exact = [tensors[i].is_floating_point() or tensors[i].is_complex() for i in chosen]
    pairs = zip(chosen, exact, strict=True)
    return [(i, tensors[i] if keep else tensors[i].to(real)) for i, keep in pairs]


def fills_a_part(value: Any, target: Any) -> bool:
    """Whether a tensor is smaller than what it is written into, or what that is a view of."""
    if not isinstance(value, Tensor) or not isinstance(target, Tensor):
        return False
    whole = target if target._base is None else target._base
    return 2 <= value.numel() < whole.numel()
