"""PrismML's packs for MLX (Bonsai 2): Qwen 3.5 in MLX's affine form of 2 bits, rotated, which stock MLX does not read.

    config.json     model_type prism_hadamard_qwen35 and the other entries of WANTED; text_config, of the language
                    model; modules, the rotated ones: path, block (features), embedding (true or false), dtype
    hadamard.json   the keys of GGUF's metadata (llama_cpp/rotated.py), version 1, with the names of the tensors here
    tensors         language_model.PATH.weight, .scales and .biases as in any MLX folder, .signs float32 [K] of rotated
                    modules, which are hadamard.json's again; all else float32
                    vision_tower.*, which is not read

What differs from transformers' tensors of these names is what differs in MLX's Qwen 3.5: norms that multiply by 1 +
weight in transformers are stored as that sum, and convolutions as [channels, width, 1]. Value heads stand in
transformers' order (gdn_activation_layout, gdn_v_grouped).

Sources, which agree: runtime.py of PrismML's own loader; the loaders for these packs of MTPLX, TensorFold, NInfer and
Splash.
"""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..files.damaged import Damaged
from ..files.json_object import read_json
from ..files.safetensors import TensorHeader
from ..llama_cpp.rotated import Rotation, rotation_of

KIND, MANIFEST = "prism_hadamard_qwen35", "hadamard.json"
FILES = (MANIFEST, "files.json")  # which say something of the pack alone
WANTED: dict[str, tuple[Any, ...]] = {
    "schema_version": (2,),
    "base_model_type": ("qwen3_5",),
    "tensor_namespace": ("mlx-vlm-qwen3_5",),
    "hadamard_config": (MANIFEST,),
    "gdn_activation_layout": ("grouped",),
}
PREFIX, VISION = "language_model.", "vision_tower."


class Pack(NamedTuple):
    """A pack as a plain folder of the language model: names, here and below, are without PREFIX."""

    config: dict[str, Any]  # of the language model
    headers: dict[str, TensorHeader]
    rotation: Rotation
    signs: dict[int, Tensor]  # the rotation's
    vision: int  # tensors that are not read

    def restored(self, name: str, values: Tensor) -> Tensor:
        """A float tensor as transformers has it, for what is stored."""
        if name.endswith("conv1d.weight"):
            return values.transpose(1, 2).contiguous()
        return values.float() - 1 if _centered(name) else values

    def described(self, name: str, header: TensorHeader) -> tuple[str, tuple[int, ...]]:
        """Its dtype and shape then."""
        if name.endswith("conv1d.weight") and len(header.shape) == 3:
            channels, width, one = header.shape
            return header.dtype, (channels, one, width)
        return ("F32" if _centered(name) else header.dtype), header.shape


def _centered(name: str) -> bool:
    return name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight")


def pack_of(file: Path, config: dict[str, Any], headers: dict[str, TensorHeader]) -> Pack | None:
    """The pack that a config.json describes; None if it is none.

    Raises ValueError naming the entry for what is not known here, and Damaged for what contradicts itself.
    """
    if config.get("model_type") != KIND:
        return None
    for key, known in WANTED.items():
        if config.get(key) not in known:
            raise ValueError(
                f"{file}: {key} is {config.get(key, 'missing')!r:.80}; known of {KIND}: {', '.join(map(str, known))}"
            )
    text, modules = config.get("text_config"), config.get("modules")
    if not isinstance(text, dict) or text.get("model_type") != "qwen3_5_text":
        raise ValueError(f"{file}: its text_config is no qwen3_5_text, which {KIND} is known for")
    if text.get("tie_word_embeddings") or text.get("mtp_num_hidden_layers"):
        what = "tie_word_embeddings" if text.get("tie_word_embeddings") else "mtp_num_hidden_layers"
        raise ValueError(f"{file}: {what} is {text[what]!r:.80}, which is not known of {KIND}")
    named = isinstance(modules, list) and all(isinstance(m, dict) and isinstance(m.get("path"), str) for m in modules)
    if not named or not isinstance(modules, list):
        raise Damaged(file, "modules is no list of objects with a path")
    if strangers := [key for key in headers if not key.startswith((PREFIX, VISION))]:
        raise ValueError(f"{file.parent}: tensor {strangers[0]} is neither in {PREFIX[:-1]} nor in {VISION[:-1]}")
    own = {key.removeprefix(PREFIX): header for key, header in headers.items() if key.startswith(PREFIX)}
    manifest = file.parent / MANIFEST
    if not manifest.is_file():
        raise Damaged(file.parent, f"has no {MANIFEST}, which says how its weights are rotated")
    stored = {f"{PREFIX}{name}": _width(own, name) for name in own if name.endswith(".weight")}
    embedding, head = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"
    found = rotation_of(manifest, read_json(manifest), stored, embedding, head)
    names = frozenset(name.removeprefix(PREFIX) for name in found.names)
    other = next((module for module in modules if module.get("block") != found.block), None)
    if not found.grouped or found.signs is None or other is not None:
        what = "sign_mode is identity" if found.signs is None else "gdn_v_grouped is not true"
        if other is not None:
            what = f"block_size is {found.block}, but {other.get('block')!r:.80} of {other['path']:.80}"
        raise ValueError(f"{manifest}: {what}, which is not known of {KIND}")
    if {f"{module['path']}.weight" for module in modules} != names:
        raise Damaged(manifest, "names other matrices than config.json's modules")
    text = dict(text, architectures=["Qwen3_5ForCausalLM"])
    return Pack(text, own, found._replace(names=names), found.signs, len(headers) - len(own))


def _width(headers: dict[str, TensorHeader], name: str) -> tuple[int, ...]:
    """The shape of a matrix of 2 bits in its features."""
    shape = headers[name].shape
    return (shape[0], 16 * shape[1]) if headers[name].dtype == "U32" and len(shape) == 2 else shape
