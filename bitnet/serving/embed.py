"""Embeddings of texts, by the model in a checkpoint folder and what its sentence-transformers files say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..convert.checkpoint import load
from ..convert.folders import find_folder
from ..convert.hub.sentences import MODULES, POOLINGS, read_sentences
from ..convert.hub.tokenizers import load_tokenizer
from ..decode.sequences import positions

UNBOUNDED = 1 << 20  # what tokenizers say that know no greatest length is larger


class Encoder:
    """A model that turns texts into vectors: loaded once, called as often as needed.

    directory: a checkpoint folder, or its name on the Hub; its modules.json says how the vectors of a text's tokens
    become one
    pooling:   "mean", "cls" or "lasttoken", for a folder without modules.json; normalize then says whether to divide
               by the length
    device, backend: as in bitnet.load

    Raises ValueError naming the file if how to pool is not known, or is not among these.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        pooling: str | None = None,
        normalize: bool = True,
        device: str | torch.device | None = None,
        backend: str = "auto",
    ) -> None:
        directory = find_folder(directory)
        found = read_sentences(directory)
        if found is None and pooling is None:
            raise ValueError(
                f"embed: {directory} has no {MODULES}, which says how tokens become an embedding; pass "
                f"pooling={' or '.join(map(repr, POOLINGS.values()))}"
            )
        if found is not None and pooling is None:
            pooling, normalize = found.pooling, "Normalize" in found.kinds
            if others := sorted({*found.kinds[1:]} - {"Pooling", "Normalize"}):
                raise ValueError(f"embed: {directory} has a {others[0]} module, which is not computed here")
        if pooling not in POOLINGS.values():
            raise ValueError(
                f"embed: {directory}: pooling is {pooling!r:.80}; {', '.join(POOLINGS.values())} are computed here"
            )
        self.tokenizer = load_tokenizer(directory)
        self.tokenizer.padding_side = "right"  # where it changes nothing for the tokens of the text
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)
        self.model = load(directory, device=device, backend=backend).base_model
        self.pooling, self.normalize, self.found = pooling, normalize, found
        limits = [found.length if found else None, self.tokenizer.model_max_length]
        limits.append(positions(self.model.config))
        self.length = min(limit for limit in (*limits, UNBOUNDED) if limit is not None)

    @torch.inference_mode()
    def __call__(self, texts: str | Sequence[str], *, prompt: str | None = None, batch: int = 32) -> Tensor:
        """float32 [texts, features], or [features] for one text.

        prompt: put in front of every text; None takes the folder's own
        """
        if isinstance(texts, str):
            return self([texts], prompt=prompt)[0]
        prompt = prompt if prompt is not None else self.found.prompt if self.found else ""
        if prompt and self.found and self.found.without_prompt and self.pooling == "mean":
            raise ValueError("embed: the model's mean leaves out the prompt's tokens, which is not computed here")
        lower = self.found is not None and self.found.lower_case
        whole = [prompt + (text.lower() if lower else text) for text in texts]
        order = sorted(range(len(whole)), key=lambda i: len(whole[i]))  # texts of like lengths share a batch
        vectors: list[Any] = [None] * len(whole)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = self.tokenizer(
                [whole[i] for i in chosen], padding=True, truncation=True, max_length=self.length, return_tensors="pt"
            )
            if not bool((lengths := inputs["attention_mask"].sum(1)).all()):
                raise ValueError(f"embed: text {chosen[int(lengths.argmin())]} has no tokens")
            for i, vector in zip(chosen, self._pooled(inputs.to(self.model.device)), strict=True):
                vectors[i] = vector.cpu()
        return torch.stack(vectors) if vectors else torch.empty(0, self.model.config.hidden_size)

    def _pooled(self, inputs: Any) -> Tensor:
        hidden, mask = self.model(**inputs).last_hidden_state.float(), inputs["attention_mask"]
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "lasttoken":
            pooled = hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
        else:
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(pooled, dim=1) if self.normalize else pooled


def embed(model: str | Path | Encoder, texts: str | Sequence[str], **options: Any) -> Tensor:
    """Embeddings of texts, float32 [texts, features], or [features] for one text.

    model:   a checkpoint folder that sentence-transformers would read, or an Encoder of one, which is not loaded again
    options: of an Encoder's call: prompt, batch
    """
    encoder = model if isinstance(model, Encoder) else Encoder(model)
    return encoder(texts, **options)
