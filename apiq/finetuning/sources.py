"""From a corpus or a file of prompts and answers to training examples."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from apiq.calibration.corpora import files_of, load_corpus, rows_of
from apiq.calibration.windows import consecutive_windows, tokenize
from apiq.errors import ApiqError
from apiq.finetuning.examples import Example, Examples, answer_only, repeated, split, whole
from apiq.finetuning.packing import pack
from apiq.params import FinetuneParams


def prepare(params: FinetuneParams, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Examples:
    """The examples of the task, with a share held out.

    Args:
        params: task, sources and lengths.
        tokenizer: the tokenizer of the model.
        context: longest sequence that the model takes, if it has a bound.

    Raises:
        ApiqError: `length` is beyond the context, or the source cannot be read or holds too little.
    """
    if context is not None and params.length > context:
        raise ApiqError(f"finetune.length is {params.length}; the context of the model takes at most {context} tokens.")
    examples = _pairs(params, tokenizer) if params.task == "instruction" else _language(params, tokenizer)
    return _packed(examples, params.length) if params.packing else examples


def _packed(examples: Examples, length: int) -> Examples:
    train, held_out = pack(examples.train, length), pack(examples.held_out, length)
    counts = examples.counts | {"train_sequences": len(train), "held_out_sequences": len(held_out)}
    return replace(examples, train=list(train), held_out=list(held_out), counts=counts)


def _language(params: FinetuneParams, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Windows of text that do not overlap; every token is learned."""
    assert params.text is not None  # FinetuneParams sees to it
    corpus = load_corpus(params.text, split="train", column=params.column, join=params.join)
    windows = consecutive_windows(tokenize(corpus.text, tokenizer), 0, params.length).tolist()
    train, held_out = split([whole(window) for window in windows], params.held_out, params.seed)
    counts = {
        "train_windows": len(train),
        "held_out_windows": len(held_out),
        "repeated_windows": repeated(windows),
    }
    return Examples(train, held_out, counts, {"name": _name(params.text), "sha256": corpus.sha256})


def _pairs(params: FinetuneParams, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Prompts that are read, followed by answers and end-of-sequence tokens that are learned."""
    assert params.pairs is not None  # FinetuneParams sees to it
    if tokenizer.eos_token_id is None:
        raise ApiqError(
            "the tokenizer has no end-of-sequence token, so that no answer could ever end; set its eos_token."
        )
    pairs = [
        (prompt, answer)
        for path in files_of(Path(params.pairs), (".jsonl", ".parquet"))
        for prompt, answer in rows_of(path, (params.prompt_column, params.answer_column))
    ]
    encoded = [_encode(prompt, answer, tokenizer, params.length) for prompt, answer in pairs]
    usable = [example for example, _ in encoded if example is not None]
    if not usable:
        raise ApiqError(
            f"none of the {len(pairs)} pairs in {params.pairs} has an answer that begins within its first "
            f"finetune.length={params.length} tokens; raise it, or look at the file."
        )
    train, held_out = split(usable, params.held_out, params.seed)
    counts = {
        "train_pairs": len(train),
        "held_out_pairs": len(held_out),
        "truncated_pairs": sum(cut for example, cut in encoded if example is not None),
        "dropped_pairs": len(pairs) - len(usable),
        "repeated_pairs": repeated(usable),
    }
    digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    return Examples(train, held_out, counts, {"name": _name(params.pairs), "sha256": digest})


def _name(source: str) -> str:
    """The last part of a path, or the name of a corpus as it is: the folder that it lies in concerns one machine."""
    return os.path.basename(os.path.abspath(source))


def _encode(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Example | None, bool]:
    """The example, and whether its end was cut off.

    Prompt and answer are tokenized apart, so that training sees the prompt as generation will; what
    stands between them (a space, a line break) belongs into one of the two columns.
    """
    read = tokenizer(prompt, verbose=False)["input_ids"]
    if read and read[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        read = read[:-1]
    learned = [*tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    if not answer.strip():
        return None, False
    return answer_only(read, learned, length), len(read) + len(learned) > length
