"""Let engines load Hugging Face folders as they are: transformers|vllm|lm_eval FOLDER...; the last line is JSON, by folder.

Each goes on greedily from a text, or scores its end; what vLLM and lm-eval answer, transformers answers beside them, in the same process.
"""

import json
import sys
from pathlib import Path
from typing import Any

TEXT, END = "Entry 7. A hacker's", " bug, number 49."
NEW_TOKENS = 8


def transformers_answers(folder: str) -> dict[str, Any]:
    """Return class, type and left-out weights of the model, the ids of the text, its greedy continuation, and the score of its end."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    answers: dict[str, Any] = {"class": type(model).__name__, "dtype": str(model.dtype), "missing": sorted(loading["missing_keys"])}
    model = model.float().eval()
    start, whole = tokenizer(TEXT)["input_ids"], tokenizer(TEXT + END)["input_ids"]
    ids = list(start)
    logprobs = []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
        scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    score = sum(float(scores[place - 1, whole[place]]) for place in range(len(start), len(whole)))
    return {**answers, "ids": start, "tokens": ids[len(start) :], "logprobs": logprobs, "score": score}


def vllm_answers(folder: str) -> dict[str, Any]:
    """Return what vLLM's engine goes on with."""
    from vllm import LLM, SamplingParams

    model = LLM(model=folder, max_model_len=256, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3)
    wanted = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)
    (answer,) = model.generate([TEXT], wanted, use_tqdm=False)
    (output,) = answer.outputs
    tokens = list(output.token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
    return {"ids": list(answer.prompt_token_ids), "tokens": tokens, "logprobs": logprobs}


def lm_eval_answers(folder: str) -> dict[str, Any]:
    """Return what lm-eval scores the end of the text with."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, device="cpu", batch_size=1, dtype="float32")
    request = Instance(request_type="loglikelihood", doc={}, arguments=(TEXT, END), idx=0)
    return {"score": model.loglikelihood([request], disable_tqdm=True)[0][0]}


ENGINES = {"vllm": vllm_answers, "lm_eval": lm_eval_answers}


def main() -> None:
    engine, *folders = sys.argv[1:]
    found: dict[str, Any] = {}
    for folder in folders:
        found[Path(folder).name] = {"transformers": transformers_answers(folder)}
        if engine in ENGINES:
            found[Path(folder).name][engine] = ENGINES[engine](folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
