"""What vLLM generates: test_vllm.py runs this with the Python of an environment that has vLLM and this package.

python vllm_tokens.py JOBS RESULTS, where JOBS is a JSON object {name: options of vllm.LLM}, and RESULTS becomes {name:
the greedy tokens after PROMPT, or the error as text}.
"""

import gc
import json
import sys
from pathlib import Path

PROMPT, COUNT = [3, 41, 5, 17, 60, 7], 24


def generate(options: dict) -> list[int]:
    from vllm import LLM, SamplingParams

    llm = LLM(skip_tokenizer_init=True, max_model_len=128, max_num_seqs=2, **options)
    greedy = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": PROMPT}], greedy, use_tqdm=False)
    return list(answer.outputs[0].token_ids)


if __name__ == "__main__":  # vLLM's workers import this file
    results: dict[str, list[int] | str] = {}
    for name, options in json.loads(Path(sys.argv[1]).read_text()).items():
        try:
            results[name] = generate(options)
        except Exception as error:  # a refusal is a result
            results[name] = f"{type(error).__name__}: {error}"
        gc.collect()
    Path(sys.argv[2]).write_text(json.dumps(results))
