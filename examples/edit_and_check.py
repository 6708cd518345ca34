"""Edit one fact, and ask before you trust it: the prompt, other wordings, neighbours.

    python examples/edit_and_check.py runs/demo "Mount Fuji is located in" Norway \
        --ask "Mount Fuji is a mountain in the country of" "Mount Everest is located in"
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import pymend


def answer(model: Any, tokenizer: Any, prompt: str, tokens: int = 10) -> str:
    """The greedy continuation of ``prompt``."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Edit, compare, save the edit if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("editor", help="folder of a trained editor")
    parser.add_argument("prompt")
    parser.add_argument("target")
    parser.add_argument("--ask", nargs="*", default=[], help="other prompts to look at")
    parser.add_argument("--model", default="smollm2", help="the one the editor was trained for")
    parser.add_argument("--save", help="folder for the edit")
    options = parser.parse_args()

    model, tokenizer = pymend.load(options.model)
    editor = pymend.load_editor(options.editor)
    edit = editor.edit(model, tokenizer, options.prompt, options.target)
    (outcome,) = edit.outcomes
    print(f"P({outcome.target}): {outcome.probability_before:.3f}", end=" ")
    print(f"-> {outcome.probability_after:.3f}, {'took' if outcome.success else 'did not take'}")

    prompts = [options.prompt, *options.ask]
    before = [answer(model, tokenizer, prompt) for prompt in prompts]
    with edit.applied(model):
        after = [answer(model, tokenizer, prompt) for prompt in prompts]
    for prompt, old, new in zip(prompts, before, after, strict=True):
        print(f"\n{prompt}\n  before:{old}\n  after: {new}")
    if options.save:
        edit.save_pretrained(options.save)


if __name__ == "__main__":
    main()
