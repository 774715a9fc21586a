"""Learning from a teacher: losses for any loop.

    loss = CE + kl * KL(teacher || student) + relation * (differences of attention relations)
           + hidden * (mean square of differences of hidden states) + cosine * (1 - their cosine)

The first three are BitDistill's (arXiv 2510.13998, eq. 8 to 13), the last two for encoders, which have no logits. Every
term is a mean over tokens; how each is reduced is part of its definition here, because a weight that is published for
one reduction means nothing for another. The paper's weight of the relations is for another one than ours.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import IGNORED

# what models call their projections to queries, keys and values; one name: the three together, each a third
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("c_attn",))


def logit_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of logits [M, V], both divided by the temperature: summed over V, the mean over M.

    BitDistill eq. 8 and 9: there is no factor temperature^2. Computed in float32.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits are {list(student.shape)}, the teacher's {list(teacher.shape)}; "
            "they need one vocabulary"
        )
    own, theirs = [(y.float() / temperature).log_softmax(-1) for y in (student, teacher.to(student.device))]
    return F.kl_div(own, theirs, log_target=True, reduction="sum") / len(student)


def attention_relation(student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """How the tokens of one text relate to each other, student against teacher: BitDistill eq. 11, MiniLM v2's idea.

    student, teacher: queries, or keys, or values of one layer, [B, L, D] and [B, L, E]; D and E multiples of heads
    mask:             bool [B, L], the tokens that are text; default all
    returns:          with R = softmax(A A^T / sqrt(D / heads)) of each head, KL(R_teacher || R_student): summed over
                      the keys, the mean over batch, heads and queries
    """
    relations = []
    for states in (student, teacher.to(student.device)):
        if states.shape[-1] % heads:
            raise ValueError(f"{states.shape[-1]} features cannot be split into {heads} relation heads")
        a = states.float().unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = a @ a.mT / a.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
        relations.append(scores.log_softmax(-1))
    own, theirs = relations
    kl = F.kl_div(own, theirs, log_target=True, reduction="none").sum(-1).mean(1)
    return kl.mean() if mask is None else kl[mask].mean()


class Distillation:
    """A loss for any loop: loss = distillation(model, batch); `parts` has the terms of the last call, unweighted.

    teacher:     a model with the student's vocabulary, used in evaluation mode and without gradients
    ce:          weight of the cross entropy with the batch's labels; 0 for a loss of the teacher alone
    kl:          weight of logit_kl
    temperature: of it
    relation:    weight of the sum of attention_relation of queries, keys and values. It is a small number where student
                 and teacher resemble each other; choose the weight so that the term is of the size of the others
    layer:       which layer's relations; the paper finds one late layer better than all
    heads:       relation heads; default the student's key-value heads
    hidden:      weight of the mean square of hidden states' differences: over tokens, features and layers
    cosine:      weight of the mean of 1 - cosine of each token's hidden states, over tokens and layers

    A batch has the models' arguments and "labels": [B, L], each token's own (shifted already; see train.data), -100
    where there is none, or [B] of classes. Tokens count where they have a label or, without labels, by attention_mask.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        ce: float = 1.0,
        kl: float = 1.0,
        temperature: float = 1.0,
        relation: float = 0.0,
        layer: int = -1,
        heads: int | None = None,
        hidden: float = 0.0,
        cosine: float = 0.0,
    ) -> None:
        self.weights = {"ce": ce, "kl": kl, "relation": relation, "hidden": hidden, "cosine": cosine}
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise ValueError(
                f"the weights of a distillation must be 0 or more, and one of them not 0; got {self.weights}"
            )
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.teacher, self.temperature, self.layer, self.heads = teacher, temperature, layer, heads
        self.parts: dict[str, Tensor] = {}
        if relation:
            _projections(teacher, layer)  # a clear error now

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.with_outputs(model, batch)[0]

    def with_outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """The loss and the student's outputs."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        options: dict[str, Any] = {"output_hidden_states": True} if self._wants("hidden", "cosine") else {}
        own, theirs = [
            {"use_cache": False, **options} if getattr(_config(m), "use_cache", None) is not None else options
            for m in (model, self.teacher)
        ]
        training = self.teacher.training
        self.teacher.eval()
        place = next(self.teacher.parameters()).device
        wanted = self._wants("relation")
        with torch.no_grad(), _watched(self.teacher, self.layer, wanted) as teacher_states:
            teacher = self.teacher(**{key: value.to(place) for key, value in inputs.items()}, **theirs)
        self.teacher.train(training)
        with _watched(model, self.layer, wanted) as student_states:
            student = model(**inputs, **own)
        terms = self._terms(model, batch, student, teacher, student_states, teacher_states)
        self.parts = {name: term.detach() for name, term in terms.items()}
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum(), student

    def _wants(self, *names: str) -> bool:
        return any(self.weights[name] for name in names)

    def _terms(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        student: Any,
        teacher: Any,
        own: Sequence[Tensor],
        theirs: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        text = mask.bool() if mask is not None and mask.ndim == 2 else None
        if self._wants("ce"):
            if labels is None:
                raise ValueError("a distillation with ce needs batches with labels; ce=0 does without")
            logits = student.logits.float()
            terms["ce"] = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
        if self._wants("kl"):
            y, t = student.logits.flatten(0, -2), teacher.logits.flatten(0, -2)
            if labels is not None and labels.numel() == len(y):
                keep = labels.flatten() != IGNORED
                y, t = y[keep], t[keep.to(t.device)]
            elif text is not None and text.numel() == len(y):
                y, t = y[text.flatten()], t[text.flatten().to(t.device)]
            terms["kl"] = logit_kl(y, t, self.temperature)
        if self._wants("relation"):
            heads = self.heads or _heads(model)
            found = [attention_relation(s, t, heads, text) for s, t in zip(own, theirs, strict=True)]
            terms["relation"] = torch.stack(found).sum()
        if self._wants("hidden", "cosine"):
            pairs = list(_paired(student.hidden_states[1:], teacher.hidden_states[1:], text))
            if self._wants("hidden"):
                terms["hidden"] = torch.stack([F.mse_loss(s, t) for s, t in pairs]).mean()
            if self._wants("cosine"):
                terms["cosine"] = torch.stack([1 - F.cosine_similarity(s, t, dim=-1).mean() for s, t in pairs]).mean()
        return terms


def _config(model: nn.Module) -> Any:
    """A model's config, also through wrappers (DistributedDataParallel, torch.compile)."""
    while not hasattr(model, "config") and isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return getattr(model, "config", None)


def _heads(model: nn.Module) -> int:
    config = _config(model)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if not heads:
        raise ValueError("the model's config does not say how many heads it has; pass heads= to Distillation")
    return heads


def _projections(model: nn.Module, layer: int) -> list[nn.Module]:
    """The modules whose outputs are queries, keys and values in one layer, in this order; or the one of the three."""
    for names in PROJECTIONS:
        found = [[m for path, m in model.named_modules() if path.split(".")[-1] == name] for name in names]
        if found[0]:
            try:
                return [modules[layer] for modules in found]
            except IndexError:
                raise ValueError(f"the model has {len(found[0])} layers of attention, so no layer {layer}") from None
    raise ValueError(
        f"relation: {type(model).__name__} has no projections that are known "
        f"({'; '.join(map(', '.join, PROJECTIONS))}); use kl, or hidden"
    )


@contextmanager
def _watched(model: nn.Module, layer: int, wanted: bool) -> Iterator[list[Tensor]]:
    """Queries, keys and values of a layer, after a forward pass inside."""
    states: list[Tensor] = []
    if not wanted:
        yield states
        return
    modules = _projections(model, layer)
    found: dict[int, Tensor] = {}

    def watch(index: int, output: Tensor) -> None:
        found[index] = output

    hooks = [
        module.register_forward_hook(lambda m, args, output, index=index: watch(index, output))
        for index, module in enumerate(modules)
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
    kept = [found[index] for index in range(len(modules))]
    states += kept if len(kept) == 3 else kept[0].chunk(3, dim=-1)


def _paired(
    student: Sequence[Tensor], teacher: Sequence[Tensor], text: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states of the tokens that are text, layer by layer; of a teacher with more layers, evenly spread ones."""
    if len(teacher) % len(student):
        raise ValueError(f"the teacher's {len(teacher)} layers are no multiple of the student's {len(student)}")
    step = len(teacher) // len(student)
    for s, t in zip(student, teacher[step - 1 :: step], strict=True):
        if s.shape != t.shape:
            raise ValueError(f"hidden states are {list(s.shape)} and the teacher's {list(t.shape)}; use kl or relation")
        s, t = s.float(), t.float().to(s.device)
        yield (s, t) if text is None else (s[text], t[text])
