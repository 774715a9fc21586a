"""Text from a checkpoint, streamed to the terminal."""

import sys
import time
from typing import Any

import torch
from transformers import TextStreamer

from .run import Options, load_both


def generate(
    checkpoint: str,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    chat: bool = False,
    options: Options | None = None,
) -> str:
    """Continue `prompt` with the model in `checkpoint`, printing the text as it comes; returns the continuation.

    temperature 0 takes the likeliest token each time; above it, tokens are sampled. chat wraps the prompt as a
    user's turn with the checkpoint's chat template. The speed goes to standard error at the end.
    """
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"--temperature must not be negative, got {temperature}")
    model, tokenizer = load_both(checkpoint, options or Options())
    if chat:
        if not tokenizer.chat_template:
            raise ValueError(f"{checkpoint} has no chat template; leave out --chat to continue plain text")
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one character")
    if seed is not None:
        torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    if not chat:
        print(prompt, end="", flush=True)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **inputs.to(model.device),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    seconds = time.perf_counter() - start
    new = output[0, inputs["input_ids"].shape[1] :]
    print(f"[{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:.1f} tokens/s]", file=sys.stderr)
    return tokenizer.decode(new, skip_special_tokens=True)
