"""PackedBitLinear: a trained BitLinear as it is stored and served, two bits a weight (four or eight, for heads)."""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deprecated import renamed
from .kept import Kept, Packed
from .kernels import backends, layout, observed, ops, reference, rotation
from .linear import BitConv1D, BitLinear, become, cast_for_autocast, check_features, describe, random_signs
from .quantize import QuantSpec


class PackedBitLinear(Packed):
    """Inference-only linear layer over packed ternary weights; the output equals the BitLinear it came from.

    Takes nn.Linear's arguments, then the options of QuantSpec, `backend` ("auto" or a name that bitnet.backends()
    lists), and `weight_bits`: 2, or 1.6 for a fifth less memory traffic, or 1, of binary weights, for half of it, where
    the backend can (elsewhere 2 with a warning).
    Freshly built it holds zeros. Buffers:

    weight:       uint8 [ceil(N/4), K], the Hub layout (kernels/layout.py); int8 [N, K] with weights="int8"; uint8
                  [N, ceil(K/32), 16] with weights="int4"
    weight_scale: float32 [1], or [N] with per_row, or float16 [N, ceil(K / group_size)] with group_size; multiplies.
                  Keeps its dtype under .to(dtype)
    bias:         [N] or None
    signs:        int8 [K] with hadamard_signs, or None

    The backend derives its own layout from these at the first call; it is never saved. Gradients flow through
    to the input, so adapters (LoRA) can be trained beside packed layers; the packed weight itself cannot.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    signs: Tensor | None
    transposed = False  # made from a layer whose float weight is [K, N]; the packed one is the same

    @renamed(bits="weight_bits")
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        weight_bits: float = 2,
        **options: Any,
    ) -> None:
        super().__init__()
        spec = QuantSpec(**options)
        check_features(in_features, spec)
        packed, scale = packed_zeros(in_features, out_features, spec, device)
        signs = random_signs(in_features, spec, device)
        b = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        norm = nn.RMSNorm(in_features, spec.rms_norm_eps, device=device, dtype=dtype) if spec.rms_norm else None
        self._configure(in_features, out_features, spec, packed, scale, b, norm, signs, backend, weight_bits)

    @staticmethod
    def from_bit_linear(
        layer: BitLinear | BitConv1D, packed: Tensor | None = None, scale: Tensor | None = None, backend: str = "auto"
    ) -> "PackedBitLinear":
        """Turn a BitLinear or BitConv1D into its packed form *in place* and return it; its latent weight is dropped.

        packed, scale: what quantize_packed(layer) returned; without them the layer holds zeros, to be loaded
        """
        k, n, norm, spec = layer.in_features, layer.out_features, layer.rms_norm, layer.spec
        if packed is None or scale is None:
            packed, scale = packed_zeros(k, n, spec, layer.weight.device)
        bias = None if layer.bias is None else layer.bias.detach()
        transposed = layer.transposed
        del layer.weight, layer.bias, layer.rms_norm, layer.strength
        module = become(layer, PackedBitLinear)
        module._configure(k, n, spec, packed, scale, bias, norm, layer.signs, backend)
        if transposed:
            module.transposed = True
        return module

    @staticmethod
    def from_packed(
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        spec: QuantSpec,
        backend: str = "auto",
        weight_bits: float = 2,
    ) -> "PackedBitLinear":
        """A layer around tensors that exist already, which it shares."""
        module = PackedBitLinear.__new__(PackedBitLinear)
        nn.Module.__init__(module)
        module._configure(packed.shape[-1], out_features, spec, packed, scale, bias, None, None, backend, weight_bits)
        return module

    def _configure(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        rms_norm: nn.RMSNorm | None,
        signs: Tensor | None,
        backend: str,
        weight_bits: float = 2,
    ) -> None:
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.register_buffer("weight", packed)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)
        self.register_buffer("signs", signs)
        self.rms_norm = rms_norm
        self._drop_derived()
        self.backend, self.weight_bits = "auto", 2.0
        self._activation_bits: int | str | None = "auto"
        self.set_backend(backend, weight_bits)

    def _drop_derived(self) -> None:
        self._prepacked: _Prepacked | None = None
        self._bound: _Bound | None = None

    def take_back(self, weight: Tensor) -> None:
        super().take_back(weight)
        if (made := self._prepacked) is not None:
            self._prepacked = made._replace(source=weight, tracked=weight, version=weight._version)

    @renamed(bits="weight_bits")
    def set_backend(
        self, backend: str = "auto", weight_bits: float = 2, activation_bits: int | str | None = "auto"
    ) -> None:
        """Choose the backend and its bits a weight; see the class. Raises ValueError for values there are not.

        activation_bits: how a layer whose options say float activations runs: None leaves them float, 16 and 8 quantize
            them all the same; "auto" takes float where a kernel does, else 16 if one takes those (CPUs), whose
            error is below bfloat16's own rounding. Other layers run as their options say.
        """
        check_backend(backend, weight_bits)
        if activation_bits not in ("auto", None, 8, 16):
            raise ValueError(f"activation_bits must be 'auto', None, 8 or 16, got {activation_bits!r}")
        chosen = backend, weight_bits, activation_bits
        if (self.backend, self.weight_bits, self._activation_bits) != chosen:
            self._give_back()
            self.backend, self.weight_bits, self._activation_bits = chosen
            self._drop_derived()

    @property
    def activation_bits(self) -> int | None:
        """To how many bits activations are quantized here and now; None for float ones. See set_backend."""
        spec = self.spec
        if spec.activation_bits is not None or spec.wide:
            return spec.activation_bits
        if not isinstance(self._activation_bits, str):
            return self._activation_bits
        groups, backend, device = spec.group_size is not None, self.backend, self.weight.device
        if backend == "auto":
            if backends.choose_backend(backend, device, None, groups=groups) not in ("torch", "reference"):
                return None
            if not groups and self.in_features > reference.MOST_16:
                return None
            backend = backends.choose_backend(backend, device, 16, groups=groups)
        return 16 if backend.startswith("cpu") else None

    def prepack(self) -> tuple[Tensor, str]:
        """Derive the backend's own layout now instead of at the first call; returns it with the backend's name.

        Made again when the weight has been replaced or written to, which only inference tensors do not tell.
        Raises ValueError if the bytes or the scale are not those of a ternary weight.
        """
        made, weight = self._prepacked, self._buffers["weight"]
        tracing = torch.compiler.is_compiling()  # a compiled graph notices a new tensor, but no writing
        if made is None or made.source is not weight or not (tracing or made.tracked._version == made.version):
            self._check_scale()
            weight = self.weight
            bits, groups = self.activation_bits, self.spec.group_size is not None
            backend = backends.choose_backend(self.backend, weight.device, bits, self.weight_bits, groups)
            tracked = _NEVER_WRITTEN if tracing or weight.is_inference() else weight
            with torch.inference_mode(False):  # inference tensors could not be saved for a later backward
                prepacked = ops.prepack(weight, self.out_features, in_features=self.in_features, backend=backend)
            made = _Prepacked(prepacked, backend, weight, tracked, -1 if tracing else tracked._version)
            if not torch.compiler.is_exporting():  # a program is to hold the stored bytes, not this machine's layout
                self._prepacked = made
        return made.weight, made.backend

    def hold(self, prepacked: Tensor) -> None:
        """Hold an equal tensor, which others use, in place of what prepack() returned."""
        assert self._prepacked is not None
        self._prepacked, self._bound = self._prepacked._replace(weight=prepacked), None

    def check(self) -> None:
        """Raise ValueError if the bytes or the scale are not those of a ternary weight, which prepack checks, too."""
        self._check_scale()
        layout.check_stored(self.weight, self.out_features, self.in_features)
        if not self.spec.wide:
            layout.validate_packed(self.weight)

    def _check_scale(self) -> None:
        scale = self.weight_scale
        unseen = scale.is_meta or observed.is_observed()
        expected = zero_scale(self.in_features, self.out_features, self.spec, "meta")
        if scale.dtype != expected.dtype or scale.shape != expected.shape:
            raise ValueError(
                f"weight_scale is {scale.dtype} {list(scale.shape)}, but these options need {expected.dtype} "
                f"{list(expected.shape)}"
            )
        if not unseen and not layout.are_scales(scale, self.spec.weights):
            raise ValueError("weight_scale must be positive and finite; the checkpoint is corrupt or incomplete")

    def nbytes(self) -> int:
        """Bytes this layer holds in memory now, the backend's own layout included."""
        own = [] if self._prepacked is None else [self._prepacked.weight]
        tensors = {id(t): t for t in [*self.parameters(), *self.buffers(), *own]}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def codes(self) -> Tensor:
        """The weight as integers, int8 [N, K]."""
        return layout.codes_of(self.weight, self.out_features, self.in_features)

    @property
    def bits(self) -> float:
        """The old name of weight_bits."""
        warnings.warn("PackedBitLinear.bits is now weight_bits", DeprecationWarning, stacklevel=2)
        return self.weight_bits

    def to_linear(self, dtype: torch.dtype) -> nn.Module:
        """Turn it back into what it was made of, in place: nn.Linear or a class like it, with the weight codes * scale.

        Raises ValueError for a layer with an RMSNorm inside, which no such class can express.
        """
        if self.rms_norm is not None:
            raise ValueError("it has an RMSNorm inside, which an nn.Linear cannot express")
        bias, transposed = self.bias, self.transposed
        weight = reference.dequantize_weight(self.codes(), self.weight_scale)
        if self.spec.hadamard is not None:
            weight = rotation.unrotate(weight, self.spec.hadamard, self.signs)
        weight = weight.to(dtype)
        origin = vars(self).pop("origin", nn.Linear)
        for buffer in ("weight", "weight_scale", "bias", "signs"):
            delattr(self, buffer)
        del self.rms_norm, self.spec, self.backend, self.weight_bits, self._activation_bits
        del self._prepacked, self._bound
        if transposed:
            del self.in_features, self.out_features, self.transposed
        linear: nn.Module = become(self, origin)
        linear.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype)))
        return linear

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if self.rms_norm is not None:
            x = self.rms_norm(x)
        x = cast_for_autocast(x)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input is {list(x.shape)}, but this layer takes {self.in_features} features")
        if self.spec.hadamard is not None:
            x = rotation.hadamard(x, self.spec.hadamard, self.signs)
        buffers = self._buffers  # a third of the cost of looking a buffer up as an attribute
        scale, bias = buffers["weight_scale"], buffers["bias"]
        assert scale is not None
        if observed.needs_operator(x, scale, bias):
            weight, backend = self.prepack()
            return ops.linear_prepacked(x, weight, scale, bias, self.out_features, self.activation_bits, backend)
        bound = self._bound
        if (
            bound is None
            or bound[1] is not buffers["weight"]
            or bound[2]._version != bound[3]
            or bound[4] is not scale
            or bound[5]._version != bound[6]
            or bound[7] is not bias
        ):
            bound = self._bound = self._bind(scale, bias)
        return bound[0](x)

    def _bind(self, scale: Tensor, bias: Tensor | None) -> "_Bound":
        weight, backend = self.prepack()
        n, k = self.out_features, self.in_features
        run = ops.bind(weight, scale, bias, n, k, self.activation_bits, backend)
        made = self._prepacked
        assert made is not None
        # of scales of groups backends have copies in an order of their own
        copied = scale if scale.dtype == torch.float16 and not scale.is_inference() else _NEVER_WRITTEN
        return run, made.source, made.tracked, made.version, scale, copied, copied._version, bias

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prepacked": None, "_bound": None}

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self.options()}, backend={self.backend}"

    def options(self) -> str:
        """Its options in a few words, and how float activations run here where they do not stay floats."""
        bits = self.activation_bits
        run = f" run as int{bits}" if self.spec.activation_bits is None and bits is not None else ""
        return f"{describe(self.spec)}{run}"


class _Prepacked(NamedTuple):
    """A weight in its backend's own layout, and what it was made from."""

    weight: Tensor
    backend: str
    source: Tensor | None  # None while the module keeps this form only
    tracked: Tensor  # the source, or a tensor that nobody writes to where the source does not count its versions
    version: int


_NEVER_WRITTEN = torch.empty(0, device="cpu")

# the layer as a function of x; source, tracked and version of _Prepacked; the scale it is bound to, a tensor that
# counts its versions if it was copied, and that version; the bias
_Bound = tuple[backends.Linear, Tensor | None, Tensor, int, Tensor, Tensor, int, Tensor | None]


def check_backend(backend: str, weight_bits: float) -> None:
    """Raise ValueError for a backend or bits of a weight that there are not."""
    backends.check_backend(backend)
    if weight_bits not in (2, 1.6, 1):
        raise ValueError(f"weight_bits must be 2, 1.6 or 1, got {weight_bits!r}")


def packed_zeros(in_features: int, out_features: int, spec: QuantSpec, device: Any) -> tuple[Tensor, Tensor]:
    """The weight and the scale of a freshly built packed layer."""
    packed = layout.stored_zeros(out_features, in_features, spec.weights, device)
    return packed, zero_scale(in_features, out_features, spec, device)


def zero_scale(in_features: int, out_features: int, spec: QuantSpec, device: Any) -> Tensor:
    """The scale of a freshly built packed layer: ones."""
    if spec.group_size is not None:
        return torch.ones(out_features, -(-in_features // spec.group_size), dtype=torch.float16, device=device)
    return torch.ones(out_features if spec.per_row else 1, dtype=torch.float32, device=device)


def keep_prepacked(layer: PackedBitLinear, others: Iterable[Packed], weight: Tensor) -> None:
    """Give a layer, and the others that share its weight, one in the form of the backend `cpu` alone, which it runs on.

    The stored weight is made, for all of them, when it is looked at, saved, copied or moved.
    """
    layer._check_scale()
    sharing = [layer, *others]
    kept = Kept(sharing, weight, layer.out_features, layer.in_features, layer.spec.weights)
    for module in sharing:
        module._buffers["weight"], module._kept = None, kept
    layer._prepacked = _Prepacked(weight, "cpu", None, _NEVER_WRITTEN, _NEVER_WRITTEN._version)


def embedding_rows(ids: Tensor, weight: Tensor | Kept, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """Rows of a packed embedding: codes * scale, as dtype [..., D].

    weight, scale: as a PackedBitLinear of D features stores them, with a scale for each row, [V], or group, [V, G]
    """
    found = F.embedding(ids, scale if scale.ndim > 1 else scale[:, None])  # raises where there is no such row
    codes = weight.rows(ids) if isinstance(weight, Kept) else layout.codes_of_rows(weight, ids, in_features)
    return reference.dequantize_weight(codes, found if scale.ndim > 1 else found.squeeze(-1), dtype)


class PackedEmbedding(Packed):
    """The input embedding that shares its weight with a packed output head; a token's row is codes * scale.

    weight, weight_scale: those of a PackedBitLinear of V outputs and D features, with a scale for each row or group.
    Only the rows that are looked up are unpacked. The output has the dtype of the embedding it was made from, which
    .to(dtype) changes as usual. Gemma 3's embedding, which multiplies its rows by a constant, goes on doing so.
    """

    weight: Tensor
    weight_scale: Tensor
    dtype_of: Tensor  # empty: follows .to(dtype)
    origin: type[nn.Embedding]
    multiplier: float | None
    spec: QuantSpec
    out_features: int
    in_features: int

    @staticmethod
    def from_embedding(
        embedding: nn.Embedding, spec: QuantSpec, weight: Tensor | None = None, scale: Tensor | None = None
    ) -> "PackedEmbedding":
        """Turn an nn.Embedding into its packed form *in place* and return it; without a weight it holds zeros.

        spec: the options of the head
        """
        like, origin = embedding.weight.detach(), type(embedding)
        out_features, in_features = like.shape
        if weight is None or scale is None:
            weight, scale = packed_zeros(in_features, out_features, spec, like.device)
        del embedding.weight
        embedding._buffers.pop("embed_scale", None)  # not stored in checkpoints; the number is
        module = become(embedding, PackedEmbedding)
        module.origin, module.multiplier = origin, vars(module).get("scalar_embed_scale")
        module.spec, module.out_features, module.in_features = spec, out_features, in_features
        module.register_buffer("weight", weight)
        module.register_buffer("weight_scale", scale.clone())
        module.register_buffer("dtype_of", like.new_empty(0), persistent=False)
        return module

    def forward(self, input: Tensor) -> Tensor:
        weight = self._kept or self.weight
        rows = embedding_rows(input, weight, self.weight_scale, self.in_features, self.dtype_of.dtype)
        if self.multiplier is None:
            return rows
        return rows * torch.full((), self.multiplier, dtype=rows.dtype, device=rows.device)

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, {self.spec.weights}"

    def codes(self) -> Tensor:
        """The weight as integers, int8 [V, D]."""
        return layout.codes_of(self.weight, self.out_features, self.in_features)

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """Turn it back into what it was, in place, with the weight codes * scale."""
        dtype, origin, multiplier = dtype or self.dtype_of.dtype, self.origin, self.multiplier
        weight = reference.dequantize_weight(self.codes(), self.weight_scale, dtype)
        del self.weight, self.weight_scale, self.dtype_of, self.origin, self.multiplier
        del self.spec, self.out_features, self.in_features
        embedding = become(self, origin)
        embedding.weight = nn.Parameter(weight)
        if multiplier is not None:
            embedding.register_buffer("embed_scale", weight.new_full((), multiplier), persistent=False)
        return embedding
