"""What each tensor operation does to the scale of a branch, known by the operation's name.

One name for one operation: `torch.relu`, `F.relu`, `Tensor.relu_` and `aten.relu.default` are
"relu"; `2 * x`, `x *= 2` and `torch.multiply` are "mul". A leaf.
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
_POOLS = frozenset(
    f"{adaptive}{kind}_pool{n}d"
    for adaptive in ("", "adaptive_")
    for kind in ("avg", "max")
    for n in (1, 2, 3)
)
_CASTS = frozenset({"to", "type", "type_as", "float", "half", "double", "bfloat16"})
_BENDS = frozenset({"relu", "leaky_relu", "prelu", "abs", "clamp", "clamp_min"}) | {
    name for name in _POOLS if "max" in name
}
# f(a x) = a f(x) for every a > 0, channel by channel: the branch scale goes through unchanged.
HOMOGENEOUS = (
    _POOLS
    | _CASTS
    | _BENDS
    | frozenset({"clone", "contiguous", "detach", "alias", "requires_grad", "neg", "positive"})
    | frozenset({"mul", "div", "pad", "constant_pad_nd"})
)
REDUCTIONS = frozenset({"sum", "mean", "amax", "amin"})
# These move elements about and change none.
STRUCTURAL = frozenset(
    {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "reshape", "view"}
    | {"flatten", "unflatten", "squeeze", "unsqueeze", "getitem", "narrow", "chunk", "split"}
    | {"tensor_split", "unbind", "select", "index_select", "expand", "expand_as", "flip", "roll"}
    | {"rot90", "t", "channel_shuffle", "repeat", "tile", "ravel", "view_as", "reshape_as"}
    | {"pixel_shuffle", "pixel_unshuffle", "split_with_sizes", "hsplit", "dsplit", "take_along_dim"}
    | {"T", "mT", "data", "repeat_interleave", "broadcast_to", "slice", "adjoint"}
)
# Elements of one channel move into others: the map is no longer the branch that was resized.
SHUFFLES = frozenset({"pixel_shuffle", "pixel_unshuffle"})
NORMALIZATIONS = frozenset(
    {"batch_norm", "layer_norm", "group_norm", "instance_norm", "normalize", "rms_norm"}
    | {"native_batch_norm", "native_layer_norm", "native_group_norm", "local_response_norm"}
    | {"batch_norm_elemt"}  # SyncBatchNorm's
)
CHANNEL_NORMS = frozenset({"batch_norm", "instance_norm", "native_batch_norm", "batch_norm_elemt"})
SUMS = frozenset({"add", "sub"})
_PRODUCTS = frozenset(
    {"mul", "div", "matmul", "bmm", "einsum", "scaled_dot_product_attention", "softmax", "sigmoid"}
    | {"tanh", "multi_head_attention_forward", "baddbmm", "addcmul", "addcdiv", "pow", "square"}
)
# They gather the neighbours of a pixel among its channels.
PATCHES = frozenset({"unfold", "im2col", "fold", "col2im"})
# Products with a weight that are not followed, though they are linear layers by another name.
OPAQUE = frozenset(
    {"matmul", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "tensordot"}
    | {"inner", "bilinear", "convolution", "lstm", "gru", "rnn_tanh", "rnn_relu"}
    | {"multi_head_attention_forward"}
)
# They say what their result is like, but take no value from their input.
FACTORIES = frozenset(
    name.format(what)
    for name in ("new_{}", "{}_like")
    for what in ("zeros", "ones", "full", "empty")
)
# Without an input, they are no constants all the same.
RANDOM = frozenset({"rand", "randn", "randint", "normal", "bernoulli", "randperm"})
# The tensor they are about is their first one.
UNARY = (HOMOGENEOUS - {"mul"}) | STRUCTURAL | RESIZES | REDUCTIONS | NORMALIZATIONS
# Asked often, and no tensor comes out.
QUERIES = frozenset({"size", "dim", "numel", "stride", "is_contiguous", "is_floating_point"})

_SYNONYMS = {
    **dict.fromkeys(("iadd", "radd"), "add"),
    **dict.fromkeys(("isub", "subtract", "rsub"), "sub"),
    **dict.fromkeys(("imul", "rmul", "multiply"), "mul"),
    **dict.fromkeys(("itruediv", "truediv", "idiv", "divide", "true_divide"), "div"),
    **dict.fromkeys(("imatmul", "rmatmul"), "matmul"),
    **dict.fromkeys(("pow", "ipow"), "pow"),
    "negative": "neg",
    "absolute": "abs",
    "convert_element_type": "to",
    "unsafe_view": "view",
    "to_copy": "to",
}
_JOIN_DIMS = {"hstack": 1, "vstack": 0, "row_stack": 0, "dstack": 2, "column_stack": 1}


def name_of(func: Any) -> str:
    """The one name of an operation, however it was called."""
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
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, (list, tuple, dict)):
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


def is_homogeneous(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], factors_are_fixed: bool
) -> bool:
    """Whether this very call of an operation in `HOMOGENEOUS` passes the scale on.

    Args:
        name: The operation.
        args: Its arguments.
        kwargs: Its keyword arguments.
        factors_are_fixed: Whether no other tensor takes part than parameters and constants.
    """
    if name in ("mul", "div"):
        return factors_are_fixed
    if name == "pad":
        return not argument(args, kwargs, 3, "value", 0.0)
    if name == "constant_pad_nd":
        return not argument(args, kwargs, 2, "value", 0.0)
    if name in ("clamp", "clamp_min"):
        lowest, highest = argument(args, kwargs, 1, "min"), argument(args, kwargs, 2, "max")
        return isinstance(lowest, (int, float)) and lowest == 0 and highest is None
    return True


def bends(name: str) -> bool:
    """Whether a homogeneous operation is not linear: it passes on scales, but no means."""
    return name in _BENDS


def is_opaque(func: Any, name: str) -> bool:
    """Whether the operation may be a linear layer that is not followed: some are, or custom."""
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        return name in OPAQUE or not str(func).startswith(("aten.", "prims."))
    return name in OPAQUE


def obstacle(name: str) -> str:
    """Why an operation between a concatenation and its consumer prevents folding."""
    if name in NORMALIZATIONS:
        return f"a normalization ({name}) lies between; it already removes the branch scale"
    if name in _PRODUCTS:
        return f"a product or attention ({name}) lies between; its scale is not linear in a branch"
    if name in SUMS:
        return f"a sum ({name}) lies between; the other summand has no slice of its own"
    return f"the operation {name} lies between; it does not pass a branch's scale on unchanged"
