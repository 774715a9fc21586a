"""`bitnet write`: a model writes text to be trained on, for a student that is to follow it, where there is no other.

Text begins as in LLM-QAT (arXiv 2305.17888, section 3.1): with a token drawn from the whole vocabulary, then a few that
are the likeliest, then all sampled. Conversations begin as in Magpie (arXiv 2406.08464): behind the chat template's
start of a user's turn the model writes the question itself, and then the answer.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..convert.finding import from_anywhere
from ..convert.writing import write_whole
from ..progress import Progress
from ..train.texts import prefix
from .models import runnable

GREEDY = 4  # tokens after the first that are the likeliest: LLM-QAT's 3 to 5
TURN = "\0"  # stands for a user's turn, to see what the chat template puts before it


def write(
    model: str | Path,
    out: str | Path,
    *,
    tokens: int,
    length: int = 256,
    batch: int = 32,
    chat: float = 0.0,
    temperature: float = 1.0,
    seed: int = 0,
    resume: bool = False,
    device: str | None = None,
    backend: str = "auto",
    console: Console | None = None,
) -> int:
    """Have a model write documents, one a line of a .jsonl file as {"text": ...}; returns how many tokens they have.

    model:       checkpoint folder, packed or float, or GGUF file
    tokens:      how many at least; the last batch is written whole
    length:      of a document in tokens, at most; it is shorter where the model ends it
    batch:       documents at a time
    chat:        share of batches that are conversations of one question and one answer
    temperature: of what is sampled
    seed:        batch number i is drawn with seed + i, so that a run that goes on writes what it would have written
    resume:      go on with OUT, whose settings OUT.json has; otherwise OUT must not be there

    Raises ValueError for settings that cannot be, and for others than those of the file.
    """
    out = Path(out)
    if min(tokens, batch) < 1 or length <= GREEDY + 1 or not 0 <= chat <= 1 or temperature <= 0:
        raise ValueError(
            f"--tokens and --batch must be at least 1, --length more than {GREEDY + 1}, --chat a share from 0 to 1, "
            f"--temperature positive; got {tokens}, {batch}, {length}, {chat} and {temperature}"
        )
    settings: dict[str, Any] = {"model": from_anywhere(model), "length": length, "batch": batch, "chat": chat}
    settings |= {"temperature": temperature, "seed": seed}
    beside = out.with_name(f"{out.name}.json")
    done = _written(out, beside, settings, resume)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    writer, tokenizer = runnable(model, device=device, backend=backend)
    if chat and not tokenizer.chat_template:
        raise ValueError(f"{model} has no chat template; leave out --chat for plain text")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(beside, (json.dumps(settings, indent=1) + "\n").encode())
    written = sum(_length(tokenizer, text) for text in done)
    quiet = console or Console(quiet=True)
    with (
        Progress("writing", tokens, "tokens", quiet, done=written) as progress,
        out.open("a", encoding="utf-8") as file,
        torch.inference_mode(),
        torch.random.fork_rng(),
    ):
        number = len(done) // batch
        while written < tokens:
            torch.manual_seed(seed + number)
            talks = int((number + 1) * chat) > int(number * chat)
            found = (_talk if talks else _prose)(writer, tokenizer, batch, length, temperature)
            file.write("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found))
            file.flush()
            written += sum(_length(tokenizer, text) for text in found)
            number += 1
            progress.update(written)
    return written


def _written(out: Path, beside: Path, settings: dict[str, Any], resume: bool) -> list[str]:
    """The documents of the file, cut after its last whole batch, if it may be continued; none if it is not there."""
    if not out.exists():
        return []
    if not resume:
        raise ValueError(f"{out} is there already; go on with it with --resume, or name another file")
    try:
        known = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{beside}: cannot be read ({error}); it says how {out} was written") from None
    if known != settings:
        other = [f"{name} {known.get(name)!r}" for name in settings if known.get(name) != settings[name]]
        raise ValueError(f"{out} was begun with {', '.join(other)}; go on with that, or name another file")
    lines = out.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    whole = whole[: len(whole) // settings["batch"] * settings["batch"]]
    with out.open("r+b") as file:
        file.truncate(sum(map(len, whole)))
    return [json.loads(line)["text"] for line in whole]


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _prose(model: Any, tokenizer: Any, count: int, length: int, temperature: float) -> list[str]:
    """Documents that begin with any token."""
    special = set(tokenizer.all_special_ids)
    words = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    first = words[torch.randint(len(words), (count, 1))]
    start = torch.cat([torch.tensor(prefix(tokenizer), dtype=torch.long).expand(count, -1), first], dim=1)
    start = start.to(model.device)
    begun = _continue(model, tokenizer, start, GREEDY, min_new_tokens=GREEDY, do_sample=False)
    ids = _continue(model, tokenizer, begun, length - GREEDY - 1, temperature=temperature)
    return [_text(tokenizer, row) for row in ids.tolist()]


def _talk(model: Any, tokenizer: Any, count: int, length: int, temperature: float) -> list[str]:
    """Conversations: the model's own questions, and its answers."""
    shown = tokenizer.apply_chat_template([{"role": "user", "content": TURN}], tokenize=False)
    before = shown.partition(TURN)[0]
    start = tokenizer([before] * count, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    asked = _continue(model, tokenizer, start, max(GREEDY, length // 4), temperature=temperature, min_new_tokens=GREEDY)
    questions = tokenizer.batch_decode(asked[:, start.shape[1] :], skip_special_tokens=True)
    turns = [[{"role": "user", "content": question.strip()}] for question in questions]
    shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    rows = tokenizer(shown, add_special_tokens=False)["input_ids"]
    longest = max(map(len, rows))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    padded = torch.tensor([[_pad(tokenizer)] * (longest - len(row)) + row for row in rows], device=model.device)
    ids = _continue(model, tokenizer, padded, length, temperature=temperature, attention_mask=mask)
    answers = [_text(tokenizer, row) for row in ids[:, longest:].tolist()]
    begin = tokenizer.decode(prefix(tokenizer))  # training puts it there by itself
    return [text.removeprefix(begin) + answer for text, answer in zip(shown, answers, strict=True)]


def _continue(model: Any, tokenizer: Any, ids: Tensor, new: int, **options: Any) -> Tensor:
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "attention_mask": torch.ones_like(ids), **options}
    if not options["do_sample"]:
        options |= {"top_k": None, "top_p": None, "temperature": None}
    made: Tensor = model.generate(ids, max_new_tokens=new, pad_token_id=_pad(tokenizer), **options)
    return made


def _pad(tokenizer: Any) -> int:
    """What follows a document's end in a batch."""
    found: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return found


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    """A document without the tokens that training puts around it."""
    begin = prefix(tokenizer)
    ids = list(ids[len(begin) :] if list(ids[: len(begin)]) == begin else ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    text: str = tokenizer.decode(ids)
    return text
